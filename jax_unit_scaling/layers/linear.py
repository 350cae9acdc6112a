"""What linear layers and convolutions do once their parameters are there."""

import functools as ft
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from ..constraints import Constraint
from ..formats import Formats
from ..op import AxisName
from ..ops.contraction import linear
from ..scale import scale_bwd, scale_fwd


class Options(Protocol):
    """What a layer of either family holds for its product."""

    @property
    def formats(self) -> Formats | None: ...
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

    The layer's product is to be multiplied by the same, with `times`.
    """
    return op(
        scale_bwd(inputs, layer.output_scale),
        kernel,
        bias,
        precision=layer.precision,
        **options_of(layer),
        **more,
    )


def times(product: Callable[..., jax.Array], factor: float) -> Any:
    """A product times `factor`; the input's cotangent gets its own (`apply_linear`)."""

    @ft.wraps(product, updated=())  # with its signature, which tells what it takes
    def scaled_product(*args: Any, **kwargs: Any) -> jax.Array:
        return scale_fwd(product(*args, **kwargs), factor)

    return scaled_product


def low_rank(
    layer: Options,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    in_axis_name: AxisName | None = None,
    out_axis_name: AxisName | None = None,
) -> jax.Array:
    """(x A) B, of two unit-scaled products."""
    y = linear(x, a, in_axis_name=in_axis_name, **options_of(layer))
    return linear(y, b, out_axis_name=out_axis_name, **options_of(layer))


def apply_conv(
    layer: Any,
    op: Callable[..., jax.Array],
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    **more: Any,
) -> jax.Array:
    """One call into ops, with the options of a convolution's layer."""
    return op(
        inputs,
        kernel,
        bias,
        strides=layer.strides,
        padding=layer.padding,
        kernel_dilation=layer.kernel_dilation,
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
