"""The three measurements, each in processes of its own and side by side.

A pair of measurements, plain and unit-scaled, is taken one right after the other, and
which comes first alternates: what slows the machine slows both. The ratio is that of a
pair; the median and the quartiles of the pairs' ratios are what counts.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from .model import KINDS, Dtype, Kind, Size, training_step

Times = dict[str, float]


class Ratio(NamedTuple):
    """Seconds of plain and unit-scaled, and the ratios of the pairs, in the median."""

    what: str
    plain: float
    unit: float
    ratio: float
    low: float
    high: float
    target: float | None


def ratio_of(
    what: str, pairs: Iterable[tuple[float, float]], target: float | None
) -> Ratio:
    """The summary of pairs (plain, unit)."""
    plain, unit = zip(*pairs, strict=True)
    ratios = [u / p for p, u in zip(plain, unit, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    middle = statistics.median
    return Ratio(what, middle(plain), middle(unit), middle(ratios), low, high, target)


def alternate(measure: Callable[[Kind], Any], repeats: int) -> list[dict[Kind, Any]]:
    """Pairs of measurements; which comes first alternates."""
    return [
        {kind: measure(kind) for kind in (KINDS if i % 2 == 0 else KINDS[::-1])}
        for i in range(repeats)
    ]


def import_times(repeats: int) -> list[dict[Kind, float]]:
    """Seconds to import jax and flax, without and with this package."""
    modules = {"plain": "jax, flax.nnx", "unit": "jax, flax.nnx, jax_unit_scaling"}

    def measure(kind: Kind) -> float:
        return child(
            f"import time; start = time.perf_counter(); import {modules[kind]}; "
            "print(time.perf_counter() - start)"
        )

    for kind in KINDS:  # reads the disk, and leaves bytecode, as an installation does
        measure(kind)
    return alternate(measure, repeats)


def compile_times(size: Size, dtype: Dtype, repeats: int) -> list[dict[Kind, Times]]:
    """Seconds that a fresh process needs to trace, lower and compile a step."""

    def measure(kind: Kind) -> Times:
        return child(
            "import json; from experiments.overhead import measure, model; "
            f"size = model.{size!r}; "
            f"print(json.dumps(measure.compile_once(size, {kind!r}, {dtype!r})))"
        )

    return alternate(measure, repeats)


def compile_once(size: Size, kind: Kind, dtype: Dtype) -> Times:
    """Seconds of tracing, lowering and compiling, in this process; as yet untraced."""
    step, state, ids = training_step(size, kind, dtype)
    clock = [time.perf_counter()]
    traced = jax.jit(step).trace(state, ids)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    parts = [b - a for a, b in zip(clock, clock[1:], strict=False)]
    names = ("trace", "lower", "compile")
    return dict(zip(names, parts, strict=True)) | {"all": sum(parts)}


def step_times(
    size: Size, dtypes: Iterable[Dtype], repeats: int, seconds: float
) -> dict[str, Any]:
    """Seconds of a step, plain and unit-scaled: `repeats` pairs of each dtype.

    Each measurement runs as many steps as fill `seconds`. A process of its own: on a
    GPU it holds the memory.
    """
    return child(
        "import json; from experiments.overhead import measure, model; "
        f"size = model.{size!r}; dtypes = {tuple(dtypes)!r}; "
        f"print(json.dumps(measure.time_steps(size, dtypes, {repeats}, {seconds})))"
    )


def time_steps(
    size: Size, dtypes: Iterable[Dtype], repeats: int, seconds: float
) -> dict[str, Any]:
    """What `step_times` says, in this process, and the device's name."""
    times = {dtype: _time_steps(size, dtype, repeats, seconds) for dtype in dtypes}
    return {"device": jax.devices()[0].device_kind, "times": times}


def _time_steps(
    size: Size, dtype: Dtype, repeats: int, seconds: float
) -> list[dict[Kind, float]]:
    runners = {kind: _runner(size, kind, dtype) for kind in KINDS}
    count = max(1, round(seconds / runners["plain"](2)))
    return alternate(lambda kind: runners[kind](count), repeats)


def _runner(size: Size, kind: Kind, dtype: Dtype) -> Callable[[int], float]:
    return keeps_training(*training_step(size, kind, dtype))


def keeps_training(
    step: Callable[..., Any], state: Any, batch: Any
) -> Callable[[int], float]:
    """Seconds per step over so many steps of a compiled model that keeps training.

    `step` is (state, batch) -> (state, loss).
    """
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()

    def run(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, loss = compiled(state, batch)
        loss.block_until_ready()
        return (time.perf_counter() - start) / count

    run(2)
    return run


def child(code: str) -> Any:
    """What a fresh Python process prints last, as JSON.

    Raises:
        RuntimeError: if it fails, with what it wrote.
    """
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"a measurement failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
