"""Gates: what recurrent cells are made of.

A gate multiplies, so it keeps its range: a sigmoid that is one lets everything through.
Not the gate but its product gets the factors. All agree in both passes, as all paths
through a recurrence meet.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from ..constraints import Constraint, to_output_scale
from ..moments import Moments, moments
from ..op import case, scaled_op
from ..scale import scaled
from .activation import _gated_rule

X = Float[Array, "*shape"]
GateFn = Callable[..., Any]


def _gate(x: Array, *, gate_fn: GateFn, bias: float = 0.0) -> Array:
    return gate_fn(x + bias)


_gate.__name__ = "gate_fn"  # as an error of its moments calls it


@scaled_op(
    rule=_gated_rule(_gate),
    cases=(
        case((2**14,), (2**14,)),
        case((64, 512), (64, 512), gate_fn=jax.nn.hard_sigmoid),
        case((2**14,), (2**14,), bias=1.0),
    ),
)
def gated(
    x: X,
    gate: X,
    *,
    gate_fn: GateFn = jax.nn.sigmoid,
    bias: float = 0.0,
    constraint: Constraint | None = to_output_scale,
) -> X:
    """Unit-scaled `x * gate_fn(gate + bias)`; `gate` itself is unit-scaled.

    Factors, for independent inputs: 1 / rms(gate_fn(Z + bias)) forward and for `x`,
    1 / rms(gate_fn'(Z + bias)) for `gate`; for a sigmoid 1.846 and 4.723.
    """
    return x * gate_fn(gate + bias)


def gated_carry(
    carry: X,
    value: X,
    keep: X,
    write: X | None = None,
    *,
    gate_fn: GateFn = jax.nn.sigmoid,
    bias: float = 0.0,
    feedback: float = 0.5,
) -> X:
    """A recurrent state that is partly kept and partly written: k carry + a w value.

    k = gate_fn(keep + bias) and w = gate_fn(write), or w = 1 - k without a `write`.
    The constant a makes up for the variance that k loses, so that after many steps the
    state has unit scale. k itself has no factor: an open gate would amplify the state
    at each step. The gradient is the true one, as constraints demand.

    `feedback` is the share of `value`'s variance that comes from the carry, through a
    random matrix: 1/2 where a product of the carry is half of a pre-activation. Without
    it a = sqrt(1 - E[k^2]) / rms(w); with it values resemble those before them, add up,
    and a is smaller: for sigmoids 1.552 without, 1.270 with (1.299 for w = 1 - k).

    Raises:
        ValueError: if shapes differ, rms(k) is not below one for a unit-normal `keep`,
            or `feedback` not in [0, 1).
    """
    names = ("carry", "value", "keep", "write")
    given = zip(names, (carry, value, keep, write), strict=True)
    shapes = {name: x.shape for name, x in given if x is not None}
    if len({*shapes.values()}) != 1:
        raise ValueError(f"all arguments must have the same shape, got {shapes}.")
    if not 0 <= feedback < 1:
        raise ValueError(
            f"`feedback` must be in [0, 1), got {feedback}: it is a share of the value."
        )
    kept = moments(_gate, gate_fn=gate_fn, bias=bias)
    if kept.rms >= 1 - 1e-9:
        raise ValueError(
            f"`gate_fn` must keep less than it is given, but its rms is {kept.rms:.3g} "
            "for a unit-normal input: use a function from 0 to 1, such as a sigmoid."
        )
    k = gate_fn(keep + bias)
    if write is None:
        w, mean, variance = 1 - k, 1 - kept.mean, kept.std**2
        covariance = -variance
    else:
        written = moments(_gate, gate_fn=gate_fn, bias=0.0)
        w, mean, variance = gate_fn(write), written.mean, written.std**2
        covariance = 0.0
    a = _write_factor(kept, mean, variance, covariance, feedback)
    return k * carry + scaled(w * value, fwd=a, bwd=a)


def _write_factor(
    kept: Moments, w: float, variance: float, covariance: float, feedback: float
) -> float:
    """The a of h' = K h + a W v for which h gets unit scale; E[K] = k, E[W] = w.

    The gates' means filter a signal in time, and their deviations add white noise of
    variance N = Var[K] + a^2 Var[W] + 2 a Cov[K, W] E[h v]. For v = sqrt(feedback) M h
    + .. with a random matrix M of unit scale, h of unit variance has the spectrum S,
    with e = exp(i frequency):

        S |e - k|^2 = a^2 w^2 (feedback S + 1 - feedback) + N
        S = (N + a^2 (w^2 - q)) / (1 + k^2 - a^2 q - 2 k cos), q = feedback w^2

    Its mean over all frequencies is to be one, and that of 1 / (c - 2 k cos) is
    (c^2 - 4 k^2)^-1/2. E[h v] follows from 1 = E[h'^2], that is from
    1 = E[K^2] + a^2 E[W^2] + 2 a E[K W] E[h v]. So a^2 is the smaller positive root of

        (N + a^2 (w^2 - q))^2 = (1 + k^2 - a^2 q)^2 - 4 k^2,

    whose left side is (constant + slope a^2)^2.
    """
    k, k_square, w_square = kept.mean, kept.rms**2, w**2 + variance
    q = feedback * w**2
    ratio = covariance / (k * w + covariance) if covariance else 0.0
    constant = kept.std**2 + ratio * (1 - k_square)
    slope = (1 - ratio) * w_square - q
    linear = slope * constant + q * (1 + k**2)
    rest = (1 - k**2) ** 2 - constant**2
    root = math.sqrt(linear**2 + (slope**2 - q**2) * rest)
    return math.sqrt(rest / (linear + root))
