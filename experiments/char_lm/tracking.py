"""What tracking a training run costs: `python -m experiments.char_lm.tracking`.

A step of the character-level model, beside the step that also records the scales of its
tensors, and the time to write them to the disk, in turn.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jax_unit_scaling import analysis

from ..shared.record import environment
from .model import ModelConfig
from .train import TrainConfig, make_task


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """The model, and how often each is measured."""

    out: Path = Path("runs/tracking")
    """Folder for tracking.json."""
    width: int = 96
    depth: int = 3
    vocabulary: int = 128
    repeats: int = 15


def cost(config: TrackingConfig) -> dict[str, Any]:
    """Measures, writes tracking.json and prints the table."""
    models = {kind: measure(config, kind) for kind in ("regular", "unit")}
    settings = dataclasses.asdict(config) | {"out": str(config.out)}
    cores = len(os.sched_getaffinity(0))
    record = {"config": settings, "cores": cores, **environment(), "models": models}
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "tracking.json").write_text(json.dumps(record, indent=1))
    Console(width=100).print(analysis.table(summary(record)))
    return record


def measure(config: TrackingConfig, parametrisation: Any) -> dict[str, Any]:
    """Seconds of each part in each round, and of what is done once."""
    model = ModelConfig(parametrisation, width=config.width, depth=config.depth)
    run = TrainConfig(out=config.out, model=model)
    task = make_task(run, config.vocabulary)
    shape = (2, run.batch, run.length)
    batch = np.random.default_rng(0).integers(0, config.vocabulary, shape)
    once, scales = _seconds(lambda: task.tracked_step(task.state, *batch)[-1])
    _seconds(lambda: task.step(task.state, *batch))
    parts: dict[str, list[float]] = {"step": [], "tracked": [], "save": []}
    with tempfile.TemporaryDirectory() as folder:
        each: dict[str, Callable[[], Any]] = {
            "step": lambda: task.step(task.state, *batch),
            "tracked": lambda: task.tracked_step(task.state, *batch),
            "save": lambda: analysis.save(scales, Path(folder) / "0.npz"),
        }
        for _ in range(config.repeats):
            for name, part in each.items():
                parts[name].append(_seconds(part)[0])
    return {"tensors": len(scales), "compile": once, **parts}


def _seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    return time.perf_counter() - start, out


def summary(record: dict[str, Any]) -> list[dict[str, str]]:
    """Medians, and what recording every so many steps adds to a step's time."""
    rows = []
    for name, found in record["models"].items():
        step, tracked, save = (
            statistics.median(found[part]) for part in ("step", "tracked", "save")
        )
        row = {"model": name, "tensors": str(found["tensors"])}
        for part, seconds in (
            ("step", step),
            ("with scales", tracked),
            ("to the disk", save),
        ):
            row[part] = f"{1e3 * seconds:.0f} ms"
        for every in (50, 100):
            share = (tracked - step + save) / (every * step)
            row[f"every {every}"] = f"{share:.1%}"
        row["once, to compile"] = f"{found['compile']:.0f} s"
        rows.append(row)
    return rows


if __name__ == "__main__":
    import tyro  # where it is not installed, `cost` can still be called

    cost(tyro.cli(TrackingConfig, description=__doc__))
