"""The measurements: `python -m experiments.fp8_speed`."""

import dataclasses
import functools as ft
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import jax_unit_scaling as jus

from ..shared.record import as_json, environment
from . import model as models
from .measure import Program, compiled, kernels, side_by_side
from .model import NAMES, Kind, Size
from .report import RECORD, draw, report
from .train import TrainConfig, train

Part = Literal["linear", "layers", "sweep", "train"]
# Triton's kernels too: XLA's own default, which the baseline may be faster with.
DEFAULT = {"xla_gpu_enable_triton_gemm": True}


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """What is measured; by default what the figures show."""

    parts: tuple[Part, ...] = ("linear", "layers", "sweep", "train")
    """Of a record with more, the others stay as they are."""
    linear: tuple[int, int, int] = (16384, 4096, 16384)
    layers: Size = Size()
    widths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    tokens: tuple[int, ...] = (2048, 8192, 32768)
    kinds: tuple[Kind, ...] = ("bf16", "bf16 unit", "fp8 unit", "fp8 flax", "fp8 qwix")
    rounds: int = 5
    phase: float = 1.0
    profile: bool = True
    """Where there is a GPU: times by kernel, and the roofline."""
    train: TrainConfig = TrainConfig()
    out: Path = RECORD
    smoke: bool = False
    """Runs through everything once, at a size that says nothing."""

    @property
    def smaller(self) -> "SpeedConfig":
        """A minute of a CPU."""
        tiny = Size(width=32, hidden=64, head_size=16, depth=1, batch=2, length=32)
        qwix = importlib.util.find_spec("qwix") is not None
        return dataclasses.replace(
            self,
            linear=(64, 32, 64),
            layers=tiny,
            widths=(32,),
            tokens=(32,),
            kinds=tuple(k for k in self.kinds if qwix or k != "fp8 qwix"),
            rounds=2,
            phase=0.01,
            train=dataclasses.replace(
                self.train,
                size=tiny,
                vocabulary=300,
                characters=2**14,
                steps=4,
                log2_rates=self.train.log2_rates[:2],
                plain_log2_rates=self.train.plain_log2_rates[:1],
                warmup=1,
                settled=1,
            ),
            out=Path("runs/fp8_speed/speed.json") if self.out == RECORD else self.out,
        )


# Saves a part's result so far.
Keep = Callable[[Any], None]
Build = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]


def _measure(
    config: SpeedConfig, title: str, builds: Mapping[str, tuple[Build, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Program]]:
    programs = {}
    for name, (build, options) in builds.items():
        print(f"{title}: compiling {name}", file=sys.stderr)
        programs[name] = compiled(*build(), options)
    print(f"{title}: measuring", file=sys.stderr)
    found = side_by_side(programs, rounds=config.rounds, phase=config.phase)
    return found, programs


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _linear(config: SpeedConfig, keep: Keep) -> dict[str, Any]:
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
    return {"times": _measure(config, "linear", builds)[0]}


def _layers(config: SpeedConfig, keep: Keep) -> dict[str, Any]:
    builds: dict[str, tuple[Build, Any]] = {
        NAMES[kind]: (ft.partial(models.forward_backward, config.layers, kind), None)
        for kind in config.kinds
    }
    if _on_gpu():
        default = (lambda: models.forward_backward(config.layers, "bf16"), DEFAULT)
        builds["bfloat16, Flax, with Triton's kernels"] = default
    found, programs = _measure(config, "layers", builds)
    result: dict[str, Any] = {"times": found}
    keep(result)
    if config.profile and _on_gpu():
        profiled: tuple[Kind, ...] = ("bf16", "bf16 unit", "fp8 unit")
        result["kernels"] = {
            NAMES[kind]: kernels(programs[NAMES[kind]])
            for kind in profiled
            if kind in config.kinds
        }
        result["roofline"] = _roofline(config)
    return result


def _roofline(config: SpeedConfig) -> dict[str, Any]:
    """What FP8 kernels of these layers could take at least: milliseconds.

    The floor of the products is their operations at the rate of one large product of
    operands that are in place; that of attention, half of whose seven products a causal
    mask hides, its operations at that rate in bfloat16; that of the casts is one read
    of 16 bits and two writes of 8 for every operand, at the rate of a copy.
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
        "fp8": compiled(product, (a8, b8), None),
        "bf16": compiled(product, (b, b), None),
        "copy": compiled(_increment, (jnp.tile(b, (4, 1)),), None),
    }
    # As the groups: from a short profile, at the clock before the GPU's power limit.
    rates = {name: sum(kernels(p).values()) for name, p in programs.items()}
    operations = {name: 2 * side**3 / rates[name] for name in ("fp8", "bf16")}
    bytes_per_ms = 2 * 2 * 4 * side**2 / rates["copy"]
    weights = size.depth * (4 * size.width**2 + 3 * size.width * size.hidden)
    # Of a layer: the norms' and attention's outputs, and the MLP's; the cotangents of
    # the seven products' outputs.
    inputs = tokens * (3 * size.width + size.hidden)
    cotangents = tokens * (5 * size.width + 2 * size.hidden)
    cast = weights + size.depth * (inputs + cotangents)
    attention = 7 * size.depth * tokens * size.length * size.width
    return {
        "floor": {
            "products": 6 * tokens * weights / operations["fp8"],
            "attention": attention / operations["bf16"],
            "casts": cast * (2 + 1 + 1) / bytes_per_ms,
        },
        "tflops": {name: rate / 1e9 for name, rate in operations.items()},
        "copy_tb_per_s": bytes_per_ms / 1e9,
    }


def _increment(x: jax.Array) -> jax.Array:
    return x + 1


def _sweep(config: SpeedConfig, keep: Keep) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
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
            found.append({"width": width, "tokens": tokens, "times": times})
            keep({"points": found})
    return {"points": found}


def _train(config: SpeedConfig, keep: Keep) -> dict[str, Any]:
    return train(config.train, keep, _earlier(config))


def _earlier(config: SpeedConfig) -> dict[str, Any]:
    """What the record has of this training already: it may have been stopped."""
    record = json.loads(config.out.read_text()) if config.out.exists() else {}
    part = record.get("train", {})
    same = part.get("config", {}).get("train") == as_json(
        dataclasses.asdict(config.train)
    )
    return dict(part["result"]) if same else {}


PARTS: dict[Part, Callable[[SpeedConfig, Keep], dict[str, Any]]] = {
    "linear": _linear,
    "layers": _layers,
    "sweep": _sweep,
    "train": _train,
}


def run(config: SpeedConfig) -> dict[str, Any]:
    """Measures, saves as it goes, prints the tables and draws the pictures.

    The record has an entry for each part: what it was run with, and its result. One
    that is in the file and not in `config.parts` stays.
    """
    config = config.smaller if config.smoke else config
    _check(config)
    out = config.out
    out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    about = {**environment(), "config": as_json(dataclasses.asdict(config))}
    for name in config.parts:

        def keep(result: Any, name: Part = name) -> None:
            record[name] = {**about, "result": result}
            out.write_text(json.dumps(record, indent=1) + "\n")

        keep(PARTS[name](config, keep))
    print(report(record))
    draw(record, out.parent)
    return record


def _check(config: SpeedConfig) -> None:
    if unknown := [name for name in config.parts if name not in PARTS]:
        raise ValueError(f"`parts` must be of {[*PARTS]}, got {unknown}.")
    layers = "layers" in config.parts and "fp8 qwix" in config.kinds
    if layers and importlib.util.find_spec("qwix") is None:
        raise ModuleNotFoundError(
            "`kinds` has 'fp8 qwix', whose package is not there: install qwix, or "
            "leave it out (`--kinds bf16 'bf16 unit' 'fp8 unit' 'fp8 flax'`)."
        )
