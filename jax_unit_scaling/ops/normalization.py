"""Norms: their output has unit scale by construction."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ..arguments import axes_of, check_broadcast, checked
from ..op import AxisName, Factors, Zeros, case, check_bound, scaled_op

Axes = int | Sequence[int]


def _norm_rule(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    where: Any = None,
    *,
    axis: Axes = -1,
    axis_name: AxisName | None,
    **_: Any,
) -> Factors:
    check_bound("axis_name", axis_name)
    if not x.shape:
        raise ValueError("`x` must have an axis to normalise over, got a scalar.")
    axes_of("axis", axis, len(x.shape))
    affine = {"scale": scale, "bias": bias}
    for name, p in {**affine, "where": where}.items():
        check_broadcast(name, p, x.shape)
    if where is not None and where.dtype != jnp.bool_:
        raise TypeError(f"`where` must be an array of booleans, got {where.dtype}.")
    size = max(math.prod(x.shape), 1)
    bwd = {
        name: math.sqrt(max(math.prod(p.shape), 1) / size)
        for name, p in affine.items()
        if p is not None
    }
    return Factors(1.0, {"x": 1.0, **bwd})


def _rms_rule(x: Any, scale: Any = None, where: Any = None, **options: Any) -> Factors:
    return _norm_rule(x, scale, None, where, **options)


# The cotangent of x loses its projections on x (and on a constant): its rms falls short
# by 1/n (or 2/n), within the 0.05 that is promised above 40 features.
@scaled_op(
    rule=_norm_rule,
    parameters=("scale", "bias"),
    cases=(
        case((256, 128)),
        case((4, 32, 4096), (4096,), Zeros((4096,))),
        case((8, 3, 4096), (4096,), Zeros((4096,)), axis=(0, 1, 2)),
        case((16, 64, 5, 64), (64, 1, 64), Zeros((64, 1, 64)), axis=(1, 2)),
    ),
)
def layer_norm(
    x: Float[Array, "..."],
    scale: Float[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled layer norm; statistics in float32 at least.

    Args:
        x: of any shape.
        scale, bias: broadcastable to `x`: [features] where these are the last axis.
        where: broadcastable to `x`; statistics are taken where it is true, and all of
            `x` is normalised by them.
        axis: what statistics are taken over: several axes for an instance norm.
        epsilon: is added to the variance.
        axis_name, axis_index_groups: gather statistics over devices that hold pieces
            of `axis`, as `jax.lax.pmean` does.
        batch_axis_name: the named axes that split the batch of `scale` and `bias`.

    Factors: 1 forward and for `x`, batch^-1/2 for `scale` and `bias`, each of whose
    elements multiplies, or is added to, so many of `x`. `where` and named axes change
    which numbers are averaged, not the scale of what comes out, and so no factor.

    Reference: Unit Scaling (Blake et al., 2023), table A.2.
    """
    axes = axes_of("axis", axis, x.ndim)
    mean = _averager(axes, where, axis_name, axis_index_groups)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - mean(wide)
    y = centred * lax.rsqrt(mean(lax.square(centred)) + epsilon)
    return _affine(y, x, scale, bias)


@scaled_op(
    rule=_rms_rule,
    parameters=("scale",),
    cases=(
        case((256, 128)),
        case((4, 32, 4096), (4096,)),
        case((16, 64, 5, 64), (64, 1, 64), axis=(1, 2)),
    ),
)
def rms_norm(
    x: Float[Array, "..."],
    scale: Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled RMS norm; statistics in float32 at least. Arguments: `layer_norm`'s.

    Factors: 1 forward and for `x`, batch^-1/2 for `scale`.
    """
    axes = axes_of("axis", axis, x.ndim)
    mean = _averager(axes, where, axis_name, axis_index_groups)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = wide * lax.rsqrt(mean(lax.square(wide)) + epsilon)
    return _affine(y, x, scale, None)


def _group_norm_rule(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    where: Any = None,
    *,
    num_groups: int | None,
    group_size: int | None,
    axis: Axes | None,
    **options: Any,
) -> Factors:
    _groups(x, num_groups, group_size)
    _group_axes(x, axis)
    return _norm_rule(x, scale, bias, where, **options)


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


def _group_axes(x: Any, axis: Axes | None) -> tuple[int, ...]:
    """What statistics are taken over, once the channels are [groups, group size]."""
    last = len(x.shape) - 1
    every = range(1, last + 1)
    axes = every if axis is None else sorted(axes_of("axis", axis, last + 1))
    if last not in axes:
        raise ValueError(
            f"`axis` must hold the channels' axis, the last, got {axis} for `x` of "
            f"shape {x.shape}."
        )
    return (*axes[:-1], last + 1)


# As above, n being the positions of an example times the channels of a group.
@scaled_op(
    rule=_group_norm_rule,
    parameters=("scale", "bias"),
    cases=(
        case((16, 4, 5, 64), num_groups=4),
        case((4, 8, 4096), (4096,), Zeros((4096,)), num_groups=None, group_size=128),
        case((4, 8, 6, 256), num_groups=2, axis=(2, -1)),
    ),
)
def group_norm(
    x: Float[Array, "..."],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    where: Bool[Array, "..."] | None = None,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    axis: Axes | None = None,
    epsilon: float = 1e-6,
    axis_name: AxisName | None = None,
    axis_index_groups: Any = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled group norm of x [batch, *spatial, channels], over the positions of an
    example and a group's channels.

    Statistics in float32 at least. There are `num_groups`, or groups of `group_size`
    channels. `axis`, by default all but the first, has to hold the last. `where` and
    the named axes: as in `layer_norm`. Factors as there, the positions being part of
    the batch: 1 forward and for `x`, (batch positions)^-1/2 for `scale` and `bias`.
    """
    groups = _groups(x, num_groups, group_size)
    shape = (*x.shape[:-1], groups, x.shape[-1] // groups)
    if where is not None:
        where = jnp.broadcast_to(where, x.shape).reshape(shape)
    mean = _averager(_group_axes(x, axis), where, axis_name, axis_index_groups)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(shape)
    centred = wide - mean(wide)
    y = centred * lax.rsqrt(mean(lax.square(centred)) + epsilon)
    return _affine(y.reshape(x.shape), x, scale, bias)


def _averager(
    axes: tuple[int, ...],
    where: Array | None,
    axis_name: AxisName | None,
    axis_index_groups: Any,
) -> Callable[[Array], Array]:
    """The mean over axes, where a mask is true, and over devices."""

    def mean(x: Array) -> Array:
        y = jnp.mean(x, axes, keepdims=True, where=where)
        if axis_name is None:
            return y
        return lax.pmean(y, axis_name, axis_index_groups=axis_index_groups)

    return mean


def _affine(y: Array, x: Array, scale: Array | None, bias: Array | None) -> Array:
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.astype(jnp.result_type(x, *(p for p in (scale, bias) if p is not None)))


@checked
def spectral_norm(
    kernel: Float[Array, "*in out"],
    u: Float[Array, "1 out"],
    *,
    n_steps: int = 1,
    epsilon: float = 1e-12,
) -> tuple[Float[Array, "*in out"], Float[Array, "1 out"], Float[Array, ""]]:
    """`kernel` with the spectral norm that a matrix of unit-normal numbers has.

    Power iteration from `u` improves the largest singular value, sigma, by `n_steps`.
    Returns the kernel (sqrt(m) + sqrt(n)) / sigma, all axes but the last being the m
    rows of a matrix; and u and sigma, which get no gradient. So a unit-normal kernel
    stays as it is, and its gradient with it, but for the component along sigma.

    Raises:
        ValueError: if `u` is not [1, out], or there is no step.

    Reference: Spectral normalization (Miyato et al., 2018), section 2.1; the limit of
    the largest singular value is that of Bai & Yin (1988).
    """
    if not kernel.shape or u.shape != (1, kernel.shape[-1]):
        raise ValueError(
            "`u` must be [1, out] for a `kernel` [*in, out], got shapes "
            f"{u.shape} and {kernel.shape}."
        )
    if n_steps < 1:
        raise ValueError(f"`n_steps` must be 1 or more, got {n_steps}.")
    matrix = kernel.reshape(-1, kernel.shape[-1])
    for _ in range(n_steps):
        v = _normalised(u @ matrix.T, epsilon)
        u = _normalised(v @ matrix, epsilon)
    u, v = lax.stop_gradient((u, v))
    sigma = (v @ matrix @ u.T)[0, 0]
    expected = math.sqrt(matrix.shape[0]) + math.sqrt(matrix.shape[1])
    y = kernel * (expected / jnp.where(sigma == 0, 1, sigma))
    return y, u, lax.stop_gradient(sigma)


def _normalised(x: Array, epsilon: float) -> Array:
    return x * lax.rsqrt(jnp.sum(x * x, keepdims=True) + epsilon)
