"""One step of each recurrent cell, from its layers' products.

Pre-activations are the sum of a unit-scaled product of the input and one of the hidden
state, in equal shares; candidates are unit-scaled; gates are plain functions, and what
they multiply has the factors (`gated`, `gated_carry`). All factors of activations agree
in both passes, so gradients are true up to a constant for each parameter.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ..moments import moments
from ..ops.activation import tanh, unit_scaled
from ..ops.arithmetic import weighted_add
from ..ops.recurrent import gated, gated_carry
from ..scale import scale_bwd, scaled

Fn = Callable[..., Any]
Pair = tuple[jax.Array, jax.Array]
T = TypeVar("T")


def simple_step(
    from_input: jax.Array,
    from_carry: jax.Array,
    carry: jax.Array,
    *,
    activation_fn: Fn,
    residual: bool,
) -> jax.Array:
    """h' = tanh(W_i x + W_h h), or with `+ h`."""
    if residual:  # the carry's half is divided: more of it would be unstable
        from_carry = weighted_add(from_carry, carry)
    return unit_scaled(activation_fn)(weighted_add(from_input, from_carry))


def lstm_step(
    c: jax.Array,
    i: jax.Array,
    f: jax.Array,
    g: jax.Array,
    o: jax.Array,
    *,
    gate_fn: Fn,
    activation_fn: Fn,
    forget_bias: float = 0.0,
) -> tuple[Pair, jax.Array]:
    """The carry (c', h') and h', from c and the pre-activations of the four gates."""
    activation = unit_scaled(activation_fn)
    c = gated_carry(c, activation(g), f, i, gate_fn=gate_fn, bias=forget_bias)
    h = gated(activation(c), o, gate_fn=gate_fn)
    return (c, h), h


def gru_step(
    h: jax.Array,
    r: Pair,
    z: Pair,
    n: Pair,
    *,
    gate_fn: Fn,
    activation_fn: Fn,
) -> jax.Array:
    """h' from h and the products of (input, h) for reset, update and candidate."""
    reset = gated(n[1], weighted_add(*r), gate_fn=gate_fn)
    candidate = unit_scaled(activation_fn)(weighted_add(n[0], reset))
    return gated_carry(h, candidate, weighted_add(*z), gate_fn=gate_fn)


def mgu_step(
    h: jax.Array,
    f: Pair,
    n: Pair,
    *,
    gate_fn: Fn,
    activation_fn: Fn,
    reset_gate: bool,
    forget_bias: float,
) -> jax.Array:
    """h' from h and the products of (input, h) for forget gate and candidate.

    `forget_bias` is what the first of `f` starts around, in place of zero.
    """
    mean = forget_bias * 2**-0.5  # its share in a sum of two
    keep = weighted_add(*f) - mean
    reset = gated(n[1], keep, gate_fn=gate_fn, bias=mean) if reset_gate else n[1]
    candidate = unit_scaled(activation_fn)(weighted_add(n[0], reset))
    if reset_gate:  # one gate for both: little is written of what is not reset
        gate: dict[str, Any] = {"gate_fn": gate_fn, "bias": mean}
        alone, both = (moments(f, **gate).rms for f in (_written, _written_after_reset))
        candidate = scaled(candidate, fwd=alone / both, bwd=alone / both)
    return gated_carry(h, candidate, keep, gate_fn=gate_fn, bias=mean)


def _written(z: jax.Array, *, gate_fn: Fn, bias: float) -> jax.Array:
    """The share 1 - f of a candidate of scale one."""
    return 1 - gate_fn(z + bias)


def _written_after_reset(z: jax.Array, *, gate_fn: Fn, bias: float) -> jax.Array:
    """The same of one whose pre-activation is n_0 + c f n_1, over sqrt(2), as if the
    activation were linear; c as in `gated`."""
    f = gate_fn(z + bias)
    c = 1 / moments(_gate_alone, gate_fn=gate_fn, bias=bias).rms
    return (1 - f) * jnp.sqrt((1 + (c * f) ** 2) / 2)


def _gate_alone(z: jax.Array, *, gate_fn: Fn, bias: float) -> jax.Array:
    return gate_fn(z + bias)


def highway_step(
    dense: Callable[[jax.Array], jax.Array],
    h: jax.Array,
    inputs: jax.Array,
    *,
    rebias: float,
) -> jax.Array:
    """h' = (1 - u) h + a u tanh(t), u = sigmoid(u' - rebias), [t, u'] = dense([x, h]).

    Reference: Unit Scaling (Blake et al., 2023), section 6.1.
    """
    t, u = jnp.split(dense(jnp.concatenate([inputs, h], axis=-1)), 2, axis=-1)
    # 1 - sigmoid(x) = sigmoid(-x), for which -u is as unit-normal as u.
    return gated_carry(h, tanh(t), -u, bias=rebias)


def each_step(parameters: T, steps: int) -> T:
    """Parameters of a loop with the factor steps^-1/2: each sums `steps` gradients."""
    factor = max(steps, 1) ** -0.5
    return jax.tree.map(lambda p: scale_bwd(p, factor), parameters)
