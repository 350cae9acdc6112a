"""Training as pure functions of seed and learning rate, to be jitted or vmapped."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jax_unit_scaling as jus

from ..shared.layers import Parametrisation, make_loss
from .model import ModelConfig, make_model, simulated

Optimiser = Literal["adam", "lion"]


@dataclasses.dataclass(frozen=True)
class Training:
    """One model's training: a state is its parameters and its optimiser's state."""

    graph: Any
    """What `nnx.merge` makes a model of, with a state's first half."""
    init: Callable[[Any], Any]
    """seed -> state"""
    step: Callable[..., Any]
    """(state, learning rate, inputs, targets) -> (state, loss in nats); with
    `value_and_grad=jus.track_value_and_grad` the scales too"""
    nats: Callable[..., jax.Array]
    """(state, inputs, targets) -> the loss of each character, [batch, length]"""


def make_training(
    model: ModelConfig,
    vocabulary: int,
    make_optimiser: Callable[[Any], optax.GradientTransformation],
) -> Training:
    """The functions, none of them jitted.

    Args:
        model: what to train.
        vocabulary: the number of characters.
        make_optimiser: gives the optimiser of a learning rate, which may be traced.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(model, vocabulary, 0)))
    loss = make_loss(model.parametrisation)

    def init(seed: Any) -> Any:
        params = nnx.state(make_model(model, vocabulary, seed))
        # The rate is no part of an optimiser's state.
        return params, make_optimiser(1.0).init(params)

    def step(
        state: Any,
        rate: Any,
        inputs: jax.Array,
        targets: jax.Array,
        *,
        value_and_grad: Callable[..., Any] = jax.value_and_grad,
    ) -> Any:
        params, opt_state = state
        rounded = simulated(model, lambda p: loss(nnx.merge(graph, p)(inputs), targets))
        value, grads, *scales = value_and_grad(rounded)(params)
        updates, opt_state = make_optimiser(rate).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value, *scales

    def nats(state: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        call = simulated(model, lambda p: nnx.merge(graph, p)(inputs))
        logits = call(state[0]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    return Training(graph, init, step, nats)


def optimiser(
    parametrisation: Parametrisation, rate: Any, name: Optimiser = "adam"
) -> optax.GradientTransformation:
    """optax's optimiser, or the one of the same name with u-muP's learning rates."""
    library: Any = jus.optim if parametrisation == "unit" else optax
    if name == "lion":
        return library.lion(rate, weight_decay=0.0)
    # Adam's epsilon would be a scale; this one is far below any gradient's.
    return library.adam(rate, b2=0.99, eps=1e-12)


def warmup_cosine(rate: Any, *, warmup: int, steps: int) -> Callable[[Any], Any]:
    """Linear from 0 to `rate`, which may be traced, then half a cosine to a tenth."""
    shape = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, min(warmup, steps // 2), steps, 0.1
    )
    return lambda count: rate * shape(count)
