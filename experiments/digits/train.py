"""A small ResNet on scikit-learn's digits: `python -m experiments.digits.train`.

The same network is trained with plain Flax in float32, and unit-scaled in float32 and
simulated FP8. Its layers are drop-in: only the module that they come from changes.
"""

import dataclasses
import functools as ft
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jax_unit_scaling as jus

Parametrisation = Literal["regular", "unit"]
RUNS: tuple[tuple[Parametrisation, jus.Formats | None], ...] = (
    ("regular", None),
    ("unit", None),
    ("unit", jus.SIMULATED_FP8),
)


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """What all runs share, and each parametrisation's learning rate."""

    width: int = 16
    """Channels of the first stage; the second has twice as many."""
    depth: int = 2
    """Residual blocks in each of the two stages."""
    steps: int = 300
    batch: int = 64
    seeds: int = 3
    """Runs of each kind, from seed 0; a seed chooses split, batches and parameters."""
    regular_learning_rate: float = 2.0**-7
    unit_learning_rate: float = 1.0


class ResNet(nnx.Module):
    """Pre-activation blocks in two stages, 8 x 8 and 4 x 4, a mean and a readout."""

    def __init__(
        self,
        config: DigitsConfig,
        parametrisation: Parametrisation,
        formats: jus.Formats | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.unit = parametrisation == "unit"
        layers: Any = jus.nnx if self.unit else nnx
        rounding: dict[str, Any] = {"formats": formats} if self.unit else {}
        conv = ft.partial(
            layers.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs, **rounding
        )
        # A gain's learning rate would not be that of the weights (u-muP, section 3).
        norm = ft.partial(
            layers.GroupNorm,
            num_groups=None,
            group_size=8,
            use_scale=False,
            use_bias=False,
            rngs=rngs,
        )
        widths = [config.width] * config.depth + [2 * config.width] * config.depth
        self.stem = conv(1, config.width)
        self.down = conv(config.width, 2 * config.width, strides=2)
        self.blocks = nnx.List(
            nnx.List([norm(n), conv(n, n), norm(n), conv(n, n)]) for n in widths
        )
        self.norm = norm(2 * config.width)
        self.readout = (layers.LinearReadout if self.unit else nnx.Linear)(
            2 * config.width, 10, rngs=rngs, **rounding
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        functions: Any = jus if self.unit else nnx
        x = self.stem(images)
        for i, (norm1, conv1, norm2, conv2) in enumerate(self.blocks):
            if 2 * i == len(self.blocks):
                x = self.down(x)

            def branch(x: jax.Array) -> jax.Array:
                x = conv1(functions.relu(norm1(x)))  # noqa: B023 (called below)
                return conv2(functions.relu(norm2(x)))  # noqa: B023

            x = jus.residual_apply(branch, x) if self.unit else x + branch(x)
        x = functions.relu(self.norm(x))
        mean = functions.avg_pool(x, x.shape[-3:-1])
        return self.readout(mean[:, 0, 0])


def train(
    config: DigitsConfig,
    parametrisation: Parametrisation,
    formats: jus.Formats | None = None,
    seed: int = 0,
) -> float:
    """Trains one network; returns its accuracy on the quarter that is held out."""
    unit = parametrisation == "unit"
    images, test_images, labels, test_labels = _digits(seed)
    graph, params = nnx.split(
        ResNet(config, parametrisation, formats, rngs=nnx.Rngs(seed))
    )
    rate = config.unit_learning_rate if unit else config.regular_learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, rate, config.steps // 10, config.steps
    )
    optimiser = (jus.optim if unit else optax).adam(schedule, b2=0.99)

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(images)
        if unit:
            return jus.cross_entropy(logits, labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        grads = jax.grad(loss)(params, images, labels)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    rng = np.random.default_rng(seed)
    for _ in track(range(config.steps), _name(parametrisation, formats)):
        chosen = rng.choice(len(images), config.batch, replace=False)
        params, state = step(params, state, images[chosen], labels[chosen])
    logits = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, test_images)
    return float(np.mean(jnp.argmax(logits, -1) == test_labels))


def compare(config: DigitsConfig) -> dict[str, list[float]]:
    """Trains each kind with each seed, and prints the table of accuracies."""
    found = {
        _name(*run): [train(config, *run, seed=seed) for seed in range(config.seeds)]
        for run in RUNS
    }
    table = Table("network", "accuracy", "of each seed")
    for name, accuracies in found.items():
        each = " ".join(f"{a:.2%}" for a in accuracies)
        table.add_row(name, f"{np.mean(accuracies):.2%}", each)
    Console().print(table)
    return found


def _digits(seed: int) -> list[np.ndarray]:
    """Images [n, 8, 8, 1] of unit scale and labels [n], both in train and test."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32)
    images = (images - images.mean()) / images.std()
    split: list[np.ndarray] = train_test_split(
        images,
        labels.astype(np.int32),
        test_size=0.25,
        stratify=labels,
        random_state=seed,
    )
    return split


def _name(parametrisation: Parametrisation, formats: jus.Formats | None) -> str:
    return f"{parametrisation}, {'simulated FP8' if formats else 'float32'}"


if __name__ == "__main__":
    compare(tyro.cli(DigitsConfig, description=__doc__))
