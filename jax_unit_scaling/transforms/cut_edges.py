"""Where factors may differ: the cut-edges of a function's graph.

The graph has a node for each operation, parameter and the loss, and an edge for each
use of a value. What has no gradient is left out: data, and what the loss does not
depend on. An edge is a cut-edge if nothing else connects its ends: every gradient then
passes it on all ways or on none, and a factor there makes a constant of it. A loop's
carry is an edge back to its start.

Reference: Unit Scaling (Blake et al., 2023), section 5, definition 5.1.
"""

import collections
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .._jaxpr import Equation, Region, is_inexact, is_literal
from ..op import OPS
from .audit import (
    FLAT,
    Operation,
    check_argnums,
    is_opened,
    operations,
    table,
    traced_loss,
)


class Inputs(NamedTuple):
    """An operation, and which of the edges into it are cut-edges.

    Attributes:
        shapes: of the inputs that have a gradient.
        cut: for each of them whether it enters on a cut-edge: may have a factor of its
            own in the backward pass.
    """

    operation: Operation
    shapes: tuple[tuple[int, ...], ...]
    cut: tuple[bool, ...]

    @property
    def is_free(self) -> bool:
        """Whether the operation may be unconstrained (`constraint=None`)."""
        return all(self.cut)


@dataclasses.dataclass(frozen=True)
class CutEdges:
    """What `cut_edges` found, in the order of computation; printed, a table."""

    operations: tuple[Inputs, ...]

    def __str__(self) -> str:
        rows = [("unconstrained", "inputs (cut-edges in brackets)", "operation")]
        for operation, shapes, cut in self.operations:
            inputs = [
                f"[{_shape(shape)}]" if is_cut else _shape(shape)
                for shape, is_cut in zip(shapes, cut, strict=True)
            ]
            free = "may be" if all(cut) else "no"
            rows.append((free, " ".join(inputs), str(operation)))
        # Blocks of a stack are alike.
        each = collections.Counter(rows)
        times = [f" ({n} times)" if n > 1 else "" for n in each.values()]
        return "\n".join(
            line + n for line, n in zip(table(list(each)), times, strict=True)
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def cut_edges(
    fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., CutEdges]:
    """Finds the scaled operations of a loss that may safely be unconstrained.

    Nothing is computed: the jaxpr alone is looked at, with all that is inside of jit,
    scan, cond, remat and shard_map. The arguments are those of `audit_gradients`; what
    they leave out is data, and no edge. A value that enters an operation of several
    arguments more than once is on no cut-edge.

    Returns:
        A function of `fn`'s arguments that returns `CutEdges`.

    Raises:
        TypeError: as for `audit_gradients`.
    """
    wanted = check_argnums(fn, argnums)

    def found(*args: Any, **kwargs: Any) -> CutEdges:
        call, inputs = traced_loss(fn, wanted, has_aux, args, kwargs)
        graph = _Graph(operations(call.region))
        values = [
            graph.value(x.shape) if i in inputs else None
            for i, x in enumerate(call.leaves)
        ]
        loss = graph.inline(call.region, values)[0]
        return CutEdges(tuple(graph.inputs(loss)))

    return found


class _Value(NamedTuple):
    """An output of a node."""

    node: int
    number: int
    shape: tuple[int, ...]


class _Edge(NamedTuple):
    value: _Value
    to: int
    # Of several uses of a value by one operation those with the same number are one.
    use: int


class _Graph:
    def __init__(self, operations: dict[tuple[int, ...], Operation]) -> None:
        self._operations = operations
        self._at: list[Operation | None] = []
        self._edges: list[_Edge] = []
        self._same: list[int] = []

    def inline(
        self, region: Region, values: Sequence[_Value | None]
    ) -> list[_Value | None]:
        """Adds a region's equations; gives its outputs, None without a gradient."""
        env = dict(zip(region.jaxpr.invars, values, strict=True))

        def read(atom: Any) -> _Value | None:
            return None if is_literal(atom) else env.get(atom)

        for equation in region.equations:
            given = list(map(read, equation.invars))
            env.update(zip(equation.outvars, self._outputs(equation, given)))  # noqa: B905
        return list(map(read, region.jaxpr.outvars))

    def value(
        self,
        shape: tuple[int, ...],
        *uses: _Value | None,
        operation: Operation | None = None,
    ) -> _Value:
        """The output of a new node, which uses these."""
        node = len(self._at)
        self._at.append(operation)
        self._same.append(node)
        for use in uses:
            self._connect(use, node)
        return _Value(node, 0, shape)

    def _connect(self, value: _Value | None, node: int) -> None:
        if value is None:
            return
        operation = self._at[node]
        if operation is not None and operation == self._at[value.node]:
            self._same[self._root(value.node)] = self._root(node)
        single = operation is not None and operation.name in _of_one_argument()
        self._edges.append(_Edge(value, node, 0 if single else len(self._edges)))

    def _root(self, node: int) -> int:
        while self._same[node] != node:
            node = self._same[node]
        return node

    def _outputs(
        self, equation: Equation, given: Sequence[_Value | None]
    ) -> list[_Value | None]:
        if equation.primitive == "optimization_barrier":
            return list(given)
        if equation.primitive in FLAT or not any(given):
            return [None] * len(equation.outvars)
        if is_opened(equation):
            return self._opened(equation, given)
        operation = self._operations.get(equation.place)
        node = self.value((), *given, operation=operation).node
        return [
            _Value(node, i, aval.shape) if is_inexact(aval) else None
            for i, aval in enumerate(equation.out_avals)
        ]

    def _opened(
        self, equation: Equation, given: Sequence[_Value | None]
    ) -> list[_Value | None]:
        ways: list[list[_Value | None]] = [[] for _ in equation.outvars]
        for region in equation.regions:
            inputs = [given[i] for i in region.inputs]
            for _, i in region.carry:
                aval = region.jaxpr.invars[i].aval
                if is_inexact(aval):
                    inputs[i] = self.value(aval.shape, inputs[i])
            outs = self.inline(region, inputs)
            for out, i in region.carry:
                if (start := inputs[i]) is not None:
                    self._connect(outs[out], start.node)
                    outs[out] = start
            for i, value in zip(region.outputs, outs, strict=False):
                ways[i].append(value)
        return [
            self._joined(way, aval.shape)
            for way, aval in zip(ways, equation.out_avals, strict=True)
        ]

    def _joined(
        self, way: Sequence[_Value | None], shape: tuple[int, ...]
    ) -> _Value | None:
        """What a value is after all branches, or iterations."""
        if len(way) > 1:
            return self.value(shape, *way)
        return None if way[0] is None else way[0]._replace(shape=shape)

    def inputs(self, loss: _Value | None) -> Iterator[Inputs]:
        """The operations between the parameters and the loss, and their inputs."""
        end = self.value((), loss).node
        edges = [
            edge
            for edge in dict.fromkeys(
                edge._replace(to=self._root(edge.to)) for edge in self._edges
            )
            if self._root(edge.value.node) != edge.to
        ]
        ends = [(self._root(edge.value.node), edge.to) for edge in edges]
        # All nodes come from a parameter; of loops that nothing enters, none does.
        useful = _reachable([(b, a) for a, b in ends], {end})
        starts = {self._root(i) for i in range(len(self._at))} - {b for _, b in ends}
        useful &= _reachable(ends, starts)
        keep = [i for i, (a, b) in enumerate(ends) if {a, b} <= useful]
        bridges = {keep[i] for i in _bridges([ends[i] for i in keep])}
        for node in sorted(useful):
            operation = self._at[node]
            into = [i for i in keep if ends[i][1] == node]
            if operation is not None:
                shapes = tuple(edges[i].value.shape for i in into)
                yield Inputs(operation, shapes, tuple(i in bridges for i in into))


def _of_one_argument() -> set[str]:
    def required(op: Any) -> int:
        parameters = inspect.signature(op.fn).parameters.values()
        return sum(
            p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty
            for p in parameters
        )

    return {name for name, op in OPS.items() if required(op) == 1} | {"unit_scaled"}


def _reachable(edges: Sequence[tuple[int, int]], starts: set[int]) -> set[int]:
    after: dict[int, list[int]] = {}
    for a, b in edges:
        after.setdefault(a, []).append(b)
    found, new = set(starts), list(starts)
    while new:
        new = [b for a in new for b in after.get(a, ()) if b not in found]
        new = [*dict.fromkeys(new)]
        found.update(new)
    return found


def _bridges(edges: Sequence[tuple[int, int]]) -> set[int]:
    """The edges whose removal disconnects their ends, by number; several between the
    same nodes are none.

    Depth first, without recursion. An edge down the tree is a bridge if no edge from
    beneath it leads above it: `low` is the highest that one does.
    """
    near: dict[int, list[tuple[int, int]]] = {}
    for i, (a, b) in enumerate(edges):
        near.setdefault(a, []).append((b, i))
        near.setdefault(b, []).append((a, i))
    depth: dict[int, int] = {}
    low: dict[int, int] = {}
    found = set()
    for root in near:
        if root in depth:
            continue
        depth[root] = low[root] = 0
        stack = [(root, -1, iter(near[root]))]
        while stack:
            node, by, rest = stack[-1]
            for other, i in rest:
                if other not in depth:
                    depth[other] = low[other] = depth[node] + 1
                    stack.append((other, i, iter(near[other])))
                    break
                if i != by:
                    low[node] = min(low[node], depth[other])
            else:
                stack.pop()
                if stack:
                    above = stack[-1][0]
                    low[above] = min(low[above], low[node])
                    if low[node] > depth[above]:
                        found.add(by)
    return found
