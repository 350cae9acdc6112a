"""The comparison: that of `experiments.transformed`, with this model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..char_lm.model import Precision
from ..transformed.train import TransformedConfig
from .model import GPT


@dataclasses.dataclass(frozen=True)
class GPTConfig(TransformedConfig):
    """A GPT, its training, and where the results go.

    By default small enough for a CPU, whose batch is 32 times smaller than nanoGPT's.
    A loss is a mean, so its gradients at the logits are 32 times larger than there;
    `fp8_loss_factor` makes them what they are there. They are divided by it in float32.
    """

    out: Path = Path("runs/fp8_out_of_the_box")
    width: int = 64
    depth: int = 4
    head_size: int = 32
    steps: int = 1000
    warmup: int = 50
    batch: int = 8
    length: int = 64
    log2_rates: tuple[int, ...] = (-10, -9, -8)
    seeds: tuple[int, ...] = (0, 1, 2)
    fp8_loss_factor: float = 2.0**-5
    variants: tuple[str, ...] = ("float32", "FP8, naive", "FP8, unit_scale")

    def model(self, precision: Precision, vocabulary: int, seed: Any) -> nnx.Module:
        return GPT(
            vocabulary,
            self.length,
            self.width,
            self.width // self.head_size,
            self.depth,
            dtype=jnp.dtype(precision),
            rngs=nnx.Rngs(jax.random.key(seed)),
        )


# nanoGPT's own configuration for characters, but for its dropout; minutes of a GPU.
NANOGPT = GPTConfig(
    width=384,
    depth=6,
    head_size=64,
    steps=2000,
    warmup=100,
    batch=64,
    length=256,
    log2_rates=(-10, -9),
    seeds=(0,),
    fp8_loss_factor=1.0,
)
