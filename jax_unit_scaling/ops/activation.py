"""Elementwise functions: their factors are computed, whatever the function."""

import functools as ft
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..constraints import Constraint, to_output_scale
from ..moments import moments
from ..op import AxisName, Case, Constant, Factors, Op, case, scaled_op
from ..scale import check_factor

P = ParamSpec("P")
R = TypeVar("R")
X = Float[Array, "*shape"]


def unit_scaled(f: Callable[..., Array]) -> Op[..., Array]:
    """Unit-scales any elementwise JAX function: `unit_scaled(jnp.sin)(x)`.

    Factors: `1 / std(f(Z))` forward and `1 / rms(f'(Z))` backward, Z standard normal,
    integrated numerically while tracing and cached. The result is called as
    `g(x, *, constraint=to_output_scale, **options)`; `options` go on to `f`, and are
    fixed while tracing. Calling it raises a `ValueError` if `f` is not elementwise, or
    if it or its derivative is zero or not square-integrable under the normal density.

    Reference: Unit Scaling (Blake et al., 2023), appendix A.2, for any function.
    """

    @ft.wraps(f, assigned=("__name__", "__doc__"), updated=())
    def fn(
        x: X, *, constraint: Constraint | None = to_output_scale, **options: Any
    ) -> X:
        return f(x, **options)

    del fn.__wrapped__  # its signature is the one above
    return Op(fn, _elementwise_rule(f))


def _elementwise_rule(f: Callable[..., Array]) -> Callable[..., Factors]:
    def rule(x: Array, **options: Hashable) -> Factors:
        m = _moments(f, options)
        return Factors(1 / m.std, {"x": 1 / m.slope_rms})

    return rule


def _gated_rule(f: Callable[..., Array]) -> Callable[..., Factors]:
    """For `x * f(gate)`, x and gate independent, so that E[x f(gate)] = 0."""

    def rule(x: Array, gate: Array, **options: Hashable) -> Factors:
        if x.shape != gate.shape:
            raise ValueError(
                "`x` and `gate` must have the same shape, got "
                f"{x.shape} and {gate.shape}."
            )
        m = _moments(f, options)
        return Factors(1 / m.rms, {"x": 1 / m.rms, "gate": 1 / m.slope_rms})

    return rule


def _moments(f: Callable[..., Array], options: dict[str, Hashable]) -> Any:
    if "mult" in options:
        check_factor("mult", options["mult"])
    for name, value in options.items():
        if isinstance(value, jax.Array):
            raise TypeError(
                f"`{name}` must be a Python number that is known while tracing, got "
                f"{value}: the factors depend on it."
            )
    return moments(f, **options)


def _elementwise(*cases: Case) -> Callable[[Callable[P, R]], Op[P, R]]:
    def decorate(f: Callable[P, R]) -> Op[P, R]:
        return scaled_op(rule=_elementwise_rule(f), cases=cases)(f)  # type: ignore[arg-type]

    return decorate


_SHAPES = (case((2**14,)), case((64, 512)))
_MULTS = (*_SHAPES, *(case((2**14,), mult=m) for m in (0.25, 4.0)))
_GATED = tuple(Case(c.args * 2, c.options, c.error) for c in _MULTS)


@_elementwise(*_SHAPES)
def relu(x: X, *, constraint: Constraint | None = to_output_scale) -> X:
    """Unit-scaled ReLU: factors sqrt(2 / (1 - 1/pi)) forward, sqrt(2) backward."""
    return jax.nn.relu(x)


@_elementwise(*_SHAPES, case((2**14,), negative_slope=0.2))
def leaky_relu(
    x: X,
    *,
    negative_slope: float = 0.01,
    constraint: Constraint | None = to_output_scale,
) -> X:
    """Unit-scaled leaky ReLU."""
    return jax.nn.leaky_relu(x, negative_slope)


@_elementwise(*_SHAPES)
def elu(
    x: X, *, alpha: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled exponential linear unit."""
    return jax.nn.elu(x, alpha)


@_elementwise(*_SHAPES)
def selu(x: X, *, constraint: Constraint | None = to_output_scale) -> X:
    """Unit-scaled SELU; its own constants already make the forward factor 1."""
    return jax.nn.selu(x)


@_elementwise(*_SHAPES)
def celu(
    x: X, *, alpha: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled continuously differentiable exponential linear unit."""
    return jax.nn.celu(x, alpha)


@_elementwise(*_MULTS, case((2**14,), approximate=False))
def gelu(
    x: X,
    *,
    mult: float = 1.0,
    approximate: bool = True,
    constraint: Constraint | None = to_output_scale,
) -> X:
    """Unit-scaled GELU, `gelu(mult * x) / mult`. A large `mult` is nearly a ReLU.

    Factors 1.7009 forward and 1.4811 backward at `mult=1`, exact at every other; the
    PyTorch library's fit differs by up to 4%.
    """
    return jax.nn.gelu(mult * x, approximate) / mult


@_elementwise(*_MULTS)
def silu(
    x: X, *, mult: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled SiLU (swish), `x * sigmoid(mult * x)`.

    Factors 1.7872 forward and 1.6233 backward at `mult=1`, exact at every other; the
    PyTorch library's fit differs by up to 4%.
    """
    return x * jax.nn.sigmoid(mult * x)


@_elementwise(*_MULTS)
def tanh(
    x: X, *, mult: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled `tanh(mult * x) / mult`: 1.5925 and 1.4674 at `mult=1`."""
    return jnp.tanh(mult * x) / mult


@_elementwise(*_MULTS)
def sigmoid(
    x: X, *, mult: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled `sigmoid(mult * x) / mult`: 4.8013 and 4.7226 at `mult=1`."""
    return jax.nn.sigmoid(mult * x) / mult


@_elementwise(*_MULTS)
def softplus(
    x: X, *, mult: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled `softplus(mult * x) / mult`. A large `mult` is nearly a ReLU."""
    return jax.nn.softplus(mult * x) / mult


@_elementwise(*_MULTS)
def mish(
    x: X, *, mult: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled `mish(mult * x) / mult`, with mish(x) = x tanh(softplus(x))."""
    return jax.nn.mish(mult * x) / mult


@_elementwise(*_MULTS)
def hard_tanh(
    x: X, *, mult: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled `clip(mult * x, -1, 1) / mult`."""
    return jax.nn.hard_tanh(mult * x) / mult


@_elementwise(*_SHAPES)
def squareplus(
    x: X, *, b: float = 4.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled `(x + sqrt(x^2 + b)) / 2`."""
    return jax.nn.squareplus(x, b)


@scaled_op(rule=_gated_rule(silu.fn), cases=_GATED)
def silu_glu(
    x: X, gate: X, *, mult: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled SwiGLU gate, `x * gate * sigmoid(mult * gate)`.

    Factors, for independent inputs: 1 / rms(silu(Z)) forward and for `x`,
    1 / rms(silu'(Z)) for `gate`.
    """
    return x * silu.fn(gate, mult=mult)


@scaled_op(
    rule=_gated_rule(gelu.fn),
    cases=(*_GATED, case((2**14,), (2**14,), approximate=False)),
)
def gelu_glu(
    x: X,
    gate: X,
    *,
    mult: float = 1.0,
    approximate: bool = True,
    constraint: Constraint | None = to_output_scale,
) -> X:
    """Unit-scaled GEGLU gate, `x * gelu(mult * gate) / mult`; factors as `silu_glu`."""
    return x * gelu.fn(gate, mult=mult, approximate=approximate)


def _prelu_rule(x: Any, negative_slope: Any, *, initial_slope: float) -> Factors:
    if jnp.broadcast_shapes(negative_slope.shape, x.shape) != x.shape:
        raise ValueError(
            f"`negative_slope` must be broadcastable to `x` of shape {x.shape}, got "
            f"shape {negative_slope.shape}."
        )
    m = _moments(jax.nn.leaky_relu, {"negative_slope": initial_slope})
    # The slope's cotangent adds up min(x, 0) g over all that it multiplies, whose mean
    # square is 1/2: half of x is negative.
    slope = (2 * max(negative_slope.size, 1) / max(x.size, 1)) ** 0.5
    return Factors(1 / m.std, {"x": 1 / m.slope_rms, "negative_slope": slope})


@scaled_op(
    rule=_prelu_rule,
    parameters=("negative_slope",),
    cases=(
        case((64, 4096), Constant((4096,), 0.01)),
        case((64, 4096), Constant((64, 4096), 0.25), initial_slope=0.25),
    ),
)
def prelu(
    x: Float[Array, "..."],
    negative_slope: Float[Array, "..."],
    *,
    initial_slope: float = 0.01,
    constraint: Constraint | None = to_output_scale,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled parametric ReLU: x, and `negative_slope` x where x is negative.

    Factors: those of `leaky_relu` with the `initial_slope`, as no factor can follow
    what is learnt; (2 slopes / inputs)^1/2 for `negative_slope`.
    """
    return jnp.where(x >= 0, x, negative_slope * x)
