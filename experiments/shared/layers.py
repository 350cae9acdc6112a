"""The same layers in two parametrisations: of plain Flax, and unit-scaled."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jax_unit_scaling as jus

from .precision import Precision

Parametrisation = Literal["regular", "unit"]


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a parametrisation, by the same signatures."""

    embed: Callable[..., Any]
    linear: Callable[..., Any]
    readout: Callable[..., Any]
    norm: Callable[..., Any]
    attention: Callable[..., Any]
    relu: Callable[[jax.Array], jax.Array]
    gelu: Callable[[jax.Array], jax.Array]
    total: Callable[..., jax.Array]
    """Of several tensors."""
    residual: Callable[..., jax.Array]
    """(branch, x, tau=) -> x and its branch, added up"""


def unit_layers(
    precision: Precision,
    *,
    epsilon: float,
    constraint: Any = jus.to_output_scale,
) -> Layers:
    """This library's; `epsilon` is the norms'."""
    dtype: dict[str, Any] = {"dtype": jnp.dtype(precision.dtype)}
    product = dtype | {"formats": precision.formats, "constraint": constraint}
    return Layers(
        embed=ft.partial(jus.nnx.Embed, **dtype),
        linear=ft.partial(jus.nnx.Linear, **product),
        # The last layer is a cut-edge.
        readout=ft.partial(jus.nnx.Linear, **product | {"constraint": None}),
        norm=ft.partial(jus.nnx.LayerNorm, epsilon=epsilon, **dtype),
        attention=ft.partial(jus.nnx.MultiHeadAttention, **product),
        relu=ft.partial(jus.relu, constraint=constraint),
        gelu=ft.partial(jus.gelu, constraint=constraint),
        total=jus.weighted_add,
        residual=jus.residual_apply,
    )


def regular_layers(
    precision: Precision,
    *,
    epsilon: float,
    embedding_init: nnx.Initializer,
    kernel_init: nnx.Initializer,
    qkv_init: nnx.Initializer | None = None,
) -> Layers:
    """Flax's, whose products are rounded as the unit-scaled ones are."""
    dtype: dict[str, Any] = {"dtype": jnp.dtype(precision.dtype)}
    product = ft.partial(rounded, jax.lax.dot_general, precision.formats)
    linear = ft.partial(
        nnx.Linear, dot_general=product, kernel_init=kernel_init, **dtype
    )
    return Layers(
        embed=ft.partial(nnx.Embed, embedding_init=embedding_init, **dtype),
        linear=linear,
        readout=linear,
        norm=ft.partial(nnx.LayerNorm, epsilon=epsilon, **dtype),
        attention=ft.partial(
            nnx.MultiHeadAttention,
            qkv_dot_general=product,
            out_dot_general=product,
            kernel_init=qkv_init or kernel_init,
            out_kernel_init=kernel_init,
            **dtype,
        ),
        relu=nnx.relu,
        gelu=nnx.gelu,
        total=lambda *xs: sum(xs[1:], xs[0]),
        residual=_plain_residual,
    )


def _plain_residual(
    branch: Callable[[jax.Array], jax.Array], x: jax.Array, *, tau: float | None
) -> jax.Array:
    """The weights of `residual_apply`, without a delayed factor; or with None plain."""
    y = branch(x)
    if tau is None:
        return x + y
    return (x + tau * y) * (1 + tau**2) ** -0.5


def rounded(
    product: Callable[..., jax.Array],
    formats: jus.Formats | None,
    lhs: jax.Array,
    rhs: jax.Array,
    *args: Any,
    **more: Any,
) -> jax.Array:
    """A plain product, rounded as the unit-scaled one is, without its factors."""
    if formats is None or formats.fwd is None or formats.bwd is None:
        return product(lhs, rhs, *args, **more)
    lhs, rhs = (jus.quantize_fwd(x, formats.fwd) for x in (lhs, rhs))
    return jus.quantize_bwd(product(lhs, rhs, *args, **more), formats.bwd)


def plain_attention(
    *qkv: jax.Array,
    formats: jus.Formats | None,
    rotary: bool = True,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    **_: Any,
) -> jax.Array:
    """Plain attention, rounded where the unit-scaled one is; as an `attention_fn`."""
    query, key, value = qkv
    if rotary:
        query, key = jus.rotary(query), jus.rotary(key)
    scale = query.shape[-1] ** -0.5
    if formats is not None and formats.fwd is not None and not formats.native:
        query, key, value = (
            jus.quantize_fwd(x, formats.fwd) for x in (query, key, value)
        )
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32
    )
    if is_causal:
        causal = jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool)
        mask = causal if mask is None else mask & causal
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits * scale).astype(value.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    if formats is not None and formats.bwd is not None and not formats.native:
        y = jus.quantize_bwd(y, formats.bwd)
    return y


def make_loss(parametrisation: Parametrisation) -> Callable[..., jax.Array]:
    """loss(logits, targets, mask=None): the same mean in nats for both."""
    if parametrisation == "unit":
        return lambda logits, targets, mask=None: jus.cross_entropy(
            logits, targets, where=mask
        )

    def regular(
        logits: jax.Array, targets: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        wide = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(wide, targets)
        if mask is None:
            return losses.mean()
        return jnp.where(mask, losses, 0).sum() / mask.sum()

    return regular
