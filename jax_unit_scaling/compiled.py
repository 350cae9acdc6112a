"""Compiling for 8-bit products, and reading what was compiled.

`jit` is `jax.jit` with the compiler options that matter for them. `fp8_products` and
`assert_fp8` read the compiled program: whether a product became one of the hardware's
8-bit products is the compiler's decision, and nothing else tells. So is whether a
factor became part of another kernel (`lone_multiplications`).
"""

import collections
import dataclasses
import functools as ft
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
from jax import lax

from .fp8 import SCOPE, SIMULATED_SCOPE, is_native, on_cuda

# Measured on an H200 with jax 0.11.2 (`experiments/fp8_speed`): where XLA tries Triton
# kernels for each product, it compiles for minutes instead of seconds, gives some
# 8-bit products no cuBLASLt kernel at all, and steps take a tenth longer.
GPU_OPTIONS: Mapping[str, bool | int | str] = {"xla_gpu_enable_triton_gemm": False}

_LEFT_OUT: Any = object()


@overload
def jit(
    fn: Callable[..., Any],
    *,
    compiler_options: Mapping[str, bool | int | str] | None = None,
    **options: Any,
) -> "Jitted": ...


@overload
def jit(
    *,
    compiler_options: Mapping[str, bool | int | str] | None = None,
    **options: Any,
) -> "Callable[[Callable[..., Any]], Jitted]": ...


def jit(
    fn: Any = _LEFT_OUT,
    *,
    compiler_options: Mapping[str, bool | int | str] | None = None,
    **options: Any,
) -> Any:
    """`jax.jit` with the compiler options for 8-bit products, where there is a GPU.

    On NVIDIA's GPUs XLA multiplies matrices by cuBLASLt alone, without Triton's
    kernels; elsewhere this is `jax.jit`. The backend is looked at when the function is
    first used, not before, and the environment is left alone.

    A program has the options of its outermost `jit`: inside of another one, of a scan,
    of a gradient or any other transformation this is `jax.jit` without them. So it
    belongs around the whole training step.

    Args:
        fn: the function, such as a training step; without it this is a decorator, as
            `jax.jit` is.
        compiler_options: more of them, or others in place of these.
        options: those of `jax.jit`: `donate_argnums`, `static_argnames`, shardings.

    Returns:
        What `jax.jit` returns: it can be called, and has `lower`, `trace` and the rest.

    Raises:
        TypeError: if `fn` is not callable.
    """
    if fn is _LEFT_OUT:
        return ft.partial(jit, compiler_options=compiler_options, **options)
    if not callable(fn):
        raise TypeError(f"`fn` must be a function, got {fn!r}.")
    return Jitted(_Jits(fn, dict(compiler_options or {}), options))


@dataclasses.dataclass(eq=False)
class _Jits:
    """A function's `jax.jit`s, each of them made when it is first used."""

    fn: Callable[..., Any]
    own: dict[str, Any]
    options: dict[str, Any]

    @ft.cached_property
    def outermost(self) -> Any:
        compiler_options = {**(GPU_OPTIONS if on_cuda() else {}), **self.own}
        return jax.jit(
            self.fn, compiler_options=compiler_options or None, **self.options
        )

    @ft.cached_property
    def inner(self) -> Any:
        return jax.jit(self.fn, **self.options)


class Jitted:
    """A function that is handed to `jax.jit` once the backend is known."""

    def __init__(self, jits: _Jits, *first: Any) -> None:
        self._jits, self._first = jits, first
        ft.update_wrapper(self, jits.fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = (*self._first, *args)
        # JAX refuses compiler options of what becomes a part of another program.
        inner = _is_traced(args, kwargs)
        jitted = self._jits.inner if inner else self._jits.outermost
        return jitted(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> "Jitted":
        return self if instance is None else Jitted(self._jits, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self._jits.outermost.lower(*self._first, *args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self._jits.outermost.trace(*self._first, *args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        return self._jits.inner.eval_shape(*self._first, *args, **kwargs)

    def clear_cache(self) -> None:
        self._jits.outermost.clear_cache()
        self._jits.inner.clear_cache()

    def __getattr__(self, name: str) -> Any:
        # Hooks are where copy and pickle look before there are any attributes.
        if name.startswith("__") or name == "_jits":
            raise AttributeError(name)
        return getattr(self._jits.outermost, name)


def _is_traced(args: Any, kwargs: Any) -> bool:
    """Whether a call with these arguments is a part of a larger program."""
    tracer = jax.core.Tracer
    if any(isinstance(x, tracer) for x in jax.tree.leaves((args, kwargs))):
        return True
    # Of constants alone: what is computed of a constant tells.
    return isinstance(lax.full((), 0), tracer)


# -- Reading the compiled program ------------------------------------------------------


_NO_SINGLE_DOT = "what is not one dot of its operands: its native formats are simulated"
# Of a product that is no dot: why native formats do not make it an 8-bit one.
_OTHERS = {
    "convolution": "a convolution and its gradients: native formats are simulated",
    "ragged dot": "a ragged dot and its gradients: native formats are simulated",
    "attention": "attention without scales of its own: native formats have no effect",
}


@dataclasses.dataclass(frozen=True)
class CompiledProduct:
    """A product in a compiled program.

    Attributes:
        name: its instruction.
        path: the names around it in the function, "/" between.
        lhs, rhs, out: types and shapes, such as "f8e4m3fn[8192,4096]"; of attention in
            one kernel its first two operands and its first result.
        kernel: what computes it: "cuBLASLt FP8", "cuBLAS", "cuDNN", "Triton", "oneDNN"
            (Intel's, on a CPU), "XLA" (its own code).
        scale: what cuBLASLt multiplies its result by; None if that is no constant of
            the program.
        kind: "dot", "ragged dot", "convolution" or "attention".
        native: whether the backend has 8-bit products.
    """

    name: str
    path: str
    lhs: str
    rhs: str
    out: str
    kernel: str
    scale: float | None = 1.0
    kind: str = "dot"
    native: bool = False

    @property
    def is_fp8(self) -> bool:
        """Whether the hardware multiplies 8-bit operands."""
        in_8_bits = all(t.startswith("f8") for t in self._types)
        return self.kernel == "cuBLASLt FP8" or self.kernel == "cuDNN" and in_8_bits

    @property
    def _types(self) -> list[str]:
        return [x.partition("[")[0] for x in (self.lhs, self.rhs)]

    @property
    def reason(self) -> str:
        """Why it is no 8-bit product; empty if it is one."""
        operands = self._types
        if self.is_fp8:
            return ""
        if SIMULATED_SCOPE in self.path or self.kind != "dot":
            what = _OTHERS.get(self.kind, _NO_SINGLE_DOT)
            return f"there is no 8-bit kernel for {what}"
        if SCOPE not in self.path and not all(t.startswith("f8") for t in operands):
            return (
                f"its operands are {' and '.join(operands)}: give it native formats "
                "(`formats=jax_unit_scaling.NATIVE_FP8`)"
            )
        if self.kernel == "Triton":
            return (
                "XLA took a Triton kernel, which may widen its operands: compile with "
                "`jax_unit_scaling.jit`"
            )
        if operands == ["f8e5m2", "f8e5m2"]:
            return "no hardware multiplies E5M2 by E5M2"
        if self.native:
            return (
                "this backend has 8-bit products, but XLA took none here, and widens "
                "its operands"
            )
        return "this backend has no 8-bit product, and widens its operands"


@dataclasses.dataclass(frozen=True)
class CompiledProducts(Sequence[CompiledProduct]):
    """The products of a compiled program; `print` shows them as a table."""

    products: tuple[CompiledProduct, ...]
    backend: str

    def __len__(self) -> int:
        return len(self.products)

    def __getitem__(self, index: Any) -> Any:
        return self.products[index]

    def __str__(self) -> str:
        """A row for each kind of product, how many there are of it, and the path of
        those that are no 8-bit ones."""
        rows = collections.Counter(
            ("" if p.is_fp8 else p.path, p.lhs, p.rhs, p.out, p.kernel, p.reason)
            for p in self.products
        )
        lines = [
            f"{sum(p.is_fp8 for p in self.products)} of {len(self)} products in 8 bits "
            f"on {self.backend}"
        ]
        for (path, lhs, rhs, out, kernel, reason), count in rows.items():
            lines.append(f"  {count:3} x {lhs} . {rhs} -> {out}  {kernel}")
            if reason:
                lines.append(f"        {path}\n        no FP8: {reason}")
        return "\n".join(lines)


def fp8_products(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> CompiledProducts:
    """The products of `fn`, compiled for these arguments, and what became of each.

    Products are dots, convolutions, and attention where it is one kernel. What XLA
    computes as a sum of elementwise products (of vectors, most often) is none any more.

    Args:
        fn: a function, or one that `jit` or `jax.jit` made (and so with its options),
            or its `functools.partial`, or a method; compile what trains, the whole
            step, since that is what is fused and cut.
        args, kwargs: its arguments; `jax.ShapeDtypeStruct`s will do.
    """
    if isinstance(fn, ft.partial):
        return fp8_products(fn.func, *fn.args, *args, **(fn.keywords | kwargs))
    # A method of what `jax.jit` made has its `lower`, which knows of no object.
    if isinstance(fn, types.MethodType) and hasattr(fn.__func__, "lower"):
        return fp8_products(fn.__func__, fn.__self__, *args, **kwargs)
    lower = getattr(fn, "lower", None) or jit(fn).lower
    compiled = lower(*args, **kwargs).compile()
    return CompiledProducts(tuple(read(compiled.as_text())), _backend())


def assert_fp8(
    fn: Callable[..., Any],
    *args: Any,
    but: Callable[[CompiledProduct], bool] = lambda product: False,
    **kwargs: Any,
) -> CompiledProducts:
    """`fp8_products`, all of which must be 8-bit ones, `but` for some.

    Args:
        fn, args, kwargs: as in `fp8_products`.
        but: the products that need not be: `lambda p: "readout" in p.path`.

    Raises:
        AssertionError: if one is not, with the table and the reason of each, or if
            there are no products.
    """
    products = fp8_products(fn, *args, **kwargs)
    if not products:
        raise AssertionError(
            f"the compiled program of {fn!r} has no products, in 8 bits or wider: XLA "
            "removes those whose results nothing uses."
        )
    if wide := [p for p in products if not p.is_fp8 and not but(p)]:
        raise AssertionError(
            f"{len(wide)} of {len(products)} products are not 8-bit products:\n"
            f"{CompiledProducts(tuple(wide), products.backend)}"
        )
    return products


def _backend() -> str:
    return f"{jax.default_backend()} ({jax.devices()[0].device_kind})"


_TYPE = r"\(?((?:f|bf|s|u|c)\w+\[[\d,]*\])"
_DEFINITION = re.compile(rf"^\s*(?:ROOT )?%?([\w.-]+) = {_TYPE}.*? ([\w-]+)\((.*)$")
_OPCODES = {"dot": "dot", "ragged-dot": "ragged dot", "convolution": "convolution"}
# Custom calls by how the names of their targets begin: kernel and kind.
_TARGETS = {
    "__cublas$lt$matmul$f8": ("cuBLASLt FP8", "dot"),
    "__cublas$lt$matmul": ("cuBLAS", "dot"),
    "__cublas$gemm": ("cuBLAS", "dot"),
    "__cudnn$conv": ("cuDNN", "convolution"),
    "__cudnn$fmha": ("cuDNN", "attention"),
    "__onednn$matmul": ("oneDNN", "dot"),
    "__onednn$convolution": ("oneDNN", "convolution"),
}
_NUMBERS = ("f32[]", "bf16[]", "f16[]")
# What may stand between a constant and the kernel that multiplies by it.
_SAME_NUMBER = ("convert", "copy", "bitcast", "reshape")


def read(hlo: str, *, native: bool | None = None) -> list[CompiledProduct]:
    """The products in the text of an optimised module, which was compiled for a backend
    with (`native`) or without 8-bit products; for the default one if it is None."""
    found = []
    native = is_native() if native is None else native
    for computation in _computations(hlo):
        shapes = dict(computation.shapes)
        constants: dict[str, float] = {}
        for x in computation.instructions:
            shapes[x.name] = x.out
            if x.opcode == "constant" and x.out in _NUMBERS:
                constants[x.name] = float(x.inside)
            elif x.opcode in _SAME_NUMBER and x.out in _NUMBERS:
                if x.operands[0] in constants:
                    constants[x.name] = constants[x.operands[0]]
            if (how := _kernel(x, computation)) is None:
                continue
            lhs, rhs = (shapes.get(o, "?") for o in x.operands[:2])
            path = re.search(r'op_name="([^"]*)"', x.rest)
            found.append(
                CompiledProduct(
                    x.name,
                    path[1] if path else "",
                    lhs,
                    rhs,
                    x.out,
                    how[0],
                    _scale(x, how[0], shapes, constants),
                    how[1],
                    native,
                )
            )
    return found


def _scale(
    x: "_Instruction",
    kernel: str,
    shapes: Mapping[str, str],
    constants: Mapping[str, float],
) -> float | None:
    """What cuBLASLt multiplies by: its own factor, and those of the operands."""
    if not kernel.startswith("cuBLAS"):
        return 1.0
    alpha = re.search(r'"alpha_real":([\d.e+-]+)', x.rest)
    factors = [float(alpha[1]) if alpha else 1.0]
    for operand in x.operands[2:]:
        if shapes.get(operand) == "f32[]":
            if operand not in constants:
                return None
            factors.append(constants[operand])
    return math.prod(factors)


def _kernel(x: "_Instruction", computation: "_Computation") -> tuple[str, str] | None:
    """What computes a product, and its kind; None if it is no product."""
    if x.opcode in _OPCODES:
        return "Triton" if computation.is_triton else "XLA", _OPCODES[x.opcode]
    return _target(x.rest) if x.opcode == "custom-call" else None


def _target(rest: str) -> tuple[str, str] | None:
    name = re.search(r'custom_call_target="([^"]+)"', rest)
    known = (t for t in _TARGETS if name and name[1].startswith(t))
    return _TARGETS.get(next(known, ""))


# -- Instructions ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A line `name = out opcode(inside), ...`; `rest` is what follows the bracket."""

    name: str
    out: str
    opcode: str
    inside: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%?([\w.-]+)(?:,|$)", self.inside)

    @property
    def dtype(self) -> str:
        return self.out.partition("[")[0]

    @property
    def is_number(self) -> bool:
        return self.out.endswith("[]")

    @property
    def calls(self) -> str | None:
        """What a fusion computes."""
        called = re.search(r"\bcalls=%?([\w.-]+)", self.rest)
        return called[1] if called and self.opcode == "fusion" else None


@dataclasses.dataclass(frozen=True)
class _Computation:
    """Names are unique within it alone."""

    name: str
    shapes: Mapping[str, str]
    is_triton: bool
    instructions: list[_Instruction]


def _computations(hlo: str) -> list[_Computation]:
    found: list[_Computation] = [_Computation("", {}, False, [])]
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]
            shapes = dict(re.findall(rf"([\w.-]+): {_TYPE}", line))
            triton = "triton_gemm" in line or "gemm_fusion" in line
            found.append(_Computation(name, shapes, triton, []))
        elif match := _DEFINITION.match(line):
            name, out, opcode, rest = match.groups()
            inside = rest.partition(")")[0]
            found[-1].instructions.append(_Instruction(name, out, opcode, inside, rest))
    return found


# -- Factors that are kernels of their own ---------------------------------------------


# What gives a tensor another shape or name, and moves nothing.
_SAME_TENSOR = ("bitcast", "reshape", "get-tuple-element")
# What a kernel may hold beside a multiplication and still do nothing else.
_BESIDE = ("parameter", "constant", "broadcast", "convert", *_SAME_TENSOR)


def lone_multiplications(hlo: str) -> list[str]:
    """The kernels that do nothing but multiply, by one number, what a product reads or
    what it wrote, by name, in the text of an optimised module.

    They are what a factor costs that was not made a part of another kernel: one more
    read and write of a tensor. One that casts between widths or transposes besides does
    what has to be done without a factor too, and is not counted.
    """
    computations: dict[str | None, _Computation]
    computations = {c.name: c for c in _computations(hlo)}
    fused = {x.calls for c in computations.values() for x in c.instructions}

    def is_product(x: _Instruction, within: _Computation) -> bool:
        inner = computations.get(x.calls)
        if inner:
            return any(is_product(y, inner) for y in inner.instructions)
        return _kernel(x, within) is not None

    found: list[str] = []
    for name, within in computations.items():
        if name in fused:
            continue
        numbers = _of_one_number(within.instructions)
        products = {x.name for x in within.instructions if is_product(x, within)}
        beside = _beside(within.instructions, products) - products - numbers
        for x in within.instructions:
            inner = computations.get(x.calls)
            if x.name in beside and (
                _only_multiplies(inner.instructions)
                if inner
                else x.opcode == "multiply" and not numbers.isdisjoint(x.operands)
            ):
                found.append(x.name)
    return found


def _beside(instructions: Sequence[_Instruction], products: set[str]) -> set[str]:
    """What reads a product's result, or computes its operand."""
    through = products | {x.name for x in instructions if x.opcode in _SAME_TENSOR}
    after, before = set(products), set(products)
    for x in instructions:
        if not (after & through).isdisjoint(x.operands):
            after.add(x.name)
    for x in reversed(instructions):
        if x.name in before & through:
            before |= {*x.operands}
    return after | before


def _of_one_number(instructions: Sequence[_Instruction]) -> set[str]:
    """Names of numbers, and of tensors that are one number throughout."""
    found: set[str] = set()
    for x in instructions:
        spread = x.opcode in (*_SAME_NUMBER, "broadcast") and {*x.operands} <= found
        if x.is_number or spread:
            found.add(x.name)
    return found


def _only_multiplies(instructions: Sequence[_Instruction]) -> bool:
    """Whether a fused computation multiplies by numbers and leaves the dtype."""
    numbers = _of_one_number(instructions)
    rest = [x for x in instructions if x.name not in numbers]
    times = [x for x in rest if x.opcode == "multiply"]
    given = {x.dtype for x in rest if x.opcode == "parameter"}
    return (
        bool(times)
        and not any(numbers.isdisjoint(x.operands) for x in times)
        and all(x.opcode in ("multiply", *_BESIDE) for x in rest)
        and given == {rest[-1].dtype}
    )
