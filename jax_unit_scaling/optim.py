"""u-muP's learning rates for optax."""

import math
from typing import Any

import jax
import optax
from flax import nnx


def learning_rate_factors(params: Any) -> Any:
    """The factor on each parameter's learning rate, for Adam-like optimisers.

    fan_in^-1/2 for a weight, 1 for all others, as Adam's updates have unit scale: a
    weight's update then changes its product's output by the same amount at every
    width, and the readout, already divided by its fan-in, takes the full rate.

    Args:
        params: a state of `nnx.Param`s, as from `nnx.split(model)`, with the metadata
            that this library's modules write.

    Raises:
        ValueError: if a parameter has no role.

    Reference: u-muP (Blake et al., 2024), table 2.
    """

    def factor(path: Any, parameter: nnx.Variable[Any]) -> float:
        about = parameter.get_metadata()
        if "role" not in about:
            raise ValueError(
                f"`params` has no role for {jax.tree_util.keystr(path)}: use the "
                "modules of `jax_unit_scaling.nnx`, or write one with "
                '`kernel_metadata={"role": "bias"}`.'
            )
        if about["role"] != "weight":
            return 1.0
        return 1 / math.sqrt(about["fan_in"])

    return jax.tree_util.tree_map_with_path(
        factor, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def scale_by_umup(params: Any) -> optax.GradientTransformation:
    """Multiplies each update by its parameter's learning-rate factor.

    Goes behind an Adam-like transformation:
    `optax.chain(optax.scale_by_adam(), scale_by_umup(params),
    optax.scale_by_learning_rate(1.0))`.
    """
    factors = jax.tree.leaves(learning_rate_factors(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        leaves, structure = jax.tree.flatten(updates)
        scaled = [u * f for u, f in zip(leaves, factors, strict=True)]
        return jax.tree.unflatten(structure, scaled), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
