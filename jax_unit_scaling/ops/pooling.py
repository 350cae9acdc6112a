"""Pooling over windows, channels last."""

import functools as ft
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..constraints import Constraint, to_output_scale
from ..moments import max_moments
from ..op import Factors, case, factors_of_sum, scaled_op
from .window import Window, pads_of, per_axis

Padding = str | Sequence[int | Sequence[int]]


def _windows(
    x: Any, window_shape: Sequence[int], strides: Sequence[int] | None, padding: Padding
) -> list[Window]:
    rank = len(window_shape)
    if len(x.shape) < rank + 1:
        raise ValueError(
            f"`x` must be [*batch, *spatial, channels] with an axis for each of "
            f"`window_shape` {window_shape}, got shape {x.shape}."
        )
    taps = per_axis("window_shape", window_shape, rank)
    steps = per_axis("strides", strides, rank)
    sizes = x.shape[-rank - 1 : -1]
    pads = pads_of(padding, sizes, taps, steps)
    windows = list(map(Window, sizes, taps, steps, pads))
    if not all(w.outputs for w in windows):
        raise ValueError(
            f"`window_shape` {window_shape} does not fit into `x` of shape {x.shape} "
            f"with `padding` {padding}: nothing would be left."
        )
    if any((w.hits == 0).any() for w in windows):
        raise ValueError(
            f"`padding` {padding} must be less than `window_shape` {window_shape}: a "
            "window of padding alone has nothing to pool."
        )
    return windows


def _counts(windows: Sequence[Window]) -> np.ndarray:
    """How many numbers each window holds: [*spatial]."""
    return ft.reduce(np.multiply.outer, (w.hits for w in windows))


def _reduce_window(
    x: Array, windows: Sequence[Window], init: float, reduce: Any
) -> Array:
    batch = [1] * (x.ndim - 1 - len(windows))
    return lax.reduce_window(
        x,
        init,
        reduce,
        (*batch, *(w.taps for w in windows), 1),
        (*batch, *(w.stride for w in windows), 1),
        (*[(0, 0) for _ in batch], *(w.pads for w in windows), (0, 0)),
    )


def _avg_pool_rule(
    x: Any,
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
    count_include_pad: bool,
    **_: Any,
) -> Factors:
    counts = _counts(_windows(x, window_shape, strides, padding))
    shared = math.prod(x.shape[: -len(window_shape) - 1]) * x.shape[-1]
    # A window of n numbers adds them up with the weight 1/n, or 1/window.
    squares = counts / math.prod(window_shape) ** 2 if count_include_pad else 1 / counts
    return factors_of_sum(
        shared * float(squares.sum()), out=shared * counts.size, x=math.prod(x.shape)
    )


@scaled_op(
    rule=_avg_pool_rule,
    cases=(
        case((8, 8, 9, 32), window_shape=(2, 2), strides=(2, 2)),
        case((8, 8, 9, 32), window_shape=(3, 3), padding="SAME"),
        case(
            (8, 8, 9, 32),
            window_shape=(4, 3),
            strides=(1, 2),
            padding=((2, 2), (1, 0)),
            count_include_pad=False,
        ),
    ),
)
def avg_pool(
    x: Float[Array, "..."],
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
    *,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `flax.nnx.avg_pool`: x [*batch, *spatial, channels].

    Factors, with w the numbers in a window and s the stride's product, both counted
    without padding: w^1/2 forward, for independent `x`, and (w s)^1/2 for `x`. Where
    neighbours are alike, as behind a convolution, they average out less, and the output
    is larger than 1.
    """
    windows = _windows(x, window_shape, strides, padding)
    # bfloat16's eight bits are too few to sum many numbers in.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    total = _reduce_window(wide, windows, 0.0, lax.add)
    if count_include_pad:
        return (total / math.prod(window_shape)).astype(x.dtype)
    return (total / _counts(windows)[..., None].astype(wide.dtype)).astype(x.dtype)


def _max_pool_rule(
    x: Any,
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
    **_: Any,
) -> Factors:
    counts = _counts(_windows(x, window_shape, strides, padding))
    sizes, often = np.unique(counts, return_counts=True)
    mean, square = np.average(
        [max_moments(int(n)) for n in sizes], axis=0, weights=often
    )
    spatial = math.prod(x.shape[-len(window_shape) - 1 : -1])
    return Factors(
        float(square - mean**2) ** -0.5, {"x": math.sqrt(spatial / counts.size)}
    )


@scaled_op(
    rule=_max_pool_rule,
    cases=(
        case((8, 8, 9, 32), window_shape=(2, 2), strides=(2, 2)),
        case((8, 8, 9, 32), window_shape=(3, 3), padding="SAME"),
        case(
            (8, 8, 9, 32),
            window_shape=(4, 3),
            strides=(1, 2),
            padding=((2, 2), (1, 0)),
        ),
    ),
)
def max_pool(
    x: Float[Array, "..."],
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    *,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `flax.nnx.max_pool`: x [*batch, *spatial, channels].

    Factors: 1 / std of the largest of w independent normals forward, by quadrature
    (1.43 for w = 4), with w the numbers in a window without padding; (inputs /
    outputs)^1/2 for `x`, as every output sends its cotangent to one input, however the
    windows overlap. The output's mean is above zero, as ReLU's.
    """
    windows = _windows(x, window_shape, strides, padding)
    return _reduce_window(x, windows, -jnp.inf, lax.max)
