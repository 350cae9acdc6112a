"""Every operation of the registry is held to one contract, on the cases it declares."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_unit_scaling as jus
from jax_unit_scaling.op import OPS, Constant, Integers, Key, Zeros

CASES = [
    pytest.param(op, c, id=f"{name}-{i}")
    for name, op in OPS.items()
    for i, c in enumerate(op.cases)
]
KEY = jax.random.key(0)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Half precision by each operation's first case; `-m slow` for the others.
IN_EACH_DTYPE = [
    pytest.param(
        op,
        c,
        dtype,
        id=f"{name}-{i}-{dtype.__name__}",
        marks=[pytest.mark.slow] if i and dtype != jnp.float32 else [],
    )
    for dtype in DTYPES
    for name, op in OPS.items()
    for i, c in enumerate(op.cases)
]
CONSTRAINABLE = [p for p in CASES if "constraint" in p.values[0]._signature.parameters]


def _argument(spec, random, dtype):
    # By NumPy: JAX would compile a program for each shape.
    match spec:
        case Integers():
            return jnp.asarray(random.integers(0, spec.high, spec.shape, np.int32))
        case Zeros():
            return jnp.asarray(np.zeros(spec.shape, dtype))
        case Constant():
            return jnp.asarray(np.full(spec.shape, spec.value, dtype))
        case Key():
            return KEY
        case tuple() if all(isinstance(n, int) for n in spec):
            return _normal(random, spec, dtype)
    return spec


def _normal(random, shape, dtype):
    return jnp.asarray(random.standard_normal(shape, np.float32).astype(dtype))


def _arguments(c, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    return [_argument(a, random, dtype) for a in c.args]


def _run(op, fns, c, dtype=jnp.float32):
    """Of each of `fns`, alike but for numbers, the output and the gradients by name,
    for unit-normal arguments."""
    args = _arguments(c, dtype)
    names = list(op.factors(*args, **c.options).bwd)
    positions = [list(op._signature.parameters).index(name) for name in names]

    def of_floats(fn):
        def of(*floats):
            full = list(args)
            for i, x in zip(positions, floats, strict=True):
                full[i] = x
            return fn(*full, **c.options)

        return jax.jit(of)

    @jax.jit
    def run(floats, cotangent):
        passes = []
        for f in jitted:
            out, vjp = jax.vjp(f, *floats)
            passes.append((out, dict(zip(names, vjp(cotangent), strict=True))))
        return passes

    jitted = [of_floats(fn) for fn in fns]
    floats = [args[i] for i in positions]
    out = jax.eval_shape(jitted[0], *floats)
    return run(floats, _normal(np.random.default_rng(1), out.shape, out.dtype))


def _scale(x, statistic="rms"):
    x = np.asarray(x, np.float64)
    return np.std(x) if statistic == "std" else np.sqrt(np.mean(x**2))


@pytest.mark.parametrize("op, c, dtype", IN_EACH_DTYPE)
def test_unconstrained_operation_has_unit_scale_in_both_passes(op, c, dtype):
    free = op.constrained(None) if "constraint" in op._signature.parameters else op
    ((out, grads),) = _run(op, [free], c, dtype)
    # The scale of n independent numbers has a standard error of (2 n)^-1/2; the cases
    # have 3,000 numbers or more in each tensor, so 0.05 is four of them.
    atol = 0.05 + c.error
    if "out" not in op.unscaled:
        np.testing.assert_allclose(_scale(out, op.statistic), 1, atol=atol)
    for name, grad in grads.items():
        np.testing.assert_allclose(_scale(grad), 1, atol=atol, err_msg=name)
        assert grad.dtype == out.dtype == dtype


@pytest.mark.parametrize("op, c", CASES)
def test_by_default_the_gradients_of_activations_are_true_up_to_one_constant(op, c):
    if op is OPS["linear_readout"]:  # at a cut-edge, unconstrained by default
        op_default = op.constrained(jus.to_output_scale)
    else:
        op_default = op
    fwd = op.factors(*_arguments(c), **c.options | _default(op)).fwd
    plainly = lambda *a, **k: fwd * op.fn(*a, **k)
    (_, grads), (_, plain) = _run(op, [op_default, plainly], c)
    for name in grads:
        got, true = (np.asarray(g[name], np.float64).ravel() for g in (grads, plain))
        cosine = got @ true / np.sqrt((got @ got) * (true @ true))
        np.testing.assert_allclose(cosine, 1, atol=1e-6, err_msg=name)
        if name not in op.parameters:  # for activations the constant is one
            # Terms reach 4.2^2 * 1.7 = 30 (two unit normals, a factor) and may cancel:
            # 16 roundings of 2^-24 of that.
            np.testing.assert_allclose(got, true, rtol=2e-4, atol=3e-5, err_msg=name)


def test_a_wider_bias_leaves_float16_its_range_and_promotes_as_in_the_plain_sum():
    x, kernel = jnp.full((8192, 2048), 8.0, "f2"), jnp.full((2048, 2), 8.0, "f2")

    def run(bias):
        y, vjp = jax.vjp(jax.jit(jus.linear), x, kernel, bias)
        return y, *vjp(jnp.full(y.shape, 2.0, y.dtype))

    for got, want in zip(run(jnp.zeros(2)), run(jnp.zeros(2, "f2")), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-3)  # float16's 2^-10, twice
        assert np.isfinite(np.asarray(got, np.float32)).all()
    y, _, _, of_bias = run(jnp.zeros(2))
    assert y.dtype == of_bias.dtype == jnp.float32
    assert jus.layer_norm(x[:2], None, jnp.zeros(2048)).dtype == jnp.float32


@pytest.mark.parametrize("number", [np.sqrt(4.0), np.float32(2), np.int64(2)])
def test_a_numpy_number_promotes_no_more_than_pythons(number):
    x = jnp.ones((4, 8), jnp.bfloat16)
    for call in (jus.gelu, jus.softmax):
        y = call(x, mult=number)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, call(x, mult=2.0))


def test_attention_of_an_empty_batch_with_a_bias_is_empty():
    x = jnp.zeros((0, 4, 2, 8))
    y = jus.dot_product_attention(x, x, x, None, jnp.zeros((2, 4, 4)))
    assert y.shape == x.shape


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: jus.scale_bwd(jnp.ones(2), "a"), TypeError, "`s` must be"),
        (lambda: jus.cross_entropy([[1.0, 2.0]], jnp.ones(1, int)), TypeError, "`logi"),
        (lambda: jus.residual_add(jnp.ones(2), jnp.ones(2, int)), TypeError, "`skip`"),
        (lambda: jus.unit_scaled("relu"), TypeError, "`f` must be a function"),
        (lambda: jus.unit_scaled(jnp.sin)(jnp.ones(2), w=[2.0]), TypeError, "`w` must"),
        (
            lambda: jus.linear(jnp.ones((2, 3)), jnp.ones((3, 4)), batch_axes=5),
            ValueError,
            "`batch_axes` must be",
        ),
    ],
)
def test_what_is_wrong_is_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


def _default(op):
    return {"constraint": jus.to_output_scale} if op is OPS["linear_readout"] else {}


@pytest.mark.parametrize("constraint", [jus.gmean, jus.hmean, jus.amean])
@pytest.mark.parametrize("op, c", CONSTRAINABLE)
def test_a_constraint_makes_the_factors_of_activations_agree(op, c, constraint):
    args = _arguments(c)
    free = op.factors(*args, **c.options, constraint=None)
    tied = op.factors(*args, **c.options, constraint=constraint)
    active = [name for name in free.bwd if name not in op.parameters]
    expected = constraint(free.fwd, *(free.bwd[name] for name in active))
    np.testing.assert_allclose([tied.fwd, *(tied.bwd[n] for n in active)], expected)
    for name in op.parameters:
        assert tied.bwd.get(name) == free.bwd.get(name)


def _turned(x, positions, base):
    """Rotary positions by complex numbers."""
    half = x.shape[-1] // 2
    if positions is None:
        positions = np.arange(x.shape[-3])
    turn = np.exp(
        1j * np.asarray(positions)[..., None, None] * base ** (-np.arange(half) / half)
    )
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return jnp.concatenate([z.real, z.imag], -1)


def _module(cls, x, kernel, bias=None, *, transpose_kernel=False, **options):
    """What a convolution of `flax.nnx` with these parameters computes."""
    sizes = (kernel.shape[-1], kernel.shape[-2])[:: 1 if transpose_kernel else -1]
    if transpose_kernel:
        options["transpose_kernel"] = True
    d_in = sizes[0] * options.get("feature_group_count", 1)
    layer = cls(d_in, sizes[1], kernel.shape[:-2], rngs=nnx.Rngs(0), **options)
    layer.kernel[...] = kernel
    if bias is not None:
        layer.bias[...] = bias
    return layer(x)


def _attention(q, k, v, mask=None, bias=None, _=None, key=None, mult=1.0, **options):
    """Attention by JAX, and by Flax (which divides by the root) where weights drop."""
    if "dropout_rate" in options:
        q = q * mult / q.shape[-1] ** 0.5
        return nnx.dot_product_attention(
            q, k, v, bias, mask, dropout_rng=key, **options
        )
    scale = mult / q.shape[-1]
    mask = None if mask is None else jnp.reshape(mask, (1, 1, 1, -1))
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, **options)


def _group_norm(x, scale=1.0, bias=0.0, axis=None, **options):
    """Flax's, which takes one axis for the batch."""
    norm = nnx.GroupNorm(x.shape[-1], **options, rngs=nnx.Rngs(0))
    if axis is None:
        return norm(x) * scale + bias
    assert axis == (2, -1)
    flat = x.reshape(-1, *x.shape[2:])
    return norm(flat).reshape(x.shape) * scale + bias


# The plain functions, stated again: a derived rule would follow any function.
PLAIN = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "gelu": lambda x, mult=1.0, **k: jax.nn.gelu(x * mult, **k) / mult,
    "silu": lambda x, mult=1.0: jax.nn.silu(x * mult) / mult,
    "tanh": lambda x, mult=1.0: jnp.tanh(x * mult) / mult,
    "sigmoid": lambda x, mult=1.0: jax.nn.sigmoid(x * mult) / mult,
    "softplus": lambda x, mult=1.0: jax.nn.softplus(x * mult) / mult,
    "mish": lambda x, mult=1.0: jax.nn.mish(x * mult) / mult,
    "hard_tanh": lambda x, mult=1.0: jax.nn.hard_tanh(x * mult) / mult,
    "squareplus": jax.nn.squareplus,
    "silu_glu": lambda x, g, mult=1.0: x * jax.nn.silu(g * mult) / mult,
    "gelu_glu": lambda x, g, mult=1.0, **k: x * jax.nn.gelu(g * mult, **k) / mult,
    "dot_general": jax.lax.dot_general,
    "linear": lambda x, k, b=0.0, axis=-1, batch_axes=0: (
        (
            jnp.einsum("bsi,bihd->bshd", x, k)
            if batch_axes
            else jnp.tensordot(
                x, k, axes=(axis, [0, 1] if isinstance(axis, tuple) else 0)
            )
        )
        + b
    ),
    "prelu": lambda x, slope, initial_slope=0.01: (
        jnp.maximum(x, 0) + slope * jnp.minimum(x, 0)
    ),
    "matmul": jnp.matmul,
    "einsum": jnp.einsum,
    "einsum_linear": lambda s, x, k, b=0.0: jnp.einsum(s, x, k) + b,
    "ragged_dot": lambda x, k, sizes: jnp.concatenate(
        [a @ b for a, b in zip(jnp.split(x, np.cumsum(sizes)[:-1]), k, strict=True)]
    ),
    "add": jnp.add,
    "multiply": jnp.multiply,
    "sum": jnp.sum,
    "mean": jnp.mean,
    "gated": lambda x, gate, gate_fn=jax.nn.sigmoid, bias=0: x * gate_fn(gate + bias),
    "conv": lambda *a, **k: _module(nnx.Conv, *a, **k),
    "conv_transpose": lambda *a, **k: _module(nnx.ConvTranspose, *a, **k),
    "avg_pool": nnx.avg_pool,
    "max_pool": nnx.max_pool,
    "softmax": lambda x, axis=-1, mult=1.0: jax.nn.softmax(x * mult, axis),
    "layer_norm": lambda x, scale=1.0, bias=0.0, axis=-1: (
        jax.nn.standardize(x, axis, epsilon=1e-6) * scale + bias
    ),
    "rms_norm": lambda x, scale=1.0, axis=-1: (
        x / jnp.sqrt(jnp.mean(x**2, axis, keepdims=True) + 1e-6) * scale
    ),
    "group_norm": _group_norm,
    "embedding": lambda table, ids: table[ids],
    "dot_product_attention": _attention,
    "rotary": lambda x, positions=None, base=1e4: _turned(x, positions, base),
    "dropout": lambda x, key, rate: jnp.where(
        jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0
    ),
}
PLAIN["linear_readout"] = PLAIN["linear"]


@pytest.mark.parametrize("op, c", CASES)
def test_operation_computes_its_namesake(op, c):
    args = _arguments(c, seed=1)
    floats = {
        i: x
        for i, x in enumerate(args)
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    }

    @jax.jit
    def both(floats):
        full = [floats.get(i, x) for i, x in enumerate(args)]
        return [f(*full, **c.options) for f in (op.fn, PLAIN[op.__name__])]

    got, want = both(floats)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_every_operation_is_exported():
    missing = [n for n in OPS if getattr(jus, n, None) is not OPS[n]]
    lines = "\n".join(f"    {name} as {name}," for name in missing)
    assert not missing, f"add to jax_unit_scaling/__init__.py:\n{lines}"


def test_any_elementwise_function_can_be_unit_scaled():
    x, g = jax.random.normal(jax.random.key(0), (2, 2**16))
    f = jus.unit_scaled(lambda x, power: jnp.sin(x) * x**power)
    y, vjp = jax.vjp(jax.jit(lambda x: f(x, power=2, constraint=None)), x)
    np.testing.assert_allclose(_scale(y, "std"), 1, atol=0.02)
    np.testing.assert_allclose(_scale(vjp(g)[0]), 1, atol=0.02)


def test_factors_ignore_the_values_and_fold_the_named_axes():
    x, kernel = jnp.ones((8, 4, 16)), jnp.ones((16, 32))
    one = jus.linear.factors(x[0], kernel, constraint=None)
    split = jax.vmap(
        lambda x: jnp.asarray(
            jus.linear.factors(x, kernel, constraint=None, batch_axis_name="b").bwd[
                "kernel"
            ]
        ),
        axis_name="b",
        out_axes=None,
    )(x)
    np.testing.assert_allclose(split, one.bwd["kernel"] * 8**-0.5)


def test_float16_sums_over_a_large_batch_do_not_overflow():
    # Each weight's gradient is a sum of 2^17 ones: beyond float16, 362 once scaled.
    x = jnp.ones((2**17, 8), jnp.float16)
    kernel = jnp.ones((8, 8), jnp.float16)
    bias = jnp.zeros(8, jnp.float16)
    y, vjp = jax.vjp(jus.linear, x, kernel, bias)
    dx, dkernel, dbias = vjp(jnp.ones_like(y))
    np.testing.assert_allclose(dkernel, 2**8.5, rtol=1e-3)
    np.testing.assert_allclose(dbias, 2**8.5, rtol=1e-3)
    np.testing.assert_allclose(dx, 8**0.5, rtol=1e-3)


X, KERNEL = jnp.ones((4, 8)), jnp.ones((8, 16))
Q, KV = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 6, 4, 8))
WRONG = {
    "kernel": (lambda: jus.linear(X, KERNEL.T), ValueError, "`kernel` must begin"),
    "bias": (lambda: jus.linear(X, KERNEL, X[0]), ValueError, "`bias` must have"),
    "axis": (
        lambda: jus.linear(X, KERNEL, axis=5),
        ValueError,
        "`axis` must name axes of an array of rank 2, each once, got 5",
    ),
    "softmax axis": (lambda: jus.softmax(X, axis=2), ValueError, "`axis` 2 is out of"),
    "integers": (lambda: jus.gelu(jnp.arange(3)), TypeError, "`x` must be a floating"),
    "mult": (lambda: jus.gelu(X, mult=-1.0), ValueError, "`mult` must be finite and"),
    "string": (
        lambda: jus.linear(X, KERNEL, constraint="gmean"),
        TypeError,
        "`constraint` must be a function",
    ),
    "format": (lambda: jus.Formats("e4m3"), TypeError, "`fwd` must be a"),
    "matmul": (lambda: jus.matmul(X, X), ValueError, "must agree on k"),
    "einsum": (lambda: jus.einsum("ij,ij->i", X, KERNEL), ValueError, "two sizes"),
    "einsum bias": (
        lambda: jus.einsum_linear("ij,jk->ik", X, KERNEL, X),
        ValueError,
        "`bias` must be broadcastable",
    ),
    "ragged": (
        lambda: jus.ragged_dot(X, KERNEL, jnp.array([4])),
        ValueError,
        r"`rhs` \[groups, k, n\]",
    ),
    "groups": (
        lambda: jus.ragged_dot(X, KERNEL[None], jnp.array([2, 2])),
        ValueError,
        "`group_sizes` must have",
    ),
    "one operand": (lambda: jus.einsum("ij->i", X, X), ValueError, "two operands"),
    "add": (lambda: jus.add(X, KERNEL), ValueError, "must be broadcastable"),
    "multiply": (lambda: jus.multiply(X, KERNEL), ValueError, "must be broadcastable"),
    "numbers": (
        lambda: jus.add(1.0, 2.0),
        TypeError,
        "`x` or `y` must be an array, got 1.0 and 2.0",
    ),
    "missing": (
        lambda: jus.multiply(X),
        TypeError,
        r"multiply\(x, y, \*, constraint=to_output_scale\): missing a required "
        "argument: `y`",
    ),
    "keyword": (
        lambda: jus.softmax(X, axes=1),
        TypeError,
        r"softmax\(x, .*axis=-1.*\): got an unexpected keyword argument `axes`",
    ),
    "paddings": (
        lambda: jus.conv(X, X[..., None], padding="EXACT"),
        ValueError,
        '`padding` must be "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", '
        "\"CAUSAL\", an integer, .* for each of 1 spatial axes, got 'EXACT'",
    ),
    "number": (lambda: jus.multiply(X, 2.0), TypeError, "`y` must be an array, got 2"),
    "sum axis": (lambda: jus.sum(X, axis=2), ValueError, "`axis` must name axes of"),
    "mean axis": (lambda: jus.mean(X, axis=(0, 0)), ValueError, "`axis` must name"),
    "terms": (lambda: jus.weighted_add(X, KERNEL), ValueError, "`xs` must be tensors"),
    "weights": (
        lambda: jus.weighted_add(X, X, weights=(1.0,)),
        ValueError,
        "`weights` must hold one number for each of 2",
    ),
    "weight": (
        lambda: jus.weighted_add(X, X, weights=(1.0, 0.0)),
        ValueError,
        "`weights` must be finite and positive",
    ),
    "gate": (lambda: jus.silu_glu(X, KERNEL), ValueError, "`x` and `gate` must"),
    "scale": (lambda: jus.layer_norm(X, X[:, 0]), ValueError, "`scale` must be broad"),
    "norm axis": (lambda: jus.rms_norm(X, axis=(1, -1)), ValueError, "`axis` must na"),
    "where": (lambda: jus.rms_norm(X, None, X), TypeError, "`where` must be an arr"),
    "ids": (lambda: jus.embedding(X, X), TypeError, "`ids` must be an array of int"),
    "rate": (
        lambda: jus.dropout(X, jax.random.key(0), rate=1.0),
        ValueError,
        r"`rate` must be in \[0, 1\)",
    ),
    "attention": (
        lambda: jus.dot_product_attention(X, X, X),
        ValueError,
        "must be ",
    ),
    "heads": (
        lambda: jus.dot_product_attention(Q, KV, KV[..., :2, :]),
        ValueError,
        "a multiple of theirs",
    ),
    "mask": (
        lambda: jus.dot_product_attention(Q, KV, KV, jnp.ones((4, 7), bool)),
        ValueError,
        r"`mask` must be broadcastable to \(2, 4, 5, 6\)",
    ),
    "additive mask": (
        lambda: jus.dot_product_attention(Q, KV, KV, jnp.ones((5, 6))),
        TypeError,
        "as `bias`",
    ),
    "attention bias": (
        lambda: jus.dot_product_attention(Q, KV, KV, None, jnp.ones((3, 2, 4, 5, 6))),
        ValueError,
        "`bias` must be broadcastable",
    ),
    "query positions": (
        lambda: jus.dot_product_attention(Q, KV, KV, None, None, jnp.arange(6)),
        ValueError,
        "`query_positions` must be broadcastable",
    ),
    "window": (
        lambda: jus.dot_product_attention(Q, KV, KV, local_window_size=(-1, 2)),
        ValueError,
        "`local_window_size` must be one or two",
    ),
    "empty window": (
        lambda: jus.dot_product_attention(KV, Q[:, :2], Q[:, :2], local_window_size=2),
        ValueError,
        "`local_window_size` must leave",
    ),
    "length": (
        lambda: jus.dot_product_attention(Q, KV, KV, length=0),
        ValueError,
        "`length` must be 1",
    ),
    "dropout without a key": (
        lambda: jus.dot_product_attention(Q, KV, KV, dropout_rate=0.1),
        ValueError,
        "with a `dropout_key`",
    ),
    "positions": (
        lambda: jus.rotary(jnp.ones((3, 2, 8)), jnp.arange(4)),
        ValueError,
        "`positions` must be",
    ),
    "labels": (
        lambda: jus.cross_entropy(X, jnp.zeros(3, int)),
        ValueError,
        "`labels` must have",
    ),
    "label_smoothing": (
        lambda: jus.cross_entropy(X, jnp.zeros(4, int), label_smoothing=1.0),
        ValueError,
        r"`label_smoothing` must be a number in \[0, 1\)",
    ),
    "z_loss": (
        lambda: jus.cross_entropy(X, jnp.zeros(4, int), z_loss=-1.0),
        ValueError,
        "`z_loss` must be a finite number >= 0",
    ),
    "distribution": (lambda: jus.kl_divergence(X, X[0]), ValueError, "`targets` must"),
    "one class": (
        lambda: jus.kl_divergence(X[:, :1], X[:, :1]),
        ValueError,
        "`logits` must have two",
    ),
    "binary labels": (
        lambda: jus.binary_cross_entropy(X, X[0]),
        ValueError,
        "`labels` must have",
    ),
    "delta": (lambda: jus.huber_loss(X, X, delta=0.0), ValueError, "`delta` must be"),
    "targets": (lambda: jus.mse_loss(X, KERNEL), ValueError, "`targets` must have"),
    "taps": (lambda: jus.conv(X, KERNEL), ValueError, r"`kernel` must be \[\*window"),
    "channels": (
        lambda: jus.conv(X, jnp.ones((3, 4, 16))),
        ValueError,
        "must take the 8 channels of `x`",
    ),
    "conv groups": (
        lambda: jus.conv(X, jnp.ones((3, 4, 15)), feature_group_count=2),
        ValueError,
        "in 2 group",
    ),
    "conv bias": (
        lambda: jus.conv(X, jnp.ones((3, 8, 4)), X[0]),
        ValueError,
        "`bias` must have the shape",
    ),
    "causal": (
        lambda: jus.conv(X[None], jnp.ones((3, 3, 8, 4)), padding="CAUSAL"),
        ValueError,
        "needs one spatial axis, got 2",
    ),
    "padding": (
        lambda: jus.conv_transpose(X, jnp.ones((3, 8, 4)), padding="REFLECT"),
        ValueError,
        '`padding` must be "SAME".*"CIRCULAR", an integer.*got \'REFLECT\'',
    ),
    "pairs": (
        lambda: jus.conv(X, jnp.ones((3, 8, 4)), padding=((1, 2), (3, 4))),
        ValueError,
        "pair .low, high. for each of 1",
    ),
    "dilated": (
        lambda: jus.conv(X, jnp.ones((3, 8, 4)), input_dilation=2),
        ValueError,
        "padding` 'SAME' has no meaning",
    ),
    "strides": (
        lambda: jus.conv(X, jnp.ones((3, 8, 4)), strides=0),
        ValueError,
        "`strides` must be a positive integer",
    ),
    "pool window": (
        lambda: jus.max_pool(X, (2, 2)),
        ValueError,
        r"`x` must be \[\*batch",
    ),
    "empty pool": (
        lambda: jus.avg_pool(X, (2,), padding=((2, 0),)),
        ValueError,
        "`padding` .* must be less than",
    ),
    "num_groups": (
        lambda: jus.group_norm(X, num_groups=3),
        ValueError,
        "`num_groups` must divide the 8 channels",
    ),
    "group_size": (
        lambda: jus.group_norm(X, group_size=2),
        ValueError,
        "pass one of `num_groups` and `group_size`",
    ),
    "no such axis": (
        lambda: jus.layer_norm(X, axis=(0, -2)),
        ValueError,
        "`axis` must name axes of an array of rank 2, each once",
    ),
    "no term": (
        lambda: jus.weighted_add(X, "x"),
        TypeError,
        "`xs` must be an array, got 'x'",
    ),
    "one weight": (
        lambda: jus.weighted_add(X, X, weights=0.5),
        TypeError,
        "`weights` must be",
    ),
    "no branch": (
        lambda: jus.residual_apply(X, jus.relu),
        TypeError,
        "`fn` must be",
    ),
    "integers on a branch": (
        lambda: jus.residual_apply(jus.relu, jnp.ones((2, 2), int)),
        TypeError,
        "`x` must be a floating-point array",
    ),
    "experts": (
        lambda: jus.mixture_of_experts(
            jus.relu, jus.relu, X, num_experts=2.0, num_selected=1
        ),
        TypeError,
        "`num_experts` must be an integer",
    ),
    "singular vector": (
        lambda: jus.spectral_norm(KERNEL, jnp.ones((1, 3))),
        ValueError,
        r"`u` must be \[1, out\]",
    ),
    "power iteration": (
        lambda: jus.spectral_norm(KERNEL, jnp.ones((1, KERNEL.shape[1])), n_steps=0),
        ValueError,
        "`n_steps` must be 1 or more",
    ),
    "unbound axis": (
        lambda: jus.linear(X, KERNEL, batch_axis_name="data"),
        ValueError,
        "`batch_axis_name` must name an axis .* got 'data'",
    ),
    "unbound axis of features": (
        lambda: jus.linear(X, KERNEL, in_axis_name=("data",)),
        ValueError,
        "`in_axis_name` must name an axis .* got 'data'",
    ),
    "unbound axis of a loss": (
        lambda: jus.mse_loss(X, X, reduction="sum", batch_axis_name="data"),
        ValueError,
        "`batch_axis_name` must name an axis .* got 'data'",
    ),
    "unbound axis of gradients": (
        lambda: jus.optim.sum_gradients(X, "data"),
        ValueError,
        "`axis_name` must name an axis .* got 'data'",
    ),
    "tau": (lambda: jus.residual_apply(jus.relu, X, tau=0.0), ValueError, "`tau` must"),
    "share": (
        lambda: jus.fixed_residual_rule(share=1.0),
        ValueError,
        "`share` must be between 0 and 1",
    ),
    "index": (
        lambda: jus.running_mean_residual_rule()(4, 4),
        ValueError,
        "`index` must be from 0",
    ),
    "carry": (
        lambda: jus.gated_carry(X, X, X, KERNEL),
        ValueError,
        "must have the same shape",
    ),
    "gate_fn": (
        lambda: jus.gated_carry(X, X, X, gate_fn=jnp.exp),
        ValueError,
        "`gate_fn` must keep less",
    ),
    "feedback": (
        lambda: jus.gated_carry(X, X, X, feedback=1.0),
        ValueError,
        r"`feedback` must be in \[0, 1\)",
    ),
    "unconstrainable": (
        lambda: jus.layer_norm.constrained(None),
        TypeError,
        "takes no constraint",
    ),
    "unknown": (lambda: jus.gelu(X, approx=True), TypeError, "gelu.*approx"),
}


@pytest.mark.parametrize("call, error, match", WRONG.values(), ids=WRONG)
def test_bad_input_gets_an_error_that_names_it(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_sum_of_two_single_numbers_has_unit_scale():
    one, many = jnp.ones((1, 1)), jnp.ones((3, 4))
    assert jus.add.factors(one, one).fwd == 2**-0.5
    assert jus.add.factors(one, many).fwd == jus.add.factors(many, 2.0).fwd == 1


def test_an_einsum_that_reads_a_diagonal_scales_the_diagonal():
    x, kernel, g = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate(((64, 96, 32), (32, 48, 48), (64, 96, 48)))
    )
    free = jus.einsum_linear.constrained(None)
    y, vjp = jax.vjp(lambda x, k: free("bik,kjj->bij", x, k), x, kernel)
    dx, dkernel = vjp(g)
    plain = jnp.einsum("bik,kjj->bij", x, kernel)
    np.testing.assert_allclose(y, plain / 32**0.5, rtol=1e-4, atol=1e-5)
    read = np.einsum("kjj->kj", dkernel)
    # A product is known no better than its smallest factor: 4 / sqrt(2 32 48).
    for tensor in (y, dx, read):
        np.testing.assert_allclose(np.std(tensor), 1, atol=0.08)
    assert np.count_nonzero(dkernel) == read.size


def test_an_operation_under_another_constraint_is_an_operation():
    twin = jus.linear.constrained(jus.gmean)
    assert isinstance(twin, type(jus.linear)) and twin.__name__ == "linear"
    x, kernel = jnp.ones((3, 8)), jnp.ones((8, 4))
    want = {"x": x, "kernel": kernel, "constraint": jus.gmean}
    assert twin.factors(x, kernel) == jus.linear.factors(**want)
    np.testing.assert_array_equal(twin(x, kernel), jus.linear(**want))
    assert inspect.signature(twin).parameters["constraint"].default is jus.gmean
    # The twin's own, in turn, and the original's, which it leaves alone.
    free = twin.constrained(None)
    assert free.factors(x, kernel) == jus.linear.factors(x, kernel, constraint=None)
    assert jus.linear.factors(x, kernel).bwd["x"] == 8**-0.5


def _old_product(lhs, rhs, dimension_numbers, precision=None):
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision)


def _old_convolution(lhs, rhs, strides, pads, *, precision=None, **options):
    assert "preferred_element_type" not in options
    return jax.lax.conv_general_dilated(lhs, rhs, strides, pads, **options)


_old_convolution.__signature__ = inspect.signature(
    lambda lhs, rhs, strides, pads, *, precision=None, lhs_dilation=None: None
)


def test_a_product_that_cannot_choose_its_accumulator_works_in_float16():
    """A sum of 2^17 ones is beyond float16; it is taken, and scaled, in float32."""
    x, kernel = jnp.ones((2, 2**17), jnp.float16), jnp.ones((2**17, 3), jnp.float16)
    layer = jus.nnx.Linear(
        2**17, 3, use_bias=False, dot_general=_old_product, rngs=nnx.Rngs(0)
    )
    layer.kernel[...] = jnp.ones((2**17, 3))
    for y in (
        jus.linear(x, kernel, dot_general=_old_product),
        layer(x.astype(jnp.float16)).astype(jnp.float16),
        jus.conv(
            x.reshape(2, 1, -1), kernel[None], conv_general_dilated=_old_convolution
        ),
        jus.einsum_linear(
            "bi,ij->bj",
            x,
            kernel,
            einsum=lambda s, x, y, precision: jnp.einsum(s, x, y),
        ),
    ):
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(y, 2**8.5, rtol=1e-3)
