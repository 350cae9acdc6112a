"""Native 8-bit products: what they compute, compose with, and compile to."""

import dataclasses
import functools as ft
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from draws import normal
from flax import linen as nn, nnx

import jax_unit_scaling as jus
from jax_unit_scaling import fp8
from jax_unit_scaling.compiled import CompiledProducts, lone_multiplications, read
from jax_unit_scaling.formats import also_fused
from jax_unit_scaling.ops import attention

NATIVE, SIMULATED = jus.NATIVE_FP8, jus.SIMULATED_FP8
pytestmark = pytest.mark.filterwarnings("ignore:native FP8 formats on")


def output_and_gradients(fn, *args):
    """The output, and the gradients for a cotangent that is rounded too."""
    y, pull = jax.vjp(fn, *args)
    return y, *pull(normal(99, *y.shape, dtype=y.dtype))


def assert_same(fn, *args, tolerance=1e-6):
    """With native and simulated formats `fn` gives the same, up to sums' order."""
    native, simulated = (
        output_and_gradients(ft.partial(fn, formats=f), *args)
        for f in (NATIVE, SIMULATED)
    )
    for a, b in zip(native, simulated, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_a_second_derivative_is_refused_and_a_first_one_is_not():
    x, w = normal(0, 4, 8), normal(1, 8, 6)

    def loss(w):
        return jnp.sum(jnp.sin(jus.linear(x, w, formats=NATIVE)))

    def slope(w, v):
        return jnp.vdot(jax.grad(loss)(w), v)

    assert jnp.isfinite(slope(w, w))
    for second in (jax.grad(slope), jax.jit(jax.grad(slope))):
        with pytest.raises(TypeError, match="no second derivative.*SIMULATED_FP8"):
            second(w, w)
    # In what it is linear it has one.
    np.testing.assert_array_equal(jax.grad(slope, 1)(w, w), jax.grad(loss)(w))


PRODUCTS = {
    "linear": (jus.linear, (4, 32, 64), (64, 96)),
    "linear with bias": (jus.linear, (4, 32, 64), (64, 96), (96,)),
    "linear over two axes": (
        ft.partial(jus.linear, axis=(-2, -1)),
        (8, 16, 4, 32),
        (4, 32, 48),
    ),
    "readout": (jus.linear_readout, (4, 32, 64), (64, 96)),
    "matmul": (jus.matmul, (4, 32, 64), (4, 64, 48)),
    "matmul, broadcast": (jus.matmul, (4, 32, 64), (64, 48)),
    "dot_general": (
        lambda x, y, formats: jus.dot_general(
            x, y, (((2, 3), (1, 0)), ((), ())), formats=formats
        ),
        (8, 16, 32, 4),
        (4, 32, 48),
    ),
    "dot_general with a batch": (
        lambda x, y, formats: jus.dot_general(
            x, y, (((2,), (1,)), ((1,), (0,))), formats=formats
        ),
        (16, 4, 32),
        (4, 32, 48),
    ),
}
EINSUMS = {
    "bqhd,bkhd->bhqk": ((4, 16, 4, 32), (4, 24, 4, 32)),
    "...i,ij->...j": ((8, 16, 32), (32, 48)),
    "...ij,...jk->...ik": ((8, 16, 32), (1, 32, 48)),
    "ab,cb->ca": ((64, 32), (48, 32)),  # operands reach the dot swapped
    "abz,cb->ca": ((64, 32, 2), (48, 32)),  # a sum comes before it: simulated
    "ab,ab->ab": ((16, 32), (16, 32)),  # no dot at all
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("jitted", [False, True])
def test_native_products_equal_simulated_ones(name, jitted):
    op, *shapes = PRODUCTS[name]
    fn = (
        (lambda *a, formats: jax.jit(ft.partial(op, formats=formats))(*a))
        if (jitted)
        else op
    )
    assert_same(fn, *(normal(i, *s) for i, s in enumerate(shapes)))


@pytest.mark.parametrize("subscripts", EINSUMS)
def test_native_einsums_equal_simulated_ones(subscripts):
    args = (normal(i, *s) for i, s in enumerate(EINSUMS[subscripts]))
    assert_same(ft.partial(jus.einsum, subscripts), *args)


# A half-precision result is rounded once, and in bfloat16 its factor too.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 2**-6), (jnp.float16, 2**-9)]
)
def test_half_precision(dtype, tolerance):
    args = normal(0, 4, 32, 64, dtype=dtype), normal(1, 64, 96, dtype=dtype)
    g = normal(2, 4, 32, 96, dtype=dtype)

    def run(formats, dtype):
        fn = ft.partial(jus.linear, formats=formats)
        y, pull = jax.vjp(fn, *(x.astype(dtype) for x in args))
        return y, *pull(g.astype(dtype))

    for a, b in zip(run(NATIVE, dtype), run(SIMULATED, jnp.float32), strict=True):
        assert a.dtype == dtype
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_float16_sums_past_its_largest_number():
    x, w = 200 * jnp.ones((4096, 256), jnp.float16), jnp.ones((256, 64), jnp.float16)
    y, dx, dw = output_and_gradients(ft.partial(jus.linear, formats=NATIVE), x, w)
    assert all(bool(jnp.isfinite(z).all()) for z in (y, dx, dw))


def test_convolutions_and_ragged_dots_are_simulated():
    assert_same(jus.conv, normal(0, 4, 16, 32), normal(1, 3, 32, 48))
    sizes = jnp.array([10, 20, 34])
    assert_same(
        lambda x, w, formats: jus.ragged_dot(x, w, sizes, formats=formats),
        normal(0, 64, 32),
        normal(1, 3, 32, 16),
    )


def test_what_is_beyond_the_range_saturates_and_nan_stays():
    x = jnp.array([[1e4, -1e4, jnp.inf, jnp.nan, 1e-9, 300.0]])
    eye = jnp.eye(6)
    y = fp8.dot_general(x, eye, MATRICES, formats=NATIVE)
    assert jnp.isnan(y).all()  # NaN times zero
    clean = x.at[0, 3].set(0.0)
    y = fp8.dot_general(clean, eye, MATRICES, formats=NATIVE)
    np.testing.assert_array_equal(y[0], [448, -448, 448, 0, 0, 288])
    assert jnp.isnan(fp8.cast(x, jus.E4M3).astype(jnp.float32)[0, 3])


@pytest.mark.parametrize("format", [jus.E4M3, jus.E5M2], ids=["E4M3", "E5M2"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_cast_is_the_rounding_that_is_simulated(format, dtype):
    x = jnp.arange(2**16, dtype=jnp.uint16).view(dtype)
    ours = jax.jit(ft.partial(fp8.cast, format=format))(x).astype(jnp.float32)
    simulated = jus.quantize(x, format).astype(jnp.float32)
    same = (ours == simulated) | (jnp.isnan(ours) & jnp.isnan(simulated))
    assert bool(same.all())


@pytest.mark.parametrize("shape", [(64, 128), (128, 512), (192, 384)])
@pytest.mark.parametrize("format", [jus.E4M3, jus.E5M2], ids=["E4M3", "E5M2"])
def test_the_kernels_equal_xla(shape, format):
    x = 1000 * normal(0, *shape, dtype=jnp.bfloat16)
    y, t = fp8.cast_and_transpose(x, format=format, interpret=True)
    limit = float(ml_dtypes.finfo(format.dtype).max)
    expected = np.clip(np.asarray(x, np.float32), -limit, limit).astype(format.dtype)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint8), expected.view(np.uint8))
    np.testing.assert_array_equal(
        np.asarray(t).view(np.uint8), expected.T.view(np.uint8)
    )
    again = fp8.transpose(y, interpret=True)
    assert bool((again == t).all())


TILE = jnp.zeros((64, 128))
CAST = ft.partial(fp8.cast_and_transpose, format=jus.E4M3, interpret=True)
TRANSPOSE = ft.partial(fp8.transpose, interpret=True)
WHOLE_TILES = r"`x` must be a matrix of whole tiles of \(64, 128\), got shape"
REFUSED_BY_KERNELS = {
    "no whole tiles": (CAST, TILE[1:], ValueError, WHOLE_TILES),
    "a stack": (CAST, TILE[None], ValueError, WHOLE_TILES),
    "integers": (CAST, TILE.astype(int), TypeError, "`x` must be a floating-point"),
    "16 bits": (
        ft.partial(CAST, format=jus.BF16),
        TILE,
        ValueError,
        "`format` must have 8 bits, .* got bfloat16",
    ),
    "4 bits": (
        ft.partial(CAST, format=jus.formats.E2M1),
        TILE,
        ValueError,
        "`format` must have 8 bits, .* got float4",
    ),
    "no dtype": (
        ft.partial(CAST, format=jus.Format(4, 2)),
        TILE,
        ValueError,
        "`format` must have a dtype",
    ),
    "a dtype": (
        ft.partial(CAST, format=jnp.float8_e4m3fn),
        TILE,
        TypeError,
        "`format` must be Format, got",
    ),
    "wide numbers": (TRANSPOSE, TILE, ValueError, "`x` must have 8 bits, .* float32"),
    "a stack, to transpose": (
        TRANSPOSE,
        TILE[None].astype(jnp.float8_e4m3fn),
        ValueError,
        WHOLE_TILES,
    ),
}


@pytest.mark.parametrize("what", REFUSED_BY_KERNELS)
def test_kernels_refuse(what):
    kernel, x, error, message = REFUSED_BY_KERNELS[what]
    with pytest.raises(error, match=message):
        kernel(x)


def test_kernels_without_their_backend(monkeypatch):
    """In the interpreter they need none."""
    expected = CAST(TILE + 300)
    monkeypatch.setattr(fp8, "_triton", lambda: None)
    for a, b in zip(CAST(TILE + 300), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a, float), np.asarray(b, float))
    with pytest.raises(NotImplementedError, match="no Triton backend for Pallas: use"):
        fp8.cast_and_transpose(TILE, format=jus.E4M3)


MATRICES = (((1,), (0,)), ((), ()))
ARGUMENTS = {
    "simulated": ({"formats": SIMULATED}, ValueError, "`formats` must be native"),
    "wide": (
        {"formats": jus.Formats(jus.BF16, jus.BF16)},
        ValueError,
        "`formats` must be native",
    ),
    "empty": ({"formats": jus.Formats()}, ValueError, "`formats` must be native"),
    "none": ({"formats": None}, TypeError, "`formats` must be Formats, got None"),
    "of a block": ({"formats": jus.MUNIT_FP8}, TypeError, "`formats` must be Formats"),
    "integers": ({"rhs": jnp.ones((8, 4), int)}, TypeError, "`rhs` must be a floating"),
    "no such axis": (
        {"dimension_numbers": (((3,), (0,)), ((), ()))},
        ValueError,
        "`dimension_numbers` must name axes of `lhs`",
    ),
    "other sizes": (
        {"dimension_numbers": (((0,), (0,)), ((), ()))},
        ValueError,
        r"`lhs` and `rhs` must agree on the contracting dimensions, .* \[4\] of",
    ),
    "no pairs": (
        {"dimension_numbers": ((1,), (0,))},
        TypeError,
        "`dimension_numbers` must be tuple",
    ),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_bad_arguments_of_a_native_product_are_named(what):
    given, error, message = ARGUMENTS[what]
    good = {
        "lhs": jnp.ones((4, 8)),
        "rhs": jnp.ones((8, 4)),
        "dimension_numbers": MATRICES,
        "formats": NATIVE,
    }
    assert fp8.dot_general(**good).shape == (4, 4)
    with pytest.raises(error, match=message):
        fp8.dot_general(**good | given)


def test_every_way_to_cast_gives_the_same_product(monkeypatch):
    """With the kernels, in the interpreter, in place of what a CPU takes."""
    for name in ("cast_and_transpose", "transpose"):
        kernel = ft.partial(getattr(fp8, name), interpret=True)
        monkeypatch.setattr(fp8, name, kernel)
    on_gpu = lambda *args, cuda, default: cuda(*args)  # noqa: E731
    expected = output_and_gradients(
        ft.partial(jus.linear, formats=NATIVE), normal(0, 128, 256), normal(1, 256, 512)
    )
    monkeypatch.setattr(fp8.lax, "platform_dependent", on_gpu)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for fused in ((), ("rhs",), ("lhs", "rhs", "cotangent")):
        formats = dataclasses.replace(NATIVE, fused=fused)
        found = output_and_gradients(
            ft.partial(jus.linear, formats=formats),
            normal(0, 128, 256),
            normal(1, 256, 512),
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_without_pallas_kernels_xla_does_their_work(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = normal(0, 128, 256)
    assert fp8._kernels_apply(x) and not fp8._kernels_apply(x[:100])
    monkeypatch.setattr(fp8, "_triton", lambda: None)
    assert not fp8._kernels_apply(x)


def test_residuals_have_8_bits():
    x, w = normal(0, 64, 128), normal(1, 128, 256)
    _, pull = jax.vjp(ft.partial(jus.linear, formats=NATIVE), x, w)
    kept = [z for z in jax.tree.leaves(pull) if getattr(z, "size", 0) > 16]
    assert {z.dtype.itemsize for z in kept} == {1}
    assert sum(z.size for z in kept) == x.size + w.size


def test_a_factor_is_in_the_product_and_nowhere_else():
    """Lowered for a GPU: one multiplication for each product, of 8 bits on their way
    up, where cuBLASLt takes it; none of the operands, the result or a cotangent."""
    x, w = (jnp.zeros(s, jnp.bfloat16) for s in ((64, 96), (96, 160)))

    def step(x, w):
        return output_and_gradients(ft.partial(jus.linear, formats=NATIVE), x, w)

    text = jax.export.export(jax.jit(step), platforms=["cuda"])(x, w).mlir_module()
    lines = text.splitlines()
    dots = [line for line in lines if "stablehlo.dot_general" in line]
    scalings = [
        line for line in lines if "stablehlo.multiply" in line and "bf16>" in line
    ]
    assert len(dots) == 3
    assert len(scalings) == 3
    assert sum("optimization_barrier" in line for line in lines) >= 6


# -- What it composes with -------------------------------------------------------------


def _linear(x, w):
    return jus.linear(x, w, formats=NATIVE)


def test_under_vmap_scan_and_remat():
    x, w = normal(0, 4, 16, 32), normal(1, 32, 32)
    expected = _linear(x, w)
    np.testing.assert_allclose(
        jax.vmap(lambda x: _linear(x, w))(x), expected, 1e-5, 1e-6
    )
    per_example = jax.vmap(jax.grad(lambda w, x: _linear(x, w).sum()), (None, 0))(w, x)
    assert per_example.shape == (4, 32, 32)

    def deep(w, *, remat):
        layer = lambda x, _: (_linear(x, w), None)  # noqa: E731
        y, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, length=3)
        return (y**2).sum()

    plain, again = (jax.jit(jax.grad(ft.partial(deep, remat=r)))(w) for r in (0, 1))
    np.testing.assert_allclose(plain, again, rtol=1e-5, atol=1e-5)


def test_a_remat_policy_keeps_the_8_bit_residuals():
    x, w = normal(0, 64, 128), normal(1, 128, 128)
    policy = jax.checkpoint_policies.save_only_these_names(fp8.RESIDUAL)

    def layer(x, w):
        return jnp.tanh(_linear(jnp.sin(x), w))

    y, pull = jax.vjp(jax.checkpoint(layer, policy=policy), x, w)
    given = [a.unsafe_buffer_pointer() for a in (x, w)]
    kept = [
        z
        for z in jax.tree.leaves(pull)
        if getattr(z, "size", 0) > 16 and z.unsafe_buffer_pointer() not in given
    ]
    # Both operands, and nothing of the sine and the tangent.
    assert sorted((z.dtype.itemsize, z.size) for z in kept) == [
        (1, x.size),
        (1, w.size),
    ]
    expected = jax.vjp(layer, x, w)[1](y)
    for a, b in zip(pull(y), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


MODULES = {
    "nnx": lambda formats: jus.nnx.TransformerBlock(
        64, 2, 128, index=0, depth=2, formats=formats, rngs=nnx.Rngs(0)
    ),
    "linen": lambda formats: jus.linen.TransformerBlock(
        2, 128, index=0, depth=2, formats=formats
    ),
}


@pytest.mark.parametrize("family", MODULES)
def test_modules_take_native_formats_by_one_word(family):
    x = normal(0, 2, 32, 64)
    # Attention's own inputs are not rounded by native formats.
    simulated = dataclasses.replace(jus.BlockFormats.of(SIMULATED), attention=None)

    def loss(formats):
        module = MODULES[family](formats)
        if family == "nnx":
            graph, state = nnx.split(module)
            apply = lambda p: nnx.merge(graph, p)(x)  # noqa: E731
        else:
            state = module.init(jax.random.key(0), x)
            apply = lambda p: module.apply(p, x)  # noqa: E731
        return jax.value_and_grad(lambda p: (apply(p) ** 2).mean())(state)

    native, other = jax.tree.leaves(loss(NATIVE)), jax.tree.leaves(loss(simulated))
    for a, b in zip(native, other, strict=True):
        # A value next to the middle of two numbers of the format may be rounded to the
        # other where sums before it end in another bit: a step of 1/16 in one of many.
        error = float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))
        assert error < 2e-2


@pytest.mark.parametrize("family", MODULES)
def test_the_preset_of_umup_leaves_two_products_wide(family):
    x = normal(0, 2, 32, 64)
    module = MODULES[family](jus.UMUP_FP8)
    if family == "nnx":
        fn, args = module, (x,)
    else:
        fn, args = module.apply, (module.init(jax.random.key(0), x), x)
    paths = [p.path for p in jus.fp8_products(fn, *args)]
    assert len(paths) == 9  # two of them attention's own
    assert sum(fp8.SCOPE in path for path in paths) == 5


def test_linen_lifts():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jus.linen.Dense(32, formats=NATIVE)(x), None

    stack = nn.scan(
        nn.remat(Layer),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )()
    x = normal(0, 8, 32)
    params = stack.init(jax.random.key(0), x, None)
    grads = jax.grad(lambda p: (stack.apply(p, x, None)[0] ** 2).sum())(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_simulation_and_tracking_leave_it_alone():
    x, w = normal(0, 16, 32), normal(1, 32, 48)
    expected = output_and_gradients(_linear, x, w)
    found = output_and_gradients(jus.simulate_fp8(_linear), x, w)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    y, _ = jus.track_scales(_linear)(x, w)
    np.testing.assert_array_equal(y, expected[0])


def test_unit_scale_brings_what_native_products_cast_into_range():
    x, w = normal(0, 16, 32), normal(1, 32, 48)

    def step(product):
        loss = lambda x, w: (product(1e-4 * x, w) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(loss, (0, 1))

    true, native = (jax.tree.leaves(step(p)(x, w)) for p in (jus.linear, _linear))
    scaled = jax.tree.leaves(jus.unit_scale(step(_linear), x, w)(x, w))

    def error(a, b):
        return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))

    assert all(error(a, b) == 1.0 for a, b in zip(native, true, strict=True))
    assert all(error(a, b) < 0.08 for a, b in zip(scaled, true, strict=True))


# -- Formats ---------------------------------------------------------------------------


def test_bad_formats_are_refused():
    with pytest.raises(ValueError, match="native products need `fwd` and `bwd`"):
        jus.Formats(jus.E5M2, jus.E5M2, native=True)
    with pytest.raises(ValueError, match="native products need"):
        jus.Formats(jus.BF16, None, native=True)
    with pytest.raises(ValueError, match="`fused` must be of"):
        jus.Formats(jus.E4M3, jus.E5M2, native=True, fused=("kernel",))
    with pytest.raises(TypeError, match="`native` must be a bool"):
        jus.Formats(jus.E4M3, jus.E5M2, native=1)
    for fused in (None, "rhs", ["rhs"]):
        with pytest.raises(TypeError, match="`fused` must be a tuple of names, got"):
            jus.Formats(fused=fused)
    for bad in ("fp8", jus.E4M3, jus.MUNIT_FP8):
        with pytest.raises(TypeError, match="`mlp_in` must be `jax_unit_scaling.Form"):
            jus.BlockFormats(mlp_in=bad)
    with pytest.raises(TypeError, match="`formats` must be .* or None, got 'fp8'"):
        jus.BlockFormats.of("fp8")


def test_formats_for_each_product():
    assert jus.BlockFormats.of(NATIVE).mlp_out == NATIVE
    assert jus.BlockFormats.of(None).mlp_out is None
    assert jus.BlockFormats.of(jus.UMUP_FP8) is jus.UMUP_FP8
    assert jus.UMUP_FP8.mlp_out is None and jus.MUNIT_FP8.mlp_out == NATIVE
    assert also_fused(NATIVE, "lhs", "rhs").fused == ("rhs", "lhs")
    assert also_fused(None, "lhs") is None


def test_it_says_once_that_there_is_no_hardware():
    fp8._tell_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            _linear(normal(0, 4, 8), normal(1, 8, 4))
    assert [str(w.message)[:25] for w in caught] == ["native FP8 formats on cpu"]


def test_attention_by_cudnn_is_refused_where_it_cannot_be():
    def attend(q, *more, implementation="cudnn", **options):
        jus.dot_product_attention(
            q, q, q, *more, implementation=implementation, **options
        )

    q = normal(0, 1, 8, 2, 16, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match='`implementation` must be "xla" or "cudnn"'):
        attend(q, implementation="triton")
    not_there = "neither dropout, `precision` nor `query_positions`"
    with pytest.raises(ValueError, match=not_there):
        attend(q, None, None, jnp.arange(8))
    with pytest.raises(ValueError, match=not_there):
        attend(q, precision="highest")
    dropout = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    with pytest.raises(ValueError, match=not_there):
        attend(q, **dropout)
    with pytest.raises(ValueError, match=r"one batch axis or none, got .*\(1, 1, 8"):
        attend(q[None])
    with pytest.raises(ValueError, match="in float16 and bfloat16, got float32"):
        attend(q.astype(jnp.float32))
    with pytest.raises(ValueError, match='needs an NVIDIA GPU, got the backend "cpu"'):
        attend(q)


@pytest.mark.parametrize(
    "formats", [None, SIMULATED, NATIVE], ids=["none", "simulated", "native"]
)
def test_attention_by_cudnn_is_given_what_it_takes(monkeypatch, formats):
    """With XLA's kernel in its place."""
    monkeypatch.setattr(attention, "on_cuda", lambda: True)
    kernel = jax.nn.dot_product_attention

    def in_its_place(*args, implementation, **options):
        assert implementation == "cudnn"
        return kernel(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    args = [normal(i, 2, 8, 2, 16, dtype=jnp.float16) for i in range(3)]
    found, expected = (
        output_and_gradients(
            ft.partial(
                jus.dot_product_attention,
                is_causal=True,
                formats=formats,
                implementation=implementation,
            ),
            *args,
        )
        for implementation in ("cudnn", "xla")
    )
    for a, b in zip(found, expected, strict=True):
        a, b = (np.asarray(z, np.float64) for z in (a, b))
        # Simulated, the factor is on the value where that is rounded, and not on the
        # output's cotangent: both become other numbers, of 3 and 2 bits.
        tolerance = 0.1 if formats == SIMULATED else 5e-3
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


# -- Compiling -------------------------------------------------------------------------


def test_jit_is_jax_jit_elsewhere():
    calls = []

    @jus.jit
    def double(x):
        """Doubles."""
        calls.append(1)
        return 2 * x

    assert double(jnp.float32(3)) == 6 and double(jnp.float32(4)) == 8
    assert len(calls) == 1 and double.__doc__ == "Doubles."
    assert "multiply" in double.lower(jnp.float32(3)).as_text()
    static = jus.jit(lambda x, n: x * n, static_argnames="n")
    assert static(jnp.float32(2), n=3) == 6
    donated = jus.jit(lambda x: x + 1, donate_argnums=0)
    assert donated(jnp.float32(2)) == 3
    double.clear_cache()

    with pytest.raises(TypeError, match="`fn` must be a function"):
        jus.jit(3)


# One that a CPU knows too, in place of a GPU's own.
OPTIONS = {"xla_embed_ir_in_executable": True}


@jax.tree_util.register_static
class Model:
    calls = 0

    @ft.partial(jus.jit, compiler_options=OPTIONS)
    def forward(self, x):
        type(self).calls += 1
        return x @ x


def test_jit_of_a_method():
    x, model = normal(0, 4, 4), Model()
    np.testing.assert_allclose(model.forward(x), x @ x, rtol=1e-6)
    np.testing.assert_allclose(model.forward(x), x @ x, rtol=1e-6)
    assert Model.calls == 1
    assert "dot_general" in model.forward.lower(x).as_text()
    assert model.forward.trace(x).jaxpr.eqns
    assert model.forward.eval_shape(x).shape == (4, 4)
    assert jax.jit(model.forward)(x).shape == (4, 4)
    for fn in (model.forward, ft.partial(Model.forward, model)):
        assert len(jus.fp8_products(fn, x)) == 1


def test_a_method_of_jax_jit_is_read():
    class Plain(Model):
        forward = jax.jit(lambda self, x: x @ x)

    jax.tree_util.register_static(Plain)
    assert len(jus.fp8_products(Plain().forward, normal(0, 4, 4))) == 1


def test_jit_without_a_function_is_a_decorator():
    @jus.jit(static_argnames="n")
    def times(x, n):
        return x * n

    assert times(jnp.float32(2), n=3) == 6
    assert len(jus.fp8_products(ft.partial(times, n=3), jnp.float32(2))) == 0


INSIDE = {
    "jit": lambda f: jax.jit(lambda x: f(x)),
    "another of its own": lambda f: jus.jit(lambda x: f(x), compiler_options=OPTIONS),
    "jit, of a constant": lambda f: jax.jit(lambda x: x + f(np.ones(3, np.float32))),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=2)[0],
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[0],
    "vmap": jax.vmap,
    "make_jaxpr": lambda f: lambda x: jax.make_jaxpr(f)(x).jaxpr.eqns and x,
    "checkpoint": lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()),
    "simulate_fp8": jus.simulate_fp8,
    "track_scales": lambda f: lambda x: jus.track_scales(f)(x)[0],
    "unit_scale": lambda f: lambda x: jus.unit_scale(f, x)(x),
}


@pytest.mark.parametrize("where", INSIDE)
def test_jit_with_options_inside_of_another_transformation(where):
    def plain(x):
        return 2 * x

    x, fn = jnp.ones(3), jus.jit(plain, compiler_options=OPTIONS)
    np.testing.assert_allclose(INSIDE[where](fn)(x), INSIDE[where](jax.jit(plain))(x))


def a_gpu(capability, platform="gpu", kind="a GPU"):
    fields = {"platform": platform, "device_kind": kind}
    if capability is not None:
        fields["compute_capability"] = capability
    return type("Device", (), fields)()


@pytest.mark.parametrize(
    ("capability", "cuda", "native"),
    [
        ("8.0", True, False),
        ("8.6", True, False),
        ("8.9", True, True),
        ("9.0", True, True),
        ("10.0", True, True),
        ("9", True, True),
        ("gfx942", False, False),
        ("gfx90a", False, False),
        (None, False, False),
    ],
)
def test_which_gpus_are_native(monkeypatch, capability, cuda, native):
    monkeypatch.setattr(jax, "devices", lambda: [a_gpu(capability)])
    assert fp8.on_cuda() == cuda and fp8.is_native() == native


@pytest.mark.parametrize(
    ("kind", "native"),
    [
        ("TPU v4", False),
        ("TPU v5 lite", False),
        ("TPU v6e", False),
        ("TPU v7x", True),
        ("TPU7x", True),
    ],
)
def test_which_tpus_are_native(monkeypatch, kind, native):
    monkeypatch.setattr(jax, "devices", lambda: [a_gpu(None, "tpu", kind)])
    assert not fp8.on_cuda() and fp8.is_native() == native


def test_products_on_an_amd_gpu(monkeypatch):
    fp8._tell_once.cache_clear()
    monkeypatch.setattr(jax, "devices", lambda: [a_gpu("gfx942", kind="MI300X")])
    with pytest.warns(UserWarning, match="MI300X, which is not known to have units"):
        _linear(normal(0, 4, 8), normal(1, 8, 4))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (None, OPTIONS),
        ("gfx942", OPTIONS),
        ("9.0", {"xla_gpu_enable_triton_gemm": False, **OPTIONS}),
    ],
)
def test_jit_sets_its_options_on_nvidias_gpus_alone(monkeypatch, capability, expected):
    given = []
    monkeypatch.setattr(jax, "jit", lambda fn, **kw: given.append(kw) or fn)
    monkeypatch.setattr(jax, "devices", lambda: [a_gpu(capability)])
    jus.jit(abs, compiler_options=OPTIONS)(-1)
    jus.jit(abs)(-1)
    own = {k: v for k, v in expected.items() if k not in OPTIONS} or None
    assert [kw["compiler_options"] for kw in given] == [expected, own]


GPU_PROGRAM = """\
HloModule jit_step
%gemm_fusion_dot (p.0: bf16[64,96], p.1: bf16[96,160]) -> bf16[64,160] {
  %p.0 = bf16[64,96]{1,0} parameter(0)
  %p.1 = bf16[96,160]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,160]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, metadata={op_name="jit(step)/readout/dot_general"}
}
ENTRY %main (x: f8e4m3fn[64,96], w: f8e4m3fn[160,96]) -> bf16[64,160] {
  %x = f8e4m3fn[64,96]{1,0} parameter(0)
  %w = f8e4m3fn[160,96]{1,0} parameter(1)
  %one = f32[] constant(1)
  %cublas-gemm.3 = (bf16[64,160]{1,0}, s8[33554432]{0}) custom-call(%x, %w, %one, %one), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(step)/up/fp8_product/dot_general"}, backend_config={"gemm_backend_config":{"alpha_real":0.125}}
  %get.1 = bf16[64,160]{1,0} get-tuple-element(%cublas-gemm.3), index=0
  %cublas-gemm.4 = (bf16[64,64]{1,0}, s8[33554432]{0}) custom-call(%get.1, %get.1), custom_call_target="__cublas$gemm", metadata={op_name="jit(step)/down/dot_general"}
  ROOT %fusion = bf16[64,160]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm_fusion_dot
}
"""  # noqa: E501

# By hand, from the pieces that XLA's source names: nothing here was on a GPU.
GPU_FACTORS = """\
ENTRY %main (x: f8e4m3fn[64,96], w: f8e4m3fn[160,96], s: f32[], y: bf16[2,8,8,16], k: bf16[3,3,16,8]) -> bf16[64,160] {
  %x = f8e4m3fn[64,96]{1,0} parameter(0)
  %w = f8e4m3fn[160,96]{1,0} parameter(1)
  %s = f32[] parameter(2)
  %y = bf16[2,8,8,16]{3,2,1,0} parameter(3)
  %k = bf16[3,3,16,8]{3,2,1,0} parameter(4)
  %half = bf16[] constant(0.5)
  %c.1 = c64[] constant((1, 2))
  %wide = f32[] convert(%half)
  %one = f32[] constant(1)
  %gemm.1 = (bf16[64,160]{1,0}, s8[33554432]{0}) custom-call(%x, %w, %wide, %one), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(step)/up/fp8_product/dot_general"}, backend_config={"gemm_backend_config":{"alpha_real":0.25}}
  %gemm.2 = (bf16[64,160]{1,0}, s8[33554432]{0}) custom-call(%x, %w, %s, %one), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(step)/up/fp8_product/dot_general"}
  %gemm.3 = (bf16[64,160]{1,0}, s8[33554432]{0}) custom-call(%up.1, %up.2), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/up/fp8_product/dot_general"}
  %cudnn-conv.1 = (bf16[2,8,8,8]{3,2,1,0}, u8[0]{0}) custom-call(%y, %k), window={size=3x3}, custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/fp8_simulated/conv_general_dilated"}
  %fmha = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%y, %y, %y), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/attention"}
  %norm = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%y, %y, %y), custom_call_target="__cudnn$norm"
  %conv.2 = bf16[2,8,8,8]{3,2,1,0} convolution(%y, %k), window={size=3x3}, metadata={op_name="jit(step)/conv_general_dilated"}
}
"""  # noqa: E501


def test_a_gpu_program_is_read():
    products = read(GPU_PROGRAM)
    assert [p.kernel for p in products] == ["Triton", "cuBLASLt FP8", "cuBLAS"]
    triton, native, wide = products
    assert native.is_fp8 and native.scale == 0.125 and native.reason == ""
    assert (native.lhs, native.rhs) == ("f8e4m3fn[64,96]", "f8e4m3fn[160,96]")
    assert native.out == "bf16[64,160]" and native.path.endswith("dot_general")
    assert "give it native formats" in triton.reason
    assert wide.lhs == "bf16[64,160]" and "give it native formats" in wide.reason
    mixed = dataclasses.replace(triton, lhs=native.lhs, rhs=native.rhs)
    assert "compile with `jax_unit_scaling.jit`" in mixed.reason
    both = dataclasses.replace(wide, lhs="f8e5m2[8,8]", rhs="f8e5m2[8,8]")
    assert "no hardware multiplies" in both.reason
    table = str(CompiledProducts(tuple(products), "a GPU"))
    assert table.startswith("1 of 3 products in 8 bits on a GPU")
    assert "jit(step)/down/dot_general" in table and "no FP8" in table


def test_all_kinds_of_a_gpus_products_are_read():
    products = read(GPU_FACTORS, native=True)
    assert [(p.kind, p.kernel) for p in products] == [
        *2 * [("dot", "cuBLASLt FP8")],
        ("dot", "cuBLAS"),
        ("convolution", "cuDNN"),
        ("attention", "cuDNN"),
        ("convolution", "XLA"),
    ]
    # A factor of an operand is one of the product; the second one's is no constant.
    assert [p.scale for p in products[:3]] == [0.125, None, 1.0]
    assert [p.is_fp8 for p in products] == 2 * [True] + 4 * [False]
    widened, conv, attention, plain = products[2:]
    assert "this backend has 8-bit products, but XLA took none" in widened.reason
    assert "no 8-bit kernel for a convolution" in conv.reason == plain.reason
    assert "native formats have no effect" in attention.reason
    widened = read(GPU_FACTORS, native=False)[2]
    assert "this backend has no 8-bit product" in widened.reason
    narrow = dataclasses.replace(attention, lhs=products[0].lhs, rhs=products[0].rhs)
    assert narrow.is_fp8


# By hand as well: who reads and writes what, and which of it only multiplies.
GPU_MULTIPLICATIONS = """\
%times (p.0: bf16[64,160]) -> bf16[64,160] {
  %p.0 = bf16[64,160]{1,0} parameter(0)
  %wide = f32[64,160]{1,0} convert(%p.0)
  %half = f32[] constant(0.5)
  %halves = f32[64,160]{1,0} broadcast(%half), dimensions={}
  %mul.1 = f32[64,160]{1,0} multiply(%wide, %halves)
  ROOT %narrow = bf16[64,160]{1,0} convert(%mul.1)
}
%cast (p.1: f32[96,160]) -> bf16[96,160] {
  %p.1 = f32[96,160]{1,0} parameter(0)
  %half = f32[] constant(0.5)
  %halves = f32[96,160]{1,0} broadcast(%half), dimensions={}
  %mul.2 = f32[96,160]{1,0} multiply(%p.1, %halves)
  ROOT %narrow = bf16[96,160]{1,0} convert(%mul.2)
}
%square (p.2: bf16[64,160]) -> bf16[64,160] {
  %p.2 = bf16[64,160]{1,0} parameter(0)
  ROOT %mul.3 = bf16[64,160]{1,0} multiply(%p.2, %p.2)
}
%turn (p.3: bf16[64,160], p.4: bf16[]) -> bf16[160,64] {
  %p.3 = bf16[64,160]{1,0} parameter(0)
  %p.4 = bf16[] parameter(1)
  %all = bf16[64,160]{1,0} broadcast(%p.4), dimensions={}
  %mul.4 = bf16[64,160]{1,0} multiply(%p.3, %all)
  ROOT %turned = bf16[160,64]{1,0} transpose(%mul.4), dimensions={1,0}
}
%gemm_fusion_dot (p.5: bf16[64,96], p.6: bf16[96,160]) -> bf16[64,160] {
  %p.5 = bf16[64,96]{1,0} parameter(0)
  %p.6 = bf16[96,160]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,160]{1,0} dot(%p.5, %p.6), lhs_contracting_dims={1}
}
ENTRY %main (x: bf16[64,96], w: f32[96,160], y: bf16[64,160]) -> bf16[64,160] {
  %x = bf16[64,96]{1,0} parameter(0)
  %w = f32[96,160]{1,0} parameter(1)
  %y = bf16[64,160]{1,0} parameter(2)
  %number = bf16[] constant(3)
  %numbers = bf16[64,96]{1,0} broadcast(%number), dimensions={}
  %before = bf16[64,96]{1,0} multiply(%x, %numbers)
  %same = bf16[64,96]{1,0} bitcast(%before)
  %cast_multiply = bf16[96,160]{1,0} fusion(%w), kind=kLoop, calls=%cast
  %gemm = (bf16[64,160]{1,0}, s8[8]{0}) custom-call(%same, %cast_multiply), custom_call_target="__cublas$gemm"
  %got = bf16[64,160]{1,0} get-tuple-element(%gemm), index=0
  %after = bf16[64,160]{1,0} fusion(%got), kind=kLoop, calls=%times
  %squared = bf16[64,160]{1,0} fusion(%got), kind=kLoop, calls=%square
  %turned = bf16[160,64]{1,0} fusion(%got, %number), kind=kLoop, calls=%turn
  %triton = bf16[64,160]{1,0} fusion(%x, %cast_multiply), kind=kCustom, calls=%gemm_fusion_dot
  %after_triton = bf16[64,160]{1,0} fusion(%triton), kind=kLoop, calls=%times
  %elsewhere = bf16[64,160]{1,0} fusion(%y), kind=kLoop, calls=%times
  ROOT %sum = bf16[64,160]{1,0} add(%after, %elsewhere)
}
"""  # noqa: E501


def test_multiplications_that_are_kernels_of_their_own_are_found():
    found = lone_multiplications(GPU_MULTIPLICATIONS)
    assert found == ["before", "after", "after_triton"]


def test_a_factor_that_another_operation_takes_is_no_kernel():
    x, w = normal(0, 16, 32), normal(1, 32, 8)

    def count(fn):
        text = jax.jit(fn).lower(x, w).compile().as_text()
        return len(lone_multiplications(text))

    assert count(lambda x, w: x @ w) == 0
    assert count(lambda x, w: (x @ w) * 0.3) == 1
    assert count(lambda x, w: ((x * 0.3) @ w) * 0.3) == 2
    assert count(lambda x, w: jnp.tanh((x @ w) * 0.3)) == 0


SIMULATED_ONES = {
    "a convolution": (
        jus.conv,
        ((2, 8, 16), (3, 16, 8)),
        "no 8-bit kernel for a convolution",
    ),
    "a ragged dot": (
        lambda x, w, formats: jus.ragged_dot(x, w, jnp.array([10, 6]), formats=formats),
        ((16, 32), (2, 32, 8)),
        "not one dot of its operands: its native formats are simulated",
    ),
    "an operation that is not one dot": (
        ft.partial(jus.einsum, "abz,cb->ca"),
        ((64, 32, 2), (48, 32)),
        "not one dot of its operands: its native formats are simulated",
    ),
}


@pytest.mark.parametrize("kind", SIMULATED_ONES)
@pytest.mark.parametrize("native", [False, True])
def test_what_is_simulated_is_said_and_listed(monkeypatch, kind, native):
    fn, shapes, reason = SIMULATED_ONES[kind]
    step = jax.grad(lambda *a: (fn(*a, formats=NATIVE) ** 2).sum(), (0, 1))
    args = [normal(i, *s) for i, s in enumerate(shapes)]
    monkeypatch.setattr(fp8, "is_native", lambda: native)
    fp8._tell_once_of.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step(*args)
    assert [str(w.message).partition(":")[0] for w in caught] == [
        f"native FP8 formats on {kind}"
        + (" of its operands" if kind.startswith("an op") else "")
    ]
    found = jus.fp8_products(step, *args)
    assert len(found) == 3 and all(reason in p.reason for p in found)
    with pytest.raises(AssertionError, match="3 of 3 products are not 8-bit"):
        jus.assert_fp8(step, *args)


def test_a_program_without_products_is_no_8_bit_one():
    with pytest.raises(AssertionError, match="has no products, in 8 bits or wider"):
        jus.assert_fp8(lambda x: x + 1, jnp.ones(3))


def test_assert_fp8_says_which_are_not_and_why():
    x, w = normal(0, 64, 128), normal(1, 128, 128)
    step = jax.grad(lambda x, w: _linear(_linear(x, w), w).sum(), (0, 1))
    with pytest.raises(AssertionError, match="this backend has no 8-bit product"):
        jus.assert_fp8(step, x, w)
    plain = jax.jit(lambda x, w: x @ w)
    with pytest.raises(
        AssertionError, match="operands are f32 and f32: give it native"
    ):
        jus.assert_fp8(plain, x, w)
    found = jus.assert_fp8(plain, x, w, but=lambda p: p.out == "f32[64,128]")
    assert len(found) == 1 and found[0].path.endswith("dot_general")


# -- On a GPU --------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_products_are_8_bit_ones_with_their_factors_inside():
    x, w = (
        normal(i, *s, dtype=jnp.bfloat16)
        for i, s in enumerate([(512, 1024), (1024, 768)])
    )

    def step(x, w):
        return output_and_gradients(_linear, x, w)

    found = jus.assert_fp8(jus.jit(step), x, w)
    assert len(found) == 3
    text = jus.jit(step).lower(x, w).compile().as_text()
    assert lone_multiplications(text) == []


@pytest.mark.gpu
@pytest.mark.parametrize("format", [jus.E4M3, jus.E5M2], ids=["E4M3", "E5M2"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_gpu_casts_saturate_and_round_as_simulated_ones(format, dtype):
    x = jnp.arange(2**16, dtype=jnp.uint16).view(dtype).reshape(256, 256)
    ours = {
        "XLA": jax.jit(ft.partial(fp8.cast, format=format))(x),
        "kernel": fp8.cast_and_transpose(x, format=format)[0],
        "transposed": fp8.transpose(fp8.cast_and_transpose(x, format=format)[1]),
    }
    expected = np.asarray(jus.quantize(x, format), np.float32)
    for name, found in ours.items():
        np.testing.assert_array_equal(np.asarray(found, np.float32), expected, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gpu_native_and_simulated_products_agree(dtype):
    """The units add up to 128 products at a time with some 14 bits, aligned to the
    largest of them, before they are added in float32: an error of 2^-13 of the largest
    term for each, against sums of 1024 terms of the same size. bfloat16 results differ
    by its own rounding, 2^-8, twice more."""
    args = [normal(0, 512, 1024, dtype=dtype), normal(1, 1024, 768, dtype=dtype)]
    tolerance = 2e-3 if dtype == jnp.float32 else 1.2e-2

    def run(formats):
        return jax.jit(
            lambda *a: output_and_gradients(ft.partial(jus.linear, formats=formats), *a)
        )(*args)

    for a, b in zip(run(NATIVE), run(SIMULATED), strict=True):
        a, b = (np.asarray(z, np.float64) for z in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
        assert np.abs(a - b).max() <= 8 * tolerance * np.abs(b).std()


@pytest.mark.gpu
def test_gpu_attention_by_cudnn_equals_xla():
    q, k, v = (normal(i, 2, 256, 4, 64, dtype=jnp.bfloat16) for i in range(3))

    def run(**options):
        fn = ft.partial(jus.dot_product_attention, is_causal=True, **options)
        return jax.jit(lambda *a: output_and_gradients(fn, *a))(q, k, v)

    expected = run()
    for formats in (None, NATIVE):
        found = run(implementation="cudnn", formats=formats)
        for a, b in zip(found, expected, strict=True):
            a, b = (np.asarray(z, np.float64) for z in (a, b))
            assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)
