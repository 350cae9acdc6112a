"""Learning rates transfer over width: the coordinate check, and the sweep's parts."""

import json
import math

import numpy as np
import pytest

import jax_unit_scaling as jus
from experiments.mup_transfer.coordinates import (
    CoordinatesConfig,
    coordinates,
    measure,
    slopes,
)
from experiments.mup_transfer.results import Curve, Run, curves, read_results, report
from experiments.mup_transfer.runs import Group, Settings, train_group
from experiments.mup_transfer.sweep import SweepConfig, sweep

# The slope of an activation's change, of its log2 rms over log2 width. Two parts make
# a change: what weights' updates do, whose scale muP's rules keep, and what the
# embedding's change does through weights as they are, which goes as width^-1/2 by
# u-muP's rule. The sum of their squares has a slope of -1/2 times the second's share,
# which is at most half at width 32 (measured: up to 0.4, for query and key). Seeds
# differ by 0.13 at most (standard deviation, attention's output), the mean of four by
# half of that, and two of those are allowed: 0.13.
SPREAD = 0.13
LOWEST, HIGHEST = -1 / 4 - SPREAD, SPREAD
# These see the embedding's change alone: -1/2. The table's own is its update, of the
# same size for each entry, and so the same for every seed but for the second step; the
# norm divides by an rms that is known within a few percent at width 32.
EMBEDDING = {"embed": 0.05, "blocks/0/attention_norm": SPREAD}

CHECK = CoordinatesConfig(widths=(32, 128), depth=1, steps=2, seeds=4)


def _out_of_band(slope_of):
    return {
        name
        for name, slope in slope_of.items()
        if not (
            abs(slope + 1 / 2) < EMBEDDING[name]
            if name in EMBEDDING
            else LOWEST < slope < HIGHEST
        )
    }


@pytest.mark.slow
def test_no_activation_of_the_unit_scaled_model_moves_with_width(tmp_path, capsys):
    found = coordinates(CoordinatesConfig(out=tmp_path, smoke=True))
    assert not _out_of_band(found["unit"])
    # The regular model's change grows in every layer and in the logits; a norm's cannot
    # grow past its output, and an embedding's change is the rate.
    assert {k for k, s in found["regular"].items() if s > 2 * HIGHEST} >= {
        *(f"blocks/0/attention/{k}" for k in ("query", "key", "value", "out")),
        *(f"blocks/0{k}" for k in ("", "/up", "/down")),
        "readout",
    }
    assert "readout" in capsys.readouterr().out
    assert (tmp_path / "coordinates.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "coordinates.json").read_text())
    scales = record["scales"]["unit"]["128"]
    assert np.shape(scales["readout"]) == (4, 2, 3)
    # At the start a readout of unit weights makes width^-1/2; nothing has changed yet.
    initial = np.array(scales["readout"])[:, :, 0]
    np.testing.assert_allclose(initial[:, 0], 128**-0.5, rtol=0.2)
    np.testing.assert_array_equal(initial[:, 1], 0)


@pytest.mark.slow
def test_the_check_fails_without_the_factor_of_hidden_weights():
    def broken(rate):
        factor_of_one = {"blocks/*/kernel": {"role": "bias"}}
        return jus.optim.adam(rate, b2=0.99, eps=1e-12, overrides=factor_of_one)

    # The rate is what a hidden weight should get at width 64.
    scales = {
        w: measure(CHECK, CHECK.model("unit", w), broken, 1 / 8) for w in (32, 128)
    }
    layers = ("attention/query", "attention/out", "mlp/up", "mlp/down")
    slope_of = {k: s.mean() for k, s in slopes(scales, step=1).items()}
    assert _out_of_band(slope_of) >= {f"blocks/0/{k}" for k in layers} | {"blocks/0"}


def test_the_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    config = SweepConfig(out=tmp_path, smoke=True)
    path = tmp_path / "sweep.jsonl"
    runs = sweep(config)
    assert {run.key for run in runs} == {
        *(("regular", 16, rate, 0) for rate in (-8, -7)),
        *(("unit", 16, rate, 0) for rate in (-1, 0)),
    }
    assert all(0 < run.valid_bits < 12 for run in runs)
    # Higher rates learn more in four steps, so each model was trained at its own.
    by_key = {run.key: run.valid_bits for run in runs}
    assert by_key["unit", 16, 0, 0] < by_key["unit", 16, -1, 0]
    assert by_key["regular", 16, -7, 0] < by_key["regular", 16, -8, 0]
    assert "4/4 runs" in capsys.readouterr().err
    assert (tmp_path / "sweep.png").stat().st_size > 10_000

    whole = path.read_text()
    path.write_text(whole[:-30])  # as a kill would leave it
    assert sweep(config) == runs
    assert "1 runs" in capsys.readouterr().err
    assert read_results(path)[1] == runs
    (tmp_path / "sweep.png").unlink()
    report(path)
    assert (tmp_path / "sweep.png").exists()

    path.write_text(whole.replace('"steps": 4', '"steps": 5'))
    with pytest.raises(ValueError, match="runs of another settings"):
        sweep(config)


def test_a_batch_of_rates_trains_each_as_if_it_were_alone():
    settings = Settings(
        depth=1, steps=4, warmup=2, batch=2, length=16, eval_characters=64
    )
    both = train_group(settings, Group("unit", 16, 0, (-1, 0)))
    alone = train_group(settings, Group("unit", 16, 0, (0,)))
    # float32's rounding differs with the shape of a product, some 1e-7 a step.
    np.testing.assert_allclose(both[1].valid_bits, alone[0].valid_bits, atol=2e-5)


def test_a_curve_knows_its_best_rate_and_the_parabola_through_it():
    rates = [-3, -2, -1, 0]
    curve = Curve("unit", 32, rates, [[(r + 1.25) ** 2 + 3] for r in rates])
    assert curve.log2_rates[curve.best] == -1
    np.testing.assert_allclose(curve.optimum, -1.25, rtol=1e-12)
    # At the end of the rates, or beside one that diverged, there is no parabola.
    assert math.isnan(Curve("unit", 32, [0, 1, 2], [[1.0], [2.0], [3.0]]).optimum)
    diverged = curves(
        [
            Run("unit", 32, rate, seed, bits, None)
            for rate, each in {0: (2.0, 2.0), 1: (1.5, 1.6), 2: (1.0, None)}.items()
            for seed, bits in enumerate(each)
        ]
    )
    assert len(diverged) == 1 and diverged[0].best == 1
    assert math.isnan(diverged[0].optimum)
