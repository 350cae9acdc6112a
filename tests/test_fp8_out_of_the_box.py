"""A GPT as it is: FP8 stalls, and follows float32 once it is unit-scaled."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.fp8_out_of_the_box.model import GPT
from experiments.fp8_out_of_the_box.run import NANOGPT, GPTConfig
from experiments.transformed.train import VARIANTS, compare


def test_the_model_is_nanogpts():
    shapes = nnx.eval_shape(lambda: NANOGPT.model("float32", 65, 0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(shapes)))
    # Its own count for this configuration is 10.65 million without positions.
    assert count - 256 * 384 == pytest.approx(10.65e6, rel=1e-3)


def test_no_position_sees_what_follows():
    gpt = GPT(16, 8, 16, 2, 1, dtype=jnp.float32, rngs=nnx.Rngs(0))
    ids = jnp.arange(8)[None] % 5
    a, b = map(nnx.jit(gpt), (ids, ids.at[:, 4:].add(3)))
    np.testing.assert_allclose(a[:, :4], b[:, :4], atol=1e-6)
    assert (abs(a[:, 4:] - b[:, 4:]).max(-1) > 1e-4).all()


@pytest.mark.slow
def test_fp8_follows_float32_once_it_is_unit_scaled(tmp_path):
    config = GPTConfig(
        out=tmp_path,
        width=32,
        depth=1,
        head_size=16,
        steps=30,
        warmup=2,
        batch=2,
        length=32,
        log2_rates=(-6,),
        eval_characters=256,
        fp8_loss_factor=2.0**-9,
    )
    bits = {run.variant: run.valid_bits for run in compare(config)}
    assert {*bits} == {*config.variants}
    exact = bits["float32"]
    np.testing.assert_allclose(bits["FP8, unit_scale"], exact, atol=0.03 / math.log(2))
    assert bits["FP8, naive"] > exact + 0.05


def test_a_loss_is_multiplied_where_its_precision_says():
    config = dataclasses.replace(GPTConfig(), fp8_loss_factor=0.5, loss_factor=0.25)
    factors = {name: config.factor(variant) for name, variant in VARIANTS.items()}
    want = {"float32": 1.0, "FP8": 0.5, "float16": 0.25}
    assert factors == {name: want[name.split(",")[0]] for name in VARIANTS}
