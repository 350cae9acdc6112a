"""A parameter's role, fan-in and depth: what u-muP's learning rates depend on."""

from typing import Any, Literal, get_args

Role = Literal["weight", "bias", "norm", "output"]


def role_metadata(role: Role, fan_in: int | None = None) -> dict[str, Any]:
    """The metadata that a module writes on a parameter; a user's own goes on top.

    `role` is weight (hidden and input weights), bias, norm (a norm's gain) or output
    (the readout's weight); `fan_in` the length of a weight's contracted axes, for an
    embedding its features.
    """
    if role not in get_args(Role):
        raise ValueError(f"`role` must be one of {get_args(Role)}, got {role!r}.")
    return {"role": role} if fan_in is None else {"role": role, "fan_in": fan_in}
