"""Sums and products of tensors, and sums over axes."""

import functools as ft
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..arguments import axes_of, checked
from ..constraints import Constraint, to_output_scale
from ..op import Factors, case, factors_of_sum, scaled_op
from ..scale import check_factor, scaled


def _sizes(**inputs: Any) -> tuple[int, dict[str, int]]:
    """The size of a broadcast result, and of each input that has a shape."""
    shapes = {name: x.shape for name, x in inputs.items() if hasattr(x, "shape")}
    try:
        out = math.prod(jnp.broadcast_shapes(*shapes.values()))
    except ValueError as e:
        raise ValueError(f"`x` and `y` must be broadcastable, got {shapes}.") from e
    return out, {name: math.prod(shape) for name, shape in shapes.items()}


def _add_rule(x: Any, y: Any, **_: Any) -> Factors:
    out, sizes = _sizes(x=x, y=y)
    if not sizes:
        raise TypeError(
            f"`x` or `y` must be an array, got {x!r} and {y!r}: add numbers with `+`."
        )
    constant = len(sizes) < 2 or [*sizes.values()].count(1) == 1
    return Factors(
        1.0 if constant else 2**-0.5, factors_of_sum(out, out=out, **sizes).bwd
    )


@scaled_op(
    rule=_add_rule,
    cases=(case((256, 64), (256, 64)), case((64, 4096), (4096,))),
)
def add(
    x: Float[Array, "..."] | float,
    y: Float[Array, "..."] | float,
    *,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `x + y`, with NumPy's broadcasting.

    Factors: 2^-1/2 forward (1 where one of them alone is a single number, which shifts
    but does not scale), and broadcast^-1/2 for an input that is broadcast that many
    times.
    For a residual branch use `residual_apply`, which weighs the two.
    """
    return jnp.add(x, y)


def _multiply_rule(x: Any, y: Any, **_: Any) -> Factors:
    for name, value in (("x", x), ("y", y)):
        if not hasattr(value, "shape"):
            raise TypeError(
                f"`{name}` must be an array, got {value!r}: a number changes the scale "
                "of the other, which is what `scaled` is for."
            )
    out, sizes = _sizes(x=x, y=y)
    return factors_of_sum(out, out=out, **sizes)


@scaled_op(
    rule=_multiply_rule,
    cases=(case((256, 64), (256, 64)), case((64, 4096), (4096,))),
)
def multiply(
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    *,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `x * y` of two independent activations, with NumPy's broadcasting.

    Factors: 1 forward, and broadcast^-1/2 for an input that is broadcast that many
    times: its cotangent is a sum of as many products.
    """
    return jnp.multiply(x, y)


@checked
def weighted_add(
    *xs: Float[Array, "*shape"], weights: Sequence[float] | None = None
) -> Float[Array, "*shape"]:
    """The weighted sum `g_1 x_1 + g_2 x_2 + ..` of independent tensors of one shape.

    `weights`, equal by default, are given up to a common factor: g is `weights` divided
    by sqrt(sum weights^2), so that the sum has unit scale. The cotangent of x_i is
    g_i times that of the sum: the true one, as constraints demand.

    Raises:
        ValueError: if shapes differ, or there is not one positive weight for each x.

    Reference: Unit Scaling (Blake et al., 2023), section 5.
    """
    if len({x.shape for x in xs}) != 1:
        raise ValueError(
            f"`xs` must be tensors of one shape, got {[x.shape for x in xs]}."
        )
    weights = (1.0,) * len(xs) if weights is None else tuple(weights)
    if len(weights) != len(xs):
        raise ValueError(
            f"`weights` must hold one number for each of {len(xs)} tensors, got "
            f"{weights}."
        )
    norm = math.hypot(*(check_factor("weights", w) for w in weights))
    terms = (
        scaled(x, fwd=w / norm, bwd=w / norm) for x, w in zip(xs, weights, strict=True)
    )
    return ft.reduce(operator.add, terms)


Axis = int | tuple[int, ...] | None


def _terms(x: Any, axis: Axis) -> int:
    """How many numbers are added up for each one of the result."""
    rank = len(x.shape)
    axes = range(rank) if axis is None else axes_of("axis", axis, rank)
    return max(math.prod(x.shape[a] for a in axes), 1)


def _sum_rule(x: Any, *, axis: Axis, **_: Any) -> Factors:
    return Factors(_terms(x, axis) ** -0.5, {"x": 1.0})


def _mean_rule(x: Any, *, axis: Axis, **_: Any) -> Factors:
    n = _terms(x, axis)
    return Factors(n**0.5, {"x": float(n)})


_REDUCTIONS = (
    case((64, 256, 64), axis=1),
    case((32, 4096, 16), axis=(0, -1), keepdims=True),
)


@scaled_op(rule=_sum_rule, cases=_REDUCTIONS)
def sum(
    x: Float[Array, "..."],
    *,
    axis: Axis = None,
    keepdims: bool = False,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `jnp.sum` of n numbers that have no common mean.

    Factors: n^-1/2 forward, 1 for `x`.

    Reference: Unit Scaling (Blake et al., 2023), table A.2, sum.
    """
    return jnp.sum(x, axis, keepdims=keepdims)


@scaled_op(rule=_mean_rule, cases=_REDUCTIONS)
def mean(
    x: Float[Array, "..."],
    *,
    axis: Axis = None,
    keepdims: bool = False,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `jnp.mean` of n numbers that have no common mean.

    Factors: n^1/2 forward, n for `x`. At unit scale it is the same as `sum`. There is
    no `where`: how many it selects is not known while tracing.
    """
    return jnp.mean(x, axis, keepdims=keepdims)
