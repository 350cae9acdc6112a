"""What transforming costs: `python -m experiments.transformed.cost`.

Compilation (traced, lowered and compiled in a fresh process) and steps of a training
step of the unmodified model in bfloat16, transformed beside plain, in turn. With
`--statistics` what the statistics of one tensor cost instead, by its size.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
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

from ..char_lm.model import ModelConfig, make_model
from ..overhead.measure import child, keeps_training
from ..shared.layers import make_loss

# Each makes (parameters, inputs, targets) -> (loss, gradients) of the loss.
KINDS: dict[str, Callable[..., Callable[..., Any]]] = {
    "plain": lambda loss, *args: jax.value_and_grad(loss),
    "nothing rewritten": lambda loss, *args: jax.value_and_grad(
        jus.simulate_fp8(loss, choose=lambda product: None)
    ),
    "unit_scale": lambda loss, *args: jus.unit_scale(jax.value_and_grad(loss), *args),
    "simulate_fp8": lambda loss, *args: jax.value_and_grad(jus.simulate_fp8(loss)),
}
VOCABULARY = 512


@dataclasses.dataclass(frozen=True)
class CostConfig:
    """The model, its batch, and how often each is measured."""

    out: Path = Path("runs/transformed")
    """Folder for cost.json."""
    width: int = 256
    depth: int = 12
    head_size: int = 64
    batch: int = 4
    length: int = 128
    repeats: int = 3
    """Rounds of processes that compile."""
    step_repeats: int = 15
    """Rounds of measurements of a step, for as long as a second each."""
    statistics: bool = False
    """Measure what `track_scales` computes of one tensor, and nothing else."""
    log2_sizes: tuple[int, ...] = (16, 20, 24, 26)
    """The tensor's numbers of elements, for `statistics`."""


def cost(config: CostConfig) -> dict[str, Any]:
    """Measures, writes cost.json and prints the table."""
    if config.statistics:
        return tracking(config)
    settings = dataclasses.asdict(config) | {"out": str(config.out)}
    call = (
        "import json; from experiments.transformed import cost; "
        f" config = cost.CostConfig(**{settings!r}); print(json.dumps(cost."
    )
    compiled: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    record: dict[str, Any] = {"config": settings, "jax": jax.__version__}
    config.out.mkdir(parents=True, exist_ok=True)

    def keep(**measured: Any) -> None:
        record.update(measured)
        (config.out / "cost.json").write_text(json.dumps(record, indent=1))

    keep(**child(f"{call}steps(config)))"))
    for _ in range(config.repeats):
        for kind in KINDS:
            compiled[kind].append(child(f"{call}compile_once(config, {kind!r})))"))
            keep(compile=compiled)
    title = f"{record['device']}, jax {jax.__version__}, width {config.width}, "
    title += f"{config.depth} layers, {config.batch} x {config.length} tokens, bfloat16"
    Console(width=100).print(analysis.table(summary(record), title=title))
    return record


def tracking(config: CostConfig) -> dict[str, Any]:
    """The milliseconds of a tensor's statistics, beside those of its mean square."""
    kinds = {
        "mean square, ms": jax.jit(lambda x: (x**2).mean()),
        "statistics, ms": jax.jit(lambda x: jus.track_scales(lambda x: None)(x)[1]),
    }
    rows = []
    for k in config.log2_sizes:
        x = jax.random.normal(jax.random.key(0), (2 ** (k // 2), 2 ** (k - k // 2)))
        row = {"elements": f"2^{k}"}
        for name, fn in kinds.items():
            seconds = [_seconds(fn, x) for _ in range(config.step_repeats + 1)]
            row[name] = f"{1e3 * statistics.median(seconds[1:]):.3f}"
        rows.append(row)
    device = jax.devices()[0].device_kind
    title = f"{device}, jax {jax.__version__}, float32"
    Console(width=100).print(analysis.table(rows, title=title))
    return {"device": device, "jax": jax.__version__, "tracking": rows}


def _seconds(fn: Callable[..., Any], x: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(x))
    return time.perf_counter() - start


def summary(record: dict[str, Any]) -> list[dict[str, str]]:
    """Medians, and ratios to the plain one of the same round."""
    rows = []
    for kind in KINDS:
        row = {"step": kind}
        for part in ("trace", "compile", "all"):
            ours, plain = (
                [each[part] for each in record["compile"][k]] for k in (kind, "plain")
            )
            row[f"{part}, s"] = f"{statistics.median(ours):.2f} ({_ratio(ours, plain)})"
        ours, plain = record["times"][kind], record["times"]["plain"]
        row["step, ms"] = f"{1e3 * statistics.median(ours):.2f} ({_ratio(ours, plain)})"
        rows.append(row)
    return rows


def _ratio(ours: list[float], plain: list[float]) -> str:
    ratio = statistics.median(x / y for x, y in zip(ours, plain, strict=True))
    return f"{ratio:.3f}"


def compile_once(config: CostConfig, kind: str) -> dict[str, float]:
    """Seconds of tracing, of lowering and compiling, and of all, in this process.

    The example run of `unit_scale`, once for a whole training, is not among them.
    """
    step, state, ids = _training(config, kind)
    start = time.perf_counter()
    traced = jax.jit(step).trace(state, ids)
    middle = time.perf_counter()
    traced.lower().compile()
    end = time.perf_counter()
    return {"trace": middle - start, "compile": end - middle, "all": end - start}


def steps(config: CostConfig) -> dict[str, Any]:
    """Seconds of a step of each kind, in as many rounds, and the device."""
    runners = {kind: keeps_training(*_training(config, kind)) for kind in KINDS}
    count = max(1, round(1 / runners["plain"](2)))
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(config.step_repeats):
        for kind in list(KINDS)[:: 1 if i % 2 else -1]:
            times[kind].append(runners[kind](count))
    return {"device": jax.devices()[0].device_kind, "times": times}


def _training(
    config: CostConfig, kind: str
) -> tuple[Callable[..., Any], Any, jax.Array]:
    """A step (state, ids) -> (state, loss) of Adam, a state to begin with, and ids."""
    model = ModelConfig(
        "regular",
        "bfloat16",
        width=config.width,
        depth=config.depth,
        head_size=config.head_size,
    )
    graph, params = nnx.split(make_model(model, VOCABULARY, 0))
    mean, adam = make_loss(model.parametrisation), optax.adam(1e-3)
    shape = (config.batch, config.length + 1)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, shape))

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        return mean(nnx.merge(graph, params)(ids[:, :-1]), ids[:, 1:])

    value_and_grad = KINDS[kind](loss, params, ids)

    def step(state: Any, ids: jax.Array) -> Any:
        params, opt_state = state
        value, grads = value_and_grad(params, ids)
        updates, opt_state = adam.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step, (params, adam.init(params)), ids


if __name__ == "__main__":
    import tyro  # where it is not installed, `cost` can still be called

    cost(tyro.cli(CostConfig, description=__doc__))
