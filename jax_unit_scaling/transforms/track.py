"""The scales of all tensors in a function, forward and backward, in a few numbers each.

A tensor's cotangent is caught by a probe: an argument with the statistics' shape that
takes no part in the function, whose own cotangent is set to the statistics of the
tensor's. So everything stays a pure function, and the memory is that of the numbers.
"""

import dataclasses
import functools as ft
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float

from .._jaxpr import (
    Call,
    Equation,
    Interpreter,
    Place,
    Side,
    flow,
    is_inexact,
    is_literal,
    is_variable,
)
from ..formats import E4M3, E5M2, FP16, Format
from ..op import varying, varying_along

# The binades of a histogram: below lies what no 16-bit float format but bfloat16 holds.
LOWEST, HIGHEST = -48, 31
FORMATS: Mapping[str, Format] = {"FP16": FP16, "E5M2": E5M2, "E4M3": E4M3}


class Stats(NamedTuple):
    """What a tensor's elements are like; in a scan with an axis for the iterations.

    Of its finite elements `scale` is the root mean square, `total` the sum, `largest`
    and `smallest` are magnitudes, the latter of those that are not zero. All else are
    counts: `nan` of what is not a number, `infinite` of infinities. `histogram[i]`
    finite elements have magnitudes in [2^(i + LOWEST), 2^(i + LOWEST + 1)); the first
    and the last binade also count what lies beyond. `underflow` and `overflow` count
    for each format what would round to zero, and what lies beyond its largest number
    (infinities too). A complex number counts as two elements.
    """

    size: Float[Array, "..."]
    total: Float[Array, "..."]
    scale: Float[Array, "..."]
    largest: Float[Array, "..."]
    smallest: Float[Array, "..."]
    zeros: Float[Array, "..."]
    infinite: Float[Array, "..."]
    nan: Float[Array, "..."]
    histogram: Float[Array, "... binades"]
    underflow: Float[Array, "... formats"]
    overflow: Float[Array, "... formats"]

    @property
    def finite(self) -> Array:
        return self.size - self.infinite - self.nan

    @property
    def mean(self) -> Array:
        return self.total / self.finite

    @property
    def std(self) -> Array:
        share = self.mean / jnp.where(self.scale > 0, self.scale, 1)
        return self.scale * jnp.sqrt(jnp.maximum(1 - share**2, 0))


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a tensor stands.

    Attributes:
        name: the path of modules and scopes, of an argument or the parameter that is
            applied, and the primitive.
        source: the file and line.
        shape, dtype: of the tensor, in one iteration.
        is_backward: whether it belongs to a backward pass that is written down.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_backward: bool
    place: tuple[int, ...]


@ft.partial(
    jax.tree_util.register_dataclass,
    data_fields=["forward", "backward"],
    meta_fields=["site"],
)
@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor's statistics, and those of its cotangent where they were asked for."""

    forward: Stats
    backward: Stats | None
    site: Site


@ft.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tensors"],
    meta_fields=["formats"],
)
@dataclasses.dataclass(frozen=True)
class Scales(Mapping[str, Tensor]):
    """What `track_scales` saw: each `Tensor` by its name, in the order of computation.

    It is a pytree, so that it can leave jit, and be stacked by a scan over steps.
    """

    tensors: tuple[Tensor, ...]
    formats: tuple[tuple[str, Format], ...]

    @ft.cached_property
    def _by_name(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for tensor in self.tensors:
            name, n = tensor.site.name, 1
            while name in found:
                n += 1
                name = f"{tensor.site.name}#{n}"
            found[name] = tensor
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.tensors)

    def where(self, keep: Callable[[Site], bool]) -> "Scales":
        """Those tensors alone whose site `keep` says to keep."""
        kept = tuple(t for t in self.tensors if keep(t.site))
        return dataclasses.replace(self, tensors=kept)


# What gives the elements it is given, or some of them, in another place or dtype.
_MOVES = frozenset(
    "broadcast_in_dim concatenate convert_element_type copy dynamic_slice expand_dims "
    "gather optimization_barrier pad reshape rev slice split squeeze stop_gradient "
    "transpose".split()
)


def computed(site: Site) -> bool:
    """Whether a tensor is an argument or computed, not only moved: pass it as `where`.

    Left out are reshapes, slices, casts and the like, and what is no larger than a
    scalar: about half of a model's tensors, whose scales are those of others.
    """
    moved = site.name.split("/")[-1] in _MOVES
    return site.source == "argument" or not (moved or math.prod(site.shape) == 1)


def track_scales(
    fn: Callable[..., Any],
    *,
    formats: Mapping[str, Format] = FORMATS,
    where: Callable[[Site], bool] = lambda site: True,
) -> Callable[..., tuple[Any, Scales]]:
    """`fn`, which then also returns the statistics of every floating-point tensor.

    Tracked are its arguments and what each equation gives, also inside jit, scan (with
    an axis for the iterations), cond, remat and shard_map (over all devices, so that
    what each of n devices holds a copy of is counted n times); a function with a
    derivative of its own counts as one equation. Of a while loop all iterations come as
    one, and a branch of a cond that is not taken has a count of zero.

    If `fn` differentiates (`jax.value_and_grad(loss)`), the tensors of its backward
    pass are among them, as `is_backward`. For each tensor's cotangent beside the
    tensor see `track_value_and_grad`.

    Args:
        formats: for these, by name, under- and overflows are counted.
        where: which tensors to track.

    Returns:
        A pure function that returns `(fn(...), Scales)`.

    Raises:
        TypeError: if `fn`, `formats` or `where` is of another kind; and where called,
            if `fn` is tracked already.

    Reference: Unit Scaling (Blake et al., 2023), figures 1 and A.1.
    """
    _check(fn, formats, where)

    @ft.wraps(fn, updated=())
    def tracked(*args: Any, **kwargs: Any) -> tuple[Any, Scales]:
        call = _call(fn, args, kwargs)
        outs, records = _through(call, call.leaves, formats, where, None)
        return call.result(outs), _scales(records, None, formats)

    return tracked


def track_value_and_grad(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    formats: Mapping[str, Format] = FORMATS,
    where: Callable[[Site], bool] = lambda site: True,
) -> Callable[..., tuple[Any, Any, Scales]]:
    """`jax.value_and_grad(fn)`, with the statistics of tensors and cotangents.

    The cotangent of a tensor that is used several times is the sum that arrives at it.
    What the loss does not depend on has cotangents of zero; inside a while loop, which
    has no gradient, they are not seen (a count of zero).

    A gradient has the structure of its argument: that of a Flax module is a module that
    holds gradients (`nnx.state(grads, nnx.Param)` are those of its parameters). What
    `fn` sets a module's variables to, batch statistics and random counts, the caller's
    own module has afterwards, whether it is differentiated or not.

    Args:
        fn: a loss, as for `jax.value_and_grad`.
        argnums: which arguments are differentiated. Those of a module's variables that
            are not floating point have gradients of `jax.dtypes.float0`, as those of
            `jax.grad(..., allow_int=True)`.
        has_aux: whether `fn` returns `(loss, aux)`.
        formats, where: as for `track_scales`.

    Returns:
        A pure function that returns `(value, gradients, Scales)`.

    Raises:
        TypeError: if `fn`, `argnums`, `formats` or `where` is of another kind; and
            where called, if `fn` does not return a scalar (or with `has_aux` a pair),
            is tracked already, or an argument to be differentiated has nothing of
            floating point.
    """
    _check(fn, formats, where)
    wanted = numbers(argnums)

    @ft.wraps(fn, updated=())
    def tracked(*args: Any, **kwargs: Any) -> tuple[Any, Any, Scales]:
        call = _call(fn, with_arrays(args, wanted), kwargs)
        if not call.gives_loss(has_aux):
            raise TypeError(
                "`fn` must return a scalar loss, or with `has_aux=True` a pair of one "
                "and an auxiliary value."
            )
        inputs = _differentiable(call, wanted, len(args))
        shapes = jax.eval_shape(
            lambda *leaves: _through(call, leaves, formats, where, None)[1],
            *call.leaves,
        )
        probes = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def loss(differentiated: Sequence[Any], probes: Any) -> Any:
            given = dict(enumerate(call.leaves))
            given |= zip(inputs, differentiated, strict=True)
            outs, records = _through(call, [*given.values()], formats, where, probes)
            return outs[0], (outs, records)

        (_, (outs, records)), (found, caught) = jax.value_and_grad(
            loss, (0, 1), has_aux=True
        )([call.leaves[i] for i in inputs], probes)
        leaves = dict(enumerate(map(_no_gradient, call.leaves)))
        leaves |= zip(inputs, found, strict=True)
        grads = tuple(call.argument(i, [*leaves.values()]) for i in wanted)
        out = call.result(outs)
        several = isinstance(argnums, Iterable)
        return out, grads if several else grads[0], _scales(records, caught, formats)

    return tracked


def _check(fn: Any, formats: Any, where: Any) -> None:
    for name, value, what in (("fn", fn, " or a module"), ("where", where, "")):
        if not callable(value):
            raise TypeError(f"`{name}` must be a function{what}, got {value!r}.")
    check_formats(formats)


def check_formats(formats: Any) -> None:
    are_formats = isinstance(formats, Mapping) and all(
        isinstance(f, Format) for f in formats.values()
    )
    if not are_formats:
        raise TypeError(
            "`formats` must be a mapping of names to `jax_unit_scaling.Format`s, such "
            f"as {{'E4M3': jax_unit_scaling.E4M3}}, got {formats!r}."
        )


def numbers(argnums: int | Sequence[int]) -> tuple[int, ...]:
    """The numbers of arguments, of which there may be one."""
    try:
        several = argnums if isinstance(argnums, Iterable) else (argnums,)
        return tuple(map(operator.index, several))
    except TypeError:
        raise TypeError(
            "`argnums` must be the number of an argument, or a sequence of them, got "
            f"{argnums!r}."
        ) from None


def with_arrays(args: tuple[Any, ...], wanted: Sequence[int]) -> tuple[Any, ...]:
    """Python numbers in what is differentiated as arrays; they are static elsewhere."""
    given = list(args)
    for i in wanted:
        if -len(args) <= i < len(args):
            given[i] = jax.tree.map(
                lambda x: jnp.asarray(x) if isinstance(x, float) else x,
                args[i],
                is_leaf=is_variable,
            )
    return tuple(given)


def _differentiable(call: Call, wanted: Sequence[int], n: int) -> list[int]:
    """The inputs of floating point in the arguments that are differentiated."""
    found: set[int] = set()
    for i in wanted:
        if not -n <= i < n:
            raise TypeError(
                f"`argnums` must be numbers of the {n} positional arguments, got {i}."
            )
        here = [j for j in call.inputs_of(i) if is_inexact(call.leaves[j])]
        if not here:
            raise TypeError(
                f"`argnums` must be of arguments with arrays of floating point, got "
                f"{i}, which has none: choose others, or convert it."
            )
        found.update(here)
    return sorted(found)


def _no_gradient(x: Any) -> Any:
    return np.zeros(x.shape, jax.dtypes.float0)


def _through(
    call: Call,
    leaves: Sequence[Any],
    formats: Mapping[str, Format],
    where: Callable[[Site], bool],
    probes: Any,
) -> tuple[Any, Any]:
    interpreter = _Track(tuple(formats.values()), where, parameters(call))
    side = Side(None, probes)
    values, record = interpreter.track(
        argument_sites(call), side.of("arguments"), leaves
    )
    outs, records = interpreter.run(call.region, side, values)
    return outs, {"arguments": record, **records}


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Call:
    call = Call(fn, args, kwargs)
    if any(map(is_statistics, call.region.walk())):
        raise TypeError(
            "`fn` must not be tracked already, but it computes statistics: a record of "
            "them would be none of the model. Track once, outermost: "
            "`track_scales(fn)` or `track_value_and_grad(loss)`, with other "
            "transformations inside."
        )
    return call


def is_statistics(equation: Equation) -> bool:
    """Whether an equation is what this file counts of a tensor."""
    return equation.is_own and equation.name == "_stats"


def argument_sites(call: Call) -> list[Site | None]:
    """Where each input of a call stands; None if it is not floating point."""
    return [
        Site(path, "argument", x.shape, np.dtype(x.dtype), False, (i,))
        if is_inexact(x)
        else None
        for i, (path, x) in enumerate(zip(call.paths, call.leaves, strict=True))
    ]


def parameters(call: Call) -> dict[Place, str]:
    """Of equations that take one parameter, itself or cast or scaled, its path.

    NNX's modules leave no name in a jaxpr: `blocks/0/up/kernel/dot_general` says more
    than a line that all blocks share. A parameter is an argument of floating point;
    where two of them meet, or what was computed from them, there is no one path.
    """
    found: dict[Place, str] = {}
    several = ""

    def transfer(equation: Equation, given: list[Any]) -> list[Any]:
        paths = {path for path in given if path}
        variables = [v for v in equation.invars if not is_literal(v)]
        fact = several if several in given or paths else None
        if len(paths) == 1:
            (path,) = paths
            for n in range(1, len(equation.place) + 1):
                found.setdefault(equation.place[:n], path)
            if len(variables) == 1:
                fact = path
        return [fact] * len(equation.outvars)

    def join(a: Any, b: Any) -> Any:
        return b if a is None or a == b else a if b is None else several

    facts = [
        path if is_inexact(x) else None
        for path, x in zip(call.paths, call.leaves, strict=True)
    ]
    flow(call.region, facts, transfer, join=join, bottom=None)
    return found


def sites(equation: Equation, parameter: str = "") -> list[Site | None]:
    """Where each output of an equation stands; None if it is not floating point.

    It is called by its scope; without one by the parameter it takes, or by its source.
    """
    where = equation.path or parameter or equation.source.split("/")[-1]
    called = equation.name or equation.primitive
    return [
        Site(
            f"{where}/{called}",
            equation.source,
            aval.shape,
            np.dtype(aval.dtype),
            equation.is_backward,
            (*equation.place, i),
        )
        if is_inexact(aval)
        else None
        for i, aval in enumerate(equation.out_avals)
    ]


class _Track(Interpreter):
    def __init__(
        self,
        formats: tuple[Format, ...],
        where: Callable[[Site], bool],
        parameters: Mapping[Place, str],
    ) -> None:
        self._formats, self._where = formats, where
        self._parameters = parameters

    def wants(self, equation: Equation) -> bool:
        whole = equation.primitive.startswith("custom_") or equation.is_own
        opened = equation.can_be_opened and not whole
        return not opened and any(map(is_inexact, equation.out_avals))

    def rewrite(
        self, equation: Equation, side: Side, *args: Any
    ) -> tuple[Sequence[Any], Any]:
        parameter = self._parameters.get(equation.place, "")
        outs = self.leave(equation, *args)
        return self.track(sites(equation, parameter), side, outs)

    def track(
        self, sites: Sequence[Site | None], side: Side, values: Sequence[Any]
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """The values, on their way through probes, and a record of those with sites."""
        records, outs = {}, list(values)
        for i, site in enumerate(sites):
            if site is None or not self._is_wanted(site):
                continue
            if side.probes is not None:
                outs[i] = _probe(self._formats)(outs[i], side.probes[str(i)])
            stats = _stats(lax.stop_gradient(outs[i]), self._formats)
            records[str(i)] = Tensor(stats, None, site)
        return outs, records

    def _is_wanted(self, site: Site) -> bool:
        try:
            return self._where(site)
        except Exception as e:
            e.add_note(f"This happened in `where`, of {site.name} ({site.source}).")
            raise

    def empty(self, record: Any) -> Any:
        def one(tensor: Tensor) -> Tensor:
            zeros = jax.tree.map(lambda x: lax.full_like(x, 0), tensor.forward)
            smallest = jnp.full_like(zeros.smallest, jnp.inf)
            return dataclasses.replace(
                tensor, forward=zeros._replace(smallest=smallest)
            )

        return jax.tree.map(one, record, is_leaf=_is_tensor)

    def merge(self, records: Any) -> Any:
        def one(tensor: Tensor) -> Tensor:
            stats = tensor.forward
            merged = Stats(*(x.sum(0) for x in stats))._replace(
                scale=rms(stats.scale, stats.finite, 0),
                largest=stats.largest.max(0),
                smallest=stats.smallest.min(0),
            )
            return dataclasses.replace(tensor, forward=merged)

        return jax.tree.map(one, records, is_leaf=_is_tensor)


@ft.cache
def _probe(formats: tuple[Format, ...]) -> Callable[[Array, Tensor], Array]:
    @jax.custom_vjp
    def probe(x: Array, caught: Tensor) -> Array:
        return x

    def backward(caught: Tensor, g: Array) -> tuple[Array, Tensor]:
        stats = jax.tree.map(_varying_as, _stats(g, formats), caught.forward)
        return g, dataclasses.replace(caught, forward=stats)

    probe.defvjp(lambda x, caught: (x, caught), backward)
    return probe


def _varying_as(x: Array, like: Array) -> Array:
    """In a shard_map each device has a probe, also of what is the same on all."""
    return varying_along(x, varying(like))


# Jitted, so that it is traced once for all tensors of a shape.
@ft.partial(jax.jit, static_argnums=1)
def _stats(x: Array, formats: tuple[Format, ...]) -> Stats:
    """The statistics of one tensor."""
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.explicit_axes:
        return _counted(x, formats)
    # JAX would refuse to count at places that are split: the compiler chooses how.
    return jax.sharding.auto_axes(
        ft.partial(_counted, formats=formats),
        axes=mesh.explicit_axes,
        out_sharding=NamedSharding(mesh, P()),
    )(x)


def _counted(x: Array, formats: tuple[Format, ...]) -> Stats:
    """The statistics of one tensor, none of whose axes is split explicitly.

    A float's bits without the sign are ordered as magnitudes are. So all counts are
    differences of `above`: how many elements are at least each of the sorted `edges`.
    """
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    wide = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    integer = np.dtype(f"int{8 * wide.itemsize}")

    def ordered(magnitude: float) -> int:
        return int(np.asarray(magnitude, wide).view(integer))

    def magnitude(bits: Array) -> Array:
        return lax.bitcast_convert_type(bits, wide)

    x = x.astype(wide)
    bits = lax.bitcast_convert_type(x, integer) & np.iinfo(integer).max
    binades = [ordered(2.0**k) for k in range(LOWEST + 1, HIGHEST + 1)]
    inf = ordered(math.inf)
    # Half of the smallest number rounds to even: to zero.
    kept = [ordered(f.smallest_subnormal / 2) + 1 for f in formats]
    too_large = [ordered(f.max) + 1 for f in formats]
    others = [1, inf, inf + 1, *kept, *too_large]
    edges = np.sort([*binades, *others])

    def scattered(bits: Array, *, tables: int = 1) -> Array:
        shift = jnp.finfo(wide).nmant
        exponent = (bits >> shift) - (ordered(2.0**LOWEST) >> shift)
        passed = jnp.clip(exponent, 0, len(binades)).astype(jnp.int32)
        passed += sum((bits >= e).astype(jnp.int32) for e in others)
        n = len(edges) + 1
        if tables > 1:
            passed += n * (_number(bits.shape) % tables).astype(jnp.int32)
        counts = jnp.zeros(tables * n, jnp.int32)
        counts = counts.at[passed].add(1, mode="promise_in_bounds")
        between = counts.reshape(tables, n).sum(0)
        return jnp.cumsum(between[::-1], dtype=jnp.int32)[::-1]

    def compared(bits: Array) -> Array:
        least = jnp.asarray([0, *edges], integer)
        axes = tuple(range(bits.ndim))
        return jnp.sum(bits[..., None] >= least, axis=axes, dtype=jnp.int32)

    # A CPU counts one element at a time. A GPU counts by atomic additions: neighbours
    # in tables of their own, as most are in a few binades and would wait for each
    # other. To compare each with every edge reads once too, but is 90 times the work.
    tables = min(max(x.size // 128, 1), 4096)
    on_gpu = ft.partial(scattered, tables=tables)
    above = lax.platform_dependent(
        bits, cpu=scattered, cuda=on_gpu, rocm=on_gpu, default=compared
    )
    wanted = [[0, 1, inf, inf + 1], kept, too_large, [1, *binades, inf]]
    found = above[np.searchsorted(edges, sum(wanted, []), side="right")]
    ends = np.cumsum(list(map(len, wanted)))[:-1]
    (size, nonzero, not_finite, nan), kept_by, beyond, at_least = jnp.split(
        found.astype(jnp.float32), ends
    )
    is_finite = bits < inf
    x, bits = jnp.where(is_finite, x, 0), jnp.where(is_finite, bits, 0)
    largest = magnitude(bits.max(initial=0))
    squares = (x / jnp.where(largest > 0, largest, 1)) ** 2
    return Stats(
        size=size,
        total=x.sum(),
        scale=largest * jnp.sqrt(squares.sum() / jnp.maximum(size - not_finite, 1)),
        largest=largest,
        smallest=magnitude(bits.min(initial=inf, where=bits > 0)),
        zeros=size - nonzero,
        infinite=not_finite - nan,
        nan=nan,
        histogram=at_least[:-1] - at_least[1:],
        underflow=nonzero - kept_by,
        overflow=beyond - nan,
    )


def _number(shape: tuple[int, ...]) -> Array:
    """Each element's number, or what is left of it in 32 bits."""
    number = jnp.zeros(shape, jnp.uint32)
    for axis, n in enumerate(shape):
        number = number * n + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return number


def rms(x: Array, weight: Array, axis: int | tuple[int, ...]) -> Array:
    """The root of the weighted mean of squares, none of which overflows."""
    top = x.max(axis, keepdims=True, initial=0.0)
    relative = x / jnp.where(top > 0, top, 1)
    weights = jnp.maximum(weight.sum(axis), 1)
    mean = jnp.sum(weight * relative**2, axis) / weights
    return jnp.squeeze(top, axis) * jnp.sqrt(mean)


def _scales(records: Any, caught: Any, formats: Mapping[str, Format]) -> Scales:
    tensors = jax.tree.leaves(records, is_leaf=_is_tensor)
    if caught is not None:
        backward = jax.tree.leaves(caught, is_leaf=_is_tensor)
        tensors = [
            dataclasses.replace(t, backward=b.forward)
            for t, b in zip(tensors, backward, strict=True)
        ]
    return Scales(
        tuple(
            sorted(tensors, key=lambda t: (t.site.source != "argument", t.site.place))
        ),
        tuple(formats.items()),
    )


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
