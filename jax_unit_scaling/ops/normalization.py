"""Norms: their output has unit scale by construction."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..op import AxisName, Factors, Zeros, case, scaled_op


def _norm_rule(
    x: Any, scale: Any = None, bias: Any = None, *, epsilon: float, **_: Any
) -> Factors:
    if epsilon < 0:
        raise ValueError(f"`epsilon` must be 0 or more, got {epsilon}.")
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


def _rms_rule(x: Any, scale: Any = None, **options: Any) -> Factors:
    factors = _norm_rule(x, scale, **options)
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


def _group_norm_rule(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    num_groups: int | None,
    group_size: int | None,
    **options: Any,
) -> Factors:
    _groups(x, num_groups, group_size)
    return _norm_rule(x, scale, bias, **options)


def _groups(x: Any, num_groups: int | None, group_size: int | None) -> int:
    if len(x.shape) < 2:
        raise ValueError(f"`x` must be [batch, ..., channels], got shape {x.shape}.")
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "pass one of `num_groups` and `group_size`, with `num_groups=None` for the "
            f"second, got {num_groups} and {group_size}."
        )
    channels, divisor = x.shape[-1], num_groups or group_size or 0
    if 0 in x.shape[1:]:
        raise ValueError(
            f"`x` must have one position and one channel or more, got shape {x.shape}."
        )
    if divisor < 1 or channels % divisor:
        name = "num_groups" if num_groups is not None else "group_size"
        raise ValueError(
            f"`{name}` must divide the {channels} channels of `x`, got {divisor}."
        )
    return num_groups or channels // divisor


# As above, n being the positions of an example times the channels of a group.
@scaled_op(
    rule=_group_norm_rule,
    parameters=("scale", "bias"),
    cases=(
        case((16, 4, 5, 64), num_groups=4),
        case((4, 8, 4096), (4096,), Zeros((4096,)), num_groups=None, group_size=128),
    ),
)
def group_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    epsilon: float = 1e-6,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "batch *spatial channels"]:
    """Unit-scaled group norm, over the positions of an example and a group's channels.

    Statistics in float32 at least. There are `num_groups`, or groups of `group_size`
    channels. Factors as `layer_norm`, the positions being part of the batch: 1 forward
    and for `x`, (batch positions)^-1/2 for `scale` and `bias`.
    """
    groups = _groups(x, num_groups, group_size)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    grouped = wide.reshape(
        x.shape[0], math.prod(x.shape[1:-1]), groups, x.shape[-1] // groups
    )
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    y = centred * lax.rsqrt(
        jnp.mean(lax.square(centred), (1, 3), keepdims=True) + epsilon
    )
    return _affine(y.reshape(x.shape), x, scale, bias)


def _normalise(
    wide: Array,
    x: Array,
    scale: Array | None,
    epsilon: float,
    bias: Array | None = None,
) -> Array:
    y = wide * lax.rsqrt(jnp.mean(lax.square(wide), -1, keepdims=True) + epsilon)
    return _affine(y, x, scale, bias)


def _affine(y: Array, x: Array, scale: Array | None, bias: Array | None) -> Array:
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.astype(jnp.result_type(x, *(p for p in (scale, bias) if p is not None)))
