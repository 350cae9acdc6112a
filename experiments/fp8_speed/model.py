"""What is measured: a linear layer and Llama-shaped layers, each way to train them."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

import jax_unit_scaling as jus

Kind = Literal["bf16", "bf16 unit", "fp8 unit", "fp8 flax", "fp8 qwix"]
NAMES: dict[Kind, str] = {
    "bf16": "bfloat16, Flax",
    "bf16 unit": "bfloat16, unit-scaled",
    "fp8 unit": "FP8, unit-scaled (`NATIVE_FP8`)",
    "fp8 flax": "FP8, Flax's `Fp8DirectDotGeneralOp`",
    "fp8 qwix": "FP8, qwix's `QtProvider`, per tensor",
}
# On a CPU, which has no cuDNN, the same models run with `--smoke`, and so in the tests.
IMPLEMENTATION: Literal["cudnn", "xla"] = (
    "cudnn" if jax.default_backend() == "gpu" else "xla"
)


@dataclasses.dataclass(frozen=True)
class Size:
    """Llama-shaped layers and their batch."""

    width: int = 4096
    hidden: int = 14336
    head_size: int = 128
    depth: int = 4
    batch: int = 4
    length: int = 2048


class _PlainBlock(nn.Module):
    size: Size
    dot_general_cls: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.size
        heads = size.width // size.head_size
        common: dict[str, Any] = {
            "dtype": jnp.bfloat16,
            "param_dtype": self.param_dtype,
        }
        dense: Any = ft.partial(
            nn.DenseGeneral,
            use_bias=False,
            dot_general_cls=self.dot_general_cls,
            **common,
        )
        norm = ft.partial(nn.RMSNorm, use_scale=False, **common)
        y = norm()(x)
        query, key, value = (
            dense((heads, size.head_size), name=name)(y)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(
            jus.rotary(query),
            jus.rotary(key),
            value,
            is_causal=True,
            implementation=IMPLEMENTATION,
        )
        x = x + dense(size.width, axis=(-2, -1), name="out")(y)
        y = norm()(x)
        up, gate = (dense(size.hidden, name=name)(y) for name in ("up", "gate"))
        return x + dense(size.width, name="down")(up * nn.silu(gate))


def _block(
    size: Size, kind: Kind, index: int, param_dtype: Any, remat: bool
) -> nn.Module:
    fp8 = kind == "fp8 unit"
    block: Any = _PlainBlock
    args: dict[str, Any]
    if kind in ("bf16 unit", "fp8 unit"):
        block = jus.linen.TransformerBlock
        args = {
            "num_heads": size.width // size.head_size,
            "hidden_features": size.hidden,
            "index": index,
            "depth": size.depth,
            "formats": jus.NATIVE_FP8 if fp8 else None,
            "attention": ft.partial(
                jus.linen.MultiHeadDotProductAttention, implementation=IMPLEMENTATION
            ),
            "dtype": jnp.bfloat16,
            "param_dtype": param_dtype,
        }
    else:
        direct = nn.Fp8DirectDotGeneralOp if kind == "fp8 flax" else None
        args = {"size": size, "dot_general_cls": direct, "param_dtype": param_dtype}
    return (nn.remat(block) if remat else block)(**args, name=f"block_{index}")


class Layers(nn.Module):
    """Blocks in a row, [batch, length, width] to the same."""

    size: Size
    kind: Kind
    param_dtype: Any = jnp.bfloat16
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.size.depth):
            x = _block(self.size, self.kind, index, self.param_dtype, self.remat)(x)
        return x


class LanguageModel(nn.Module):
    """Embedding, blocks, norm and readout."""

    size: Size
    kind: Kind
    vocabulary: int
    remat: bool = True

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        unit = self.kind in ("bf16 unit", "fp8 unit")
        kit: Any = jus.linen if unit else nn
        dtype = jnp.bfloat16
        x = kit.Embed(self.vocabulary, self.size.width, dtype=dtype)(ids)
        x = Layers(self.size, self.kind, jnp.float32, self.remat, name="layers")(x)
        x = kit.RMSNorm(use_scale=False, dtype=dtype)(x)
        readout = kit.DenseReadout if unit else nn.Dense
        return readout(self.vocabulary, use_bias=False, dtype=dtype, name="readout")(x)


def forward_backward(
    size: Size, kind: Kind
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and its arguments: loss and gradients of the layers."""
    model: Any = Layers(size, kind)
    key = jax.random.key(0)
    x = jax.random.normal(key, (size.batch, size.length, size.width), jnp.bfloat16)
    if kind == "fp8 qwix":
        model = _qwix(model, x)
    variables = jax.jit(model.init)(key, x)
    if kind == "fp8 qwix":
        variables = {"params": variables["params"]}

    def loss(variables: Any, x: jax.Array) -> jax.Array:
        y = model.apply(variables, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1)), (variables, x)


def _qwix(model: nn.Module, x: jax.Array) -> Any:
    import qwix  # type: ignore[import-not-found, unused-ignore]

    rule = qwix.QtRule(
        module_path=".*",
        op_names=("dot_general",),
        weight_qtype=jnp.float8_e4m3fn,
        act_qtype=jnp.float8_e4m3fn,
        bwd_qtype=jnp.float8_e5m2,
        disable_channelwise_axes=True,
        act_batch_axes=(),
    )
    return qwix.quantize_model(model, qwix.QtProvider([rule]))


def _flax_product(numbers: Any) -> Callable[..., Any]:
    op: Any = nn.Fp8DirectDotGeneralOp()
    one = jnp.zeros((16, 16), jnp.bfloat16)
    variables = op.init(jax.random.key(0), one, one, numbers)

    def product(x: jax.Array, w: jax.Array) -> Any:
        return op.apply(variables, x, w, numbers, mutable=list(variables))[0]

    return product


def linear(
    tokens: int, in_features: int, out_features: int, kind: Kind, fused: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and its arguments: x @ w, and both gradients for a cotangent."""
    every = dataclasses.replace(jus.NATIVE_FP8, fused=("lhs", "rhs", "cotangent"))
    formats = {"fp8 unit": every if fused else jus.NATIVE_FP8}.get(kind)
    numbers: Any = (((1,), (0,)), ((), ()))
    product: Callable[..., Any]
    if kind == "bf16":
        product = ft.partial(lax.dot_general, dimension_numbers=numbers)
    elif kind == "fp8 flax":
        product = _flax_product(numbers)
    else:
        product = ft.partial(jus.linear, formats=formats)

    def both(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
        y, pull = jax.vjp(product, x, w)
        return y, *pull(g)

    shapes = (
        (tokens, in_features),
        (in_features, out_features),
        (tokens, out_features),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    return both, tuple(
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    )
