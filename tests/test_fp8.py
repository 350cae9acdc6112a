"""Native 8-bit products: what they compute, compose with, and compile to."""

import dataclasses
import functools as ft
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn, nnx

import jax_unit_scaling as jus
from jax_unit_scaling import fp8
from jax_unit_scaling.compiled import CompiledProducts, read
from jax_unit_scaling.formats import also_fused

NATIVE, SIMULATED = jus.NATIVE_FP8, jus.SIMULATED_FP8
pytestmark = pytest.mark.filterwarnings("ignore:native FP8 formats on")


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


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
    numbers = (((1,), (0,)), ((), ()))
    y = fp8.dot_general(x, eye, numbers, formats=NATIVE)
    assert jnp.isnan(y).all()  # NaN times zero
    clean = x.at[0, 3].set(0.0)
    y = fp8.dot_general(clean, eye, numbers, formats=NATIVE)
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


def test_kernels_refuse_what_their_tiles_do_not_cover():
    with pytest.raises(ValueError, match=r"`x` must be tiles of \(64, 128\)"):
        fp8.transpose(jnp.zeros((100, 128), jnp.float8_e4m3fn), interpret=True)


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
    layer = jax.checkpoint(lambda x: jnp.tanh(_linear(x, w)), policy=policy)
    kept = (
        [aval for aval, _ in jax.ad_checkpoint.saved_residuals(layer, x)]
        if hasattr(jax.ad_checkpoint, "saved_residuals")
        else []
    )
    expected = jax.grad(lambda x: jnp.tanh(_linear(x, w)).sum())(x)
    np.testing.assert_allclose(
        jax.grad(lambda x: layer(x).sum())(x), expected, rtol=1e-5
    )
    assert all(a.dtype.itemsize <= 4 for a in kept)


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
    q = normal(0, 1, 8, 2, 16)
    with pytest.raises(ValueError, match='`implementation` must be "xla" or "cudnn"'):
        jus.dot_product_attention(q, q, q, implementation="triton")
    with pytest.raises(ValueError, match="neither dropout nor `query_positions`"):
        jus.dot_product_attention(
            q, q, q, None, None, jnp.arange(8), implementation="cudnn"
        )


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

    class Model:
        @jus.jit
        def forward(self, x):
            return x + 1

    with pytest.raises(TypeError, match="`fn` must be a function"):
        jus.jit(3)


def test_jit_sets_its_options_on_a_gpu_alone(monkeypatch):
    given = {}
    monkeypatch.setattr(jax, "jit", lambda fn, **kw: given.update(kw) or fn)
    jus.jit(abs)(-1)
    assert given["compiler_options"] is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jus.jit(abs, compiler_options={"xla_embed_ir_in_executable": True})(-1)
    assert given["compiler_options"] == {
        "xla_gpu_enable_triton_gemm": False,
        "xla_embed_ir_in_executable": True,
    }


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
    alone = [
        line
        for line in text.splitlines()
        if "multiply" in line.split("=")[0] and "fusion(" in line
    ]
    assert alone == []


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
