"""Unit-scaled modules, drop-in for their `flax.nnx` namesakes."""

from .conv import (
    Conv as Conv,
    ConvTranspose as ConvTranspose,
)
from .linear import (
    Embed as Embed,
    Linear as Linear,
    LinearGeneral as LinearGeneral,
    LinearReadout as LinearReadout,
)
from .normalization import (
    BatchNorm as BatchNorm,
    Dropout as Dropout,
    GroupNorm as GroupNorm,
    LayerNorm as LayerNorm,
    RMSNorm as RMSNorm,
)
from .transformer import (
    MLP as MLP,
    MultiHeadAttention as MultiHeadAttention,
    TransformerBlock as TransformerBlock,
)
