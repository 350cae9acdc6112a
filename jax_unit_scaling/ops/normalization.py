"""Norms: their output has unit scale by construction."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..op import AxisName, Factors, Zeros, case, scaled_op


def _norm_rule(x: Any, scale: Any = None, bias: Any = None, **_: Any) -> Factors:
    if not x.shape:
        raise ValueError("`x` must have an axis to normalise over, got a scalar.")
    for name, p in (("scale", scale), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(
                f"`{name}` must have the shape {x.shape[-1:]} of `x`'s last axis, got "
                f"{p.shape} for `x` of shape {x.shape}."
            )
    batch = math.prod(x.shape[:-1])
    shared = batch**-0.5 if batch else 1.0
    return Factors(1.0, {"x": 1.0, "scale": shared, "bias": shared})


def _rms_rule(x: Any, scale: Any = None, **_: Any) -> Factors:
    factors = _norm_rule(x, scale)
    return Factors(factors.fwd, {k: factors.bwd[k] for k in ("x", "scale")})


# The cotangent of x loses its projections on x (and on a constant): its rms falls short
# by 1/n (or 2/n), within the 0.05 that is promised above 40 features.
@scaled_op(
    rule=_norm_rule,
    parameters=("scale", "bias"),
    cases=(case((256, 128)), case((4, 32, 4096), (4096,), Zeros((4096,)))),
)
def layer_norm(
    x: Float[Array, "..."],
    scale: Float[Array, " n"] | None = None,
    bias: Float[Array, " n"] | None = None,
    *,
    epsilon: float = 1e-6,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled layer norm over the last axis; statistics in float32 at least.

    Factors: 1 forward and for `x`, batch^-1/2 for `scale` and `bias`.

    Reference: Unit Scaling (Blake et al., 2023), table A.2.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    return _normalise(centred, x, scale, epsilon, bias)


@scaled_op(
    rule=_rms_rule,
    parameters=("scale",),
    cases=(case((256, 128)), case((4, 32, 4096), (4096,))),
)
def rms_norm(
    x: Float[Array, "..."],
    scale: Float[Array, " n"] | None = None,
    *,
    epsilon: float = 1e-6,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled RMS norm over the last axis; statistics in float32 at least.

    Factors: 1 forward and for `x`, batch^-1/2 for `scale`.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return _normalise(wide, x, scale, epsilon)


def _normalise(
    wide: Array,
    x: Array,
    scale: Array | None,
    epsilon: float,
    bias: Array | None = None,
) -> Array:
    y = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.astype(jnp.result_type(x, *(p for p in (scale, bias) if p is not None)))
