"""Softmax and attention."""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, Key as KeyArray

from ..arguments import check_broadcast, check_key
from ..constraints import Constraint, to_output_scale
from ..formats import Formats, quantize_bwd, quantize_fwd
from ..fp8 import on_cuda
from ..moments import softmax_moments
from ..op import Factors, Integers, Key, Zeros, case, scaled_op
from ..scale import check_factor
from .dropout import dropout


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
    bias: Any = None,
    query_positions: Any = None,
    dropout_key: Any = None,
    *,
    is_causal: bool,
    local_window_size: int | tuple[int, int] | None,
    length: int | None,
    mult: float,
    dropout_rate: float,
    precision: Any,
    implementation: str,
    **_: Any,
) -> Factors:
    _check_shapes(query, key, value)
    *batch, queries, heads, head_size = query.shape
    keys, kv_heads = key.shape[-3:-1]
    logits = (*batch, heads, queries, keys)
    check_broadcast("mask", mask, logits)
    check_broadcast("bias", bias, logits)
    check_broadcast("query_positions", query_positions, (*batch, queries))
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(
            f"`mask` must be an array of booleans, got {mask.dtype}: pass what is to "
            "be added to the logits as `bias`."
        )
    check_factor("mult", mult)
    if dropout_key is not None:
        check_key("dropout_key", dropout_key)
    if not 0 <= dropout_rate < 1 or (dropout_rate and dropout_key is None):
        raise ValueError(
            "`dropout_rate` must be in [0, 1), and above 0 with a `dropout_key`, got "
            f"{dropout_rate} and {dropout_key}."
        )
    if implementation == "cudnn":
        _check_cudnn(query, query_positions, dropout_rate, precision)
    if length is None and query_positions is not None:
        length = keys
    if length is not None:
        if length < 1:
            raise ValueError(f"`length` must be 1 or more, got {length}.")
        queries = keys = length
    reach = _reach(is_causal, local_window_size)
    ideal = _attention_factors(queries, keys, head_size, *reach, float(mult))
    shared = (kv_heads / heads) ** 0.5  # a sum over the heads of a group
    sums = {"key": shared, "value": shared}
    if bias is not None:
        sums["bias"] = (max(bias.size, 1) / max(math.prod(logits), 1)) ** 0.5
    kept = (1 - dropout_rate) ** 0.5
    bwd = {name: kept * b * sums.get(name, 1.0) for name, b in ideal.bwd.items()}
    return Factors(kept * ideal.fwd, bwd)


def _check_cudnn(
    query: Any, query_positions: Any, dropout_rate: float, precision: Any
) -> None:
    if dropout_rate or query_positions is not None or precision is not None:
        raise ValueError(
            '`implementation="cudnn"` has neither dropout, `precision` nor '
            '`query_positions` (nor decoding with a cache): use "xla" for them.'
        )
    if len(query.shape) not in (3, 4):
        raise ValueError(
            '`implementation="cudnn"` takes `query`, `key` and `value` with one batch '
            f"axis or none, got shape {query.shape}: reshape them, or use `jax.vmap`."
        )
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(
            '`implementation="cudnn"` computes in float16 and bfloat16, got '
            f'{query.dtype}: convert `query`, `key` and `value`, or use "xla".'
        )
    if not on_cuda():
        raise ValueError(
            '`implementation="cudnn"` needs an NVIDIA GPU, got the backend '
            f'"{jax.default_backend()}": use "xla".'
        )


def _check_shapes(query: Any, key: Any, value: Any) -> None:
    shapes = f"{query.shape}, {key.shape} and {value.shape}"
    if min(map(len, (query.shape, key.shape, value.shape))) < 3:
        raise ValueError(
            "`query`, `key` and `value` must be [..., length, heads, head_size], got "
            f"shapes {shapes}."
        )
    if 0 in query.shape[-3:] or 0 in key.shape[-3:]:
        raise ValueError(
            "`query` and `key` must have a length, heads and a head size of 1 or more, "
            f"got shapes {shapes}."
        )
    common = [x.shape[:-3] + x.shape[-1:] for x in (query, key)]
    if (
        common[0] != common[1]
        or key.shape != value.shape
        or query.shape[-2] % key.shape[-2]
    ):
        raise ValueError(
            "`key` and `value` must have the same shape, and `query` may differ in its "
            "length and in its heads, a multiple of theirs, alone, got shapes "
            f"{shapes}."
        )


def _reach(
    is_causal: bool, local_window_size: int | tuple[int, int] | None
) -> tuple[float, float]:
    """How many keys before its own position a query sees, and how many after it."""
    if local_window_size is None:
        before, after = math.inf, math.inf
    elif isinstance(local_window_size, int):
        before = after = local_window_size
    else:
        before, after = local_window_size
    if min(before, after) < 0:
        raise ValueError(
            "`local_window_size` must be one or two counts of keys, 0 or more, got "
            f"{local_window_size}."
        )
    return before, 0 if is_causal else after


def _attention_times(
    query: Array, key: Array, value: Array, *args: Any, **options: Any
) -> Array:
    """Attention times the last of `args`, multiplied in where XLA can put it into
    another operation: nothing is fused with cuDNN's kernel, and the value has a factor
    on it already."""
    *rest, factor = args
    attention = dot_product_attention.fn
    if options["implementation"] == "cudnn":
        return attention(query, key, value * factor, *rest, **options)
    return attention(query, key, value, *rest, **options) * factor


@ft.lru_cache(maxsize=1024)
def _attention_factors(
    queries: int, keys: int, d: int, before: float, after: float, mult: float
) -> Factors:
    """1 / std of attention's output and cotangents, averaged over positions and |q|.

    Given |q|, the logits are independent with standard deviation s = mult |q| / d, and
    |q|^2 is chi-squared with d degrees of freedom. A query with n keys contributes, per
    element and with V(s, n) the `gradient` of `softmax_moments`,

        output        n E[p^2]
        value         n E[p^2]                      summed over its keys
        bias          d n V                         summed over its keys
        query         mult^2 / d n V
        key           mult^2 / d n V |q|^2 / d      summed over its keys.

    The query's takes the keys as independent of their weights. Their part along q is
    not: one of d directions, so an error of order 1 / d.
    """
    position = np.arange(queries)
    seen = np.minimum(position + after, keys - 1) - np.maximum(position - before, 0) + 1
    if seen.min() < 1:
        raise ValueError(
            f"`local_window_size` must leave every query a key, got {before} before a "
            f"query's own position, for {queries} queries and {keys} keys."
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
        "bias": d * mean(logits) / keys,
    }
    # With one key the output is the value, and nothing comes back to query and key.
    bwd = {k: v**-0.5 if v > 0 else 1.0 for k, v in variance.items()}
    return Factors(mean(out) ** -0.5, bwd)


@scaled_op(
    rule=_attention_rule,
    widen=False,  # float16 operands; logits and softmax in float32
    multiplied=_attention_times,
    cases=(
        case(*3 * [(32, 64, 8, 32)]),
        case(*3 * [(32, 64, 8, 32)], is_causal=True),
        case((32, 48, 8, 32), (32, 96, 8, 32), (32, 96, 8, 32)),
        case(*3 * [(16, 256, 4, 64)], is_causal=True, mult=0.25),
        case(*3 * [(32, 128, 8, 16)], mult=4.0),
        case(
            (16, 48, 6, 32),
            *2 * [(16, 48, 2, 32)],
            is_causal=True,
            local_window_size=(15, 0),
        ),
        case(
            (32, 32, 4, 32),
            *2 * [(32, 32, 2, 32)],
            None,
            Zeros((4, 32, 32)),
            None,
            Key(),
            dropout_rate=0.25,
            broadcast_dropout=False,
        ),
        # A mask is not looked at: with an eighth of the keys hidden the scales are
        # (8 / 7)^1/2 off.
        case(*3 * [(32, 32, 4, 32)], np.arange(32) < 28, error=0.07),
    ),
)
def dot_product_attention(
    query: Float[Array, "*batch queries heads head_size"],
    key: Float[Array, "*batch keys kv_heads head_size"],
    value: Float[Array, "*batch keys kv_heads head_size"],
    mask: Bool[Array | np.ndarray, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    query_positions: Integer[Array, "..."] | None = None,
    dropout_key: KeyArray[Array, ""] | None = None,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    length: int | None = None,
    mult: float = 1.0,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    precision: lax.PrecisionLike = None,
    implementation: str = "xla",
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "*batch queries heads head_size"]:
    """Unit-scaled attention: softmax(query key^T mult / head_size + bias) value.

    Arrays are [..., length, heads, head_size]; `key` and `value` may have fewer heads,
    each shared by a group of the query's. The options are those of
    `jax.nn.dot_product_attention`:

        mask, bias: broadcastable to [..., heads, queries, keys]; `mask` is true where a
            query sees a key. Padding is a mask, `arange(keys) < lengths[:, None, None,
            None]`; a query that sees no key averages all values.
        is_causal: whether a query sees only keys up to its own position.
        local_window_size: how many keys a query sees (before, after) its own position;
            one number means both.

    and further

        query_positions: [..., queries], the queries' positions among the keys, where
            they are not 0, 1, ...: the queries of one step, say, with a cache of keys.
        length: the factors are those of self-attention over so many positions. Give
            the length of training wherever a model sees another: the output then does
            not depend on how a sequence is cut into calls. Without it they are this
            call's own, or those of as many positions as there are keys where
            `query_positions` are given.
        dropout_key, dropout_rate, broadcast_dropout: drop attention weights, by one
            draw for all examples and heads or (False) by one for each.
        implementation: "xla", or "cudnn" for NVIDIA's kernel, which keeps no [queries,
            keys] array: in float16 and bfloat16, with one batch axis or none, without
            `query_positions`, dropout and `precision`.
        formats: round query, key and value, and the output's cotangent. Native ones
            have no effect: an 8-bit kernel would need scales of its own for the
            attention weights.

    Factors: 1 / std of the output and of each cotangent for independent normal inputs,
    from exact integrals (`moments.py`), averaged over positions where these see
    different numbers of keys; times (1 - dropout_rate)^1/2, and for keys and values
    group^-1/2. The output is the mean of about n values, and its factor about n^1/2.
    Values that are correlated along the sequence average out less: identical ones leave
    a scale of n^1/2 rather than 1, which is the common reason for a large attention
    output late in training. What `mask`, `bias` and `query_positions` hide or stress is
    not looked at, for values are not known while tracing.

    References: u-muP (Blake et al., 2024), section 4 (mult / head_size, one factor);
    Almost-scaled dot-product attention (Blake & Bouamama, 2023).
    """
    if formats is not None and formats.native:
        formats = None
    if formats is not None and formats.fwd is not None:
        query, key, value = (quantize_fwd(x, formats.fwd) for x in (query, key, value))
    if implementation == "cudnn":
        y = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            None if mask is None else jnp.asarray(mask),
            scale=mult / query.shape[-1],
            is_causal=is_causal,
            local_window_size=local_window_size,
            implementation="cudnn",
        )
    else:
        y = _attention(
            query,
            key,
            value,
            mask,
            bias,
            query_positions,
            dropout_key,
            reach=_reach(is_causal, local_window_size),
            mult=mult,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            precision=precision,
        )
    if formats is not None and formats.bwd is not None:
        y = quantize_bwd(y, formats.bwd)
    return y


def _attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | np.ndarray | None,
    bias: Array | None,
    query_positions: Array | None,
    dropout_key: Array | None,
    *,
    reach: tuple[float, float],
    mult: float,
    dropout_rate: float,
    broadcast_dropout: bool,
    precision: lax.PrecisionLike,
) -> Array:
    """Attention without factors, of XLA's own operations."""
    *batch, queries, heads, head_size = query.shape
    keys, kv_heads = key.shape[-3:-1]
    # A group of one gets no axis: its transposes would stay in the compiled program.
    group = () if heads == kv_heads else (heads // kv_heads,)
    g = "g" * len(group)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # The power of two goes on the query, exactly: on the logits, where only the rest
    # is, XLA reads and writes all [queries, keys] of their cotangent once more.
    rest, exponent = math.frexp(mult / head_size)
    logits = jnp.einsum(
        f"...qh{g}d,...khd->...h{g}qk",
        (query * 2.0 ** (exponent - 1)).reshape(
            *batch, queries, kv_heads, *group, head_size
        ),
        key,
        precision=precision,
        preferred_element_type=wide,
    ).reshape(*batch, heads, queries, keys)
    if rest != 0.5:
        logits = logits * (2 * rest)
    if bias is not None:
        logits = logits + bias.astype(wide)
    before, after = reach
    seen = [] if mask is None else [jnp.asarray(mask)]
    if min(before, after) < math.inf:
        if query_positions is None:
            query_positions = jnp.arange(queries)
        position, key_position = query_positions[..., None, :, None], jnp.arange(keys)
        # Whole numbers are added to the queries' positions alone, not to all pairs.
        seen += [key_position >= position - before] if before < math.inf else []
        seen += [key_position <= position + after] if after < math.inf else []
    if seen:  # finite, so that a row without any key is not NaN
        visible = ft.reduce(jnp.logical_and, seen)
        logits = jnp.where(visible, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    if dropout_rate and dropout_key is not None:
        shared = tuple(range(weights.ndim - 2)) if broadcast_dropout else ()
        weights = dropout.fn(
            weights, dropout_key, rate=dropout_rate, broadcast_dims=shared
        )
    return jnp.einsum(
        f"...h{g}qk,...khd->...qh{g}d",
        weights.reshape(*batch, kv_heads, *group, queries, keys),
        value,
        precision=precision,
    ).reshape(query.shape)


def _rotary_rule(x: Any, positions: Any = None, *, base: float) -> Factors:
    check_factor("base", base)
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
