"""Unit-scaled modules, drop-in for their `flax.linen` namesakes."""

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
from .linear import (
    Dense as Dense,
    DenseGeneral as DenseGeneral,
    DenseReadout as DenseReadout,
    Einsum as Einsum,
    Embed as Embed,
    LoRA as LoRA,
    LoRADense as LoRADense,
)
from .metadata import (
    Parameter as Parameter,
    at_depth as at_depth,
    set_depth as set_depth,
    with_metadata as with_metadata,
)
from .moe import (
    ExpertDense as ExpertDense,
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
    ConvLSTMCell as ConvLSTMCell,
    GRUCell as GRUCell,
    LSTMCell as LSTMCell,
    MGUCell as MGUCell,
    OptimizedLSTMCell as OptimizedLSTMCell,
    RecurrentHighwayCell as RecurrentHighwayCell,
    SimpleCell as SimpleCell,
)
from .transformer import (
    MLP as MLP,
    MultiHeadAttention as MultiHeadAttention,
    MultiHeadDotProductAttention as MultiHeadDotProductAttention,
    TransformerBlock as TransformerBlock,
    TransformerStack as TransformerStack,
)
from .weight_norm import (
    SpectralNorm as SpectralNorm,
    WeightNorm as WeightNorm,
)
