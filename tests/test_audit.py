"""audit_gradients, cut_edges: which gradients are true, and what breaks the others."""

import functools as ft
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import jax_unit_scaling as jus
from jax_unit_scaling import audit_gradients, cut_edges


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def line_of(mark):
    """Where this file has the comment: in the form that a source has."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return f"{Path(__file__).name}:{number}:"


def consistent(audit):
    """All gradients are true, by the jaxpr and by the numbers, which agree on how far
    each is from the true one: rounding of float32 aside, in sums of a few hundred."""
    assert audit.is_true and audit.culprits == ()
    assert audit.gradients
    for row in audit.gradients:
        assert row.verdict == "true"
        np.testing.assert_allclose(row.cosine, 1, atol=1e-5)
        if not math.isnan(row.expected):
            np.testing.assert_allclose(row.ratio, row.expected, rtol=1e-4)
    audit.check()
    return audit


def broken(audit, *names):
    """Some gradients are not, and these operations are why."""
    assert not audit.is_true
    assert [culprit.operation.name for culprit in audit.culprits] == [*names]
    assert min(row.cosine for row in audit.gradients) < 1 - 1e-4
    for row in audit.gradients:
        if row.verdict == "true":
            np.testing.assert_allclose(row.cosine, 1, atol=1e-5)
            np.testing.assert_allclose(row.ratio, row.expected, rtol=1e-4)
    return audit


# -- Models of the library -------------------------------------------------------------


class _LM(nnx.Module):
    def __init__(self, **block):
        rngs = nnx.Rngs(0)
        self.embed = jus.nnx.Embed(16, 8, rngs=rngs)
        self.stack = jus.nnx.TransformerStack(8, 2, 16, depth=2, rngs=rngs, **block)
        self.readout = jus.nnx.LinearReadout(8, 16, rngs=rngs)

    def loss(self, ids):
        return jus.cross_entropy(self.readout(self.stack(self.embed(ids))), ids)


IDS = jax.random.randint(jax.random.key(1), (2, 6), 0, 16)


def _lm_loss(model, ids):
    return model.loss(ids)


def test_a_transformers_gradients_are_true():
    audit = consistent(audit_gradients(_lm_loss)(_LM(remat=True), IDS))
    assert [row.path for row in audit.gradients][-2:] == [
        "args/0/stack/blocks/1/mlp/gate/kernel",
        "args/0/stack/blocks/1/mlp/up/kernel",
    ]
    assert "Every gradient is true" in str(audit)


def test_an_unconstrained_activation_in_a_block_is_found():
    model = _LM(activation=jus.silu_glu.constrained(None))
    audit = audit_gradients(_lm_loss)(model, IDS)
    assert not audit.is_true
    (culprit,) = audit.culprits
    assert culprit.operation.name == "silu_glu"
    assert any("MLP.__call__" in call for call in culprit.operation.within)
    assert "MLP" in str(audit) and "feed_forward" in str(audit)
    # One way alone leads from the last block's products to the loss.
    verdicts = {row.path.split("/", 2)[-1]: row.verdict for row in audit.gradients}
    last = "stack/blocks/1/mlp/{}/kernel"
    assert {verdicts[last.format(x)] for x in ("up", "gate", "down")} == {"true"}
    assert verdicts["readout/kernel"] == "true"
    assert verdicts["embed/embedding"] == "broken"
    with pytest.raises(ValueError, match="(?s)break gradients.*silu_glu"):
        audit.check()
    # It is as far off as that operation's two factors for its gate, or for its value.
    fwd, bwd = (getattr(culprit, name) for name in ("fwd", "bwd"))
    factors = jus.silu_glu.factors(normal(4), normal(4), constraint=None)
    assert any(
        math.isclose(bwd / fwd, a / b, rel_tol=1e-5)
        for a, b in itertools.permutations([factors.fwd, *factors.bwd.values()], 2)
    )


def test_a_module_and_its_method_are_functions_too():
    model = _LM()
    audit = consistent(audit_gradients(model.loss, argnums=())(IDS))
    assert audit.gradients[0].path == "fn/embed/embedding"


def test_a_recurrent_net_is_true_and_an_unconstrained_cell_is_not():
    class Net(nnx.Module):
        def __init__(self, cell):
            self.rnn = nnx.RNN(cell)

    def loss(net, x):
        return jus.mse_loss(net.rnn(x), x)

    def cell(**options):
        return jus.nnx.OptimizedLSTMCell(4, 4, rngs=nnx.Rngs(0), **options)

    x = normal(2, 5, 4)
    consistent(audit_gradients(loss)(Net(cell()), x))

    def by_hand(ws, x):
        def step(h, x):
            both = jus.linear(x, ws[0]) + jus.linear(h, ws[1])
            h = jus.tanh(both, constraint=None)  # the mistake in a loop
            return h, h

        return jus.mse_loss(lax.scan(step, x[:, 0], x.swapaxes(0, 1))[1][-1], x[:, 0])

    audit = broken(audit_gradients(by_hand)(normal(2, 4, 4), x), "tanh")
    assert line_of("the mistake in a loop") in audit.culprits[0].operation.source


# -- Mistakes by hand ------------------------------------------------------------------


def test_the_line_and_the_factors_of_a_mistake_are_told():
    def loss(p, x):
        x = jus.linear(x, p["in"])
        y = jus.linear(x, p["up"], constraint=None)  # the wrong constraint
        y = jus.tanh(y)
        return jus.mse_loss(x + y, jnp.zeros_like(y))

    p = {"in": normal(8, 8), "up": normal(8, 8, seed=1)}
    p = p | {"in": normal(8, 4), "up": normal(4, 4, seed=1)}
    x = normal(6, 8)
    audit = audit_gradients(loss)(p, x)
    consistent(audit)  # a square product's factors agree by themselves

    def wide(p, x):
        x = jus.linear(x, p["in"])
        with jax.named_scope("branch"):
            y = jus.linear(x, p["up"], constraint=None)  # the wide constraint
        y = jus.linear(jus.tanh(y), p["down"])
        return jus.mse_loss(x + y, jnp.zeros_like(y))

    p = {"in": normal(8, 4), "up": normal(4, 16), "down": normal(16, 4)}
    audit = broken(audit_gradients(wide)(p, x), "linear")
    (culprit,) = audit.culprits
    assert line_of("the wide constraint") in culprit.operation.source
    assert "wide" in culprit.operation.source
    assert culprit.operation.scope == "branch"
    factors = jus.linear.factors(normal(6, 4), p["up"], constraint=None)
    got = culprit.bwd / culprit.fwd
    want = factors.bwd["x"] / factors.fwd
    assert math.isclose(got, want, rel_tol=1e-5) or math.isclose(
        got, 1 / want, rel_tol=1e-5
    )
    verdicts = {row.path: row.verdict for row in audit.gradients}
    assert verdicts == {
        "args/0/down": "true",
        "args/0/in": "broken",
        "args/0/up": "true",
    }


def test_a_false_factor_is_sound_on_a_cut_edge_only():
    def loss(on_edge, on_branch, w, x):
        y = jus.scaled(x @ w, bwd=on_edge)
        return jnp.sum(jnp.sin(y) * jus.scale_bwd(jnp.cos(y), on_branch))

    w, x = normal(4, 4), normal(3, 4)
    audit = ft.partial(audit_gradients, argnums=0)
    rows = consistent(audit(ft.partial(loss, 7.0, 1.0))(w, x)).gradients
    np.testing.assert_allclose(rows[0].ratio, 7, rtol=1e-5)
    found = broken(audit(ft.partial(loss, 7.0, 0.5))(w, x), "scale_bwd").culprits
    assert sorted([found[0].fwd, found[0].bwd]) in ([0.5, 1.0], [1.0, 2.0])

    def made_up_for(w, x):
        y = x @ w
        return jnp.sum(jus.scale_bwd(jnp.sin(jus.scale_bwd(y, 0.5)), 2.0) + y)

    consistent(audit(made_up_for)(w, x))


def test_several_are_named_where_no_single_one_is_the_mistake():
    def loss(w, x):
        y = x @ w
        return jnp.sum(jnp.sin(jus.scale_bwd(y, 2.0)) * jus.scale_bwd(y, 3.0))

    found = audit_gradients(loss)(normal(4, 4), normal(3, 4))
    broken(found, "scale_bwd", "scale_bwd")

    def residual(w, x):
        y, skip = jus.residual_split(jus.linear(x, w), tau=0.5)
        return jnp.sum(jnp.sin(jus.residual_add(jnp.sin(y), skip, tau=0.7)))

    broken(
        audit_gradients(residual)(normal(4, 4), normal(3, 4)),
        "residual_split",
        "residual_add",
    )


def _residual_net(ws, x):
    x = jus.linear(x, ws[0])
    for tau, w in zip((0.3, 2.0), ws[1:], strict=True):
        x = jus.residual_apply(lambda x, w=w: _layer(jus.gmean, x, w), x, tau=tau)
    return jus.mse_loss(x, jnp.zeros_like(x))


def test_a_delayed_residual_factor_is_true():
    consistent(audit_gradients(_residual_net)([*normal(3, 4, 4)], normal(6, 4)))


def test_residual_weights_of_a_scan_are_refused():
    def net(ws, x):
        block = lambda x, given: (
            jus.residual_apply(jnp.sin, x * given[0], tau=given[1]),
            0,
        )
        return lax.scan(block, x, (ws, jnp.array([0.3, 2.0])))[0].sum()

    with pytest.raises(ValueError, match="`tau` of `residual_.*a Python loop"):
        audit_gradients(net)(normal(2, 4), normal(6, 4))


def test_losses_that_are_added_have_weights_of_their_own():
    def loss(mult, w, x):
        y = jus.linear(x, w)
        return jus.mse_loss(y, x) + mult * jus.cross_entropy(y, jnp.arange(6) % 4)

    audit = audit_gradients(ft.partial(loss, 0.5))(normal(4, 4), normal(6, 4))
    names = {culprit.operation.name for culprit in audit.culprits}
    assert not audit.is_true and names <= {"mse_loss", "cross_entropy"} and names


def test_a_masked_mean_is_a_factor_that_is_known_at_run_time():
    def loss(w, x, where):
        y = jus.linear(x, w)
        return jus.cross_entropy(y, jnp.arange(6) % 4, where=where)

    args = normal(4, 4), normal(6, 4), jnp.arange(6) < 2
    (row,) = consistent(audit_gradients(loss)(*args)).gradients
    assert math.isnan(row.expected)

    def two(w, x, where):
        return loss(w, x, where) + jnp.sum(jus.linear(x, w))

    assert not audit_gradients(two)(*args).is_true


# -- Inside of other functions ---------------------------------------------------------


def _layer(constraint, x, w):
    return jus.tanh(jus.linear(x, w), constraint=constraint)


def test_layers_under_scan_are_one_parameter():
    def loss(constraint, ws, x):
        layer = jax.checkpoint(jax.jit(ft.partial(_layer, constraint)))
        x, _ = lax.scan(lambda x, w: (layer(x, w), None), x, ws)
        return jus.mse_loss(x, jnp.zeros_like(x))

    args = normal(3, 4, 4), normal(6, 4)
    consistent(audit_gradients(ft.partial(loss, jus.to_output_scale))(*args))
    # In a chain each layer's gradient is true, but each up to another constant.
    broken(audit_gradients(ft.partial(loss, None))(*args), "tanh")

    def unrolled(ws, x):
        for w in ws:
            x = _layer(None, x, w)
        return jus.mse_loss(x, jnp.zeros_like(x))

    consistent(audit_gradients(unrolled)([*args[0]], args[1]))


@pytest.mark.parametrize("wrap", ["jit", "remat", "cond", "shard_map", "vmap", "rule"])
def test_it_looks_inside(wrap):
    def inside(constraint, x, w):
        layer = ft.partial(_layer, constraint)
        match wrap:
            case "jit":
                return jax.jit(layer)(x, w)
            case "remat":
                return jax.checkpoint(layer)(x, w)
            case "cond":
                return lax.cond(x.sum() > 0, layer, layer, x, w)
            case "shard_map":
                mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,))
                specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
                return jax.shard_map(layer, mesh=mesh, **specs)(x, w)
            case "vmap":
                return jax.vmap(layer, (0, None))(x[:, None], w)[:, 0]
            case "rule":
                f = jax.custom_jvp(lambda x: x + 1)
                f.defjvps(lambda t, _, x: t)
                return layer(f(x), w)

    def loss(constraint, ws, x):
        x = jus.linear(x, ws[0])
        return jus.mse_loss(x + inside(constraint, x, ws[1]), jnp.zeros_like(x))

    args = [*normal(2, 4, 4)], normal(6, 4)
    consistent(audit_gradients(ft.partial(loss, jus.to_output_scale))(*args))
    broken(audit_gradients(ft.partial(loss, None))(*args), "tanh")


def test_rounded_factors_of_bfloat16_are_no_mistake():
    ws, x = (a.astype(jnp.bfloat16) for a in (normal(3, 4, 4), normal(6, 4)))
    audit = audit_gradients(_residual_net)([*ws], x)
    assert audit.is_true and min(row.cosine for row in audit.gradients) > 0.999


def test_what_has_no_gradient_is_called_zero():
    def loss(p, x):
        still = lax.stop_gradient(p["still"]) + jnp.sign(p["sign"])
        return jnp.sum(x * p["used"] * still), {"aux": x}

    p = dict.fromkeys(("still", "sign", "unused", "used"), jnp.ones(3))
    p["count"] = jnp.int32(3)
    audit = audit_gradients(loss, argnums=(0,), has_aux=True)(p, jnp.arange(3.0))
    assert {row.path: row.verdict for row in audit.gradients} == {
        "args/0/sign": "zero",
        "args/0/still": "zero",
        "args/0/unused": "zero",
        "args/0/used": "true",
    }
    assert audit.is_true


def test_simulated_formats_are_part_of_the_function():
    def loss(w, x):
        return jus.mse_loss(_layer(jus.to_output_scale, x, w), jnp.zeros((6, 4)))

    audit = audit_gradients(jus.simulate_fp8(loss))(normal(4, 4), normal(6, 4))
    assert audit.is_true and audit.gradients[0].cosine > 0.99


@pytest.mark.filterwarnings("ignore:native FP8 formats on")
def test_factors_inside_native_products_are_seen():
    def loss(formats, weights, x):
        w, b, v = weights
        linear = ft.partial(jus.linear, formats=formats)
        y = linear(x, w, b)
        broken = linear(y, v, constraint=None) + y[:, :3]  # its mistake
        einsum = ft.partial(jus.einsum_linear, "io,bi->bo", formats=formats)
        sound = jus.mse_loss(einsum(w, x), jnp.zeros((6, 8)))
        return jus.weighted_add(jnp.mean(broken**2), sound), sound

    weights = normal(4, 8), normal(8), normal(8, 3)
    x = normal(6, 4)
    for output in (0, 1):
        fn = lambda formats, w, x: loss(formats, w, x)[output]  # noqa: B023
        native, simulated = (
            (audit_gradients(f)(weights, x), cut_edges(f)(weights, x))
            for formats in (jus.NATIVE_FP8, jus.SIMULATED_FP8)
            for f in (ft.partial(fn, formats),)
        )
        # An einsum's own equations are in a scope of their own.
        edges = [
            [(row[0][0], row[0][2:], *row[1:]) for row in found.operations]
            for _, found in (native, simulated)
        ]
        assert edges[0] == edges[1]
        for a, b in zip(native[0].gradients, simulated[0].gradients, strict=True):
            assert (a.path, a.verdict) == (b.path, b.verdict)
            np.testing.assert_allclose(a.expected, b.expected, rtol=1e-6)
            for one, other in zip(a.culprits, b.culprits, strict=True):
                assert one.operation == other.operation and one.operation.name
                np.testing.assert_allclose(one[1:], other[1:], rtol=1e-6)
        if output:
            assert native[0].is_true and native[0].gradients[0].cosine > 0.99
        else:
            assert [g.verdict for g in native[0].gradients] == ["broken"] * 2 + ["true"]
            where = {str(culprit.operation) for culprit in native[0].culprits}
            assert any(line_of("its mistake") in x for x in where)


@pytest.mark.parametrize("check", [audit_gradients, cut_edges])
def test_an_audit_of_nothing_is_refused(check):
    square = lambda w: jnp.sum(w**2.0)
    for w in (3, jnp.arange(3), {"w": "a"}, ()):
        with pytest.raises(
            TypeError, match=r"`argnums` must be .* got 0, which has no"
        ):
            check(lambda w: jnp.float32(1.0))(w)
    with pytest.raises(TypeError, match=r"got 1, which has none"):
        check(lambda w, i: square(w), argnums=(0, 1))(jnp.ones(3), 2)
    with pytest.raises(TypeError, match=r"`argnums` must be .* got none"):
        check(square, argnums=())(jnp.ones(3))
    check(square)(3.0)  # a Python float is a number to differentiate


def test_a_python_float_is_audited():
    (row,) = consistent(
        audit_gradients(lambda w: jus.scaled(w, bwd=3.0) ** 2)(2.0)
    ).gradients
    np.testing.assert_allclose(row.ratio, 3, rtol=1e-6)


def test_a_linear_solve_is_no_gradient():
    """What JAX keeps in it has equations of its transpose."""
    a = 4 * jnp.eye(4) + normal(4, 4) / 4

    def solved(bwd, a, b):
        return jnp.sum(jnp.linalg.solve(jus.scaled(a, bwd=bwd), b) ** 2) + jnp.sum(a)

    consistent(audit_gradients(ft.partial(solved, 1.0), (0, 1))(a, normal(4)))
    audit = audit_gradients(ft.partial(solved, 3.0), (0, 1))(a, normal(4))
    assert [(row.path, row.verdict) for row in audit.gradients] == [
        ("args/0", "broken"),
        ("args/1", "true"),
    ]
    found = cut_edges(lambda a: jnp.sum(jus.gelu(jnp.linalg.inv(a))))(a)
    assert _free(found) == {"gelu": True}


@pytest.mark.parametrize("x64", [False, True])
def test_complex_parameters_have_both_of_their_parts_compared(x64):
    def loss(real, imag, z):
        real = jus.scaled(z.real, bwd=real)
        z = lax.complex(real, jus.scaled(z.imag, bwd=imag))
        return jnp.sum(jnp.abs(z * (1 + 2j)) ** 2)

    with jax.enable_x64(x64):
        z = np.asarray(normal(5) + 1j * normal(5, seed=1), [np.complex64, complex][x64])
        (row,) = consistent(audit_gradients(ft.partial(loss, 3.0, 3.0))(z)).gradients
        np.testing.assert_allclose(row.ratio, 3, rtol=1e-12 if x64 else 1e-6)
        # A gradient 10 z, whose imaginary part is three times too large.
        (row,) = audit_gradients(ft.partial(loss, 1.0, 3.0))(z).gradients
        dot = np.sum(z.real**2 + 3 * z.imag**2)
        norms = np.linalg.norm(z) * np.linalg.norm(z.real + 3j * z.imag)
        np.testing.assert_allclose(row.cosine, dot / norms, rtol=1e-6)
        assert row.verdict == "broken"


def test_errors_name_the_argument():
    w = jnp.ones(3)
    with pytest.raises(TypeError, match="`fn` must be a function"):
        audit_gradients(3)
    with pytest.raises(TypeError, match=r"`argnums` must be .*'w'"):
        audit_gradients(jnp.sum, argnums=("w",))
    with pytest.raises(TypeError, match=r"`argnums` must be .* 1 positional"):
        audit_gradients(jnp.sum, argnums=1)(w)
    with pytest.raises(TypeError, match=r"`fn` must return a scalar.*float32\[3\]"):
        audit_gradients(jnp.sin)(w)
    with pytest.raises(TypeError, match="`fn` must return a scalar.*no array"):
        audit_gradients(lambda w: None)(w)
    with pytest.raises(TypeError, match="`fn` must be the loss itself.*test_audit"):
        cut_edges(lambda w: jax.grad(lambda w: jnp.sum(w**2))(w).sum())(w)


# -- Cut-edges -------------------------------------------------------------------------


def _free(found):
    return {row.operation.name: row.is_free for row in found.operations}


def test_the_way_to_the_loss_is_free_behind_the_last_residual():
    free = _free(cut_edges(_lm_loss)(_LM(), IDS))
    assert free["linear_readout"] and free["cross_entropy"] and free["embedding"]
    assert not free["silu_glu"] and not free["linear"]
    assert not free["dot_product_attention"]


def test_a_chain_is_free_and_a_shared_weight_is_not():
    def chain(w, x):
        return jnp.sum(jus.gelu(jus.linear(x, w)))

    found = cut_edges(chain, argnums=(0, 1))(normal(4, 4), normal(6, 4))
    assert _free(found) == {"linear": True, "gelu": True}
    assert {row.operation.name: row.shapes for row in found.operations} == {
        "linear": ((6, 4), (4, 4)),
        "gelu": ((6, 4),),
    }

    def tied(w, x):
        return jnp.sum(jus.matmul(jus.linear(x, w), w.T))

    found = cut_edges(tied)(normal(4, 4), normal(6, 4))
    assert _free(found) == {"linear": False, "matmul": False}
    assert "no " in str(found) and "4x4" in str(found)
    # The same array on both sides is on two edges.
    squared = cut_edges(lambda x: jnp.sum(jus.matmul(jnp.sin(x), jnp.sin(x))))
    assert _free(squared(normal(4, 4))) == {"matmul": False}

    def twice(x):
        y = jnp.sin(x)
        return jnp.sum(jus.matmul(y, y))

    assert _free(cut_edges(twice)(normal(4, 4))) == {"matmul": False}


def test_a_carry_is_an_edge_back_to_the_start():
    def loss(ws, x):
        def step(h, x):
            h = jus.tanh(jus.linear(h, ws["h"]))
            return h, jus.silu(h)

        hs = lax.scan(step, jus.linear(x[0], ws["in"]), x)[1]
        return jnp.sum(jus.gelu(hs))

    ws = {"h": normal(4, 4), "in": normal(4, 4, seed=1)}
    rows = cut_edges(loss)(ws, normal(5, 6, 4)).operations
    into = {(r.operation.name, r.shapes): r.cut for r in rows}
    # The carry is on a cycle; what enters the loop and what leaves it is not.
    assert into["linear", ((6, 4), (4, 4))] == (False, True)
    assert into["linear", ((4, 4),)] == (True,)
    assert into["tanh", ((6, 4),)] == (False,)
    assert into["silu", ((6, 4),)] == into["gelu", ((5, 6, 4),)] == (True,)


# A program: each line an operation on one or two of the values before it, of which the
# first two are parameters; the last value is the loss.
PROGRAMS = st.lists(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=2), min_size=1, max_size=6
).map(
    lambda lines: [
        sorted({i % (2 + n) for i in inputs}) for n, inputs in enumerate(lines)
    ]
)


def _program(lines, false_at, a, b):
    """Runs it, with a false factor on the edge `false_at`: (line, input)."""
    values = [a, b]
    for n, inputs in enumerate(lines):
        given = [
            jus.scaled(values[i], bwd=3.0) if (n, i) == false_at else values[i]
            for i in inputs
        ]
        with jax.named_scope(f"line{n}"):
            values.append(jus.tanh(*given) if len(given) == 1 else jus.add(*given))
    return jnp.sum(values[-1])


def _useful_edges(lines):
    """The edges from parameters to the loss, as (line, input)."""
    useful, edges = {len(lines) + 1}, []
    for n in reversed(range(len(lines))):
        if n + 2 in useful:
            useful.update(lines[n])
            edges += [(n, i) for i in lines[n]]
    return edges


def _connected(edges, one, other):
    near = {one}
    for _ in edges:
        for n, i in edges:
            if {n + 2, i} & near:
                near |= {n + 2, i}
    return other in near


@settings(max_examples=40, deadline=None, derandomize=True)
@given(PROGRAMS)
def test_cut_edges_are_those_whose_removal_disconnects(lines):
    edges = _useful_edges(lines)
    want = {}
    for n, i in edges:
        others = [edge for edge in edges if edge != (n, i)]
        want.setdefault(f"line{n}", []).append(not _connected(others, n + 2, i))
    found = cut_edges(ft.partial(_program, lines, None), argnums=(0, 1))
    rows = found(jnp.ones(3), jnp.ones(3)).operations
    got = {row.operation.scope: sorted(row.cut) for row in rows}
    assert got == {scope: sorted(cut) for scope, cut in want.items()}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(PROGRAMS, st.integers(0, 10**6))
def test_a_false_factor_is_sound_exactly_on_a_cut_edge(lines, which):
    edges = sorted(_useful_edges(lines))
    n, i = edges[which % len(edges)]
    is_cut = not _connected([edge for edge in edges if edge != (n, i)], n + 2, i)
    audit = audit_gradients(ft.partial(_program, lines, (n, i)), argnums=(0, 1))
    found = audit(normal(3), normal(3, seed=1))
    assert found.is_true == is_cut
    assert {c.operation.name for c in found.culprits} == (
        set() if is_cut else {"scaled"}
    )
    for row in found.gradients:
        if row.verdict == "true":
            np.testing.assert_allclose(row.ratio, row.expected, rtol=1e-3)


def test_a_way_through_complex_numbers_counts():
    def loss(w):
        return jnp.sum(jus.scale_bwd(w, 3.0) ** 2) + jnp.sum(jnp.abs(jnp.fft.fft(w)))

    w = jnp.arange(1.0, 9.0)
    (row,) = jus.audit_gradients(loss)(w).gradients
    assert row.verdict == "broken"

    def both(w):
        return jnp.sum(jnp.abs(jnp.fft.fft(jus.scale_bwd(w, 3.0))))

    (row,) = jus.audit_gradients(both)(w).gradients
    assert row.verdict == "true"
    np.testing.assert_allclose(row.ratio, 3, rtol=1e-5)


@pytest.mark.gpu
def test_a_gpu_compares_the_gradients():
    with jax.default_matmul_precision("highest"):  # of which `ratio` is told
        net = [*normal(3, 4, 4)], normal(6, 4)
        consistent(audit_gradients(_residual_net)(*net))

        def wrong(ws, x):
            y = jus.linear(x, ws[0])
            return jnp.sum(jus.tanh(y, constraint=None) + y)

        broken(audit_gradients(wrong)(*net), "tanh")
