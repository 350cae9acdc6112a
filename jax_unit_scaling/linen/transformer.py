"""Attention, MLP, and Transformer blocks with u-muP's residual rule."""

import functools as ft
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..formats import BlockFormats
from ..layers.attention import SOW_WEIGHTS, Attention, Cache, projection_formats
from ..layers.linear import options_of
from ..layers.transformer import (
    ResidualRule,
    block_taus,
    feed_forward,
    pre_norm,
)
from ..op import AxisName, axis_names, check_bound
from ..ops.activation import silu_glu
from .linear import (
    Checked,
    Dense,
    DenseGeneral,
    ScaledBlock,
    fields_of,
    unit_normal,
)
from .metadata import at_depth
from .names import named
from .normalization import Dropout, LayerNorm, RMSNorm


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention, ScaledBlock):
    """`flax.linen.MultiHeadDotProductAttention` of unit-scaled projections and
    attention.

    Takes all arguments of its namesake (with an `attention_fn` of your own, those from
    `mult` to `is_causal` are without effect) and, as keywords,

        num_kv_heads: heads of keys and values, if fewer than those of queries.
        mult: multiplies the attention logits (u-muP's alpha_attn-softmax).
        rotary_base: turns queries and keys by their positions (`rotary`), if given.
        local_window_size: as in `dot_product_attention`.
        length: the length of training, as in `dot_product_attention`. Give it where
            the model also sees other lengths; without it a call's own counts, and in
            decoding the cache's.
        is_causal: whether a position sees only those up to its own. The factors are
            then those of causal attention, in decoding too; with a causal mask alone
            those of attention to all keys. Decode as in training.
        implementation: as in `dot_product_attention`: "cudnn" is faster on a GPU.
        model_axis_name: axes over which the heads are split, inside `shard_map`.
        formats: the number formats of its projections, and of attention's inputs; for
            some alone, `BlockFormats`.
        constraint, batch_axis_name: as in `Dense`.

    Its softmax is in float32 at least, whatever `force_fp32_for_softmax` says, and
    einsums for its inside need an `attention_fn` that takes them. Decoding takes any
    number of tokens at a time: the output does not depend on how a sequence is cut. A
    position behind the cache's end is an error, and under `jit` NaN.

    The gradient of a value's bias (`use_bias`) grows with the length as in
    `jax_unit_scaling.nnx.MultiHeadAttention`, which says by what law.
    """

    kernel_init: nn.initializers.Initializer = unit_normal
    attention_fn: Callable[..., jax.Array] | None = None  # type: ignore[assignment]
    num_kv_heads: int | None = None
    mult: float = 1.0
    rotary_base: float | None = None
    local_window_size: int | tuple[int, int] | None = None
    length: int | None = None
    is_causal: bool = False
    implementation: str = "xla"
    model_axis_name: AxisName | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        inputs_kv: jax.Array | None = None,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
    ) -> jax.Array:
        check_bound("model_axis_name", named(self).model_axis_name)
        inputs = _sources(inputs_q, inputs_k, inputs_v, inputs_kv)
        query, key, value = self._project(*inputs)
        if self.dropout_rate > 0.0:
            deterministic = nn.merge_param(
                "deterministic", self.deterministic, deterministic
            )
            if not deterministic and dropout_rng is None:
                dropout_rng = self.make_rng("dropout")
        else:
            deterministic = True
        options = {
            "mask": mask,
            "dropout_rng": dropout_rng,
            "deterministic": deterministic,
            **fields_of(self, "dropout_rate", "broadcast_dropout", "precision"),
        }
        attend = self._attend if self.attention_fn is None else self._attend_by_fn
        y = attend(query, key, value, sow_weights, options)
        return self._dense(
            "out",
            self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
        )(y)

    def _project(
        self, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        features = self.qkv_features or q.shape[-1]
        kv_heads = self.num_kv_heads or self.num_heads
        if features % self.num_heads or self.num_heads % kv_heads:
            raise ValueError(
                "`num_heads` must divide `qkv_features` and be a multiple of "
                f"`num_kv_heads`, got {self.num_heads}, {features} and {kv_heads}."
            )
        size = features // self.num_heads
        query = self._dense("query", (self.num_heads, size))(q)
        key = self._dense("key", (kv_heads, size))(k)
        if self.normalize_qk:
            query, key = (
                LayerNorm(
                    name=name,
                    use_bias=False,
                    # Its gain is shared by the heads, which are part of its batch.
                    batch_axis_name=axis_names(self.batch_axis_name)
                    + axis_names(self.model_axis_name),
                    **fields_of(self, "dtype", "param_dtype"),
                )(x)
                for name, x in (("query_ln", query), ("key_ln", key))
            )
        return query, key, self._dense("value", (kv_heads, size))(v)

    def _dense(self, name: str, features: Any, **more: Any) -> DenseGeneral:
        kind = "out" if name == "out" else "qkv"
        side = "in_axis_name" if name == "out" else "out_axis_name"
        split: dict[str, Any] = {side: self.model_axis_name}
        names = ("use_bias", "dtype", "param_dtype", "precision")
        inits = fields_of(self, "kernel_init", "bias_init")
        return DenseGeneral(
            features,
            name=name,
            dot_general=getattr(self, f"{kind}_dot_general"),
            dot_general_cls=getattr(self, f"{kind}_dot_general_cls"),
            **split,
            **fields_of(self, *names),
            **inits | more,
            **options_of(self) | {"formats": projection_formats(self.formats, name)},
        )

    def _attend(
        self, query: Any, key: Any, value: Any, sow_weights: bool, options: Any
    ) -> jax.Array:
        if sow_weights:
            raise ValueError(SOW_WEIGHTS)
        if self.qk_attn_weights_einsum_cls or self.attn_weights_value_einsum_cls:
            raise ValueError(
                "`qk_attn_weights_einsum_cls` and `attn_weights_value_einsum_cls` must "
                "be None: an `attention_fn` of your own takes them."
            )
        own = ("mult", "rotary_base", "local_window_size", "length", "implementation")
        attention = Attention(
            formats=BlockFormats.of(self.formats).attention,
            constraint=self.constraint,
            **fields_of(self, *own),
        )
        if not self.decode:
            return attention.attend(
                query, key, value, is_causal=self.is_causal, **options
            )[0]
        initialised = self.has_variable("cache", "cached_key")
        zeros = (jnp.zeros_like(key), jnp.zeros_like(value), jnp.array(0, jnp.int32))
        names = ("cached_key", "cached_value", "cache_index")
        slots = [
            self.variable("cache", name, lambda zero=zero: zero)
            for name, zero in zip(names, zeros, strict=True)
        ]
        cache = Cache(*(slot.value for slot in slots)) if initialised else None
        y, cache = attention.attend(
            query, key, value, cache, is_causal=self.is_causal, **options
        )
        for slot, new in zip(slots, cache or (), strict=cache is not None):
            slot.value = new
        return y

    def _attend_by_fn(
        self, query: Any, key: Any, value: Any, sow_weights: bool, options: Any
    ) -> jax.Array:
        """A function of the user's own, called as the namesake calls it."""
        if self.decode:
            raise ValueError(
                "`decode` must be False with an `attention_fn` of your own: the cache "
                "is part of this library's."
            )
        fn: Any = self.attention_fn
        classes = ("qk_attn_weights_einsum", "attn_weights_value_einsum")
        made = {name: getattr(self, f"{name}_cls") for name in classes}
        options = {
            **options,
            **fields_of(self, "dtype", "force_fp32_for_softmax"),
            **{name: made[name] and made[name]() for name in classes},
        }
        known = inspect.signature(fn).parameters
        options = {name: x for name, x in options.items() if name in known}
        if sow_weights:
            options["module"] = self
        return fn(query, key, value, **options)


def _sources(
    q: jax.Array, k: jax.Array | None, v: jax.Array | None, kv: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What queries, keys and values are made of."""
    if kv is not None:
        if k is not None or v is not None:
            raise ValueError(
                "`inputs_kv` must be None where `inputs_k` or `inputs_v` is given."
            )
        return q, kv, kv
    if k is None:
        if v is not None:
            raise ValueError("`inputs_k` must be given where `inputs_v` is.")
        k = q
    return q, k, k if v is None else v


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` under its other name."""


class MLP(ScaledBlock):
    """A feed-forward layer: `down(activation(up(x), gate(x)))`, or without a gate.

    Attributes:
        hidden_features: the size between.
        activation: a unit-scaled function of two arrays if `gated`, else of one.
        gated: whether there is a gate.
        model_axis_name: axes over which the hidden features are split, inside
            `shard_map`.
        formats: the number formats of its products; for some alone, `BlockFormats`.
        constraint, batch_axis_name and the rest: as in `Dense`.
    """

    hidden_features: int
    activation: Callable[..., jax.Array] = silu_glu
    gated: bool = True
    model_axis_name: AxisName | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = unit_normal
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        check_bound("model_axis_name", named(self).model_axis_name)
        names = ("use_bias", "dtype", "param_dtype", "precision")
        inits = ("kernel_init", "bias_init")
        each = BlockFormats.of(self.formats)

        def layer(name: str, features: int) -> Dense:
            side = "in_axis_name" if name == "down" else "out_axis_name"
            split: dict[str, Any] = {side: self.model_axis_name}
            return Dense(
                features,
                name=name,
                **split,
                **fields_of(self, *names, *inits),
                **options_of(self)
                | {"formats": each.mlp_out if name == "down" else each.mlp_in},
            )

        return feed_forward(
            layer("up", self.hidden_features),
            layer("gate", self.hidden_features) if self.gated else None,
            layer("down", inputs.shape[-1]),
            inputs,
            activation=self.activation,
        )


class TransformerBlock(ScaledBlock):
    """A Transformer block of an attention and an MLP branch.

    Attributes:
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
        attention: makes the attention; give options of `MultiHeadDotProductAttention`
            by `functools.partial(MultiHeadDotProductAttention, num_kv_heads=2)`.
        is_causal: whether a position sees only those up to its own.
        mult, rotary_base, decode: as in `MultiHeadDotProductAttention`.
        activation, gated: the MLP's.
        dropout_rate: what is dropped of each branch's output.
        deterministic: whether nothing is; a call's own goes first.
        use_bias, dtype, param_dtype, kernel_init, formats, constraint,
            batch_axis_name: of all its layers.
        model_axis_name: axes over which attention's heads and the MLP's hidden features
            are split, inside `shard_map`. Elsewhere every device holds all features:
            there is one `psum` at the end of each branch.

    Reference: u-muP (Blake et al., 2024), appendix G.
    """

    num_heads: int
    hidden_features: int
    index: int
    depth: int
    residual_rule: ResidualRule | None = None
    placement: Callable[..., jax.Array] = pre_norm
    norm: Callable[..., Any] = ft.partial(RMSNorm, use_scale=False)
    attention: Callable[..., Any] = MultiHeadDotProductAttention
    is_causal: bool = True
    mult: float = 1.0
    rotary_base: float | None = 10000.0
    decode: bool = False
    activation: Callable[..., jax.Array] = silu_glu
    gated: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = unit_normal
    model_axis_name: AxisName | None = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """`mask` and `deterministic` are the layers' own."""
        block = ft.partial(_block, mask=mask, deterministic=deterministic)
        return at_depth(block, 2 * self.depth)(self, inputs)


def _block(
    block: TransformerBlock,
    inputs: jax.Array,
    *,
    mask: jax.Array | None,
    deterministic: bool | None,
) -> jax.Array:
    if deterministic is None:
        deterministic = block.deterministic
    dropout = Dropout(block.dropout_rate, name="dropout")
    still = block.dropout_rate == 0.0 or deterministic
    norm = ft.partial(
        block.norm, **fields_of(block, "dtype", "param_dtype", "batch_axis_name")
    )
    names = ("use_bias", "dtype", "param_dtype", "kernel_init", "model_axis_name")
    shared = fields_of(block, *names) | options_of(block)
    attention = block.attention(
        block.num_heads,
        name="attention",
        **fields_of(block, "mult", "rotary_base", "decode", "is_causal"),
        **shared,
    )
    own = fields_of(block, "hidden_features", "activation", "gated")
    mlp = MLP(name="mlp", **own, **shared)

    def attend(x: jax.Array) -> jax.Array:
        y = attention(x, mask=mask, deterministic=deterministic)
        return dropout(y, deterministic=still)

    def feed(x: jax.Array) -> jax.Array:
        return dropout(mlp(x), deterministic=still)

    taus = block_taus(block.residual_rule, block.index, block.depth)
    x = block.placement(norm(name="attention_norm"), attend, inputs, tau=taus[0])
    return block.placement(norm(name="mlp_norm"), feed, x, tau=taus[1])


class TransformerStack(Checked):
    """Transformer blocks in a row, each with the residual weights of its place.

    A Python loop, not a scan over stacked parameters: each block keeps its own. (For a
    scan `residual_apply` takes the weight of each block from an array.)

    Attributes:
        num_heads, hidden_features: as in `TransformerBlock`.
        depth: the number of blocks.
        remat: computes a block's activations again in the backward pass, instead of
            keeping them.
        block: the further options of each `TransformerBlock`.
    """

    num_heads: int
    hidden_features: int
    depth: int
    remat: bool = False
    block: Mapping[str, Any] | None = None

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """`mask` and `deterministic` are each block's own."""
        kind = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        # As a field: `nn.remat` would trace an argument.
        options: dict[str, Any] = dict(self.block or {})
        if deterministic is not None:
            options["deterministic"] = deterministic
        x = inputs
        for i in range(self.depth):
            block = kind(
                self.num_heads,
                self.hidden_features,
                i,
                self.depth,
                name=f"blocks_{i}",
                **options,
            )
            x = block(x, mask=mask)
        return x
