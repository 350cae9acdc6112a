"""The primitive: two factors, exactly, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_unit_scaling.constraints import (
    amean,
    apply_constraint,
    gmean,
    hmean,
    to_grad_input_scale,
    to_left_grad_scale,
    to_output_scale,
    to_right_grad_scale,
)
from jax_unit_scaling.scale import scale_bwd, scale_fwd, scaled

X = jnp.array([1.0, -2.0, 0.5])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_output_and_cotangent_are_scaled_in_the_dtype(dtype):
    x = X.astype(dtype)
    y, vjp = jax.vjp(lambda x: scaled(x, fwd=4.0, bwd=0.25), x)
    (g,) = vjp(x)
    assert y.dtype == g.dtype == dtype
    np.testing.assert_array_equal(y, 4 * x)
    np.testing.assert_array_equal(g, x / 4)


def test_one_costs_nothing_and_nothing_is_saved():
    assert scaled(X) is X
    assert not jax.make_jaxpr(lambda x: scaled(x, fwd=1.0, bwd=1.0))(X).eqns
    assert "mul" not in str(jax.make_jaxpr(lambda x: scale_bwd(x, 2.0))(X))
    _, vjp = jax.vjp(lambda x: scaled(x, fwd=2.0, bwd=3.0), X)
    assert not jax.tree.leaves(vjp)


def test_it_composes_with_every_transformation():
    def f(x):
        return scaled(x, fwd=2.0, bwd=3.0)

    grad = jax.grad(lambda x: f(x).sum())
    np.testing.assert_array_equal(jax.jit(grad)(X), 3 * jnp.ones(3))
    np.testing.assert_array_equal(jax.vmap(f)(X), 2 * X)
    np.testing.assert_array_equal(jax.vmap(jax.grad(f))(X), 3 * jnp.ones(3))
    np.testing.assert_array_equal(
        jax.grad(lambda x: jax.checkpoint(f)(x).sum())(X), 3 * jnp.ones(3)
    )

    def scan(x):
        return jax.lax.scan(lambda c, _: (f(c), None), x, length=3)[0]

    np.testing.assert_array_equal(scan(X), 8 * X)
    np.testing.assert_array_equal(jax.grad(lambda x: scan(x).sum())(X), 27.0)
    # x^3 through f: the backward pass sees the scaled x, and is scaled in its turn.
    second = jax.grad(jax.grad(lambda x: f(x) ** 3))(1.0)
    np.testing.assert_allclose(second, 3 * 6 * 2 * 3)


@pytest.mark.parametrize("factor", [1e-5, 1e6])
def test_a_factor_outside_float16s_range_is_not_lost(factor):
    x = jnp.array([0.01, 3.0], jnp.float16) / factor**0.5
    want = (np.asarray(x, np.float32) * np.float32(factor)).astype(np.float16)
    np.testing.assert_array_equal(scale_fwd(x, factor), want)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: scaled(jnp.arange(3)), TypeError, "`x` must be a floating-point"),
        (lambda: scaled(X, fwd=0.0), ValueError, "`fwd` must be finite and positive"),
        (lambda: scaled(X, bwd=-1.0), ValueError, "`bwd` must be finite and positive"),
        (lambda: scaled(X, bwd=float("nan")), ValueError, "`bwd` must be finite"),
        (lambda: scaled(X, fwd=float("inf")), ValueError, "`fwd` must be finite"),
        (lambda: jax.jit(scale_fwd)(X, 2.0), TypeError, "known while tracing"),
        (lambda: scaled(X, fwd=True), TypeError, "`fwd` must be a Python number"),
        (lambda: jax.jvp(lambda x: scale_fwd(x, 2.0), (X,), (X,)), TypeError, "jvp"),
    ],
)
def test_what_cannot_be_a_factor_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_constraints():
    factors = (0.5, 2.0, 8.0)
    assert apply_constraint(None, *factors) == factors
    for constraint, value in (
        (gmean, 2.0),
        (hmean, 3 / (2 + 0.5 + 0.125)),
        (amean, 3.5),
        (to_output_scale, 0.5),
        (to_left_grad_scale, 2.0),
        (to_right_grad_scale, 8.0),
    ):
        np.testing.assert_allclose(apply_constraint(constraint, *factors), 3 * [value])
    assert apply_constraint(to_grad_input_scale, 0.5, 2.0) == (2.0, 2.0)


@pytest.mark.parametrize(
    "constraint, error, match",
    [
        ("gmean", TypeError, "must be a function such as"),
        (to_left_grad_scale, TypeError, "does not fit an operation with 1"),
        (lambda *f: -1.0, ValueError, "must return one finite, positive float"),
    ],
)
def test_what_is_no_constraint_is_refused(constraint, error, match):
    with pytest.raises(error, match=match):
        apply_constraint(constraint, 0.5, 2.0)
