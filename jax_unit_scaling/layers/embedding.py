"""What an embedding does with its table: look rows up and, if tied, make logits.

A tied table sums two gradients, of s table[ids] and of r query table^T, where s is the
`output_scale` and r the `logits_scale` / features. For the sum to be the true gradient
up to a constant f, that constant has to be the same for both, and r the query's factor
too, as a path leads around it. With unit-scaled cotangents of the logits, that of the
query, and of all up to the look-up, is then r vocabulary^1/2. The table's two gradients
add up to f r (positions (1 + s^2))^1/2, from which f:

    look-up   s forward, f s for the table
    attend    r forward and for the query, f r = (positions (1 + s^2))^-1/2 for the
              table.

Neither depends on the shapes of a call.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax import lax

from ..constraints import to_output_scale
from ..op import AxisName
from ..ops.contraction import linear_readout
from ..ops.embedding import embedding
from ..scale import scale_bwd, scale_fwd
from .linear import with_factor


class Options(Protocol):
    """What an embedding of either family holds beside its table."""

    @property
    def features(self) -> int: ...
    @property
    def tied(self) -> int | None: ...
    @property
    def batch_axis_name(self) -> AxisName | None: ...
    @property
    def vocabulary_axis_name(self) -> AxisName | None: ...
    @property
    def output_scale(self) -> float: ...
    @property
    def logits_scale(self) -> float: ...


def look_up(
    embed: Options, table: jax.Array, ids: jax.Array, *, out_sharding: Any = None
) -> jax.Array:
    """The rows of the table at `ids`."""
    rows: Callable[..., jax.Array] = embedding
    if embed.tied is None:
        rows = ft.partial(rows, batch_axis_name=embed.batch_axis_name)
    else:
        rows = embedding.fn
        ratio = embed.output_scale * embed.features / embed.logits_scale
        table = scale_bwd(table, ratio * _attend_factor(embed))
    if embed.vocabulary_axis_name is not None:
        rows = ft.partial(rows, vocabulary_axis_name=embed.vocabulary_axis_name)
    if out_sharding is not None:
        rows = jax.sharding.auto_axes(rows, out_sharding=out_sharding)
    return scale_fwd(rows(table, ids), embed.output_scale)


def attend(
    embed: Options, query: jax.Array, table: jax.Array, *, out_sharding: Any = None
) -> jax.Array:
    """The logits of a query with a tied table.

    Raises:
        ValueError: if the table is not tied.
    """
    if embed.tied is None:
        raise ValueError(
            "`attend` sums the gradients of look-up and logits in one table, whose "
            "factors differ: build `Embed(..., tied=positions)` with the positions of "
            "a batch, or use a readout of its own."
        )
    kernel = table.T
    own = linear_readout.factors(query, kernel).bwd["kernel"]
    return linear_readout(
        scale_bwd(query, embed.logits_scale),
        scale_bwd(kernel, _attend_factor(embed) / own),
        dot_general=with_factor(lax.dot_general, embed.logits_scale),
        constraint=to_output_scale,
        out_sharding=out_sharding,
    )


def _attend_factor(embed: Any) -> float:
    """That of a tied table in `attend`, whatever the look-up's is."""
    return (embed.tied * (1 + embed.output_scale**2)) ** -0.5
