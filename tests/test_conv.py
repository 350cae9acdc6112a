"""Convolutions, pooling and their norms: what the registry's cases cannot state."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from hypothesis import assume, given, settings, strategies as st

import jax_unit_scaling as jus
from jax_unit_scaling.moments import max_moments

OPS = {"Conv": jus.conv, "ConvTranspose": jus.conv_transpose}


def _rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


@st.composite
def _layers(draw, name):
    """The sizes, strides, padding and so on of a small convolution and its input."""
    rank = draw(st.integers(1, 2))

    def each(low, high):
        return st.tuples(*[st.integers(low, high)] * rank)

    window, sizes = draw(each(1, 4)), draw(each(4, 7))
    options = {
        "strides": draw(each(1, 3)),
        "kernel_dilation": draw(each(1, 2)),
    }
    named = ["SAME", "VALID", "CIRCULAR"]
    if name == "Conv" or options["strides"] == rank * (1,):
        named += ["SAME_LOWER", "same", "valid"]
    explicit = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * rank)
    groups = 1
    if name == "Conv":
        named += ["REFLECT", *["CAUSAL"] * (rank == 1)]
        options["feature_group_count"] = groups = draw(st.sampled_from([1, 2]))
    else:
        options["transpose_kernel"] = draw(st.booleans())
    options["padding"] = draw(st.sampled_from(named) | explicit | st.integers(2, 3))
    if name == "Conv" and not isinstance(options["padding"], str):
        options["input_dilation"] = draw(each(1, 3))
    if options["padding"] in ("VALID", "valid") or not isinstance(
        options["padding"], str
    ):
        # so that there is an output
        reach = np.multiply(options["kernel_dilation"], np.subtract(window, 1))
        sizes = tuple((sizes + reach).tolist())
    batch = draw(st.sampled_from([(), (2,), (2, 2)]))
    return (2 * groups, 4, window), options, (*batch, *sizes, 2 * groups)


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_factors_count_the_products_and_the_layer_is_its_namesake_times_one(name, data):
    sizes, options, shape = data.draw(_layers(name))
    rng = np.random.default_rng(0)

    def layer(module, kernel_init):  # numpy throughout: a new shape is a compilation
        return getattr(module, name)(
            *sizes,
            **options,
            use_bias=False,
            kernel_init=lambda key, shape, dtype: jnp.asarray(
                kernel_init(shape), dtype
            ),
            rngs=nnx.Rngs(0),
        )

    plain, ones = layer(nnx, rng.standard_normal), layer(nnx, np.ones)
    unit = layer(jus.nnx, np.ones)
    nnx.update(unit, nnx.state(plain))
    x = rng.standard_normal(shape).astype(np.float32)
    # Of ones, the output is the number of products in each of its elements.
    terms = np.asarray(ones(jnp.ones(shape))).sum()
    assume(terms)
    kernel, bias = plain.kernel.shape, jax.ShapeDtypeStruct((4,), jnp.float32)
    factors = OPS[name].factors(
        x, jax.ShapeDtypeStruct(kernel, jnp.float32), bias, **options, constraint=None
    )
    y = np.asarray(plain(x))
    found = [factors.fwd, *(factors.bwd[k] for k in ("x", "kernel", "bias"))]
    sizes = [y.size, x.size, np.prod(kernel), 4 * terms / y.size]
    np.testing.assert_allclose(found, np.sqrt(np.divide(sizes, terms)), rtol=1e-6)
    np.testing.assert_allclose(unit(x), factors.fwd * y, rtol=1e-4, atol=1e-5)


def test_a_stride_has_no_lower_padding_in_a_transposed_convolution():
    with pytest.raises(ValueError, match="`padding` 'SAME_LOWER' needs `strides` of 1"):
        x, kernel = jnp.ones((4, 9, 8)), jnp.ones((3, 8, 8))
        jus.conv_transpose(x, kernel, strides=2, padding="SAME_LOWER")


# 1/sqrt(pi) for two, 3/2 that for three; E[max^2] = 1 + sqrt(3) / (2 pi) for three.
@pytest.mark.parametrize(
    "n, mean, square",
    [
        (1, 0, 1),
        (2, math.pi**-0.5, 1),
        (3, 1.5 * math.pi**-0.5, 1 + 3**0.5 / (2 * math.pi)),
    ],
)
def test_the_largest_of_normals(n, mean, square):
    np.testing.assert_allclose(max_moments(n), (mean, square), atol=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_formats_round_the_operands_and_the_cotangent(name):
    layer = getattr(jus.nnx, name)(
        8, 8, 3, use_bias=False, formats=jus.SIMULATED_FP8, rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(layer)
    x, g = normal(0, 4, 9, 8), normal(2, 4, 9, 8)
    _, vjp = jax.vjp(lambda p, x: nnx.merge(graph, p)(x), params, x)
    (dkernel,), dx = map(jax.tree.leaves, vjp(g))
    rounded = [jus.quantize(a, jus.E4M3) for a in (x, layer.kernel[...])]
    _, of_rounded = jax.vjp(OPS[name], *rounded)
    want = of_rounded(jus.quantize(g, jus.E5M2))
    for a, b in zip((*dx, dkernel), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_float16_sums_over_positions_do_not_overflow():
    x, kernel = jnp.ones((2**17, 2), jnp.float16), jnp.ones((1, 2, 4), jnp.float16)
    y, vjp = jax.vjp(jus.conv, x, kernel)
    np.testing.assert_allclose(vjp(jnp.ones_like(y))[1], 2**8.5, rtol=1e-3)


def test_a_mask_keeps_the_scale_and_must_be_known():
    mask = np.zeros((3, 32, 64))
    mask[:1] = 1  # a third of the weights
    layer = jus.nnx.Conv(32, 64, 3, mask=mask, constraint=None, rngs=nnx.Rngs(0))
    x, g = normal(0, 8, 64, 32), normal(1, 8, 64, 64)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    y, vjp = jax.vjp(lambda p, x: nnx.merge(graph, p, rest)(x), params, x)
    grads, dx = vjp(g)
    dkernel = grads["kernel"][...]
    np.testing.assert_allclose([_rms(y), _rms(dx), _rms(dkernel[0])], 1, atol=0.05)
    np.testing.assert_array_equal(dkernel[1:], 0)
    with pytest.raises(ValueError, match="`mask` must be known when"):
        jax.jit(lambda m: jus.nnx.Conv(1, 1, 1, mask=m, rngs=nnx.Rngs(0)))(mask)
    with pytest.raises(ValueError, match="`mask` must have the kernel's shape"):
        jus.nnx.Conv(32, 64, 3, mask=0 * mask, rngs=nnx.Rngs(0))


def _batch_norm(module, x, g, **options):
    norm = module.BatchNorm(x.shape[-1], **options, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(norm, nnx.Param, ...)

    def call(params, x):
        norm = nnx.merge(graph, params, stats, copy=True)
        return norm(x), nnx.state(norm, nnx.BatchStat)

    y, vjp, stats = jax.vjp(call, params, x, has_aux=True)
    grads, dx = vjp(g)
    return (y, dx, stats["mean"][...], stats["var"][...]), jax.tree.leaves(grads)


@pytest.mark.parametrize("options", [{}, {"use_running_average": True}])
def test_batch_norm_is_its_namesake_with_factors_on_gain_and_bias(options):
    x, g = 3 + 2 * normal(0, 4, 9, 8), normal(1, 4, 9, 8)
    plain, plain_grads = _batch_norm(nnx, x, g, **options)
    unit, unit_grads = _batch_norm(jus.nnx, x, g, **options)
    for a, b in zip(unit, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(unit_grads, plain_grads, strict=True):
        np.testing.assert_allclose(a, b / 6, rtol=1e-5)


def test_batch_norm_over_a_split_batch_is_that_over_the_whole():
    x, g = normal(0, 4, 9, 8), normal(1, 4, 9, 8)
    whole, grads = _batch_norm(jus.nnx, x, g)
    names = {"axis_name": "b", "batch_axis_name": "b"}
    parts, part_grads = jax.vmap(
        lambda x, g: _batch_norm(jus.nnx, x, g, **names), axis_name="b"
    )(x, g)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(parts[2][0], whole[2], rtol=1e-4, atol=1e-5)
    for a, b in zip(part_grads, grads, strict=True):
        np.testing.assert_allclose(a.sum(0), b, rtol=1e-4, atol=1e-5)


def test_batch_norm_in_float16_sums_over_a_large_batch():
    x = normal(0, 2**17, 2).astype(jnp.float16)
    (y, *_), grads = _batch_norm(jus.nnx, x, jnp.ones_like(x), dtype=jnp.float16)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(grads[0], 2**8.5, rtol=1e-3)  # the bias's
