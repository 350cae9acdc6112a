"""Trains one character-level language model: `python -m experiments.char_lm.train`."""

import dataclasses
import functools as ft
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

import jax_unit_scaling as jus
from jax_unit_scaling import analysis

from ..shared.data import load_corpus, train_batch
from ..shared.evaluate import mean_bits
from ..shared.loop import train_steps
from ..shared.record import claim, log
from .model import ModelConfig
from .task import Optimiser, make_training, optimiser, warmup_cosine


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
    optimiser: Optimiser = "adam"
    learning_rate: float = 1.0
    """For Adam about 2 if unit-scaled and 2^-7 if regular: see the sweep."""
    warmup: int = 50
    steps: int = 1000
    batch: int = 8
    length: int = 128
    seed: int = 0
    eval_characters: int = 65536
    checkpoint_every: int = 200
    track_every: int = 0
    """After so many steps each, the scales of weights, products and their cotangents go
    into the run's folder: scales/<step>.npz, and at the end scales.html and .png. 0 for
    never."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length", "eval_characters", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be 1 or more, got {getattr(self, name)}."
                )
        if self.track_every < 0:
            raise ValueError(
                f"`track_every` must be 0 or more, got {self.track_every}."
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """What a configuration means: a state to start from, and functions of it."""

    state: Any
    step: Callable[..., Any]
    """(state, inputs, targets) -> (state, loss in nats)"""
    tracked_step: Callable[..., Any]
    """(state, inputs, targets) -> (state, loss in nats, scales)"""
    nats: Callable[..., jax.Array]
    """(state, inputs, targets) -> the loss of each character, [batch, length]"""


def make_task(config: TrainConfig, vocabulary: int) -> Task:
    """The jitted functions that `train` calls."""

    def make_optimiser(rate: Any) -> optax.GradientTransformation:
        schedule = warmup_cosine(rate, warmup=config.warmup, steps=config.steps)
        return optimiser(config.model.parametrisation, schedule, config.optimiser)

    training = make_training(config.model, vocabulary, make_optimiser)

    @jax.jit
    def step(state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        return training.step(state, config.learning_rate, inputs, targets)

    @jax.jit
    def tracked_step(state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        track = ft.partial(jus.track_value_and_grad, where=_is_watched)
        rate = config.learning_rate
        return training.step(state, rate, inputs, targets, value_and_grad=track)

    state = training.init(config.seed)
    return Task(state, step, tracked_step, jax.jit(training.nats))


def _is_watched(site: Any) -> bool:
    """Weights, products, and factors: what the formats of a training run have to hold.

    All tensors would be ten times as many, and their statistics as long to compile.
    """
    watched = ("/dot_general", "/scaling")
    return site.source == "argument" or site.name.endswith(watched)


def train(config: TrainConfig, *, progress: bool = True) -> dict[str, Any]:
    """Runs to the end, or goes on with what was begun; returns the final metrics.

    Raises:
        ValueError: if `out` holds a run of another configuration or vocabulary, or its
            last checkpoint cannot be read.
    """
    corpus = load_corpus(config.data)
    claim(
        config.out,
        {
            "config": dataclasses.asdict(config),
            "data": corpus.name,
            "vocabulary": "".join(corpus.vocabulary),
            "fingerprint": corpus.fingerprint,
        },
    )
    task = make_task(config, len(corpus.vocabulary))
    size = {"batch": config.batch, "length": config.length}

    def advance(state: Any, i: int) -> tuple[Any, jax.Array]:
        b = train_batch(corpus.train, step=i, seed=config.seed, **size)
        if config.track_every and i % config.track_every == 0:
            state, value, scales = task.tracked_step(state, b.inputs, b.targets)
            analysis.save(scales, _scales_folder(config) / f"{i}.npz")
            return state, value
        return task.step(state, b.inputs, b.targets)

    model = config.model
    state = train_steps(
        config.out,
        task.state,
        advance,
        steps=config.steps,
        checkpoint_every=config.checkpoint_every,
        name=f"{model.parametrisation} {model.precision}",
        progress=progress,
    )
    nats = ft.partial(task.nats, state)
    bits = mean_bits(nats, corpus.valid, **size, limit=config.eval_characters)
    final = {"step": config.steps, "valid_bits": float(bits)}
    log(config.out, **final)
    if config.track_every:
        scales, steps = read_scales(config.out)
        analysis.report(scales, config.out / "scales.html", steps=steps)
        analysis.timeline(scales, steps).savefig(config.out / "scales.png", dpi=110)
    return final


def _scales_folder(config: TrainConfig) -> Path:
    folder = config.out / "scales"
    folder.mkdir(exist_ok=True)
    return folder


def read_scales(run: Path) -> tuple[jus.Scales, list[int]]:
    """The scales of a run, stacked over the steps at which they were recorded."""
    steps = sorted(int(path.stem) for path in (run / "scales").glob("*.npz"))
    records = [analysis.load(run / "scales" / f"{step}.npz") for step in steps]
    return analysis.stack(records), steps


if __name__ == "__main__":
    print(train(tyro.cli(TrainConfig, description=__doc__)))
