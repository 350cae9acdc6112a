"""Grids of panels; matplotlib is imported when one is drawn, so after the training."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Line:
    """Points (x, y), where given the range that the seeds span, and one to mark.

    A value that is not finite breaks the line.
    """

    label: str
    points: Sequence[tuple[float, float]]
    spans: Sequence[tuple[float, float]] = ()
    best: int | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines, coloured in their order, and what the axes mean."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]


def draw(
    rows: Sequence[Sequence[Panel]],
    path: Path,
    *,
    note: str,
    colours: str = "viridis",
    x_log2: bool = False,
    y_limits: tuple[float, float] | None = None,
) -> None:
    """Draws a grid whose rows share the y axis, with one legend, and `note` beneath."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6 * len(rows[0]) + 1.6, 3.1 * len(rows) + 0.6))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharey="row")
    count = max(len(panel.lines) for row in rows for panel in row)
    palette = colormaps[colours]
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            ax = axes[i, j]
            for k, line in enumerate(panel.lines):
                _draw_line(ax, line, palette(_DARK * k / max(1, count - 1)))
            ax.set_xlabel(panel.x)
            if i == 0:
                ax.set_title(panel.title, fontsize=11)
            if j == 0:
                ax.set_ylabel(panel.y)
            ax.grid(alpha=0.3)
            if x_log2:
                ax.set_xscale("log", base=2)
                ax.set_yscale("log", base=2)
            else:
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if y_limits:
                ax.set_ylim(*y_limits)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.text(0.01, -0.02, note, fontsize=7, color="0.35", va="top")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"drew {path}")


# The end of both colour maps is too light for a line on white.
_DARK = 0.9


def _draw_line(ax: Any, line: Line, colour: Any) -> None:
    x = [p[0] for p in line.points]
    y = [p[1] if math.isfinite(p[1]) else math.nan for p in line.points]
    ax.plot(x, y, color=colour, marker="o", markersize=3, label=line.label)
    if line.spans:
        ax.fill_between(x, *zip(*line.spans, strict=True), color=colour, alpha=0.15)
    if line.best is not None:
        ax.plot(x[line.best], y[line.best], "*", color=colour, markersize=13)
