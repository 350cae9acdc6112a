"""muP's coordinate check: `python -m experiments.mup_transfer.coordinates`.

How the scale of every activation, and of its change since initialisation, depends on
width after some steps of Adam. A learning rate can only transfer where it does not.

Reference: Tensor Programs V (Yang et al., 2022), appendix D.1.
"""

import dataclasses
import functools as ft
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..char_lm.model import ModelConfig, Parametrisation
from ..char_lm.task import Training, make_training, optimiser
from ..shared.data import load_corpus, train_batch
from ..shared.picture import Line, Panel, draw
from ..shared.record import environment
from .results import NAMES

Scales = dict[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class CoordinatesConfig:
    """Models of several widths, and the few steps that they are trained for."""

    out: Path = Path("runs/mup_transfer")
    """Folder for coordinates.json and coordinates.png."""
    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    depth: int = 2
    head_size: int = 16
    """Heads grow in number, not in size, so that attention itself knows no width."""
    steps: int = 5
    seeds: int = 5
    batch: int = 4
    length: int = 32
    regular_log2_rate: int = -8
    unit_log2_rate: int = 0
    smoke: bool = False
    """Two small widths, one block, two steps: seconds."""

    def model(self, parametrisation: Parametrisation, width: int) -> ModelConfig:
        return ModelConfig(
            parametrisation, width=width, depth=self.depth, head_size=self.head_size
        )


def coordinates(config: CoordinatesConfig) -> dict[str, dict[str, float]]:
    """Measures, writes coordinates.json, prints the slopes, draws the picture."""
    if config.smoke:
        config = dataclasses.replace(
            config, widths=(32, 128), depth=1, steps=2, seeds=4
        )
    log2_rates: dict[Parametrisation, int] = {
        "regular": config.regular_log2_rate,
        "unit": config.unit_log2_rate,
    }
    found: dict[str, dict[int, Scales]] = {}
    for parametrisation, log2_rate in log2_rates.items():
        found[parametrisation] = {
            width: measure(
                config,
                config.model(parametrisation, width),
                ft.partial(optimiser, parametrisation),
                2.0**log2_rate,
            )
            for width in config.widths
        }
    config.out.mkdir(parents=True, exist_ok=True)
    _write(config, found)
    fitted = {p: slopes(scales) for p, scales in found.items()}
    print(
        f"slope of log2 rms(x_{config.steps} - x_0) against log2 width, +- over seeds"
    )
    for p, by_name in fitted.items():
        for name, each in by_name.items():
            print(f"{p:8} {name:30} {each.mean():+.2f} +- {each.std():.2f}")
    _draw(config, found)
    return {p: {k: float(s.mean()) for k, s in f.items()} for p, f in fitted.items()}


def measure(
    config: CoordinatesConfig,
    model: ModelConfig,
    make_optimiser: Callable[[Any], Any],
    rate: float,
) -> Scales:
    """Of each activation [seeds, 2, steps + 1]: its rms, and the rms of its change.

    All seeds are one program; a seed chooses parameters, the data are the same. The
    activations are those of the first batch.
    """
    corpus = _corpus(config.data)
    training = make_training(model, len(corpus.vocabulary), make_optimiser)
    batches = [
        train_batch(
            corpus.train, step=i, seed=0, batch=config.batch, length=config.length
        )
        for i in range(config.steps)
    ]
    inputs, targets = (
        np.stack([getattr(b, name) for b in batches]) for name in ("inputs", "targets")
    )

    def run(seed: jax.Array) -> Any:
        state = training.init(seed)
        first = activations(training, state, inputs[0])

        def step(state: Any, batch: Any) -> Any:
            state, _ = training.step(state, rate, *batch)
            now = activations(training, state, inputs[0])
            return state, {k: _scales(x, first[k]) for k, x in now.items()}

        _, later = jax.lax.scan(step, state, (inputs, targets))
        start = {k: _scales(x, x) for k, x in first.items()}
        return {k: jnp.concatenate([start[k][None], later[k]]).T for k in start}

    scales = jax.jit(jax.vmap(run))(jnp.arange(config.seeds))
    return {k: np.asarray(x) for k, x in scales.items()}


_corpus = ft.cache(load_corpus)


def _scales(x: jax.Array, first: jax.Array) -> jax.Array:
    return jnp.stack([_rms(x), _rms(x - first)])


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


class _Watched(nnx.Module):
    """A layer that shows its output to `keep`."""

    def __init__(self, layer: nnx.Module, keep: Callable[[jax.Array], None]):
        self.layer = layer
        self.keep = keep

    def __call__(self, *args: Any, **more: Any) -> Any:
        y = self.layer(*args, **more)
        self.keep(y)
        return y


def activations(training: Training, state: Any, ids: jax.Array) -> dict[str, jax.Array]:
    """The output of every layer and block, by path; that of `readout` are the logits.

    What attention and the nonlinearity put out is the input of `out` and `down`.
    """
    model = nnx.merge(training.graph, state[0])
    seen: dict[str, jax.Array] = {}
    modules = dict(nnx.iter_modules(model))
    for path, layer in modules.items():
        if _is_watched(path, layer):
            name = "/".join(map(str, path))
            watched = _Watched(layer, ft.partial(seen.__setitem__, name))
            _replace(modules[path[:-1]], path[-1], watched)
    model(ids)
    return seen


def _is_watched(path: tuple[Any, ...], module: Any) -> bool:
    layers = nnx.Linear | nnx.LinearGeneral | nnx.Embed | nnx.RMSNorm
    return isinstance(module, layers) or path[:-1] == ("blocks",)


def _replace(parent: Any, key: Any, module: nnx.Module) -> None:
    if isinstance(key, int):
        parent[key] = module
    else:
        setattr(parent, key, module)


def slopes(scales: Mapping[int, Scales], step: int = -1) -> Scales:
    """Of each activation [seeds]: the slope of its change's log2 rms over log2 width.

    Args:
        scales: what `measure` found at each width.
        step: the change since initialisation is that after this step.
    """
    x = np.log2(list(scales))
    x -= x.mean()
    names = next(iter(scales.values()))
    changes = {k: np.log2([s[k][:, 1, step] for s in scales.values()]) for k in names}
    return {k: x @ y / (x @ x) for k, y in changes.items()}


def _write(config: CoordinatesConfig, found: dict[str, dict[int, Scales]]) -> None:
    record = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "environment": environment(),
        "axes": "model, width, activation, [seed, rms or rms of change, step]",
        "scales": {
            p: {w: {k: _rounded(x) for k, x in s.items()} for w, s in widths.items()}
            for p, widths in found.items()
        },
    }
    (config.out / "coordinates.json").write_text(json.dumps(record))


def _rounded(x: np.ndarray[Any, Any]) -> Any:
    return [[[float(f"{v:.4g}") for v in row] for row in seed] for seed in x]


# One block's layers, in the order of the computation, and all that follow.
_DRAWN = {
    "embed": "embedding",
    "query": "query",
    "value": "value",
    "out": "attention's output",
    "up": "MLP, up",
    "down": "MLP, down",
    "block": "last block",
    "norm": "last norm",
    "readout": "logits",
}


def _kind(name: str, depth: int) -> str:
    """Which line a path belongs to: those of the last block, and outside the blocks."""
    first, *rest = name.split("/")
    if first != "blocks":
        return first
    return {1: "block"}.get(len(rest), rest[-1]) if rest[0] == str(depth - 1) else ""


def _draw(config: CoordinatesConfig, found: dict[str, dict[int, Scales]]) -> None:
    """Rows: what is at initialisation, and the change after one and after all steps."""

    def panel(p: Parametrisation, which: int, step: int, y: str) -> Panel:
        names = {_kind(k, config.depth): k for k in found[p][config.widths[0]]}
        lines = []
        for kind, label in _DRAWN.items():
            values = {w: s[names[kind]][:, which, step] for w, s in found[p].items()}
            points = [(w, float(v.mean())) for w, v in values.items()]
            spans = [(float(v.min()), float(v.max())) for v in values.values()]
            lines.append(Line(label, points, spans))
        return Panel(f"{NAMES[p]}, rate 2^{rates[p]}", "width", y, lines)

    rates = {"regular": config.regular_log2_rate, "unit": config.unit_log2_rate}
    shown = [(0, 0, "rms at initialisation")] + [
        (1, step, f"rms of change, step {step}") for step in sorted({1, config.steps})
    ]
    draw(
        [[panel(p, *what) for p in NAMES] for what in shown],
        config.out / "coordinates.png",
        note=f"Layers of the last of {config.depth} blocks. Adam at a constant rate, "
        f"{config.batch} x {config.length} characters; mean, and range, of "
        f"{config.seeds} seeds.",
        colours="turbo",
        x_log2=True,
    )


if __name__ == "__main__":
    import tyro

    coordinates(tyro.cli(CoordinatesConfig, description=__doc__))
