"""Linear layers and embeddings, drop-in for their `flax.linen` namesakes."""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax import lax

from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..layers.linear import apply_linear, low_rank, times
from ..op import AxisName
from ..ops.contraction import einsum_fan_in, einsum_linear, linear, linear_readout
from ..ops.embedding import embedding
from ..parameters import Role
from ..scale import scale_fwd
from .metadata import with_role

# What unit scaling starts from: every weight has unit variance.
unit_normal = nn.initializers.normal(1.0)


class Scaled(nn.Module, kw_only=True):
    """The fields that unit scaling adds to a layer with a product.

    Attributes:
        formats: the number formats of its product, simulated.
        constraint: makes the output's and the input's factor agree.
        batch_axis_name: axes over which the batch is split, inside `shard_map`, `pmap`
            or a `vmap` over examples.
    """

    formats: Formats | None = None
    constraint: Constraint | None = to_output_scale
    batch_axis_name: AxisName | None = None


class ScaledOutput(Scaled, kw_only=True):
    """Attributes: those of `Scaled`, and

    output_scale: multiplies the output, before the bias, and the input's cotangent, but
        not the kernel's: a weight's own scale.
    """

    output_scale: float = 1.0


class Dense(nn.Dense, ScaledOutput):
    """`flax.linen.Dense` with unit-normal weights, computed by `linear`.

    Takes all arguments of its namesake (`dot_general` computes the plain product) and,
    as keywords: formats, constraint, batch_axis_name, output_scale (`ScaledOutput`).
    """

    kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self._apply(inputs, linear, "weight", "bias")

    def _apply(
        self, inputs: jax.Array, op: Any, role: Role, bias_role: Role
    ) -> jax.Array:
        shape = (inputs.shape[-1], self.features)
        kernel = self.param(
            "kernel", with_role(self.kernel_init, role, *shape), shape, self.param_dtype
        )
        bias = None
        if self.use_bias:
            init = with_role(self.bias_init, bias_role)
            bias = self.param("bias", init, shape[1:], self.param_dtype)
        return _promote_and_apply(self, ft.partial(op, dot_general=_product(self)))(
            inputs, kernel, bias
        )


class DenseReadout(Dense, kw_only=True):
    """`Dense` for a model's logits, computed by `linear_readout`: 1 / in forward.

    Unconstrained by default, as it lies at a cut-edge.
    """

    constraint: Constraint | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self._apply(inputs, linear_readout, "output", "output")


class DenseGeneral(nn.DenseGeneral, ScaledOutput):
    """`flax.linen.DenseGeneral` with unit-normal weights, computed by `linear`.

    Takes the further arguments of `Dense`. `batch_dims` is not supported.
    """

    kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if self.batch_dims:
            raise ValueError(
                f"`batch_dims` must be (), got {self.batch_dims}: use `nn.vmap` over a "
                "`DenseGeneral`."
            )
        features, axis = (
            (n,) if isinstance(n, int) else tuple(n) for n in (self.features, self.axis)
        )
        axis = tuple(sorted(a % inputs.ndim for a in axis))
        d_in = tuple(inputs.shape[a] for a in axis)
        fans = math.prod(d_in), math.prod(features)
        init = with_role(_flat(self.kernel_init, fans), "weight", *fans)
        kernel = self.param("kernel", init, d_in + features, self.param_dtype)
        bias = None
        if self.use_bias:
            init = with_role(_flat(self.bias_init, fans[1:]), "bias")
            bias = self.param("bias", init, features, self.param_dtype)
        op = ft.partial(linear, axis=axis, dot_general=_product(self))
        return _promote_and_apply(self, op)(inputs, kernel, bias)


def _flat(init: Any, flat: tuple[int, ...]) -> Any:
    """As Flax: an initialiser sees a matrix, whose fans it can tell."""

    def reshaped(key: Any, shape: Any, dtype: Any) -> Any:
        value = init(key, flat, dtype)
        return meta.replace_boxed(value, jnp.reshape(meta.unbox(value), shape))

    return reshaped


class Einsum(nn.Einsum, ScaledOutput):
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
        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias, broadcast = None, ()
        if self.use_bias:
            bias_shape, broadcast = self._get_bias_shape(subscripts, inputs, kernel)
            init = with_role(self.bias_init, "bias")
            bias = self.param("bias", init, tuple(bias_shape), self.param_dtype)
        product = times(jnp.einsum, self.output_scale)

        def op(x: Any, kernel: Any, bias: Any, **options: Any) -> jax.Array:
            bias = None if bias is None else bias.reshape(broadcast)
            return einsum_linear(subscripts, x, kernel, bias, einsum=product, **options)

        return _promote_and_apply(
            self, op, preferred_element_type=self.preferred_element_type
        )(inputs, kernel, bias)


def _product(layer: Any) -> Any:
    plain = layer.dot_general_cls() if layer.dot_general_cls else layer.dot_general
    return times(plain or lax.dot_general, layer.output_scale)


def _promote_and_apply(layer: Any, op: Any, **more: Any) -> Any:
    """What a linear layer does, whatever its shape: promote, and one call into ops."""

    def applied(*arrays: Any) -> jax.Array:
        promoted = layer.promote_dtype(*arrays, dtype=layer.dtype)
        return apply_linear(layer, op, *promoted, **more)

    return applied


class Embed(nn.Embed):
    """`flax.linen.Embed` with a unit-normal table, computed by `embedding`.

    `attend` is refused: its gradient and the look-up's would meet in one table with
    different factors. Use a `DenseReadout` for the logits. `batch_axis_name` and
    `output_scale`: as in `Dense`.
    """

    embedding_init: nn.initializers.Initializer = unit_normal
    batch_axis_name: AxisName | None = None
    output_scale: float = 1.0

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            with_role(self.embedding_init, "weight", self.features),
            (self.num_embeddings, self.features),
            self.param_dtype,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        table: Any
        (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        y = embedding(table, inputs, batch_axis_name=self.batch_axis_name)
        return scale_fwd(y, self.output_scale)

    def attend(self, query: jax.Array) -> jax.Array:
        raise NotImplementedError(
            "a tied table sums the gradients of look-up and readout, whose factors "
            "differ; use a `DenseReadout` of its own."
        )


class LoRA(Scaled):
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
            return self.param(name, init, shape, self.param_dtype)

        a = kernel("lora_a", self.a_initializer, x.shape[-1], self.lora_rank)
        b = kernel("lora_b", self.b_initializer, self.lora_rank, self.features)
        y = low_rank(self, *self.promote_dtype(x, a, b, dtype=self.dtype))
        return y if self.base_module is None else y + self.base_module(x, **kwargs)


def fields_of(module: nn.Module, *names: str) -> dict[str, Any]:
    """The fields of this name, to be handed on to a layer inside."""
    return {name: getattr(module, name) for name in names}
