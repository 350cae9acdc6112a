"""The values of a model's products at initialisation, forward and backward."""

import functools as ft
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_unit_scaling.analysis import Histogram, histogram

from .model import ModelConfig, make_loss, make_model


def initial_histograms(
    config: ModelConfig, vocabulary: int, seed: int, inputs: Any, targets: Any
) -> dict[str, Histogram]:
    """Of weights, activations into linear layers, and the gradients of either."""
    model = make_model(config, vocabulary, seed)
    seen: defaultdict[str, list[np.ndarray]] = defaultdict(list)

    def keep(kind: str, x: jax.Array) -> None:
        jax.debug.callback(lambda value: seen[kind].append(np.asarray(value)), x)

    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Linear | nnx.LinearGeneral):
            plain = layer.dot_general or jax.lax.dot_general
            layer.dot_general = ft.partial(_observed, keep, plain)
    graph, params = nnx.split(model)
    loss = make_loss(config)
    grads = jax.grad(lambda p: loss(nnx.merge(graph, p)(inputs), targets))(params)
    jax.effects_barrier()
    seen |= {
        "weights": jax.tree.leaves(params),
        "weight gradients": jax.tree.leaves(grads),
    }
    kinds = ("weights", "activations", "activation gradients", "weight gradients")
    return {kind: histogram(seen[kind]) for kind in kinds}


def _observed(
    keep: Any, product: Any, lhs: jax.Array, rhs: jax.Array, *args: Any, **more: Any
) -> jax.Array:
    """A product that shows its left operand and its output's cotangent to `keep`."""

    @jax.custom_vjp
    def watch(y: jax.Array) -> jax.Array:
        return y

    def bwd(_: None, g: jax.Array) -> tuple[jax.Array]:
        keep("activation gradients", g)
        return (g,)

    watch.defvjp(lambda y: (y, None), bwd)
    keep("activations", lhs)
    return watch(product(lhs, rhs, *args, **more))
