"""Products: of activations with parameters, and of two activations."""

import functools as ft
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from ..arguments import axes_of, check_broadcast, check_dimension_numbers
from ..constraints import Constraint, to_output_scale
from ..formats import Formats
from ..fp8 import DotDimensionNumbers, in_formats
from ..op import AxisName, Factors, Zeros, case, factors_of_sum, scaled_op

DotGeneral = Callable[..., Array]


def _dot_general_rule(
    lhs: Any, rhs: Any, dimension_numbers: DotDimensionNumbers, *_: Any, **__: Any
) -> Factors:
    check_dimension_numbers(lhs, rhs, dimension_numbers)
    (lhs_contract, rhs_contract), batch = dimension_numbers
    shared = {*rhs_contract, *batch[1]}
    free = math.prod(n for i, n in enumerate(rhs.shape) if i not in shared)
    terms = math.prod(lhs.shape) * free
    contracted = math.prod(lhs.shape[i] for i in lhs_contract)
    return factors_of_sum(
        terms,
        out=terms // max(contracted, 1),
        lhs=math.prod(lhs.shape),
        rhs=math.prod(rhs.shape),
    )


@scaled_op(
    rule=_dot_general_rule,
    parameters=("rhs",),
    cases=(
        case((256, 512), (512, 128), (((1,), (0,)), ((), ()))),
        case((8, 32, 64, 4), (4, 64, 96), (((2, 3), (1, 0)), ((), ()))),
        case((4, 128, 96), (4, 96, 64), (((2,), (1,)), ((0,), (0,)))),
    ),
)
def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: DotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
    batch_axis_name: AxisName | None = None,
    in_axis_name: AxisName | None = None,
    out_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled `jax.lax.dot_general`; `rhs` is a parameter, as in a Flax module.

    With k the contracted, m and n the free sizes of `lhs` and `rhs`, factors: k^-1/2
    forward, n^-1/2 for `lhs`, m^-1/2 for `rhs`. It has lax's signature, so a Flax
    module takes it as it is: `nnx.Linear(..., dot_general=jax_unit_scaling.dot_general,
    kernel_init=nnx.initializers.normal(1.0))`. `formats` as in `linear`.

    Reference: Unit Scaling (Blake et al., 2023), table A.2, matmul.
    """
    keywords = {} if out_sharding is None else {"out_sharding": out_sharding}

    def product(lhs: Array, rhs: Array) -> Array:
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, **keywords
        )

    return in_formats(product, formats)(lhs, rhs)


def _linear_rule(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    axis: int | Sequence[int],
    batch_axes: int = 0,
    **_: Any,
) -> Factors:
    axes = axes_of("axis", axis, len(x.shape))
    if not 0 <= batch_axes <= len(x.shape):
        raise ValueError(
            f"`batch_axes` must be a number of `x`'s axes, got {batch_axes} for shape "
            f"{x.shape}."
        )
    shared = tuple(range(batch_axes)) + axes
    sizes, out = tuple(x.shape[a] for a in shared), kernel.shape[len(shared) :]
    if kernel.shape[: len(shared)] != sizes or len({*shared}) != len(shared):
        raise ValueError(
            f"`kernel` must begin with the sizes of `x`'s axes {shared}, each once, "
            f"{sizes}, got shape {kernel.shape} for `x` of shape {x.shape}."
        )
    bias_shape = out
    if batch_axes:
        free = len(x.shape) - len(shared)
        bias_shape = (*sizes[:batch_axes], *free * (1,), *out)
    if bias is not None and bias.shape != bias_shape:
        raise ValueError(
            f"`bias` must have the shape {bias_shape} of the rest of `kernel` "
            f"{kernel.shape}, got {bias.shape}."
        )
    terms = math.prod(x.shape) * math.prod(out)
    return factors_of_sum(
        terms,
        out=terms // max(math.prod(sizes[batch_axes:]), 1),
        x=math.prod(x.shape),
        kernel=math.prod(kernel.shape),
        bias=math.prod(kernel.shape),  # summed over the batch, as each weight is
    )


_LINEAR_CASES = (
    case((256, 512), (512, 128)),
    case((8, 16, 128), (128, 4096), Zeros((4096,))),
    case((4, 32, 8, 64), (8, 64, 128), axis=(-2, -1)),
    case((4, 32, 64), (64, 32, 128), Zeros((32, 128))),
)


@scaled_op(
    rule=_linear_rule,
    parameters=("kernel", "bias"),
    cases=(
        *_LINEAR_CASES,
        case(
            (4, 96, 64),
            (4, 64, 32, 128),
            Zeros((4, 1, 32, 128)),
            axis=-1,
            batch_axes=1,
        ),
    ),
)
def linear(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    *,
    axis: int | Sequence[int] = -1,
    batch_axes: int = 0,
    dot_general: DotGeneral = lax.dot_general,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
    batch_axis_name: AxisName | None = None,
    in_axis_name: AxisName | None = None,
    out_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled `x @ kernel + bias`: x [..., in], kernel [in, out], bias [out].

    Contracts `axis` of `x` with the leading axes of `kernel`; `in` and `out` may each
    be several axes. `dot_general` computes the plain product. `x` and `kernel` may have
    `batch_axes` leading axes in common, with a kernel of its own for each place on them
    (and `bias` then has axes of size one for those of `x` that are left).

    Factors: in^-1/2 forward, out^-1/2 for `x`, batch^-1/2 for `kernel` and `bias`. The
    bias is added after the forward factor.

    Inside `shard_map` each device sees a piece, and the factors are those of the whole
    for the names of the mesh axes that split it:

        batch_axis_name: the batch. Also in `pmap` and in a `vmap` over examples.
        in_axis_name: the axes that are contracted, of `x` and `kernel`. The pieces'
            products are added up over it (`psum`), before the bias.
        out_axis_name: the output's axes, of `kernel` and `bias`.

    `formats` are those of the product, simulated or native: on hardware without 8-bit
    units native ones give the same, slowly, and a warning says so, once.

    So a feed-forward layer's first product has `out_axis_name="model"` and its second
    `in_axis_name="model"`, as in Megatron.

    Reference: Unit Scaling (Blake et al., 2023), table A.2; u-muP, table 2.
    """
    axes = axes_of("axis", axis, x.ndim)
    batch = tuple(range(batch_axes))
    contracted = tuple(range(batch_axes, batch_axes + len(axes)))
    numbers = ((axes, contracted), (batch, batch))
    product = given_options(
        ft.partial(dot_general, dimension_numbers=numbers),
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    y = in_formats(product, formats)(x, kernel)
    return y if bias is None else y + bias


def given_options(
    product: Callable[..., Array],
    *,
    precision: Any,
    preferred_element_type: DTypeLike | None,
    out_sharding: Any = None,
) -> Callable[[Array, Array], Array]:
    """A product, maybe a user's own, with the options that are not None.

    As in Flax it need not know the others. Nor need it know `preferred_element_type`,
    which float16 sets by itself: then its operands are converted in its place.
    """
    options = {"precision": precision}
    if out_sharding is not None:
        options["out_sharding"] = out_sharding
    if preferred_element_type is None:
        return ft.partial(product, **options)
    if _takes(product, "preferred_element_type"):
        return ft.partial(
            product, preferred_element_type=preferred_element_type, **options
        )

    def of_converted(lhs: Array, rhs: Array) -> Array:
        wide = jnp.result_type(lhs, rhs, preferred_element_type)
        y = product(lhs.astype(wide), rhs.astype(wide), **options)
        return y.astype(preferred_element_type)

    return of_converted


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some of those written in C have none
        return True
    return keyword in parameters or any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )


@scaled_op(
    rule=_linear_rule,
    parameters=("kernel", "bias"),
    cases=_LINEAR_CASES,
    unscaled=("out",),
    fwd_power=2,
)
def linear_readout(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    *,
    axis: int | Sequence[int] = -1,
    dot_general: DotGeneral = lax.dot_general,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    formats: Formats | None = None,
    constraint: Constraint | None = None,
    batch_axis_name: AxisName | None = None,
    in_axis_name: AxisName | None = None,
    out_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled `linear` for a model's last product, the way to its logits.

    Factors: 1/in forward, so that logits start small at every width and learn at a rate
    independent of it; out^-1/2 for `x`, batch^-1/2 for `kernel` and `bias`.
    Unconstrained by default: sound where every path to the loss leads through it, as
    after the last residual. `formats` as in `linear`.

    Reference: u-muP (Blake et al., 2024), table 2, output weights.
    """
    return linear.fn(
        x,
        kernel,
        bias,
        axis=axis,
        dot_general=dot_general,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        formats=formats,
    )


def _matmul_rule(x: Any, y: Any, **_: Any) -> Factors:
    contracted = x.shape[-1] if x.shape else None
    if contracted is None or not y.shape or contracted != y.shape[-2:][0]:
        raise ValueError(
            "`x` [..., m, k] and `y` [..., k, n] must agree on k, got shapes "
            f"{x.shape} and {y.shape}."
        )
    try:
        out = math.prod(jax.eval_shape(jnp.matmul, x, y).shape)
    except (TypeError, ValueError) as e:
        raise ValueError(
            "the leading axes of `x` and `y` must be broadcastable, got shapes "
            f"{x.shape} and {y.shape}."
        ) from e
    return factors_of_sum(
        out * contracted, out=out, x=math.prod(x.shape), y=math.prod(y.shape)
    )


@scaled_op(
    rule=_matmul_rule,
    cases=(
        case((256, 512), (512, 128)),
        case((8, 64, 128), (8, 128, 96)),
        case((8, 64, 128), (128, 96)),
    ),
)
def matmul(
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `jnp.matmul` of two activations, x [..., m, k] and y [..., k, n].

    Factors: k^-1/2 forward, n^-1/2 for `x`, m^-1/2 for `y`, each times (extent)^-1/2
    for the leading axes along which it is broadcast. `formats` as in `linear`.

    Reference: Unit Scaling (Blake et al., 2023), table A.2.
    """
    product = ft.partial(
        jnp.matmul, precision=precision, preferred_element_type=preferred_element_type
    )
    return in_formats(product, formats)(x, y)


def _einsum_rule(subscripts: str, x: Any, y: Any, **_: Any) -> Factors:
    labelled, out = _parse(subscripts, x.shape, y.shape)
    sizes: dict[str | int, int] = {}
    for label, size in labelled:
        known = sizes.setdefault(label, size)
        # Axes under the ellipsis are broadcast, as in NumPy.
        if known != size and not (isinstance(label, int) and 1 in (known, size)):
            raise ValueError(
                f"`subscripts` {subscripts!r} give axis {label!r} two sizes, {known} "
                f"and {size}, for `x` of shape {x.shape} and `y` of shape {y.shape}."
            )
        sizes[label] = max(known, size)
    # By label: of an axis that is named twice the diagonal alone is read.
    each = dict(labelled[: len(x.shape)]), dict(labelled[len(x.shape) :])
    return factors_of_sum(
        math.prod(sizes.values()),
        out=math.prod(sizes[label] for label in out),
        x=math.prod(each[0].values()),
        y=math.prod(each[1].values()),
    )


def _parse(
    subscripts: str, *shapes: tuple[int, ...]
) -> tuple[list[tuple[str | int, int]], list[str | int]]:
    """Each operand axis's label and size, and the output's labels.

    Axes under an ellipsis are labelled by their distance from its end.
    """
    operands, arrow, result = subscripts.replace(" ", "").partition("->")
    terms = operands.split(",")
    if len(terms) != 2 or not arrow:
        raise ValueError(
            "`subscripts` must name two operands and an output, as in "
            f"'...i,ij->...j', got {subscripts!r}."
        )
    labelled: list[tuple[str | int, int]] = []
    for term, shape in zip(terms, shapes, strict=True):
        labels = list(_labels(term, len(shape)))
        if len(labels) != len(shape):
            raise ValueError(
                f"`subscripts` {subscripts!r} must name each axis of an operand, got "
                f"{term!r} for shape {shape}."
            )
        labelled += zip(labels, shape, strict=True)
    hidden = {label for label, _ in labelled if isinstance(label, int)}
    out = list(_labels(result, len(result.replace("...", "")) + len(hidden)))
    if unknown := {*out} - {label for label, _ in labelled}:
        raise ValueError(
            f"`subscripts` {subscripts!r} must take its output from the operands, got "
            f"{sorted(map(str, unknown))} beside them."
        )
    return labelled, out


def _labels(term: str, rank: int) -> Iterator[str | int]:
    before, ellipsis, after = term.partition("...")
    yield from before
    if ellipsis:
        yield from range(rank - len(before) - len(after), 0, -1)
    yield from after


@scaled_op(
    rule=_einsum_rule,
    cases=(
        case("bqhd,bkhd->bhqk", (4, 32, 4, 64), (4, 48, 4, 64)),
        case("...i,ij->...j", (8, 64, 128), (128, 96)),
        case("...ij,...jk->...ik", (8, 64, 128), (1, 128, 96)),
    ),
)
def einsum(
    subscripts: str,
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
) -> Float[Array, "..."]:
    """Unit-scaled `jnp.einsum` of two activations; `subscripts` name the output too.

    Factors: each of the output, `x` and `y` has (the product of the sizes of the labels
    that it lacks)^-1/2: in "bmk,kn->bmn", k^-1/2, n^-1/2 for `x`, (b m)^-1/2 for `y`.
    An operand that names a label twice has that scale on the diagonal, which is read.

    `formats` as in `linear`, but native ones are simulated, which a warning says once,
    where this is not one dot: a label that one operand alone has is summed over first.
    """
    product = ft.partial(
        jnp.einsum,
        subscripts,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return in_formats(product, formats)(x, y)


def _einsum_linear_rule(
    subscripts: str, x: Any, kernel: Any, bias: Any = None, **_: Any
) -> Factors:
    factors = _einsum_rule(subscripts, x, kernel)
    bwd = {"x": factors.bwd["x"], "kernel": factors.bwd["y"]}
    if bias is None:
        return Factors(factors.fwd, bwd)
    out = jax.eval_shape(ft.partial(jnp.einsum, subscripts), x, kernel).shape
    check_broadcast("bias", bias, out)
    size = math.prod(out)
    shared = math.sqrt(math.prod(bias.shape) / size) if size else 1.0
    return Factors(factors.fwd, bwd | {"bias": shared})


@scaled_op(
    rule=_einsum_linear_rule,
    parameters=("kernel", "bias"),
    cases=(
        case("bqhd,bkhd->bhqk", (4, 32, 4, 64), (4, 48, 4, 64)),
        case("...i,ij->...j", (8, 64, 128), (128, 4096), Zeros((4096,))),
        case("bhd,hde->beh", (64, 32, 64), (32, 64, 96), Zeros((96, 32))),
    ),
)
def einsum_linear(
    subscripts: str,
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None = None,
    *,
    einsum: Callable[..., Array] = jnp.einsum,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
    batch_axis_name: AxisName | None = None,
    in_axis_name: AxisName | None = None,
    out_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Unit-scaled `jnp.einsum` of an activation and a parameter, plus `bias`.

    `bias` is broadcast to the output; `einsum` computes the plain product. Factors: as
    `einsum`, with `kernel`'s, a parameter's, left out of the constraint; for `bias`
    (its size / the output's)^1/2. `formats` as in `einsum`.
    """
    product = given_options(
        ft.partial(einsum, subscripts),
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    y = in_formats(product, formats)(x, kernel)
    return y if bias is None else y + bias


def einsum_fan_in(subscripts: str, kernel_shape: Sequence[int]) -> int:
    """The length of the kernel's contracted axes: its labels that the output lacks."""
    term, _, result = subscripts.replace(" ", "").partition(",")[2].partition("->")
    labels = [*_labels(term, len(kernel_shape))]
    if len(labels) != len(kernel_shape):
        raise ValueError(
            "`einsum_str` must name the axes of an input and of a kernel of shape "
            f"{tuple(kernel_shape)}, as in '...i,ij->...j', got {subscripts!r}."
        )
    sizes = dict(zip(labels, kernel_shape, strict=True))
    return math.prod(
        size
        for label, size in sizes.items()
        if isinstance(label, str) and label not in result
    )


def _ragged_dot_rule(
    lhs: Any, rhs: Any, group_sizes: Any, *_: Any, **__: Any
) -> Factors:
    shapes = f"{lhs.shape} and {rhs.shape}"
    if len(lhs.shape) != 2 or len(rhs.shape) != 3 or lhs.shape[1] != rhs.shape[1]:
        raise ValueError(
            "`lhs` must be [m, k] and `rhs` [groups, k, n] with the same k, got shapes "
            f"{shapes}."
        )
    if group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"`group_sizes` must have the shape {rhs.shape[:1]}, one size for each "
            f"group of `rhs` {rhs.shape}, got {group_sizes.shape}."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(
            f"`group_sizes` must be an array of integers, got {group_sizes.dtype}."
        )
    (m, k), n = lhs.shape, rhs.shape[2]
    return factors_of_sum(m * k * n, out=m * n, lhs=m * k, rhs=math.prod(rhs.shape))


@scaled_op(
    rule=_ragged_dot_rule,
    parameters=("rhs",),
    cases=(
        case((256, 64), (4, 64, 96), np.array([64, 64, 64, 64])),
        case((384, 128), (4, 128, 48), np.array([200, 0, 56, 128])),
    ),
)
def ragged_dot(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "groups k n"],
    group_sizes: Integer[Array, " groups"],
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    formats: Formats | None = None,
    constraint: Constraint | None = to_output_scale,
    batch_axis_name: AxisName | None = None,
    in_axis_name: AxisName | None = None,
    out_axis_name: AxisName | None = None,
) -> Float[Array, "m n"]:
    """Unit-scaled `jax.lax.ragged_dot`: each group of rows times its own matrix.

    The first `group_sizes[0]` rows of `lhs` are multiplied by `rhs[0]`, the next by
    `rhs[1]` and so on; the sizes add up to m. `rhs` is a parameter. Factors: k^-1/2
    forward, n^-1/2 for `lhs`, (m / groups)^-1/2 for `rhs`.

    The sizes are values and no factor can depend on them, so the last is that of
    balanced groups. It is right for any: a matrix with s rows has a gradient of scale
    (s groups / m)^1/2, whose mean square over the groups is 1.

    `formats` round the operands, and the output's cotangent. Native ones are simulated,
    which a warning says once: XLA has no 8-bit kernel for it and its gradients.

    `jax.vmap` needs a leading axis on all three arrays, as lax does. lax's
    `group_offset` is left out: JAX has not implemented it.
    """
    product = ft.partial(
        lax.ragged_dot,
        group_sizes=jnp.asarray(group_sizes),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return in_formats(product, formats)(lhs, rhs)
