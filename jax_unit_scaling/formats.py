"""Floating-point number formats, and rounding to them in a wider dtype.

Rounding is done by integer arithmetic on the bits of float32, never by a cast to a
narrow dtype and back: XLA removes such a pair on a GPU, silently.
"""

import dataclasses
import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key


@dataclasses.dataclass(frozen=True)
class Format:
    """A binary floating-point number format: a sign, an exponent and a mantissa.

    Its numbers are +-2^e (1 + m / 2^mantissa_bits) with e >= 1 - bias, and below them
    the evenly spaced subnormals, up to `max`.

    Attributes:
        exponent_bits: bits of the exponent.
        mantissa_bits: bits of the mantissa, without the implicit leading one.
        bias: what is subtracted from the exponent's code; IEEE 754's
            2^(exponent_bits - 1) - 1 by default.
        max: the largest number; by default IEEE 754's, which keeps the highest
            exponent for infinity and NaN. (OCP's and AMD's formats use it for numbers.)
        signed_zero: whether zero has a sign (not in the `fnuz` formats).
        dtype: the ml_dtypes or NumPy type with these numbers; None if there is none.

    Raises:
        ValueError: if float32 cannot hold the format, or `max` is not in it.
    """

    exponent_bits: int
    mantissa_bits: int
    _: dataclasses.KW_ONLY
    bias: int = -1
    max: float = math.nan
    signed_zero: bool = True
    dtype: np.dtype | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("exponent_bits", 1, 8), ("mantissa_bits", 0, 23)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(
                    f"`{name}` must be an integer from {low} to {high}, as float32 has "
                    f"to hold the format, got {value!r}."
                )
        if self.bias == -1:
            object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1)
        if math.isnan(self.max):
            object.__setattr__(self, "max", self._ieee_max())
        if self.dtype is not None:
            object.__setattr__(self, "dtype", np.dtype(self.dtype))
        top = math.frexp(self.max)[1] - 1
        if (
            not (-126 <= self.min_exponent <= top <= 127)
            or self._floor(self.max) != self.max
        ):
            raise ValueError(
                f"`max` must be a number of the format, not below its smallest normal "
                f"number {2.0**self.min_exponent}, within float32's range, got "
                f"{self.max} for bias {self.bias}."
            )
        if -126 > self.min_exponent - self.mantissa_bits and self.min_exponent != -126:
            raise ValueError(
                "float32 cannot compute with this format's smallest number, "
                f"2^{self.min_exponent - self.mantissa_bits}: choose a smaller `bias` "
                f"than {self.bias}."
            )

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number, and of the subnormals."""
        return 1 - self.bias

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    def _ieee_max(self) -> float:
        top = 2**self.exponent_bits - 2 - self.bias
        return 2.0**top * (2 - 2.0**-self.mantissa_bits)

    def _floor(self, x: float) -> float:
        """The largest number of the format that is not above a normal `x`."""
        quantum = 2.0 ** (math.frexp(x)[1] - 1 - self.mantissa_bits)
        return math.floor(x / quantum) * quantum

    def max_in(self, dtype: jnp.dtype) -> float:
        """The largest number that both the format and `dtype` hold."""
        return min(self.max, self._floor(float(jnp.finfo(dtype).max)))


def _preset(
    exponent_bits: int, mantissa_bits: int, dtype: type, **differences: Any
) -> Format:
    return Format(exponent_bits, mantissa_bits, dtype=np.dtype(dtype), **differences)


# The 8-bit formats of GPUs and TPUs (OCP): E4M3 gives up infinity for one more binade.
E4M3 = _preset(4, 3, ml_dtypes.float8_e4m3fn, max=448.0)
E5M2 = _preset(5, 2, ml_dtypes.float8_e5m2)
# The 8-bit formats of Graphcore and AMD, which the 2023 paper used: no infinity, no
# negative zero, and one more binade at the bottom.
E4M3FNUZ = _preset(
    4, 3, ml_dtypes.float8_e4m3fnuz, bias=8, max=240.0, signed_zero=False
)
E5M2FNUZ = _preset(
    5, 2, ml_dtypes.float8_e5m2fnuz, bias=16, max=57344.0, signed_zero=False
)
E4M3B11FNUZ = _preset(
    4, 3, ml_dtypes.float8_e4m3b11fnuz, bias=11, max=30.0, signed_zero=False
)
# The 8-bit formats of IEEE 754's pattern.
E4M3_IEEE = _preset(4, 3, ml_dtypes.float8_e4m3)
E3M4 = _preset(3, 4, ml_dtypes.float8_e3m4)
# The 6- and 4-bit formats (OCP MX): every code is a number.
E3M2 = _preset(3, 2, ml_dtypes.float6_e3m2fn, max=28.0)
E2M3 = _preset(2, 3, ml_dtypes.float6_e2m3fn, max=7.5)
E2M1 = _preset(2, 1, ml_dtypes.float4_e2m1fn, max=6.0)
FP16 = _preset(5, 10, np.float16)
BF16 = _preset(8, 7, ml_dtypes.bfloat16)
FP32 = _preset(8, 23, np.float32)


def _check_format(name: str, value: object) -> None:
    if not isinstance(value, Format):
        raise TypeError(
            f"`{name}` must be a `jax_unit_scaling.Format`, such as "
            f"`jax_unit_scaling.E4M3`, got {value!r}."
        )


@dataclasses.dataclass(frozen=True)
class Formats:
    """The formats of a matrix product.

    Simulated ones round in the dtype of the operands, and compute in it. Native ones
    hand the hardware 8-bit operands (`jax_unit_scaling.fp8`).

    Attributes:
        fwd: both operands are rounded to it, for the forward and backward products.
        bwd: the output's cotangent is rounded to it before the backward products.
        native: whether the operands of the product are 8-bit numbers themselves.
        fused: of a native product's "lhs", "rhs" and "cotangent" those that one kernel
            casts and transposes. It pays for what lies in memory as it is: a parameter,
            what a product or an attention kernel wrote. The others are cast by XLA in
            the kernel that computes them (a norm, an activation), and transposed as 8
            bits.

    None as a format stands for no rounding.

    Raises:
        TypeError: if `fwd` or `bwd` is no `Format`, or `fused` no tuple.
        ValueError: if `fused` names anything else; if `native` and there is no hardware
            for the formats.
    """

    fwd: Format | None = None
    bwd: Format | None = None
    native: bool = False
    fused: tuple[str, ...] = ("rhs",)

    def __post_init__(self) -> None:
        for name in ("fwd", "bwd"):
            if (value := getattr(self, name)) is not None:
                _check_format(name, value)
        if not isinstance(self.native, bool):
            raise TypeError(f"`native` must be a bool, got {self.native!r}.")
        if not isinstance(self.fused, tuple):
            raise TypeError(f"`fused` must be a tuple of names, got {self.fused!r}.")
        if unknown := [x for x in self.fused if x not in ("lhs", "rhs", "cotangent")]:
            raise ValueError(
                '`fused` must be of "lhs", "rhs" and "cotangent", got '
                f"{unknown} in {self.fused!r}."
            )
        if self.native and (self.fwd, self.bwd) not in _NATIVE_PAIRS:
            raise ValueError(
                "native products need `fwd` and `bwd` to be E4M3 and E5M2, or both "
                f"E4M3: there is no hardware for fwd={self.fwd} and bwd={self.bwd}. "
                "Simulate them (`native=False`)."
            )


@dataclasses.dataclass(frozen=True)
class ScaledFormats(Formats):
    """The formats of an operation's product, and the factors for it to apply.

    Attributes:
        out: multiplies the product.
        lhs, rhs: multiply the cotangents of its operands.
    """

    out: float = 1.0
    lhs: float = 1.0
    rhs: float = 1.0

    @classmethod
    def of(cls, formats: Formats, **factors: float) -> "ScaledFormats":
        return cls(**vars(formats) | factors)

    @property
    def swapped(self) -> "ScaledFormats":
        """Those of the product with its operands in the other order."""
        names = {"lhs": "rhs", "rhs": "lhs"}
        fused = tuple(names.get(x, x) for x in self.fused)
        return dataclasses.replace(self, fused=fused, lhs=self.rhs, rhs=self.lhs)


def _check_formats(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Formats):
        raise TypeError(
            f"`{name}` must be `jax_unit_scaling.Formats`, such as "
            f"`jax_unit_scaling.NATIVE_FP8`, or None, got {value!r}."
        )


def also_fused(formats: Formats | None, *names: str) -> Formats | None:
    """`formats` with more operands `fused`."""
    if formats is None:
        return None
    fused = tuple(dict.fromkeys((*formats.fused, *names)))
    return dataclasses.replace(formats, fused=fused)


# What FP8 units multiply: any two but E5M2 with itself.
_NATIVE_PAIRS = ((E4M3, E5M2), (E4M3, E4M3))

# More precision forward, more range backward (Noune et al., 2022; OCP; both papers).
SIMULATED_FP8 = Formats(E4M3, E5M2)
NATIVE_FP8 = Formats(E4M3, E5M2, native=True)


@dataclasses.dataclass(frozen=True)
class BlockFormats:
    """The formats of each product of a Transformer's layers.

    Attributes:
        attention_in: of the query, key and value projections.
        attention: of attention itself: query, key and value are rounded, and the
            output's cotangent. Native ones have no effect: attention computes in the
            dtype of its inputs.
        attention_out: of attention's output projection.
        mlp_in: of a feed-forward layer's up and gate projections.
        mlp_out: of its down projection.

    Raises:
        TypeError: if one of them is neither `Formats` nor None.
    """

    attention_in: Formats | None = None
    attention: Formats | None = None
    attention_out: Formats | None = None
    mlp_in: Formats | None = None
    mlp_out: Formats | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check_formats(name, value)

    @classmethod
    def of(cls, formats: "Formats | BlockFormats | None") -> "BlockFormats":
        """Those of all products, where one for all is given."""
        if isinstance(formats, BlockFormats):
            return formats
        _check_formats("formats", formats)
        return cls(*[formats] * len(dataclasses.fields(cls)))


# Which of a Transformer's hidden products are in FP8. u-muP (section 4.2) keeps the two
# whose inputs grow in training wide; munit scaling (Narayan et al., 2025, section 3)
# needs none, for its norm is at the end of each branch.
UMUP_FP8 = BlockFormats(attention_in=NATIVE_FP8, mlp_in=NATIVE_FP8)
MUNIT_FP8 = BlockFormats.of(NATIVE_FP8)


def quantize(
    x: Float[Array, "*shape"], format: Format, key: Key[Array, ""] | None = None
) -> Float[Array, "*shape"]:
    """Rounds `x` to the nearest number of `format`, ties to even, in `x`'s own dtype.

    Subnormals are kept, NaN stays NaN, and what lies beyond the largest number that
    `format` and `x`'s dtype both hold (infinity too) becomes that number. The gradient
    passes straight through, as if this were the identity, and so does a gradient of
    gradients (by reverse mode: JAX refuses the forward mode).

    With a `key` the rounding is stochastic: up or down to a neighbour, so that the
    expectation is `x` (to 2^-23 of their distance, and but for saturation).

    Raises:
        TypeError: if `x` is not floating point or `format` not a `Format`.
    """
    return quantize_fwd(x, format, key)


def quantize_fwd(
    x: Float[Array, "*shape"], format: Format, key: Key[Array, ""] | None = None
) -> Float[Array, "*shape"]:
    """`quantize` on the way forward; the cotangent passes unrounded."""
    return _quantize_fwd(*_check(x, format, key))


def quantize_bwd(
    x: Float[Array, "*shape"], format: Format, key: Key[Array, ""] | None = None
) -> Float[Array, "*shape"]:
    """`quantize` of the cotangent on the way back; `x` passes unrounded."""
    return _quantize_bwd(*_check(x, format, key))


@ft.partial(jax.jit, static_argnames="format")
def _quantize(x: Array, format: Format, key: Array | None) -> Array:
    # A jit of its own keeps this one equation, by this name, in every jaxpr. Clipping
    # and rounding are done on the bits, so that no unit flushes a subnormal on the way.
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    uint = jnp.dtype(f"uint{jnp.finfo(wide).bits}")
    bits = lax.bitcast_convert_type(x.astype(wide), uint)
    sign = bits & uint.type(1 << (uint.itemsize * 8 - 1))
    # Constants of numpy's: what is computed here of jax's own a scan would compute
    # once outside of its loop, by a second equation of this name.
    number = jnp.dtype(wide).type
    largest = number(format.max_in(x.dtype)).view(uint)
    magnitude = jnp.minimum(bits ^ sign, largest)
    noise = None if key is None else jax.random.bits(key, x.shape, jnp.uint32)
    rounded = _round_mantissa(magnitude, jnp.finfo(wide).nmant, format, noise)
    if format.min_exponent > jnp.finfo(wide).minexp:
        subnormal = _round_to_multiple(
            lax.bitcast_convert_type(magnitude, wide), format.smallest_subnormal, noise
        )
        rounded = jnp.where(
            magnitude < number(format.smallest_normal).view(uint),
            lax.bitcast_convert_type(subnormal, uint),
            rounded,
        )
    if noise is not None:  # which can step up from the last number
        rounded = jnp.minimum(rounded, largest)
    if not format.signed_zero:
        sign = jnp.where(rounded == 0, uint.type(0), sign)
    y = lax.bitcast_convert_type(rounded | sign, wide)
    return jnp.where(jnp.isnan(x), x, y.astype(x.dtype))


def _round_mantissa(
    bits: Array, available: int, format: Format, noise: Array | None
) -> Array:
    """Rounds a positive number's mantissa; a carry moves on into the exponent."""
    drop = available - format.mantissa_bits
    if drop == 0:
        return bits
    uint = bits.dtype.type
    dropped = uint((1 << drop) - 1)
    if noise is None:  # just under one half, and one half where the kept bit is odd
        half = (dropped >> uint(1)) + ((bits >> uint(drop)) & uint(1))
    else:  # 32 random bits at the top of the mantissa, all below it in float32
        half = (noise.astype(uint) << uint(max(available - 32, 0))) & dropped
    return (bits + half) & ~dropped


def _round_to_multiple(x: Array, quantum: float, noise: Array | None) -> Array:
    """Rounds `x` >= 0, below 2^23 quanta, to a multiple of `quantum` (a power of 2)."""
    steps = x * (1 / quantum)
    if noise is None:
        return jnp.round(steps) * quantum
    down = jnp.floor(steps)
    uniform = (noise >> jnp.uint32(9)).astype(x.dtype) * 2.0**-23
    return (down + (uniform < steps - down)) * quantum


@ft.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _quantize_fwd(x: Array, format: Format, key: Array | None) -> Array:
    return _quantize(x, format, key)


# What a rule calls has a rule too, so that second derivatives pass straight through.
_quantize_fwd.defvjp(
    lambda x, format, key: (_quantize_fwd(x, format, key), None),
    lambda format, _, g: (g, None),
)


@ft.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _quantize_bwd(x: Array, format: Format, key: Array | None) -> Array:
    return x


_quantize_bwd.defvjp(
    lambda x, format, key: (x, key),
    lambda format, key, g: (_quantize_fwd(g, format, key), None),
)


def _check(
    x: Array, format: Format, key: Array | None
) -> tuple[Array, Format, Array | None]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be a floating-point array, got {x.dtype}.")
    _check_format("format", format)
    return x, format, key
