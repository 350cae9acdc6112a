"""Training of the paper's models as pure functions, to be vmapped over many of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ...shared.layers import make_loss
from ...shared.loss_scale import scaled_grad
from ...shared.precision import PRECISIONS, store, widen
from .model import Model, ModelConfig

Optimiser = Literal["adamw", "momentum"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained; its learning rate is searched for."""

    model: ModelConfig
    optimiser: Optimiser = "adamw"
    loss_scale: float = 1.0
    """Static. Multiplies the loss; gradients are divided by it in float32."""

    @property
    def is_reference(self) -> bool:
        return self.model.precision == "float32"

    @property
    def kind(self) -> str:
        """What of it is compared for the same model: a column of the table."""
        scaling = f", loss x {self.loss_scale:g}" if self.loss_scale != 1 else ""
        names = {"regular": "regular", "unit": "unit-scaled"}
        return f"{names[self.model.parametrisation]} {self.model.precision}{scaling}"

    @property
    def name(self) -> str:
        """The model that it is a kind of: a row of the table."""
        m = self.model
        parts = [f"{m.mixer}, {m.norm} norm", f"{m.residual} residual, {m.depth} deep"]
        return ", ".join(parts + [self.optimiser] * (self.optimiser != "adamw"))


class Training(NamedTuple):
    """A state is the parameters, the optimiser's state, and a key."""

    init: Callable[[Any], Any]
    """seed -> state"""
    steps: Callable[..., Any]
    """(state, rate, loss scale, inputs [steps, batch, length], targets) -> (state, the
    loss of each step in nats)"""
    nats: Callable[..., jax.Array]
    """(state, inputs, targets) -> the loss of each character, [batch, length]"""


def make_training(
    setting: Setting, vocabulary: int, *, steps: int, overlap: int, halvings: float
) -> Training:
    """The functions, none of them jitted.

    Args:
        setting: what to train.
        vocabulary: the number of characters.
        steps: the run's length, over which the rate is halved `halvings` times.
        overlap: how many of a window's first targets do not count.
        halvings: the paper's AdamW has 8 in its 2^19 steps.
    """
    precision = PRECISIONS[setting.model.precision]
    loss = make_loss(setting.model.parametrisation)

    def fresh(seed: Any) -> Model:
        return Model(setting.model, vocabulary, rngs=nnx.Rngs(jax.random.key(seed)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: fresh(0)))

    def optimiser(rate: Any) -> optax.GradientTransformation:
        schedule = optax.exponential_decay(rate, steps, 2.0**-halvings)
        return make_optimiser(setting, schedule)

    def init(seed: Any) -> Any:
        params = nnx.state(fresh(seed))
        key = jax.random.key(seed + 2**16)  # others than the parameters'
        # The rate is no part of an optimiser's state.
        return store(params, precision, key), optimiser(1.0).init(params), key

    def step(state: Any, rate: Any, loss_scale: Any, batch: Any) -> Any:
        params, opt_state, key = state
        inputs, targets = batch
        counts = jnp.broadcast_to(jnp.arange(inputs.shape[-1]) >= overlap, inputs.shape)

        def mean(params: Any) -> jax.Array:
            return loss(nnx.merge(graph, params)(inputs), targets, counts)

        value, grads = scaled_grad(mean, params, loss_scale)
        wide = widen(params)
        updates, opt_state = optimiser(rate).update(grads, opt_state, wide)
        key, now = jax.random.split(key)
        params = store(optax.apply_updates(wide, updates), precision, now)
        return (params, opt_state, key), value

    def many(state: Any, rate: Any, loss_scale: Any, inputs: Any, targets: Any) -> Any:
        return jax.lax.scan(
            lambda state, batch: step(state, rate, loss_scale, batch),
            state,
            (inputs, targets),
        )

    def nats(state: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, state[0])(inputs).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    return Training(init, many, nats)


def make_optimiser(
    setting: Setting, schedule: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """The paper's: AdamW without decay, or SGD with momentum 0.9.

    Of a unit-scaled model the rate of vectors (biases, gains) is divided by the root of
    their size, as in the authors' code; all other parameters have the same rate.
    """
    dtype = jnp.dtype(PRECISIONS[setting.model.precision].weights)
    direction = {
        "adamw": optax.scale_by_adam(eps=1e-7, mu_dtype=dtype),
        "momentum": optax.trace(0.9, accumulator_dtype=dtype),
    }[setting.optimiser]
    parts = [direction]
    if setting.model.parametrisation == "unit":
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(_slow, updates)))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def _slow(update: jax.Array) -> jax.Array:
    return update * update.size**-0.5 if update.ndim == 1 else update
