"""Losses: the value is the usual one, the gradient that of the sum at unit scale.

Dividing a gradient by the number of examples is what makes float16 and FP8 underflow,
so a mean divides the value alone. Gradients of devices or accumulation steps are
therefore summed, not averaged.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from ..scale import check_factor, scale_bwd, scale_fwd

Reduction = Literal["mean", "sum"]


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    mult: float = 1.0,
) -> Float[Array, ""]:
    """Unit-scaled cross-entropy of softmax(mult logits) and `labels`, in nats.

    Computed in float32 at least. The cotangent of `logits`, n classes, is
    n / sqrt(n - 1) (softmax(mult logits) - onehot), without `mult` and without
    1 / count, and zero outside `where`; the mean is taken inside it.

    Reference: Unit Scaling (Blake et al., 2023), table A.2; u-muP, alpha_loss-softmax.
    """
    classes = logits.shape[-1] if logits.ndim else 0
    if classes < 2:
        raise ValueError(
            f"`logits` must have two or more classes on its last axis, got {classes}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be an array of class ids, got {labels.dtype}.")
    _same_shape("labels", labels, logits.shape[:-1])
    check_factor("mult", mult)
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # Of z independent, uniform labels and flat probabilities 1/n, the cotangent's mean
    # square is (n - 1) / n^2.
    wide = scale_bwd(wide, classes / math.sqrt(classes - 1))
    logp = jax.nn.log_softmax(scale_fwd(wide, mult))
    losses = -jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
    return _reduced(losses, where, reduction)


def mse_loss(
    predictions: Float[Array, "*shape"],
    targets: Float[Array, "*shape"],
    *,
    where: Bool[Array, "*shape"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Array, ""]:
    """Unit-scaled squared error, in float32 at least.

    The cotangent of `predictions` is 8^-1/2 times that of the sum, 2 (predictions -
    targets), which for unit-scaled independent arguments has the variance 8.
    """
    _same_shape("targets", targets, predictions.shape)
    wide = jnp.promote_types(jnp.result_type(predictions, targets), jnp.float32)
    error = scale_bwd(predictions.astype(wide), 8**-0.5) - scale_bwd(
        targets.astype(wide), 8**-0.5
    )
    return _reduced(error * error, where, reduction)


def _same_shape(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"`{name}` must have the shape {shape}, got {x.shape}.")


def _reduced(losses: Array, where: Array | None, reduction: Reduction) -> Array:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'`reduction` must be "mean" or "sum", got {reduction!r}.')
    if where is not None:
        _same_shape("where", where, losses.shape)
    total = jnp.sum(losses, where=where)
    if reduction == "sum":
        return total
    if where is None:
        return scale_fwd(total, 1 / max(losses.size, 1))
    return _divided_forward(total, jnp.maximum(jnp.sum(where, dtype=total.dtype), 1))


@jax.custom_vjp
def _divided_forward(x: Array, count: Array) -> Array:
    """`x / count`, with the gradient of `x`: a forward factor known at run time."""
    return x / count


_divided_forward.defvjp(
    lambda x, count: (x / count, None), lambda _, g: (g, jnp.zeros_like(g))
)
