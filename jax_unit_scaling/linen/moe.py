"""A mixture-of-experts feed-forward layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..layers.linear import options_of
from ..layers.transformer import feed_forward
from ..op import AxisName, check_bound
from ..ops.activation import silu_glu
from ..ops.contraction import ragged_dot
from ..ops.moe import RouterLosses, mixture_of_experts
from .linear import Dense, Scaled, fields_of, unit_normal
from .metadata import with_role
from .names import named, parameter


class ExpertDense(Scaled):
    """A linear layer for each expert, without bias, computed by `ragged_dot`.

    Its `kernel` is [num_experts, in, features]. It is called with rows that are sorted
    by expert, and the number of rows of each. Attributes as in `Dense`.
    """

    num_experts: int
    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = unit_normal
    promote_dtype: Any = nn.dtypes.promote_dtype
    in_axis_name: AxisName | None = None
    out_axis_name: AxisName | None = None

    @nn.compact
    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        d_in = rows.shape[-1]
        kernel = parameter(
            self,
            "kernel",
            with_role(self.kernel_init, "weight", d_in),
            (self.num_experts, d_in, self.features),
            self.param_dtype,
        )
        rows, kernel = self.promote_dtype(rows, kernel, dtype=self.dtype)
        names = ("precision", "in_axis_name", "out_axis_name")
        return ragged_dot(
            rows,
            kernel,
            group_sizes,
            **fields_of(named(self), *names),
            **options_of(named(self)),
        )


class MoE(Scaled):
    """An `MLP` for each expert, and a router that sends each token to a few of them.

    Returns the output and the router's losses, to be added to the model's loss:

        y, losses = moe(x)
        loss = cross_entropy(...) + 0.01 * losses.load_balance + 1e-3 * losses.z_loss

    The router computes in float32 at least and without `formats`: it is a small part of
    the work, and a rounded logit changes which expert is chosen.

    Attributes:
        hidden_features: the size inside an expert.
        num_experts: how many experts there are.
        num_selected: how many a token goes to.
        mult: multiplies the router's logits.
        activation, gated, model_axis_name: as in `MLP`, of every expert.
        formats: as in `Dense`; native ones are simulated, as in `ragged_dot`.
        constraint, batch_axis_name and the rest: as in `Dense`.

    Of several devices see the NNX one: there is no expert parallelism.

    Reference: Mixtral (Jiang et al., 2024), for the function; `mixture_of_experts` for
    its factors.
    """

    hidden_features: int
    num_experts: int
    num_selected: int = 2
    mult: float = 1.0
    activation: Callable[..., jax.Array] = silu_glu
    gated: bool = True
    model_axis_name: AxisName | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, RouterLosses]:
        check_bound("model_axis_name", named(self).model_axis_name)
        return mixture_of_experts(
            self._route,
            self._apply_experts,
            inputs,
            batch_axis_name=named(self).batch_axis_name,
            **fields_of(self, "num_experts", "num_selected", "mult"),
        )

    def _route(self, tokens: jax.Array) -> jax.Array:
        router = Dense(
            self.num_experts,
            use_bias=False,
            name="router",
            **fields_of(
                self, "param_dtype", "kernel_init", "constraint", "batch_axis_name"
            ),
        )
        return router(tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32)))

    def _apply_experts(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        def expert(name: str, features: int) -> Callable[[jax.Array], jax.Array]:
            side = "in_axis_name" if name == "down" else "out_axis_name"
            split: dict[str, Any] = {side: self.model_axis_name}
            layer = ExpertDense(
                self.num_experts,
                features,
                name=name,
                **split,
                **fields_of(self, "dtype", "param_dtype", "precision", "kernel_init"),
                **options_of(self),
            )
            return lambda rows: layer(rows, sizes)

        return feed_forward(
            expert("up", self.hidden_features),
            expert("gate", self.hidden_features) if self.gated else None,
            expert("down", rows.shape[-1]),
            rows,
            activation=self.activation,
        )
