"""Learning-rate sweep of the comparison: `python -m experiments.char_lm.sweep`.

Powers of two for each parametrisation and precision, three seeds each; ends with the
table of means and spreads, and the picture. A second call goes on where one stopped.
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
    regular_log2_rates: tuple[int, ...] = (-10, -9, -8, -7, -6)
    unit_log2_rates: tuple[int, ...] = (-1, 0, 1, 2, 3)
    seeds: int = 3
    workers: int = 1
    """Processes; on a GPU several need XLA_PYTHON_CLIENT_PREALLOCATE=false."""


Kind = tuple[Parametrisation, Precision]


class Point(NamedTuple):
    """One configuration of the sweep, and the validation bits of its seeds."""

    parametrisation: Parametrisation
    precision: Precision
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
    rates = {"regular": config.regular_log2_rates, "unit": config.unit_log2_rates}
    kinds = [run for run in RUNS if run[1] in config.precisions]
    places = [(*kind, rate) for kind in kinds for rate in rates[kind[0]]]
    runs = [
        _run(config.demo, *place, seed)
        for place in places
        for seed in range(config.seeds)
    ]
    context = get_context("spawn")  # JAX has threads, which a fork would lose
    with ProcessPoolExecutor(config.workers, mp_context=context) as pool:
        results = track(pool.map(_valid_bits, runs), "sweep", total=len(runs))
        bits = list(results)
    n = config.seeds
    points = [
        Point(*place, tuple(bits[i * n : (i + 1) * n]))
        for i, place in enumerate(places)
    ]
    out = config.demo.out
    (out / "sweep.json").write_text(json.dumps([p._asdict() for p in points], indent=1))
    Console().print(analysis.table(_rows(kinds, points)))
    _draw(kinds, points, out / "sweep.png")
    return points


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


def _run(
    demo: DemoConfig,
    parametrisation: Parametrisation,
    precision: Precision,
    log2_rate: int,
    seed: int,
) -> TrainConfig:
    place = demo.out / f"{parametrisation}-{precision}-{log2_rate}-{seed}"
    run = run_config(demo, parametrisation, precision)
    return dataclasses.replace(run, out=place, learning_rate=2.0**log2_rate, seed=seed)


def _valid_bits(run: TrainConfig) -> float:
    return train(run, progress=False)["valid_bits"]


def _rows(kinds: list[Kind], points: list[Point]) -> list[dict[str, Any]]:
    """The best rate of each kind of run."""
    rows = []
    for kind in kinds:
        best = min((p for p in points if p[:2] == kind), key=lambda p: p.mean)
        rows.append(
            {
                "model": NAMES[best.parametrisation],
                "precision": PRECISIONS.get(best.precision, best.precision),
                "best learning rate": f"2^{best.log2_rate}",
                "valid. bits per character": f"{best.mean:.3f}",
                "spread of seeds": f"{best.spread:.3f}",
            }
        )
    return rows


if __name__ == "__main__":
    sweep(tyro.cli(SweepConfig, description=__doc__))
