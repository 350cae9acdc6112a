"""What linear layers and convolutions do once their parameters are there."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ..constraints import Constraint
from ..formats import BlockFormats, Formats
from ..op import AxisName
from ..ops.contraction import linear
from ..scale import scale_bwd, scale_fwd


class Options(Protocol):
    """What a layer of either family holds for its product."""

    @property
    def formats(self) -> Formats | BlockFormats | None: ...
    @property
    def constraint(self) -> Constraint | None: ...
    @property
    def batch_axis_name(self) -> AxisName | None: ...


def options_of(layer: Options) -> dict[str, Any]:
    """The keyword arguments that a layer's attributes are to its operation."""
    return {
        "formats": layer.formats,
        "constraint": layer.constraint,
        "batch_axis_name": layer.batch_axis_name,
    }


def apply_linear(
    layer: Any,
    op: Callable[..., jax.Array],
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    **more: Any,
) -> jax.Array:
    """One call into ops, with the options of a layer that has an `output_scale`.

    The layer's product is to be multiplied by the same, with `with_factor`.
    """
    return op(
        scale_bwd(inputs, layer.output_scale),
        kernel,
        bias,
        precision=layer.precision,
        **options_of(layer),
        **more,
    )


def with_factor(product: Callable[..., jax.Array], factor: float) -> Any:
    """A product times `factor`; the input's cotangent gets its own (`apply_linear`)."""

    @ft.wraps(product, updated=())  # with its signature, which tells what it takes
    def scaled_product(*args: Any, **kwargs: Any) -> jax.Array:
        return scale_fwd(product(*args, **kwargs), factor)

    return scaled_product


def low_rank(layer: Any, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """(x A) B, of two unit-scaled products, times the layer's `output_scale`."""
    x = scale_bwd(x, layer.output_scale)
    y = linear(x, a, in_axis_name=layer.in_axis_name, **options_of(layer))
    y = linear(y, b, out_axis_name=layer.out_axis_name, **options_of(layer))
    return scale_fwd(y, layer.output_scale)


def bias_of_batch(bias: jax.Array, free: int, batch_axes: int) -> jax.Array:
    """A bias [*batch, *out] as `linear` takes it, to be added to [*batch, *free, *out],
    of which `free` axes are in between."""
    batch, out = bias.shape[:batch_axes], bias.shape[batch_axes:]
    return bias.reshape(*batch, *free * (1,), *out) if batch_axes else bias


def broadcast_bias(
    bias: jax.Array, whole: tuple[int, ...], broadcast: Sequence[int]
) -> jax.Array:
    """A bias of shape `whole`, or a piece of it, with the ones that `broadcast` has."""
    if bias.shape != whole:
        pairs = zip(bias.shape, whole, strict=True)
        sizes = iter([n for n, of in pairs if of != 1])
        broadcast = [1 if n == 1 else next(sizes) for n in broadcast]
    return bias.reshape(broadcast)


def apply_conv(
    layer: Any,
    op: Callable[..., jax.Array],
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    product: Callable[..., jax.Array],
    **more: Any,
) -> jax.Array:
    """One call into ops, with the options of a convolution's layer.

    `product` computes the plain convolution.
    """
    return op(
        scale_bwd(inputs, layer.output_scale),
        kernel,
        bias,
        strides=layer.strides,
        padding=layer.padding,
        kernel_dilation=layer.kernel_dilation,
        conv_general_dilated=with_factor(product, layer.output_scale),
        precision=layer.precision,
        **options_of(layer),
        **more,
    )


def mask_factor(mask: Any, kernel_shape: tuple[int, ...]) -> float:
    """What gives a kernel of unit scale the rms 1 again, once it is masked."""
    if mask is None:
        return 1.0
    if isinstance(mask, jax.core.Tracer):
        raise ValueError(
            "`mask` must be known when the module is built, as the scale depends on "
            "it: make it with numpy, outside of `jit`."
        )
    if not (hasattr(mask, "shape") and hasattr(mask, "dtype")):
        raise TypeError(f"`mask` must be None or an array, got {mask!r}.")
    values = np.asarray(mask, np.float64)
    if values.shape != tuple(kernel_shape) or not values.any():
        raise ValueError(
            f"`mask` must have the kernel's shape {kernel_shape} and leave some "
            f"weights, got shape {values.shape} with {np.count_nonzero(values)} of "
            "them."
        )
    return float(np.mean(values**2) ** -0.5)


def masked(kernel: jax.Array, mask: Any, factor: float) -> jax.Array:
    """The kernel under its layer's mask, at unit scale again."""
    return kernel if mask is None else scale_fwd(kernel * mask, factor)
