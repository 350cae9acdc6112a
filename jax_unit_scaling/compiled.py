"""Compiling for 8-bit products, and reading what was compiled.

`jit` is `jax.jit` with the compiler options that matter for them. `fp8_products` and
`assert_fp8` read the compiled program: whether a product became one of the hardware's
8-bit products is the compiler's decision, and nothing else tells.
"""

import collections
import dataclasses
import functools as ft
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .fp8 import SCOPE

# Measured on an H200 with jax 0.11.2 (`experiments/fp8_speed`): where XLA tries Triton
# kernels for each product, it compiles for minutes instead of seconds, gives some
# 8-bit products no cuBLASLt kernel at all, and steps take a tenth longer.
GPU_OPTIONS: Mapping[str, bool | int | str] = {"xla_gpu_enable_triton_gemm": False}


def jit(
    fn: Callable[..., Any],
    *,
    compiler_options: Mapping[str, bool | int | str] | None = None,
    **options: Any,
) -> "Jitted":
    """`jax.jit` with the compiler options for 8-bit products, where there is a GPU.

    On the default backend "gpu" XLA multiplies matrices by cuBLASLt alone, without
    Triton's kernels; elsewhere this is `jax.jit`. The backend is looked at when the
    function is first used, not before, and the environment is left alone.

    Args:
        fn: the function, such as a training step.
        compiler_options: more of them, or others in place of these.
        options: those of `jax.jit`: `donate_argnums`, `static_argnames`, shardings.

    Returns:
        What `jax.jit` returns: it can be called, and has `lower`, `trace` and the rest.

    Raises:
        TypeError: if `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be a function, got {fn!r}.")
    return Jitted(fn, dict(compiler_options or {}), options)


class Jitted:
    """A function that is handed to `jax.jit` once the backend is known."""

    def __init__(
        self, fn: Callable[..., Any], own: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self._fn, self._own, self._options = fn, own, options
        ft.update_wrapper(self, fn, updated=())

    @ft.cached_property
    def _jitted(self) -> Any:
        known = GPU_OPTIONS if jax.default_backend() == "gpu" else {}
        compiler_options = {**known, **self._own} or None
        return jax.jit(self._fn, compiler_options=compiler_options, **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else ft.partial(self, instance)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted.lower(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # where copy and pickle look for their hooks
            raise AttributeError(name)
        return getattr(self._jitted, name)


# -- Reading the compiled program ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CompiledProduct:
    """A matrix product in a compiled program.

    Attributes:
        name: its instruction.
        path: the names around it in the function, "/" between.
        lhs, rhs, out: types and shapes, such as "f8e4m3fn[8192,4096]".
        kernel: what computes it: "cuBLASLt FP8", "cuBLAS", "Triton", "XLA".
        scale: what its result is multiplied by inside the kernel.
    """

    name: str
    path: str
    lhs: str
    rhs: str
    out: str
    kernel: str
    scale: float = 1.0

    @property
    def is_fp8(self) -> bool:
        """Whether the hardware multiplies 8-bit operands."""
        return self.kernel == "cuBLASLt FP8"

    @property
    def reason(self) -> str:
        """Why it is no 8-bit product; empty if it is one."""
        if self.is_fp8:
            return ""
        types = [x.partition("[")[0] for x in (self.lhs, self.rhs)]
        if SCOPE not in self.path and not all(t.startswith("f8") for t in types):
            return (
                f"its operands are {' and '.join(types)}: give it native formats "
                "(`formats=jax_unit_scaling.NATIVE_FP8`)"
            )
        if self.kernel == "Triton":
            return (
                "XLA took a Triton kernel, which may widen its operands: compile with "
                "`jax_unit_scaling.jit`"
            )
        if types == ["f8e5m2", "f8e5m2"]:
            return "no hardware multiplies E5M2 by E5M2"
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

    Args:
        fn: a function, or one that `jit` or `jax.jit` made (and so with its options);
            compile what trains, the whole step, since that is what is fused and cut.
        args, kwargs: its arguments; `jax.ShapeDtypeStruct`s will do.
    """
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
        AssertionError: if one is not, with the table and the reason of each.
    """
    products = fp8_products(fn, *args, **kwargs)
    if wide := [p for p in products if not p.is_fp8 and not but(p)]:
        raise AssertionError(
            f"{len(wide)} of {len(products)} products are not 8-bit products:\n"
            f"{CompiledProducts(tuple(wide), products.backend)}"
        )
    return products


def _backend() -> str:
    return f"{jax.default_backend()} ({jax.devices()[0].device_kind})"


_TYPE = r"\(?((?:f|bf|s|u|c)\w+\[[\d,]*\])"
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?([\w.-]+) = {_TYPE}.*? (dot|custom-call|fusion)\(([^)]*)\)(.*)$"
)
_KERNELS = {
    "__cublas$lt$matmul$f8": "cuBLASLt FP8",
    "__cublas$lt$matmul": "cuBLAS",
    "__cublas$gemm": "cuBLAS",
    "__onednn$matmul": "oneDNN",
}


def read(hlo: str) -> list[CompiledProduct]:
    """The products in the text of an optimised module."""
    found = []
    types: dict[str, str] = {}
    triton = False
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            types = {}  # names are unique within a computation alone
            triton = "triton_gemm" in line or "gemm_fusion" in line
            types.update(re.findall(rf"([\w.-]+): {_TYPE}", line))
            continue
        if defined := re.match(rf"^\s*(?:ROOT )?%?([\w.-]+) = {_TYPE}", line):
            types[defined[1]] = defined[2]
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, out, opcode, operands, rest = match.groups()
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        if opcode == "dot":
            kernel = "Triton" if triton else "XLA"
        elif opcode == "custom-call" and target and target[1] in _KERNELS:
            kernel = _KERNELS[target[1]]
        else:
            continue
        lhs, rhs = (
            types.get(x, "?") for x in re.findall(r"%?([\w.-]+)(?:,|$)", operands)[:2]
        )
        path = re.search(r'op_name="([^"]*)"', rest)
        alpha = re.search(r'"alpha_real":([\d.e+-]+)', rest)
        found.append(
            CompiledProduct(
                name,
                path[1] if path else "",
                lhs,
                rhs,
                out,
                kernel,
                float(alpha[1]) if alpha else 1.0,
            )
        )
    return found
