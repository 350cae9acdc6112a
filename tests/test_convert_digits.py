"""Flax networks trained on real data, converted, and tuned further in FP8."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jax_unit_scaling as jus


class _Convolutional(nnx.Module):
    """A residual network with batch norms, of [batch, 8, 8]."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norms = nnx.List(nnx.BatchNorm(16, momentum=0.9, rngs=rngs) for _ in "ab")
        self.conv = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.pool = nnx.Conv(16, 32, (2, 2), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.readout = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images, train=False):
        x = nnx.relu(self.norms[0](self.stem(images[..., None]), not train))
        x = x + nnx.relu(self.norms[1](self.conv(x), not train))
        x = self.dropout(nnx.relu(self.pool(x)).mean((1, 2)), deterministic=not train)
        return self.readout(x)


class _Transformer(nnx.Module):
    """A Transformer over the eight rows of an image, as vectors of eight."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(8, 32, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (8, 32)))
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.norms = nnx.List(nnx.LayerNorm(32, rngs=rngs) for _ in "abc")
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)
        self.readout = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images, train=False):
        x = self.embed(images) + self.position[...]
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.readout(self.norms[2](x).mean(1))


def _data():
    digits = load_digits()
    images = (digits.images.astype(np.float32) - 4.9) / 6.0  # mean and scale
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], digits.target[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


TRAIN, TEST = _data()


def _plain_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _gradients(model, loss_fn, images, labels, train=True):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradients(params, rest):
        def loss(params):
            merged = nnx.merge(graph, params, rest, copy=True)
            return loss_fn(merged(images, train), labels)

        return jax.grad(loss)(params)

    return gradients(params, rest)


def _train(model, loss_fn, rate, steps):
    """Trains with batches of 100, and returns the model."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))
    images, labels = map(jnp.asarray, TRAIN)
    batches = np.random.default_rng(1).integers(0, len(labels), (steps, 100))

    @jax.jit
    def step(state, batch):
        params, rest, moments = state

        def loss(params):
            merged = nnx.merge(graph, params, rest, copy=True)
            value = loss_fn(merged(images[batch], True), labels[batch])
            return value, nnx.state(merged, nnx.Not(nnx.Param))

        grads, rest = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimiser.update(grads, moments)
        return optax.apply_updates(params, updates), rest, moments

    state = params, rest, optimiser.init(params)
    for batch in batches:  # no scan, in which XLA's convolutions on a CPU are slow
        state = step(state, batch)
    return nnx.merge(graph, *state[:2])


@jax.jit
def _logits(graph, state):
    return nnx.merge(graph, state)(TEST[0])


def _accuracy(logits):
    return float(np.mean(np.argmax(logits, -1) == TEST[1]))


@pytest.mark.parametrize(
    "kind", [_Convolutional, pytest.param(_Transformer, marks=pytest.mark.slow)]
)
def test_a_trained_network_converts_and_is_tuned_in_fp8(kind):
    plain = _train(kind(nnx.Rngs(0)), _plain_loss, 5e-3, 200)
    logits = _logits(*nnx.split(plain))
    before = _accuracy(logits)
    assert before > 0.9
    unit = jus.nnx.convert(plain)
    np.testing.assert_allclose(
        _logits(*nnx.split(unit)), logits, rtol=1e-4, atol=1e-4 * np.std(logits)
    )
    for path, leaf in nnx.to_flat_state(nnx.state(unit, nnx.Param)):
        if path[-1] == "kernel":
            np.testing.assert_allclose(np.std(leaf[...]), 1, rtol=1e-5)
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (unit, plain)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)

    images, labels = TRAIN[0][:200], TRAIN[1][:200]
    want = _gradients(plain, _plain_loss, images, labels)
    got = _gradients(unit, jus.cross_entropy, images, labels)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        name = jax.tree_util.keystr(path)
        # A bias ahead of a batch norm, or of attention's keys, has no effect.
        if np.sqrt(np.mean(b**2)) > 1e-6:
            cosine = a @ b / np.sqrt((a @ a) * (b @ b))
            np.testing.assert_array_less(0.9999, cosine, err_msg=name)

    rounded = jus.nnx.convert(plain, formats=jus.SIMULATED_FP8)
    assert np.std(_logits(*nnx.split(rounded)) - logits) > 1e-3 * np.std(logits)
    tuned = _train(rounded, jus.cross_entropy, 2e-2, 60)
    # 397 images: two standard errors of an accuracy of 0.96
    assert _accuracy(_logits(*nnx.split(tuned))) > before - 0.02
