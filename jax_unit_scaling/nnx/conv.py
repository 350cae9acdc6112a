"""Convolutions, drop-in for their `flax.nnx` namesakes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from ..arguments import checked
from ..layers.linear import apply_conv, mask_factor, masked
from ..ops.conv import conv, conv_transpose
from ..parameters import role_metadata
from .linear import ScaledProduct, unit_normal


class _Conv(ScaledProduct):
    """What both layers add to their namesake: construction, mask and promotion."""

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *strides: int | Sequence[int] | None,
        kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        **more: Any,
    ):
        window = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
        groups = more.get("feature_group_count", 1)  # which `Conv` has checked
        role = role_metadata("weight", math.prod(window) * in_features // groups)
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            *strides,
            kernel_init=kernel_init,
            kernel_metadata=role | dict(kernel_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **more,
        )
        self.mask_factor = _mask_factor(self)

    def _apply(
        self: Any,
        op: Callable[..., jax.Array],
        inputs: jax.Array,
        **options: Any,
    ) -> jax.Array:
        kernel = masked(self.kernel[...], self.mask, self.mask_factor)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype(
            (inputs, kernel, bias), dtype=self.dtype
        )
        return apply_conv(
            self,
            op,
            inputs,
            kernel,
            bias,
            preferred_element_type=self.preferred_element_type,
            **options,
        )


class Conv(_Conv, nnx.Conv):
    """`flax.nnx.Conv` with unit-normal weights, computed by `conv`.

    Takes all arguments of its namesake and formats, constraint, batch_axis_name and
    output_scale, as in `Linear`; native formats are simulated. A `mask` must be known
    when the module is built: the masked weights are divided by its rms, so that the
    scale does not depend on how many it leaves.
    """

    @checked
    def __init__(
        self, *sizes: Any, feature_group_count: int = 1, rngs: nnx.Rngs, **more: Any
    ):
        super().__init__(
            *sizes, feature_group_count=feature_group_count, rngs=rngs, **more
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return self._apply(
            conv,
            inputs,
            input_dilation=self.input_dilation,
            feature_group_count=self.feature_group_count,
            product=self.conv_general_dilated,
            out_sharding=out_sharding,
        )


class ConvTranspose(_Conv, nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` with unit-normal weights, computed by `conv_transpose`.

    Takes all arguments of its namesake and the further ones of `Conv`.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self._apply(
            conv_transpose,
            inputs,
            product=lax.conv_general_dilated,
            transpose_kernel=self.transpose_kernel,
        )


def _mask_factor(layer: Any) -> float:
    return mask_factor(layer.mask, layer.kernel_shape)
