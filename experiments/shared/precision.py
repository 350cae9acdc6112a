"""What a model is computed in, and what its weights are kept in between steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jax_unit_scaling as jus


@dataclasses.dataclass(frozen=True)
class Precision:
    """One way to train in low precision."""

    dtype: str = "float32"
    """Of activations, their cotangents, and the operands of products."""
    weights: str = "float32"
    """Of the parameters between steps, and of Adam's first moment or the momentum; the
    update itself is computed in float32, and so is Adam's second moment."""
    stochastic: bool = False
    """Whether the update is rounded stochastically to `weights`. The paper's machine
    did so in hardware; here it is emulated by `quantize` with a key."""
    formats: jus.Formats | None = None
    """What the operands of products, and their cotangents, are rounded to."""


# float16 is the paper's: no float32 master weights. A further precision is a line more.
PRECISIONS: dict[str, Precision] = {
    "float32": Precision(),
    "bfloat16": Precision("bfloat16"),
    "float16": Precision("float16", "float16", stochastic=True),
    "float16, nearest": Precision("float16", "float16"),
    "float16, master": Precision("float16"),
    "fp8": Precision("float16", "float16", True, jus.SIMULATED_FP8),
    "fp8, master": Precision("float16", formats=jus.SIMULATED_FP8),
    "fp8 in float32": Precision(formats=jus.SIMULATED_FP8),
    "fp8 native": Precision("bfloat16", formats=jus.NATIVE_FP8),
}


def widen(tree: Any) -> Any:
    """All arrays in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def store(params: Any, precision: Precision, key: jax.Array) -> Any:
    """float32 parameters as they are kept; `key` is for stochastic rounding."""
    dtype = jnp.dtype(precision.weights)
    if not precision.stochastic:
        return jax.tree.map(lambda x: x.astype(dtype), params)
    format = {"float16": jus.FP16, "bfloat16": jus.BF16}[precision.weights]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    rounded = [
        jus.quantize(x, format, k).astype(dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, rounded)
