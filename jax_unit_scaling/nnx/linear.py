"""Linear layers and embeddings, drop-in for their `flax.nnx` namesakes."""

import functools as ft
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from ..arguments import checked
from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..layers.embedding import attend, look_up
from ..layers.linear import (
    apply_linear,
    bias_of_batch,
    broadcast_bias,
    with_factor,
)
from ..op import AxisName
from ..ops.contraction import einsum_fan_in, einsum_linear, linear, linear_readout
from ..parameters import Role, role_metadata

# What unit scaling starts from: every weight has unit variance.
unit_normal = nnx.initializers.normal(1.0)


class ScaledProduct(nnx.Module):
    """A mixin: the arguments that a layer with a product has beside its namesake's.

    formats: the number formats of its product, simulated or native.
    constraint: makes the output's and the input's factor agree.
    batch_axis_name: axes over which the batch is split, inside `shard_map`, `pmap` or a
        `vmap` over examples.
    output_scale: multiplies the output, before the bias, and the input's cotangent, but
        not the kernel's: a weight's own scale, which `convert` keeps here.
    """

    @checked
    def __init__(
        self,
        *sizes: Any,
        formats: Formats | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        output_scale: float = 1.0,
        **namesake: Any,
    ):
        # `LoRA` has checked it: a function is more than Flax's annotation says.
        checked(super().__init__, but=("base_module",))(*sizes, **namesake)
        self.formats = formats
        self.constraint = constraint
        self.batch_axis_name = batch_axis_name
        self.output_scale = output_scale


class SplitProduct(ScaledProduct):
    """`ScaledProduct` of features that may be split.

    in_axis_name, out_axis_name: axes over which the input and the output features are
        split, inside `shard_map`: see `linear`. The sizes stay those of the whole; the
        layer is built outside, and its parameters come in as pieces.
    """

    @checked
    def __init__(
        self,
        *sizes: Any,
        in_axis_name: AxisName | None = None,
        out_axis_name: AxisName | None = None,
        **more: Any,
    ):
        super().__init__(*sizes, **more)
        self.in_axis_name = in_axis_name
        self.out_axis_name = out_axis_name


class _Linear(SplitProduct):
    """What every linear layer adds to its namesake: weights, promotion, and one call
    into ops."""

    _bias_role: Role = "bias"

    @checked
    def __init__(
        self,
        *sizes: Any,
        role: dict[str, Any],
        kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
        **more: Any,
    ):
        super().__init__(
            *sizes,
            kernel_init=kernel_init,
            kernel_metadata=role | dict(kernel_metadata or {}),
            bias_metadata=role_metadata(self._bias_role) | dict(bias_metadata or {}),
            **more,
        )

    def _apply(self: Any, op: Any, inputs: jax.Array, out_sharding: Any) -> jax.Array:
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = self.promote_dtype(
            (inputs, self.kernel[...], bias), dtype=self.dtype
        )
        return apply_linear(
            self,
            op,
            inputs,
            kernel,
            bias,
            preferred_element_type=self.preferred_element_type,
            out_sharding=out_sharding,
            in_axis_name=self.in_axis_name,
            out_axis_name=self.out_axis_name,
        )


class Linear(_Linear, nnx.Linear):
    """`flax.nnx.Linear` with unit-normal weights, computed by `linear`.

    Takes all arguments of its namesake (`dot_general` computes the plain product) and

        formats: the number formats of its product, simulated or native.
        constraint: makes the output's and the input's factor agree.
        batch_axis_name: axes over which the batch is split, inside `shard_map`, `pmap`
            or a `vmap` over examples.
        in_axis_name, out_axis_name: axes over which the input and the output features
            are split, inside `shard_map`: see `linear`. The sizes stay those of the
            whole; the layer is built outside, and its parameters come in as pieces.
        output_scale: multiplies the output, before the bias, and the input's cotangent,
            but not the kernel's: a weight's own scale, which `convert` keeps here.
    """

    _op: Any = staticmethod(linear)
    _role: Role = "weight"

    @checked
    def __init__(
        self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **more: Any
    ):
        role = role_metadata(self._role, in_features, out_features)
        super().__init__(in_features, out_features, role=role, rngs=rngs, **more)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        product = with_factor(self.dot_general, self.output_scale)
        op = ft.partial(self._op, dot_general=product)
        return self._apply(op, inputs, out_sharding)


class LinearReadout(Linear):
    """`Linear` for a model's logits, computed by `linear_readout`: 1 / in forward.

    Unconstrained by default, as it lies at a cut-edge.
    """

    _op = staticmethod(linear_readout)
    _role: Role = "output"
    _bias_role: Role = "output"

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        constraint: Constraint | None = None,
        rngs: nnx.Rngs,
        **more: Any,
    ):
        super().__init__(
            in_features, out_features, constraint=constraint, rngs=rngs, **more
        )


class LinearGeneral(_Linear, nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` with unit-normal weights, computed by `linear`.

    Takes the further arguments of `Linear`.
    """

    @checked
    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        rngs: nnx.Rngs,
        **more: Any,
    ):
        sizes = (in_features, out_features)
        fans = (n if isinstance(n, int) else math.prod(n) for n in sizes)
        role = role_metadata("weight", *fans)
        super().__init__(*sizes, role=role, rngs=rngs, **more)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        product = self.dot_general_cls() if self.dot_general_cls else self.dot_general
        product = with_factor(product or lax.dot_general, self.output_scale)
        batch_axes = len(self.batch_axis)

        def op(
            x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **options: Any
        ) -> jax.Array:
            if bias is not None:
                free = x.ndim - batch_axes - len(self.axis)
                bias = bias_of_batch(bias, free, batch_axes)
            return linear(
                x,
                kernel,
                bias,
                axis=self.axis,
                batch_axes=batch_axes,
                dot_general=product,
                **options,
            )

        return self._apply(op, inputs, out_sharding)


class Einsum(_Linear, nnx.Einsum):
    """`flax.nnx.Einsum` with unit-normal weights, computed by `einsum_linear`.

    Takes the further arguments of `Linear`.
    """

    @checked
    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        rngs: nnx.Rngs,
        **more: Any,
    ):
        super().__init__(
            einsum_str,
            tuple(kernel_shape),
            None if bias_shape is None else tuple(bias_shape),
            role=role_metadata("weight", einsum_fan_in(einsum_str, kernel_shape)),
            rngs=rngs,
            **more,
        )

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        subscripts = (einsum_str or self.einsum_str).replace(" ", "")
        product = with_factor(self.einsum_op, self.output_scale)

        def op(
            x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **options: Any
        ) -> jax.Array:
            if bias is not None:
                shape = self._infer_broadcasted_bias_shape(subscripts, x, kernel)
                bias = broadcast_bias(bias, tuple(self.bias_shape or ()), shape)
            return einsum_linear(subscripts, x, kernel, bias, einsum=product, **options)

        return self._apply(op, inputs, out_sharding)


class Embed(nnx.Embed):
    """`flax.nnx.Embed` with a unit-normal table, computed by `embedding`.

    `batch_axis_name` and `output_scale`: as in `Linear`. And

        tied: the positions of a (global) batch, which allows `attend`.
        logits_scale: multiplies what `attend` gives, as `output_scale` the look-up.
        vocabulary_axis_name: axes over which the rows of the table are split, inside
            `shard_map`: see `embedding`. The logits of `attend` are then split by
            class, as `cross_entropy` takes them with `class_axis_name`.

    Factors: s = `output_scale` forward and (vocabulary / ids)^1/2 for the table; of a
    tied one those of `layers/embedding.py`, where both gradients of the table are true
    up to the same constant and their sum has unit scale. Without `tied` the table has
    `embedding`'s own factor, and `attend` is refused: a `LinearReadout` gives the
    query, and all that is before it, cotangents of unit scale.
    """

    @checked
    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: nnx.Initializer = unit_normal,
        embedding_metadata: Mapping[str, Any] | None = None,
        tied: int | None = None,
        batch_axis_name: AxisName | None = None,
        vocabulary_axis_name: AxisName | None = None,
        output_scale: float = 1.0,
        logits_scale: float = 1.0,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        checked(super().__init__)(
            num_embeddings,
            features,
            embedding_init=embedding_init,
            embedding_metadata=role_metadata("weight", features)
            | dict(embedding_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.tied = tied
        self.batch_axis_name = batch_axis_name
        self.output_scale = output_scale
        self.logits_scale = logits_scale
        self.vocabulary_axis_name = vocabulary_axis_name

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        (table,) = self.promote_dtype(
            (self.embedding[...],), dtype=self.dtype, inexact=False
        )
        return look_up(self, table, inputs, out_sharding=out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The logits [..., vocabulary] of a query [..., features], with a tied table.

        Raises:
            ValueError: without `tied`.
        """
        query, table = self.promote_dtype(
            (query, self.embedding[...]), dtype=self.dtype
        )
        return attend(self, query, table, out_sharding=out_sharding)
