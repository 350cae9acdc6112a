"""The paper's models: attention, convolution or recurrence, and feed-forward layers."""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jax_unit_scaling as jus

from ..model import Parametrisation, plain_attention
from .precision import PRECISIONS, Precision

Mixer = Literal["attention", "conv", "rnn"]
Norm = Literal["none", "pre", "post"]
Residual = Literal["default", "fixed", "mean"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of the paper's; the sizes are its own."""

    parametrisation: Parametrisation = "unit"
    mixer: Mixer = "attention"
    norm: Norm = "pre"
    residual: Residual = "mean"
    """`default` is x + f(x), for regular models only; `fixed` gives a branch half of
    the variance, `mean` all branches so far and the embedding the same."""
    precision: str = "float32"
    """One of `PRECISIONS`."""
    width: int = 128
    depth: int = 8
    """Layers, each of a mixer and a feed-forward network; the paper's recurrent models
    have 2."""
    head_size: int = 64
    kernel_size: int = 7
    groups: int = 8
    unroll: int = 1
    """Steps of a recurrence that are compiled as one."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"`precision` must be one of {list(PRECISIONS)}, got "
                f"{self.precision!r}."
            )
        if self.parametrisation == "unit" and self.residual == "default":
            raise ValueError(
                "`residual` must be 'fixed' or 'mean' for a unit-scaled model, got "
                "'default': x + f(x) has no unit scale."
            )
        for name in ("head_size", "groups"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"`width` must be a multiple of `{name}` {getattr(self, name)}, "
                    f"got {self.width}."
                )


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The layers of a parametrisation, by the same signatures."""

    embed: Callable[..., Any]
    linear: Callable[..., Any]
    readout: Callable[..., Any]
    norm: Callable[..., Any]
    attention: Callable[..., Any]
    conv: Callable[..., Any]
    cell: Callable[..., Any]
    rnn: Callable[..., Any]
    relu: Callable[[jax.Array], jax.Array]
    residual: Callable[..., jax.Array]
    """(branch, x, tau=) -> x and its branch, added up"""


def _unit(precision: Precision) -> _Layers:
    dtype: dict[str, Any] = {"dtype": jnp.dtype(precision.dtype)}
    product = dtype | {"formats": precision.formats, "constraint": jus.gmean}
    return _Layers(
        embed=ft.partial(jus.nnx.Embed, **dtype),
        linear=ft.partial(jus.nnx.Linear, **product),
        # The last layer is a cut-edge.
        readout=ft.partial(jus.nnx.Linear, **product | {"constraint": None}),
        norm=ft.partial(jus.nnx.LayerNorm, epsilon=_EPSILON, **dtype),
        attention=ft.partial(jus.nnx.MultiHeadAttention, **product),
        conv=ft.partial(jus.nnx.Conv, **product),
        cell=ft.partial(jus.nnx.RecurrentHighwayCell, **product),
        rnn=jus.nnx.RNN,
        relu=ft.partial(jus.relu, constraint=jus.gmean),
        residual=jus.residual_apply,
    )


def _regular(precision: Precision) -> _Layers:
    dtype: dict[str, Any] = {"dtype": jnp.dtype(precision.dtype)}
    glorot = nnx.initializers.glorot_uniform()
    normal = nnx.initializers.normal(1.0)
    fan_in = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
    product = ft.partial(rounded, jax.lax.dot_general, precision.formats)
    linear = ft.partial(nnx.Linear, dot_general=product, kernel_init=glorot, **dtype)
    return _Layers(
        embed=ft.partial(nnx.Embed, embedding_init=normal, **dtype),
        linear=linear,
        readout=linear,
        norm=ft.partial(nnx.LayerNorm, epsilon=_EPSILON, **dtype),
        attention=ft.partial(
            nnx.MultiHeadAttention,
            qkv_dot_general=product,
            out_dot_general=product,
            kernel_init=fan_in,
            out_kernel_init=glorot,
            **dtype,
        ),
        conv=ft.partial(nnx.Conv, kernel_init=glorot, **dtype),
        cell=ft.partial(
            _HighwayCell, ft.partial(linear, kernel_init=fan_in), jnp.float32
        ),
        rnn=nnx.RNN,
        relu=nnx.relu,
        residual=_plain_residual,
    )


_EPSILON = 1e-3  # of layer norms, in the authors' code


def _plain_residual(
    branch: Callable[[jax.Array], jax.Array], x: jax.Array, *, tau: float | None
) -> jax.Array:
    """The weights of `residual_apply`, without a delayed factor; or with None plain."""
    y = branch(x)
    if tau is None:
        return x + y
    return (x + tau * y) * (1 + tau**2) ** -0.5


class _HighwayCell(nnx.RNNCellBase):
    """h' = (1 - u) h + u tanh(t), u = sigmoid(u' - 1), [t, u'] = W [x, h] + b."""

    def __init__(
        self,
        linear: Callable[..., Any],
        param_dtype: Any,
        in_features: int,
        hidden_features: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.hidden_features = in_features, hidden_features
        self.param_dtype = param_dtype
        self.dense = linear(
            in_features + hidden_features, 2 * hidden_features, rngs=rngs
        )

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> Any:
        joined = jnp.concatenate([inputs, carry], axis=-1)
        t, u = jnp.split(self.dense(joined), 2, axis=-1)
        u = jax.nn.sigmoid(u - 1)
        h = (1 - u) * carry + u * jnp.tanh(t)
        return h, h

    @property
    def num_feature_axes(self) -> int:
        return 1


class Model(nnx.Module):
    """Embedding, norm, layers, norm and readout: ids [batch, length] to logits."""

    def __init__(self, config: ModelConfig, vocabulary: int, *, rngs: nnx.Rngs):
        precision = PRECISIONS[config.precision]
        make = _unit if config.parametrisation == "unit" else _regular
        layers = make(precision)
        width = config.width
        self.dtype = jnp.dtype(precision.dtype)
        self.config, self.relu, self.residual = config, layers.relu, layers.residual
        self.taus = _taus(config)
        self.embed = layers.embed(vocabulary, width, rngs=rngs)
        self.first_norm = layers.norm(width, rngs=rngs)
        self.mixers = nnx.List(
            _mixer(config, layers, rngs) for _ in range(config.depth)
        )
        self.ups = nnx.List(
            layers.linear(width, 4 * width, rngs=rngs) for _ in range(config.depth)
        )
        self.downs = nnx.List(
            layers.linear(4 * width, width, rngs=rngs) for _ in range(config.depth)
        )
        norms = 0 if config.norm == "none" else 2 * config.depth
        self.norms = nnx.List(layers.norm(width, rngs=rngs) for _ in range(norms))
        self.last_norm = layers.norm(width, rngs=rngs)
        self.readout = layers.readout(width, vocabulary, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.first_norm(self.embed(ids))
        for i in range(self.config.depth):
            x = self._branch(2 * i, ft.partial(self._mix, self.mixers[i]), x)
            feed_forward = ft.partial(self._feed_forward, self.ups[i], self.downs[i])
            x = self._branch(2 * i + 1, feed_forward, x)
        return self.readout(self.last_norm(x))

    def _branch(self, index: int, body: Callable[..., Any], x: jax.Array) -> jax.Array:
        residual = ft.partial(self.residual, tau=self.taus[index])
        if self.config.norm == "none":
            return residual(body, x)
        norm = self.norms[index]
        if self.config.norm == "post":
            return norm(residual(body, x))
        return residual(lambda x: body(norm(x)), x)

    def _mix(self, mixer: Any, x: jax.Array) -> jax.Array:
        match self.config.mixer:
            case "attention":
                return mixer(x, is_causal=True)
            case "conv":
                return self.relu(mixer(x))
            case "rnn":  # the carry in the dtype of all else
                carry = jnp.zeros((*x.shape[:-2], x.shape[-1]), self.dtype)
                return mixer(x, initial_carry=carry)

    def _feed_forward(self, up: Any, down: Any, x: jax.Array) -> jax.Array:
        return down(self.relu(up(x)))


def _taus(config: ModelConfig) -> Sequence[float | None]:
    """The ratio of each branch's weight to the skip's."""
    branches = 2 * config.depth
    if config.residual == "default":
        return branches * [None]
    rule = (
        jus.fixed_residual_rule(share=0.5)
        if config.residual == "fixed"
        else jus.running_mean_residual_rule()
    )
    return [rule(i, branches) for i in range(branches)]


def _mixer(config: ModelConfig, layers: _Layers, rngs: nnx.Rngs) -> Any:
    width, formats = config.width, PRECISIONS[config.precision].formats
    match config.mixer:
        case "attention":
            return layers.attention(
                width // config.head_size,
                width,
                decode=False,
                use_bias=False,
                attention_fn=ft.partial(plain_attention, formats=formats),
                rngs=rngs,
            )
        case "conv":
            regular = config.parametrisation == "regular"
            return layers.conv(
                width,
                width,
                kernel_size=config.kernel_size,
                padding="CAUSAL",
                feature_group_count=config.groups,
                conv_general_dilated=ft.partial(rounded, causal_product, formats)
                if regular
                else causal_product,
                rngs=rngs,
            )
        case "rnn":
            cell = layers.cell(width, width, rngs=rngs)
            # Its carry is given: it needs no random numbers.
            return layers.rnn(cell, unroll=config.unroll, rngs=False)


def causal_product(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    feature_group_count: int,
    preferred_element_type: Any = None,
    **_: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` of a causal layer, as one product of windows.

    Under `vmap` over models a convolution is one of many groups, which GPUs are slow
    at; this is a batch of matrices. Takes x [batch, length, in] and a kernel [window,
    in / groups, out], with a stride of 1.
    """
    if padding != "VALID":  # this library's layer leaves it to the product
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    window, out = kernel.shape[0], kernel.shape[-1]
    length, g = x.shape[1] - window + 1, feature_group_count
    windows = jnp.stack([x[:, i : i + length] for i in range(window)], axis=2)
    y = jnp.einsum(
        "blkgi,kigo->blgo",
        windows.reshape(*windows.shape[:3], g, -1),
        kernel.reshape(*kernel.shape[:2], g, -1),
        preferred_element_type=preferred_element_type,
    )
    return y.reshape(*y.shape[:2], out)


def make_loss(
    parametrisation: Parametrisation,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """loss(logits, targets, mask): the value is the same mean in nats for both."""
    if parametrisation == "unit":
        return lambda logits, targets, mask: jus.cross_entropy(
            logits, targets, where=mask
        )

    def regular(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        wide = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(wide, targets)
        return jnp.where(mask, losses, 0).sum() / mask.sum()

    return regular


def rounded(
    product: Callable[..., jax.Array],
    formats: jus.Formats | None,
    lhs: jax.Array,
    rhs: jax.Array,
    *args: Any,
    **more: Any,
) -> jax.Array:
    """A plain product, rounded as the unit-scaled one is, without its factors."""
    if formats is None or formats.fwd is None or formats.bwd is None:
        return product(lhs, rhs, *args, **more)
    lhs, rhs = (jus.quantize_fwd(x, formats.fwd) for x in (lhs, rhs))
    return jus.quantize_bwd(product(lhs, rhs, *args, **more), formats.bwd)
