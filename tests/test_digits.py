"""The digits experiment: unit-scaled, in simulated FP8 it is as good as in float32."""

from experiments.digits.train import DigitsConfig, compare


def test_a_small_network_trains_in_simulated_fp8_as_in_float32(capsys):
    found = compare(DigitsConfig(width=8, depth=1, steps=80, seeds=1))
    table = capsys.readouterr().out
    assert all(f"{name} " in table and len(a) == 1 for name, a in found.items())
    ((exact,), (fp8,)) = (found[f"unit, {p}"] for p in ("float32", "simulated FP8"))
    # Few weights and steps: the full run is closer, as the experiment's table says.
    assert exact > 0.9 and fp8 > exact - 0.02
