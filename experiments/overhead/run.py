"""The whole comparison, from a configuration to a table."""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any, Literal

import flax
import jax

from .measure import Ratio, compile_times, import_times, ratio_of, step_times
from .model import Dtype, Size

# What the project promises of each: at most so many times the plain one's.
IMPORT, COMPILE, STEP = 1.1, 1.1, 1.02

SIZES = {
    "cpu": Size(),
    "gpu": Size(
        width=1024, depth=8, head_size=64, vocabulary=16384, batch=8, length=1024
    ),
}
SMOKE = Size(width=32, depth=1, head_size=16, vocabulary=64, batch=2, length=16)


@dataclasses.dataclass(frozen=True)
class OverheadConfig:
    """What is measured, and how often."""

    device: Literal["cpu", "gpu"] = "cpu"
    """Chooses the model's size; jax chooses the device itself."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    repeats: int = 7
    """Pairs of processes for import and compilation."""
    step_repeats: int = 21
    """Pairs of measurements of a step."""
    seconds: float = 1.0
    """The length of one measurement of a step."""
    out: Path = Path("runs/overhead")
    smoke: bool = False
    """Runs through everything once, at a size that says nothing."""


def run(config: OverheadConfig) -> list[Ratio]:
    """Measures all, writes `overhead.json` as it goes, and prints the table."""
    if config.smoke:
        config = dataclasses.replace(config, repeats=2, step_repeats=2, seconds=0.01)
    size = SMOKE if config.smoke else SIZES[config.device]
    config.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "config": dataclasses.asdict(config) | {"out": str(config.out)},
        "size": dataclasses.asdict(size),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
    }

    def keep(name: str, values: Any) -> Any:
        record[name] = values
        (config.out / "overhead.json").write_text(json.dumps(record, indent=1))
        return values

    keep("import", import_times(config.repeats))
    keep("compile", compile_times(size, config.dtypes[0], config.repeats))
    steps = step_times(size, config.dtypes, config.step_repeats, config.seconds)
    keep("steps", steps)
    ratios = summary(record)
    print(table(ratios, f"{steps['device']}, {size}"))
    return ratios


def summary(record: dict[str, Any]) -> list[Ratio]:
    """The rows of the table, from what is in `overhead.json`."""
    pairs = ((p["plain"], p["unit"]) for p in record["import"])
    ratios = [ratio_of("import", pairs, IMPORT)]
    for part in ("trace", "lower", "compile", "all"):
        pairs = ((p["plain"][part], p["unit"][part]) for p in record["compile"])
        name = "trace, lower, compile" if part == "all" else f"  {part}"
        ratios.append(ratio_of(name, pairs, COMPILE if part == "all" else None))
    for dtype, times in record["steps"]["times"].items():
        pairs = ((p["plain"], p["unit"]) for p in times)
        ratios.append(ratio_of(f"step in {dtype}", pairs, STEP))
    return ratios


def table(ratios: list[Ratio], title: str) -> str:
    """Plain text, as neither rich nor a terminal need be there."""
    head = (
        f"{'':24}{'plain':>10}{'unit':>10}{'ratio':>8}{'quartiles':>16}{'at most':>9}"
    )
    lines = [title, head]
    for r in ratios:
        target = "" if r.target is None else f"{r.target:.2f}"
        lines.append(
            f"{r.what:24}{1000 * r.plain:7.1f} ms{1000 * r.unit:7.1f} ms"
            f"{r.ratio:8.3f}{r.low:9.3f} -{r.high:5.3f}{target:>9}"
        )
    return "\n".join(lines)
