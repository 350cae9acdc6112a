"""The comparison: regular against unit-scaled, in float32, simulated FP8 and float16.

`make demo`, or `python -m experiments.char_lm.demo --help`. All runs see the same data
for the same steps, at the best learning rate that `experiments.char_lm.sweep` found for
each parametrisation in float32.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from jax_unit_scaling import analysis

from ..shared.data import load_corpus, train_batch
from ..shared.record import read_metrics
from .histogram import initial_histograms
from .model import ModelConfig, Parametrisation, Precision
from .train import TrainConfig, train

RUNS: tuple[tuple[Parametrisation, Precision], ...] = (
    ("regular", "float32"),
    ("regular", "fp8"),
    ("regular", "float16"),
    ("unit", "float32"),
    ("unit", "fp8"),
    ("unit", "float16"),
)
NAMES = {"regular": "regular", "unit": "unit-scaled"}
PRECISIONS = {"fp8": "simulated FP8", "float16": "float16, no loss scaling"}


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What all six runs share, and each parametrisation's learning rate."""

    out: Path = Path("runs/demo")
    data: Path | None = None
    steps: int = 400
    width: int = 96
    depth: int = 3
    batch: int = 8
    length: int = 128
    seed: int = 0
    regular_learning_rate: float = 2.0**-7
    unit_learning_rate: float = 2.0


def demo(config: DemoConfig) -> list[dict[str, Any]]:
    """Runs all six, prints the table, draws `loss.png` and `scales.png` into `out`."""
    runs = [run_config(config, *run) for run in RUNS]
    results = [train(run)["valid_bits"] for run in runs]
    rows = []
    for (parametrisation, precision), bits in zip(RUNS, results, strict=True):
        baseline = results[RUNS.index((parametrisation, "float32"))]
        rows.append(
            {
                "model": NAMES[parametrisation],
                "precision": PRECISIONS.get(precision, precision),
                "valid. bits per character": f"{bits:.3f}",
                "gap to float32": f"{bits - baseline:+.3f}" * (precision != "float32"),
            }
        )
    Console().print(analysis.table(rows))
    _draw_losses(runs, config.out / "loss.png")
    _draw_scales(config, config.out / "scales.png")
    return rows


def run_config(
    config: DemoConfig, parametrisation: Parametrisation, precision: Precision
) -> TrainConfig:
    """One of the demonstration's runs."""
    rates = {"regular": config.regular_learning_rate, "unit": config.unit_learning_rate}
    return TrainConfig(
        out=config.out / f"{parametrisation}-{precision}",
        model=ModelConfig(
            parametrisation, precision, width=config.width, depth=config.depth
        ),
        data=config.data,
        learning_rate=rates[parametrisation],
        steps=config.steps,
        batch=config.batch,
        length=config.length,
        seed=config.seed,
    )


def label_and_style(
    parametrisation: Parametrisation, precision: Precision
) -> tuple[str, dict[str, Any]]:
    """How a kind of run is named and drawn: colour by model, dash by precision."""
    dashes = {"float32": "-", "fp8": "--", "float16": ":"}
    colours = {"regular": "C0", "unit": "C1"}
    style = {"linestyle": dashes[precision], "color": colours[parametrisation]}
    return f"{NAMES[parametrisation]}, {PRECISIONS.get(precision, precision)}", style


def _draw_losses(runs: list[TrainConfig], path: Path) -> None:
    lines, styles = {}, {}
    for run in runs:
        label, style = label_and_style(run.model.parametrisation, run.model.precision)
        records = [r for r in read_metrics(run.out) if "loss_bits" in r]
        lines[label] = [(r["step"], r["loss_bits"]) for r in records]
        styles[label] = style
    figure = analysis.curves(
        lines, x="step", y="training loss (bits per character)", styles=styles
    )
    figure.savefig(path, dpi=120)
    print(f"drew {path}: the loss of each run")


def _draw_scales(config: DemoConfig, path: Path) -> None:
    corpus = load_corpus(config.data)
    batch = train_batch(
        corpus.train, step=0, seed=config.seed, batch=config.batch, length=config.length
    )
    figure = analysis.histograms(
        {
            NAMES[parametrisation]: initial_histograms(
                run_config(config, parametrisation, "float32").model,
                len(corpus.vocabulary),
                config.seed,
                batch.inputs,
                batch.targets,
            )
            for parametrisation in ("regular", "unit")
        }
    )
    figure.savefig(path, dpi=120)
    print(f"drew {path}: the scales at initialisation, and the formats' ranges")


if __name__ == "__main__":
    demo(tyro.cli(DemoConfig, description=__doc__))
