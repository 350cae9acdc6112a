"""Times side by side, and where in a step the time goes."""

import collections
import dataclasses
import gzip
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

import jax_unit_scaling as jus

Program = tuple[Any, tuple[Any, ...], float]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled program tells without being run.

    Attributes:
        compile_s: seconds to compile.
        temporary_gib: memory beside arguments and results.
        fp8, products: how many products are 8-bit ones, of how many.
        multiplications: how many kernels only multiply, by a number, what a product
            reads or wrote: factors that became a part of nothing else.
    """

    compile_s: float
    temporary_gib: float
    fp8: int
    products: int
    multiplications: int

    @classmethod
    def of(cls, program: Any, seconds: float) -> dict[str, Any]:
        """As it is kept in a record."""
        text = program.as_text()
        products = jus.compiled.read(text)
        found = cls(
            seconds,
            program.memory_analysis().temp_size_in_bytes / 2**30,
            sum(p.is_fp8 for p in products),
            len(products),
            len(jus.compiled.lone_multiplications(text)),
        )
        return dataclasses.asdict(found)


def compiled(fn: Callable[..., Any], args: tuple[Any, ...], options: Any) -> Program:
    """The program, its arguments, and what compiling took."""
    start = time.perf_counter()
    program = jus.jit(fn, compiler_options=options).lower(*args).compile()
    return program, args, time.perf_counter() - start


def side_by_side(
    programs: Mapping[str, Program], *, rounds: int = 5, phase: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Times each program in turn, in several rounds: `Compiled`, the median of the
    rounds (`ms`), and what is between their quartiles (`spread`).

    A GPU under load lowers its clock until it keeps to its power, which takes tenths of
    a second. So each turn calls one program for `phase` seconds, and its second half is
    timed: the clock is then the one at which this program trains.
    """
    turns: dict[str, int] = {}
    for name, (program, args, _) in programs.items():
        jax.block_until_ready(program(*args))
        turns[name] = max(2, math.ceil(phase / 2 / _seconds(program, args, 3)))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (program, args, _) in programs.items():
            _seconds(program, args, turns[name])
            times[name].append(_seconds(program, args, turns[name]) * 1e3)
    found = {}
    for name, (program, _, seconds) in programs.items():
        low, middle, high = statistics.quantiles(times[name], n=4)
        spent = {"ms": middle, "spread": high - low}
        found[name] = spent | Compiled.of(program, seconds)
    return found


def _seconds(program: Any, args: tuple[Any, ...], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = program(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


GROUPS = {
    "products": ("nvjet", "gemm", "cutlass", "wgmma_f8"),
    "attention": ("cudnn", "sdpa"),
    "our kernels": ("kernel",),
}


def kernels(program: Program, *, calls: int = 5) -> dict[str, float]:
    """Milliseconds of a call by kernel, from a profile under load."""
    run, args, _ = program
    for _ in range(calls):
        out = run(*args)
    jax.block_until_ready(out)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = run(*args)
            jax.block_until_ready(out)
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    processes = {
        e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"
    }
    found: dict[str, float] = collections.defaultdict(float)
    for event in events:
        on_gpu = "GPU" in processes.get(event.get("pid"), "")
        if on_gpu and "dur" in event and "hlo_op" in event.get("args", {}):
            found[event["name"]] += event["dur"] / 1e3 / calls
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def grouped(times: Mapping[str, float]) -> dict[str, float]:
    """Kernels' times by what they are for."""
    found: dict[str, float] = collections.defaultdict(float)
    for kernel, ms in times.items():
        names = (g for g, parts in GROUPS.items() if any(p in kernel for p in parts))
        found[next(names, "all else")] += ms
    return dict(found)
