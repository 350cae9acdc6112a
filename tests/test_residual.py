"""Residual schemes: the weights they stand for, and unit scale through a stack."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P

import jax_unit_scaling as jus


def test_a_branch_of_another_dtype_gets_cotangents_in_its_own():
    # A float32 branch of a bfloat16 stream, under scan, where a carry keeps its dtype.
    x = jnp.linspace(-1, 1, 8).astype(jnp.bfloat16)

    def stream(x):
        def block(carry, _):
            y = jus.residual_apply(lambda r: r.astype(jnp.float32) * 2, carry * carry)
            return y.astype(carry.dtype), None

        return jnp.sum(jax.lax.scan(block, x, length=2)[0])

    assert jax.grad(stream)(x).dtype == jnp.bfloat16
    wide = x.astype(jnp.float32)
    grads = jax.grad(lambda r, s: jus.residual_add(r, s).sum(), (0, 1))(x, wide)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


def test_fixed_weights_are_the_papers():
    tau = jus.fixed_residual_rule(share=0.2)
    x, y = jax.random.normal(jax.random.key(0), (2, 100))
    for index in (0, 5):
        got = jus.residual_apply(lambda _: y, x, tau=tau(index, 6))
        np.testing.assert_allclose(got, 0.8**0.5 * x + 0.2**0.5 * y, rtol=1e-5)


def test_a_running_mean_gives_all_terms_the_same_weight():
    tau, terms = jus.running_mean_residual_rule(), np.eye(5, dtype=np.float32)
    x = terms[0]
    for index in range(4):
        branch = terms[index + 1]
        x = jus.residual_apply(lambda _, b=branch: b, x, tau=tau(index, 4))
    np.testing.assert_allclose(x, 5**-0.5, rtol=1e-5)
    # It is u-muP's rule where each branch weighs as much as the embedding.
    umup = jus.transformer_residual_rule(residual_mult=2**0.5)
    for index in range(4):
        np.testing.assert_allclose(tau(index, 4), umup(index, 4))


@pytest.mark.parametrize(
    "rule", [jus.fixed_residual_rule(share=0.3), jus.running_mean_residual_rule()]
)
def test_a_stack_has_unit_scale_in_both_passes(rule):
    kernels = jax.random.normal(jax.random.key(0), (8, 128, 128))

    def stack(x):
        for i, kernel in enumerate(kernels):
            x = jus.residual_apply(
                lambda x, k=kernel: jus.linear(x, k), x, tau=rule(i, 8)
            )
        return x

    x, g = jax.random.normal(jax.random.key(1), (2, 256, 128))
    y, vjp = jax.vjp(jax.jit(stack), x)
    # Branches that share their input are not quite independent.
    np.testing.assert_allclose(np.std(y), 1, atol=0.05)
    np.testing.assert_allclose(np.std(vjp(g)[0]), 1, atol=0.05)


def _looped(x, kernels, taus):
    for kernel, tau in zip(kernels, taus, strict=True):
        x = _block(x, kernel, float(tau))
    return x


def _scanned(x, kernels, taus):
    body = lambda x, block: (_block(x, *block), None)
    return jax.lax.scan(body, x, (kernels, taus))[0]


def _block(x, kernel, tau):
    return jus.residual_apply(lambda r: jus.linear(jnp.tanh(r), kernel), x, tau=tau)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_with_weights_of_their_own_are_scanned(dtype):
    x, g = jax.random.normal(jax.random.key(0), (2, 16, 32), dtype)
    kernels = jax.random.normal(jax.random.key(1), (4, 32, 32), dtype)
    tau = jus.running_mean_residual_rule()
    taus = np.array([tau(i, 4) for i in range(4)], "float32")

    @jax.jit
    def both(x, kernels):
        each = (
            jax.vjp(ft.partial(f, taus=taus), x, kernels) for f in (_looped, _scanned)
        )
        return [(y, vjp(g)) for y, vjp in each]

    looped, scanned = both(x, kernels)
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype("float32"), b.astype("float32"), tolerance, 4 * tolerance
        ),
        looped,
        scanned,
    )
    with pytest.raises(TypeError, match="`tau` has no gradient"):
        jax.grad(lambda taus: _scanned(x, kernels, taus).sum())(jnp.array(taus))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_dtypes_are_kept(dtype):
    x, y = jnp.array([0.5, -1.0, 2.0], dtype), jnp.array([1.0, 0.25, -2.0], dtype)

    def both(x, y, tau):
        branch, skip = jus.residual_split(x, tau=tau)
        return jus.residual_add(y, skip, tau=tau), branch

    for f in (ft.partial(both, tau=0.5), lambda x, y: jax.jit(both)(x, y, 0.5)):
        (joined, branch), vjp = jax.vjp(f, x, y)
        grads = vjp((joined, branch))
        assert {a.dtype for a in (joined, branch, *grads)} == {jnp.dtype(dtype)}
        exact = (0.5 * y.astype("float32") + x.astype("float32")) / 1.25**0.5
        rough = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(joined.astype("float32"), exact, atol=rough)


@pytest.mark.parametrize(
    "tau",
    [np.float32(0.5), np.array(0.5), jnp.array(0.5), nnx.Variable(jnp.array(0.5))],
)
def test_a_weight_that_is_known_is_a_number(tau):
    x = jnp.ones(3)
    for f in (
        lambda: jus.residual_apply(jnp.sin, x, tau=tau),
        jax.jit(lambda: jus.residual_apply(jnp.sin, x, tau=tau)),
    ):
        np.testing.assert_allclose(f(), jus.residual_apply(jnp.sin, x, tau=0.5), 1e-6)
    np.testing.assert_array_equal(
        jus.residual_apply(jnp.sin, x, tau=np.int64(1)),
        jus.residual_apply(jnp.sin, x, tau=1.0),
    )


@pytest.mark.parametrize(
    "tau, error, match",
    [
        (-1.0, ValueError, "positive"),
        (jnp.array(-1.0), ValueError, "positive"),
        (jnp.ones(2), ValueError, "shape"),
        ("a", TypeError, "number"),
        (None, TypeError, "number"),
    ],
)
def test_other_weights_are_refused(tau, error, match):
    for call in (jus.residual_split, ft.partial(jus.residual_apply, jnp.sin)):
        with pytest.raises(error, match=f"`tau` must be.*{match}"):
            call(jnp.ones(3), tau=tau)


@pytest.mark.parametrize("tau", [0.5, None])
def test_what_varies_over_devices_meets_what_does_not(tau):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    x, each = jnp.linspace(-1, 1, 6), jnp.array([0.5])

    def stage(x, each):
        branch = lambda r: jnp.sin(r) * (1.0 if tau is None else each[0])
        return jus.residual_apply(branch, x, tau=tau or each[0])

    def total(x):
        specs = {"in_specs": (P(), P("i")), "out_specs": P("i")}
        return jax.shard_map(stage, mesh=mesh, **specs)(x, each).sum()

    factor = 1.0 if tau is None else 0.5
    alone = lambda x: jus.residual_apply(lambda r: jnp.sin(r) * factor, x, tau=0.5)
    got, want = (jax.grad(f)(x) for f in (total, lambda x: alone(x).sum()))
    np.testing.assert_allclose(got, want, 1e-5)


def test_a_weighted_add_has_unit_norm_and_its_own_gradient():
    xs = jax.random.normal(jax.random.key(0), (3, 4096))
    y, vjp = jax.vjp(lambda *xs: jus.weighted_add(*xs, weights=(1, 2, 2)), *xs)
    np.testing.assert_allclose(y, (xs[0] + 2 * xs[1] + 2 * xs[2]) / 3, atol=1e-5)
    for got, weight in zip(vjp(xs[0]), (1 / 3, 2 / 3, 2 / 3), strict=True):
        np.testing.assert_allclose(got, weight * xs[0], rtol=1e-5)
    np.testing.assert_allclose(np.std(jus.weighted_add(*xs)), 1, atol=0.05)
