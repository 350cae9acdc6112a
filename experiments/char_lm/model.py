"""One Transformer in two parametrisations: regular Flax, and unit-scaled."""

import dataclasses
import functools as ft
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import jax_unit_scaling as jus

from ..shared.layers import Parametrisation as Parametrisation, plain_attention

Precision = Literal["float32", "bfloat16", "float16", "fp8"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model: its size, and what this experiment compares."""

    parametrisation: Parametrisation = "unit"
    precision: Precision = "float32"
    width: int = 128
    depth: int = 4
    head_size: int = 32
    # Unit-scaled attention multiplies a mean over n values by about n^1/2, which is
    # right for independent values; those of a text are not. The sweep tried 1 and 1/4
    # for both parametrisations, and 1/4 was better for both.
    attention_weight: float = 0.25
    """The weight of attention branches beside that of MLP branches."""

    @property
    def dtype(self) -> Any:
        return jnp.float32 if self.precision == "fp8" else jnp.dtype(self.precision)

    @property
    def formats(self) -> jus.Formats | None:
        return jus.SIMULATED_FP8 if self.precision == "fp8" else None


class UnitModel(nnx.Module):
    """Embedding, pre-norm blocks, norm and readout, all unit-scaled."""

    def __init__(self, config: ModelConfig, vocabulary: int, *, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        rule = jus.transformer_residual_rule(
            residual_attn_ratio=config.attention_weight
        )
        self.embed = jus.nnx.Embed(vocabulary, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            jus.nnx.TransformerBlock(
                width,
                width // config.head_size,
                4 * width,
                index=i,
                depth=config.depth,
                residual_rule=rule,
                activation=jus.gelu,
                gated=False,
                formats=config.formats,
                dtype=dtype,
                rngs=rngs,
            )
            for i in range(config.depth)
        )
        self.norm = jus.nnx.RMSNorm(width, use_scale=False, dtype=dtype, rngs=rngs)
        self.readout = jus.nnx.LinearReadout(
            width,
            vocabulary,
            use_bias=False,
            formats=config.formats,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


class RegularBlock(nnx.Module):
    """The same block of plain Flax layers, with their default initialisers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.width
        common: dict[str, Any] = {
            "use_bias": False,
            "dtype": config.dtype,
            "rngs": rngs,
        }
        norm = ft.partial(
            nnx.RMSNorm, width, use_scale=False, dtype=config.dtype, rngs=rngs
        )
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = nnx.MultiHeadAttention(
            width // config.head_size,
            width,
            decode=False,
            attention_fn=ft.partial(plain_attention, formats=config.formats),
            **common,
        )
        self.attention_weight = config.attention_weight
        self.up = nnx.Linear(width, 4 * width, **common)
        self.down = nnx.Linear(4 * width, width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        attended = self.attention(self.attention_norm(x), is_causal=True)
        x = x + self.attention_weight * attended
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class RegularModel(nnx.Module):
    """The same model of plain Flax layers, with their default initialisers."""

    def __init__(self, config: ModelConfig, vocabulary: int, *, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.embed = nnx.Embed(vocabulary, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            RegularBlock(config, rngs=rngs) for _ in range(config.depth)
        )
        self.norm = nnx.RMSNorm(width, use_scale=False, dtype=dtype, rngs=rngs)
        self.readout = nnx.Linear(
            width,
            vocabulary,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


def make_model(config: ModelConfig, vocabulary: int, seed: Any) -> nnx.Module:
    """The configured model with fresh parameters; `seed` may be traced."""
    if config.width % config.head_size:
        raise ValueError(
            f"`width` must be a multiple of `head_size` {config.head_size}, got "
            f"{config.width}."
        )
    models = {"unit": UnitModel, "regular": RegularModel}
    rngs = nnx.Rngs(jax.random.key(seed))
    return models[config.parametrisation](config, vocabulary, rngs=rngs)


def simulated(config: ModelConfig, fn: Any) -> Any:
    """`fn` of the model in its precision: linear layers of the plain one are rounded.

    The unit-scaled model's round by themselves. So does either attention, which keeps
    the softmax's output and its cotangent as they are.
    """
    if config.parametrisation == "unit" or config.formats is None:
        return fn
    formats = config.formats
    return jus.simulate_fp8(fn, choose=lambda p: formats if is_linear(p) else None)


def is_linear(product: jus.Product) -> bool:
    """Attention's own products have four axes, of batch and heads two."""
    return len(product.rhs) < 4
