"""The comparison: regular against unit-scaled, in float32, simulated FP8 and float16.

`make demo`, or `python -m experiments.char_lm.demo --help`. All runs see the same data
for the same steps; each parametrisation has one learning rate for all its precisions.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro
from rich.console import Console
from rich.table import Table

from .model import ModelConfig, Precision
from .train import TrainConfig, train

RUNS: tuple[tuple[str, Precision], ...] = (
    ("regular", "float32"),
    ("regular", "fp8"),
    ("regular", "float16"),
    ("unit", "float32"),
    ("unit", "fp8"),
    ("unit", "float16"),
)


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
    unit_learning_rate: float = 0.5


def demo(config: DemoConfig) -> list[dict[str, Any]]:
    """Runs all six, prints the table and draws the loss curves into `out`."""
    rows = []
    for parametrisation, precision in RUNS:
        print(f"{parametrisation}, {precision}")
        run = _run_config(config, parametrisation, precision)
        rows.append({"run": run, "valid_bits": train(run)["valid_bits"]})
    baseline = rows[0]["valid_bits"]
    table = Table("model", "precision", "valid. bits per character", "gap to float32")
    for row in rows:
        model, bits = row["run"].model, row["valid_bits"]
        if model.precision == "float32":
            baseline = bits
        table.add_row(
            model.parametrisation,
            model.precision,
            f"{bits:.3f}",
            f"{bits - baseline:+.3f}",
        )
    Console().print(table)
    _draw_losses([row["run"] for row in rows], config.out / "loss.png")
    return rows


def _run_config(
    config: DemoConfig, parametrisation: Any, precision: Any
) -> TrainConfig:
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


def _draw_losses(runs: list[TrainConfig], path: Path) -> None:
    styles = {"float32": "-", "fp8": "--", "float16": ":"}
    colours = {"regular": "tab:orange", "unit": "tab:blue"}
    figure, axes = plt.subplots(figsize=(7, 4))
    for run in runs:
        # Steps that a resumed run repeats are the same: the last line of each counts.
        points = {}
        for line in (run.out / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if math.isfinite(record.get("loss_bits", math.nan)):
                points[record["step"]] = record["loss_bits"]
        model = run.model
        axes.plot(
            *zip(*sorted(points.items()), strict=True),
            styles[model.precision],
            color=colours[model.parametrisation],
            label=f"{model.parametrisation}, {model.precision}",
        )
    axes.set(xlabel="step", ylabel="training loss (bits per character)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    demo(tyro.cli(DemoConfig, description=__doc__))
