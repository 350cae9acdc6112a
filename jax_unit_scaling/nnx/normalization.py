"""Norms and dropout, drop-in for their `flax.nnx` namesakes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..layers.normalization import (
    check_axes,
    check_group_axes,
    check_mask,
    scaled_affine,
)
from ..op import AxisName
from ..ops.dropout import dropout
from ..ops.normalization import group_norm, layer_norm, rms_norm
from ..parameters import role_metadata


class LayerNorm(nnx.LayerNorm):
    """`flax.nnx.LayerNorm` over the last axis, computed by `layer_norm`."""

    def __init__(
        self,
        num_features: int,
        *,
        scale_metadata: Any = None,
        bias_metadata: Any = None,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        super().__init__(
            num_features,
            scale_metadata=role_metadata("norm") | dict(scale_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        check_axes(self)
        self.batch_axis_name = batch_axis_name

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        check_mask(mask)
        x, scale, bias = self.promote_dtype(
            (x, _value(self.scale), _value(self.bias)), dtype=self.dtype
        )
        return layer_norm(
            x,
            scale,
            bias,
            epsilon=self.epsilon,
            batch_axis_name=self.batch_axis_name,
        )


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm` over the last axis, computed by `rms_norm`."""

    def __init__(
        self,
        num_features: int,
        *,
        scale_metadata: Any = None,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        super().__init__(
            num_features,
            scale_metadata=role_metadata("norm") | dict(scale_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        check_axes(self)
        self.batch_axis_name = batch_axis_name

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        check_mask(mask)
        x, scale = self.promote_dtype((x, _value(self.scale)), dtype=self.dtype)
        return rms_norm(
            x, scale, epsilon=self.epsilon, batch_axis_name=self.batch_axis_name
        )


class GroupNorm(nnx.GroupNorm):
    """`flax.nnx.GroupNorm` of [batch, ..., channels], computed by `group_norm`."""

    def __init__(
        self,
        num_features: int,
        *groups: int | None,
        scale_metadata: Any = None,
        bias_metadata: Any = None,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        super().__init__(
            num_features,
            *groups,
            scale_metadata=role_metadata("norm") | dict(scale_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        check_group_axes(self)
        self.batch_axis_name = batch_axis_name

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        check_mask(mask)
        x, scale, bias = self.promote_dtype(
            (x, _value(self.scale), _value(self.bias)), dtype=self.dtype
        )
        return group_norm(
            x,
            scale,
            bias,
            num_groups=self.num_groups,
            epsilon=self.epsilon,
            batch_axis_name=self.batch_axis_name,
        )


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, whose output has unit scale already.

    Factors: 1 forward and for the input, batch^-1/2 for gain and bias, with all axes
    but the channels' in the batch. `axis_name` gathers the statistics of several
    devices, as ever; name the axes that split the batch in `batch_axis_name` as well.
    """

    def __init__(
        self,
        num_features: int,
        *,
        scale_metadata: Any = None,
        bias_metadata: Any = None,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        super().__init__(
            num_features,
            scale_metadata=role_metadata("norm") | dict(scale_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.promote_dtype = _PromoteAndScale(self.promote_dtype, batch_axis_name)


@dataclasses.dataclass(frozen=True)
class _PromoteAndScale:
    """`promote_dtype`, and then the backward factors of gain and bias: here Flax hands
    out all arrays before it uses them."""

    promote_dtype: Callable[..., Any]
    batch_axis_name: AxisName | None

    def __call__(self, arrays: Any, /, **options: Any) -> Any:
        x, mean, var, *affine = self.promote_dtype(arrays, **options)
        return (
            x,
            mean,
            var,
            *scaled_affine(affine, x, mean.size, self.batch_axis_name),
        )


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout`, computed by `dropout`: keeps the scale, not the mean."""

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        # The namesake checks its arguments, draws and divides by 1 - rate; the rest of
        # the factor is the operation's, here without a key of its own.
        if deterministic is None:
            deterministic = self.deterministic
        if self.rate == 0.0 or deterministic:
            return inputs
        source = self.rngs if rngs is None else rngs
        if source is None or deterministic is None:
            return super().__call__(inputs, deterministic=deterministic, rngs=rngs)
        if isinstance(source, nnx.Rngs):
            source = source[self.rng_collection]
        key = source if isinstance(source, jax.Array) else source()
        if self.rate == 1.0:
            return jnp.zeros_like(inputs)
        dims = tuple(d % inputs.ndim for d in self.broadcast_dims)
        return dropout(inputs, key, rate=self.rate, broadcast_dims=dims)


def _value(parameter: nnx.Param[jax.Array] | None) -> jax.Array | None:
    return None if parameter is None else parameter[...]
