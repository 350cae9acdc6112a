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
from ..moments import moments
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
    ),
)
def gated(
    x: X,
    gate: X,
    *,
    gate_fn: GateFn = jax.nn.sigmoid,
    constraint: Constraint | None = to_output_scale,
) -> X:
    """Unit-scaled `x * gate_fn(gate)`; `gate` is what the gate function is applied to.

    Factors, for independent inputs: 1 / rms(gate_fn(Z)) forward and for `x`,
    1 / rms(gate_fn'(Z)) for `gate`; for a sigmoid 1.846 and 4.723.
    """
    return x * gate_fn(gate)


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
    and a is smaller: 1.552 and 1.270 for a sigmoid.

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
    if kept.rms >= 1:
        raise ValueError(
            f"`gate_fn` must keep less than it is given, but its rms is {kept.rms:.3g} "
            "for a unit-normal input: use a function from 0 to 1, such as a sigmoid."
        )
    k = gate_fn(keep + bias)
    if write is None:
        w, mean, square = 1 - k, 1 - kept.mean, 1 - 2 * kept.mean + kept.rms**2
    else:
        written = moments(_gate, gate_fn=gate_fn)
        w, mean, square = gate_fn(write), written.mean, written.rms**2
    a = _write_factor(kept.mean, kept.rms**2, mean, square, feedback)
    return k * carry + scaled(w * value, fwd=a, bwd=a)


def _write_factor(
    k: float, k_square: float, w: float, w_square: float, feedback: float
) -> float:
    """The a of h' = K h + a W v for which h gets unit scale; E[K] = k, E[W] = w.

    The gates' means filter a signal in time, and their variances add white noise. For
    v = sqrt(feedback) M h + .. with a random matrix M of unit scale, h of unit variance
    has the spectrum S, with e = exp(i frequency):

        S |e - k|^2 = a^2 w^2 (feedback S + 1 - feedback) + a^2 Var[W] + Var[K]
        S = (a^2 (E[W^2] - q) + Var[K]) / (1 + k^2 - a^2 q - 2 k cos), q = feedback w^2

    Its mean over all frequencies is to be one. That of 1 / (c - 2 k cos) being
    (c^2 - 4 k^2)^-1/2, it is the smaller positive root of a quadratic in a^2:

        (a^2 (E[W^2] - q) + Var[K])^2 = (1 + k^2 - a^2 q)^2 - 4 k^2
    """
    q = feedback * w**2
    noise = k_square - k**2
    linear = (w_square - q) * noise + q * (1 + k**2)
    constant = (1 - k**2) ** 2 - noise**2
    root = math.sqrt(linear**2 + w_square * (w_square - 2 * q) * constant)
    return math.sqrt(constant / (linear + root))
