"""The one primitive: one factor on the way forward, another on the way back."""

import functools as ft
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def scaled(
    x: Float[Array, "*shape"], *, fwd: float = 1.0, bwd: float = 1.0
) -> Float[Array, "*shape"]:
    """Returns `fwd * x`; the cotangent `g` that comes back is returned as `bwd * g`.

    Both keep `x`'s dtype. The factors are fixed while tracing: a factor of one costs no
    operation, XLA folds the others, and nothing is saved for the backward pass.

    Where `fwd != bwd` this is deliberately not the derivative. It is sound where the
    constraints of the paper hold: see DESIGN.md. Where they
    agree it is a plain product.
    Forward-mode differentiation of a false gradient has no meaning and is refused by
    JAX (`custom_vjp`).

    Raises:
        TypeError: if `x` is not floating point, or a factor is not a Python number.
        ValueError: if a factor is not finite and positive.

    Reference: Unit Scaling (Blake et al., 2023), section 5.1, "scaled op".
    """
    x = floating(x)
    fwd, bwd = check_factor("fwd", fwd), check_factor("bwd", bwd)
    # A product's derivative is itself: no rule need be written, or traced, for it.
    return times(x, fwd) if fwd == bwd else _scaled(x, fwd, bwd)


def scale_fwd(x: Float[Array, "*shape"], s: float) -> Float[Array, "*shape"]:
    """`scaled(x, fwd=s)`: multiplies `x` by `s`, and leaves its cotangent alone."""
    return scaled(x, fwd=check_factor("s", s))


def scale_bwd(x: Float[Array, "*shape"], s: float) -> Float[Array, "*shape"]:
    """`scaled(x, bwd=s)`: multiplies `x`'s cotangent by `s`, and leaves `x` alone."""
    return scaled(x, bwd=check_factor("s", s))


@ft.partial(jax.custom_vjp, nondiff_argnums=(1,))
def forward_only(x: Array, why: str) -> Array:
    """`x`, which has no derivative: it raises a TypeError that says why."""
    return x


def _refuse(x: Array, why: str) -> tuple[Array, None]:
    raise TypeError(why)


forward_only.defvjp(_refuse, lambda why, _, g: (g,))


def _scaled(x: Array, fwd: float, bwd: float) -> Array:
    return _scaling(fwd, bwd)(x)


# A function for each pair of factors, kept, is traced twice as fast as one function
# with `nondiff_argnums`; a large model has a few dozen pairs.
@ft.lru_cache(maxsize=4096)
def _scaling(fwd: float, bwd: float) -> Callable[[Array], Array]:
    """`x -> fwd * x`, whose cotangent is multiplied by `bwd`."""

    @jax.custom_vjp
    def scaling(x: Array) -> Array:
        return times(x, fwd)

    # Through itself, so that a second derivative is scaled again.
    scaling.defvjp(lambda x: (scaling(x), None), lambda _, g: (times(g, bwd),))
    return scaling


def times(x: Array, factor: float) -> Array:
    """`factor * x`, rounded once where `x`'s dtype cannot hold `factor` itself.

    A Python float is weakly typed, so the product is taken in `x`'s dtype and folds
    into its neighbours. That would lose a factor outside float16's range (1e-5, say)
    or bend one in an 8-bit dtype by up to 6%, so there the product is taken in float32.
    """
    if factor == 1.0:
        return x
    dtype = jnp.finfo(x.dtype)
    if dtype.bits >= 16 and float(dtype.tiny) <= factor <= float(dtype.max):
        return x * factor
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def floating(x: Array, name: str = "x") -> Array:
    """`x` as an array; `name` is what an error calls it.

    Raises:
        TypeError: if it is not one of floating-point numbers.
    """
    x = jnp.asarray(x)
    check_floating(name, x.dtype)
    return x


def check_floating(name: str, dtype: Any) -> None:
    """Refuses, by a TypeError, what is not a floating-point dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be a floating-point array, got {dtype}: convert it first, "
            f"for example `{name}.astype(jnp.float32)`."
        )


def check_factor(name: str, value: object) -> float:
    """`value` as a float, if it can be a factor.

    Raises:
        TypeError: if it is not a Python number.
        ValueError: if it is not finite and positive.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"`{name}` must be a Python number that is known while tracing, got "
            f"{type(value).__name__}: factors depend on shapes, never on values. Pass "
            "a number computed from static shapes."
        )
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(
            f"`{name}` must be finite and positive, got {value}: a factor changes a "
            "scale, never a sign. Pass a positive number, or negate the tensor itself."
        )
    return number
