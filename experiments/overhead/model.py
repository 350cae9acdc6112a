"""One Transformer twice: plain Flax layers, and unit-scaled; else the same maths."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_unit_scaling as jus

Kind = Literal["plain", "unit"]
KINDS: tuple[Kind, ...] = ("plain", "unit")
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Size:
    """The model and its batch."""

    width: int = 256
    depth: int = 4
    head_size: int = 64
    vocabulary: int = 512
    batch: int = 4
    length: int = 128


def _rotary(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    frequency = (10000.0 ** (-np.arange(half) / half)).astype(np.float32)
    positions = jnp.arange(x.shape[-3])
    angle = positions[:, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, **_: Any
) -> jax.Array:
    """Causal attention as the unit-scaled one computes it: logits in float32."""
    query, key = _rotary(query), _rotary(key)
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    logits = logits * (1 / query.shape[-1])
    seen = jnp.arange(query.shape[1])[:, None] >= jnp.arange(key.shape[1])
    logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class _PlainBlock(nnx.Module):
    def __init__(self, size: Size, **common: Any):
        width = size.width
        self.attention_norm = nnx.RMSNorm(width, use_scale=False, **common)
        self.attention = nnx.MultiHeadAttention(
            width // size.head_size,
            width,
            use_bias=False,
            decode=False,
            attention_fn=_attention,
            **common,
        )
        self.mlp_norm = nnx.RMSNorm(width, use_scale=False, **common)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, **common)
        self.gate = nnx.Linear(width, 4 * width, use_bias=False, **common)
        self.down = nnx.Linear(4 * width, width, use_bias=False, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), is_causal=True)
        y = self.mlp_norm(x)
        return x + self.down(self.up(y) * jax.nn.silu(self.gate(y)))


def _unit_block(size: Size, index: int, **common: Any) -> nnx.Module:
    return jus.nnx.TransformerBlock(
        size.width,
        size.width // size.head_size,
        4 * size.width,
        index=index,
        depth=size.depth,
        **common,
    )


class Model(nnx.Module):
    """Embedding, pre-norm blocks with rotary positions and a gated MLP, readout."""

    def __init__(self, size: Size, kind: Kind, dtype: Dtype, *, rngs: nnx.Rngs):
        layers: Any = jus.nnx if kind == "unit" else nnx
        readout: Any = jus.nnx.LinearReadout if kind == "unit" else nnx.Linear
        common: dict[str, Any] = {"dtype": jnp.dtype(dtype), "rngs": rngs}
        self.embed = layers.Embed(size.vocabulary, size.width, **common)
        self.blocks = nnx.List(
            _unit_block(size, i, **common)
            if kind == "unit"
            else _PlainBlock(size, **common)
            for i in range(size.depth)
        )
        self.norm = layers.RMSNorm(size.width, use_scale=False, **common)
        self.readout = readout(size.width, size.vocabulary, use_bias=False, **common)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


def _plain_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    wide = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(wide, targets).mean()


def training_step(
    size: Size, kind: Kind, dtype: Dtype
) -> tuple[Callable[..., Any], Any, jax.Array]:
    """A step (state, ids) -> (state, loss) of Adam, a state to begin with, and ids."""
    graph, params = nnx.split(Model(size, kind, dtype, rngs=nnx.Rngs(0)))
    optimiser = jus.optim.adam(0.1) if kind == "unit" else optax.adam(1e-3)
    loss = jus.cross_entropy if kind == "unit" else _plain_loss

    def step(state: Any, ids: jax.Array) -> Any:
        params, opt_state = state

        def of_params(params: Any) -> jax.Array:
            return loss(nnx.merge(graph, params)(ids[:, :-1]), ids[:, 1:])

        value, grads = jax.value_and_grad(of_params)(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    shape = (size.batch, size.length + 1)
    ids = jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)
    return step, (params, optimiser.init(params)), ids
