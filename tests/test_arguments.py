"""A wrong argument of a module is refused by the name that the user wrote.

Driven by the exports and by the constructors' signatures, the namesakes' too: a new
module or argument fails with what to add. Nothing is compiled: modules are built and
called on shapes alone.
"""

import dataclasses
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import jax_unit_scaling as jus

N, L = jus.nnx, jus.linen
X = jnp.ones((4, 6, 8))


def _all(names, *wrong):
    return dict.fromkeys(names.split(), wrong)


FUNCTIONS = """
    activation activation_fn gate_fn attention attention_fn norm placement residual_rule
    merge_fn constraint base_module a_initializer b_initializer kernel_init bias_init
    scale_init embedding_init carry_init recurrent_kernel_init activation_bias_init
    forget_bias_init out_kernel_init out_bias_init promote_dtype qkv_promote_dtype
    out_promote_dtype ln_promote_dtype lora_promote_dtype dot_general dot_general_cls
    qkv_dot_general qkv_dot_general_cls out_dot_general out_dot_general_cls einsum_op
    conv_general_dilated conv_general_dilated_cls qk_attn_weights_einsum_cls
    attn_weights_value_einsum_cls
"""
BOOLEANS = """
    use_bias use_scale use_fast_variance force_float32_reductions force_fp32_for_softmax
    broadcast_dropout decode deterministic normalize_qk keep_rngs is_causal gated remat
    residual reset_gate transpose_kernel reverse keep_order time_major return_carry
    error_on_non_matrix update_stats use_running_average
"""
METADATA = """
    a_metadata b_metadata kernel_metadata bias_metadata scale_metadata
    embedding_metadata recurrent_kernel_metadata negative_slope_metadata
    out_kernel_metadata out_bias_metadata query_ln_scale_metadata key_ln_scale_metadata
"""
WRONG = {
    **_all(FUNCTIONS, "gelu", 1.0),
    **_all(BOOLEANS, "no", 1.5),
    **_all(METADATA, "mine", 1),
    **_all("dtype param_dtype lora_dtype lora_param_dtype", int, "float99"),
    **_all("preferred_element_type", int, "float99"),
    **_all("num_heads num_kv_heads num_experts", 0, -1, 1.5, "8"),
    **_all("num_selected", 0, 9, 1.5, "8"),
    **_all("num_groups group_size num_embeddings kernel_size", 0, -1, 1.5, "8"),
    **_all("feature_group_count lora_rank tied length unroll depth", 0, 1.5, "8"),
    **_all("features in_features out_features hidden_features", -1, 1.5, "8"),
    **_all("num_features qkv_features in_kv_features", -1, 1.5, "8"),
    **_all("index n_steps", -1, 1.5, "8"),
    **_all("output_scale logits_scale mult rotary_base", 0.0, -1.0, math.nan, "1", X),
    **_all("rate dropout_rate momentum", -0.1, 1.1, math.nan, "a"),
    **_all("epsilon", -1.0, math.nan, "a"),
    **_all("negative_slope_init rebias forget_bias", math.nan, "a"),
    **_all("axis_name batch_axis_name in_axis_name out_axis_name", 1.5, "unbound"),
    **_all("model_axis_name vocabulary_axis_name", 1.5, "unbound"),
    **_all("axis reduction_axes feature_axes batch_dims broadcast_dims", 7, "a", 1.5),
    **_all("strides kernel_dilation input_dilation", 0, "a", (1, 1)),
    **_all("padding", "EXACT", 1.5),
    **_all("local_window_size", -1, "a", (1, 2, 3)),
    **_all("formats", "fp8", jus.E4M3),
    **_all("implementation", "triton", 1),
    **_all("mask", "a", np.ones((2, 2))),
    **_all("rngs", 0, "key"),
    **_all("rng_collection collection_name", 1),
    **_all("einsum_str", 1, "nonsense"),
    **_all("kernel_shape shape", "a", (8, 1.5)),
    **_all("bias_shape", "a", (1.5,)),
    **_all("cell forward_rnn backward_rnn layer_instance", 1, "a"),
    **_all("block batch_axis", "a", 1),
    "no_such_option": (1,),
}
UNCHECKED = {
    **_all("precision axis_index_groups", "JAX's own, handed on as they are"),
    **_all("state_axes broadcast_rngs split_rngs variable_filter", "Flax's filters"),
    **_all("variable_axes variable_broadcast variable_carry", "Flax's filters"),
    **_all("lora_param_type", "any type of variable"),
    **_all("name parent", "Linen's own"),
}


def _modules(home, base):
    return {
        name: kind
        for name, kind in vars(home).items()
        if inspect.isclass(kind) and issubclass(kind, base)
    }


NNX, LINEN = _modules(N, nnx.Module), _modules(L, nn.Module)
# The required arguments of any module, by name; of a few another one.
SIZES = {
    **dict.fromkeys("in_features out_features features num_features".split(), 8),
    **{"hidden_features": 8, "num_heads": 2, "num_experts": 4, "num_embeddings": 8},
    **{"kernel_size": (3,), "lora_rank": 2, "index": 0, "depth": 1, "rate": 0.5},
    **{"kernel_shape": (8, 8), "shape": (8, 8), "einsum_str": "abi,io->abo"},
}
NNX_SIZES = {
    "rngs": lambda: nnx.Rngs(0),
    "cell": lambda: N.GRUCell(8, 8, rngs=nnx.Rngs(0)),
    "forward_rnn": lambda: N.RNN(N.GRUCell(8, 8, rngs=nnx.Rngs(0))),
    "backward_rnn": lambda: N.RNN(N.GRUCell(8, 8, rngs=nnx.Rngs(0))),
    "layer_instance": lambda: N.Linear(8, 8, rngs=nnx.Rngs(0)),
}
LINEN_SIZES = {
    "cell": lambda: L.GRUCell(8),
    "forward_rnn": lambda: L.RNN(L.GRUCell(8)),
    "backward_rnn": lambda: L.RNN(L.GRUCell(8)),
    "layer_instance": lambda: L.Dense(8),
}
# What else a module needs to be built and called at all, or for an option to count.
ALSO = {
    "Dropout": {"deterministic": False},
    "Einsum": {"einsum_str": "abi,io->abo"},
    "GroupNorm": {"num_groups": 2},
    "BatchNorm": {"use_running_average": False},
    "MultiHeadAttention": {"decode": False},
    "MultiHeadDotProductAttention": {"decode": False},
}
WITH = {
    "group_size": {"num_groups": None},
    "dropout_rate": {"deterministic": False},
    "broadcast_dropout": {"dropout_rate": 0.5, "deterministic": False},
    "ln_promote_dtype": {"normalize_qk": True},
    "bias_init": {"use_bias": True},
    "input_dilation": {"padding": 1},
}
# A module that hands its further arguments on: to which.
HANDS_ON = {
    "MLP": "Linear",
    "MoE": "ExpertLinear",
    "TransformerBlock": "MLP",
    "TransformerStack": "TransformerBlock",
    "RecurrentHighwayCell": "Linear",
}


def _parameters(kind):
    """Of all its constructors: those it has from its bases take the rest."""
    found = [
        p
        for base in kind.__mro__
        if "__init__" in vars(base) and base not in (nnx.Module, nn.Module, object)
        for p in inspect.signature(base.__init__).parameters.values()
    ]
    return [p for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _nnx_arguments(name):
    names = {p.name for p in _parameters(NNX[name])}
    handed = _nnx_arguments(HANDS_ON[name]) if name in HANDS_ON else set()
    # Those that are its own say, of the layers inside.
    inside = {"in_features", "out_features", "in_axis_name", "out_axis_name", "index"}
    return (names | (handed - inside)) - {"self", "role"}


def _linen_arguments(name):
    return {f.name for f in dataclasses.fields(LINEN[name]) if f.init}


def _required(kind, special):
    wanted = {
        p.name for p in _parameters(kind) if p.default is p.empty or p.name == "rngs"
    }
    return {
        name: special[name]() if name in special else SIZES[name]
        for name in wanted - {"self", "role"}
    }


def _inputs(name):
    match name:
        case "Embed":
            return (jnp.zeros((4, 6), int),)
        case "ExpertLinear" | "ExpertDense":
            return X[0], jnp.array([6, 0, 0, 0])
        case "ConvLSTMCell":
            return (X, X), X
        case "LSTMCell" | "OptimizedLSTMCell":
            return (X[0], X[0]), X[0]
        case _ if name.endswith("Cell"):
            return X[0], X[0]
    return (X,)


def _run_nnx(name, **options):
    """Builds and calls it."""
    module = NNX[name](**_required(NNX[name], NNX_SIZES) | ALSO.get(name, {}) | options)
    jax.tree.map(jnp.shape, module(*_inputs(name)))
    if options.get("tied"):
        module.attend(X)


def _run_linen(name, **options):
    """Builds, initialises and calls it: names of axes count in the last alone."""

    def made(options):
        kind, also = LINEN[name], ALSO.get(name, {})
        return kind(**_required(kind, LINEN_SIZES) | also | options)

    call = {"update_stats": True} if name == "SpectralNorm" else {}
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    made(options).init(rngs, *_inputs(name), **call)
    variables = made({}).init(rngs, *_inputs(name), **call)
    mutable = {"mutable": ["batch_stats"]}
    made(options).apply(variables, *_inputs(name), rngs=rngs, **mutable, **call)


FAMILIES = {
    "nnx": (NNX, _nnx_arguments, _run_nnx),
    "linen": (LINEN, _linen_arguments, _run_linen),
}
MODULES = [(family, name) for family, (kinds, *_) in FAMILIES.items() for name in kinds]


def test_every_argument_of_every_module_is_tried():
    known = {*WRONG, *UNCHECKED}
    for family, name in MODULES:
        missing = FAMILIES[family][1](name) - known
        lines = "".join(f'\n    **_all("{k}", ...),' for k in sorted(missing))
        assert not missing, f"{family}.{name}: add to WRONG or UNCHECKED:{lines}"


@pytest.mark.parametrize("family, name", MODULES)
def test_each_wrong_argument_is_refused_by_name(family, name):
    _, arguments, run = FAMILIES[family]
    jax.eval_shape(lambda: run(name))  # which nothing is wrong with
    failed = []
    for option in sorted((arguments(name) | {"no_such_option"}) & {*WRONG}):
        also = WITH.get(option, {})
        also = {k: v for k, v in also.items() if k in arguments(name)}
        for wrong in WRONG[option]:
            try:
                jax.eval_shape(lambda o={**also, option: wrong}: run(name, **o))
            except (TypeError, ValueError) as e:
                if not re.search(rf"[`']{option}\b", str(e)):
                    failed.append(f"{option}={wrong!r}: {type(e).__name__}: {e}")
            except Exception as e:
                failed.append(f"{option}={wrong!r}: {e!r}")
            else:
                failed.append(f"{option}={wrong!r} is accepted")
    assert not failed, "\n".join(failed)


# -- What Flax takes, whatever its annotations say -------------------------------------

IMAGE, TEXT = jnp.ones((2, 6, 7, 4)), jnp.ones((2, 5, 4))
DIAGONAL = "bik,kjj->bij"


def _in_nnx(make):
    return lambda home, x: make(home, nnx.Rngs(0))(x)


def _in_linen(make):
    return lambda home, x: make(home).init_with_output(jax.random.key(0), x)[0]


# Each of a home, which is Flax's or ours, and an input.
TAKEN = {
    "nnx kernel_size": (
        _in_nnx(lambda m, r: m.Conv(4, 4, np.array([3, 2]), rngs=r)),
        IMAGE,
    ),
    "linen kernel_size": (_in_linen(lambda m: m.Conv(4, np.array([3, 2]))), IMAGE),
    "nnx sizes": (
        _in_nnx(lambda m, r: m.LinearGeneral(4, (np.int64(3), np.int32(2)), rngs=r)),
        TEXT,
    ),
    "nnx out_features": (
        _in_nnx(lambda m, r: m.LinearGeneral(4, np.array([3, 2]), rngs=r)),
        TEXT,
    ),
    "linen features": (_in_linen(lambda m: m.DenseGeneral(np.array([3, 2]))), TEXT),
    "linen axis": (_in_linen(lambda m: m.DenseGeneral(3, axis=np.int64(-1))), TEXT),
    "linen batch_dims": (_in_linen(lambda m: m.DenseGeneral(3, batch_dims=0)), TEXT),
    "nnx kernel_shape": (
        _in_nnx(lambda m, r: m.Einsum("bik,kj->bij", np.array([4, 3]), rngs=r)),
        TEXT,
    ),
    "nnx diagonal": (
        _in_nnx(lambda m, r: m.Einsum(DIAGONAL, (4, 3, 3), rngs=r)),
        TEXT,
    ),
    "linen diagonal": (
        _in_linen(lambda m: m.Einsum((4, 3, 3), DIAGONAL, use_bias=False)),
        TEXT,
    ),
    "nnx reduction_axes": (
        _in_nnx(lambda m, r: m.LayerNorm(4, reduction_axes=np.array([-1]), rngs=r)),
        TEXT,
    ),
    "linen reduction_axes": (
        _in_linen(lambda m: m.LayerNorm(reduction_axes=np.array([-2, -1]))),
        TEXT,
    ),
    "nnx unroll": (
        _in_nnx(lambda m, r: m.RNN(m.GRUCell(4, 3, rngs=r), unroll=True)),
        TEXT,
    ),
    "linen unroll": (_in_linen(lambda m: m.RNN(m.GRUCell(3), unroll=False)), TEXT),
    "linen strides": (
        _in_linen(lambda m: m.ConvTranspose(3, (3, 3), 2, kernel_dilation=2)),
        IMAGE,
    ),
    "nnx padding": (
        _in_nnx(lambda m, r: m.Conv(4, 3, (2, 2), padding="same_lower", rngs=r)),
        IMAGE,
    ),
    "linen padding": (
        _in_linen(lambda m: m.ConvTranspose(3, (2, 2), padding="valid")),
        IMAGE,
    ),
}


@pytest.mark.parametrize("call, x", TAKEN.values(), ids=TAKEN)
def test_what_flax_takes_is_taken(call, x):
    flax, ours = (nnx, N) if call.__qualname__.startswith("_in_nnx") else (nn, L)
    want = jax.eval_shape(lambda: call(flax, x))
    assert jax.eval_shape(lambda: call(ours, x)) == want


@pytest.mark.parametrize("family, name", MODULES)
def test_numpys_integers_are_sizes(family, name, monkeypatch):
    """Those of any module, alone or in a tuple; `monkeypatch` puts its sizes back."""
    for key, size in SIZES.items():
        if isinstance(size, tuple):
            monkeypatch.setitem(SIZES, key, tuple(map(np.int64, size)))
        elif isinstance(size, int):
            monkeypatch.setitem(SIZES, key, np.int32(size))
    jax.eval_shape(lambda: FAMILIES[family][2](name))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: N.LayerNorm("8", rngs=nnx.Rngs(0)), "`num_features`"),
        (lambda: N.RMSNorm(8.0, rngs=nnx.Rngs(0)), "`num_features`"),
        (lambda: N.MultiHeadAttention(2, 8, "8", rngs=nnx.Rngs(0)), "`qkv_features`"),
        (
            lambda: N.MultiHeadAttention(2, 8, 8, 8.5, rngs=nnx.Rngs(0)),
            "`out_features`",
        ),
    ],
)
def test_a_positional_size_is_refused_by_its_name(make, match):
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize("depth", [0, True, 1.5, "2"])
def test_depth_is_a_positive_integer_of_python_or_numpy(depth):
    layer = N.Linear(4, 4, rngs=nnx.Rngs(0))
    N.set_depth(layer, np.int64(6))
    assert jus.optim.report(nnx.state(layer), 1.0)[0].depth == 6
    boxed = L.set_depth({"w": jnp.ones(3)}, np.int64(6))
    assert type(boxed["w"].depth) is int
    for write in (lambda: N.set_depth(layer, depth), lambda: L.set_depth({}, depth)):
        with pytest.raises(ValueError, match="`depth` must be a positive integer"):
            write()
    info = jus.optim.ParameterInfo("weight", np.int64(8), depth=np.int32(2))
    assert info == jus.optim.ParameterInfo("weight", 8, depth=2)
    jus.optim.multi_steps(jus.optim.sgd(1.0), np.int64(2))
