"""The results: a file of JSON lines, the paper's table, and its scatter."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jax_unit_scaling import analysis

from ...shared.record import markdown, read_lines
from .model import ModelConfig
from .training import Setting

REFERENCE = "regular float32"


@dataclasses.dataclass(frozen=True)
class Run:
    """One model's end, in bits for each character; None where that is not finite."""

    setting: Setting
    steps: int
    log2_rate: int
    seed: int
    train_bits: float | None
    """Mean over the last tenth of the steps."""
    valid_bits: float | None
    test_bits: float | None


def as_runs(lines: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The runs that lines of the file are."""
    names = [field.name for field in dataclasses.fields(Run)]
    found = []
    for line in lines:
        given = line["setting"]
        setting = Setting(**given | {"model": ModelConfig(**given["model"])})
        found.append(Run(**{n: line[n] for n in names} | {"setting": setting}))
    return found


def median_bits(
    runs: Iterable[Run], setting: Setting, seeds: int | None = None
) -> dict[int, float]:
    """The median validation bits at each rate that all seeds, if given, have run at."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if same(run.setting, setting) and (seeds is None or run.seed < seeds):
            bits = math.inf if run.valid_bits is None else run.valid_bits
            found.setdefault(run.log2_rate, []).append(bits)
    return {
        rate: statistics.median(bits)
        for rate, bits in found.items()
        if seeds is None or len(bits) == seeds
    }


def same(a: Setting, b: Setting) -> bool:
    """Whether two settings differ in nothing but how they are compiled."""
    model = dataclasses.replace(a.model, unroll=b.model.unroll)
    return dataclasses.replace(a, model=model) == b


@dataclasses.dataclass(frozen=True)
class Result:
    """A setting at its best rate, by validation; test and validation bits by seed."""

    setting: Setting
    steps: int
    log2_rate: int
    test: dict[int, float]
    valid: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.test.values())


def results(runs: Sequence[Run]) -> list[Result]:
    """Of all settings in the file, in the order in which they were trained."""
    found: list[Result] = []
    for run in runs:
        if any(same(run.setting, r.setting) for r in found):
            continue
        bits = median_bits(runs, run.setting)
        best = min(bits, key=bits.__getitem__)
        at_best = [
            r for r in runs if same(r.setting, run.setting) and r.log2_rate == best
        ]
        test = {r.seed: _number(r.test_bits) for r in at_best}
        valid = {r.seed: _number(r.valid_bits) for r in at_best}
        found.append(Result(run.setting, run.steps, best, test, valid))
    return found


def _number(bits: float | None) -> float:
    return math.inf if bits is None else bits


def half_width(values: Sequence[float]) -> float:
    """Of the mean's 95% interval, by Student's distribution."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    from scipy.stats import t

    n = len(values)
    return float(t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n))


def interval(values: Sequence[float], sign: str = "") -> str:
    """A mean with its interval."""
    if not values:
        return ""
    mean, half = statistics.fmean(values), half_width(values)
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def rows(found: Sequence[Result]) -> list[dict[str, str]]:
    """The table: each setting, and how it differs from its model's float32.

    Differences are between the same seeds, so the same data and, within a
    parametrisation, the same initial weights.
    """
    table = []
    for name in dict.fromkeys(r.setting.name for r in found):
        of_model = {r.setting.kind: r for r in found if r.setting.name == name}
        for kind, result in of_model.items():
            own = of_model.get(f"{kind.split()[0]} float32")
            table.append(
                {
                    "model": name,
                    "steps": str(result.steps),
                    "trained as": kind,
                    "best rate": f"2^{result.log2_rate}",
                    "test bits": interval([*result.test.values()]),
                    "beside own float32": _beside(result, own),
                    "beside regular float32": _beside(result, of_model.get(REFERENCE)),
                }
            )
    return table


def summary(found: Sequence[Result]) -> list[dict[str, str]]:
    """A row for each kind, a column for each model: test bits beside own float32."""
    long = rows(found)
    table: dict[str, dict[str, str]] = {}
    for row in long:
        line = table.setdefault(row["trained as"], {"trained as": row["trained as"]})
        line[row["model"]] = row["beside own float32"] or row["test bits"]
    models = dict.fromkeys(row["model"] for row in long)
    return [
        {n: line.get(n, "") for n in ("trained as", *models)} for line in table.values()
    ]


def _beside(result: Result, other: Result | None) -> str:
    if other is None or other is result:
        return ""
    seeds = result.test.keys() & other.test.keys()
    return interval([result.test[s] - other.test[s] for s in sorted(seeds)], "+")


def report(path: Path) -> None:
    """Prints the table and writes it as Markdown; draws the scatter beside the file."""
    shared, lines = read_lines(path)
    found = results(as_runs(lines))
    table = rows(found)
    print(markdown(summary(found)))
    Console(width=140).print(analysis.table(table))
    tables = (summary(found), table)
    path.with_name("table.md").write_text("\n\n".join(map(markdown, tables)) + "\n")
    scatter(found, path.with_name("scatter.png"))


_MARKERS = {"attention": "o", "conv": "s", "rnn": "^"}


def scatter(found: Sequence[Result], path: Path) -> None:
    """Each kind's validation bits against those of regular float32, of each model."""
    from matplotlib.figure import Figure

    reference = {r.setting.name: r for r in found if r.setting.kind == REFERENCE}
    kinds = dict.fromkeys(r.setting.kind for r in found)
    panels = [kind for kind in kinds if kind != REFERENCE]
    columns = min(4, len(panels))
    shape = (math.ceil(len(panels) / columns), columns)
    figure = Figure(figsize=(3.1 * shape[1], 3.1 * shape[0] + 0.4))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    points = {
        kind: [
            (r.setting, _mean(reference[r.setting.name].valid), _mean(r.valid))
            for r in found
            if r.setting.kind == kind and r.setting.name in reference
        ]
        for kind in panels
    }
    ends = [v for p in points.values() for _, *xy in p for v in xy if math.isfinite(v)]
    low, high = min(ends) - 0.05, max(ends) + 0.05
    for ax, kind in zip(axes.flat, panels, strict=False):
        ax.plot([low, high], [low, high], color="0.6", linewidth=0.8)
        for i, (setting, x, y) in enumerate(points[kind]):
            marker = _MARKERS[setting.model.mixer]
            lost = not math.isfinite(y)  # at the top, hollow
            face = "none" if lost else f"C{i % 10}"
            label = setting.name if len(reference) <= 8 else None
            ax.plot(
                x,
                high if lost else y,
                marker,
                color=f"C{i % 10}",
                markerfacecolor=face,
                linestyle="",
                label=label,
                clip_on=False,
            )
        ax.set_title(kind, fontsize=9)
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel("validation bits, regular float32", fontsize=9)
    figure.supylabel("validation bits", fontsize=9)
    if len(reference) <= 8:
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=2, fontsize=7)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def _mean(bits: Mapping[int, float]) -> float:
    return float(np.mean([*bits.values()]))
