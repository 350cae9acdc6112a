"""Linear layers and embeddings, drop-in for their `flax.nnx` namesakes."""

import functools as ft
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..layers.linear import apply_linear, times
from ..op import AxisName
from ..ops.contraction import einsum_fan_in, einsum_linear, linear, linear_readout
from ..ops.embedding import embedding
from ..parameters import Role, role_metadata
from ..scale import scale_bwd, scale_fwd

# What unit scaling starts from: every weight has unit variance.
unit_normal = nnx.initializers.normal(1.0)


class Linear(nnx.Linear):
    """`flax.nnx.Linear` with unit-normal weights, computed by `linear`.

    Takes all arguments of its namesake (`dot_general` computes the plain product) and

        formats: the number formats of its product, simulated.
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
    _bias_role: Role = "bias"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Any = None,
        bias_metadata: Any = None,
        formats: Formats | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        in_axis_name: AxisName | None = None,
        out_axis_name: AxisName | None = None,
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        super().__init__(
            in_features,
            out_features,
            kernel_init=kernel_init,
            kernel_metadata=role_metadata(self._role, in_features, out_features)
            | dict(kernel_metadata or {}),
            bias_metadata=role_metadata(self._bias_role) | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.formats = formats
        self.constraint = constraint
        self.batch_axis_name = batch_axis_name
        self.in_axis_name = in_axis_name
        self.out_axis_name = out_axis_name
        self.output_scale = output_scale

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        product = times(self.dot_general, self.output_scale)
        op = ft.partial(self._op, dot_general=product)
        return _apply(self, op, inputs, out_sharding)


class LinearReadout(Linear):
    """`Linear` for a model's logits, computed by `linear_readout`: 1 / in forward.

    Unconstrained by default, as it lies at a cut-edge.
    """

    _op = staticmethod(linear_readout)
    _role: Role = "output"
    _bias_role: Role = "output"

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


class LinearGeneral(nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` with unit-normal weights, computed by `linear`.

    Takes the further arguments of `Linear`.
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Any = None,
        bias_metadata: Any = None,
        formats: Formats | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        in_axis_name: AxisName | None = None,
        out_axis_name: AxisName | None = None,
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        fans = (
            n if isinstance(n, int) else math.prod(n)
            for n in (in_features, out_features)
        )
        super().__init__(
            in_features,
            out_features,
            kernel_init=kernel_init,
            kernel_metadata=role_metadata("weight", *fans)
            | dict(kernel_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.formats = formats
        self.constraint = constraint
        self.batch_axis_name = batch_axis_name
        self.in_axis_name = in_axis_name
        self.out_axis_name = out_axis_name
        self.output_scale = output_scale

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        product = self.dot_general_cls() if self.dot_general_cls else self.dot_general
        product = times(product or lax.dot_general, self.output_scale)
        batch_axes = len(self.batch_axis)

        def op(
            x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **options: Any
        ) -> jax.Array:
            if bias is not None and batch_axes:
                free = x.ndim - batch_axes - len(self.axis)
                shape = (*bias.shape[:batch_axes], *free * (1,))
                bias = bias.reshape(*shape, *bias.shape[batch_axes:])
            return linear(
                x,
                kernel,
                bias,
                axis=self.axis,
                batch_axes=batch_axes,
                dot_general=product,
                **options,
            )

        return _apply(self, op, inputs, out_sharding)


class Einsum(nnx.Einsum):
    """`flax.nnx.Einsum` with unit-normal weights, computed by `einsum_linear`.

    Takes the further arguments of `Linear`.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Any = None,
        bias_metadata: Any = None,
        formats: Formats | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        in_axis_name: AxisName | None = None,
        out_axis_name: AxisName | None = None,
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        role = role_metadata("weight", einsum_fan_in(einsum_str, kernel_shape))
        super().__init__(
            einsum_str,
            tuple(kernel_shape),
            None if bias_shape is None else tuple(bias_shape),
            kernel_init=kernel_init,
            kernel_metadata=role | dict(kernel_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        self.formats = formats
        self.constraint = constraint
        self.batch_axis_name = batch_axis_name
        self.in_axis_name = in_axis_name
        self.out_axis_name = out_axis_name
        self.output_scale = output_scale

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        subscripts = (einsum_str or self.einsum_str).replace(" ", "")
        product = times(self.einsum_op, self.output_scale)

        def op(
            x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **options: Any
        ) -> jax.Array:
            if bias is not None:
                shape = self._infer_broadcasted_bias_shape(subscripts, x, kernel)
                if bias.shape != self.bias_shape:  # a piece of the whole, as is `x`'s
                    pairs = zip(bias.shape, self.bias_shape or (), strict=True)
                    sizes = iter([n for n, whole in pairs if whole != 1])
                    shape = [1 if n == 1 else next(sizes) for n in shape]
                bias = bias.reshape(shape)
            return einsum_linear(subscripts, x, kernel, bias, einsum=product, **options)

        return _apply(self, op, inputs, out_sharding)


def _apply(layer: Any, op: Any, inputs: jax.Array, out_sharding: Any) -> jax.Array:
    """What a linear layer does, whatever its shape: promote, and one call into ops."""
    bias = None if layer.bias is None else layer.bias[...]
    inputs, kernel, bias = layer.promote_dtype(
        (inputs, layer.kernel[...], bias), dtype=layer.dtype
    )
    return apply_linear(
        layer,
        op,
        inputs,
        kernel,
        bias,
        preferred_element_type=layer.preferred_element_type,
        out_sharding=out_sharding,
        in_axis_name=layer.in_axis_name,
        out_axis_name=layer.out_axis_name,
    )


class Embed(nnx.Embed):
    """`flax.nnx.Embed` with a unit-normal table, computed by `embedding`.

    `batch_axis_name` and `output_scale`: as in `Linear`. And

        tied: the positions of a (global) batch, which allows `attend`.
        logits_scale: multiplies what `attend` gives, as `output_scale` the look-up.

    A tied table sums two gradients, of s table[ids] and of r query table^T, where s is
    `output_scale` and r `logits_scale` / features. For the sum to be the true gradient
    up to a constant f, that constant has to be the same for both, and r the query's
    factor too, as a path leads around it. With unit-scaled cotangents of the logits,
    that of the query, and of all up to the look-up, is then r vocabulary^1/2. The
    table's two gradients add up to f r (positions (1 + s^2))^1/2, from which f:

        look-up   s forward, f s for the table
        attend    r forward and for the query, f r = (positions (1 + s^2))^-1/2 for
                  the table.

    Neither depends on the shapes of a call. Without `tied` the table has `embedding`'s
    own factor, and `attend` is refused: a `LinearReadout` gives the query, and all that
    is before it, cotangents of unit scale.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: nnx.Initializer = unit_normal,
        embedding_metadata: Any = None,
        tied: int | None = None,
        batch_axis_name: AxisName | None = None,
        output_scale: float = 1.0,
        logits_scale: float = 1.0,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        super().__init__(
            num_embeddings,
            features,
            embedding_init=embedding_init,
            embedding_metadata=role_metadata("weight", features)
            | dict(embedding_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        is_count = isinstance(tied, int) and not isinstance(tied, bool)
        if tied is not None and not (is_count and tied >= 1):
            raise ValueError(
                f"`tied` must be None or the positions of a batch, got {tied}."
            )
        self.tied = tied
        self.batch_axis_name = batch_axis_name
        self.output_scale = output_scale
        self.logits_scale = logits_scale

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        (table,) = self.promote_dtype(
            (self.embedding[...],), dtype=self.dtype, inexact=False
        )
        look_up: Callable[..., jax.Array]
        if self.tied is None:
            look_up = ft.partial(embedding, batch_axis_name=self.batch_axis_name)
        else:
            look_up = embedding.fn
            ratio = self.output_scale * self.features / self.logits_scale
            table = scale_bwd(table, ratio * _attend_factor(self))
        if out_sharding is not None:
            look_up = jax.sharding.auto_axes(look_up, out_sharding=out_sharding)
        return scale_fwd(look_up(table, inputs), self.output_scale)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The logits [..., vocabulary] of a query [..., features], with a tied table.

        Raises:
            ValueError: without `tied`.
        """
        if self.tied is None:
            raise ValueError(
                "`attend` sums the gradients of look-up and logits in one table, whose "
                "factors differ: build `Embed(..., tied=positions)` with the positions "
                "of a batch, or use a `LinearReadout` of its own."
            )
        query, table = self.promote_dtype(
            (query, self.embedding[...]), dtype=self.dtype
        )
        kernel = table.T
        own = linear_readout.factors(query, kernel).bwd["kernel"]
        return linear_readout(
            scale_bwd(query, self.logits_scale),
            scale_bwd(kernel, _attend_factor(self) / own),
            dot_general=times(lax.dot_general, self.logits_scale),
            constraint=to_output_scale,
            out_sharding=out_sharding,
        )


def _attend_factor(embed: Any) -> float:
    """That of a tied table in `attend`, whatever the look-up's is."""
    return (embed.tied * (1 + embed.output_scale**2)) ** -0.5
