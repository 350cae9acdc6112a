"""One machine or many, the same update: loss, gradients, and a step of Adam and SGD.

The number of devices is fixed when JAX starts. So what needs eight of them runs in one
process of its own, which the decorator `on_eight_devices` sends a test's body to.
"""

import contextlib
import functools as ft
import importlib
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import normal
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jax_unit_scaling as jus
from jax_unit_scaling.op import OPS


def _start():
    warnings.simplefilter("error")  # as pytest does in its own process
    jax.config.update("jax_num_cpu_devices", 8)
    # Little is computed here, and much compiled.
    jax.config.update("jax_disable_most_optimizations", True)


@ft.cache
def _devices():
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_start)


def _call(module, name, kwargs):
    getattr(importlib.import_module(module), name).__wrapped__(**kwargs)


def on_eight_devices(test):
    """Runs a test where there are eight devices; its arguments have to be plain."""

    @ft.wraps(test)
    def sent(**kwargs):
        _devices().submit(_call, test.__module__, test.__name__, kwargs).result()

    return sent


# -- The model, and what one device makes of it ----------------------------------------

BATCH, LENGTH, VOCABULARY, WIDTH, HEADS = 16, 8, 32, 32, 4


class _Transformer(nnx.Module):
    """All kinds of parameters: a table, kernels, biases, gains, a readout."""

    def __init__(self, batch_axis_name=None, model_axis_name=None, metadata=()):
        metadata, rngs = dict(metadata), nnx.Rngs(0)
        batch = {"batch_axis_name": batch_axis_name}
        self.embed = jus.nnx.Embed(
            VOCABULARY, WIDTH, embedding_metadata=metadata, **batch, rngs=rngs
        )
        self.stack = jus.nnx.TransformerStack(
            WIDTH,
            HEADS,
            2 * WIDTH,
            depth=1,
            norm=jus.nnx.RMSNorm,
            attention=ft.partial(jus.nnx.MultiHeadAttention, normalize_qk=True),
            use_bias=True,
            kernel_metadata=metadata,
            model_axis_name=model_axis_name,
            **batch,
            rngs=rngs,
        )
        self.norm = jus.nnx.LayerNorm(WIDTH, **batch, rngs=rngs)
        self.readout = jus.nnx.LinearReadout(
            WIDTH, VOCABULARY, kernel_metadata=metadata, **batch, rngs=rngs
        )

    def __call__(self, ids):
        return self.readout(self.norm(self.stack(self.embed(ids))))


@ft.cache
def _data():
    """Tokens and labels, and a mask that leaves each piece another number of them."""
    ids = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCABULARY)
    share = jnp.linspace(0.2, 1, BATCH)[:, None]
    where = jax.random.bernoulli(jax.random.key(2), share, (BATCH, LENGTH))
    return ids[:, :-1], ids[:, 1:], where


ADAM, SGD = jus.optim.adam(0.1), jus.optim.sgd(0.1)


def _loss(graph, params, data, **names):
    tokens, labels, where = data
    logits = nnx.merge(graph, params)(tokens)
    return jus.cross_entropy(logits, labels, where=where, **names)


_gradient = jax.value_and_grad(_loss, argnums=1)


def _updated(params, grads, *optimisers):
    """The parameters after one step of each optimiser."""
    made = (o.update(grads, o.init(params), params)[0] for o in optimisers)
    return [optax.apply_updates(params, updates) for updates in made]


def _step(graph, params, data, total=lambda grads: grads, **names):
    loss, grads = _gradient(graph, params, data, **names)
    grads = total(grads)
    return loss, grads, *_updated(params, grads, ADAM, SGD)


@ft.cache
def _single():
    """The model's graph and parameters, and what one device makes of them."""

    # Biases or gains that are all alike would hide one that is given to another.
    def told_apart(p):
        return p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape)

    def make():
        return jax.tree.map(told_apart, nnx.state(_Transformer()))

    graph, params = _graph(), jax.jit(make)()
    return graph, params, jax.jit(ft.partial(_step, graph))(params, _data())


def _graph(*axis_names):
    return nnx.graphdef(nnx.eval_shape(lambda: _Transformer(*axis_names)))


def _assert_same(got):
    """The loss, the gradients of unit scale and the steps of 0.1 agree to 1e-5."""
    for a, b in zip(got, _single()[2], strict=True):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
        )
        for (path, x), y in pairs:
            np.testing.assert_allclose(
                x, y, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path)
            )


# -- `jit` with shardings --------------------------------------------------------------


def _mesh(**axes):
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
    )


def _megatron(path, x):
    """Heads and hidden features over `model`; all else whole on every device."""
    match path:
        case [*_, "query" | "key" | "value" | "up" | "gate", "kernel"]:
            return P(None, "model")
        case [*_, "query" | "key" | "value" | "up" | "gate", "bias"]:
            return P("model")
        case [*_, "out" | "down", "kernel"]:
            return P("model")
    return P()


def _vocabulary(path, x):
    """As `_megatron`, with table and readout split over the vocabulary as well."""
    match path:
        case ["embed", "embedding"] | ["readout", "bias"]:
            return P("model")
        case ["readout", "kernel"]:
            return P(None, "model")
    return _megatron(path, x)


def _fsdp(path, x, taken=()):
    """A piece of each parameter for each device of `data`, along an axis that fits."""
    size = jax.sharding.get_abstract_mesh().shape["data"]
    axes = [taken[i] if i < len(taken) else None for i in range(x.ndim)]
    free = [i for i in range(x.ndim) if axes[i] is None and x.shape[i] % size == 0]
    if free:
        axes[free[0]] = "data"
    return P(*axes)


def _specs(layout, params):
    def spec(path, x):
        return layout([str(getattr(k, "key", "")) for k in path[:-1]], x)

    return jax.tree_util.tree_map_with_path(spec, params)


LAYOUTS = {
    "data parallel": ({"data": 8}, lambda path, x: P()),
    "fsdp": ({"data": 8}, _fsdp),
    "tensor parallel": ({"model": 4}, _vocabulary),
    "data and tensor parallel": ({"data": 2, "model": 4}, _vocabulary),
    "fsdp and tensor parallel": (
        {"data": 4, "model": 2},
        lambda path, x: _fsdp(path, x, _vocabulary(path, x)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@on_eight_devices
def test_jit_with_shardings_makes_the_same_update(name):
    axes, layout = LAYOUTS[name]
    graph, params, _ = _single()
    mesh = _mesh(**axes)
    with jax.set_mesh(mesh):
        specs = _specs(layout, params)
    split = any(spec != P() for spec in jax.tree.leaves(specs))
    assert split == (name != "data parallel")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    batch = NamedSharding(mesh, P("data" if "data" in axes else None))
    params = jax.device_put(params, shardings)
    got = jax.jit(
        ft.partial(_step, graph), out_shardings=(None, shardings, shardings, shardings)
    )(params, jax.device_put(_data(), batch))
    _assert_same(got)
    for x, sharding in zip(
        jax.tree.leaves(got[3]), jax.tree.leaves(shardings), strict=True
    ):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@on_eight_devices
def test_shardings_in_the_metadata_of_parameters_make_the_same_update():
    _, params, _ = _single()
    mesh = _mesh(data=4, model=2)
    with jax.set_mesh(mesh):
        model = _Transformer(metadata={"out_sharding": ("data", "model")})
        graph, made = nnx.split(model)
        specs = nnx.get_partition_spec(made)
        kernels = [
            t["stack"]["blocks"][0]["mlp"]["up"]["kernel"] for t in (made, specs)
        ]
        assert kernels[0].get_metadata()["role"] == "weight"
        assert kernels[0].sharding.spec == kernels[1].get_value() == P("data", "model")
        shardings = jax.tree.map(lambda p: p.sharding, made)
        leaves = jax.device_put(jax.tree.leaves(params), jax.tree.leaves(shardings))
        split = jax.tree.unflatten(jax.tree.structure(made), leaves)
        data = jax.device_put(_data(), NamedSharding(mesh, P("data")))
        got = jax.jit(ft.partial(_step, graph))(split, data)
    _assert_same(got)


# -- Mapped axes: each device sees a piece ---------------------------------------------


def _pieces(x, n):
    return x.reshape(n, -1, *x.shape[1:])


MEGATRON = {
    "data": {"data": 8},
    "model": {"model": 4},
    "data and model": {"data": 2, "model": 4},
}


@pytest.mark.parametrize("name", MEGATRON)
@on_eight_devices
def test_shard_map_makes_the_same_update(name):
    axes = MEGATRON[name]
    _, params, _ = _single()
    data, model = (a if a in axes else None for a in ("data", "model"))
    graph = _graph(data, model)
    specs = _specs(_megatron, params) if model else P()

    def step(params, piece):
        def total(grads):
            return jus.optim.sum_gradients(grads, data) if data else grads

        return _step(graph, params, piece, total, batch_axis_name=data)

    mapped = jax.shard_map(
        step,
        mesh=_mesh(**axes),
        in_specs=(specs, P(data)),
        out_specs=(P(), specs, specs, specs),
    )
    _assert_same(jax.jit(mapped)(params, _data()))


@pytest.mark.parametrize("way", ["pmap", "unchecked shard_map"])
@on_eight_devices
def test_where_jax_sums_no_gradients_the_sum_makes_the_same_update(way):
    _, params, _ = _single()
    graph = _graph("data")

    def step(params, piece):
        total = ft.partial(jus.optim.sum_gradients, axis_name="data")
        return _step(graph, params, piece, total, batch_axis_name="data")

    if way == "pmap":
        mapped = jax.pmap(step, axis_name="data", in_axes=(None, 0))
        got = mapped(params, jax.tree.map(lambda x: _pieces(x, 8), _data()))
        got = jax.tree.map(lambda x: x[3], got)
    else:
        specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": False}
        mapped = jax.shard_map(step, mesh=_mesh(data=8), **specs)
        got = jax.jit(mapped)(params, _data())
    _assert_same(got)


@pytest.mark.parametrize("grad", ["inside", "outside"])
@on_eight_devices
def test_gradients_of_a_vmap_over_examples_add_up_to_that_of_the_batch(grad):
    _, params, (loss, want, *_) = _single()
    graph = _graph("data")
    examples = jax.tree.map(lambda x: x[:, None], _data())

    def one(params, example, f=_gradient):
        return f(graph, params, example, batch_axis_name="data")

    def value(params):
        loss = ft.partial(one, params, f=_loss)
        return jax.vmap(loss, axis_name="data", out_axes=None)(examples)

    if grad == "inside":
        each = jax.vmap(one, axis_name="data", in_axes=(None, 0))
        got = jax.tree.map(lambda x: x.sum(0), jax.jit(each)(params, examples)[1])
    else:
        value, got = jax.jit(jax.value_and_grad(value))(params)
        np.testing.assert_allclose(value, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["multi_steps", "by hand"])
@on_eight_devices
def test_accumulated_gradients_make_the_same_update(way):
    graph, params, (_, want_grads, *want) = _single()
    every = 4
    batches = jax.tree.map(lambda x: _pieces(x, every), _data())

    @jax.jit
    def run(params, batches):
        grads = lax.map(lambda b: _gradient(graph, params, b)[1], batches)
        if way == "by hand":
            grads = jax.tree.map(lambda g: g.sum(0) * every**-0.5, grads)
            return _updated(params, grads, ADAM, SGD), grads
        optimisers = [jus.optim.multi_steps(o, every) for o in (ADAM, SGD)]
        states = [o.init(params) for o in optimisers]
        made = [params, params]
        for i in range(every):
            one = jax.tree.map(lambda g, i=i: g[i], grads)
            for j, o in enumerate(optimisers):
                updates, states[j] = o.update(one, states[j], made[j])
                made[j] = optax.apply_updates(made[j], updates)
        return made, want_grads

    got, grads = run(params, batches)
    pairs = zip(
        jax.tree.leaves((got, grads)), jax.tree.leaves((want, want_grads)), strict=True
    )
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# -- Operations and modules alone ------------------------------------------------------

# Whose statistics are over all axes, and whose parameter has an element for each input:
# there is no batch to split.
WITHOUT_BATCH = ("layer_norm-2", "prelu-1")
WITH_PARAMETERS = [name for name, op in OPS.items() if op.parameters]
CASES = [
    f"{name}-{i}"
    for name in WITH_PARAMETERS
    for i, case in enumerate(OPS[name].cases)
    if {*OPS[name].parameters} & {*[*OPS[name]._signature.parameters][: len(case.args)]}
    and f"{name}-{i}" not in WITHOUT_BATCH
]
# The axis of the first activation that is batch, where it is not the first.
BATCH_AXIS = {"dot_general-2": 1, "einsum_linear-0": 1, "linear-4": 1}


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_an_operation_with_parameters_takes_the_names_of_the_axes_of_its_batch(name):
    assert "batch_axis_name" in OPS[name]._signature.parameters, (
        f"`{name}` has parameters, whose gradients are sums over the batch: give it "
        "the keyword `batch_axis_name: AxisName | None = None`; `op.py` does the rest."
    )


def _halves(case_id, op, args):
    """The arguments with a leading axis of two where they are split, and which are."""
    (first, *_) = (
        i
        for i, (name, a) in enumerate(zip(op._signature.parameters, args, strict=False))
        if name not in op.parameters and hasattr(a, "shape")
    )
    axis = BATCH_AXIS.get(case_id, 0)
    halves = list(args)
    # Every other row, so that groups of rows, as `ragged_dot` has them, are halved too.
    rows = np.moveaxis(np.asarray(args[first]), axis, 0)
    halves[first] = jnp.asarray(
        np.stack([np.moveaxis(rows[i::2], 0, axis) for i in (0, 1)])
    )
    if op is OPS["ragged_dot"]:
        halves[2] = args[2] // 2
    return halves, first


@pytest.mark.parametrize("case_id", CASES)
@on_eight_devices
def test_an_operation_on_a_split_batch_has_the_gradients_of_the_whole(case_id):
    from test_ops import _arguments  # here, as it makes arrays when it is imported

    name, _, index = case_id.rpartition("-")
    op, case = OPS[name], OPS[name].cases[int(index)]
    args = _arguments(case)
    halves, split = _halves(case_id, op, args)
    names = list(op._signature.parameters)
    parameters = {
        n: args[names.index(n)] for n in op.factors(*args, **case.options).bwd
    }
    parameters = {n: p for n, p in parameters.items() if n in op.parameters}

    def grads(parameters, x, args, **options):
        def loss(parameters):
            full = list(args)
            full[split] = x
            for n, p in parameters.items():
                full[names.index(n)] = p
            return jnp.sum(op(*full, **case.options, **options) ** 2)

        return jax.grad(loss)(parameters)

    def piece(parameters, x):
        return grads(parameters, x, halves, batch_axis_name="b")

    def all_ways(parameters, x, pieces):
        mapped = jax.vmap(piece, in_axes=(None, 0), axis_name="b")
        sharded = jax.shard_map(
            lambda parameters, x: piece(parameters, x[0]),
            mesh=_mesh(b=2),
            in_specs=(P(), P("b")),
            out_specs=P(),
        )(parameters, pieces)
        if op is OPS["ragged_dot"]:  # JAX maps it over axes that all arrays have
            return grads(parameters, x, args), sharded
        summed = jax.tree.map(lambda g: g.sum(0), mapped(parameters, pieces))
        return grads(parameters, x, args), sharded, summed

    want, *got = jax.jit(all_ways)(parameters, args[split], halves[split])
    assert want
    for way in got:
        for n, g in want.items():
            # float32 sums of 2^13 numbers at most, in another order
            unit = np.sqrt(np.mean(np.square(g)))
            np.testing.assert_allclose(way[n] / unit, g / unit, atol=2e-5, err_msg=n)


# The operation on x [64, 32] and kernel [32, 24], and whether it adds a bias.
PRODUCTS = {
    "linear": (jus.linear, True),
    "linear_readout": (jus.linear_readout, True),
    "dot_general": (
        lambda x, k, b, **o: jus.dot_general(x, k, (((1,), (0,)), ((), ())), **o),
        False,
    ),
    "einsum_linear": (
        lambda x, k, b, **o: jus.einsum_linear("bi,io->bo", x, k, b, **o),
        True,
    ),
    "ragged_dot": (
        lambda x, k, b, **o: jus.ragged_dot(
            x, jnp.stack([k, -k]), jnp.array([40, 24]), **o
        ),
        False,
    ),
}


@pytest.mark.parametrize(
    ("constraint", "formats"),
    [(None, None), (jus.gmean, None), (jus.gmean, jus.NATIVE_FP8)],
    ids=["free", "gmean", "native FP8"],
)
@pytest.mark.parametrize("name", PRODUCTS)
@on_eight_devices
def test_a_product_in_pieces_has_the_value_and_gradients_of_the_whole(
    name, constraint, formats
):
    op, biased = PRODUCTS[name]
    x, kernel, bias, g = (
        normal(i, *shape)
        for i, shape in enumerate([(64, 32), (32, 24), (24,), (64, 24)])
    )
    args = (x, kernel, bias if biased else None)
    op = ft.partial(op, formats=formats)
    warnings.filterwarnings("ignore", "native FP8 formats on")

    def run(f):
        y, vjp = jax.vjp(f, *args)
        return y, vjp(g)

    def split(specs, out, **names):
        f = ft.partial(op, constraint=constraint, **names)
        mesh = _mesh(b=2, m=4)
        return run(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out))

    def all_ways():
        return (
            run(ft.partial(op, constraint=constraint)),
            split((P(None, "m"), P("m"), P()), P(), in_axis_name="m"),
            split((P(), P(None, "m"), P("m")), P(None, "m"), out_axis_name="m"),
            split(
                (P(None, "b"), P("b", "m"), P("m")),
                P(None, "m"),
                in_axis_name="b",
                out_axis_name="m",
            ),
        )

    want, *got = jax.jit(all_ways)()
    for way in got:
        for a, b in zip(jax.tree.leaves(way), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "specs",
    [(P("b"), P()), (P("b"), P(None, "m")), (P("b", "m"), P("m")), (P(), P("b", "m"))],
    ids=["batch", "batch and out", "batch and in", "kernel"],
)
@on_eight_devices
def test_jit_with_shardings_makes_the_same_native_products(specs):
    warnings.filterwarnings("ignore", "native FP8 formats on")
    mesh = _mesh(b=2, m=4)
    args = normal(0, 64, 32), normal(1, 32, 24)

    @jax.jit
    def run(x, kernel):
        f = ft.partial(jus.linear, formats=jus.NATIVE_FP8)
        y, vjp = jax.vjp(f, x, kernel)
        return y, vjp(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    placed = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in zip(args, specs, strict=True)
    ]
    for a, b in zip(
        jax.tree.leaves(run(*placed)), jax.tree.leaves(run(*args)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# How x and the kernel are split, by name, and the result where a sum over devices is
# asked for.
EXPLICIT = {
    "batch": ("bsi,io->bso", P("b"), P(), None),
    "batch and out": ("bsi,io->bso", P("b"), P(None, "m"), None),
    "batch and length": ("bsi,io->bso", P("b", "m"), P(), None),
    "length alone": ("bsi,io->bso", P(None, "m"), P(), None),
    "sum": ("bsi,io->bso", P("b", None, "m"), P("m"), P("b")),
    "heads": ("bsi,ihd->bshd", P("b"), P(None, "m"), None),
    "from heads": ("bshd,hdo->bso", P("b", None, "m"), P("m"), P("b")),
    "scores": ("bshd,bthd->bhst", P("b", None, "m"), P("b", None, "m"), None),
    "on no device": ("bsi,io->bso", P("b"), None, None),
}


@pytest.mark.parametrize("inside", [False, True], ids=["arguments", "set_mesh"])
@pytest.mark.parametrize("name", EXPLICIT)
@on_eight_devices
def test_native_products_on_a_mesh_with_explicit_axes(name, inside):
    warnings.filterwarnings("ignore", "native FP8 formats on")
    subscripts, *specs, out = EXPLICIT[name]
    mesh = jax.make_mesh((2, 4), ("b", "m"), axis_types=(AxisType.Explicit,) * 2)
    sizes = dict(b=8, s=4, i=32, o=24, h=4, d=8, t=12)
    args = [
        normal(i, *(sizes[x] for x in letters))
        for i, letters in enumerate(subscripts.split("->")[0].split(","))
    ]
    cotangent = np.cos(np.arange(8 * 4 * 4 * 12, dtype=np.float32))

    def run(f, *args):
        y, vjp = jax.vjp(f, *args)
        g = jnp.asarray(cotangent[: y.size].reshape(y.shape))
        sharding = jax.typeof(y).sharding
        return y, vjp(g if sharding.mesh.empty else jax.sharding.reshard(g, sharding))

    native = ft.partial(jus.einsum_linear, subscripts, formats=jus.NATIVE_FP8)
    want = jax.jit(ft.partial(run, native))(*args)
    placed = [
        y if s is None else jax.device_put(y, NamedSharding(mesh, s))
        for y, s in zip(args, specs, strict=True)
    ]
    named = {} if out is None else {"out_sharding": NamedSharding(mesh, out)}
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        split = jax.jit(ft.partial(run, ft.partial(native, **named)))
        got = split(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(got[1], placed, strict=True):
        same = a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert same or b.sharding.is_fully_replicated


@on_eight_devices
def test_a_mixture_of_experts_refuses_tokens_on_explicit_axes():
    layer = jus.nnx.MoE(8, 16, 4, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, P("d")))
    with pytest.raises(ValueError, match="`x` must not be sharded along its tokens"):
        jax.jit(layer)(x)


@pytest.mark.parametrize("module", ["LoRALinear", "Einsum", "LinearGeneral"])
@on_eight_devices
def test_layers_in_pieces_compute_what_the_whole_does(module):
    def layer(**names):
        rngs = nnx.Rngs(0)
        if module == "Einsum":
            return jus.nnx.Einsum("bi,io->bo", (16, 24), (24,), rngs=rngs, **names)
        if module == "LinearGeneral":
            return jus.nnx.LinearGeneral(16, 24, rngs=rngs, **names)
        b = nnx.initializers.normal(1.0)
        return jus.nnx.LoRALinear(
            16, 24, lora_rank=4, b_initializer=b, rngs=rngs, **names
        )

    def run(params, x, **names):
        graph = nnx.graphdef(nnx.eval_shape(lambda: layer(**names)))
        return nnx.merge(graph, params)(x)

    whole = nnx.state(layer())
    specs = {
        "in_axis_name": {"kernel": P("m"), "lora_a": P("m")},
        "out_axis_name": {
            "kernel": P(None, "m"),
            "lora_b": P(None, "m"),
            "bias": P("m"),
        },
    }
    x = normal(1, 8, 16)
    value = lambda f: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(f(p, x)))))
    want = value(run)(whole)
    for name, by_name in specs.items():
        mapped = jax.shard_map(
            ft.partial(run, **{name: "m"}),
            mesh=_mesh(m=4),
            in_specs=(
                _specs(lambda path, x, by=by_name: by.get(path[-1], P()), whole),
                P(None, "m") if name == "in_axis_name" else P(),
            ),
            out_specs=P() if name == "in_axis_name" else P(None, "m"),
        )
        got = value(mapped)(whole)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", ["Dense", "DenseGeneral", "Einsum", "LoRADense"])
@on_eight_devices
def test_linen_layers_in_pieces_compute_what_the_whole_does(module):
    from flax import linen as nn

    init = nn.initializers.normal(1.0)
    L = jus.linen

    def layer(**names):
        match module:
            case "Dense":
                return L.Dense(24, bias_init=init, **names)
            case "DenseGeneral":
                return L.DenseGeneral((24,), bias_init=init, **names)
            case "Einsum":
                return L.Einsum((16, 24), "bi,io->bo", bias_init=init, **names)
            case _:
                return L.LoRADense(24, lora_rank=4, b_initializer=init, **names)

    def run(params, x, **names):
        return layer(**names).apply({"params": params}, x)

    x = normal(1, 8, 16)
    # Built with the names, outside of the mapping.
    whole = layer(in_axis_name="m").init(jax.random.key(0), x)["params"]
    specs = {
        "in_axis_name": {"kernel": P("m"), "lora_a": P("m")},
        "out_axis_name": {
            "kernel": P(None, "m"),
            "lora_b": P(None, "m"),
            "bias": P("m"),
        },
    }
    value = lambda f: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(f(p, x)))))
    want = value(run)(whole)
    for name, by_name in specs.items():
        mapped = jax.shard_map(
            ft.partial(run, **{name: "m"}),
            mesh=_mesh(m=4),
            in_specs=(
                _specs(lambda path, x, by=by_name: by.get(path[-1], P()), whole),
                P(None, "m") if name == "in_axis_name" else P(),
            ),
            out_specs=P() if name == "in_axis_name" else P(None, "m"),
        )
        got = value(mapped)(whole)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MEGATRON)
@on_eight_devices
def test_a_linen_model_makes_the_same_update_in_shard_map(name):
    from flax import linen as nn

    L = jus.linen

    class Model(nn.Module):
        data: str | None = None
        model: str | None = None

        @nn.compact
        def __call__(self, ids):
            batch = {"batch_axis_name": self.data}
            x = L.Embed(VOCABULARY, WIDTH, name="embed", **batch)(ids)
            block = {
                "norm": L.RMSNorm,
                "attention": ft.partial(
                    L.MultiHeadDotProductAttention, normalize_qk=True
                ),
                "use_bias": True,
                "model_axis_name": self.model,
                **batch,
            }
            x = L.TransformerStack(HEADS, 2 * WIDTH, 1, block=block, name="stack")(x)
            x = L.LayerNorm(name="norm", **batch)(x)
            return L.DenseReadout(VOCABULARY, name="readout", **batch)(x)

    def step(model, params, data, total=lambda grads: grads, **names):
        def loss(params):
            logits = model.apply({"params": params}, data[0])
            return jus.cross_entropy(logits, data[1], where=data[2], **names)

        value, grads = jax.value_and_grad(loss)(params)
        grads = total(grads)
        return value, grads, *_updated(params, grads, ADAM, SGD)

    axes = MEGATRON[name]
    data, model = (a if a in axes else None for a in ("data", "model"))
    split = Model(data, model)
    params = jax.jit(split.init)(jax.random.key(0), _data()[0])["params"]
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params
    )
    want = jax.jit(ft.partial(step, Model()))(params, _data())
    specs = _specs(_megatron, params) if model else jax.tree.map(lambda _: P(), params)

    def piece(params, piece):
        def total(grads):
            return jus.optim.sum_gradients(grads, data) if data else grads

        return step(split, params, piece, total, batch_axis_name=data)

    mapped = jax.shard_map(
        piece,
        mesh=_mesh(**axes),
        in_specs=(specs, P(data)),
        out_specs=(P(), specs, specs, specs),
    )
    got = jax.jit(mapped)(params, _data())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [None, 96])
@pytest.mark.parametrize("family", ["nnx", "linen"])
@on_eight_devices
def test_a_vocabulary_in_pieces_has_the_loss_and_gradients_of_the_whole(family, tied):
    ids, labels, where = (x[:, :6] for x in _data())

    def both(embed, readout, ids):
        x = jnp.sin(embed(ids))
        return readout(x) if tied is None else embed.attend(x)

    def layers(home, name=None, **rngs):
        split = {"vocabulary_axis_name": name, "tied": tied, **rngs}
        embed = home.Embed(VOCABULARY, 16, output_scale=0.5, **split)
        if home is jus.nnx:
            sizes, kind = (16, VOCABULARY), home.LinearReadout
        else:
            sizes, kind = (VOCABULARY,), home.DenseReadout
        return embed, kind(*sizes, out_axis_name=name, **rngs)

    def nnx_layers(name=None):
        return nnx.List(layers(jus.nnx, name, rngs=nnx.Rngs(0)))

    def loss(params, ids, labels, where, name=None):
        if family == "nnx":
            graph = nnx.graphdef(nnx.eval_shape(lambda: nnx_layers(name)))
            logits = both(*nnx.merge(graph, params), ids)
        else:
            embed, readout = layers(jus.linen, name)
            bound = embed.bind({"params": params["embed"]})
            logits = both(
                bound, lambda x: readout.apply({"params": params["readout"]}, x), ids
            )
        return jus.cross_entropy(
            logits,
            labels,
            where=where,
            mult=2.0,
            label_smoothing=0.1,
            z_loss=0.01,
            class_axis_name=name,
        )

    if family == "nnx":
        params = nnx.state(nnx_layers())
    else:
        embed, readout = layers(jus.linen, "m")  # the names have no effect here
        params = {
            "embed": embed.init(jax.random.key(0), ids)["params"],
            "readout": readout.init(jax.random.key(1), jnp.ones((1, 16)))["params"],
        }
    by_name = {"embedding": P("m"), "kernel": P(None, "m"), "bias": P("m")}
    mapped = jax.shard_map(
        ft.partial(loss, name="m"),
        mesh=_mesh(m=4),
        in_specs=(_specs(lambda path, _: by_name[path[-1]], params), P(), P(), P()),
        out_specs=P(),
    )
    data = ids, labels, where
    want, got = (jax.jit(jax.value_and_grad(f))(params, *data) for f in (loss, mapped))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    # What is in no piece is NaN, as with the whole.
    bad = jax.jit(mapped)(params, ids + VOCABULARY, labels, where)
    assert np.isnan(bad)


# The axis that an expert's hidden features are split over, inside `shard_map`.
SPLIT_HIDDEN = {
    "up": P(None, None, "model"),
    "gate": P(None, None, "model"),
    "down": P(None, "model"),
}


@on_eight_devices
def test_linen_experts_whose_hidden_features_are_split_compute_what_the_whole_do():
    x = normal(1, 24, 16)

    def run(params, x, **names):
        y, losses = jus.linen.MoE(32, 4, **names).apply({"params": params}, x)
        return jnp.sum(jnp.sin(y)) + losses.load_balance + losses.z_loss

    params = jus.linen.MoE(32, 4).init(jax.random.key(0), x)["params"]
    specs = _specs(lambda path, _: SPLIT_HIDDEN.get(path[-2], P()), params)
    mapped = jax.shard_map(
        ft.partial(run, model_axis_name="model"),
        mesh=_mesh(model=4),
        in_specs=(specs, P()),
        out_specs=P(),
    )
    want, got = (jax.jit(jax.value_and_grad(f))(params, x) for f in (run, mapped))
    _assert_close(got, want)


def _moe(**names):
    return jus.nnx.MoE(16, 32, 4, rngs=nnx.Rngs(0), **names)


def _moe_step(graph, params, x, **names):
    """Loss, gradients, and the parameters after one step of each optimiser."""

    def loss(params):
        y, losses = nnx.merge(graph, params)(x)
        value = jus.mse_loss(y, jnp.cos(x), **names)
        return value + losses.load_balance + 0.3 * losses.z_loss

    value, grads = jax.value_and_grad(loss)(params)
    return value, grads, *_updated(params, grads, ADAM, SGD)


def _assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["data", "data and model"])
@on_eight_devices
def test_a_mixture_of_experts_makes_the_same_update_in_shard_map(name):
    model = "model" if "model" in name else None
    graph, params = nnx.split(_moe())
    x = normal(1, 8, 6, 16)
    specs = P()
    if model:
        specs = _specs(lambda path, _: SPLIT_HIDDEN.get(path[-2], P()), params)
    split = _moe(batch_axis_name="data", model_axis_name=model)
    step = ft.partial(_moe_step, nnx.graphdef(split), batch_axis_name="data")
    mapped = jax.shard_map(
        step,
        mesh=_mesh(data=2, model=4),
        in_specs=(specs, P("data")),
        out_specs=(P(), specs, specs, specs),
    )
    want = jax.jit(ft.partial(_moe_step, graph))(params, x)
    _assert_close(jax.jit(mapped)(params, x), want)


@on_eight_devices
def test_experts_that_jit_keeps_on_different_devices_make_the_same_update():
    graph, params = nnx.split(_moe())
    x = normal(1, 8, 6, 16)
    step = jax.jit(ft.partial(_moe_step, graph))
    mesh = _mesh(data=2, experts=4)

    def placed(p):
        spec = P("experts") if p.ndim == 3 else P()
        return jax.device_put(p, NamedSharding(mesh, spec))

    pieces = jax.device_put(x, NamedSharding(mesh, P("data")))
    got = step(jax.tree.map(placed, params), pieces)
    _assert_close(got, step(params, x))


@pytest.mark.parametrize("name", ["in_axis_name", "out_axis_name"])
def test_pieces_of_features_need_a_shard_map_that_knows_what_varies(name):
    f = ft.partial(jus.linear, **{name: "m"})
    with pytest.raises(ValueError, match=f"`{name}='m'` needs `jax.shard_map`"):
        jax.vmap(f, axis_name="m")(jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)))
