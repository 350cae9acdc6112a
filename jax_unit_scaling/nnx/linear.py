"""Linear layers and embeddings, drop-in for their `flax.nnx` namesakes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..op import AxisName
from ..ops.contraction import linear, linear_readout
from ..ops.embedding import embedding
from ..parameters import Role, role_metadata

# What unit scaling starts from: every weight has unit variance.
unit_normal = nnx.initializers.normal(1.0)


class Linear(nnx.Linear):
    """`flax.nnx.Linear` with unit-normal weights, computed by `linear`.

    Takes all arguments of its namesake (`dot_general` computes the plain product) and

        formats: the number formats of its product, simulated.
        constraint: makes the output's and the input's factor agree.
        batch_axis_name: axes over which the batch is split, inside `shard_map`, `pmap`
            or a `vmap` over examples.
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

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return _apply(self, self._op, inputs, -1, self.dot_general, out_sharding)


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

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        product = self.dot_general_cls() if self.dot_general_cls else self.dot_general
        return _apply(
            self, linear, inputs, self.axis, product or lax.dot_general, out_sharding
        )


def _apply(
    layer: Any,
    op: Any,
    inputs: jax.Array,
    axis: int | tuple[int, ...],
    dot_general: Any,
    out_sharding: Any,
) -> jax.Array:
    """What a linear layer does, whatever its shape: promote, and one call into ops."""
    bias = None if layer.bias is None else layer.bias[...]
    inputs, kernel, bias = layer.promote_dtype(
        (inputs, layer.kernel[...], bias), dtype=layer.dtype
    )
    return op(
        inputs,
        kernel,
        bias,
        axis=axis,
        dot_general=dot_general,
        precision=layer.precision,
        preferred_element_type=layer.preferred_element_type,
        out_sharding=out_sharding,
        formats=layer.formats,
        constraint=layer.constraint,
        batch_axis_name=layer.batch_axis_name,
    )


class Embed(nnx.Embed):
    """`flax.nnx.Embed` with a unit-normal table, computed by `embedding`.

    `attend` is refused: its gradient and the look-up's would meet in one table with
    different factors. Use a `LinearReadout` for the logits.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: nnx.Initializer = unit_normal,
        embedding_metadata: Any = None,
        batch_axis_name: AxisName | None = None,
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

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        if out_sharding is not None:
            raise ValueError(
                "`out_sharding` is not supported: constrain the output's sharding with "
                "`jax.lax.with_sharding_constraint`."
            )
        (table,) = self.promote_dtype(
            (self.embedding[...],), dtype=self.dtype, inexact=False
        )
        return embedding(table, inputs, batch_axis_name=self.batch_axis_name)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        raise NotImplementedError(
            "a tied table sums the gradients of look-up and readout, whose factors "
            "differ; use a `LinearReadout` of its own."
        )
