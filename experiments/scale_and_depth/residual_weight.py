"""Residual weight by depth: `python -m experiments.scale_and_depth.residual_weight`.

Transformers of several depths with sqrt(1 - tau) x + sqrt(tau) norm(f(x)) at each
branch, each trained for the same steps at several tau. All layers of a model are alike,
so they are one compiled function and a scan.

Reference: munit Scaling (Narayan et al., 2025): the best tau falls
with depth, 0.4 at 4 layers.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track

import jax_unit_scaling as jus

from ..char_lm.task import warmup_cosine
from ..shared.data import Corpus, load_corpus, train_batch
from ..shared.evaluate import mean_bits
from ..shared.picture import Line, Panel, draw
from ..shared.record import append_lines, environment, open_lines


@dataclasses.dataclass(frozen=True)
class ResidualWeightConfig:
    """The depths and weights, and the training of each."""

    out: Path = Path("runs/scale_and_depth")
    """Folder for residual_weight.jsonl and .png. A second call trains what is
    missing."""
    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    depths: tuple[int, ...] = (4, 12, 36, 100)
    taus: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.2)
    width: int = 32
    head_size: int = 16
    steps: int = 150
    warmup: int = 15
    learning_rate: float = 1.0
    batch: int = 4
    length: int = 32
    seeds: int = 1
    eval_characters: int = 2**14


def residual_weight(config: ResidualWeightConfig) -> list[dict[str, Any]]:
    """Trains what is missing, prints the best tau of each depth and draws all."""
    corpus = load_corpus(config.data, "bytes")
    path = config.out / "residual_weight.jsonl"
    free = ("out", "data", "depths", "taus", "seeds")
    shared = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    runs = open_lines(path, {"settings": shared, "data": corpus.fingerprint})
    done = {(r["depth"], r["tau"], r["seed"]) for r in runs}
    wanted = [
        (depth, tau, seed)
        for seed in range(config.seeds)
        for depth in config.depths
        for tau in config.taus
    ]
    for depth, tau, seed in track([w for w in wanted if w not in done], "trains"):
        bits = train(config, corpus, depth, tau, seed)
        run = {"depth": depth, "tau": tau, "seed": seed, "valid_bits": bits}
        append_lines(path, [run | environment()])
        runs.append(run)
    lines = [_line(depth, runs) for depth in sorted({r["depth"] for r in runs})]
    for line in lines:
        log2_tau, bits = line.points[line.best or 0]
        print(f"{line.label}: best tau {2**log2_tau:.3g}, {bits:.3f} bits")
    title = "fixed residual weights, norm behind each branch"
    panel = Panel(title, "log2 of tau", "validation bits per character", lines)
    note = f"{config.steps} steps of {config.batch} x {config.length} bytes, width "
    note += f"{config.width}, {config.seeds} seed(s); star: best of each depth."
    lowest = min(bits for line in lines for _, bits in line.points)
    limits = (lowest - 0.1, lowest + 1.6)  # where nothing is learnt is of no interest
    draw([[panel]], path.with_suffix(".png"), note=note, y_limits=limits)
    return runs


def _line(depth: int, runs: Sequence[dict[str, Any]]) -> Line:
    own = [r for r in runs if r["depth"] == depth]
    points = [
        (
            math.log2(tau),
            float(np.mean([r["valid_bits"] for r in own if r["tau"] == tau])),
        )
        for tau in sorted({r["tau"] for r in own})
    ]
    best = min(range(len(points)), key=lambda i: points[i][1])
    return Line(f"{depth} layers", points, best=best)


class _Ends(nnx.Module):
    """What is before and behind the stack."""

    def __init__(self, width: int, vocabulary: int, *, rngs: nnx.Rngs):
        self.embed = jus.nnx.Embed(vocabulary, width, rngs=rngs)
        self.norm = jus.nnx.RMSNorm(width, use_scale=False, rngs=rngs)
        self.readout = jus.nnx.LinearReadout(
            width, vocabulary, use_bias=False, rngs=rngs
        )


def train(
    config: ResidualWeightConfig, corpus: Corpus, depth: int, tau: float, seed: int
) -> float:
    """One model's validation bits."""

    def ends(key: jax.Array) -> _Ends:
        return _Ends(config.width, len(corpus.vocabulary), rngs=nnx.Rngs(key))

    def block(key: jax.Array) -> Any:
        return jus.nnx.TransformerBlock(
            config.width,
            config.width // config.head_size,
            4 * config.width,
            index=0,  # all alike
            depth=depth,
            residual_rule=jus.fixed_residual_rule(share=tau),
            placement=jus.nnx.branch_norm,
            activation=jus.gelu,
            gated=False,
            rngs=nnx.Rngs(key),
        )

    first, *keys = jax.random.split(jax.random.key(seed), depth + 1)
    graphs = [nnx.graphdef(nnx.eval_shape(ft.partial(f, first))) for f in (ends, block)]

    def logits(params: Any, ids: jax.Array) -> jax.Array:
        outer = nnx.merge(graphs[0], params[0])

        def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graphs[1], own)(x), None

        x, _ = jax.lax.scan(layer, outer.embed(ids), params[1])
        return outer.readout(outer.norm(x))

    schedule = warmup_cosine(
        config.learning_rate, warmup=config.warmup, steps=config.steps
    )
    adam = jus.optim.adam(schedule, b2=0.99, eps=1e-12)

    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, ids: jax.Array, targets: jax.Array) -> Any:
        grads = jax.grad(lambda p: jus.cross_entropy(logits(p, ids), targets))(params)
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def nats(params: Any, ids: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, ids), targets
        )

    @jax.jit
    def init() -> Any:
        blocks = jax.vmap(lambda key: nnx.state(block(key)))(jnp.stack(keys))
        return nnx.state(ends(first)), blocks

    params = init()
    state = adam.init(params)
    size = {"batch": config.batch, "length": config.length}
    for i in range(config.steps):
        b = train_batch(corpus.train, step=i, seed=seed, **size)
        params, state = update(params, state, b.inputs, b.targets)
    evaluated = ft.partial(nats, params)
    bits = mean_bits(evaluated, corpus.valid, **size, limit=config.eval_characters)
    return round(bits.item(), 5)


if __name__ == "__main__":
    import tyro

    residual_weight(tyro.cli(ResidualWeightConfig, description=__doc__))
