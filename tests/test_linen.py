"""Linen modules: drop-in for Flax's, twins of the NNX ones, and their metadata."""

import dataclasses
import functools as ft
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import jax_unit_scaling as jus
from jax_unit_scaling.parameters import named_parameters

L, N = jus.linen, jus.nnx
WIDTH = 64


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _rms(x):
    return np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))


X = _normal(1, 4, 32, WIDTH)
IDS = jax.random.randint(jax.random.key(2), (4, 64), 0, 32)
MASK = np.tril(np.ones((3, WIDTH, WIDTH)))


def _same(params):
    return params


def _renamed(pattern, replacement):
    """NNX's names for Linen's, by path."""
    return lambda params: {
        re.sub(pattern, replacement, path): x for path, x in params.items()
    }


def _joined(gates, biased):
    """One kernel for all gates, as in NNX, of Linen's one for each."""

    def join(params):
        joined = {}
        for source in "ih":
            kinds = ("bias", "kernel") if source in biased else ("kernel",)
            for kind in kinds:
                parts = [params[f"{source}{gate}/{kind}"] for gate in gates]
                joined[f"dense_{source}/{kind}"] = jnp.concatenate(parts, -1)
        return joined

    return join


@dataclasses.dataclass(frozen=True)
class Twin:
    """A Linen module and the NNX one that computes the same.

    Attributes:
        linen: the module.
        nnx: makes its twin from `rngs`.
        x: the input.
        to_nnx: a dictionary of NNX's parameters from one of Linen's, by path.
        unit: whether all gradients of a single use are at unit scale.
        biased: whether biases are to be other than zero.
        call: applies either module.
    """

    linen: nn.Module
    nnx: Callable[..., nnx.Module]
    x: jax.Array = dataclasses.field(default_factory=lambda: X)
    to_nnx: Callable[[dict[str, Any]], dict[str, Any]] = _same
    unit: bool = True
    biased: bool = True
    call: Callable[..., Any] = lambda module, x: module(x)


_block = dict(index=1, depth=3, use_bias=True, mult=2.0)
TWINS = {
    "Dense": Twin(L.Dense(WIDTH), ft.partial(N.Linear, WIDTH, WIDTH)),
    "DenseReadout": Twin(
        L.DenseReadout(WIDTH), ft.partial(N.LinearReadout, WIDTH, WIDTH), unit=False
    ),
    "DenseGeneral": Twin(
        L.DenseGeneral((8, 8), output_scale=2.0),
        ft.partial(N.LinearGeneral, WIDTH, (8, 8), output_scale=2.0),
        unit=False,
    ),
    "Einsum": Twin(
        L.Einsum((WIDTH, WIDTH), "...a,ab->...b"),
        ft.partial(N.Einsum, "...a,ab->...b", (WIDTH, WIDTH), (WIDTH,)),
    ),
    "Embed": Twin(L.Embed(32, WIDTH), ft.partial(N.Embed, 32, WIDTH), x=IDS),
    "LoRA": Twin(
        L.LoRA(4, WIDTH),
        ft.partial(N.LoRA, WIDTH, 4, WIDTH),
        unit=False,
    ),
    "LoRADense": Twin(
        L.LoRADense(WIDTH, lora_rank=4, output_scale=2.0),
        ft.partial(N.LoRALinear, WIDTH, WIDTH, lora_rank=4, output_scale=2.0),
        unit=False,
    ),
    "Embed, tied": Twin(
        L.Embed(32, WIDTH, tied=256, output_scale=0.5, logits_scale=3.0),
        ft.partial(N.Embed, 32, WIDTH, tied=256, output_scale=0.5, logits_scale=3.0),
        x=IDS,
        unit=False,
        call=lambda embed, x: embed.attend(jnp.sin(embed(x))),
    ),
    "DenseGeneral, batched": Twin(
        L.DenseGeneral((8, 8), batch_dims=(0,)),
        ft.partial(N.LinearGeneral, WIDTH, (8, 8), batch_axis={0: 4}),
    ),
    "PReLU": Twin(  # one number has no scale
        L.PReLU(negative_slope_init=0.25), lambda rngs: N.PReLU(0.25), unit=False
    ),
    "WeightNorm": Twin(
        L.WeightNorm(L.Dense(WIDTH)),
        lambda rngs: N.WeightNorm(N.Linear(WIDTH, WIDTH, rngs=rngs), rngs=rngs),
        to_nnx=_renamed("^layer_instance/kernel/scale$", "scales/('kernel',)"),
    ),
    "Bidirectional": Twin(
        L.Bidirectional(
            L.RNN(L.SimpleCell(WIDTH)),
            L.RNN(L.SimpleCell(WIDTH)),
            merge_fn=jus.weighted_add,
        ),
        lambda rngs: N.Bidirectional(
            N.RNN(N.SimpleCell(WIDTH, WIDTH, rngs=rngs)),
            N.RNN(N.SimpleCell(WIDTH, WIDTH, rngs=rngs)),
            merge_fn=jus.weighted_add,
            rngs=rngs,
        ),
        x=X[:, :6],
        to_nnx=_renamed(r"cell/(\w)/", r"cell/dense_\1/"),
        unit=False,
    ),
    "Conv": Twin(L.Conv(WIDTH, (3,)), ft.partial(N.Conv, WIDTH, WIDTH, (3,))),
    "Conv, scaled": Twin(
        L.Conv(WIDTH, (3,), output_scale=2.0),
        ft.partial(N.Conv, WIDTH, WIDTH, (3,), output_scale=2.0),
        unit=False,
    ),
    "ConvTranspose, scaled": Twin(
        L.ConvTranspose(WIDTH, (3,), output_scale=2.0),
        ft.partial(N.ConvTranspose, WIDTH, WIDTH, (3,), output_scale=2.0),
        unit=False,
    ),
    "Conv, masked": Twin(
        L.Conv(WIDTH, 3, mask=MASK, padding="VALID", strides=2),
        ft.partial(N.Conv, WIDTH, WIDTH, 3, mask=MASK, padding="VALID", strides=2),
        unit=False,
    ),
    "ConvTranspose": Twin(
        L.ConvTranspose(WIDTH, (3,)), ft.partial(N.ConvTranspose, WIDTH, WIDTH, (3,))
    ),
    "LayerNorm": Twin(
        L.LayerNorm(reduction_axes=(1, 2)),
        ft.partial(N.LayerNorm, WIDTH, reduction_axes=(1, 2)),
        call=lambda norm, x: norm(x, mask=jnp.cos(50 * x) > 0),
    ),
    "InstanceNorm": Twin(L.InstanceNorm(), ft.partial(N.InstanceNorm, WIDTH)),
    "RMSNorm": Twin(L.RMSNorm(), ft.partial(N.RMSNorm, WIDTH)),
    "GroupNorm": Twin(L.GroupNorm(4), ft.partial(N.GroupNorm, WIDTH, 4)),
    "BatchNorm": Twin(
        L.BatchNorm(use_running_average=False),
        ft.partial(N.BatchNorm, WIDTH, use_running_average=False),
    ),
    "Dropout": Twin(
        L.Dropout(0.3),
        ft.partial(N.Dropout, 0.3),
        call=lambda module, x: module(
            x,
            deterministic=False,
            **{"rng" if isinstance(module, nn.Module) else "rngs": jax.random.key(3)},
        ),
    ),
    "MultiHeadDotProductAttention": Twin(
        L.MultiHeadDotProductAttention(
            4, num_kv_heads=2, normalize_qk=True, rotary_base=1e4, mult=2.0, length=48
        ),
        ft.partial(
            N.MultiHeadAttention,
            4,
            WIDTH,
            num_kv_heads=2,
            decode=False,
            normalize_qk=True,
            rotary_base=1e4,
            mult=2.0,
            length=48,
        ),
        unit=False,
    ),
    "MultiHeadAttention": Twin(
        L.MultiHeadAttention(4, local_window_size=8, formats=jus.SIMULATED_FP8),
        ft.partial(
            N.MultiHeadAttention,
            4,
            WIDTH,
            decode=False,
            local_window_size=8,
            formats=jus.SIMULATED_FP8,
        ),
        unit=False,
    ),
    "MLP": Twin(L.MLP(96), ft.partial(N.MLP, WIDTH, 96), unit=False),
    "ExpertDense": Twin(
        L.ExpertDense(num_experts=3, features=WIDTH),
        ft.partial(N.ExpertLinear, 3, WIDTH, WIDTH),
        x=X.reshape(-1, WIDTH),
        call=lambda module, x: module(x, jnp.array([40, 50, 38])),
    ),
    "MoE": Twin(
        L.MoE(96, 4),
        ft.partial(N.MoE, WIDTH, 96, 4),
        unit=False,
        call=lambda module, x: jnp.concatenate([y.ravel() for y in _flat(module(x))]),
    ),
    "TransformerBlock": Twin(
        L.TransformerBlock(4, 96, **_block),
        ft.partial(N.TransformerBlock, WIDTH, 4, 96, **_block),
        unit=False,
    ),
    "TransformerStack": Twin(
        L.TransformerStack(
            4,
            96,
            1,
            remat=True,
            block={
                "placement": L.branch_norm,
                "gated": False,
                "activation": jus.gelu,
                "norm": L.LayerNorm,
            },
        ),
        ft.partial(
            N.TransformerStack,
            WIDTH,
            4,
            96,
            depth=1,
            placement=N.branch_norm,
            gated=False,
            activation=jus.gelu,
            norm=N.LayerNorm,
        ),
        to_nnx=_renamed(r"blocks_(\d+)", r"blocks/\1"),
        unit=False,
    ),
    "SimpleCell": Twin(
        L.SimpleCell(WIDTH, residual=True),
        ft.partial(N.SimpleCell, WIDTH, WIDTH, residual=True),
        to_nnx=_renamed(r"^(\w)/", r"dense_\1/"),
        unit=False,
        call=lambda cell, x: cell(jnp.cos(x), x)[1],
    ),
    "LSTMCell": Twin(
        L.LSTMCell(WIDTH, gate_fn=jax.nn.hard_sigmoid),
        ft.partial(N.LSTMCell, WIDTH, WIDTH, gate_fn=jax.nn.hard_sigmoid),
        to_nnx=_renamed("^if/", "if_/"),
        unit=False,
        call=lambda cell, x: cell((jnp.sin(x), jnp.cos(x)), x)[1],
    ),
    "OptimizedLSTMCell": Twin(
        L.OptimizedLSTMCell(WIDTH),
        ft.partial(N.OptimizedLSTMCell, WIDTH, WIDTH),
        to_nnx=_joined("ifgo", "h"),
        unit=False,
        call=lambda cell, x: cell((jnp.sin(x), jnp.cos(x)), x)[1],
    ),
    "GRUCell": Twin(  # Linen's has a bias more, here at its initial zero
        L.GRUCell(WIDTH),
        ft.partial(N.GRUCell, WIDTH, WIDTH),
        to_nnx=_joined("rzn", "i"),
        unit=False,
        biased=False,
        call=lambda cell, x: cell(jnp.cos(x), x)[1],
    ),
    "RecurrentHighwayCell": Twin(
        L.RecurrentHighwayCell(WIDTH),
        ft.partial(N.RecurrentHighwayCell, WIDTH, WIDTH),
        unit=False,
        call=lambda cell, x: cell(jnp.cos(x), x)[1],
    ),
    "RNN": Twin(
        L.RNN(L.SimpleCell(WIDTH), time_major=True, reverse=True, keep_order=True),
        lambda rngs: N.RNN(
            N.SimpleCell(WIDTH, WIDTH, rngs=rngs),
            time_major=True,
            reverse=True,
            keep_order=True,
        ),
        x=X[:6],
        to_nnx=_renamed(r"cell/(\w)/", r"cell/dense_\1/"),
        unit=False,
    ),
}
MODULES = [
    name
    for name, value in vars(L).items()
    if isinstance(value, type) and issubclass(value, nn.Module)
]


def _flat(tree):
    return jax.tree.leaves(tree)


def test_every_export_has_its_twin():
    # NNX has no such cells, and another power iteration: see their own tests.
    missing = {*MODULES} - {*TWINS} - {"MGUCell", "ConvLSTMCell", "SpectralNorm"}
    assert not missing, "add to TWINS: " + " ".join(
        f'"{name}": Twin(L.{name}(...), ft.partial(N.{name}, ...)),' for name in missing
    )


def _by_path(params):
    """The arrays of parameters of either family, by path."""
    return dict(zip(named_parameters(params), jax.tree.leaves(params), strict=True))


def _gradients(apply, params, x):
    """Output, and the cotangents of parameters and of an input of numbers."""

    @jax.jit
    def run(params, x):
        y, vjp, *_ = jax.vjp(apply, params, x)
        return y, vjp(_normal(7, *y.shape).astype(y.dtype))

    y, (grads, dx) = run(params, x)
    return y, _by_path(grads), dx


def _abstract(twin):
    """The shapes of a Linen module's variables: parameters, and the rest."""
    init = nn.init(twin.call, twin.linen)
    variables = dict(jax.eval_shape(init, jax.random.key(0), twin.x))
    return variables.pop("params", {}), variables


def _of_linen(twin):
    """Parameters at unit scale, and a function of them and of the input."""
    abstract, rest = _abstract(twin)
    random = np.random.default_rng(0)

    def value(leaf, info):
        (shape,) = (s.shape for s in jax.tree.leaves(leaf))
        x = random.standard_normal(shape).astype(np.float32)
        scale = {"bias": 0.1 if twin.biased else 0.0, "norm": 0.1}.get(info.role, 1.0)
        return (info.role == "norm") + scale * x

    values = [value(*about) for about in named_parameters(abstract).values()]
    params = jax.tree.unflatten(jax.tree.structure(abstract), values)
    rest = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), rest)

    def apply(params, x):
        run = nn.apply(twin.call, twin.linen, mutable=list(rest))
        return run({"params": params, **rest}, x)[0]

    return params, apply


def _of_nnx(twin, values):
    graph, params, rest = nnx.split(twin.nnx(rngs=nnx.Rngs(0)), nnx.Param, ...)
    paths = list(named_parameters(params))
    assert {*paths} == {*values}
    leaves = [values[path] for path in paths]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return params, lambda params, x: twin.call(
        nnx.merge(graph, params, rest, copy=True), x
    )


@pytest.mark.parametrize("name", TWINS)
def test_a_module_is_the_twin_of_the_nnx_one(name):
    """Same function, same gradients, same scales; and unit scale."""
    twin = TWINS[name]
    params, apply = _of_linen(twin)
    y, grads, dx = _gradients(apply, params, twin.x)
    nnx_params, nnx_apply = _of_nnx(twin, twin.to_nnx(_by_path(params)))
    want, nnx_grads, nnx_dx = _gradients(nnx_apply, nnx_params, twin.x)
    pairs = [(y, want), (dx, nnx_dx)]
    converted = twin.to_nnx(grads)
    assert {*converted} == {*nnx_grads}
    pairs += [(converted[path], nnx_grads[path]) for path in nnx_grads]
    for got, want in pairs:
        if got.dtype != jax.dtypes.float0:
            # Sums of up to 256 terms, added up in another order: 256^1/2 roundings of
            # 2^-24, and as many more through a block's ten layers.
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    floats = [g for g in (y, dx, *grads.values()) if g.dtype != jax.dtypes.float0]
    for tensor in floats:
        if twin.unit:  # what is added to gains is 1%
            atol = 0.06 + 4 / np.sqrt(tensor.size)
            np.testing.assert_allclose(_rms(tensor), 1, atol=atol)


def test_roles_are_those_of_the_nnx_twins():
    for name, twin in TWINS.items():
        if twin.to_nnx is not _same:
            continue
        params, _ = _abstract(twin)
        graph = nnx.eval_shape(lambda twin=twin: twin.nnx(rngs=nnx.Rngs(0)))
        want = named_parameters(nnx.state(graph, nnx.Param))
        got = named_parameters(params)
        assert {k: v[1] for k, v in got.items()} == {
            k: v[1] for k, v in want.items()
        }, name


# -- Drop-in for Flax ------------------------------------------------------------------

NAMESAKES = [name for name in MODULES if hasattr(nn, name)]
INITS = {"kernel_init", "recurrent_kernel_init", "embedding_init", "attention_fn"}
REQUIRED = {
    "layer_instance": lambda home: home.Dense(8),
    "forward_rnn": lambda home: home.RNN(home.GRUCell(8)),
    "backward_rnn": lambda home: home.RNN(home.GRUCell(8)),
    "cell": lambda home: home.GRUCell(8),
    "features": 8,
    "num_embeddings": 16,
    "kernel_size": (3,),
    "shape": (WIDTH, 8),
    "num_heads": 4,
    "rate": 0.5,
}
BF16 = jnp.bfloat16


def _lax_product(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


def _lax_conv(*args, **kwargs):
    return jax.lax.conv_general_dilated(*args, **kwargs)


_dtypes = [{"dtype": BF16}, {"param_dtype": BF16}]
_linear = [
    *_dtypes,
    {"use_bias": False},
    {"precision": "highest"},
    {"dot_general": _lax_product},
    {"dot_general_cls": lambda: _lax_product},
    {"kernel_init": nn.initializers.ones, "bias_init": nn.initializers.ones},
]
_conv = [
    *_dtypes,
    {"use_bias": False, "padding": "VALID"},
    {"strides": (2,), "kernel_dilation": (2,)},
    {"kernel_size": (3, 5)},
    {"kernel_size": 3, "padding": "CIRCULAR"},
]
_norm = [*_dtypes, {"use_scale": False}, {"epsilon": 0.1}]
_axes = [{"reduction_axes": (1, 2), "feature_axes": (-1, 1)}]
_with_bias = [{"use_bias": False}, {"bias_init": nn.initializers.ones}]
_cell = [
    {"dtype": BF16},
    # Flax's orthogonal initialiser computes in float32 alone.
    {"param_dtype": BF16, "recurrent_kernel_init": nn.initializers.ones},
    {"activation_fn": jax.nn.relu},
    {"carry_init": nn.initializers.ones},
]
_attention = [
    *_linear[:4],
    {"qkv_features": 32, "out_features": 24},
    {"dropout_rate": 0.5, "deterministic": True, "broadcast_dropout": False},
    {"normalize_qk": True, "force_fp32_for_softmax": True},
    {"decode": True},
    {"attention_fn": nn.dot_product_attention, "precision": None},
    {"qkv_dot_general": _lax_product, "out_dot_general_cls": lambda: _lax_product},
    {"out_kernel_init": nn.initializers.ones, "out_bias_init": nn.initializers.ones},
]
OPTIONS = {
    "Dense": _linear,
    "DenseGeneral": [
        *_linear,
        {"features": (2, 4), "axis": (-1, 1)},
        {"features": (2, 4), "batch_dims": (0,)},
        {"axis": 2, "batch_dims": (1, 0)},
    ],
    "PReLU": [{"param_dtype": BF16}, {"negative_slope_init": 0.5}],
    "WeightNorm": [
        *_dtypes,
        {"use_scale": False, "epsilon": 0.1},
        {"feature_axes": None, "scale_init": nn.initializers.zeros},
        {"feature_axes": (0, 1)},
        {"variable_filter": None, "layer_instance": nn.Dense(8)},
        {"variable_filter": {"bias"}},
    ],
    "SpectralNorm": [
        *_dtypes,
        {"n_steps": 3, "epsilon": 0.1},
        {"n_steps": 0},
        {"error_on_non_matrix": True, "collection_name": "mine"},
    ],
    "Bidirectional": [
        {"time_major": True, "return_carry": True},
        {"merge_fn": jnp.add},
    ],
    "MGUCell": [
        *_cell,
        {"gate_fn": jax.nn.hard_sigmoid, "reset_gate": False},
        {"forget_bias_init": nn.initializers.zeros},
    ],
    "ConvLSTMCell": [*_dtypes, {"use_bias": False, "padding": "CIRCULAR"}],
    "Einsum": [*_linear[:4], {"einsum_str": "bta,ac->btc"}],
    "Embed": _dtypes,
    "Conv": [
        *_conv,
        {"feature_group_count": 4, "input_dilation": 2, "padding": 3},
        {"kernel_size": (3,), "padding": "CAUSAL"},
        {"conv_general_dilated": _lax_conv},
        {"mask": np.tril(np.ones((3, WIDTH, 8)))},
    ],
    "ConvTranspose": [*_conv[:-1], {"transpose_kernel": True}],
    "LayerNorm": [*_norm, *_with_bias, *_axes],
    "RMSNorm": [*_norm, *_axes],
    "InstanceNorm": [*_norm, *_with_bias],
    "GroupNorm": [*_norm, *_with_bias, {"num_groups": None, "group_size": 8}],
    "BatchNorm": [*_norm, *_with_bias, {"momentum": 0.5}, {"axis": 1}],
    "Dropout": [{"broadcast_dims": (1,)}, {"rate": 1.0}, {"rng_collection": "params"}],
    "MultiHeadDotProductAttention": _attention,
    "MultiHeadAttention": _attention,
    "SimpleCell": [*_cell, {"residual": True}],
    "LSTMCell": _cell,
    "OptimizedLSTMCell": _cell,
    "GRUCell": [*_cell, {"gate_fn": jax.nn.hard_sigmoid}],
    "RNN": [{"time_major": True, "unroll": 2}, {"return_carry": True, "reverse": True}],
}


def _fields(cls):
    named = {field.name: field for field in dataclasses.fields(cls)}
    return {k: v for k, v in named.items() if k not in ("parent", "name")}


@pytest.mark.parametrize("name", NAMESAKES)
def test_a_module_takes_the_arguments_of_its_namesake(name):
    ours, theirs = getattr(L, name), getattr(nn, name)
    names = list(_fields(theirs))
    positional = [k for k, v in _fields(ours).items() if not v.kw_only]
    assert positional[: len(names)] == names
    for field in names:
        got, want = _fields(ours)[field].default, _fields(theirs)[field].default
        assert field in INITS or got is want or got == want, field
    calls = [inspect.signature(c.__call__).parameters for c in (ours, theirs)]
    if name != "RNN":  # whose own are handed on
        assert [*calls[0]][: len(calls[1])] == [*calls[1]]


def _shapes(cls, name, options):
    """Shapes and dtypes of variables and output."""
    home = L if cls is getattr(L, name) else nn
    required = {
        k: v(home) if callable(v) else v
        for k, v in REQUIRED.items()
        if k in _fields(cls)
    }
    is_cell = name.endswith("Cell")
    call = {"update_stats": True} if name == "SpectralNorm" else {}
    if name == "Einsum" and "einsum_str" not in options:
        options = {"einsum_str": "...a,ab->...b", **options}
    if name == "BatchNorm":
        options = {"use_running_average": False, **options}
    if name == "Dropout":
        options = {"deterministic": False, **options}
    if name == "GroupNorm" and not options.get("group_size"):
        options = {"num_groups": 4, **options}
    module = cls(**required | options)
    x = IDS if name == "Embed" else X
    if len(options.get("kernel_size", ())[1:] if is_window(options) else ()):
        x = X[:, :, None].repeat(5, 2)

    def run():
        keys = {k: jax.random.key(i) for i, k in enumerate(("params", "dropout"))}
        if is_cell:
            carry = module.initialize_carry(jax.random.key(0), x[:, 0].shape)
            return module.init_with_output(keys, carry, x[:, 0])
        return module.init_with_output(keys, x, **call)

    y, variables = jax.eval_shape(run)
    return jax.tree.map(lambda a: (a.shape, a.dtype), (y, nn.unbox(variables)))


def is_window(options):
    return isinstance(options.get("kernel_size"), tuple)


@pytest.mark.parametrize("name", NAMESAKES)
def test_a_module_is_a_drop_in_for_its_namesake_under_every_option(name):
    """The same variables and outputs, in names, shapes and dtypes."""
    assert name in OPTIONS, f'add to OPTIONS: "{name}": [{{"dtype": BF16}}, ...],'
    for options in [{}, *OPTIONS[name]]:
        ours, theirs = (_shapes(getattr(h, name), name, options) for h in (L, nn))
        assert ours == theirs, options


def test_dropout_and_batch_statistics_are_those_of_flax():
    norm = L.BatchNorm(use_running_average=False), nn.BatchNorm(False)
    (y, got), (want, stats) = (m.init_with_output(jax.random.key(0), X) for m in norm)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    new = [
        m.apply(v, X, mutable="batch_stats")[1]["batch_stats"]
        for m, v in zip(norm, (got, stats), strict=True)
    ]
    jax.tree.map(ft.partial(np.testing.assert_allclose, rtol=1e-6), *new)
    key = {"dropout": jax.random.key(0)}
    dropped = L.Dropout(0.5).apply({}, X, False, rngs=key)
    plain = nn.Dropout(0.5).apply({}, X, False, rngs=key)
    np.testing.assert_allclose(dropped, plain * 0.5**0.5, rtol=1e-6)
    np.testing.assert_array_equal(L.Dropout(0.5).apply({}, X, True), X)


def test_decoding_does_not_depend_on_how_a_sequence_is_cut():
    x = X[:2, :12]
    options = dict(num_kv_heads=2, rotary_base=1e4, length=12, is_causal=True)
    whole = L.MultiHeadDotProductAttention(4, **options)
    decoder = L.MultiHeadDotProductAttention(4, decode=True, **options)
    variables = jax.jit(decoder.init)(jax.random.key(0), x)
    cache, params = variables["cache"], variables["params"]
    want = whole.apply({"params": params}, x)
    step = jax.jit(ft.partial(decoder.apply, mutable="cache"))
    pieces, start = [], 0
    for length in (7, 5):
        piece = x[:, start : start + length]
        y, new = step({"params": params, "cache": cache}, piece)
        cache, start = new["cache"], start + length
        pieces.append(y)
    # float32 rounding of sums of 64 terms, in another order.
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`inputs_q` must fit the cache"):
        decoder.apply(variables, X[:2], mutable="cache")


@pytest.mark.parametrize(
    "module, x, message",
    [
        (L.DenseGeneral(8, batch_dims=(1,)), X, "`batch_dims` must be the leading"),
        (L.Conv(8, 3, mask=np.zeros((3, WIDTH, 8))), X, "`mask` must have"),
        (L.InstanceNorm(feature_axes=0), X, "`feature_axes` must leave out"),
        (L.MultiHeadAttention(7), X, "`num_heads` must divide"),
        (
            L.MultiHeadAttention(4, qk_attn_weights_einsum_cls=lambda: jnp.einsum),
            X,
            "`qk_attn_weights_einsum_cls`",
        ),
        (
            L.MultiHeadAttention(4, decode=True, attention_fn=nn.dot_product_attention),
            X,
            "`decode` must be False",
        ),
    ],
)
def test_what_is_not_supported_says_so(module, x, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), x)


def test_a_call_that_is_not_supported_says_so():
    def init(module, *args, **kwargs):
        return jax.eval_shape(
            lambda: module.init_with_output(jax.random.key(0), *args, **kwargs)
        )

    attention = L.MultiHeadAttention(4)
    for kwargs, message in (
        ({"sow_weights": True}, "`sow_weights` must be False"),
        ({"inputs_v": X}, "`inputs_k` must be given"),
        ({"inputs_k": X, "inputs_kv": X}, "`inputs_kv` must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            init(attention, X, **kwargs)
    assert init(attention, X, inputs_kv=X[:, :8])[0].shape == X.shape
    with pytest.raises(ValueError, match="`attend` sums the gradients"):
        L.Embed(8, 8).init(jax.random.key(0), X, method="attend")
    norm = L.SpectralNorm(L.Conv(8, (3,)), error_on_non_matrix=True)
    with pytest.raises(ValueError, match="`error_on_non_matrix` refuses"):
        init(norm, X, update_stats=True)


# -- What NNX has not, or not in this form ---------------------------------------------

_long = _normal(3, 16, 64, 48)
# A cell, its input and, of its parameters, how many.
CELLS = {
    "MGUCell": (L.MGUCell(64), _long),
    "MGUCell, no reset": (L.MGUCell(64, reset_gate=False), _long),
    "MGUCell, no bias": (
        L.MGUCell(64, forget_bias_init=nn.initializers.zeros, forget_bias=0.0),
        _long,
    ),
    "ConvLSTMCell": (L.ConvLSTMCell(16, (3,)), _normal(3, 4, 64, 32, 16)),
}


def _of_rnn(cell, x):
    rnn = L.RNN(cell)
    params = jax.jit(rnn.init)(jax.random.key(0), x)["params"]
    return params, lambda params, x: rnn.apply({"params": params}, x)


@pytest.mark.parametrize("name", CELLS)
def test_cells_keep_unit_scale_over_many_steps_and_a_decade_backward(name):
    cell, x = CELLS[name]
    params, apply = _of_rnn(cell, x)
    y, grads, dx = _gradients(apply, params, x)
    # As for the other cells: the factors leave out what activation functions, and here
    # the one gate for both uses, do to correlations.
    np.testing.assert_allclose(_rms(y[:, 48:]), 1, atol=0.12)
    for tensor in (dx, *grads.values()):
        assert 0.1 < _rms(tensor) < 10


def test_gradients_of_these_cells_are_true_up_to_a_positive_constant(truly):
    short = {k: (cell, x[:2, :6]) for k, (cell, x) in CELLS.items()}
    made = {k: (*_of_rnn(cell, x), x) for k, (cell, x) in short.items()}

    def run():
        return {k: _gradients(f, params, x)[1] for k, (params, f, x) in made.items()}

    got, true = run(), truly(run)
    for name in made:
        for path, a in got[name].items():
            a, b = (np.asarray(g, np.float64).ravel() for g in (a, true[name][path]))
            assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.9999, (name, path)


@pytest.mark.parametrize("reset", [True, False])
def test_a_minimal_gated_unit_is_that_of_flax_between_unit_scaled_operations(reset):
    x, h = _normal(0, 3, WIDTH), _normal(1, 3, WIDTH)
    cell = L.MGUCell(WIDTH, reset_gate=reset)
    params = nn.unbox(jax.jit(cell.init)(jax.random.key(0), h, x))["params"]
    got, _ = cell.apply({"params": params}, h, x)
    of = {
        k: jus.linear(x if k[0] == "i" else h, v["kernel"], v.get("bias"))
        for k, v in params.items()
    }
    f = (of["if"] + of["hf"]) * 2**-0.5
    mean = 2**-0.5  # of f, whose bias starts at one
    gate = jax.nn.sigmoid(f)
    z = np.random.default_rng(0).standard_normal(2**20) + mean
    p = 1 / (1 + np.exp(-z))
    c = 1 / _rms(p)
    inner = c * gate * of["hn"] if reset else of["hn"]
    n = jus.tanh((of["in"] + inner) * 2**-0.5)
    if reset:
        n = n * _rms(1 - p) / _rms((1 - p) * np.sqrt((1 + (c * p) ** 2) / 2))
    want = jus.gated_carry(h, n, f - mean, bias=mean)
    # The means over 2^20 are known to 1e-3.
    np.testing.assert_allclose(got, want, rtol=0.01, atol=0.01)
    written = (want - gate * h) / ((1 - gate) * n)  # one constant
    np.testing.assert_allclose(written, np.median(written), rtol=1e-3)


def test_the_output_scale_of_a_convolution_multiplies_all_but_its_bias():
    init = {"bias_init": nn.initializers.ones}
    plain = L.Conv(8, (3,), **init)
    params = plain.init(jax.random.key(0), X)
    got = L.Conv(8, (3,), output_scale=3.0, **init).apply(params, X)
    np.testing.assert_allclose(got - 1, 3 * (plain.apply(params, X) - 1), atol=1e-4)


def test_a_convolutional_lstm_is_that_of_flax_between_unit_scaled_operations():
    x, h, c = (_normal(i, 3, 10, 16) for i in range(3))
    cell = L.ConvLSTMCell(16, (3,))
    params = nn.unbox(jax.jit(cell.init)(jax.random.key(0), (c, h), x))["params"]
    (got_c, got_h), y = cell.apply({"params": params}, (c, h), x)
    convolved = [
        jus.conv(a, params[k]["kernel"], params[k]["bias"])
        for k, a in (("ih", x), ("hh", h))
    ]
    i, g, f, o = jnp.split(jus.weighted_add(*convolved), 4, axis=-1)
    want = jus.gated_carry(c, jus.tanh(g), f, i, bias=1.0)
    np.testing.assert_allclose(got_c, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, jus.gated(jus.tanh(want), o), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y, got_h)


def test_spectral_norm_is_that_of_its_operation_and_keeps_its_statistics():
    norm = L.SpectralNorm(L.Dense(32, use_bias=False), n_steps=2)
    y, variables = norm.init_with_output(jax.random.key(0), X, update_stats=False)
    params, stats = variables["params"], variables["batch_stats"]
    u, sigma = (stats[f"layer_instance/kernel/{name}"] for name in ("u", "sigma"))
    np.testing.assert_array_equal(sigma, 1)
    kernel, new_u, new_sigma = jus.spectral_norm(
        nn.unbox(params)["layer_instance"]["kernel"], u, n_steps=2
    )
    want = jus.linear(X, kernel)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert _infos(params) == {"layer_instance/kernel": ("weight", WIDTH, 32, 1)}
    got, new = norm.apply(variables, X, update_stats=True, mutable="batch_stats")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    new = new["batch_stats"]
    np.testing.assert_allclose(new["layer_instance/kernel/u"], new_u, rtol=1e-5)
    np.testing.assert_allclose(new["layer_instance/kernel/sigma"], new_sigma, rtol=1e-5)


@pytest.mark.slow
def test_muon_makes_the_same_update_of_the_same_cell_and_turns_no_part_of_it():
    muon, adam = jus.optim.muon(0.5), jus.optim.adam(0.5)

    def updates(params, optimiser=muon):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
        return _by_path(optimiser.update(grads, optimiser.init(params), params)[0])

    for name in (n for n in TWINS if n.endswith("Cell") or n in ("RNN", "MLP")):
        twin = TWINS[name]
        params, _ = _of_linen(twin)
        nnx_params, _ = _of_nnx(twin, twin.to_nnx(_by_path(params)))
        got, want = twin.to_nnx(updates(params)), updates(nnx_params)
        of_adam = updates(nnx_params, adam)
        for path in want:
            # float32 through five products of up to 96 terms, for a matrix
            np.testing.assert_allclose(got[path], want[path], rtol=1e-3, atol=1e-4)
            turned = not np.allclose(want[path], of_adam[path], rtol=1e-3)
            assert turned == (name == "MLP" and "kernel" in path), (name, path)


# -- Transformations, and what a parameter's box carries -------------------------------


class _Layer(nn.Module):
    """A residual layer in the form that `nn.scan` asks for, with sharded weights."""

    @nn.compact
    def __call__(self, x, _=None):
        init = nn.with_partitioning(nn.initializers.normal(1.0), ("data", "model"))

        def branch(x):
            def inner(_, x):
                y = L.RMSNorm(name="norm")(x)
                return L.Dense(WIDTH, kernel_init=init, name="dense")(y)

            return L.at_depth(inner, 3)(self, x)

        return jus.residual_apply(branch, x, tau=0.5), None


def _scanned(layer=_Layer):
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()


INFOS = {
    "dense/bias": ("bias", None, None, 3),
    "dense/kernel": ("weight", WIDTH, WIDTH, 3),
    "norm/scale": ("norm", None, None, 3),
}


def _infos(params):
    return {
        path: dataclasses.astuple(info)
        for path, (_, info) in named_parameters(params).items()
    }


def _grad(module, params, x=X):
    def loss(params):
        y, _ = module.apply({"params": params}, x)
        return jnp.sum(y * jnp.cos(y)), y

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_scan_over_layers_with_remat_is_the_loop_over_them():
    module = _scanned(nn.remat(_Layer))
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    assert _infos(params) == INFOS
    got, y = _grad(module, params)
    assert _infos(got) == INFOS
    assert params["dense"]["kernel"].value.value.shape == (3, WIDTH, WIDTH)

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x, _ = _Layer(name=str(i))(x)
            return x, None

    apart = {str(i): jax.tree.map(lambda p, i=i: p[i], params) for i in range(3)}
    grads, want = _grad(Loop(), apart)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for i in range(3):
        for a, b in zip(_flat(got), _flat(grads[str(i)]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5 * _rms(b))


def test_jit_of_a_module_is_the_module_alone_and_under_the_others():
    plain = L.TransformerBlock(4, 96, 0, 1)
    params = jax.jit(plain.init)(jax.random.key(0), X)
    jitted = nn.jit(L.TransformerBlock)(4, 96, 0, 1)
    # Their random numbers differ, as in Flax.
    made = jax.tree.map(jnp.shape, jitted.init(jax.random.key(0), X))
    assert made == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(
        jitted.apply(params, X), plain.apply(params, X), rtol=1e-5, atol=1e-5
    )
    stack, same = _scanned(nn.remat(nn.jit(_Layer))), _scanned()
    params = jax.jit(same.init)(jax.random.key(0), X)["params"]
    got, want = _grad(stack, params), _grad(same, params)
    assert _infos(got[0]) == INFOS
    for a, b in zip(_flat(got), _flat(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * _rms(b))
    mapped = nn.vmap(
        nn.jit(L.Dense),
        in_axes=0,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )(8)
    y, variables = mapped.init_with_output(jax.random.key(0), X)
    kernel = nn.unbox(variables)["params"]["kernel"]
    np.testing.assert_allclose(y[1], jus.linear(X[1], kernel[1]), rtol=1e-5, atol=1e-5)


def test_vmap_over_models_is_each_of_them():
    options = dict(in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
    xs = X.reshape(2, -1, WIDTH)
    module = nn.vmap(L.Dense, **options, metadata_params={nn.PARTITION_NAME: None})(8)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), xs)
    ((kernel, info),) = (
        v for k, v in named_parameters(variables["params"]).items() if "kernel" in k
    )
    assert (info.role, info.fan_in, kernel.value.shape) == ("weight", 64, (2, 64, 8))
    for i in range(2):
        one = jax.tree.map(lambda p, i=i: p[i], variables)
        want = L.Dense(8).apply(one, xs[i])
        np.testing.assert_allclose(y[i], want, rtol=1e-5, atol=1e-5)


def test_a_box_keeps_the_names_of_shardings():
    """Flax's convention: `nn.get_partition_spec`, with the axis that scan adds."""
    spec = jax.sharding.PartitionSpec
    abstract = jax.eval_shape(_scanned().init, jax.random.key(0), X)
    specs = nn.get_partition_spec(abstract)["params"]
    assert specs["dense"]["kernel"] == spec("layers", "data", "model")
    assert specs["dense"]["bias"] == spec()
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    logical = L.DenseGeneral(
        (8, 8),
        kernel_init=nn.with_logical_partitioning(
            nn.initializers.normal(1.0), ("embed", "heads", "size")
        ),
    )
    specs = nn.get_partition_spec(jax.eval_shape(logical.init, jax.random.key(0), X))
    rules = [("embed", "data"), ("heads", "model"), ("size", None)]
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)["params"]
    assert shardings["kernel"].spec == spec("data", "model", None)


def test_metadata_of_the_users_own_goes_on_top():
    init = nn.initializers.normal(1.0)
    module = L.Dense(8, kernel_init=L.with_metadata(init, role="output", depth=5))
    params = module.init(jax.random.key(0), X)["params"]
    assert _infos(params)["kernel"] == ("output", WIDTH, 8, 5)
    with pytest.raises(ValueError, match="`about` may have role, fan_in"):
        L.with_metadata(init, fan=3)
    with pytest.raises(ValueError, match="`depth` must be a positive integer"):
        L.set_depth(params, 0)
    plain = nn.Dense(
        8, kernel_init=nn.with_partitioning(init, (None, None)), use_bias=False
    )
    params = plain.init(jax.random.key(0), X)["params"]
    about = {"kernel": {"role": "weight", "fan_in": WIDTH}}
    ((row,),) = [jus.optim.report(params, 1.0, overrides=about)]
    assert row.factor == WIDTH**-0.5


def test_roles_survive_optax_and_a_checkpoint(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    module = _scanned()
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    optimiser = jus.optim.adam(0.5)
    state = optimiser.init(params)
    updates, state = jax.jit(optimiser.update)(_grad(module, params)[0], state, params)
    new = optax.apply_updates(params, updates)
    assert _infos(new) == _infos(updates) == INFOS
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", new)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "params", jax.tree.map(jnp.zeros_like, new)
        )
    assert _infos(restored) == INFOS
    jax.tree.map(np.testing.assert_array_equal, restored, new)


# -- A whole model ---------------------------------------------------------------------


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = L.Embed(32, 32, name="embed")(ids)
        x = L.TransformerStack(4, 48, 2, name="stack")(x)
        x = L.LayerNorm(name="norm")(x)
        return L.DenseReadout(32, name="readout")(x)


class _Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = N.Embed(32, 32, rngs=rngs)
        self.stack = N.TransformerStack(32, 4, 48, depth=2, rngs=rngs)
        self.norm = N.LayerNorm(32, rngs=rngs)
        self.readout = N.LinearReadout(32, 32, rngs=rngs)

    def __call__(self, ids):
        return self.readout(self.norm(self.stack(self.embed(ids))))


MODELS = Twin(
    _Linen(), _Nnx, x=IDS[:, :16], to_nnx=_renamed(r"blocks_(\d+)", r"blocks/\1")
)


def _trained(params, apply, steps):
    """Parameters and losses of a few steps on sequences that count upwards."""
    optimiser = jus.optim.adam(0.5)

    @jax.jit
    def run(params):
        ids = (jnp.arange(17) + jnp.arange(0, 32, 4)[:, None]) % 32

        def loss(params):
            return jus.cross_entropy(apply(params, ids[:, :-1]), ids[:, 1:])

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        carry = params, optimiser.init(params)
        (params, _), losses = jax.lax.scan(step, carry, length=steps)
        return params, losses

    return run(params)


def test_a_language_model_trains_as_its_nnx_twin_does():
    _, apply = _of_linen(MODELS)
    params = jax.jit(MODELS.linen.init)(jax.random.key(0), MODELS.x)["params"]
    for path, (leaf, info) in named_parameters(params).items():
        if info.role in ("weight", "output") and info.fan_in:
            # four standard errors of the rms of 1024 values or more
            np.testing.assert_allclose(_rms(leaf.value), 1, atol=0.09, err_msg=path)
    nnx_params, nnx_apply = _of_nnx(MODELS, MODELS.to_nnx(_by_path(params)))
    rows, nnx_rows = (
        {row.path: row for row in jus.optim.report(p, 0.5)}
        for p in (params, nnx_params)
    )
    renamed = {
        path: dataclasses.replace(row, path=path)
        for path, row in MODELS.to_nnx(rows).items()
    }
    assert renamed == nnx_rows
    params, losses = _trained(params, apply, 30)
    nnx_params, nnx_losses = _trained(nnx_params, nnx_apply, 30)
    # The first steps agree to rounding, which Adam's division by small gradients and
    # training then amplify.
    np.testing.assert_allclose(losses[:5], nnx_losses[:5], rtol=1e-4)
    assert losses[0] > 3 and losses[-1] < 0.5
