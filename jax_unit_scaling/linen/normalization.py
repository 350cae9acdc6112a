"""Norms and dropout, drop-in for their `flax.linen` namesakes."""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from ..layers.normalization import (
    check_axes,
    check_group_axes,
    check_mask,
    scaled_affine,
)
from ..op import AxisName
from ..ops.dropout import dropout
from ..ops.normalization import group_norm, layer_norm, rms_norm
from .metadata import mapped, with_role


class LayerNorm(nn.LayerNorm):
    """`flax.linen.LayerNorm` over the last axis, computed by `layer_norm`.

    Statistics are taken in float32 at least, of the centred input, whatever
    `use_fast_variance` and `force_float32_reductions` say.
    """

    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        check_axes(self)
        return _apply(self, layer_norm, x, mask)


class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm` over the last axis, computed by `rms_norm`.

    Statistics: as in `LayerNorm`.
    """

    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        check_axes(self)
        return _apply(self, rms_norm, x, mask)


class GroupNorm(nn.GroupNorm):
    """`flax.linen.GroupNorm` of [batch, ..., channels], computed by `group_norm`.

    Statistics: as in `LayerNorm`.
    """

    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        check_group_axes(self)
        op = ft.partial(
            group_norm, num_groups=self.num_groups, group_size=self.group_size
        )
        return _apply(self, op, x, mask)


def _apply(norm: Any, op: Any, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Parameters and promotion, and one call into ops."""
    check_mask(mask)
    arrays = [x]
    if norm.use_scale:
        init = with_role(norm.scale_init, "norm")
        arrays.append(norm.param("scale", init, x.shape[-1:], norm.param_dtype))
    named = {}
    if getattr(norm, "use_bias", False):
        init = with_role(norm.bias_init, "bias")
        named["bias"] = norm.param("bias", init, x.shape[-1:], norm.param_dtype)
    promoted = promote_dtype(*arrays, *named.values(), dtype=norm.dtype)
    arrays = promoted[: len(arrays)]
    return op(
        *arrays,
        **dict(zip(named, promoted[len(arrays) :], strict=True)),
        epsilon=norm.epsilon,
        batch_axis_name=norm.batch_axis_name,
    )


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm`, whose output has unit scale already.

    Factors: 1 forward and for the input, batch^-1/2 for gain and bias, with all axes
    but the channels' in the batch. `axis_name` gathers the statistics of several
    devices, as ever; name the axes that split the batch in `batch_axis_name` as well.
    """

    batch_axis_name: AxisName | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        features = math.prod(x.shape[a] for a in axes)

        def with_factors(params: Any) -> Any:
            leaves, structure = jax.tree.flatten(params)
            scaled = scaled_affine(leaves, x, features, self.batch_axis_name)
            return jax.tree.unflatten(structure, scaled)

        plain = mapped(nn.BatchNorm.__call__, with_factors)
        return plain(self, x, use_running_average, mask=mask)

    def param(self, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Parameters are made by Flax's own code; here they get their roles."""
        init = with_role(init_fn, "bias" if name == "bias" else "norm")
        return super().param(name, init, *args, **kwargs)


class Dropout(nn.Dropout):
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
