"""u-muP is muP in other units: the same trajectory, step for step.

Adam ignores the scale of a gradient, and Lion takes its sign. So a weight w with the
factor a in its product and the learning rate c moves as the plain weight w' = a w with
the learning rate a c does. Here the second is written out with `jnp` alone, as muP has
it: weights that start at the scale a, plain products, plain gradients, and rates in
proportion to 1 / width.

SGD's update is the gradient, here k times the true one of w, which is a times that of
w'. So its plain rate is a^2 c k. The k of a parameter is a constant of the model: it is
read off the first gradients, and has to hold at every later step; how it depends on
width is known apart, from muP's table for SGD.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_unit_scaling as jus

VOCABULARY, WIDTH, HEADS, HIDDEN, BLOCKS = 16, 32, 4, 48, 2
HEAD_SIZE, ADDS = WIDTH // HEADS, 2 * BLOCKS
BATCH, LENGTH, STEPS, RATE = 8, 6, 20, 0.25
# Of a step in float64 after 20 of them; Adam's epsilon does not mask a wrong scale.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EPSILON = 1e-30


class _Transformer(nnx.Module):
    """Every role: a table, hidden weights, biases, gains, and a readout with a bias."""

    def __init__(
        self, width=WIDTH, heads=HEADS, hidden=HIDDEN, *, readout_constraint=None
    ):
        like = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.embed = jus.nnx.Embed(VOCABULARY, width, **like)
        self.stack = jus.nnx.TransformerStack(
            width,
            heads,
            hidden,
            depth=BLOCKS,
            norm=jus.nnx.LayerNorm,
            use_bias=True,
            **like,
        )
        self.norm = jus.nnx.LayerNorm(width, **like)
        self.readout = jus.nnx.LinearReadout(
            width, VOCABULARY, constraint=readout_constraint, **like
        )

    def __call__(self, ids):
        return self.readout(self.norm(self.stack(self.embed(ids))))


# -- The same model in muP's units, without the library --------------------------------


def _plain_rule(path):
    """The scale a that a parameter starts with, and c: its learning rate is a c."""
    inside = ADDS**-0.5  # of all that is in a residual branch
    match path:
        case ["embed", "embedding"]:
            return 1.0, WIDTH**-0.5
        case ["readout", "kernel"]:
            return 1 / WIDTH, 1.0
        case ["readout", "bias"] | ["norm", "scale" | "bias"]:
            return 1.0, 1.0
        case [*_, "down", "kernel"]:
            return HIDDEN**-0.5, HIDDEN**-0.5 * inside
        case [*_, "kernel"]:
            return WIDTH**-0.5, WIDTH**-0.5 * inside
    return 1.0, inside


def _affine(p, x):
    return x @ p["kernel"] + p["bias"]


def _norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def _mlp(p, x):
    gate = _affine(p["gate"], x)
    return _affine(p["down"], _affine(p["up"], x) * gate / (1 + jnp.exp(-gate)) / SILU)


def _attention(p, x):
    def heads(name, rotate=True):
        y = jnp.einsum("btf,fhd->bthd", x, p[name]["kernel"]) + p[name]["bias"]
        return _rotated(y) if rotate else y

    logits = jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key")) / HEAD_SIZE
    seen = np.tri(LENGTH, dtype=bool)
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, heads("value", rotate=False)) / ATTENTION
    return jnp.einsum("bqhd,hdf->bqf", y, p["out"]["kernel"]) + p["out"]["bias"]


def _rotated(y):
    half = HEAD_SIZE // 2
    angle = np.arange(LENGTH)[:, None] * 1e4 ** (-np.arange(half) / half)
    z = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angle)[:, None]
    return jnp.concatenate([z.real, z.imag], -1)


def _plain_logits(p, ids):
    x = p["embed"]["embedding"][ids]
    for i in range(ADDS):
        block = p["stack"]["blocks"][i // 2]
        if i % 2:
            f = _mlp(block["mlp"], _norm(block["mlp_norm"], x))
        else:
            f = _attention(block["attention"], _norm(block["attention_norm"], x))
        tau = (BLOCKS + i) ** -0.5  # equal shares of all branches and the embedding
        x = (tau * f + x) / math.sqrt(1 + tau**2)
    return _affine(p["readout"], _norm(p["norm"], x))


def _silu_scale():
    """The rms of silu(Z), Z standard normal: a sum over a fine grid."""
    z = np.linspace(-12, 12, 100_001)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    return math.sqrt(density @ (z / (1 + np.exp(-z))) ** 2)


def _attention_scale():
    """The standard deviation of causal attention's output for independent normals.

    A query q with n keys has logits of standard deviation s = |q| / head_size and the
    variance n E[p^2], where p = e^x / S and 1 / S^2 is the integral of t exp(-t S):

        E[p^2] = integral of t E[e^(2x) exp(-t e^x)] E[exp(-t e^x)]^(n - 1) dt,

    here over log t; then the mean over n, the positions, and over |q|.
    """
    r = np.linspace(1e-3, 12, 241)
    chi = r ** (HEAD_SIZE - 1) * np.exp(-(r**2) / 2)
    z = np.linspace(-9, 9, 181)
    normal = np.exp(-(z**2) / 2)
    normal /= normal.sum()
    log_t = np.linspace(-45, 25, 701)
    total = 0.0
    for radius, weight in zip(r, chi / chi.sum(), strict=True):
        x = radius / HEAD_SIZE * z
        decay = np.exp(-np.exp(log_t[:, None] + x))
        first, squared = decay @ normal, decay @ (normal * np.exp(2 * x))
        for n in range(1, LENGTH + 1):
            integral = np.exp(2 * log_t) * squared * first ** (n - 1)
            total += weight * n * integral.sum() * (log_t[1] - log_t[0])
    return math.sqrt(total / LENGTH)


SILU, ATTENTION = _silu_scale(), _attention_scale()


# -- Their trajectories ----------------------------------------------------------------


def _mean_loss(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logp, labels[..., None], -1).mean()


def _train(loss, optimiser, params, batches):
    """The losses, and the parameters after each step."""

    def step(state, batch):
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, batch[:, :-1], batch[:, 1:])
        updates, moments = optimiser.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        return (params, moments), (value, params)

    start = params, optimiser.init(params)
    return jax.lax.scan(step, start, batches)[1]


def _by_path(f, params, *rest):
    def at(path, *leaves):
        return f([jax.tree_util.keystr((k,), simple=True) for k in path], *leaves)

    return jax.tree_util.tree_map_with_path(at, params, *rest)


# Lion's steps are as large as ever where a gradient is small; of more than these a sign
# may turn on its rounding. SGD's rate is one at which the loss falls without a warm-up.
OPTIMISERS = {
    "adam": (
        jus.optim.adam(RATE, eps=EPSILON),
        optax.chain(optax.scale_by_adam(eps=EPSILON), optax.scale(RATE)),
    ),
    "lion": (
        jus.optim.lion(RATE / 8),
        optax.chain(optax.scale_by_lion(0.9, 0.99), optax.scale(RATE / 8)),
    ),
    "sgd": (jus.optim.sgd(RATE / 8), optax.scale(RATE / 8)),
    "sgd, momentum": (
        jus.optim.sgd(RATE / 4, momentum=0.9, nesterov=True),
        optax.chain(optax.trace(0.9, nesterov=True), optax.scale(RATE / 4)),
    ),
    "sgd, constrained readout": (
        jus.optim.sgd(RATE / 8, readout_constraint=jus.to_output_scale),
        optax.scale(RATE / 8),
    ),
}


@ft.cache
def _setting(name="adam"):
    """The u-muP model's parameters, batches, losses, trajectory and first gradients."""
    constraint = jus.to_output_scale if "constrained" in name else None
    make = lambda: _Transformer(readout_constraint=constraint)
    graph, params = nnx.split(nnx.jit(make)())
    batch = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCABULARY)
    ids = jnp.tile(batch, (STEPS, 1, 1))  # to learn by heart

    def loss(params, ids, labels):
        return jus.cross_entropy(nnx.merge(graph, params)(ids), labels)

    train = jax.jit(ft.partial(_train, loss, OPTIMISERS[name][0]))
    losses, path = train(params, ids)
    grads = jax.jit(jax.grad(loss))(params, batch[:, :-1], batch[:, 1:])
    return *map(nnx.to_pure_dict, (params, path, grads)), ids, losses


def _plain_loss(params, ids, labels):
    return _mean_loss(_plain_logits(params, ids), labels)


@ft.partial(jax.jit, static_argnums=0)
def _train_plain(direction, scales, rates, params, batches):
    """The plain model from a w, with a table of a and one of rates."""
    optimiser = optax.chain(
        direction,
        optax.stateless(
            lambda updates, _: jax.tree.map(lambda u, r: -r * u, updates, rates)
        ),
    )
    start = jax.tree.map(jnp.multiply, params, scales)
    return _train(_plain_loss, optimiser, start, batches)


def _plain(rule, name="adam"):
    params, _, grads, batches, _ = _setting(name)
    scales = _by_path(lambda path, _: rule(path)[0], params)
    rates = _by_path(lambda path, _: math.prod(rule(path)), params)
    if name.startswith("sgd"):
        plain = jax.tree.map(jnp.multiply, params, scales)
        true = jax.jit(jax.grad(_plain_loss))(
            plain, batches[0, :, :-1], batches[0, :, 1:]
        )
        ratios = jax.tree.map(lambda g, t: jnp.vdot(g, t) / jnp.vdot(t, t), grads, true)
        rates = jax.tree.map(jnp.multiply, rates, ratios)
    return _train_plain(OPTIMISERS[name][1], scales, rates, params, batches)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# With a constrained readout SGD makes the updates of a free one: the next test.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=pytest.mark.slow if n in ("lion", "sgd, momentum") else []
        )
        for n in OPTIMISERS
        if "constrained" not in n
    ],
)
def test_a_model_moves_as_the_equivalent_mup_model_does(name):
    _, path, _, _, losses = _setting(name)
    want_losses, want_path = _plain(_plain_rule, name)
    assert losses[-1] < losses[0] - 0.1  # they do move
    np.testing.assert_allclose(losses, want_losses, **CLOSE)

    def compare(at, got, want):
        a, _ = _plain_rule(at)
        np.testing.assert_allclose(got, want / a, **CLOSE, err_msg="/".join(at))

    _by_path(compare, path, want_path)


def test_both_readings_of_sgd_make_the_same_update():
    _, free, _, _, _ = _setting("sgd")
    _, constrained, _, _, _ = _setting("sgd, constrained readout")
    jax.tree.map(ft.partial(np.testing.assert_allclose, **CLOSE), constrained, free)


# The power of width in SGD's rate for the plain weight w': muP's table for SGD, but for
# the embedding, whose width^1 there is width^1/2 by u-muP's rule.
SGD_POWERS = {
    ("embed", "embedding"): 1 / 2,
    ("stack", "kernel"): 0,
    ("stack", "bias"): 1,
    ("stack", "scale"): 1,
    ("norm", "scale"): 1,
    ("norm", "bias"): 1,
    ("readout", "kernel"): -1,
    ("readout", "bias"): 0,
}


@pytest.mark.parametrize(
    "constraint",
    [pytest.param(None, marks=pytest.mark.slow), jus.to_output_scale],
)
def test_sgds_plain_rates_depend_on_width_as_in_mups_table(constraint, truly):
    """Its plain rate is a^2 c k, k the ratio of a gradient and the true one."""
    optimiser = jus.optim.sgd(1.0, readout_constraint=constraint)
    ids = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCABULARY)

    def rates(scale):
        sizes = WIDTH * scale, HEADS * scale, HIDDEN * scale
        make = lambda: _Transformer(*sizes, readout_constraint=constraint)
        graph, params = nnx.split(nnx.jit(make)())

        def gradients():
            def loss(params):
                logits = nnx.merge(graph, params)(ids[:, :-1])
                return jus.cross_entropy(logits, ids[:, 1:])

            return jax.jit(jax.grad(loss))(params)

        updates, _ = optimiser.update(gradients(), optimiser.init(params), params)
        updates, true = map(nnx.to_pure_dict, (updates, truly(gradients)))

        def rate(path, u, t):
            return -jnp.vdot(u, t) / jnp.vdot(t, t) * _initial_scale(path, scale) ** 2

        return _by_path(rate, updates, true)

    def power(path, narrow, wide):
        want = SGD_POWERS[path[0], path[-1]]
        np.testing.assert_allclose(jnp.log2(wide / narrow), want, atol=1e-6)

    _by_path(power, rates(1), rates(2))


def _initial_scale(path, scale):
    """The a of a width that is so many times larger."""
    a = _plain_rule(path)[0]
    if path[-1] != "kernel":
        return a
    return a / scale if path[0] == "readout" else a / scale**0.5


def _without_depth(path):
    a, c = _plain_rule(path)
    return a, c if path[0] != "stack" else c * ADDS**0.5


WRONG = {
    "embedding 1": lambda p: (1.0, 1.0) if p[0] == "embed" else _plain_rule(p),
    "no depth": _without_depth,
    "readout fan_in^-1/2": lambda p: (
        (1 / WIDTH, WIDTH**-0.5) if p[-2:] == ["readout", "kernel"] else _plain_rule(p)
    ),
    "down of the wrong width": lambda p: (
        (HIDDEN**-0.5, WIDTH**-0.5 * ADDS**-0.5) if "down" in p else _plain_rule(p)
    ),
    "gains without depth": lambda p: (1.0, 1.0) if p[-1] == "scale" else _plain_rule(p),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_another_trajectory(name):
    losses = _setting()[-1]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        np.testing.assert_allclose(losses, _plain(WRONG[name])[0], **CLOSE)
