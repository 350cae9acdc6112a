"""Unit scaling for JAX and Flax: low-precision training that works out of the box."""

import importlib
from typing import TYPE_CHECKING, Any

from . import (
    analysis as analysis,
    compiled as compiled,
    formats as formats,
    fp8 as fp8,
    nnx as nnx,
    optim as optim,
)
from .compiled import (
    CompiledProduct as CompiledProduct,
    CompiledProducts as CompiledProducts,
    assert_fp8 as assert_fp8,
    fp8_products as fp8_products,
    jit as jit,
)
from .constraints import (
    amean as amean,
    gmean as gmean,
    hmean as hmean,
    to_grad_input_scale as to_grad_input_scale,
    to_left_grad_scale as to_left_grad_scale,
    to_output_scale as to_output_scale,
    to_right_grad_scale as to_right_grad_scale,
)
from .formats import (
    BF16 as BF16,
    E4M3 as E4M3,
    E5M2 as E5M2,
    FP16 as FP16,
    FP32 as FP32,
    MUNIT_FP8 as MUNIT_FP8,
    NATIVE_FP8 as NATIVE_FP8,
    SIMULATED_FP8 as SIMULATED_FP8,
    UMUP_FP8 as UMUP_FP8,
    BlockFormats as BlockFormats,
    Format as Format,
    Formats as Formats,
    quantize as quantize,
    quantize_bwd as quantize_bwd,
    quantize_fwd as quantize_fwd,
)
from .ops.activation import (
    celu as celu,
    elu as elu,
    gelu as gelu,
    gelu_glu as gelu_glu,
    hard_tanh as hard_tanh,
    leaky_relu as leaky_relu,
    mish as mish,
    prelu as prelu,
    relu as relu,
    selu as selu,
    sigmoid as sigmoid,
    silu as silu,
    silu_glu as silu_glu,
    softplus as softplus,
    squareplus as squareplus,
    tanh as tanh,
    unit_scaled as unit_scaled,
)
from .ops.arithmetic import (
    add as add,
    mean as mean,
    multiply as multiply,
    sum as sum,
    weighted_add as weighted_add,
)
from .ops.attention import (
    dot_product_attention as dot_product_attention,
    rotary as rotary,
    softmax as softmax,
)
from .ops.contraction import (
    dot_general as dot_general,
    einsum as einsum,
    einsum_linear as einsum_linear,
    linear as linear,
    linear_readout as linear_readout,
    matmul as matmul,
    ragged_dot as ragged_dot,
)
from .ops.conv import (
    conv as conv,
    conv_transpose as conv_transpose,
)
from .ops.dropout import (
    dropout as dropout,
)
from .ops.embedding import (
    embedding as embedding,
)
from .ops.loss import (
    binary_cross_entropy as binary_cross_entropy,
    cross_entropy as cross_entropy,
    huber_loss as huber_loss,
    kl_divergence as kl_divergence,
    mse_loss as mse_loss,
)
from .ops.moe import (
    RouterLosses as RouterLosses,
    mixture_of_experts as mixture_of_experts,
)
from .ops.normalization import (
    group_norm as group_norm,
    layer_norm as layer_norm,
    rms_norm as rms_norm,
    spectral_norm as spectral_norm,
)
from .ops.pooling import (
    avg_pool as avg_pool,
    max_pool as max_pool,
)
from .ops.recurrent import (
    gated as gated,
    gated_carry as gated_carry,
)
from .ops.residual import (
    fixed_residual_rule as fixed_residual_rule,
    residual_add as residual_add,
    residual_apply as residual_apply,
    residual_split as residual_split,
    running_mean_residual_rule as running_mean_residual_rule,
    transformer_residual_rule as transformer_residual_rule,
)
from .scale import (
    scale_bwd as scale_bwd,
    scale_fwd as scale_fwd,
    scaled as scaled,
)
from .transforms.audit import (
    Audit as Audit,
    audit_gradients as audit_gradients,
)
from .transforms.cut_edges import (
    CutEdges as CutEdges,
    cut_edges as cut_edges,
)
from .transforms.simulate import (
    Product as Product,
    products as products,
    simulate_format as simulate_format,
    simulate_fp8 as simulate_fp8,
)
from .transforms.track import (
    Scales as Scales,
    track_scales as track_scales,
    track_value_and_grad as track_value_and_grad,
)
from .transforms.unit_scale import (
    Held as Held,
    UnitScaled as UnitScaled,
    unit_scale as unit_scale,
)

# A Linen module is a dataclass, whose methods are compiled at import: as many as these
# take as long as all the rest. So `linen` is imported when it is first used.
if TYPE_CHECKING:
    from . import linen as linen


def __getattr__(name: str) -> Any:
    if name == "linen":
        return importlib.import_module(".linen", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "linen"})
