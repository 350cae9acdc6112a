"""Norms and dropout, drop-in for their `flax.nnx` namesakes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..arguments import checked
from ..layers.normalization import (
    apply_norm,
    check_batch_norm,
    instance_axes,
    scaled_affine,
)
from ..op import AxisName
from ..ops.dropout import dropout
from ..ops.normalization import group_norm, layer_norm, rms_norm
from ..parameters import role_metadata


class _Norm(nnx.Module):
    """What each norm adds to its namesake: construction, mask and promotion."""

    @checked
    def __init__(
        self,
        *sizes: Any,
        scale_metadata: Mapping[str, Any] | None = None,
        axis_name: AxisName | None = None,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        # Names of several axes are more than Flax's annotation says.
        checked(super().__init__, but=("axis_name",))(  # type: ignore[call-arg]
            *sizes,
            axis_name=axis_name,
            scale_metadata=role_metadata("norm") | dict(scale_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.batch_axis_name = batch_axis_name

    def _apply(
        self: Any,
        op: Callable[..., jax.Array],
        x: jax.Array,
        mask: jax.Array | None,
        *parameters: nnx.Param[jax.Array] | None,
        **options: Any,
    ) -> jax.Array:
        values = (None if p is None else p[...] for p in parameters)
        x, *affine = self.promote_dtype((x, *values), dtype=self.dtype)
        return apply_norm(self, op, x, mask, *affine, **options)


class _BiasedNorm(_Norm):
    """A norm with a bias, which has a role as well."""

    @checked
    def __init__(
        self,
        *sizes: Any,
        bias_metadata: Mapping[str, Any] | None = None,
        **more: Any,
    ):
        bias_metadata = role_metadata("bias") | dict(bias_metadata or {})
        super().__init__(*sizes, bias_metadata=bias_metadata, **more)


class LayerNorm(_BiasedNorm, nnx.LayerNorm):
    """`flax.nnx.LayerNorm`, computed by `layer_norm`.

    All norms take the arguments of their namesakes and `batch_axis_name`, the named
    axes that split the batch of gain and bias. Their variance is never the fast one.
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return self._apply(
            layer_norm,
            x,
            mask,
            self.scale,
            self.bias,
            feature_axes=self.feature_axes,
            axis=self.reduction_axes,
        )


class RMSNorm(_Norm, nnx.RMSNorm):
    """`flax.nnx.RMSNorm`, computed by `rms_norm`: see `LayerNorm`."""

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self._apply(
            rms_norm,
            x,
            mask,
            self.scale,
            feature_axes=self.feature_axes,
            axis=self.reduction_axes,
        )


class InstanceNorm(_BiasedNorm, nnx.InstanceNorm):
    """`flax.nnx.InstanceNorm`, computed by `layer_norm`: see `LayerNorm`.

    Statistics are over all axes but the first and `feature_axes`.
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return self._apply(
            layer_norm,
            x,
            mask,
            self.scale,
            self.bias,
            feature_axes=self.feature_axes,
            axis=instance_axes(x, self.feature_axes),
        )


class GroupNorm(_BiasedNorm, nnx.GroupNorm):
    """`flax.nnx.GroupNorm`, computed by `group_norm`: see `LayerNorm`.

    Its `reduction_axes` may leave out any axis but the last (Flax's repeats statistics
    along the wrong one where they leave out more than the first).
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return self._apply(
            group_norm,
            x,
            mask,
            self.scale,
            self.bias,
            num_groups=self.num_groups,
            axis=self.reduction_axes,
        )


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, whose output has unit scale already.

    Factors: 1 forward and for the input, batch^-1/2 for gain and bias, with all axes
    but the channels' in the batch. `axis_name` gathers the statistics of several
    devices, as ever; name the axes that split the batch in `batch_axis_name` as well.
    """

    @checked
    def __init__(
        self,
        num_features: int,
        *,
        axis: int | Sequence[int] = -1,
        axis_name: AxisName | None = None,
        scale_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        # So are several axes here.
        checked(super().__init__, but=("axis", "axis_name"))(
            num_features,
            axis=axis,  # type: ignore[arg-type]
            axis_name=axis_name,  # type: ignore[arg-type]
            scale_metadata=role_metadata("norm") | dict(scale_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.promote_dtype = _PromoteAndScale(self.promote_dtype, batch_axis_name)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        if use_running_average is None:
            use_running_average = self.use_running_average
        check_batch_norm(self, x, use_running_average)
        return super().__call__(x, use_running_average, mask=mask)


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

    __init__ = checked(nnx.Dropout.__init__)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        # The namesake is called for its error alone: it would divide by 1 - rate. The
        # key is drawn as it draws it, so that the same elements are dropped.
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
