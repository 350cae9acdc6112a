"""Attention by position: `python -m experiments.scale_and_depth.attention_variance`.

A causal attention's output at position k is a weighted mean of k values. With
independent normal queries, keys and values its variance is

    E[sum_i p_i^2] = e / k - (e - 1) / k^2

for softmax probabilities p of k normal logits: exact at k = 1 and as k grows, since
E[exp(2 z)] / E[exp(z)]^2 = e, and up to 30% too much for few positions. So a factor can
make it one on average over positions, as `dot_product_attention` does, but not at all
of them. Values of a text are not independent: equal characters have equal ones, and a
mean of them stays larger.

Reference: munit Scaling (Narayan et al., 2025), section 2.
"""

import dataclasses
import functools as ft
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_unit_scaling as jus
from jax_unit_scaling import analysis

from ..shared.data import load_corpus, train_batch
from ..shared.layers import plain_attention

LAW = "e/k - (e-1)/k^2"


@dataclasses.dataclass(frozen=True)
class AttentionVarianceConfig:
    """The sequences, and how many of them."""

    out: Path = Path("runs/scale_and_depth")
    """Folder for attention_variance.json and .png."""
    data: Path | None = None
    """Folder with train.txt, valid.txt and test.txt; by default the source text of the
    running Python's standard library."""
    batch: int = 64
    length: int = 256
    heads: int = 4
    head_size: int = 64


def attention_variance(config: AttentionVarianceConfig) -> dict[str, list[float]]:
    """The variance at each position, of each way; writes and draws them."""
    shape = (config.batch, config.length, config.heads, config.head_size)
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (jax.random.normal(k, shape) for k in keys[:3])
    k = np.arange(1, config.length + 1)
    # The unit-scaled one divides its logits by head_size, not by its root: p is nearly
    # uniform, and the variance without its factor 1 / k.
    found = {
        LAW: (math.e / k - (math.e - 1) / k**2).tolist(),
        "plain, independent values": _variance(_plain, query, key, value),
        "plain, values of a text": _variance(
            _plain, query, key, _of_text(config, keys[3])
        ),
        "unit-scaled, independent values": _variance(_unit, query, key, value),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "attention_variance.json"
    path.write_text(json.dumps(found))
    lines = {
        name: list(zip(k.astype(float), values, strict=True))
        for name, values in found.items()
    }
    figure = analysis.curves(
        lines,
        x="position",
        y="variance of attention's output",
        styles={LAW: {"color": "k", "linestyle": "--", "zorder": 3}},
    )
    figure.axes[0].set(xscale="log", yscale="log")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    at = min(config.length, 100) - 1
    for name, values in found.items():
        print(f"{name}: {values[0]:.3f} at position 1, {values[at]:.4f} at {at + 1}")
    return found


_plain = ft.partial(plain_attention, formats=None, is_causal=True)
_unit = ft.partial(jus.dot_product_attention, is_causal=True)


def _variance(
    attention: Callable[..., jax.Array], query: jax.Array, key: jax.Array, v: jax.Array
) -> list[float]:
    y = np.asarray(jax.jit(attention)(query, key, v), np.float64)
    return [float(x) for x in np.mean(y**2, axis=(0, 2, 3))]


def _of_text(config: AttentionVarianceConfig, key: jax.Array) -> jax.Array:
    """Normal values of the characters of a text, as an embedding gives them."""
    corpus = load_corpus(config.data, "bytes")
    ids = train_batch(
        corpus.train, step=0, seed=0, batch=config.batch, length=config.length
    ).inputs
    table = jax.random.normal(key, (256, config.heads, config.head_size))
    return table[jnp.asarray(ids)]


if __name__ == "__main__":
    import tyro

    attention_variance(tyro.cli(AttentionVarianceConfig, description=__doc__))
