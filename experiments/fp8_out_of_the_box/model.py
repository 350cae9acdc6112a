"""nanoGPT's model in plain Flax: nothing in it knows of low precision."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

normal = nnx.initializers.normal


class Block(nnx.Module):
    """Pre-norm attention and feed-forward branches, added to their inputs."""

    def __init__(
        self, width: int, heads: int, depth: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        last = normal(0.02 / (2 * depth) ** 0.5)  # GPT-2's, of a branch's last weight
        norm = ft.partial(nnx.LayerNorm, width, use_bias=False, dtype=dtype, rngs=rngs)
        linear = ft.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = nnx.MultiHeadAttention(
            heads,
            width,
            decode=False,
            use_bias=False,
            kernel_init=normal(0.02),
            out_kernel_init=last,
            dtype=dtype,
            rngs=rngs,
        )
        self.up = linear(width, 4 * width, kernel_init=normal(0.02))
        self.down = linear(4 * width, width, kernel_init=last)

    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """Learnt positions, and a readout that is the embedding's table."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int,
        heads: int,
        depth: int,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        embed = ft.partial(
            nnx.Embed,
            features=width,
            embedding_init=normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.tokens, self.positions = embed(vocabulary), embed(length)
        self.blocks = nnx.List(
            Block(width, heads, depth, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        self.norm = nnx.LayerNorm(width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x))
