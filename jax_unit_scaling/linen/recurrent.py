"""Recurrent cells and their loop, drop-in for their `flax.linen` namesakes."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.recurrent import DenseParams

from ..layers.linear import options_of
from ..layers.recurrent import (
    Pair,
    each_step,
    gru_step,
    highway_step,
    lstm_step,
    mgu_step,
    simple_step,
)
from ..ops.arithmetic import weighted_add
from ..ops.contraction import linear
from .conv import Conv
from .linear import Checked, Dense, Scaled, fields_of, unit_normal
from .metadata import mapped, with_role
from .names import named


class _Gates(Dense):
    """`Dense` of a cell. NNX joins a cell's gates in one kernel, which is no matrix to
    turn; so neither is one of them here."""

    _is_matrix: ClassVar[bool] = False


class _Cell(Scaled):
    """The layers of a cell; its namesake, next in line, has the fields they need."""

    def _layer(self: Any, name: str, use_bias: bool, bias_init: Any = None) -> Dense:
        """From the input, a name that begins with `i`, or else from the carry."""
        kernel_init = self.kernel_init if name[0] == "i" else self.recurrent_kernel_init
        return _Gates(
            self.features,
            use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init or self.bias_init,
            name=name,
            **fields_of(self, "dtype", "param_dtype"),
            **options_of(self),
        )


class SimpleCell(nn.SimpleCell, _Cell):
    """`flax.linen.SimpleCell` with unit scale: h' = tanh(W_i x + W_h h), or with `+ h`.

    All cells take the arguments of their namesakes; formats, constraint and
    batch_axis_name as in `Dense`; and any activation function, whose factors are
    computed. They give the carry and the output unit scale for independent inputs of
    unit scale.
    """

    kernel_init: nn.initializers.Initializer = unit_normal
    recurrent_kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, carry: jax.Array, inputs: jax.Array) -> Pair:
        h = simple_step(
            self._layer("i", True)(inputs),
            self._layer("h", False)(carry),
            carry,
            activation_fn=self.activation_fn,
            residual=self.residual,
        )
        return h, h


class LSTMCell(nn.LSTMCell, _Cell):
    """`flax.linen.LSTMCell` with unit scale: see `SimpleCell`."""

    kernel_init: nn.initializers.Initializer = unit_normal
    recurrent_kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, carry: Pair, inputs: jax.Array) -> tuple[Pair, jax.Array]:
        c, h = carry
        gates = (
            weighted_add(
                self._layer(f"i{gate}", False)(inputs),
                self._layer(f"h{gate}", True)(h),
            )
            for gate in "ifgo"
        )
        return lstm_step(
            c, *gates, gate_fn=self.gate_fn, activation_fn=self.activation_fn
        )


class OptimizedLSTMCell(nn.OptimizedLSTMCell, _Cell):
    """`flax.linen.OptimizedLSTMCell` with unit scale: see `SimpleCell`."""

    kernel_init: nn.initializers.Initializer = unit_normal
    recurrent_kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, carry: Pair, inputs: jax.Array) -> tuple[Pair, jax.Array]:
        c, h = carry
        product = weighted_add(
            self._product("i", inputs, self.kernel_init, False),
            self._product("h", h, self.recurrent_kernel_init, True),
        )
        return lstm_step(
            c,
            *jnp.split(product, 4, axis=-1),
            gate_fn=self.gate_fn,
            activation_fn=self.activation_fn,
        )

    def _product(self, source: str, x: jax.Array, init: Any, use_bias: bool) -> Any:
        """One product for the four gates, whose parameters are those of `LSTMCell`."""
        parts: list[Any] = [
            DenseParams(
                self.features,
                use_bias,
                self.param_dtype,
                kernel_init=with_role(init, "weight", x.shape[-1]),
                bias_init=with_role(self.bias_init, "bias"),
                name=source + gate,
            )(x)
            for gate in "ifgo"
        ]
        kernel = jnp.concatenate([kernel for kernel, _ in parts], axis=-1)
        bias = jnp.concatenate([b for _, b in parts], axis=-1) if use_bias else None
        promoted = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return linear(*promoted, **options_of(named(self)))


class GRUCell(nn.GRUCell, _Cell):
    """`flax.linen.GRUCell` with unit scale: see `SimpleCell`."""

    kernel_init: nn.initializers.Initializer = unit_normal
    recurrent_kernel_init: nn.initializers.Initializer = unit_normal

    @nn.compact
    def __call__(self, carry: jax.Array, inputs: jax.Array) -> Pair:
        pairs = (
            (
                self._layer(f"i{gate}", True)(inputs),
                self._layer(f"h{gate}", gate == "n")(carry),
            )
            for gate in "rzn"
        )
        h = gru_step(
            carry, *pairs, gate_fn=self.gate_fn, activation_fn=self.activation_fn
        )
        return h, h


class MGUCell(nn.MGUCell, _Cell):
    """`flax.linen.MGUCell` with unit scale: see `SimpleCell`.

    `forget_bias` is the number that `forget_bias_init` gives, which the factors depend
    on: a gate that starts on the side of keeping writes less.
    """

    kernel_init: nn.initializers.Initializer = unit_normal
    recurrent_kernel_init: nn.initializers.Initializer = unit_normal
    forget_bias: float = dataclasses.field(default=1.0, kw_only=True)

    @nn.compact
    def __call__(self, carry: jax.Array, inputs: jax.Array) -> Pair:
        zero = self.activation_bias_init
        h = mgu_step(
            carry,
            (
                self._layer("if", True, self.forget_bias_init)(inputs),
                self._layer("hf", False, zero)(carry),
            ),
            (
                self._layer("in", True, zero)(inputs),
                self._layer("hn", self.reset_gate, zero)(carry),
            ),
            **fields_of(self, "gate_fn", "activation_fn", "reset_gate", "forget_bias"),
        )
        return h, h


class ConvLSTMCell(nn.ConvLSTMCell, Scaled):
    """`flax.linen.ConvLSTMCell` with unit scale: see `SimpleCell`."""

    @nn.compact
    def __call__(self, carry: Pair, inputs: jax.Array) -> tuple[Pair, jax.Array]:
        names = ("strides", "padding", "use_bias", "dtype", "param_dtype")

        def layer(name: str) -> Conv:
            return Conv(
                4 * self.features,
                self.kernel_size,
                name=name,
                **fields_of(self, *names),
                **options_of(self),
            )

        c, h = carry
        gates = weighted_add(layer("ih")(inputs), layer("hh")(h))
        i, g, f, o = jnp.split(gates, 4, axis=-1)
        return lstm_step(
            c, i, f, g, o, gate_fn=nn.sigmoid, activation_fn=nn.tanh, forget_bias=1.0
        )


class RecurrentHighwayCell(nn.RNNCellBase, Scaled):
    """The 2023 paper's recurrent highway cell: h' = (1 - u) h + a u tanh(t).

    [t, u'] = W [x, h] + b and u = sigmoid(u' - rebias), with the constant a that keeps
    h at unit scale (`gated_carry`) and a unit-scaled tanh. The carry is one array.

    Attributes:
        features: the size of the carry and of the output.
        rebias: how far the gate starts on the side of keeping.
        carry_init: the initial carry's initialiser.
        use_bias and the rest: as in `Dense`.

    Reference: Unit Scaling (Blake et al., 2023), section 6.1; Recurrent Highway
    Networks (Zilly et al., 2017), of depth one.
    """

    features: int
    rebias: float = 1.0
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = unit_normal
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    carry_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, carry: jax.Array, inputs: jax.Array) -> Pair:
        names = ("use_bias", "dtype", "param_dtype", "kernel_init", "bias_init")
        dense = _Gates(
            2 * self.features,
            name="dense",
            **fields_of(self, *names),
            **options_of(self),
        )
        h = highway_step(dense, carry, inputs, rebias=self.rebias)
        return h, h

    initialize_carry = nn.GRUCell.initialize_carry
    num_feature_axes = nn.GRUCell.num_feature_axes


class RNN(nn.RNN, Checked):
    """`flax.linen.RNN`, which divides the gradients of its cell by sqrt(steps).

    A weight that is used at each step sums up as many gradients. Only the loop knows
    how many, so its parameters get the factor steps^-1/2 here, and a loop of your own
    needs `scale_bwd(parameter, steps**-0.5)`.
    """

    unroll: int | bool = 1

    def __call__(
        self, inputs: jax.Array, *, time_major: bool | None = None, **namesake: Any
    ) -> Any:
        time_major = self.time_major if time_major is None else time_major
        axis = 0 if time_major else -1 - self.cell.num_feature_axes
        steps = inputs.shape[axis]
        loop = mapped(nn.RNN.__call__, lambda params: each_step(params, steps))
        return loop(self, inputs, time_major=time_major, **namesake)


class Bidirectional(nn.Bidirectional, Checked):
    """`flax.linen.Bidirectional` of two `RNN`s of unit-scaled cells.

    Factors: 1 throughout. Both halves of the output have unit scale; so has what a
    `merge_fn` makes of them if it keeps the scale, as concatenation and `weighted_add`
    do and `jnp.add` does not. The two cotangents of the input add up to sqrt(2), which
    a constraint would have the output pay for.
    """
