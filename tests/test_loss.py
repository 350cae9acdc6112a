"""Losses: optax's values, and gradients of the sum at unit scale when training starts.

`cross_entropy` and `mse_loss` at their defaults are compared with the PyTorch library
in test_parity.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_unit_scaling as jus

SHAPE = (64, 32, 50)
LOGITS, OTHER = jax.random.normal(jax.random.key(0), (2, *SHAPE))
IDS = jax.random.randint(jax.random.key(1), SHAPE[:-1], 0, SHAPE[-1])
ONEHOT = jax.nn.one_hot(IDS, SHAPE[-1])
BITS = jax.random.bernoulli(jax.random.key(2), 0.5, SHAPE)
FLAT = jnp.zeros(SHAPE)  # logits as they start


def _smoothed(logits, ids, *, label_smoothing=0.0, z_loss=0.0):
    labels = optax.smooth_labels(jax.nn.one_hot(ids, SHAPE[-1]), label_smoothing)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return optax.softmax_cross_entropy(logits, labels) + z_loss * log_z**2


# The loss and its options, optax's, an input at the start of training, and targets.
LOSSES = {
    "cross_entropy": (jus.cross_entropy, {}, _smoothed, FLAT, IDS),
    "smoothed": (
        jus.cross_entropy,
        {"label_smoothing": 0.2, "z_loss": 0.1},
        _smoothed,
        FLAT,
        IDS,
    ),
    "z_loss": (jus.cross_entropy, {"z_loss": 3.0}, _smoothed, FLAT, IDS),
    "kl_divergence": (
        jus.kl_divergence,
        {},
        lambda x, q: optax.losses.kl_divergence(jax.nn.log_softmax(x), q),
        FLAT,
        ONEHOT,
    ),
    "binary": (
        jus.binary_cross_entropy,
        {},
        optax.sigmoid_binary_cross_entropy,
        FLAT,
        BITS,
    ),
    "mse": (jus.mse_loss, {}, optax.squared_error, LOGITS, OTHER),
    **{
        f"huber {delta}": (
            jus.huber_loss,
            {"delta": delta},
            optax.huber_loss,
            LOGITS,
            OTHER,
        )
        for delta in (0.1, 1.0, 10.0)
    },
}
CASES = pytest.mark.parametrize("loss, options, plain, start, y", LOSSES.values())


def _rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


@CASES
def test_the_gradient_has_unit_scale_at_the_start(loss, options, plain, start, y):
    grad = jax.grad(loss)(start, y, **options)
    # 102,400 numbers, and 2,048 labels: four standard errors of either.
    np.testing.assert_allclose(_rms(grad), 1, atol=0.01)


@CASES
@pytest.mark.parametrize("masked", [False, True])
def test_the_value_is_the_usual_and_the_gradient_that_of_the_sum_times_a_constant(
    loss, options, plain, start, y, masked
):
    losses = plain(LOGITS, y, **options)
    where = None if not masked else OTHER.reshape(-1)[: losses.size] > 0
    where = where if where is None else where.reshape(losses.shape)

    @jax.jit
    def run(logits, start):
        both = [
            jax.value_and_grad(loss)(
                logits, y, **options, where=where, reduction=reduction
            )
            for reduction in ("mean", "sum")
        ]
        want = [reduced(losses, where=where) for reduced in (jnp.mean, jnp.sum)]
        true = jax.grad(lambda x: plain(x, y, **options).sum(where=where))(logits)
        start_grad = jax.grad(loss)(start, y, **options)
        start_true = jax.grad(lambda x: plain(x, y, **options).sum())(start)
        return both, want, true, start_grad, start_true

    both, wanted, true, start_grad, start_true = run(LOGITS, start)
    for (value, grad), want in zip(both, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5)
        constant = _rms(grad) / _rms(true)
        np.testing.assert_allclose(grad, constant * true, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            constant, _rms(start_grad) / _rms(start_true), rtol=1e-4
        )


@pytest.mark.parametrize("loss", [jus.kl_divergence, jus.binary_cross_entropy])
def test_mult_sharpens_logits_and_is_not_in_their_gradient(loss):
    q = jax.nn.softmax(OTHER)
    value, grad = jax.value_and_grad(loss)(LOGITS, q, mult=3.0)
    want, plain = jax.value_and_grad(loss)(3.0 * LOGITS, q)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, plain, rtol=1e-5, atol=1e-6)


def test_distillation_mixes_labels_and_a_teacher_with_one_constant():
    q = jax.nn.softmax(OTHER)

    def mixed(x):
        return jus.cross_entropy(x, IDS) + jus.kl_divergence(x, q)

    target = ONEHOT + q
    want = 50 / 7 * (2 * jax.nn.softmax(LOGITS) - target)  # 49^1/2 = 7
    np.testing.assert_allclose(jax.grad(mixed)(LOGITS), want, rtol=1e-4, atol=1e-5)
    assert not np.any(jax.grad(jus.kl_divergence, argnums=1)(LOGITS, q))


def test_a_loss_of_float16_is_computed_in_float32():
    value, grad = jax.value_and_grad(jus.huber_loss)(
        LOGITS.astype(jnp.float16), OTHER.astype(jnp.float16)
    )
    assert (value.dtype, grad.dtype) == (jnp.float32, jnp.float16)
    exact = optax.huber_loss(LOGITS, OTHER).mean()
    np.testing.assert_allclose(value, exact, rtol=1e-4)


@CASES
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_split_batch_it_is_the_loss_of_the_whole(
    loss, options, plain, start, y, masked
):
    """Also where a mask leaves each piece another number of examples."""
    whole = {"logits": LOGITS, "y": y}
    if masked:
        shape = jax.eval_shape(plain, LOGITS, y).shape
        share = jnp.linspace(0.1, 1, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
        whole["where"] = jax.random.bernoulli(jax.random.key(3), share, shape)

    def grad(reduction, logits, y, where=None, **names):
        return jax.value_and_grad(loss)(
            logits, y, **options, where=where, reduction=reduction, **names
        )

    def both(whole):
        pieces = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), whole)
        for reduction in ("mean", "sum"):
            each = jax.vmap(
                lambda piece, r=reduction: grad(r, **piece, batch_axis_name="b"),
                axis_name="b",
            )
            yield grad(reduction, **whole), each(pieces)

    run = jax.jit(lambda whole: list(both(whole)))
    for (value, want), (values, grads) in run(whole):
        np.testing.assert_allclose(values, np.full(4, value), rtol=1e-5)
        np.testing.assert_allclose(
            grads.reshape(want.shape), want, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_cross_entropys_gradient_is_one_pass_over_the_logits(options):
    # A gather's gradient would be a scatter into zeros, written and read once more.
    logits, labels = jax.random.normal(jax.random.key(0), (8, 32)), jnp.arange(8)
    grad = jax.grad(lambda x: jus.cross_entropy(x, labels, **options))
    program = str(jax.make_jaxpr(grad)(logits))
    assert "scatter" not in program and "gather" not in program


def test_a_label_that_is_no_class_makes_the_loss_nan_unless_excluded():
    logits = jax.random.normal(jax.random.key(0), (4, 5))
    labels, last = jnp.array([0, 7, 2, -1]), jnp.array([0, 1, 2, 4])
    assert jnp.isnan(jus.cross_entropy(logits, labels))
    assert jnp.isnan(jus.cross_entropy(logits, labels - 6))
    where = jnp.array([True, False, True, True])
    got = jax.value_and_grad(jus.cross_entropy)(logits, labels, where=where)
    want = jax.value_and_grad(jus.cross_entropy)(logits, last, where=where)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
