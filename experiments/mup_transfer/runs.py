"""Trains one width at many learning rates at once, as one program."""

import dataclasses
import functools as ft
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..char_lm.model import ModelConfig, Parametrisation, Precision
from ..char_lm.task import make_training, optimiser, warmup_cosine
from ..shared.data import Corpus, load_corpus, train_batch
from ..shared.evaluate import mean_bits
from .results import Run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a sweep share, whatever their width."""

    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    precision: Precision = "float32"
    """On a GPU bfloat16 (with float32 parameters) is the fast one."""
    depth: int = 2
    head_size: int = 16
    """Heads grow in number, not in size, so that attention itself knows no width."""
    steps: int = 300
    warmup: int = 50
    batch: int = 8
    length: int = 64
    eval_characters: int = 32768


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the learning rate: one batch of models."""

    parametrisation: Parametrisation
    width: int
    seed: int
    log2_rates: tuple[int, ...]


def corpus(settings: Settings) -> Corpus:
    """The text, read once in each process."""
    return _load(settings.data)


_load = ft.cache(load_corpus)


def train_group(
    settings: Settings, group: Group, show: Callable[[float], None] = lambda share: None
) -> list[Run]:
    """Trains and evaluates all rates of a group; `show` gets the share that is done."""
    text = corpus(settings)
    functions = _functions(
        settings,
        group.parametrisation,
        group.width,
        len(text.vocabulary),
        len(group.log2_rates),
    )
    rates = 2.0 ** jnp.array(group.log2_rates, jnp.float32)
    state = functions.init(group.seed)
    losses = []
    for i in range(settings.steps):
        b = train_batch(
            text.train,
            step=i,
            seed=group.seed,
            batch=settings.batch,
            length=settings.length,
        )
        state, loss = functions.step(state, rates, b.inputs, b.targets)
        losses.append(loss)
        if i % 20 == 0:
            loss.block_until_ready()  # what is only queued is not done
            show(i / settings.steps)
    last = np.array(losses[-max(1, settings.steps // 10) :], np.float64)
    train_bits = last.mean(0) / math.log(2)
    valid_bits = mean_bits(
        ft.partial(functions.nats, state),
        text.valid,
        batch=settings.batch,
        length=settings.length,
        limit=settings.eval_characters,
    )
    kinds = (group.parametrisation, group.width)
    return [
        Run(*kinds, log2_rate, group.seed, _finite(valid), _finite(train))
        for log2_rate, valid, train in zip(
            group.log2_rates, valid_bits, train_bits, strict=True
        )
    ]


def flops(settings: Settings, group: Group) -> float:
    """Of the training: 6 for each token and weight, and attention's own products."""
    weights = 12 * settings.depth * group.width**2
    weights += group.width * len(corpus(settings).vocabulary)
    attention = 2 * settings.depth * settings.length * group.width
    tokens = settings.steps * settings.batch * settings.length
    return 6.0 * (weights + attention) * tokens * len(group.log2_rates)


class _Functions(NamedTuple):
    init: Callable[..., Any]
    """seed -> state, with a leading axis for the rates"""
    step: Callable[..., Any]
    """(state, rates, inputs, targets) -> (state, losses [rates]); takes over `state`"""
    nats: Callable[..., Any]
    """(state, inputs, targets) -> losses [rates, batch, length]"""


@ft.cache  # the seeds of a width share its compilation
def _functions(
    settings: Settings,
    parametrisation: Parametrisation,
    width: int,
    vocabulary: int,
    rates: int,
) -> _Functions:
    def make_optimiser(rate: Any) -> optax.GradientTransformation:
        schedule = warmup_cosine(rate, warmup=settings.warmup, steps=settings.steps)
        return optimiser(parametrisation, schedule)

    model = ModelConfig(
        parametrisation,
        settings.precision,
        width=width,
        depth=settings.depth,
        head_size=settings.head_size,
    )
    training = make_training(model, vocabulary, make_optimiser)
    return _Functions(
        jax.jit(jax.vmap(training.init, in_axes=None, axis_size=rates)),
        jax.jit(jax.vmap(training.step, in_axes=(0, 0, None, None)), donate_argnums=0),
        jax.jit(jax.vmap(training.nats, in_axes=(0, None, None))),
    )


def _finite(x: float) -> float | None:
    return round(float(x), 5) if math.isfinite(x) else None
