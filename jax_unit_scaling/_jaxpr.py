"""One interpreter of jaxprs for every transformation of a function.

A transformation is an `Interpreter`: it says which equations it `wants`, and how to
`rewrite` one. `transform(fn, make)` traces `fn` to a jaxpr and evaluates that anew with
JAX's own operations, so that the result composes with jit, grad, vmap and the rest.
What is not wanted is bound again exactly as it was, whole, with all that is inside.
Only the way to a wanted equation is opened: jit, scan, while, cond, remat, shard_map
and functions with a derivative of their own (which keep it, see `_custom`) are built
again around it. What holds a wanted equation and cannot be opened (a Pallas kernel, a
linear solve) is handed to `left`.

Where an equation stands is data: an `Equation` knows its `place` (its number in each
jaxpr around it), its `scope` (the name stack, JAX's and the user's), its `source` line
and its `regions` (the jaxprs in it, and which of its inputs and outputs are theirs).

Three things can travel beside the values, as one explicit `Side` argument, since a
closure would not survive a custom derivative:
- `shared`, the same everywhere but for `at(shared, i)` in iteration i of a loop or on
  device i of a shard_map: a random key;
- `probes`, a dictionary by equation of values for it alone (nested like the regions,
  with an axis for the iterations of a scan): what catches a cotangent;
- on the way out the *records* that `rewrite` returned, nested and stacked in the same
  way. A cond fills in `empty` ones, a while loop and a shard_map `merge` them.

Values may be pytrees in place of arrays, with static parts (an exponent, say): `lift`
makes one, `lower` gives the array back for equations that are left. A loop's carry has
the static parts that `carry` chooses, the outputs of a cond those that `join` does, and
`match` gives them to a value. `flow` is for what needs no values at all: it propagates
facts through a region, to a fixpoint in loops; `flow_back` does so from the outputs to
the inputs, as cotangents go.

This file is the only door to `jax.extend` and to what differs between JAX versions: how
jaxprs are stored in parameters (`_regions`), and scan's layout (`_scan_lengths`).
"""

import collections
import contextlib
import dataclasses
import functools as ft
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.sharding import NamedSharding, PartitionSpec as P

Place = tuple[int, ...]
_PACKAGE = str(Path(__file__).parent)
_JAX = str(Path(jax.__file__).parent)
# The name scope of what `unit_scale` computes; in no path.
UNIT_SCALED = "jax_unit_scaling.unit_scale"
Value = Any


class Side(NamedTuple):
    """What travels beside the values into a region or an equation."""

    shared: Any = None
    probes: Any = None

    def of(self, key: str) -> "Side":
        """The side of one equation of this region."""
        probes = None if self.probes is None else self.probes.get(key)
        return Side(self.shared, probes)


# -- Where equations stand -------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A jaxpr in its place.

    Attributes:
        jaxpr: the jaxpr, whose `invars` are its inputs.
        consts: the values of its `constvars`.
        place: its equation's place and its number among the equation's regions.
        scope: the name stack around it.
        inputs: for each of its inputs, which input of its equation that is.
        outputs: for each of its outputs, which output of its equation that is.
        carry: which output becomes which input of the next iteration.
        around: its equation.
    """

    jaxpr: Any
    consts: Sequence[Any] = ()
    place: Place = ()
    scope: str = ""
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    carry: tuple[tuple[int, int], ...] = ()
    around: "Equation | None" = None

    @ft.cached_property
    def equations(self) -> tuple["Equation", ...]:
        return tuple(
            Equation(eqn, (*self.place, i), self.scope, self.around)
            for i, eqn in enumerate(self.jaxpr.eqns)
        )

    @ft.cached_property
    def last_used(self) -> Mapping[str, list[Any]]:
        """By an equation's key the variables that nothing behind it uses."""
        seen = {v for v in self.jaxpr.outvars if not is_literal(v)}
        last = {}
        for equation in reversed(self.equations):
            own = [
                v for v in (*equation.invars, *equation.outvars) if not is_literal(v)
            ]
            last[equation.key] = [v for v in dict.fromkeys(own) if v not in seen]
            seen.update(own)
        return last

    def walk(
        self, opens: Callable[["Equation"], bool] = lambda equation: True
    ) -> Iterator["Equation"]:
        """All equations in it, those inside of what `opens` selects behind them."""
        for equation in self.equations:
            yield equation
            if opens(equation):
                for region in equation.regions:
                    yield from region.walk(opens)


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation in its place."""

    eqn: Any
    place: Place
    outer: str
    around: "Equation | None" = None

    @property
    def primitive(self) -> str:
        return self.eqn.primitive.name

    @property
    def params(self) -> Mapping[str, Any]:
        return self.eqn.params

    @property
    def key(self) -> str:
        """What the equation is called among those of its region."""
        return str(self.place[-1])

    @property
    def invars(self) -> Sequence[Any]:
        return self.eqn.invars

    @property
    def outvars(self) -> Sequence[Any]:
        return self.eqn.outvars

    @property
    def in_avals(self) -> list[Any]:
        return [v.aval for v in self.eqn.invars]

    @property
    def out_avals(self) -> list[Any]:
        return [v.aval for v in self.eqn.outvars]

    @ft.cached_property
    def scope(self) -> str:
        """The name stack, from the outermost in: what `jax.named_scope` and Linen's
        modules wrote, and `jvp(..)` and `transpose(..)` of differentiation."""
        own = str(self.eqn.source_info.name_stack)
        return "/".join(s for s in (self.outer, own) if s)

    @property
    def path(self) -> str:
        """The scope without what differentiation and vmap wrote: the user's names."""
        parts = re.sub(r"\w+\(|\)", "", self.scope).split("/")
        others = ("", "rematted_computation", UNIT_SCALED)
        return "/".join(p for p in parts if p not in others)

    @property
    def is_backward(self) -> bool:
        """Whether it belongs to a backward pass that differentiation has written down.

        What `jax.checkpoint` computes again on the way back is forward once more.
        """
        return self.scope.rfind("transpose(") > self.scope.rfind("rematted_computation")

    @ft.cached_property
    def source(self) -> str:
        """`file:line` of the innermost call outside of installed packages.

        JAX does not know it of what is in its own functions: then that of their call.
        """
        own = [x for x in self.frames if not is_installed(x)]
        if not own and self.around is not None:
            return self.around.source
        return (own or self.frames or ("unknown",))[-1]

    @ft.cached_property
    def frames(self) -> tuple[str, ...]:
        """The calls that led to it, as `file:line (function)`, the innermost last."""
        frames = source_info_util.summarize(self.eqn.source_info, num_frames=32)
        return tuple(line.strip() for line in frames.splitlines())

    @ft.cached_property
    def name(self) -> str:
        """The name of the function that a jit or custom derivative calls, if any."""
        if "name" in self.params:
            return str(self.params["name"])
        return str(getattr(self._debug_info, "func_name", ""))

    @property
    def is_own(self) -> bool:
        """Whether it calls a function of this library's as one, as `quantize` is: by a
        jit, or with a rule. Not a loop, nor what a transformation has built again."""
        primitive = self.primitive
        if primitive not in ("jit", "pjit") and not primitive.startswith("custom_"):
            return False
        source = str(getattr(self._debug_info, "func_src_info", ""))
        return _PACKAGE in source and __file__ not in source

    @property
    def is_jax(self) -> bool:
        """Whether what it calls is a function of JAX, as `jax.nn.relu` is."""
        return _JAX in str(getattr(self._debug_info, "func_src_info", ""))

    @property
    def is_rebuilt(self) -> bool:
        """Whether it is a custom derivative that a transformation has built again."""
        source = str(getattr(self._debug_info, "func_src_info", ""))
        return self.primitive == "custom_vjp_call" and __file__ in source

    @property
    def _debug_info(self) -> Any:
        params = self.params
        jaxpr, _ = _open(params.get("call_jaxpr", params.get("jaxpr")))
        return getattr(jaxpr, "debug_info", None)

    @ft.cached_property
    def regions(self) -> tuple[Region, ...]:
        return tuple(_regions(self))

    @property
    def can_be_opened(self) -> bool:
        """Whether what is in its regions can be rewritten."""
        return self.primitive in _CONTROL

    def __str__(self) -> str:
        name = f"[{self.name}]" if self.name else ""
        return f"{self.primitive}{name} in {self.scope or '<no scope>'} ({self.source})"

    def bind(self, *args: Any, **changes: Any) -> list[Any]:
        """The equation itself on these arrays, exactly but for changed parameters."""
        primitive = self.eqn.primitive
        params = primitive.get_bind_params({**self.params, **changes})
        out = primitive.bind(*args, **params)
        return list(out) if primitive.multiple_results else [out]

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What is traced inside has this equation's name stack, source and context."""
        info = self.eqn.source_info
        stack = source_info_util.current_name_stack() + info.name_stack
        with (
            source_info_util.user_context(info.traceback, name_stack=stack),
            self.eqn.ctx.manager,
        ):
            yield


def source() -> Any:
    """Where the function that calls this was called from."""
    return source_info_util.current().traceback


@contextlib.contextmanager
def traced_from(source: Any) -> Iterator[None]:
    """What is traced inside has this source, which `source` gave."""
    stack = source_info_util.current_name_stack()
    with source_info_util.user_context(source, name_stack=stack):
        yield


def is_installed(frame: str) -> bool:
    """Whether a call is one of this library's or of another package's functions."""
    return "site-packages" in frame or _PACKAGE in frame


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants: jax 0.11 merged closed and open ones."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _regions(equation: Equation) -> Iterator[Region]:
    """The jaxprs among an equation's parameters, and what their inputs are."""
    params, n_in = equation.params, len(equation.invars)
    every, all_out = tuple(range(n_in)), tuple(range(len(equation.outvars)))

    def region(jaxpr: Any, inputs: Any, outputs: Any = (), carry: Any = ()) -> Region:
        opened, consts = _open(jaxpr)
        place = (*equation.place, next(number))
        return Region(
            opened,
            consts,
            place,
            equation.scope,
            tuple(inputs),
            tuple(outputs),
            carry,
            equation,
        )

    number = iter(range(1 << 30))
    match equation.primitive:
        case "scan":
            consts, carry = _scan_lengths(params)
            feeds = tuple((i, consts + i) for i in range(carry))
            yield region(params["jaxpr"], every, all_out, feeds)
        case "while":
            cond, body = params["cond_nconsts"], params["body_nconsts"]
            carried = every[cond + body :]
            yield region(params["cond_jaxpr"], (*every[:cond], *carried))
            feeds = tuple((i, body + i) for i in range(len(carried)))
            inputs = (*every[cond : cond + body], *carried)
            yield region(params["body_jaxpr"], inputs, all_out, feeds)
        case "cond":
            for branch in params["branches"]:
                yield region(branch, every[1:], all_out)
        case name if name in _CONTROL:
            jaxpr = params["call_jaxpr" if "call_jaxpr" in params else "jaxpr"]
            yield region(jaxpr, every, all_out)
        case _:
            for jaxpr in jex.jaxprs_in_params(params):
                yield region(jaxpr, ())


def _scan_lengths(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.11 on
    return len(consts), len(carry)


# -- The interpreter -------------------------------------------------------------------


class Interpreter:
    """A transformation: what it wants, and what it makes of it. This one wants nothing.

    An instance serves one trace; see the file's docstring for what each method is for.

    Attributes:
        context: gives what is entered while the function, or the rule of a custom
            derivative in it, is traced.
    """

    context: Callable[[], Any] = contextlib.nullcontext

    def wants(self, equation: Equation) -> bool:
        """Whether `rewrite` is to evaluate this equation; a static question."""
        return False

    def rewrite(
        self, equation: Equation, side: Side, *args: Value
    ) -> tuple[Sequence[Value], Any]:
        """The outputs of an equation that is wanted, and a record (None for none)."""
        return self.leave(equation, *args), None

    def opens(self, equation: Equation) -> bool:
        """Whether to look into the rule of this custom derivative, even if there is
        nothing wanted in the function itself."""
        return False

    def left(self, equation: Equation) -> None:
        """Told of each equation that holds what is wanted and cannot be opened."""

    def begin(self, region: Region, cotangents: Sequence[bool]) -> None:
        """Told of each jaxpr before it is run: the function's, and those of the rules
        of custom derivatives, with which of the inputs are cotangents."""

    def at(self, shared: Any, index: Any) -> Any:
        """`shared` in iteration or on device `index`; not called if it is None."""
        return shared

    def empty(self, record: Any) -> Any:
        """The record (given as shapes) of what has not run."""
        return jax.tree.map(lambda x: lax.full_like(x, 0), record)

    def merge(self, records: Any) -> Any:
        """One record of several, stacked along a new first axis."""
        return jax.tree.map(lambda x: x.sum(0), records)

    def lift(self, array: Any) -> Value:
        return array

    def lower(self, value: Value) -> Any:
        return value

    def carry(self, body: Region, values: Sequence[Value]) -> Sequence[Value]:
        """What a loop starts from, with the static parts that it is to keep."""
        return values

    def join(self, values: Sequence[Value]) -> Value:
        """A value with the static parts for what each branch of a cond gives; of the
        values here only shapes are known."""
        return values[0]

    def match(self, value: Value, like: Value) -> Value:
        """`value` with the static parts of `like`."""
        return value

    def leave(self, equation: Equation, *args: Value) -> list[Value]:
        """The outputs of an equation that is not rewritten."""
        return [self.lift(x) for x in equation.bind(*map(self.lower, args))]

    # What follows is not for overriding.

    def run(
        self, region: Region, side: Side, args: Sequence[Value]
    ) -> tuple[list[Value], dict[str, Any]]:
        """Evaluates a region: its outputs, and the records by equation."""
        env: dict[Any, Value] = {}
        env.update(zip(region.jaxpr.constvars, map(self.lift, region.consts)))  # noqa: B905
        env.update(zip(region.jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            return self.lift(atom.val) if is_literal(atom) else env[atom]

        records = {}
        for equation in region.equations:
            args = [read(v) for v in equation.invars]
            with equation.context():
                outs, record = self._evaluate(equation, side.of(equation.key), args)
            env.update(zip(equation.outvars, outs, strict=True))
            if record is not None and jax.tree.leaves(record):
                records[equation.key] = record
            for v in region.last_used[equation.key]:
                del env[v]  # where arrays are no tracers, memory is freed
        return [read(v) for v in region.jaxpr.outvars], records

    def _evaluate(
        self, equation: Equation, side: Side, args: Sequence[Value]
    ) -> tuple[Sequence[Value], Any]:
        if self.wants(equation):
            try:
                return self.rewrite(equation, side, *args)
            except Exception as e:
                e.add_note(f"This happened at {equation}.")
                raise
        if self.is_inside(equation):
            if equation.can_be_opened:
                return self.open(equation, side, args)
            self.left(equation)
        return self.leave(equation, *args), None

    def open(
        self, equation: Equation, side: Side, args: Sequence[Value]
    ) -> tuple[Sequence[Value], Any]:
        """Builds an equation that can be opened again, around what is in it."""
        return _CONTROL[equation.primitive](self, equation, side, args)

    def is_inside(self, equation: Equation) -> bool:
        """Whether there is something wanted in the equation's regions."""
        return self.opens(equation) or any(
            self.wants(inner) or self.is_inside(inner)
            for region in equation.regions
            for inner in region.equations
        )


# -- Equations that hold jaxprs --------------------------------------------------------

Outs = tuple[Sequence[Value], Any]


def _call(self: Interpreter, equation: Equation, side: Side, args: Any) -> Outs:
    (region,) = equation.regions
    return self.run(region, side, args)


def _jit(self: Interpreter, equation: Equation, side: Side, args: Any) -> Outs:
    (region,), params = equation.regions, equation.params

    def called(side: Side, *args: Value) -> Outs:
        return self.run(region, side, args)

    called.__name__ = called.__qualname__ = params["name"]
    options: dict[str, Any] = {
        "donate_argnums": [i + 1 for i, d in enumerate(params["donated_invars"]) if d],
        "keep_unused": params["keep_unused"],
        "inline": params["inline"],
        "compiler_options": dict(params["compiler_options_kvs"]) or None,
    }
    if any(isinstance(s, jax.sharding.Sharding) for s in params["in_shardings"]):
        options["in_shardings"] = (None, *params["in_shardings"])
    if any(isinstance(s, jax.sharding.Sharding) for s in params["out_shardings"]):
        options["out_shardings"] = (list(params["out_shardings"]), None)
    return jax.jit(called, **options)(side, *args)


def _scan(self: Interpreter, equation: Equation, side: Side, args: Any) -> Outs:
    (region,), params = equation.regions, equation.params
    n_consts, n_carry = _scan_lengths(params)
    consts, init = args[:n_consts], args[n_consts : n_consts + n_carry]
    init = list(self.carry(region, init))
    steps = None if side.shared is None else jnp.arange(params["length"])

    def body(carry: Any, x: Any) -> Any:
        step, probes, xs = x
        inner = Side(_at(self, side.shared, step), probes)
        outs, records = self.run(region, inner, [*consts, *carry, *xs])
        new = [self.match(v, like) for v, like in zip(outs, carry, strict=False)]
        return new, (outs[n_carry:], records)

    carry, (ys, records) = lax.scan(
        body,
        init,
        (steps, side.probes, args[n_consts + n_carry :]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys], records


def _while(self: Interpreter, equation: Equation, side: Side, args: Any) -> Outs:
    condition, body = equation.regions
    n, m = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    cond_consts, body_consts, init = args[:n], args[n : n + m], args[n + m :]
    init, shared = list(self.carry(body, init)), side.shared

    def keep(state: Any) -> Any:
        step, _, carry = state
        inner = Side(_at(self, shared, step))
        (more,), _ = self.run(condition, inner, [*cond_consts, *carry])
        return self.lower(more)

    def once(step: Any, carry: Any) -> Outs:
        inner = Side(_at(self, shared, step))
        outs, records = self.run(body, inner, [*body_consts, *carry])
        new = [self.match(v, like) for v, like in zip(outs, carry, strict=True)]
        return new, records

    def advance(state: Any) -> Any:
        step, records, carry = state
        carry, more = once(step, carry)
        return _next(step), _merge(self, records, more), carry

    step = None if shared is None else jnp.int32(0)
    records = self.empty(jax.eval_shape(once, step, init)[1])
    _, records, carry = lax.while_loop(keep, advance, (step, records, init))
    return carry, records


def _cond(self: Interpreter, equation: Equation, side: Side, args: Any) -> Outs:
    index, *operands = args

    def branch(i: int, region: Region) -> Callable[..., Outs]:
        def run(side: Side, *operands: Value) -> Outs:
            outs, records = self.run(region, side.of(str(i)), operands)
            return outs, {str(i): records} if records else {}

        return run

    branches = [branch(i, region) for i, region in enumerate(equation.regions)]
    given, found = zip(
        *(jax.eval_shape(run, side, *operands) for run in branches), strict=True
    )
    likes = [self.join(values) for values in zip(*given, strict=True)]
    shapes = {k: v for records in found for k, v in records.items()}

    def filled(run: Callable[..., Outs]) -> Callable[..., Outs]:
        def call(side: Side, *operands: Value) -> Outs:
            outs, records = run(side, *operands)
            others = {k: v for k, v in shapes.items() if k not in records}
            outs = [self.match(v, like) for v, like in zip(outs, likes, strict=True)]
            return outs, {**self.empty(others), **records}

        return call

    return lax.switch(self.lower(index), list(map(filled, branches)), side, *operands)


def _remat(self: Interpreter, equation: Equation, side: Side, args: Any) -> Outs:
    (region,), params = equation.regions, equation.params

    def called(side: Side, *args: Value) -> Outs:
        return self.run(region, side, args)

    again = jax.checkpoint(
        called, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    if not params["differentiated"]:
        return again(side, *args)
    # JAX keeps XLA from moving back what differentiation has already moved into the
    # backward pass; `jax.checkpoint` alone would not say so.
    region, leaves, tree = trace(again, side, *args)
    outs = Interpreter().run(_differentiated(region), Side(), leaves)[0]
    return jax.tree.unflatten(tree, outs)


def _differentiated(region: Region) -> Region:
    def mark(eqn: Any) -> Any:
        if "differentiated" not in eqn.params:
            return eqn
        return eqn.replace(params={**eqn.params, "differentiated": True})

    jaxpr = region.jaxpr
    jaxpr = jaxpr.replace(eqns=[mark(eqn) for eqn in jaxpr.eqns])
    return dataclasses.replace(region, jaxpr=jaxpr)


def _shard_map(self: Interpreter, equation: Equation, side: Side, args: Any) -> Outs:
    (region,), params = equation.regions, equation.params
    mesh, axes = params["mesh"], tuple(sorted(params["newly_manual_axes"]))
    devices = math.prod(mesh.shape[axis] for axis in axes)
    # By a cotangent's type explicit axes split it, so they have to split the probes.
    explicit = tuple(axis for axis in axes if axis in mesh.explicit_axes)

    def called(side: Side, *args: Value) -> Any:
        shared = _at(self, side.shared, lax.axis_index(axes))
        probes = jax.tree.map(lambda x: x[0], side.probes)
        outs, records = self.run(region, Side(shared, probes), args)
        return outs, jax.tree.map(lambda x: x[None], records)

    mapped = jax.shard_map(
        called,
        mesh=mesh,
        in_specs=(Side(P(), P(axes)), *params["in_specs"]),
        out_specs=(list(params["out_specs"]), P(axes)),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )

    # Each device has probes of its own, whose cotangents are merged as records are.
    @jax.custom_vjp
    def spread(probes: Any) -> Any:
        each = jax.tree.map(lambda x: jnp.stack([x] * devices), probes)
        if not explicit:
            return each
        return jax.sharding.reshard(each, NamedSharding(mesh, P(explicit)))

    spread.defvjp(lambda x: (spread(x), None), lambda _, g: (self.merge(g),))
    outs, records = mapped(Side(side.shared, spread(side.probes)), *args)
    return outs, self.merge(records)


def _custom(self: Interpreter, equation: Equation, side: Side, args: Any) -> Outs:
    """A function with a derivative of its own, opened.

    The function and its rule for the backward pass are both interpreted. Forward mode
    is lost, where there was one.

    The rule is what `jax.vjp` of the equation itself traces, only when it is asked for.
    """
    (region,) = equation.regions
    is_float = [is_inexact(aval) for aval in equation.in_avals]

    def vjp(*args: Any) -> Any:
        return jax.vjp(equation.bind, *args)

    def transpose(pull: Any, cotangents: Sequence[Any]) -> list[Any]:
        given = [
            g if is_inexact(aval) else np.zeros(aval.shape, jax.dtypes.float0)
            for g, aval in zip(cotangents, equation.out_avals, strict=True)
        ]
        return [g for g, wanted in zip(pull(given), is_float, strict=True) if wanted]

    def run(region: Region, shared: Any, args: Sequence[Any]) -> list[Any]:
        # Arrays in and out: JAX's rules for these functions know no other values.
        outs, _ = self.run(region, Side(shared), list(map(self.lift, args)))
        return list(map(self.lower, outs))

    @jax.custom_vjp
    def called(shared: Any, *args: Any) -> list[Any]:
        return run(region, shared, args)

    def interpret(fn: Callable[..., Any], n: int, shared: Any, *args: Any) -> Any:
        with self.context():
            inner, leaves, tree = trace(fn, *args)
        scope = f"{equation.scope}/transpose()" if fn is transpose else equation.scope
        place = (*equation.place, n)
        inner = dataclasses.replace(inner, place=place, scope=scope, around=equation)
        # Of the transposed rule the last arguments are cotangents.
        count = len(leaves) - len(jax.tree.leaves(args[0])) if fn is transpose else 0
        self.begin(inner, [i >= len(leaves) - count for i in range(len(leaves))])
        return jax.tree.unflatten(tree, run(inner, shared, leaves))

    def forward(shared: Any, *args: Any) -> Any:
        outs, pull = interpret(vjp, 1, shared, *args)
        return outs, (shared, pull)

    def backward(residuals: Any, cotangents: Any) -> Any:
        shared, pull = residuals
        cotangents = [
            g if is_inexact(aval) else None
            for g, aval in zip(cotangents, equation.out_avals, strict=True)
        ]
        found = iter(interpret(transpose, 2, shared, pull, cotangents))
        return None, *(next(found) if wanted else None for wanted in is_float)

    called.defvjp(forward, backward)
    outs = called(side.shared, *map(self.lower, args))
    return [self.lift(x) for x in outs], None


_CONTROL: Mapping[str, Callable[[Interpreter, Equation, Side, Any], Outs]] = {
    "jit": _jit,
    "pjit": _jit,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _remat,
    "checkpoint": _remat,
    "shard_map": _shard_map,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "closed_call": _call,
    "core_call": _call,
}


def _at(self: Interpreter, shared: Any, index: Any) -> Any:
    return None if shared is None else self.at(shared, index)


def _next(step: Any) -> Any:
    return None if step is None else step + 1


def _merge(self: Interpreter, one: Any, other: Any) -> Any:
    return self.merge(jax.tree.map(lambda *x: jnp.stack(x), one, other))


def is_inexact(x: Any) -> bool:
    """Whether an array or type is of floating point, complex or not."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


# -- Facts without values --------------------------------------------------------------


def flow(
    region: Region,
    facts: Sequence[Any],
    transfer: Callable[[Equation, list[Any]], Sequence[Any]],
    *,
    join: Callable[[Any, Any], Any],
    bottom: Any,
    literal: Callable[[Equation, Any], Any] | None = None,
    opens: Callable[[Equation], bool] = lambda equation: equation.can_be_opened,
    enter: Callable[[Region, list[Any]], Sequence[Any]] | None = None,
) -> list[Any]:
    """Propagates facts about a region's inputs to its outputs.

    `transfer` gives the facts about an equation's outputs from those about its inputs.
    `enter` is told of those about each region's inputs, and gives those about its
    constants (else `bottom`); of literals it is what `literal` says of their value in
    an equation (or `bottom`). What `opens` selects is opened: branches are
    joined, and loops are run through until nothing changes, so that `join` must grow
    and end (and `transfer` see an equation once more each time).
    """
    env = dict.fromkeys(region.jaxpr.constvars, bottom)
    if enter:
        constants = enter(region, list(facts))
        env.update(zip(region.jaxpr.constvars, constants, strict=True))
    env.update(zip(region.jaxpr.invars, facts, strict=True))

    def read(atom: Any) -> Any:
        return bottom if is_literal(atom) else env[atom]

    again = ft.partial(
        flow,
        transfer=transfer,
        join=join,
        bottom=bottom,
        literal=literal,
        opens=opens,
        enter=enter,
    )

    def inside(inner: Region, given: list[Any]) -> list[Any]:
        inputs = [given[i] for i in inner.inputs]
        while True:
            outs = again(inner, inputs)
            old = list(inputs)
            for out, into in inner.carry:
                inputs[into] = join(inputs[into], outs[out])
            if inputs == old:
                return outs

    for equation in region.equations:
        given = [
            literal(equation, v.val) if literal and is_literal(v) else read(v)
            for v in equation.invars
        ]
        if opens(equation):
            # A loop that does not run gives back what it was given.
            outs = [bottom] * len(equation.outvars)
            for inner in equation.regions:
                for into, out in inner.carry:
                    if len(outs) > into:
                        outs[into] = join(outs[into], given[inner.inputs[out]])
                for i, fact in zip(inner.outputs, inside(inner, given), strict=False):
                    outs[i] = join(outs[i], fact)
        else:
            outs = list(transfer(equation, given))
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in region.jaxpr.outvars]


def flow_back(
    region: Region,
    facts: Sequence[Any],
    transfer: Callable[[Equation, list[Any]], Sequence[Any] | None],
    *,
    join: Callable[[Any, Any], Any],
) -> list[Any]:
    """Propagates facts about a region's outputs to its inputs.

    `transfer` gives the facts about an equation's inputs from those about its outputs,
    or None to have the equation opened. What nothing is known of has the fact None;
    the facts of a value's several uses are joined, and `join(old, new)` must be `old`
    where there is nothing new in it, so that loops come to an end.
    """
    env: dict[Any, Any] = {}

    def met(old: Any, new: Any) -> Any:
        if old is None or new is None:
            return new if old is None else old
        return join(old, new)

    def add(atoms: Sequence[Any], facts: Sequence[Any]) -> None:
        for atom, fact in zip(atoms, facts, strict=True):
            if not is_literal(atom):
                env[atom] = met(env.get(atom), fact)

    def inside(inner: Region, given: list[Any]) -> list[Any]:
        outputs = [given[i] for i in inner.outputs]
        while True:
            inputs = flow_back(inner, outputs, transfer, join=join)
            old = list(outputs)
            for out, into in inner.carry:
                outputs[out] = met(outputs[out], inputs[into])
            if outputs == old:
                return inputs

    add(region.jaxpr.outvars, facts)
    for equation in reversed(region.equations):
        given = [env.get(v) for v in equation.outvars]
        if all(fact is None for fact in given):
            continue
        found = transfer(equation, given)
        if found is not None:
            add(equation.invars, found)
            continue
        for inner in filter(lambda inner: inner.outputs, equation.regions):
            atoms = [equation.invars[i] for i in inner.inputs]
            add(atoms, inside(inner, given))
    return [env.get(v) for v in region.jaxpr.invars]


# -- Functions of anything -------------------------------------------------------------


class Traced(NamedTuple):
    """A function's jaxpr, its arrays, and the structure of what it returns."""

    region: Region
    leaves: list[Any]
    tree: Any


def trace(fn: Callable[..., Any], *args: Any) -> Traced:
    """The jaxpr of a function of pytrees of arrays."""
    leaves, tree = jax.tree.flatten(args)
    closed, shapes = jax.make_jaxpr(
        lambda *leaves: fn(*jax.tree.unflatten(tree, leaves)), return_shape=True
    )(*leaves)
    region = Region(*_open(closed))
    return Traced(region, leaves, jax.tree.structure(shapes))


def transform(
    fn: Callable[..., Any],
    make: Callable[[Region], tuple[Interpreter, Side]],
    finish: Callable[[Any, Interpreter, dict[str, Any]], Any] = lambda out, *_: out,
    context: Callable[[], Any] = contextlib.nullcontext,
) -> Callable[..., Any]:
    """`fn` evaluated by an interpreter.

    `fn` takes and returns anything: arrays, pytrees of them, static values (which stay
    as they are), and modules that hold variables, whose updates reach the caller's own
    module (see `Call`). It may be such a module itself, or a method of one.

    Args:
        make: gives the interpreter for a jaxpr, and what travels beside its inputs.
        finish: makes the result of fn's, the interpreter and the records.
        context: the interpreter's.
    """

    @ft.wraps(fn, updated=())
    def transformed(*args: Any, **kwargs: Any) -> Any:
        with context():
            call = Call(fn, args, kwargs)
        interpreter, side = make(call.region)
        interpreter.context = context
        interpreter.begin(call.region, [False] * len(call.leaves))
        inputs = list(map(interpreter.lift, call.leaves))
        outs, records = interpreter.run(call.region, side, inputs)
        out = call.result(list(map(interpreter.lower, outs)))
        return finish(out, interpreter, records)

    return transformed


class Call:
    """A call of a function, traced: flat arrays to flat arrays.

    Arrays are inputs; all else (numbers, strings, functions) is static. A *variable* is
    an object with a value that is set in place, as `nnx.Variable` is: inside, the
    function gets copies of the variables (one of each, however often it occurs), and
    what it set them to is returned too and written to the originals.

    Attributes:
        region: the jaxpr.
        leaves: its inputs.
        paths: the name of each input, such as "args/0/kernel".
        static: the names of all else.

    Raises:
        TypeError: if it is given a shape in place of an array, and computes with it.
        ValueError: if the function changes a module's structure.
    """

    def __init__(
        self, fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        method = getattr(fn, "__func__", None)
        fn = fn if method is None else fn.__self__
        everything = {"fn": fn, "args": args, "kwargs": kwargs}
        paths, self._parts, self._structure = _flatten(everything, is_variable)
        self._variables = _distinct([x for x in self._parts if is_variable(x)])
        self._values = [jax.tree.flatten(v) for v in self._variables]
        flat = [x for leaves, _ in self._values for x in leaves]
        self._flat = flat + [x for x in self._parts if not is_variable(x)]
        is_input = list(map(_is_array, self._flat))
        self.leaves = [x for x in self._flat if _is_array(x)]
        self.paths = self._paths(paths, self._parts, is_input)
        self.static = self._paths(paths, self._parts, [not x for x in is_input])

        def flat_fn(*leaves: Any) -> list[Any]:
            given, copies = self._filled(leaves)
            call = given["fn"] if method is None else ft.partial(method, given["fn"])
            before = [jax.tree.leaves(v) for v in copies]
            out = call(*given["args"], **given["kwargs"])
            after = jax.tree.structure(given, is_leaf=is_variable)
            if after != self._structure:
                raise ValueError(
                    "`fn` must keep the structure of the modules it is given, but it "
                    "added or removed attributes: transform a function of "
                    "`nnx.split(module)`'s state, which returns the new state."
                )
            self._set = {
                i: jax.tree.structure(v)
                for i, (v, old) in enumerate(zip(copies, before, strict=True))
                if any(
                    a is not b for a, b in zip(jax.tree.leaves(v), old, strict=False)
                )
            }
            new = [copies[i] for i in self._set]
            self._out, self._tree = jax.tree.flatten((out, new))
            self._is_output = list(map(_is_array, self._out))
            return [x for x in self._out if _is_array(x)]

        try:
            self.region = Region(*_open(jax.make_jaxpr(flat_fn)(*self.leaves)))
        except Exception as e:
            self._check_shapes(paths, e)
            raise
        # Some of JAX's functions take a shape for a constant.
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in self.region.consts):
            self._check_shapes(paths, None)

    def _check_shapes(self, paths: list[str], cause: Exception | None) -> None:
        """Raises TypeError if the function was given a shape, and has computed with it.

        It may well be given one to take it for that.
        """
        is_shape = [isinstance(x, jax.ShapeDtypeStruct) for x in self._flat]
        if any(is_shape):
            path = self._paths(paths, self._parts, is_shape)[0]
            raise TypeError(
                f"`{path}` must be an array where `fn` computes with it, got "
                f"{self._flat[is_shape.index(True)]}: pass an array of that shape."
            ) from cause

    def check_concrete(self, reason: str, instead: str) -> None:
        """Raises TypeError if an input is traced, or what the function closes over."""
        for path, leaf in zip(self.paths, self.leaves, strict=True):
            if isinstance(leaf, jax.core.Tracer):
                raise TypeError(
                    f"`{path}` must be concrete, as {reason}, got a traced "
                    f"{jax.typeof(leaf)}: {instead}."
                )
        for const in self.region.consts:
            if isinstance(const, jax.core.Tracer):
                raise TypeError(
                    f"`fn` must be concrete, as {reason}, but it closes over a traced "
                    f"{jax.typeof(const)}: {instead}."
                )

    def gives_loss(self, has_aux: bool) -> bool:
        """Whether it returns one array, or a pair of one and an auxiliary value, which
        is the first output then.

        Raises:
            TypeError: if it was to return a pair, and does not.
        """
        tree: Any = self._tree
        value = tree.children()[0]
        if has_aux:
            node, parts = value.node_data(), value.children()
            if node is None or len(parts) != 2 or not issubclass(node[0], tuple | list):
                found = f"a {node[0].__name__} of {len(parts)}" if node else "one value"
                raise TypeError(
                    "`fn` must return a pair of a loss and an auxiliary value, as "
                    f"`has_aux=True` says, got {found}: return `(loss, aux)`, or leave "
                    "out `has_aux`."
                )
            value = parts[0]
        return jax.tree_util.treedef_is_leaf(value) and self._is_output[0]

    def argument(self, i: int, leaves: Sequence[Any]) -> Any:
        """The positional argument `i` with these values in place of the inputs."""
        return self._filled(leaves)[0]["args"][i]

    def inputs_of(self, i: int) -> list[int]:
        """Which inputs are in the positional argument `i`."""
        numbers = list(map(_Number, range(len(self.leaves))))
        found = jax.tree.leaves(self.argument(i, numbers))
        return [x.number for x in found if isinstance(x, _Number)]

    def _filled(self, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
        """What the call is of, with these values in place of the inputs, and the
        copies of variables in it."""
        rest = iter(leaves)
        filled = iter([next(rest) if _is_array(x) else x for x in self._flat])
        copies = [
            jax.tree.unflatten(tree, [next(filled) for _ in leaves])
            for leaves, tree in self._values
        ]
        where = {id(v): copy for v, copy in zip(self._variables, copies, strict=True)}
        parts = [where[id(x)] if id(x) in where else next(filled) for x in self._parts]
        return jax.tree.unflatten(self._structure, parts), copies

    def result(self, outs: Sequence[Any]) -> Any:
        """What the function returns, given its flat outputs; variables are set."""
        rest = iter(outs)
        flat = [
            next(rest) if dynamic else x
            for x, dynamic in zip(self._out, self._is_output, strict=True)
        ]
        out, new = jax.tree.unflatten(self._tree, flat)
        for i, copy in zip(self._set, new, strict=True):
            self._variables[i].set_raw_value(copy.get_raw_value())
        return out

    def _paths(
        self, paths: list[str], parts: list[Any], is_input: list[bool]
    ) -> list[str]:
        first = {id(x): path for path, x in zip(reversed(paths), reversed(parts))}  # noqa: B905
        named = [
            "/".join((first[id(v)], *([path] if path != "value" else [])))
            for v in self._variables
            for path in _flatten(v)[0]
        ]
        named += [p for p, x in zip(paths, parts, strict=True) if not is_variable(x)]
        return [p for p, dynamic in zip(named, is_input, strict=True) if dynamic]


def _flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any], Any]:
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found
    ]
    return paths, [leaf for _, leaf in found], structure


@dataclasses.dataclass(frozen=True)
class _Number:
    """The number of an input, in its place: a leaf, unlike a tuple."""

    number: int


def is_variable(x: Any) -> bool:
    return hasattr(x, "set_raw_value") and hasattr(x, "get_raw_value")


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _distinct(objects: list[Any]) -> list[Any]:
    return list(collections.OrderedDict((id(x), x) for x in objects).values())
