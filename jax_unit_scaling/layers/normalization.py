"""What norms of both families check, and the factors of a plain norm's parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..op import AxisName, axis_size
from ..scale import scaled


def check_axes(norm: Any) -> None:
    """Refuses statistics over anything but the last axis of one example."""
    for name in ("reduction_axes", "feature_axes"):
        if getattr(norm, name) not in (-1, (-1,)):
            raise ValueError(
                f"`{name}` must be -1, the last axis, got {getattr(norm, name)}."
            )
    check_axis_name(norm)


def check_group_axes(norm: Any) -> None:
    """Refuses a group norm over part of an example."""
    check_axis_name(norm)
    if norm.reduction_axes is not None:
        raise ValueError(
            "`reduction_axes` must be None, every axis but the first, got "
            f"{norm.reduction_axes}: reshape the input to one batch axis."
        )


def check_axis_name(norm: Any) -> None:
    """Refuses statistics over devices."""
    if norm.axis_name is not None:
        raise ValueError("`axis_name` must be None: statistics are over one example.")


def check_mask(mask: jax.Array | None) -> None:
    """Refuses a mask."""
    if mask is not None:
        raise ValueError(
            "`mask` must be None: a masked norm has no factor that is known while "
            "tracing."
        )


def tuple_of_axes(rank: int, axes: int | Sequence[int]) -> tuple[int, ...]:
    """Axes of an array of this rank, counted from 0."""
    return tuple(a % rank for a in ((axes,) if isinstance(axes, int) else axes))


def apply_norm(
    norm: Any,
    op: Callable[..., jax.Array],
    x: jax.Array,
    mask: jax.Array | None,
    *parameters: jax.Array | None,
    feature_axes: int | Sequence[int] = -1,
    **options: Any,
) -> jax.Array:
    """One call into ops, with gain and bias along `feature_axes`, and Flax's mask."""
    features = tuple_of_axes(x.ndim, feature_axes)
    shape = [n if i in features else 1 for i, n in enumerate(x.shape)]
    return op(
        x,
        *(None if p is None else p.reshape(shape) for p in parameters),
        None if mask is None else mask.astype(jnp.bool_),
        epsilon=norm.epsilon,
        axis_name=norm.axis_name,
        axis_index_groups=norm.axis_index_groups,
        batch_axis_name=norm.batch_axis_name,
        **options,
    )


def scaled_affine(
    parameters: Sequence[jax.Array | None],
    x: jax.Array,
    features: int,
    batch_axis_name: AxisName | None,
) -> tuple[jax.Array | None, ...]:
    """Gain and bias of a plain norm of `x` with so many features, with batch^-1/2.

    In float32 at least, as the statistics: float16 could not hold a sum over the batch.
    """
    batch = max(x.size // max(features, 1), 1) * axis_size(batch_axis_name)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return tuple(
        None if p is None else scaled(p.astype(wide), bwd=batch**-0.5)
        for p in parameters
    )
