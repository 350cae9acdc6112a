"""What plain Flax hands over, its bridges between families and its checkpoints, keeps
values, roles and u-muP's rates."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import jax_unit_scaling as jus

X = jax.random.normal(jax.random.key(0), (4, 8))
RATES = {"kernel": 0.5 / 8**0.5, "bias": 0.5}  # of fan-in 8, and of none


def _rates(params):
    """The size of Adam's first update at rate 1/2, by the parameter's name."""
    grads = jax.tree.map(jnp.ones_like, params)
    optimiser = jus.optim.adam(0.5)
    updates, _ = jax.jit(optimiser.update)(grads, optimiser.init(params), params)
    return {
        next(k for k in RATES if k in jax.tree_util.keystr(path)): -np.mean(u)
        for path, u in jax.tree_util.tree_leaves_with_path(updates)
    }


def _same_rates(found, expected=RATES):
    assert {*found} == {*expected}
    for name, rate in expected.items():
        np.testing.assert_allclose(found[name], rate, rtol=1e-4)


def _partitioned(wrap):
    init = wrap(nn.initializers.normal(1.0), ("in", "out"))
    return jus.linen.Dense(16, kernel_init=init)


@pytest.mark.parametrize(
    "make",
    [
        lambda: jus.linen.Dense(16),
        lambda: _partitioned(nn.with_partitioning),
        lambda: _partitioned(nn.with_logical_partitioning),
    ],
)
def test_a_linen_module_runs_in_nnx_with_its_roles(make):
    auto = 2 * (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((1, 1), ("in", "out"), axis_types=auto)):
        _runs_in_nnx(make())


def _runs_in_nnx(linen):
    model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(X)
    params = nnx.state(model, nnx.Param)
    variables = {"params": {k: params[k][...] for k in RATES}}
    np.testing.assert_array_equal(model(X), linen.apply(variables, X))
    rows = {row.path: row for row in jus.optim.report(params, 1.0)}
    assert rows["kernel"].role == "weight" and rows["kernel"].fan_in == 8
    assert rows["bias"].role == "bias"
    _same_rates(_rates(params))
    # There and back: the box that Linen sees is the one it made.
    boxes = linen.init(jax.random.key(0), X)["params"]
    back = nnx.bridge.variables.nnx_attrs_to_linen_vars({k: params[k] for k in RATES})
    assert jax.tree.structure(back["params"]) == jax.tree.structure(boxes)


def test_an_nnx_module_runs_in_linen_with_its_roles():
    linen = nnx.bridge.to_linen(jus.nnx.Linear, 8, 16)
    params = linen.init(jax.random.key(0), X)["params"]
    bare = {k: jnp.asarray(nn.unbox(params[k])) for k in RATES}
    want = jus.linear(X, bare["kernel"], bare["bias"])
    np.testing.assert_allclose(linen.apply({"params": params}, X), want, rtol=1e-5)
    _same_rates(_rates(params))
    frozen = optax.partition(
        {True: jus.optim.adam(0.5), False: optax.set_to_zero()},
        lambda p: {k: jax.tree.map(lambda _, k=k: k == "bias", p[k]) for k in p},
    )
    updates, _ = frozen.update(params, frozen.init(params), params)
    assert np.any(nn.unbox(updates)["kernel"]) == 0


class _Model(nn.Module):
    """The same names of parameters, made of Flax's layers or of ours."""

    layers: object

    @nn.compact
    def __call__(self, x):
        x = self.layers.LayerNorm()(self.layers.Dense(16)(x))
        return self.layers.MultiHeadDotProductAttention(num_heads=2)(x, x)


def test_a_checkpoint_of_plain_linen_goes_into_the_boxes():
    key, x = jax.random.key(1), X[None]
    model, plain_variables = _Model(jus.linen), _Model(nn).init(key, x)
    params = flax.core.meta.replace_boxed(model.init(key, x), plain_variables)
    for a, b in zip(*map(jax.tree.leaves, (params, plain_variables)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.apply(params, x).shape == (1, 4, 16)
    roles = {row.path: row.role for row in jus.optim.report(params["params"], 1.0)}
    assert roles["Dense_0/kernel"] == "weight" and roles["LayerNorm_0/scale"] == "norm"
    assert len(roles) == 12
