"""Formats against ml_dtypes, bit for bit, and rounding that no compiler removes."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_unit_scaling import formats
from jax_unit_scaling._jaxpr import Call
from jax_unit_scaling.formats import E4M3, E5M2, FP16, Format, quantize, quantize_bwd

PRESETS = {k: v for k, v in vars(formats).items() if isinstance(v, Format)}


def test_there_is_a_preset_for_every_small_type():
    names = [n for n in dir(ml_dtypes) if re.match(r"float[468]_", n)]
    types = {np.dtype(getattr(ml_dtypes, n)) for n in names if "e8m0" not in n}
    assert types <= {f.dtype for f in PRESETS.values()}
    assert len(types) == 10


@pytest.mark.parametrize("name", PRESETS)
def test_presets_agree_with_ml_dtypes(name):
    f, info = PRESETS[name], ml_dtypes.finfo(PRESETS[name].dtype)
    assert f.max == float(info.max)
    assert f.smallest_normal == float(info.smallest_normal)
    assert f.smallest_subnormal == float(info.smallest_subnormal)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
def test_rounding_equals_ml_dtypes_on_every_bit_pattern(name, source, jitted):
    f = PRESETS[name]
    x = np.arange(2**16, dtype=np.uint16).view(source)
    # Where x's dtype ends before the format does, that is where it saturates: rounding
    # float16's 65504 to BF16 would give 65536, which float16 does not have.
    largest = f.max_in(jnp.dtype(source))
    with np.errstate(all="ignore"):
        clipped = np.clip(x.astype(np.float64), -largest, largest)
        want = clipped.astype(np.float32).astype(f.dtype).astype(np.float32)
        want = np.where(np.isnan(x), x, want.astype(source))

    def rounded(x):
        return quantize(x, f)

    got = np.asarray((jax.jit(rounded) if jitted else rounded)(jnp.asarray(x)))
    assert got.dtype == x.dtype
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        number = ~np.isnan(x)
        np.testing.assert_array_equal(~np.isnan(got), number)
    np.testing.assert_array_equal(
        got[number].view(np.uint16), want[number].view(np.uint16)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_float32_rounds_as_ml_dtypes_does(name):
    f = PRESETS[name]
    rng = np.random.default_rng(0)
    x = (rng.normal(size=2**17) * 2.0 ** rng.uniform(-20, 18, 2**17)).astype("f4")
    x = np.concatenate([x, [np.inf, -np.inf, 0.0, -0.0]]).astype(np.float32)
    want = np.clip(x, -f.max, f.max).astype(f.dtype).astype(np.float32)
    got = np.asarray(quantize(jnp.asarray(x), f))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_any_pair_of_bits_is_a_format():
    assert Format(3, 2).max == 14.0 and Format(3, 2).smallest_subnormal == 2.0**-4
    assert Format(5, 10) == Format(5, 10) != FP16  # which names its dtype
    x = jax.random.normal(jax.random.key(0), (1000,))
    np.testing.assert_array_equal(quantize(x, Format(5, 10)), quantize(x, FP16))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: Format(9, 3), ValueError, "`exponent_bits` must be an integer from 1"),
        (lambda: Format(4, 24), ValueError, "`mantissa_bits` must be an integer"),
        (lambda: Format(4, 3, max=449.0), ValueError, "`max` must be a number of the"),
        (lambda: Format(4, 3, bias=200), ValueError, "`max` must be|float32 cannot"),
        (lambda: quantize(jnp.ones(1), "e4m3"), TypeError, "`format` must be a"),
        (lambda: quantize(jnp.ones(1, int), E4M3), TypeError, "`x` must be a floating"),
    ],
)
def test_what_is_no_format_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_each_direction_is_rounded_alone():
    x, g = jnp.array([1.1, 500.0]), jnp.array([0.3, 1e6])
    y, vjp = jax.vjp(lambda x: quantize(x, E4M3), x)
    np.testing.assert_array_equal(y, [1.125, 448.0])
    np.testing.assert_array_equal(vjp(g)[0], g)
    y, vjp = jax.vjp(lambda x: quantize_bwd(x, E5M2), x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(vjp(g)[0], [0.3125, 57344.0])


@pytest.mark.parametrize("value", [1.1, -300.0, 0.3 * 2**-9, 447.0])
def test_stochastic_rounding_is_unbiased(value):
    n = 2**17
    x = jnp.full(n, value, jnp.float32)
    y = np.asarray(quantize(x, E4M3, jax.random.key(0)), np.float64)
    low, high = np.unique(y)
    assert low < value < high
    # A mean of n draws from two values has a standard error of at most half the step
    # times n^-1/2: 4.5 of them.
    bound = 4.5 * (high - low) / 2 / n**0.5
    np.testing.assert_allclose(y.mean(), value, atol=bound)
    beyond = quantize(jnp.full(n, 1e4), E4M3, jax.random.key(0))
    np.testing.assert_array_equal(beyond, 448.0)


def test_the_rounding_is_in_the_program_of_every_platform():
    def step(x, w):
        def loss(w):
            y = quantize(x, E4M3) @ quantize(w, E4M3)
            return jnp.sum(quantize_bwd(y, E5M2) ** 2)

        return jax.grad(loss)(w)

    x, w = jnp.ones((4, 8)), jnp.ones((8, 2))
    exported = jax.export.export(jax.jit(step), platforms=("tpu", "cuda", "cpu"))(x, w)
    program = exported.mlir_module()
    assert len(re.findall(r"call @_quantize", program)) >= 3
    assert "round_nearest_even" in program and "shift_right_logical" in program
    # Nothing that a compiler could take for a cast there and back.
    assert not re.search(r"f8E|f6E|f4E", program)


def test_it_stays_one_equation_after_grad_and_vmap():
    def names(f, x):
        found = Call(f, (x,), {}).region.equations
        return [e.name for e in found if e.is_own]

    def f(x):
        return jnp.sum(quantize_bwd(quantize(x, E4M3), E5M2))

    x, xs = jnp.ones(3), jnp.ones((2, 3))
    assert names(ft.partial(quantize, format=E4M3), x) == ["_quantize_fwd"]
    assert names(f, x) == ["_quantize_fwd", "_quantize_bwd"]
    assert names(jax.grad(f), x) == ["_quantize_fwd"] * 2
    assert names(jax.vmap(jax.grad(f)), xs) == ["_quantize_fwd"] * 2
    assert names(jax.grad(lambda xs: jax.vmap(f)(xs).sum()), xs) == (
        ["_quantize_fwd"] * 2
    )


def test_second_derivatives_pass_straight_through_the_rounding():
    """q(x) and r(g) of the backward pass have derivatives of one each."""

    def f(key, x):
        return jnp.sum(jnp.sin(quantize_bwd(quantize(x, E4M3, key), E5M2)))

    x = jax.random.normal(jax.random.key(0), (7,))
    for key in (None, jax.random.key(1)):
        grad = jax.grad(ft.partial(f, key))
        np.testing.assert_array_equal(
            grad(x), quantize(jnp.cos(quantize(x, E4M3, key)), E5M2)
        )
        want = np.diag(-jnp.sin(quantize(x, E4M3, key)))
        np.testing.assert_array_equal(jax.jacrev(grad)(x), want)
        np.testing.assert_array_equal(jax.jit(jax.jacrev(jax.jit(grad)))(x), want)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jacfwd(grad)(x)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS)
def test_a_gpu_rounds_under_jit(name):
    f = PRESETS[name]
    x = jax.random.normal(jax.random.key(0), (4096,))
    got = np.asarray(jax.jit(lambda x: quantize(x, f))(x))
    want = np.clip(np.asarray(x), -f.max, f.max).astype(f.dtype).astype(np.float32)
    np.testing.assert_array_equal(got, want)
