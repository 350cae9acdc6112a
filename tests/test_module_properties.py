"""Properties of the constructors of the NNX modules, over sizes and options.

Valid options build a module that runs, at about unit scale; of wrong ones see
test_arguments.py.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import nnx
from hypothesis import given, settings, strategies as st

import jax_unit_scaling as jus

# The same examples in each run, so that a failure is that of a change.
EXACT = settings(max_examples=3, deadline=None, derandomize=True, database=None)

SIZE = st.sampled_from([32, 48, 64])
DTYPE = st.sampled_from([None, jnp.bfloat16, jnp.float16])
FORMATS = st.sampled_from([None, jus.SIMULATED_FP8])
CONSTRAINT = st.sampled_from([jus.to_output_scale, None, jus.gmean])
WINDOW = st.sampled_from([(3,), (5,)])

COMMON = {"dtype": DTYPE}
PRODUCT = {**COMMON, "formats": FORMATS, "constraint": CONSTRAINT}
BIASED = {**PRODUCT, "use_bias": st.booleans()}
NORM = {**COMMON, "epsilon": st.sampled_from([1e-6, 1e-3])}
AFFINE = {**NORM, "use_bias": st.booleans(), "use_scale": st.booleans()}
MULT = st.sampled_from([0.5, 1.0])
# The geometric mean with its query's and key's factors is far from attention's own: a
# softmax of small logits sends back little.
ATTENTION = {
    "constraint": st.sampled_from([jus.to_output_scale, None]),
    "mult": MULT,
    "rotary_base": st.sampled_from([None, 1e4]),
}
CONV = {
    **BIASED,
    "strides": st.sampled_from([1, 2]),
    "kernel_dilation": st.sampled_from([1, 2]),
    "padding": st.sampled_from(["SAME", "VALID", "CIRCULAR", 1]),
}
GATED = st.sampled_from([(True, jus.silu_glu), (False, jus.gelu)])


_normal = ft.partial(normal, 7)


def _run(module, features):
    return module(_normal(16, 8, features))


def _run_cell(cell, features):
    carry = jax.tree.map(
        lambda c: _normal(*c.shape), cell.initialize_carry((64, features), nnx.Rngs(0))
    )
    return cell(carry, _normal(64, features))[1]


def _sized(name, *rest, **more):
    """A module of the features of its input, and a few sizes behind them."""
    return lambda n, **k: getattr(jus.nnx, name)(
        n, *rest, **{"rngs": nnx.Rngs(0)} | more | k
    )


# How it is built for an input of n features, its options, and how it is called.
MODULES = {
    "Linear": (_sized("Linear", 48), BIASED, _run),
    "LinearGeneral": (_sized("LinearGeneral", (4, 12)), BIASED, _run),
    "Einsum": (
        lambda n, **k: jus.nnx.Einsum(
            "...i,ij->...j", (n, 48), (48,), rngs=nnx.Rngs(0), **k
        ),
        PRODUCT,
        _run,
    ),
    "Embed": (
        lambda n, **k: jus.nnx.Embed(99, n, rngs=nnx.Rngs(0), **k),
        {**COMMON, "tied": st.sampled_from([None, 64])},
        lambda m, n: m(jnp.arange(64) % 99),
    ),
    "Conv": (_sized("Conv", 48, (3,)), CONV, _run),
    "ConvTranspose": (_sized("ConvTranspose", 48, (3,)), CONV, _run),
    "LayerNorm": (_sized("LayerNorm"), AFFINE, _run),
    "RMSNorm": (_sized("RMSNorm"), NORM | {"use_scale": st.booleans()}, _run),
    "GroupNorm": (_sized("GroupNorm", num_groups=4), AFFINE, _run),
    "InstanceNorm": (_sized("InstanceNorm"), AFFINE, _run),
    "BatchNorm": (
        _sized("BatchNorm"),
        {**AFFINE, "momentum": st.sampled_from([0.5, 0.9])},
        _run,
    ),
    "Dropout": (
        lambda n, **k: jus.nnx.Dropout(**{"rate": 0.5} | k, rngs=nnx.Rngs(0)),
        {"rate": st.sampled_from([0.0, 0.1, 0.5])},
        _run,
    ),
    "PReLU": (
        lambda n, **k: jus.nnx.PReLU(**k),
        {
            "negative_slope_init": st.sampled_from([0.01, 0.25]),
            "constraint": CONSTRAINT,
        },
        _run,
    ),
    "MultiHeadAttention": (
        lambda n, **k: jus.nnx.MultiHeadAttention(
            4, n, decode=False, rngs=nnx.Rngs(0), **k
        ),
        {**BIASED, **ATTENTION, "length": st.sampled_from([None, 8])},
        _run,
    ),
    "MLP": (_sized("MLP", 96), {**BIASED, "gated": GATED}, _run),
    "TransformerBlock": (
        _sized("TransformerBlock", 4, 96, index=0, depth=2),
        {**PRODUCT, **ATTENTION, "gated": GATED},
        _run,
    ),
    "TransformerStack": (
        _sized("TransformerStack", 4, 96, depth=2),
        {**PRODUCT, **ATTENTION, "gated": GATED},
        _run,
    ),
    "LoRA": (
        _sized("LoRA", 4, 48, b_initializer=nnx.initializers.normal(1.0)),
        PRODUCT,
        _run,
    ),
    "LoRALinear": (
        _sized("LoRALinear", 48, lora_rank=4),
        # In Flax `dtype` is that of the base alone, and the sum is promoted.
        {k: v for k, v in BIASED.items() if k != "dtype"},
        _run,
    ),
    "MoE": (
        _sized("MoE", 96, 4),
        {**PRODUCT, "num_selected": st.integers(1, 4), "gated": GATED},
        lambda m, n: _run(m, n)[0],
    ),
    **{
        name: (_sized(name, 48), {"formats": FORMATS, "constraint": CONSTRAINT}, run)
        for name, run in (
            ("SimpleCell", _run_cell),
            ("LSTMCell", _run_cell),
            ("OptimizedLSTMCell", _run_cell),
            ("GRUCell", _run_cell),
            ("RecurrentHighwayCell", _run_cell),
        )
    },
}
# They take modules, and have tests of their own.
OTHERS = {"RNN", "Bidirectional", "WeightNorm", "SpectralNorm", "ExpertLinear"}
OTHERS |= {"LinearReadout"}  # `Linear`, at another scale


def test_every_module_is_here():
    modules = {
        name
        for name, value in vars(jus.nnx).items()
        if isinstance(value, type) and issubclass(value, nnx.Module)
    }
    assert modules == {*MODULES} | OTHERS


def _chosen(data, options):
    """Some of the options; the gate and the activation that fits it are one."""
    chosen = {k: data.draw(v) for k, v in options.items() if data.draw(st.booleans())}
    if "gated" in chosen:
        chosen["gated"], chosen["activation"] = chosen["gated"]
    return chosen


# Without a constraint, or under another one, a factor is off by the root of a ratio of
# sizes, here 3 at most; attention's output and the sums of a stack are correlated.
LOW, HIGH = 1 / 2.5, 2.5


@pytest.mark.parametrize("name", MODULES)
@EXACT
@given(data=st.data())
def test_valid_options_build_a_module_that_runs_at_unit_scale(name, data):
    make, options, run = MODULES[name]
    features, chosen = data.draw(SIZE), _chosen(data, options)

    @jax.jit
    def call():
        return run(make(features, **chosen), features)

    y = np.asarray(call(), np.float64)
    assert np.isfinite(y).all(), chosen
    rms = math.sqrt(np.mean(y**2))
    assert LOW < rms < HIGH, (rms, features, chosen)
    dtype = chosen.get("dtype")
    if dtype is not None and "Transformer" not in name:  # whose skip is its input
        assert call().dtype == dtype
