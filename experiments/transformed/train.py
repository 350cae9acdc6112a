"""Trains an unmodified Flax Transformer as transformed functions compute it.

`python -m experiments.transformed`. All runs have float32's model, data, number of
steps and learning rate, the best that float32 has of `log2_rates`. What differs is the
function that gives loss and gradients: `VARIANTS`.

A loss in float16 is multiplied by `loss_factor`, and its gradients are divided by it in
float32. float16's own range needs that not to be done; a deep or badly initialised
model does it to itself.
"""

import dataclasses
import functools as ft
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import jax_unit_scaling as jus
from jax_unit_scaling import analysis

from ..char_lm.model import ModelConfig, Precision, make_model
from ..char_lm.task import optimiser, warmup_cosine
from ..shared.data import Batch, Corpus, load_corpus, train_batch
from ..shared.evaluate import mean_bits
from ..shared.layers import make_loss
from ..shared.record import as_json, environment

Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """How loss and gradients are computed."""

    precision: Precision = "float32"
    """The dtype of the model's layers; its parameters are float32."""
    simulate: Transform = lambda loss: loss
    unit_scale: bool = False


VARIANTS: dict[str, Variant] = {
    "float32": Variant(),
    "float32, unit_scale": Variant(unit_scale=True),
    "FP8, naive": Variant(simulate=jus.simulate_fp8),
    "FP8, unit_scale": Variant(simulate=jus.simulate_fp8, unit_scale=True),
    "float16, naive": Variant("float16"),
    "float16, unit_scale": Variant("float16", unit_scale=True),
}
STYLES = {
    name: {
        "color": f"C{['float32', 'FP8', 'float16'].index(name.split(',')[0])}",
        "linestyle": "--" if "unit_scale" in name else "-",
    }
    for name in VARIANTS
}


@dataclasses.dataclass(frozen=True)
class TransformedConfig:
    """The model, its training, and where the results go."""

    out: Path = Path("runs/transformed")
    """Folder for train.json, loss.png and the table."""
    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    width: int = 96
    depth: int = 3
    head_size: int = 32
    steps: int = 400
    warmup: int = 50
    batch: int = 8
    length: int = 128
    log2_rates: tuple[int, ...] = (-9, -8, -7, -6)
    """Adam's learning rates that float32 is trained at, with the first seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    loss_factor: float = 2.0**-14
    """What the loss in float16 is multiplied by."""
    fp8_loss_factor: float = 1.0
    """What the loss in FP8 is multiplied by."""
    eval_characters: int = 65536
    variants: tuple[str, ...] = tuple(VARIANTS)

    def model(self, precision: Precision, vocabulary: int, seed: Any) -> nnx.Module:
        """What is trained: ids [batch, length] to logits."""
        size = {name: getattr(self, name) for name in ("width", "depth", "head_size")}
        config = ModelConfig("regular", precision, **size)
        return make_model(config, vocabulary, seed)

    def factor(self, variant: Variant) -> float:
        """What the variant's loss is multiplied by."""
        if variant.precision == "float16":
            return self.loss_factor
        return self.fp8_loss_factor if variant.simulate is jus.simulate_fp8 else 1.0


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: mean bits per character, and those of training by step."""

    variant: str
    log2_rate: int
    seed: int
    valid_bits: float
    train_bits: list[tuple[int, float]]
    seconds: float


def compare(config: TransformedConfig) -> list[Run]:
    """Runs all, writes `train.json` as it goes, the table and `loss.png`."""
    corpus = load_corpus(config.data)
    step_of = {
        name: value_and_grad(config, VARIANTS[name], corpus) for name in config.variants
    }
    config.out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []

    def add(name: str, log2_rate: int, seeds: Sequence[int]) -> Run:
        for run in train(config, corpus, name, step_of[name], log2_rate, seeds):
            runs.append(run)
            of = f"{name} at 2^{log2_rate}, seed {run.seed}"
            print(f"{of}: {run.valid_bits:.4f} bits, {run.seconds} s", flush=True)
            _write(config, corpus, runs)
        return runs[-1]

    swept = [add("float32", rate, config.seeds[:1]) for rate in config.log2_rates]
    best = min(swept, key=lambda run: run.valid_bits).log2_rate
    for name in config.variants:
        add(name, best, config.seeds[1:] if name == "float32" else config.seeds)
    chosen = [run for run in runs if run.log2_rate == best]
    table = analysis.table(summary(chosen))
    Console().print(table)
    draw(chosen, config.out / "loss.png")
    return runs


def value_and_grad(
    config: TransformedConfig, variant: Variant, corpus: Corpus
) -> Callable[..., Any]:
    """(parameters, inputs, targets) -> the loss in nats, and its gradients."""
    count, factor = len(corpus.vocabulary), config.factor(variant)
    make = ft.partial(config.model, variant.precision, count)
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
    mean = make_loss("regular")

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return factor * mean(nnx.merge(graph, params)(inputs), targets)

    step = jax.value_and_grad(variant.simulate(loss))
    if variant.unit_scale:
        params = nnx.state(make(config.seeds[0]))
        first = _batch(config, corpus, 0, config.seeds[0])
        step = jus.unit_scale(step, params, first.inputs, first.targets)

    def unscaled(params: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        return jax.tree.map(lambda x: x / factor, step(params, inputs, targets))

    return unscaled


def train(
    config: TransformedConfig,
    corpus: Corpus,
    name: str,
    step: Callable[..., Any],
    log2_rate: int,
    seeds: Sequence[int],
) -> Iterator[Run]:
    """A run of each seed, which begins with other parameters and sees other batches."""
    make = ft.partial(config.model, "float32", len(corpus.vocabulary))
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(0)))
    schedule = warmup_cosine(2.0**log2_rate, warmup=config.warmup, steps=config.steps)
    adam = optimiser("regular", schedule)

    @jax.jit
    def update(params: Any, state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        value, grads = step(params, inputs, targets)
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def nats(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(inputs).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    for seed in seeds:
        start = time.perf_counter()
        params = nnx.state(make(seed))
        state, values = adam.init(params), []
        for i in range(config.steps):
            b = _batch(config, corpus, i, seed)
            params, state, value = update(params, state, b.inputs, b.targets)
            values.append(value)
        bits = np.asarray(jax.device_get(values), np.float64) / math.log(2)
        every = max(config.steps // 40, 1)
        curve = [
            (i + every, float(bits[i : i + every].mean()))
            for i in range(0, config.steps, every)
        ]
        valid = mean_bits(
            ft.partial(nats, params),
            corpus.valid,
            batch=config.batch,
            length=config.length,
            limit=config.eval_characters,
        ).item()
        seconds = round(time.perf_counter() - start, 1)
        yield Run(name, log2_rate, seed, round(valid, 5), curve, seconds)


def summary(runs: list[Run]) -> list[dict[str, Any]]:
    """The table's rows: means over seeds, and each beside float32 of the same seeds."""
    bits = {
        name: np.array([run.valid_bits for run in runs if run.variant == name])
        for name in _names(runs)
    }
    return [
        {
            "computed in": name,
            "valid. bits per character": f"{each.mean():.4f}",
            "beside float32": f"{each.mean() / bits['float32'].mean() - 1:+.2%}",
            "in nats": f"{(each - bits['float32']).mean() * math.log(2):+.4f}",
            "of each seed": " ".join(
                f"{ratio - 1:+.2%}" for ratio in each / bits["float32"]
            ),
        }
        for name, each in bits.items()
    ]


def _names(runs: list[Run]) -> list[str]:
    return [*dict.fromkeys(run.variant for run in runs)]


def draw(runs: list[Run], path: Path) -> None:
    """The training loss, in the mean over seeds, of each variant."""
    lines = {
        name: [
            (points[0][0], float(np.mean([bits for _, bits in points])))
            for points in zip(
                *(run.train_bits for run in runs if run.variant == name), strict=True
            )
        ]
        for name in _names(runs)
    }
    figure = analysis.curves(
        lines, x="step", y="training loss (bits per character)", styles=STYLES
    )
    figure.axes[0].legend(loc=(0.66, 0.5))  # between the lines
    figure.savefig(path, dpi=120)


def _batch(config: TransformedConfig, corpus: Corpus, step: int, seed: int) -> Batch:
    return train_batch(
        corpus.train, step=step, seed=seed, batch=config.batch, length=config.length
    )


def _write(config: TransformedConfig, corpus: Corpus, runs: list[Run]) -> None:
    record = {
        "config": as_json(dataclasses.asdict(config)),
        "data": corpus.name,
        **environment(),
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    (config.out / "train.json").write_text(json.dumps(record, indent=1))
