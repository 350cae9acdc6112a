"""Every pair of transformations works as said, or is refused with the right order."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_unit_scaling as jus
from jax_unit_scaling import simulate_fp8, track_scales, unit_scale

pytestmark = pytest.mark.filterwarnings("ignore:native FP8 formats on")

# Magnitudes in [1, 2): rounding them to FP8 is the same at every power of two.
KEYS = jax.random.split(jax.random.key(0), 4)
X, W = (
    jax.random.uniform(KEYS[i], shape, minval=1, maxval=2)
    * jax.random.rademacher(KEYS[i + 2], shape)
    for i, shape in enumerate(((4, 8), (8, 5)))
)


def _loss(product, x, w):
    return jnp.sum(jnp.sin(product(x, w)) ** 2)


LOSS = ft.partial(_loss, jnp.matmul)


def _rounded(x, w):
    x, w = jus.quantize_fwd(x, jus.E4M3), jus.quantize_fwd(w, jus.E4M3)
    return jus.quantize_bwd(x @ w, jus.E5M2)


ARGNUMS = (0, 1)
TRANSFORMS = {
    "value_and_grad": ft.partial(jax.value_and_grad, argnums=ARGNUMS),
    "simulate": simulate_fp8,
    "track": track_scales,
    "track_grad": ft.partial(jus.track_value_and_grad, argnums=ARGNUMS),
    "unit_scale": lambda fn: unit_scale(fn, X, W),
    "audit": ft.partial(jus.audit_gradients, argnums=ARGNUMS),
    "cut_edges": ft.partial(jus.cut_edges, argnums=ARGNUMS),
}
TRACKED = "`fn` must not be tracked already.*Track once, outermost"
WRITTEN = "`fn` must be the loss itself, but it computes gradients"
CONCRETE = r"(?s)`args/0` must be concrete.*audit_gradients\(simulate_fp8\(loss\)\)"
EXAMPLE = "`fn` must return .*loss"
# The outer one first; what is not here gives the loss's value, and gradients.
REFUSED = {
    ("track", "track"): TRACKED,
    ("track", "track_grad"): TRACKED,
    ("track_grad", "track"): TRACKED,
    ("track_grad", "track_grad"): TRACKED,
    ("audit", "value_and_grad"): WRITTEN,
    ("audit", "track_grad"): WRITTEN,
    ("cut_edges", "value_and_grad"): WRITTEN,
    ("cut_edges", "track_grad"): WRITTEN,
    ("cut_edges", "audit"): CONCRETE,
    ("cut_edges", "cut_edges"): EXAMPLE,
    ("audit", "cut_edges"): EXAMPLE,
    ("value_and_grad", "cut_edges"): "not a valid JAX type",  # JAX's own
    ("track_grad", "cut_edges"): EXAMPLE,
    **{(name, "audit"): CONCRETE for name in TRANSFORMS},
}
PAIRS = list(itertools.product(TRANSFORMS, TRANSFORMS))


def _value(fn):
    """`fn`'s first result alone, where a loss is asked for."""
    return lambda x, w: jax.tree.leaves(fn(x, w))[0]


def _of_a_pair(outer, inner):
    fn = TRANSFORMS[inner](LOSS)
    takes_loss = outer not in ("simulate", "track", "unit_scale")
    return TRANSFORMS[outer](_value(fn) if takes_loss else fn)


@pytest.mark.parametrize("outer, inner", PAIRS)
def test_a_pair_gives_the_loss_or_is_refused(outer, inner):
    if (outer, inner) in REFUSED:
        with pytest.raises(TypeError, match=REFUSED[outer, inner]):
            _of_a_pair(outer, inner)(X, W)
        return
    out = _of_a_pair(outer, inner)(X, W)
    if outer == "audit":
        assert out.is_true
    elif "cut_edges" in (outer, inner):
        assert repr(jus.cut_edges(LOSS, ARGNUMS)(X, W)) in repr(out)
    else:
        product = _rounded if "simulate" in (outer, inner) else jnp.matmul
        want = jax.value_and_grad(ft.partial(_loss, product), ARGNUMS)(X, W)
        gives_gradients = {"value_and_grad", "track_grad"} & {outer, inner}
        # Sums of 40 float32 numbers err by 40 units of their largest at most.
        n = 3 if gives_gradients else 1
        got, want = jax.tree.leaves(out)[:n], jax.tree.leaves(want)[:n]
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, atol=40 * 2.0**-23 * np.abs(w).max())


# -- Cotangents that would be rounded at their true size -------------------------------


@jax.custom_vjp
def _with_a_rule(x, w):
    return x @ w


_with_a_rule.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_vjp
def _with_a_product_in_its_rule_alone(x, w):
    return jnp.sum(x) + jnp.sum(w) + jnp.zeros((4, 5))


_with_a_product_in_its_rule_alone.defvjp(
    lambda x, w: (_with_a_product_in_its_rule_alone(x, w), (x, w)),
    lambda r, g: (g @ r[1].T, r[0].T @ g),
)
LOSSES = {
    "a product": jnp.matmul,
    "with a rule": _with_a_rule,
    "a rule's": _with_a_product_in_its_rule_alone,
    "in a scan": lambda x, w: lax.scan(lambda c, _: (c + x @ w, None), 0.0 * x @ w, X)[
        0
    ],
    "in remat": lambda x, w: jax.checkpoint(jnp.matmul)(x, w),
    "in a cond": lambda x, w: lax.cond(x.sum() > 0, jnp.matmul, jnp.matmul, x, w),
    "of the library": ft.partial(jus.linear, formats=jus.SIMULATED_FP8),
    "native": ft.partial(jus.linear, formats=jus.NATIVE_FP8),
}
WITH_FORMATS = {"of the library", "native"}
AROUND = {
    "grad": jax.grad,
    "jit of it": lambda f: jax.jit(jax.grad(f)),
    "of jit": lambda f: jax.grad(jax.jit(f)),
    "vmap": lambda f: jax.vmap(jax.grad(lambda x, w: f(x[None][0], w)), (0, None)),
    "vjp": lambda f: lambda *args: jax.vjp(f, *args)[1](1.0),
    "remat": lambda f: jax.grad(jax.checkpoint(f)),
    "scan": lambda f: jax.grad(lambda x, w: lax.map(lambda x: f(x, w), x[None]).sum()),
    "track": jus.track_value_and_grad,
    "audit": jus.audit_gradients,
    "simulate": lambda f: jax.grad(simulate_fp8(f)),
    "unit_scale": lambda f: jax.grad(unit_scale(f, X, W)),
}
RIGHT = r"Differentiate first: `unit_scale\(jax.value_and_grad\(simulate_fp8\(loss\)\)"

# Each of either with the first of the other; `-m slow` for all.
COMBINATIONS = [
    pytest.param(
        name,
        around,
        marks=[] if name == "a product" or around == "jit of it" else pytest.mark.slow,
    )
    for name, around in itertools.product(LOSSES, AROUND)
]


@pytest.mark.parametrize("name, around", COMBINATIONS)
def test_a_loss_that_is_unit_scaled_first_is_refused(name, around):
    loss = simulate_fp8(ft.partial(_loss, LOSSES[name]))
    scaled = unit_scale(loss, X, W)
    args = (X, W) if around != "vmap" else (X[None], W)
    with pytest.raises(TypeError, match=RIGHT):
        AROUND[around](scaled)(*args)
    # Without a derivative it is the loss, and in the right order that is given.
    np.testing.assert_allclose(scaled(X, W), loss(X, W), rtol=1e-5)


@pytest.mark.parametrize("name", sorted({*LOSSES} - WITH_FORMATS))
def test_so_is_one_that_is_simulated_around_it(name):
    scaled = unit_scale(ft.partial(_loss, LOSSES[name]), X, W)
    for fn in (simulate_fp8(scaled), simulate_fp8(jax.jit(lambda x, w: scaled(x, w)))):
        with pytest.raises(TypeError, match=RIGHT):
            jax.jit(jax.grad(fn))(X, W)


@pytest.mark.parametrize("name", LOSSES)
def test_in_the_right_order_gradients_are_those_of_fp8(name):
    step = jax.value_and_grad(simulate_fp8(ft.partial(_loss, LOSSES[name])), ARGNUMS)
    got, want = unit_scale(step, X, W)(X, W), step(X, W)
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max())


@pytest.mark.parametrize("name", sorted({*LOSSES} - WITH_FORMATS))
def test_without_rounded_cotangents_the_order_is_free(name):
    loss = ft.partial(_loss, LOSSES[name])
    for fn in (loss, jus.simulate_format(loss, jus.E4M3, None)):
        want = jax.grad(fn, ARGNUMS)(X, W)
        for g, w in zip(jax.grad(unit_scale(fn, X, W), ARGNUMS)(X, W), want):  # noqa: B905
            np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max())


def test_rounding_twice_to_one_format_is_rounding_once():
    step = jax.value_and_grad(LOSS, ARGNUMS)
    once, twice = simulate_fp8(step), simulate_fp8(simulate_fp8(step))
    jax.tree.map(np.testing.assert_array_equal, once(X, W), twice(X, W))


def test_names_in_a_record_are_those_of_the_function():
    _, plain = track_scales(LOSS)(X, W)
    _, scaled = track_scales(unit_scale(LOSS, X, W))(X, W)
    assert set(plain) <= set(scaled)
