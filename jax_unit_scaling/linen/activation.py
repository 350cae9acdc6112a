"""Activations with a parameter, drop-in for their `flax.linen` namesakes."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

from ..constraints import Constraint, to_output_scale
from ..op import AxisName
from ..ops.activation import prelu
from .linear import Checked
from .metadata import with_role
from .names import named


class PReLU(nn.PReLU, Checked):
    """`flax.linen.PReLU`, computed by `prelu`.

    Its factors are those of the initial slope. constraint, batch_axis_name: as in
    `Dense`, as keywords.
    """

    constraint: Constraint | None = dataclasses.field(
        default=to_output_scale, kw_only=True
    )
    batch_axis_name: AxisName | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        init = nn.initializers.constant(self.negative_slope_init)
        slope: Any = self.param(
            "negative_slope", with_role(init, "norm"), (), self.param_dtype
        )
        return prelu(
            inputs,
            slope.astype(inputs.dtype),  # as Flax: the parameter follows the input
            initial_slope=float(self.negative_slope_init),
            constraint=self.constraint,
            batch_axis_name=named(self).batch_axis_name,
        )
