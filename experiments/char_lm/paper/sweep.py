"""The sweep: many models at once, and the next program compiled meanwhile."""

import dataclasses
import functools as ft
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from ...shared.data import Corpus, Unit, load_corpus, train_batch
from ...shared.evaluate import mean_bits
from ...shared.record import append_lines, environment, open_lines
from .model import Mixer
from .report import Run, as_runs, median_bits, report
from .search import Preset, Search, settings
from .training import Setting, make_training


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's experiment; a shorter one gives fewer `steps`."""

    out: Path = Path("runs/paper")
    """Folder for runs.jsonl, the table and scatter.png. A second call trains what is
    missing."""
    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    unit: Unit = "bytes"
    """What is predicted; the paper's are characters."""
    preset: Preset = "table"
    precisions: tuple[str, ...] = ("float32", "float16", "fp8")
    mixers: tuple[Mixer, ...] = ("attention", "conv", "rnn")
    search: Search = Search()
    seeds: int = 3
    steps: int = 2**19
    recurrent_steps: int | None = None
    """`steps` of recurrent models, whose many small products in a row are slow on a
    GPU."""
    batch: int = 8
    length: int = 256
    overlap: int = 32
    halvings: float = 8.0
    """How often the learning rate is halved over the steps."""
    steps_at_once: int = 50
    """Steps that a program makes in one call."""
    eval_batch: int = 32
    eval_characters: int = 2**17
    """Of each of the validation and the test text."""
    compilers: int = 1
    """Threads that compile what comes next, beside the one that trains."""
    unroll: int = 1
    """Steps of a recurrence that are compiled as one; 8 is faster on a GPU."""
    width: int | None = None
    """In place of the paper's 128, for a trial."""
    depth: int | None = None
    """In place of the paper's 8 and 2, for a trial."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "steps_at_once", "compilers", "eval_characters"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be 1 or more, got {getattr(self, name)}."
                )

    def steps_of(self, setting: Setting) -> int:
        own = self.recurrent_steps if setting.model.mixer == "rnn" else None
        return own or self.steps


# What may differ between two calls that share a file of results.
_FREE = {"out", "data", "preset", "precisions", "mixers", "search", "seeds"}
_FREE |= {"compilers", "steps_at_once", "unroll", "eval_batch"}


def run(config: Config) -> list[Run]:
    """Trains what is missing, then prints the table and draws the scatter."""
    corpus = load_corpus(config.data, config.unit)
    shared = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    shared |= {"data": corpus.fingerprint, "text": corpus.name}
    path = config.out / "runs.jsonl"
    runs = as_runs(open_lines(path, {"settings": shared}))
    wanted = [_trial(config, setting) for setting in _settings(config)]
    total = sum(flops(config, s, len(corpus.vocabulary)) for s in wanted)
    print(f"{len(wanted)} settings, {total:.2g} operations for each rate and seed")
    with _Programs(config, corpus) as programs, _bar(len(wanted)) as show:
        for setting in wanted:
            if _missing(config, setting, runs):
                programs.prepare(setting, _count(config, setting))
        for setting in wanted:
            while rates := _missing(config, setting, runs):
                start = time.perf_counter()
                tell = ft.partial(show, setting, rates)
                new = train(config, corpus, programs, setting, rates, tell)
                seconds = round((time.perf_counter() - start) / len(new), 2)
                about = {"seconds": seconds, **environment()}
                append_lines(path, [dataclasses.asdict(r) | about for r in new])
                runs += new
            show(None, (), 0.0)
    report(path)
    return runs


def _settings(config: Config) -> list[Setting]:
    return settings(config.preset, config.precisions, config.mixers)


def _trial(config: Config, setting: Setting) -> Setting:
    """The setting with what the configuration says of its size."""
    width = config.width or setting.model.width
    model = dataclasses.replace(
        setting.model,
        unroll=config.unroll,
        width=width,
        head_size=min(setting.model.head_size, width),
        groups=min(setting.model.groups, width),
        depth=config.depth or setting.model.depth,
    )
    return dataclasses.replace(setting, model=model)


def flops(config: Config, setting: Setting, vocabulary: int) -> float:
    """Of one model's training: 6 for each token and weight, and attention's own."""
    m = setting.model
    own = {
        "attention": 4 * m.width**2 + 2 * config.length * m.width,
        "conv": m.kernel_size * m.width**2 // m.groups,
        "rnn": 4 * m.width**2,
    }[m.mixer]
    weights = m.depth * (own + 8 * m.width**2) + m.width * vocabulary
    return 6.0 * weights * config.steps_of(setting) * config.batch * config.length


def _count(config: Config, setting: Setting) -> int:
    """How many rates are trained at once."""
    return config.search.count if setting.is_reference else config.search.near


def _missing(config: Config, setting: Setting, runs: list[Run]) -> tuple[int, ...]:
    """The rates to train next: those begun with, then as the search says."""
    found = median_bits(runs, setting, config.seeds)
    reference = None
    if not setting.is_reference:
        model = dataclasses.replace(setting.model, precision="float32")
        wide = dataclasses.replace(setting, model=model, loss_scale=1.0)
        bits = median_bits(runs, wide, config.seeds)
        reference = min(bits, key=bits.__getitem__, default=0)  # till it is known
    first = config.search.first(setting, reference)
    if not set(first) <= set(found):
        return first
    return config.search.next(found, _count(config, setting))


def train(
    config: Config,
    corpus: Corpus,
    programs: "_Programs",
    setting: Setting,
    log2_rates: tuple[int, ...],
    show: Callable[[float], None] = lambda share: None,
) -> list[Run]:
    """Trains all rates and seeds of a setting at once; `show` gets the share done."""
    program = programs.get(setting, len(log2_rates))
    models = [(r, seed) for r in log2_rates for seed in range(config.seeds)]
    rates = jnp.array([2.0**r for r, _ in models], jnp.float32)
    seeds = jnp.array([seed for _, seed in models], jnp.int32)
    scales = jnp.full(len(models), setting.loss_scale, jnp.float32)
    state, losses, done = program.init(seeds), [], 0
    steps = config.steps_of(setting)
    for size in _pieces(steps, config.steps_at_once):
        batches = _batches(config, corpus, range(done, done + size))
        repeated = (np.concatenate(len(log2_rates) * [x]) for x in batches)
        state, values = program.steps[size](state, rates, scales, *repeated)
        losses.append(np.asarray(values))
        done += size
        show(done / steps)
    last = np.concatenate(losses, 1)[:, -max(1, steps // 10) :].astype(np.float64)
    evaluate = ft.partial(
        mean_bits,
        ft.partial(program.nats, state),
        batch=config.eval_batch,
        length=config.length,
        overlap=config.overlap,
        limit=config.eval_characters,
    )
    bits = (last.mean(1) / math.log(2), evaluate(corpus.valid), evaluate(corpus.test))
    return [
        Run(setting, steps, rate, seed, *map(_finite, each))
        for (rate, seed), *each in zip(models, *bits, strict=True)
    ]


def _pieces(steps: int, at_once: int) -> list[int]:
    """The steps of each call, the last of which may be shorter."""
    whole, rest = divmod(steps, at_once)
    return whole * [at_once] + ([rest] if rest else [])


def _batches(
    config: Config, corpus: Corpus, steps: range
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Inputs and targets [seeds, steps, batch, length]: all rates see the same."""
    found = [
        [
            train_batch(
                corpus.train,
                step=step,
                seed=seed,
                batch=config.batch,
                length=config.length,
                overlap=config.overlap,
            )
            for step in steps
        ]
        for seed in range(config.seeds)
    ]
    inputs = np.array([[b.inputs for b in row] for row in found])
    return inputs, np.array([[b.targets for b in row] for row in found])


def _finite(x: Any) -> float | None:
    """JSON has no NaN."""
    return round(float(x), 5) if math.isfinite(x) else None


class _Program(NamedTuple):
    """Compiled for a number of models, a leading axis of all they take and give."""

    init: Callable[..., Any]
    steps: Mapping[int, Callable[..., Any]]
    """By how many they make."""
    nats: Callable[..., Any]


class _Programs:
    """Programs by setting and number of rates, compiled ahead in threads.

    XLA compiles without Python's lock, so it goes on while another program runs. Loss
    scales share a program, for which they are an argument.
    """

    def __init__(self, config: Config, corpus: Corpus):
        self.config, self.vocabulary = config, len(corpus.vocabulary)
        self.pool = ThreadPoolExecutor(config.compilers)
        self.futures: dict[tuple[Setting, int], Future[_Program]] = {}

    def __enter__(self) -> "_Programs":
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def prepare(self, setting: Setting, rates: int) -> Future[_Program]:
        setting = dataclasses.replace(setting, loss_scale=1.0)
        key = setting, rates
        if key not in self.futures:
            self.futures[key] = self.pool.submit(self._compile, setting, rates)
        return self.futures[key]

    def get(self, setting: Setting, rates: int) -> _Program:
        return self.prepare(setting, rates).result()

    def _compile(self, setting: Setting, rates: int) -> _Program:
        # float32 is to be that, where a GPU would round it to TF32.
        with jax.default_matmul_precision("highest"):
            return self._lowered(setting, rates * self.config.seeds)

    def _lowered(self, setting: Setting, models: int) -> _Program:
        config = self.config
        training = make_training(
            setting,
            self.vocabulary,
            steps=config.steps_of(setting),
            overlap=config.overlap,
            halvings=config.halvings,
        )
        number = jax.ShapeDtypeStruct((models,), jnp.float32)
        seeds = jax.ShapeDtypeStruct((models,), jnp.int32)
        init = jax.jit(jax.vmap(training.init)).lower(seeds)
        state = init.out_info
        many = jax.jit(jax.vmap(training.steps), donate_argnums=0)
        window = (config.batch, config.length)
        ids = jax.ShapeDtypeStruct((config.eval_batch, config.length), jnp.int32)
        nats = jax.jit(jax.vmap(training.nats, in_axes=(0, None, None)))
        steps = {}
        for size in {*_pieces(config.steps_of(setting), config.steps_at_once)}:
            shape = jax.ShapeDtypeStruct((models, size, *window), jnp.int32)
            lowered = many.lower(state, number, number, shape, shape)
            steps[size] = lowered.compile()
        return _Program(init.compile(), steps, nats.lower(state, ids, ids).compile())


class _bar:
    """A bar over settings, with what is trained now and how far it is."""

    def __init__(self, settings: int):
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.task = self.progress.add_task("compiles", total=settings)

    def __enter__(self) -> Callable[[Setting | None, Iterable[int], float], None]:
        self.progress.start()
        return self._show

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def _show(
        self, setting: Setting | None, rates: Iterable[int], share: float
    ) -> None:
        if setting is None:
            self.progress.advance(self.task)
            return
        tried = " ".join(f"2^{rate}" for rate in rates)
        text = f"{setting.name}, {setting.kind}, {tried}: {share:.0%}"
        self.progress.update(self.task, description=text)
