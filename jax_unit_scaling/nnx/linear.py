"""Linear layers and embeddings, drop-in for their `flax.nnx` namesakes."""

import functools as ft
import math
from collections.abc import Sequence
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
from ..scale import scale_fwd

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

    _op = staticmethod(linear)
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

    Takes the further arguments of `Linear`. `batch_axis` is not supported.
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
        if namesake.get("batch_axis"):
            raise ValueError(
                "`batch_axis` is not supported: use `jax.vmap` over a `LinearGeneral`."
            )
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
        op = ft.partial(linear, axis=self.axis, dot_general=product)
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
                # Flax's are the whole's sizes; the bias may be a piece.
                pairs = zip(bias.shape, self.bias_shape or (), strict=True)
                sizes = iter([n for n, whole in pairs if whole != 1])
                bias = bias.reshape([1 if n == 1 else next(sizes) for n in shape])
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

    `attend` is refused: its gradient and the look-up's would meet in one table with
    different factors. Use a `LinearReadout` for the logits. `batch_axis_name` and
    `output_scale`: as in `Linear`.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: nnx.Initializer = unit_normal,
        embedding_metadata: Any = None,
        batch_axis_name: AxisName | None = None,
        output_scale: float = 1.0,
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
        self.batch_axis_name = batch_axis_name
        self.output_scale = output_scale

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        if out_sharding is not None:
            raise ValueError(
                "`out_sharding` is not supported: constrain the output's sharding with "
                "`jax.lax.with_sharding_constraint`."
            )
        (table,) = self.promote_dtype(
            (self.embedding[...],), dtype=self.dtype, inexact=False
        )
        y = embedding(table, inputs, batch_axis_name=self.batch_axis_name)
        return scale_fwd(y, self.output_scale)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        raise NotImplementedError(
            "a tied table sums the gradients of look-up and readout, whose factors "
            "differ; use a `LinearReadout` of its own."
        )
