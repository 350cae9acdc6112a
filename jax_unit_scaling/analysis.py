"""Tables and pictures of results and scales; needs the extra `plots` when called."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from . import formats as number_formats
from .formats import Format

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

RANGES: Mapping[str, Format] = {
    "FP16": number_formats.FP16,
    "E5M2": number_formats.E5M2,
    "E4M3": number_formats.E4M3,
}


class Histogram(NamedTuple):
    """How the magnitudes of an array, or of several, spread over binades.

    `share[i]` of all elements lie in [2^exponent[i], 2^(exponent[i] + 1)), and the
    share `zero` is zero. What is not finite is in no binade.
    """

    exponent: np.ndarray
    share: np.ndarray
    zero: float


def histogram(arrays: Iterable[jax.typing.ArrayLike]) -> Histogram:
    """The histogram of log2|value| over all elements of `arrays`.

    Raises:
        ValueError: if there is no element.
    """
    flat = [np.abs(np.asarray(x, np.float64)).ravel() for x in arrays]
    values = np.concatenate(flat) if flat else np.zeros(0)
    if not values.size:
        raise ValueError("`arrays` must hold at least one element, got none.")
    finite = values[(values > 0) & np.isfinite(values)]
    # frexp gives a mantissa in [1/2, 1).
    exponent, count = np.unique(np.frexp(finite)[1] - 1, return_counts=True)
    return Histogram(exponent, count / values.size, float(np.mean(values == 0)))


def histograms(
    rows: Mapping[str, Mapping[str, Histogram]],
    *,
    formats: Mapping[str, Format] = RANGES,
) -> "Figure":
    """A panel for each row (a model, say) and column (activations, weights, ...).

    Above the histograms lie the ranges of `formats`: dark from the smallest normal
    number to the largest, light down to the smallest subnormal.

    Reference: Unit Scaling (Blake et al., 2023), log2|value| at initialisation.
    """
    columns = list(next(iter(rows.values())))
    figure, axes = _figure(len(rows), len(columns), width=3.1, height=2.6)
    everything = [h for row in rows.values() for h in row.values()]
    edges = [math.log2(f.smallest_subnormal) for f in formats.values()]
    edges += [math.log2(f.max) for f in formats.values()]
    edges += [e for h in everything for e in h.exponent[h.share > _VISIBLE]]
    top = max(h.share.max(initial=0.0) for h in everything)
    for i, (name, row) in enumerate(rows.items()):
        for j, (column, h) in enumerate(row.items()):
            panel = axes[i, j]
            panel.bar(h.exponent + 0.5, h.share, width=1.0, color=f"C{i}")
            _draw_ranges(panel, formats, top)
            panel.set_xlim(min(edges) - 1, max(edges) + 2)
            panel.set_ylim(0, top * _HEADROOM)
            if h.zero > _VISIBLE:
                panel.text(
                    0.02, 0.55, f"{h.zero:.0%} zero", transform=panel.transAxes, size=7
                )
            if i == 0:
                panel.set_title(column, size=10)
            if i == len(rows) - 1:
                panel.set_xlabel("log2 |value|")
            if j == 0:
                panel.set_ylabel(f"{name}\nshare of values")
    return figure


# A thousandth of a panel's values would not be seen in it.
_VISIBLE = 1e-3
# A panel's height over that of its tallest bar leaves the upper third to the ranges.
_HEADROOM = 1.5


def _draw_ranges(panel: "Axes", formats: Mapping[str, Format], top: float) -> None:
    step = (_HEADROOM - 1) / (len(formats) + 0.5)
    for k, (name, f) in enumerate(formats.items()):
        y = top * (_HEADROOM - step * (k + 0.75))
        subnormal, normal, largest = map(
            math.log2, (f.smallest_subnormal, f.smallest_normal, f.max)
        )
        panel.barh(
            y, normal - subnormal, left=subnormal, height=top * 0.09, color="0.82"
        )
        panel.barh(y, largest - normal, left=normal, height=top * 0.09, color="0.6")
        middle = (subnormal + largest) / 2
        panel.text(middle, y, name, ha="center", va="center", size=6)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> "Figure":
    """Labelled lines of (x, y) points; points that are not finite are left out.

    `styles` give a line's matplotlib properties by its label.
    """
    figure, axes = _figure(1, 1, width=7.0, height=4.0)
    panel = axes[0, 0]
    for label, points in lines.items():
        finite = [p for p in points if all(map(math.isfinite, p))]
        panel.plot(
            [p[0] for p in finite],
            [p[1] for p in finite],
            label=label,
            **(styles or {}).get(label, {}),
        )
    panel.set(xlabel=x, ylabel=y)
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def table(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> "Table":
    """A rich table of records with the same keys; print it with `rich.print`."""
    rich = _extra("rich.table")
    made: Table = rich.Table(*rows[0], title=title)
    for row in rows:
        made.add_row(*map(str, row.values()))
    return made


def _figure(rows: int, columns: int, *, width: float, height: float) -> Any:
    """A figure without pyplot's global state, and its panels as a grid."""
    figure: Figure = _extra("matplotlib.figure").Figure(
        figsize=(width * columns, height * rows), layout="constrained"
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _extra(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(
            f"`analysis` needs {module.split('.')[0]}: pip install "
            "'jax-unit-scaling[plots]'."
        ) from e
