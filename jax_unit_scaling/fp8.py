"""Native 8-bit products: the hardware's own, with unit scaling's static factors.

A product y = a (x w) of unit-scaled operands is a clipped cast of each to E4M3 and one
8-bit product; its cotangent g is cast to E5M2, and dx = b (g w^T), dw = c (x^T g) are
8-bit products too. Nothing is measured and nothing is remembered: a, b and c are
constants of the compiled program, and what is kept for the backward pass has 8 bits.

What the numbers below stand for was measured on an H200 (`experiments/fp8_speed`):

- Hopper's FP8 units take operands whose contracted axis is innermost. Each of the three
  tensors is contracted along one axis on the way forward and along the other on the way
  back, so it is needed both as it is and transposed (`_both_layouts`). XLA would
  transpose by itself, in a cast that reads 16 bits and is not fused into what computes
  them; to say so costs a tenth less time. Kernels of our own do it a little faster
  still, where the process sees one device, or inside a `shard_map` (`_kernels_apply`).
- cuBLASLt multiplies its result by a number at no cost. XLA makes a multiplication of
  the result that number only if its broadcast has no second use, and it shares the
  broadcasts of equal factors among equal shapes: in a model, all of them. What reaches
  cuBLASLt always is a factor on an operand on its way up from 8 bits (`_matmul`).
- A cast straight back up is removed (`f8 -> bf16` behind `bf16 -> f8`): a barrier
  behind each cast keeps it.

Reference: FP8 formats for deep learning (Micikevicius et al., 2022); Unit Scaling
(Blake et al., 2023), section 6; munit scaling (Narayan et al., 2025).
"""

import contextlib
import dataclasses
import functools as ft
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ._jaxpr import Equation, Interpreter, Side, flow, source, traced_from, transform
from .arguments import check_dimension_numbers, checked
from .formats import Format, Formats, ScaledFormats, quantize_bwd, quantize_fwd
from .op import varying, varying_along
from .scale import forward_only, scaled

Product = Callable[[Array, Array], Array]
DotDimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]
# What `jax.checkpoint_policies.save_only_these_names` keeps of an 8-bit product.
RESIDUAL = "fp8_residual"
# In the name stack of each 8-bit product: what a compiled program is searched for.
SCOPE = "fp8_product"
# In that of a product whose native formats are simulated.
SIMULATED_SCOPE = "fp8_simulated"


def in_formats(product: Product, formats: Formats | None) -> Product:
    """The product of operands, and of cotangents, in `formats`.

    Of native ones a dot is an 8-bit product. What is no dot (a convolution, a ragged
    dot) is simulated: XLA has 8-bit kernels for neither's backward products. A warning
    says so, once for each kind.
    """
    if formats is None:
        return product
    both = ScaledFormats.of(formats)
    return _native(product, both) if formats.native else _simulated(product, both)


def _simulated(product: Product, formats: ScaledFormats) -> Product:
    def of_rounded(lhs: Array, rhs: Array) -> Array:
        # A factor of one leaves no trace.
        lhs, rhs = scaled(lhs, bwd=formats.lhs), scaled(rhs, bwd=formats.rhs)
        if formats.fwd is not None:
            lhs, rhs = (quantize_fwd(x, formats.fwd) for x in (lhs, rhs))
        y = product(lhs, rhs)
        y = y if formats.bwd is None else quantize_bwd(y, formats.bwd)
        return scaled(y, fwd=formats.out)

    return of_rounded


# -- Any function that is one dot ------------------------------------------------------


def _native(product: Product, formats: ScaledFormats) -> Product:
    def of_cast(lhs: Array, rhs: Array) -> Array:
        here = source()
        native = transform(product, lambda region: (_Native(formats, here), Side()))
        try:
            y = native(lhs, rhs)
        except _NoSingleDot as no_dot:
            _tell_once_of(str(no_dot))
            with jax.named_scope(SIMULATED_SCOPE):
                return _simulated(product, formats)(lhs, rhs)
        _tell_once()
        return y

    return of_cast


# What may stand between a product's operands and its dot.
_MOVES = (
    "reshape",
    "transpose",
    "squeeze",
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
)


# What is multiplied, by primitive: a dot is native, the others are simulated.
_PRODUCTS = {
    "dot_general": "a dot",
    "conv_general_dilated": "a convolution",
    "ragged_dot_general": "a ragged dot",
}


class _NoSingleDot(Exception):
    """Says what it is instead."""


class _Native(Interpreter):
    """Makes a function's one `dot_general` an 8-bit product."""

    def __init__(self, formats: ScaledFormats, source: Any) -> None:
        self._formats, self._source = formats, source

    def begin(self, region: Any, cotangents: Sequence[bool]) -> None:
        dots, others = [], set()

        def transfer(equation: Equation, given: list[Any]) -> list[Any]:
            if self.wants(equation):
                dots.append(given)
            if equation.primitive not in (*_MOVES, "dot_general"):
                others.add(equation.primitive)
            return [max(given, default=0)] * len(equation.outvars)

        # einsum may hand its operands to the dot in the other order.
        flow(region, [1, 2], transfer, join=max, bottom=0)
        if named := [name for name in _PRODUCTS if name in others]:
            raise _NoSingleDot(_PRODUCTS[named[0]])
        # A sum would come before the rounding.
        if others or sorted(map(tuple, dots)) not in ([(1, 2)], [(2, 1)]):
            raise _NoSingleDot("an operation that is not one dot of its operands")
        if dots[0] == [2, 1]:
            self._formats = self._formats.swapped

    def wants(self, equation: Equation) -> bool:
        return equation.primitive in _PRODUCTS

    def rewrite(
        self, equation: Equation, side: Side, *args: Any
    ) -> tuple[Sequence[Any], None]:
        params = equation.params
        lhs, rhs = args
        with traced_from(self._source):
            y = dot_general(
                lhs,
                rhs,
                params["dimension_numbers"],
                params["precision"],
                equation.out_avals[0].dtype,
                formats=self._formats,
                out_sharding=params.get("out_sharding"),
            )
        return [y], None


# -- The product -----------------------------------------------------------------------


def is_product(equation: Equation) -> bool:
    """Whether it is a native product, with its rule."""
    return equation.is_own and equation.name == "_dot"


def factors_of(equation: Equation) -> tuple[float, ...]:
    """What a native product multiplies its result by, and both cotangents."""
    return tuple(float(v.val) for v in equation.invars[2:])


@checked
def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: DotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    formats: Formats,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` of 8-bit operands, forward and backward.

    Without factors; `jax_unit_scaling.dot_general(..., formats=NATIVE_FP8)` is the
    unit-scaled one. Operands are clipped to the largest number of `formats.fwd` and
    cast, the cotangent likewise to `formats.bwd`; NaN stays NaN. All sums are
    float32's, the result and both cotangents have the dtype that they have without.

    `precision` HIGHEST asks for sums in full float32, which costs a few percent; by
    default Hopper's units add up with 14 bits or so before that.

    Raises:
        TypeError: if an operand is not floating point, or `formats` are no `Formats`.
        ValueError: if `formats` are not native, or `dimension_numbers` do not fit.
    """
    _check_native(formats)
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    check_dimension_numbers(lhs, rhs, dimension_numbers)
    (lc, rc), (lb, rb) = (tuple(map(tuple, pair)) for pair in dimension_numbers)
    dtype = np.dtype(preferred_element_type or jnp.result_type(lhs, rhs))
    left, right = _Operand.of(lhs, lb, lc), _Operand.of(rhs, rb, rc)
    both = ScaledFormats.of(formats)
    # On a mesh with explicit axes this is refused if a sum over devices is not asked
    # for, and says how the result is split.
    out = jax.eval_shape(
        ft.partial(
            lax.dot_general,
            dimension_numbers=dimension_numbers,
            out_sharding=out_sharding,
        ),
        *(lhs, rhs),
    )
    how = _How(left, right, out.shape, dtype, precision, both, _explicit(out))
    # Inside a `shard_map` the rule below gives each device's own part of a cotangent;
    # JAX adds them up where it knows that the operand is the same on all devices.
    axes = varying(lhs) | varying(rhs)
    lhs, rhs = (varying_along(x, axes) for x in (lhs, rhs))
    return _dot(how, lhs, rhs, both.out, both.lhs, both.rhs)


def _check_native(formats: Formats) -> None:
    if not formats.native:
        raise ValueError(
            "`formats` must be native, such as `jax_unit_scaling.NATIVE_FP8`, got "
            f"{formats}: `jax_unit_scaling.dot_general` simulates others."
        )


def _explicit(x: Any) -> NamedSharding | None:
    """How `x` is split over a mesh with explicit axes, if it is on one."""
    sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
    sharding = sharding or jax.typeof(x).sharding
    types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return sharding if AxisType.Explicit in types else None


@dataclasses.dataclass(frozen=True)
class _Operand:
    """What is static of an operand: its axes by what they do, its shape and dtype, and
    how it is split over a mesh with explicit axes.

    As a matrix it is [batch, free, contracted], each one axis, and the batch none if
    there is none.
    """

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracted: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding | None

    @classmethod
    def of(
        cls, x: Array, batch: tuple[int, ...], contracted: tuple[int, ...]
    ) -> "_Operand":
        free = tuple(i for i in range(x.ndim) if i not in (*batch, *contracted))
        return cls(batch, free, contracted, x.shape, x.dtype, _explicit(x))

    @property
    def contracted_first(self) -> bool:
        """Whether its contracted axes lie before the free ones in memory, as those of a
        kernel [in, out] do."""
        return self._transposed == tuple(range(len(self.shape)))

    @property
    def _transposed(self) -> tuple[int, ...]:
        return (*self.batch, *self.contracted, *self.free)

    @property
    def _order(self) -> tuple[tuple[int, ...], ...]:
        """The groups of axes of a matrix that is this, but for a copy if need be."""
        two = (self.free, self.contracted)
        groups = (self.batch, *(two[::-1] if self.contracted_first else two))
        return groups if self.batch else groups[1:]

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in axes)

    def _size(self, axes: Sequence[int]) -> int:
        return math.prod(self._sizes(axes))

    def matrix(self, x: Array) -> Array:
        """`x` as a matrix, or as its transpose where `contracted_first`."""
        sizes = [*map(self._size, self._order)]
        return x.transpose(sum(self._order, ())).reshape(sizes)

    def unmatrix(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        order = sum(self._order, ())
        return matrix.reshape(self._sizes(order)).transpose(np.argsort(order))

    def cast(self, x: Array, format: Format, fused: bool) -> tuple[Array, Array]:
        """`x` in 8 bits, as a matrix and as its transpose."""
        one, other = _both_layouts(self.matrix(x), format, fused)
        return (other, one) if self.contracted_first else (one, other)

    # A transpose is kept with the operand's own axes, which say how it is split.

    def unflattened(self, transpose: Array) -> Array:
        return transpose.reshape(self._sizes(self._transposed))

    def flattened(self, kept: Array) -> Array:
        batch = [self._size(self.batch)] if self.batch else []
        return kept.reshape(*batch, self._size(self.contracted), self._size(self.free))

    @property
    def sharding_of_kept(self) -> NamedSharding | None:
        if self.sharding is None:
            return None
        spec = (*self.sharding.spec, *[None] * len(self.shape))
        return self.sharding.update(spec=P(*(spec[i] for i in self._transposed)))


@dataclasses.dataclass(frozen=True)
class _How:
    """What is static of a product."""

    lhs: _Operand
    rhs: _Operand
    out_shape: tuple[int, ...]
    dtype: np.dtype
    precision: Any
    formats: ScaledFormats
    sharding: NamedSharding | None


# The factors are in `how`, too: here they can be read off a jaxpr.
@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(how: _How, lhs: Array, rhs: Array, *factors: Any) -> Array:
    return _dot_fwd(how, lhs, rhs, *factors)[0]


def _dot_fwd(how: _How, lhs: Array, rhs: Array, *factors: Any) -> tuple[Array, Any]:
    formats = how.formats

    def product(lhs: Array, rhs: Array) -> tuple[Array, Array, Array]:
        x, x_t = how.lhs.cast(lhs, _given(formats.fwd), "lhs" in formats.fused)
        w, w_t = how.rhs.cast(rhs, _given(formats.fwd), "rhs" in formats.fused)
        y = _matmul(x, w, formats.out, how.dtype, how.precision)
        kept = how.lhs.unflattened(x_t), how.rhs.unflattened(w_t)
        return y.reshape(how.out_shape), *kept

    shardings = (how.sharding, how.lhs.sharding_of_kept, how.rhs.sharding_of_kept)
    y, *kept = _split_like(shardings, product)(*map(_once, (lhs, rhs)))
    # The backward products contract each operand's other axis: of its two layouts they
    # need the one alone.
    return y, tuple(checkpoint_name(z, RESIDUAL) for z in kept)


def _dot_bwd(how: _How, residuals: Any, g: Array) -> tuple[Any, ...]:
    formats = how.formats

    def products(x_t: Array, w_t: Array, g: Array) -> tuple[Array, Array]:
        x_t, w_t = how.lhs.flattened(x_t), how.rhs.flattened(w_t)
        g, g_t = _both_layouts(
            g.reshape(*x_t.shape[:-2], x_t.shape[-1], w_t.shape[-1]),
            _given(formats.bwd),
            "cotangent" in formats.fused,
        )

        def cotangent(operand: _Operand, scale: float, *two: Array) -> Array:
            one, other = two[::-1] if operand.contracted_first else two
            d = _matmul(one, other, scale, operand.dtype, how.precision)
            return operand.unmatrix(d)

        lhs = cotangent(how.lhs, formats.lhs, g, w_t)
        return lhs, cotangent(how.rhs, formats.rhs, g_t, x_t)

    shardings = (how.lhs.sharding, how.rhs.sharding)
    cotangents = _split_like(shardings, products)(*residuals, _once(g))
    return (*cotangents, None, None, None)


_dot.defvjp(_dot_fwd, _dot_bwd)


def _once(x: Array) -> Array:
    """What is rounded for a product, and has no derivative of its own."""
    return forward_only(
        x,
        "a product in native FP8 has no second derivative: its operands were rounded "
        "to 8 bits, and so would be their cotangents. Give it simulated formats "
        "(`SIMULATED_FP8`) or none where gradients are differentiated.",
    )


def _split_like(
    shardings: tuple[NamedSharding | None, ...], fn: Callable[..., Any]
) -> Callable[..., Any]:
    """`fn`, whose results are split so over a mesh with explicit axes, if on one.

    Inside, the compiler chooses: JAX would refuse to flatten some axes that are split,
    and to sum over any.
    """
    on_mesh = next((s for s in shardings if s is not None), None)
    if on_mesh is None:
        return fn
    # What is on no mesh is the same on every device.
    whole = on_mesh.update(spec=P())
    return jax.sharding.auto_axes(
        fn,
        axes=on_mesh.mesh.explicit_axes,
        out_sharding=tuple(whole if s is None else s for s in shardings),
    )


def _given(format: Format | None) -> Format:
    assert format is not None  # native `Formats` have both
    return format


def _matmul(
    lhs: Array, rhs: Array, scale: float, dtype: np.dtype, precision: Any
) -> Array:
    """scale * lhs [.., m, k] rhs [.., n, k]^T in `dtype`."""
    last = lhs.ndim - 1
    numbers = (((last,), (last,)), (tuple(range(last - 1)),) * 2)
    dot = ft.partial(lax.dot_general, dimension_numbers=numbers, precision=precision)

    def widened(lhs: Array, rhs: Array) -> Array:
        lhs, rhs = lhs.astype(dtype) * scale, rhs.astype(dtype)
        return dot(lhs, rhs, preferred_element_type=dtype)

    def direct(lhs: Array, rhs: Array) -> Array:
        y = dot(lhs, rhs, preferred_element_type=jnp.float32) * scale
        return y.astype(dtype)

    with jax.named_scope(SCOPE):
        if scale == 1.0:
            return dot(lhs, rhs, preferred_element_type=dtype)
        return lax.platform_dependent(lhs, rhs, cuda=widened, default=direct)


# -- Casts -----------------------------------------------------------------------------


@checked
def cast(x: Float[Array, "*shape"], format: Format) -> Float[Array, "*shape"]:
    """`x` in the format's own dtype, what lies beyond its largest number clipped.

    Raises:
        TypeError: if `x` is not floating point, or `format` no `Format`.
        ValueError: if the format has no dtype.
    """
    _check_dtype(format)
    limit = format.max_in(x.dtype)
    return jnp.clip(x, -limit, limit).astype(format.dtype)


def _check_dtype(format: Format) -> None:
    if format.dtype is None:
        raise ValueError(
            f"`format` must have a dtype, as `jax_unit_scaling.E4M3` has, got {format}."
        )


def _both_layouts(x: Array, format: Format, fused: bool) -> tuple[Array, Array]:
    """`x` [.., a, b] in 8 bits, and its transpose [.., b, a]."""
    if fused and _kernels_apply(x):
        both = lax.platform_dependent(
            x,
            cuda=ft.partial(cast_and_transpose, format=format),
            default=lambda x: (y := cast(x, format), y.swapaxes(-1, -2)),
        )
        return lax.optimization_barrier(both)
    # The first barrier keeps the cast out of the transpose, which would read 16 bits
    # then, the second the transpose out of the product.
    y = lax.optimization_barrier(cast(x, format))
    if not _kernels_apply(x):
        return y, lax.optimization_barrier(y.swapaxes(-1, -2))
    return y, lax.optimization_barrier(
        lax.platform_dependent(y, cuda=transpose, default=lambda y: y.swapaxes(-1, -2))
    )


# -- Kernels ---------------------------------------------------------------------------

# Tiles [rows, columns] and their warps, the fastest first of ten tried on an H200 in
# exploration: alone, over and over, it casts and transposes a 16384 x 16384 matrix at
# 3.5 TB/s, and transposes one at 3.3, where a copy moves 3.2. The other, for sizes that
# it does not divide, is 5% slower.
_TILES = (((64, 256), 8), ((64, 128), 4))


def _kernels_apply(x: Array) -> bool:
    """Whether whole tiles cover `x`, and it is in one piece.

    XLA partitions none of these kernels over devices. So where there may be several,
    and no `shard_map` has split the work, XLA casts and transposes. That is wherever a
    process sees more than one device, for what a `jit` will be partitioned over is not
    known while it is traced.
    """
    if jax.default_backend() != "gpu" or _triton() is None:
        return False
    whole = x.ndim == 2 and _tile_of(x.shape) is not None
    return whole and (jax.device_count() == 1 or bool(varying(x)))


@ft.cache
def _triton() -> Any:
    """Pallas's Triton backend: JAX has announced its end, and XLA is the fallback."""
    # Importing it takes as long as all of this library.
    with contextlib.suppress(ImportError):
        from jax.experimental.pallas import triton

        return triton
    return None


def _tile_of(shape: tuple[int, ...]) -> tuple[tuple[int, int], int] | None:
    for tile, warps in _TILES:
        if all(n % t == 0 for n, t in zip(shape, tile, strict=True)):
            return tile, warps
    return None


@checked
def cast_and_transpose(
    x: Float[Array, "a b"], *, format: Format, interpret: bool = False
) -> tuple[Float[Array, "a b"], Float[Array, "b a"]]:
    """`cast` to 8 bits and its transpose, in one read of `x`.

    A kernel for NVIDIA's GPUs; `interpret` runs it elsewhere.

    Raises:
        TypeError: if `x` is not floating point, or `format` no `Format`.
        ValueError: if `x` is no matrix or not whole tiles, or the format has not 8
            bits.
        NotImplementedError: if this version of JAX has no Triton backend for Pallas.
    """
    _check_dtype(format)
    _check_8_bits("format", format.dtype)
    limit = format.max_in(x.dtype)

    def kernel(x_ref: Any, y_ref: Any, t_ref: Any) -> None:
        x = x_ref[...].astype(jnp.float32)
        # Triton's minimum and maximum drop NaN.
        y = jnp.where(jnp.isnan(x), x, jnp.clip(x, -limit, limit)).astype(format.dtype)
        y_ref[...] = y
        t_ref[...] = y.T

    y, t = _tiled(kernel, x, format.dtype, both=True, interpret=interpret)
    return y, t


@checked
def transpose(
    x: Float[Array, "a b"], *, interpret: bool = False
) -> Float[Array, "b a"]:
    """The transpose of a matrix of 8-bit numbers, as `cast_and_transpose` a kernel.

    Raises:
        TypeError: if `x` is not floating point.
        ValueError: if `x` has not 8 bits, is no matrix or not whole tiles.
        NotImplementedError: if this version of JAX has no Triton backend for Pallas.
    """
    _check_8_bits("x", x.dtype)

    def kernel(x_ref: Any, t_ref: Any) -> None:
        t_ref[...] = x_ref[...].T

    bits = lax.bitcast_convert_type(x, jnp.int8)
    (y,) = _tiled(kernel, bits, jnp.int8, both=False, interpret=interpret)
    return lax.bitcast_convert_type(y, x.dtype)


def _check_8_bits(name: str, dtype: Any) -> None:
    if jnp.finfo(dtype).bits != 8:
        raise ValueError(
            f"`{name}` must have 8 bits, as float8_e4m3fn and float8_e5m2 have, got "
            f"{dtype}."
        )


def _tiled(
    kernel: Callable[..., None], x: Array, dtype: Any, *, both: bool, interpret: bool
) -> Sequence[Array]:
    from jax.experimental import pallas as pl

    found = _tile_of(x.shape) if x.ndim == 2 else None
    if found is None:
        smallest, _ = _TILES[-1]
        raise ValueError(
            f"`x` must be a matrix of whole tiles of {smallest}, got shape {x.shape}."
        )
    if (triton := _triton()) is None and not interpret:
        raise NotImplementedError(
            f"jax {jax.__version__} has no Triton backend for Pallas: use "
            "`jax_unit_scaling.fp8.cast` and `swapaxes`, as native products do."
        )
    (a, b), ((rows, columns), warps) = x.shape, found
    straight = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    crossed = pl.BlockSpec((columns, rows), lambda i, j: (j, i))
    shapes = [(a, b), (b, a)] if both else [(b, a)]
    return pl.pallas_call(
        kernel,
        grid=(a // rows, b // columns),
        in_specs=[straight],
        out_specs=[straight, crossed] if both else [crossed],
        out_shape=[_struct(shape, dtype, x) for shape in shapes],
        compiler_params=triton and triton.CompilerParams(num_warps=warps),
        interpret=interpret,
    )(x)


def _struct(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    axes = varying(like)
    return jax.ShapeDtypeStruct(shape, dtype, **({"vma": axes} if axes else {}))


# -- Hardware --------------------------------------------------------------------------


def on_cuda() -> bool:
    """Whether the default backend is NVIDIA's."""
    return _compute_capability() is not None


def _compute_capability() -> tuple[int, int] | None:
    """Of an NVIDIA GPU: (9, 0) for Hopper. None elsewhere; an AMD GPU's is a name, such
    as "gfx942"."""
    device = jax.devices()[0]
    number = re.match(r"(\d+)\.?(\d*)", str(getattr(device, "compute_capability", "")))
    if device.platform != "gpu" or number is None:
        return None
    return int(number[1]), int(number[2] or 0)


# As JAX names devices of the seventh generation ("TPU v7x", "TPU7x").
_NATIVE_TPUS = ("v7", "tpu7", "ironwood")


def is_native() -> bool:
    """Whether the default backend is known to have units for products of these formats.

    So have NVIDIA's GPUs of compute capability 8.9 (Ada, Hopper) and later, and TPUs of
    the seventh generation and later. AMD's are not counted: the first with such units
    multiply other formats (E4M3FNUZ, E5M2FNUZ), and the later ones were not tried.
    """
    device = jax.devices()[0]
    if device.platform == "tpu":
        return any(x in device.device_kind.lower() for x in _NATIVE_TPUS)
    return (_compute_capability() or (0, 0)) >= (8, 9)


@ft.cache
def _tell_once() -> None:
    if not is_native():
        warnings.warn(
            f"native FP8 formats on {jax.devices()[0].device_kind}, which is not known "
            "to have units for 8-bit products: results are the same, but 8 bits are "
            "widened for each product, which is slow.",
            stacklevel=2,
        )


@ft.cache
def _tell_once_of(kind: str) -> None:
    warnings.warn(
        f"native FP8 formats on {kind}: they are simulated, for XLA has no 8-bit "
        "kernels for it and its backward products. Results are rounded as native "
        "ones, and no faster than without formats.",
        stacklevel=2,
    )
