"""Unit-scaled modules, drop-in for their `flax.nnx` namesakes."""

from .linear import (
    Embed as Embed,
    Linear as Linear,
    LinearGeneral as LinearGeneral,
    LinearReadout as LinearReadout,
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
    TransformerStack as TransformerStack,
    branch_norm as branch_norm,
    post_norm as post_norm,
    pre_norm as pre_norm,
)
