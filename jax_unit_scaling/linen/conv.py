"""Convolutions, drop-in for their `flax.linen` namesakes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import lax

from ..layers.linear import apply_conv, mask_factor, masked
from ..ops.conv import conv, conv_transpose
from .linear import ScaledOutput, unit_normal
from .metadata import with_role
from .names import named


class Conv(nn.Conv, ScaledOutput):
    """`flax.linen.Conv` with unit-normal weights, computed by `conv`.

    Takes all arguments of its namesake and formats, constraint, batch_axis_name and
    output_scale as in `Dense`; native formats are simulated. A `mask` must be known
    while tracing: the masked weights are divided by its rms, so that the scale does not
    depend on how many it leaves.
    """

    kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        plain = self.conv_general_dilated_cls or (lambda: self.conv_general_dilated)
        shape = (inputs.shape[-1] // self.feature_group_count, self.features)
        return _apply(
            self,
            conv,
            inputs,
            shape,
            input_dilation=self.input_dilation,
            feature_group_count=self.feature_group_count,
            product=plain() or lax.conv_general_dilated,
        )


class ConvTranspose(nn.ConvTranspose, ScaledOutput):
    """`flax.linen.ConvTranspose` with unit-normal weights, computed by
    `conv_transpose`.

    Takes all arguments of its namesake and the further ones of `Conv`.
    """

    # Its namesake takes an integer as well, whatever it says.
    strides: int | Sequence[int] | None = None  # type: ignore[assignment]
    kernel_dilation: int | Sequence[int] | None = None  # type: ignore[assignment]
    kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        shape = (inputs.shape[-1], self.features)
        return _apply(
            self,
            conv_transpose,
            inputs,
            shape[::-1] if self.transpose_kernel else shape,
            product=lax.conv_general_dilated,
            transpose_kernel=self.transpose_kernel,
            preferred_element_type=self.preferred_element_type,
        )


def _apply(
    layer: Any,
    op: Callable[..., jax.Array],
    inputs: jax.Array,
    channels: tuple[int, int],
    **options: Any,
) -> jax.Array:
    """Parameters, mask and promotion, and one call into ops."""
    size = layer.kernel_size
    shape = ((size,) if isinstance(size, int) else tuple(size)) + channels
    window = math.prod(shape[:-2])
    d_in = inputs.shape[-1] // options.get("feature_group_count", 1)
    init = with_role(layer.kernel_init, "weight", window * d_in)
    kernel = layer.param("kernel", init, shape, layer.param_dtype)
    kernel = masked(kernel, layer.mask, mask_factor(layer.mask, shape))
    bias = None
    if layer.use_bias:
        init = with_role(layer.bias_init, "bias")
        bias = layer.param("bias", init, (layer.features,), layer.param_dtype)
    promoted = layer.promote_dtype(inputs, kernel, bias, dtype=layer.dtype)
    return apply_conv(named(layer), op, *promoted, **options)
