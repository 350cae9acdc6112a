"""Which settings there are, and which learning rates they are tried at."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

from ...shared.precision import PRECISIONS
from .model import Mixer, ModelConfig, Norm, Residual
from .training import Optimiser, Setting

Preset = Literal["table", "figure"]
LOSS_SCALE = 2048.0  # the paper's, of regular float16
DEPTHS: dict[Mixer, tuple[int, ...]] = {
    "attention": (2, 8),
    "conv": (2, 8),
    "rnn": (2,),
}
TABLE: tuple[tuple[Mixer, Norm], ...] = (
    ("attention", "post"),
    ("attention", "pre"),
    ("conv", "pre"),
    ("rnn", "pre"),
)
NORMS: tuple[Norm, ...] = ("none", "pre", "post")
RESIDUALS: tuple[Residual, ...] = ("default", "fixed", "mean")
OPTIMISERS: tuple[Optimiser, ...] = ("adamw", "momentum")


def settings(
    preset: Preset, precisions: tuple[str, ...], mixers: tuple[Mixer, ...]
) -> list[Setting]:
    """All that a preset compares, model by model: float32 first, as others begin there.

    `table` is the paper's second, of four models; `figure` its figure 4, of all depths,
    norms, residual weights and optimisers. Each model is regular and unit-scaled, in
    every precision, and regular ones in float16 with a loss scale as well.
    """
    bases = [base for base in _bases(preset) if base.model.mixer in mixers]
    kinds = (sorted(_kinds(base, precisions), key=_is_narrow) for base in bases)
    return [*itertools.chain(*kinds)]


def _is_narrow(setting: Setting) -> bool:
    return not setting.is_reference


def _bases(preset: Preset) -> list[Setting]:
    """Each model as a regular one in float32."""
    if preset == "table":
        return [
            Setting(ModelConfig("regular", mixer, norm, depth=max(DEPTHS[mixer])))
            for mixer, norm in TABLE
        ]
    return [
        Setting(ModelConfig("regular", mixer, norm, residual, depth=depth), optimiser)
        for mixer, depths in DEPTHS.items()
        for depth, norm, residual, optimiser in itertools.product(
            depths, NORMS, RESIDUALS, OPTIMISERS
        )
    ]


def _kinds(base: Setting, precisions: tuple[str, ...]) -> Iterator[Setting]:
    """A model in both parametrisations and all precisions; float32 always."""
    for name in dict.fromkeys(("float32", *precisions)):
        model = dataclasses.replace(base.model, precision=name)
        regular = dataclasses.replace(base, model=model)
        yield regular
        if PRECISIONS[name].dtype == "float16":
            yield dataclasses.replace(regular, loss_scale=LOSS_SCALE)
        if model.residual != "default":
            unit = dataclasses.replace(model, parametrisation="unit")
            yield dataclasses.replace(base, model=unit)


@dataclasses.dataclass(frozen=True)
class Search:
    """Powers of two, upwards until it gets worse, as in the paper.

    Several are trained at once; and should the lowest be the best, lower ones too.
    """

    regular_log2_rate: int = -14
    """Where AdamW begins in float32. The paper's are -14 and -8."""
    unit_log2_rate: int = -8
    regular_momentum_log2_rate: int = -10
    """Where SGD with momentum begins. The paper's regular ones were best at -8 to -4,
    and its unit-scaled ones at -14 to -10; here their gradients are larger."""
    unit_momentum_log2_rate: int = -16
    count: int = 4
    """Rates at a time in float32."""
    near: int = 3
    """Rates at a time around float32's best one, in other precisions."""
    worse: float = 0.1
    """Bits above the best at which the search ends; the paper's."""
    limits: tuple[int, int] = (-24, 6)
    """No rate is outside, should a model learn nothing at any."""

    def first(self, setting: Setting, reference: int | None) -> tuple[int, ...]:
        """Where to begin, with float32's best rate if that is known."""
        if reference is not None:
            start = reference - self.near // 2
            return tuple(range(start, start + self.near))
        unit = setting.model.parametrisation == "unit"
        momentum = setting.optimiser == "momentum"
        start = {
            (False, False): self.regular_log2_rate,
            (True, False): self.unit_log2_rate,
            (False, True): self.regular_momentum_log2_rate,
            (True, True): self.unit_momentum_log2_rate,
        }[unit, momentum]
        return tuple(range(start, start + self.count))

    def next(self, found: Mapping[int, float], count: int) -> tuple[int, ...]:
        """The rates to try next, none at the end; `found` is inf where a run failed."""
        low, high, best = min(found), max(found), min(found.values())
        up = range(high + 1, high + 1 + count)
        down = range(low - count, low)
        if math.isfinite(best) and found[high] <= best + self.worse and self._has(up):
            return tuple(up)
        if (found[low] == best or not math.isfinite(best)) and self._has(down):
            return tuple(down)
        return ()

    def _has(self, rates: range) -> bool:
        return self.limits[0] <= rates[0] and rates[-1] <= self.limits[1]
