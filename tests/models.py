"""Small models, each the same maths written in the way of several libraries.

`MODELS[name][library](tree)` gives a loss `loss(params, x)`, a function that makes the
library's own parameters of the tree that all libraries share, and `REFERENCE[name]` is
the loss of that tree, in plain `jax.numpy`, with its products `dot` and `conv` to be
replaced by hand-quantised ones.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

FEATURES, HEADS, HIDDEN, EXPERTS = 8, 2, 16, 3
SIZE = FEATURES // HEADS  # a head's: 1 / sqrt(SIZE) is a power of two


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def _kernels(**shapes):
    return {
        name: normal(*shape, seed=i) * (1 if len(shape) == 1 else shape[-2] ** -0.5)
        for i, (name, shape) in enumerate(shapes.items())
    }


D, F, E = FEATURES, HIDDEN, EXPERTS
TREES = {
    "transformer": _kernels(
        q=(D, D), k=(D, D), v=(D, D), o=(D, D), up=(D, F), down=(F, D)
    ),
    "convnet": _kernels(first=(3, 3, 3, D), second=(3, 3, D, D), readout=(D, 4)),
    "lstm": _kernels(x=(6, 4 * D), h=(D, 4 * D), bias=(4 * D,)),
    "experts": _kernels(router=(D, E), up=(E, D, F), down=(E, F, D)),
}
INPUTS = {
    "transformer": normal(2, 5, D, seed=9),
    "convnet": normal(2, 6, 6, 3, seed=9),
    "lstm": normal(2, 4, 6, seed=9),
    "experts": normal(7, D, seed=9),
}


def square(y):
    return jnp.sum(y**2)


# -- By hand ---------------------------------------------------------------------------


def _norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _transformer(p, x, dot=jnp.matmul, **_):
    def heads(y):
        return y.reshape(*y.shape[:-1], HEADS, SIZE).swapaxes(1, 2)

    y = _norm(x)
    q, k, v = (heads(dot(y, p[name])) for name in "qkv")
    weights = jax.nn.softmax(dot(q * SIZE**-0.5, k.swapaxes(-1, -2)))
    y = dot(weights, v).swapaxes(1, 2).reshape(x.shape)
    x = x + dot(y, p["o"])
    return square(x + dot(jax.nn.gelu(dot(_norm(x), p["up"])), p["down"]))


def _convnet(p, x, dot=jnp.matmul, conv=lax.conv_general_dilated):
    for name in ("first", "second"):
        x = conv(x, p[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x)
    return square(dot(x.mean((1, 2)), p["readout"]))


def _lstm(p, x, dot=jnp.matmul, **_):
    def step(carry, x):
        h, c = carry
        gates = dot(x, p["x"]) + dot(h, p["h"]) + p["bias"]
        i, f, g, o = jnp.split(gates, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[0], D))
    return square(lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))[1])


def _experts(p, x, dot=jnp.matmul, **_):
    shares = jax.nn.softmax(dot(x, p["router"]))
    ys = [
        dot(jax.nn.gelu(dot(x, up)), down)
        for up, down in zip(p["up"], p["down"], strict=True)
    ]
    return square(sum(shares[:, i, None] * y for i, y in enumerate(ys)))


REFERENCE = {
    "transformer": _transformer,
    "convnet": _convnet,
    "lstm": _lstm,
    "experts": _experts,
}


# -- Plain jax.numpy, as its users write it: einsum, vmap, jax.nn ---------------------


def _same(tree):
    return tree


def _jnp_transformer(p, x):
    y = jax.nn.standardize(x, epsilon=1e-6)
    q, k, v = (
        jnp.einsum("btd,dhk->bthk", y, p[name].reshape(D, HEADS, SIZE))
        for name in "qkv"
    )
    y = jax.nn.dot_product_attention(q * SIZE**-0.5, k, v, scale=1.0)
    x = x + jnp.einsum("bthk,hkd->btd", y, p["o"].reshape(HEADS, SIZE, D))
    y = jax.nn.standardize(x, epsilon=1e-6)
    return square(x + jax.nn.gelu(y @ p["up"]) @ p["down"])


def _jnp_experts(p, x):
    @jax.vmap
    def expert(up, down):
        return jax.nn.gelu(x @ up) @ down

    shares = jax.nn.softmax(x @ p["router"])
    return square((shares.T[..., None] * expert(p["up"], p["down"])).sum(0))


# -- Flax NNX --------------------------------------------------------------------------


class _Block(nnx.Module):
    def __init__(self, rngs):
        norm = {"use_bias": False, "use_scale": False, "rngs": rngs}
        self.norms = nnx.List([nnx.LayerNorm(D, **norm) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            HEADS, D, use_bias=False, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(F, D, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class _Convolutions(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, D, (3, 3), use_bias=False, rngs=rngs)
        self.second = nnx.Conv(D, D, (3, 3), use_bias=False, rngs=rngs)
        self.readout = nnx.Linear(D, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.readout(x.mean((1, 2)))


class _Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(6, D, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x)


class _Mixture(nnx.Module):
    def __init__(self, rngs):
        self.router = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        self.up = nnx.LinearGeneral(D, (E, F), use_bias=False, rngs=rngs)
        self.down = nnx.List(
            [nnx.Linear(F, D, use_bias=False, rngs=rngs) for _ in range(E)]
        )

    def __call__(self, x):
        shares, hidden = nnx.softmax(self.router(x)), nnx.gelu(self.up(x))
        ys = [down(hidden[:, i]) for i, down in enumerate(self.down)]
        return sum(shares[:, i, None] * y for i, y in enumerate(ys))


def _in_nnx(make, convert):
    graphdef, _, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, x):
        # Variables of this trace's own: a recurrent net counts its random keys.
        own = jax.tree.map(lambda x: x, rest)
        return square(nnx.merge(graphdef, params, own)(x))

    return loss, convert


def _kernel(x):
    return {"kernel": x}


def _attention_kernels(p):
    heads = {
        name: _kernel(p[name[0]].reshape(D, HEADS, SIZE))
        for name in ("query", "key", "value")
    }
    return {**heads, "out": _kernel(p["o"].reshape(HEADS, SIZE, D))}


def _nnx_block(p):
    return {
        "attention": _attention_kernels(p),
        "up": _kernel(p["up"]),
        "down": _kernel(p["down"]),
    }


def _nnx_mixture(p):
    down = {i: _kernel(p["down"][i]) for i in range(E)}
    up = _kernel(p["up"].swapaxes(0, 1))
    return {"router": _kernel(p["router"]), "up": up, "down": down}


def _nnx_lstm(p):
    of_h = {"kernel": p["h"], "bias": p["bias"]}
    return {"rnn": {"cell": {"dense_i": _kernel(p["x"]), "dense_h": of_h}}}


# -- Flax Linen ------------------------------------------------------------------------


class _LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = {"use_bias": False, "use_scale": False}
        y = nn.LayerNorm(**norm)(x)
        attention = nn.MultiHeadDotProductAttention(
            HEADS, use_bias=False, name="attention"
        )
        x = x + attention(y)
        y = nn.gelu(nn.Dense(F, use_bias=False, name="up")(nn.LayerNorm(**norm)(x)))
        return x + nn.Dense(D, use_bias=False, name="down")(y)


class _LinenConvolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = nn.relu(nn.Conv(D, (3, 3), use_bias=False, name=name)(x))
        return nn.Dense(4, use_bias=False, name="readout")(x.mean((1, 2)))


class _LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(D, name="cell"))(x)


class _LinenExpert(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(F, use_bias=False, name="up")(x))
        return nn.Dense(D, use_bias=False, name="down")(y)


class _LinenMixture(nn.Module):
    @nn.compact
    def __call__(self, x):
        shares = nn.softmax(nn.Dense(E, use_bias=False, name="router")(x))
        experts = nn.vmap(
            _LinenExpert,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=E,
        )
        ys = experts(name="experts")(x)
        return (shares.T[..., None] * ys).sum(0)


def _in_linen(model, convert):
    def loss(params, x):
        return square(model.apply({"params": params}, x))

    return loss, convert


def _linen_lstm(p):
    split = {name: jnp.split(p[name], 4, -1) for name in p}
    cell = {f"i{gate}": _kernel(split["x"][i]) for i, gate in enumerate("ifgo")}
    cell |= {
        f"h{gate}": {"kernel": split["h"][i], "bias": split["bias"][i]}
        for i, gate in enumerate("ifgo")
    }
    return {"cell": cell}


# -- Equinox ---------------------------------------------------------------------------


class _EqxBlock(eqx.Module):
    norms: list
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        norm = {"use_weight": False, "use_bias": False, "eps": 1e-6}
        self.norms = [eqx.nn.LayerNorm(D, **norm) for _ in range(2)]
        self.attention = eqx.nn.MultiheadAttention(HEADS, D, key=key)
        self.up = eqx.nn.Linear(D, F, use_bias=False, key=key)
        self.down = eqx.nn.Linear(F, D, use_bias=False, key=key)

    def __call__(self, x):
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        y = jax.vmap(self.up)(jax.vmap(self.norms[1])(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(y))


class _EqxConvolutions(eqx.Module):
    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    readout: eqx.nn.Linear

    def __init__(self, key):
        conv = {"kernel_size": 3, "padding": 1, "use_bias": False, "key": key}
        self.first = eqx.nn.Conv2d(3, D, **conv)
        self.second = eqx.nn.Conv2d(D, D, **conv)
        self.readout = eqx.nn.Linear(D, 4, use_bias=False, key=key)

    def __call__(self, x):
        x = jax.nn.relu(self.first(x.transpose(2, 0, 1)))
        return self.readout(jax.nn.relu(self.second(x)).mean((1, 2)))


class _EqxRecurrent(eqx.Module):
    cell: eqx.nn.LSTMCell

    def __init__(self, key):
        self.cell = eqx.nn.LSTMCell(6, D, key=key)

    def __call__(self, x):
        def step(carry, x):
            carry = self.cell(x, carry)
            return carry, carry[0]

        return lax.scan(step, (jnp.zeros(D), jnp.zeros(D)), x)[1]


class _EqxMixture(eqx.Module):
    router: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        def many(size, out):
            make = lambda key: eqx.nn.Linear(size, out, use_bias=False, key=key)
            return eqx.filter_vmap(make)(jax.random.split(key, E))

        self.router = eqx.nn.Linear(D, E, use_bias=False, key=key)
        self.up, self.down = many(D, F), many(F, D)

    def __call__(self, x):
        shares = jax.nn.softmax(self.router(x))
        expert = eqx.filter_vmap(lambda up, down: down(jax.nn.gelu(up(x))))
        return (shares[:, None] * expert(self.up, self.down)).sum(0)


def _in_equinox(make, arrays):
    params, static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, x):
        return square(jax.vmap(eqx.combine(params, static))(x))

    def convert(tree):
        return eqx.tree_at(
            lambda m: [get(m) for get, _ in arrays],
            params,
            [of(tree) for _, of in arrays],
        )

    return loss, convert


def _weight(get, name):
    return lambda m: get(m).weight, lambda p: p[name].swapaxes(-1, -2)


_EQX = {
    "transformer": [
        _weight(lambda m: m.attention.query_proj, "q"),
        _weight(lambda m: m.attention.key_proj, "k"),
        _weight(lambda m: m.attention.value_proj, "v"),
        _weight(lambda m: m.attention.output_proj, "o"),
        _weight(lambda m: m.up, "up"),
        _weight(lambda m: m.down, "down"),
    ],
    "convnet": [
        (lambda m: m.first.weight, lambda p: p["first"].transpose(3, 2, 0, 1)),
        (lambda m: m.second.weight, lambda p: p["second"].transpose(3, 2, 0, 1)),
        _weight(lambda m: m.readout, "readout"),
    ],
    "lstm": [
        (lambda m: m.cell.weight_ih, lambda p: p["x"].T),
        (lambda m: m.cell.weight_hh, lambda p: p["h"].T),
        (lambda m: m.cell.bias, lambda p: p["bias"]),
    ],
    "experts": [
        _weight(lambda m: m.router, "router"),
        _weight(lambda m: m.up, "up"),
        _weight(lambda m: m.down, "down"),
    ],
}


# -- Haiku -----------------------------------------------------------------------------


def _hk_transformer(x):
    def norm():
        return hk.LayerNorm(-1, create_scale=False, create_offset=False, eps=1e-6)

    y = norm()(x)
    attention = hk.MultiHeadAttention(
        HEADS, SIZE, model_size=D, with_bias=False, w_init=jnp.zeros, name="attention"
    )
    x = x + attention(y, y, y)
    y = jax.nn.gelu(hk.Linear(F, with_bias=False, name="up")(norm()(x)))
    return x + hk.Linear(D, with_bias=False, name="down")(y)


def _hk_convnet(x):
    for name in ("first", "second"):
        x = jax.nn.relu(hk.Conv2D(D, 3, with_bias=False, name=name)(x))
    return hk.Linear(4, with_bias=False, name="readout")(x.mean((1, 2)))


def _hk_lstm(x):
    core = hk.LSTM(D, name="lstm")
    state = core.initial_state(x.shape[0])
    return hk.dynamic_unroll(core, x, state, time_major=False)[0]


def _hk_experts(x):
    shares = jax.nn.softmax(hk.Linear(E, with_bias=False, name="router")(x))
    up = [hk.Linear(F, with_bias=False, name=f"up{i}") for i in range(E)]
    down = [hk.Linear(D, with_bias=False, name=f"down{i}") for i in range(E)]
    ys = [b(jax.nn.gelu(a(x))) for a, b in zip(up, down, strict=True)]
    return sum(shares[:, i, None] * y for i, y in enumerate(ys))


def _in_haiku(fn, convert):
    model = hk.without_apply_rng(hk.transform(fn))
    return lambda params, x: square(model.apply(params, x)), convert


def _hk_kernels(p):
    names = {"q": "query", "k": "key", "v": "value", "o": "linear"}
    of = {k: f"attention/{name}" for k, name in names.items()}
    return {of.get(name, name): {"w": x} for name, x in p.items()}


def _hk_gates(p):
    def order(x):  # its gates are in another order
        i, f, g, o = jnp.split(x, 4, -1)
        return jnp.concatenate([i, g, f, o], -1)

    forget = jnp.repeat(jnp.arange(4) == 2, D)  # of which it adds a one to the bias
    w = jnp.concatenate([order(p["x"]), order(p["h"])])
    return {"lstm/linear": {"w": w, "b": order(p["bias"]) - forget}}


def _hk_list(p):
    each = {
        f"{name}{i}": {"w": p[name][i]} for name in ("up", "down") for i in range(E)
    }
    return {"router": {"w": p["router"]}, **each}


def _plain_kernels(p):
    return {name: _kernel(x) for name, x in p.items()}


MODELS = {
    "transformer": {
        "jnp": lambda: (_jnp_transformer, _same),
        "nnx": lambda: _in_nnx(_Block, _nnx_block),
        "linen": lambda: _in_linen(_LinenBlock(), _nnx_block),
        "equinox": lambda: _in_equinox(_EqxBlock, _EQX["transformer"]),
        "haiku": lambda: _in_haiku(_hk_transformer, _hk_kernels),
    },
    "convnet": {
        "jnp": lambda: (_convnet, _same),
        "nnx": lambda: _in_nnx(_Convolutions, _plain_kernels),
        "linen": lambda: _in_linen(_LinenConvolutions(), _plain_kernels),
        "equinox": lambda: _in_equinox(_EqxConvolutions, _EQX["convnet"]),
        "haiku": lambda: _in_haiku(_hk_convnet, _hk_kernels),
    },
    "lstm": {
        "jnp": lambda: (_lstm, _same),
        "nnx": lambda: _in_nnx(_Recurrent, _nnx_lstm),
        "linen": lambda: _in_linen(_LinenRecurrent(), _linen_lstm),
        "equinox": lambda: _in_equinox(_EqxRecurrent, _EQX["lstm"]),
        "haiku": lambda: _in_haiku(_hk_lstm, _hk_gates),
    },
    "experts": {
        "jnp": lambda: (_jnp_experts, _same),
        "nnx": lambda: _in_nnx(_Mixture, _nnx_mixture),
        "linen": lambda: _in_linen(
            _LinenMixture(),
            lambda p: {
                "router": _kernel(p["router"]),
                "experts": {"up": _kernel(p["up"]), "down": _kernel(p["down"])},
            },
        ),
        "equinox": lambda: _in_equinox(_EqxMixture, _EQX["experts"]),
        "haiku": lambda: _in_haiku(_hk_experts, _hk_list),
    },
}


# -- With state, and with derivatives of their own -------------------------------------


class Stateful(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.up(x)))


@jax.custom_vjp
def clipped(x, w):
    return x @ w


clipped.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda r, g: (jnp.clip(g @ r[1].T, -0.5, 0.5), 2 * r[0].T @ g),
)


@jax.custom_jvp
def halved(x):
    return jnp.sin(x)


halved.defjvps(lambda t, out, x: 0.5 * t * jnp.cos(x))
