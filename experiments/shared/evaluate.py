"""Evaluation of a language model over a text."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .data import Ids, eval_batches


def mean_bits(
    nats: Callable[..., Any],
    split: Ids,
    *,
    batch: int,
    length: int,
    limit: int | None,
    overlap: int = 0,
) -> np.ndarray[Any, Any]:
    """Bits per character in the mean over a text, at most `limit` characters of it.

    `nats` is (inputs, targets) -> the loss of each character, [*models, batch, length].
    The result is [*models], a scalar for one model.
    """
    total, count = np.float64(0.0), 0
    for b in eval_batches(
        split, batch=batch, length=length, limit=limit, overlap=overlap
    ):
        losses = np.asarray(nats(b.inputs, b.targets), np.float64)
        total = total + losses[..., b.mask].sum(-1)
        count += int(b.mask.sum())
    return np.asarray(total / count / math.log(2))
