"""Attention, MLP, and Transformer blocks with u-muP's residual rule."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..arguments import checked
from ..constraints import Constraint, to_output_scale
from ..formats import BlockFormats, Formats
from ..layers.attention import SOW_WEIGHTS, Attention, Cache, projection_formats
from ..layers.transformer import block_taus, feed_forward, pre_norm
from ..op import AxisName, axis_names, check_bound
from ..ops.activation import silu_glu
from .depth import set_depth
from .linear import Linear, LinearGeneral, unit_normal
from .normalization import Dropout, LayerNorm, RMSNorm


class _Attention(Attention):
    """`Attention` with the signature that Flax calls `attention_fn` by."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        module: Any,
        dtype: Any = None,
        **options: Any,
    ) -> jax.Array:
        """`module`, where given, is the one whose cache to decode with."""
        cache = None if module is None else _cache(module)
        y, cache = self.attend(query, key, value, cache, **options)
        if cache is not None:
            module.cached_key[...] = cache.key
            module.cached_value[...] = cache.value
            module.cache_index[...] = cache.filled
        return y


def with_constraint(
    attention_fn: Callable[..., jax.Array], constraint: Constraint | None
) -> Callable[..., jax.Array]:
    """The attention of a `MultiHeadAttention` under another constraint than that of its
    projections; a user's own attention has none."""
    if not isinstance(attention_fn, _Attention):
        return attention_fn
    return dataclasses.replace(attention_fn, constraint=constraint)


def _cache(module: Any) -> Cache:
    if module.cache_index is None:
        raise ValueError("`decode` needs a cache: call `init_cache` first.")
    return Cache(
        module.cached_key[...], module.cached_value[...], module.cache_index[...]
    )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` of unit-scaled projections and attention.

    Takes all arguments of its namesake (with an `attention_fn` of your own, those from
    `mult` to `length` are without effect) and

        formats: the number formats of its projections, and of attention's inputs; for
            some alone, `BlockFormats`.
        mult: multiplies the attention logits (u-muP's alpha_attn-softmax).
        rotary_base: turns queries and keys by their positions (`rotary`), if given.
        local_window_size: as in `dot_product_attention`.
        length: the length of training, as in `dot_product_attention`. Give it where
            the model also sees other lengths; without it a call's own counts, and in
            decoding the cache's.
        implementation: as in `dot_product_attention`: "cudnn" is faster on a GPU.
        constraint, batch_axis_name: as in `Linear`.
        model_axis_name: axes over which the heads are split, inside `shard_map`.

    Values' weights average out over a sequence; their bias (`use_bias`, as in Flax, is
    True) does not, as it is the same at every key. With attention's factor f =
    `dot_product_attention.factors(...).fwd`, about length^1/2 / 1.6 for long sequences
    that see all keys, it adds f bias to attention's output, and its gradient has the
    rms f (num_heads / num_kv_heads)^1/2, where all others start at 1 or below. Adam's
    updates do not see it; for SGD, or lengths of many thousands, pass `use_bias=False`,
    as `TransformerBlock` does. No factor of the bias alone would change the forward
    part, and f belongs to a call (its lengths, mask), not to a layer. The key's bias
    has no gradient: softmax does not see it.

    Decoding takes any number of tokens at a time, a whole prompt as well as one token:
    the output does not depend on how a sequence is cut, but for a query from which a
    `mask` hides all keys. It is that of the whole sequence, if `length` is given or the
    cache is as long as that, and if a call has `is_causal` as in training: factors are
    those of causal attention with it, and with a causal `mask` alone those of attention
    to all keys. A position behind the cache's end is an error, and under `jit` NaN.
    """

    @checked
    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *sizes: Any,
        kernel_init: nnx.Initializer = unit_normal,
        out_kernel_init: nnx.Initializer | None = None,
        attention_fn: Callable[..., jax.Array] | None = None,
        formats: Formats | BlockFormats | None = None,
        mult: float = 1.0,
        rotary_base: float | None = None,
        local_window_size: int | tuple[int, int] | None = None,
        length: int | None = None,
        implementation: str = "xla",
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        model_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        checked(super().__init__)(
            num_heads,
            in_features,
            *sizes,
            kernel_init=nnx.initializers.zeros_init(),
            attention_fn=attention_fn
            or _Attention(
                BlockFormats.of(formats).attention,
                mult,
                rotary_base,
                local_window_size,
                length,
                constraint,
                implementation,
            ),
            rngs=rngs,
            **namesake,
        )
        self.model_axis_name = model_axis_name
        # The namesake builds plain layers; each gives way to a unit-scaled one.
        inits = {"out": out_kernel_init or kernel_init}
        for name in ("query", "key", "value", "out"):
            plain = getattr(self, name)
            heads_first = name == "out"
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
                kernel_metadata=plain.kernel.get_metadata(),
                bias_metadata=plain.bias and plain.bias.get_metadata(),
                formats=projection_formats(formats, name),
                constraint=constraint,
                batch_axis_name=batch_axis_name,
                in_axis_name=model_axis_name if heads_first else None,
                out_axis_name=None if heads_first else model_axis_name,
                rngs=rngs,
            )
            if plain.bias is not None and projection.bias is not None:
                projection.bias[...] = plain.bias[...]
            setattr(self, name, projection)
        for name in ("query_ln", "key_ln") if self.normalize_qk else ():
            plain = getattr(self, name)
            norm = LayerNorm(
                plain.num_features,
                use_bias=False,
                dtype=plain.dtype,
                param_dtype=plain.param_dtype,
                promote_dtype=plain.promote_dtype,
                scale_metadata=plain.scale.get_metadata(),
                # Its gain is shared by the heads, which are part of its batch.
                batch_axis_name=axis_names(batch_axis_name)
                + axis_names(model_axis_name),
                rngs=rngs,
            )
            setattr(self, name, norm)

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        sow_weights: bool = False,
        decode: bool | None = None,
        **namesake: Any,
    ) -> jax.Array:
        check_bound("model_axis_name", self.model_axis_name)
        decode = bool(self.decode if decode is None else decode)
        if isinstance(self.attention_fn, _Attention):
            if sow_weights:
                raise ValueError(SOW_WEIGHTS)
            # The namesake decodes one token at a time, and then gives `attention_fn`
            # no positions. So ours decodes, and is handed the module, in the one way
            # there is, for its cache.
            decode, sow_weights = False, decode
        return super().__call__(
            inputs_q,
            inputs_k,
            inputs_v,
            sow_weights=sow_weights,
            decode=decode,
            **namesake,
        )


class MLP(nnx.Module):
    """A feed-forward layer: `down(activation(up(x), gate(x)))`, or without a gate.

    Args:
        in_features: the size of the input and of the output.
        hidden_features: the size between.
        activation: a unit-scaled function of two arrays if `gated`, else of one.
        gated: whether there is a gate.
        model_axis_name: axes over which the hidden features are split, inside
            `shard_map`.
        formats: the number formats of its products; for some alone, `BlockFormats`.
        constraint, batch_axis_name and the rest: as in `Linear`.
    """

    @checked
    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        activation: Callable[..., jax.Array] = silu_glu,
        gated: bool = True,
        model_axis_name: AxisName | None = None,
        formats: Formats | BlockFormats | None = None,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        each = BlockFormats.of(formats)

        def layer() -> Linear:
            return Linear(
                in_features,
                hidden_features,
                out_axis_name=model_axis_name,
                formats=each.mlp_in,
                rngs=rngs,
                **linear,
            )

        self.up = layer()
        self.gate = layer() if gated else nnx.data(None)
        self.down = Linear(
            hidden_features,
            in_features,
            in_axis_name=model_axis_name,
            formats=each.mlp_out,
            rngs=rngs,
            **linear,
        )
        self.activation = activation
        self.model_axis_name = model_axis_name

    def __call__(self, inputs: jax.Array) -> jax.Array:
        check_bound("model_axis_name", self.model_axis_name)
        return feed_forward(
            self.up, self.gate, self.down, inputs, activation=self.activation
        )


class TransformerBlock(nnx.Module):
    """A Transformer block of an attention and an MLP branch.

    Args:
        features: the size of the input and of the output.
        num_heads: attention heads.
        hidden_features: the MLP's size.
        index: the block's place in its stack, from 0.
        depth: the number of blocks in the stack.
        residual_rule: tau(index, layers), of residual adds: two for each block. By
            default u-muP's.
        placement: where the norm of a branch is: `pre_norm`, `post_norm`,
            `branch_norm`, or your own function of that signature.
        norm: makes a norm: `RMSNorm`, `LayerNorm`, or a partial of one. By default an
            RMS norm without a gain, whose learning rate would not transfer (u-muP,
            section 3).
        attention: makes the attention; give options of `MultiHeadAttention` by
            `functools.partial(MultiHeadAttention, num_kv_heads=2)`.
        is_causal: whether a position sees only those up to its own.
        mult, rotary_base: as in `MultiHeadAttention`.
        activation, gated: the MLP's.
        dropout_rate: what is dropped of each branch's output.
        use_bias, formats, dtype, param_dtype, batch_axis_name: of all its layers.
        model_axis_name: axes over which attention's heads and the MLP's hidden features
            are split, inside `shard_map`. Elsewhere every device holds all features:
            there is one `psum` at the end of each branch.

    Reference: u-muP (Blake et al., 2024), appendix G.
    """

    @checked
    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden_features: int,
        *,
        index: int,
        depth: int,
        residual_rule: Callable[[int, int], float] | None = None,
        placement: Callable[..., jax.Array] = pre_norm,
        norm: Callable[..., Any] | None = None,
        attention: Callable[..., Any] = MultiHeadAttention,
        is_causal: bool = True,
        mult: float = 1.0,
        rotary_base: float | None = 10000.0,
        activation: Callable[..., jax.Array] = silu_glu,
        gated: bool = True,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        self.taus = block_taus(residual_rule, index, depth)
        self.placement = placement
        self.is_causal = is_causal
        linear = {"use_bias": False} | linear
        shared = ("dtype", "param_dtype", "batch_axis_name")
        norm = ft.partial(
            norm or ft.partial(RMSNorm, use_scale=False),
            **{k: linear[k] for k in shared if k in linear},
        )
        self.attention_norm = norm(features, rngs=rngs)
        self.attention = attention(
            num_heads,
            features,
            mult=mult,
            rotary_base=rotary_base,
            rngs=rngs,
            **linear,
        )
        self.mlp_norm = norm(features, rngs=rngs)
        self.mlp = MLP(
            features,
            hidden_features,
            activation=activation,
            gated=gated,
            rngs=rngs,
            **linear,
        )
        self.dropout = Dropout(dropout_rate, rngs=rngs if dropout_rate else None)
        set_depth(self, 2 * depth)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        decode: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """`mask`, `deterministic`, `decode` and `rngs` are the layers' own."""

        def dropped(y: jax.Array) -> jax.Array:
            return self.dropout(y, deterministic=deterministic, rngs=rngs)

        def attend(x: jax.Array) -> jax.Array:
            y = self.attention(
                x,
                mask=mask,
                is_causal=self.is_causal,
                deterministic=deterministic,
                decode=decode,
                rngs=rngs,
            )
            return dropped(y)

        def feed_forward(x: jax.Array) -> jax.Array:
            return dropped(self.mlp(x))

        attend_tau, mlp_tau = self.taus
        x = self.placement(self.attention_norm, attend, inputs, tau=attend_tau)
        return self.placement(self.mlp_norm, feed_forward, x, tau=mlp_tau)

    def init_cache(
        self, input_shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> None:
        """Makes room to `decode` inputs of this shape, [batch, length, features]."""
        self.attention.init_cache(input_shape, dtype)


class TransformerStack(nnx.Module):
    """Transformer blocks in a row, each with the residual weights of its place.

    A Python loop, not a scan over stacked parameters: each block keeps its own. (For a
    scan `residual_apply` takes the weight of each block from an array.)

    Args:
        features, num_heads, hidden_features: as in `TransformerBlock`.
        depth: the number of blocks.
        remat: computes a block's activations again in the backward pass, instead of
            keeping them.
        block: the further options of each `TransformerBlock`.
    """

    @checked
    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden_features: int,
        *,
        depth: int,
        remat: bool = False,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.remat = remat
        self.blocks = nnx.List(
            TransformerBlock(
                features,
                num_heads,
                hidden_features,
                index=i,
                depth=depth,
                rngs=rngs,
                **block,
            )
            for i in range(depth)
        )

    def __call__(
        self, inputs: jax.Array, *, rngs: nnx.Rngs | None = None, **call: Any
    ) -> jax.Array:
        """`rngs` and `call` are the keyword arguments of each block."""

        # `rngs` is an argument: they count what is drawn, which `nnx.remat` refuses to
        # see changed from outside of its trace.
        def apply(
            block: TransformerBlock, x: jax.Array, rngs: nnx.Rngs | None
        ) -> jax.Array:
            return block(x, rngs=rngs, **call)

        apply = nnx.remat(apply) if self.remat else apply
        x = inputs
        for block in self.blocks:
            x = apply(block, x, rngs)
        return x

    def init_cache(
        self, input_shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> None:
        """Makes room to `decode` inputs of this shape, [batch, length, features]."""
        for block in self.blocks:
            block.init_cache(input_shape, dtype)
