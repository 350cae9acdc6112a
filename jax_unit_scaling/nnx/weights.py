"""A layer computed with other weights than it keeps."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Path = tuple[Any, ...]


def with_weights(
    layer: Any, select: Any, change: Callable[[Path, jax.Array], jax.Array]
) -> Any:
    """The layer with its selected weights changed, and all other state shared."""
    graph, weights, *rest = nnx.split(layer, select, ...)
    changed = [
        (path, variable.replace(change(path, variable[...])))
        for path, variable in nnx.to_flat_state(weights)
    ]
    return nnx.merge(graph, nnx.from_flat_state(changed), *rest)
