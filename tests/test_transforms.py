"""simulate_format: bit for bit what hand-quantised functions compute, on any model."""

import functools as ft
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from models import Stateful

import jax_unit_scaling as jus
from jax_unit_scaling import E4M3, E5M2, Formats, simulate_format, simulate_fp8

KEY = jax.random.key(0)


def normal(*shape, seed=0, scale=1.0):
    # By NumPy: JAX would compile a program for each shape.
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(np.float32(scale) * x)


def by_hand(product, fwd=E4M3, bwd=E5M2):
    """A function of two operands, as dot_general is, rounded by hand."""

    def rounded(lhs, rhs, *args, **kwargs):
        lhs, rhs = jus.quantize_fwd(lhs, fwd), jus.quantize_fwd(rhs, fwd)
        return jus.quantize_bwd(product(lhs, rhs, *args, **kwargs), bwd)

    return rounded


DOT, CONV = by_hand(lax.dot_general), by_hand(lax.conv_general_dilated)
MATMUL = by_hand(jnp.matmul)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differs(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)


# -- Models of four libraries, each with the function that is to be told the product ---


class _Block(nnx.Module):
    def __init__(self, rngs, dot=lax.dot_general):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2,
            16,
            qkv_dot_general=dot,
            out_dot_general=dot,
            attention_fn=ft.partial(_attention, dot),
            decode=False,
            rngs=rngs,
        )
        self.up = nnx.Linear(16, 32, dot_general=dot, rngs=rngs)
        self.down = nnx.Linear(32, 16, dot_general=dot, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


def _attention(dot, q, k, v, mask=None, **_):
    logits = dot(q, k, (((3,), (3,)), ((0, 2), (0, 2)))) / 4
    return jnp.einsum(
        "bhqd->bqhd", dot(jax.nn.softmax(logits), v, (((3,), (1,)), ((0, 1), (0, 2))))
    )


def _transformer(dot=lax.dot_general, _=None):
    graphdef, state = nnx.split(_Block(nnx.Rngs(0), dot))

    def loss(state, x):
        return jnp.mean(nnx.merge(graphdef, state)(x) ** 2)

    return loss, nnx.to_pure_dict(state), normal(2, 8, 16)


class _Convolutional(nn.Module):
    conv: object
    dot: object

    @nn.compact
    def __call__(self, x):
        conv = ft.partial(nn.Conv, conv_general_dilated=self.conv)
        x = nn.relu(conv(8, (3, 3), strides=2, name="first")(x))
        x = nn.relu(conv(8, (3, 3), feature_group_count=4, name="second")(x))
        return nn.Dense(3, dot_general=self.dot, name="readout")(x.mean((1, 2)))


def _convnet(dot=lax.dot_general, conv=lax.conv_general_dilated):
    x = normal(2, 8, 8, 3)
    model = _Convolutional(conv, dot)
    params = _Convolutional(lax.conv_general_dilated, lax.dot_general).init(KEY, x)
    return lambda params, x: jnp.sum(model.apply(params, x) ** 2), params, x


def _lstm(dot=lax.dot_general, _=None):
    cell = eqx.nn.LSTMCell(6, 8, key=KEY)

    def step(cell, carry, x):
        h, c = carry
        both = _vector(dot, cell.weight_ih, x) + _vector(dot, cell.weight_hh, h)
        i, f, g, o = jnp.split(both + cell.bias, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def loss(cell, xs):
        call = cell.__call__ if dot is lax.dot_general else None

        def body(carry, x):
            carry = step(cell, carry, x) if call is None else call(x, carry)
            return carry, carry[0]

        zeros = jnp.zeros(8)
        return jnp.sum(lax.scan(body, (zeros, zeros), xs)[1] ** 2)

    return loss, cell, normal(5, 6)


def _vector(dot, w, x):
    return dot(w, x, (((1,), (0,)), ((), ())))


def _experts(dot=lax.dot_general, _=None):
    ragged = lax.ragged_dot if dot is lax.dot_general else by_hand(lax.ragged_dot)
    params = {
        "router": normal(8, 4, seed=1),
        "up": normal(4, 8, 16, seed=2),
        "down": normal(4, 16, 8, seed=3),
    }

    def loss(params, x):
        scores = dot(x, params["router"], (((1,), (0,)), ((), ())))
        expert = jnp.argmax(scores, -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=4)
        y = jax.nn.silu(ragged(x[order], params["up"], sizes))
        y = ragged(y, params["down"], sizes)[jnp.argsort(order)]
        return jnp.sum((y * jnp.max(jax.nn.softmax(scores), -1, keepdims=True)) ** 2)

    return loss, params, normal(12, 8)


MODELS = {
    "transformer in NNX": _transformer,
    "convnet in Linen": _convnet,
    "LSTM in Equinox": _lstm,
    "mixture of experts in jnp": _experts,
}
VALUE_AND_GRAD = ft.partial(jax.value_and_grad, argnums=(0, 1))


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_model_rounded_by_hand(name):
    loss, params, x = MODELS[name]()
    reference, *_ = MODELS[name](DOT, CONV)
    want = jax.jit(VALUE_AND_GRAD(reference))(params, x)
    same(jax.jit(VALUE_AND_GRAD(simulate_fp8(loss)))(params, x), want)
    same(jax.jit(simulate_fp8(VALUE_AND_GRAD(loss)))(params, x), want)
    assert differs(want, jax.jit(VALUE_AND_GRAD(loss))(params, x))


@pytest.mark.parametrize("name", MODELS)
def test_with_nothing_rewritten_it_is_the_same_program(name):
    """So it gives the same bits, whatever XLA makes of it."""
    loss, params, x = MODELS[name]()
    plain = jax.jit(VALUE_AND_GRAD(loss)).lower(params, x)
    want = plain.compile()(params, x)
    for t in (
        ft.partial(simulate_format, fwd=None, bwd=None),
        ft.partial(simulate_fp8, choose=lambda _: None),
    ):
        ours = jax.jit(VALUE_AND_GRAD(t(loss))).lower(params, x)
        assert ours.as_text() == plain.as_text()
    same(ours.compile()(params, x), want)


@pytest.mark.parametrize("name", MODELS)
def test_rounding_to_float32_changes_no_number(name):
    """It is a format as well. Between its operations XLA fuses others, and so adds in
    another order: a sum of n numbers then errs by n units of them, and none here has
    more than 256 (8 x 8 x 4 places; 32 features). They may cancel (a key's bias has a
    gradient of zero), so the unit is that of the largest gradient."""
    loss, params, x = MODELS[name]()
    want = jax.jit(VALUE_AND_GRAD(loss))(params, x)
    t = ft.partial(simulate_format, fwd=jus.FP32, bwd=jus.FP32)
    got = jax.jit(VALUE_AND_GRAD(t(loss)))(params, x)
    got, want = map(jax.tree.leaves, (got, want))
    unit = 2.0**-24 * max(np.abs(a).max() for a in want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=256 * unit)


@pytest.mark.parametrize("fwd, bwd", [(E4M3, None), (None, E5M2), (jus.FP16, jus.BF16)])
def test_each_format_has_its_pass(fwd, bwd):
    x, w = normal(4, 8), normal(8, 5, seed=1)

    def f(x, w):
        return jnp.sum(jnp.sin(x @ w) * x[:, :1])

    def hand(x, w):
        q = [a if fwd is None else jus.quantize_fwd(a, fwd) for a in (x, w)]
        y = q[0] @ q[1]
        y = y if bwd is None else jus.quantize_bwd(y, bwd)
        return jnp.sum(jnp.sin(y) * x[:, :1])

    t = ft.partial(simulate_format, fwd=fwd, bwd=bwd)
    want = jax.jit(VALUE_AND_GRAD(hand))(x, w)
    same(jax.jit(VALUE_AND_GRAD(t(f)))(x, w), want)
    same(jax.jit(t(VALUE_AND_GRAD(f)))(x, w), want)


# -- Which products --------------------------------------------------------------------


def test_formats_are_chosen_by_path_shape_or_anything():
    loss, params, x = _convnet()

    def but_readout(p):
        return None if "readout" in p.path else jus.SIMULATED_FP8

    want, *_ = _convnet(conv=CONV)
    t = simulate_fp8(loss, choose=but_readout)
    same(VALUE_AND_GRAD(t)(params, x), VALUE_AND_GRAD(want)(params, x))
    grad = simulate_fp8(VALUE_AND_GRAD(loss), choose=but_readout)
    same(grad(params, x), VALUE_AND_GRAD(want)(params, x))
    by_shape = simulate_fp8(
        loss, choose=lambda p: None if len(p.rhs) == 2 else jus.SIMULATED_FP8
    )
    same(by_shape(params, x), want(params, x))


def test_products_lists_what_there_is():
    loss, params, x = _convnet()
    found = jus.products(jax.grad(loss), params, x)
    assert [p.path for p in found if not p.is_backward] == [
        "_Convolutional/first",
        "_Convolutional/second",
        "_Convolutional/readout",
    ]
    assert all("test_transforms.py" in p.source for p in found)
    # The input of the first convolution needs no gradient.
    assert sum(p.is_backward for p in found) == 5
    assert found[0].lhs == (2, 8, 8, 3) and found[0].out == (2, 4, 4, 8)
    assert found[0].primitive == "conv_general_dilated"


def test_integer_products_are_none():
    x = jnp.arange(6).reshape(2, 3)
    assert jus.products(lambda x: x @ x.T, x) == []
    same(simulate_fp8(lambda x: x @ x.T)(x), x @ x.T)


@pytest.mark.parametrize(
    "dtypes, why",
    [
        ((jnp.complex64, jnp.complex64), "operands are complex: complex64 and"),
        ((jnp.bfloat16, jnp.float8_e4m3fn), "of different kinds: bfloat16 and float8"),
        ((jnp.float8_e4m3fn, jnp.float32), "of different kinds: float8_e4m3fn and"),
    ],
)
def test_operands_that_cannot_be_rounded_are_named(dtypes, why):
    x, y = (normal(3, 3).astype(dtype) for dtype in dtypes)

    @jax.jit
    def f(x, y):
        with jax.named_scope("here"):
            dims = (((1,), (0,)), ((), ()))
            return lax.dot_general(x, y, dims).astype(x.dtype)

    with pytest.warns(UserWarning, match=rf"dot_general in here \(.*{why}"):
        out = simulate_fp8(f)(x, y)
    same(out, f(x, y))
    (product,) = jus.products(f, x, y)
    assert why in product.unrounded
    leave = lambda p: None if p.unrounded else jus.SIMULATED_FP8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate_fp8(f, choose=leave)(x, y)
        narrow = [a.astype(jnp.float8_e4m3fn) for a in (x.real, y.astype(x.dtype).real)]
        simulate_fp8(f)(*narrow)  # which have a format already


def test_second_derivatives_are_those_of_the_rounded_passes():
    """With rounding of derivative one, in both passes: so, g being the cotangent,
    dx = r(g) q(w)^T is differentiated as g q(w)^T is, at the rounded numbers."""
    x, w = normal(3, 4), normal(4, 5, seed=1)

    def straight(x, format):
        return x + lax.stop_gradient(jus.quantize(x, format) - x)

    def gradients(x, w):
        x, w = straight(x, E4M3), straight(w, E4M3)
        g = straight(jnp.cos(x @ w), E5M2)
        return g @ w.T, x.T @ g

    loss = simulate_fp8(lambda x, w: jnp.sum(jnp.sin(x @ w)))
    grad = jax.grad(loss, (0, 1))
    same(grad(x, w), gradients(x, w))
    found = jax.jit(jax.jacrev(grad, (0, 1)))(x, w)
    # Sums of at most five terms, in another order where they are compiled.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        found,
        jax.jacrev(gradients, (0, 1))(x, w),
    )
    assert min(np.abs(h).max() for h in jax.tree.leaves(found)) > 1
    with pytest.raises(TypeError, match="forward-mode"):
        jax.hessian(loss)(x, w)


def test_what_cannot_be_opened_is_named():
    a, b = jnp.eye(3) * 3.1, normal(3)

    def f(b):
        with jax.named_scope("solve"):
            return lax.custom_linear_solve(lambda v: a @ v, b, lambda _, b: b / 3.1)

    with pytest.warns(
        UserWarning, match=r"dot_general in solve \(.*custom_linear_solve"
    ):
        y = simulate_fp8(f)(b)
    same(y, f(b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate_fp8(f, choose=lambda p: None if p.inside else jus.SIMULATED_FP8)(b)


# -- Functions with a derivative of their own ------------------------------------------


def _with_rule(matmul):
    @jax.custom_vjp
    def f(x, w):
        return matmul(x, w) * 2

    def backward(residuals, g):
        x, w = residuals
        # The cotangent once on the left, once on the right, and cut on the way.
        g = jnp.clip(g, -0.3, 0.3)
        again = matmul(x, w)  # recomputed: of two residuals
        return _left(matmul, g * again, w.T), _right(matmul, x.T, g)

    f.defvjp(lambda x, w: (f(x, w), (x, w)), backward)
    return f


def _left(matmul, g, w):
    return g @ w if matmul is jnp.matmul else _q5(g) @ _q4(w)


def _right(matmul, x, g):
    return x @ g if matmul is jnp.matmul else _q4(x) @ _q5(g)


def _q4(x):
    return jus.quantize_fwd(x, E4M3)


def _q5(x):
    return jus.quantize_fwd(x, E5M2)


def test_a_custom_vjp_keeps_its_rule_and_both_its_passes_are_rounded():
    x, w = normal(4, 8), normal(8, 5, seed=1)

    def loss(matmul, x, w):
        return jnp.sum(jnp.sin(_with_rule(matmul)(x, w) + matmul(x, w)))

    plain, hand = ft.partial(loss, jnp.matmul), ft.partial(loss, MATMUL)
    want = jax.jit(VALUE_AND_GRAD(hand))(x, w)
    same(jax.jit(VALUE_AND_GRAD(simulate_fp8(plain)))(x, w), want)
    # Differentiated before: its rule's equations then stand in the jaxpr.
    same(jax.jit(simulate_fp8(VALUE_AND_GRAD(plain)))(x, w), want)
    assert differs(want, VALUE_AND_GRAD(plain)(x, w))


def test_a_custom_jvp_with_a_product_keeps_its_rule():
    def make(matmul):
        f = jax.custom_jvp(lambda x, w: matmul(x, w))
        f.defjvps(
            lambda t, _, x, w: 3 * matmul(t, w),
            lambda t, _, x, w: 5 * matmul(x, t),
        )
        return lambda x, w: jnp.sum(f(x, w) ** 2)

    x, w = normal(4, 8), normal(8, 5, seed=1)
    value, (dx, dw) = jax.jit(VALUE_AND_GRAD(simulate_fp8(make(jnp.matmul))))(x, w)
    y = _q4(x) @ _q4(w)
    g = 2 * y
    same(value, jnp.sum(y**2))
    np.testing.assert_allclose(dx, _q5(3 * g) @ _q4(w).T, rtol=1e-6)
    np.testing.assert_allclose(dw, _q4(x).T @ _q5(5 * g), rtol=1e-6)


def test_unit_scaled_operations_are_rounded_too():
    x, w = normal(4, 8), normal(8, 5, seed=1)

    def loss(formats, x, w):
        y = jus.linear(jus.gelu(x), w, formats=formats)
        return jus.cross_entropy(y, jnp.arange(4))

    want = jax.jit(VALUE_AND_GRAD(ft.partial(loss, jus.SIMULATED_FP8)))(x, w)
    ours = simulate_fp8(ft.partial(loss, None))
    same(jax.jit(VALUE_AND_GRAD(ours))(x, w), want)


def test_a_function_of_jax_nn_is_rounded_inside():
    q = normal(1, 8, 2, 4)

    def loss(q):
        return jnp.sum(jax.nn.dot_product_attention(q, q, 2 * q) ** 2)

    found = jus.products(loss, q)
    assert len(found) == 2
    assert differs(jax.grad(simulate_fp8(loss))(q), jax.grad(loss)(q))


# -- Compositions ----------------------------------------------------------------------


def _chain(matmul, x, ws):
    """A stack of layers under scan, each rematerialised, with a branch."""

    @jax.checkpoint
    def layer(x, w):
        y = jnp.tanh(matmul(x, w))
        return lax.cond(y.sum() > 0, lambda y: matmul(y, w.T), lambda y: y, y)

    def body(x, w):
        return jax.jit(layer)(x, w), x.sum()

    x, sums = lax.scan(body, x, ws)
    return jnp.sum(x**2) + sums.sum()


def test_it_goes_inside_jit_scan_cond_and_remat():
    x, ws = normal(4, 8), normal(3, 8, 8, seed=1)
    plain, hand = ft.partial(_chain, jnp.matmul), ft.partial(_chain, MATMUL)
    want = jax.jit(VALUE_AND_GRAD(hand))(x, ws)
    same(jax.jit(VALUE_AND_GRAD(simulate_fp8(plain)))(x, ws), want)
    same(jax.jit(simulate_fp8(VALUE_AND_GRAD(plain)))(x, ws), want)
    same(jax.jit(simulate_fp8(simulate_fp8(VALUE_AND_GRAD(plain))))(x, ws), want)
    xs = jnp.stack([x, -x])
    per_example = jax.jit(jax.vmap(VALUE_AND_GRAD(hand), (0, None)))(xs, ws)
    ours = jax.vmap(VALUE_AND_GRAD(simulate_fp8(plain)), (0, None))
    same(jax.jit(ours)(xs, ws), per_example)
    ours = simulate_fp8(jax.vmap(VALUE_AND_GRAD(plain), (0, None)))
    same(jax.jit(ours)(xs, ws), per_example)


def test_a_cotangent_that_is_given_is_recognised():
    x, w, g = normal(4, 8), normal(8, 5, seed=1), normal(4, 5, seed=2)

    def pull(x, w, g):
        return jax.vjp(jnp.matmul, x, w)[1](g)

    dx, dw = jax.jit(simulate_fp8(pull))(x, w, g)
    same(dx, _q5(g) @ _q4(w).T)
    same(dw, (_q5(g).T @ _q4(x)).T)


STARTS = {
    "a number": (lambda loss: lambda p, x: jax.vjp(loss, p, x)[1](1024.0), ()),
    "another": (lambda loss: lambda p, x: jax.vjp(loss, p, x)[1](jnp.float32(3)), ()),
    "computed": (
        lambda loss: lambda p, x: jax.vjp(loss, p, x)[1](jnp.full((), 3.0) * 2),
        (),
    ),
    "under jit": (
        lambda loss: jax.jit(lambda p, x: jax.vjp(jax.jit(loss), p, x)[1](1024.0)),
        (),
    ),
    "an argument": (lambda loss: lambda p, x, g: jax.vjp(loss, p, x)[1](g), (5.0,)),
    "one that is divided by": (
        lambda loss: (
            lambda p, x, g: jax.tree.map(lambda d: d / g, jax.vjp(loss, p, x)[1](g))
        ),
        (5.0,),
    ),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "name",
    ["convnet in Linen", pytest.param("transformer in NNX", marks=pytest.mark.slow)],
)
def test_a_cotangent_is_recognised_by_what_starts_it(name, start):
    loss, params, x = MODELS[name]()
    reference, *_ = MODELS[name](DOT, CONV)
    pull, given = STARTS[start]
    args = (params, x, *map(jnp.float32, given))
    want = jax.jit(pull(reference))(*args)
    same(jax.jit(simulate_fp8(pull(loss)))(*args), want)


def test_it_goes_inside_shard_map():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    x, w = normal(4, 8), normal(8, 5, seed=1)

    def loss(matmul, x, w):
        f = jax.shard_map(
            lambda x, w: lax.psum(jnp.sum(jnp.sin(matmul(x, w))), "d"),
            mesh=mesh,
            in_specs=(P("d"), P()),
            out_specs=P(),
        )
        return f(x, w)

    plain, hand = ft.partial(loss, jnp.matmul), ft.partial(loss, MATMUL)
    want = jax.jit(VALUE_AND_GRAD(hand))(x, w)
    same(jax.jit(VALUE_AND_GRAD(simulate_fp8(plain)))(x, w), want)
    same(jax.jit(simulate_fp8(VALUE_AND_GRAD(plain)))(x, w), want)


# -- Stochastic rounding ---------------------------------------------------------------


def test_stochastic_rounding_is_unbiased_and_repeats_with_its_key():
    # A quarter of the way between two neighbours.
    x, one = jnp.full((4096, 1), 1 + 1 / 32), jnp.ones((1, 1))
    y = simulate_fp8(jnp.matmul, fwd_key=KEY)(x, one)
    assert set(np.unique(y)) == {1.0, 1.125}
    # The share rounded up is binomial; five of its standard deviations.
    share = np.mean(np.asarray(y) > 1)
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4096)
    same(y, simulate_fp8(jnp.matmul, fwd_key=KEY)(x, one))
    assert differs(y, simulate_fp8(jnp.matmul, fwd_key=jax.random.key(1))(x, one))


def test_each_place_draws_afresh():
    x = jnp.full((64, 1), 1 + 1 / 32)
    one = jnp.ones((1, 1))

    def f(x):
        y = lax.scan(lambda c, _: (c, x @ one), 0, length=3)[1]
        z = lax.fori_loop(0, x.shape[1] + 1, lambda i, z: z.at[i].set(x @ one), y)
        with_rule = _with_rule(jnp.matmul)(x, one) / 2
        return [*y, *z[:2], x @ one, jax.jit(jnp.matmul)(x, one), with_rule]

    drawn = jax.jit(simulate_fp8(f, fwd_key=KEY))(x)
    assert len({np.asarray(y).tobytes() for y in drawn}) == len(drawn)


def test_cotangents_draw_from_their_own_key():
    x, one = jnp.full((64, 1), 1 + 1 / 32), jnp.ones((1, 1))
    g = jnp.full((64, 1), 1 + 1 / 16)

    def f(x):
        return jnp.sum((x @ one) * g)

    for t in (
        lambda key: jax.grad(simulate_fp8(f, bwd_key=key))(x),
        lambda key: simulate_fp8(jax.grad(f), bwd_key=key)(x),
        lambda key: jax.grad(
            simulate_fp8(lambda x: jnp.sum(_with_rule(jnp.matmul)(x, one)), bwd_key=key)
        )(x * 0.4),
    ):
        drawn = jax.jit(t)(KEY)
        assert len(np.unique(drawn)) == 2
        assert differs(drawn, jax.jit(t)(jax.random.key(1)))
        assert len(np.unique(t(None))) == 1


def test_examples_in_a_step_draw_afresh_under_vmap_inside():
    x = jnp.full((8, 64, 1), 1 + 1 / 32)
    y = simulate_fp8(jax.vmap(lambda x: x @ jnp.ones((1, 1))), fwd_key=KEY)(x)
    assert len({np.asarray(row).tobytes() for row in y}) == 8


# -- Modules and errors ----------------------------------------------------------------


def test_nnx_modules_keep_their_updates():
    model, x = Stateful(), normal(4, 8)
    simulate_fp8(model)(x)
    nnx.jit(simulate_fp8(lambda m, x: m(x)))(model, x)
    assert model.drop.rngs.count[...] == 2
    hand = Stateful()
    hand.up.dot_general = DOT
    hand(x), hand(x)
    np.testing.assert_allclose(model.norm.mean[...], hand.norm.mean[...], rtol=1e-5)


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="`fwd` must be a .*Format"):
        simulate_format(jnp.matmul, "e4m3")
    with pytest.raises(TypeError, match="`fn` must be a function"):
        simulate_fp8(3)
    with pytest.raises(TypeError, match="`bwd_key` must be a typed random key"):
        simulate_fp8(jnp.matmul, bwd_key=jnp.zeros(2, jnp.uint32))
    with pytest.raises(TypeError, match="`choose` must be a function.* got 3"):
        simulate_fp8(jnp.matmul, choose=3)
    with pytest.raises(TypeError, match="(?s)`choose` must return.*E4M3|Format"):
        simulate_fp8(jnp.matmul, choose=lambda p: E4M3)(normal(2, 2), normal(2, 2))
    assert Formats() == Formats(None, None)


@pytest.mark.gpu
def test_a_gpu_rounds_operands_and_cotangents_under_jit():
    """Against NumPy's casts: sums of 64 products of 8-bit numbers, each exact, are all
    that differs; rounding moves them by percents."""
    x, w, g = normal(32, 64), normal(64, 16, seed=1), normal(32, 16, seed=2)

    def cast(x, format):
        return np.asarray(x).astype(format.dtype).astype(np.float64)

    @jax.jit
    def both(x, w):
        y, pull = jax.vjp(simulate_fp8(jnp.matmul), x, w)
        return y, *pull(g)

    with jax.default_matmul_precision("highest"):
        found = both(x, w)
    qx, qw, rg = cast(x, E4M3), cast(w, E4M3), cast(g, E5M2)
    for got, want in zip(found, (qx @ qw, rg @ qw.T, qx.T @ rg), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=64 * 2**-20)
    assert np.abs(found[0] - np.asarray(x, np.float64) @ np.asarray(w)).max() > 0.1
