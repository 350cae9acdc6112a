"""What a scaled operation is: plain maths, a rule for its factors, and cases.

An operation f with inputs x_1 .. x_k is computed as `fwd * f(x_1, .., x_k)`, and the
cotangent of x_i is multiplied by `bwd[x_i]`. Its rule gives the factors that make the
output and every cotangent unit-scaled for unit-scaled, independent inputs. A constraint
then makes the forward factor and the factors of the activations agree, so that the
gradient of a whole model is the true one up to a constant for each parameter;
parameters lie on cut-edges and keep their own.

Reference: Unit Scaling (Blake et al., 2023), section 5.
"""

import copy
import dataclasses
import functools as ft
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from .arguments import Check, bind, checks_of
from .constraints import Constraint, apply_constraint
from .formats import ScaledFormats
from .scale import scaled

P = ParamSpec("P")
R = TypeVar("R")
AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Factors:
    """An operation's forward factor, and the backward factor of each input by name."""

    fwd: float
    bwd: Mapping[str, float]


def factors_of_sum(terms: float, *, out: int, **inputs: int) -> Factors:
    """The factors of a multilinear operation that multiplies and adds `terms` products.

    Each element of a tensor with `size` elements (the output in the forward pass, an
    input's cotangent in the backward pass) is a sum of `terms / size` products of
    independent unit-scaled numbers, so `sqrt(size / terms)` gives it unit scale.
    For `x[b, m] @ w[m, n]`, with b m n terms: m^-1/2, and n^-1/2 for x, b^-1/2 for w.
    """

    def factor(size: int) -> float:
        # Where a shape has a zero there is nothing to scale.
        return math.sqrt(size / terms) if size and terms else 1.0

    return Factors(factor(out), {name: factor(size) for name, size in inputs.items()})


@dataclasses.dataclass(frozen=True)
class Integers:
    """A case's argument of integers, uniform in [0, high)."""

    shape: tuple[int, ...]
    high: int


@dataclasses.dataclass(frozen=True)
class Zeros:
    """A case's argument that starts at zero, as a bias does."""

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A case's argument that starts at one value, as a negative slope does."""

    shape: tuple[int, ...]
    value: float


@dataclasses.dataclass(frozen=True)
class Key:
    """A case's argument that is a random key."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An example of an operation: its arguments (a shape is a unit-normal array), its
    options, and the error its rule declares on top of what chance allows."""

    args: tuple[Any, ...]
    options: Mapping[str, Any]
    error: float


def case(*args: Any, error: float = 0.0, **options: Any) -> Case:
    """A case in one line: `case((256, 512), (512, 1024), constraint=None)`."""
    return Case(args, options, error)


@dataclasses.dataclass(frozen=True, eq=False)
class Op(Generic[P, R]):
    """A unit-scaled operation, called like the plain function `fn` it is made of.

    Attributes:
        fn: the plain maths. Its signature is the operation's; of its keywords
            `constraint` and the names of axes concern factors and never reach it. A
            parameter `bias` is one that it adds, last, to the rest.
        rule: gives the ideal `Factors` from the arguments, with each array replaced by
            a `jax.ShapeDtypeStruct`; it also checks them.
        parameters: the arguments that are parameters.
        cases: examples, which the tests and the documentation run through.
        unscaled: what the rule does not promise unit scale of: "out" or an argument.
        statistic: what "scale" means for the output.
        widen: whether float16 inputs are computed on in float32.
        fwd_power: the power of the ideal forward factor that is used.
        multiplied: `fn`'s values times a number, its last argument, where there is a
            better place for that than the end: XLA puts a multiplication that ends an
            operation into every read of it by a product.
    """

    fn: Callable[P, R]
    rule: Callable[..., Factors]
    parameters: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()
    unscaled: tuple[str, ...] = ()
    statistic: Literal["std", "rms"] = "std"
    widen: bool = True
    fwd_power: int = 1
    multiplied: Callable[..., R] | None = None
    __name__: str = dataclasses.field(init=False)
    _signature: inspect.Signature = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.__dict__.update(
            __name__=getattr(self.fn, "__name__", "op"),
            __doc__=self.fn.__doc__,
            __wrapped__=self.fn,
            _signature=inspect.signature(self.fn),
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        arguments, options = self._bind(*args, **kwargs)
        factors = self._factors(arguments, options)
        inputs = {
            name: jnp.asarray(arguments[name])
            for name in factors.bwd
            if arguments[name] is not None
        }
        bias = inputs.pop("bias", None) if "bias" in self.parameters else None
        dtype = jnp.result_type(*inputs.values())
        half = dtype == jnp.float16
        formats = options.get("formats")
        if native := self._is_product and formats is not None and formats.native:
            # The hardware multiplies what it adds up by a number at no cost.
            lhs, rhs = (factors.bwd[name] for name in inputs)
            options["formats"] = ScaledFormats.of(
                formats, out=factors.fwd, lhs=lhs, rhs=rhs
            )
            factors = Factors(1.0, {**factors.bwd, **dict.fromkeys(inputs, 1.0)})
        common = self._common(factors, [*inputs], options, half and not native)
        for name, x in inputs.items():
            x = scaled(x, bwd=factors.bwd[name] / common)
            arguments[name] = x.astype(jnp.float32) if self._widens(half) else x
        if bias is not None:
            arguments["bias"] = None
        # An option of lax's own signatures, in which it may be positional.
        given = arguments if "preferred_element_type" in arguments else options
        if keep := half and given.get("preferred_element_type", dtype) is None:
            given["preferred_element_type"] = jnp.float32
        keywords = {k: v for k, v in options.items() if k not in _ABOUT_FACTORS}
        y: Any
        if self.multiplied is not None and factors.fwd == common:
            y = self.multiplied(*arguments.values(), common, **keywords)
        else:
            y = self.fn(*arguments.values(), **keywords)
            if (contracted := options.get("in_axis_name")) is not None:
                y = lax.psum(y, contracted)
            y = scaled(y, fwd=factors.fwd, bwd=common)
        if bias is not None:
            dtype = jnp.result_type(dtype, bias)
            bias = bias.astype(jnp.result_type(y, bias))
            y = y + scaled(bias, bwd=factors.bwd["bias"])
        return y.astype(dtype) if keep or self._widens(half) else y

    def factors(self, *args: Any, **kwargs: Any) -> Factors:
        """The factors that a call with these arguments uses (shapes will do)."""
        return self._factors(*self._bind(*args, **kwargs))

    def constrained(self, constraint: Constraint | None) -> "Op[P, R]":
        """The operation under another constraint, or under none, by default.

        Raises:
            TypeError: if it takes no constraint because its factors cannot conflict.
        """
        if "constraint" not in self._signature.parameters:
            raise TypeError(
                f"`{self.__name__}` takes no constraint: its factors cannot conflict."
            )
        parameters = self._signature.parameters
        other = parameters["constraint"].replace(default=constraint)
        signature = self._signature.replace(
            parameters=list((parameters | {"constraint": other}).values())
        )
        twin = copy.copy(self)
        twin.__dict__.update(_signature=signature, __signature__=signature)
        return twin

    def _bind(
        self, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments before the `*` by name, and the options behind it."""
        bound = bind(self.__name__, self._signature, *args, **kwargs)
        bound.apply_defaults()
        names = [p for p in self._signature.parameters][: len(bound.args)]
        arguments = dict(zip(names, bound.args, strict=True))
        options = dict(bound.kwargs)
        for check in self._checks:
            given = arguments if check.name in arguments else options
            given[check.name] = check(given[check.name])
        return arguments, options

    @ft.cached_property
    def _checks(self) -> tuple[Check, ...]:
        return checks_of(self._signature, but=_ABOUT_FACTORS)

    def _factors(self, arguments: dict[str, Any], options: dict[str, Any]) -> Factors:
        keywords = {k: v for k, v in options.items() if k not in _ABOUT_FACTORS}
        ideal = self.rule(*map(_shape_only, arguments.values()), **keywords)
        # Each factor is (terms of its sum)^-1/2. The rule sees this device's piece of
        # the shapes, so the terms along an axis that is split are too few: of the
        # output's sum along the contracted axes, of an activation's cotangent along
        # the output's, of a parameter's along the batch.
        contracted, made, batch = (
            _pieces(options, name) ** -0.5
            for name in ("in_axis_name", "out_axis_name", "batch_axis_name")
        )
        bwd = {
            name: factor * (batch if name in self.parameters else made)
            for name, factor in ideal.bwd.items()
            if arguments[name] is not None
        }
        active = [name for name in bwd if name not in self.parameters]
        fwd, *agreed = apply_constraint(
            options.get("constraint"),
            (ideal.fwd * contracted) ** self.fwd_power,
            *(bwd[name] for name in active),
        )
        return Factors(fwd, bwd | dict(zip(active, agreed, strict=True)))

    def _common(
        self, factors: Factors, inputs: list[str], options: dict[str, Any], half: bool
    ) -> float:
        """The part of the backward factors that multiplies the output's cotangent."""
        # A sum over a batch passes float16's largest number, 65504, before a factor
        # could bring it back. So the smallest factor multiplies the cotangent first.
        if half:
            return min(factors.bwd[name] for name in inputs)
        # One multiplication for all activations, and away from the products before
        # this operation: XLA puts it into the one behind it, where it costs nothing,
        # but into every read of a product's operand, where it does. A product's own
        # would be such a one, and formats round a cotangent at unit scale.
        if self._is_product or options.get("formats") is not None:
            return 1.0
        agreed = {factors.bwd[x] for x in inputs if x not in self.parameters}
        return agreed.pop() if len(agreed) == 1 else 1.0

    def _widens(self, half: bool) -> bool:
        return half and self.widen and not self._is_product

    @property
    def _is_product(self) -> bool:
        """Products keep float16 operands and ask for a float32 result instead."""
        return "preferred_element_type" in self._signature.parameters


_ABOUT_FACTORS = ("constraint", "batch_axis_name", "in_axis_name", "out_axis_name")


def _pieces(options: Mapping[str, Any], option: str) -> int:
    names = options.get(option)
    if option == "batch_axis_name":
        return axis_size(names)
    return feature_pieces(option, names)


def feature_pieces(option: str, names: AxisName | None) -> int:
    """How many pieces there are along named axes that split no batch.

    Raises:
        ValueError: where JAX would not sum cotangents over them; `option` named them.
    """
    check_bound(option, names)
    if names is not None and not sums_cotangents(names):
        raise ValueError(
            f"`{option}={names!r}` needs `jax.shard_map` with its default, "
            "`check_vma=True`: without it, as in `pmap` and `vmap`, JAX does not know "
            "what is the same on all devices, and sums cotangents too often or not at "
            "all."
        )
    return _size(names)


def _shape_only(x: Any) -> Any:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return x


def axis_size(names: AxisName | None) -> int:
    """How many pieces there are along the named axes, which split the batch."""
    check_bound("batch_axis_name", names)
    return _size(names)


def _size(names: AxisName | None) -> int:
    return math.prod(map(lax.axis_size, axis_names(names)))


def check_bound(option: str, names: AxisName | None) -> None:
    """Refuses the name of an axis that nothing around has.

    Raises:
        TypeError: if it is no name, nor a tuple of names.
        ValueError: if there is no such axis.
    """
    each = axis_names(names)
    if not (isinstance(each, tuple) and all(isinstance(n, str) for n in each)):
        raise TypeError(
            f"`{option}` must be None, the name of an axis or a tuple of names, got "
            f"{names!r}."
        )
    for name in each:
        try:
            lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"`{option}` must name an axis of a `shard_map`, `pmap` or `vmap` "
                f"around the call, got {name!r}, which there is none of: call it "
                "inside of one, for example `jax.vmap(..., axis_name="
                f"{name!r})`, or leave `{option}` None. Under `jit` alone shapes are "
                "those of the whole, and it is not needed."
            ) from None


def sums_cotangents(names: AxisName) -> bool:
    """Whether JAX knows what varies along the named axes, and so adds up by itself the
    cotangents of what does not: inside `shard_map` with `check_vma`."""
    return all(name in varying(lax.axis_index(name)) for name in axis_names(names))


def varying(x: Any) -> frozenset[str]:
    """The axes along which JAX knows `x` to vary: none outside such a `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def varying_along(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x` as one that may differ along more axes of a `shard_map`."""
    missing = tuple(sorted(axes - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def axis_names(names: AxisName | None) -> tuple[str, ...]:
    """The names of axes as a tuple."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else names


OPS: dict[str, Op[..., Any]] = {}


def scaled_op(
    *, rule: Callable[..., Factors], **about: Any
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes a function into an `Op` with this rule, and enters it into the registry."""

    def decorate(fn: Callable[P, R]) -> Op[P, R]:
        op = Op(fn, rule, **about)
        if op.__name__ in OPS:
            raise ValueError(f"`fn` must have a name of its own, got {op.__name__}.")
        OPS[op.__name__] = op
        return op

    return decorate
