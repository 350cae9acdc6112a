"""Table look-up."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from ..op import (
    AxisName,
    Factors,
    Integers,
    axis_size,
    case,
    feature_pieces,
    scaled_op,
)


def _embedding_rule(
    table: Any, ids: Any, vocabulary_axis_name: AxisName | None = None
) -> Factors:
    if len(table.shape) != 2 or not table.shape[0]:
        raise ValueError(
            "`table` must be [vocabulary, features], with one row or more, got shape "
            f"{table.shape}."
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`ids` must be an array of integers, got {ids.dtype}.")
    tokens = max(math.prod(ids.shape), 1)
    pieces = feature_pieces("vocabulary_axis_name", vocabulary_axis_name)
    return Factors(1.0, {"table": math.sqrt(table.shape[0] * pieces / tokens)})


@scaled_op(
    rule=_embedding_rule,
    parameters=("table",),
    cases=(
        case((256, 128), Integers((16, 256), 256)),
        case((500, 64), Integers((8000,), 500)),
    ),
)
def embedding(
    table: Float[Array, "vocabulary features"],
    ids: Integer[Array, "*batch"],
    *,
    batch_axis_name: AxisName | None = None,
    vocabulary_axis_name: AxisName | None = None,
) -> Float[Array, "*batch features"]:
    """Unit-scaled look-up `table[ids]`; an id beyond the table gives NaN, as in Flax.

    Factors: 1 forward, (vocabulary / ids)^1/2 for `table`, each of whose rows gathers
    the cotangents of that share of the ids.

    Inside `shard_map`, `vocabulary_axis_name` names the axes over which the rows of the
    table are split: `table` is then a piece, vocabulary the size of the whole, and each
    row comes from the device that has it (one `psum`), as in Megatron.

    Reference: u-muP (Blake et al., 2024), table 2, input weights.
    """
    if vocabulary_axis_name is None:
        return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
    own, inside, known = own_of_split(ids, table.shape[0], vocabulary_axis_name)
    rows = jnp.where(inside[..., None], table[own], 0)
    return jnp.where(known[..., None], lax.psum(rows, vocabulary_axis_name), jnp.nan)


def own_of_split(ids: Array, size: int, names: AxisName) -> tuple[Array, Array, Array]:
    """Where ids, of all that is split over `names`, are in this device's `size` of it;
    which are there; and which are anywhere. Negative ones count from the end."""
    whole = size * axis_size(names)
    ids = jnp.where(ids < 0, ids + whole, ids)
    own = ids - lax.axis_index(names) * size
    inside = (own >= 0) & (own < size)
    return jnp.where(inside, own, 0), inside, (ids >= 0) & (ids < whole)
