"""What several files of tests share."""

import gc

import jax
import numpy as np
import pytest

from jax_unit_scaling import scale
from jax_unit_scaling.ops import residual

# Little of what tracing allocates is garbage: with Python's thresholds the search for
# it takes a twentieth of the time.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def truly(monkeypatch):
    """truly(f, *args): `f(*args)` with the true gradients of the forward functions.

    All that has a rule of its own for the backward pass is replaced by its forward
    function: the primitive, and the two ends of a residual branch.
    """

    def call(f, *args):
        with monkeypatch.context() as patched:
            patched.setattr(scale, "_scaled", lambda x, fwd, bwd: x * fwd)
            patched.setattr(residual, "_split", lambda x, *taus: (x, x))
            patched.setattr(residual, "_join", residual._weighted_sum)
            jax.clear_caches()
            result = f(*args)
        jax.clear_caches()
        return result

    return call


@pytest.fixture
def close_to_float32():
    """close(what, fp8, exact): one number of each seed's run, in either precision.

    The mean's relative gap is below 1%. Printed, with its spread: `pytest -rP`.
    """

    def close(what, fp8, exact):
        gaps = (np.asarray(fp8) - exact) / np.asarray(exact)
        print(
            f"{what}: float32 {np.mean(exact):.4f}, FP8 {np.mean(fp8):.4f}, gap "
            f"{gaps.mean():+.2%} (standard deviation {gaps.std(ddof=1):.2%} over "
            f"{len(gaps)} seeds)"
        )
        assert abs(gaps.mean()) < 0.01

    return close
