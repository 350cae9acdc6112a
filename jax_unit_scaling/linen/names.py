"""The names of mapped axes, which a module has inside `shard_map` and not before."""

from typing import Any, TypeVar

import jax
from flax import linen as nn
from flax.core import meta

M = TypeVar("M", bound=nn.Module)

_OF_FEATURES = ("in_axis_name", "out_axis_name", "vocabulary_axis_name")
_NAMES = ("axis_name", "batch_axis_name", "model_axis_name", *_OF_FEATURES)


def named(module: M) -> M:
    """The module, to read its fields: without names of axes while it is initialised.

    As in Flax's BatchNorm, so that `init` is called outside, with whole arrays.
    """
    if not module.is_initializing():
        return module
    nameless: dict[str, Any] = {name: None for name in _NAMES if hasattr(module, name)}
    return module.clone(parent=None, **nameless)


def parameter(module: nn.Module, name: str, *init: Any) -> Any:
    """`module.param(...)`; of a parameter that comes in as a piece, that piece.

    Its shape is not checked: only who splits it knows along which axes.
    """
    is_split = any(getattr(module, of, None) is not None for of in _OF_FEATURES)
    if not (is_split and module.has_variable("params", name)):
        return module.param(name, *init)
    piece: jax.Array = meta.unbox(module.get_variable("params", name))
    return piece
