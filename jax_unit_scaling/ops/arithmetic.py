"""Sums of tensors."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..constraints import Constraint, to_output_scale
from ..op import Factors, case, scaled_op


def _add_rule(x: Any, y: Any, **_: Any) -> Factors:
    shapes = {
        name: value.shape
        for name, value in (("x", x), ("y", y))
        if hasattr(value, "shape")
    }
    try:
        out = math.prod(jnp.broadcast_shapes(*shapes.values()))
    except ValueError as e:
        raise ValueError(f"`x` and `y` must be broadcastable, got {shapes}.") from e
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    constant = len(sizes) < 2 or 1 in sizes.values()
    return Factors(
        1.0 if constant else 2**-0.5,
        {name: math.sqrt(size / out) if out else 1.0 for name, size in sizes.items()},
    )


@scaled_op(
    rule=_add_rule,
    cases=(case((256, 64), (256, 64)), case((64, 4096), (4096,))),
)
def add(
    x: Float[Array, "..."] | float,
    y: Float[Array, "..."] | float,
    *,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `x + y`, with NumPy's broadcasting.

    Factors: 2^-1/2 forward (1 where one of them is a single number, which shifts but
    does not scale), and broadcast^-1/2 for an input that is broadcast that many times.
    For a residual branch use `residual_apply`, which weighs the two.
    """
    return jnp.add(x, y)
