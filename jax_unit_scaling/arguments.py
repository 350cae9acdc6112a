"""Arguments checked against a signature, so that an error names what was passed."""

import collections.abc
import dataclasses
import functools as ft
import inspect
import math
import numbers
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from .scale import check_floating

Predicate = Callable[[Any], bool]
F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Check:
    """What a signature says of one argument.

    Attributes:
        name: the argument's.
        default: needs no check.
        is_array: whether it is an array, or may be one.
        is_floating: whether that array is one of floating-point numbers.
        others: what else it may be; of an array None or a number.
        expected: the same in words.
        many: whether it is `*name`, a tuple of such arguments.
    """

    name: str
    default: Any
    is_array: bool
    is_floating: bool
    others: tuple[Predicate, ...]
    expected: str
    many: bool = False

    def __call__(self, value: Any) -> Any:
        """The value, if it fits; of a NumPy number the Python one, which promotes none.

        Raises:
            TypeError: if it is not what the signature says, by the argument's name.
            ValueError: if it is not finite.
        """
        if self.many:
            one = dataclasses.replace(self, many=False)
            return tuple(map(one, value))
        if value is self.default:
            return value
        if self.is_array and hasattr(value, "shape") and hasattr(value, "dtype"):
            if self.is_floating:
                check_floating(self.name, value.dtype)
        elif not any(fits(value) for fits in self.others):
            raise TypeError(
                f"`{self.name}` must be {self.expected}, got "
                f"{_described(value)}: pass one"
                f"{'' if self.is_array else ', known while tracing'}."
            )
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"`{self.name}` must be finite, got {value}: pass a finite number."
            )
        plain = isinstance(value, np.generic) and not self.is_array
        return value.item() if plain else value


def checked(f: F) -> F:
    """`f`, whose arguments are first checked against its annotations."""
    signature = inspect.signature(f)
    checks = checks_of(signature, but=())

    @ft.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{f.__name__}{signature}: {e}.") from None
        for check in checks:
            if check.name in bound.arguments:
                bound.arguments[check.name] = check(bound.arguments[check.name])
        return f(*bound.args, **bound.kwargs)

    return cast(F, call)


def checks_of(signature: inspect.Signature, but: Sequence[str]) -> tuple[Check, ...]:
    """A check for each argument whose annotation says what it is, `but` for some."""
    found = [_check(p) for p in signature.parameters.values() if p.name not in but]
    return tuple(check for check in found if check is not None)


def _check(parameter: inspect.Parameter) -> Check | None:
    annotation = parameter.annotation
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    arrays = [m for m in members if _is_array(m)]
    others = [m for m in members if not _is_array(m)]
    predicates = [_predicate(m) for m in others]
    known = [p for p in predicates if p is not None]
    if parameter.kind is parameter.VAR_KEYWORD or len(known) < len(predicates):
        return None
    return Check(
        parameter.name,
        parameter.default,
        bool(arrays),
        all("float" in dtype for m in arrays for dtype in getattr(m, "dtypes", ("",))),
        tuple(known),
        " or ".join((["an array"] if arrays else []) + list(map(_words, others))),
        parameter.kind is parameter.VAR_POSITIONAL,
    )


def _is_array(annotation: Any) -> bool:
    return annotation is jax.Array or hasattr(annotation, "dtypes")


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _words(annotation: Any) -> str:
    plain = {int: "an integer", float: "a Python number", type(None): "None"}
    if annotation in plain:
        return plain[annotation]
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("collections.abc.", "")


def _predicate(annotation: Any) -> Predicate | None:
    """Whether a value is what `annotation` says; None where that is not looked at."""
    if _is_union(annotation):
        return _any_of([_predicate(m) for m in get_args(annotation)])
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is collections.abc.Sequence or (origin is tuple and args[-1] is ...):
        item = _predicate(args[0])
        return None if item is None else lambda x: _is_sequence(x) and all(map(item, x))
    if origin is tuple:
        items = [_predicate(a) for a in args]
        return lambda x: (
            _is_sequence(x)
            and len(x) == len(items)
            and all(fits is None or fits(v) for fits, v in zip(items, x, strict=True))
        )
    if origin is collections.abc.Callable:
        return callable
    if annotation in _NUMBERS:
        kind = _NUMBERS[annotation]
        return lambda x: isinstance(x, kind) and not isinstance(x, bool)
    if annotation is bool:
        return lambda x: isinstance(x, bool | np.bool_)
    unsaid = annotation in (inspect.Parameter.empty, Any)  # `Any` is a class
    if unsaid or not isinstance(annotation, type):
        return None
    return lambda x: isinstance(x, annotation)


_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}


def _any_of(predicates: list[Predicate | None]) -> Predicate | None:
    known = [p for p in predicates if p is not None]
    if len(known) < len(predicates):
        return None
    return lambda x: any(fits(x) for fits in known)


def _is_sequence(x: Any) -> bool:
    return isinstance(x, collections.abc.Sequence) and not isinstance(x, str)


def _described(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return "a value that is being traced"
    return repr(value)


def check_key(name: str, key: Any) -> None:
    """Refuses, by a TypeError, what is no random key, of either kind that JAX has."""
    new = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not new and key.dtype != "uint32":
        raise TypeError(
            f"`{name}` must be a random key, got an array of {key.dtype}: pass "
            "`jax.random.key(seed)`."
        )


def check_broadcast(name: str, x: Any, shape: tuple[int, ...]) -> None:
    """Refuses, by a ValueError, an array that would not be broadcast to `shape`."""
    if x is None:
        return
    try:
        fits = np.broadcast_shapes(x.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` must be broadcastable to {shape}, got shape {x.shape}."
        )


def axes_of(name: str, axis: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Axes of an array of this rank, in the order given, counted from 0.

    Raises:
        ValueError: if there is no such axis, or one is named twice.
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    counted = tuple(a % rank for a in axes if -rank <= a < rank)
    if len({*counted}) != len(axes):
        raise ValueError(
            f"`{name}` must name axes of an array of rank {rank}, each once, got "
            f"{axis}."
        )
    return counted
