"""Linear layers and embeddings, drop-in for their `flax.linen` namesakes."""

import dataclasses
import functools as ft
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax import lax

from ..arguments import axes_of, check_fields
from ..constraints import Constraint, to_output_scale
from ..formats import BlockFormats, Formats
from ..layers.embedding import attend, look_up
from ..layers.linear import (
    apply_linear,
    bias_of_batch,
    broadcast_bias,
    low_rank,
    options_of,
    with_factor,
)
from ..op import AxisName
from ..ops.contraction import einsum_fan_in, einsum_linear, linear, linear_readout
from ..parameters import Role
from .metadata import with_role
from .names import named, parameter

# What unit scaling starts from: every weight has unit variance.
unit_normal = nn.initializers.normal(1.0)


class Checked(nn.Module):
    """A module whose fields, those of its namesake too, are checked when it is built.

    Raises:
        TypeError, ValueError: by the name of a field that is not what its annotation
            says, or a number that its name does not stand for.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()


class Scaled(Checked, kw_only=True):
    """The fields that unit scaling adds to a layer with a product.

    Attributes:
        formats: the number formats of its product, simulated or native.
        constraint: makes the output's and the input's factor agree.
        batch_axis_name: axes over which the batch is split, inside `shard_map`, `pmap`
            or a `vmap` over examples. As all names of axes it has no effect in `init`,
            which is called outside, with whole arrays.
    """

    formats: Formats | None = None
    constraint: Constraint | None = to_output_scale
    batch_axis_name: AxisName | None = None


class ScaledBlock(Checked, kw_only=True):
    """The fields of `Scaled` for layers with several products.

    Attributes:
        formats: the number formats of all its products, or of each kind.
        constraint, batch_axis_name: as in `Scaled`.
    """

    formats: Formats | BlockFormats | None = None
    constraint: Constraint | None = to_output_scale
    batch_axis_name: AxisName | None = None


class ScaledOutput(Scaled, kw_only=True):
    """Attributes: those of `Scaled`, and

    output_scale: multiplies the output, before the bias, and the input's cotangent, but
        not the kernel's: a weight's own scale.
    """

    output_scale: float = 1.0


class SplitOutput(ScaledOutput, kw_only=True):
    """Attributes: those of `ScaledOutput`, and

    in_axis_name, out_axis_name: axes over which the input and the output features are
        split, inside `shard_map`: see `linear`. The sizes stay those of the whole; the
        layer is initialised outside, and its parameters come in as pieces.
    """

    in_axis_name: AxisName | None = None
    out_axis_name: AxisName | None = None


class Dense(nn.Dense, SplitOutput):
    """`flax.linen.Dense` with unit-normal weights, computed by `linear`.

    Takes all arguments of its namesake (`dot_general` computes the plain product) and,
    as keywords: formats, constraint, batch_axis_name, in_axis_name, out_axis_name,
    output_scale (`SplitOutput`).
    """

    kernel_init: nn.initializers.Initializer = unit_normal

    _op: ClassVar[Any] = staticmethod(linear)
    _roles: ClassVar[tuple[Role, Role]] = ("weight", "bias")
    _is_matrix: ClassVar[bool] = True  # which Muon turns as a whole

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self._apply(inputs)

    def _apply(self, inputs: jax.Array) -> jax.Array:
        shape = (inputs.shape[-1], self.features)
        role, bias_role = self._roles
        init = with_role(self.kernel_init, role, *shape[: 1 + self._is_matrix])
        kernel = parameter(self, "kernel", init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            init = with_role(self.bias_init, bias_role)
            bias = parameter(self, "bias", init, shape[1:], self.param_dtype)
        op = ft.partial(self._op, dot_general=_product(self))
        return _promote_and_apply(self, op)(inputs, kernel, bias)


class DenseReadout(Dense, kw_only=True):
    """`Dense` for a model's logits, computed by `linear_readout`: 1 / in forward.

    Unconstrained by default, as it lies at a cut-edge.
    """

    constraint: Constraint | None = None

    _op: ClassVar[Any] = staticmethod(linear_readout)
    _roles: ClassVar[tuple[Role, Role]] = ("output", "output")


class DenseGeneral(nn.DenseGeneral, SplitOutput):
    """`flax.linen.DenseGeneral` with unit-normal weights, computed by `linear`.

    Takes the further arguments of `Dense`. Places along `batch_dims` have a kernel and
    a bias of their own, of which the batch is what is left.
    """

    # Its namesake takes an integer as well, whatever it says.
    batch_dims: int | Sequence[int] = ()  # type: ignore[assignment]
    kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        features, axis, batch = (
            (n,) if isinstance(n, int) else tuple(n)
            for n in (self.features, self.axis, self.batch_dims)
        )
        if {*batch} != {*range(len(batch))}:
            raise ValueError(
                f"`batch_dims` must be the leading axes 0, 1, .., got {batch}: move "
                "them to the front."
            )
        axis = tuple(sorted(axes_of("axis", axis, inputs.ndim)))
        places = tuple(inputs.shape[: len(batch)])
        d_in = tuple(inputs.shape[a] for a in axis)
        fans = math.prod(d_in), math.prod(features)
        count = math.prod(places)
        init = with_role(
            _flat(self.kernel_init, (count * fans[0], fans[1])), "weight", *fans
        )
        shape = places + d_in + features
        kernel = parameter(self, "kernel", init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            init = with_role(_flat(self.bias_init, (count * fans[1],)), "bias")
            shape = places + features
            bias = parameter(self, "bias", init, shape, self.param_dtype)
            free = inputs.ndim - len(batch) - len(axis)
            bias = bias_of_batch(bias, free, len(batch))
        op = ft.partial(
            linear, axis=axis, batch_axes=len(batch), dot_general=_product(self)
        )
        return _promote_and_apply(self, op)(inputs, kernel, bias)


def _flat(init: Any, flat: tuple[int, ...]) -> Any:
    """As Flax: an initialiser sees a matrix, whose fans it can tell."""

    def reshaped(key: Any, shape: Any, dtype: Any) -> Any:
        value = init(key, flat, dtype)
        return meta.replace_boxed(value, jnp.reshape(meta.unbox(value), shape))

    return reshaped


class Einsum(nn.Einsum, SplitOutput):
    """`flax.linen.Einsum` with unit-normal weights, computed by `einsum_linear`.

    Takes the further arguments of `Dense`.
    """

    kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        subscripts = nn.merge_param("einsum_str", self.einsum_str, einsum_str)
        subscripts = subscripts.replace(" ", "")
        shape = tuple(self.shape)
        init = with_role(self.kernel_init, "weight", einsum_fan_in(subscripts, shape))
        kernel = parameter(self, "kernel", init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            whole, broadcast = self._get_bias_shape(subscripts, inputs, kernel)
            init = with_role(self.bias_init, "bias")
            bias = parameter(self, "bias", init, tuple(whole), self.param_dtype)
            bias = broadcast_bias(bias, tuple(whole), broadcast)
        product = with_factor(jnp.einsum, self.output_scale)

        def op(x: Any, kernel: Any, bias: Any, **options: Any) -> jax.Array:
            return einsum_linear(subscripts, x, kernel, bias, einsum=product, **options)

        return _promote_and_apply(
            self, op, preferred_element_type=self.preferred_element_type
        )(inputs, kernel, bias)


def _product(layer: Any) -> Any:
    plain = layer.dot_general_cls() if layer.dot_general_cls else layer.dot_general
    return with_factor(plain or lax.dot_general, layer.output_scale)


def _promote_and_apply(layer: Any, op: Any, **more: Any) -> Any:
    """What a linear layer does, whatever its shape: promote, and one call into ops."""

    def applied(*arrays: Any) -> jax.Array:
        promoted = layer.promote_dtype(*arrays, dtype=layer.dtype)
        return apply_linear(
            at := named(layer),
            op,
            *promoted,
            in_axis_name=at.in_axis_name,
            out_axis_name=at.out_axis_name,
            **more,
        )

    return applied


class Embed(nn.Embed, Checked):
    """`flax.linen.Embed` with a unit-normal table, computed by `embedding`.

    `batch_axis_name` and `output_scale`: as in `Dense`. And, as keywords,

        tied: the positions of a (global) batch, which allows `attend`.
        logits_scale: multiplies what `attend` gives, as `output_scale` the look-up.
        vocabulary_axis_name: axes over which the rows of the table are split, inside
            `shard_map`: see `embedding`. The logits of `attend` are then split by
            class, as `cross_entropy` takes them with `class_axis_name`.

    Factors: s = `output_scale` forward and (vocabulary / ids)^1/2 for the table; of a
    tied one those of `layers/embedding.py`, where both gradients of the table are true
    up to the same constant and their sum has unit scale. Without `tied` the table has
    `embedding`'s own factor, and `attend` is refused: a `DenseReadout` gives the query,
    and all that is before it, cotangents of unit scale.
    """

    embedding_init: nn.initializers.Initializer = unit_normal
    batch_axis_name: AxisName | None = None
    output_scale: float = 1.0
    vocabulary_axis_name: AxisName | None = dataclasses.field(
        default=None, kw_only=True
    )
    tied: int | None = dataclasses.field(default=None, kw_only=True)
    logits_scale: float = dataclasses.field(default=1.0, kw_only=True)

    def setup(self) -> None:
        self.embedding = parameter(
            self,
            "embedding",
            with_role(self.embedding_init, "weight", self.features),
            (self.num_embeddings, self.features),
            self.param_dtype,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        table: Any
        (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        return look_up(named(self), table, inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        """The logits [..., vocabulary] of a query [..., features], with a tied table.

        Raises:
            ValueError: without `tied`.
        """
        promoted: Any = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        return attend(named(self), *promoted)


class LoRA(SplitOutput):
    """A low-rank adapter of two unit-scaled products: base(x) + (x A) B.

    A is unit-normal, and B zero: so the sum starts as the base, B's gradient at unit
    scale, and what is learnt reaches the base's scale as B reaches 1.

    Attributes:
        lora_rank: the rank.
        features: the size of the output.
        base_module: the module beside it, called with the same input.
        dtype, param_dtype: as in `Dense`.
        a_initializer, b_initializer: of A [in, rank] and B [rank, features].
        formats, constraint, batch_axis_name: as in `Dense`.
        in_axis_name, out_axis_name: as in `Dense`, of A and of B.
        output_scale: as in `Dense`, of (x A) B alone.
    """

    lora_rank: int
    features: int
    base_module: nn.Module | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    a_initializer: nn.initializers.Initializer = unit_normal
    b_initializer: nn.initializers.Initializer = nn.initializers.zeros_init()
    promote_dtype: Any = nn.dtypes.promote_dtype

    @nn.compact
    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        def kernel(name: str, init: Any, *shape: int) -> Any:
            init = with_role(init, "weight", shape[0])
            return parameter(self, name, init, shape, self.param_dtype)

        a = kernel("lora_a", self.a_initializer, x.shape[-1], self.lora_rank)
        b = kernel("lora_b", self.b_initializer, self.lora_rank, self.features)
        y = low_rank(named(self), *self.promote_dtype(x, a, b, dtype=self.dtype))
        return y if self.base_module is None else y + self.base_module(x, **kwargs)


class LoRADense(Dense, kw_only=True):
    """A `Dense` with a `LoRA` beside it, as `flax.nnx.LoRALinear` is in NNX.

    Attributes: those of `Dense`, of which formats, constraint and the names of axes
    concern both, and

    lora_rank: the rank.
    lora_dtype, lora_param_dtype, lora_promote_dtype: the adapter's own.
    a_initializer, b_initializer: as in `LoRA`.
    """

    lora_rank: int
    lora_dtype: Any = None
    lora_param_dtype: Any = jnp.float32
    lora_promote_dtype: Any = nn.dtypes.promote_dtype
    a_initializer: nn.initializers.Initializer = unit_normal
    b_initializer: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        names = ("in_axis_name", "out_axis_name", "a_initializer", "b_initializer")
        adapter = LoRA(
            self.lora_rank,
            self.features,
            dtype=self.lora_dtype,
            param_dtype=self.lora_param_dtype,
            promote_dtype=self.lora_promote_dtype,
            name="lora",
            **fields_of(self, *names),
            **options_of(self),
        )
        return self._apply(inputs) + adapter(inputs)


def fields_of(module: nn.Module, *names: str) -> dict[str, Any]:
    """The fields of this name, to be handed on to a layer inside."""
    return {name: getattr(module, name) for name in names}
