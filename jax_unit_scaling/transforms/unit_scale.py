"""Unit scaling of any function: every tensor is held as data times a power of two.

A tensor v is `data * 2**exponent`, with a static exponent for which the data has unit
scale (rms) on the example arguments. Powers of two multiply exactly, so the function
stays what it was. How exponents move through an equation is a rule by its primitive
(`_RULES`), and equations without one see true values. Where the data that a rule gives
is off its scale by more than a tolerance, it is multiplied once and settled.
"""

import contextlib
import dataclasses
import functools as ft
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._jaxpr import (
    UNIT_SCALED,
    Call,
    Equation,
    Interpreter,
    Place,
    Region,
    Side,
    flow,
    is_inexact,
    is_literal,
)
from ..formats import quantize
from ..fp8 import factors_of, is_product
from .order import ROUNDED_LATER, not_rounded_later, refusal
from .simulate import PRODUCTS
from .track import (
    HIGHEST,
    LOWEST,
    Scales,
    Site,
    Tensor,
    argument_sites,
    is_statistics,
    parameters,
    rms,
    sites,
)

# By how many powers of two data may be off unit scale. What is rounded to a format, or
# cast to a dtype of a shorter range, is held at the NEAREST. Elsewhere the range of the
# dtype decides: float32 and bfloat16 (254 binades) do not notice eight, which spares
# most multiplications; float16 (30) is kept to two, and to one (CLOSE) in arguments,
# products, their operands, and what a loop carries.
NEAREST, CLOSE, NARROW, WIDE = 0.5, 1.0, 2.0, 8.0
# The log2 of the scale of what is zero, or was not seen.
_NONE = -math.inf
_ZERO = "zero or a mask's fill on the example arguments"
_UNSEEN = "not seen on the example arguments"
_LARGE = "at unit scale its largest numbers, a mask's fill or others, would overflow"


@dataclasses.dataclass(frozen=True)
class Held:
    """How `unit_scale` holds a tensor.

    Attributes:
        site: where it stands.
        exponent: the tensor is its data times 2^exponent; None for a constant of
            zeros or infinities, which are the same at any exponent.
        scale: log2 of its scale on the example arguments; -inf if it was zero or all
            fill of a mask (infinite, or about its dtype's largest number, or above 2^64
            in dtypes of up to 32 bits), NaN if it was not seen: in a branch that was
            not taken, in a loop that did not run, or left out of `scales`.
        reason: why it, or what it is computed from, is not unit-scaled; "" if it is.
    """

    site: Site
    exponent: int | None
    scale: float
    reason: str

    def __str__(self) -> str:
        held = "any power of two" if self.exponent is None else f"2^{self.exponent}"
        because = f"; {self.reason}" if self.reason else ""
        return f"{self.site.name} ({self.site.source}): {held}{because}"


def unit_scale(
    fn: Callable[..., Any],
    *example_args: Any,
    scales: Scales | None = None,
    **example_kwargs: Any,
) -> "UnitScaled":
    """`fn` computed with tensors of unit scale: same outputs, same true gradients.

    Each floating-point tensor v is held as data times 2^k, where k = round(log2(rms))
    of v in one run on the example arguments, or another that is close: the one that
    comes for free, or that a tensor has which is computed alike, so that XLA compiles
    the kernels of both layers once. Close is within a factor of 2 in float16 where data
    is multiplied out or carried by a loop, and 4 elsewhere; in dtypes with float32's
    range, which is not short of it, 2^8. What is quantised, or cast to a dtype of a
    shorter range than float32's, has the nearest k. Arguments and results have their
    true values, so that optimisers and checkpoints see nothing new.

    Where a number would overflow that the dtype holds truly (one of 4e4 among some of
    1e-3 in float16, or the fill of a mask among logits), k is larger. If it is only in
    later arguments, it becomes the largest that there is at this k; with float32's
    range, where that is 2^k 3e38, it becomes infinite.

    Linear and homogeneous operations move the powers of two along: those of a product's
    operands add up, a sum's operands are brought to the same one, a quotient's are
    subtracted, a root's halved. Others (exp, tanh, ...) see true values. A cast, and
    `quantize`, act on the data: so a whole training step in float16 or simulated FP8
    needs no loss scaling. Transform the differentiated function, with the simulation
    inside::

        step = jax.value_and_grad(jus.simulate_fp8(loss))
        step = jax.jit(jus.unit_scale(step, params, batch))

    `jax.grad(jus.unit_scale(loss, ...))` is the true gradient as well, but then only
    the forward pass has unit scale: cotangents are what autodiff makes of it. So it is
    refused where they would be rounded to a format. `simulate_fp8(unit_scale(...))`
    rounds the same data as `unit_scale(simulate_fp8(...))`, in a function that
    differentiates. Around a tracked function the record is that of the true tensors,
    as without it; `track_scales(unit_scale(...))` records the data.

    The example run is in float32 (or wider) with all rounding off: quantisation, casts
    to 16 bits or fewer. What has an effect (`jax.debug.print`, `io_callback`) has it
    once in this run as well. As exponents are static, data whose scale is far from the
    example's is as far from unit scale, and can over- or underflow in a narrow dtype or
    format: choose a typical batch, and transform anew when scales have moved.

    A scan's iterations and a shard_map's devices share one k; so does what a loop
    carries. The result may be called inside of a `jax.shard_map`, but for a function
    that differentiates and whose gradients JAX sums there in another order.

    What is zero (a parameter initialised so, and all that is multiplied by it) has no
    scale: an argument keeps k = 0, a product of n terms is taken to have that of its
    operands times sqrt(n), and other results what their operands give.

    Args:
        fn: a function of arrays, pytrees and Flax or Equinox modules, or a module.
        example_args, example_kwargs: concrete arguments, such as the first batch.
            Variables of modules are not updated by the example run.
        scales: what `track_scales(fn)(*example_args)` returned beside the result (of a
            training run, say), to use in place of the example run. What it leaves out
            has no scale; a constant has that of its own elements.

    Returns:
        A `UnitScaled`, a function like `fn`, also of other shapes (a last batch) if its
        equations are the same. Its `report()` lists every tensor, and why some are not
        unit-scaled. Compile it with `jax.jit`, else each call traces anew.

    Raises:
        TypeError: if `fn` is no function, or the example arguments are traced; and by
            a gradient of the result in which a cotangent would be rounded.
        ValueError: if `scales` is a record of another function, or of other shapes.

    Reference: Unit Scaling (Blake et al., 2023), section 4; powers of two as in
    Scalify (Balanca et al., 2024).
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be a function or a module, got {fn!r}.")
    if scales is not None and not isinstance(scales, Scales):
        raise TypeError(
            "`scales` must be the `Scales` that `track_scales(fn)` returns beside the "
            f"result, got {type(scales).__name__}."
        )
    call = Call(fn, example_args, example_kwargs)
    call.check_concrete(
        "its scale is measured", "call `unit_scale` outside of jit, grad and vmap"
    )
    # Where something else is being traced, this is not to be part of it.
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    with jax.ensure_compile_time_eval() if traced else contextlib.nullcontext():
        measured = _calibrate(call) if scales is None else _recorded(call, scales)
        measured |= _of_constants(call)
    return UnitScaled(fn, call, measured)


class UnitScaled:
    """What `unit_scale` returns: a function, and a report of how it is computed."""

    def __init__(self, fn: Any, call: Call, scales: "Mapping[Place, _Scale]") -> None:
        ft.update_wrapper(self, fn, updated=())
        self._fn, self._scales = fn, scales
        self._region, self._arguments = call.region, argument_sites(call)
        self._shapes, self._paths = list(map(_shape, call.leaves)), call.paths
        self._static = call.static

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(self._fn, args, kwargs)
        scales = self._matched(call)
        with jax.named_scope(UNIT_SCALED):
            outs = self._run(call.region, call.leaves, scales)
        return call.result(outs)

    def report(self) -> tuple[Held, ...]:
        """How each tensor is held, in the order of computation: on arguments like the
        example ones, and with no simulation of a format around it.

        Those with a `reason` are not, or not surely, of unit scale.
        """
        held: dict[Place, Held] = {}

        def run(*leaves: Any) -> list[Any]:
            return self._run(self._region, leaves, self._scales, held)

        jax.eval_shape(run, *self._shapes)
        order = sorted(held, key=lambda place: (len(place) > 1, place))
        return tuple(held[place] for place in order)

    def _run(
        self,
        region: Region,
        leaves: Sequence[Any],
        scales: "Mapping[Place, _Scale]",
        held: dict[Place, Held] | None = None,
    ) -> list[Any]:
        interpreter = _UnitScale(region, scales, held)
        values = interpreter.arguments(self._arguments, leaves)
        outs, _ = interpreter.run(region, Side(), values)
        return list(map(interpreter.lower, outs))

    def _matched(self, call: Call) -> "Mapping[Place, _Scale]":
        """The scales by the places of this call, which is to have the same equations.

        Inside of a shard_map there may be some more, which say what varies.
        """
        self._check_inputs(call)
        places: dict[Place, Place] = {(): ()}
        for new, old in _pairs(call.region, self._region):
            if new is None or old is None or new.primitive != old.primitive:
                inside = any(map(_is_of_varying, call.region.walk()))
                raise _another(f"is {new or 'nothing'}", old or "nothing", inside)
            places[old.place] = new.place
            for n, _ in enumerate(old.regions):
                places[*old.place, n] = (*new.place, n)
        # The last number is that of an output, an argument or a constant.
        return {(*places[p[:-1]], p[-1]): scale for p, scale in self._scales.items()}

    def _check_inputs(self, call: Call) -> None:
        became = {*call.paths} & {*self._static}
        for path in sorted(became | ({*call.static} & {*self._paths})):
            kinds = ("an array", "static") if path in became else ("static", "an array")
            raise ValueError(
                f"`{path}` must be what it was in the example arguments of "
                f"`unit_scale`, got {kinds[0]} in place of {kinds[1]}. Python numbers "
                "are static, and arrays inside of jit: pass an array both times, such "
                "as `jnp.asarray(0.5)`, or make it one of jit's `static_argnums`."
            )
        n_new, n_old = len(call.paths), len(self._paths)
        if n_new != n_old:
            raise _another(f"are {n_new} arrays", f"{n_old}")


def _another(new: str, old: object, inside: bool = False) -> ValueError:
    """Of a call that has something else in a place, inside of a shard_map or not."""
    whole = (
        ", or on the whole, as JAX sums gradients over devices inside of a "
        "`jax.shard_map`: `unit_scale(jax.shard_map(fn, ...), *args)`"
    )
    return ValueError(
        "The arguments must lead to the same equations as the example arguments of "
        f"`unit_scale` did, but there {new} in place of {old}. Call `unit_scale` on "
        f"arguments like these{whole if inside else ''}."
    )


# What JAX adds inside of a shard_map where values that vary over devices meet others,
# and on the way back.
_OF_VARYING = ("pvary", "psum_invariant")


def _is_of_varying(equation: Equation) -> bool:
    return equation.primitive in _OF_VARYING


def _pairs(
    new: Region, old: Region
) -> Iterator[tuple[Equation | None, Equation | None]]:
    """The equations of two jaxprs beside each other, None where one has no more.

    Left out is what says what varies in the new one alone.
    """
    theirs = iter(new.equations)
    numbers: set[Any] = set()

    def is_added(equation: Equation, instead_of: str) -> bool:
        if equation.primitive == instead_of:
            return False
        if _is_of_varying(equation):
            is_number = all(map(is_literal, equation.invars))
            numbers.update(equation.outvars if is_number else ())
            return True
        # From jax 0.12 on Python's numbers are made to vary, and then cast.
        is_cast = equation.primitive == "convert_element_type"
        return is_cast and not numbers.isdisjoint(equation.invars)

    for equation in old.equations:
        match = next(theirs, None)
        while match and is_added(match, equation.primitive):
            match = next(theirs, None)
        yield match, equation
        inside = match.regions if match else ()
        for inner, ours in zip(inside, equation.regions, strict=False):
            yield from _pairs(inner, ours)
    yield from ((e, None) for e in theirs if not is_added(e, ""))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None)
    named = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named)


# -- Calibration -----------------------------------------------------------------------


@ft.partial(
    jax.tree_util.register_dataclass,
    data_fields=["runs", "size", "scale", "largest"],
    meta_fields=["place", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class _Measured:
    """How often a tensor was computed, the number of elements that count, their rms and
    the largest that its dtype holds; with axes for iterations."""

    runs: Float[Array, "..."]
    size: Float[Array, "..."]
    scale: Float[Array, "..."]
    largest: Float[Array, "..."]
    place: Place
    dtype: np.dtype


class _Scale(NamedTuple):
    """The log2 of a tensor's scale, and of the least at which its dtype holds all of
    it; the latter is -inf but for outliers, as a mask's fill is one."""

    log2: float = _NONE
    least: float = -math.inf

    @property
    def held(self) -> float:
        """The log2 of the scale that its data is to be divided by."""
        return _NONE if self.log2 == _NONE else max(self)

    def allows(self, exponent: int, tolerance: float) -> bool:
        """Whether data at this exponent has unit scale within the tolerance, and its
        largest number does not overflow."""
        return exponent >= self.least and abs(self.held - exponent) <= tolerance

    def join(self, other: "_Scale") -> "_Scale":
        return _Scale(*map(max, self, other))


def _calibrate(call: Call) -> dict[Place, _Scale]:
    """The scale of each tensor, by its place."""
    interpreter = _Calibrate()
    arguments = [_measure(x, (i,)) for i, x in enumerate(call.leaves)]
    # Not compiled as a whole: one kernel for each of thousands of tensors takes longer
    # than to run them.
    values = list(map(interpreter.lift, call.leaves))
    _, records = interpreter.run(call.region, Side(), values)
    return _scales((arguments, records))


def _of_constants(call: Call) -> dict[Place, _Scale]:
    """The same of constants, which count backwards from -1 in their region's place."""
    inner = [r for equation in call.region.walk() for r in equation.regions]
    return _scales(
        [
            _measure(x, (*region.place, -1 - i))
            for region in (call.region, *inner)
            for i, x in enumerate(region.consts)
        ]
    )


def _scales(measured: Any) -> dict[Place, _Scale]:
    found = jax.tree.leaves(measured, is_leaf=_is_measured)
    return {
        x.place: _Scale(_log2(x.size, x.scale), _least(x.dtype, x.largest))
        for x in jax.device_get(found)
        if np.sum(x.runs) > 0
    }


def _recorded(call: Call, scales: Scales) -> dict[Place, _Scale]:
    """The same from a record, which is to be one of this call."""
    names = parameters(call)
    every = argument_sites(call)
    for equation in call.region.walk():
        every += sites(equation, names.get(equation.place, ""))
    expected = {site.place: site for site in every if site is not None}
    for tensor in scales.tensors:
        ours, theirs = expected.get(tensor.site.place), tensor.site
        if ours is None or _what(ours) != _what(theirs):
            instead = f"{ours.name} {ours.shape}" if ours else "nothing"
            raise ValueError(
                "`scales` must be a record of `fn` on arguments like the example ones, "
                f"but it has {theirs.name} {theirs.shape} where `fn` has {instead}: "
                "record again, `_, scales = track_scales(fn)(*example_args)`."
            )
    return {
        t.site.place: _recorded_scale(t)
        for t in scales.tensors
        if np.sum(t.forward.size) > 0
    }


def _what(site: Site) -> tuple[str, tuple[int, ...]]:
    """A tensor's name, without the line that it may begin with, and its shape."""
    return site.name.removeprefix(site.source.split("/")[-1]), site.shape


def _recorded_scale(tensor: Tensor) -> _Scale:
    site = tensor.site
    stats = jax.tree.map(lambda x: np.asarray(x, np.float64), tensor.forward)
    fill = _fill(site.dtype)
    if np.max(stats.largest, initial=0) < fill:
        return _Scale(_log2(stats.finite, stats.scale))
    # Of numbers spread evenly over a binade the mean square is 7/3 of its lowest.
    square = 7 / 3 * 4.0 ** np.arange(LOWEST, HIGHEST + 1)
    counts = stats.histogram.reshape(-1, square.size).sum(0)
    counts[square >= min(fill, 2.0**HIGHEST) ** 2] = 0
    size = counts.sum() + np.sum(stats.zeros)
    return _Scale(
        _log2(size, math.sqrt(counts @ square / max(size, 1))),
        _least(site.dtype, stats.largest),
    )


def _log2(size: Any, scale: Any) -> float:
    size, scale = np.asarray(size, np.float64), np.asarray(scale, np.float64)
    mean = np.sum(size * scale**2) / max(np.sum(size), 1.0)
    return float(np.log2(mean) / 2) if 0 < mean < math.inf else _NONE


def _least(dtype: np.dtype, largest: Any) -> float:
    """The log2 of the least scale at which the largest number does not overflow."""
    top = np.max(largest, initial=0) / float(jnp.finfo(dtype).max)
    # A whole number, as exponents are. What rounds to the largest number is held.
    return math.ceil(math.log2(top) - 1e-3) if top else -math.inf


class _Calibrate(Interpreter):
    """Measures each tensor, in float32 or wider, with no rounding to a format."""

    def wants(self, equation: Equation) -> bool:
        is_wanted = not equation.can_be_opened or _is_called(equation)
        return is_wanted or equation.primitive == "shard_map"

    def rewrite(
        self, equation: Equation, side: Side, *args: Any
    ) -> tuple[Sequence[Any], Any]:
        records: dict[str, Any] = {}
        if _is_quantize(equation) or equation.primitive == "reduce_precision":
            outs = [args[_rounded(equation)]]
        elif _is_called(equation):
            (region,) = equation.regions
            outs, records = self.run(region, side, args)
        elif equation.can_be_opened:
            # One program for all devices, as they cannot wait for each other in many.
            opened = jax.jit(lambda side, *args: self.open(equation, side, args))
            outs, records = opened(side, *args)
        else:
            outs = self._widely(equation, args)
        if not equation.can_be_opened or _is_whole(equation):
            for i, (x, aval) in enumerate(zip(outs, equation.out_avals, strict=True)):
                measured = _measure(x, (*equation.place, i), aval.dtype)
                if measured is not None:
                    records[f"out{i}"] = measured
        if not any(isinstance(x, jax.core.Tracer) for x in outs):
            jax.block_until_ready(outs)  # as many programs in a row would as well
        return outs, records

    def _widely(self, equation: Equation, args: Sequence[Any]) -> list[Any]:
        if equation.regions or equation.primitive == "bitcast_convert_type":
            # What a kernel is written for, or a number of bits, cannot be changed.
            args = [
                x.astype(aval.dtype) if _is_float(aval) else x
                for x, aval in zip(args, equation.in_avals, strict=True)
            ]
            return list(map(self.lift, equation.bind(*args)))
        narrow = {k: jnp.float32 for k, v in equation.params.items() if _is_narrow(v)}
        return list(map(self.lift, equation.bind(*args, **narrow)))

    def lift(self, array: Any) -> Any:
        narrow = _is_narrow(getattr(array, "dtype", None))
        return jnp.asarray(array).astype(jnp.float32) if narrow else array

    def merge(self, records: Any) -> Any:
        def one(x: _Measured) -> _Measured:
            return dataclasses.replace(
                x,
                runs=x.runs.sum(0),
                size=x.size.sum(0),
                scale=rms(x.scale, x.size, 0),
                largest=x.largest.max(0),
            )

        return jax.tree.map(one, records, is_leaf=_is_measured)


def _measure(x: Any, place: Place, dtype: Any = None) -> _Measured | None:
    """What is known of a tensor that has this dtype when it is not calibrated."""
    if not (hasattr(x, "dtype") and is_inexact(x)):
        return None
    dtype = jnp.dtype(dtype or x.dtype)
    size, scale, largest = _statistics(x, dtype)
    return _Measured(jnp.ones_like(size), size, scale, largest, place, dtype)


@ft.partial(jax.jit, static_argnames="dtype")
def _statistics(x: Any, dtype: np.dtype) -> tuple[Array, Array, Array]:
    size = jnp.abs(x)
    size = size.astype(jnp.promote_types(size.dtype, jnp.float32))
    # What a float16 tensor would overflow to counts: it is not to.
    counts = (size < _fill(dtype)) | ((size > 4 * _fill(dtype)) & (size < _FILL))
    weight = counts.astype(size.dtype)
    axes = tuple(range(size.ndim))
    # Twice the dtype's largest, as a fill behind a subtraction may be beyond it.
    end = min(2 * float(jnp.finfo(dtype).max), float(jnp.finfo(size.dtype).max))
    largest = jnp.where(size <= end, size, 0.0).max(initial=0.0)
    return weight.sum(), rms(jnp.where(weight > 0, size, 0.0), weight, axes), largest


# What fills the place of masked logits is no part of a tensor's scale: infinities, what
# is about as large, and numbers within a factor of two of the dtype's largest, before
# or behind a subtraction of the maximum. Where the dtype holds 1e60, that may be meant.
_FILL = 2.0**64


def _fill(dtype: Any) -> float:
    half = float(jnp.finfo(dtype).max) / 2
    return half if dtype.type in (np.float64, np.complex128) else min(_FILL, half)


def _is_measured(x: Any) -> bool:
    return isinstance(x, _Measured)


# -- The interpreter -------------------------------------------------------------------


@ft.partial(
    jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["exponent"]
)
@dataclasses.dataclass(frozen=True)
class Scaled:
    """The tensor data * 2^exponent. An exponent of None is any: all elements are zero,
    infinite or not a number, which a factor would not change."""

    data: Any
    exponent: int | None


class _Here(NamedTuple):
    """An equation, the scales of its inputs and outputs, and what settles them."""

    equation: Equation
    operands: list[_Scale]
    results: list[_Scale]
    chosen: "_Chosen"
    is_rounded_later: bool

    def bind(self, *args: Any, **changes: Any) -> list[Any]:
        return self.equation.bind(*map(_data, args), **changes)

    def operand(self, i: int, value: Any, tolerance: float) -> Any:
        """An operand, held so that its data has unit scale within the tolerance."""
        key = _Key(self.equation.place, "operand", i)
        return self.chosen.settle(value, self.operands[i], tolerance, key)

    def for_unknown_results(self, args: Sequence[Any]) -> Sequence[Any]:
        """The operands, closer if what comes of them was zero or not seen: nothing will
        settle that, and squares of squares would add up what they are off."""
        pairs = zip(self.results, self.equation.out_avals, strict=True)
        if not any(y.log2 == _NONE and _is_float(aval) for y, aval in pairs):
            return args
        return [self.operand(i, x, CLOSE) for i, x in enumerate(args)]

    def multiplicand(self, i: int, value: Any) -> Any:
        """An operand of a product, held so that it can be multiplied out."""
        avals = (self.equation.in_avals[i], *self.equation.out_avals)
        by_range = min(map(_tolerance, avals))
        return self.operand(i, value, NEAREST if self.is_rounded_later else by_range)

    def result(self, i: int, value: Any, scale: _Scale | None = None) -> Any:
        """A result, of this scale or its own, held as its dtype's range asks for."""
        scale = self.results[i] if scale is None else scale
        tolerance = _tolerance(self.equation.out_avals[i])
        if self.equation.primitive not in PRODUCTS:
            tolerance = max(tolerance, NARROW)
        key = _Key(self.equation.place, "result", i)
        return self.chosen.settle(value, scale, tolerance, key)


class _Key(NamedTuple):
    """A tensor: the i-th of an equation's operands, results or what it carries."""

    place: Place
    role: str
    i: int


# So many equations in a row are those of a layer again. Fewer may be on one line of a
# model, where `x * y * z` is two that are not alike.
_ALIKE = 8


class _Chosen:
    """The exponents that tensors were settled to.

    What is computed alike, as layer after layer, gets the same one where that is within
    the tolerance: XLA compiles kernels that are equal once, and a product's that differ
    in a factor are compiled, and on a GPU tuned, one by one.
    """

    def __init__(self, region: Region) -> None:
        self._last: dict[Any, int] = {}
        self._alike: dict[Place, tuple[int, ...]] = {}
        kinds: dict[Any, int] = {}
        before: deque[int] = deque(maxlen=_ALIKE)
        for equation in region.walk():
            avals = (*equation.in_avals, *equation.out_avals)
            kind = equation.primitive, *map(_kind, avals)
            before.append(kinds.setdefault(kind, len(kinds)))
            self._alike[equation.place] = tuple(before)

    def settle(self, value: Any, scale: _Scale, tolerance: float, key: _Key) -> Any:
        """The same tensor, held so that its data has unit scale within the tolerance,
        and none of it overflows."""
        exponent = getattr(value, "exponent", None)
        if exponent is None or scale.log2 == _NONE:
            return value
        keys: list[Any] = [key]  # the same once more, as JAX may trace a loop's body
        if key.role == "argument":
            keys.append((key.role, _kind(value.data)))
        elif key.place in self._alike:
            keys.append((self._alike[key.place], *key[1:]))
        known = [self._last[k] for k in keys if k in self._last]
        # An argument is left as it is given, if it can be.
        each = (exponent, *known) if key.role == "argument" else (*known, exponent)
        close = (e for e in each if scale.allows(e, tolerance))
        exponent = next(close, round(scale.held))
        self._last.update(dict.fromkeys(keys, exponent))
        return _at(value, exponent)


class _UnitScale(Interpreter):
    def __init__(
        self,
        region: Region,
        scales: Mapping[Place, _Scale],
        held: dict[Place, Held] | None,
    ) -> None:
        """`held` is what to fill in for a report."""
        self._scales = dict(scales)
        self._operands: dict[Place, list[_Scale]] = {}
        self._inputs: dict[Place, list[_Scale]] = {}
        self._chosen, self._held = _Chosen(region), held
        self._is_rounded_later = ROUNDED_LATER.value

        def transfer(equation: Equation, given: list[_Scale]) -> list[_Scale]:
            self._operands[equation.place] = given
            if _is_of_varying(equation) and (*equation.place, 0) not in scales:
                return given  # added inside of a shard_map
            if _rule(equation) in _MOVING:
                # On other arguments more rows may be masked, and a maximum a fill.
                least = _Scale(least=max((x.least for x in given), default=-math.inf))
                places = [(*equation.place, i) for i in range(len(equation.outvars))]
                self._scales |= {
                    place: self._scales[place].join(least)
                    for place in places
                    if place in self._scales
                }
            return self._results(equation)

        def enter(inner: Region, inputs: list[_Scale]) -> list[_Scale]:
            self._inputs[inner.place] = inputs
            n = len(inner.consts)
            return [self._scale((*inner.place, -1 - i)) for i in range(n)]

        flow(
            region,
            [self._scale((i,)) for i in range(len(region.jaxpr.invars))],
            transfer,
            join=_Scale.join,
            bottom=_Scale(),
            opens=lambda e: e.can_be_opened and not self.wants(e),
            enter=enter,
        )

    def _scale(self, place: Place) -> _Scale:
        return self._scales.get(place, _Scale())

    def _results(self, equation: Equation) -> list[_Scale]:
        return [self._scale((*equation.place, i)) for i in range(len(equation.outvars))]

    def arguments(
        self, where: Sequence[Site | None], leaves: Sequence[Any]
    ) -> list[Any]:
        """The function's inputs, brought to unit scale."""
        values = []
        for site, leaf in zip(where, leaves, strict=True):
            value = self.lift(jnp.asarray(leaf) if _is_float(leaf) else leaf)
            if site is not None:
                scale, key = self._scale(site.place), _Key(site.place, "argument", 0)
                value = self._chosen.settle(value, scale, _tolerance(site), key)
                self._report(site, value, "")
            values.append(value)
        return values

    def begin(self, region: Region, cotangents: Sequence[bool]) -> None:
        # The rule of a custom derivative, which is traced if it is asked for.
        def transfer(equation: Equation, given: list[bool]) -> list[bool]:
            if any(given) and (_is_quantize(equation) or is_product(equation)):
                raise refusal()
            return [any(given)] * len(equation.outvars)

        opens = lambda e: e.can_be_opened and not _is_whole(e)
        flow(region, cotangents, transfer, join=max, bottom=False, opens=opens)

    def wants(self, equation: Equation) -> bool:
        is_whole = not equation.can_be_opened or _is_whole(equation)
        return is_whole and bool(equation.outvars)

    def rewrite(
        self, equation: Equation, side: Side, *args: Any
    ) -> tuple[Sequence[Any], None]:
        operands = self._operands.get(equation.place, [_Scale()] * len(args))
        results = self._results(equation)
        later = self._is_rounded_later
        here = _Here(equation, operands, results, self._chosen, later)
        rule = _rule(equation)
        outs = None if rule is None else rule(here, *here.for_unknown_results(args))
        reason = ""
        if outs is None:
            outs = self.leave(equation, *args)
            reason = _why_truly(equation)
        outs = [
            _narrowed(here.result(i, x), aval)
            for (i, x), aval in zip(enumerate(outs), equation.out_avals, strict=True)
        ]
        if self._held is not None:  # else sites would cost time for nothing
            for site, x in zip(sites(equation), outs, strict=True):
                if site is not None:
                    self._report(site, x, reason)
        return outs, None

    def _report(self, site: Site, value: Any, reason: str) -> None:
        if self._held is None:
            return
        scale, least = self._scales.get(site.place, _Scale(math.nan))
        exponent = _exponent(value)
        if not isinstance(value, Scaled):
            reason = reason or "complex numbers have true values"
        elif exponent is not None and math.isnan(scale):
            reason = "; ".join(filter(None, (reason, _UNSEEN)))
        elif exponent is not None and scale == _NONE:
            reason = "; ".join(filter(None, (reason, _ZERO)))
        elif exponent is not None and least > scale + _tolerance(site):
            reason = "; ".join(filter(None, (reason, _LARGE)))
        self._held[site.place] = Held(site, exponent, scale, reason)

    def carry(self, body: Region, values: Sequence[Any]) -> list[Any]:
        inputs, carried = self._inputs.get(body.place), list(values)
        for (_, into), (i, x) in zip(body.carry, enumerate(values), strict=True):
            if isinstance(x, Scaled):
                scale = _Scale() if inputs is None else inputs[into]
                key = _Key(body.place[:-1], "carry", i)
                carried[i] = self._chosen.settle(
                    _fixed(x), scale, _tolerance(x.data), key
                )
        return carried

    def join(self, values: Sequence[Any]) -> Any:
        # To the largest: a number that is too small is lost, one that is too large
        # takes all others with it.
        known = [x for x in values if isinstance(x, Scaled) and x.exponent is not None]
        return max(known, key=lambda x: x.exponent or 0, default=values[0])

    def match(self, value: Any, like: Any) -> Any:
        return _at(value, like.exponent) if isinstance(like, Scaled) else value

    def lift(self, array: Any) -> Any:
        if not _is_float(array):
            return array
        if isinstance(array, jax.Array) or np.ndim(array):
            return Scaled(jnp.asarray(array), 0)
        # A literal: its power of two is taken out while tracing.
        value, dtype = float(array), np.dtype(array.dtype)
        if value == 0 or not math.isfinite(value):
            return Scaled(np.asarray(value, dtype), None)
        exponent = round(math.log2(abs(value)))
        if not _has_short_range(dtype):  # what one factor takes back
            exponent = min(exponent, -int(jnp.finfo(dtype).minexp))
        return Scaled(np.asarray(math.ldexp(value, -exponent), dtype), exponent)

    def lower(self, value: Any) -> Any:
        return _truly(value)


def _is_quantize(equation: Equation) -> bool:
    # What of it depends on no input (nothing; inside of a shard_map, numbers that are
    # made to vary) a scan moves out of its loop: an equation of this name, without one.
    return _is_one_of(equation, "", "_fwd", "_bwd") and bool(
        equation.invars and equation.outvars
    )


def _rounded(equation: Equation) -> int:
    """Which operand a `quantize` rounds. What a scan has moved out of its loop are
    others: scalars, behind that one for a function, before it for one with a rule."""
    (out,) = equation.out_avals
    alike = [i for i, x in enumerate(equation.in_avals) if _kind(x) == _kind(out)]
    return alike[0 if equation.primitive == "jit" else -1]


def _kind(aval: Any) -> tuple[Any, Any]:
    return getattr(aval, "shape", ()), getattr(aval, "dtype", None)


def _is_one_of(equation: Equation, *ends: str) -> bool:
    names = {f"_{quantize.__name__}{end}" for end in ends}
    return equation.is_own and equation.name in names


def _is_called(equation: Equation) -> bool:
    """Whether it calls one jaxpr once, which a run without derivatives may inline."""
    is_loop = equation.primitive in ("scan", "while", "cond", "shard_map")
    return equation.can_be_opened and not is_loop


def _is_whole(equation: Equation) -> bool:
    """Whether an equation that could be opened is left as one: what rounds or counts,
    and what has a derivative of its own and no products."""
    custom = equation.primitive in ("custom_jvp_call", "custom_vjp_call")
    within = (e for region in equation.regions for e in region.walk())
    return (
        is_statistics(equation)
        or _is_quantize(equation)
        or is_product(equation)
        or (
            custom
            and not equation.is_rebuilt
            and not any(e.primitive in PRODUCTS for e in within)
        )
    )


def _why_truly(equation: Equation) -> str:
    if is_statistics(equation):
        return "statistics are those of true operands"
    if equation.can_be_opened:
        return f"{equation.name} has a derivative of its own: true operands"
    if equation.regions:
        return f"{equation.primitive} cannot be opened: true operands"
    if not any(map(_is_float, equation.in_avals)):
        return ""
    return f"{equation.primitive} has no rule for powers of two: true operands"


# -- Powers of two ---------------------------------------------------------------------


def _times(x: Any, power: int, largest: float = math.inf) -> Any:
    """x 2^power, in x's dtype; what is finite ends at the largest."""
    info = jnp.finfo(x.dtype)
    if isinstance(x, np.ndarray):  # a literal, in whose place stays what fits
        largest = float(info.max)
        value = math.ldexp(float(x), power)
        return np.asarray(min(max(value, -largest), largest), x.dtype)
    if _has_short_range(x.dtype):
        # XLA makes one factor of two in a row, which may be too much for float16.
        return _times(x.astype(jnp.float32), power, largest).astype(x.dtype)
    given, limit = x, -int(info.minexp)
    while power:
        step = min(max(power, -limit), limit)
        if x is not given:  # else XLA makes one factor of two, which may be infinite
            x = lax.optimization_barrier(x)
        x, power = lax.mul(x, np.asarray(2.0**step, x.dtype)), power - step
    if largest < math.inf:
        top = np.asarray(largest, x.dtype)
        x = jnp.where(jnp.isfinite(given), lax.clamp(-top, x, top), x)
    return x


# A number that its dtype holds truly, such as a mask's fill, stays finite when scaled
# up, and so it does in float16 when logits are added to it.
_ROOM = 1 - 2.0**-6


def _at(value: Any, exponent: int | None, is_logits: bool = False) -> Any:
    """The same tensor held at this exponent.

    In dtypes with float32's range only what `is_logits` may be as large as a fill.
    """
    if not isinstance(value, Scaled) or value.exponent == exponent:
        return value
    if value.exponent is None or exponent is None:
        return Scaled(value.data, exponent)
    dtype, largest = value.data.dtype, math.inf
    if exponent < min(value.exponent, 0) and (is_logits or _has_short_range(dtype)):
        largest = float(jnp.finfo(dtype).max) * _ROOM
    return Scaled(_times(value.data, value.exponent - exponent, largest), exponent)


def _fixed(value: Scaled) -> Scaled:
    return _at(value, 0) if value.exponent is None else value


def _tolerance(aval: Any) -> float:
    """Of arguments, products, their operands, and what a loop carries."""
    return CLOSE if _is_float(aval) and _has_short_range(aval.dtype) else WIDE


def _narrowed(value: Any, aval: Any) -> Any:
    """A result that was asked for in float32, to have room for its factor."""
    if not isinstance(value, Scaled) or value.data.dtype == aval.dtype:
        return value
    return Scaled(value.data.astype(aval.dtype), value.exponent)


def _is_literal(value: Any) -> bool:
    return isinstance(value, Scaled) and isinstance(value.data, np.ndarray)


def _truly(value: Any) -> Any:
    return _at(value, 0).data if isinstance(value, Scaled) else value


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Scaled) else value


def _exponent(value: Any) -> int | None:
    return value.exponent if isinstance(value, Scaled) else 0


def _held(array: Any, exponent: int | None) -> Any:
    return Scaled(array, exponent) if _is_float(array) else array


def _bits(aval: Any) -> int:
    return int(jnp.finfo(aval.dtype).bits)


def _sum(*exponents: int | None) -> int | None:
    known = [e for e in exponents if e is not None]
    return sum(known) if len(known) == len(exponents) else None


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", np.dtype(object)), jnp.floating)


def _has_short_range(dtype: Any) -> bool:
    """Whether it is a floating-point dtype with a shorter range than float32's."""
    return bool(jnp.finfo(dtype).minexp > jnp.finfo(jnp.float32).minexp)


def _is_narrow(dtype: Any) -> bool:
    """Whether it is a floating-point dtype of fewer than 32 bits."""
    if not isinstance(dtype, np.dtype | type) or dtype is object:
        return False
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        return False
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


# -- Rules -----------------------------------------------------------------------------

# A rule gives an equation's outputs, or None to see true values.
_Rule = Callable[..., list[Any] | None]


def _along(here: _Here, *args: Any) -> list[Any]:
    """f(2^k x) = 2^k f(x): each output has the exponent of its operand."""
    outs = here.bind(*args)
    given = args if len(args) == len(outs) else args[:1] * len(outs)
    return [_held(y, _exponent(x)) for x, y in zip(given, outs, strict=True)]


def _filled(here: _Here, *args: Any) -> list[Any] | None:
    """A gather, which may fill in a number of its own."""
    fill = here.equation.params.get("fill_value")
    free = fill is None or fill == 0 or not math.isfinite(fill)
    return _along(here, *args) if free else None


def _summed(here: _Here, x: Any, *rest: Any) -> list[Any]:
    """A sum, of float16 in float32: its factor comes before the cast."""
    if isinstance(x, Scaled) and x.data.dtype == jnp.float16:
        x = Scaled(x.data.astype(jnp.float32), x.exponent)
    return _along(here, x, *rest)


def _cast(here: _Here, x: Any) -> list[Any] | None:
    """A cast acts on the data, which is brought to unit scale for a shorter range."""
    (old,), (new,) = here.equation.in_avals, here.equation.out_avals
    if not (_is_float(old) and _is_float(new)):
        return None
    if _has_short_range(new.dtype) and _bits(new) <= _bits(old):
        x = here.operand(0, x, NEAREST)
    return _along(here, x)


def _quantized(here: _Here, *args: Any) -> list[Any]:
    place = _rounded(here.equation)
    operands: list[Any] = list(map(_truly, args))
    operands[place] = x = here.operand(place, args[place], NEAREST)
    return [_held(y, _exponent(x)) for y in here.bind(*operands)]


def _unrounded(here: _Here, x: Any, *key: Any) -> list[Any]:
    """The cotangent's rounding, of which a true gradient of this cannot be."""
    return [Scaled(not_rounded_later(x.data), x.exponent)]


def _aligned(here: _Here, *args: Any) -> list[Any]:
    """f(2^k x, 2^k y) = 2^k f(x, y), or a comparison: all on one exponent."""
    exponent = _common(here, args)
    aligned = (_at(x, exponent, is_logits=True) for x in args)
    return [_held(y, exponent) for y in here.bind(*aligned)]


def _common(here: _Here, args: Sequence[Any]) -> int | None:
    """An operand's exponent, of those the nearest to the result's scale.

    The result's own where its largest number would overflow at that, and in float16
    where that is far above: at the exponent of small logits a mask's fill would not be
    one.
    """
    known = [x for x in args if getattr(x, "exponent", None) is not None]
    scale, least = here.results[0].held, here.results[0].least
    far = (lambda e: -e) if scale == _NONE else (lambda e: abs(e - scale))
    nearest = min((x.exponent for x in known), key=far, default=None)
    if nearest is None or scale == _NONE:
        return nearest
    is_short = _has_short_range(known[0].data.dtype)
    is_far = is_short and scale - nearest > NARROW
    return round(scale) if is_far or nearest < least else nearest


def _scattered(here: _Here, *args: Any) -> list[Any] | None:
    """A scatter, which may apply a function to what is there."""
    applies = here.equation.params.get("update_jaxpr") is not None
    return None if applies else _aligned(here, *args)


def _first(here: _Here, x: Any, *rest: Any) -> list[Any]:
    """Linear in the first operand, selected by the others."""
    return [_held(y, _exponent(x)) for y in here.bind(x, *rest)]


def _multiplied(here: _Here, x: Any, y: Any) -> list[Any] | None:
    exponent = _sum(_exponent(x), _exponent(y))
    (aval,) = here.equation.out_avals
    for one, other in ((x, y), (y, x)):
        if _is_one(one) and np.shape(_data(other)) == aval.shape:
            return [Scaled(_data(other), exponent)]
    return [_held(z, exponent) for z in here.bind(x, y)]


def _is_one(value: Any) -> bool:
    """Whether it is a literal power of two, which is all exponent."""
    return _is_literal(value) and value.data == 1


def _divided(here: _Here, x: Any, y: Any) -> list[Any]:
    divisor = _exponent(y)
    exponent = _sum(_exponent(x), None if divisor is None else -divisor)
    (aval,) = here.equation.out_avals
    if _is_one(y) and np.shape(_data(x)) == aval.shape:
        return [Scaled(_data(x), exponent)]
    return [_held(z, exponent) for z in here.bind(x, y)]


# Of products of unit-scaled numbers, each up to 16 in magnitude: below float16's 65504.
_FLOAT16_TERMS = 2**12


def _product(here: _Here, lhs: Any, rhs: Any, *rest: Any) -> list[Any] | None:
    """A product on operands of unit scale; its exponent is the sum of theirs.

    One that was zero is taken for a sum of independent terms.
    """
    lhs, rhs = (here.multiplicand(i, x) for i, x in enumerate((lhs, rhs)))
    if not _is_float(here.equation.out_avals[0]):
        return None
    wide = here.equation.out_avals[0].dtype == jnp.float16
    if here.equation.primitive == "conv_general_dilated":
        # JAX cannot transpose a convolution whose result is wider than its operands.
        # Float16 holds the sum of fewer terms, even if they do not cancel.
        wide &= _terms(here.equation) > _FLOAT16_TERMS
        if wide:
            lhs, rhs = (
                Scaled(x.data.astype("float32"), x.exponent) for x in (lhs, rhs)
            )
    changes = {"preferred_element_type": np.dtype(np.float32)} if wide else {}
    exponent = _sum(_exponent(lhs), _exponent(rhs))
    (y,) = here.bind(lhs, rhs, *rest, **changes)
    if here.results[0].log2 == _NONE and exponent is not None:
        terms = _terms(here.equation)
        scale = _Scale(exponent + math.log2(terms) / 2)
        return [here.result(0, Scaled(y, exponent), scale)]
    return [_held(y, exponent)]


def _native_product(here: _Here, lhs: Any, rhs: Any, *factors: Any) -> list[Any]:
    """A product that rounds its operands. Its rule would round a cotangent, and there
    is none in a backward pass that is written down."""
    lhs, rhs = (here.operand(i, x, NEAREST) for i, x in enumerate((lhs, rhs)))
    (y,) = here.bind(lhs, rhs, *factors_of(here.equation))
    return [_held(not_rounded_later(y), _sum(_exponent(lhs), _exponent(rhs)))]


def _terms(equation: Equation) -> int:
    """How many numbers a product adds up."""
    lhs, rhs = equation.in_avals[:2]
    if equation.primitive == "conv_general_dilated":
        out = rhs.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return max(rhs.size // max(out, 1), 1)
    numbers = equation.params.get("ragged_dot_dimension_numbers")
    dots = (
        equation.params["dimension_numbers"]
        if numbers is None
        else numbers.dot_dimension_numbers
    )
    return max(math.prod(lhs.shape[axis] for axis in dots[0][0]), 1)


def _to_the(power: Callable[[_Here], float]) -> _Rule:
    """f(2^k x) = 2^(p k) f(x). For a root k is made even."""

    def rule(here: _Here, x: Any) -> list[Any] | None:
        if not isinstance(x, Scaled):
            return None
        p = power(here)
        if abs(p) > 2:  # which would take what is off its scale far off
            x = here.operand(0, x, NEAREST)
        if x.exponent is not None and (p * x.exponent) % 1:
            x = _at(x, x.exponent - 1)
        exponent = None if x.exponent is None else round(p * x.exponent)
        exponent = exponent if p else 0  # of zeros, too, the 0th power is one
        return [_held(y, exponent) for y in here.bind(x)]

    return rule


def _unmoved(here: _Here, *args: Any) -> list[Any]:
    """f(2^k x) = f(x)."""
    return [_held(y, 0) for y in here.bind(*args)]


def _rules(rule: _Rule, names: str) -> dict[str, _Rule]:
    return dict.fromkeys(names.split(), rule)


def _rule(equation: Equation) -> _Rule | None:
    if _is_one_of(equation, "_bwd"):
        return _unrounded
    if _is_quantize(equation):
        return _quantized
    if is_product(equation):
        return _native_product
    if equation.is_own and equation.name == "forward_only":
        return _along
    if equation.can_be_opened:  # a derivative of its own: of JAX's it is a true one
        return _aligned if equation.is_jax and _is_homogeneous(equation) else None
    return _RULES.get(equation.primitive)


def _is_homogeneous(equation: Equation) -> bool:
    """Whether f(2^k x, 2^k y) = 2^k f(x, y) for what it calls, as for a ReLU."""

    def moves(inner: Equation) -> bool:
        free = (
            not _is_float(v.aval) or not math.isfinite(v.val) or v.val == 0
            for v in inner.invars
            if is_literal(v)
        )
        rule = _RULES.get(inner.primitive)
        return all(free) and (rule in (_along, _aligned) or inner.primitive == "jit")

    return all(
        moves(inner) and not region.consts
        for region in equation.regions
        for inner in region.walk()
    )


# The rules of what moves numbers, or gives others about as large.
_MOVING = (_along, _aligned, _filled, _scattered, _first)

_RULES: Mapping[str, _Rule] = {
    **_rules(
        _along,
        "reshape transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice "
        "split unstack tile rev sort top_k neg abs real copy copy_p "
        "reduce_max reduce_min cummax cummin reduce_window_max reduce_window_min "
        "stop_gradient optimization_barrier name device_put "
        "sharding_constraint layout_constraint reshard mesh_cast pvary pcast "
        "pbroadcast pmax pmin ppermute all_gather all_gather_invariant all_to_all "
        "reduce_scatter psum psum_invariant",
    ),
    **_rules(_summed, "reduce_sum cumsum reduce_window_sum"),
    **_rules(
        _aligned,
        "add add_any sub max min clamp rem concatenate stack pad "
        "scatter-add scatter-sub scatter-max scatter-min scatter_add "
        "scatter_sub scatter_max scatter_min dynamic_update_slice "
        "select_n eq ne lt le gt ge eq_to lt_to le_to",
    ),
    **_rules(_first, "select_and_scatter_add select_and_gather_add"),
    **_rules(_product, " ".join(PRODUCTS)),
    **_rules(_to_the(lambda here: here.equation.params["y"]), "integer_pow"),
    **_rules(_to_the(lambda here: 2), "square"),
    **_rules(_to_the(lambda here: 0.5), "sqrt"),
    **_rules(_to_the(lambda here: -0.5), "rsqrt"),
    **_rules(_unmoved, "sign is_finite argmax argmin"),
    "convert_element_type": _cast,
    "reduce_precision": _quantized,
    "gather": _filled,
    "scatter": _scattered,
    "mul": _multiplied,
    "div": _divided,
}
