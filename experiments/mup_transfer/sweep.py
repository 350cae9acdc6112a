"""Learning-rate sweeps over widths: `python -m experiments.mup_transfer.sweep`.

Regular against unit-scaled. The rates of a width are trained at once, as one batch of
models. A line of sweep.jsonl for each finished run; a second call trains what is
missing. Ends with the best rates and the picture. Nothing but these, at the end, and
the command line itself needs the extra `experiments`.
"""

import dataclasses
import functools as ft
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from ..char_lm.model import Parametrisation
from ..shared.record import append_lines, environment, open_lines
from .results import Run, as_runs, report
from .runs import Group, Settings, corpus, flops, train_group


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The widths, rates and seeds, and where the results go."""

    out: Path = Path("runs/mup_transfer")
    """Folder for sweep.jsonl and sweep.png."""
    settings: Settings = dataclasses.field(default_factory=Settings)
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """On a GPU `--widths 128 256 512 1024`."""
    regular_log2_rates: tuple[int, ...] = tuple(range(-12, -3))
    unit_log2_rates: tuple[int, ...] = tuple(range(-4, 5))
    seeds: int = 1
    workers: int = 1
    """Processes; on a GPU several need XLA_PYTHON_CLIENT_PREALLOCATE=false."""
    smoke: bool = False
    """One small width, two rates, four steps: seconds."""


_SMOKE = Settings(depth=1, steps=4, warmup=2, batch=2, length=16, eval_characters=64)


def sweep(config: SweepConfig) -> list[Run]:
    """Trains what is missing, then prints the table and draws the picture."""
    if config.smoke:
        settings = dataclasses.replace(_SMOKE, data=config.settings.data)
        config = dataclasses.replace(
            config,
            settings=settings,
            widths=(16,),
            regular_log2_rates=(-8, -7),
            unit_log2_rates=(-1, 0),
        )
    path = config.out / "sweep.jsonl"
    shared = {
        "settings": dataclasses.asdict(config.settings),
        "data": corpus(config.settings).fingerprint,
    }
    runs = as_runs(open_lines(path, shared))
    groups = _missing(config, runs)
    work = [flops(config.settings, group) for group in groups]
    show = Progress(sum(len(g.log2_rates) for g in groups), sum(work))
    for group, new, seconds in _train(config, groups, show):
        about = {"seconds": round(seconds / len(new), 2), **environment()}
        append_lines(path, [dataclasses.asdict(run) | about for run in new])
        runs += new
        show.finish(len(new), flops(config.settings, group))
    try:
        report(path)
    except ImportError as e:
        print(
            f"no picture: {e}. All runs are in {path}; draw them elsewhere "
            f"with `python -m experiments.mup_transfer.results {path}`."
        )
    return runs


def _missing(config: SweepConfig, runs: list[Run]) -> list[Group]:
    """A seed at all widths before the next: what a time-out leaves is a picture."""
    rates: dict[Parametrisation, tuple[int, ...]] = {
        "regular": config.regular_log2_rates,
        "unit": config.unit_log2_rates,
    }
    done = {run.key for run in runs}
    groups = []
    for seed in range(config.seeds):
        for width in config.widths:
            for kind, log2_rates in rates.items():
                left = tuple(
                    r for r in log2_rates if (kind, width, r, seed) not in done
                )
                if left:
                    groups.append(Group(kind, width, seed, left))
    return groups


def _train(
    config: SweepConfig, groups: list[Group], show: "Progress"
) -> Iterator[tuple[Group, list[Run], float]]:
    """Each group as it ends, its runs, and the seconds it took."""
    group_work = ft.partial(flops, config.settings)
    if config.workers == 1:
        for group in groups:
            yield _timed(
                config.settings, group, ft.partial(show.begin, group_work(group))
            )
        return
    context = get_context("spawn")  # JAX has threads, which a fork would lose
    with ProcessPoolExecutor(config.workers, mp_context=context) as pool:
        futures = [pool.submit(_timed, config.settings, g) for g in groups]
        for future in as_completed(futures):
            yield future.result()


def _timed(
    settings: Settings, group: Group, *show: Callable[[float], None]
) -> tuple[Group, list[Run], float]:
    start = time.perf_counter()
    runs = train_group(settings, group, *show)
    return group, runs, time.perf_counter() - start


class Progress:
    """A bar over runs, with time left by work done; plain text, for rich may lack."""

    def __init__(self, runs: int, work: float):
        self.runs, self.work = runs, work
        self.runs_done, self.work_done = 0, 0.0
        self.start = time.perf_counter()
        if runs:
            print(f"{runs} runs, {work:.2g} floating-point operations", file=sys.stderr)

    def finish(self, runs: int, work: float) -> None:
        """Counts runs that have ended."""
        self.runs_done += runs
        self.work_done += work
        self.begin(0.0, 0.0)
        if self.runs_done == self.runs:
            print(file=sys.stderr)

    def begin(self, work: float, done: float) -> None:
        """Shows the bar; the share `done` of some `work` has not ended yet."""
        share = (self.work_done + work * done) / self.work
        bar = "#" * round(30 * share)
        used = time.perf_counter() - self.start
        left = f"{used * (1 - share) / share / 60:.1f} min left" if share else ""
        text = f"\r[{bar:30}] {self.runs_done}/{self.runs} runs  {left}"
        print(f"{text:70}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    import tyro

    sweep(
        tyro.cli(SweepConfig, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    )
