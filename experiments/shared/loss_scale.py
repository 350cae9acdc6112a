"""The factor on a loss that keeps float16 gradients from underflow: fixed or dynamic.

What unit scaling does without. Reference: Mixed Precision Training (Micikevicius et
al., 2018), section 3.2.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .precision import widen


@dataclasses.dataclass(frozen=True)
class LossScale:
    """A fixed factor, or one that follows what the gradients bear."""

    initial: float = 1.0
    grow_every: int | None = None
    """Doubles after so many steps without an overflow, and is halved by one, whose step
    is skipped. None for a fixed factor, with which no step is ever skipped."""
    limits: tuple[float, float] = (1.0, 2.0**24)

    def __post_init__(self) -> None:
        low, high = self.limits
        if not 0 < low <= self.initial <= high:
            raise ValueError(
                f"`initial` must be within `limits` {self.limits}, got {self.initial}."
            )
        if self.grow_every is not None and self.grow_every < 1:
            raise ValueError(
                f"`grow_every` must be 1 or more, or None, got {self.grow_every}."
            )

    def init(self) -> "ScaleState":
        return ScaleState(*map(jnp.asarray, (jnp.float32(self.initial), 0, 0)))

    def update(self, state: "ScaleState", finite: jax.Array) -> "ScaleState":
        """After a step whose gradients were all `finite`, or not."""
        if self.grow_every is None:
            return state
        good = jnp.where(finite, state.good + 1, 0)
        grows = good == self.grow_every
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        value = jnp.clip(state.value * factor, *self.limits)
        return ScaleState(value, jnp.where(grows, 0, good), state.skipped + ~finite)

    def keep(self, finite: jax.Array, new: Any, old: Any) -> Any:
        """`new`, or where a dynamic factor was too large, `old`."""
        if self.grow_every is None:
            return new
        return jax.tree.map(ft.partial(jnp.where, finite), new, old)


class ScaleState(NamedTuple):
    """The factor, the steps since it changed, and how many were skipped in all."""

    value: jax.Array
    good: jax.Array
    skipped: jax.Array


def scaled_grad(
    loss: Callable[[Any], jax.Array], params: Any, scale: Any
) -> tuple[jax.Array, Any]:
    """A loss, and its gradients in float32.

    They are those of `scale` times the loss, divided by `scale` once they are wide.
    """

    def scaled_loss(params: Any) -> Any:
        value = loss(params)
        return value * scale, value

    grads, value = jax.grad(scaled_loss, has_aux=True)(params)
    return value, jax.tree.map(lambda g: g / scale, widen(grads))


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of a tree is infinite or NaN."""
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
