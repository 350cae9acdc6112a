"""Low-rank adapters: they start as their base, at unit scale, with true gradients."""

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


def _gradients(module, x):
    graph, params = nnx.split(module)
    y, vjp = jax.vjp(lambda p: nnx.merge(graph, p)(x), params)
    (grads,) = vjp(normal(9, *y.shape))
    return y, grads


def test_an_adapted_layer_starts_as_its_base_with_unit_gradients():
    layer = jus.nnx.LoRALinear(128, 64, lora_rank=16, rngs=nnx.Rngs(0))
    base = jus.nnx.Linear(128, 64, rngs=nnx.Rngs(0))
    x = normal(1, 256, 128)
    y, grads = _gradients(layer, x)
    np.testing.assert_array_equal(y, base(x))
    np.testing.assert_allclose(_rms(grads["lora"]["lora_b"][...]), 1, atol=0.15)
    assert not np.any(grads["lora"]["lora_a"][...])


def test_what_is_learnt_has_unit_scale_and_is_added_to_the_base():
    base = jus.nnx.Linear(128, 128, rngs=nnx.Rngs(1))
    lora = jus.nnx.LoRA(
        128,
        64,
        128,
        base_module=base,
        b_initializer=nnx.initializers.normal(1.0),
        rngs=nnx.Rngs(0),
    )
    x = normal(1, 256, 128)
    y, grads = _gradients(lora, x)
    learnt = y - base(x)
    np.testing.assert_allclose(_rms(learnt), 1, atol=0.1)
    a, b = lora.lora_a[...], lora.lora_b[...]
    want = x @ a @ b / (128 * 64) ** 0.5
    np.testing.assert_allclose(learnt, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(_rms(grads["lora_b"][...]), 1, atol=0.1)
    # By default the factor for x is the output's, 64^-1/2 and not 128^-1/2.
    np.testing.assert_allclose(_rms(grads["lora_a"][...]), 2**0.5, atol=0.15)
    assert lora.lora_a.get_metadata()["fan_in"] == 128
    assert lora.lora_b.get_metadata()["fan_in"] == 64


@pytest.mark.parametrize("name", ["LoRA", "LoRALinear"])
def test_adapters_take_every_argument_and_parameter_of_their_namesake(name):
    sizes = {"LoRA": (6, 2, 4), "LoRALinear": (6, 4)}[name]
    rank = {"lora_rank": 2} if name == "LoRALinear" else {}
    namesake = getattr(nnx, name)
    defaults = {
        k: p.default
        for k, p in inspect.signature(namesake.__init__).parameters.items()
        if p.default is not inspect.Parameter.empty and "initializer" not in k
    }
    unit = getattr(jus.nnx, name)(
        *sizes, **defaults, **rank, formats=jus.SIMULATED_FP8, rngs=nnx.Rngs(0)
    )
    plain = namesake(*sizes, **rank, rngs=nnx.Rngs(1))
    nnx.update(unit, nnx.state(plain))
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (unit, plain)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    lora = unit if name == "LoRA" else unit.lora
    assert type(lora) is jus.nnx.LoRA and lora.formats is jus.SIMULATED_FP8
    assert unit(jnp.ones((3, 6))).shape == (3, 4)


def test_a_base_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="`base_module` must be a function or None"):
        jus.nnx.LoRA(6, 2, 4, base_module=nnx.Module(), rngs=nnx.Rngs(0))
