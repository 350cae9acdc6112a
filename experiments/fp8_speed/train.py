"""A whole training step at a billion parameters, and a run of some hundred of them.

`python -m experiments.fp8_speed.train`: a byte-pair language model on real text, remat
of every block, float32 parameters, AdamW; the same data and rate for both precisions.
"""

import dataclasses
import functools as ft
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax

import jax_unit_scaling as jus

from ..shared.data import Ids, load_corpus, text_of, train_batch
from ..shared.loop import timed_steps
from ..shared.record import environment
from ..shared.tokens import byte_pairs, encode
from .model import NAMES, Kind, LanguageModel, Size
from .run import FIGURES


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """By default what the figures show."""

    size: Size = Size(width=2048, hidden=7168, head_size=128, depth=16, batch=8)
    vocabulary: int = 32768
    data: Path | None = None
    kinds: tuple[Kind, ...] = ("bf16", "bf16 unit", "fp8 unit")
    steps: int = 300
    plain_steps: int = 40
    rate: float = 2**-1
    plain_rate: float = 3e-4
    warmup: int = 50
    settled: int = 5  # steps before the clock starts
    weight_decay: float = 2**-13
    seed: int = 0
    out: Path = FIGURES / "train.json"


def tokens(data: Path | None, vocabulary: int) -> Ids:
    """The training text as ids of a byte-pair encoding that is trained on it."""
    text = text_of(load_corpus(data, "bytes").train)
    return encode(byte_pairs(text, vocabulary), text)


def _optimiser(config: TrainConfig, kind: Kind) -> optax.GradientTransformation:
    plain = kind == "bf16"
    peak = config.plain_rate if plain else config.rate
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup, config.steps)
    if plain:
        return optax.adamw(rate, weight_decay=0.1)
    return jus.optim.adamw(rate, weight_decay=config.weight_decay)


def training_step(config: TrainConfig, kind: Kind) -> tuple[Any, Any]:
    """A step (state, inputs, targets) -> (state, loss), and a function of a key that
    gives the state to begin with."""
    model = LanguageModel(config.size, kind, config.vocabulary)
    optimiser = _optimiser(config, kind)
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


def _train(config: TrainConfig, kind: Kind, ids: Ids) -> dict[str, Any]:
    step, initial = training_step(config, kind)
    state = initial(jax.random.key(config.seed))
    count = sum(x.size for x in jax.tree.leaves(state[0]))

    def batch(i: int) -> tuple[Any, Any]:
        size = config.size
        b = train_batch(
            ids, step=i, seed=config.seed, batch=size.batch, length=size.length
        )
        return b.inputs, b.targets

    start = time.perf_counter()
    program = step.lower(state, *batch(0)).compile()
    compile_s = time.perf_counter() - start
    products = jus.compiled.read(program.as_text())
    steps = config.plain_steps if kind == "bf16" else config.steps

    def show(i: int, value: float) -> None:
        print(f"{kind}: step {i}, loss {value:.4f} nats", file=sys.stderr)

    _, losses, seconds = timed_steps(
        lambda state, i: program(state, *batch(i)),
        state,
        steps=steps,
        settled=config.settled,
        show=show,
    )
    return {
        "losses": losses,
        "step_ms": seconds * 1e3,
        "tokens_per_s": config.size.batch * config.size.length / seconds,
        "parameters": count,
        "compile_s": compile_s,
        "fp8": sum(p.is_fp8 for p in products),
        "products": len(products),
        "temporary_gib": program.memory_analysis().temp_size_in_bytes / 2**30,
    }


def _plain_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    wide = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(wide, targets).mean()


def _smoothed(losses: list[float], window: int = 20) -> np.ndarray[Any, Any]:
    window = min(window, len(losses))
    return np.convolve(losses, np.ones(window) / window, "valid")


def _draw(result: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    styles: dict[Kind, str] = {"bf16 unit": "-", "fp8 unit": "--"}
    for kind, style in styles.items():
        if kind in result["runs"]:
            smooth = _smoothed(result["runs"][kind]["losses"])
            axes.plot(smooth / math.log(2), style, label=NAMES[kind].replace("`", ""))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, bits per token (mean of 20 steps)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains each kind in turn, saves after each, and draws the losses."""
    ids = tokens(config.data, config.vocabulary)
    print(f"{len(ids)} tokens", file=sys.stderr)
    result: dict[str, Any] = {
        **environment(),
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "tokens": len(ids),
        "runs": {},
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    for kind in config.kinds:
        result["runs"][kind] = _train(config, kind, ids)
        config.out.write_text(json.dumps(result, indent=1) + "\n")
    _draw(result, config.out.with_suffix(".png"))
    for kind, run in result["runs"].items():
        last = statistics.mean(run["losses"][-20:])
        print(
            f"{kind}: {run['tokens_per_s']:.0f} tokens/s, step {run['step_ms']:.1f} ms,"
            f" last 20 losses {last:.4f}, {run['fp8']} of {run['products']} products in"
            f" FP8, {run['parameters'] / 1e6:.0f}M parameters"
        )
    return result


if __name__ == "__main__":
    import tyro

    train(tyro.cli(TrainConfig))
