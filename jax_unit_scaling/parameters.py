"""A parameter's role, fan-in and depth: what u-muP's learning rates depend on."""

import dataclasses
import fnmatch
import functools as ft
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax

from .arguments import positive_integer

Role = Literal["weight", "bias", "norm", "output"]
Overrides = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
    """What a parameter is to u-muP, whatever framework holds it.

    A parameter's own shape does not say it: it may be stacked for a scan, split over
    devices, or be a table. So a module writes it when it makes the parameter.

    Attributes:
        role: weight (hidden and input weights), bias, norm (a norm's gain) or output
            (all that belongs to the readout).
        fan_in: the length of a weight's contracted axes; an embedding's features.
        fan_out: the length of its other axes; None unless it is one matrix, as a linear
            layer's weight is, but not a table, a window's, or the gates of a recurrent
            cell, which may be several matrices in one array.
        depth: the residual adds of the stack it belongs to, 1 outside a stack.

    Raises:
        ValueError: if a value is none of these, or a weight has no `fan_in`.
    """

    role: Role
    fan_in: int | None = None
    fan_out: int | None = None
    depth: int = 1

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ValueError(
                f"`role` must be one of {get_args(Role)}, got {self.role!r}."
            )
        if self.role == "weight" and self.fan_in is None:
            raise ValueError("`fan_in` must be given for a weight, got None.")
        for name in ("fan_in", "fan_out", "depth"):
            value = getattr(self, name)
            if name == "depth" or value is not None:
                object.__setattr__(self, name, positive_integer(name, value))


FIELDS = tuple(field.name for field in dataclasses.fields(ParameterInfo))


def role_metadata(
    role: Role, fan_in: int | None = None, fan_out: int | None = None
) -> dict[str, Any]:
    """The metadata that a module writes on a parameter; a user's own goes on top."""
    about = dataclasses.asdict(ParameterInfo(role, fan_in, fan_out))
    return {k: v for k, v in about.items() if v is not None and k != "depth"}


def named_parameters(
    params: Any, overrides: Overrides | None = None
) -> dict[str, tuple[Any, ParameterInfo]]:
    """Each parameter of a tree, in its order, and its record, by path.

    A record is read from the attributes of the box that holds a parameter (of an
    `nnx.Param` its metadata) and then from `overrides`: a mapping from path pattern
    ("blocks/*/mlp/*/kernel") to fields of `ParameterInfo`, later patterns on top. Where
    optax has left a parameter to another optimiser (`optax.partition`, `optax.masked`)
    its box is empty: a pattern may name it, but it is not listed.

    Raises:
        ValueError: if a parameter has no role, or a pattern matches no path.
    """
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box)
    }
    abouts = {path: _fields(leaf) for path, leaf in found.items()}
    for pattern, fields in (overrides or {}).items():
        matched = fnmatch.filter(found, pattern)
        if not matched:
            raise ValueError(
                f"`overrides` has the pattern {pattern!r}, which matches none of the "
                f"paths {', '.join(found)}."
            )
        if unknown := {*fields} - {*FIELDS}:
            raise ValueError(
                f"`overrides` may set {', '.join(FIELDS)}, got {sorted(unknown)} for "
                f"{pattern!r}."
            )
        for path in matched:
            abouts[path].update(fields)
    return {
        path: (leaf, _info(path, abouts[path]))
        for path, leaf in found.items()
        if jax.tree.leaves(leaf)
    }


def _is_box(x: Any) -> bool:
    # optax writes an empty tuple, its `MaskedNode`, in a parameter's place. The others
    # are how an `nnx.Param` and a box of Linen are known without a role.
    return (isinstance(x, tuple) and not x) or any(
        hasattr(x, name) for name in ("role", "get_metadata", "unbox")
    )


def _fields(leaf: Any) -> dict[str, Any]:
    # The box that `flax.nnx.bridge.ToLinen` puts around a parameter has one mapping.
    about = getattr(leaf, "metadata", None)
    get = about.get if isinstance(about, Mapping) else ft.partial(getattr, leaf)
    found = {name: get(name, None) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def _info(path: str, about: dict[str, Any]) -> ParameterInfo:
    if "role" not in about:
        raise ValueError(
            f"`params` has no role for {path}: use this library's modules, write "
            'metadata of your own as `kernel_metadata={"role": "bias"}`, or name it in '
            f'`overrides={{"{path}": {{"role": "bias"}}}}`. Metadata is lost where '
            "parameters are taken out of their boxes (`nnx.to_pure_dict`)."
        )
    try:
        return ParameterInfo(**about)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
