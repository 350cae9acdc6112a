"""Factors by quadrature, against closed forms, the papers and sampling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_unit_scaling as jus
from jax_unit_scaling.moments import moments, softmax_moments
from jax_unit_scaling.op import OPS
from jax_unit_scaling.ops.activation import _AT_DEFAULTS, _defaults

# Unit Scaling, table A.2. Its figures are closed forms or rounded Monte Carlo.
TABLE = {
    "relu": (math.sqrt(2 / (1 - 1 / math.pi)), math.sqrt(2), 1e-6),
    "gelu": (1.7006, 1.4805, 1e-3),
    "tanh": (1.5931, 1.4669, 1e-3),
    "sigmoid": (4.803, 4.722, 3e-3),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_papers_table(name):
    fwd, bwd, atol = TABLE[name]
    factors = getattr(jus, name).factors(jnp.ones(1), constraint=None)
    np.testing.assert_allclose(factors.fwd, fwd, atol=atol)
    np.testing.assert_allclose(factors.bwd["x"], bwd, atol=atol)


def test_polynomials_are_exact():
    m = moments(lambda x: x**2)
    np.testing.assert_allclose(m, (1, 2**0.5, 3**0.5, 2), rtol=1e-9)


def test_hard_tanh_at_any_mult():
    for mult in (0.3, 1.0, 7.0):  # the PyTorch library's worked example
        z = math.erf(1 / (mult * 2**0.5))
        bump = math.sqrt(2 / math.pi) / mult * math.exp(-1 / (2 * mult**2))
        factors = jus.hard_tanh.factors(jnp.ones(1), mult=mult, constraint=None)
        want = (z + (1 - z) / mult**2 - bump) ** -0.5, z**-0.5
        np.testing.assert_allclose((factors.fwd, factors.bwd["x"]), want, rtol=2e-5)


@pytest.mark.parametrize(
    "f, match",
    [
        (jnp.sign, "derivative of zero"),
        (lambda x: 0 * x + 1, "is constant"),
        (lambda x: 1 / x, "no finite second moment"),
        (lambda x: jnp.exp(x * x), "no finite second moment"),
        (jax.nn.softmax, "not elementwise"),
        (lambda x: x[:3], "keeps its input's shape"),
    ],
)
def test_functions_without_factors_are_refused(f, match):
    with pytest.raises(ValueError, match=match):
        moments(f)


def test_a_traced_hyperparameter_is_refused():
    with pytest.raises(TypeError, match="fixed while tracing"):
        jax.jit(lambda a: moments(lambda x: jnp.tanh(a * x)).std)(2.0)


def test_it_works_inside_any_trace():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")

    def f(x):
        return jus.unit_scaled(lambda z: jnp.cos(z) + z)(x)

    x = jnp.linspace(-1, 1, 4)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    for other in (jax.jit(f), jax.vmap(f), mapped, jax.jit(mapped)):
        np.testing.assert_allclose(other(x), f(x), rtol=1e-6)
    assert jnp.isfinite(jax.jit(jax.grad(lambda x: f(x).sum()))(x)).all()


@pytest.mark.parametrize("std", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("n", [2, 8, 64])
def test_softmax_moments_against_sampling(std, n):
    rng = np.random.default_rng(0)
    p = np.exp(std * rng.normal(size=(100_000, n)))
    p /= p.sum(1, keepdims=True)
    g = rng.normal(size=p.shape)
    dx = p * (g - (p * g).sum(1, keepdims=True))
    m = softmax_moments(std, np.array([1, n]))
    np.testing.assert_allclose([m.square[0], m.gradient[0]], [1, 0], atol=1e-9)
    for sample, exact in (
        ((p**2).mean(1), m.square[1]),
        ((dx**2).mean(1), m.gradient[1]),
    ):
        error = sample.std() / len(sample) ** 0.5
        np.testing.assert_allclose(sample.mean(), exact, atol=4.5 * error)


def test_softmax_approaches_its_limits():
    n = np.array([8, 64, 8192])
    got = n * softmax_moments(1.0, n).square ** 0.5
    np.testing.assert_allclose(got, [1.363, 1.576, math.exp(0.5)], rtol=1e-3)


@pytest.mark.parametrize("f", _AT_DEFAULTS, ids=lambda f: f.__name__)
def test_what_is_known_at_the_default_options_is_what_the_quadrature_gives(f):
    m = moments(f, **_defaults(f))
    # Twelve digits are stated; means of zero are rounding in the quadrature.
    np.testing.assert_allclose(_AT_DEFAULTS[f], m, rtol=1e-11, atol=1e-10)
    moments.cache_clear()
    OPS[f.__name__].factors(jnp.ones(1))
    assert moments.cache_info().misses == 0
