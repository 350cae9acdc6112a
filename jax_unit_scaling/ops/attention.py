"""Softmax and attention."""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from ..constraints import Constraint, to_output_scale
from ..formats import Formats, quantize_bwd, quantize_fwd
from ..moments import softmax_moments
from ..op import Factors, Integers, case, scaled_op
from ..scale import check_factor


def _softmax_rule(x: Any, *, axis: int, mult: float, **_: Any) -> Factors:
    rank = len(x.shape)
    if not -rank <= axis < rank:
        raise ValueError(f"`axis` {axis} is out of range for `x` of shape {x.shape}.")
    check_factor("mult", mult)
    length = x.shape[axis]
    if length < 2:
        raise ValueError(
            f"`x` must have two or more entries along `axis` {axis}, got shape "
            f"{x.shape}: the softmax of one number is constant."
        )
    return _softmax_factors(length, float(mult))


@ft.lru_cache(maxsize=1024)
def _softmax_factors(length: int, mult: float) -> Factors:
    square, gradient = (m.item() for m in softmax_moments(mult, np.array([length])))
    return Factors(square**-0.5, {"x": gradient**-0.5 / mult})


@scaled_op(
    rule=_softmax_rule,
    statistic="rms",
    cases=(
        *(case((4096, n), mult=m) for n in (8, 256) for m in (0.25, 1.0)),
        case((8192, 64), mult=4.0),
        case((64, 128, 32), axis=1),
    ),
)
def softmax(
    x: Float[Array, "..."],
    *,
    axis: int = -1,
    mult: float = 1.0,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled softmax(mult x): its rms is 1 (its mean carries meaning).

    Factors, for independent normal `x`, from exact integrals (`moments.py`):
    1 / sqrt(E[p^2]) forward and 1 / std of the cotangent of `x`; about n and n / mult
    for n entries at a small `mult`. Where `x` is correlated along `axis` the output is
    flatter, and its rms less than 1.

    Reference: Unit Scaling (Blake et al., 2023), table A.2, where s is the limit of a
    small `mult`.
    """
    # bfloat16's eight bits are too few to sum many exponentials in.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.nn.softmax(mult * wide, axis).astype(x.dtype)


def _attention_rule(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    *,
    is_causal: bool,
    mult: float,
    **_: Any,
) -> Factors:
    shapes = f"{query.shape}, {key.shape} and {value.shape}"
    if min(map(len, (query.shape, key.shape, value.shape))) < 3:
        raise ValueError(
            "`query`, `key` and `value` must be [..., length, heads, head_size], got "
            f"shapes {shapes}."
        )
    without_length = [x.shape[:-3] + x.shape[-2:] for x in (query, key)]
    if without_length[0] != without_length[1] or key.shape != value.shape:
        raise ValueError(
            "`key` and `value` must have the same shape, and `query` may differ in its "
            f"length alone, got shapes {shapes}."
        )
    check_factor("mult", mult)
    queries, _, head_size = query.shape[-3:]
    return _attention_factors(queries, key.shape[-3], head_size, is_causal, float(mult))


@ft.lru_cache(maxsize=1024)
def _attention_factors(
    queries: int, keys: int, d: int, is_causal: bool, mult: float
) -> Factors:
    """1 / std of attention's output and cotangents, averaged over positions and |q|.

    Given |q|, the logits are independent with standard deviation s = mult |q| / d, and
    |q|^2 is chi-squared with d degrees of freedom. A query with n keys contributes, per
    element and with V(s, n) the `gradient` of `softmax_moments`,

        output        n E[p^2]
        value         n E[p^2]                      summed over its keys
        query         mult^2 / d n V
        key           mult^2 / d n V |q|^2 / d      summed over its keys.
    """
    # A causal query sees the keys up to its own position.
    seen = (
        np.minimum(np.arange(1, queries + 1), keys) if is_causal else np.array([keys])
    )
    lengths = np.unique(np.round(np.geomspace(seen.min(), seen.max(), 64)).astype(int))
    # |q|: the chi density has a standard deviation near 0.7, whatever d is.
    radius = math.sqrt(d) + np.arange(-4.0, 4.25, 0.5)
    radius = radius[radius > 0]
    log_density = (d - 1) * np.log(radius) - radius**2 / 2
    density = np.exp(log_density - log_density.max())
    density /= density.sum()

    out, logits, logits_q = np.zeros((3, len(lengths)))
    for r, p in zip(radius, density, strict=True):
        m = softmax_moments(mult * r / d, lengths)
        out += p * lengths * m.square
        logits += p * lengths * m.gradient
        logits_q += p * lengths * m.gradient * r**2 / d

    def mean(values: np.ndarray) -> float:
        """Over positions; smooth in the logarithm of how many keys they see."""
        return float(np.interp(np.log(seen), np.log(lengths), values).mean())

    products = mult**2 / d
    variance = {
        "query": products * mean(logits),
        "key": products * mean(logits_q) * queries / keys,
        "value": mean(out) * queries / keys,
    }
    # With one key the output is the value, and nothing comes back to query and key.
    bwd = {k: v**-0.5 if v > 0 else 1.0 for k, v in variance.items()}
    return Factors(mean(out) ** -0.5, bwd)


@scaled_op(
    rule=_attention_rule,
    widen=False,  # float16 operands; logits and softmax in float32
    cases=(
        case(*3 * [(32, 64, 8, 32)]),
        case(*3 * [(32, 64, 8, 32)], is_causal=True),
        case((32, 48, 8, 32), (32, 96, 8, 32), (32, 96, 8, 32)),
        case(*3 * [(16, 256, 4, 64)], is_causal=True, mult=0.25),
        case(*3 * [(32, 128, 8, 16)], mult=4.0),
    ),
)
def dot_product_attention(
    query: Float[Array, "..."],
    key: Float[Array, "..."],
    value: Float[Array, "..."],
    mask: Bool[Array, "..."] | None = None,
    *,
    is_causal: bool = False,
    mult: float = 1.0,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled attention: softmax(query key^T mult / head_size) value.

    Arrays are [..., length, heads, head_size]; `mask`, broadcastable to [..., heads,
    queries, keys], is true where a query sees a key. `formats` round query, key and
    value, and the output's cotangent.

    Factors: 1 / std of the output and of each cotangent for independent normal inputs,
    from exact integrals (`moments.py`), averaged over positions where `is_causal`. The
    output is the mean of about n values, and its factor about n^1/2. Values that are
    correlated along the sequence average out less: identical ones leave a scale of
    n^1/2 rather than 1, which is the common reason for a large attention output late in
    training. A `mask` is not looked at, for its values are not known while tracing.

    References: u-muP (Blake et al., 2024), section 4 (mult / head_size, one factor);
    Almost-scaled dot-product attention (Blake & Bouamama, 2023).
    """
    if formats is not None and formats.fwd is not None:
        query, key, value = (quantize_fwd(x, formats.fwd) for x in (query, key, value))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum(
        "...qhd,...khd->...hqk", query, key, preferred_element_type=wide
    )
    if is_causal:
        causal = jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool)
        mask = causal if mask is None else mask & causal
    if mask is not None:  # finite, so that a row without any key is not NaN
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits * (mult / query.shape[-1]))
    y = jnp.einsum("...hqk,...khd->...qhd", weights.astype(value.dtype), value)
    if formats is not None and formats.bwd is not None:
        y = quantize_bwd(y, formats.bwd)
    return y


def _rotary_rule(x: Any, positions: Any = None, **_: Any) -> Factors:
    if len(x.shape) < 3 or x.shape[-1] % 2:
        raise ValueError(
            "`x` must be [..., length, heads, head_size] with an even head size, got "
            f"shape {x.shape}."
        )
    if positions is not None and (
        not positions.shape
        or positions.shape[-1] != x.shape[-3]
        or len(positions.shape) > len(x.shape) - 2
    ):
        raise ValueError(
            f"`positions` must be [..., length] for `x` of shape {x.shape}, got shape "
            f"{positions.shape}."
        )
    return Factors(1.0, {"x": 1.0})


@scaled_op(
    rule=_rotary_rule,
    cases=(
        case((4, 64, 2, 32)),
        case((4, 64, 2, 32), Integers((4, 64), 256)),
        case((64, 4, 64), base=500000.0),
    ),
)
def rotary(
    x: Float[Array, "*batch length heads head_size"],
    positions: Integer[Array, "*#batch length"] | None = None,
    *,
    base: float = 10000.0,
) -> Float[Array, "*batch length heads head_size"]:
    """Rotary positions: turns the pair (x_i, x_{i + d/2}) of a head's d features by the
    angle position / base^(2i/d). `positions` are 0, 1, ... where none are given.

    Factors: 1 both ways, as a rotation keeps every scale and is its own gradient's
    inverse. Computed in float32 at least: an angle of thousands needs its bits.

    Reference: RoFormer (Su et al., 2021), section 3.4, in the layout of GPT-NeoX.
    """
    half = x.shape[-1] // 2
    if positions is None:
        positions = jnp.arange(x.shape[-3])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = base ** (-np.arange(half) / half)
    angle = positions[..., None, None].astype(wide) * frequency.astype(wide)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
