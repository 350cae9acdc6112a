"""Attention: its factors over a wide grid, the module against its namesake, blocks."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_unit_scaling as jus


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


# What is promised: within 0.1 of unit scale at every one of these. The default run
# takes a few corners, `-m slow` the rest.
GRID = list(
    itertools.product(
        (0.25, 0.5, 1.0, 2.0, 4.0), (8, 64, 512, 8192), (16, 64, 256), (False, True)
    )
)
CORNERS = [(0.25, 8, 256, True), (4.0, 64, 16, True), (4.0, 8192, 16, False)]


def _cells(cells, quick):
    mark = pytest.mark.slow
    return [pytest.param(*c, marks=() if c in quick else mark) for c in cells]


def _sampled(length, is_causal):
    """Positions of queries, and how many each of them stands for.

    One of each stratum; a causal query at position i sees i + 1 keys, so that there
    the strata grow geometrically.
    """
    if is_causal:
        edges = np.geomspace(1, length + 1, 33) - 1
    else:
        edges = np.linspace(0, length, 17)
    edges = np.unique(edges.round().astype(int))
    low, high = edges[:-1], edges[1:]
    return np.random.default_rng(0).integers(low, high), high - low


@pytest.mark.parametrize("mult, length, d, is_causal", _cells(GRID, CORNERS))
def test_attention_has_unit_scale_within_a_tenth(mult, length, d, is_causal):
    options = {"is_causal": is_causal, "mult": mult}
    # Cotangents of different queries are independent: in a sum over all queries, one
    # that stands for w of them has a cotangent of scale w^1/2.
    positions, weights = _sampled(length, is_causal)
    w = weights[:, None, None]
    # Without a mask, outputs of all queries are nearly one mean of values, of d
    # numbers for each head. 1024 of them have a standard error of 0.02.
    heads = max(2**10 // d, 2**14 // length)

    @jax.jit
    def squares(key):
        keys = jax.random.split(key, 4)
        q, g = (jax.random.normal(k, (len(w), heads, d)) for k in keys[:2])
        k, v = (jax.random.normal(k, (length, heads, d)) for k in keys[2:])

        def plain(q, k, v):
            where = jnp.asarray(positions)
            return jus.dot_product_attention.fn(q, k, v, None, None, where, **options)

        y, vjp = jax.vjp(plain, q, k, v)
        dq, dk, dv = vjp(g * jnp.sqrt(w))
        return [jnp.sum(x) for x in (w * y**2, dq**2, dk**2, dv**2)]

    x = jax.ShapeDtypeStruct((length, heads, d), jnp.float32)
    factors = jus.dot_product_attention.factors(x, x, x, constraint=None, **options)
    got = np.sqrt(np.asarray(squares(jax.random.key(0))) / x.size)
    bwd = [factors.bwd[name] for name in ("query", "key", "value")]
    np.testing.assert_allclose(got * [factors.fwd, *bwd], 1, atol=0.1)


SOFTMAX = sorted({c[:2] for c in GRID})


@pytest.mark.parametrize("mult, length", _cells(SOFTMAX, [(4.0, 8), (0.25, 512)]))
def test_softmax_has_unit_scale_within_a_tenth(mult, length):
    x, g = _normal(0, 2, 2**11, length)
    y, vjp = jax.vjp(lambda x: jus.softmax(x, mult=mult, constraint=None), x)
    np.testing.assert_allclose([_rms(y), _rms(vjp(g)[0])], 1, atol=0.1)


def test_all_masks_and_a_bias_at_once_are_those_of_jax_and_so_is_the_gradient():
    q, kv, bias = _normal(0, 2, 6, 4, 8), _normal(1, 2, 7, 2, 8), _normal(2, 4, 6, 7)
    mask = (jnp.arange(7) < jnp.array([5, 7])[:, None, None, None]) & (
        jnp.arange(6)[:, None] != 3  # a query that sees no key
    )
    window = (3, 1)
    fwd = jus.dot_product_attention.factors(
        q, kv, kv, local_window_size=window, mult=20.0
    ).fwd

    def unit(q, k, v, bias):
        return jus.dot_product_attention(
            q, k, v, mask, bias, local_window_size=window, mult=20.0
        )

    def plain(q, k, v, bias):
        options = {"mask": mask, "local_window_size": window, "scale": 20 / 8}
        return fwd * jax.nn.dot_product_attention(q, k, v, bias[None], **options)

    @ft.partial(jax.jit, static_argnums=0)
    def run(f, g):
        y, vjp = jax.vjp(f, q, kv, kv, bias)
        return y, *vjp(g)

    g = _normal(3, *q.shape)
    for a, b in zip(run(unit, g), run(plain, g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [None, 64])
def test_a_sequence_in_parts_gives_the_same_output(length):
    q, k, v = (_normal(i, 2, 16, 2, 8) for i in range(3))
    options = {"is_causal": True, "local_window_size": (6, 0), "length": length}
    whole = jus.dot_product_attention(q, k, v, **options)
    parts = [
        jus.dot_product_attention(
            q[:, a:b], k, v, None, None, jnp.arange(a, b), **options
        )
        for a, b in ((0, 9), (9, 10), (10, 16))
    ]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)
    factors = jus.dot_product_attention.factors(q, k, v, **options)
    n = length or 16
    x = jnp.ones((n, 1, 8))
    options |= {"length": None}
    assert factors.fwd == jus.dot_product_attention.factors(x, x, x, **options).fwd


def _call(module, *args, **options):
    return nnx.jit(lambda module, args: module(*args, **options))(module, args)


def _moved(module):
    """The module with biases and gains that differ from zero and one."""
    params = nnx.state(module, nnx.Param)
    move = jax.jit(ft.partial(jax.tree.map, lambda p: p + 0.1 * jnp.cos(p)))
    nnx.update(module, move(params))
    return module


def _with_plain_namesake(factor, *sizes, **options):
    """A module, and Flax's with the same parameters but for the static factors.

    Those are fan_in^-1/2 on a kernel, attention's `factor` (here on the last kernel),
    and head_size^-1/2 on the logits, which the unit-scaled one is given as `mult`.
    """
    plain = nnx.MultiHeadAttention(*sizes, rngs=nnx.Rngs(0), **options)
    mult = plain.head_dim**0.5
    unit = jus.nnx.MultiHeadAttention(*sizes, mult=mult, rngs=nnx.Rngs(1), **options)
    _moved(unit)
    nnx.update(plain, nnx.state(unit, nnx.Param))
    for name in ("query", "key", "value", "out"):
        kernel = getattr(plain, name).kernel
        fan_in = kernel.size // getattr(plain, name).bias.size
        kernel[...] *= fan_in**-0.5 * (factor if name == "out" else 1.0)
    return unit, plain


def _factor(queries, keys, d, **options):
    q, k = jnp.ones((queries, 1, d)), jnp.ones((keys, 1, d))
    options["mult"] = d**0.5
    return jus.dot_product_attention.factors(q, k, k, **options).fwd


def test_cross_attention_with_grouped_heads_and_normalised_queries_is_the_namesakes():
    unit, plain = _with_plain_namesake(
        _factor(5, 7, 8), 4, 16, 32, 24, 2, 20, normalize_qk=True, decode=False
    )
    inputs = _normal(0, 3, 5, 16), _normal(1, 3, 7, 20), _normal(2, 3, 7, 20)
    mask = jax.random.bernoulli(jax.random.key(0), 0.7, (3, 1, 5, 7)).astype(float)
    got, want = (_call(m, *inputs, mask=mask) for m in (unit, plain))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("broadcast", [False, True])
def test_dropout_of_attention_weights_draws_as_the_namesake(broadcast):
    unit, plain = _with_plain_namesake(
        _factor(
            6, 6, 4, is_causal=True, dropout_rate=0.3, dropout_key=jax.random.key(0)
        ),
        *(4, 16),
        decode=False,
        dropout_rate=0.3,
        broadcast_dropout=broadcast,
        keep_rngs=False,
    )
    x = _normal(0, 2, 6, 16)
    got, want = (
        nnx.jit(
            lambda m, x: m(
                x, is_causal=True, deterministic=False, rngs=nnx.Rngs(dropout=3)
            )
        )(m, x)
        for m in (unit, plain)
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="deterministic"):
        unit(x)
    unit.eval()
    assert not np.allclose(_call(unit, x, is_causal=True), got, atol=0.1)


def test_decoding_step_by_step_is_the_namesakes():
    unit, plain = _with_plain_namesake(
        _factor(6, 6, 4, is_causal=True), 4, 16, num_kv_heads=2, decode=True
    )
    x = _normal(0, 2, 6, 16)
    for module in (unit, plain):
        module.init_cache(x.shape)
    for i in range(3):
        # The namesake's decoding is causal by itself; ours takes the factor from it.
        got = _call(unit, x[:, i : i + 1], is_causal=True)
        want = _call(plain, x[:, i : i + 1])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for name in ("cached_key", "cached_value", "cache_index"):
        a, b = (getattr(m, name)[...] for m in (unit, plain))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["is_causal", "mask"])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_decoding_is_what_was_trained_with_a_causal_mask_or_is_causal(api, masked):
    x = _normal(0, 2, 12, 16)
    mask = nnx.make_causal_mask(x[..., 0]) if masked else None
    if api == "nnx":
        module = jus.nnx.MultiHeadAttention(4, 16, decode=True, rngs=nnx.Rngs(0))
        module.init_cache(x.shape)
        causal = {} if masked else {"is_causal": True}
        want = module(x, mask=mask, decode=False, **causal)
        parts = [_call(module, part, **causal) for part in jnp.split(x, (5, 6), axis=1)]
    else:
        kind = ft.partial(
            jus.linen.MultiHeadDotProductAttention, 4, is_causal=not masked
        )
        variables = kind(decode=True).init(jax.random.key(0), x)
        params, cache = variables["params"], variables["cache"]
        want = kind().apply({"params": params}, x, mask=mask)
        parts = []
        for part in jnp.split(x, (5, 6), axis=1):
            y, new = kind(decode=True).apply(
                {"params": params, "cache": cache}, part, mutable="cache"
            )
            cache = new["cache"]
            parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_what_does_not_fit_a_decoding_call_is_refused_by_name(causal):
    x, call = _normal(0, 2, 12, 16), {"is_causal": causal, "decode": True}
    module = jus.nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
    module.init_cache(x.shape)
    short = jnp.ones((2, 1, 4, 4), bool)  # of the call's keys, not of the cache's
    with pytest.raises(
        ValueError, match=r"`mask`.*\(2, 4, 4, 12\), got .*\(2, 1, 4, 4"
    ):
        module(x[:, :4], mask=short, **call)
    with pytest.raises(ValueError, match=r"`inputs_k`.*`inputs_q` \(1\).*got 4"):
        module(x[:, :1], x[:, :4], **call)


def test_decoding_past_the_caches_end_is_an_error_and_under_jit_nan():
    x = _normal(0, 1, 2, 8)
    eager, jitted = _attention(decode=True), _attention(decode=True)
    eager(x)
    with pytest.raises(ValueError, match="holds 2 of 3 positions, got 2 more"):
        eager(x)
    assert jnp.isfinite(_call(jitted, x)).all()
    assert jnp.isnan(_call(jitted, x)).all()


def test_attention_passes_metadata_on_and_knows_the_roles():
    module = jus.nnx.MultiHeadAttention(
        4,
        16,
        normalize_qk=True,
        kernel_metadata={"a": 1},
        out_kernel_metadata={"a": 2},
        bias_metadata={"a": 3},
        out_bias_metadata={"a": 4},
        query_ln_scale_metadata={"a": 5},
        key_ln_scale_metadata={"role": "bias"},
        rngs=nnx.Rngs(0),
    )

    def about(parameter):
        data = parameter.get_metadata()
        return data.get("a"), data["role"], data.get("fan_in")

    assert about(module.value.kernel) == (1, "weight", 16)
    assert about(module.out.kernel) == (2, "weight", 16)
    assert about(module.key.bias) == (3, "bias", None)
    assert about(module.out.bias) == (4, "bias", None)
    assert about(module.query_ln.scale) == (5, "norm", None)
    assert about(module.key_ln.scale) == (None, "bias", None)
    assert isinstance(module.key_ln, jus.nnx.LayerNorm)


def test_precision_reaches_every_product():
    graph, params = nnx.split(_attention(precision="highest"))
    call = jax.make_jaxpr(lambda p, x: nnx.merge(graph, p)(x))
    text = str(call(params, jnp.ones((1, 3, 8))))
    assert text.count("dot_general[") == 6 == text.count("precision=(Precision.HIGHEST")


def test_attention_of_your_own_is_called_as_by_the_namesake():
    def attention(query, key, value, *, module, mask, **_):
        assert module is own and key.shape[-3] == mask.shape[-1] == 3
        return value[:, :1]

    own = _attention(attention_fn=attention)
    own(_normal(0, 1, 1, 8), decode=True, sow_weights=True)


def _attention(**options):
    module = jus.nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), **options)
    module.init_cache((1, 3, 8))
    return module


REFUSED = {
    "sow": (lambda x: _attention()(x, sow_weights=True), "`sow_weights` must be False"),
    "size": (lambda x: _attention(decode=True)(x), "`inputs_q` must fit the cache"),
    "cache": (
        lambda x: jus.nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))(x, decode=True),
        "call `init_cache` first",
    ),
    "depth": (
        lambda x: jus.nnx.TransformerStack(8, 2, 8, depth=0, rngs=nnx.Rngs(0)),
        "`depth` must be 1",
    ),
}


@pytest.mark.parametrize("call, match", REFUSED.values(), ids=REFUSED)
def test_bad_calls_get_an_error_that_names_it(call, match):
    with pytest.raises(ValueError, match=match):
        call(_normal(0, 1, 4, 8))


def test_input_positions_turn_queries_and_keys():
    x = _normal(0, 2, 5, 8)
    plain = _attention()
    turning = _attention(rotary_base=100.0)
    with pytest.raises((TypeError, ValueError), match="input_positions"):
        plain(x, input_positions=jnp.arange(5))
    try:
        moved = turning(x, input_positions=3 + 2 * jnp.arange(5))
    except TypeError:  # Flax 0.12.8 has no such argument
        return
    # Only differences of positions count: here twice those of the next line.
    other = turning(x, input_positions=2 * jnp.arange(5))
    np.testing.assert_allclose(moved, other, rtol=1e-4, atol=1e-5)
    assert not np.allclose(moved, turning(x), atol=1e-3)


STACK = {
    "pre_norm": {},
    "post_norm": {"placement": jus.nnx.post_norm, "norm": jus.nnx.LayerNorm},
    "branch_norm": {
        "placement": jus.nnx.branch_norm,
        "norm": jus.nnx.RMSNorm,
        "remat": True,
        "attention": ft.partial(
            jus.nnx.MultiHeadAttention,
            num_kv_heads=2,
            normalize_qk=True,
            local_window_size=(8, 0),
        ),
    },
}


def _stack(**options):
    make = lambda: jus.nnx.TransformerStack(
        32, 4, 64, depth=2, rngs=nnx.Rngs(0), **options
    )
    return nnx.jit(make)()  # one program for all parameters


def _vjp(module, x, g):
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def run(params, x, g):
        def call(params, x):
            return nnx.merge(graph, params, rest)(x)

        y, vjp = jax.vjp(call, params, x)
        return y, vjp(g)

    return run(params, x, g)


@pytest.mark.parametrize("options", STACK.values(), ids=STACK)
def test_stacks_have_unit_scale_at_their_ends_and_true_gradients(options, truly):
    x, g = _normal(0, 2, 4, 32, 32)
    model = _moved(_stack(**options))
    y, got = _vjp(model, x, g)
    np.testing.assert_allclose(_rms(y), 1, atol=0.1)
    # Cotangents of query, key and value add up, and so do those of up and gate.
    assert 1 < _rms(got[1]) < 1.6
    _, true = truly(_vjp, model, x, g)

    def cosine(a, b):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        return a @ b / np.sqrt((a @ a) * (b @ b))

    cosines = jax.tree.leaves(jax.tree.map(cosine, got, true))
    assert len(cosines) >= 15
    np.testing.assert_array_less(0.9999, cosines)


def test_placements_put_the_norm_where_they_say():
    x, tau = _normal(0, 3, 16), 0.5
    norm, branch = jnp.sin, lambda x: 3 * x
    a, b = tau / 1.25**0.5, 1 / 1.25**0.5
    for placement, want in (
        (jus.nnx.pre_norm, b * x + a * 3 * jnp.sin(x)),
        (jus.nnx.post_norm, jnp.sin(b * x + a * 3 * x)),
        (jus.nnx.branch_norm, b * x + a * jnp.sin(3 * x)),
    ):
        got = placement(norm, branch, x, tau=tau)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_stack_gives_its_blocks_their_places_and_takes_any_residual_rule():
    model = _stack(residual_rule=lambda index, layers: 1.0 + index / layers)
    assert [b.taus for b in model.blocks] == [(1.0, 1.25), (1.5, 1.75)]


@pytest.mark.parametrize("remat", [False, True])
def test_remat_marks_each_block(remat):  # its gradients are those of branch_norm above
    graph, params = nnx.split(_stack(remat=remat))
    call = jax.make_jaxpr(lambda p, x: nnx.merge(graph, p)(x))
    equations = call(params, jnp.ones((1, 4, 32))).jaxpr.eqns
    assert sum("remat" in str(e.primitive) for e in equations) == 2 * remat


@pytest.mark.parametrize("length", [None, 40])
def test_decoding_does_not_depend_on_how_a_sequence_is_cut(length):
    attention = ft.partial(
        jus.nnx.MultiHeadAttention,
        num_kv_heads=2,
        normalize_qk=True,
        local_window_size=(5, 0),
        length=length,
    )
    model = _stack(attention=attention)
    x = _normal(0, 2, 12, 32)
    whole = _call(model, x)
    # A cache of the sequence's length, or one of any if `length` is given.
    model.init_cache((2, 12 if length is None else 20, 32))
    decode = nnx.jit(lambda model, x: model(x, decode=True))
    parts = [decode(model, part) for part in jnp.split(x, (8, 9, 10, 11), axis=1)]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_in_training_alone():
    attention = ft.partial(jus.nnx.MultiHeadAttention, dropout_rate=0.5)
    options = {"dropout_rate": 0.2, "attention": attention}
    model, x = _stack(**options), _normal(0, 2, 8, 32)
    plain = _stack()
    nnx.update(plain, nnx.state(model, nnx.Param))
    still = _call(model, x, deterministic=True)
    np.testing.assert_allclose(still, _call(plain, x), rtol=1e-5, atol=1e-6)
    draw = nnx.jit(lambda model, x: model(x, deterministic=False))
    one, two = draw(model, x), draw(model, x)
    assert _rms(one - still) > 0.1 and _rms(one - two) > 0.1
    draw = nnx.jit(lambda model, x: model(x, deterministic=False, rngs=nnx.Rngs(7)))
    np.testing.assert_array_equal(draw(model, x), draw(model, x))


def test_remat_draws_the_same_dropout_from_keys_of_the_call():
    attention = ft.partial(jus.nnx.MultiHeadAttention, dropout_rate=0.5)
    options = {"dropout_rate": 0.2, "attention": attention}

    # Of the input alone: `jax.grad` around `nnx.remat` is refused by Flax where there
    # are random counts, and `nnx.grad` takes other arguments in either mode.
    def loss(x, model, rngs):
        return jnp.sum(jnp.sin(model(x, deterministic=False, rngs=rngs)))

    def run(remat):
        step = nnx.jit(nnx.value_and_grad(loss))
        return step(_normal(0, 2, 8, 32), _stack(remat=remat, **options), nnx.Rngs(7))

    for a, b in zip(run(False), run(True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length, kv_heads", [(16, 4), (128, 4), (128, 2)])
def test_a_values_bias_meets_attentions_factor(length, kv_heads, is_causal):
    """Its gradient is f times a sum of the output's cotangent, over a group of heads,
    whatever the weights: they add up to 1 for each query."""
    layer = jus.nnx.MultiHeadAttention(
        4, 256, num_kv_heads=kv_heads, decode=False, rngs=nnx.Rngs(0)
    )
    x, g = (
        _normal(1, 2048 // length, length, 256),
        _normal(2, 2048 // length, length, 256),
    )
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def gradients(params):
        call = lambda p: nnx.merge(graph, p, rest)(x, is_causal=is_causal)
        return jax.vjp(call, params)[1](g)[0]

    grads = gradients(params)
    q, k = (jax.ShapeDtypeStruct((1, length, n, 64), x.dtype) for n in (4, kv_heads))
    f = jus.dot_product_attention.factors(q, k, k, is_causal=is_causal).fwd
    # Of n = 64 kv_heads numbers: 4 / sqrt(2 n), relative, is 0.25 and 0.18.
    want = f * (4 / kv_heads) ** 0.5
    found = _rms(grads["value"]["bias"][...])
    np.testing.assert_allclose(found, want, rtol=4 / (128 * kv_heads) ** 0.5)
    assert _rms(grads["key"]["bias"][...]) < 1e-3
