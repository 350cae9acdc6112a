"""Unit-scaled modules, drop-in for their `flax.nnx` namesakes."""

from ..layers.left_out import LEFT_OUT as LEFT_OUT
from ..layers.transformer import (
    branch_norm as branch_norm,
    post_norm as post_norm,
    pre_norm as pre_norm,
)
from .activation import (
    PReLU as PReLU,
)
from .conv import (
    Conv as Conv,
    ConvTranspose as ConvTranspose,
)
from .convert import (
    COUNTERPARTS as COUNTERPARTS,
    Counterpart as Counterpart,
    convert as convert,
)
from .depth import (
    set_depth as set_depth,
)
from .linear import (
    Einsum as Einsum,
    Embed as Embed,
    Linear as Linear,
    LinearGeneral as LinearGeneral,
    LinearReadout as LinearReadout,
)
from .lora import (
    LoRA as LoRA,
    LoRALinear as LoRALinear,
)
from .moe import (
    ExpertLinear as ExpertLinear,
    MoE as MoE,
)
from .normalization import (
    BatchNorm as BatchNorm,
    Dropout as Dropout,
    GroupNorm as GroupNorm,
    InstanceNorm as InstanceNorm,
    LayerNorm as LayerNorm,
    RMSNorm as RMSNorm,
)
from .recurrent import (
    RNN as RNN,
    Bidirectional as Bidirectional,
    GRUCell as GRUCell,
    LSTMCell as LSTMCell,
    OptimizedLSTMCell as OptimizedLSTMCell,
    RecurrentHighwayCell as RecurrentHighwayCell,
    SimpleCell as SimpleCell,
)
from .transformer import (
    MLP as MLP,
    MultiHeadAttention as MultiHeadAttention,
    TransformerBlock as TransformerBlock,
    TransformerStack as TransformerStack,
)
from .weight_norm import (
    SpectralNorm as SpectralNorm,
    WeightNorm as WeightNorm,
)
