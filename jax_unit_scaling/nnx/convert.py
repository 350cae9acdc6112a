"""From a Flax model to a unit-scaled one that computes the same function."""

import inspect
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..formats import Formats
from ..op import AxisName
from .linear import Einsum, Embed, Linear, LinearGeneral
from .normalization import LayerNorm, RMSNorm

M = TypeVar("M")

# Each Flax layer's counterpart, and the weight whose scale moves into `output_scale`
# (none for a norm, whose gain starts at one in both). A layer enters here if its
# counterpart has the same parameters, under the same names.
COUNTERPARTS: dict[type, tuple[type, str | None]] = {
    nnx.Linear: (Linear, "kernel"),
    nnx.LinearGeneral: (LinearGeneral, "kernel"),
    nnx.Einsum: (Einsum, "kernel"),
    nnx.Embed: (Embed, "embedding"),
    nnx.LayerNorm: (LayerNorm, None),
    nnx.RMSNorm: (RMSNorm, None),
}


def convert(
    module: M,
    *,
    formats: Formats | None = None,
    batch_axis_name: AxisName | None = None,
) -> M:
    """The unit-scaled model that computes the same function as a Flax model.

    Takes any `nnx.Module`, trained or fresh, and leaves it as it is. In the copy every
    layer of `COUNTERPARTS` gives way to its unit-scaled namesake, with

        kernel = kernel / s,   output_scale = s fan_in^1/2,   s = std(kernel)

    (1 where that is zero), so that kernels have unit scale and the output is the same.
    The cotangent of an input is the true one; that of a kernel has batch^-1/2, in place
    of the batch's size and s. So for a loss of this library, whose gradient starts at
    unit scale, all gradients are again near it as far as the activations are.

    All else stays, and computes what it did: functions that a `__call__` calls
    (`nnx.gelu`, a residual sum), attention between its projections, dropout, and
    parameters that a user's own module holds. Their scales are the original's: to have
    these unit-scaled too, build the model from `jax_unit_scaling.nnx`.

    Args:
        module: the model, or a single layer.
        formats: the number formats of all products, simulated.
        batch_axis_name: as in `Linear`, of all layers.

    Raises:
        ValueError: if a layer of Flax has parameters and no counterpart, or one that
            cannot take its options; or if a weight is shared by two layers.
    """
    converted: dict[int, Any] = {}
    owners: dict[int, str] = {}
    more = {"formats": formats, "batch_axis_name": batch_axis_name}

    def of_node(path: Any, node: Any) -> Any:
        """A layer's counterpart or a variable's copy, the same for the same node."""
        if not _is_leaf(node):
            return node
        if id(node) not in converted:
            where = jax.tree_util.keystr(path) or "the root"
            if isinstance(node, nnx.Variable):
                _check_owner(owners, node, where)
                converted[id(node)] = node.copy()
            else:
                for variable in _parameters(node).values():
                    _check_owner(owners, variable, where)
                converted[id(node)] = _convert_layer(node, where, more)
        return converted[id(node)]

    return jax.tree_util.tree_map_with_path(of_node, module, is_leaf=_is_leaf)


def _is_leaf(node: Any) -> bool:
    return isinstance(node, nnx.Variable) or _is_layer_of_flax(node)


def _is_layer_of_flax(node: Any) -> bool:
    """Whether it has parameters of its own and is, or derives from, one of Flax's."""
    if not isinstance(node, nnx.Module) or not _parameters(node):
        return False
    homes = [base.__module__ for base in type(node).__mro__]
    return any(h.startswith("flax.nnx.nn.") for h in homes) and not any(
        h.startswith(__package__) for h in homes
    )


def _parameters(module: nnx.Module) -> dict[str, nnx.Param[Any]]:
    return {k: v for k, v in vars(module).items() if isinstance(v, nnx.Param)}


def _check_owner(owners: dict[int, str], variable: Any, where: str) -> None:
    owner = owners.setdefault(id(variable), where)
    if owner != where:
        raise ValueError(
            f"`module` shares one parameter between {owner} and {where}: its two "
            "gradients have different factors, so their sum would not be the gradient. "
            "Give each a parameter of its own."
        )


def _convert_layer(layer: Any, where: str, more: Mapping[str, Any]) -> Any:
    flax_type = type(layer)
    if flax_type not in COUNTERPARTS:
        raise ValueError(
            f"`module` has a layer that cannot be converted at {where}, "
            f"{flax_type.__name__}: those that can are "
            f"{', '.join(t.__name__ for t in COUNTERPARTS)}. Replace it, or add its "
            "counterpart to `jax_unit_scaling.nnx.convert.COUNTERPARTS`."
        )
    kind, weight = COUNTERPARTS[flax_type]
    parameters = _parameters(layer)
    options = {
        name: getattr(layer, name)
        for name in inspect.signature(flax_type.__init__).parameters
        if name in vars(layer) and name not in parameters
    }
    try:  # without computing initial values, which are replaced
        new = nnx.eval_shape(lambda: kind(**options, rngs=nnx.Rngs(0)))
    except ValueError as e:
        raise ValueError(
            f"`module` has a {flax_type.__name__} that cannot be converted at {where}: "
            f"{e}"
        ) from e
    for name, old in parameters.items():
        metadata = getattr(new, name).get_metadata()
        value = old[...]
        if name == weight:
            scale = _scale(value)
            # The operation divides a product by fan_in^1/2, a look-up by nothing.
            fan_in = 1 if kind is Embed else metadata["fan_in"]
            new.output_scale = scale * math.sqrt(fan_in)
            value = value / scale
        setattr(new, name, old.copy(value, **metadata | old.get_metadata()))
    for name, value in more.items():
        if name in vars(new):
            setattr(new, name, value)
    return new


def _scale(weight: jax.Array) -> float:
    """Its standard deviation; 1 for a constant, such as a zero initial value."""
    std = float(jnp.std(weight.astype(jnp.float32)))
    return std if std > 0 else 1.0
