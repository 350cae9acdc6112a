"""The tables and pictures of a record: `python -m experiments.fp8_speed.report`.

With `--gallery experiments/README.md` the tables there become those of the record.
"""

import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..shared.record import markdown
from .measure import grouped
from .model import NAMES
from .train import LAST

RECORD = Path(__file__).parent / "figures" / "speed.json"
Times = Mapping[str, Mapping[str, Any]]
PLAIN, UNIT, FP8 = NAMES["bf16"], NAMES["bf16 unit"], NAMES["fp8 unit"]


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """A record, and what is made of it beside the tables that are printed."""

    record: Path = RECORD
    pictures: bool = True
    """Draws them anew, beside the record."""
    gallery: Path | None = None
    """A page whose tables are replaced: each behind `<!-- fp8_speed: its name -->`."""


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """The tables of a record, of the parts that it has, by what they show."""
    results = {name: record[name]["result"] for name in record}
    found: dict[str, str] = {}
    for name in ("linear", "layers", "train"):
        if name in results:
            found[name] = table(results[name]["times"])
    if "kernels" in results.get("layers", {}):
        found["where the time goes"] = _roofline(results["layers"])
    if "sweep" in results:
        points = results["sweep"]["points"]
        found["speed by size"] = _grid(points, _speeds)
        found["memory by size"] = _grid(points, _memory)
    return found


def report(record: Mapping[str, Any]) -> str:
    """The tables, and what each part was measured on."""
    lines = []
    for name, part in record.items():
        versions = (f"{k} {part[k]}" for k in ("jax", "flax", "python") if k in part)
        lines.append(f"{name}: {part['device']}, {', '.join(versions)}")
    for name, rows in tables(record).items():
        lines.append(f"\n## {name}\n\n{rows}")
    return "\n".join(lines)


def with_tables(page: str, record: Mapping[str, Any]) -> str:
    """A page with the record's tables in place of those behind their names."""
    for name, rows in tables(record).items():
        mark = f"<!-- fp8_speed: {name} -->\n"
        there = re.escape(mark) + r"\n*(?:\|.*\n)*\n*"
        # No backslash of a table would be one of the pattern's.
        new = f"{mark}\n{rows}\n\n".replace("\\", r"\\")
        page = re.sub(there, new, page)
    return page


# A column's head, what it needs of a row, and its text.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("FP8 products", "fp8", lambda m: f"{m['fp8']} of {m['products']}"),
    (
        "kernels that only multiply",
        "multiplications",
        lambda m: str(m["multiplications"]),
    ),
    ("temporary GiB", "temporary_gib", lambda m: f"{m['temporary_gib']:.2f}"),
    ("compile s", "compile_s", lambda m: f"{m['compile_s']:.1f}"),
    ("tokens a second", "tokens_per_s", lambda m: f"{m['tokens_per_s']:.0f}"),
    ("best rate", "log2_rate", lambda m: f"2^{m['log2_rate']:g}"),
    ("steps", "losses", lambda m: str(len(m["losses"]))),
)


def table(times: Times) -> str:
    """A row for each program, against the faster plain bfloat16."""
    base = _baseline(times)
    columns = [c for c in _COLUMNS if all(c[1] in m for m in times.values())]
    heads = [
        "",
        "ms (quartiles)",
        "against bfloat16",
        *(head for head, _, _ in columns),
    ]
    trained = all("final_losses" in m for m in times.values())
    if trained:
        heads += [f"loss of the last {LAST}, nats", "of each seed"]
    rows = []
    for name, m in times.items():
        spread = f" ({m['spread']:.2f})" if "spread" in m else ""
        row = [name, f"{m['ms']:.2f}{spread}", f"{base / m['ms']:.2f}"]
        row += [text(m) for _, _, text in columns]
        if trained:
            losses = m["final_losses"]
            row += [
                f"{statistics.fmean(losses):.4f}",
                " ".join(map("{:.4f}".format, losses)),
            ]
        rows.append(row)
    return _markdown(heads, rows)


def _markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    return markdown([dict(zip(heads, row, strict=True)) for row in rows])


def _baseline(times: Times) -> float:
    """The faster of the plain bfloat16 programs."""
    return min(m["ms"] for name, m in times.items() if name.startswith(PLAIN))


def _roofline(layers: Mapping[str, Any]) -> str:
    """Milliseconds by what kernels are for, and the floor, where it was measured."""
    groups = {name: grouped(times) for name, times in layers["kernels"].items()}
    names = dict.fromkeys(group for found in groups.values() for group in found)
    heads = ["ms", *groups]
    rows = [[n, *(f"{g.get(n, 0.0):.1f}" for g in groups.values())] for n in names]
    together = ["together", *(f"{sum(g.values()):.1f}" for g in groups.values())]
    if "roofline" in layers:
        floor = layers["roofline"]["floor"]
        rates = layers["roofline"]
        heads.append(
            f"floor of FP8 ({rates['tflops']['fp8']:.0f} TFLOPS, attention "
            f"{rates['tflops']['bf16']:.0f}, {rates['copy_tb_per_s']:.1f} TB/s)"
        )
        for row in rows:
            row.append(f"{floor[row[0]]:.1f}" if row[0] in floor else "")
        casts = [
            "casts, in the two above",
            *[""] * len(groups),
            f"{floor['casts']:.1f}",
        ]
        rows.append(casts)
        together.append(f"{sum(floor.values()):.1f}")
    return _markdown(heads, [*rows, together])


def _grid(points: list[Any], text: Callable[[Times], str]) -> str:
    widths, tokens = (sorted({p[name] for p in points}) for name in ("width", "tokens"))
    cells = {(p["width"], p["tokens"]): text(p["times"]) for p in points}
    return _markdown(
        ["width", *(f"{n} tokens" for n in tokens)],
        [[str(w), *(cells.get((w, n), "") for n in tokens)] for w in widths],
    )


def _speeds(times: Times) -> str:
    base = _baseline(times)
    return f"{base / times[FP8]['ms']:.2f} ({base / times[UNIT]['ms']:.2f})"


def _memory(times: Times) -> str:
    return " / ".join(f"{times[name]['temporary_gib']:.2f}" for name in (FP8, PLAIN))


# -- Pictures --------------------------------------------------------------------------


def draw(record: Mapping[str, Any], folder: Path) -> None:
    """speed.png and train.png, of the parts that the record has."""
    if "sweep" in record:
        part = record["sweep"]
        _draw_speeds(part["result"]["points"], part["device"], folder / "speed.png")
    if "train" in record:
        _draw_losses(record["train"]["result"]["times"], folder / "train.png")


def _draw_speeds(points: list[Any], device: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for tokens in sorted({point["tokens"] for point in points}):
        chosen = [p for p in points if p["tokens"] == tokens]
        axes.plot(
            [p["width"] for p in chosen],
            [_baseline(p["times"]) / p["times"][FP8]["ms"] for p in chosen],
            marker="o",
            label=f"{tokens} tokens",
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([p["width"] for p in points], [str(p["width"]) for p in points])
    axes.set_xlabel("width of the layer")
    axes.set_ylabel("time of bfloat16 / time of FP8")
    axes.set_title(f"One Llama-shaped layer, forward and backward ({device})")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_losses(times: Times, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, style in ((PLAIN, ":"), (UNIT, "-"), (FP8, "--")):
        if name in times:
            losses = times[name]["losses"]
            window = min(LAST, len(losses))
            smooth = np.convolve(losses, np.ones(window) / window, "valid")
            steps = np.arange(window, len(losses) + 1)
            axes.plot(steps, smooth, style, label=name.replace("`", ""))
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, nats per token (mean of {LAST} steps)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: ReportConfig) -> None:
    """Prints the tables, and draws the pictures."""
    record = json.loads(config.record.read_text())
    print(report(record))
    if config.pictures:
        draw(record, config.record.parent)
    if config.gallery:
        page = config.gallery.read_text()
        config.gallery.write_text(with_tables(page, record))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(ReportConfig))
