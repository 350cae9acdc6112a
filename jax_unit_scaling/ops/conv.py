"""Convolutions and transposed convolutions, channels last, in any number of axes."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..fp8 import in_formats
from ..op import AxisName, Factors, Zeros, case, factors_of_sum, scaled_op
from .contraction import given_options
from .window import Pads, Window, count_hits, lax_padding, pads_of, per_axis

PerAxis = int | Sequence[int] | None
Padding = str | int | Sequence[int | Sequence[int]]


def _conv_rule(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: PerAxis,
    padding: Padding,
    input_dilation: PerAxis,
    kernel_dilation: PerAxis,
    feature_group_count: int,
    **_: Any,
) -> Factors:
    _check(x, kernel, kernel.shape[-2:-1], kernel.shape[-1:], bias, feature_group_count)
    windows = _windows(x, kernel, strides, padding, input_dilation, kernel_dilation)[0]
    return _factors(x, kernel, windows, [w.outputs for w in windows], kernel.shape[-1])


def _factors(
    x: Any, kernel: Any, windows: Sequence[Window], spatial: list[int], features: int
) -> Factors:
    """The factors of the sum that these windows make, with `spatial` outputs."""
    rank = len(windows)
    batch = math.prod(x.shape[: -rank - 1])
    positions = batch * math.prod(spatial)
    factors = factors_of_sum(
        batch * count_hits(windows) * math.prod(kernel.shape[rank:]),
        out=positions * features,
        x=math.prod(x.shape),
        kernel=math.prod(kernel.shape),
    )
    return Factors(factors.fwd, {**factors.bwd, "bias": max(positions, 1) ** -0.5})


def _check(
    x: Any, kernel: Any, d_in: Any, d_out: Any, bias: Any, groups: int = 1
) -> None:
    rank = len(kernel.shape) - 2
    if rank < 1 or len(x.shape) < rank + 1:
        raise ValueError(
            "`kernel` must be [*window, in, out] and `x` [*batch, *spatial, in], with "
            f"as many spatial axes as the window has, got shapes {kernel.shape} and "
            f"{x.shape}."
        )
    if 0 in kernel.shape[:rank]:
        raise ValueError(
            f"`kernel` must have a window of 1 or more, got shape {kernel.shape}."
        )
    if groups < 1 or d_in[0] * groups != x.shape[-1] or d_out[0] % groups:
        raise ValueError(
            f"`kernel` of shape {kernel.shape}, in {groups} group(s), must take the "
            f"{x.shape[-1]} channels of `x` in equal parts and give each its part of "
            f"the output's: got {d_in[0]} in and {d_out[0]} out."
        )
    if bias is not None and bias.shape != d_out:
        raise ValueError(
            f"`bias` must have the shape {d_out} of the output's channels, got "
            f"{bias.shape}."
        )


def _windows(
    x: Any,
    kernel: Any,
    strides: PerAxis,
    padding: Padding,
    input_dilation: PerAxis,
    kernel_dilation: PerAxis,
) -> tuple[list[Window], Pads]:
    """The window along each axis, and how many numbers of it are repeated around it."""
    rank = len(kernel.shape) - 2
    stride = per_axis("strides", strides, rank)
    spread = per_axis("input_dilation", input_dilation, rank)
    dilation = per_axis("kernel_dilation", kernel_dilation, rank)
    sizes = x.shape[-rank - 1 : -1]
    taps = kernel.shape[:rank]
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    if lax_padding(padding) in ("SAME", "SAME_LOWER") and set(spread) != {1}:
        raise ValueError(
            f"`padding` {padding!r} has no meaning for a dilated input: pass a pair "
            "(low, high) for each spatial axis, or use `conv_transpose`."
        )
    repeated = [(0, 0)] * rank
    if _mode(padding):
        repeated = [((span - 1) // 2, span // 2) for span in spans]
        padding = "VALID"
    elif padding == "CAUSAL":
        if rank != 1:
            raise ValueError(f'`padding` "CAUSAL" needs one spatial axis, got {rank}.')
        padding = [(spans[0] - 1, 0)]
    sizes = [n + sum(r) for n, r in zip(sizes, repeated, strict=True)]
    pads = pads_of(padding, sizes, spans, stride, ("CIRCULAR", "REFLECT", "CAUSAL"))
    windows = map(Window, sizes, taps, stride, pads, dilation, spread)
    return list(windows), repeated


def _mode(padding: Padding) -> str | None:
    """NumPy's name for padding that repeats the data."""
    if isinstance(padding, str):
        return {"CIRCULAR": "wrap", "REFLECT": "reflect"}.get(padding)
    return None


def _convolve(
    x: Array,
    kernel: Array,
    windows: Sequence[Window],
    feature_group_count: int,
    conv_general_dilated: Callable[..., Array],
    formats: Formats | None,
    **options: Any,
) -> Array:
    """The plain convolution, with `x` [batch, *spatial, in]."""
    last = x.ndim - 1
    spatial = tuple(range(1, last))
    channels_last = (0, last, *spatial)
    numbers = lax.ConvDimensionNumbers(
        channels_last, (last, last - 1, *range(last - 1)), channels_last
    )

    @ft.wraps(conv_general_dilated, updated=())
    def product(x: Array, kernel: Array, **options: Any) -> Array:
        return conv_general_dilated(
            x,
            kernel,
            tuple(w.stride for w in windows),
            [w.pads for w in windows],
            lhs_dilation=tuple(w.input_dilation for w in windows),
            rhs_dilation=tuple(w.dilation for w in windows),
            dimension_numbers=numbers,
            feature_group_count=feature_group_count,
            **options,
        )

    return in_formats(given_options(product, **options), formats)(x, kernel)


def _flat(x: Array, rank: int) -> Array:
    """`x` with one batch axis in front of its `rank` spatial axes and channels."""
    batch = math.prod(x.shape[: -rank - 1])
    return x.reshape(batch, *x.shape[-rank - 1 :])


@scaled_op(
    rule=_conv_rule,
    parameters=("kernel", "bias"),
    cases=(
        case((4, 48, 32), (3, 32, 2048), Zeros((2048,)), padding="CAUSAL"),
        case(
            (4, 48, 32), (5, 16, 64), padding=3, input_dilation=3, feature_group_count=2
        ),
        case((8, 8, 9, 32), (3, 3, 32, 32), strides=2),
        case((8, 8, 9, 32), (3, 3, 1, 512), padding="VALID", feature_group_count=32),
        case((8, 8, 9, 32), (3, 3, 32, 32), padding="CIRCULAR", kernel_dilation=2),
        case((4, 5, 4, 6, 16), (2, 3, 2, 16, 32), padding=(1, (0, 2), 0)),
    ),
)
def conv(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, " out"] | None = None,
    *,
    strides: PerAxis = 1,
    padding: Padding = "SAME",
    input_dilation: PerAxis = 1,
    kernel_dilation: PerAxis = 1,
    feature_group_count: int = 1,
    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled convolution: x [*batch, *spatial, in], kernel [*window, in/groups,
    out], bias [out].

    The options are those of `flax.nnx.Conv`. `padding` is "SAME", "SAME_LOWER",
    "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (one axis), an integer, or an integer or a
    pair (low, high) for each axis; `conv_general_dilated` computes the plain
    convolution.

    Factors, with t the products of an input and a weight that are added up:
    (outputs / t)^1/2 forward, (inputs / t)^1/2 for `x`, (weights / t)^1/2 for `kernel`
    and (batch positions)^-1/2 for `bias`. Away from the borders that is (window
    in/groups)^-1/2, (window out/groups / stride)^-1/2 and (batch positions)^-1/2. These
    numbers are the usual rule, but where zeros of padding or of a dilated input meet
    the window fewer products are added: a 3 x 3 window over 4 x 4 numbers adds 6.25,
    not 9. So t is counted from the shapes, and the scale is 1 on average over
    positions, whatever the padding, stride and dilation.

    `formats` round the operands, and the output's cotangent. Native ones are simulated,
    which a warning says once: XLA has no 8-bit kernels for a convolution's gradients.

    Reference: Unit Scaling (Blake et al., 2023), table A.2, matmul; the count for
    convolutions is the PyTorch library's conv1d, made exact.
    """
    windows, repeated = _windows(
        x, kernel, strides, padding, input_dilation, kernel_dilation
    )
    rank = len(windows)
    inputs = _flat(x, rank)
    if mode := _mode(padding):
        inputs = jnp.pad(inputs, [(0, 0), *repeated, (0, 0)], mode)
    y = _convolve(
        inputs,
        kernel,
        windows,
        feature_group_count,
        conv_general_dilated,
        formats,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    y = y.reshape(*x.shape[: -rank - 1], *y.shape[1:])
    return y if bias is None else y + bias


def _conv_transpose_rule(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: PerAxis,
    padding: Padding,
    kernel_dilation: PerAxis,
    transpose_kernel: bool,
    **_: Any,
) -> Factors:
    d_in, d_out = kernel.shape[-2:-1], kernel.shape[-1:]
    if transpose_kernel:
        d_in, d_out = d_out, d_in
    _check(x, kernel, d_in, d_out, bias)
    windows = _transposed_windows(x, kernel, strides, padding, kernel_dilation)
    spatial = [
        w.size * w.input_dilation if padding == "CIRCULAR" else w.outputs
        for w in windows
    ]
    return _factors(x, kernel, windows, spatial, d_out[0])


def _transposed_windows(
    x: Any, kernel: Any, strides: PerAxis, padding: Padding, kernel_dilation: PerAxis
) -> list[Window]:
    rank = len(kernel.shape) - 2
    stride = per_axis("strides", strides, rank)
    dilation = per_axis("kernel_dilation", kernel_dilation, rank)
    sizes, taps = x.shape[-rank - 1 : -1], kernel.shape[:rank]
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    if padding == "CIRCULAR" and 0 in sizes:
        raise ValueError(
            f'`padding` "CIRCULAR" has nothing to repeat in `x` of shape {x.shape}.'
        )
    if padding in ("SAME", "VALID", "CIRCULAR"):
        pads = [
            _transposed_pads(span, s, padding == "SAME")
            for span, s in zip(spans, stride, strict=True)
        ]
    else:
        # "SAME_LOWER" and names in lower case are those of a plain convolution, to
        # which the stride is a dilation of its input.
        if isinstance(padding, str) and set(stride) != {1}:
            raise ValueError(
                f"`padding` {padding!r} needs `strides` of 1 here, got {strides}: pass "
                '"SAME", "VALID", "CIRCULAR" or pairs (low, high).'
            )
        pads = pads_of(padding, sizes, spans, stride, ("CIRCULAR",))
    return list(map(Window, sizes, taps, [1] * rank, pads, dilation, stride))


def _transposed_pads(span: int, stride: int, same: bool) -> tuple[int, int]:
    """What `lax.conv_transpose` pads with, so as to give stride * size, or more."""
    if not same:
        return span - 1, max(span, stride) - 1
    low = span - 1 if stride >= span else -(-(span + stride - 2) // 2)
    return low, span + stride - 2 - low


def _wrapped(y: Array, period: int, axis: int, low_first: bool) -> Array:
    """`y` laid around a circle of length `period` and added up, as Flax does."""
    missing = -(y.shape[axis] - period) % (2 * period)
    low, high = (missing + low_first) // 2, (missing + 1 - low_first) // 2
    pads = [(0, 0)] * y.ndim
    pads[axis] = (low, high)
    turns = jnp.pad(y, pads)
    count = turns.shape[axis] // period
    rest = y.shape[axis + 1 :]
    return turns.reshape(*y.shape[:axis], count, period, *rest).sum(axis)


@scaled_op(
    rule=_conv_transpose_rule,
    parameters=("kernel", "bias"),
    cases=(
        case((4, 48, 32), (5, 32, 64), strides=3),
        case((4, 48, 32), (3, 32, 2048), Zeros((2048,)), strides=2, padding="VALID"),
        case(
            (8, 8, 9, 32),
            (3, 3, 32, 32),
            strides=2,
            padding="CIRCULAR",
            transpose_kernel=True,
        ),
        case((8, 8, 9, 32), (3, 3, 32, 32), padding=1, kernel_dilation=2),
    ),
)
def conv_transpose(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, " out"] | None = None,
    *,
    strides: PerAxis = 1,
    padding: Padding = "SAME",
    kernel_dilation: PerAxis = 1,
    transpose_kernel: bool = False,
    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled transposed convolution: x [*batch, *spatial, in], kernel [*window,
    in, out] (or [*window, out, in] where `transpose_kernel`), bias [out].

    The options are those of `flax.nnx.ConvTranspose`. `padding` is "SAME", "VALID",
    "CIRCULAR", an integer, or an integer or a pair (low, high) for each axis; without
    strides also "SAME_LOWER". `conv_general_dilated` computes the plain convolution.

    Factors as `conv`, of the same count: away from the borders
    (window in / stride)^-1/2 forward and (window out)^-1/2 for `x`. `formats` as in
    `conv`.
    """
    windows = _transposed_windows(x, kernel, strides, padding, kernel_dilation)
    rank = len(windows)
    if transpose_kernel:
        kernel = jnp.flip(kernel, range(rank)).swapaxes(-1, -2)
    y = _convolve(
        _flat(x, rank),
        kernel,
        windows,
        1,
        conv_general_dilated,
        formats,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    if padding == "CIRCULAR":
        for axis, w in enumerate(windows, 1):
            y = _wrapped(y, w.size * w.input_dilation, axis, not transpose_kernel)
    y = y.reshape(*x.shape[: -rank - 1], *y.shape[1:])
    return y if bias is None else y + bias
