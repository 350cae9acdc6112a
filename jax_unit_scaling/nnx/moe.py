"""A mixture-of-experts feed-forward layer."""

import functools as ft
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from ..arguments import checked
from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..layers.linear import options_of
from ..layers.transformer import feed_forward
from ..op import AxisName, check_bound
from ..ops.activation import silu_glu
from ..ops.contraction import ragged_dot
from ..ops.moe import RouterLosses, mixture_of_experts
from ..parameters import role_metadata
from .linear import Linear, unit_normal


class ExpertLinear(nnx.Module):
    """A linear layer for each expert, without bias, computed by `ragged_dot`.

    Its `kernel` is [num_experts, in_features, out_features]. It is called with rows
    that are sorted by expert, and the number of rows of each. Arguments as in `Linear`.
    """

    @checked
    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Mapping[str, Any] | None = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        preferred_element_type: Any = None,
        formats: Formats | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        in_axis_name: AxisName | None = None,
        out_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (num_experts, in_features, out_features)
        metadata = role_metadata("weight", in_features) | dict(kernel_metadata or {})
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), shape, param_dtype), **metadata
        )
        self.dtype = dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.formats = formats
        self.constraint = constraint
        self.batch_axis_name = batch_axis_name
        self.in_axis_name = in_axis_name
        self.out_axis_name = out_axis_name

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        rows, kernel = self.promote_dtype((rows, self.kernel[...]), dtype=self.dtype)
        return ragged_dot(
            rows,
            kernel,
            group_sizes,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            in_axis_name=self.in_axis_name,
            out_axis_name=self.out_axis_name,
            **options_of(self),
        )


class MoE(nnx.Module):
    """An `MLP` for each expert, and a router that sends each token to a few of them.

    Returns the output and the router's losses, to be added to the model's loss:

        y, losses = moe(x)
        loss = cross_entropy(...) + 0.01 * losses.load_balance + 1e-3 * losses.z_loss

    The router computes in float32 at least and without `formats`: it is a small part of
    the work, and a rounded logit changes which expert is chosen.

    Args:
        in_features: the size of the input and of the output.
        hidden_features: the size inside an expert.
        num_experts: how many experts there are.
        num_selected: how many a token goes to.
        mult: multiplies the router's logits.
        activation, gated, model_axis_name: as in `MLP`, of every expert.
        formats: as in `Linear`; native ones are simulated, as in `ragged_dot`.
        constraint, batch_axis_name and the rest: as in `Linear`.

    Every device that has some of the tokens needs all experts, whole or their hidden
    features in pieces (`model_axis_name`). Expert parallelism, whole experts on
    different devices and an all-to-all that brings them their tokens, is not provided.
    Kernels whose first axis, the experts', is sharded under `jit` make the same update,
    and each device stores its experts alone; but XLA sends it all rows to do so, and
    adds up the results.

    Reference: Mixtral (Jiang et al., 2024), for the function; `mixture_of_experts` for
    its factors.
    """

    @checked
    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        num_selected: int = 2,
        *,
        mult: float = 1.0,
        activation: Callable[..., jax.Array] = silu_glu,
        gated: bool = True,
        batch_axis_name: AxisName | None = None,
        model_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        linear["batch_axis_name"] = batch_axis_name
        shared = {"batch_axis_name", "constraint", "kernel_init", "param_dtype"}
        self.router = Linear(
            in_features,
            num_experts,
            use_bias=False,
            rngs=rngs,
            **{name: linear[name] for name in shared & linear.keys()},
        )

        def layer(d_in: int, d_out: int, **split: Any) -> ExpertLinear:
            return ExpertLinear(num_experts, d_in, d_out, rngs=rngs, **split, **linear)

        up = ft.partial(
            layer, in_features, hidden_features, out_axis_name=model_axis_name
        )
        self.up = up()
        self.gate = up() if gated else nnx.data(None)
        self.down = layer(hidden_features, in_features, in_axis_name=model_axis_name)
        self.num_experts = num_experts
        self.num_selected = num_selected
        self.mult = mult
        self.activation = activation
        self.batch_axis_name = batch_axis_name
        self.model_axis_name = model_axis_name

    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, RouterLosses]:
        check_bound("model_axis_name", self.model_axis_name)
        return mixture_of_experts(
            self._route,
            self._apply_experts,
            inputs,
            num_experts=self.num_experts,
            num_selected=self.num_selected,
            mult=self.mult,
            batch_axis_name=self.batch_axis_name,
        )

    def _route(self, tokens: jax.Array) -> jax.Array:
        return self.router(tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32)))

    def _apply_experts(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        def expert(layer: ExpertLinear) -> Callable[[jax.Array], jax.Array]:
            return lambda rows: layer(rows, sizes)

        return feed_forward(
            expert(self.up),
            None if self.gate is None else expert(self.gate),
            expert(self.down),
            rows,
            activation=self.activation,
        )
