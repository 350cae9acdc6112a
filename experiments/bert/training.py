"""What pre-training and fine-tuning share: optimisers, schedule, steps, weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jax_unit_scaling as jus

from ..shared.layers import Parametrisation
from ..shared.loss_scale import LossScale, ScaleState, all_finite, scaled_grad
from ..shared.precision import Precision, store, widen

Optimiser = Literal["lamb", "adamw"]
WEIGHT_DECAY = 0.01


def warmup_linear(rate: float, *, warmup: int, steps: int) -> Callable[[Any], Any]:
    """From 0 to `rate` in `warmup` steps, then to 0 at the end, both linear."""
    up = optax.linear_schedule(0.0, rate, warmup)
    down = optax.linear_schedule(rate, 0.0, steps - warmup)
    return optax.join_schedules([up, down], [warmup])


def make_optimiser(
    name: Optimiser, parametrisation: Parametrisation, rate: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """LAMB, or AdamW; for a unit-scaled model with u-muP's rates.

    LAMB's updates are a share of the weights' own norm, whatever that is, so its rates
    are the same for both parametrisations. As in the paper on it, biases and norms have
    neither decay nor that norm.
    """
    if name == "lamb":
        return optax.chain(
            optax.scale_by_adam(0.9, 0.999, eps=1e-6),
            optax.add_decayed_weights(WEIGHT_DECAY, _are_weights),
            optax.masked(optax.scale_by_trust_ratio(), _are_weights),
            optax.scale_by_learning_rate(rate),
        )
    decay: dict[str, Any] = {"weight_decay": WEIGHT_DECAY, "mask": _are_weights}
    if parametrisation == "regular":
        return optax.adamw(rate, eps=1e-6, **decay)
    return jus.optim.adamw(rate, eps=1e-6, independent_weight_decay=False, **decay)


def _are_weights(params: Any) -> Any:
    """A tree of booleans: kernels and tables, and not biases and norms."""

    def is_weight(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return "kernel" in name or "embedding" in name

    return jax.tree_util.tree_map_with_path(is_weight, params)


class State(NamedTuple):
    """Of a training run; the key is for stochastic rounding."""

    params: Any
    opt_state: Any
    scale: ScaleState
    key: jax.Array


class Training(NamedTuple):
    """Two functions, neither of them jitted."""

    begin: Callable[[Any, int], State]
    """(parameters in float32, seed) -> state"""
    step: Callable[[State, Any], tuple[State, jax.Array]]
    """(state, batch) -> (state, loss in nats)"""


def make_training(
    loss: Callable[[Any, Any], jax.Array],
    optimiser: optax.GradientTransformation,
    precision: Precision,
    *,
    loss_scale: LossScale | None = None,
    accumulate: int = 1,
) -> Training:
    """Training by a mean `loss(params, batch)`.

    Args:
        loss: in nats.
        optimiser: of float32 parameters.
        precision: what parameters are kept in between steps.
        loss_scale: by default the loss is as it is.
        accumulate: a batch is divided into so many, one after another.
    """
    loss_scale = loss_scale or LossScale()

    def begin(params: Any, seed: int) -> State:
        key, now = jax.random.split(jax.random.key(seed))
        kept = store(params, precision, now)
        return State(kept, optimiser.init(params), loss_scale.init(), key)

    def grads_of(params: Any, batch: Any, scale: Any) -> Any:
        if accumulate == 1:
            return scaled_grad(lambda p: loss(p, batch), params, scale)
        pieces = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def add(sums: Any, piece: Any) -> Any:
            new = scaled_grad(lambda p: loss(p, piece), params, scale)
            return jax.tree.map(jnp.add, sums, new), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), widen(params)))
        sums, _ = jax.lax.scan(add, zeros, pieces)
        return jax.tree.map(lambda x: x / accumulate, sums)

    def step(state: State, batch: Any) -> tuple[State, jax.Array]:
        value, grads = grads_of(state.params, batch, state.scale.value)
        finite = all_finite(grads)
        wide = widen(state.params)
        updates, opt_state = optimiser.update(grads, state.opt_state, wide)
        key, now = jax.random.split(state.key)
        params = store(optax.apply_updates(wide, updates), precision, now)
        kept = loss_scale.keep(
            finite, (params, opt_state), (state.params, state.opt_state)
        )
        params, opt_state = kept
        scale = loss_scale.update(state.scale, finite)
        return State(params, opt_state, scale, key), value

    return Training(begin, step)


def fresh(build: Callable[[nnx.Rngs], nnx.Module], seed: int) -> tuple[Any, Any]:
    """What `nnx.merge` makes a new model of: its graph and its parameters.

    Not compiled as one program, which for 24 layers takes most of a minute.
    """
    return nnx.split(build(nnx.Rngs(jax.random.key(seed))))


def save_weights(path: Path, params: Any) -> None:
    """All parameters by their paths, in float32."""
    arrays: dict[str, Any] = _by_path(jax.tree.map(np.asarray, widen(params)))
    np.savez(path, **arrays)


def load_weights(path: Path, params: Any, *, under: str = "") -> Any:
    """`params`, with those whose paths begin with `under` as they were saved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if one of them is not in the file, or has another shape there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no pre-training run ended there.")
    found = np.load(path)
    leaves = []
    for name, leaf in _by_path(params).items():
        if not name.startswith(under):
            leaves.append(leaf)
            continue
        if name not in found or found[name].shape != leaf.shape:
            shape = found[name].shape if name in found else "nothing"
            raise ValueError(
                f"{path} has {shape} for the parameter {name} of shape {leaf.shape}: "
                "it holds another model."
            )
        leaves.append(jnp.asarray(found[name]))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _by_path(params: Any) -> dict[str, Any]:
    named = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in named}
