"""Modules: unit scale, true gradients, and drop-in for their Flax namesakes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx

import jax_unit_scaling as jus


def _rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


def _vjp(module, x):
    """Output and gradients for a unit-normal cotangent: of x, and of parameters."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def call(params, x):
        return nnx.merge(graph, params, rest, copy=True)(x)

    y, vjp = jax.vjp(jax.jit(call), params, x)
    grads, dx = vjp(normal(99, *y.shape))
    return y, dx, grads


LAYERS = {
    "Linear": lambda **k: jus.nnx.Linear(128, 256, **k),
    "LinearGeneral": lambda **k: jus.nnx.LinearGeneral(128, (8, 16), **k),
    "BatchNorm": lambda **k: jus.nnx.BatchNorm(128, **k),
    "Conv": lambda **k: jus.nnx.Conv(128, 64, 2, **k),
    "ConvTranspose": lambda **k: jus.nnx.ConvTranspose(128, 64, 2, **k),
    "GroupNorm": lambda **k: jus.nnx.GroupNorm(128, **k | {"num_groups": 2}),
    "LayerNorm": lambda **k: jus.nnx.LayerNorm(128, **k),
    "RMSNorm": lambda **k: jus.nnx.RMSNorm(128, **k),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_unit_scale_forward_and_backward(name):
    kwargs = {} if name.endswith("Norm") else {"constraint": None}
    module = LAYERS[name](rngs=nnx.Rngs(0), **kwargs)
    y, dx, grads = _vjp(module, normal(1, 512, 128))
    np.testing.assert_allclose(_rms(y), 1, atol=0.05)
    np.testing.assert_allclose(_rms(dx), 1, atol=0.05)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        # 128 or 256 numbers: four standard errors of (2 n)^-1/2
        np.testing.assert_allclose(_rms(grad), 1, atol=0.25, err_msg=str(path))


NAMESAKES = LAYERS | {
    "MultiHeadAttention": lambda **k: jus.nnx.MultiHeadAttention(4, 128, **k)
}


@pytest.mark.parametrize("name", NAMESAKES)
def test_layers_take_every_argument_of_their_namesake(name):
    namesake = inspect.signature(getattr(nnx, name).__init__).parameters
    defaults = {
        k: p.default
        for k, p in namesake.items()
        if p.default is not inspect.Parameter.empty and not k.endswith("_init")
    }
    module = NAMESAKES[name](rngs=nnx.Rngs(0), **defaults)
    assert module(normal(0, 4, 128)).shape[0] == 4
    for path, value in nnx.iter_graph(module):
        if isinstance(value, nnx.Param) and path:
            assert value.get_metadata()["role"] in ("weight", "norm", "bias")


def test_linear_loads_a_flax_checkpoint_and_computes_the_same_up_to_its_factor():
    plain = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    unit = jus.nnx.Linear(64, 32, rngs=nnx.Rngs(1))
    nnx.update(unit, nnx.state(plain))
    x = normal(0, 8, 64)
    np.testing.assert_allclose(unit(x), plain(x) / 8, rtol=1e-4, atol=1e-5)


def test_readout_embedding_and_dropout():
    readout = jus.nnx.LinearReadout(256, 64, use_bias=False, rngs=nnx.Rngs(0))
    y, dx, _ = _vjp(readout, normal(0, 512, 256))
    np.testing.assert_allclose(_rms(y), 256**-0.5, rtol=0.05)
    np.testing.assert_allclose(_rms(dx), 1, atol=0.05)

    embed = jus.nnx.Embed(100, 64, rngs=nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(0), (4000,), 0, 100)
    graph, params = nnx.split(embed)
    y, vjp = jax.vjp(lambda p: nnx.merge(graph, p)(ids), params)
    (grad,) = jax.tree.leaves(vjp(normal(1, *y.shape)))
    np.testing.assert_allclose([_rms(y), _rms(grad)], 1, atol=0.05)
    with pytest.raises(ValueError, match="`attend` sums"):
        embed.attend(y)

    dropout = jus.nnx.Dropout(0.3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(_rms(dropout(normal(0, 2**14))), 1, atol=0.05)
    x = normal(0, 8)
    np.testing.assert_array_equal(dropout(x, deterministic=True), x)


class _Transformer(nnx.Module):
    """A language model: embedding, blocks, norm and readout."""

    def __init__(self, *, depth=3, width=64, **linear):
        rngs = nnx.Rngs(0)
        self.embed = jus.nnx.Embed(32, width, rngs=rngs)
        self.blocks = nnx.List(
            jus.nnx.TransformerBlock(
                width, 4, 2 * width, index=i, depth=depth, rngs=rngs, **linear
            )
            for i in range(depth)
        )
        self.norm = jus.nnx.LayerNorm(width, rngs=rngs)
        self.readout = jus.nnx.LinearReadout(width, 32, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


IDS = jax.random.randint(jax.random.key(5), (8, 33), 0, 32)


def _gradients(model):
    graph, params = nnx.split(model)

    def loss(params):
        logits = nnx.merge(graph, params)(IDS[:, :-1])
        return jus.cross_entropy(logits, IDS[:, 1:])

    return jax.jit(jax.grad(loss))(params)


def _cosines(model, truly):
    """Each parameter's gradient against the true one of the same forward function."""
    got = _gradients(model)
    true = truly(_gradients, model)

    def cosine(a, b):
        a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
        return a @ b / np.sqrt((a @ a) * (b @ b))

    return jax.tree.leaves(jax.tree.map(cosine, got, true))


def test_every_gradient_of_a_transformer_is_true_up_to_a_positive_constant(truly):
    model = _Transformer(use_bias=True)
    # The initial zeros hide a bias from its neighbours' gradients.
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p + 0.1 * jnp.cos(p), params))
    cosines = _cosines(model, truly)
    assert len(cosines) > 40
    np.testing.assert_array_less(0.9999, cosines)


def test_an_unconstrained_residual_branch_breaks_the_gradient(truly):
    model = _Transformer()
    model.blocks[1].mlp.up.constraint = None
    assert min(_cosines(model, truly)) < 0.9999


def test_a_block_is_near_unit_scale_at_its_ends_and_within_a_decade_inside():
    block = jus.nnx.TransformerBlock(128, 4, 256, index=0, depth=4, rngs=nnx.Rngs(0))
    y, dx, grads = _vjp(block, normal(0, 8, 64, 128))
    np.testing.assert_allclose([_rms(y), _rms(dx)], 1, atol=0.15)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert 0.1 < _rms(grad) < 10, path


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_block_in_simulated_fp8_or_a_narrow_dtype_stays_close(dtype):
    x = normal(0, 4, 32, 64)
    options = {"index": 0, "depth": 2}

    def run(**more):
        block = jus.nnx.TransformerBlock(
            64, 4, 128, rngs=nnx.Rngs(0), **options, **more
        )
        return [np.asarray(a, np.float64) for a in _vjp(block, x)[:2]]

    exact = run()
    narrow, fp8 = run(dtype=dtype), run(formats=jus.SIMULATED_FP8)
    for other, error in ((narrow, 0.03), (fp8, 0.2)):
        for a, b in zip(exact, other, strict=True):
            assert 0 < _rms(a - b) < error


def test_formats_round_the_operands_and_the_cotangent():
    module = jus.nnx.Linear(
        64, 32, use_bias=False, formats=jus.SIMULATED_FP8, rngs=nnx.Rngs(0)
    )
    x = normal(0, 128, 64)
    y, dx, grads = _vjp(module, x)
    kernel = jus.quantize(module.kernel[...], jus.E4M3)
    g = jus.quantize(normal(99, 128, 32), jus.E5M2)
    want = [
        jus.quantize(x, jus.E4M3) @ kernel / 8,
        g @ kernel.T / 8,
        jus.quantize(x, jus.E4M3).T @ g / 128**0.5,
    ]
    for a, b in zip((y, dx, *jax.tree.leaves(grads)), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
