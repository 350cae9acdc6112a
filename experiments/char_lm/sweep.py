"""Learning-rate sweep of the comparison: `python -m experiments.char_lm.sweep`.

Powers of two, and two weights of the attention branches, for each parametrisation in
float32; then the other precisions at the weight that was better for it. Three seeds
each. Ends with the table of means and spreads, and the picture. A second call goes on
where one stopped.
"""

import dataclasses
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console
from rich.progress import track

from jax_unit_scaling import analysis

from .demo import NAMES, PRECISIONS, RUNS, DemoConfig, label_and_style, run_config
from .model import Parametrisation, Precision
from .train import TrainConfig, train


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The demonstration's runs at several learning rates and seeds."""

    demo: DemoConfig = dataclasses.field(
        default_factory=lambda: DemoConfig(out=Path("runs/sweep"))
    )
    precisions: tuple[Precision, ...] = ("float32", "fp8", "float16")
    """float32 is always among them."""
    attention_weights: tuple[float, ...] = (1.0, 0.25)
    regular_log2_rates: tuple[int, ...] = (-12, -11, -10, -9, -8, -7, -6)
    unit_log2_rates: tuple[int, ...] = (-1, 0, 1, 2, 3)
    seeds: int = 3
    workers: int = 1
    """Processes; on a GPU several need XLA_PYTHON_CLIENT_PREALLOCATE=false."""


Kind = tuple[Parametrisation, Precision]
Place = tuple[Parametrisation, Precision, float, int]


class Point(NamedTuple):
    """One configuration of the sweep, and the validation bits of its seeds."""

    parametrisation: Parametrisation
    precision: Precision
    attention_weight: float
    log2_rate: int
    bits: tuple[float, ...]

    @property
    def mean(self) -> float:
        return (
            statistics.fmean(self.bits)
            if all(map(math.isfinite, self.bits))
            else math.inf
        )

    @property
    def spread(self) -> float:
        return max(self.bits) - min(self.bits)


def sweep(config: SweepConfig) -> list[Point]:
    """Runs all, prints each configuration's best rate, and draws `sweep.png`."""
    kinds = [r for r in RUNS if r[1] == "float32" or r[1] in config.precisions]
    wide = [kind for kind in kinds if kind[1] == "float32"]
    narrow = [kind for kind in kinds if kind[1] != "float32"]
    weights = config.attention_weights
    points = _points(config, [(*kind, w) for kind in wide for w in weights])
    better = {kind[0]: _best(points, kind).attention_weight for kind in wide}
    points += _points(config, [(*kind, better[kind[0]]) for kind in narrow])
    out = config.demo.out
    (out / "sweep.json").write_text(json.dumps([p._asdict() for p in points], indent=1))
    Console().print(analysis.table(_rows(kinds, points)))
    chosen = [p for p in points if p.attention_weight == better[p.parametrisation]]
    _draw(kinds, chosen, out / "sweep.png")
    return points


def _points(
    config: SweepConfig, models: list[tuple[Parametrisation, Precision, float]]
) -> list[Point]:
    """These models at all rates and seeds."""
    rates = {"regular": config.regular_log2_rates, "unit": config.unit_log2_rates}
    places = [(*model, rate) for model in models for rate in rates[model[0]]]
    n = config.seeds
    runs = [_run(config.demo, place, seed) for place in places for seed in range(n)]
    context = get_context("spawn")  # JAX has threads, which a fork would lose
    with ProcessPoolExecutor(config.workers, mp_context=context) as pool:
        results = track(pool.map(_valid_bits, runs), "sweep", total=len(runs))
        bits = list(results)
    return [
        Point(*place, tuple(bits[i * n : (i + 1) * n]))
        for i, place in enumerate(places)
    ]


def _best(points: list[Point], kind: Kind) -> Point:
    return min((p for p in points if p[:2] == kind), key=lambda p: p.mean)


def _draw(kinds: list[Kind], points: list[Point], path: Path) -> None:
    lines, styles = {}, {}
    for kind in kinds:
        label, style = label_and_style(*kind)
        lines[label] = [(p.log2_rate, p.mean) for p in points if p[:2] == kind]
        styles[label] = style | {"marker": "o", "markersize": 3}
    figure = analysis.curves(
        lines,
        x="log2 learning rate",
        y="validation bits per character, mean of seeds",
        styles=styles,
    )
    figure.savefig(path, dpi=120)
    print(f"drew {path}: validation loss against learning rate")


def _run(demo: DemoConfig, place: Place, seed: int) -> TrainConfig:
    parametrisation, precision, attention_weight, log2_rate = place
    run = run_config(demo, parametrisation, precision)
    return dataclasses.replace(
        run,
        out=demo.out / "-".join(map(str, (*place, seed))),
        model=dataclasses.replace(run.model, attention_weight=attention_weight),
        learning_rate=2.0**log2_rate,
        seed=seed,
    )


def _valid_bits(run: TrainConfig) -> float:
    return train(run, progress=False)["valid_bits"]


def _rows(kinds: list[Kind], points: list[Point]) -> list[dict[str, Any]]:
    """The best rate of each kind of run."""
    rows = []
    for kind in kinds:
        best = _best(points, kind)
        rows.append(
            {
                "model": NAMES[best.parametrisation],
                "precision": PRECISIONS.get(best.precision, best.precision),
                "attention weight": f"{best.attention_weight:g}",
                "best learning rate": f"2^{best.log2_rate}",
                "valid. bits per character": f"{best.mean:.3f}",
                "spread of seeds": f"{best.spread:.3f}",
            }
        )
    return rows


if __name__ == "__main__":
    sweep(tyro.cli(SweepConfig, description=__doc__))
