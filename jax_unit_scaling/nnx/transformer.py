"""Attention, MLP and the Transformer block with u-muP's residual rule."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..op import AxisName
from ..ops.activation import silu_glu
from ..ops.attention import dot_product_attention, rotary
from ..ops.residual import residual_apply, transformer_residual_rule
from .depth import set_depth
from .linear import Linear, LinearGeneral, unit_normal
from .normalization import RMSNorm


@dataclasses.dataclass(frozen=True)
class _Attention:
    """`dot_product_attention` with the signature that Flax calls `attention_fn` by."""

    formats: Formats | None
    mult: float
    rotary_base: float | None
    constraint: Constraint | None

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        mask: jax.Array | None = None,
        is_causal: bool = False,
        module: Any = None,
        **_: Any,
    ) -> jax.Array:
        if module is not None:
            raise ValueError("`sow_weights` is not supported.")
        if self.rotary_base is not None:
            query, key = (rotary(x, base=self.rotary_base) for x in (query, key))
        return dot_product_attention(
            query,
            key,
            value,
            None if mask is None else mask.astype(jnp.bool_),
            is_causal=is_causal,
            mult=self.mult,
            formats=self.formats,
            constraint=self.constraint,
        )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` of unit-scaled projections and attention.

    Takes the arguments of its namesake (not yet dropout of attention weights, grouped
    heads and decoding, which are refused), and

        formats: the number formats of its projections, and of attention's inputs.
        mult: multiplies the attention logits (u-muP's alpha_attn-softmax).
        rotary_base: turns queries and keys by their positions (`rotary`), if given.
        constraint, batch_axis_name: as in `Linear`.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *sizes: int | None,
        kernel_init: nnx.Initializer = unit_normal,
        out_kernel_init: nnx.Initializer | None = None,
        kernel_metadata: Any = None,
        bias_metadata: Any = None,
        attention_fn: Callable[..., jax.Array] | None = None,
        formats: Formats | None = None,
        mult: float = 1.0,
        rotary_base: float | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        for name in ("dropout_rate", "decode", "normalize_qk"):
            if namesake.get(name):
                raise ValueError(
                    f"`{name}` is not supported yet, got {namesake[name]}."
                )
        if namesake.get("num_kv_heads") not in (None, num_heads) or sizes[2:3] not in (
            (),
            (None,),
            (num_heads,),
        ):
            raise ValueError("`num_kv_heads` is not supported yet: leave it None.")
        zeros = nnx.initializers.zeros_init()
        super().__init__(
            num_heads,
            in_features,
            *sizes,
            kernel_init=zeros,
            attention_fn=attention_fn
            or _Attention(formats, mult, rotary_base, constraint),
            rngs=rngs,
            **namesake | {"decode": False},
        )
        # The namesake builds plain projections; each gives way to a unit-scaled one.
        inits = {"out": out_kernel_init or kernel_init}
        for name in ("query", "key", "value", "out"):
            plain = getattr(self, name)
            projection = LinearGeneral(
                plain.in_features,
                plain.out_features,
                axis=plain.axis,
                use_bias=plain.use_bias,
                dtype=plain.dtype,
                param_dtype=plain.param_dtype,
                precision=plain.precision,
                promote_dtype=plain.promote_dtype,
                dot_general=plain.dot_general,
                dot_general_cls=plain.dot_general_cls,
                kernel_init=inits.get(name, kernel_init),
                kernel_metadata=kernel_metadata,
                bias_metadata=bias_metadata,
                formats=formats,
                constraint=constraint,
                batch_axis_name=batch_axis_name,
                rngs=rngs,
            )
            if plain.bias is not None and projection.bias is not None:
                projection.bias[...] = plain.bias[...]
            setattr(self, name, projection)


class MLP(nnx.Module):
    """A feed-forward layer: `down(activation(up(x), gate(x)))`, or without a gate.

    Args:
        in_features: the size of the input and of the output.
        hidden_features: the size between.
        activation: a unit-scaled function of two arrays if `gated`, else of one.
        gated: whether there is a gate.
        formats, constraint, batch_axis_name and the rest: as in `Linear`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        activation: Callable[..., jax.Array] = silu_glu,
        gated: bool = True,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        def layer(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, rngs=rngs, **linear)

        self.up = layer(in_features, hidden_features)
        self.gate = layer(in_features, hidden_features) if gated else nnx.data(None)
        self.down = layer(hidden_features, in_features)
        self.activation = activation

    def __call__(self, inputs: jax.Array) -> jax.Array:
        up = self.up(inputs)
        if self.gate is None:
            return self.down(self.activation(up))
        return self.down(self.activation(up, self.gate(inputs)))


class TransformerBlock(nnx.Module):
    """A pre-norm Transformer block, its residual weights set by u-muP's rule.

    Args:
        features: the size of the input and of the output.
        num_heads: attention heads.
        hidden_features: the MLP's size.
        index: the block's place in its stack, from 0.
        depth: the number of blocks in the stack.
        residual_rule: tau(index, layers), of residual adds: two for each block.
        is_causal: whether a position sees only those up to its own.
        mult, rotary_base: as in `MultiHeadAttention`.
        activation, gated: the MLP's.
        use_bias, formats, dtype, param_dtype, batch_axis_name: of all its layers.

    Reference: u-muP (Blake et al., 2024), appendix G.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden_features: int,
        *,
        index: int,
        depth: int,
        residual_rule: Callable[[int, int], float] | None = None,
        is_causal: bool = True,
        mult: float = 1.0,
        rotary_base: float | None = 10000.0,
        activation: Callable[..., jax.Array] = silu_glu,
        gated: bool = True,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        rule = residual_rule or transformer_residual_rule()
        self.taus = tuple(rule(2 * index + i, 2 * depth) for i in range(2))
        self.is_causal = is_causal
        linear = {"use_bias": False} | linear
        norm = {k: linear[k] for k in ("dtype", "param_dtype") if k in linear}
        # Norms have no gain: its learning rate would not transfer (u-muP, section 3).
        self.attention_norm = RMSNorm(features, use_scale=False, rngs=rngs, **norm)
        self.attention = MultiHeadAttention(
            num_heads,
            features,
            mult=mult,
            rotary_base=rotary_base,
            rngs=rngs,
            **linear,
        )
        self.mlp_norm = RMSNorm(features, use_scale=False, rngs=rngs, **norm)
        self.mlp = MLP(
            features,
            hidden_features,
            activation=activation,
            gated=gated,
            rngs=rngs,
            **linear,
        )
        set_depth(self, 2 * depth)

    def __call__(
        self, inputs: jax.Array, *, mask: jax.Array | None = None
    ) -> jax.Array:
        def attend(x: jax.Array) -> jax.Array:
            normed = self.attention_norm(x)
            return self.attention(normed, mask=mask, is_causal=self.is_causal)

        x = residual_apply(attend, inputs, tau=self.taus[0])
        return residual_apply(lambda x: self.mlp(self.mlp_norm(x)), x, tau=self.taus[1])
