"""Rounding's noise by scale: `python -m experiments.scale_and_depth.signal_to_noise`.

E[x^2] / E[(q(x) - x)^2] for normal x of each scale and q of each format, rounding to
the nearest and saturating. A format holds a tensor well where its line is flat.

Reference: Unit Scaling (Blake et al., 2023), figure 2.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np

import jax_unit_scaling as jus
from jax_unit_scaling import analysis, formats

FORMATS = {
    "float16": jus.FP16,
    "bfloat16": jus.BF16,
    "E4M3": jus.E4M3,
    "E5M2": jus.E5M2,
    "E4M3, of the paper's machine": formats.E4M3FNUZ,
    "E5M2, of the paper's machine": formats.E5M2FNUZ,
}


@dataclasses.dataclass(frozen=True)
class SignalToNoiseConfig:
    """How many samples of which scales."""

    out: Path = Path("runs/scale_and_depth")
    """Folder for signal_to_noise.json and .png."""
    samples: int = 2**20
    log2_scales: tuple[int, int] = (-24, 20)
    """From the first to the last, one for each power of two."""


def signal_to_noise(config: SignalToNoiseConfig) -> dict[str, dict[int, float]]:
    """The ratio of each format at each log2 scale; writes and draws them."""
    x = jax.random.normal(jax.random.key(0), (config.samples,))
    low, high = config.log2_scales
    found = {
        name: {k: _ratio(x * 2.0**k, format) for k in range(low, high + 1)}
        for name, format in FORMATS.items()
    }
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "signal_to_noise.json"
    path.write_text(json.dumps(found, indent=1))
    lines = {
        name: [(float(k), 10 * math.log10(r)) for k, r in ratios.items() if r > 0]
        for name, ratios in found.items()
    }
    styles = {name: {"linestyle": "--"} for name in FORMATS if "machine" in name}
    figure = analysis.curves(
        lines,
        x="log2 of the input's scale",
        y="signal to noise (dB)",
        styles=styles,
    )
    panel = figure.axes[0]
    panel.axvline(0, color="0.5", linewidth=0.8)
    panel.set_ylim(bottom=0)
    panel.legend(loc=(0.29, 0.47), ncols=2, fontsize=8)  # between the lines
    figure.savefig(path.with_suffix(".png"), dpi=120)
    for name, ratios in found.items():
        print(f"{name}: {ratios.get(0, math.nan):.4g} at unit scale")
    return found


def _ratio(x: jax.Array, format: jus.Format) -> float:
    exact = np.asarray(x, np.float64)
    noise = np.asarray(jus.quantize(x, format), np.float64) - exact
    with np.errstate(divide="ignore"):
        return float(np.mean(exact**2) / np.mean(noise**2))


if __name__ == "__main__":
    import tyro

    signal_to_noise(tyro.cli(SignalToNoiseConfig, description=__doc__))
