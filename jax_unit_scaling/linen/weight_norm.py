"""Layers whose weights are normalised, drop-in for their `flax.linen` namesakes.

Flax's keep a norm of one, which leaves a weight the scale fan_in^-1/2 or less. These
keep the scale of one that unit-scaled layers start from: wrap unit-scaled ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype

from ..layers.normalization import normalised_weight, tuple_of_axes
from ..ops.normalization import spectral_norm
from .linear import Checked
from .metadata import with_role


class WeightNorm(nn.WeightNorm, Checked):
    """`flax.linen.WeightNorm` to unit rms: scale * v / rms(v) for each feature.

    Takes the arguments of its namesake. The layer keeps its weights as they are, and
    computes with normalised ones.

    Factors: those of `rms_norm`: 1 forward and for v, (weights of a feature)^-1/2 for
    its scale.
    """

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _with_weights(self, self._normalised, False, args, kwargs)

    def _normalised(self, name: str, kernel: jax.Array) -> jax.Array:
        chosen = self.variable_filter
        if chosen and not any(part in name for part in chosen):
            return kernel
        axes = () if self.feature_axes is None else self.feature_axes
        features = tuple_of_axes(kernel.ndim, axes)
        scale: Any = None
        if self.use_scale:
            init = with_role(self.scale_init, "norm")
            shape = tuple(kernel.shape[a] for a in features)
            scale = self.param(f"{name}/scale", init, shape, self.param_dtype)
        dtype = canonicalize_dtype(kernel, scale, dtype=self.dtype)
        return normalised_weight(kernel, scale, features, self.epsilon).astype(dtype)


class SpectralNorm(nn.SpectralNorm, Checked):
    """`flax.linen.SpectralNorm` to the spectral norm of a unit-normal matrix.

    Takes the arguments of its namesake. That norm is sqrt(m) + sqrt(n) for [m, n], all
    axes but the last taken together: a unit-scaled layer's own factor then makes the
    map's norm 1 + sqrt(n / m), a constant as Flax's 1 is, and starts at unit scale. The
    layer keeps its weights as they are, and computes with normalised ones.

    As in Flax one step of the power iteration starts far from the largest singular
    value: the output shrinks by up to sqrt(2) over the first some ten calls.
    """

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        def normalised(name: str, kernel: jax.Array) -> jax.Array:
            if kernel.ndim < 2 or self.n_steps < 1:
                return kernel
            if kernel.ndim > 2 and self.error_on_non_matrix:
                raise ValueError(
                    "`error_on_non_matrix` refuses weights that are no matrix, got "
                    f"shape {kernel.shape} of {name}: set it to False to have all axes "
                    "but the last taken together."
                )
            u, sigma = self._statistics(name, kernel.shape[-1])
            y, new_u, new_sigma = spectral_norm(
                kernel, u.value, n_steps=self.n_steps, epsilon=self.epsilon
            )
            if update_stats:
                u.value, sigma.value = new_u, new_sigma
            return y.astype(canonicalize_dtype(kernel, new_u, dtype=self.dtype))

        return _with_weights(self, normalised, True, args, kwargs)

    def _statistics(self, name: str, features: int) -> tuple[Any, Any]:
        home, dtype = self.collection_name, self.param_dtype
        u = self.variable(
            home,
            f"{name}/u",
            lambda: jax.random.normal(self.make_rng("params"), (1, features), dtype),
        )
        return u, self.variable(home, f"{name}/sigma", jnp.ones, (), dtype)


def _with_weights(
    wrapper: Any,
    change: Callable[[str, jax.Array], jax.Array],
    mutable: bool,
    args: Any,
    kwargs: Any,
) -> Any:
    """The layer inside called with its parameters changed, each by its path."""

    def of_box(path: Any, box: Any) -> Any:
        keys = [key.key for key in path[1:]]  # behind that of the collection
        name = "/".join([wrapper.layer_instance.name, *keys])
        return meta.replace_boxed(box, change(name, meta.unbox(box)))

    return nn.map_variables(
        lambda layer: layer(*args, **kwargs),
        trans_in_fn=lambda params: jax.tree_util.tree_map_with_path(
            of_box, params, is_leaf=meta.is_axis_metadata
        ),
        init=wrapper.is_initializing(),
        mutable=mutable,
    )(wrapper.layer_instance)
