"""Unit-scaled modules, drop-in for their `flax.nnx` namesakes."""

from .convert import (
    convert as convert,
)
from .linear import (
    Einsum as Einsum,
    Embed as Embed,
    Linear as Linear,
    LinearGeneral as LinearGeneral,
    LinearReadout as LinearReadout,
)
from .moe import (
    ExpertLinear as ExpertLinear,
    MoE as MoE,
)
from .normalization import (
    Dropout as Dropout,
    LayerNorm as LayerNorm,
    RMSNorm as RMSNorm,
)
from .transformer import (
    MLP as MLP,
    MultiHeadAttention as MultiHeadAttention,
    TransformerBlock as TransformerBlock,
)
