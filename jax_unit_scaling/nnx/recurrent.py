"""Recurrent cells and their loop, drop-in for their `flax.nnx` namesakes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..arguments import checked
from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..layers.recurrent import (
    each_step,
    gru_step,
    highway_step,
    lstm_step,
    simple_step,
)
from ..op import AxisName
from ..ops.arithmetic import weighted_add
from ..parameters import role_metadata
from .linear import Linear, unit_normal
from .weights import with_weights


class _Cell(nnx.RNNCellBase):
    """A mixin that gives its namesake, next in line, unit-scaled linear layers."""

    gate_fn: Callable[..., Any]
    activation_fn: Callable[..., Any]

    @checked
    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        kernel_init: nnx.Initializer = unit_normal,
        recurrent_kernel_init: nnx.Initializer = unit_normal,
        kernel_metadata: Mapping[str, Any] | None = None,
        recurrent_kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
        formats: Formats | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
        **namesake: Any,
    ):
        checked(super().__init__)(  # type: ignore[call-arg]
            in_features,
            hidden_features,
            kernel_init=kernel_init,
            recurrent_kernel_init=recurrent_kernel_init,
            kernel_metadata=role_metadata("weight", in_features)
            | dict(kernel_metadata or {}),
            recurrent_kernel_metadata=role_metadata("weight", hidden_features)
            | dict(recurrent_kernel_metadata or {}),
            bias_metadata=role_metadata("bias") | dict(bias_metadata or {}),
            rngs=rngs,
            **namesake,
        )
        # The namesake builds plain layers; unit-scaled ones take over their parameters.
        for name, plain in list(vars(self).items()):
            if isinstance(plain, nnx.Linear):
                layer = Linear(
                    plain.in_features,
                    plain.out_features,
                    use_bias=False,
                    kernel_init=nnx.initializers.zeros_init(),
                    dtype=plain.dtype,
                    param_dtype=plain.param_dtype,
                    promote_dtype=plain.promote_dtype,
                    formats=formats,
                    constraint=constraint,
                    batch_axis_name=batch_axis_name,
                    rngs=rngs,
                )
                layer.kernel, layer.bias = plain.kernel, plain.bias
                setattr(self, name, layer)


class SimpleCell(_Cell, nnx.SimpleCell):
    """`flax.nnx.SimpleCell` with unit scale: h' = tanh(W_i x + W_h h), or with `+ h`.

    All cells take the arguments of their namesakes, formats, constraint and
    batch_axis_name as in `Linear`, and any activation function, whose factors are
    computed. They give the carry and the output unit scale for independent inputs of
    unit scale.
    """

    def __call__(
        self, carry: jax.Array, inputs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        h = simple_step(
            self.dense_i(inputs),
            self.dense_h(carry),
            carry,
            activation_fn=self.activation_fn,
            residual=self.residual,
        )
        return h, h


class LSTMCell(_Cell, nnx.LSTMCell):
    """`flax.nnx.LSTMCell` with unit scale: see `SimpleCell`."""

    def __call__(
        self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        pairs = zip(
            (self.ii, self.if_, self.ig, self.io),
            (self.hi, self.hf, self.hg, self.ho),
            strict=True,
        )
        c, h = carry
        gates = (weighted_add(i(inputs), r(h)) for i, r in pairs)
        return lstm_step(
            c, *gates, gate_fn=self.gate_fn, activation_fn=self.activation_fn
        )


class OptimizedLSTMCell(_Cell, nnx.OptimizedLSTMCell):
    """`flax.nnx.OptimizedLSTMCell` with unit scale: see `SimpleCell`."""

    def __call__(
        self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        c, h = carry
        gates = jnp.split(weighted_add(self.dense_i(inputs), self.dense_h(h)), 4, -1)
        return lstm_step(
            c, *gates, gate_fn=self.gate_fn, activation_fn=self.activation_fn
        )


class GRUCell(_Cell, nnx.GRUCell):
    """`flax.nnx.GRUCell` with unit scale: see `SimpleCell`."""

    def __call__(
        self, carry: jax.Array, inputs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        products = (self.dense_i(inputs), self.dense_h(carry))
        pairs = zip(*(jnp.split(y, 3, axis=-1) for y in products), strict=True)
        h = gru_step(
            carry, *pairs, gate_fn=self.gate_fn, activation_fn=self.activation_fn
        )
        return h, h


class RecurrentHighwayCell(nnx.RNNCellBase):
    """The 2023 paper's recurrent highway cell: h' = (1 - u) h + a u tanh(t).

    [t, u'] = W [x, h] + b and u = sigmoid(u' - rebias), with the constant a that keeps
    h at unit scale (`gated_carry`) and a unit-scaled tanh. The carry is one array.

    Args:
        in_features: the size of the input.
        hidden_features: the size of the carry and of the output.
        rebias: how far the gate starts on the side of keeping.
        carry_init: the initial carry's initialiser, zeros by default.
        linear: the further arguments of `Linear`, for W and b.

    Reference: Unit Scaling (Blake et al., 2023), section 6.1; Recurrent Highway
    Networks (Zilly et al., 2017), of depth one.
    """

    @checked
    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        rebias: float = 1.0,
        param_dtype: Any = jnp.float32,
        carry_init: nnx.Initializer | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.rebias = rebias
        self.param_dtype = param_dtype
        self.carry_init = carry_init
        self.rngs = nnx.data(None)
        self.dense = Linear(
            in_features + hidden_features,
            2 * hidden_features,
            param_dtype=param_dtype,
            # Two gates in one kernel, which is no matrix to turn.
            kernel_metadata={"fan_out": None} | dict(kernel_metadata or {}),
            rngs=rngs,
            **linear,
        )

    def __call__(
        self, carry: jax.Array, inputs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        h = highway_step(self.dense, carry, inputs, rebias=self.rebias)
        return h, h

    initialize_carry = nnx.GRUCell.initialize_carry
    num_feature_axes = nnx.GRUCell.num_feature_axes


class RNN(nnx.RNN):
    """`flax.nnx.RNN`, which divides the gradients of its cell by sqrt(steps).

    A weight that is used at each step sums up as many gradients. Only the loop knows
    how many, so its parameters get the factor steps^-1/2 here, and a loop of your own
    needs `scale_bwd(parameter, steps**-0.5)`.
    """

    __init__ = checked(nnx.RNN.__init__, unroll=int | bool)

    def __call__(
        self, inputs: jax.Array, *, time_major: bool | None = None, **namesake: Any
    ) -> Any:
        time_major = self.time_major if time_major is None else time_major
        axis = 0 if time_major else -1 - self.cell.num_feature_axes
        steps = inputs.shape[axis]
        twin = with_weights(self, nnx.Param, lambda _, p: each_step(p, steps))
        return nnx.RNN.__call__(twin, inputs, time_major=time_major, **namesake)


class Bidirectional(nnx.Bidirectional):
    """`flax.nnx.Bidirectional` of two `RNN`s of unit-scaled cells.

    Factors: 1 throughout. Both halves of the output have unit scale; so has what a
    `merge_fn` makes of them if it keeps the scale, as concatenation and `weighted_add`
    do and `jnp.add` does not. The two cotangents of the input add up to sqrt(2), which
    a constraint would have the output pay for.
    """

    __init__ = checked(nnx.Bidirectional.__init__)
