"""What norms of both families do once their parameters are there."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..arguments import axes_of
from ..op import AxisName, axis_size, check_bound
from ..ops.normalization import rms_norm
from ..scale import check_floating, scaled


def tuple_of_axes(rank: int, axes: int | Sequence[int]) -> tuple[int, ...]:
    """A layer's `feature_axes`, counted from 0."""
    return axes_of("feature_axes", axes, rank)


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
    if options["axis"] is not None:
        options["axis"] = axes_of("reduction_axes", options["axis"], x.ndim)
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


def instance_axes(x: jax.Array, feature_axes: int | Sequence[int]) -> tuple[int, ...]:
    """What an instance norm takes statistics over: all but the first and the features.

    Raises:
        ValueError: if the first axis, the batch's, is a feature.
    """
    features = tuple_of_axes(x.ndim, feature_axes)
    if 0 in features:
        raise ValueError(
            "`feature_axes` must leave out the first axis, the batch's, got "
            f"{feature_axes} for an input of shape {x.shape}."
        )
    return tuple(a for a in range(1, x.ndim) if a not in features)


def normalised_weight(
    kernel: jax.Array, scale: jax.Array | None, features: Sequence[int], epsilon: float
) -> jax.Array:
    """scale * v / rms(v) for each feature, along the axes `features`."""
    axes = tuple(a for a in range(kernel.ndim) if a not in features)
    if scale is not None:
        shape = [n if a in features else 1 for a, n in enumerate(kernel.shape)]
        scale = scale.reshape(shape)
    # Flax adds epsilon to a sum of so many squares, of which this is the mean.
    terms = math.prod(kernel.shape[a] for a in axes)
    return rms_norm(kernel, scale, axis=axes, epsilon=epsilon / terms)


def check_batch_norm(norm: Any, x: jax.Array, use_running_average: bool | None) -> None:
    """Refuses what Flax's own code would not say by name.

    Raises:
        TypeError: if `x` is not floating point.
        ValueError: if `axis` names no axis of `x`, its channels are not as many as
            there are statistics, or `axis_name`, where it is used, names none.
    """
    check_floating("x", x.dtype)
    axes = axes_of("axis", norm.axis, x.ndim)
    channels = math.prod(x.shape[a] for a in axes)
    expected = getattr(norm, "num_features", channels)
    if channels != expected:
        raise ValueError(
            f"`x` must have `num_features` = {expected} channels along `axis` "
            f"{norm.axis}, got shape {x.shape}."
        )
    if not use_running_average:
        check_bound("axis_name", norm.axis_name)


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
