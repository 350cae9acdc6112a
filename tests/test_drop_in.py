"""Every exported module is a drop-in for its `flax.nnx` namesake, in both NNX modes.

Graph and tree mode are set by Flax's own contexts, so one process has both; for Linen
see test_linen.py.

Driven by the exports and by the namesakes' signatures: a new module, or a new argument
of a namesake, fails with what to add to `ENTRIES`.
"""

import contextlib
import dataclasses
import functools as ft
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn, nnx
from jax import lax

import jax_unit_scaling as jus

X = jax.random.normal(jax.random.key(0), (4, 6, 8))
FLOATS = (X,)
IDS = jnp.arange(24).reshape(4, 6) % 8


def _recorder(fn):
    """`fn`, and how often it has been called, for arguments that are functions."""

    @ft.wraps(fn)
    def recorded(*args, **kwargs):
        recorded.calls += 1
        return fn(*args, **kwargs)

    recorded.calls = 0
    return recorded


def _init(key, shape, dtype=jnp.float32, out_sharding=None):
    return jnp.full(shape, 0.5, dtype)


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a module is built and called, and a value for each of its other arguments.

    Attributes:
        sizes: its required arguments; a function of (the modules, rngs) makes one that
            holds modules.
        options: another value than the default for each argument of the namesake. A
            tuple of dicts sets several at once, one dict each.
        call: the arguments of a call; a function of the module makes them.
        without: arguments whose default is all that can be tried, with the reason.
    """

    sizes: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    call: object = FLOATS
    without: dict = dataclasses.field(default_factory=dict)


def _promote(args, /, *, dtype=None, **options):
    return nnx.nn.dtypes.promote_dtype(args, dtype=dtype, **options)


def _metadata(*names):
    return {f"{name}_metadata": {"mine": 1} for name in names}


DTYPES = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "promote_dtype": _promote}
AFFINE = (
    DTYPES
    | _metadata("kernel", "bias")
    | {
        "use_bias": False,
        "kernel_init": _init,
        "bias_init": _init,
        "precision": lax.Precision.HIGHEST,
        "preferred_element_type": jnp.float32,
    }
)
NORM = (
    DTYPES
    | _metadata("scale", "bias")
    | {
        "use_bias": False,
        "use_scale": False,
        "bias_init": _init,
        "scale_init": _init,
        "epsilon": 0.1,
        "use_fast_variance": False,
    }
)
NAMED = {
    "axis_name": "a name, which only `vmap` and the like bind: see test_modules.py",
    "axis_index_groups": "groups of that name's devices",
}
CONV = {k: v for k, v in AFFINE.items()} | {
    "strides": 2,
    "padding": "VALID",
    "kernel_dilation": 2,
    "mask": np.ones((3, 8, 8)),
}
CELL = (
    DTYPES
    | _metadata("kernel", "recurrent_kernel", "bias")
    | {
        "activation_fn": jax.nn.relu,
        "gate_fn": jax.nn.hard_sigmoid,
        "kernel_init": _init,
        "recurrent_kernel_init": _init,
        "bias_init": _init,
        "carry_init": _init,
        "keep_rngs": False,
        # The default initialiser of the recurrent kernel is for float32 and wider.
        "param_dtype": ({"param_dtype": jnp.bfloat16, "recurrent_kernel_init": _init},),
    }
)


def _stepped(cell):
    return cell.initialize_carry((4, 8), nnx.Rngs(0)), X[:, 0]


def _rnn(modules, rngs):
    return modules.RNN(modules.GRUCell(8, 8, rngs=rngs), rngs=rngs)


LOOP = {
    "time_major": True,
    "return_carry": True,
}
DOT = _recorder(lambda *a, out_sharding=None, **k: lax.dot_general(*a, **k))
ENTRIES = {
    "Linear": Entry(
        {"in_features": 8, "out_features": 8}, AFFINE | {"dot_general": DOT}
    ),
    "LinearGeneral": Entry(
        {"in_features": 8, "out_features": 8},
        AFFINE
        | {
            "axis": (2,),
            "batch_axis": {0: 4},
            "dot_general": DOT,
            "dot_general_cls": lambda: DOT,
        },
    ),
    "Einsum": Entry(
        {"einsum_str": "abi,io->abo", "kernel_shape": (8, 8), "bias_shape": (8,)},
        {k: v for k, v in AFFINE.items() if k != "use_bias"}
        | {"einsum_op": _recorder(jnp.einsum)},
    ),
    "Conv": Entry(
        {"in_features": 8, "out_features": 8, "kernel_size": (3,)},
        CONV
        | {
            "input_dilation": ({"input_dilation": 2, "padding": 1},),
            "feature_group_count": ({"feature_group_count": 2},),
            "conv_general_dilated": _recorder(lax.conv_general_dilated),
        },
    ),
    "ConvTranspose": Entry(
        {"in_features": 8, "out_features": 8, "kernel_size": (3,)},
        CONV | {"transpose_kernel": True},
    ),
    "Embed": Entry(
        {"num_embeddings": 8, "features": 8},
        DTYPES | _metadata("embedding") | {"embedding_init": _init},
        (IDS,),
    ),
    "LayerNorm": Entry(
        {"num_features": 8},
        NORM | {"reduction_axes": (1, 2), "feature_axes": (2,)},
        without=NAMED,
    ),
    "RMSNorm": Entry(
        {"num_features": 8},
        {k: v for k, v in NORM.items() if "bias" not in k}
        | {"reduction_axes": (1, 2), "feature_axes": (2,)},
        without=NAMED,
    ),
    "InstanceNorm": Entry(
        {"num_features": 8}, NORM | {"feature_axes": (2,)}, without=NAMED
    ),
    "GroupNorm": Entry(
        {"num_features": 8, "num_groups": 2},
        NORM
        | {
            "reduction_axes": (1, -1),
            "group_size": ({"num_groups": None, "group_size": 2},),
        },
        without=NAMED,
    ),
    "BatchNorm": Entry(
        {"num_features": 8},
        NORM | {"use_running_average": True, "axis": 2, "momentum": 0.5},
        without=NAMED,
    ),
    "PReLU": Entry(
        {},
        DTYPES
        | {
            "negative_slope_init": 0.5,
            "promote_dtype": ({"promote_dtype": _promote, "dtype": jnp.bfloat16},),
        }
        | _metadata("negative_slope"),
    ),
    "WeightNorm": Entry(
        {"layer_instance": lambda m, rngs: m.Linear(8, 8, rngs=rngs)},
        {
            "feature_axes": None,
            "use_scale": False,
            "scale_init": lambda key, shape, dtype=jnp.float32: _init(key, shape),
            "epsilon": 1e-6,
            "dtype": jnp.float32,
            "variable_filter": nnx.PathContains("bias"),
        },
        without={
            "param_dtype": "Flax takes it and does not use it",
            "promote_dtype": "Flax takes it and does not use it",
        },
    ),
    "SpectralNorm": Entry(
        {"layer_instance": lambda m, rngs: m.Linear(8, 8, rngs=rngs)},
        {
            "n_steps": 2,
            "epsilon": 1e-6,
            "dtype": jnp.float32,
            "error_on_non_matrix": True,
            "update_stats": False,
        },
        without={"param_dtype": "Flax writes float32 into what it has made of it"},
    ),
    "Dropout": Entry(
        {"rate": 0.5},
        {"broadcast_dims": (1,), "deterministic": True, "rng_collection": "mine"},
    ),
    "MultiHeadAttention": Entry(
        {"num_heads": 2, "in_features": 8, "decode": False},
        {k: v for k, v in DTYPES.items() if k != "promote_dtype"}
        | _metadata("kernel", "out_kernel", "bias", "out_bias")
        | {
            "qkv_features": 16,
            "out_features": 6,
            "num_kv_heads": 1,
            "in_kv_features": ({"in_kv_features": 8},),
            "broadcast_dropout": (
                {"broadcast_dropout": False, "dropout_rate": 0.5}
                | {"deterministic": False},
            ),
            "dropout_rate": ({"dropout_rate": 0.5, "deterministic": False},),
            "deterministic": True,
            "precision": lax.Precision.HIGHEST,
            "kernel_init": _init,
            "out_kernel_init": _init,
            "bias_init": _init,
            "out_bias_init": _init,
            "use_bias": False,
            "attention_fn": _recorder(nnx.dot_product_attention),
            "normalize_qk": True,
            "qkv_promote_dtype": _promote,
            "out_promote_dtype": _promote,
            "ln_promote_dtype": ({"ln_promote_dtype": _promote, "normalize_qk": True},),
            "qkv_dot_general": DOT,
            "out_dot_general": DOT,
            "qkv_dot_general_cls": lambda: DOT,
            "out_dot_general_cls": lambda: DOT,
            "keep_rngs": False,
            "query_ln_scale_metadata": (
                {"query_ln_scale_metadata": {"mine": 1}, "normalize_qk": True},
            ),
            "key_ln_scale_metadata": (
                {"key_ln_scale_metadata": {"mine": 1}, "normalize_qk": True},
            ),
        },
    ),
    **{
        name: Entry(
            {"in_features": 8, "hidden_features": 8},
            {k: v for k, v in CELL.items() if (name, k) != ("SimpleCell", "gate_fn")}
            | ({"residual": True} if name == "SimpleCell" else {}),
            _stepped,
        )
        for name in ("SimpleCell", "LSTMCell", "OptimizedLSTMCell", "GRUCell")
    },
    "RNN": Entry(
        {"cell": lambda m, rngs: m.GRUCell(8, 8, rngs=rngs)},
        LOOP
        | {
            "reverse": True,
            "keep_order": ({"keep_order": True, "reverse": True},),
            "unroll": 2,
            "state_axes": {...: nnx.Carry},
            "broadcast_rngs": None,
        },
    ),
    "Bidirectional": Entry(
        {"forward_rnn": _rnn, "backward_rnn": _rnn}, LOOP | {"merge_fn": jnp.add}
    ),
    "LoRA": Entry(
        {"in_features": 8, "lora_rank": 2, "out_features": 8},
        DTYPES
        | _metadata("a", "b")
        | {
            "base_module": lambda x: x,
            "a_initializer": _init,
            "b_initializer": _init,
            "lora_param_type": nnx.Param,
        },
    ),
    "LoRALinear": Entry(
        {"in_features": 8, "out_features": 8, "lora_rank": 2},
        {
            "a_initializer": _init,
            "b_initializer": _init,
            "lora_param_type": nnx.Param,
            "lora_dtype": jnp.bfloat16,
            "lora_param_dtype": jnp.bfloat16,
            "lora_promote_dtype": _promote,
        }
        | _metadata("a", "b"),
    ),
}
# Those without a namesake.
OWN = {
    "LinearReadout": Entry({"in_features": 8, "out_features": 8}),
    "MLP": Entry({"in_features": 8, "hidden_features": 8}),
    "MoE": Entry(
        {"in_features": 8, "hidden_features": 8, "num_experts": 4},
        call=lambda _: (X,),  # not over examples: lax maps no `ragged_dot` so
    ),
    "ExpertLinear": Entry(
        {"num_experts": 2, "in_features": 8, "out_features": 8},
        call=lambda _: (X[0], jnp.array([2, 4])),
    ),
    "RecurrentHighwayCell": Entry(
        {"in_features": 8, "hidden_features": 8}, {}, _stepped
    ),
    "TransformerBlock": Entry(
        {"features": 8, "num_heads": 2, "hidden_features": 8, "index": 0, "depth": 1}
    ),
    "TransformerStack": Entry(
        {"features": 8, "num_heads": 2, "hidden_features": 8, "depth": 2}
    ),
}
NAMESAKES = {
    name: (getattr(jus.nnx, name), getattr(nnx, name))
    for name in dir(jus.nnx)
    if inspect.isclass(getattr(jus.nnx, name))
    and inspect.isclass(getattr(nnx, name, 0))
}


def _arguments(kind):
    """The arguments of `__init__`: NNX's metaclass hides the class's own."""
    found = inspect.signature(kind.__init__).parameters
    named = [
        p for p in found.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return {p.name: p.default for p in named if p.name not in ("self", "rngs")}


def _defaults(name):
    """Those that have one, but for initialisers, whose scale is what we change."""
    entry, arguments = ENTRIES[name], _arguments(NAMESAKES[name][1])
    return {
        k: default
        for k, default in arguments.items()
        if default is not inspect.Parameter.empty
        and not k.endswith(("_init", "initializer"))
        or k == "negative_slope_init"
        if k not in entry.sizes
        # our own attention takes the place of the default one
        and k != "attention_fn"
    }


def _build(modules, name, **options):
    rngs = nnx.Rngs(0)
    sizes = {
        k: v(modules, rngs) if callable(v) else v
        for k, v in (ENTRIES | OWN)[name].sizes.items()
    }
    kind = getattr(modules, name)
    arguments = inspect.signature(getattr(nnx, name, kind).__init__).parameters
    shared = {"rngs": rngs} if "rngs" in arguments else {}
    return kind(**(sizes | shared | options))


def _call(module, name):
    arguments = (ENTRIES | OWN)[name].call
    return module(*(arguments(module) if callable(arguments) else arguments))


def _traced(modules, name, options):
    """Shapes and dtypes of the output and of all parameters, and their metadata."""
    built = {}

    def run():
        module = _build(modules, name, **options)
        y = _call(module, name)
        about = {
            path: p.get_metadata("mine", None)
            for path, p in nnx.to_flat_state(nnx.state(module, nnx.Param))
        }
        built.update(module=module, about=about)
        return y, nnx.to_pure_dict(nnx.state(module, nnx.Param))

    jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)()
    shapes = jax.tree.map(lambda s: (s.shape, s.dtype), shapes)
    return shapes, built["about"], str(jaxpr).count("Precision.HIGHEST")


@contextlib.contextmanager
def _mode(mode):
    graph = mode == "graph"
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        yield


MODES = pytest.mark.parametrize("mode", ["graph", "tree"])


def test_every_namesake_and_every_argument_is_tried():
    classes = {n: kind for n, kind in vars(jus.nnx).items() if inspect.isclass(kind)}
    modules = {n for n, kind in classes.items() if issubclass(kind, nnx.Module)}
    assert {*OWN} == modules - {*NAMESAKES}
    missing = [n for n in NAMESAKES if n not in ENTRIES]
    lines = "".join(f'\n    "{n}": Entry({{...}}, {{...}}),' for n in missing)
    assert not missing, f"add to ENTRIES:{lines}"
    for name, entry in ENTRIES.items():
        tried = {*entry.sizes, *entry.options, *entry.without}
        untried = {*_arguments(NAMESAKES[name][1])} - tried
        lines = "".join(f'\n    "{k}": ...,' for k in sorted(untried))
        assert not untried, f"add to the options of {name}:{lines}"


@pytest.mark.parametrize("ours, theirs", [(jus.nnx, nnx), (jus.linen, nn)])
def test_every_module_of_flax_is_provided_or_left_out_with_a_reason(ours, theirs):
    def classes(home):
        return {name for name, kind in vars(home).items() if inspect.isclass(kind)}

    modules = {n for n in classes(theirs) if issubclass(vars(theirs)[n], theirs.Module)}
    missing = modules - classes(ours) - {*ours.LEFT_OUT}
    lines = "".join(f'\n    "{name}": "why it is left out",' for name in missing)
    assert not missing, f"provide these, or add to LEFT_OUT:{lines}"
    assert not {*ours.LEFT_OUT} & classes(ours), "provided, so not left out"


def _variants(name):
    """Sets of options: all defaults, and each other value."""
    yield "defaults", _defaults(name)
    for argument, value in ENTRIES[name].options.items():
        several = isinstance(value, tuple) and value and isinstance(value[0], dict)
        yield argument, value[0] if several else {argument: value}


# Flax would rather have the initialiser in `initialize_carry`.
@pytest.mark.filterwarnings("ignore:carry_init is provided")
@MODES
@pytest.mark.parametrize("name", ENTRIES)
def test_every_argument_does_to_shapes_dtypes_and_metadata_what_flax_does(name, mode):
    with _mode(mode):
        for argument, options in _variants(name):
            functions = {
                k: _recorder(v)
                for k, v in options.items()
                if inspect.isfunction(v)
                and not k.endswith("_cls")
                and k != "activation_fn"
            }
            if argument == "defaults":
                functions = {}
            got = _traced(jus.nnx, name, options | functions)
            uncalled = [k for k, f in functions.items() if not f.calls]
            # A carry's initialiser is called for a call without a carry.
            assert set(uncalled) <= {"carry_init"}, f"{name}: {uncalled} without effect"
            want = _traced(nnx, name, options)
            if name == "WeightNorm":  # parameters in ours, as in Flax from 0.12.12
                got, want = got[0][:1], want[0][:1]
            # Attention's own products take the precision as well.
            assert got[:2] == want[:2] and got[2:] >= want[2:], f"{name}({argument}=)"


NORMS = ("LayerNorm", "RMSNorm", "InstanceNorm", "GroupNorm", "BatchNorm")
PRODUCTS = ("Linear", "LinearGeneral", "Einsum", "Conv", "ConvTranspose", "LoRALinear")


@pytest.mark.parametrize("name", (*NORMS, *PRODUCTS, "Embed", "WeightNorm"))
def test_every_argument_computes_what_flax_computes_up_to_the_factor(name):
    variants = [
        options
        for argument, options in _variants(name)
        # What these make is added, and not by the same factor.
        if argument not in ("bias_init", "b_initializer") or name in NORMS
    ]

    @jax.jit
    def run():
        pairs = []
        for options in variants:
            plain = _build(nnx, name, **options)
            unit = _build(jus.nnx, name, **options)
            weights = nnx.state(unit, nnx.Param)
            if name in PRODUCTS:  # in Flax's own, which differ in scale
                weights = nnx.state(plain, nnx.Param)
                nnx.update(unit, weights)
            elif name == "Embed":
                nnx.update(plain, weights)
            elif name == "WeightNorm":
                nnx.update(plain.layer_instance, nnx.state(unit.layer_instance))
            pairs.append((_call(unit, name), _call(plain, name)))
            if name == "BatchNorm":
                pairs[-1] = [
                    (y, m.mean[...])
                    for y, m in zip(pairs[-1], (unit, plain), strict=True)
                ]
        return pairs

    for options, (got, want) in zip(variants, run(), strict=True):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
            scale = 1.0
            if name in (*PRODUCTS, "WeightNorm"):
                scale = np.sqrt((a @ a) / (b @ b))
            # bfloat16 has eight bits, of sums of a few roundings.
            narrow = any(value is jnp.bfloat16 for value in options.values())
            atol = 0.03 if narrow else 1e-4
            error = np.max(np.abs(a - scale * b)) / (np.std(a) or 1.0)
            assert error < atol, f"{name}({options}): {error}"


def _stacked(name):
    """Two modules whose parameters lie behind each other, as for a scan over layers."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        kind, entry = NAMESAKES[name][0], ENTRIES[name]
        return kind(**entry.sizes, rngs=rngs)

    return build(nnx.Rngs(0).split(2))


@MODES
@pytest.mark.parametrize("name", [*ENTRIES, *OWN])
def test_modules_work_under_every_transformation(name, mode):
    """Traced alone: what NNX objects to, it objects to while tracing."""
    with _mode(mode):
        module = _build(jus.nnx, name)

        def loss(module):
            outputs = jax.tree.leaves(_call(module, name))
            return sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in outputs)

        nnx.eval_shape(nnx.jit(loss), module)
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        shapes = jax.tree.map(jnp.shape, params)

        def of_params(params, rest):
            return loss(nnx.merge(graph, params, rest, copy=True))

        def gradient(loss):
            if mode == "graph":
                return nnx.eval_shape(nnx.grad(loss), module)
            # Here the gradient is of all that is given, so not of integers.
            of_split = nnx.grad(lambda p, r: loss(nnx.merge(graph, p, r, copy=True)))
            return nnx.eval_shape(of_split, params, rest)

        for found in (gradient(loss), gradient(nnx.remat(loss))):
            assert jax.tree.map(jnp.shape, found) == shapes

        @jax.jit
        def of_split(params, rest):
            return jax.grad(of_params)(params, rest)

        assert jax.tree.map(jnp.shape, jax.eval_shape(of_split, params, rest)) == shapes

        def of_examples(params, rest, x):
            return nnx.merge(graph, params, rest, copy=True)(x)

        if (ENTRIES | OWN)[name].call is FLOATS:
            mapped = jax.vmap(of_examples, in_axes=(None, None, 0))
            outputs = jax.eval_shape(mapped, params, rest, X[:, None])
            assert all(y.shape[0] == 4 for y in jax.tree.leaves(outputs))


SCANNED = ("Linear", "Conv", "LayerNorm", "BatchNorm", "Dropout", "LoRALinear")


@MODES
@pytest.mark.parametrize("name", SCANNED)
def test_modules_are_stacked_by_vmap_and_run_by_scan(name, mode):
    with _mode(mode):
        stack = _stacked(name)
        params = nnx.state(stack, nnx.Param)
        assert all(p.shape[0] == 2 for p in jax.tree.leaves(params))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        got = nnx.jit(run)(X, stack)
        if name == "Dropout":
            assert 0 < np.mean(np.asarray(got) == 0) < 1
            return
        want = X
        for i in range(2):
            layer = _build(jus.nnx, name)
            nnx.update(layer, jax.tree.map(lambda p, i=i: p[i], params))
            want = layer(want)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_flax_loads_into_the_unit_scaled_module(tmp_path):
    def states(modules):
        built = {n: _build(modules, n) for n in ENTRIES if n != "WeightNorm"}
        return built, {n: nnx.state(m, nnx.Param) for n, m in built.items()}

    _, plain = states(nnx)
    modules, empty = states(jus.nnx)
    pure = {n: nnx.to_pure_dict(s) for n, s in plain.items() if jax.tree.leaves(s)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "flax", pure)
        checkpointer.wait_until_finished()
        target = {n: nnx.to_pure_dict(empty[n]) for n in pure}
        loaded = checkpointer.restore(tmp_path / "flax", target)
    for name, values in loaded.items():
        nnx.replace_by_pure_dict(empty[name], values)
        nnx.update(modules[name], empty[name])
        got = nnx.to_pure_dict(nnx.state(modules[name], nnx.Param))
        jax.tree.map(np.testing.assert_array_equal, got, pure[name])
    assert len(loaded) == len(ENTRIES) - 2  # dropout has no parameters
    y = modules["Linear"](X)
    np.testing.assert_allclose(
        y, X @ pure["Linear"]["kernel"] / 8**0.5, rtol=1e-4, atol=1e-5
    )
