"""The measurements, their table and pictures: `python -m experiments.fp8_speed`."""

import dataclasses
import functools as ft
import json
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.markdown import Markdown

import jax_unit_scaling as jus

from . import model as models
from .measure import Measured, Program, compiled, grouped, kernels, side_by_side
from .model import NAMES, Kind, Size

FIGURES = Path(__file__).parent / "figures"
# Triton's kernels too: XLA's own default, which the baseline may be faster with.
DEFAULT = {"xla_gpu_enable_triton_gemm": True}


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """What is measured; by default what the figures show."""

    linear: tuple[int, int, int] = (16384, 4096, 16384)
    layers: Size = Size()
    widths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    tokens: tuple[int, ...] = (2048, 8192, 32768)
    kinds: tuple[Kind, ...] = ("bf16", "bf16 unit", "fp8 unit", "fp8 flax", "fp8 qwix")
    rounds: int = 5
    phase: float = 1.0
    profile: bool = True
    out: Path = FIGURES / "speed.json"


Build = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


def _measure(
    config: SpeedConfig, title: str, builds: Mapping[str, tuple[Build, Any]]
) -> tuple[dict[str, Measured], dict[str, Program]]:
    programs = {}
    for name, (build, options) in builds.items():
        print(f"{title}: compiling {name}", file=sys.stderr)
        programs[name] = compiled(*build(), options)
    print(f"{title}: measuring", file=sys.stderr)
    found = side_by_side(programs, rounds=config.rounds, phase=config.phase)
    return found, programs


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _linear(config: SpeedConfig) -> dict[str, Any]:
    builds: dict[str, tuple[Build, Any]] = {
        NAMES[kind]: (ft.partial(models.linear, *config.linear, kind), None)
        for kind in config.kinds
        if kind != "fp8 qwix"  # it transforms modules alone
    }
    builds[f"{NAMES['fp8 unit']}, all operands `fused`"] = (
        lambda: models.linear(*config.linear, "fp8 unit", fused=True),
        None,
    )
    if _on_gpu():
        default = (lambda: models.linear(*config.linear, "bf16"), DEFAULT)
        builds["bfloat16, Flax, with Triton's kernels"] = default
    return _rows(_measure(config, "linear", builds)[0])


def _layers(config: SpeedConfig) -> dict[str, Any]:
    builds: dict[str, tuple[Build, Any]] = {
        NAMES[kind]: (ft.partial(models.forward_backward, config.layers, kind), None)
        for kind in config.kinds
    }
    if _on_gpu():
        default = (lambda: models.forward_backward(config.layers, "bf16"), DEFAULT)
        builds["bfloat16, Flax, with Triton's kernels"] = default
    found, programs = _measure(config, "layers", builds)
    result: dict[str, Any] = {"times": _rows(found)}
    if config.profile:
        measured = {k: kernels(programs[NAMES[k]]) for k in ("bf16", "fp8 unit")}
        result["kernels"] = measured
        result["roofline"] = _roofline(config, grouped(measured["fp8 unit"]))
    return result


def _roofline(config: SpeedConfig, groups: Mapping[str, float]) -> dict[str, Any]:
    """What the step's kernels take, and could: milliseconds.

    The floor of the products is their operations at the rate of one large product of
    operands that are in place; that of the casts is one read of 16 bits and two writes
    of 8 for every operand, at the rate of a copy.
    """
    size = config.layers
    tokens = size.batch * size.length
    side = 8192
    b = jax.random.normal(jax.random.key(0), (side, side)).astype(jnp.bfloat16)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        numbers = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.bfloat16)

    a8 = jus.fp8.cast(b.T * 0.5, jus.E4M3)
    b8 = jus.fp8.cast(b, jus.E4M3)
    programs = {
        "product": compiled(product, (a8, b8), None),
        "copy": compiled(_increment, (jnp.tile(b, (4, 1)),), None),
    }
    # As the groups: from a short profile, at the clock before the GPU's power limit.
    rates = {name: sum(kernels(p).values()) for name, p in programs.items()}
    operations = 2 * side**3 / rates["product"]
    bytes_per_ms = 2 * 2 * 4 * side**2 / rates["copy"]
    weights = size.depth * (4 * size.width**2 + 3 * size.width * size.hidden)
    # Of a layer: the norms' and attention's outputs, and the MLP's; the cotangents of
    # the seven products' outputs.
    inputs = tokens * (3 * size.width + size.hidden)
    cotangents = tokens * (5 * size.width + 2 * size.hidden)
    cast = weights + size.depth * (inputs + cotangents)
    return {
        "measured": dict(groups),
        "floor": {
            "products": 6 * tokens * weights / operations,
            "casts": cast * (2 + 1 + 1) / bytes_per_ms,
        },
        "product_tflops": operations / 1e9,
        "copy_tb_per_s": bytes_per_ms / 1e9,
    }


def _increment(x: jax.Array) -> jax.Array:
    return x + 1


def _sweep(config: SpeedConfig) -> list[dict[str, Any]]:
    found = []
    for width in config.widths:
        for tokens in config.tokens:
            length = min(2048, tokens)
            size = Size(
                width, width * 7 // 2, min(128, width // 2), 1, tokens // length, length
            )
            builds: dict[str, tuple[Build, Any]] = {
                NAMES[kind]: (ft.partial(models.forward_backward, size, kind), None)
                for kind in ("bf16", "bf16 unit", "fp8 unit")
            }
            times, _ = _measure(
                dataclasses.replace(config, phase=config.phase / 3),
                f"width {width}, {tokens} tokens",
                builds,
            )
            found.append({"width": width, "tokens": tokens, "times": _rows(times)})
    return found


def _rows(found: Mapping[str, Measured]) -> dict[str, Any]:
    return {name: dataclasses.asdict(m) for name, m in found.items()}


def _baseline(times: Mapping[str, Any]) -> float:
    """The faster of the plain bfloat16 programs."""
    return min(m["ms"] for name, m in times.items() if name.startswith(NAMES["bf16"]))


def table(times: Mapping[str, Any]) -> str:
    """A table in Markdown, against the faster plain bfloat16."""
    base = _baseline(times)
    lines = [
        "| | ms (quartiles) | against bfloat16 | FP8 products | temporary GiB | "
        "compile s |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in times.items():
        lines.append(
            f"| {name} | {m['ms']:.2f} ({m['spread']:.2f}) | {base / m['ms']:.2f} | "
            f"{m['fp8']} of {m['products']} | {m['temporary_gib']:.2f} | "
            f"{m['compile_s']:.1f} |"
        )
    return "\n".join(lines)


def _draw(sweep: list[dict[str, Any]], device: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for tokens in sorted({point["tokens"] for point in sweep}):
        points = [p for p in sweep if p["tokens"] == tokens]
        axes.plot(
            [p["width"] for p in points],
            [
                _baseline(p["times"]) / p["times"][NAMES["fp8 unit"]]["ms"]
                for p in points
            ],
            marker="o",
            label=f"{tokens} tokens",
        )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([p["width"] for p in sweep], [str(p["width"]) for p in sweep])
    axes.set_xlabel("width of the layer")
    axes.set_ylabel("time of bfloat16 / time of FP8")
    axes.set_title(f"One Llama-shaped layer, forward and backward ({device})")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(config: SpeedConfig) -> dict[str, Any]:
    """Measures, saves after each part, prints the tables, and draws the sweep."""
    device = jax.devices()[0].device_kind
    result: dict[str, Any] = {
        "device": device,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "config": dataclasses.asdict(config) | {"out": str(config.out)},
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    parts = {"linear": _linear, "layers": _layers, "sweep": _sweep}
    for name, part in parts.items():
        result[name] = part(config)
        config.out.write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    console.print(
        Markdown(f"## Linear layer {config.linear}\n{table(result['linear'])}")
    )
    console.print(Markdown(f"## Layers\n{table(result['layers']['times'])}"))
    for point in result["sweep"]:
        title = f"## Width {point['width']}, {point['tokens']} tokens"
        console.print(Markdown(f"{title}\n{table(point['times'])}"))
    _draw(result["sweep"], device, config.out.with_suffix(".png"))
    return result
