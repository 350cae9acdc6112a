"""The interpreter: what it does not rewrite stays as it was, wherever it stands."""

import dataclasses
import functools as ft

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from models import clipped, halved

import jax_unit_scaling as jus
from jax_unit_scaling._jaxpr import Interpreter, Side, flow, trace, transform

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
W = jnp.sin(jnp.arange(16.0)).reshape(4, 4)


class Opened(Interpreter):
    """Opens all that can be opened, and binds each equation in it again."""

    def wants(self, equation):
        return not equation.can_be_opened

    def opens(self, equation):
        return equation.primitive == "custom_vjp_call"


def left(fn):
    return transform(fn, lambda region: (Interpreter(), Side()))


def opened(fn):
    return transform(fn, lambda region: (Opened(), Side(jnp.uint32(0))))


def _scanned(x, w):
    def body(carry, w):
        y = jnp.tanh(carry @ w)
        return y, y.sum()

    y, sums = lax.scan(body, x, jnp.stack([w, 2 * w, w.T]), reverse=True, unroll=2)
    return y + sums.sum()


def _whiled(x, w):
    y = lax.stop_gradient(x)
    return lax.while_loop(lambda y: jnp.sum(y @ w) < 50, lambda y: y + 1, y) * x


def _branched(x, w):
    y = lax.cond(x.sum() > 0, lambda x: jnp.sin(x @ w), lambda x: x, x)
    return lax.switch(2, [lambda y: y, lambda y: y @ w, lambda y: 2 * (y @ w)], y)


def _rematerialised(x, w):
    policy = jax.checkpoint_policies.dots_saveable
    y = jax.checkpoint(lambda x: jnp.sin(x @ w), policy=policy)(x)
    return jax.checkpoint(lambda y: jnp.cos(y @ w))(y)


def _sharded(x, w):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

    @ft.partial(jax.shard_map, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())
    def f(x, w):
        return lax.psum(jnp.sin(x @ w).sum(0), "d")

    return f(x, w)


FUNCTIONS = {
    "plain": lambda x, w: jax.nn.relu(x @ w) * 2,
    "jit": lambda x, w: jax.jit(lambda x, k: x @ w + k, static_argnums=1)(x, 3),
    "scan": _scanned,
    "while": _whiled,
    "cond": _branched,
    "remat": _rematerialised,
    "shard_map": _sharded,
    "custom_vjp": lambda x, w: clipped(x, w) + 1,
    "custom_jvp": lambda x, w: halved(x @ w),
    "vmap": lambda x, w: jax.vmap(lambda x: clipped(x[None], w)[0])(x),
    "grad": lambda x, w: jax.grad(lambda x: _scanned(clipped(x, w), w).sum())(x),
    "unit-scaled": lambda x, w: jus.cross_entropy(
        jus.linear(jus.gelu(jus.linear(x, w)), w), jnp.zeros(3, int)
    ),
    "key": lambda x, w: x + jax.random.normal(jax.random.key(0), x.shape),
    "grad of remat": lambda x, w: jax.grad(lambda x: _rematerialised(x, w).sum())(x),
}


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _grad(f):
    return jax.grad(lambda *args: jnp.sum(f(*args) ** 2), (0, 1))


@ft.cache
def _value_and_gradient(name):
    f = FUNCTIONS[name]
    return jax.jit(f)(X, W), jax.jit(_grad(f))(X, W)


@pytest.mark.parametrize("t", [left, opened])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_the_same_to_the_bit(name, t):
    f = FUNCTIONS[name]
    value, gradient = _value_and_gradient(name)
    _same(jax.jit(t(f))(X, W), value)
    _same(jax.jit(_grad(t(f)))(X, W), gradient)
    _same(jax.jit(t(_grad(f)))(X, W), gradient)


@pytest.mark.parametrize("name", ["scan", "cond", "remat", "custom_vjp", "grad"])
def test_it_composes_with_vmap_scan_remat_and_itself(name):
    f = FUNCTIONS[name]
    xs = jnp.stack([X, 2 * X])

    def per_example(f):
        return jax.jit(jax.vmap(_grad(f), (0, None)))(xs, W)

    def in_scan(f):
        return jax.jit(lambda: lax.scan(lambda c, x: (c, f(x, W)), 0, xs)[1])()

    for use in (per_example, in_scan, lambda f: _grad(jax.checkpoint(f))(X, W)):
        _same(use(opened(opened(f))), use(f))


def test_nothing_wanted_binds_the_same_equations():
    for f in FUNCTIONS.values():
        ours, plain = jax.make_jaxpr(left(f))(X, W), jax.make_jaxpr(f)(X, W)
        assert [e.primitive for e in ours.eqns] == [e.primitive for e in plain.eqns]
        assert [str(e.source_info.name_stack) for e in ours.eqns] == [
            str(e.source_info.name_stack) for e in plain.eqns
        ]


def test_forward_mode_survives_where_nothing_is_opened():
    f = FUNCTIONS["custom_jvp"]
    _same(jax.jvp(left(f), (X, W), (X, W)), jax.jvp(f, (X, W), (X, W)))


def test_arguments_and_results_may_be_anything():
    def f(x, n, *, flag, tree):
        assert isinstance(n, int) and flag == "yes"
        return {"y": [x * n, tree["a"]], "static": n, "fn": flag, "none": None}

    out = left(f)(X, 3, flag="yes", tree={"a": np.float32(2.0)})
    assert out["static"] == 3 and out["fn"] == "yes" and out["none"] is None
    np.testing.assert_array_equal(out["y"][0], 3 * X)
    assert left(f).__name__ == "f"


def test_a_closed_over_tracer_is_differentiated():
    g = jax.grad(lambda w: opened(lambda x: jnp.sin(x @ w))(X).sum())
    _same(g(W), jax.grad(lambda w: jnp.sin(X @ w).sum())(W))


def test_weak_types_and_literals_are_kept():
    y = left(lambda x: x * 2.0 + 1)(X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert jax.eval_shape(opened(lambda x: x + 1), 1.0).weak_type


# -- Where equations stand -------------------------------------------------------------


def _equations(f, *args):
    return list(trace(f, *args).region.walk())


def test_an_equation_knows_its_scope_source_and_pass():
    def f(x, w):
        with jax.named_scope("up"):
            y = x @ w
        return lax.scan(lambda c, _: (jnp.sin(c @ w), None), y, length=2)[0].sum()

    def dots(f):
        return [e for e in _equations(f, X, W) if e.primitive == "dot_general"]

    up, inner = dots(f)
    assert up.scope == "up" and "test_jaxpr.py" in up.source
    assert len(up.place) == 1 and len(inner.place) == 3
    assert str(up).startswith("dot_general in up (") and "test_jaxpr.py" in str(up)
    found = dots(jax.grad(f, (0, 1)))
    assert [e.is_backward for e in found].count(False) == 2
    assert len(found) == 6
    recomputed = dots(jax.grad(jax.checkpoint(f), (0, 1)))
    assert [e.is_backward for e in recomputed].count(True) == 4


def test_functions_are_named():
    names = {
        e.name for e in _equations(lambda x: jax.nn.silu(jax.nn.relu(x)), X) if e.name
    }
    assert {"silu", "relu"} <= names
    assert "scaling" in {e.name for e in _equations(lambda x: jus.scale_bwd(x, 2.0), X)}


def test_an_error_in_a_rewrite_names_the_equation():
    class Failing(Interpreter):
        def wants(self, equation):
            return equation.primitive == "sin"

        def rewrite(self, equation, side, *args):
            raise ValueError("no")

    def f(x):
        with jax.named_scope("here"):
            return lax.scan(lambda c, _: (jnp.sin(c), None), x, length=2)[0]

    with pytest.raises(ValueError, match=r"sin in here \(.*test_jaxpr.py:"):
        transform(f, lambda _: (Failing(), Side()))(X)


def test_what_cannot_be_opened_is_handed_over():
    seen = []

    class Wanting(Interpreter):
        def wants(self, equation):
            return equation.primitive == "dot_general"

        def left(self, equation):
            seen.append(equation.primitive)

    def f(x):
        return lax.custom_linear_solve(lambda v: W @ v, x, lambda _, b: W @ b)

    transform(f, lambda _: (Wanting(), Side()))(X.T)
    assert seen == ["custom_linear_solve"]


# -- What travels beside the values ----------------------------------------------------


class Counting(Interpreter):
    """Records the sum of each sine, and catches that of its cotangent by a probe."""

    def wants(self, equation):
        return equation.primitive == "sin"

    def rewrite(self, equation, side, x):
        (y,) = equation.bind(x)
        if side.probes is not None:
            y = _probed(y, side.probes)
        return [y], y.sum()


@jax.custom_vjp
def _probed(x, probe):
    return x


_probed.defvjp(lambda x, probe: (x, None), lambda _, g: (g, g.sum()))


def counting(f, probes=None):
    return transform(
        f, lambda _: (Counting(), Side(None, probes)), lambda out, _, r: (out, r)
    )


SINES = {
    "jit": (lambda x: jax.jit(jnp.sin)(x), 1),
    "scan": (
        lambda x: lax.scan(lambda c, w: (jnp.sin(c * w), None), x, jnp.arange(3.0))[0],
        3,
    ),
    "remat": (lambda x: jax.checkpoint(lambda x: jnp.sin(x) * 2)(x), 1),
    "cond": (lambda x: lax.cond(True, lambda x: jnp.sin(x), lambda x: x, x), 1),
    "shard_map": (
        lambda x: jax.shard_map(
            lambda x: jnp.sin(x),
            mesh=jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,)),
            in_specs=P("d"),
            out_specs=P("d"),
        )(x),
        1,
    ),
}


@pytest.mark.parametrize("name", SINES)
def test_records_come_out_and_probes_catch_cotangents(name):
    f, count = SINES[name]
    y, records = jax.jit(counting(f))(X)
    _same(y, jax.jit(f)(X))
    (record,) = jax.tree.leaves(records)
    assert record.size == count
    zeros = jax.tree.map(jnp.zeros_like, records)

    def loss(x, probes):
        y, records = counting(f, probes)(x)
        return y.sum(), records

    (g, caught), again = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(X, zeros)
    _same(again, records)
    _same(g, jax.jit(jax.grad(lambda x: f(x).sum()))(X))
    assert jax.tree.structure(caught) == jax.tree.structure(records)
    (caught,) = jax.tree.leaves(caught)
    last = {"scan": 2, "remat": 2}.get(name)
    want = 24.0 if name == "remat" else 12.0
    np.testing.assert_allclose(caught[last] if name == "scan" else caught, want)


def test_a_while_loop_merges_its_records():
    def f(x):
        return lax.fori_loop(0, x.shape[0], lambda i, x: jnp.sin(x) + 0 * i, x)

    def g(x, n):
        return lax.fori_loop(0, n, lambda i, x: jnp.sin(x), x)

    _, records = jax.jit(counting(g))(X + 2, 2)
    want = jnp.sin(X + 2).sum() + jnp.sin(jnp.sin(X + 2)).sum()
    np.testing.assert_allclose(*jax.tree.leaves(records), want, rtol=1e-6)
    _, records = counting(f)(X + 2)
    assert jax.tree.leaves(records)[0].shape == (3,)


def test_shared_knows_the_iteration():
    class Indexed(Interpreter):
        def wants(self, equation):
            return equation.primitive == "sin"

        def rewrite(self, equation, side, x):
            return [x + side.shared], None

        def at(self, shared, index):
            return 10 * shared + index

    def f(x, n):
        y = lax.scan(lambda c, _: (c, jnp.sin(x)), 0, length=3, reverse=True)[1]
        z = lax.fori_loop(0, n, lambda i, z: z + jnp.sin(x), x)
        return y, z

    t = transform(f, lambda _: (Indexed(), Side(jnp.float32(1.0))))
    y, z = jax.jit(t)(0.0, 3)
    np.testing.assert_array_equal(y, [10.0, 11.0, 12.0])
    np.testing.assert_array_equal(z, 10.0 + 11.0 + 12.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scaled:
    data: jax.Array
    exponent: int = dataclasses.field(metadata={"static": True})


class Exponents(Interpreter):
    """Values are data times a static power of two; sines add one to the exponent."""

    def wants(self, equation):
        return equation.primitive == "sin"

    def rewrite(self, equation, side, x):
        (y,) = equation.bind(self.lower(x))
        return [Scaled(y / 2, 1)], None

    def lift(self, array):
        return Scaled(array, 0)

    def lower(self, value):
        return value.data * 2**value.exponent if value.exponent else value.data

    def match(self, value, like):
        data = self.lower(value) * 2.0**-like.exponent
        return Scaled(data, like.exponent)


@pytest.mark.parametrize("name", ["scan", "jit", "remat", "cond"])
def test_values_may_carry_static_parts(name):
    f = (
        SINES[name][0]
        if name != "cond"
        else lambda x: lax.cond(True, lambda x: jnp.sin(x), lambda x: jnp.sin(2 * x), x)
    )
    t = transform(f, lambda _: (Exponents(), Side()))
    _same(jax.jit(t)(X), jax.jit(f)(X))
    _same(jax.grad(lambda x: t(x).sum())(X), jax.grad(lambda x: f(x).sum())(X))


def test_facts_flow_through_branches_and_loops_to_a_fixpoint():
    def f(a, b):
        def body(carry, _):
            x, y, z = carry
            return (x + 1, x, y), None

        (x, y, z), _ = lax.scan(body, (a, b, b), length=2)
        branch = lax.cond(a > 0, lambda: a, lambda: b)
        return x, y, z, branch, jax.jit(jnp.sin)(b), b * 2

    region = trace(f, 1.0, 2.0).region
    facts = flow(
        region,
        [True, False],
        lambda e, given: [any(given)] * len(e.outvars),
        join=lambda a, b: a or b,
        bottom=False,
    )
    assert facts == [True, True, True, True, False, False]


# -- Modules ---------------------------------------------------------------------------


class _Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(nnx.relu(self.norm(self.up(x))))


@pytest.mark.parametrize("t", [left, opened])
@pytest.mark.parametrize("how", ["argument", "method", "module"])
def test_nnx_modules_keep_their_updates(t, how):
    ours, plain = _Net(nnx.Rngs(0)), _Net(nnx.Rngs(0))
    for _ in range(2):
        y = {
            "argument": lambda: t(lambda m, x: m(x))(ours, X),
            "method": lambda: t(ours.__call__)(X),
            "module": lambda: t(ours)(X),
        }[how]()
        np.testing.assert_array_equal(y, plain(X))
    assert ours.drop.rngs.count[...] == 2
    assert np.any(ours.norm.mean[...] != 0)
    _same(
        jax.tree.map(jax.random.key_data, nnx.state(ours, nnx.RngKey)),
        jax.tree.map(jax.random.key_data, nnx.state(plain, nnx.RngKey)),
    )
    _same(nnx.state(ours, nnx.BatchStat), nnx.state(plain, nnx.BatchStat))
    _same(nnx.state(ours, nnx.RngCount), nnx.state(plain, nnx.RngCount))


def test_nnx_trains_through_it():
    def loss(params, rest, graphdef, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = jnp.sum(model(x) ** 2)
        return y, nnx.state(model, nnx.BatchStat)

    def step(loss):
        graphdef, params, rest = nnx.split(_Net(nnx.Rngs(0)), nnx.Param, ...)
        grad = jax.grad(loss, has_aux=True)
        return jax.jit(grad, static_argnums=2)(params, rest, graphdef, X)

    _same(step(opened(loss)), step(loss))


def test_a_variable_that_occurs_twice_is_one():
    class Twice(nnx.Module):
        def __init__(self):
            self.a = self.b = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.a[...] += x
            self.b[...] += x
            return x * self.b[...]

    model = Twice()
    assert left(lambda m, x: m(x))(model, 2.0) == 8.0
    assert model.a[...] == model.b[...] == 4.0


def test_a_changed_structure_is_refused():
    class Growing(nnx.Module):
        def __call__(self, x):
            self.seen = nnx.Cache(x)
            return x

    with pytest.raises(ValueError, match="added or removed attributes"):
        left(lambda m, x: m(x))(Growing(), X)


def test_linen_and_equinox_models_are_functions_like_others():
    dense = nn.Dense(3)
    params = dense.init(jax.random.key(0), X)
    _same(opened(dense.apply)(params, X), dense.apply(params, X))
    mlp = eqx.nn.MLP(4, 3, 8, 1, activation=jax.nn.relu, key=jax.random.key(0))
    _same(opened(mlp)(X[0]), mlp(X[0]))
    both = opened(lambda m, x: jax.vmap(m)(x))
    _same(eqx.filter_jit(both)(mlp, X), jax.vmap(mlp)(X))
