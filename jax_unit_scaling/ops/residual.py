"""Residual branches: a weighted sum, with the branch unit-scaled in both passes."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arguments import checked
from ..op import varying, varying_along
from ..scale import check_factor, floating, forward_only, times

X = Float[Array, "*shape"]
Tau = float | Float[Array, ""]


def residual_split(x: X, *, tau: Tau = 1.0) -> tuple[X, X]:
    """Splits `x` into `(residual, skip)`, the inputs of a branch and of its skip.

    The branch's weight w = tau / sqrt(1 + tau^2) belongs to the forward pass at its end
    (`residual_add`) and to the backward pass here, at its start, where both cotangents
    are weighted. Delayed so, both passes are unit-scaled inside the branch. `tau` is
    the ratio of the branch's weight to the skip's: a positive number. Where a scan runs
    through stacked blocks it is a scalar array, which must be positive as well and has
    no gradient; stacked gradients then have a constant for each block.

    Raises:
        TypeError: if `tau` is neither, or is differentiated.
        ValueError: if it is a number that is not positive, or an array of a shape.

    Reference: Unit Scaling (Blake et al., 2023), section 5.3; u-muP, appendix G.
    """
    number, traced = _static_or_traced(tau)
    x, traced = _varying_alike(floating(x), traced)
    return _split(x, number, traced)


def residual_add(residual: X, skip: X, *, tau: Tau = 1.0) -> X:
    """Joins what `residual_split` split: (tau residual + skip) / sqrt(1 + tau^2).

    Raises:
        TypeError, ValueError: if the branch has changed the shape, and as
            `residual_split` of `tau`.
    """
    residual, skip = floating(residual, "residual"), floating(skip, "skip")
    if residual.shape != skip.shape:
        raise ValueError(
            f"`residual` and `skip` must have the same shape, got {residual.shape} and "
            f"{skip.shape}: a residual branch keeps its input's shape."
        )
    # Promoted here, so that each cotangent comes back in its own dtype.
    dtype = jnp.result_type(residual, skip)
    number, traced = _static_or_traced(tau)
    residual, skip = residual.astype(dtype), skip.astype(dtype)
    residual, skip, traced = _varying_alike(residual, skip, traced)
    return _join(residual, skip, number, traced)


@ft.partial(checked, but=("tau",))
def residual_apply(fn: Callable[[X], X], x: X, *, tau: Tau = 1.0) -> X:
    """The residual branch `(tau fn(x) + x) / sqrt(1 + tau^2)`, unit-scaled inside.

    `tau` is what it is in `residual_split`.
    """
    residual, skip = residual_split(x, tau=tau)
    return residual_add(fn(residual), skip, tau=tau)


def transformer_residual_rule(
    *, residual_mult: float = 1.0, residual_attn_ratio: float = 1.0
) -> Callable[[int, int], float]:
    """u-muP's residual weights for a stack of attention and MLP branches, in turn.

    All attention branches contribute the same variance to the output, and so do all
    MLP branches; `residual_mult` is the ratio of the branches' share to the
    embedding's, `residual_attn_ratio` that of attention to MLP.

    Returns:
        tau(index, layers): the weight of branch `index` (from 0, attention first) of
        `layers` residual adds, with a the attention's and m the MLP's multiplier:
        (a or m) / sqrt(layers / 2 + ceil(index / 2) a^2 + floor(index / 2) m^2).

    Reference: u-muP (Blake et al., 2024), appendix G.
    """
    check_factor("residual_mult", residual_mult)
    check_factor("residual_attn_ratio", residual_attn_ratio)
    mlp = residual_mult * math.sqrt(2 / (1 + residual_attn_ratio**2))
    attention = residual_attn_ratio * mlp

    def tau(index: int, layers: int) -> float:
        _check_index(index, layers)
        before = (index + 1) // 2 * attention**2 + index // 2 * mlp**2
        return (mlp if index % 2 else attention) / math.sqrt(layers / 2 + before)

    return tau


def fixed_residual_rule(*, share: float) -> Callable[[int, int], float]:
    """The same weights for every branch: sqrt(1 - share) x + sqrt(share) f(x).

    `share` is the branch's share of the sum's variance, between 0 and 1: the tau of
    both papers, whose ratio of weights is sqrt(share / (1 - share)). With a norm at the
    end of each branch in place of the start it is munit scaling's scheme.

    Reference: Unit Scaling (Blake et al., 2023), section 5.3, "fixed(tau)"; munit
    Scaling (Narayan et al., 2025), section 2.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"`share` must be between 0 and 1, got {share}: it is the branch's share "
            "of the variance."
        )
    ratio = math.sqrt(share / (1 - share))

    def tau(index: int, layers: int) -> float:
        _check_index(index, layers)
        return ratio

    return tau


def running_mean_residual_rule() -> Callable[[int, int], float]:
    """Equal shares for the input and all branches so far, whatever the depth.

    With l the number of terms that x already holds it is sqrt(l / (l + 1)) x +
    sqrt(1 / (l + 1)) f(x), a ratio of l^-1/2. The input is the first term, so l =
    index + 1 is at least 1: counted from 0, the first branch would replace its input.

    Reference: Unit Scaling (Blake et al., 2023), section 5.3, "running-mean".
    """

    def tau(index: int, layers: int) -> float:
        _check_index(index, layers)
        return (index + 1) ** -0.5

    return tau


def _check_index(index: int, layers: int) -> None:
    if not 0 <= index < layers:
        raise ValueError(
            f"`index` must be from 0 to `layers` - 1 = {layers - 1}, got {index}."
        )


def _static_or_traced(tau: Tau) -> tuple[float | None, Array | None]:
    """`tau` as one of both, checked; the other is None."""
    if isinstance(tau, float | int) or not hasattr(tau, "shape"):
        return check_factor("tau", tau), None
    if tau.shape:
        raise ValueError(f"`tau` must be a number or a scalar, got shape {tau.shape}.")
    x = tau if isinstance(tau, np.ndarray | np.generic) else jnp.asarray(tau)
    if not isinstance(x, jax.core.Tracer):
        return check_factor("tau", x.item()), None
    why = "`tau` has no gradient: use `jax.lax.stop_gradient(tau)`."
    return None, forward_only(floating(x, "tau"), why)


def _varying_alike(*arrays: Any) -> list[Any]:
    """The arrays, along the same axes of a `shard_map`; None stays."""
    axes = frozenset().union(*(varying(x) for x in arrays if x is not None))
    return [x if x is None else varying_along(x, axes) for x in arrays]


@ft.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split(x: X, tau: float | None, traced: Array | None) -> tuple[X, X]:
    return x, x


_split.defvjp(
    lambda x, tau, traced: (_split(x, tau, traced), traced),
    lambda tau, traced, g: (_weighted_sum(g[0], g[1], tau, traced), None),
)


@ft.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _join(residual: X, skip: X, tau: float | None, traced: Array | None) -> X:
    return _weighted_sum(residual, skip, tau, traced)


_join.defvjp(
    lambda residual, skip, *taus: (_join(residual, skip, *taus), None),
    lambda tau, _, g: (g, g, None),
)


def _weighted_sum(branch: X, skip: X, tau: float | None, traced: Array | None) -> X:
    """The sum a branch + b skip, a = tau b, b = (1 + tau^2)^-1/2, rearranged.

    It is computed as skip + a (branch - (1 - b) / a skip).

    In the plain form the skip enters through its product with b alone, which XLA takes
    for cheap enough to compute again wherever it is used, on a CPU: with all that the
    skip is a sum of, so that the last block adds up the whole stack once more, in each
    of its fusions. Here the sum has the skip itself for an operand, and as that also
    leads to it through the branch, XLA keeps it, as in a plain residual.

    The branch enters a sum, too, before it meets a number that depends on the block's
    place: on a GPU the number would become part of the product that ends the branch,
    and be compiled and tuned for each block anew.

    For tau up to 1/2, as in a deep stack, rounding is no worse; at 4 it is a third
    more.
    """
    weight: Any = tau
    if traced is not None:
        bits = jnp.finfo(skip.dtype).bits
        weight = traced.astype(skip.dtype if bits > 32 else jnp.float32)
    n = math.hypot(1.0, weight) if traced is None else jnp.hypot(1.0, weight)
    less = weight / (n + 1)  # (1 - 1 / n) / (tau / n), without cancellation
    return skip + _times(branch - _times(skip, less), weight / n)


def _times(x: X, weight: Any) -> X:
    """`weight * x`, rounded once."""
    if not isinstance(weight, jax.Array):
        return times(x, weight)
    return (x.astype(weight.dtype) * weight).astype(x.dtype)
