"""The values of a model's products at initialisation, forward and backward."""

from typing import Any

import jax
from flax import nnx

import jax_unit_scaling as jus
from jax_unit_scaling.analysis import Histogram, pooled

from ..shared.layers import make_loss
from .model import ModelConfig, is_linear, make_model


def initial_histograms(
    config: ModelConfig, vocabulary: int, seed: int, inputs: Any, targets: Any
) -> dict[str, Histogram]:
    """Of weights, activations into linear layers, and the gradients of either."""
    graph, params = nnx.split(make_model(config, vocabulary, seed))
    mean = make_loss(config.parametrisation)

    def loss(params: Any) -> jax.Array:
        return mean(nnx.merge(graph, params)(inputs), targets)

    # Rounding to float32 changes nothing, and marks what a linear layer multiplies.
    fp32 = jus.Formats(jus.FP32, jus.FP32)
    marked = jus.simulate_format(loss, choose=lambda p: fp32 if is_linear(p) else None)
    _, _, scales = jax.jit(jus.track_value_and_grad(marked, where=_is_seen))(params)
    tensors = scales.values()
    weights = [t for t in tensors if t.site.source == "argument"]
    rounded = [t for t in tensors if t.site.source != "argument"]
    activations = [t for t in rounded if t.site.name.endswith("/_quantize_fwd")]
    outputs = [t for t in rounded if t.site.name.endswith("/_quantize_bwd")]
    return {
        "weights": pooled(t.forward for t in weights),
        "activations": pooled(t.forward for t in activations),
        "activation gradients": pooled(t.backward for t in outputs),
        "weight gradients": pooled(t.backward for t in weights),
    }


def _is_seen(site: Any) -> bool:
    """Parameters, and what is rounded but for them."""
    is_weight = site.name.startswith("args/") and site.source != "argument"
    return site.source == "argument" or ("/_quantize" in site.name and not is_weight)
