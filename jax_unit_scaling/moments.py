"""Scales under normal inputs, by quadrature: elementwise functions and softmax."""

import functools as ft
import math
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np


class Moments(NamedTuple):
    """Statistics of `f(Z)` and of its slope `f'(Z)`, with Z standard normal."""

    mean: float
    std: float
    rms: float
    slope_rms: float


# The midpoints of cells 2^-15 wide. Beyond twelve standard deviations lies 4e-33 of the
# probability. For smooth functions the midpoint rule converges faster than any power of
# the width (the normal density has no ends); a kink costs nothing on a cell's edge, as
# at 0, 1 or 1/8, and the square of the width elsewhere; a jump, as of a kink's
# derivative, costs at most its width times the density: 1e-5.
_WIDTH = 2.0**-15


@ft.cache
def _grid() -> np.ndarray:  # not made at import
    return np.arange(-12.0, 12.0, _WIDTH) + _WIDTH / 2


# A second rule, to judge the first by: every third point, the midpoints of cells three
# times as wide, out to ten deviations. Where the two disagree the integral has a pole
# or its weight lies in the far tail, and where `f` itself disagrees on the common
# points it is not elementwise.
@ft.cache
def _coarse() -> np.ndarray:
    return np.flatnonzero(np.abs(_grid()) < 10)[1::3]


_AGREEMENT = 1e-3


@ft.lru_cache(maxsize=1024)
def moments(f: Callable[..., jax.Array], **options: Hashable) -> Moments:
    """The moments of the elementwise `x -> f(x, **options)` under a normal input.

    Computed in float64 while tracing, once for each function object and its options.
    `f` sees a vector.

    Raises:
        ValueError: if `f` is not elementwise, if its output or its slope is constantly
            zero or has no finite second moment under the normal distribution.
        TypeError: if `f` closes over a value that is not known while tracing.
    """
    name = getattr(f, "__name__", repr(f))
    f = ft.partial(f, **options)
    grid, some = _grid(), _coarse()
    y, dy = _evaluate(f, grid)
    coarse, _ = _evaluate(f, grid[some])
    if not np.allclose(coarse, y[some], rtol=1e-6, atol=1e-12, equal_nan=True):
        raise ValueError(
            f"`{name}` is not elementwise: its value at a point depends on the other "
            "points. Only functions of one number at a time have factors of this kind."
        )
    fine = _integrate(y, dy, grid)
    rough = _integrate(coarse, dy[some], grid[some])
    if not (np.isfinite(fine).all() and _agree(fine, rough)):
        raise ValueError(
            f"`{name}` has no finite second moment under a standard normal input, for "
            f"itself or its derivative (estimates {rough} and {fine}): it grows too "
            "fast or has a pole, so no factor gives it unit scale."
        )
    if fine.std <= 0 or fine.slope_rms <= 0:
        what = "is constant" if fine.std <= 0 else "has a derivative of zero"
        raise ValueError(
            f"`{name}` {what} almost everywhere, so no factor gives "
            f"{'it' if fine.std <= 0 else 'its gradient'} unit scale. Give it a slope, "
            "for example by a straight-through estimator."
        )
    return fine


def _integrate(y: np.ndarray, dy: np.ndarray, x: np.ndarray) -> Moments:
    p = np.exp(-(x**2) / 2)
    p /= p.sum()
    with np.errstate(all="ignore"):
        mean = p @ y
        variance = p @ (y - mean) ** 2
        second, slope = p @ y**2, p @ dy**2
    # A constant's variance is rounding, not scale.
    variance = variance if variance > 1e-24 * second else 0.0
    return Moments(*map(float, (mean, *np.sqrt([variance, second, slope]))))


def _agree(a: Moments, b: Moments) -> bool:
    """Whether the two rules give the same scales (the mean may well be zero)."""
    return all(
        math.isclose(p, q, rel_tol=_AGREEMENT)
        for p, q in zip(a[1:], b[1:], strict=True)
    )


def _evaluate(
    f: Callable[..., jax.Array], x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`f(x)` and `f'(x)` in float64, whatever is being traced around the call.

    A thread of its own has none of the caller's tracing contexts: under an eager
    `shard_map` or an explicit mesh `jax.ensure_compile_time_eval` alone does not
    suffice.
    """
    with ThreadPoolExecutor(1) as fresh:
        try:
            y, dy = fresh.submit(_value_and_slope, f, x).result()
        except (
            jax.errors.UnexpectedTracerError,
            jax.errors.ConcretizationTypeError,
        ) as e:
            raise TypeError(
                "the function's factors are fixed while tracing, so it must not close "
                "over traced values: pass hyperparameters as Python numbers."
            ) from e
    if y.shape != x.shape:
        raise ValueError(
            f"an elementwise function keeps its input's shape, got {y.shape} from "
            f"{x.shape}."
        )
    return y, dy


def _value_and_slope(
    f: Callable[..., jax.Array], x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    @jax.jit
    def value_and_slope(x: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, vjp = jax.vjp(f, x)
        return y, vjp(g.astype(y.dtype))[0] if y.shape == g.shape else x

    with jax.enable_x64(True), jax.default_device(_cpu()):
        y, dy = value_and_slope(x, np.ones_like(x))
        return np.asarray(y, np.float64), np.asarray(dy, np.float64)


def _cpu() -> "jax.Device | None":
    """The host, where float64 is at home; None (the default) where it is hidden."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


# The grid has (180 std)^2 points: here 33 million, of 8 bytes.
_WIDEST = 32.0


class SoftmaxMoments(NamedTuple):
    """Moments of p = softmax(x), x independent normals, for several lengths n.

    `square` is E[p_i^2]. `gradient` is the variance of the cotangent of x_i under an
    independent unit-normal cotangent g of p, that is of p_i (g_i - sum_j p_j g_j):
    E[p_i^2] - 2 E[p_i^3] + E[p_i^4] + (n - 1) E[p_i^2 p_j^2].
    """

    square: np.ndarray
    gradient: np.ndarray


def softmax_moments(std: float, lengths: np.ndarray) -> SoftmaxMoments:
    """Moments of softmax over `lengths` independent logits of scale `std`, exactly.

    With S = sum_j exp(x_j), 1 / S^k is the integral over t of t^(k-1) exp(-t S) /
    (k-1)! (Laplace), and E[exp(-t S)] is a product over the independent x_j.
    With t = exp(u), h_k(v) = exp(k v - exp(v)), H_k(u) = E[h_k(u + std Z)]:

        E[p_i^k]       = integral of H_k(u) H_0(u)^(n-1)   du / (k-1)!
        E[p_i^2 p_j^2] = integral of H_2(u)^2 H_0(u)^(n-2) du / 3!

    All integrands are smooth and vanish at both ends, where the trapezoidal rule
    converges faster than any power of its step.

    Raises:
        ValueError: if `std` is above 32.
    """
    if std > _WIDEST:
        raise ValueError(
            f"`mult` must leave the logits a standard deviation of {_WIDEST} or less, "
            f"got {std:.4g}: their softmax is nearly one-hot, and hardly trains."
        )
    n = np.asarray(lengths, np.float64)[:, None]
    step = 0.1  # of u, and of std Z: h_k varies on a scale of one
    # p <= 1 bounds what lies outside: nine deviations of Z hold all but 2e-19 of it;
    # h_0 is 1 to double precision below -36, and h_k underflows above 7.
    u = np.arange(-36 - 9 * std - np.log(n.max()), 7 + 9 * std, step)
    z = np.arange(-9.0, 9.0, step / max(std, 1.0))
    density = np.exp(-(z**2) / 2)
    density /= density.sum()
    v = u[:, None] + std * z
    exp_v = np.exp(v)
    h = [np.exp(k * v - exp_v) @ density for k in (2, 3, 4)]
    h0_minus_1 = np.maximum(np.expm1(-exp_v) @ density, -1 + 1e-16)
    log_h0 = np.log1p(h0_minus_1)

    def integral(values: np.ndarray, power: np.ndarray) -> np.ndarray:
        return np.exp(np.maximum(power, 0) * log_h0) @ values * step

    square, cube, fourth = (
        integral(h_k, n - 1) / math.factorial(k - 1)
        for k, h_k in zip((2, 3, 4), h, strict=True)
    )
    pair = integral(h[0] ** 2, n - 2) / math.factorial(3)
    others = n[:, 0] - 1
    gradient = square - 2 * cube + fourth + others * pair
    return SoftmaxMoments(square, np.maximum(gradient, 0.0))


@ft.lru_cache(maxsize=1024)
def max_moments(n: int) -> tuple[float, float]:
    """The mean and the mean square of the largest of `n` independent standard normals.

    Its density is n phi(z) Phi(z)^(n-1): smooth, and below 1e-30 at the ends up to
    n = 1e9, so that the trapezoidal rule is exact to double precision.
    """
    z = np.arange(-12.0, 14.0, 2.0**-6)
    below = np.array([math.erfc(-t / math.sqrt(2)) / 2 for t in z])
    p = np.exp(-(z**2) / 2) * below ** (n - 1)
    p /= p.sum()
    return float(p @ z), float(p @ z**2)
