"""Mixtures of experts: scale, dispatch, true gradients, losses and training; Einsum."""

import argparse
import functools as ft
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal
from flax import nnx

import jax_unit_scaling as jus
from jax_unit_scaling.ops import moe as moe_ops


def _rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


class _Branch(nnx.Module):
    """A residual branch: a norm and a mixture of experts."""

    def __init__(self, *sizes, tau=0.5, rngs=None, **options):
        rngs = rngs or nnx.Rngs(0)
        self.norm = jus.nnx.RMSNorm(sizes[0], use_scale=False, rngs=rngs)
        self.moe = jus.nnx.MoE(*sizes, rngs=rngs, **options)
        self.tau = tau

    def __call__(self, x):
        residual, skip = jus.residual_split(x, tau=self.tau)
        y, losses = self.moe(self.norm(residual))
        return jus.residual_add(y, skip, tau=self.tau), losses


def _vjp(module, x, output=lambda y: y[0]):
    """An output and its gradients, of parameters and x, for a unit-normal cotangent."""
    graph, params = nnx.split(module)
    call = jax.jit(lambda params, x: output(nnx.merge(graph, params)(x)))
    y, vjp = jax.vjp(call, params, x)
    return y, vjp(normal(99, *y.shape).astype(y.dtype))


def _named(grads):
    return [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    ]


@pytest.mark.parametrize("k, mult", [(1, 1.0), (3, 0.5)])
def test_everything_starts_near_unit_scale(k, mult):
    x = normal(1, 2048, 128)
    layer = jus.nnx.MoE(128, 256, 8, k, mult=mult, rngs=nnx.Rngs(0))
    y, (params, dx) = _vjp(layer, x)
    # The sum over up, gate and router is the true gradient; in an MLP it is 1.5.
    np.testing.assert_allclose(_rms(y), 1, atol=0.05)
    assert 1.2 < _rms(dx) < 2
    for name, grad in _named(params):
        # What a hidden size of twice the input's leaves to up and gate is 2^-1/2.
        want = 2**-0.5 if "up" in name or "gate" in name else 1
        np.testing.assert_allclose(_rms(grad), want, atol=0.1, err_msg=name)


def test_a_residual_branch_has_unit_scale_at_its_ends():
    y, (_, dx) = _vjp(_Branch(128, 256, 8), normal(1, 8, 64, 128))
    np.testing.assert_allclose([_rms(y), _rms(dx)], 1, atol=0.15)


@pytest.mark.parametrize("k, gated", [(1, False), (3, True)])
def test_dispatch_equals_a_dense_loop_over_the_experts(k, gated):
    activation = jus.silu_glu if gated else jus.gelu
    layer = jus.nnx.MoE(
        16, 32, 4, k, gated=gated, activation=activation, rngs=nnx.Rngs(3)
    )
    x = normal(0, 3, 20, 16)
    got = jax.jit(lambda x: layer(x)[0])(x)
    x = np.asarray(x)
    p = np.exp(x @ np.asarray(layer.router.kernel) / 4)
    p /= p.sum(-1, keepdims=True)
    w = np.where(p >= np.sort(p)[..., -k, None], p, 0)
    w = w if k == 1 else w / w.sum(-1, keepdims=True)
    want = 0
    for i in range(4):
        up, gate = (
            x @ np.asarray(m.kernel)[i] / 4 if m is not None else None
            for m in (layer.up, layer.gate)
        )
        hidden = activation(up, gate) if gated else activation(up)
        y = np.asarray(hidden) @ np.asarray(layer.down.kernel)[i] / 32**0.5
        want += w[..., i, None] * y
    want = want / moe_ops._router_scales(4, k, 1.0).weights
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def _three_gradients(branch, x):
    """Of the output and of each loss, by parameter and x."""
    graph, params = nnx.split(branch)
    call = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    (y, losses), vjp = jax.vjp(call, params, x)
    g, zero, no_loss = normal(99, *y.shape), jnp.zeros_like(y), (0.0, 0.0)
    return {
        what: vjp((g, type(losses)(*map(jnp.asarray, of_losses))))
        for what, g, of_losses in (
            ("output", g, no_loss),
            ("load_balance", zero, (1.0, 0.0)),
            ("z_loss", zero, (0.0, 1.0)),
        )
    }


def test_gradients_are_true_up_to_a_positive_constant(truly):
    # Sizes that differ, so that a path's missing factor shows.
    branch, x = _Branch(24, 80, 6, 2, tau=0.7), normal(1, 96, 24)
    got = _three_gradients(branch, x)
    true = truly(_three_gradients, branch, x)
    for what in got:
        pairs = zip(_named(got[what]), _named(true[what]), strict=True)
        for (name, a), (_, b) in pairs:
            a, b = (np.asarray(g, np.float64).ravel() for g in (a, b))
            if what != "output" and "router" not in name and "[1]" not in name:
                assert not a.any() and not b.any(), name
            else:
                cosine = a @ b / np.sqrt((a @ a) * (b @ b))
                assert cosine > 0.9999, (what, name)


def test_the_losses_have_the_values_of_their_formulas_and_unit_gradients():
    logits = normal(0, 4096, 8)
    # A skewed load, whose shares deviate from 1/8 by 100%, apart from the logits.
    deviation = np.array([1, -1, 1, -1, 1, -1, 1, -1]) * 0.999
    chosen = np.repeat(np.arange(8), np.round((1 + deviation) * 512).astype(int))
    chosen = np.random.default_rng(0).permutation(chosen)[:, None]
    scales = moe_ops._router_scales(8, 1, 0.5)

    def losses(logits):
        return moe_ops._losses(logits, jnp.asarray(chosen), 0.5, scales, None)

    p = np.exp(0.5 * np.asarray(logits, np.float64))
    z = np.log(p.sum(-1))
    share = np.bincount(chosen[:, 0], minlength=8) / len(chosen)
    want = [8 * share @ (p / np.exp(z)[:, None]).mean(0), np.mean(z**2)]
    np.testing.assert_allclose(jax.jit(losses)(logits), want, rtol=1e-5)
    for name in ("load_balance", "z_loss"):
        one = jax.grad(lambda x, name=name: getattr(losses(x), name))
        grad = jax.jit(one)(logits)
        np.testing.assert_allclose(_rms(grad), 1, atol=0.05, err_msg=name)


def test_a_balanced_load_has_the_loss_one_and_the_loss_is_of_the_named_axes():
    layer = _losses_of(lambda x: 40 * x)
    one_each = jnp.tile(jnp.eye(4), (8, 1))
    np.testing.assert_allclose(layer(one_each).load_balance, 1, rtol=1e-5)
    np.testing.assert_allclose(layer(one_each[::4]).load_balance, 4, rtol=1e-5)
    x = normal(0, 4, 6, 4)
    whole = _losses_of(lambda x: x)(x.reshape(-1, 4))
    split = _losses_of(lambda x: x, batch_axis_name="b")
    for a, b in zip(jax.vmap(split, axis_name="b")(x), whole, strict=True):
        np.testing.assert_allclose(np.mean(a), b, rtol=1e-5)


def _losses_of(router, **options):
    """The losses of a mixture of one choice, for a router; its experts do nothing."""
    mix = ft.partial(
        jus.mixture_of_experts,
        router,
        lambda rows, sizes: rows,
        num_experts=4,
        num_selected=1,
        **options,
    )
    return jax.jit(lambda x: mix(x)[1])


def test_narrow_dtypes_and_simulated_fp8_stay_close():
    def run(dtype=jnp.float32, **more):
        layer = jus.nnx.MoE(64, 128, 4, dtype=dtype, rngs=nnx.Rngs(0), **more)
        # Rounded for all, as a rounded input changes which expert is chosen.
        x = normal(0, 256, 64).astype(jnp.bfloat16).astype(dtype)
        y, (_, dx) = _vjp(layer, x)
        assert y.dtype == dx.dtype == dtype
        return [np.asarray(a, np.float64) for a in (y, dx)]

    exact = run()
    for other, error in (
        (run(jnp.float16), 0.01),
        (run(jnp.bfloat16), 0.03),
        (run(formats=jus.SIMULATED_FP8), 0.2),
    ):
        for a, b in zip(exact, other, strict=True):
            assert 0 < _rms(a - b) < error


def test_float16_products_with_a_positional_element_type_do_not_overflow():
    # Each weight's gradient is a sum of 2^17 ones: beyond float16, 362 once scaled.
    x, kernel = jnp.ones((2**17, 8), jnp.float16), jnp.ones((1, 8, 8), jnp.float16)
    sizes = jnp.array([2**17])
    numbers = (((1,), (0,)), ((), ()))
    for product in (
        lambda k: jus.ragged_dot(x, k, sizes),
        lambda k: jus.dot_general(x, k[0], numbers),
    ):
        y, vjp = jax.vjp(product, kernel)
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(vjp(jnp.ones_like(y))[0], 2**8.5, rtol=1e-3)


def test_ragged_dot_maps_over_leading_axes_and_folds_the_named_axis():
    x, kernel = normal(0, 2, 12, 8), normal(1, 4, 8, 6)
    sizes = jnp.array([[3, 0, 5, 4], [6, 6, 0, 0]])
    mapped = jax.vmap(ft.partial(jus.ragged_dot, batch_axis_name="b"), axis_name="b")

    def grad(f, *args):
        return jax.jit(jax.grad(lambda k: jnp.sum(f(args[0], k, *args[1:]) ** 2)))

    kernels = jnp.stack([kernel, kernel])
    got = grad(mapped, x, sizes)(kernels)
    for i in range(2):
        want = grad(jus.ragged_dot, x[i], sizes[i])(kernel) * 2**-0.5
        np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-5)


EINSUMS = {
    "...i,ij->...j": ((128, 96), (96,), (64, 128), 128),
    "btd,hdf->btfh": ((4, 64, 32), (4, 32), (8, 16, 64), 64),
    "bthd,hde->bte": ((4, 32, 64), (64,), (8, 16, 4, 32), 128),
}


@pytest.mark.parametrize("subscripts", EINSUMS)
def test_einsum_is_its_namesake_at_unit_scale(subscripts):
    kernel_shape, bias_shape, x_shape, fan_in = EINSUMS[subscripts]
    sizes = subscripts, kernel_shape, bias_shape
    namesake = inspect.signature(nnx.Einsum.__init__).parameters
    defaults = {
        name: p.default
        for name, p in namesake.items()
        if p.kind is p.KEYWORD_ONLY and name != "rngs" and not name.endswith("_init")
    }
    plain = nnx.Einsum(*sizes, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    unit = jus.nnx.Einsum(*sizes, rngs=nnx.Rngs(1), **defaults)
    assert unit.kernel.get_metadata()["fan_in"] == fan_in
    x = normal(2, *x_shape)
    y, (params, dx) = _vjp(unit, x, lambda y: y)
    np.testing.assert_allclose(_rms(y), 1, atol=0.05)
    for name, grad in _named(params):
        np.testing.assert_allclose(_rms(grad), 1, atol=0.3, err_msg=name)
    nnx.update(unit, nnx.state(plain))
    unit.output_scale = fan_in**0.5
    np.testing.assert_allclose(unit(x), plain(x), rtol=1e-4, atol=1e-5)


TEXT = np.frombuffer(inspect.getsource(argparse).encode("ascii", "ignore"), np.uint8)


class _LanguageModel(nnx.Module):
    """Bytes in, logits out: attention and a mixture of experts, with its losses."""

    def __init__(self, formats, seed=0, width=64, depth=1):
        rngs = nnx.Rngs(jax.random.key(seed))
        common = {"formats": formats, "use_bias": False}
        rule = jus.transformer_residual_rule()
        self.embed = jus.nnx.Embed(128, width, rngs=rngs)
        self.attention = nnx.List(
            jus.nnx.MultiHeadAttention(2, width, rngs=rngs, **common)
            for _ in range(depth)
        )
        self.branches = nnx.List(
            _Branch(
                width,
                width,
                4,
                tau=rule(2 * i + 1, 2 * depth),
                formats=formats,
                rngs=rngs,
            )
            for i in range(depth)
        )
        self.norm = jus.nnx.RMSNorm(width, use_scale=False, rngs=rngs)
        self.readout = jus.nnx.LinearReadout(width, 128, rngs=rngs, **common)
        self.taus = tuple(rule(2 * i, 2 * depth) for i in range(depth))

    def __call__(self, ids):
        x, total = self.embed(ids), 0.0
        for attend, branch, tau in zip(
            self.attention, self.branches, self.taus, strict=True
        ):
            x = jus.residual_apply(
                lambda x, attend=attend: attend(self.norm(x), is_causal=True),
                x,
                tau=tau,
            )
            x, losses = branch(x)
            total += 0.01 * losses.load_balance + 1e-3 * losses.z_loss
        return self.readout(self.norm(x)), total


def _train(formats, seeds, steps=50):
    """The loss of each step: [seeds, steps]."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: _LanguageModel(formats)))
    schedule = optax.warmup_cosine_decay_schedule(0, 0.3, 10, steps)
    optimiser = optax.chain(
        optax.scale_by_adam(0.9, 0.98),
        jus.optim.scale_by_umup(),
        optax.scale_by_learning_rate(schedule),
    )

    def step(carry, ids):
        params, state = carry

        def loss(params):
            logits, more = nnx.merge(graph, params)(ids[:, :-1])
            value = jus.cross_entropy(logits, ids[:, 1:])
            return value + more, value

        grads, value = jax.grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    def run(seed):
        """A seed chooses parameters and batches."""
        starts = jax.random.randint(
            jax.random.key(seed + 1), (steps, 16, 1), 0, len(TEXT) - 33, jnp.int32
        )
        batches = jnp.asarray(TEXT.astype(np.int32))[starts + jnp.arange(33)]
        params = nnx.state(_LanguageModel(formats, seed))
        return jax.lax.scan(step, (params, optimiser.init(params)), batches)[1]

    return np.asarray(jax.jit(jax.vmap(run))(jnp.arange(seeds)))


@pytest.mark.slow
def test_a_mixture_of_experts_language_model_trains_in_simulated_fp8(close_to_float32):
    exact, fp8 = _train(None, 3), _train(jus.SIMULATED_FP8, 3)
    np.testing.assert_allclose(exact[:, 0], np.log(128), rtol=0.05)
    assert exact[:, -10:].mean(1).max() < 3.0
    assert np.any(fp8 != exact, axis=1).all()
    close_to_float32("MoE, nats a byte", *(x[:, -10:].mean(1) for x in (fp8, exact)))


def test_no_tokens_give_no_rows_and_losses_of_zero():
    layer = jus.nnx.MoE(8, 16, 4, rngs=nnx.Rngs(0))
    y, losses = layer(jnp.zeros((3, 0, 8)))
    assert y.shape == (3, 0, 8)
    np.testing.assert_array_equal(losses, 0)


BAD = {
    "one expert": (lambda: jus.nnx.MoE(4, 4, 1, rngs=nnx.Rngs(0)), "`num_experts`"),
    "selected": (lambda: jus.nnx.MoE(4, 4, 2, 3, rngs=nnx.Rngs(0)), "`num_selected`"),
    "router": (lambda: _losses_of(lambda x: x[:, :3]), "`router` must return"),
}


@pytest.mark.parametrize("make, match", BAD.values(), ids=BAD)
def test_bad_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()(jnp.ones((2, 4)))
