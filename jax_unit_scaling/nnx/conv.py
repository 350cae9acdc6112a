"""Convolutions, drop-in for their `flax.nnx` namesakes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..op import AxisName
from ..ops.conv import conv, conv_transpose
from ..parameters import role_metadata
from ..scale import scale_fwd
from .linear import unit_normal


class Conv(nnx.Conv):
    """`flax.nnx.Conv` with unit-normal weights, computed by `conv`.

    Takes the further arguments of `Linear`. Where there is a `mask`, the masked weights
    are divided by its rms, so that their number does not change the scale; its values
    must be known when the module is built.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        feature_group_count: int = 1,
        mask: jax.Array | None = None,
        kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Any = None,
        bias_metadata: Any = None,
        formats: Formats | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        fan_in = _window(kernel_size) * in_features // feature_group_count
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            feature_group_count=feature_group_count,
            mask=mask,
            kernel_init=kernel_init,
            kernel_metadata=role_metadata("weight", fan_in)
            | dict(kernel_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.mask_factor = _mask_factor(self)
        self.formats = formats
        self.constraint = constraint
        self.batch_axis_name = batch_axis_name

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return _apply(
            self,
            conv,
            inputs,
            input_dilation=self.input_dilation,
            feature_group_count=self.feature_group_count,
            conv_general_dilated=self.conv_general_dilated,
            out_sharding=out_sharding,
        )


class ConvTranspose(nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` with unit-normal weights, computed by `conv_transpose`.

    Takes the further arguments of `Conv`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        mask: jax.Array | None = None,
        kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Any = None,
        bias_metadata: Any = None,
        formats: Formats | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        fan_in = _window(kernel_size) * in_features
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            mask=mask,
            kernel_init=kernel_init,
            kernel_metadata=role_metadata("weight", fan_in)
            | dict(kernel_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.mask_factor = _mask_factor(self)
        self.formats = formats
        self.constraint = constraint
        self.batch_axis_name = batch_axis_name

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return _apply(
            self, conv_transpose, inputs, transpose_kernel=self.transpose_kernel
        )


def _window(kernel_size: int | Sequence[int]) -> int:
    return kernel_size if isinstance(kernel_size, int) else math.prod(kernel_size)


def _mask_factor(layer: Any) -> float:
    """What gives the masked kernel the rms 1."""
    if layer.mask is None:
        return 1.0
    if isinstance(layer.mask, jax.core.Tracer):
        raise ValueError(
            "`mask` must be known when the module is built, as the scale depends on "
            "it: make it with numpy, outside of `jit`."
        )
    mask = np.asarray(layer.mask, np.float64)
    if mask.shape != layer.kernel_shape or not mask.any():
        raise ValueError(
            f"`mask` must have the kernel's shape {layer.kernel_shape} and leave some "
            f"weights, got shape {mask.shape} with {np.count_nonzero(mask)} of them."
        )
    return float(np.mean(mask**2) ** -0.5)


def _apply(layer: Any, op: Any, inputs: jax.Array, **options: Any) -> jax.Array:
    """What both layers do: mask, promote, and one call into ops."""
    kernel = layer.kernel[...]
    if layer.mask is not None:
        kernel = scale_fwd(kernel * layer.mask, layer.mask_factor)
    bias = None if layer.bias is None else layer.bias[...]
    inputs, kernel, bias = layer.promote_dtype(
        (inputs, kernel, bias), dtype=layer.dtype
    )
    return op(
        inputs,
        kernel,
        bias,
        strides=layer.strides,
        padding=layer.padding,
        kernel_dilation=layer.kernel_dilation,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
        formats=layer.formats,
        constraint=layer.constraint,
        batch_axis_name=layer.batch_axis_name,
        **options,
    )
