"""Properties of every operation and function, over shapes, axes, dtypes and options.

Most are checked on shapes alone (`jax.eval_shape` compiles nothing), so that many can
be tried; the few on numbers are compiled once for each example.
"""

import inspect
import math
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

import jax_unit_scaling as jus
from jax_unit_scaling.formats import E2M1, Format
from jax_unit_scaling.op import OPS

# The same examples in each run, so that a failure is that of a change.
EXACT = settings(max_examples=3, deadline=None, derandomize=True, database=None)
SHAPES = settings(EXACT, max_examples=8)
BITS = settings(EXACT, max_examples=20)

SIZE = st.integers(1, 4)
DTYPE = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])


class Ids(tuple):
    """The shape of an argument of integers below 3."""


class Key:
    """An argument that is a random key."""


# ---- strategies: the arguments (a tuple is a shape) and options of each operation


def shapes(low=0, high=3, **size):
    return st.lists(
        SIZE if not size else st.integers(**size), min_size=low, max_size=high
    ).map(tuple)


BATCH = shapes(0, 2)


@st.composite
def _elementwise(draw, arrays=1, **options):
    shape = draw(shapes(0, 3, min_value=0, max_value=4))
    chosen = {
        name: draw(value) for name, value in options.items() if draw(st.booleans())
    }
    return (shape,) * arrays, chosen


MULT = st.sampled_from([0.25, 0.5, 2.0])


@st.composite
def _prelu(draw):
    shape = draw(shapes(1, 3))
    slope = tuple(draw(st.sampled_from([1, n])) for n in shape)
    return (shape, slope[draw(st.integers(0, len(slope))) :]), {}


@st.composite
def _broadcast(draw):
    shape = draw(shapes(1, 3))
    other = tuple(draw(st.sampled_from([1, n])) for n in shape)
    args = [shape, other[draw(st.integers(0, len(other))) :]]
    return tuple(draw(st.permutations(args))), {}


@st.composite
def _reduction(draw):
    shape = draw(shapes(1, 3, min_value=0, max_value=4))
    axes = st.integers(-len(shape), len(shape) - 1)
    many = st.lists(axes, unique_by=lambda a: a % len(shape), max_size=3).map(tuple)
    axis = draw(st.none() | axes | many)
    return (shape,), {"axis": axis, "keepdims": draw(st.booleans())}


@st.composite
def _dot_general(draw):
    """Axes of all kinds, in any order."""
    batch, contract, left, right = (draw(shapes(0, 2)) for _ in range(4))
    shape, numbers = [], []
    for free in (left, right):
        sizes = [*batch, *contract, *free]
        order = draw(st.permutations(range(len(sizes))))
        shape.append(tuple(sizes[i] for i in order))
        place = [order.index(i) for i in range(len(sizes))]
        b, c = len(batch), len(contract)
        numbers.append((tuple(place[b : b + c]), tuple(place[:b])))
    (lc, lb), (rc, rb) = numbers
    return (*shape, ((lc, rc), (lb, rb))), {}


@st.composite
def _linear(draw):
    shape, axis = draw(shapes(1, 3)), -1
    if len(shape) > 1 and draw(st.booleans()):
        axes = draw(st.permutations(range(len(shape))))[: draw(st.integers(1, 2))]
        axis = tuple(a - len(shape) if draw(st.booleans()) else a for a in axes)
    fan_in = tuple(shape[a] for a in ((axis,) if axis == -1 else axis))
    out = draw(shapes(0, 2))
    bias = (out,) if draw(st.booleans()) else ()
    return (shape, fan_in + out, *bias), {"axis": axis}


@st.composite
def _matmul(draw):
    m, k, n, b = (draw(SIZE) for _ in range(4))
    left, right = draw(
        st.sampled_from([((), ()), ((b,), (b,)), ((b,), ()), ((), (b,)), ((b,), (1,))])
    )
    return ((*left, m, k), (*right, k, n)), {}


@st.composite
def _einsum(draw, parameter=False):
    sizes = {label: draw(SIZE) for label in "abcd"}
    x, y = (draw(st.permutations("abcd"))[: draw(st.integers(1, 3))] for _ in range(2))
    out = [c for c in "abcd" if c in {*x, *y} and draw(st.booleans())]
    subscripts = f"{''.join(x)},{''.join(y)}->{''.join(out)}"
    bias = [tuple(sizes[c] for c in out)] if parameter and draw(st.booleans()) else []
    return (subscripts, *(tuple(sizes[c] for c in t) for t in (x, y)), *bias), {}


@st.composite
def _ragged_dot(draw):
    k, n, groups = (draw(SIZE) for _ in range(3))
    sizes = draw(st.lists(st.integers(0, 3), min_size=groups, max_size=groups))
    assume(sum(sizes))
    return ((sum(sizes), k), (groups, k, n), np.array(sizes)), {}


@st.composite
def _conv(draw, transposed=False):
    rank, groups = draw(st.integers(1, 2)), 1 if transposed else draw(st.integers(1, 2))
    each = lambda low, high: draw(st.tuples(*rank * [st.integers(low, high)]))
    d_in, d_out = draw(SIZE), groups * draw(SIZE)
    options = {"strides": each(1, 3), "kernel_dilation": each(1, 2)}
    names = ["SAME", "VALID", "CIRCULAR", *([] if transposed else ["REFLECT"])]
    if rank == 1 and not transposed:
        names.append("CAUSAL")
    options["padding"] = draw(st.sampled_from([*names, 1, (rank * ((1, 2),))]))
    if transposed:
        options["transpose_kernel"] = draw(st.booleans())
    else:
        options["feature_group_count"] = groups
        if not isinstance(options["padding"], str):
            options["input_dilation"] = each(1, 2)
    kernel = (
        *each(1, 3),
        *((d_out, d_in) if options.get("transpose_kernel") else (d_in, d_out)),
    )
    # Larger than any window spans, as REFLECT and VALID need.
    x = (*draw(BATCH), *each(5, 7), d_in * groups)
    return (x, kernel, *([(d_out,)] if draw(st.booleans()) else [])), options


@st.composite
def _pool(draw, average=False):
    rank = draw(st.integers(1, 2))
    each = lambda low, high: draw(st.tuples(*rank * [st.integers(low, high)]))
    options = {"window_shape": each(1, 3), "strides": each(1, 3)}
    options["padding"] = draw(st.sampled_from(["SAME", "VALID", "SAME_LOWER", "same"]))
    if average:
        options["count_include_pad"] = draw(st.booleans())
    return ((*draw(BATCH), *each(3, 5), draw(SIZE)),), options


@st.composite
def _norm(draw, parameters=2):
    shape = (*draw(BATCH), draw(st.integers(2, 5)))
    count = draw(st.integers(0, parameters))
    return (shape, *count * [shape[-1:]]), {}


@st.composite
def _group_norm(draw):
    groups, size = draw(SIZE), draw(st.integers(2, 3))
    shape = (draw(SIZE), *draw(BATCH), groups * size)
    by = draw(
        st.sampled_from(
            [{"num_groups": groups}, {"num_groups": None, "group_size": size}]
        )
    )
    return (shape, *draw(st.integers(0, 2)) * [shape[-1:]]), by


@st.composite
def _softmax(draw):
    shape = draw(shapes(1, 3, min_value=2, max_value=4))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    return (shape,), {"axis": axis, "mult": draw(st.sampled_from([0.5, 1.0]))}


@st.composite
def _attention(draw):
    batch, kv, group = draw(BATCH), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, keys = draw(st.sampled_from([(3, 3), (2, 4), (1, 2)]))
    causal = draw(st.booleans())
    key = (*batch, keys, kv, 4)
    options = {"is_causal": causal, "mult": draw(st.sampled_from([0.5, 1.0]))}
    return ((*batch, queries, kv * group, 4), key, key), options


@st.composite
def _rotary(draw):
    shape = (*draw(BATCH), draw(SIZE), draw(SIZE), 2 * draw(SIZE))
    return (shape, *([Ids(shape[-3:-2])] if draw(st.booleans()) else [])), {}


@st.composite
def _dropout(draw):
    shape = draw(shapes(1, 3))
    dims = draw(st.sampled_from([(), (0,), (-1,)]))
    return (shape, Key()), {
        "rate": draw(st.sampled_from([0.0, 0, 0.5])),
        "broadcast_dims": dims,
    }


STRATEGIES = {
    "relu": _elementwise(),
    "prelu": _prelu(),
    "leaky_relu": _elementwise(negative_slope=st.sampled_from([0.0, 0.2])),
    "elu": _elementwise(alpha=st.sampled_from([0.5, 2.0])),
    "selu": _elementwise(),
    "celu": _elementwise(alpha=st.sampled_from([0.5, 2.0])),
    "gelu": _elementwise(mult=MULT, approximate=st.booleans()),
    "silu": _elementwise(mult=MULT),
    "tanh": _elementwise(mult=MULT),
    "sigmoid": _elementwise(mult=MULT),
    "softplus": _elementwise(mult=MULT),
    "mish": _elementwise(mult=MULT),
    "hard_tanh": _elementwise(mult=MULT),
    "squareplus": _elementwise(b=st.sampled_from([1.0])),
    "silu_glu": _elementwise(2, mult=MULT),
    "gelu_glu": _elementwise(2, mult=MULT),
    "gated": _elementwise(2, gate_fn=st.sampled_from([jax.nn.hard_sigmoid])),
    "add": _broadcast(),
    "multiply": _broadcast(),
    "sum": _reduction(),
    "mean": _reduction(),
    "dot_general": _dot_general(),
    "linear": _linear(),
    "linear_readout": _linear(),
    "matmul": _matmul(),
    "einsum": _einsum(),
    "einsum_linear": _einsum(parameter=True),
    "ragged_dot": _ragged_dot(),
    "conv": _conv(),
    "conv_transpose": _conv(transposed=True),
    "avg_pool": _pool(average=True),
    "max_pool": _pool(),
    "layer_norm": _norm(),
    "rms_norm": _norm(parameters=1),
    "group_norm": _group_norm(),
    "embedding": st.tuples(SIZE, BATCH).map(lambda d: (((3, d[0]), Ids(d[1])), {})),
    "softmax": _softmax(),
    "dot_product_attention": _attention(),
    "rotary": _rotary(),
    "dropout": _dropout(),
}


def test_every_operation_has_a_strategy():
    missing = "\n".join(
        f'    "{name}": _elementwise(),' for name in {*OPS} - {*STRATEGIES}
    )
    assert not missing, (
        f"add to STRATEGIES of {__file__}, with its arguments:\n{missing}"
    )
    assert {*STRATEGIES} == {*OPS}


EVERY = pytest.mark.parametrize("name", STRATEGIES)


def _examples(name):
    return STRATEGIES[name]


def _is_shape(spec):
    return type(spec) is tuple and all(isinstance(n, int) for n in spec)


def _array(spec, rng, dtype=np.float32):
    if isinstance(spec, Ids):
        return rng.integers(0, 3, spec)
    if isinstance(spec, Key):
        return jax.random.key(0)
    return jnp.asarray(rng.normal(size=spec), dtype) if _is_shape(spec) else spec


def _arrays(specs, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [_array(spec, rng, dtype) for spec in specs]


def _of_floats(fn, args, options):
    """`fn` as a function of its floating-point arrays alone, and these."""
    at = [
        i
        for i, a in enumerate(args)
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.floating)
    ]

    def call(*floats):
        full = list(args)
        for i, x in zip(at, floats, strict=True):
            full[i] = x
        return fn(*full, **options)

    return call, [args[i] for i in at]


def _about(tree):
    return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


# ---- properties of every operation


@EVERY
@SHAPES
@given(data=st.data())
def test_shapes_and_dtypes_are_the_plain_functions_and_factors_are_finite(name, data):
    op = OPS[name]
    specs, options = data.draw(_examples(name))
    dtype = data.draw(DTYPE)
    args = _arrays(specs, dtype=dtype)
    call, floats = _of_floats(op, args, options)
    plain, _ = _of_floats(op.fn, args, options)

    def both_passes(*floats):
        y, vjp = jax.vjp(call, *floats)
        return y, vjp(jnp.ones_like(y))

    got, gradients = jax.eval_shape(both_passes, *floats)
    assert _about(got) == [(jax.eval_shape(plain, *floats).shape, dtype)]
    assert _about(gradients) == _about(floats)
    factors = op.factors(*args, **options)
    assert all(math.isfinite(f) and f > 0 for f in (factors.fwd, *factors.bwd.values()))


@EVERY
@EXACT
@given(data=st.data())
def test_output_and_gradients_are_the_plain_ones_times_the_factors(name, data):
    op = OPS[name]
    specs, options = data.draw(_examples(name))
    args = _arrays(specs)
    factors = op.factors(*args, **options)
    named = [n for n in factors.bwd if n in op._signature.parameters]
    call, floats = _of_floats(op, args, options)
    plain, _ = _of_floats(op.fn, args, options)
    rng = np.random.default_rng(1)
    shape = jax.eval_shape(plain, *floats).shape
    g = jnp.asarray(rng.normal(size=shape), jnp.float32)

    @jax.jit
    def run(g, *floats):
        passes = (jax.vjp(f, *floats) for f in (call, plain))
        return [(y, vjp(g)) for y, vjp in passes]

    (y, grads), (want, trues) = run(g, *floats)
    bias = "bias" in op.parameters and "bias" in named
    if not bias:  # which is added behind the factor
        np.testing.assert_allclose(y, factors.fwd * want, rtol=1e-4, atol=1e-5)
    for parameter, grad, true in zip(named, grads, trues, strict=True):
        factor = factors.bwd[parameter]
        if parameter not in op.parameters and name != "linear_readout":
            np.testing.assert_allclose(factor, factors.fwd)  # a true gradient
        np.testing.assert_allclose(grad, factor * true, rtol=1e-4, atol=2e-5 * factor)


# lax maps `ragged_dot` over all three arguments only.
@pytest.mark.parametrize("name", sorted({*STRATEGIES} - {"ragged_dot"}))
@settings(EXACT, max_examples=1)
@given(data=st.data())
def test_vmap_is_a_loop_and_jit_changes_nothing(name, data):
    op = OPS[name]
    specs, options = data.draw(_examples(name))
    one, two = (_arrays(specs, seed) for seed in (0, 1))
    call, first = _of_floats(op, one, options)
    second = _of_floats(op, two, options)[1]
    looped = np.stack([call(*first), call(*second)])
    mapped = jax.jit(jax.vmap(call))(*map(lambda *x: np.stack(x), first, second))
    np.testing.assert_allclose(mapped, looped, rtol=1e-4, atol=1e-5)


# ---- exact counts: an expected square is a number of terms, where all factors are one

COUNTED = [
    "dot_general",
    "linear",
    "linear_readout",
    "matmul",
    "einsum",
    "einsum_linear",
    "conv",
    "conv_transpose",
    "multiply",
    "sum",
    "ragged_dot",
]


@pytest.mark.parametrize("name", COUNTED)
@settings(EXACT, max_examples=10)
@given(data=st.data())
def test_factors_are_those_of_a_count_of_all_products(name, data):
    """Of ones a multilinear operation makes the number of products it adds up.

    With independent unit-normal inputs that number is the expected sum of squares of
    the output, and of each cotangent.
    """
    op = OPS[name]
    specs, options = data.draw(_examples(name))
    args = [jnp.asarray(np.ones(s, np.float32)) if _is_shape(s) else s for s in specs]
    bias = (
        list(op._signature.parameters).index("bias") if "bias" in op.parameters else 99
    )
    y = np.asarray(op.fn(*args[:bias], **options))
    assume(y.sum() > 0)
    factors = op.factors(*args, **options, constraint=None)
    power = 2 if name == "linear_readout" else 1
    np.testing.assert_allclose(factors.fwd, np.sqrt(y.size / y.sum()) ** power)
    for parameter, factor in factors.bwd.items():
        if parameter == "bias":  # each number is added to so many outputs
            want = np.sqrt(args[bias].size / y.size)
        else:
            at = list(op._signature.parameters).index(parameter)
            want = np.sqrt(args[at].size / y.sum())
        np.testing.assert_allclose(factor, want, err_msg=parameter)


LINEAR = ["add", "mean", "avg_pool", "rotary"]


@pytest.mark.parametrize("name", LINEAR)
@settings(EXACT, max_examples=5)
@given(data=st.data())
def test_factors_are_those_of_the_jacobians_squares(name, data):
    """Of a linear operation the sum of the squares of its Jacobian says all."""
    op = OPS[name]
    specs, options = data.draw(_examples(name))
    args = _arrays(specs)
    plain, floats = _of_floats(op.fn, args, options)
    jacobians = jax.jit(jax.jacobian(plain, range(len(floats))))(*floats)
    squares = [float(jnp.sum(j * j)) for j in jacobians]
    outputs = plain(*floats).size
    assume(outputs and all(squares))
    free = {} if name == "rotary" else {"constraint": None}
    factors = op.factors(*args, **options, **free)
    if not (name == "add" and 1 in [x.size for x in floats]):  # it shifts, not scales
        np.testing.assert_allclose(
            factors.fwd, np.sqrt(outputs / sum(squares)), rtol=1e-5
        )
    for factor, x, square in zip(factors.bwd.values(), floats, squares, strict=True):
        np.testing.assert_allclose(factor, np.sqrt(x.size / square), rtol=1e-5)


# ---- axes


@pytest.mark.parametrize("name", ["softmax", "sum", "mean", "linear"])
@SHAPES
@given(data=st.data())
def test_an_axis_may_be_counted_from_either_end(name, data):
    specs, options = data.draw(_examples(name))
    axis, rank = options["axis"], len(specs[0])
    assume(axis is not None and np.ndim(axis) == 0 or name == "linear")
    turned = tuple(
        a + rank if a < 0 else a - rank for a in np.atleast_1d(axis).tolist()
    )
    other = options | {"axis": turned if np.ndim(axis) else turned[0]}
    args = _arrays(specs)
    op = OPS[name]
    assert op.factors(*args, **options) == op.factors(*args, **other)
    texts = [
        str(jax.make_jaxpr(lambda *a, o=o: op(*a, **o))(*args))
        for o in (options, other)
    ]
    assert texts[0] == texts[1]


# ---- arguments that are wrong

NOT_AN_ARRAY = ["x", [1.0], object()]
# What no annotated option can be.
NOT_AN_OPTION = [object(), "nonsense", math.nan, (0.5, "a"), 1j]
# Checked elsewhere or not at all: functions, lax's own options, and hints to sharding.
UNCHECKED = {
    "precision",
    "preferred_element_type",
    "out_sharding",
    "batch_axis_name",
    "subscripts",
}


def _assert_refused(call, fn_name, names):
    """`call` raises, here and not in JAX, an error with an argument in backticks."""
    with pytest.raises((TypeError, ValueError), match="`|" + fn_name) as caught:
        call()
    last = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert "jax_unit_scaling" in last, f"{fn_name}: {caught.value!r} from {last}"
    said = {
        word
        for quote in re.findall(r"`([^`]*)`", str(caught.value))
        for word in re.findall(r"\w+", quote)
    }
    assert said & {*names}, f"{fn_name}: {caught.value!r} names none of {names}"


@EVERY
@settings(EXACT, max_examples=8)
@given(data=st.data())
def test_what_is_no_array_of_its_kind_is_refused_by_name(name, data):
    op = OPS[name]
    specs, options = data.draw(_examples(name))
    args = _arrays(specs)
    parameters = list(op._signature.parameters)
    at = data.draw(
        st.sampled_from([i for i, s in enumerate(specs) if not isinstance(s, str)])
    )
    wrong = data.draw(st.sampled_from(NOT_AN_ARRAY))
    if _is_shape(specs[at]) and type(specs[at]) is tuple and data.draw(st.booleans()):
        wrong = jnp.ones(specs[at], data.draw(st.sampled_from([int, bool, complex])))
    args[at] = wrong
    _assert_refused(lambda: op(*args, **options), name, [parameters[at]])


@EVERY
@settings(EXACT, max_examples=12)
@given(data=st.data())
def test_an_option_of_another_type_or_without_a_name_is_refused(name, data):
    op = OPS[name]
    specs, options = data.draw(_examples(name))
    args = _arrays(specs)
    _assert_unknown_is_refused(op, args, options)
    known = [
        p.name
        for i, p in enumerate(op._signature.parameters.values())
        if i >= len(args)
        and p.default is not None
        and p.name not in UNCHECKED
        or p.name in ("constraint", "formats")
    ]
    if known:
        option = data.draw(st.sampled_from(known))
        wrong = data.draw(st.sampled_from(NOT_AN_OPTION))
        # An unconstrained operation of one factor calls no gate function by name.
        call = lambda: op(*args, **options | {option: wrong})
        _assert_refused(call, name, [option])


def _assert_unknown_is_refused(op, args, options):
    with pytest.raises(TypeError, match=f"{op.__name__}.*no_such_option"):
        op(*args, **options, no_such_option=1)


# Operations that take any shape of one array have none that does not fit.
FITTED = sorted(
    {*STRATEGIES} - {"sum", "mean", "rotary", "dropout", "softmax", "embedding"}
)
FITTED = [n for n in FITTED if len(inspect.signature(OPS[n].fn).parameters) > 1]


@pytest.mark.parametrize("name", FITTED)
@settings(EXACT, max_examples=10)
@given(data=st.data())
def test_a_shape_that_does_not_fit_is_refused_by_name_or_computed_as_the_plain(
    name, data
):
    """One axis is made longer, dropped, or emptied. If the plain function takes it, so
    does the operation, or it says why not."""
    op = OPS[name]
    specs, options = data.draw(_examples(name))
    places = [i for i, s in enumerate(specs) if _is_shape(s) and s]
    assume(places)
    at = data.draw(st.sampled_from(places))
    shape = list(specs[at])
    axis = data.draw(st.integers(0, len(shape) - 1))
    match data.draw(st.sampled_from(["longer", "dropped", "empty"])):
        case "longer":
            shape[axis] += 5
        case "dropped":
            del shape[axis]
        case "empty":
            shape[axis] = 0
    specs = [*specs[:at], tuple(shape), *specs[at + 1 :]]
    args = _arrays(specs)
    call, floats = _of_floats(op, args, options)
    plain, _ = _of_floats(op.fn, args, options)
    try:
        got = jax.eval_shape(call, *floats)
    except Exception:  # whatever it is, it must be ours
        _assert_refused(lambda: op(*args, **options), name, op._signature.parameters)
    else:
        assert got.shape == jax.eval_shape(plain, *floats).shape


# ---- formats

FORMAT = st.tuples(st.integers(2, 6), st.integers(1, 8)).map(lambda bits: Format(*bits))
PRESET = st.sampled_from([jus.E4M3, jus.E5M2, jus.FP16, E2M1])
NUMBERS = st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8).map(
    lambda codes: np.array(codes, np.uint32).view(np.float32)
)
SMALL = st.lists(st.floats(-40, 40, width=32), min_size=8, max_size=8).map(
    lambda x: np.array(x, np.float32)
)


def _neighbours(x, f):
    """The numbers of `f` around those in its range, by their spacing, in float64."""
    exponent = np.maximum(np.frexp(np.abs(x))[1] - 1, f.min_exponent)
    quantum = 2.0 ** (exponent - f.mantissa_bits)
    return np.floor(x / quantum) * quantum, np.ceil(x / quantum) * quantum


@BITS
@given(f=FORMAT, x=SMALL | NUMBERS)
def test_rounding_is_to_the_nearest_is_odd_monotone_and_leaves_numbers_alone(f, x):
    x = np.sort(x[~np.isnan(x)])
    y = np.asarray(jus.quantize(jnp.asarray(x), f))
    np.testing.assert_array_equal(jus.quantize(jnp.asarray(y), f), y)
    np.testing.assert_array_equal(-y, jus.quantize(jnp.asarray(-x), f))
    assert (np.diff(y) >= 0).all()
    clipped = np.clip(x.astype(np.float64), -f.max, f.max)
    low, high = _neighbours(clipped, f)
    np.testing.assert_array_less(np.abs(y - clipped), (high - low) / 2 + 1e-300)


@BITS
@given(f=PRESET, x=NUMBERS | SMALL)
def test_any_bit_pattern_is_rounded_as_by_ml_dtypes(f, x):
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        want = np.clip(x, -f.max, f.max).astype(f.dtype).astype(np.float32)
    got = np.asarray(jus.quantize(jnp.asarray(x), f))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@BITS
@given(f=FORMAT, x=SMALL, seed=st.integers(0, 99))
def test_stochastic_rounding_goes_to_one_of_two_neighbours(f, x, seed):
    y = np.asarray(jus.quantize(jnp.asarray(x), f, jax.random.key(seed)))
    low, high = _neighbours(np.clip(x.astype(np.float64), -f.max, f.max), f)
    assert ((y == low) | (y == high)).all()


# ---- plain functions on `scaled`


def _logits(rng, batch, classes):
    labels = jnp.asarray(rng.integers(0, classes, batch))
    return jnp.asarray(rng.normal(size=(*batch, classes)), jnp.float32), labels


def _targets(logits):
    return jax.nn.softmax(logits[..., ::-1])


LOSSES = {
    "cross_entropy": lambda x, labels, **k: jus.cross_entropy(x, labels, **k),
    "smooth": lambda x, labels, **k: jus.cross_entropy(
        x, labels, label_smoothing=0.1, z_loss=1e-3, **k
    ),
    "kl": lambda x, labels, **k: jus.kl_divergence(x, _targets(x), **k),
    "mse": lambda x, labels, **k: jus.mse_loss(x[..., 0], x[..., 1], **k),
    "huber": lambda x, labels, **k: jus.huber_loss(x[..., 0], x[..., 1], **k),
    "binary": lambda x, labels, **k: jus.binary_cross_entropy(
        x[..., 0], labels > 0, **k
    ),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@EXACT
@given(batch=shapes(0, 2), classes=st.integers(2, 4), seed=st.integers(0, 9))
def test_a_mean_is_the_sum_over_the_count_with_the_same_gradient(
    loss, batch, classes, seed
):
    x, labels = _logits(np.random.default_rng(seed), batch, classes)
    some = jnp.asarray(np.random.default_rng(seed + 1).integers(0, 2, batch), bool)

    @jax.jit
    def run(x):
        def both(where):
            f = lambda x, r: loss(x, labels, where=where, reduction=r)
            return [jax.value_and_grad(f)(x, r) for r in ("mean", "sum")]

        return both(None), both(some)

    counts = max(math.prod(batch), 1), max(int(some.sum()), 1)
    for count, ((mean, a), (total, b)) in zip(counts, run(x), strict=True):
        np.testing.assert_allclose(mean * count, total, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert not np.asarray(run(x)[1][0][1])[~np.asarray(some)].any()


@SHAPES
@given(tau=st.floats(0.1, 10), dtype=DTYPE, seed=st.integers(0, 9))
def test_a_residual_is_the_weighted_sum_and_its_gradient_true(tau, dtype, seed):
    x, f, g = (a.astype(dtype) for a in _arrays([(64,)] * 3, seed))
    y, vjp = jax.vjp(lambda x: jus.residual_apply(lambda x: x * f, x, tau=tau), x)
    wide = [np.asarray(a, np.float64) for a in (x, f, g)]
    weight = (tau * wide[1] + 1) / math.hypot(1, tau)
    # Each of x f, its product with a weight, the skip's, and two sums is rounded once,
    # by half an epsilon of itself: of |x f| + |x| at most, and one for the input's own.
    for got, of in ((y, wide[0]), (vjp(g)[0], wide[2])):
        bound = 3 * float(jnp.finfo(dtype).eps) * np.abs(of) * (np.abs(wide[1]) + 1)
        assert (np.abs(np.asarray(got, np.float64) - weight * of) <= bound).all()


@EXACT
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4))
def test_a_weighted_add_has_weights_of_unit_norm(weights):
    eye = jnp.eye(len(weights))
    y = jus.weighted_add(*eye, weights=weights)
    np.testing.assert_allclose(np.linalg.norm(y), 1, rtol=1e-5)
    np.testing.assert_allclose(y / y[0], np.array(weights) / weights[0], rtol=1e-5)


X = jnp.ones((2, 3))
FUNCTIONS = {
    "scaled": (lambda x, **k: jus.scaled(x, **k), {"fwd": 1.0, "bwd": 1.0}),
    "residual_split": (lambda x, **k: jus.residual_split(x, **k), {"tau": 1.0}),
    "residual_add": (lambda x, **k: jus.residual_add(x, X, **k), {"tau": 1.0}),
    "huber_loss": (lambda x, **k: jus.huber_loss(x, X, **k), {"delta": 1.0}),
    "cross_entropy": (
        lambda x, **k: jus.cross_entropy(x, jnp.zeros(2, int), **k),
        {"mult": 1.0},
    ),
    "kl_divergence": (lambda x, **k: jus.kl_divergence(x, X / 3, **k), {"mult": 1.0}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@EXACT
@given(
    wrong=st.sampled_from([math.nan, math.inf, 0.0, -1.0, "1", True, 1j, X]),
    data=st.data(),
)
def test_a_factor_that_is_none_is_refused_by_name(name, wrong, data):
    call, options = FUNCTIONS[name]
    call(X, **options)
    option = data.draw(st.sampled_from(sorted(options)))
    _assert_refused(lambda: call(X, **options | {option: wrong}), name, [option])
