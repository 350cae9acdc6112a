"""Compiling for 8-bit products, and reading what was compiled.

`jit` is `jax.jit` with the compiler options that matter for them. `fp8_products` and
`assert_fp8` read the compiled program: whether a product became one of the hardware's
8-bit products is the compiler's decision, and nothing else tells.
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
            (on a CPU), "XLA".
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
    shapes: dict[str, str] = {}
    constants: dict[str, float] = {}
    triton = False
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            # Names are unique within a computation alone.
            shapes = dict(re.findall(rf"([\w.-]+): {_TYPE}", line))
            constants = {}
            triton = "triton_gemm" in line or "gemm_fusion" in line
            continue
        if not (match := _DEFINITION.match(line)):
            continue
        name, out, opcode, rest = match.groups()
        shapes[name] = out
        inside = rest.partition(")")[0]
        operands = re.findall(r"%?([\w.-]+)(?:,|$)", inside)
        if opcode == "constant" and out in _NUMBERS:
            constants[name] = float(inside)
        elif opcode in _SAME_NUMBER and out in _NUMBERS and operands[0] in constants:
            constants[name] = constants[operands[0]]
        if opcode in _OPCODES:
            kernel, kind = "Triton" if triton else "XLA", _OPCODES[opcode]
        elif opcode == "custom-call" and (target := _target(rest)):
            kernel, kind = target
        else:
            continue
        scale: float | None = 1.0
        if kernel.startswith("cuBLAS"):
            alpha = re.search(r'"alpha_real":([\d.e+-]+)', rest)
            factors = [float(alpha[1]) if alpha else 1.0]
            scalars = [x for x in operands[2:] if shapes.get(x) == "f32[]"]
            known = all(x in constants for x in scalars)
            factors += [constants[x] for x in scalars] if known else []
            scale = math.prod(factors) if known else None
        lhs, rhs = (shapes.get(x, "?") for x in operands[:2])
        path = re.search(r'op_name="([^"]*)"', rest)
        found.append(
            CompiledProduct(
                name,
                path[1] if path else "",
                lhs,
                rhs,
                out,
                kernel,
                scale,
                kind,
                native,
            )
        )
    return found


def _target(rest: str) -> tuple[str, str] | None:
    name = re.search(r'custom_call_target="([^"]+)"', rest)
    known = (t for t in _TARGETS if name and name[1].startswith(t))
    return _TARGETS.get(next(known, ""))
