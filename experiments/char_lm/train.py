"""Trains one character-level language model: `python -m experiments.char_lm.train`."""

import dataclasses
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from rich.progress import Progress

import jax_unit_scaling as jus

from .data import Corpus, eval_batches, load_corpus, train_batch
from .model import ModelConfig, make_loss, make_model


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run: data, model, optimiser and where its results go."""

    out: Path
    """Folder of the run: config.json, metrics.jsonl and checkpoints. A second call with
    the same configuration goes on from the last checkpoint."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    learning_rate: float = 1.0
    """Of Adam; about 1 for unit, 2^-8 for regular."""
    warmup: int = 50
    steps: int = 1000
    batch: int = 8
    length: int = 128
    seed: int = 0
    eval_characters: int = 65536
    checkpoint_every: int = 200


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs to the end, or goes on with what was begun; returns the final metrics.

    Raises:
        ValueError: if `out` holds a run of another configuration or vocabulary.
    """
    corpus = load_corpus(config.data)
    _claim(config, corpus)
    graph, params = nnx.split(
        make_model(config.model, len(corpus.vocabulary), config.seed)
    )
    optimiser = _optimiser(config)
    state = (params, optimiser.init(params))
    loss = make_loss(config.model)

    @jax.jit
    def step(state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(
            lambda p: loss(nnx.merge(graph, p)(inputs), targets)
        )(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def nats(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(nnx.merge(graph, params)(inputs).astype(jnp.float32))
        return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

    def evaluate(split: np.ndarray) -> float:
        total, count = 0.0, 0
        for b in eval_batches(
            split,
            batch=config.batch,
            length=config.length,
            limit=config.eval_characters,
        ):
            total += float(
                np.asarray(nats(state[0], b.inputs, b.targets))[b.mask].sum()
            )
            count += int(b.mask.sum())
        return total / count / math.log(2)

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(
        config.out.resolve() / "checkpoints", options=options
    ) as saved:
        start = saved.latest_step() or 0
        if start:
            state = _restored(saved, start, state)
        for i in _shown(range(start, config.steps)):
            b = train_batch(
                corpus.train,
                step=i,
                seed=config.seed,
                batch=config.batch,
                length=config.length,
            )
            state, value = step(state, b.inputs, b.targets)
            if i % 10 == 0 or i + 1 == config.steps:
                _log(config, step=i, loss_bits=float(value) / math.log(2))
            if (i + 1) % config.checkpoint_every == 0:
                saved.save(i + 1, args=ocp.args.StandardSave(jax.tree.leaves(state)))
    final = {"step": config.steps, "valid_bits": evaluate(corpus.valid)}
    _log(config, **final)
    return final


def _restored(saved: Any, step: int, state: Any) -> Any:
    leaves, structure = jax.tree.flatten(state)
    restored = saved.restore(step, args=ocp.args.StandardRestore(leaves))
    return jax.tree.unflatten(structure, restored)


def _optimiser(config: TrainConfig) -> Any:
    """Adam; unit-scaled, with u-muP's factor on each weight's learning rate."""
    unit = config.model.parametrisation == "unit"
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup, config.steps // 2),
        config.steps,
        config.learning_rate / 10,
    )
    return optax.chain(
        optax.scale_by_adam(b2=0.99, eps=1e-12),
        jus.optim.scale_by_umup() if unit else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def _shown(steps: range) -> Iterator[int]:
    """The steps, with a progress bar and the time that is left."""
    with Progress() as progress:
        yield from progress.track(steps, description="training")


def _claim(config: TrainConfig, corpus: Corpus) -> None:
    """Writes down what this folder holds, or checks that it is the same run."""
    config.out.mkdir(parents=True, exist_ok=True)
    record = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "data": corpus.name,
        "fingerprint": corpus.fingerprint,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    path = config.out / "config.json"
    if not path.exists():
        path.write_text(json.dumps(record, indent=1))
        return
    found = json.loads(path.read_text())
    for name in ("config", "data", "fingerprint"):
        if found[name] != record[name]:
            raise ValueError(
                f"`out` {config.out} holds a run of another {name}: {found[name]}, not "
                f"{record[name]}. Choose another folder, or delete this one."
            )


def _log(config: TrainConfig, **metrics: float) -> None:
    with (config.out / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(metrics) + "\n")


if __name__ == "__main__":
    print(train(tyro.cli(TrainConfig, description=__doc__)))
