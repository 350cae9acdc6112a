"""From a Flax model to a unit-scaled one that computes the same function."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..formats import Formats
from ..op import AxisName
from .activation import PReLU
from .conv import Conv, ConvTranspose
from .linear import Einsum, Embed, Linear, LinearGeneral
from .lora import LoRA, LoRALinear
from .normalization import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .recurrent import RNN, Bidirectional
from .transformer import MultiHeadAttention, with_constraint

M = TypeVar("M")


def unscaled(*factors: float) -> float:
    """The constraint under which an operation computes the plain function."""
    return 1.0


Options = Callable[[Any, dict[str, Any]], dict[str, Any]]


def _as_given(_: Any, given: dict[str, Any]) -> dict[str, Any]:
    return given


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """The unit-scaled module that takes the place of one of Flax.

    Attributes:
        kind: it has the same parameters, under the same names.
        weights: those whose scale moves into `output_scale`.
        takes: what of `convert`'s arguments it takes.
        divides: whether its operation divides by fan_in^1/2, whatever the input's
            shape; the others compute the plain function, under `unscaled`.
        options: changes the arguments that it is built with, those of the layer.
    """

    kind: type
    weights: tuple[str, ...] = ()
    takes: tuple[str, ...] = ("batch_axis_name",)
    divides: bool = False
    options: Options = _as_given


def _product(kind: type, *weights: str, **more: Any) -> Counterpart:
    takes = ("formats", "batch_axis_name")
    return Counterpart(kind, weights, takes, **{"divides": True} | more)


def _plain(_: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "constraint": unscaled}


def _group_norm(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    # Flax keeps both counts, takes one of them, and forgets how many features.
    features = layer.num_groups * layer.group_size
    return {**given, "num_features": features, "group_size": None}


def _rank(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    adapter = getattr(layer, "lora", layer)
    return {**given, "lora_rank": adapter.lora_a.shape[1]}


def _prelu(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    start = float(layer.negative_slope[...])
    return {**given, "negative_slope_init": start, "constraint": unscaled}


def _attention(layer: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Attention of its own replaces Flax's, with logits divided by head_size^1/2; one
    that a user has put in stays."""
    if given["attention_fn"] is nnx.dot_product_attention:
        given = {k: v for k, v in given.items() if k != "attention_fn"}
        given |= {"mult": math.sqrt(layer.head_dim)}
    return given


# Each Flax layer's counterpart: one that has parameters is converted by this table, or
# refused.
COUNTERPARTS: dict[type, Counterpart] = {
    nnx.Linear: _product(Linear, "kernel"),
    nnx.LinearGeneral: _product(LinearGeneral, "kernel"),
    nnx.Einsum: _product(Einsum, "kernel"),
    nnx.Conv: _product(Conv, "kernel", divides=False, options=_plain),
    nnx.ConvTranspose: _product(ConvTranspose, "kernel", divides=False, options=_plain),
    nnx.LoRA: _product(LoRA, "lora_a", "lora_b", options=_rank),
    nnx.LoRALinear: _product(LoRALinear, "kernel", options=_rank),
    nnx.Embed: Counterpart(Embed, ("embedding",), ("batch_axis_name", "tied")),
    nnx.LayerNorm: Counterpart(LayerNorm),
    nnx.RMSNorm: Counterpart(RMSNorm),
    nnx.GroupNorm: Counterpart(GroupNorm, options=_group_norm),
    nnx.InstanceNorm: Counterpart(InstanceNorm),
    nnx.BatchNorm: Counterpart(BatchNorm),
    nnx.PReLU: Counterpart(PReLU, options=_prelu),
    nnx.MultiHeadAttention: Counterpart(
        MultiHeadAttention, takes=("formats", "batch_axis_name"), options=_attention
    ),
    nnx.RNN: Counterpart(RNN, takes=()),
    nnx.Bidirectional: Counterpart(Bidirectional, takes=()),
}
REFUSED: dict[type, str] = {
    nnx.WeightNorm: "it changes its layer's weights, and their scale, at each call",
    nnx.SpectralNorm: "it changes its layer's weights, and their scale, at each call",
}


def convert(
    module: M,
    *,
    formats: Formats | None = None,
    batch_axis_name: AxisName | None = None,
    tied: int | None = None,
) -> M:
    """The unit-scaled model that computes the same function as a Flax model.

    Takes any `nnx.Module`, trained or fresh, and leaves it as it is. In the copy every
    layer of `COUNTERPARTS` gives way to its unit-scaled namesake, with

        kernel = kernel / s,   output_scale = s fan_in^1/2,   s = std(kernel)

    (1 where that is zero; without fan_in for a convolution, whose own factor is left
    out, as it depends on the input's size). So kernels have unit scale and the output
    is the same. The cotangent of an input is the true one; that of a kernel has
    batch^-1/2, in place of the batch's size and s. So for a loss of this library, whose
    gradient starts at unit scale, all gradients are again near it as far as the
    activations are. Attention is computed by `dot_product_attention`, without its
    factors; an RNN's gradients are divided by sqrt(steps).

    All else stays, and computes what it did: functions that a `__call__` calls
    (`nnx.gelu`, a residual sum), the gates of recurrent cells between their linear
    layers, dropout, and parameters that a user's own module holds. State that is no
    parameter (running statistics, caches, random keys) is copied.

    The scale s is kept behind the product. It could as well become the `mult` of an
    activation behind it, gelu(s u) = s gelu(u, mult=s), and go on to the next layer;
    but that u has unit scale needs an input of unit scale, which no trained model
    promises, and the order of layers is a `__call__`'s secret. So activations keep the
    scales that the model has learnt to give them. To have these unit-scaled too, build
    the model from `jax_unit_scaling.nnx`.

    Args:
        module: the model, or a single layer.
        formats: the number formats of all products, simulated.
        batch_axis_name: as in `Linear`, of all layers.
        tied: as in `Embed`, of all embeddings; needed where one's `attend` is used.

    Raises:
        ValueError: if a layer of Flax has parameters and no counterpart, or one that
            cannot take its options; or if a weight is shared by two layers.
        TypeError: inside `jit`, as the weights' scales become factors.
    """
    more = {"formats": formats, "batch_axis_name": batch_axis_name, "tied": tied}
    return _Conversion(more).of_tree(module, ())


class _Conversion:
    """One call of `convert`: what has been converted, and who owns each parameter."""

    def __init__(self, more: Mapping[str, Any]):
        self.more = more
        self.converted: dict[int, Any] = {}
        self.owners: dict[int, str] = {}

    def of_tree(self, tree: Any, above: tuple[Any, ...]) -> Any:
        """A copy, with each layer converted, and the same for the same node."""

        def of_node(path: tuple[Any, ...], node: Any) -> Any:
            if not _is_leaf(node):
                return node
            if id(node) not in self.converted:
                self.converted[id(node)] = self.of_leaf(node, above + path)
            return self.converted[id(node)]

        return jax.tree_util.tree_map_with_path(of_node, tree, is_leaf=_is_leaf)

    def of_leaf(self, node: Any, path: tuple[Any, ...]) -> Any:
        where = jax.tree_util.keystr(path) or "the root"
        if isinstance(node, nnx.Variable):
            self.own(node, where)
            return node.copy()
        for variable in _parameters(node).values():
            self.own(variable, where)
        return self.of_layer(node, where, path)

    def own(self, variable: Any, where: str) -> None:
        owner = self.owners.setdefault(id(variable), where)
        if owner != where:
            raise ValueError(
                f"`module` shares one parameter between {owner} and {where}: its two "
                "gradients have different factors, so their sum would not be the "
                "gradient. Give each a parameter of its own."
            )

    def of_layer(self, layer: Any, where: str, path: tuple[Any, ...]) -> Any:
        counterpart = _counterpart(layer, where)
        new = _skeleton(layer, counterpart, where, self.more)
        scales = []
        for name, value in vars(layer).items():
            if isinstance(value, nnx.Param):
                parameter, scale = _parameter(
                    value, getattr(new, name), name in counterpart.weights
                )
                setattr(new, name, parameter)
                if name in counterpart.weights:
                    fan_in = parameter.get_metadata()["fan_in"]
                    scales.append(scale * fan_in ** (counterpart.divides / 2))
            elif _has_state(value):
                below = (*path, jax.tree_util.GetAttrKey(name))
                setattr(new, name, self.of_tree(value, below))
            elif value is None and getattr(new, name, None) is not None:
                setattr(new, name, None)  # no stream of random keys
        if scales:
            new.output_scale = math.prod(scales) / getattr(new, "mask_factor", 1.0)
        if isinstance(new, Embed):  # Flax's logits are not divided by the features
            new.logits_scale = new.output_scale * new.features
        if isinstance(new, MultiHeadAttention):
            new.attention_fn = with_constraint(new.attention_fn, unscaled)
        return new


def _is_leaf(node: Any) -> bool:
    return isinstance(node, nnx.Variable) or _is_layer_of_flax(node)


def _is_layer_of_flax(node: Any) -> bool:
    """Whether it has a counterpart, or parameters of its own and is, or derives from,
    one of Flax's."""
    if not isinstance(node, nnx.Module):
        return False
    if type(node) in (*COUNTERPARTS, *REFUSED):
        return True
    homes = [base.__module__ for base in type(node).__mro__]
    return (
        bool(_parameters(node))
        and any(h.startswith("flax.nnx.nn.") for h in homes)
        and not any(h.startswith(__package__) for h in homes)
    )


def _parameters(module: nnx.Module) -> dict[str, nnx.Param[Any]]:
    return {k: v for k, v in vars(module).items() if isinstance(v, nnx.Param)}


def _has_state(value: Any) -> bool:
    """Whether it holds variables, or arrays such as a convolution's mask."""
    leaves = jax.tree.leaves(value, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return any(isinstance(x, nnx.Variable | jax.Array | np.ndarray) for x in leaves)


def _counterpart(layer: Any, where: str) -> Counterpart:
    flax_type: type = type(layer)
    if flax_type in REFUSED:
        raise ValueError(
            f"`module` has a {flax_type.__name__} that cannot be converted at {where}: "
            f"{REFUSED[flax_type]}. Build it from `jax_unit_scaling.nnx`."
        )
    if flax_type not in COUNTERPARTS:
        raise ValueError(
            f"`module` has a layer that cannot be converted at {where}, "
            f"{flax_type.__name__}: those that can are "
            f"{', '.join(t.__name__ for t in COUNTERPARTS)}. Replace it, or add its "
            "counterpart to `jax_unit_scaling.nnx.COUNTERPARTS`."
        )
    return COUNTERPARTS[flax_type]


def _skeleton(
    layer: Any, counterpart: Counterpart, where: str, more: Mapping[str, Any]
) -> Any:
    """The counterpart as built from the layer's arguments, without values."""
    parameters = inspect.signature(type(layer).__init__).parameters
    given = {
        name: value
        for name, value in vars(layer).items()
        if name in parameters and name != "rngs" and not isinstance(value, nnx.Variable)
    }
    options = counterpart.options(layer, given)
    options |= {name: more[name] for name in counterpart.takes}

    def build() -> Any:
        rngs = {"rngs": nnx.Rngs(0)} if "rngs" in parameters else {}
        return counterpart.kind(**options, **rngs)

    try:
        return nnx.eval_shape(build)
    except ValueError as e:
        raise ValueError(
            f"`module` has a {type(layer).__name__} that cannot be converted at "
            f"{where}: {e}"
        ) from e


def _parameter(
    old: nnx.Param[Any], new: nnx.Param[Any], divided: bool
) -> tuple[nnx.Variable[Any], float]:
    """The old parameter with the new one's role, and the scale it is divided by."""
    value = old[...]
    if divided and isinstance(value, jax.core.Tracer):
        raise TypeError(
            "`module` must hold concrete weights, as their scales become factors, got "
            f"a traced {jax.typeof(value)}: call `convert` outside of `jit` and other "
            "transformations, and hand them the converted model."
        )
    scale = _scale(value) if divided else 1.0
    value = value / scale if divided else value
    return old.copy(value, **new.get_metadata() | old.get_metadata()), scale


def _scale(weight: jax.Array) -> float:
    """Its standard deviation; 1 for a constant, such as a zero initial value."""
    std = float(jnp.std(weight.astype(jnp.float32)))
    return std if std > 0 else 1.0
