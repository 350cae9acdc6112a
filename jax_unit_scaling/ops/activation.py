"""Elementwise functions: their factors are computed, whatever the function."""

import functools as ft
import inspect
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..arguments import check_broadcast
from ..constraints import Constraint, to_output_scale
from ..moments import Moments, moments
from ..op import AxisName, Case, Constant, Factors, Op, case, scaled_op
from ..scale import check_factor, times

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
    if not callable(f):
        raise TypeError(f"`f` must be a function of an array, got {f!r}.")

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


def _moments(f: Callable[..., Array], options: dict[str, Hashable]) -> Moments:
    if "mult" in options:
        check_factor("mult", options["mult"])
    for name, value in options.items():
        if isinstance(value, jax.Array) or not isinstance(value, Hashable):
            raise TypeError(
                f"`{name}` must be a Python number that is known while tracing, got "
                f"{value!r}: the factors depend on it."
            )
    if f in _AT_DEFAULTS and options == _defaults(f):
        return _AT_DEFAULTS[f]
    return moments(f, **options)


@ft.cache
def _defaults(f: Callable[..., Array]) -> dict[str, Any]:
    """The options of an operation's plain function, and their values by default."""
    keywords = inspect.signature(f).parameters.values()
    return {
        p.name: p.default
        for p in keywords
        if p.kind is p.KEYWORD_ONLY and p.name != "constraint"
    }


def _elementwise(*cases: Case, **about: Any) -> Callable[[Callable[P, R]], Op[P, R]]:
    def decorate(f: Callable[P, R]) -> Op[P, R]:
        rule = _elementwise_rule(f)  # type: ignore[arg-type]
        return scaled_op(rule=rule, cases=cases, **about)(f)

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


def _silu_times(x: Array, factor: float, *, mult: float) -> Array:
    return x * times(jax.nn.sigmoid(mult * x), factor)


@_elementwise(*_MULTS, multiplied=_silu_times)
def silu(
    x: X, *, mult: float = 1.0, constraint: Constraint | None = to_output_scale
) -> X:
    """Unit-scaled SiLU (swish), `x * sigmoid(mult * x)`.

    Factors 1.7872 forward and 1.6233 backward at `mult=1`, exact at every other; the
    PyTorch library's fit differs by up to 4%.
    """
    return _silu_times(x, 1.0, mult=mult)


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


@scaled_op(
    rule=_gated_rule(silu.fn),
    cases=_GATED,
    multiplied=lambda x, gate, factor, *, mult: (
        x * _silu_times(gate, factor, mult=mult)
    ),
)
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
    multiplied=lambda x, gate, factor, **options: (
        x * times(gelu.fn(gate, **options), factor)
    ),
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
    check_broadcast("negative_slope", negative_slope, x.shape)
    m = _moments(leaky_relu.fn, {"negative_slope": initial_slope})
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


# What the quadrature gives at the default options, kept because it is slow: 0.12 to
# 0.19 seconds a function on one CPU core, in each process, much beside the tracing of a
# small model. They are no second truth: a test in test_moments.py holds each to what
# `moments` gives, to eleven digits.
_AT_DEFAULTS: dict[Callable[..., Array], Moments] = {
    relu.fn: Moments(0.398942280417, 0.583819370093, 0.707106781187, 0.707106781187),
    leaky_relu.fn: Moments(
        0.394952857613, 0.586568188929, 0.707142135642, 0.707142135642
    ),
    elu.fn: Moments(0.160520572267, 0.786879001735, 0.803084937907, 0.817375067636),
    selu.fn: Moments(0, 1, 1, 1.03516906463),
    celu.fn: Moments(0.160520572267, 0.786879001735, 0.803084937907, 0.817375067636),
    gelu.fn: Moments(0.282038588079, 0.587918315642, 0.652068793175, 0.675142833749),
    silu.fn: Moments(0.206620964142, 0.559538467842, 0.596469211123, 0.616021388941),
    tanh.fn: Moments(0, 0.627928730349, 0.627928730349, 0.681471131045),
    sigmoid.fn: Moments(0.5, 0.208276344932, 0.541644750605, 0.211745699721),
    softplus.fn: Moments(
        0.806059183347, 0.521070534381, 0.959815559813, 0.541644750605
    ),
    mish.fn: Moments(0.240403888375, 0.628130689292, 0.672563894642, 0.692158766739),
    hard_tanh.fn: Moments(0, 0.7183721535, 0.7183721535, 0.826250260004),
    squareplus.fn: Moments(1.10930551379, 0.519077332461, 1.22474487139, 0.53788045638),
}
