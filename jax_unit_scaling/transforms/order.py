"""Orders of transformations that make no sense are refused, and the right one named.

Cotangents have unit scale where `unit_scale` sees them: in a backward pass that is
written down. Differentiated afterwards, a function has cotangents of their true size,
and to round those to a narrow format loses them silently. That can only be seen when
it is differentiated, so the equations that would round then refuse to be.
"""

import jax
from jaxtyping import Array

from ..scale import forward_only

# True while a function is traced whose products' operands will be rounded to a format.
ROUNDED_LATER = jax.make_user_context(False)

_WHY = (
    "`unit_scale` was applied to a loss, and a cotangent would be rounded to a format "
    "without being of unit scale. Differentiate first: "
    "`unit_scale(jax.value_and_grad(simulate_fp8(loss)), *args)`, or the same with a "
    "loss that has formats of its own, in place of `jax.value_and_grad` of a function "
    "with `unit_scale` and formats in it."
)


def refusal() -> TypeError:
    """Of a gradient in which a cotangent would be rounded at its true size."""
    return TypeError(_WHY)


def not_rounded_later(x: Array) -> Array:
    """`x`, whose cotangent would be rounded at its true size."""
    return forward_only(x, _WHY)
