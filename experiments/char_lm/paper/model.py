"""The paper's models: attention, convolution or recurrence, and feed-forward layers."""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import jax_unit_scaling as jus

from ...shared.layers import (
    Layers,
    Parametrisation,
    plain_attention,
    regular_layers,
    rounded,
    unit_layers,
)
from ...shared.precision import PRECISIONS, Precision

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
class _Layers(Layers):
    """With the convolution and the recurrence."""

    conv: Callable[..., Any]
    cell: Callable[..., Any]
    rnn: Callable[..., Any]


def _unit(precision: Precision) -> _Layers:
    product: dict[str, Any] = {
        "dtype": jnp.dtype(precision.dtype),
        "formats": precision.formats,
        "constraint": jus.gmean,
    }
    layers = unit_layers(precision, epsilon=_EPSILON, constraint=jus.gmean)
    return _Layers(
        **vars(layers),
        conv=ft.partial(jus.nnx.Conv, **product),
        cell=ft.partial(jus.nnx.RecurrentHighwayCell, **product),
        rnn=jus.nnx.RNN,
    )


def _regular(precision: Precision) -> _Layers:
    glorot = nnx.initializers.glorot_uniform()
    fan_in = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
    layers = regular_layers(
        precision,
        epsilon=_EPSILON,
        embedding_init=nnx.initializers.normal(1.0),
        kernel_init=glorot,
        qkv_init=fan_in,
    )
    cell = ft.partial(
        _HighwayCell, ft.partial(layers.linear, kernel_init=fan_in), jnp.float32
    )
    dtype = jnp.dtype(precision.dtype)
    conv = ft.partial(nnx.Conv, kernel_init=glorot, dtype=dtype)
    return _Layers(**vars(layers), conv=conv, cell=cell, rnn=nnx.RNN)


_EPSILON = 1e-3  # of layer norms, in the authors' code


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
