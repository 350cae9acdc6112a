"""Orders of transformations that make no sense are refused, and the right one named.

Cotangents have unit scale where `unit_scale` sees them: in a backward pass that is
written down. Differentiated afterwards, a function has cotangents of their true size,
and to round those to a narrow format loses them silently. That can only be seen when
it is differentiated, so the equations that would round then refuse to be.
"""

import jax
from jaxtyping import Array


def refusal() -> TypeError:
    """Of a gradient in which a cotangent would be rounded at its true size."""
    return TypeError(
        "`unit_scale` was applied to a loss, and a cotangent would be rounded to a "
        "format without being of unit scale. Differentiate first: "
        "`unit_scale(jax.value_and_grad(simulate_fp8(loss)), *args)`, in place of "
        "`jax.value_and_grad` of a function with `unit_scale` and `simulate_fp8` in it."
    )


# Its name is what its equation is called.
@jax.custom_vjp
def forward_only(x: Array) -> Array:
    """`x`, which refuses to have a derivative."""
    return x


def _refuse(x: Array) -> tuple[Array, None]:
    raise refusal()


forward_only.defvjp(_refuse, lambda _, g: (g,))
