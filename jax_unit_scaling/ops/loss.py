"""Losses: the value is the usual one, the gradient that of the sum at unit scale.

Dividing a gradient by the number of examples is what makes float16 and FP8 underflow,
so a mean divides the value alone. Gradients of devices or accumulation steps are
therefore summed, not averaged.

Where a device sees a piece of the batch (`shard_map`, `pmap`, a `vmap` over examples),
`batch_axis_name` names the axes that split it. The value is then that of the whole
batch, with the examples that `where` selects counted over all of it, on every device;
the gradient is unchanged: each piece gets its own. Give it to all losses that are added
up, a router's included: inside `shard_map` JAX counts a loss of the whole that is added
to one of a piece once for each device.
"""

import functools as ft
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, Num

from ..arguments import checked
from ..op import (
    AxisName,
    axis_size,
    check_bound,
    feature_pieces,
    varying,
    varying_along,
)
from ..scale import check_factor, scale_bwd, scale_fwd
from .embedding import own_of_split

Reduction = Literal["mean", "sum"]


@checked
def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    mult: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    batch_axis_name: AxisName | None = None,
    class_axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Unit-scaled cross-entropy of softmax(mult logits) and `labels`, in nats.

    Negative labels count from the last class; one that is no class makes the loss NaN,
    unless `where` excludes it. `label_smoothing` is the share of each label that is
    spread over all; `z_loss` the coefficient of log(sum(exp(mult logits)))^2, which is
    added.

    Computed in float32 at least. The cotangent of `logits` is that of the sum, for n
    classes times n / sqrt((1 - label_smoothing)^2 (n - 1) + (2 z_loss log n)^2),
    without `mult` and without 1 / count, and zero outside `where`; the mean is taken
    inside it.

    Inside `shard_map`, `class_axis_name` names the axes over which the classes are
    split, as by a `LinearReadout(..., out_axis_name=...)`: `logits` are then a piece,
    and `labels` and n those of all classes, as in Megatron.

    Reference: Unit Scaling (Blake et al., 2023), table A.2; u-muP, alpha_loss-softmax;
    for z_loss PaLM (Chowdhery et al., 2022), section 5.
    """
    n = _classes(logits, class_axis_name)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be an array of class ids, got {labels.dtype}.")
    _same_shape("labels", labels, logits.shape[:-1])
    if not (isinstance(label_smoothing, int | float) and 0 <= label_smoothing < 1):
        raise ValueError(
            f"`label_smoothing` must be a number in [0, 1), got {label_smoothing}."
        )
    if not (isinstance(z_loss, int | float) and 0 <= z_loss < math.inf):
        raise ValueError(f"`z_loss` must be a finite number >= 0, got {z_loss}.")
    # Of z independent, uniform labels and flat probabilities 1/n, the cotangent of the
    # first part is (1 - label_smoothing) (1/n - onehot), with the mean square
    # (1 - label_smoothing)^2 (n - 1) / n^2; that of the second is 2 z_loss log(n) / n
    # for all classes alike, and so orthogonal to the first.
    rms = math.hypot((1 - label_smoothing) * math.sqrt(n - 1), 2 * z_loss * math.log(n))
    wide = _scaled_logits(logits, mult)
    shifted, log_sum, log_z = _shifted(wide, class_axis_name)
    losses = log_sum - _of_labels(shifted, labels, class_axis_name)
    if label_smoothing:
        mean = _over(class_axis_name, shifted.sum(-1)) / n - log_sum
        losses = (1 - label_smoothing) * losses - label_smoothing * mean
    if z_loss:
        losses = losses + z_loss * log_z**2
    return _reduced(losses, n / rms, where, reduction, batch_axis_name)


def _shifted(logits: Array, names: AxisName | None) -> tuple[Array, Array, Array]:
    """Logits less the largest, and the log of the sum of exponentials, of these and of
    all that they are."""
    top = lax.stop_gradient(logits.max(-1))
    if names is not None:
        top = lax.pmax(top, names)
    shifted = logits - top[..., None]
    log_sum = jnp.log(_over(names, jnp.exp(shifted).sum(-1)))
    return shifted, log_sum, log_sum + top


def _of_labels(x: Array, labels: Array, names: AxisName | None) -> Array:
    """The element of each label, along the last axis; NaN for one that is no class."""
    size = x.shape[-1]
    if names is None:
        own = jnp.where(labels < 0, labels + size, labels)
        known = (own >= 0) & (own < size)
    else:
        own, inside, known = own_of_split(labels, size, names)
        own = jnp.where(inside, own, -1)
    # A sum over classes, not a gather: the cotangent is then one pass over the logits,
    # where a gather's is a scatter into zeros that are written and read before.
    chosen = own[..., None] == jnp.arange(size)
    return jnp.where(known, _over(names, jnp.where(chosen, x, 0).sum(-1)), jnp.nan)


def _over(names: AxisName | None, x: Array) -> Array:
    return x if names is None else lax.psum(x, names)


@checked
def kl_divergence(
    logits: Float[Array, "*batch classes"],
    targets: Float[Array, "*batch classes"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    mult: float = 1.0,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Unit-scaled divergence of softmax(mult logits) from the distribution `targets`.

    The value is that of `optax.losses.kl_divergence`, whose log-probabilities may be
    given as `logits` just as well. Computed in float32 at least.

    The cotangent of `logits`, n classes, is n / sqrt(n - 1) (softmax(mult logits) -
    targets), as for `cross_entropy`: the two may be mixed, as in distillation. Its
    scale is one where each of `targets` has one class to itself, as is nearly so for
    those of a trained teacher, and smaller where they are flat. `targets` get no
    gradient.
    """
    n = _classes(logits)
    _same_shape("targets", targets, logits.shape)
    logp = jax.nn.log_softmax(_scaled_logits(logits, mult))
    q = lax.stop_gradient(targets).astype(logp.dtype)
    losses = jnp.where(q == 0, 0, q * (jnp.log(q) - logp)).sum(-1)
    return _reduced(losses, n / math.sqrt(n - 1), where, reduction, batch_axis_name)


@checked
def binary_cross_entropy(
    logits: Float[Array, "*shape"],
    labels: Num[Array, "*shape"] | Bool[Array, "*shape"],
    *,
    where: Bool[Array, "*shape"] | None = None,
    reduction: Reduction = "mean",
    mult: float = 1.0,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Unit-scaled cross-entropy of sigmoid(mult logits) and `labels` from 0 to 1.

    The value is that of `optax.losses.sigmoid_binary_cross_entropy`, in float32 at
    least. The cotangent of `logits` is 2 (sigmoid(mult logits) - labels), without
    `mult`. `labels` get no gradient.
    """
    _same_shape("labels", labels, logits.shape)
    # With the probability 1/2 of both classes each cotangent is 1/2 or -1/2.
    wide = _scaled_logits(logits, mult)
    y = lax.stop_gradient(labels).astype(wide.dtype)
    losses = -y * jax.nn.log_sigmoid(wide) - (1 - y) * jax.nn.log_sigmoid(-wide)
    return _reduced(losses, 2.0, where, reduction, batch_axis_name)


@checked
def mse_loss(
    predictions: Float[Array, "*shape"],
    targets: Float[Array, "*shape"],
    *,
    where: Bool[Array, "*shape"] | None = None,
    reduction: Reduction = "mean",
    batch_axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Unit-scaled squared error, in float32 at least.

    The cotangent of `predictions` is 8^-1/2 times that of the sum, 2 (predictions -
    targets), which for unit-scaled independent arguments has the variance 8.
    """
    error = _error(predictions, targets)
    return _reduced(error * error, 8**-0.5, where, reduction, batch_axis_name)


@checked
def huber_loss(
    predictions: Float[Array, "*shape"],
    targets: Float[Array, "*shape"],
    *,
    delta: float = 1.0,
    where: Bool[Array, "*shape"] | None = None,
    reduction: Reduction = "mean",
    batch_axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Unit-scaled Huber loss, in float32 at least; the value is optax's.

    Half the squared error, and beyond `delta` its tangent. The cotangent of
    `predictions` is that of the sum, the error e = predictions - targets clipped to
    +-delta, divided by its rms for unit-normal independent arguments.
    """
    check_factor("delta", delta)
    # The error has the variance 2. So with a = delta / sqrt(2) the mean square is
    # 2 E[min(Z, a)^2] over |Z|: twice the variance inside, P(|Z| < a) - 2 a density(a),
    # and the rest of the probability times a^2.
    mean_square = (
        2 * math.erf(delta / 2)
        - 2 * delta / math.sqrt(math.pi) * math.exp(-(delta**2) / 4)
        + delta**2 * math.erfc(delta / 2)
    )
    error = jnp.abs(_error(predictions, targets))
    inside = jnp.minimum(error, delta)
    losses = inside * (error - inside / 2)
    return _reduced(losses, mean_square**-0.5, where, reduction, batch_axis_name)


def _classes(logits: Array, names: AxisName | None = None) -> int:
    classes = logits.shape[-1] if logits.ndim else 0
    classes *= feature_pieces("class_axis_name", names)
    if classes < 2:
        raise ValueError(
            f"`logits` must have two or more classes on its last axis, got {classes}."
        )
    return classes


def _scaled_logits(logits: Array, mult: float) -> Array:
    """`mult * logits` in float32 at least; their cotangent without `mult`."""
    check_factor("mult", mult)
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return scale_fwd(wide, mult)


def _error(predictions: Array, targets: Array) -> Array:
    """`predictions - targets` in float32 at least."""
    _same_shape("targets", targets, predictions.shape)
    wide = jnp.promote_types(jnp.result_type(predictions, targets), jnp.float32)
    return predictions.astype(wide) - targets.astype(wide)


def _same_shape(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"`{name}` must have the shape {shape}, got {x.shape}.")


def _reduced(
    losses: Array,
    factor: float,
    where: Array | None,
    reduction: Reduction,
    names: AxisName | None,
) -> Array:
    """The mean or sum; the cotangent of each of `losses` is `factor`.

    It stands here and not at the logits, where it would be the last to multiply what
    the product before reads: there XLA makes a pass of its own of it.
    """
    losses = scale_bwd(losses, factor)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'`reduction` must be "mean" or "sum", got {reduction!r}.')
    check_bound("batch_axis_name", names)
    if where is not None:
        _same_shape("where", where, losses.shape)
    total = sum_over(jnp.sum(losses, where=where), names)
    if reduction == "sum":
        return total
    if where is None:
        return scale_fwd(total, 1 / max(losses.size * axis_size(names), 1))
    count = jnp.sum(where, dtype=total.dtype)
    if names is not None:
        count = lax.psum(count, names)
    return _divided_forward(total, jnp.maximum(count, 1))


def sum_over(x: Array, names: AxisName | None) -> Array:
    """A loss's sum over the named axes, of which each piece is sent back its gradient.

    Not `psum`'s own cotangent: outside of `shard_map` that is the sum of the copies of
    the loss that all devices hold, and would grow with their number.
    """
    return x if names is None else _sum_over(x, names)


@ft.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_over(x: Array, names: AxisName) -> Array:
    return lax.psum(x, names)


def _sum_over_bwd(names: AxisName, x: Array, g: Array) -> tuple[Array]:
    return (varying_along(g, varying(x)),)


_sum_over.defvjp(lambda x, names: (_sum_over(x, names), x), _sum_over_bwd)


@jax.custom_vjp
def _divided_forward(x: Array, count: Array) -> Array:
    """`x / count`, with the gradient of `x`: a forward factor known at run time."""
    return x / count


_divided_forward.defvjp(
    lambda x, count: (x / count, None), lambda _, g: (g, jnp.zeros_like(g))
)
