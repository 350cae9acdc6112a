"""A sweep's results: a file of JSON lines, its table and its picture.

`python -m experiments.mup_transfer.results FILE` draws a file again, without training.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..char_lm.model import Parametrisation
from ..shared.picture import Line, Panel, draw
from ..shared.record import read_lines

NAMES: dict[Parametrisation, str] = {
    "regular": "regular (Flax's defaults, Adam)",
    "unit": "unit-scaled (u-muP)",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One model's end; a loss that is not finite is None, as JSON has no NaN."""

    parametrisation: Parametrisation
    width: int
    log2_rate: int
    seed: int
    valid_bits: float | None
    train_bits: float | None
    """Mean over the last tenth of the steps."""

    @property
    def key(self) -> tuple[Parametrisation, int, int, int]:
        return self.parametrisation, self.width, self.log2_rate, self.seed


def read_results(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """What all runs of a file share, and the runs."""
    shared, records = read_lines(path)
    return shared, as_runs(records)


def as_runs(records: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The runs that lines of the file are."""
    names = [field.name for field in dataclasses.fields(Run)]
    return [Run(**{name: r[name] for name in names}) for r in records]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One model at one width: its losses at each rate, over all seeds."""

    parametrisation: Parametrisation
    width: int
    log2_rates: list[int]
    bits: list[list[float]]

    @property
    def means(self) -> list[float]:
        return [statistics.fmean(b) for b in self.bits]

    @property
    def best(self) -> int:
        """The index of the best rate; a rate at which any seed diverged is not it."""
        means = self.means
        return min(range(len(means)), key=means.__getitem__)

    @property
    def optimum(self) -> float:
        """log2 of the rate where a parabola through best and neighbours is lowest.

        NaN where the best is at an end of the rates, or beside one that diverged.
        """
        i, y, x = self.best, self.means, self.log2_rates
        if i in (0, len(y) - 1) or not all(map(math.isfinite, y[i - 1 : i + 2])):
            return math.nan
        left, right = y[i - 1] - y[i], y[i + 1] - y[i]
        before, after = x[i] - x[i - 1], x[i + 1] - x[i]
        # The root of the parabola's derivative, with x measured from x[i]; where all
        # three are equal it is anywhere, x[i] say.
        curvature = left * after + right * before
        shift = (left * after**2 - right * before**2) / (2 * curvature or math.inf)
        return x[i] + shift


def curves(runs: Sequence[Run]) -> list[Curve]:
    """The runs by model, regular first, and width."""
    kinds = sorted({(run.parametrisation, run.width) for run in runs})
    found = []
    for kind in kinds:
        bits: dict[int, list[float]] = {}
        for run in sorted(runs, key=lambda r: r.log2_rate):
            if (run.parametrisation, run.width) == kind:
                value = math.inf if run.valid_bits is None else run.valid_bits
                bits.setdefault(run.log2_rate, []).append(value)
        found.append(Curve(*kind, list(bits), list(bits.values())))
    return found


def rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The table: the best rate of each model and width."""
    table = []
    for curve in curves(runs):
        rate, bits = curve.log2_rates[curve.best], curve.bits[curve.best]
        ends = {min(curve.log2_rates): " (lowest)", max(curve.log2_rates): " (highest)"}
        table.append(
            {
                "model": curve.parametrisation,
                "width": str(curve.width),
                "best rate": f"2^{rate}{ends.get(rate, '')}",
                "parabola's": f"2^{curve.optimum:.1f}" * math.isfinite(curve.optimum),
                "valid. bits": f"{statistics.fmean(bits):.3f}",
                "spread": f"{max(bits) - min(bits):.3f}",
                "seeds": str(len(bits)),
            }
        )
    return table


def report(path: Path) -> None:
    """Prints the table and draws the picture beside the file."""
    from rich.console import Console

    from jax_unit_scaling import analysis

    shared, runs = read_results(path)
    Console().print(analysis.table(rows(runs)))
    found = curves(runs)
    panels = [
        Panel(
            title,
            "log2 learning rate",
            "validation bits per character",
            [_line(c) for c in found if c.parametrisation == parametrisation],
        )
        for parametrisation, title in NAMES.items()
    ]
    lowest = min(min(c.means) for c in found)
    s = shared["settings"]
    seeds = max(len(b) for c in found for b in c.bits)
    draw(
        [panels],
        path.with_suffix(".png"),
        note=f"{s['steps']} steps of {s['batch']} x {s['length']} characters, depth "
        f"{s['depth']}, heads of {s['head_size']}, {s['precision']}; "
        + (f"mean, and range, of {seeds} seeds" if seeds > 1 else "one seed")
        + "; star: best rate. Higher losses lie above the frame.",
        y_limits=(lowest - 0.1, lowest + _SHOWN_BITS),
    )


# Where a run fails its loss is off by bits, and what matters would be flat.
_SHOWN_BITS = 1.6


def _line(curve: Curve) -> Line:
    return Line(
        f"width {curve.width}",
        list(zip(curve.log2_rates, curve.means, strict=True)),
        [(min(b), max(b)) for b in curve.bits],
        curve.best,
    )


if __name__ == "__main__":
    report(Path(sys.argv[1]))
