"""Constraints: several factors of one operation made into one.

An operation's gradient is the true one, up to a constant, where its forward factor and
the backward factors of its activations agree. A constraint is a function of these
factors, in this order: the output's, then one for each activation. It returns the one
factor that all of them take. `None` stands for no constraint: right at a cut-edge only.

Reference: Unit Scaling (Blake et al., 2023), section 5.1, "constraint-scaled graph".
"""

import math
from collections.abc import Callable

Constraint = Callable[..., float]


def gmean(*factors: float) -> float:
    """Geometric mean, the 2023 paper's choice: halves every error on a log scale."""
    return math.exp(math.fsum(map(math.log, factors)) / len(factors))


def hmean(*factors: float) -> float:
    """Harmonic mean: leans towards the smaller factors."""
    return len(factors) / math.fsum(1 / f for f in factors)


def amean(*factors: float) -> float:
    """Arithmetic mean: leans towards the larger factors."""
    return math.fsum(factors) / len(factors)


def to_output_scale(output: float, *grad_inputs: float) -> float:
    """The output's factor, u-muP's choice: the forward pass has exactly unit scale."""
    return output


def to_grad_input_scale(output: float, grad_input: float) -> float:
    """The factor of the only activation: the backward pass has unit scale."""
    return grad_input


def to_left_grad_scale(output: float, left: float, right: float) -> float:
    """The factor of the first of two activations."""
    return left


def to_right_grad_scale(output: float, left: float, right: float) -> float:
    """The factor of the second of two activations."""
    return right


def apply_constraint(
    constraint: Constraint | None, output: float, *grad_inputs: float
) -> tuple[float, ...]:
    """The factors, output's first, after `constraint` has made them agree.

    Raises:
        TypeError: if `constraint` is not a function, or not one of this many factors.
        ValueError: if it returns something else than one finite, positive number.
    """
    factors = (output, *grad_inputs)
    if constraint is None:
        return factors
    if not callable(constraint):
        raise TypeError(
            f"`constraint` must be a function such as `jax_unit_scaling.gmean`, or "
            f"None for unconstrained, got {constraint!r}."
        )
    name = getattr(constraint, "__name__", repr(constraint))
    try:
        one = constraint(*factors)
    except TypeError as e:
        raise TypeError(
            f"`constraint={name}` does not fit an operation with {len(grad_inputs)} "
            f"activation(s): it is called with {len(factors)} factors ({e})."
        ) from e
    if not (isinstance(one, float) and math.isfinite(one) and one > 0):
        raise ValueError(
            f"`constraint={name}` must return one finite, positive float, got {one!r}."
        )
    return (one,) * len(factors)
