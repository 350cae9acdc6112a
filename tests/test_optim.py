"""u-muP's optimisers: updates worked out by hand, reports, overrides and errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jax_unit_scaling as jus
from jax_unit_scaling import optim

RATE, DECAY = 0.5, 0.125
# Adam divides by the root of 1 - b2 = 0.001, which float32 knows to 2^-24: a relative
# error of 3e-5 in an update of 0.5.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# Muon's five Newton-Schulz steps leave singular values between 1/2 and 3/2 (Jordan et
# al., 2024).
MUON = 0.5


def _params():
    """One parameter of each kind, its role written by hand."""

    def make(i, shape, **about):
        return nnx.Param(jax.random.normal(jax.random.key(i), shape), **about)

    return nnx.State(
        {
            "bias": make(0, (16,), role="bias", depth=4),
            "gain": make(1, (16,), role="norm"),
            "hidden": make(2, (8, 4, 4), role="weight", fan_in=8, fan_out=16, depth=4),
            "readout": make(3, (16, 10), role="output", fan_in=16, fan_out=10),
            "table": make(4, (10, 4), role="weight", fan_in=4),
        }
    )


# fan_in^-1/2 of weights, times depth^-1/2 of 4 adds.
FACTORS = {
    "bias": 1 / 2,
    "gain": 1.0,
    "hidden": 1 / math.sqrt(8) / 2,
    "readout": 1.0,
    "table": 1 / 2,
}


def _grads(params):
    return jax.tree.map(lambda p: jnp.sin(3 * p), params)


def _pure(state):
    return {name: np.asarray(x) for name, x in nnx.to_pure_dict(state).items()}


def _updates(optimiser, steps=1):
    """The parameters, their gradients, and the update of the last of equal steps."""
    params = _params()
    grads, state = _grads(params), optimiser.init(params)
    for _ in range(steps):
        updates, state = jax.jit(optimiser.update)(grads, state, params)
    return _pure(params), _pure(grads), _pure(updates)


# What an optimiser's first update is, for a parameter p, its gradient g and factor f.
FIRST = {
    "adam": (optim.adam(RATE), lambda p, g, f: -RATE * f * np.sign(g)),
    "adamw": (
        optim.adamw(RATE, weight_decay=DECAY),
        lambda p, g, f: -RATE * f * np.sign(g) - DECAY * p,
    ),
    "adamw, coupled": (
        optim.adamw(RATE, weight_decay=DECAY, independent_weight_decay=False),
        lambda p, g, f: -RATE * f * (np.sign(g) + DECAY * p),
    ),
    "adamw, scheduled": (
        optim.adamw(lambda step: RATE / (step + 2), weight_decay=lambda step: DECAY),
        lambda p, g, f: -RATE / 2 * f * np.sign(g) - DECAY * p,
    ),
    "lion": (
        optim.lion(RATE, weight_decay=DECAY),
        lambda p, g, f: -RATE * f * np.sign(g) - DECAY * p,
    ),
    "sgd": (optim.sgd(RATE), lambda p, g, f: -RATE * f * g),
    "any": (
        optax.chain(optim.scale_by_umup(), optax.sgd(RATE, momentum=0.9)),
        lambda p, g, f: -RATE * f * g,
    ),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_update_is_the_one_worked_out_by_hand(name):
    optimiser, expected = FIRST[name]
    params, grads, updates = _updates(optimiser)
    assert {*updates} == {*FACTORS}
    for path, factor in FACTORS.items():
        want = expected(params[path], grads[path], factor)
        np.testing.assert_allclose(updates[path], want, **CLOSE, err_msg=path)


def test_momentum_sums_gradients_times_their_factors():
    _, grads, updates = _updates(optim.sgd(RATE, momentum=0.5), steps=3)
    for path, factor in FACTORS.items():
        want = -RATE * factor * grads[path] * 1.75  # 1 + 1/2 + 1/4
        np.testing.assert_allclose(updates[path], want, rtol=1e-5)


def test_muon_turns_hidden_weights_as_matrices_and_leaves_the_rest_to_adam():
    params, grads, updates = _updates(optim.muon(RATE, weight_decay=DECAY))
    turned = updates.pop("hidden") + DECAY * params["hidden"]
    u, _, vt = np.linalg.svd(grads["hidden"].reshape(8, 16), full_matrices=False)
    # The rate, fan_out^1/2 and depth^-1/2.
    step = -turned.reshape(8, 16) / (RATE * 4 / 2)
    along = np.diag(u.T @ step @ vt.T)
    np.testing.assert_allclose(along, 1, atol=MUON)
    np.testing.assert_allclose(step, u * along @ vt, atol=1e-3)
    for path, update in updates.items():
        want = -RATE * FACTORS[path] * np.sign(grads[path]) - DECAY * params[path]
        np.testing.assert_allclose(update, want, **CLOSE, err_msg=path)


def test_accumulated_gradients_are_summed_at_unit_scale_and_applied_once():
    optimiser = optim.multi_steps(optim.sgd(RATE), 4)
    _, grads, early = _updates(optimiser, steps=3)
    _, _, updates = _updates(optimiser, steps=4)
    for path, factor in FACTORS.items():
        np.testing.assert_array_equal(early[path], 0)
        # four equal gradients, 4^-1/2 of their sum
        want = -RATE * factor * 2 * grads[path]
        np.testing.assert_allclose(updates[path], want, rtol=1e-5)


class _Model(nnx.Module):
    def __init__(self, constraint=None):
        rngs = nnx.Rngs(0)
        self.embed = jus.nnx.Embed(10, 32, rngs=rngs)
        self.hidden = jus.nnx.Linear(32, 64, rngs=rngs)
        self.readout = jus.nnx.LinearReadout(64, 10, constraint=constraint, rngs=rngs)

    def __call__(self, ids):
        return self.readout(jus.gelu(self.hidden(self.embed(ids))))


IDS = [[1, 2, 3, 4], [5, 6, 7, 8]]


def _loss(model):
    return jus.cross_entropy(model(jnp.array(IDS)), jnp.array(IDS)[::-1])


def _gradients(model):
    graph, params = nnx.split(model, nnx.Param)
    grads = jax.jit(jax.grad(lambda p: _loss(nnx.merge(graph, p))))(params)
    return params, grads


def test_both_readings_of_sgd_make_the_same_update():
    params, grads = _gradients(_Model())
    free = optim.sgd(RATE)
    want, _ = free.update(grads, free.init(params))
    params, other = _gradients(_Model(jus.to_output_scale))
    tied = optim.sgd(RATE, readout_constraint=jus.to_output_scale)
    got, _ = tied.update(other, tied.init(params))
    # The gradient behind the readout is smaller by out^1/2 / in, 10^1/2 / 64.
    np.testing.assert_allclose(
        other["hidden"]["kernel"][...],
        grads["hidden"]["kernel"][...] * 10**0.5 / 64,
        rtol=1e-4,
        atol=1e-6,
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# -- Reports and overrides -------------------------------------------------------------


def test_a_report_takes_a_schedule_and_a_step():
    schedule = optax.linear_schedule(0.0, RATE, 8)
    for step in (0, 2, 8):
        rows = optim.report(_params(), schedule, step=step)
        want = {k: RATE * step / 8 * f for k, f in FACTORS.items()}
        assert {r.path: r.learning_rate for r in rows} == pytest.approx(want)
    with pytest.raises(TypeError, match="`learning_rate` must be"):
        optim.report(_params(), "fast")


def test_a_report_lists_the_rate_of_each_parameter():
    rows = optim.report(_params(), RATE)
    assert [row.path for row in rows] == sorted(FACTORS)
    for row in rows:
        np.testing.assert_allclose(row.factor, FACTORS[row.path])
        np.testing.assert_allclose(row.learning_rate, RATE * FACTORS[row.path])
    hidden = rows[2]
    assert (hidden.role, hidden.shape, hidden.fan_in, hidden.depth) == (
        "weight",
        (8, 4, 4),
        8,
        4,
    )
    lines = [line.split() for line in str(rows).splitlines()]
    assert lines[0][:2] == ["path", "role"] and lines[0][-1] == "learning_rate"
    assert lines[1] == ["bias", "bias", "(16,)", "-", "4", "0.5", "0.25"]


def test_overrides_set_fields_by_path_later_ones_on_top():
    overrides = {"*": {"depth": 16}, "t*": {"depth": 1, "fan_in": 100}}
    got = optim.learning_rate_factors(_params(), overrides=overrides)
    want = {
        "bias": 1 / 4,
        "gain": 1 / 4,
        "hidden": 1 / math.sqrt(8) / 4,
        "readout": 1 / 4,
        "table": 1 / 10,
    }
    assert got == pytest.approx(want)
    _, grads, updates = _updates(optim.sgd(RATE, overrides=overrides))
    for path, factor in want.items():
        np.testing.assert_allclose(updates[path], -RATE * factor * grads[path], 1e-5)


def test_a_rule_of_ones_own_sees_the_record():
    factors = optim.learning_rate_factors(
        _params(), rule=lambda info: float(info.fan_out or 0)
    )
    assert factors == {"bias": 0, "gain": 0, "hidden": 16, "readout": 10, "table": 0}


def _first_of(optimiser, params):
    return optimiser.update(params, optimiser.init(params), params)


WRONG = {
    "no role": (
        lambda: optim.adam(1.0).init({"w": nnx.Param(jnp.ones(3))}),
        "`params` has no role for w",
    ),
    "bare arrays": (lambda: optim.adam(1.0).init({"w": jnp.ones(3)}), "has no role"),
    "role": (
        lambda: optim.report(_params(), 1.0, overrides={"gain": {"role": "scale"}}),
        r"gain: `role` must be one of",
    ),
    "fan-in": (
        lambda: optim.report(_params(), 1.0, overrides={"gain": {"role": "weight"}}),
        "gain: `fan_in` must be given for a weight",
    ),
    "depth": (
        lambda: optim.report(_params(), 1.0, overrides={"gain": {"depth": 0}}),
        "gain: `depth` must be a positive integer, got 0",
    ),
    "pattern": (
        lambda: optim.report(_params(), 1.0, overrides={"gains": {"depth": 2}}),
        "the pattern 'gains', which matches none of the paths bias, gain",
    ),
    "field": (
        lambda: optim.report(_params(), 1.0, overrides={"gain": {"rate": 2}}),
        r"`overrides` may set role, .*, got \['rate'\]",
    ),
    "every": (lambda: optim.multi_steps(optim.adam(1.0), 0), "`every` must be"),
    "readouts": (
        lambda: optim.sgd(1.0, readout_constraint=jus.gmean).init(
            {"b": nnx.Param(jnp.ones(3), role="bias")}
        ),
        "`readout_constraint` needs one weight with the role output, got 0",
    ),
    "readout": (
        lambda: optim.sgd_rule(optim.ParameterInfo("output", 4), None),
        "`readout` must have `fan_in` and `fan_out`",
    ),
    "leaves": (
        lambda: optim.scale_by_umup().update(
            {"w": jnp.ones(3)}, optim.scale_by_umup().init(_params())
        ),
        "`updates` must have the 5 leaves .* got 1",
    ),
    "matrix": (
        lambda: _first_of(
            optim.muon(1.0),
            {"w": nnx.Param(jnp.ones((3, 4)), role="weight", fan_in=4, fan_out=3)},
        ),
        "a weight's last axes must make up its fan-in",
    ),
    "set_depth": (
        lambda: jus.nnx.set_depth(_Model(), 0),
        "`depth` must be a positive integer, got 0",
    ),
}


@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "sgd", "muon"])
def test_a_rate_that_is_no_number_is_named(name):
    with pytest.raises(TypeError, match="`learning_rate` must be .* got '0.1'"):
        getattr(optim, name)("0.1")


@pytest.mark.parametrize("call, match", WRONG.values(), ids=WRONG)
def test_bad_input_gets_an_error_that_names_it(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# -- Metadata survives -----------------------------------------------------------------


def _branch(rngs):
    return jus.nnx.set_depth(jus.nnx.MLP(16, 32, rngs=rngs), 6)


def _factors(module):
    return optim.learning_rate_factors(nnx.state(module, nnx.Param))


def test_metadata_survives_jit_and_eval_shape():
    want = _factors(_branch(nnx.Rngs(0)))
    assert want["down/kernel"] == pytest.approx(1 / math.sqrt(32 * 6))
    made = jax.jit(lambda: nnx.state(_branch(nnx.Rngs(0)), nnx.Param))()
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(made)
    shapes = nnx.state(nnx.eval_shape(lambda: _branch(nnx.Rngs(0))), nnx.Param)
    for state in (made, doubled, shapes):
        assert optim.learning_rate_factors(state) == want


def test_metadata_survives_vmapped_creation_and_a_scan_over_the_stack():
    """Stacked parameters keep the fan-in of one layer; Muon sees one matrix in each."""
    make = nnx.vmap(_branch, in_axes=(0,), out_axes=0)
    stack = make(nnx.Rngs(0).split(3))
    assert _factors(stack) == _factors(_branch(nnx.Rngs(0)))
    graph, params = nnx.split(stack)
    assert jax.tree.leaves(params)[0].shape[0] == 3
    x = jax.random.normal(jax.random.key(1), (64, 16))

    def loss(params):
        def layer(x, one):
            return nnx.merge(graph, one)(x), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, params)[0]))

    @jax.jit
    def step(params):
        grads = jax.grad(loss)(params)
        made = []
        for optimiser in (optim.sgd(RATE), optim.muon(RATE)):
            made.append(optimiser.update(grads, optimiser.init(params), params)[0])
        return grads, *made

    grads, sgd, muon = step(params)
    kernels = [tree["down"]["kernel"][...] for tree in (grads, sgd, muon)]
    np.testing.assert_allclose(kernels[1], -RATE * kernels[0] / 192**0.5, rtol=1e-5)
    for matrix in kernels[2]:
        values = np.linalg.svd(matrix, compute_uv=False) / (RATE * (16 / 6) ** 0.5)
        np.testing.assert_allclose(values, 1, atol=MUON)


def test_an_nnx_optimizer_reads_the_metadata_and_steps_in_either_mode():
    model = _Model()
    factors = _factors(model)
    before, grads = jax.tree.map(jnp.copy, _gradients(model))
    optimizer = nnx.Optimizer(model, optim.sgd(RATE), wrt=nnx.Param)
    optimizer.update(model, grads)
    after = nnx.state(model, nnx.Param)
    leaves = zip(*map(jax.tree.leaves, (before, grads, after)), strict=True)
    for (p, g, q), (path, f) in zip(leaves, sorted(factors.items()), strict=True):
        np.testing.assert_allclose(q, p - RATE * f * g, rtol=1e-5, err_msg=path)


def test_a_restored_checkpoint_goes_on_with_the_factors_of_the_model(tmp_path):
    params, grads = _gradients(_Model())
    optimiser = optim.adam(RATE)
    _, state = optimiser.update(grads, optimiser.init(params), params)
    want, _ = optimiser.update(grads, state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", (params, state))
        checkpointer.wait_until_finished()
        fresh = nnx.state(_Model(), nnx.Param)
        empty = jax.eval_shape(lambda: (fresh, optimiser.init(fresh)))
        restored, moments = checkpointer.restore(tmp_path / "step", empty)
    assert optim.learning_rate_factors(restored) == _factors(_Model())
    got, _ = optimiser.update(grads, moments, restored)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
