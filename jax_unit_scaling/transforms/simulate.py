"""Simulated number formats: any function, with its products on rounded operands.

A product y = x w with cotangent g is computed as q(x) q(w), and its backward products
as r(g) q(w) and r(g) q(x), where q rounds to the forward format and r to the backward
one: what hardware does that multiplies 8-bit operands and adds up in a wider format.
"""

import dataclasses
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from .._jaxpr import (
    UNIT_SCALED,
    Call,
    Equation,
    Interpreter,
    Region,
    Side,
    flow,
    is_literal,
    transform,
)
from ..formats import E4M3, E5M2, Format, Formats, quantize_bwd, quantize_fwd
from ..fp8 import SCOPE
from .order import ROUNDED_LATER, not_rounded_later, refusal

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@dataclasses.dataclass(frozen=True)
class Product:
    """A product in a function, as `choose` sees it.

    Attributes:
        primitive: its JAX primitive, one of `PRODUCTS`.
        path: the names around it, "/" between: of Linen's modules, `jax.named_scope`.
        source: the file and line, and the function in it.
        lhs, rhs, out: the shapes of its operands and result.
        dtype: of the left operand.
        is_backward: whether it is part of a backward pass that is written down in the
            function already, as in `jax.grad(loss)`.
        inside: the primitive of an equation around it that cannot be opened, or "".
        unrounded: why its operands cannot be rounded (they are complex, or one is of 8
            bits already), or "".
    """

    primitive: str
    path: str
    source: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    dtype: np.dtype
    is_backward: bool
    inside: str = ""
    unrounded: str = ""


Choice = Callable[[Product], Formats | None]


def simulate_format(
    fn: Callable[..., Any],
    fwd: Format | None = E4M3,
    bwd: Format | None = E5M2,
    *,
    choose: Choice | None = None,
    fwd_key: Key[Array, ""] | None = None,
    bwd_key: Key[Array, ""] | None = None,
) -> Callable[..., Any]:
    """`fn` with every product (dot, convolution, ragged dot) in simulated formats.

    Operands are rounded to `fwd`, and the cotangent of the result to `bwd` before the
    backward products; all is computed in the dtypes that `fn` has. Rounding saturates,
    and its own gradient is the identity. All else is computed as it was.

    Apply it to a loss, inside of `jax.grad`, or to a function that differentiates
    already: there the products of the backward pass round their residual to `fwd` and
    their cotangent to `bwd`. Functions with a `custom_vjp` keep it, and the products in
    both their passes are rounded; so do those with a `custom_jvp` that has a product
    in the function itself. Forward mode (`jax.jvp`, `jax.hessian`) is refused by JAX;
    second derivatives by reverse mode (`jax.jacrev(jax.grad(loss))`) pass straight
    through the rounding of both passes. In a function that differentiates already, a
    cotangent is recognised if it starts from a one, as in `jax.grad`; if there is none,
    from an argument that is used for nothing before; if there is no such, from a
    number, as in `jax.vjp(loss, x)[1](1024.0)`. It is not where it is computed from
    arguments: then transform the function before it is differentiated. Products of
    integers, and of two operands of 8 bits, are left as they are.
    A function that is simulated already is rounded twice: to the same format that is
    the same. Inside of `unit_scale` or around it, differentiate first (see there).

    Args:
        fn: a function of arrays, pytrees and Flax or Equinox modules, or a module.
        fwd: the operands' format; None for no rounding.
        bwd: the cotangent's format; None for no rounding.
        choose: gives the formats of each `Product` in place of `fwd` and `bwd`; None
            leaves one out: `lambda p: None if "readout" in p.path else SIMULATED_FP8`.
        fwd_key: a random key for stochastic rounding of the operands. Each operand of
            each product draws afresh, in each step of a loop and on each device of a
            `shard_map`; under `jax.vmap` examples share the draw, as with any key.
        bwd_key: the same for cotangents. For a new draw at each training step pass a
            new key: transform the loss inside the step.

    Returns:
        A function like `fn`; compile it with `jax.jit`, else each call traces anew.

    Raises:
        TypeError: if a format is not a `Format`, `choose` no function, or a key not a
            typed key; and by a gradient of a `unit_scale`d loss in which a cotangent
            would be rounded.

    Warns:
        UserWarning: of products that are left as they were because what is around them
            (a Pallas kernel, a linear solve) cannot be opened, or their operands cannot
            be rounded: they are complex, or one is of 8 bits and the other wider.

    Reference: Unit Scaling (Blake et al., 2023), section 2.2 and appendix; FP8 formats
    for deep learning (Micikevicius et al., 2022).
    """
    formats = Formats(fwd, bwd)
    if not callable(fn):
        raise TypeError(f"`fn` must be a function or a module, got {fn!r}.")
    if choose is not None and not callable(choose):
        raise TypeError(
            "`choose` must be a function of a `Product` that returns `Formats` or "
            f"None, got {choose!r}."
        )
    keys = (_check_key("fwd_key", fwd_key), _check_key("bwd_key", bwd_key))
    pick = (lambda _: formats) if choose is None else choose
    shared = None if keys == (None, None) else keys
    make = lambda region: (_Simulate(pick), Side(shared))
    return transform(fn, make, context=lambda: ROUNDED_LATER(True))


def simulate_fp8(
    fn: Callable[..., Any],
    *,
    choose: Choice | None = None,
    fwd_key: Key[Array, ""] | None = None,
    bwd_key: Key[Array, ""] | None = None,
) -> Callable[..., Any]:
    """`simulate_format` in FP8: E4M3 operands, E5M2 cotangents."""
    return simulate_format(
        fn, E4M3, E5M2, choose=choose, fwd_key=fwd_key, bwd_key=bwd_key
    )


def products(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Product]:
    """The products that `fn` computes for these arguments, in order.

    What `simulate_format` would do with each is `choose(product)`; those with `inside`
    or `unrounded` are out of its reach.
    """
    return list(_products(Call(fn, args, kwargs).region, ""))


def _products(region: Region, inside: str) -> Iterator[Product]:
    for equation in region.equations:
        if _is_product(equation) or _unrounded(equation):
            yield _product(equation, inside)
        closed = inside or ("" if equation.can_be_opened else equation.primitive)
        for inner in equation.regions:
            yield from _products(inner, closed)


def _is_product(equation: Equation) -> bool:
    # A native product has its formats already.
    native = SCOPE in equation.scope
    return (
        equation.primitive in PRODUCTS
        and not native
        and all(
            jnp.issubdtype(aval.dtype, jnp.floating)
            and jnp.finfo(aval.dtype).bits >= 16
            for aval in equation.in_avals[:2]
        )
    )


def _unrounded(equation: Equation) -> str:
    """Why the operands of a product of numbers wider than 8 bits cannot be rounded."""
    if equation.primitive not in PRODUCTS or SCOPE in equation.scope:
        return ""
    dtypes = [aval.dtype for aval in equation.in_avals[:2]]
    floating = [d for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    if _is_product(equation) or all(jnp.finfo(d).bits < 16 for d in floating):
        return ""
    is_complex = any(jnp.issubdtype(d, jnp.complexfloating) for d in floating)
    kind = "complex" if is_complex else "of different kinds"
    return f"operands are {kind}: {' and '.join(d.name for d in dtypes)}"


def _product(equation: Equation, inside: str = "") -> Product:
    lhs, rhs = equation.in_avals[:2]
    return Product(
        equation.primitive,
        equation.path,
        equation.source,
        lhs.shape,
        rhs.shape,
        equation.out_avals[0].shape,
        np.dtype(lhs.dtype),
        equation.is_backward,
        inside,
        _unrounded(equation),
    )


class _Simulate(Interpreter):
    def __init__(self, choose: Choice) -> None:
        self._choose = choose
        self._cotangent: dict[tuple[int, ...], int | None] = {}
        self._in_rules: set[tuple[int, ...]] = set()

    def begin(self, region: Region, cotangents: Sequence[bool]) -> None:
        ones = any(
            _is_one(equation, v.val)
            for equation in region.walk()
            for v in filter(is_literal, equation.invars)
        )
        if any(cotangents) or ones:
            self._mark(region, [_YES if c else _NO for c in cotangents], False)
            if any(cotangents):
                self._in_rules.update(equation.place for equation in region.walk())
            return
        # What it is given may be one, for a `jax.vjp` inside, or a number in it.
        first = _first_used_backward(region)
        facts = [_YES if c else _NO for c in first]
        if not self._mark(region, facts, not any(first)):
            self._mark(region, [_PERHAPS] * len(facts), False)

    def _mark(self, region: Region, facts: list[int], numbers: bool) -> bool:
        """Finds the products' cotangents; whether a backward pass was seen to start."""
        started = _YES in facts

        def transfer(equation: Equation, given: list[int]) -> list[int]:
            nonlocal started
            if numbers and max(given, default=_NO) <= _NO and equation.is_backward:
                given = [
                    _YES if fact == _NUMBER and _is_floating(aval) else fact
                    for fact, aval in zip(given, equation.in_avals, strict=True)
                ]
                started |= _YES in given
            fact, operand = _of_cotangents(equation, given)
            if _is_product(equation):
                self._cotangent[equation.place] = operand
            return [fact] * len(equation.outvars)

        def literal(equation: Equation, value: Any) -> int:
            return _YES if _is_one(equation, value) else _NUMBER

        def enter(inner: Region, given: list[int]) -> list[int]:
            return [_NO] * len(inner.consts)

        flow(
            region,
            facts,
            transfer,
            join=max,
            bottom=_NUMBER,
            literal=literal,
            enter=enter,
        )
        return started

    def wants(self, equation: Equation) -> bool:
        return _is_product(equation) or bool(_unrounded(equation))

    def opens(self, equation: Equation) -> bool:
        return equation.primitive == "custom_vjp_call" and not equation.is_own

    def rewrite(
        self, equation: Equation, side: Side, *args: Any
    ) -> tuple[Sequence[Any], None]:
        product = _product(equation)
        formats = self._choose(product)
        if formats is None:
            return self.leave(equation, *args), None
        if not isinstance(formats, Formats):
            raise TypeError(
                f"`choose` must return `Formats` or None, got {formats!r} for "
                f"{product}."
            )
        if product.unrounded:
            _warn(product, product.unrounded)
            return self.leave(equation, *args), None
        cotangent = self._cotangent.get(equation.place)
        keys = side.shared or (None, None)
        scaled = UNIT_SCALED in equation.scope
        if scaled and equation.place in self._in_rules and formats.bwd is not None:
            raise refusal()

        def rounded(i: int, x: Any) -> Any:
            backward = i == cotangent
            format = formats.bwd if backward else formats.fwd
            return x if format is None else quantize_fwd(x, format, key(backward, i))

        def key(backward: bool, i: int) -> Any:
            if (key := keys[backward]) is None:
                return None
            # A number of its own for each operand of each equation.
            number = zlib.crc32(repr((equation.place, i)).encode()) >> 1
            return jax.random.fold_in(key, number)

        operands = [rounded(i, x) for i, x in enumerate(args[:2])]
        (y,) = equation.bind(*operands, *args[2:])
        if cotangent is None and formats.bwd is not None:
            bwd = formats.bwd
            y = not_rounded_later(y) if scaled else quantize_bwd(y, bwd, key(True, 2))
        return [y], None

    def left(self, equation: Equation) -> None:
        for product in _within(equation):
            if self._choose(product) is not None:
                _warn(product, f"{equation.primitive} around it cannot be opened")

    def at(self, shared: Any, index: Any) -> Any:
        return tuple(k if k is None else jax.random.fold_in(k, index) for k in shared)


def _warn(product: Product, why: str) -> None:
    warnings.warn(
        f"simulate_format leaves {product.primitive} in {product.path or '<no scope>'} "
        f"({product.source}) as it is: {why}. If that is meant, let `choose` return "
        "None for it.",
        stacklevel=2,
    )


def _within(equation: Equation) -> Iterator[Product]:
    for region in equation.regions:
        yield from _products(region, equation.primitive)


# -- Which operand is the cotangent ----------------------------------------------------

# Whether a value depends on the cotangent that a backward pass starts from. Of a
# function's own arguments it cannot always be known; a number depends on none of them.
_NUMBER, _NO, _PERHAPS, _YES = range(4)


def _of_cotangents(equation: Equation, given: list[int]) -> tuple[int, int | None]:
    """What holds for an equation's outputs, and which operand is a cotangent."""
    fact = max(given, default=_NUMBER)
    if not _may_be_backward(equation):
        return min(fact, _NO), None
    if fact <= _NO or len(given) < 2:
        return fact, None
    # JAX's own transposed dots have it on the left.
    return fact, int(given[1] > given[0])


def _is_one(equation: Equation, value: Any) -> bool:
    """Whether `jax.grad` starts here: from a one, by a backward equation."""
    is_one = np.size(value) == 1 and bool(np.all(np.asarray(value) == 1))
    return is_one and _may_be_backward(equation) and _is_floating(value)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _first_used_backward(region: Region) -> list[bool]:
    """Which inputs a backward equation is the first to use: the cotangents given to a
    `jax.vjp` inside, as what is kept for it has been used before."""
    found: dict[int, bool] = {}

    def transfer(equation: Equation, given: list[int]) -> list[int]:
        for i in given:
            found.setdefault(i, _may_be_backward(equation))
        return [_ANOTHER] * len(equation.outvars)

    inputs = range(len(region.jaxpr.invars))
    join = lambda a, b: a if a == b else _ANOTHER
    flow(region, inputs, transfer, join=join, bottom=_ANOTHER)
    return [found.get(i, False) for i in inputs]


_ANOTHER = -1  # no input, or not one alone


def _may_be_backward(equation: Equation) -> bool:
    # In front of a `shard_map` the first one is resharded, outside of any name stack.
    return equation.is_backward or equation.primitive == "reshard"


def _check_key(name: str, key: Any) -> Any:
    if key is None:
        return None
    dtype = getattr(key, "dtype", np.dtype(object))
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"`{name}` must be a typed random key, as `jax.random.key(0)` gives, got "
            f"{key!r}; `jax.random.wrap_key_data` makes one of a raw key."
        )
    return key
