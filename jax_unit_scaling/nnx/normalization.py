"""Norms and dropout, drop-in for their `flax.nnx` namesakes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..op import AxisName
from ..ops.dropout import dropout
from ..ops.normalization import layer_norm, rms_norm
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
        _check_axes(self)
        self.batch_axis_name = batch_axis_name

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        _check_mask(mask)
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
        _check_axes(self)
        self.batch_axis_name = batch_axis_name

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        _check_mask(mask)
        x, scale = self.promote_dtype((x, _value(self.scale)), dtype=self.dtype)
        return rms_norm(
            x, scale, epsilon=self.epsilon, batch_axis_name=self.batch_axis_name
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


def _check_axes(norm: Any) -> None:
    for name in ("reduction_axes", "feature_axes"):
        if getattr(norm, name) not in (-1, (-1,)):
            raise ValueError(
                f"`{name}` must be -1, the last axis, got {getattr(norm, name)}."
            )
    if norm.axis_name is not None:
        raise ValueError(
            "`axis_name` must be None: statistics are over one example's last axis."
        )


def _check_mask(mask: jax.Array | None) -> None:
    if mask is not None:
        raise ValueError(
            "`mask` must be None: a masked norm has no factor that is known while "
            "tracing."
        )
