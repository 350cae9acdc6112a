"""Tables and pictures of results and scales; needs the extra `plots` when called."""

import base64
import dataclasses
import html
import io
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from .formats import Format
from .transforms.track import (
    FORMATS,
    HIGHEST,
    LOWEST,
    Scales,
    Site,
    Stats,
    Tensor,
    check_formats,
    computed as computed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


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


def pooled(tracked: Iterable[Stats | None]) -> Histogram:
    """The histogram of all elements of several tracked tensors, or of cotangents.

    As `histogram`'s of the elements themselves, but that the first and the last binade
    hold what lies beyond them. None stands for no elements.

    Raises:
        ValueError: if there is no element.
    """
    sides = [jax.tree.map(np.asarray, s) for s in tracked if s is not None]
    size = sum(float(s.size.sum()) for s in sides)
    if not size:
        raise ValueError("`tracked` must be of at least one element, got none.")
    binades = np.arange(LOWEST, HIGHEST + 1)
    count = sum(s.histogram.reshape(-1, binades.size).sum(0) for s in sides)
    share = np.asarray(count, np.float64) / size
    zero = sum(float(s.zeros.sum()) for s in sides) / size
    seen = share > 0
    return Histogram(binades[seen], share[seen], zero)


def histograms(
    rows: Mapping[str, Mapping[str, Histogram]],
    *,
    formats: Mapping[str, Format] = FORMATS,
) -> "Figure":
    """A panel for each row (a model, say) and column (activations, weights, ...).

    Above the histograms lie the ranges of `formats`: dark from the smallest normal
    number to the largest, light down to the smallest subnormal.

    Raises:
        TypeError: if `rows` or `formats` is of another kind.
        ValueError: if `rows` do not have the same columns, one at least.

    Reference: Unit Scaling (Blake et al., 2023), log2|value| at initialisation.
    """
    _check_histograms(rows)
    check_formats(formats)
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


def _check_histograms(rows: Any) -> None:
    are_rows = isinstance(rows, Mapping) and all(
        isinstance(row, Mapping) and all(isinstance(h, Histogram) for h in row.values())
        for row in rows.values()
    )
    if not are_rows:
        raise TypeError(
            "`rows` must be a mapping of names to mappings of columns to `Histogram`s, "
            "such as {'model': {'weights': histogram(weights)}}, got "
            f"{type(rows).__name__}."
        )
    columns = [tuple(row) for row in rows.values()]
    if len({*columns}) != 1 or not columns[0]:
        raise ValueError(
            f"`rows` must have the same columns, one at least, got {columns}."
        )


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
    made: Table = rich.Table(title=title)
    for column in rows[0]:
        made.add_column(column, overflow="fold")  # long names are not cut
    for row in rows:
        made.add_row(*map(str, row.values()))
    return made


# -- Tracked scales --------------------------------------------------------------------


class Row(NamedTuple):
    """One tensor of one iteration, or its cotangent (`forward` or `backward`)."""

    name: str
    site: Site
    forward: Stats | None
    backward: Stats | None


def rows(scales: Scales) -> list[Row]:
    """The tensors of `scales` in order of computation, each iteration of a scan apart.

    The statistics are NumPy's, without axes. A tensor of a backward pass that is
    written down (`track_scales` of a function that differentiates) is `backward`.

    Raises:
        TypeError: if `scales` are none.
    """
    _check(scales=scales)
    named = [(n, jax.tree.map(np.asarray, t)) for n, t in scales.items()]
    found = []
    # What one scan holds is computed iteration by iteration.
    for (shape, _), group in itertools.groupby(named, lambda x: _loop(x[1])):
        tensors = list(group)
        for index in np.ndindex(shape):
            found += [_row(name, tensor, index) for name, tensor in tensors]
    return found


def _check(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Scales):
            raise TypeError(
                f"`{name}` must be the `Scales` that `track_scales` or "
                "`track_value_and_grad` returns last, got "
                f"{type(value).__name__}."
            )


def _loop(tensor: Tensor) -> tuple[tuple[int, ...], Any]:
    shape = tensor.forward.size.shape
    return shape, tensor.site.place[0] if shape else None


def _row(name: str, tensor: Tensor, index: tuple[int, ...]) -> Row:
    one = jax.tree.map(lambda x: x[index], tensor)
    name += "".join(f"[{i}]" for i in index)
    if tensor.site.is_backward:
        return Row(name, tensor.site, None, one.forward)
    return Row(name, tensor.site, one.forward, one.backward)


class Cell(NamedTuple):
    """What a table shows: a text, what it is sorted by, and 0 to 2 for its danger."""

    text: str
    key: float | str
    danger: int = 0


# E4M3's smallest normal number is 2^-6, its smallest 2^-9: at a scale of 2^-4 every
# fourth normal value is below the first, at 2^-8 most values round to a few numbers.
_FAR = (4.0, 8.0)
# The share of elements that a format loses: noticeable, and harmful.
_LOST = (1e-3, 1e-2)


def _cells(row: Row, formats: Sequence[str]) -> dict[str, tuple[Cell, Cell]]:
    """By column, the forward and the backward cell of a tensor."""
    both = [_stats_cells(s, formats) for s in (row.forward, row.backward)]
    return {column: (both[0][column], both[1][column]) for column in both[0]}


def _stats_cells(stats: Stats | None, formats: Sequence[str]) -> dict[str, Cell]:
    if stats is None or stats.size == 0:
        blank = Cell("", -math.inf)
        return dict.fromkeys(("log2 scale", "scale", "range", *formats), blank)
    log2 = _log2(stats.scale)
    far = _danger(abs(log2) if stats.scale > 0 else 0.0, _FAR)
    low, high = _log2(stats.smallest), _log2(stats.largest)
    extremes = Cell(f"2^{low:.0f}..{high:.0f}" if stats.largest else "", high - low)
    if lost := _not_finite(stats):
        far = 2
        extremes = Cell(f"{extremes.text} {lost}".strip(), math.inf, far)
    text = f"2^{log2:.1f}" if stats.scale else "zero" if stats.finite else "none"
    cells = {
        "log2 scale": Cell(text, log2, far),
        "scale": Cell(f"{stats.scale:.3g}", float(stats.scale), far),
        "range": extremes,
    }
    for i, name in enumerate(formats):
        under = float(stats.underflow[i] / stats.size)
        over = float(stats.overflow[i] / stats.size)
        text = " ".join(
            f"{sign}{share:.1%}"
            for sign, share in (("↓", under), ("↑", over))
            if share > 0
        )
        cells[name] = Cell(text, under + over, _danger(under + over, _LOST))
    return cells


def _not_finite(stats: Stats) -> str:
    """The share of what is not finite, if any."""
    counts = (("NaN", stats.nan), ("inf", stats.infinite))
    return " ".join(f"{n / stats.size:.2g} {what}" for what, n in counts if n > 0)


def _danger(value: float, limits: tuple[float, float]) -> int:
    return sum(bool(value > limit) for limit in limits)


def _log2(x: Any) -> float:
    return float(np.log2(x)) if x > 0 else -math.inf


def _log2_scale(stats: Stats | None) -> float:
    """NaN where there is nothing to have a scale."""
    return math.nan if stats is None or not stats.finite else _log2(stats.scale)


def summary(scales: Scales, *, title: str | None = None) -> "Table":
    """A rich table of tracked tensors; print it with `rich.print`.

    Each has a line for itself (→) and one for its cotangent (←): root mean square,
    smallest and largest magnitude of its finite elements, the share of others, and that
    of elements that each format loses, below (↓) its smallest number or above (↑) its
    largest. Yellow is a scale beyond 2^±4 or a loss above 0.1%, red is 2^±8 or 1%, or
    any element that is infinite or not a number.

    Raises:
        TypeError: if `scales` are none.
    """
    _check(scales=scales)
    formats = [name for name, _ in scales.formats]
    made: Table = _extra("rich.table").Table(title=title, show_lines=False)
    made.add_column("tensor\nsource", overflow="fold")
    made.add_column("shape\ndtype", overflow="fold")
    made.add_column("")
    for column in ("log2 scale", "scale", "range", *formats):
        made.add_column(column, justify="right", no_wrap=True)
    text = _extra("rich.text").Text
    styles = ("", "yellow", "bold red")
    for row in rows(scales):
        source = text(_short(row.site.source), style="dim")
        first = text("\n").join([text(row.name), source])
        kind = text(f"{_shape(row.site)}\n{row.site.dtype.name}")
        cells = [
            text("\n").join([text(c.text, style=styles[c.danger]) for c in pair])
            for pair in _cells(row, formats).values()
        ]
        made.add_row(first, kind, "→\n←", *cells)
    return made


def _short(source: str) -> str:
    return source.rsplit("/", 1)[-1]


def _shape(site: Site) -> str:
    return "×".join(map(str, site.shape)) or "()"


def exponents(scales: Scales) -> "Figure":
    """The histogram of log2|value| of every tensor, forward and backward.

    A tensor is a line, darker where more of its values are; on the right stands its
    share of zeros, and in red of what is not finite. Grey behind them are the formats'
    ranges, from the smallest number to the largest; dotted lines are their smallest
    normal numbers.

    Reference: Unit Scaling (Blake et al., 2023), figures 1 and A.1.
    """
    found = rows(scales)
    figure, axes = _figure(1, 2, width=5.0, height=_height(len(found)), sharey=True)
    for panel, side in zip(axes[0], ("forward", "backward"), strict=True):
        stats = [getattr(row, side) for row in found]
        share = np.array([_shares(s) for s in stats])
        _shade(panel, scales.formats, len(found))
        panel.imshow(
            np.ma.masked_less(share, _VISIBLE),
            aspect="auto",
            extent=(LOWEST, HIGHEST + 1, len(found) - 0.5, -0.5),
            cmap="Blues" if side == "forward" else "Oranges",
            vmin=-0.15,  # so that the smallest share that is drawn can be seen
            vmax=0.4,
            interpolation="nearest",
            zorder=2,
        )
        for i, s in enumerate(stats):
            if s is None or not s.size:
                continue
            zero = f"{s.zeros / s.size:.0%} zero" if s.zeros / s.size > 0.005 else ""
            lost = _not_finite(s)
            told, color = " ".join(filter(None, (lost, zero))), "red" if lost else "k"
            panel.text(HIGHEST + 1.5, i, told, size=5, va="center", color=color)
        panel.set_title(side, pad=14)
        panel.set(xlabel="log2 |value|", xlim=(LOWEST, HIGHEST + 1))
    _name_rows(axes[0, 0], found)
    return figure


def _shares(stats: Stats | None) -> np.ndarray:
    if stats is None or stats.size == 0:
        return np.zeros(HIGHEST - LOWEST + 1)
    return np.asarray(stats.histogram / stats.size)


# The end of a picture of scales, somewhat beyond float16's range.
_SHOWN = (-40, 24)


def depth(
    scales: Scales, *others: Scales, names: Sequence[str] = (), title: str | None = None
) -> "Figure":
    """The scale of each tensor (filled) and its cotangent (hollow), first at the top.

    Grey are the formats' ranges; what is beyond 2^-40 or 2^24 (the fill of a mask) is
    drawn there, and a scale of zero is not drawn. With several `scales`, of the same
    names or at least of the same number of tensors, each has its colour and one of
    `names`.

    Reference: Unit Scaling (Blake et al., 2023), figure 1.
    """
    everything = (scales, *others)
    table = _joined(everything)
    figure, axes = _figure(1, 1, width=9.0, height=_height(len(table)))
    panel = axes[0, 0]
    _shade(panel, scales.formats, len(table))
    label = list(names) or [f"{i}" for i in range(len(everything))]
    for k, (side, marker) in itertools.product(
        range(len(everything)), (("forward", "o-"), ("backward", "s:"))
    ):
        points = [
            (np.clip(_log2(getattr(found[k], side).scale), *_SHOWN), i)
            for i, found in enumerate(table)
            if found[k] is not None
            and getattr(found[k], side) is not None
            and getattr(found[k], side).scale > 0
        ]
        if points:
            panel.plot(
                *zip(*points, strict=True),
                marker,
                color=f"C{k}",
                markerfacecolor=f"C{k}" if side == "forward" else "white",
                markersize=4,
                linewidth=0.8,
                label=f"{label[k]}: {side}" if others or names else side,
                zorder=3,
            )
    panel.axvline(0, color="0.4", linewidth=0.8)
    panel.set_title(title or "", pad=14)
    panel.set_xlabel("log2 scale (root mean square)")
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
    _name_rows(panel, [next(r for r in found if r is not None) for found in table])
    panel.set_ylim(len(table) - 0.5, -0.5)
    return figure


class Comparison(NamedTuple):
    """Two records of scales, beside each other."""

    table: "Table"
    picture: "Figure"


def compare(a: Scales, b: Scales, *, names: Sequence[str] = ("a", "b")) -> Comparison:
    """Two models, or two steps of one: how each tensor's scale differs.

    Tensors are matched by name; if no name is the same, by their order.

    Raises:
        TypeError: if `a` or `b` is no `Scales`.
        ValueError: if there is neither a common name nor the same number of tensors,
            or if `names` are not two.
    """
    _check(a=a, b=b)
    if isinstance(names, str) or len(names) != 2:
        raise ValueError(f"`names` must be two, of `a` and of `b`, got {names!r}.")
    records = []
    for x, y in _joined((a, b)):
        record: dict[str, Any] = {"tensor": getattr(x or y, "name", "")}
        for side in ("forward", "backward"):
            pair = [getattr(r, side, None) for r in (x, y)]
            log2 = [_log2_scale(s) for s in pair]
            for name, value, s in zip(names, log2, pair, strict=True):
                lost = _not_finite(s) if s is not None and s.size else ""
                record[f"{side} {name}"] = f"{_power(value)} {lost}".strip()
            difference = log2[1] - log2[0]
            record[f"{side} ratio"] = _power(difference)
        records.append(record)
    return Comparison(table(records), depth(a, b, names=names))


def _power(log2: float) -> str:
    if math.isnan(log2):
        return ""
    return f"2^{log2:+.1f}" if math.isfinite(log2) else "zero"


def _joined(everything: Sequence[Scales]) -> list[tuple[Row | None, ...]]:
    """The rows of each beside those of the others, by name or by order."""
    lists = [rows(s) for s in everything]
    by_name = [{row.name: row for row in found} for found in lists]
    if set.intersection(*(set(d) for d in by_name)):
        order = dict.fromkeys(row.name for found in lists for row in found)
        return [tuple(d.get(name) for d in by_name) for name in order]
    if len({len(found) for found in lists}) != 1:
        raise ValueError(
            "`a` and `b` must have names in common or the same number of tensors, got "
            f"none and {' and '.join(str(len(found)) for found in lists)}; leave out "
            "what only one has: `scales.where(...)`."
        )
    return list(zip(*lists, strict=True))


def timeline(scales: Scales, steps: Sequence[int]) -> "Figure":
    """Scales over time: a line for each tensor, red above 1 and blue below.

    Args:
        scales: stacked along a first axis: by a scan over steps, or by `stack`.
        steps: at which step each was recorded.

    Raises:
        ValueError: if there are not as many `steps` as records.
    """
    each = [rows(s) for s in _unstack(scales, steps)]
    figure, axes = _figure(1, 2, width=5.0, height=_height(len(each[0])), sharey=True)
    for panel, side in zip(axes[0], ("forward", "backward"), strict=True):
        log2 = np.array(
            [
                [_log2_scale(s) for s in column]
                for column in ([getattr(r, side) for r in found] for found in each)
            ]
        ).T
        image = panel.imshow(
            np.ma.masked_invalid(log2),
            aspect="auto",
            cmap="RdBu_r",
            vmin=-12,
            vmax=12,
            interpolation="nearest",
        )
        shown = np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))
        panel.set_xticks(shown, [str(steps[i]) for i in shown])
        panel.set(title=side, xlabel="step")
    _name_rows(axes[0, 0], each[0])
    figure.colorbar(image, ax=axes[0, 1], label="log2 scale", extend="both")
    return figure


def stack(records: Sequence[Scales]) -> Scales:
    """Records of the same tensors at several steps, along a new first axis."""
    return jax.tree.map(lambda *x: np.stack(x), *records)


def _unstack(scales: Scales, steps: Sequence[int]) -> list[Scales]:
    _check(scales=scales)
    lengths = {x.shape[:1] for x in jax.tree.leaves(scales)}
    if lengths != {(len(steps),)}:
        found = sorted(n[0] for n in lengths if n)
        raise ValueError(
            f"`scales` must be stacked over {len(steps)} `steps` along a first axis, "
            f"got first axes of {found or 'none'}."
        )
    return [jax.tree.map(lambda x, i=i: x[i], scales) for i in range(len(steps))]


def report(
    scales: Scales,
    path: str | os.PathLike[str],
    *,
    steps: Sequence[int] | None = None,
    title: str = "Tracked scales",
) -> None:
    """Writes an HTML page that stands alone: a table to be sorted, and pictures.

    Args:
        path: the file to write.
        steps: if given, `scales` is stacked over them: shown are the last step, the
            first one beside it, and the scales over time.
    """
    last, pictures = scales, {}
    if steps is not None:
        each = _unstack(scales, steps)
        last = each[-1]
        pictures["Scales over time"] = timeline(scales, steps)
        pictures["The first and the last step"] = depth(
            each[0], last, names=[f"step {steps[0]}", f"step {steps[-1]}"]
        )
    else:
        pictures["Scale against depth"] = depth(last)
    pictures["Exponents"] = exponents(last)
    body = [f"<h1>{html.escape(title)}</h1>", _html_table(last)]
    for name, figure in pictures.items():
        body += [f"<h2>{html.escape(name)}</h2>", _html_picture(figure, name)]
    text = _PAGE.format(title=html.escape(title), body="\n".join(body))
    Path(path).write_text(text, encoding="utf-8")


def _html_table(scales: Scales) -> str:
    formats = [name for name, _ in scales.formats]
    columns = ["tensor", "source", "shape", "dtype", "pass"]
    columns += ["log2 scale", "scale", "range", *formats]
    lines = ["<table><thead><tr>"]
    lines += [f"<th>{html.escape(c)}</th>" for c in columns]
    lines.append("</tr></thead><tbody>")
    for row in rows(scales):
        site = row.site
        about = (row.name, site.source, _shape(site), site.dtype.name)
        for k, (side, stats) in enumerate(
            (("forward", row.forward), ("backward", row.backward))
        ):
            if stats is not None:
                cells = [Cell(x, x) for x in (*about, side)]
                cells += [pair[k] for pair in _cells(row, formats).values()]
                lines.append(f"<tr>{''.join(map(_html_cell, cells))}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _html_cell(cell: Cell) -> str:
    key, text = html.escape(str(cell.key)), html.escape(cell.text)
    return f'<td class="danger{cell.danger}" data-key="{key}">{text}</td>'


def _html_picture(figure: "Figure", name: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; font-size: 12px; }}
th {{ position: sticky; top: 0; background: #eee; cursor: pointer; }}
th, td {{ padding: 2px 8px; text-align: left; border-bottom: 1px solid #ddd; }}
.danger1 {{ background: #fff3c4; }} .danger2 {{ background: #ffd0cc; }}
img {{ max-width: 100%; }}
</style></head><body>
{body}
<script>
document.querySelectorAll("th").forEach((head, column) => head.onclick = () => {{
  const up = head.dataset.up = head.dataset.up === "1" ? "" : "1";
  const body = document.querySelector("tbody");
  const key = row => row.cells[column].dataset.key.replace("inf", "Infinity");
  const order = (a, b) => key(a) - key(b) || key(a).localeCompare(key(b));
  [...body.rows].sort((a, b) => up ? order(a, b) : order(b, a))
    .forEach(row => body.append(row));
}});
</script></body></html>
"""


def save(scales: Scales, path: str | os.PathLike[str]) -> None:
    """Writes `scales` as an .npz file, for `load`."""
    _check(scales=scales)
    sites = [
        dataclasses.asdict(t.site)
        | {"dtype": t.site.dtype.name, "has_backward": t.backward is not None}
        for t in scales.tensors
    ]
    formats = {
        name: dataclasses.asdict(f) | {"dtype": f.dtype and f.dtype.name}
        for name, f in scales.formats
    }
    about = json.dumps({"sites": sites, "formats": formats})
    leaves = map(np.asarray, jax.tree.leaves(scales))
    with open(path, "wb") as file:
        np.savez(file, *leaves, about=np.array(about))


def load(path: str | os.PathLike[str]) -> Scales:
    """What `save` wrote."""
    with np.load(path) as file:
        about = json.loads(str(file["about"]))
        leaves = iter([file[f"arr_{i}"] for i in range(len(file.files) - 1)])
    n, tensors = len(Stats._fields), []
    for site in about["sites"]:
        has_backward = site.pop("has_backward")
        site |= {k: tuple(site[k]) for k in ("shape", "place")}
        site["dtype"] = jax.numpy.dtype(site["dtype"])
        forward = Stats(*itertools.islice(leaves, n))
        backward = Stats(*itertools.islice(leaves, n)) if has_backward else None
        tensors.append(Tensor(forward, backward, Site(**site)))
    formats = {
        name: Format(**f | {"dtype": f["dtype"] and jax.numpy.dtype(f["dtype"])})
        for name, f in about["formats"].items()
    }
    return Scales(tuple(tensors), tuple(formats.items()))


def _height(lines: int) -> float:
    """Of a picture with a line for each tensor: legible at any number of them."""
    return 1.6 + 0.13 * lines


def _name_rows(panel: "Axes", found: Sequence[Row]) -> None:
    panel.set_yticks(range(len(found)), [row.name for row in found], size=6)


def _shade(panel: "Axes", formats: Iterable[tuple[str, Format]], lines: int) -> None:
    """The formats' ranges behind everything, each with its name above its lower end."""
    for name, f in formats:
        low, high = math.log2(f.smallest_subnormal), math.log2(f.max)
        panel.axvspan(low, high, color="0.5", alpha=0.13, zorder=0, linewidth=0)
        normal = math.log2(f.smallest_normal)
        panel.axvline(normal, color="0.5", linestyle=":", linewidth=0.7, zorder=1)
        panel.annotate(
            name,
            (low, 1),
            (1, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            size=6,
            color="0.3",
        )


def _figure(
    rows: int, columns: int, *, width: float, height: float, sharey: bool = False
) -> Any:
    """A figure without pyplot's global state, and its panels as a grid."""
    figure: Figure = _extra("matplotlib.figure").Figure(
        figsize=(width * columns, height * rows), layout="constrained"
    )
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _extra(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(
            f"`analysis` needs {module.split('.')[0]}: pip install "
            "'jax-unit-scaling[plots]'."
        ) from e
