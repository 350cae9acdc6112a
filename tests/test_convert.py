"""Converted Flax models: the same function, unit-scaled weights, true gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_unit_scaling as jus


class _Flax(nnx.Module):
    """A small language model of plain Flax layers, of every kind that converts."""

    def __init__(self, rngs, vocabulary=16, width=32):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (8, width)))
        self.norms = nnx.List(
            [nnx.LayerNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)]
        )
        self.attention = nnx.MultiHeadAttention(
            4, width, num_kv_heads=2, decode=False, rngs=rngs
        )
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 4 * width, rngs=rngs),
            nnx.gelu,
            nnx.Dropout(0.1, deterministic=True),
            nnx.Einsum("...h,hd->...d", (4 * width, width), (width,), rngs=rngs),
        )
        self.readout = nnx.Linear(
            width, vocabulary, kernel_metadata={"mine": 1}, rngs=rngs
        )

    def __call__(self, ids):
        x = self.embed(ids) + self.position[...]
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return self.readout(x + self.mlp(self.norms[1](x)))


def _batch(step):
    """Sequences that count on by a step of their own."""
    start, step = jax.random.randint(jax.random.key(step), (2, 32, 1), 0, 16)
    ids = (start + step * jnp.arange(9)) % 16
    return ids[:, :-1], ids[:, 1:]


def _trainer(model, rate, loss_fn):
    """update(state, batch) -> state, loss, gradients; the first state; its model."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimiser = optax.adam(rate)

    @jax.jit
    def update(state, batch):
        params, moments = state

        def loss(params):
            return loss_fn(nnx.merge(graph, params, rest)(batch[0]), batch[1])

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimiser.update(grads, moments)
        return (optax.apply_updates(params, updates), moments), value, grads

    state = params, optimiser.init(params)
    return update, state, lambda state: nnx.merge(graph, state[0], rest)


def _train(update, state, steps=60):
    losses = []
    for step in range(steps):
        state, loss, _ = update(state, _batch(step))
        losses.append(float(loss))
    return state, losses


def _optax_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _kernels(model):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model))
        if "kernel" in jax.tree_util.keystr(path)
        or "embed" in jax.tree_util.keystr(path)
    }


def test_a_trained_model_converts_and_learns_on():
    plain_update, state, model = _trainer(_Flax(nnx.Rngs(0)), 3e-3, _optax_loss)
    state, before = _train(plain_update, state)
    plain = model(state)
    assert before[-1] < 0.8 * before[0]

    untouched = jax.tree.map(np.array, nnx.state(plain))
    unit = jus.nnx.convert(plain)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(plain), untouched)
    ids, labels = _batch(99)
    np.testing.assert_allclose(unit(ids), plain(ids), rtol=1e-5, atol=1e-5)
    kernels = _kernels(unit)
    assert len(kernels) == 8 == len(_kernels(plain))
    for path, kernel in kernels.items():
        np.testing.assert_allclose(np.std(kernel), 1, rtol=1e-5, err_msg=path)
    assert unit.readout.kernel.get_metadata()["mine"] == 1

    # Its gradients are true, each a positive multiple of the original's, and as large
    # as its activations make them instead of 1 / tokens.
    unit_update, unit_state, _ = _trainer(unit, 1e-2, jus.cross_entropy)
    _, _, want = plain_update(state, (ids, labels))
    _, _, got = unit_update(unit_state, (ids, labels))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
        path = jax.tree_util.keystr(path)
        if "'key'" in path and "'bias'" in path:
            continue  # it shifts all logits of a query alike: its gradient is zero
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        np.testing.assert_allclose(cosine, 1, atol=1e-4, err_msg=path)
        if "kernel" in path:
            assert 0.03 < np.sqrt(np.mean(a**2)) < 10, path

    _, after = _train(unit_update, unit_state)
    assert np.mean(after[:5]) < 1.1 * np.mean(before[-5:])
    assert np.mean(after[-5:]) < 0.7 * np.mean(before[-5:])


def test_a_single_layer_and_a_zero_weight_convert_and_formats_pass_on():
    x = jax.random.normal(jax.random.key(0), (8, 16))
    zero = nnx.Linear(16, 4, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(jus.nnx.convert(zero)(x), zero(x))
    plain = nnx.LinearGeneral(16, (2, 4), rngs=nnx.Rngs(0))
    rounded = jus.nnx.convert(plain, formats=jus.SIMULATED_FP8, batch_axis_name="data")
    assert rounded.batch_axis_name == "data"
    rounded.batch_axis_name = None
    assert 1e-3 < np.max(np.abs(rounded(x) - plain(x))) < 0.3
    again = jus.nnx.convert(rounded)  # what is unit-scaled already stays
    np.testing.assert_array_equal(again(x), rounded(x))


class _Shared(nnx.Module):
    def __init__(self, what):
        self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.b = self.a if what == "layer" else nnx.Linear(4, 4, rngs=nnx.Rngs(1))
        self.b.kernel = self.a.kernel


def test_a_layer_used_twice_stays_one():
    unit = jus.nnx.convert(_Shared("layer"))
    assert unit.a is unit.b and isinstance(unit.a, jus.nnx.Linear)


X = jax.random.normal(jax.random.key(1), (4, 6, 8))


class _Mine(nnx.Linear):
    """A layer of a user's own, derived from one of Flax."""


def _recurrent(name):
    def make(r):
        return nnx.RNN(getattr(nnx, name)(8, 8, rngs=r), rngs=r)

    return make


def _both(r):
    return nnx.Bidirectional(_recurrent("GRUCell")(r), _recurrent("SimpleCell")(r))


def _attention(**options):
    options = {"normalize_qk": True, "num_kv_heads": 1, "decode": False} | options
    return lambda r: nnx.MultiHeadAttention(2, 8, **options, rngs=r)


MASK = np.arange(3 * 8 * 4).reshape(3, 8, 4) % 3 > 0
# One of each layer in `COUNTERPARTS`, and of what has no parameters of its own.
LAYERS = {
    "Linear": lambda r: nnx.Linear(8, 4, rngs=r),
    "LinearGeneral": lambda r: nnx.LinearGeneral(8, (2, 3), batch_axis={0: 4}, rngs=r),
    "Einsum": lambda r: nnx.Einsum("...i,io->...o", (8, 4), (4,), rngs=r),
    "Conv": lambda r: nnx.Conv(8, 4, 3, strides=2, rngs=r),
    "Conv masked": lambda r: nnx.Conv(8, 4, 3, mask=MASK, padding="VALID", rngs=r),
    "ConvTranspose": lambda r: nnx.ConvTranspose(8, 4, 3, strides=2, rngs=r),
    "LoRA": lambda r: nnx.LoRA(8, 2, 4, b_initializer=nnx.initializers.ones, rngs=r),
    "LoRA base": lambda r: nnx.LoRA(
        8, 2, 4, base_module=nnx.Linear(8, 4, rngs=r), rngs=r
    ),
    "LoRALinear": lambda r: nnx.LoRALinear(8, 4, lora_rank=2, rngs=r),
    "LayerNorm": lambda r: nnx.LayerNorm(8, reduction_axes=(1, 2), rngs=r),
    "RMSNorm": lambda r: nnx.RMSNorm(8, rngs=r),
    "GroupNorm": lambda r: nnx.GroupNorm(8, num_groups=None, group_size=4, rngs=r),
    "InstanceNorm": lambda r: nnx.InstanceNorm(8, rngs=r),
    "BatchNorm": lambda r: nnx.BatchNorm(8, rngs=r),
    "PReLU": lambda r: nnx.PReLU(0.3),
    "MultiHeadAttention": _attention(),
    "MultiHeadAttention own": _attention(
        attention_fn=lambda *a, **k: nnx.dot_product_attention(*a, **k)
    ),
    "MultiHeadAttention dropping": _attention(dropout_rate=0.5, deterministic=False),
    "RNN of SimpleCell": _recurrent("SimpleCell"),
    "RNN of LSTMCell": _recurrent("LSTMCell"),
    "RNN of OptimizedLSTMCell": _recurrent("OptimizedLSTMCell"),
    "RNN of GRUCell": _recurrent("GRUCell"),
    "Bidirectional": _both,
    "Dropout": lambda r: nnx.Dropout(0.5, rngs=r),
}


def _outcome(layer):
    """The output, the input's cotangent, gradients by path, and other state."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def call(params, rest, x):
        def of(params, x):
            merged = nnx.merge(graph, params, rest, copy=True)
            y = merged(x)
            return y, nnx.state(merged, nnx.Not(nnx.Param))

        y, vjp, state = jax.vjp(of, params, x, has_aux=True)
        return y, vjp(jnp.cos(7 * y)), state

    y, (grads, dx), state = call(params, rest, X)
    by_path = {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    return y, dx, by_path, state


def _same_direction(got, want, path=""):
    cosine = np.sum(got * want) / np.sqrt(np.sum(got**2) * np.sum(want**2))
    np.testing.assert_allclose(cosine, 1, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_computes_the_same_with_true_gradients(name):
    plain = LAYERS[name](nnx.Rngs(0))
    params = nnx.state(plain, nnx.Param)  # no bias may be zero, no gain one
    move = lambda p: 1.3 * p + 0.1 * jnp.cos(9 * p)
    nnx.update(plain, jax.jit(lambda params: jax.tree.map(move, params))(params))
    unit = jus.nnx.convert(plain)
    flax_type = type(plain)
    if name != "Dropout":
        assert type(unit) is getattr(jus.nnx, flax_type.__name__)
    want_y, want_dx, want_grads, want_state = _outcome(plain)
    y, dx, grads, state = _outcome(unit)
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-3, atol=1e-4)
    assert grads.keys() == want_grads.keys()
    for path, want in want_grads.items():
        # A key's bias shifts all logits of a query alike.
        if np.max(np.abs(want)) > 1e-5:
            _same_direction(grads[path], want, path)
    for a, b in zip(*map(jax.tree.leaves, (state, want_state)), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_every_counterpart_is_tried():
    kinds = {type(make(nnx.Rngs(0))) for make in LAYERS.values()} | {nnx.Embed}
    missing = {*jus.nnx.convert.__globals__["COUNTERPARTS"]} - kinds
    lines = "".join(
        f'\n    "{t.__name__}": lambda r: nnx.{t.__name__}(...),' for t in missing
    )
    assert not missing, f"add to LAYERS:{lines}"


class _TiedModel(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(16, 8, rngs=nnx.Rngs(0))
        self.mlp = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, ids):
        x = self.embed(ids)
        return self.embed.attend(x + self.mlp(x))


def test_a_tied_embedding_converts_with_the_positions_of_a_batch():
    plain = _TiedModel()
    unit = jus.nnx.convert(plain, tied=256)
    ids, labels = _batch(0)

    def gradients(model):
        graph, params = nnx.split(model)

        def loss(params):
            logits = nnx.merge(graph, params)(ids)
            return jus.cross_entropy(logits, labels), logits

        return jax.grad(loss, has_aux=True)(params)

    want, logits = gradients(plain)
    got, unit_logits = gradients(unit)
    np.testing.assert_allclose(unit_logits, logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        _same_direction(np.asarray(a, np.float64), np.asarray(b, np.float64))
    with pytest.raises(ValueError, match="`attend` sums"):
        jus.nnx.convert(plain)(ids)


BAD = {
    "unknown": (lambda: _Mine(4, 4, rngs=nnx.Rngs(0)), "at the root, _Mine"),
    "nested": (
        lambda: nnx.Sequential(nnx.relu, _Mine(8, 8, rngs=nnx.Rngs(0))),
        r"at \.layers\[1\], _Mine",
    ),
    "weights": (
        lambda: nnx.List(
            [nnx.SpectralNorm(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))]
        ),
        r"SpectralNorm that cannot be converted at \[0\]: it changes",
    ),
    "below": (
        lambda: nnx.LoRA(
            8, 2, 8, base_module=_Mine(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
        ),
        r"at \.base_module, _Mine",
    ),
    "shared": (lambda: _Shared("parameter"), r"between \.a and \.b"),
}


@pytest.mark.parametrize("make, match", BAD.values(), ids=BAD)
def test_what_cannot_be_converted_is_refused_by_its_place(make, match):
    with pytest.raises(ValueError, match=match):
        jus.nnx.convert(make())


def test_traced_weights_are_refused():
    graph, params = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))

    @jax.jit
    def converted(params):
        return jus.nnx.convert(nnx.merge(graph, params))(jnp.ones((2, 8)))

    with pytest.raises(TypeError, match="`module` must hold .* outside of `jit`"):
        converted(params)


def test_a_model_built_from_numpys_integers_is_converted():
    two, three, eight = np.int64(2), np.int32(3), np.int16(8)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(three, eight, (three, three), strides=(two, two), rngs=rngs),
        nnx.LinearGeneral(eight, (two, three), axis=np.int64(-1), rngs=rngs),
        nnx.LinearGeneral((two, three), eight, axis=(-two, -1), rngs=rngs),
        nnx.LayerNorm(eight, rngs=rngs),
    )
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    unit = jus.nnx.convert(model, tied=eight)
    np.testing.assert_allclose(unit(x), model(x), rtol=1e-4, atol=1e-5)
