"""Dropout."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key as KeyArray

from ..arguments import check_key
from ..op import Factors, Key, case, scaled_op


def _dropout_rule(
    x: Any, key: Any, *, rate: float, broadcast_dims: tuple[int, ...]
) -> Factors:
    check_key("key", key)
    if not 0 <= rate < 1:
        raise ValueError(
            f"`rate` must be in [0, 1), got {rate}: it is what is dropped."
        )
    rank = len(x.shape)
    if not all(-rank <= i < rank for i in broadcast_dims):
        raise ValueError(
            f"`broadcast_dims` must name axes of `x`, got {broadcast_dims} for shape "
            f"{x.shape}."
        )
    kept = (1 - rate) ** 0.5
    return Factors(kept, {"x": kept})


@scaled_op(
    rule=_dropout_rule,
    cases=(case((256, 128), Key(), rate=0.1), case((2**14,), Key(), rate=0.5)),
)
def dropout(
    x: Float[Array, "..."],
    key: KeyArray[Array, ""],
    *,
    rate: float,
    broadcast_dims: tuple[int, ...] = (),
) -> Float[Array, "..."]:
    """Unit-scaled dropout: x / sqrt(1 - rate) where kept, zero elsewhere.

    Plain dropout divides by 1 - rate, to keep the mean; the factor (1 - rate)^1/2 in
    both passes keeps the scale instead. `broadcast_dims` share one draw.
    """
    shared = {i % x.ndim for i in broadcast_dims}
    shape = [1 if i in shared else n for i, n in enumerate(x.shape)]
    kept = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))
