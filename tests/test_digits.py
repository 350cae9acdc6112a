"""The digits experiment: unit-scaled, in simulated FP8 it is as good as in float32."""

import jax_unit_scaling as jus
from experiments.digits.train import DigitsConfig, compare, train


def test_a_small_network_trains_in_simulated_fp8_as_in_float32():
    config = DigitsConfig(width=8, depth=1, steps=100)
    exact = train(config, "unit")
    fp8 = train(config, "unit", jus.SIMULATED_FP8)
    # A network of 4,000 weights; the full one is in the experiment's table.
    assert exact > 0.9 and fp8 > exact - 0.02


def test_the_comparison_ends_with_a_table(capsys):
    found = compare(DigitsConfig(width=8, depth=1, steps=2, seeds=1))
    assert len(found) == 3
    assert all(name in capsys.readouterr().out for name in list(found)[:1])
