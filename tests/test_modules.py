"""Modules whose rule is their own: normalised weights, masks, tied and batched weights.

What all modules share is in `test_drop_in.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx

import jax_unit_scaling as jus


def _rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


def _vjp(module, *inputs):
    """Output, and gradients by path and of the inputs, for unit-normal cotangents."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def call(params, *inputs):
        return nnx.merge(graph, params, rest, copy=True)(*inputs)

    y, vjp = jax.vjp(jax.jit(call), params, *inputs)
    grads, *dinputs = vjp(normal(99, *y.shape))
    found = jax.tree_util.tree_leaves_with_path(grads)
    return y, {jax.tree_util.keystr(path): g for path, g in found}, dinputs


def _kernel(by_path, name="kernel"):
    (found,) = (g for path, g in by_path.items() if f"['{name}']" in path)
    return found


def test_weight_norm_keeps_unit_scale_whatever_the_weights():
    layer = jus.nnx.Linear(
        128,
        256,
        use_bias=False,
        constraint=None,
        kernel_init=nnx.initializers.normal(3.0),
        rngs=nnx.Rngs(0),
    )
    norm = jus.nnx.WeightNorm(layer, rngs=nnx.Rngs(0))
    before = np.array(layer.kernel[...])
    y, grads, (dx,) = _vjp(norm, normal(0, 512, 128))
    scales = _kernel(grads, "scales")
    assert scales.shape == (256,)
    np.testing.assert_allclose([_rms(y), _rms(dx)], 1, atol=0.05)
    np.testing.assert_allclose(_rms(_kernel(grads)), 1 / 3, rtol=0.05)
    # 256 numbers: four standard errors of (2 n)^-1/2
    np.testing.assert_allclose(_rms(scales), 1, atol=0.18)
    np.testing.assert_array_equal(norm.layer_instance.kernel[...], before)
    assert all(p.get_metadata()["role"] == "norm" for p in norm.scales.values())
    # Flax's norm is one: the same direction, divided by fan_in^1/2.
    plain = nnx.Linear(128, 256, use_bias=False, rngs=nnx.Rngs(0))
    plain.kernel[...] = before
    want = nnx.WeightNorm(plain, rngs=nnx.Rngs(0))(normal(0, 512, 128))
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-4)


def test_spectral_norm_fixes_the_largest_singular_value_at_that_of_a_random_matrix():
    layer = jus.nnx.Conv(8, 64, 4, constraint=None, use_bias=False, rngs=nnx.Rngs(0))
    norm = jus.nnx.SpectralNorm(layer, n_steps=30, rngs=nnx.Rngs(0))
    x = normal(0, 64, 40, 8)
    before = norm.batch_stats[("kernel", "u")][...]
    norm(x, update_stats=False)
    np.testing.assert_array_equal(norm.batch_stats[("kernel", "u")][...], before)
    norm(x)
    assert np.any(norm.batch_stats[("kernel", "u")][...] != before)
    sigma = norm.batch_stats[("kernel", "sigma")][...]
    top = np.linalg.norm(np.reshape(layer.kernel[...], (32, 64)), 2)
    np.testing.assert_allclose(sigma, top, rtol=0.01)
    y, grads, (dx,) = _vjp(norm, x)
    # The limit exceeds the largest singular value of a 32 x 64 matrix by about 4%.
    np.testing.assert_allclose([_rms(y), _rms(dx), _rms(_kernel(grads))], 1, atol=0.12)
    kernel, _, _ = jus.spectral_norm(
        7 * layer.kernel[...], normal(1, 1, 64), n_steps=30
    )
    top = np.linalg.norm(np.reshape(kernel, (32, 64)), 2)
    np.testing.assert_allclose(top, 32**0.5 + 8, rtol=0.01)


def test_linear_general_with_batch_axes_has_a_kernel_for_each_place():
    options = {"axis": (2,), "batch_axis": {0: 4}, "rngs": nnx.Rngs(0)}
    unit = jus.nnx.LinearGeneral(64, (8, 16), constraint=None, **options)
    assert unit.kernel.get_metadata()["fan_in"] == 64
    plain = nnx.LinearGeneral(64, (8, 16), **options)
    unit.bias[...] += normal(1, 4, 8, 16)
    nnx.update(plain, nnx.state(unit))
    plain.kernel[...] /= 8
    x = normal(0, 4, 96, 64)
    np.testing.assert_allclose(unit(x), plain(x), rtol=1e-3, atol=1e-4)
    unit.bias[...] *= 0
    y, grads, (dx,) = _vjp(unit, x)
    sizes = [_rms(y), _rms(dx), _rms(_kernel(grads))]
    np.testing.assert_allclose(sizes, 1, atol=0.05)
    np.testing.assert_allclose(_rms(_kernel(grads, "bias")), 1, atol=0.13)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_a_mask_and_split_devices_change_the_statistics_alone(name):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    unit = getattr(jus.nnx, name)(64, **options, rngs=nnx.Rngs(0))
    plain = getattr(nnx, name)(64, **options, rngs=nnx.Rngs(0))
    x, mask = normal(0, 16, 8, 64), np.arange(64) % 32 < 24
    mask = np.broadcast_to(mask, x.shape)
    if name == "InstanceNorm":
        mask = np.broadcast_to((np.arange(8) < 6)[:, None], x.shape)
    got = unit(x, mask=jnp.asarray(mask))
    np.testing.assert_allclose(
        got, plain(x, mask=jnp.asarray(mask)), rtol=1e-4, atol=1e-4
    )
    assert np.max(np.abs(got - unit(x))) > 0.01
    split = getattr(jus.nnx, name)(
        64, **options, axis_name="a", batch_axis_name="a", rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(split)
    pieces = jnp.stack([2 * x, x])

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params)(x) * normal(1, *x.shape))

    grads, dx = jax.vmap(jax.grad(loss, (0, 1)), in_axes=(None, 0), axis_name="a")(
        params, pieces
    )
    assert _rms(dx[0]) < 0.9 * 2 * _rms(dx[1])
    y = jax.vmap(split, axis_name="a")(pieces)
    np.testing.assert_allclose(_rms(y[0]) / _rms(y[1]), 2, rtol=0.02)
    total = jax.tree.leaves(jax.tree.map(lambda g: g.sum(0), grads))
    for grad in total:  # 64 numbers: four standard errors of (2 n)^-1/2
        np.testing.assert_allclose(_rms(grad), 1, atol=0.4)


def test_group_norm_takes_any_reduction_axes_that_hold_the_last():
    x = normal(0, 3, 4, 5, 8)
    norm = jus.nnx.GroupNorm(8, 2, reduction_axes=(2, -1), rngs=nnx.Rngs(0))
    plain = nnx.GroupNorm(8, 2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(x), jax.vmap(plain)(x), rtol=1e-4, atol=1e-5)
    wrong = jus.nnx.GroupNorm(8, 2, reduction_axes=(1, 2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`axis` must hold the channels' axis"):
        wrong(x)
    wrong = jus.nnx.InstanceNorm(3, feature_axes=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`feature_axes` must leave out"):
        wrong(x)


class _Tied(nnx.Module):
    """A language model whose logits use the table of its embedding."""

    def __init__(self, vocabulary=64, width=32, tied=8 * 16, output_scale=1.0):
        rngs = nnx.Rngs(0)
        self.embed = jus.nnx.Embed(
            vocabulary, width, tied=tied, output_scale=output_scale, rngs=rngs
        )
        self.block = jus.nnx.TransformerBlock(
            width, 2, 2 * width, index=0, depth=1, rngs=rngs
        )
        self.norm = jus.nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, ids):
        # Its calls differ in shape, as those of an encoder and a decoder do.
        y = self.block(self.embed(ids))[:, ::2]
        return self.embed.attend(self.norm(y))


IDS = jax.random.randint(jax.random.key(5), (8, 17), 0, 64)


def _gradients(model):
    graph, params = nnx.split(model)

    def loss(params):
        logits = nnx.merge(graph, params)(IDS[:, :-1])
        return jus.cross_entropy(logits, IDS[:, 1::2])

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize(
    "output_scale", [pytest.param(1.0, marks=pytest.mark.slow), 0.25]
)
def test_the_gradient_of_a_tied_table_is_the_true_one(truly, output_scale):
    model = nnx.jit(lambda: _Tied(output_scale=output_scale))()
    got = _gradients(model)
    true = truly(_gradients, model)

    def cosine(a, b):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        return a @ b / np.sqrt((a @ a) * (b @ b))

    cosines = jax.tree.leaves(jax.tree.map(cosine, got, true))
    assert len(cosines) > 5
    np.testing.assert_array_less(0.9999, cosines)


def test_both_gradients_of_a_tied_table_have_the_same_scale_and_their_sum_is_one():
    vocabulary, width, positions = 256, 64, 4096
    embed = jus.nnx.Embed(vocabulary, width, tied=positions, rngs=nnx.Rngs(0))
    graph, params = nnx.split(embed)
    ids = jax.random.randint(jax.random.key(0), (positions,), 0, vocabulary)
    query = normal(1, positions, width)

    @jax.jit
    def scales(params, query):
        def look_up(p):
            return nnx.merge(graph, p)(ids)

        def attend(p, q):
            return nnx.merge(graph, p).attend(q)

        logits, vjp = jax.vjp(attend, params, query)
        of_attend, dquery = vjp(normal(2, *logits.shape))
        # Cotangents that are independent of the query, of the scale of its own.
        _, vjp = jax.vjp(look_up, params)
        (of_look_up,) = vjp(dquery[::-1])
        total = jax.tree.map(jnp.add, of_look_up, of_attend)
        leaves = (logits, dquery, *map(jax.tree.leaves, (of_look_up, of_attend, total)))
        return jax.tree.map(lambda x: jnp.sqrt(jnp.mean(x**2)), leaves)

    logits, dquery, (look_up,), (attend,), (total,) = scales(params, query)
    np.testing.assert_allclose(logits, width**-0.5, rtol=0.05)
    np.testing.assert_allclose(dquery, vocabulary**0.5 / width, rtol=0.05)
    np.testing.assert_allclose([look_up, attend], 2**-0.5, rtol=0.1)
    np.testing.assert_allclose(total, 1, atol=0.1)


def test_both_directions_have_unit_scale():
    cells = [jus.nnx.GRUCell(32, 64, rngs=nnx.Rngs(i)) for i in range(2)]
    rnns = [jus.nnx.RNN(cell, rngs=nnx.Rngs(0)) for cell in cells]
    both = jus.nnx.Bidirectional(*rnns, rngs=nnx.Rngs(0))
    x = normal(0, 16, 24, 32)
    got = nnx.jit(lambda m, x: m(x))(both, x)
    forward = nnx.jit(lambda m, x: m(x))(rnns[0], x)
    np.testing.assert_allclose(got[..., :64], forward, rtol=1e-4, atol=1e-5)
    backward = nnx.jit(lambda m, x: m(x))(rnns[1], x[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(got[..., 64:], backward, rtol=1e-4, atol=1e-5)
    # A GRU's memory is a few steps long, and starts at zero.
    np.testing.assert_allclose(_rms(got[:, 8:-8]), 1, atol=0.2)


def test_prelu_has_the_factors_of_its_initial_slope():
    layer = jus.nnx.PReLU(0.25)
    assert layer.negative_slope.get_metadata()["role"] == "norm"
    x = normal(0, 2**14)
    want = jus.leaky_relu(x, negative_slope=0.25)
    np.testing.assert_allclose(layer(x), want, rtol=1e-6)
    layer.negative_slope[...] = 0.5
    np.testing.assert_allclose(layer(x), jnp.where(x < 0, 2 * want, want), rtol=1e-5)
