"""The unmodified model trained as transformed functions compute it, in small."""

import json

import numpy as np
import pytest

from experiments.transformed.cost import KINDS, CostConfig, compile_once, cost, steps
from experiments.transformed.train import VARIANTS, TransformedConfig, compare


def test_unit_scale_trains_as_float32_where_float16_is_lost(tmp_path, capsys):
    config = TransformedConfig(
        out=tmp_path,
        width=16,
        depth=1,
        head_size=16,
        steps=8,
        warmup=1,
        batch=2,
        length=32,
        log2_rates=(-7, -5),
        seeds=(0,),
        loss_factor=2.0**-26,
        eval_characters=256,
    )
    runs = compare(config)
    assert [run.log2_rate for run in runs] == [-7, *[-5] * 6]
    assert "float16, unit_scale" in capsys.readouterr().out
    bits = {run.variant: run.valid_bits for run in runs}
    assert {*bits} == {*VARIANTS}
    np.testing.assert_allclose(bits["float32, unit_scale"], bits["float32"], rtol=2e-5)
    for name in ("FP8, unit_scale", "float16, unit_scale"):
        np.testing.assert_allclose(bits[name], bits["float32"], rtol=5e-3)
    assert bits["float16, naive"] > 1.05 * bits["float32"]
    record = json.loads((tmp_path / "train.json").read_text())
    assert len(record["runs"]) == len(runs)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_cost_is_that_of_the_same_step(tmp_path):
    config = CostConfig(
        out=tmp_path, width=16, depth=1, head_size=16, batch=1, length=8, step_repeats=1
    )
    times = compile_once(config, "unit_scale")
    assert times["all"] == times["trace"] + times["compile"] > 0
    assert {*steps(config)["times"]} == {*KINDS}


def test_the_cost_of_statistics_is_told_by_size(capsys):
    config = CostConfig(statistics=True, log2_sizes=(3, 9), step_repeats=1)
    rows = cost(config)["tracking"]
    assert [row["elements"] for row in rows] == ["2^3", "2^9"]
    assert all(float(row["statistics, ms"]) > 0 for row in rows)
    assert "2^9" in capsys.readouterr().out
