"""The overhead experiment: that it compares like with like, and counts right."""

import jax
import numpy as np
import pytest

from experiments.overhead.measure import compile_once, ratio_of
from experiments.overhead.model import KINDS, training_step
from experiments.overhead.run import SMOKE, OverheadConfig, run


def test_both_models_have_the_same_parameters_and_products():
    steps = {kind: training_step(SMOKE, kind, "float32") for kind in KINDS}
    shapes = {k: jax.tree.map(lambda x: x.shape, s[1][0]) for k, s in steps.items()}
    plain, unit = (sorted(jax.tree.leaves(shapes[k])) for k in KINDS)
    assert plain == unit
    products = [
        str(jax.jit(step).trace(state, ids).jaxpr).count("dot_general[")
        for step, state, ids in steps.values()
    ]
    assert products[0] == products[1] > 20


def test_a_ratio_is_that_of_pairs():
    row = ratio_of("step", [(1.0, 1.5), (2.0, 2.0), (4.0, 5.0)], 1.02)
    np.testing.assert_allclose(row[1:], (2.0, 2.0, 1.25, 1.125, 1.375, 1.02))


@pytest.mark.slow
def test_it_runs_through(tmp_path, capsys):
    rows = run(OverheadConfig(out=tmp_path, smoke=True))
    assert len(rows) == 7 and (tmp_path / "overhead.json").exists()
    assert "step in bfloat16" in capsys.readouterr().out
    assert compile_once(SMOKE, "unit", "float32")["all"] > 0
