"""track_scales: the statistics that NumPy computes, wherever a tensor stands."""

import contextlib
import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_sharding import on_eight_devices

import jax_unit_scaling as jus
from jax_unit_scaling.transforms.track import HIGHEST, LOWEST

X = jax.random.normal(jax.random.key(0), (4, 8))
W = jax.random.normal(jax.random.key(1), (8, 8)) * 1e-3


def check(stats, x, atol=0.0):
    """`stats` are those of `x`; sums of n float32 numbers err by n units at most.
    Of `x` itself `atol` is known."""
    x = np.asarray(x, np.float64)
    size = np.abs(x)
    tol = {"rtol": x.size * 2.0**-23}
    assert stats.size == x.size
    np.testing.assert_allclose(stats.scale, np.sqrt(np.mean(x**2)), **tol)
    np.testing.assert_allclose(stats.total, x.sum(), atol=size.sum() * tol["rtol"])
    np.testing.assert_allclose(stats.largest, np.float32(size.max()), 0, atol)
    assert stats.zeros == np.sum(x == 0)
    if np.any(x != 0):
        smallest = np.float32(size[size > 0].min())
        np.testing.assert_allclose(stats.smallest, smallest, 0, atol)
    exponent = np.clip(np.floor(np.log2(size[size > 0])), LOWEST, HIGHEST)
    want = np.bincount((exponent - LOWEST).astype(int), minlength=HIGHEST - LOWEST + 1)
    np.testing.assert_array_equal(stats.histogram, want)
    for i, f in enumerate((jus.FP16, jus.E5M2, jus.E4M3)):
        rounded = np.asarray(jus.quantize(jnp.asarray(x, jnp.float32), f))
        assert stats.underflow[i] == np.sum((rounded == 0) & (x != 0))
        assert stats.overflow[i] == np.sum(size > f.max)


def loss(x, w):
    with jax.named_scope("up"):
        y = x @ w
    return jnp.sum(jnp.sin(y) ** 2) * 1e3


def test_tensors_and_cotangents_are_those_of_the_function():
    track = jus.track_value_and_grad(loss, (0, 1))
    value, grads, scales = jax.jit(track)(X, W)
    want, want_grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(X, W)
    np.testing.assert_array_equal(value, want)
    jax.tree.map(np.testing.assert_array_equal, grads, want_grads)
    y = X @ W
    check(scales["up/dot_general"].forward, y)
    # sin^2 is differentiated by hand; products of float32 in another order.
    g = 2e3 * np.sin(y) * np.cos(y)
    np.testing.assert_allclose(
        scales["up/dot_general"].backward.scale, np.sqrt(np.mean(g**2)), rtol=1e-5
    )
    check(scales["args/0"].forward, X)
    check(scales["args/1"].backward, want_grads[1])
    assert "test_track.py" in scales["up/dot_general"].site.source


def test_extreme_values_are_counted():
    x = jnp.array([0.0, -0.0, 2.0**-9, 2.0**-10, 2.0**-25, 1e30, -7e4, 448.0, 449.0])
    _, scales = jus.track_scales(lambda x: x * 1)(x)
    check(scales["args/0"].forward, x)


def test_what_is_not_finite_is_counted_apart():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0, 0.0, -2.0])

    def body(_, x):
        return None, x * 1

    _, scales = jus.track_scales(lambda x: lax.scan(body, None, x)[0])(x[None])
    for stats in (scales["args/0"].forward, list(scales.values())[1].forward):
        assert stats.size == 6 and stats.zeros == 1 and stats.histogram.sum() == 2
        assert stats.nan == 1 and stats.infinite == 2 and stats.finite == 3
        np.testing.assert_array_equal(np.ravel(stats.overflow), [2, 2, 2])
        assert stats.smallest == 1 and stats.largest == 2 and stats.total == -1
        np.testing.assert_allclose(stats.scale, np.sqrt(5 / 3), rtol=1e-6)
        np.testing.assert_allclose(stats.mean, -1 / 3, rtol=1e-6)


def test_iterations_of_a_loop_count_by_what_is_finite():
    def f(x, n):
        return lax.fori_loop(0, n, lambda i, y: jnp.log(y - 1), x)

    _, scales = jax.jit(jus.track_scales(f))(jnp.array([1.0, 3.0]), 2)
    (stats,) = (t.forward for name, t in scales.items() if name.endswith("/sub"))
    assert stats.size == 4 and stats.infinite == 1
    want = np.sqrt((0 + 2**2 + (np.log(2) - 1) ** 2) / 3)
    np.testing.assert_allclose(stats.scale, want, rtol=1e-6)


def test_complex_numbers_count_as_two_each():
    def loss(z):
        return jnp.sum(jnp.abs(z * (1 + 2j)) ** 2)

    z = lax.complex(X, 3 * X)
    value, grad, scales = jus.track_value_and_grad(loss)(z)
    want, want_grad = jax.value_and_grad(loss)(z)
    np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(grad, want_grad)
    check(scales["args/0"].forward, np.stack([z.real, z.imag]))
    check(scales["args/0"].backward, np.stack([grad.real, grad.imag]))
    product = np.asarray(z * (1 + 2j))
    (name,) = (
        n
        for n in scales
        if n.endswith("/mul") and "complex" in str(scales[n].site.dtype)
    )
    check(scales[name].forward, np.stack([product.real, product.imag]))


@pytest.mark.parametrize("platform", [None, "cpu", "cuda", "default"])
def test_numbers_of_64_bits_are_counted_as_they_are(monkeypatch, platform):
    def elsewhere(*args, **by_platform):
        return by_platform[platform](*args)

    if platform:
        monkeypatch.setattr(lax, "platform_dependent", elsewhere)
    with jax.enable_x64(True):
        jax.clear_caches()
        x = np.array([1e60, -1e-60, 0.0, 3.0, 2.0**-9, np.inf])
        w = X.astype(jnp.float64)
        value, grads, scales = jus.track_value_and_grad(
            lambda x, w: jnp.sum(jnp.sin(w @ w.T)) + 0 * x[3], argnums=1
        )(x, w)
        jax.clear_caches()
        stats = scales["args/0"].forward
        assert stats.largest.dtype == np.float64
        assert stats.largest == 1e60 and stats.smallest == 1e-60
        np.testing.assert_allclose(stats.scale, 1e60 / np.sqrt(5), rtol=1e-12)
        assert stats.infinite == 1 and stats.zeros == 1 and stats.size == 6
        assert stats.histogram[0] == stats.histogram[-1] == 1
        np.testing.assert_array_equal(stats.overflow, [2, 2, 2])
        np.testing.assert_array_equal(stats.underflow, [1, 1, 1])
        # Beside it what has 32 bits, and a cotangent.
        np.testing.assert_allclose(
            scales["args/1"].backward.scale, np.sqrt(np.mean(grads**2)), rtol=1e-12
        )
        _, found = jax.jit(jus.track_scales(jnp.sin))(X)
        check(found["args/0"].forward, X)


def test_errors_name_the_argument():
    for track in (jus.track_scales, jus.track_value_and_grad):
        with pytest.raises(TypeError, match="`fn` must be a function or a module.* 3"):
            track(3)
        with pytest.raises(TypeError, match="`where` must be a function, got 3"):
            track(loss, where=3)
        with pytest.raises(TypeError, match="`formats` must be a mapping.*'a': 3"):
            track(loss, formats={"a": 3})
        with pytest.raises(TypeError, match="`formats` must be a mapping.*Format"):
            track(loss, formats=jus.E4M3)
    for argnums in (None, "x", 0.5, (0, None)):
        with pytest.raises(TypeError, match="`argnums` must be the number of an arg"):
            jus.track_value_and_grad(loss, argnums)
    for argnums in (2, (0, -3)):
        with pytest.raises(TypeError, match="`argnums` must be .* 2 positional"):
            jus.track_value_and_grad(loss, argnums)(X, W)
    shape = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    with pytest.raises(TypeError, match="`args/0` must be an array.*ShapeDtypeStruct"):
        jus.track_scales(loss)(shape, W)
    # A function may ask for a shape alone.
    y, _ = jus.track_scales(lambda x, like: x.reshape(like.shape))(
        X[0], shape.update(shape=(2, 4))
    )
    assert y.shape == (2, 4)


def test_with_an_auxiliary_value_a_loss_is_a_pair():
    aux = lambda x, w: [loss(x, w), x]
    value, _, _ = jus.track_value_and_grad(aux, has_aux=True)(X, W)
    np.testing.assert_array_equal(value[1], X)
    y = loss(X, W)
    for out, found in (
        (lambda y: y, "one value"),
        (lambda y: (y,), "a tuple of 1"),
        (lambda y: {"loss": y, "aux": y}, "a dict of 2"),
        (lambda y: None, "a NoneType of 0"),
    ):
        with pytest.raises(TypeError, match=f"must return a pair.* got {found}"):
            jus.track_value_and_grad(out, has_aux=True)(y)
    for check in (jus.audit_gradients, jus.cut_edges):
        with pytest.raises(TypeError, match="must return a pair.* got one value"):
            check(loss, has_aux=True)(X, W)


def test_an_error_in_where_names_the_tensor():
    for name in ("args/0", "up/dot_general"):

        def where(site, name=name):
            if site.name == name:
                raise KeyError("no")
            return True

        for track in (jus.track_scales, jus.track_value_and_grad):
            with pytest.raises(KeyError) as error:
                track(loss, where=where)(X, W)
            assert any(f"in `where`, of {name} (" in n for n in error.value.__notes__)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "default"])
@pytest.mark.parametrize("shape", [(), (5, 3), (7, 300), (4097, 130)])
def test_accelerators_count_the_same(monkeypatch, platform, shape):
    few = jnp.array([0.0, -3.0, jnp.nan, jnp.inf, 2.0**-50, 500.0])
    x = 2.0 ** jax.random.uniform(jax.random.key(2), shape, minval=-60, maxval=40)
    x = jnp.resize(few, shape) if x.size < 20 else x
    want = jus.track_scales(lambda x: x * 1)(x)[1]

    def elsewhere(*args, **by_platform):
        return by_platform[platform](*args)

    monkeypatch.setattr(lax, "platform_dependent", elsewhere)
    jax.clear_caches()
    found = jus.track_scales(lambda x: x * 1)(x)[1]
    jax.clear_caches()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_forward_tensors_alone_and_of_a_function_that_differentiates():
    _, scales = jax.jit(jus.track_scales(jax.grad(loss, (0, 1))))(X, W)
    backward = [t for t in scales.values() if t.site.is_backward]
    assert backward and all(t.backward is None for t in scales.values())
    # The gradients themselves are among them.
    for g in jax.grad(loss, (0, 1))(X, W):
        want = np.sqrt(np.mean(np.asarray(g) ** 2))
        assert any(np.isclose(t.forward.scale, want, rtol=1e-5) for t in backward)
    y, scales = jus.track_scales(loss)(X, W)
    np.testing.assert_array_equal(y, loss(X, W))
    check(scales["up/dot_general"].forward, X @ W)


def test_a_scan_gives_a_value_for_each_layer():
    ws = jnp.stack([W * 1e3, W, W * 1e2])

    def deep(x, ws):
        @jax.checkpoint
        def layer(x, w):
            with jax.named_scope("layer"):
                return x @ w, None

        return lax.scan(layer, x, ws)[0].sum()

    value, grads, scales = jax.jit(jus.track_value_and_grad(deep, (0, 1)))(X, ws)
    want = jax.jit(jax.value_and_grad(deep, (0, 1)))(X, ws)
    jax.tree.map(np.testing.assert_array_equal, (value, grads), want)
    tensor = scales["layer/dot_general"]
    y, g = X, [jnp.ones((4, 8))]
    for w in reversed(ws[1:]):
        g.insert(0, g[0] @ w.T)
    for i in range(3):
        y = y @ ws[i]
        for stats, x in ((tensor.forward, y), (tensor.backward, g[i])):
            # Up to three products, of sums of 8 in another order than the scan's.
            atol = 3 * 8 * 2.0**-24 * np.abs(x).max()
            check(jax.tree.map(lambda s, i=i: s[i], stats), x, atol)


def test_branches_and_loops():
    def f(x, n):
        y = lax.cond(x.sum() > 1e9, lambda: jnp.sin(x), lambda: jnp.cos(x))
        return lax.fori_loop(0, n, lambda i, y: jnp.tanh(y), y)

    _, scales = jax.jit(jus.track_scales(f))(X, 2)
    found = {t.site.name.split("/")[-1]: t.forward for t in scales.values()}
    assert found["sin"].size == 0
    check(found["cos"], jnp.cos(X))
    both = jnp.stack([jnp.tanh(jnp.cos(X)), jnp.tanh(jnp.tanh(jnp.cos(X)))])
    check(found["tanh"], both)


def test_shard_map_vmap_and_where():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

    def f(x):
        g = ft.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P())
        return g(lambda x: lax.psum(jnp.sin(x).sum(), "d"))(x)

    value, grad, scales = jax.jit(jus.track_value_and_grad(f))(X)
    want, want_grad = jax.jit(jax.value_and_grad(f))(X)
    np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(grad, want_grad)
    found = {t.site.name.split("/")[-1]: t for t in scales.values()}
    check(found["sin"].forward, jnp.sin(X))
    check(found["sin"].backward, jnp.ones_like(X))
    # A sum over devices has a cotangent that does not vary over them.
    summed = next(t for name, t in found.items() if name.startswith("psum"))
    check(summed.forward, want)
    check(summed.backward, 1.0)
    one = jus.track_value_and_grad(f, where=lambda s: s.name.endswith("sin"))
    assert len(one(X)[-1]) == 1
    _, _, scales = jax.vmap(jus.track_value_and_grad(lambda x: jnp.sin(x).sum()))(X)
    assert scales["args/0"].forward.size.shape == (4,)


@pytest.mark.parametrize("inside", [False, True], ids=["arguments", "set_mesh"])
@on_eight_devices
def test_arrays_may_be_split_over_explicit_axes(inside):
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)

    def loss(x, w):
        each = ft.partial(jax.shard_map, mesh=mesh, axis_names={"d"})
        y = each(jnp.sin, in_specs=P("d"), out_specs=P("d"))(x @ w)
        return jnp.sum(lax.scan(lambda y, _: (jnp.tanh(y), None), y, length=2)[0])

    split = jax.device_put(
        (X, 1e3 * W), (NamedSharding(mesh, P("d")), NamedSharding(mesh, P(None, "m")))
    )
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        want = jax.jit(jax.value_and_grad(loss, (0, 1)))(*split)
        *got, scales = jax.jit(jus.track_value_and_grad(loss, (0, 1)))(*split)
        _, forward = jax.jit(jus.track_scales(loss))(*split)
    # Sums of 32 at most, compiled beside others.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, 32 * 2.0**-23, 1e-6)
    check(scales["args/1"].backward, got[1][1])
    y, found = np.asarray(split[0]) @ np.asarray(split[1]), {}
    for t in scales.values():
        found.setdefault(t.site.name.split("/")[-1], t)
    # A product's sums of 8 are in another order than NumPy's.
    check(found["dot_general"].forward, y, 8 * 2.0**-24 * np.abs(y).max())
    check(found["sin"].forward, jnp.sin(y), 1e-6)
    for t, alone in zip(scales.values(), forward.values(), strict=True):
        for a, b in zip(t.forward, alone.forward, strict=True):
            np.testing.assert_allclose(a, b, 32 * 2.0**-23, 1e-6)


def test_a_module_and_its_names():
    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.relu(self.norm(x))

    model = Net()
    _, scales = jus.track_scales(lambda model, x: model(x))(model, X)
    assert np.any(model.norm.mean[...] != 0)
    assert any("norm/scale" in name for name in scales)
    assert any(name.endswith("relu") for name in scales)


def test_products_are_called_by_the_parameter_they_apply():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(5, 8, rngs=rngs)
            self.layers = nnx.List(
                nnx.Linear(8, 8, dtype=jnp.bfloat16, rngs=rngs) for _ in range(2)
            )

        def __call__(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    _, scales = jus.track_scales(lambda net, ids: net(ids))(Net(), jnp.arange(5))
    for i in range(2):
        assert f"args/0/layers/{i}/kernel/dot_general" in scales
        assert f"args/0/layers/{i}/bias/add" in scales
    assert any(name.startswith("args/0/embed/embedding/") for name in scales)
    (tanh, _) = (n for n in scales if "tanh" in n)
    assert tanh.startswith("test_track.py")


@pytest.mark.parametrize("t", [jus.track_scales, jus.track_value_and_grad])
def test_it_can_be_stacked_over_steps(t):
    def step(_, x):
        return None, t(loss)(x, W)[-1]

    scales = jax.jit(lambda xs: lax.scan(step, None, xs)[1])(jnp.stack([X, 2 * X]))
    check(jax.tree.map(lambda s: s[1], scales["up/dot_general"].forward), 2 * X @ W)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_gpu_counts_what_numpy_does(dtype):
    shape = (700, 300)
    # In float16 the half of each is exact, also where a compiler keeps it wider.
    x = 2.0 ** jax.random.uniform(jax.random.key(2), shape, minval=-10, maxval=14)
    x = x.at[:3].set(0).astype(dtype)
    track = jax.jit(jus.track_value_and_grad(lambda x: jnp.sum(0.5 * x * x)))
    _, grad, scales = track(x)
    check(scales["args/0"].forward, x)
    check(scales["args/0"].backward, grad)
