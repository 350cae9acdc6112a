"""The small scripts about scale and depth, in small."""

import numpy as np

from experiments.scale_and_depth import residual_weight as residual
from experiments.scale_and_depth.attention_variance import (
    LAW,
    AttentionVarianceConfig,
    attention_variance,
)
from experiments.scale_and_depth.signal_to_noise import (
    SignalToNoiseConfig,
    signal_to_noise,
)
from experiments.scale_and_depth.underflow import UnderflowConfig, underflow

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def _written(path):
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_noise_of_each_format_is_that_of_exact_rounding(tmp_path):
    found = signal_to_noise(SignalToNoiseConfig(tmp_path, 2**18, (-10, 10)))
    # Computed elsewhere by exact rounding; 2^18 samples know it to less than 1%.
    for name, ratio in {"E4M3": 1419, "E5M2": 358, "bfloat16": 3.6e5}.items():
        np.testing.assert_allclose(found[name][0], ratio, rtol=0.01)
    flat = [k for k, r in found["E4M3"].items() if r > found["E4M3"][0] / 2]
    assert (min(flat), max(flat)) == (-5, 7)
    _written(tmp_path / "signal_to_noise.json")


def test_attentions_variance_falls_as_the_law_says(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(TEXT)
    config = AttentionVarianceConfig(tmp_path, tmp_path, batch=16, length=64, heads=8)
    found = attention_variance(config)
    law, plain, text, unit = map(np.array, found.values())
    assert [*found][0] == LAW and law[0] == 1
    # The first is the mean of 8192 squares; the rest of 32 times as many, which share
    # 4096 rows of probabilities.
    np.testing.assert_allclose(plain[:1].mean(), 1, rtol=0.05)
    np.testing.assert_allclose(plain[32:].mean(), law[32:].mean(), rtol=0.1)
    assert text[-16:].mean() > 1.8 * law[-16:].mean()
    # Its factor makes the mean over positions one, and the first far from it.
    np.testing.assert_allclose(unit.mean(), 1, rtol=0.05)
    assert unit[0] > 10 and unit[-1] < 0.5
    _written(tmp_path / "attention_variance.json")


def test_gelu_underflows_more_than_silu_and_that_more_than_relu(tmp_path):
    found = underflow(UnderflowConfig(tmp_path, 2**20, (0, 1)))
    shares = [100 * shares[0] for shares in found.values()]
    # Four standard errors of the smallest share of 2^20 samples are 0.008%.
    np.testing.assert_allclose(shares, [0.18, 0.16, 0.04], atol=0.013)
    _written(tmp_path / "underflow.json")


def test_a_residual_weight_is_trained_once(tmp_path, monkeypatch, capsys):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(TEXT)
    config = residual.ResidualWeightConfig(
        tmp_path,
        tmp_path,
        depths=(3,),
        taus=(0.2,),
        width=16,
        steps=12,
        warmup=2,
        batch=2,
        length=16,
        eval_characters=64,
    )
    runs = residual.residual_weight(config)
    assert [(r["depth"], r["tau"]) for r in runs] == [(3, 0.2)]
    assert all(r["valid_bits"] < 8 for r in runs)  # better than any of 256 bytes
    assert "3 layers: best tau 0." in capsys.readouterr().out
    _written(tmp_path / "residual_weight.jsonl")
    monkeypatch.setattr(residual, "train", None)  # nothing is missing
    again = residual.residual_weight(config)
    assert [r["valid_bits"] for r in again] == [r["valid_bits"] for r in runs]
