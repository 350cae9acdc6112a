"""Norms and dropout, drop-in for their `flax.linen` namesakes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from ..arguments import axes_of
from ..layers.normalization import (
    apply_norm,
    check_batch_norm,
    instance_axes,
    scaled_affine,
    tuple_of_axes,
)
from ..op import AxisName
from ..ops.dropout import dropout
from ..ops.normalization import group_norm, layer_norm, rms_norm
from ..parameters import Role
from .linear import Checked
from .metadata import mapped, with_role
from .names import named


class LayerNorm(nn.LayerNorm, Checked):
    """`flax.linen.LayerNorm`, computed by `layer_norm`.

    All norms take the arguments of their namesakes and `batch_axis_name`, the named
    axes that split the batch of gain and bias. Their statistics are in float32 at
    least, and their variance is never the fast one.
    """

    axis_name: AxisName | None = None  # type: ignore[assignment]
    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return _apply(self, layer_norm, x, mask, axis=self.reduction_axes)


class RMSNorm(nn.RMSNorm, Checked):
    """`flax.linen.RMSNorm`, computed by `rms_norm`: see `LayerNorm`."""

    axis_name: AxisName | None = None  # type: ignore[assignment]
    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return _apply(self, rms_norm, x, mask, axis=self.reduction_axes)


class InstanceNorm(nn.InstanceNorm, Checked):
    """`flax.linen.InstanceNorm`, computed by `layer_norm`: see `LayerNorm`.

    Statistics are over all axes but the first and `feature_axes`.
    """

    axis_name: AxisName | None = None  # type: ignore[assignment]
    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        axis = instance_axes(x, self.feature_axes)
        return _apply(self, layer_norm, x, mask, axis=axis)


class GroupNorm(nn.GroupNorm, Checked):
    """`flax.linen.GroupNorm`, computed by `group_norm`: see `LayerNorm`.

    Its `reduction_axes` may leave out any axis but the last.
    """

    axis_name: AxisName | None = None  # type: ignore[assignment]
    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return _apply(
            self,
            group_norm,
            x,
            mask,
            axis=self.reduction_axes,
            num_groups=self.num_groups,
            group_size=self.group_size,
        )


def _apply(
    norm: Any, op: Any, x: jax.Array, mask: jax.Array | None, **options: Any
) -> jax.Array:
    """Parameters and promotion, and one call into ops."""
    feature_axes = getattr(norm, "feature_axes", -1)
    shape = tuple(x.shape[a] for a in sorted(tuple_of_axes(x.ndim, feature_axes)))
    roles: dict[str, Role] = {"scale": "norm", "bias": "bias"}

    def parameter(name: str) -> jax.Array | None:
        if not getattr(norm, f"use_{name}"):
            return None
        init = with_role(getattr(norm, f"{name}_init"), roles[name])
        return norm.param(name, init, shape, norm.param_dtype)

    names = [name for name in roles if hasattr(norm, f"use_{name}")]
    x, *affine = promote_dtype(x, *map(parameter, names), dtype=norm.dtype)
    return apply_norm(
        named(norm), op, x, mask, *affine, feature_axes=feature_axes, **options
    )


class BatchNorm(nn.BatchNorm, Checked):
    """`flax.linen.BatchNorm`, whose output has unit scale already.

    Factors: 1 forward and for the input, batch^-1/2 for gain and bias, with all axes
    but the channels' in the batch. `axis_name` gathers the statistics of several
    devices, as ever; name the axes that split the batch in `batch_axis_name` as well.
    """

    axis: int | Sequence[int] = -1  # type: ignore[assignment]
    axis_name: AxisName | None = None  # type: ignore[assignment]
    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        still = self.use_running_average
        still = still if use_running_average is None else use_running_average
        check_batch_norm(named(self), x, still)
        features = math.prod(x.shape[a] for a in axes_of("axis", self.axis, x.ndim))

        def with_factors(params: Any) -> Any:
            leaves, structure = jax.tree.flatten(params)
            scaled = scaled_affine(leaves, x, features, named(self).batch_axis_name)
            return jax.tree.unflatten(structure, scaled)

        plain = mapped(nn.BatchNorm.__call__, with_factors)
        return plain(self, x, use_running_average, mask=mask)

    def param(self, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Parameters are made by Flax's own code; here they get their roles."""
        init = with_role(init_fn, "bias" if name == "bias" else "norm")
        return super().param(name, init, *args, **kwargs)


class Dropout(nn.Dropout, Checked):
    """`flax.linen.Dropout`, computed by `dropout`: keeps the scale, not the mean."""

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        deterministic = nn.merge_param(
            "deterministic", self.deterministic, deterministic
        )
        if self.rate == 0.0 or deterministic:
            return inputs
        if self.rate == 1.0:
            return jnp.zeros_like(inputs)
        key = self.make_rng(self.rng_collection) if rng is None else rng
        dims = tuple(d % inputs.ndim for d in self.broadcast_dims)
        return dropout(inputs, key, rate=self.rate, broadcast_dims=dims)
