"""Convolutions, pooling and their norms: what the registry's cases cannot state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings, strategies as st

import jax_unit_scaling as jus

OPS = {"Conv": jus.conv, "ConvTranspose": jus.conv_transpose}


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


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
    if options["padding"] == "VALID" or not isinstance(options["padding"], str):
        # so that there is an output
        reach = np.multiply(options["kernel_dilation"], np.subtract(window, 1))
        sizes = tuple((sizes + reach).tolist())
    batch = draw(st.sampled_from([(), (2,), (2, 2)]))
    return (2 * groups, 4, window), options, (*batch, *sizes, 2 * groups)


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=25, deadline=None, derandomize=True)
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
