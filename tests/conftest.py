"""What several files of tests share."""

import jax
import pytest

from jax_unit_scaling import scale
from jax_unit_scaling.ops import residual


@pytest.fixture
def truly(monkeypatch):
    """truly(f, *args): `f(*args)` with the true gradients of the forward functions.

    All that has a rule of its own for the backward pass is replaced by its forward
    function: the primitive, and the two ends of a residual branch.
    """

    def call(f, *args):
        with monkeypatch.context() as patched:
            patched.setattr(scale, "_scaled", lambda x, fwd, bwd: x * fwd)
            patched.setattr(residual, "_split", lambda x, tau: (x, x))
            patched.setattr(residual, "_join", residual._weighted_sum)
            jax.clear_caches()
            result = f(*args)
        jax.clear_caches()
        return result

    return call
