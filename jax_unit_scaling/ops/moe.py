"""Mixtures of experts: routing, dispatch without drops, and the router's losses."""

import functools as ft
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer

from ..arguments import checked
from ..op import AxisName, axis_size, check_bound
from ..scale import check_factor, scale_bwd, scale_fwd, scaled
from .loss import sum_over

X = Float[Array, "*batch features"]


class RouterLosses(NamedTuple):
    """What keeps a router healthy: add each, times a coefficient, to the loss.

    Their values are the usual means over tokens; their gradients are, as every loss's
    here, those of the sum at unit scale, so a coefficient is the ratio of the scales of
    the loss's and the model's gradient at the router's logits.

    Attributes:
        load_balance: experts sum_i f_i P_i, with f_i the share of the choices that
            fell on expert i and P_i its mean probability: 1 if balanced. Its gradient
            has unit scale where the loads deviate by 100% from one another (standard
            deviation), and is in proportion to how much they do.
        z_loss: the mean of logsumexp(mult logits)^2, which keeps the logits small.

    References: Switch Transformers (Fedus et al., 2021), equations 4 to 6; Mixtral's
    is theirs times the choices a token has; ST-MoE (Zoph et al., 2022), equation 5.
    """

    load_balance: Float[Array, ""]
    z_loss: Float[Array, ""]


@checked
def mixture_of_experts(
    router: Callable[[Array], Array],
    experts: Callable[[Array, Array], Array],
    x: X,
    *,
    num_experts: int,
    num_selected: int,
    mult: float = 1.0,
    batch_axis_name: AxisName | None = None,
) -> tuple[X, RouterLosses]:
    """Sends each token to its best experts and sums what they return, at unit scale.

    y = c sum_i w_i expert_i(x) over the `num_selected` largest of the logits that
    `router` gives; their w are the softmax of mult times these logits, as in Mixtral.
    (Of a single one that would be constant, and teach the router nothing; so there w is
    the probability among all experts, as in Switch.) c = E[sum_i w_i^2]^-1/2, for
    independent normal logits and outputs, makes y unit-scaled; a division by the
    weights' own norm would do so for every token, but change the function.

    The gradient is true: the factors between x and y agree on every path. On the two
    ways from x to y they are delayed, as `residual_split` delays tau, so that the
    cotangent has unit scale on each, whatever it adds up to where they meet: the
    experts' by k^1/2 for k = `num_selected`, since each sees w's share; the router's by
    the scale of its logits' cotangent, in proportion to features^1/2.

    Args:
        router: from [tokens, features] to logits [tokens, num_experts], unit-scaled. It
            begins at a branch, so is constrained as any activation: logits of scale 1
            at every width by in^-1/2, not a readout's 1 / in.
        experts: from rows [tokens num_selected, features], sorted by expert, and the
            number of rows of each, to as many rows; usually `ragged_dot`s. No token is
            dropped, however unbalanced the load.
        x: the tokens.
        num_experts: how many experts there are.
        num_selected: how many a token goes to.
        mult: multiplies the logits.
        batch_axis_name: axes over which the tokens are split; loads and losses are
            those of all of them.

    Returns:
        y, and the router's losses, which are zero for no tokens.

    Raises:
        ValueError: if an argument does not fit, or `x` is sharded over explicit axes.
    """
    if num_experts < 2:
        raise ValueError(f"`num_experts` must be 2 or more, got {num_experts}.")
    if not 1 <= num_selected <= num_experts:
        raise ValueError(
            f"`num_selected` must be from 1 to `num_experts` {num_experts}, got "
            f"{num_selected}."
        )
    check_factor("mult", mult)
    check_bound("batch_axis_name", batch_axis_name)
    if not x.shape:
        raise ValueError("`x` must be [*batch, features], got a scalar.")
    _check_sharding(x)
    tokens = x.reshape(-1, x.shape[-1])
    scales = _router_scales(num_experts, num_selected, float(mult))
    # The cotangent of a weight is a product over the features.
    delay = scales.logits * math.sqrt(x.shape[-1])

    logits = router(scale_bwd(tokens, delay))
    _check_shape("router", logits, (*tokens.shape[:1], num_experts))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    weights, chosen = _choose(mult * logits, num_selected)
    weights = scaled(weights, fwd=1 / scales.weights, bwd=1 / scales.weights / delay)

    outputs = _dispatch(
        experts, scale_bwd(tokens, num_selected**-0.5), chosen, num_experts
    )
    outputs = scale_bwd(outputs, num_selected**0.5)
    y = jnp.sum(outputs * weights[..., None], axis=1).astype(outputs.dtype)
    return y.reshape(x.shape), _losses(logits, chosen, mult, scales, batch_axis_name)


def _check_sharding(x: Array) -> None:
    """Refuses tokens that are split over explicit axes: JAX does not sort those."""
    spec = jax.typeof(x).sharding.spec
    if any(axes is not None for axes in spec[: x.ndim - 1]):
        raise ValueError(
            f"`x` must not be sharded along its tokens over a mesh's explicit axes, "
            f"got {spec}: tokens are sorted by expert, which JAX does over axes of "
            "`AxisType.Auto` and inside `shard_map` alone."
        )


def _choose(logits: Array, k: int) -> tuple[Array, Array]:
    """The weights and the numbers of each token's experts, [tokens, k]."""
    largest, chosen = lax.top_k(logits, k)
    if k == 1:
        return jnp.exp(largest - jax.nn.logsumexp(logits, -1, keepdims=True)), chosen
    return jax.nn.softmax(largest), chosen


def _dispatch(
    experts: Callable[[Array, Array], Array],
    tokens: Array,
    chosen: Integer[Array, "tokens k"],
    num_experts: int,
) -> Float[Array, "tokens k features"]:
    """Each token through its experts: sorted by expert, and back."""
    order = jnp.argsort(chosen.ravel())
    rows = tokens[order // chosen.shape[1]]
    outputs = experts(rows, _counts(chosen, num_experts))
    _check_shape("experts", outputs, rows.shape)
    restored = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)
    return restored.reshape(*chosen.shape, outputs.shape[-1])


def _counts(chosen: Array, num_experts: int) -> Integer[Array, " experts"]:
    return jnp.bincount(chosen.ravel(), length=num_experts)


def _losses(
    logits: Float[Array, "tokens experts"],
    chosen: Integer[Array, "tokens k"],
    mult: float,
    scales: "_RouterScales",
    batch_axis_name: AxisName | None,
) -> RouterLosses:
    tokens, num_experts = logits.shape
    loads = _counts(chosen, num_experts) / max(chosen.size, 1)
    if batch_axis_name is not None:
        loads = lax.pmean(loads, batch_axis_name)
    probabilities = jax.nn.softmax(mult * scale_bwd(logits, 1 / scales.load_balance))
    z = jax.nn.logsumexp(mult * scale_bwd(logits, 1 / scales.z_loss), axis=-1)
    sums = num_experts * jnp.sum(probabilities @ loads), jnp.sum(z * z)
    tokens = max(tokens, 1) * axis_size(batch_axis_name)
    return RouterLosses(
        *(scale_fwd(sum_over(total, batch_axis_name), 1 / tokens) for total in sums)
    )


class _RouterScales(NamedTuple):
    """Scales under independent unit-normal logits: a token's weights' norm; and those
    of the logits' cotangents from the weights, times 1 / `weights`, whose own are unit
    normal, and from each loss, for loads that deviate by 100%."""

    weights: float
    logits: float
    load_balance: float
    z_loss: float


@ft.lru_cache(maxsize=1024)
def _router_scales(num_experts: int, k: int, mult: float) -> _RouterScales:
    """Means over 2^20 logits; NumPy has frozen this generator's stream.

    A mean of squares varies by less than itself from token to token, so it is known to
    2^-10 experts^1/2, its root to half of that, and better as a token's own experts
    average: 0.3% at 64 experts.
    """
    random = np.random.RandomState(0)
    logits = mult * random.standard_normal((max(2**20 // num_experts, 1), num_experts))
    logits = -np.sort(-logits)
    z = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - z[:, None])
    among = p if k == 1 else p[:, :k] / p[:, :k].sum(-1, keepdims=True)

    def cotangent(p: np.ndarray, k: int) -> np.ndarray:
        """Sum of the variances of the cotangents p_j (g_j - sum_i p_i g_i) of logits:
        g unit-normal for the first k, zero beyond, which the softmax p may include."""
        first = np.sum(p[:, :k] ** 2, -1)
        return first - 2 * np.sum(p[:, :k] ** 3, -1) + first * np.sum(p**2, -1)

    weights = math.sqrt(np.mean(np.sum(among[:, :k] ** 2, -1)))

    def rms(sums: np.ndarray) -> float:
        return mult * math.sqrt(np.mean(sums) / num_experts)

    # Loads that deviate by 100% have a mean of their own, which softmax ignores.
    apart = math.sqrt(num_experts / (num_experts - 1))
    return _RouterScales(
        weights,
        rms(cotangent(among, k)) / weights,
        rms(cotangent(p, num_experts)) * apart,
        rms(4 * z**2 * np.sum(p**2, -1)),
    )


def _check_shape(name: str, value: Array, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(
            f"`{name}` must return an array of shape {shape}, got {value.shape}."
        )
