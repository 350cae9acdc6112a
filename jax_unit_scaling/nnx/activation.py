"""Activations with a parameter, drop-in for their `flax.nnx` namesakes."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from ..arguments import checked
from ..constraints import Constraint, to_output_scale
from ..op import AxisName
from ..ops.activation import prelu
from ..parameters import role_metadata


class PReLU(nnx.PReLU):
    """`flax.nnx.PReLU`, computed by `prelu`.

    Its factors are those of the initial slope. constraint, batch_axis_name: as in
    `Linear`.
    """

    @checked
    def __init__(
        self,
        negative_slope_init: float = 0.01,
        *,
        negative_slope_metadata: Mapping[str, Any] | None = None,
        constraint: Constraint | None = to_output_scale,
        batch_axis_name: AxisName | None = None,
        **namesake: Any,
    ):
        checked(super().__init__)(
            negative_slope_init,
            negative_slope_metadata=role_metadata("norm")
            | dict(negative_slope_metadata or {}),
            **namesake,
        )
        self.initial_slope = float(negative_slope_init)
        self.constraint = constraint
        self.batch_axis_name = batch_axis_name

    def __call__(self, inputs: jax.Array) -> jax.Array:
        slope = self.negative_slope[...]
        if self.dtype is None:  # as Flax: the parameter follows the input
            slope = slope.astype(inputs.dtype)
        else:
            inputs, slope = self.promote_dtype((inputs, slope), dtype=self.dtype)
        return prelu(
            inputs,
            slope,
            initial_slope=self.initial_slope,
            constraint=self.constraint,
            batch_axis_name=self.batch_axis_name,
        )
