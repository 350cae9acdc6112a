"""Fine-tunes a pre-trained BERT on files of SQuAD's form, and scores it.

`python -m experiments.bert.finetune --pretrained runs/bert-base --train train-v2.0.json
--dev dev-v2.0.json`
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jax_unit_scaling as jus

from ..shared.layers import make_loss
from ..shared.loop import train_steps
from ..shared.loss_scale import LossScale
from ..shared.precision import PRECISIONS
from ..shared.record import claim, log
from ..shared.tokens import read_word_pieces
from .data import PIECES
from .model import ModelConfig, SpanModel
from .squad import Windows, decode, read_questions, score, windows
from .training import (
    Optimiser,
    fresh,
    load_weights,
    make_optimiser,
    make_training,
    warmup_linear,
)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """One run."""

    pretrained: Path
    """The folder of a pre-training run that has ended. The model is that run's."""
    train: Path
    """A file of SQuAD's form, version 1.1 or 2.0."""
    dev: Path
    out: Path = Path("runs/squad")
    """Folder of the run: config.json, metrics.jsonl, checkpoints, predictions.json (as
    the official evaluation takes it). A second call goes on."""
    precision: str | None = None
    """Another than in pre-training."""
    optimiser: Optimiser = "lamb"
    rate: float = 1e-3
    epochs: float = 2.0
    warmup: float = 0.1
    """The share of the steps."""
    batch: int = 32
    length: int = 384
    stride: int = 128
    longest: int = 30
    """An answer's pieces at most."""
    threshold: float = 0.0
    """How much better than a span no answer has to be, in version 2.0."""
    loss_scale: LossScale = LossScale()
    seed: int = 0
    checkpoint_every: int = 200


def finetune(config: FinetuneConfig, *, progress: bool = True) -> dict[str, float]:
    """Runs to the end, or goes on; returns exact match and F1, and writes the answers.

    Raises:
        FileNotFoundError: if there is no pre-trained model, or no such file.
        ValueError: if `out` holds a run of another configuration.
    """
    model, vocabulary = _pretrained(config)
    encoder = read_word_pieces(config.pretrained / PIECES)
    train, dev = read_questions(config.train), read_questions(config.dev)
    shape = {"length": config.length, "stride": config.stride}
    found = windows(train, encoder, **shape)
    claim(config.out, {"config": dataclasses.asdict(config)})

    def build(rngs: nnx.Rngs) -> SpanModel:
        return SpanModel(model, vocabulary, config.batch * config.length, rngs=rngs)

    graph, params = fresh(build, config.seed)
    weights = config.pretrained / "weights.npz"
    params = load_weights(weights, params, under="encoder")
    mean = make_loss(model.parametrisation)

    def logits(params: Any, batch: Windows) -> jax.Array:
        call = nnx.merge(graph, params)
        return call(batch.ids, batch.segments, batch.seen, batch.allowed)

    def loss(params: Any, batch: Windows) -> jax.Array:
        return mean(logits(params, batch), batch.spans)

    steps = max(2, round(config.epochs * len(found.ids) / config.batch))
    warmup = max(1, round(config.warmup * steps))
    rate = warmup_linear(config.rate, warmup=warmup, steps=steps)
    training = make_training(
        loss,
        make_optimiser(config.optimiser, model.parametrisation, rate),
        PRECISIONS[model.precision],
        loss_scale=config.loss_scale,
    )
    step = jus.jit(training.step, donate_argnums=0)
    state = train_steps(
        config.out,
        training.begin(params, config.seed),
        lambda state, i: step(state, _batch(config, found, i)),
        steps=steps,
        checkpoint_every=config.checkpoint_every,
        name="SQuAD",
        progress=progress,
    )
    apply = jax.jit(logits)
    asked = windows(dev, encoder, **shape)
    answers = decode(
        dev,
        asked,
        _predict(lambda batch: apply(state.params, batch), asked, config.batch),
        longest=config.longest,
        may_be_none=any(not q.answers for q in train),
        threshold=config.threshold,
    )
    (config.out / "predictions.json").write_text(json.dumps(answers))
    final = score(dev, answers)
    log(config.out, step=steps, **final)
    return final


def _pretrained(config: FinetuneConfig) -> tuple[ModelConfig, int]:
    """The pre-trained model's configuration, and the number of its pieces."""
    path = config.pretrained / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"`pretrained` must be the folder of a pre-training run, but {path} is "
            "missing."
        )
    given = json.loads(path.read_text())["config"]
    model = ModelConfig(**given["model"])
    if config.length > model.positions:
        raise ValueError(
            f"`length` must be at most the {model.positions} positions of the "
            f"pre-trained model, got {config.length}."
        )
    if config.precision is not None:
        model = dataclasses.replace(model, precision=config.precision)
    return model, given["vocabulary"]


def _batch(config: FinetuneConfig, found: Windows, step: int) -> Windows:
    """All windows once in each epoch, in an order that is a function of the seed."""
    count = len(found.ids)
    places = step * config.batch + np.arange(config.batch)
    orders = {
        epoch: np.random.default_rng([config.seed, epoch]).permutation(count)
        for epoch in {*(places // count).tolist()}
    }
    rows = [orders[p // count][p % count] for p in places.tolist()]
    return _rows(found, rows)


def _rows(found: Windows, rows: Any) -> Windows:
    return jax.tree.map(lambda x: x[rows], found)


def _predict(apply: Any, asked: Windows, batch: int) -> np.ndarray[Any, Any]:
    """The logits of all windows, in batches of one shape."""
    count = len(asked.ids)
    parts = []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        parts.append(np.asarray(apply(_rows(asked, rows))))
    return np.concatenate(parts)[:count]


if __name__ == "__main__":
    import tyro

    print(finetune(tyro.cli(FinetuneConfig, description=__doc__)))
