"""Trains one character-level language model: `python -m experiments.char_lm.train`."""

import contextlib
import dataclasses
import functools as ft
import json
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
import tyro
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import jax_unit_scaling as jus
from jax_unit_scaling import analysis

from .data import Batch, Corpus, Ids, load_corpus, train_batch
from .model import ModelConfig
from .task import Optimiser, make_training, mean_bits, optimiser, warmup_cosine


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
    _claim(config, corpus)
    task = make_task(config, len(corpus.vocabulary))
    # Written before the run goes on: a kill loses one interval at most.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    folder = config.out.resolve() / "checkpoints"
    with ocp.CheckpointManager(folder, options=options) as checkpoints:
        state, start = _latest(checkpoints, task.state)
        _forget_after(config, start)
        with _progress(config, start, progress) as show:
            for i in range(start, config.steps):
                b = _train_batch(config, corpus, i)
                if config.track_every and i % config.track_every == 0:
                    state, value, scales = task.tracked_step(state, b.inputs, b.targets)
                    analysis.save(scales, _scales_folder(config) / f"{i}.npz")
                else:
                    state, value = task.step(state, b.inputs, b.targets)
                if i % 10 == 0 or i + 1 == config.steps:
                    bits = float(value) / math.log(2)
                    _log(config, step=i, loss_bits=bits)
                    show(i + 1, bits)
                if (i + 1) % config.checkpoint_every == 0:
                    leaves = jax.tree.leaves(state)
                    checkpoints.save(i + 1, args=ocp.args.StandardSave(leaves))
    final = {
        "step": config.steps,
        "valid_bits": _evaluate(config, task, state, corpus.valid),
    }
    _log(config, **final)
    if config.track_every:
        scales, steps = read_scales(config.out)
        analysis.report(scales, config.out / "scales.html", steps=steps)
        analysis.timeline(scales, steps).savefig(config.out / "scales.png", dpi=110)
    return final


def _train_batch(config: TrainConfig, corpus: Corpus, step: int) -> Batch:
    return train_batch(
        corpus.train,
        step=step,
        seed=config.seed,
        batch=config.batch,
        length=config.length,
    )


def _evaluate(config: TrainConfig, task: Task, state: Any, split: Ids) -> float:
    """Mean bits per character."""
    return mean_bits(
        lambda inputs, targets: task.nats(state, inputs, targets),
        split,
        batch=config.batch,
        length=config.length,
        limit=config.eval_characters,
    )


def _latest(checkpoints: ocp.CheckpointManager, state: Any) -> tuple[Any, int]:
    """The last checkpoint and its step, or `state` and 0."""
    step = checkpoints.latest_step()
    if step is None:
        return state, 0
    leaves, structure = jax.tree.flatten(state)
    try:
        leaves = checkpoints.restore(step, args=ocp.args.StandardRestore(leaves))
    except Exception as e:  # whatever orbax or its storage makes of a broken file
        raise ValueError(
            f"the checkpoint {checkpoints.directory / str(step)} cannot be read "
            f"({type(e).__name__}: {str(e).splitlines()[0]}). Delete that folder to go "
            "on from the one before it."
        ) from e
    return jax.tree.unflatten(structure, leaves), step


@contextlib.contextmanager
def _progress(
    config: TrainConfig, start: int, show: bool
) -> Iterator[Callable[[int, float], None]]:
    """A bar with the loss and the time that is left; yields show(steps done, bits)."""
    model = config.model
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]:.3f} bits"),
        TimeRemainingColumn(),
        disable=not show,
    )
    with bar:
        task = bar.add_task(
            f"{model.parametrisation} {model.precision}",
            total=config.steps,
            completed=start,
            bits=math.nan,
        )
        yield lambda done, bits: bar.update(task, completed=done, bits=bits)


def _claim(config: TrainConfig, corpus: Corpus) -> None:
    """Writes down what this folder holds, or checks that it is the same run."""
    config.out.mkdir(parents=True, exist_ok=True)
    record = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "data": corpus.name,
        "vocabulary": "".join(corpus.vocabulary),
        "fingerprint": corpus.fingerprint,
    }
    path = config.out / "config.json"
    if not path.exists():
        versions = {"jax": jax.__version__, "python": platform.python_version()}
        path.write_text(json.dumps(record | versions, indent=1))
        return
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON: {e}. Delete this folder.") from e
    for name, value in record.items():
        if found.get(name) != value:
            raise ValueError(
                f"`out` {config.out} holds a run of another {name}: "
                f"{found.get(name)!r}, not {value!r}. Choose another folder, or delete "
                "this one."
            )


def _log(config: TrainConfig, **metrics: float) -> None:
    with (config.out / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(metrics) + "\n")


def _forget_after(config: TrainConfig, start: int) -> None:
    """Drops the metrics of steps that are about to be repeated."""
    path = config.out / "metrics.jsonl"
    if path.exists():
        kept = [r for r in read_metrics(config.out) if r["step"] < start]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, without a line that a kill cut short."""
    records = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


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
