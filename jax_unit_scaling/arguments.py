"""Arguments checked against a signature, so that an error names what was passed."""

import collections.abc
import dataclasses
import functools as ft
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, Union, cast, get_args, get_origin

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
        """The value, if it fits; NumPy's numbers as Python's, which promote none.

        Raises:
            TypeError: if it is not what the signature says, by the argument's name.
            ValueError: if it is not finite, or none of those that its name stands for.
        """
        if self.many:
            one = dataclasses.replace(self, many=False)
            return tuple(map(one, value))
        if value is self.default:
            return value
        if not self.is_array:
            value = _plain(value)
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
        _check_value(self.name, value)
        return value


def _plain(value: Any) -> Any:
    """NumPy's numbers, and arrays and sequences of them, as Python's and tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        return tuple(map(_plain, value)) if value.ndim else value.item()
    if type(value) in (tuple, list):
        items = [_plain(v) for v in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            return type(value)(items)
    return value


def checked(f: F, but: Sequence[str] = (), **wider: Any) -> F:
    """`f`, whose arguments, `but` for some, are first checked against its annotations.

    `wider` are annotations in place of `f`'s, where it takes more than they say. What
    it hands on as `**more` is checked where it arrives: of a module's constructor by
    `checked(super().__init__)(...)`, whose annotations are its namesake's.
    """
    signature = inspect.signature(f, eval_str=True)
    signature = signature.replace(
        parameters=[
            p.replace(annotation=wider.get(name, p.annotation))
            for name, p in signature.parameters.items()
        ]
    )
    checks = checks_of(signature, but)

    @ft.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = bind(f.__qualname__, signature, *args, **kwargs)
        for check in checks:
            if check.name in bound.arguments:
                bound.arguments[check.name] = check(bound.arguments[check.name])
        return f(*bound.args, **bound.kwargs)

    return cast(F, call)


def bind(
    function: str, signature: inspect.Signature, /, *args: Any, **kwargs: Any
) -> inspect.BoundArguments:
    """The arguments by name.

    Raises:
        TypeError: if they do not fit, with the names that the function takes.
    """
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as e:
        said = str(e).replace("'", "`")
        raise TypeError(f"{function}{_brief(signature)}: {said}.") from None


def _brief(signature: inspect.Signature) -> inspect.Signature:
    """Without its annotations, which would hide the names, and functions' addresses."""
    plain = [
        p.replace(
            annotation=inspect.Parameter.empty,
            default=_Name(p.default.__name__)
            if inspect.isfunction(p.default)
            else p.default,
        )
        for p in signature.parameters.values()
    ]
    return inspect.Signature(plain)


class _Name(str):
    __repr__ = str.__str__


def check_fields(instance: Any) -> None:
    """Checks the fields of a dataclass against its annotations, its bases' too.

    NumPy's numbers become Python's.
    """
    kind: Any = type(instance)
    for check in _field_checks(kind):
        value = getattr(instance, check.name, check.default)
        if (plain := check(value)) is not value:
            object.__setattr__(instance, check.name, plain)  # of a frozen dataclass


@ft.lru_cache(maxsize=256)  # `nn.remat` and the like make classes without end
def _field_checks(kind: Any) -> tuple[Check, ...]:
    fields = [f for f in dataclasses.fields(kind) if f.init]
    written = any(isinstance(f.type, str) for f in fields)
    hints = typing.get_type_hints(kind) if written else {}
    parameters = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=f.default,
            annotation=hints.get(f.name, f.type),
        )
        for f in fields
    ]
    return checks_of(inspect.Signature(parameters), but=())


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
    if parameter.kind is parameter.VAR_KEYWORD:
        return None
    if len(known) < len(predicates):
        if parameter.name not in _VALUES:
            return None
        known = [lambda x: True]
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
    plain = {int: "an integer", float: "a Python number", bool: "True or False"}
    plain[type(None)] = "None"
    if annotation in plain:
        return plain[annotation]
    if get_origin(annotation) is collections.abc.Callable:
        return "a function"
    if get_origin(annotation) is collections.abc.Mapping:
        return "a mapping"
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
    if origin is collections.abc.Mapping:
        return lambda x: isinstance(x, collections.abc.Mapping)
    if annotation in _NUMBERS:
        kind = _NUMBERS[annotation]
        return lambda x: isinstance(x, kind) and not isinstance(x, bool)
    if annotation is bool:
        return lambda x: isinstance(x, bool | np.bool_)
    unsaid = annotation in (inspect.Parameter.empty, Any)  # `Any` is a class
    if unsaid or not isinstance(annotation, type):
        return None
    if Protocol in annotation.__bases__:  # which says how a function is called
        return callable
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


@dataclasses.dataclass(frozen=True)
class _Values:
    """What an argument may be, on top of its type: in words, and each number of it."""

    expected: str
    fits: Predicate


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


_COUNT = _Values("1 or more", lambda n: n >= 1)
_SIZE = _Values("0 or more", lambda n: n >= 0)
_SHARE = _Values("from 0 to 1", lambda x: 0 <= x <= 1)
_FACTOR = _Values("finite and positive", lambda x: 0 < x < math.inf)
_UNROLL = _Values("1 or more, True or False", lambda n: isinstance(n, bool) or n >= 1)
_FUNCTION = _Values("a function", callable)
_DTYPE = _Values("None or a floating-point dtype", _is_floating)

_KERNEL = _Values('"xla" or "cudnn"', lambda x: x in ("xla", "cudnn"))

# A name stands for the same in all functions and modules, Flax's own arguments too.
_VALUES: dict[str, _Values] = {
    name: values
    for values, names in (
        (
            _COUNT,
            "num_heads num_kv_heads num_groups group_size num_experts num_selected "
            "num_embeddings kernel_size feature_group_count depth lora_rank tied "
            "length",
        ),
        (_UNROLL, "unroll"),
        (
            _SIZE,
            "features in_features out_features hidden_features num_features "
            "qkv_features in_kv_features epsilon index n_steps",
        ),
        (_SHARE, "rate dropout_rate momentum"),
        (_FACTOR, "output_scale logits_scale mult rotary_base"),
        (_DTYPE, "dtype param_dtype lora_dtype lora_param_dtype"),
        (_DTYPE, "preferred_element_type"),
        (_KERNEL, "implementation"),
        (_FUNCTION, "promote_dtype lora_promote_dtype conv_general_dilated_cls"),
        (_FUNCTION, "dot_general_cls qkv_dot_general_cls out_dot_general_cls"),
    )
    for name in names.split()
}


def _check_value(name: str, value: Any) -> None:
    """Refuses, by a ValueError, what the name of an argument does not stand for."""
    values = _VALUES.get(name)
    if values is None or value is None:
        return
    each = value if _is_sequence(value) else (value,)
    if not all(map(values.fits, each)):
        raise ValueError(f"`{name}` must be {values.expected}, got {value!r}.")


def positive_integer(name: str, value: Any) -> int:
    """An integer, NumPy's too, as Python's.

    Raises:
        ValueError: if it is none, or not positive.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    return number


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


def check_dimension_numbers(lhs: Any, rhs: Any, dimension_numbers: Any) -> None:
    """Refuses, by a ValueError, what is no dot of `lhs` and `rhs`."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    for name, x, axes in (
        ("lhs", lhs, (*lhs_contract, *lhs_batch)),
        ("rhs", rhs, (*rhs_contract, *rhs_batch)),
    ):
        if len({*axes}) < len(axes) or not all(0 <= i < len(x.shape) for i in axes):
            raise ValueError(
                f"`dimension_numbers` must name axes of `{name}`, each once, got "
                f"{dimension_numbers} for shape {x.shape}."
            )
    for kind, left, right in (
        ("contracting", lhs_contract, rhs_contract),
        ("batch", lhs_batch, rhs_batch),
    ):
        sizes = [lhs.shape[i] for i in left], [rhs.shape[i] for i in right]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`lhs` and `rhs` must agree on the {kind} dimensions, got sizes "
                f"{sizes[0]} of {lhs.shape} and {sizes[1]} of {rhs.shape}."
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
