"""Windows that slide over an axis, and how often they meet data."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

Pads = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of `taps`, `dilation` apart, that advances by `stride` along an axis.

    The axis has `size` numbers, `input_dilation` apart, with `pads` zeros before and
    after them.
    """

    size: int
    taps: int
    stride: int = 1
    pads: tuple[int, int] = (0, 0)
    dilation: int = 1
    input_dilation: int = 1

    @property
    def outputs(self) -> int:
        room = self._last + sum(self.pads) - self.dilation * (self.taps - 1)
        return max(room // self.stride + 1, 0) if self.size else 0

    @property
    def hits(self) -> np.ndarray:
        """How many taps meet data, neither padding nor a gap, for each output."""
        start = self.stride * np.arange(self.outputs)[:, None] - self.pads[0]
        # The taps that lie between the first number and the last, by their residue: a
        # tap meets data or a gap as all those do that are `input_dilation` away.
        first = np.maximum(-(start // self.dilation), 0)
        last = np.minimum((self._last - start) // self.dilation, self.taps - 1)
        residue = np.arange(self.input_dilation)
        inside = (last - residue) // self.input_dilation
        inside -= (first - 1 - residue) // self.input_dilation
        on_data = (start + self.dilation * residue) % self.input_dilation == 0
        return np.where(on_data, np.maximum(inside, 0), 0).sum(-1)

    @property
    def _last(self) -> int:
        return self.input_dilation * (self.size - 1)


def count_hits(windows: Sequence[Window]) -> int:
    """The pairs of an output and a tap that meet data, over all axes together."""
    return math.prod(int(w.hits.sum()) for w in windows)


def per_axis(name: str, value: int | Sequence[int] | None, rank: int) -> list[int]:
    """A positive integer for each of `rank` axes; None stands for 1.

    Raises:
        ValueError: if `value` is anything else.
    """
    one = 1 if value is None else value
    values = [one] * rank if isinstance(one, int) else one
    if len(values) != rank or not all(v == int(v) > 0 for v in values):
        raise ValueError(
            f"`{name}` must be a positive integer or {rank} of them, one for each "
            f"spatial axis, got {value}."
        )
    return [int(v) for v in values]


def lax_padding(padding: Any) -> str | None:
    """lax's name of a way to pad, which it takes in either case."""
    name = padding.upper() if isinstance(padding, str) else None
    return name if name in _LAX_PADDINGS else None


_LAX_PADDINGS = ("SAME", "SAME_LOWER", "VALID")


def pads_of(
    padding: str | int | Sequence[int | Sequence[int]],
    sizes: Sequence[int],
    spans: Sequence[int],
    strides: Sequence[int],
    also: Sequence[str] = (),
) -> Pads:
    """The zeros before and after each axis, under windows that span `spans` numbers.

    Raises:
        ValueError: if `padding` is not one of lax's names, an integer, or a sequence
            with an integer or a pair (low, high) for each axis; the message names those
            that the caller takes `also`.
    """
    if name := lax_padding(padding):
        pads = lax.padtype_to_pads(sizes, spans, strides, name)
        return [(int(low), int(high)) for low, high in pads]
    each = [padding] * len(sizes) if isinstance(padding, int | str) else padding
    pairs: list[Any] = [(p, p) if isinstance(p, int) else tuple(p) for p in each]
    if len(pairs) != len(sizes) or any(
        len(p) != 2 or not all(isinstance(n, int) for n in p) for p in pairs
    ):
        names = ", ".join(f'"{name}"' for name in (*_LAX_PADDINGS, *also))
        raise ValueError(
            f"`padding` must be {names}, an integer, or an integer or a pair (low, "
            f"high) for each of {len(sizes)} spatial axes, got {padding!r}."
        )
    return pairs
