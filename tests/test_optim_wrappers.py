"""u-muP's optimisers inside of optax's own wrappers, in both families."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import jax_unit_scaling as jus
from jax_unit_scaling import optim

RATE = 0.5


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jus.linen.LoRADense(16, lora_rank=2, name="adapted")(x)
        return jus.linen.DenseReadout(4, use_bias=True, name="readout")(x)


def _nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        adapted=jus.nnx.LoRALinear(
            8, 16, lora_rank=2, lora_param_type=nnx.Param, rngs=rngs
        ),
        readout=jus.nnx.LinearReadout(16, 4, rngs=rngs),
    )
    return nnx.state(model, nnx.Param)


FAMILIES = {
    "nnx": _nnx,
    "linen": lambda: _Linen().init(jax.random.key(0), jnp.ones((2, 8)))["params"],
}


def _path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(tree):
    """Arrays by path, which ends at the parameter's box."""
    return {
        _path(path).removesuffix("/value"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _labelled(choose):
    """A tree of what `choose` says of each path, as optax asks for."""
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: choose(_path(path)), params
    )


def _is_adapter(path):
    return "lora" in path


def _is_readout(path):
    return path.startswith("readout")


def _step(optimiser, params):
    """The gradients of a made-up loss, and the optimiser's second update."""
    grads = jax.tree.map(lambda p: jnp.sin(3 * p) + 0.1, params)
    state = optimiser.init(params)
    for _ in range(2):
        updates, state = jax.jit(optimiser.update)(grads, state, params)
    return _by_path(grads), _by_path(updates)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrapper", [optax.multi_transform, optax.partition])
def test_a_partition_gives_each_part_its_own_optimiser(family, wrapper):
    params = FAMILIES[family]()
    parts = {True: optim.adam(RATE), False: optim.muon(RATE)}
    _, got = _step(wrapper(parts, _labelled(_is_readout)), params)
    alone = {name: _step(part, params)[1] for name, part in parts.items()}
    want = {path: alone[_is_readout(path)][path] for path in got}
    assert len(want) == 6 and any(
        np.any(alone[True][path] != alone[False][path]) for path in want
    )
    for path, update in got.items():
        np.testing.assert_allclose(update, want[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_base_keeps_still_while_its_adapter_learns(family):
    params = FAMILIES[family]()
    parts = {True: optim.adamw(RATE), False: optax.set_to_zero()}
    _, got = _step(optax.partition(parts, _labelled(_is_adapter)), params)
    _, want = _step(optim.adamw(RATE), params)
    for path, update in got.items():
        learns = want[path] if _is_adapter(path) else np.zeros_like(update)
        np.testing.assert_allclose(update, learns, rtol=1e-5, err_msg=path)
        assert np.any(update) == _is_adapter(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_mask_leaves_out_keeps_its_gradient(family):
    params = FAMILIES[family]()
    masked = optax.masked(optim.lion(RATE, weight_decay=0.125), _labelled(_is_readout))
    grads, got = _step(masked, params)
    _, want = _step(optim.lion(RATE, weight_decay=0.125), params)
    for path, update in got.items():
        left = want if _is_readout(path) else grads
        np.testing.assert_allclose(update, left[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("boxed", [True, False])
def test_overrides_may_name_what_another_optimiser_has(boxed):
    params = FAMILIES["linen"]()
    params = params if boxed else nn.unbox(params)
    overrides = {
        "readout/*": {"role": "output"},
        "adapted/*": {"role": "bias"},
        "adapted/lora/*": {"depth": 4},
    }
    parts = {
        True: optim.sgd(RATE, overrides=overrides),
        False: optim.sgd(RATE / 2, overrides=overrides),
    }
    grads, got = _step(optax.partition(parts, _labelled(_is_readout)), params)
    for path, update in got.items():
        rate = RATE if _is_readout(path) else RATE / 2
        rate /= 2 if _is_adapter(path) else 1
        np.testing.assert_allclose(update, -rate * grads[path], rtol=1e-5)


# -- Hyperparameters in the state ------------------------------------------------------

NAMES = ("adam", "adamw", "lion", "sgd", "muon")


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_can_be_injected_and_changed_on_the_way(name):
    params = FAMILIES["nnx"]()
    make = getattr(optim, name)
    fixed = ("ns_steps", "ns_coeffs") if name == "muon" else ()  # loops, as in optax's
    optimiser = optax.inject_hyperparams(make, static_args=fixed)(RATE)
    grads = jax.tree.map(jnp.ones_like, params)
    state = optimiser.init(params)
    first, _ = optimiser.update(grads, state, params)
    want, _ = make(RATE).update(grads, make(RATE).init(params), params)
    state.hyperparams["learning_rate"] = jnp.asarray(2 * RATE)
    twice, _ = optimiser.update(grads, state, params)
    want_twice, _ = make(2 * RATE).update(grads, make(RATE).init(params), params)
    for got, by_hand in ((first, want), (twice, want_twice)):
        for a, b in zip(*map(jax.tree.leaves, (got, by_hand)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_signature_is_optaxs_with_keywords_behind_it(name):
    home = optax.contrib if name == "muon" else optax
    theirs = inspect.signature(getattr(home, name)).parameters
    ours = inspect.signature(getattr(optim, name)).parameters
    assert not [p for p in ours.values() if p.kind is p.VAR_KEYWORD]

    def positional(parameters):
        return [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    if name == "muon":  # has a mask and two decays of its own, and no place for more
        assert positional(ours) == ["learning_rate"]
    else:
        assert positional(ours) == positional(theirs)
        assert {*theirs} <= {*ours}
    other = {"lion": {"weight_decay"}}  # stated in its docstring
    for argument in ({*ours} & {*theirs}) - other.get(name, set()):
        assert ours[argument].default == theirs[argument].default, argument
