"""BERT in two parametrisations: one definition, with the layers of either."""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_unit_scaling as jus

from ..shared.layers import (
    Layers,
    Parametrisation,
    plain_attention,
    regular_layers,
    unit_layers,
)
from ..shared.precision import PRECISIONS


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An encoder; by default of BERT-Base's shape."""

    parametrisation: Parametrisation = "unit"
    precision: str = "float32"
    """One of `PRECISIONS`."""
    width: int = 768
    depth: int = 12
    head_size: int = 64
    positions: int = 384
    """The longest sequence."""
    scan: bool = False
    """Compile one block, and run through all in a loop: a deep model's program is then
    ready in seconds, and its steps take a little longer."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"`precision` must be one of {list(PRECISIONS)}, got "
                f"{self.precision!r}."
            )
        if self.width % self.head_size:
            raise ValueError(
                f"`width` must be a multiple of `head_size` {self.head_size}, got "
                f"{self.width}."
            )


BASE = ModelConfig()
LARGE = ModelConfig(width=1024, depth=24, scan=True)
TINY = ModelConfig(width=32, depth=2, head_size=16, positions=64)


def _layers(config: ModelConfig) -> Layers:
    precision, epsilon = PRECISIONS[config.precision], 1e-6
    if config.parametrisation == "unit":
        return unit_layers(precision, epsilon=epsilon)
    init = nnx.initializers.truncated_normal(0.02)
    return regular_layers(
        precision, epsilon=epsilon, embedding_init=init, kernel_init=init
    )


class Block(nnx.Module):
    """Attention and feed-forward branches, with the norm behind each sum."""

    def __init__(self, config: ModelConfig, layers: Layers, *, rngs: nnx.Rngs):
        width = config.width
        formats = PRECISIONS[config.precision].formats
        self.attention = layers.attention(
            width // config.head_size,
            width,
            decode=False,
            attention_fn=ft.partial(plain_attention, formats=formats, rotary=False),
            rngs=rngs,
        )
        self.up = layers.linear(width, 4 * width, rngs=rngs)
        self.down = layers.linear(4 * width, width, rngs=rngs)
        self.attention_norm = layers.norm(width, rngs=rngs)
        self.mlp_norm = layers.norm(width, rngs=rngs)
        self.gelu, self.residual = layers.gelu, layers.residual
        if config.parametrisation == "unit":
            jus.nnx.set_depth(self, 2 * config.depth)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, taus: tuple[Any, Any]
    ) -> jax.Array:
        attend, feed_forward = taus
        x = self.residual(ft.partial(self.attention, mask=mask), x, tau=attend)
        x = self.attention_norm(x)
        return self.mlp_norm(self.residual(self._feed_forward, x, tau=feed_forward))

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        return self.down(self.gelu(self.up(x)))


class Encoder(nnx.Module):
    """Ids and segments [batch, length] to features [batch, length, width]."""

    def __init__(
        self, config: ModelConfig, vocabulary: int, tokens: int, *, rngs: nnx.Rngs
    ):
        layers, width = _layers(config), config.width
        tied: dict[str, Any] = {}
        if config.parametrisation == "unit":  # the logits of a linear layer
            tied = {"tied": tokens, "logits_scale": width**0.5}
        self.words = layers.embed(vocabulary, width, **tied, rngs=rngs)
        self.places = layers.embed(config.positions, width, rngs=rngs)
        self.segments = layers.embed(2, width, rngs=rngs)
        self.total = layers.total
        self.norm = layers.norm(width, rngs=rngs)
        self.blocks = nnx.List(
            Block(config, layers, rngs=rngs) for _ in range(config.depth)
        )
        # BERT adds branches as they are; unit scaling needs weights, the paper's means.
        tau, count = jus.running_mean_residual_rule(), 2 * config.depth
        is_unit = config.parametrisation == "unit"
        each = [tau(i, count) if is_unit else None for i in range(count)]
        self.taus = tuple(zip(each[::2], each[1::2], strict=True))
        self.scan = config.scan

    def __call__(
        self, ids: jax.Array, segments: jax.Array, seen: jax.Array | None = None
    ) -> jax.Array:
        """`seen` is true where an id is no padding."""
        places = jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape)
        x = self.total(self.words(ids), self.places(places), self.segments(segments))
        x = self.norm(x)
        mask = None if seen is None else seen[:, None, None, :]
        if self.scan:
            return self._scan(x, mask)
        for block, taus in zip(self.blocks, self.taus, strict=True):
            x = block(x, mask, taus)
        return x

    def _scan(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        # Stacked here, and not kept so: LAMB's updates are shares of each layer's norm.
        graphs, states = zip(*map(nnx.split, self.blocks), strict=True)
        stack = lambda *each: jnp.stack(each)
        blocks = jax.tree.map(stack, *zip(states, self.taus, strict=True))

        def body(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
            state, taus = block
            return nnx.merge(graphs[0], state)(x, mask, taus), None

        return jax.lax.scan(body, x, blocks)[0]


class MaskedLM(nnx.Module):
    """The encoder, and logits of what stands at some places.

    Args:
        config: the encoder's.
        vocabulary: the number of pieces.
        tokens: those of a batch, of which a unit-scaled table's factors depend.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: int, tokens: int, *, rngs: nnx.Rngs
    ):
        layers, width = _layers(config), config.width
        self.encoder = Encoder(config, vocabulary, tokens, rngs=rngs)
        self.dense = layers.linear(width, width, rngs=rngs)
        self.norm = layers.norm(width, rngs=rngs)
        self.gelu = layers.gelu
        self.bias = nnx.Param(jnp.zeros(vocabulary), role="bias")
        self.is_unit = config.parametrisation == "unit"

    def __call__(
        self, ids: jax.Array, segments: jax.Array, places: jax.Array
    ) -> jax.Array:
        """The logits [batch, predictions, vocabulary] at `places`, in float32."""
        x = self.encoder(ids, segments)
        x = jnp.take_along_axis(x, places[..., None], axis=1)
        x = self.norm(self.gelu(self.dense(x)))
        bias = self.bias[...].astype(jnp.float32)
        if self.is_unit:
            bias = jus.scale_bwd(bias, places.size**-0.5)
        return self.encoder.words.attend(x).astype(jnp.float32) + bias


class SpanModel(nnx.Module):
    """The encoder, and logits of where an answer starts and ends.

    Takes the arguments of `MaskedLM`.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: int, tokens: int, *, rngs: nnx.Rngs
    ):
        self.encoder = Encoder(config, vocabulary, tokens, rngs=rngs)
        self.readout = _layers(config).readout(config.width, 2, rngs=rngs)

    def __call__(
        self, ids: jax.Array, segments: jax.Array, seen: jax.Array, allowed: jax.Array
    ) -> jax.Array:
        """Logits [batch, 2, length], in float32; low where no answer is `allowed`."""
        logits = self.readout(self.encoder(ids, segments, seen)).astype(jnp.float32)
        return jnp.where(allowed[:, None], jnp.moveaxis(logits, -1, 1), -1e9)
