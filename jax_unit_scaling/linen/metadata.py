"""What a Linen parameter is to u-muP, in a box that travels with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn, struct
from flax.core import meta

from ..arguments import positive_integer
from ..parameters import FIELDS, Role, role_metadata


class Parameter(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A parameter's value with its `ParameterInfo`, which `optim` reads.

    A metadata box as Flax's own `nn.Partitioned`: a pytree whose only leaf is the
    parameter, with all else in its structure. So roles survive `jit`, `grad`, `vmap`,
    optimisers and checkpoints, and `nn.scan` over layers; `nn.unbox` takes them off.

    Attributes:
        value: the array, or another box around it: the one of
            `nn.with_partitioning(init, ...)` keeps its names in here.
        role, fan_in, fan_out, depth: as in `ParameterInfo`; None where not given.
    """

    value: Any
    role: Role | None = struct.field(pytree_node=False, default=None)
    fan_in: int | None = struct.field(pytree_node=False, default=None)
    fan_out: int | None = struct.field(pytree_node=False, default=None)
    depth: int | None = struct.field(pytree_node=False, default=None)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Parameter":
        return dataclasses.replace(self, value=val)

    # Roles and fans are of one layer, so a new axis changes nothing but the inner box.
    def add_axis(self, index: int, params: dict[Any, Any]) -> "Parameter":
        return self.replace_boxed(meta.add_axis(self.value, index, params))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Parameter":
        return self.replace_boxed(meta.remove_axis(self.value, index, params))

    # How `flax.nnx.bridge.ToNNX` makes an `nnx.Param` of a box, and the box again.
    def to_nnx_metadata(self) -> dict[str, Any]:
        """What an `nnx.Param` has to hold: value, roles, and what the inner box has."""
        about = {k: v for k in FIELDS if (v := getattr(self, k)) is not None}
        if not isinstance(self.value, meta.AxisMetadata):
            return {"value": self.value, **about}
        inner: Any = self.value
        return {**inner.to_nnx_metadata(), "inner_meta_type": type(inner), **about}

    @classmethod
    def from_nnx_metadata(cls, metadata: dict[str, Any]) -> "Parameter":
        """The inverse of `to_nnx_metadata`."""
        value, inner = metadata["value"], metadata.get("inner_meta_type")
        if inner is not None:
            value = inner.from_nnx_metadata(dict(metadata))
        return cls(value, **{name: metadata.get(name) for name in FIELDS})

    def get_partition_spec(self) -> Any:
        """The spec of the box inside; of a bare array, that it is replicated."""
        return meta.get_partition_spec(self.value)

    def get_sharding(self, mesh: jax.sharding.Mesh) -> Any:
        return meta.get_sharding(self.value, mesh)


def with_metadata(init: Callable[..., Any], **about: Any) -> Callable[..., Parameter]:
    """An initialiser whose parameter has these fields of `ParameterInfo`.

    For parameters of your own modules, `self.param("gain", with_metadata(init,
    role="norm"), shape)`, and on top of what a module of ours writes:
    `Dense(8, kernel_init=with_metadata(init, role="output"))`. It goes around
    `nn.with_partitioning`, not inside.

    Raises:
        ValueError: if `about` has other fields.
    """
    if unknown := {*about} - {*FIELDS}:
        raise ValueError(
            f"`about` may have {', '.join(FIELDS)}, got {', '.join(sorted(unknown))}."
        )

    def boxed(*args: Any, **kwargs: Any) -> Parameter:
        value = init(*args, **kwargs)
        if not isinstance(value, Parameter):
            return Parameter(value, **about)
        given = {k: v for k in FIELDS if (v := getattr(value, k)) is not None}
        return Parameter(value.value, **about | given)

    return boxed


def with_role(
    init: Callable[..., Any],
    role: Role,
    fan_in: int | None = None,
    fan_out: int | None = None,
) -> Callable[..., Parameter]:
    """`with_metadata` of a module's own parameter."""
    return with_metadata(init, **role_metadata(role, fan_in, fan_out))


def set_depth(params: Any, depth: int) -> Any:
    """Parameters with `depth` written on each, whatever it was.

    Args:
        params: all those inside a residual branch.
        depth: the residual adds of the whole stack: two for each Transformer block.

    u-muP's rules then give each of them depth^-1/2 of the learning rate, so that the
    sum of all branches' updates has the same scale at every depth.

    Reference: u-muP (Blake et al., 2024), table 2.
    """
    depth = positive_integer("depth", depth)

    def written(x: Any) -> Any:
        if isinstance(x, Parameter):
            return dataclasses.replace(x, depth=depth)
        return Parameter(x, depth=depth)

    return jax.tree.map(written, params, is_leaf=meta.is_axis_metadata)


def at_depth(fn: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """`fn(module, ...)`, whose parameters are made with this depth: see `set_depth`."""
    return nn.map_variables(
        fn, "params", trans_out_fn=lambda p: set_depth(p, depth), mutable=True
    )


def mapped(fn: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`fn(module, ...)`, which sees its parameters through `change`, an identity in the
    forward pass."""
    return nn.map_variables(fn, "params", trans_in_fn=change, mutable=True)
