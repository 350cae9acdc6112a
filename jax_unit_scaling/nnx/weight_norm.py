"""Layers whose weights are normalised, drop-in for their `flax.nnx` namesakes.

Flax's keep a norm of one, which leaves a weight the scale fan_in^-1/2 or less. These
keep the scale of one that unit-scaled layers start from: wrap unit-scaled ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..arguments import checked
from ..layers.normalization import normalised_weight, tuple_of_axes
from ..ops.normalization import spectral_norm
from ..parameters import role_metadata
from .weights import Path, with_weights


class WeightNorm(nnx.WeightNorm):
    """`flax.nnx.WeightNorm` to unit rms: scale * v / rms(v) for each feature.

    Takes the arguments of its namesake. `scales` are parameters, as in Flax from
    0.12.12; the layer keeps its weights as they are, and computes with normalised ones.

    Factors: those of `rms_norm`: 1 forward and for v, (weights of a feature)^-1/2 for
    its scale.
    """

    @checked
    def __init__(self, layer_instance: nnx.Module, *, rngs: nnx.Rngs, **namesake: Any):
        try:
            checked(super().__init__)(layer_instance, rngs=rngs, **namesake)
        except IndexError:
            raise ValueError(
                "`feature_axes` must name axes of each weight of `layer_instance`, got "
                f"{namesake.get('feature_axes')}: choose others, or the weights that "
                "have them by `variable_filter`."
            ) from None
        if self.scales is not None:
            self.scales = nnx.data(
                {
                    path: nnx.Param(
                        jnp.asarray(scale[...], self.param_dtype),
                        **role_metadata("norm"),
                    )
                    for path, scale in self.scales.items()
                }
            )

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        twin = with_weights(self.layer_instance, self.variable_filter, self._normalised)
        return twin(x, *args, **kwargs)

    def _normalised(self, path: Path, kernel: jax.Array) -> jax.Array:
        features = tuple_of_axes(kernel.ndim, self.feature_axes)
        scale = None if self.scales is None else self.scales[path][...]
        y = normalised_weight(kernel, scale, features, self.epsilon)
        return y if self.dtype is None else y.astype(self.dtype)


class SpectralNorm(nnx.SpectralNorm):
    """`flax.nnx.SpectralNorm` to the spectral norm of a unit-normal matrix.

    Takes the arguments of its namesake. That norm is sqrt(m) + sqrt(n) for [m, n], all
    axes but the last taken together: a unit-scaled layer's own factor then makes the
    map's norm 1 + sqrt(n / m), a constant as Flax's 1 is, and starts at unit scale. The
    layer keeps its weights as they are, and computes with normalised ones.

    As in Flax one step of the power iteration starts far from the largest singular
    value: the output shrinks by up to sqrt(2) over the first some ten calls.
    """

    __init__ = checked(nnx.SpectralNorm.__init__)

    def __call__(self, x: jax.Array, update_stats: bool | None = None) -> Any:
        update = not self.use_running_average if update_stats is None else update_stats

        def normalised(path: Path, kernel: jax.Array) -> jax.Array:
            if kernel.ndim < 2 or self.n_steps < 1:
                return kernel
            u, sigma = (self.batch_stats[(*path, name)] for name in ("u", "sigma"))
            y, new_u, new_sigma = spectral_norm(
                kernel, u[...], n_steps=self.n_steps, epsilon=self.epsilon
            )
            if update:
                u[...] = new_u.astype(u.dtype)
                sigma[...] = new_sigma.astype(sigma.dtype)
            return y if self.dtype is None else y.astype(self.dtype)

        return with_weights(self.layer_instance, nnx.Param, normalised)(x)
