"""Attention as a layer calls it: rotary positions, a cache, and one call into ops."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..arguments import check_broadcast
from ..constraints import Constraint
from ..formats import BlockFormats, Formats, also_fused
from ..ops.attention import dot_product_attention, rotary


class Cache(NamedTuple):
    """What decoding has seen: the first `filled` of [..., room, heads, head_size]."""

    key: jax.Array
    value: jax.Array
    filled: jax.Array

    def extended(self, key: jax.Array, value: jax.Array) -> "Cache":
        """With keys and values behind those that are there.

        Behind the end there is no room: where `filled` is known it is an error, and
        under `jit` what is written is NaN.

        Raises:
            ValueError: if they do not fit.
        """
        *batch, room, heads, size = self.key.shape
        length = key.shape[-3]
        if key.shape != (*batch, length, heads, size) or length > room:
            raise ValueError(
                f"`inputs_q` must fit the cache of shape {self.key.shape}, got keys of "
                f"shape {key.shape}: initialise the cache with the shape of the "
                "longest input."
            )
        filled = self.filled + length
        if not isinstance(filled, jax.core.Tracer) and filled > room:
            raise ValueError(
                f"`inputs_q` must fit the cache, which holds {self.filled} of {room} "
                f"positions, got {length} more: initialise it anew, longer if need be."
            )
        start: tuple[Any, ...] = (*len(batch) * (0,), self.filled, 0, 0)

        def write(cache: jax.Array, x: jax.Array) -> jax.Array:
            x = jnp.where(filled <= room, x, jnp.nan).astype(cache.dtype)
            return lax.dynamic_update_slice(cache, x, start)

        return Cache(write(self.key, key), write(self.value, value), filled)


@dataclasses.dataclass(frozen=True)
class Attention:
    """`dot_product_attention` with a layer's options, and decoding."""

    formats: Formats | None
    mult: float
    rotary_base: float | None
    local_window_size: int | tuple[int, int] | None
    length: int | None
    constraint: Constraint | None
    implementation: str = "xla"

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: Cache | None = None,
        *,
        mask: jax.Array | None,
        dropout_rng: jax.Array | None,
        dropout_rate: float,
        broadcast_dropout: bool,
        deterministic: bool,
        precision: Any,
        is_causal: bool,
        input_positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The output; and the cache behind this call, if there is one to decode with.

        `input_positions` are those that `rotary_base` turns by, 0, 1, .. by default.
        """
        positions = None
        if cache is not None:
            *batch, length, heads, _ = query.shape
            if key.shape[-3] != length:
                raise ValueError(
                    f"`inputs_k` must be as long as `inputs_q` ({length}) in decoding, "
                    f"got {key.shape[-3]}."
                )
            positions = cache.filled + jnp.arange(length)
            check_broadcast("mask", mask, (*batch, heads, length, cache.key.shape[-3]))
            if not is_causal:
                # Hidden by a mask, as such a model is trained: factors do not see it.
                seen = jnp.arange(cache.key.shape[-3]) <= positions[:, None]
                mask = seen if mask is None else jnp.logical_and(seen, mask)
        if self.rotary_base is not None:
            turns = positions if input_positions is None else input_positions
            query, key = (rotary(x, turns, base=self.rotary_base) for x in (query, key))
        elif input_positions is not None:
            raise ValueError("`input_positions` are without effect: set `rotary_base`.")
        if cache is not None:
            dtype, cache = key.dtype, cache.extended(key, value)
            key, value = (x.astype(dtype) for x in (cache.key, cache.value))
        y = dot_product_attention(
            query,
            key,
            value,
            None if mask is None else mask.astype(jnp.bool_),
            None,
            positions,
            dropout_rng,
            is_causal=is_causal,
            local_window_size=self.local_window_size,
            length=self.length,
            mult=self.mult,
            dropout_rate=0.0 if deterministic else dropout_rate,
            broadcast_dropout=broadcast_dropout,
            precision=precision,
            implementation=self.implementation,
            formats=self.formats,
            constraint=self.constraint,
        )
        return y, cache


def projection_formats(
    formats: Formats | BlockFormats | None, name: str
) -> Formats | None:
    """Those of attention's projection "query", "key", "value" or "out".

    Attention's output and the value's cotangent come from products, which XLA fuses no
    cast into.
    """
    each = BlockFormats.of(formats)
    match name:
        case "out":
            return also_fused(each.attention_out, "lhs")
        case "value":
            return also_fused(each.attention_in, "cotangent")
        case _:
            return each.attention_in


SOW_WEIGHTS = (
    "`sow_weights` must be False: attention's weights stay inside the operation. Pass "
    "Flax's `dot_product_attention` as `attention_fn` to look at plain ones."
)
