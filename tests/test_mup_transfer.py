"""Learning rates transfer over width: the coordinate check, and the sweep's parts."""

import json
import math

import numpy as np
import optax
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

CHECK = CoordinatesConfig(widths=(32, 128), depth=1, steps=2, seeds=4)

# The slope of an activation's change: of its log2 rms over log2 width. Two parts make a
# change, and have no correlation. What weights' updates do has a scale that muP's rules
# keep; what the embedding's does goes as width^-1/2, by u-muP's rule of its rate. So if
# s is the second's share of the variance at width 32, the variance at width 128 is
# 1 - s + s / 4 times as large, and the slope log2(1 - 3 s / 4) / 4. The share is
# measured: it is what a run with the embedding at rest lacks. It is 1, the slope -1/2,
# for the embedding and the norm behind it, and up to half for what reads them.
#
# Seeds differ from that by at most 0.1 (standard deviation; of 8, 0.15 for attention's
# output, which is multiplied by how many values it averages), the mean of four by half
# as much. Of a dozen activations, on the texts of several Pythons, some are off by two
# of those; three and a half are allowed. Queries and keys are off by -0.07 on average
# over 8 seeds.
SPREAD, SPREAD_OF_ATTENTION = 0.175, 0.26


def _is_table(info):
    return info.role == "weight" and info.fan_out is None


def _optimiser(rule):
    def make(rate):
        return optax.chain(
            optax.scale_by_adam(b2=0.99, eps=1e-12),
            jus.optim.scale_by_umup(rule=rule),
            optax.scale_by_learning_rate(rate),
        )

    return make


def _out_of_band(rule, rate=1.0):
    """The activations whose slope is another, and how the slopes differ."""

    def measured(rule):
        return {
            w: measure(CHECK, CHECK.model("unit", w), _optimiser(rule), rate)
            for w in CHECK.widths
        }

    whole, rest = measured(rule), measured(lambda i: 0 if _is_table(i) else rule(i))
    narrow, wide = CHECK.widths
    found = {}
    for name, each in slopes(whole).items():
        ratio = rest[narrow][name][:, 1, -1] / whole[narrow][name][:, 1, -1]
        share = np.clip(1 - ratio**2, 0, 1)
        want = np.log2(1 - share * (1 - narrow / wide)) / 2 / np.log2(wide / narrow)
        spread = SPREAD_OF_ATTENTION if "attention/out" in name else SPREAD
        gap = (each - want).mean()
        if abs(gap) > spread:
            found[name] = round(float(gap), 3)
    return found


def test_activations_move_with_width_as_the_embeddings_share_says():
    assert not _out_of_band(jus.optim.adam_rule)


LAYERS = {f"blocks/0/{k}" for k in ("attention/value", "mlp/up", "mlp/down")}
# Powers of the width by which a rule is wrong, and what they show in. The rate is so
# much larger or smaller at width 64 that hidden weights get there what they should.
WRONG = {
    "hidden weights without a factor": (1 / 2, LAYERS),
    "hidden weights at 1 / fan_in": (-1 / 2, LAYERS),
    "hidden weights at fan_in^-3/4": (-1 / 4, {"blocks/0/mlp/down"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_the_check_fails_with_a_wrong_factor_of_hidden_weights(name):
    power, seen = WRONG[name]

    def wrong(info):
        hidden = info.role == "weight" and not _is_table(info)
        return jus.optim.adam_rule(info) * (
            (info.fan_in / 64) ** power if hidden else 1
        )

    assert {*_out_of_band(wrong)} >= seen


@pytest.mark.slow
def test_the_check_fails_with_another_rule_of_the_embedding():
    def wrong(info):
        return (1 if _is_table(info) else 8) * jus.optim.adam_rule(info) / 8

    def mup(info):
        return 1 / 8 if _is_table(info) else jus.optim.adam_rule(info)

    assert "embed" not in _out_of_band(wrong)  # a constant is no power of the width
    assert "embed" in _out_of_band(mup)


@pytest.mark.slow
def test_the_experiment_tells_the_regular_model_from_the_unit_scaled(tmp_path, capsys):
    found = coordinates(CoordinatesConfig(out=tmp_path, smoke=True))
    # The regular model's change grows in every layer and in the logits; a norm's cannot
    # grow past its output, and an embedding's change is the rate.
    growing = {
        *(f"blocks/0/attention/{k}" for k in ("query", "key", "value", "out")),
        *(f"blocks/0{k}" for k in ("", "/up", "/down")),
        "readout",
    }
    assert {k for k, s in found["regular"].items() if s > 0.3} >= growing
    assert max(found["unit"].values()) < SPREAD
    assert "readout" in capsys.readouterr().out
    assert (tmp_path / "coordinates.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "coordinates.json").read_text())
    scales = record["scales"]["unit"]["128"]
    assert np.shape(scales["readout"]) == (4, 2, 3)
    # At the start a readout of unit weights makes width^-1/2; nothing has changed yet.
    initial = np.array(scales["readout"])[:, :, 0]
    np.testing.assert_allclose(initial[:, 0], 128**-0.5, rtol=0.2)
    np.testing.assert_array_equal(initial[:, 1], 0)


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
