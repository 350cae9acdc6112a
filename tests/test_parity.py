"""Where the PyTorch library's rule is exact, outputs and gradients are the same."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_unit_scaling as jus

DATA = dict(np.load(Path(__file__).parent / "reference" / "pytorch.npz"))
CASES = sorted({k.split("/")[0] for k in DATA} - {"version"})
RULE = "transformer_residual_scaling_rule"


def _constraint(options):
    return {"constraint": None if options[0] == "None" else getattr(jus, options[0])}


def _residual_apply(x, kernel):
    return jus.residual_apply(lambda x: jus.linear(x, kernel), x, tau=0.5)


def _function(name, options):
    match name:
        case "linear" | "linear_readout" | "matmul" | "add":
            function = getattr(jus, name)
            return lambda *a: function(*a, **_constraint(options))
        case "cross_entropy":
            reduction, mult = options[0], float(options[1])
            return lambda *a: jus.cross_entropy(*a, reduction=reduction, mult=mult)
        case "mse_loss":
            return lambda *a: jus.mse_loss(*a, reduction=options[0])
        case "residual_apply":
            return _residual_apply
        case "residual_split":
            return lambda x: jnp.stack(jus.residual_split(x, tau=0.5))
        case "residual_add":
            return lambda *a: jus.residual_add(*a, tau=0.5)
        case "layer_norm" | "rms_norm" | "embedding":
            return getattr(jus, name)
    raise AssertionError(f"no function for the case {name}")


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(RULE)])
def test_outputs_and_gradients(case):
    name, options = re.fullmatch(r"(\w+)(?:\[(.*)\])?", case).groups()
    function = _function(name, (options or "").split(","))
    names = [k.split("/")[2] for k in DATA if k.startswith(f"{case}/in/")]
    inputs = {n: jnp.asarray(DATA[f"{case}/in/{n}"]) for n in names}
    floats = [n for n in names if jnp.issubdtype(inputs[n].dtype, jnp.floating)]

    def of_floats(*values):
        return function(*(inputs | dict(zip(floats, values, strict=True))).values())

    out, vjp = jax.vjp(of_floats, *(inputs[n] for n in floats))
    np.testing.assert_allclose(out, DATA[f"{case}/out"], rtol=1e-5, atol=1e-6)
    grads = vjp(jnp.asarray(DATA[f"{case}/cotangent"]))
    for n, grad in zip(floats, grads, strict=True):
        want = DATA[f"{case}/grad/{n}"]
        np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-5, err_msg=n)


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith(RULE)])
def test_residual_rule(case):
    mult, ratio, layers = map(float, case[len(RULE) + 1 : -1].split(","))
    rule = jus.transformer_residual_rule(residual_mult=mult, residual_attn_ratio=ratio)
    got = [rule(i, int(layers)) for i in range(int(layers))]
    np.testing.assert_allclose(got, DATA[f"{case}/out"], rtol=1e-6)
