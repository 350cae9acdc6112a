"""Pre-trains one BERT in every precision: curves in one picture, and a table."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import jax_unit_scaling as jus
from jax_unit_scaling import analysis

from ..shared.layers import Parametrisation
from ..shared.loop import timed_steps
from ..shared.loss_scale import LossScale
from ..shared.picture import Line, Panel, draw
from ..shared.record import append_lines, environment, markdown, open_lines
from .data import Text, load_text
from .model import LARGE, TINY, ModelConfig
from .pretrain import PretrainConfig, make_task
from .training import Optimiser


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to train: a parametrisation, a precision, and a factor on the loss."""

    parametrisation: Parametrisation
    precision: str
    loss_scale: LossScale = LossScale()


KINDS: dict[str, Kind] = {
    "regular float32": Kind("regular", "float32"),
    "regular bfloat16": Kind("regular", "bfloat16"),
    "regular float16": Kind("regular", "float16, master"),
    "regular float16, loss x 32768": Kind(
        "regular", "float16, master", LossScale(2.0**15)
    ),
    "regular float16, dynamic": Kind(
        "regular", "float16, master", LossScale(2.0**15, grow_every=200)
    ),
    "regular fp8": Kind("regular", "fp8, master"),
    "unit-scaled float32": Kind("unit", "float32"),
    "unit-scaled bfloat16": Kind("unit", "bfloat16"),
    "unit-scaled float16": Kind("unit", "float16, master"),
    "unit-scaled fp8": Kind("unit", "fp8, master"),
    "unit-scaled fp8, native": Kind("unit", "fp8 native"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The comparison; by default BERT-Large, for a GPU."""

    out: Path = Path("runs/bert")
    """Folder for the text, runs.jsonl, table.md and loss.png. A second call trains what
    is missing."""
    model: ModelConfig = LARGE
    """The sizes; a kind has its own parametrisation and precision."""
    kinds: tuple[str, ...] = (
        "regular float32",
        "regular bfloat16",
        "regular float16",
        "unit-scaled float16",
        "unit-scaled fp8",
        "unit-scaled fp8, native",
    )
    """Of `KINDS`. The first of each parametrisation is trained at all rates, the others
    at its best one."""
    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    characters: int | None = None
    """Of the training text, by default all."""
    vocabulary: int = 30400
    optimiser: Optimiser = "lamb"
    regular_log2_rates: tuple[float, ...] = (-9,)
    unit_log2_rates: tuple[float, ...] = (-9,)
    warmup: int = 100
    steps: int = 1000
    seconds: float = 240.0
    """For the steps of each run; one that has not come to its end is compared, as all
    others then are, at the last step that all have made."""
    batch: int = 64
    length: int = 128
    seed: int = 0
    eval_batches: int = 16

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"`kinds` must be of {list(KINDS)}, got {unknown}.")

    def run_of(self, kind: Kind, log2_rate: float) -> PretrainConfig:
        model = dataclasses.replace(
            self.model, parametrisation=kind.parametrisation, precision=kind.precision
        )
        names = ("vocabulary", "optimiser", "warmup", "steps", "batch", "length")
        same = {n: getattr(self, n) for n in (*names, "seed", "eval_batches")}
        return PretrainConfig(
            model=model,
            rate=2.0**log2_rate,
            accumulate=1,
            loss_scale=kind.loss_scale,
            **same,
        )


PRESETS: dict[str, tuple[str, Config]] = {
    "large": ("BERT-Large: half an hour of a GPU.", Config()),
    "cpu": (
        "A small one: ten minutes of a CPU.",
        Config(
            out=Path("runs/bert_cpu"),
            model=ModelConfig(width=64, depth=3, head_size=16, positions=32),
            kinds=(
                "regular float32",
                "regular float16",
                "regular fp8",
                "unit-scaled float32",
                "unit-scaled float16",
                "unit-scaled fp8",
            ),
            characters=2**21,
            vocabulary=512,
            regular_log2_rates=(-8, -7, -6, -5),
            unit_log2_rates=(-8, -7, -6, -5),
            warmup=100,
            steps=1000,
            seconds=math.inf,
            batch=32,
            length=32,
        ),
    ),
    "smoke": (
        "All of it in small: a minute of a CPU.",
        Config(
            out=Path("runs/bert_smoke"),
            model=TINY,
            characters=2**18,
            vocabulary=512,
            regular_log2_rates=(-7, -6),
            unit_log2_rates=(-7, -6),
            warmup=5,
            steps=20,
            batch=4,
            length=32,
            eval_batches=2,
        ),
    ),
}

# What may differ between two calls that share a file of results.
_FREE = {"out", "data", "kinds", "regular_log2_rates", "unit_log2_rates", "seconds"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One kind at one rate; losses in nats."""

    kind: str
    log2_rate: float
    losses: tuple[float, ...]
    """Of each step."""
    valid: float
    step_ms: float
    skipped: int
    """Steps that a dynamic factor on the loss left out."""
    device: str
    jax: str


def run(config: Config) -> list[Run]:
    """Trains what is missing, then prints the table and draws the curves."""
    text = load_text(
        config.out / "text",
        config.data,
        vocabulary=config.vocabulary,
        characters=config.characters,
    )
    path = config.out / "runs.jsonl"
    shared = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    runs = [as_run(line) for line in open_lines(path, {"settings": shared})]
    found: list[Run] = []
    for name in config.kinds:
        for rate in _rates(config, name, found):
            done = [r for r in runs if (r.kind, r.log2_rate) == (name, rate)]
            if not done:
                done = [_train(config, text, name, rate)]
                append_lines(path, [dataclasses.asdict(done[0]) | environment()])
            found += done[:1]
    report(config, found)
    return found


def as_run(line: Mapping[str, Any]) -> Run:
    """The run that a line of runs.jsonl holds."""
    given = {f.name: line[f.name] for f in dataclasses.fields(Run)}
    return Run(**given | {"losses": tuple(given["losses"])})


def _rates(config: Config, name: str, found: Sequence[Run]) -> tuple[float, ...]:
    """All rates for the first kind of a parametrisation, its best one for others."""
    own = KINDS[name].parametrisation
    family = [r for r in found if KINDS[r.kind].parametrisation == own]
    first = [r for r in family if r.kind == family[0].kind and r.kind != name]
    if first:
        return (min(first, key=_rank).log2_rate,)
    return config.unit_log2_rates if own == "unit" else config.regular_log2_rates


def _rank(run: Run) -> float:
    return run.valid if math.isfinite(run.valid) else math.inf


def _train(config: Config, text: Text, name: str, log2_rate: float) -> Run:
    run = config.run_of(KINDS[name], log2_rate)
    task = make_task(run, text)
    step = jus.jit(task.training.step, donate_argnums=0)

    def show(i: int, loss: float) -> None:
        print(f"{name}, 2^{log2_rate:g}: step {i}, {loss:.4f} nats", flush=True)

    begun = task.training.begin(task.params, run.seed)
    program = step.lower(begun, task.batch(0)).compile()
    state, losses, seconds = timed_steps(
        lambda state, i: program(state, task.batch(i)),
        begun,
        steps=run.steps,
        seconds=config.seconds,
        show=show,
    )
    valid, skipped = task.valid(state.params), int(state.scale.skipped)
    rounded = tuple(round(x, 4) for x in losses)
    about = environment()
    where = about["device"], about["jax"]
    return Run(name, log2_rate, rounded, valid, seconds * 1e3, skipped, *where)


def final_loss(run: Run, steps: int) -> float:
    """The mean over the last tenth of the first `steps`."""
    return statistics.fmean(run.losses[steps - max(1, steps // 10) : steps])


def rows(config: Config, found: Sequence[Run]) -> list[dict[str, str]]:
    """The table: each kind at its rate, beside the first kind and its own family's."""
    runs = best(config, found)
    steps = min(len(r.losses) for r in runs)
    final = {r.kind: final_loss(r, steps) for r in runs}
    table = []
    for r in runs:
        own = KINDS[r.kind].parametrisation
        first = next(k for k in final if KINDS[k].parametrisation == own)
        table.append(
            {
                "trained as": r.kind,
                "rate": f"2^{r.log2_rate:g}",
                "final loss": f"{final[r.kind]:.4f}",
                f"beside {runs[0].kind}": _beside(final[r.kind], final[runs[0].kind]),
                "beside its first": _beside(final[r.kind], final[first]),
                "validation": f"{r.valid:.4f}",
                "ms a step": f"{r.step_ms:.1f}",
                "steps": f"{len(r.losses)}" + f" - {r.skipped}" * (r.skipped > 0),
            }
        )
    return table


def _beside(loss: float, other: float) -> str:
    return "" if loss == other else f"{loss / other - 1:+.2%}"


def best(config: Config, found: Sequence[Run]) -> list[Run]:
    """Each kind at its best rate, by validation."""
    return [min((r for r in found if r.kind == k), key=_rank) for k in config.kinds]


def report(config: Config, found: Sequence[Run]) -> None:
    """Prints the table and writes it as Markdown; draws the curves beside it."""
    table = rows(config, found)
    Console(width=140).print(analysis.table(table))
    (config.out / "table.md").write_text(markdown(table) + "\n")
    runs = best(config, found)
    steps = min(len(r.losses) for r in runs)
    first = np.array(runs[0].losses[:steps])
    beside = [Line(r.kind, _smooth(r.losses[:steps] - first)) for r in runs]
    lines = [Line(r.kind, _smooth(r.losses)) for r in runs]
    m = config.model
    note = (
        f"{m.depth} layers of {m.width}, {config.batch} x {config.length}, "
        f"{config.optimiser}, seed {config.seed}; {runs[0].device}, jax {runs[0].jax}"
    )
    panels = (
        Panel("Masked-language-model loss", "step", "nats", lines),
        Panel("", "step", f"nats beside {runs[0].kind}", beside),
    )
    draw([[p] for p in panels], config.out / "loss.png", note=note, colours="tab10")


def _smooth(losses: Any, points: int = 50) -> list[tuple[float, float]]:
    """Means over so many pieces of a curve."""
    size = max(1, len(losses) // points)
    ends = range(size, len(losses) + 1, size)
    return [(end, float(np.mean(losses[end - size : end]))) for end in ends]
