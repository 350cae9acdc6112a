"""A whole training step at a billion parameters, and a run of some hundred of them.

A byte-pair language model on real text, remat of every block, float32 parameters,
AdamW; the same data for all. Each model is trained at learning rates of which the best
has a worse one on either side, both unit-scaled precisions have the one that is best in
bfloat16, and all are trained from further seeds at theirs.
"""

import dataclasses
import functools as ft
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jax_unit_scaling as jus

from ..shared.data import Ids, load_corpus, text_of, train_batch
from ..shared.loop import timed_steps
from ..shared.tokens import byte_pairs, encode
from .measure import Compiled
from .model import NAMES, Kind, LanguageModel, Size

LAST = 20  # steps whose losses are averaged


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """By default what the figures show."""

    size: Size = Size(batch=8)
    vocabulary: int = 32768
    data: Path | None = None
    characters: int | None = None  # of the text; None for all of it
    kinds: tuple[Kind, ...] = ("bf16", "bf16 unit", "fp8 unit")
    steps: int = 300
    log2_rates: tuple[float, ...] = (0, 1, 2, 3)
    """Of the unit-scaled model's first kind; others have the best of them."""
    plain_log2_rates: tuple[float, ...] = (-13, -12, -11)
    umup_embedding: bool = False
    """Whether the unit-scaled embedding's rate has u-muP's factor width^-1/2. muP's, 1,
    learns a large vocabulary in few steps."""
    plain_embedding: float = 1.0
    """The plain model's embedding's rate over that of its other parameters."""
    warmup: int = 50
    settled: int = 5  # steps before the clock starts
    weight_decay: float = 2**-13
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first is trained at all rates."""


def tokens(config: TrainConfig) -> Ids:
    """The training text as ids of a byte-pair encoding that is trained on it."""
    text = text_of(load_corpus(config.data, "bytes").train)[: config.characters]
    return encode(byte_pairs(text, config.vocabulary), text)


def _optimiser(
    config: TrainConfig, kind: Kind, peak: float
) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup, config.steps)
    if kind == "bf16":
        return optax.chain(
            optax.adamw(rate, weight_decay=0.1),
            optax.masked(optax.scale(config.plain_embedding), _embeddings),
        )
    return jus.optim.adamw(
        rate,
        weight_decay=config.weight_decay,
        overrides=None if config.umup_embedding else {"*embedding": {"fan_in": 1}},
    )


def _embeddings(params: optax.Params) -> Any:
    def is_one(path: tuple[Any, ...], _: Any) -> bool:
        return "embedding" in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(is_one, params)


def training_step(config: TrainConfig, kind: Kind, peak: float) -> tuple[Any, Any]:
    """A step (state, inputs, targets) -> (state, loss) at a peak learning rate, and a
    function of a key that gives the state to begin with."""
    model = LanguageModel(config.size, kind, config.vocabulary)
    optimiser = _optimiser(config, kind, peak)
    loss_of = jus.cross_entropy if kind != "bf16" else _plain_loss

    def initial(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        return params, optimiser.init(params)

    @ft.partial(jus.jit, donate_argnums=0)
    def step(state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        params, opt_state = state

        def loss(params: Any) -> jax.Array:
            logits: Any = model.apply({"params": params}, inputs)
            return loss_of(logits, targets)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step, jax.jit(initial)


def _train(
    config: TrainConfig, kind: Kind, ids: Ids, log2_rate: float, seed: int
) -> dict[str, Any]:
    step, initial = training_step(config, kind, 2.0**log2_rate)
    state = initial(jax.random.key(seed))
    count = sum(x.size for x in jax.tree.leaves(state[0]))

    def batch(i: int) -> tuple[Any, Any]:
        size = config.size
        b = train_batch(ids, step=i, seed=seed, batch=size.batch, length=size.length)
        return b.inputs, b.targets

    start = time.perf_counter()
    program = step.lower(state, *batch(0)).compile()
    compiled = Compiled.of(program, time.perf_counter() - start)

    def show(i: int, value: float) -> None:
        place = f"{kind}, {_label(log2_rate, seed)}: step {i}"
        print(f"{place}, loss {value:.4f} nats", file=sys.stderr)

    _, losses, seconds = timed_steps(
        lambda state, i: program(state, *batch(i)),
        state,
        steps=config.steps,
        settled=config.settled,
        show=show,
    )
    return {
        "ms": seconds * 1e3,
        "tokens_per_s": config.size.batch * config.size.length / seconds,
        "parameters": count,
        "log2_rate": log2_rate,
        "losses": losses,
    } | compiled


def _plain_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    wide = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(wide, targets).mean()


def train(
    config: TrainConfig,
    keep: Callable[[Any], None] = lambda result: None,
    found: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains each kind at its rates, one after another: times, losses and memory.

    Args:
        config: what is trained.
        keep: gets what there is after each training.
        found: what an earlier call with this configuration kept; the rest is trained.

    Returns:
        Every training by kind, rate and seed (`runs`), and of each kind the best of the
        first seed's (`times`), with the median times and `final_losses` of all seeds at
        its rate.
    """
    ids = tokens(config)
    print(f"{len(ids)} tokens", file=sys.stderr)
    runs: dict[str, dict[str, Any]] = dict((found or {}).get("runs", {}))
    result: dict[str, Any] = {"tokens": len(ids), "runs": runs, "times": {}}

    def trained(kind: Kind, rate: float, seed: int) -> Any:
        own = runs.setdefault(NAMES[kind], {})
        if (label := _label(rate, seed)) not in own:
            own[label] = _train(config, kind, ids, rate, seed)
            keep(result)
        return own[label]

    first, *further = config.seeds
    best: dict[bool, float] = {}
    for kind in config.kinds:
        plain = kind == "bf16"
        rates = config.plain_log2_rates if plain else config.log2_rates
        tried = (best[plain],) if plain in best else rates
        chosen = min((trained(kind, r, first) for r in tried), key=final_loss)
        best.setdefault(plain, chosen["log2_rate"])
        result["times"][NAMES[kind]] = _together([chosen])
    for seed in further:
        for kind in config.kinds:
            trained(kind, best[kind == "bf16"], seed)
    for kind in config.kinds:
        rate = best[kind == "bf16"]
        result["times"][NAMES[kind]] = _together(
            [trained(kind, rate, seed) for seed in config.seeds]
        )
    keep(result)
    return result


def _together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first run, with all seeds' median times and final losses."""
    medians = {k: statistics.median(r[k] for r in runs) for k in ("ms", "tokens_per_s")}
    return runs[0] | medians | {"final_losses": [final_loss(r) for r in runs]}


def _label(log2_rate: float, seed: int) -> str:
    return f"2^{log2_rate:g}, seed {seed}"


def final_loss(run: Mapping[str, Any]) -> float:
    """The mean loss of the last twenty steps, in nats; infinite where it diverged."""
    value = statistics.fmean(run["losses"][-LAST:])
    return value if math.isfinite(value) else math.inf
