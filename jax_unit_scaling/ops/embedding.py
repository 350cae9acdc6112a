"""Table look-up."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ..op import AxisName, Factors, Integers, case, scaled_op


def _embedding_rule(table: Any, ids: Any, **_: Any) -> Factors:
    if len(table.shape) != 2 or not table.shape[0]:
        raise ValueError(
            "`table` must be [vocabulary, features], with one row or more, got shape "
            f"{table.shape}."
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`ids` must be an array of integers, got {ids.dtype}.")
    tokens = max(math.prod(ids.shape), 1)
    return Factors(1.0, {"table": math.sqrt(table.shape[0] / tokens)})


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
) -> Float[Array, "*batch features"]:
    """Unit-scaled look-up `table[ids]`; an id beyond the table gives NaN, as in Flax.

    Factors: 1 forward, (vocabulary / ids)^1/2 for `table`, each of whose rows gathers
    the cotangents of that share of the ids.

    Reference: u-muP (Blake et al., 2024), table 2, input weights.
    """
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
