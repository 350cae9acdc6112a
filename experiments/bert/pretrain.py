"""Pre-trains BERT: `python -m experiments.bert.pretrain base` (or `large`, `tiny`).

The paper's two phases, of 128 and of 384 tokens: the second begins with the first's
weights and pieces of words (`base-2 --start runs/bert-base`).
"""

import dataclasses
import functools as ft
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import jax_unit_scaling as jus

from ..shared.layers import make_loss
from ..shared.loop import train_steps
from ..shared.loss_scale import LossScale
from ..shared.precision import PRECISIONS
from ..shared.record import claim, log
from .data import PIECES, VALID_SEED, Text, load_text, masked_batch
from .model import BASE, LARGE, TINY, MaskedLM, ModelConfig
from .training import (
    Optimiser,
    Training,
    fresh,
    load_weights,
    make_optimiser,
    make_training,
    save_weights,
    warmup_linear,
)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """One run; by default the paper's first phase of BERT-Base."""

    out: Path = Path("runs/bert-base")
    """Folder of the run: config.json, metrics.jsonl, checkpoints, and at the end
    weights.npz. A second call with the same configuration goes on."""
    model: ModelConfig = BASE
    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    characters: int | None = None
    """Of the training text, by default all."""
    vocabulary: int = 30400
    lowercase: bool = False
    start: Path | None = None
    """An earlier run, whose weights and pieces of words are taken over."""
    optimiser: Optimiser = "lamb"
    rate: float = 4.5e-3
    warmup: int = 2827
    steps: int = 28266
    batch: int = 16320
    accumulate: int = 510
    length: int = 128
    loss_scale: LossScale = LossScale()
    """For regular float16. The paper's baselines had 512 (Base) and 32768 (Large), in
    the second phase 512 and 128; unit-scaled models need none."""
    seed: int = 0
    eval_batches: int = 8
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "length", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be 1 or more, got {getattr(self, name)}."
                )
        if self.batch % self.accumulate:
            raise ValueError(
                f"`batch` must be a multiple of `accumulate` {self.accumulate}, got "
                f"{self.batch}."
            )
        if not 0 < self.warmup < self.steps:
            raise ValueError(
                f"`warmup` must be between 0 and `steps` {self.steps}, got "
                f"{self.warmup}."
            )
        if self.length > self.model.positions:
            raise ValueError(
                f"`length` must be at most the model's `positions` "
                f"{self.model.positions}, got {self.length}."
            )


_SECOND: dict[str, Any] = {
    "rate": 1.5e-3,
    "warmup": 275,
    "steps": 8437,
    "batch": 4080,
    "length": 384,
}
_BASE = PretrainConfig()
_LARGE = PretrainConfig(out=Path("runs/bert-large"), model=LARGE)
PRESETS: dict[str, tuple[str, PretrainConfig]] = {
    "base": ("The paper's BERT-Base, first phase.", _BASE),
    "large": ("The paper's BERT-Large, first phase.", _LARGE),
    "base-2": (
        "Its second phase; give `--start`.",
        dataclasses.replace(_BASE, out=Path("runs/bert-base-2"), **_SECOND),
    ),
    "large-2": (
        "Its second phase; give `--start`.",
        dataclasses.replace(_LARGE, out=Path("runs/bert-large-2"), **_SECOND),
    ),
    "tiny": (
        "A minute of a CPU.",
        PretrainConfig(
            out=Path("runs/bert-tiny"),
            model=TINY,
            characters=2**20,
            vocabulary=1024,
            rate=2**-6,
            warmup=20,
            steps=200,
            batch=16,
            accumulate=1,
            length=64,
        ),
    ),
}


class Task(NamedTuple):
    """Masked language modelling with a configuration."""

    params: Any
    """In float32, to begin with."""
    training: Training
    nats: Callable[[Any, Any], jax.Array]
    """(parameters, batch) -> the mean loss"""
    batch: Callable[[int], Any]
    """step -> what is trained on"""
    valid: Callable[[Any], float]
    """parameters -> the mean loss over the same batches of the validation text"""


def make_task(config: PretrainConfig, text: Text) -> Task:
    """The functions of a run; those of arrays are not jitted."""
    piece = config.batch // config.accumulate
    loss = make_loss(config.model.parametrisation)

    def build(rngs: nnx.Rngs) -> MaskedLM:
        tokens = piece * config.length
        return MaskedLM(config.model, config.vocabulary, tokens, rngs=rngs)

    graph, params = fresh(build, config.seed)

    def nats(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(batch.ids, batch.segments, batch.places)
        return loss(logits, batch.labels)

    rate = warmup_linear(config.rate, warmup=config.warmup, steps=config.steps)
    training = make_training(
        nats,
        make_optimiser(config.optimiser, config.model.parametrisation, rate),
        PRECISIONS[config.model.precision],
        loss_scale=config.loss_scale,
        accumulate=config.accumulate,
    )
    batch_of = ft.partial(masked_batch, pieces=text.pieces, length=config.length)

    def batch(step: int) -> Any:
        return batch_of(text.train, step=step, seed=config.seed, batch=config.batch)

    jitted = jax.jit(nats)

    def valid(params: Any) -> float:
        def value(i: int) -> float:
            b = batch_of(text.valid, step=i, seed=VALID_SEED, batch=piece)
            return float(jitted(params, b))

        return float(np.mean([value(i) for i in range(config.eval_batches)]))

    return Task(params, training, nats, batch, valid)


def pretrain(config: PretrainConfig, *, progress: bool = True) -> dict[str, float]:
    """Runs to the end, or goes on with what was begun; returns the final metrics.

    Raises:
        ValueError: if `out` holds a run of another configuration.
    """
    text_folder = config.out / "text"
    if config.start is not None and not text_folder.exists():
        shutil.copytree(config.start / "text", text_folder)
    text = load_text(
        text_folder,
        config.data,
        vocabulary=config.vocabulary,
        lowercase=config.lowercase,
        characters=config.characters,
    )
    claim(config.out, {"config": dataclasses.asdict(config)})
    task = make_task(config, text)
    params = task.params
    if config.start is not None:
        params = load_weights(config.start / "weights.npz", params)
    step = jus.jit(task.training.step, donate_argnums=0)
    state = train_steps(
        config.out,
        task.training.begin(params, config.seed),
        lambda state, i: step(state, task.batch(i)),
        steps=config.steps,
        checkpoint_every=config.checkpoint_every,
        name=f"{config.model.parametrisation} {config.model.precision}",
        progress=progress,
    )
    final = {"step": config.steps, "valid_nats": task.valid(state.params)}
    final["skipped"] = int(state.scale.skipped)
    log(config.out, **final)
    save_weights(config.out / "weights.npz", state.params)
    shutil.copy(text_folder / PIECES, config.out / PIECES)
    return final


if __name__ == "__main__":
    import tyro

    print(pretrain(tyro.extras.overridable_config_cli(PRESETS, description=__doc__)))
