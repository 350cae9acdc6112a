"""All transformations, of unmodified models of several libraries.

Each library's model is the same maths, so one reference, written by hand in plain
`jax.numpy` with its products rounded by hand, holds for all of them.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from models import INPUTS, MODELS, REFERENCE, TREES, Stateful, normal

import jax_unit_scaling as jus

CASES = [(name, library) for name in MODELS for library in MODELS[name]]
# Compiled long: each model and each library once; `-m slow` for all.
QUICK = [
    ("transformer", "nnx"),
    ("convnet", "jnp"),
    ("convnet", "linen"),
    ("lstm", "equinox"),
    ("experts", "haiku"),
]
COSTLY = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in CASES
]


@ft.cache
def _model(name, library):
    """The loss, its parameters, what makes a gradient the shared tree's, and x."""
    loss, convert = MODELS[name][library]()
    params, pull = jax.vjp(convert, TREES[name])
    return loss, params, lambda grads: pull(grads)[0], INPUTS[name]


def _rounded(product):
    def of_rounded(lhs, rhs, *args, **kwargs):
        lhs, rhs = jus.quantize_fwd(lhs, jus.E4M3), jus.quantize_fwd(rhs, jus.E4M3)
        return jus.quantize_bwd(product(lhs, rhs, *args, **kwargs), jus.E5M2)

    return of_rounded


@ft.cache
def _reference(name, in_fp8):
    products = {"dot": jnp.matmul, "conv": lax.conv_general_dilated}
    if in_fp8:
        products = {k: _rounded(product) for k, product in products.items()}
    loss = ft.partial(REFERENCE[name], **products)
    return jax.jit(jax.value_and_grad(loss))(TREES[name], INPUTS[name])


def _close(got, want, name, tolerance=1e-5):
    """Value and gradients agree. Sums of some dozens of float32 numbers, in another
    order, err by 1e-6 of their largest; tensors are compared by their largest."""
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    assert jax.tree.structure(got[1]) == jax.tree.structure(want[1])
    for g, w in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        np.testing.assert_allclose(g, w, atol=tolerance * np.abs(w).max())


def _same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name, library", COSTLY)
def test_a_model_is_the_reference(name, library):
    loss, params, to_tree, x = _model(name, library)
    value, grads = jax.jit(jax.value_and_grad(loss))(params, x)
    _close((value, to_tree(grads)), _reference(name, False), name)


@pytest.mark.parametrize("name, library", CASES)
def test_simulated_fp8_is_that_of_the_hand_rounded_reference(name, library):
    loss, params, to_tree, x = _model(name, library)
    want = _reference(name, True)
    before = jax.value_and_grad(jus.simulate_fp8(loss))
    after = jus.simulate_fp8(jax.value_and_grad(loss))
    both = jax.jit(lambda *args: [f(*args) for f in (before, after)])
    for value, grads in both(params, x):
        _close((value, to_tree(grads)), want, name)
    # It is the rounding that is seen: FP8 errs by some per cent.
    exact = _reference(name, False)
    assert abs(want[0] / exact[0] - 1) > 1e-4


@pytest.mark.parametrize("name, library", COSTLY)
def test_tracking_changes_nothing_and_sees_both_passes(name, library):
    loss, params, _, x = _model(name, library)
    in_fp8 = jus.simulate_fp8(loss)
    want = jax.jit(jax.value_and_grad(in_fp8))(params, x)
    track = jus.track_value_and_grad(in_fp8, where=_is_argument_or_product)
    *got, scales = jax.jit(track)(params, x)
    _close(got, want, name, 1e-6)
    assert any(t.site.source != "argument" for t in scales.values())
    arguments = [t for t in scales.values() if t.site.source == "argument"]
    pairs = zip(*map(jax.tree.leaves, (params, want[1])), strict=True)
    for tensor, (p, g) in zip(arguments, pairs):  # noqa: B905
        for stats, v in ((tensor.forward, p), (tensor.backward, g)):
            np.testing.assert_allclose(stats.scale, np.sqrt(np.mean(v**2)), rtol=1e-5)


def _is_argument_or_product(site):
    # Each tensor that is tracked takes time to compile.
    return site.source == "argument" or site.name.endswith(("general", "dilated"))


@pytest.mark.parametrize("name, library", COSTLY)
def test_unit_scaled_it_is_the_same_function(name, library):
    loss, params, to_tree, x = _model(name, library)
    want = _reference(name, False)
    step = jus.unit_scale(jax.value_and_grad(loss), params, x)
    value, grads = jax.jit(step)(params, x)
    _close((value, to_tree(grads)), want, name)
    value, grads = jax.jit(jax.value_and_grad(jus.unit_scale(loss, params, x)))(
        params, x
    )
    _close((value, to_tree(grads)), want, name)


@pytest.mark.parametrize("name, library", COSTLY)
def test_unit_scaled_fp8_is_right_where_plain_fp8_is_lost(name, library):
    """At a loss of 2^-30 of its size E5M2, which holds 2^-16, has no gradients left."""
    loss, params, to_tree, x = _model(name, library)

    def tiny(params, x):
        return loss(params, x) * 2.0**-30

    fp8 = jax.value_and_grad(jus.simulate_fp8(tiny))
    _, lost = jax.jit(fp8)(params, x)
    _, grads = jax.jit(jus.unit_scale(fp8, params, x))(params, x)
    _, want = _reference(name, False)
    for key, g in to_tree(grads).items():
        assert _cosine(g, want[key]) > 0.97, key
    assert min(_cosine(to_tree(lost)[key], want[key]) for key in want) < 0.5


def _cosine(a, b):
    a, b = (np.ravel(np.asarray(x, np.float64)) for x in (a, b))
    return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300)


@pytest.mark.parametrize("name, library", COSTLY)
def test_an_audit_finds_true_gradients_and_a_false_one(name, library):
    loss, params, _, x = _model(name, library)
    audit = jus.audit_gradients(jus.simulate_fp8(loss))(params, x)
    assert audit.is_true
    for row in audit.gradients:
        np.testing.assert_allclose((row.cosine, row.ratio, row.expected), 1, rtol=1e-6)

    def false(params, x):
        first, *rest = jax.tree.leaves(params)
        shared = jnp.sum(jus.scale_bwd(first, 2.0) ** 2)
        return loss(params, x) + shared

    audit = jus.audit_gradients(false)(params, x)
    verdicts = [row.verdict for row in audit.gradients]
    assert verdicts == ["broken", *["true"] * (len(verdicts) - 1)]
    assert [c.operation.name for c in audit.culprits] == ["scale_bwd"]


# -- State -----------------------------------------------------------------------------


def _mean_square(model, x):
    return jnp.mean(model(x) ** 2)


def _normalised(model, x):
    return jnp.mean(jnp.sin(model.norm(model.up(x))) ** 2)


def _dropped(model, x):
    return jnp.mean(model.drop(model.up(x)) ** 2)


LOSSES = {"BatchNorm": _normalised, "Dropout": _dropped}
_track_grad = ft.partial(jus.track_value_and_grad, where=_is_argument_or_product)
# Each gives a function of (module, x) whose first result is the loss.
STATEFUL = {
    "simulate_format": lambda f, *args: jus.simulate_format(f, None, None),
    "track_scales": lambda f, *args: jus.track_scales(f, where=_is_argument_or_product),
    "track_value_and_grad of x": lambda f, *args: _track_grad(f, 1),
    "track_value_and_grad of both": lambda f, *args: _track_grad(f, (0, 1)),
    "unit_scale": lambda f, *args: jus.unit_scale(f, *args),
    "tracked, simulated and unit-scaled": lambda f, *args: jus.track_scales(
        jus.unit_scale(jus.simulate_format(f, None, None), *args)
    ),
    "nnx.grad of it": lambda f, *args: nnx.value_and_grad(
        jus.simulate_format(f, None, None), argnums=1
    ),
    "nnx.jit of it": lambda f, *args: nnx.jit(_track_grad(f, 1)),
    "of nnx.grad": lambda f, *args: jus.unit_scale(
        nnx.value_and_grad(f, argnums=1), *args
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", STATEFUL)
def test_statistics_and_random_counts_are_updated(name, loss):
    x = normal(16, 8)
    plain, model = Stateful(), Stateful()
    f = STATEFUL[name](LOSSES[loss], model, x)
    want = [LOSSES[loss](plain, x) for _ in range(2)]
    got = [jax.tree.leaves(f(model, x))[0] for _ in range(2)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    _equal_state(model, plain)
    changed = nnx.state(Stateful(), (nnx.BatchStat, nnx.RngCount))
    assert not all(
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (changed, _state(model))), strict=True)
    )


def _state(model):
    return nnx.state(model, (nnx.BatchStat, nnx.RngCount))


def _equal_state(a, b):
    pairs = zip(*map(jax.tree.leaves, (_state(a), _state(b))), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("argnums", [0, 1, (0, 1), -2])
def test_a_modules_gradients_are_those_of_its_arrays(argnums):
    x, model = normal(16, 8), Stateful()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of_arrays(params, x):
        return _mean_square(nnx.merge(graph, params, rest, copy=True), x)

    value, want = jax.value_and_grad(of_arrays, argnums)(params, x)
    track = _track_grad(_mean_square, argnums)
    got_value, got, scales = track(model, x)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)
    given = got if isinstance(argnums, tuple) else (got,)
    flat = [nnx.state(g, nnx.Param) if isinstance(g, Stateful) else g for g in given]
    for g, w in zip(*map(jax.tree.leaves, (flat, want)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6)
    assert scales["args/0/up/kernel"].backward is not None
    for g in given:
        if isinstance(g, Stateful):  # nothing of an integer, nor of a key
            assert g.drop.rngs.count[...].dtype == jax.dtypes.float0


def test_what_has_no_gradient_is_refused():
    with pytest.raises(TypeError, match="`argnums` must be of arguments .* got 1"):
        jus.track_value_and_grad(lambda x, n: x * n, 1)(1.0, jnp.arange(1))
    with pytest.raises(
        TypeError, match="`argnums` must be numbers of the 1 positional"
    ):
        jus.track_value_and_grad(lambda x: x, 1)(jnp.ones(()))
    with pytest.raises(TypeError, match="`fn` must return a scalar loss"):
        jus.track_value_and_grad(lambda x: (x, x))(1.0)
    value, grad, _ = jus.track_value_and_grad(lambda x: (x**2, "aux"), has_aux=True)(
        3.0
    )
    assert value == (9.0, "aux") and grad == 6.0


def test_an_audit_leaves_state_alone():
    model, x = Stateful(), normal(16, 8)
    audit = jus.audit_gradients(_mean_square)(model, x)
    verdicts = {row.path: row.verdict for row in audit.gradients}
    assert verdicts["args/0/up/kernel"] == "true"
    assert verdicts["args/0/norm/mean"] == "zero"
    assert model.drop.rngs.count[...] == 0
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(8))
