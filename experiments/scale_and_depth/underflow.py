"""Underflow of activations: `python -m experiments.scale_and_depth.underflow`.

The share of an activation's outputs that are not zero, and become zero in E4M3. GELU
and SiLU send much of their input close to zero; a ReLU's outputs are zero or not.

Reference: munit Scaling (Narayan et al., 2025).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import jax_unit_scaling as jus
from jax_unit_scaling import analysis

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "SiLU": jax.nn.silu,
    "ReLU": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class UnderflowConfig:
    """How many samples of which scales."""

    out: Path = Path("runs/scale_and_depth")
    """Folder for underflow.json and .png."""
    samples: int = 2**22
    log2_scales: tuple[int, int] = (-4, 6)
    """From the first to the last, in halves of a power of two."""


def underflow(config: UnderflowConfig) -> dict[str, dict[float, float]]:
    """The share of each activation at each log2 scale of its input."""
    x = jax.random.normal(jax.random.key(0), (config.samples,))
    low, high = config.log2_scales
    found = {
        name: {k / 2: _share(f, x * 2 ** (k / 2)) for k in range(2 * low, 2 * high + 1)}
        for name, f in ACTIVATIONS.items()
    }
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "underflow.json"
    path.write_text(json.dumps(found, indent=1))
    figure = analysis.curves(
        {name: [*shares.items()] for name, shares in found.items()},
        x="log2 of the input's scale",
        y="share that underflows in E4M3",
    )
    figure.axes[0].set_yscale("log")
    figure.axes[0].axvline(0, color="0.5", linewidth=0.8)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    for name, shares in found.items():
        worst = max(shares, key=shares.__getitem__)
        print(
            f"{name}: {shares[0]:.3%} at unit scale, at most {shares[worst]:.2%} "
            f"(2^{worst:g})"
        )
    return found


def _share(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    y = f(x)
    return float(np.mean((y != 0) & (jus.quantize(y, jus.E4M3) == 0)))


if __name__ == "__main__":
    import tyro

    underflow(tyro.cli(UnderflowConfig, description=__doc__))
