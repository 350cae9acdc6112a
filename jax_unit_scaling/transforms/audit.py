"""Whether false gradients are sound: which parameters get the true one, and why not.

A scaled operation multiplies a cotangent by another factor than the derivative's. On
its way from the loss to a parameter, the product of all ratios of the two is what the
gradient is false by. The gradient is the true one times a constant where that product
is the same on all ways; where ways part, meet, and differ in it, the sum of what comes
back points elsewhere. So each value has a *ratio*, of its cotangent to the true one,
which one pass over the jaxpr gives, from the loss to the inputs.

Reference: Unit Scaling (Blake et al., 2023), section 5, theorem 5.2.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._jaxpr import (
    Call,
    Equation,
    Interpreter,
    Region,
    Side,
    flow_back,
    is_inexact,
    is_installed,
    trace,
)
from ..fp8 import factors_of, is_product
from ..op import OPS
from ..scale import scaled
from .track import numbers, with_arrays

_PACKAGE = Path(__file__).parent.parent
Verdict = Literal["true", "broken", "zero"]


class Operation(NamedTuple):
    """An operation of the library's, and the call that it is.

    Attributes:
        name: what it is called: "linear", "cross_entropy", "scaled".
        scope: the name stack around it, of Linen's modules and `jax.named_scope`.
        source: the user's file, line and function.
        within: the calls from there on, of modules of this library and of Flax.
    """

    name: str
    scope: str
    source: str
    within: tuple[str, ...]

    def __str__(self) -> str:
        calls = [
            f"{name}:{call.split(':')[1]}"
            for call in self.within
            for name in [_short(_function(call))]
            if "<" not in _function(call) and name.strip("_") == name != self.name
        ]
        where = f" in {self.scope}" if self.scope else ""
        return f"{self.source}: {' > '.join([*calls, self.name])}{where}"


class Culprit(NamedTuple):
    """An operation whose factors break a gradient.

    `fwd` is the product of its forward factors along the way that parts, and `bwd` that
    of its backward ones, where both should be the same: or, if the operation stands on
    both ways that meet, how many times more each is on one than on the other. NaN is a
    factor that is known at run time only.
    """

    operation: Operation
    fwd: float
    bwd: float


class Gradient(NamedTuple):
    """The gradient of one parameter beside the true one.

    Attributes:
        path: the parameter's.
        cosine: of the angle between the two; NaN where one is zero.
        ratio: their ratio, in the true one's direction.
        expected: the ratio that the factors say, if they agree; NaN where they do not,
            or depend on how many elements a mask selects.
        verdict: "true" up to a constant, "broken", or "zero" for none at all.
        culprits: what breaks it.
    """

    path: str
    cosine: float
    ratio: float
    expected: float
    verdict: Verdict
    culprits: tuple[Culprit, ...]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit_gradients` found; printed, a table.

    Attributes:
        gradients: a row for each parameter.
        culprits: the operations whose factors break a gradient, each once.
    """

    gradients: tuple[Gradient, ...]

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        found = {c.operation: c for g in self.gradients for c in g.culprits}
        return tuple(found.values())

    @property
    def is_true(self) -> bool:
        """Whether every gradient is the true one up to a constant."""
        return all(g.verdict != "broken" for g in self.gradients)

    def check(self) -> None:
        """Raises a ValueError with the table if a gradient is broken."""
        if not self.is_true:
            raise ValueError(f"Factors break gradients.\n{self}")

    def __str__(self) -> str:
        rows = [("parameter", "cosine", "ratio", "gradient")]
        rows += [
            (g.path, f"{g.cosine:.6f}", f"{g.ratio:.4g}", g.verdict)
            for g in self.gradients
        ]
        lines = table(rows)
        if not self.culprits:
            return "\n".join([*lines, "Every gradient is true, up to a constant."])
        lines.append("Broken by factors that differ, forward and backward:")
        for operation, fwd, bwd in self.culprits:
            lines.append(f"  {operation}: {fwd:.4g} and {bwd:.4g}")
        lines.append(
            "Give these a constraint, or put them on a cut-edge (see `cut_edges`)."
        )
        return "\n".join(lines)


def audit_gradients(
    fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Audit]:
    """Compares the gradients that scaled operations give with those of the same values.

    Both are computed, once each. Which gradients are true up to a constant, and what
    breaks the others, is read off the jaxpr: from the factors and the ways from each
    parameter to the loss. So a broken gradient is found where its share happens to be
    small, too. An operation is named if the ways agree as soon as its own factors do;
    if none is so alone, all are named in which the ways differ.

    Parts of one array, cut from it or put together in it, are taken for one value:
    where they have gradients false by different constants, the whole is broken.
    Functions with a `custom_vjp` of another origin count as true. Operations whose
    factors agree are not to be seen in a jaxpr, nor need be. Complex parameters have
    `jax.grad`'s gradients, whose real and imaginary parts are compared.

    Args:
        fn: a loss, as for `jax.grad`: not yet differentiated. It may take NNX or
            Equinox modules, whose variables stay as they are.
        argnums: which arguments are audited; a module that is `fn` itself always is.
            Python floats in them count as arrays.
        has_aux: whether `fn` returns `(loss, aux)`.

    Returns:
        A function of `fn`'s arguments that returns an `Audit`.

    Raises:
        TypeError: if `fn` or `argnums` is of another kind; and where called, if `fn`
            does not return a scalar (or with `has_aux` a pair), or contains a backward
            pass already, in which factors are no more to be told apart; if there is
            nothing of floating point to audit; or if an argument is traced.
    """
    wanted = check_argnums(fn, argnums)

    def audited(*args: Any, **kwargs: Any) -> Audit:
        call, inputs = traced_loss(fn, wanted, has_aux, args, kwargs)
        call.check_concrete(
            "gradients are compared",
            "call `audit_gradients` outside of jit and of other transformations, on "
            "what they give: `audit_gradients(simulate_fp8(loss))`",
        )
        facts = _Ratios(call).of_inputs()
        scaled = _gradients(Interpreter(), call, inputs)
        true = _gradients(_True(), call, inputs)
        rows = [
            _gradient(call.paths[i], facts[i], g, t)
            for i, g, t in zip(inputs, scaled, true, strict=True)
        ]
        return Audit(tuple(rows))

    return audited


def check_argnums(fn: Any, argnums: int | Sequence[int]) -> tuple[int, ...]:
    if not callable(fn):
        raise TypeError(f"`fn` must be a function or a module, got {fn!r}.")
    wanted = numbers(argnums)
    if any(i < 0 for i in wanted):
        raise TypeError(
            f"`argnums` must be numbers of arguments, from 0 on, got {argnums!r}."
        )
    return wanted


def traced_loss(
    fn: Any,
    argnums: tuple[int, ...],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Call, list[int]]:
    """The traced call, of which the first output is the loss, and which of its inputs
    are parameters."""
    if any(i >= len(args) for i in argnums):
        raise TypeError(
            f"`argnums` must be numbers of the {len(args)} positional arguments, got "
            f"{argnums}."
        )
    call = Call(fn, with_arrays(args, argnums), kwargs)
    inputs = _audited(call, argnums)
    outs = [v.aval for v in call.region.jaxpr.outvars]
    is_real = bool(outs) and jnp.issubdtype(outs[0].dtype, jnp.floating)
    if not is_real or outs[0].shape != () or not call.gives_loss(has_aux):
        raise TypeError(
            "`fn` must return a scalar loss of floating-point numbers, as for "
            f"`jax.grad`{', and an auxiliary value' if has_aux else ''}, got "
            f"{outs[0] if outs else 'no array'}."
        )
    # What cannot be opened (a linear solve) may keep its own transpose.
    for equation in call.region.walk(lambda equation: equation.can_be_opened):
        if equation.is_backward:
            raise TypeError(
                "`fn` must be the loss itself, but it computes gradients, by "
                f"{equation}: give `audit_gradients` what `jax.grad` was given."
            )
    return call, inputs


def _audited(call: Call, argnums: tuple[int, ...]) -> list[int]:
    """The inputs of floating point in these arguments, and in `fn` itself."""
    # Leaves are called "args/0/..", and those of a module that is `fn` itself "fn/..".
    roots = [
        tuple(path.split("/")[:2]) if is_inexact(x) else ()
        for path, x in zip(call.paths, call.leaves, strict=True)
    ]
    wanted = [("args", str(i)) for i in argnums]
    missing = [root[1] for root in wanted if root not in roots]
    of_module = any(root[:1] == ("fn",) for root in roots)
    if not of_module and (missing or not wanted):
        raise TypeError(
            "`argnums` must be of arguments with arrays of floating point, got "
            f"{f'{missing[0]}, which has none' if missing else 'none'}: choose others, "
            "or convert them."
        )
    return [i for i, r in enumerate(roots) if r[:1] == ("fn",) or r in wanted]


def _gradients(
    interpreter: Interpreter, call: Call, inputs: Sequence[int]
) -> list[np.ndarray[Any, Any]]:
    @jax.jit
    def gradients(leaves: list[Any]) -> list[Any]:
        def loss(parameters: list[Any]) -> Any:
            given = dict(enumerate(leaves)) | dict(zip(inputs, parameters, strict=True))
            return interpreter.run(call.region, Side(), [*given.values()])[0][0]

        return jax.grad(loss)([leaves[i] for i in inputs])

    return [
        np.asarray(g, np.complex128 if jnp.iscomplexobj(g) else np.float64)
        for g in gradients(call.leaves)
    ]


def _gradient(path: str, fact: "_Ratio | None", scaled: Any, true: Any) -> Gradient:
    dot = np.vdot(scaled, true).real
    norm, true_norm = map(np.linalg.norm, (scaled, true))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = float(np.divide(dot, norm * true_norm))
        ratio = float(np.divide(dot, true_norm**2))
    if fact is None or not (np.any(scaled) or np.any(true)):
        return Gradient(path, cosine, ratio, math.nan, "zero", ())
    if fact.culprits:
        return Gradient(path, cosine, ratio, math.nan, "broken", fact.culprits)
    expected = math.exp(sum(bwd - fwd for fwd, bwd in fact.parts.values()))
    return Gradient(path, cosine, ratio, expected, "true", ())


class _True(Interpreter):
    """Replaces each rule that is not the derivative by the function that it is for.

    That of a native product rounds, and stays; its cotangents get the forward factor.
    """

    def wants(self, equation: Equation) -> bool:
        return _is_false(equation)

    def rewrite(
        self, equation: Equation, side: Side, *args: Any
    ) -> tuple[Sequence[Any], None]:
        if is_product(equation):
            fwd, *bwd = factors_of(equation)
            operands = zip(args[:2], bwd, strict=True)
            return equation.bind(
                *(scaled(x, bwd=fwd / b) for x, b in operands), *args[2:]
            ), None
        return self.run(equation.regions[0], side, args)[0], None


# The library's functions whose backward factors are not the derivative's. All but the
# last are linear in so many inputs, with coefficients that are known while tracing but
# for a `tau` that is one input more. (Rounding, whose derivative is zero, has its own
# for the true one.)
_LINEAR = {"scaling": 1, "_split": 1, "_join": 2}
_AT_RUN_TIME = "_divided_forward"


def is_opened(equation: Equation) -> bool:
    """Whether it is what is inside of it; the library's own rules are wholes."""
    return equation.can_be_opened and not _is_rule(equation)


def _is_false(equation: Equation) -> bool:
    if is_product(equation):
        return len({*factors_of(equation)}) > 1
    return _is_rule(equation) and equation.name in (*_LINEAR, _AT_RUN_TIME)


def _is_rule(equation: Equation) -> bool:
    return equation.is_own and equation.primitive.startswith("custom_")


# -- The ratios of all values ----------------------------------------------------------

_Parts = dict[Operation, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class _Ratio:
    """The ratio of a value's cotangent to the true one, in parts.

    Attributes:
        parts: by operation on the way to the loss, the logarithms of its forward and
            of its backward factors.
        culprits: of broken ratios, which go on as that of one of the ways.
    """

    parts: _Parts
    culprits: tuple["Culprit", ...] = ()

    def through(self, operation: Operation, fwd: float, bwd: float) -> "_Ratio":
        """The ratio in front of an operation with these factors."""
        old = self.parts.get(operation, (0.0, 0.0))
        new = (old[0] + math.log(fwd), old[1] + math.log(bwd))
        return _Ratio({**self.parts, operation: new}, self.culprits)


class _Ratios:
    """One pass from a call's first output, the loss, to its inputs."""

    def __init__(self, call: Call) -> None:
        self._region = call.region
        self._operations = operations(call.region)
        rules = _Rules()
        jax.eval_shape(
            lambda *leaves: rules.run(call.region, Side(), leaves)[0], *call.leaves
        )
        self._rules = rules.found
        # What rounding may make of the sum of an operation's logarithms.
        self._error: dict[Operation, float] = {}

    def of_inputs(self) -> list[_Ratio | None]:
        others = len(self._region.jaxpr.outvars) - 1
        return flow_back(
            self._region,
            [_Ratio({}), *[None] * others],
            self._transfer,
            join=self._join,
        )

    def _transfer(
        self, equation: Equation, outs: list[_Ratio | None]
    ) -> list[_Ratio | None] | None:
        if _is_false(equation):
            return self._false(equation, outs)
        if is_opened(equation):
            return None
        given = [x for x in outs if x is not None]
        if equation.primitive == "optimization_barrier":
            return list(outs)
        if equation.primitive in FLAT:
            return [None] * len(equation.invars)
        ratio = given[0]
        for other in given[1:]:
            ratio = self._join(ratio, other)
        return [ratio if is_inexact(aval) else None for aval in equation.in_avals]

    def _false(
        self, equation: Equation, outs: list[_Ratio | None]
    ) -> list[_Ratio | None]:
        operation = self._operations[equation.place]
        dtype = equation.out_avals[0].dtype
        self._error[operation] = 4 * float(jnp.finfo(dtype).eps)
        if is_product(equation):
            factor, *others = factors_of(equation)
            assert outs[0] is not None
            ratios = [outs[0].through(operation, factor, other) for other in others]
            return [*ratios, None, None, None]
        if equation.name == _AT_RUN_TIME:
            assert outs[0] is not None
            return [outs[0].through(operation, math.nan, 1.0), None]
        if len(equation.in_avals) > _LINEAR[equation.name]:
            raise ValueError(
                f"`tau` of `{operation.name}` ({operation.source}) must be a number to "
                "be audited, got an array that is not known while tracing: audit the "
                "blocks in a Python loop instead of a scan."
            )
        coefficients = _coefficients(equation, self._rules[equation.place])
        found: list[_Ratio | None] = []
        for forward, backward in zip(*coefficients, strict=True):
            met = None
            for out, fwd, bwd in zip(outs, forward, backward, strict=True):
                if out is not None:
                    ratio = out.through(operation, fwd, bwd)
                    met = ratio if met is None else self._join(met, ratio)
            found.append(met)
        return found

    def _join(self, one: _Ratio, other: _Ratio) -> _Ratio:
        differ = {
            operation: (fwd, bwd)
            for operation in {**one.parts, **other.parts}
            if (fwd := _difference(one, other, operation, 0))
            != (bwd := _difference(one, other, operation, 1))
        }
        found = [*one.culprits, *other.culprits]
        if not self._agree(differ):
            alone = [
                operation
                for operation in differ
                if self._agree({o: x for o, x in differ.items() if o != operation})
            ]
            for operation in alone or differ:
                fwd, bwd = map(math.exp, differ[operation])
                if not math.isclose(fwd, bwd, rel_tol=self._error[operation]):
                    found.append(Culprit(operation, fwd, bwd))
        each = {culprit.operation: culprit for culprit in reversed(found)}
        if len(each) == len(one.culprits):
            return one
        return _Ratio(one.parts, tuple(each.values()))

    def _agree(self, differ: _Parts) -> bool:
        error = sum(self._error[operation] for operation in differ)
        return abs(sum(bwd - fwd for fwd, bwd in differ.values())) <= error


# Their derivative is zero.
FLAT = ("stop_gradient", "sign", "floor", "ceil", "round")


def _difference(one: _Ratio, other: _Ratio, operation: Operation, i: int) -> float:
    a, b = (x.parts.get(operation, (0.0, 0.0))[i] for x in (one, other))
    # What is known at run time only is the same on both ways.
    return 0.0 if math.isnan(a) and math.isnan(b) else a - b


class _Rules(Interpreter):
    """Collects what each false equation does to cotangents, as a region of its inputs
    and these: traced in its place, since inside a shard_map types depend on that."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, ...], Region] = {}

    def wants(self, equation: Equation) -> bool:
        return _is_false(equation) and not is_product(equation)

    def rewrite(
        self, equation: Equation, side: Side, *args: Any
    ) -> tuple[Sequence[Any], None]:
        def backward(inputs: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            return jax.vjp(equation.bind, *inputs)[1](list(cotangents))

        outs = equation.bind(*args)
        self.found[equation.place] = trace(backward, args, outs).region
        return outs, None


def _coefficients(
    equation: Equation, rule: Region
) -> tuple[list[list[float]], list[list[float]]]:
    """For each input of a linear function, what each output has of it, and what its
    cotangent has of each output's: by evaluation on scalars."""
    inputs, outs = equation.in_avals, equation.out_avals
    forward = _on_units(equation.regions[0], inputs)
    rows = _on_units(rule, [*inputs, *outs])[len(inputs) :]
    return forward, [list(column) for column in zip(*rows, strict=True)]


def _on_units(region: Region, inputs: Sequence[Any]) -> list[list[float]]:
    """The outputs of an elementwise linear region, for a one in each of its inputs."""
    rows = []
    for i in range(len(inputs)):
        units = [jnp.asarray(float(i == j), x.dtype) for j, x in enumerate(inputs)]
        rows.append([float(x) for x in _OnScalars().run(region, Side(), units)[0]])
    return rows


class _OnScalars(Interpreter):
    """Leaves out what inside a shard_map marks a value as varying over devices."""

    def wants(self, equation: Equation) -> bool:
        return equation.primitive in ("pvary", "pcast")

    def rewrite(
        self, equation: Equation, side: Side, *args: Any
    ) -> tuple[Sequence[Any], None]:
        return args, None


# -- Operations ------------------------------------------------------------------------


def operations(region: Region) -> dict[tuple[int, ...], Operation]:
    """The library's operations, by the place of their equations.

    One is told by the call of it. Its plain function, which its equations without
    factors are made by, has its name.
    """
    calls = {e.place: call for e in region.walk() if (call := _call(e)) is not None}
    names = {call.key: call.name for call in calls.values() if call.is_plain}
    scopes: dict[Any, set[str]] = {}
    for call in calls.values():
        scopes.setdefault(call.key, set()).add(call.scope)

    def scope(call: _LibraryCall) -> str:
        # Functions of `jax.numpy` have scopes of their own, within.
        around = [s for s in scopes[call.key] if f"{call.scope}/".startswith(f"{s}/")]
        return "" if "" in scopes[call.key] else min(around, key=len)

    return {
        place: Operation(names.get(call.key, call.name), scope(call), *call.key)
        for place, call in calls.items()
    }


class _LibraryCall(NamedTuple):
    key: tuple[str, tuple[str, ...]]
    scope: str
    name: str
    is_plain: bool


def _call(equation: Equation) -> _LibraryCall | None:
    """The call of an operation that an equation belongs to, if any."""
    frames = equation.frames
    doors = [i for i, x in enumerate(frames) if _file(x) == "op.py"]
    if not doors and not _is_false(equation):
        return None
    ends = doors or [i for i, x in enumerate(frames) if _file(x) == "scale.py"]
    end = ends[0] if ends else len(frames)
    own = [i for i, x in enumerate(frames[:end]) if not is_installed(x)]
    start = own[-1] if own else 0
    within = tuple(frames[start + 1 : end])
    inner = frames[end + 1 :] if doors else ()
    is_plain = bool(inner) and _file(inner[0]) != "scale.py"
    if is_plain:
        name = _multiplied().get(_line(inner[0])) or _short(_function(inner[0]))
    elif doors:
        name = "scaled"
    else:
        public = [x for x in within if _file(x).startswith("ops/")]
        public = [x for x in public if not _short(_function(x)).startswith(("_", "<"))]
        name = _short(_function((public or frames[end : end + 1])[-1]))
    return _LibraryCall((frames[start], within), equation.path, name, is_plain)


def _file(frame: str) -> str:
    """The file of a frame, from the package on; "" if it is not one of this library."""
    path = frame.split(":")[0]
    inside = Path(path).is_relative_to(_PACKAGE)
    return Path(path).relative_to(_PACKAGE).as_posix() if inside else ""


@ft.cache
def _multiplied() -> dict[str, str]:
    """The operations' names, by the lines of what `Op.multiplied` says."""
    codes = {n: op.multiplied.__code__ for n, op in OPS.items() if op.multiplied}
    return {
        f"{code.co_filename}:{line}": name
        for name, code in codes.items()
        for *_, line in code.co_lines()
    }


def _line(frame: str) -> str:
    return ":".join(frame.split(":")[:2])


def _function(frame: str) -> str:
    return frame[frame.index("(") + 1 : -1] if "(" in frame else ""


def _short(function: str) -> str:
    # `unit_scaled(f)` calls f by a function of its own.
    if function.startswith("unit_scaled."):
        return "unit_scaled"
    return function.removesuffix(".__call__").split(".")[-1]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
