"""Write golden values of the PyTorch library unit-scaling, version 0.3.5.

Writes `pytorch.npz`, beside this file: inputs, outputs and gradients that the parity
tests compare `jax_unit_scaling` with. The arrays follow the JAX layout (kernels are
[in, out], the transpose of PyTorch's). Inputs are unit normal in float32, other than
the int32 ids and labels and the bias of `linear`, which is zero because the two
libraries place it on different sides of the forward factor. To regenerate:

    pip install numpy torch unit-scaling==0.3.5 && python tests/reference/pytorch.py

Keys, where `<case>` is `function` or `function[option,...]`:

    <case>/in/<arg>      input
    <case>/out           output
    <case>/cotangent     unit-normal cotangent of the output
    <case>/grad/<arg>    gradient of each floating-point input under that cotangent

Functions, their arguments and their options (a final `3d` or `broadcast` in the
brackets is only a label: it names the shapes and is not an option):

    linear(x, kernel, bias)             [constraint]
    linear_readout(x, kernel)           [constraint]
    matmul(x, y)                        [constraint]
    add(x, y)                           [constraint]
    layer_norm(x, scale, bias)          none; last axis, epsilon 1e-6
    rms_norm(x, scale)                  none; last axis, epsilon 1e-6
    embedding(table, ids)               none
    cross_entropy(logits, labels)       [reduction,mult]
    mse_loss(predictions, targets)      [reduction]
    residual_apply(x, kernel)           [tau]; around linear[to_output_scale], no bias
    residual_split(x)                   [tau]; out stacks (residual, skip) on axis 0
    residual_add(residual, skip)        [tau]

Constraints are spelled as in PyTorch, `None` included. Two kinds of key are not cases:

    transformer_residual_scaling_rule[residual_mult,attn_ratio,layers]/out
                                        tau at each index in range(layers), float64
    version/unit_scaling, version/torch
"""

from pathlib import Path

import numpy as np
import torch
import unit_scaling
import unit_scaling.functional as U
from unit_scaling.core.functional import transformer_residual_scaling_rule

FUNCTIONS = {
    "linear": lambda x, kernel, bias, c: U.linear(x, kernel.T, bias, c),
    "linear_readout": lambda x, kernel, c: U.linear_readout(x, kernel.T, None, c),
    "matmul": U.matmul,
    "add": U.add,
    "layer_norm": lambda x, scale, bias: U.layer_norm(
        x, x.shape[-1:], scale, bias, eps=1e-6
    ),
    "rms_norm": lambda x, scale: U.rms_norm(x, x.shape[-1:], scale, eps=1e-6),
    "embedding": lambda table, ids: U.embedding(ids, table),
    "cross_entropy": lambda logits, labels, reduction, mult: U.cross_entropy(
        logits, labels, reduction=reduction, mult=mult
    ),
    "mse_loss": lambda predictions, targets, reduction: U.mse_loss(
        predictions, targets, reduction=reduction
    ),
    "residual_apply": lambda x, kernel, tau: U.residual_apply(
        lambda h: U.linear(h, kernel.T, None, "to_output_scale"), x, tau
    ),
    "residual_split": lambda x, tau: torch.stack(U.residual_split(x, tau)),
    "residual_add": U.residual_add,
}


def normal(*shape):
    return lambda rng: np.asarray(rng.standard_normal(shape), np.float32)


def zeros(*shape):
    return lambda rng: np.zeros(shape, np.float32)


def integers(bound, *shape):
    return lambda rng: rng.integers(bound, size=shape, dtype=np.int32)


DENSE = {"x": normal(6, 12), "kernel": normal(12, 5)}
NORM = {"x": normal(6, 48), "scale": normal(48)}
LOGITS = {"logits": normal(6, 11), "labels": integers(11, 6)}
ERROR = {"predictions": normal(6, 8), "targets": normal(6, 8)}
REDUCTIONS = ("mean", "sum")
TO_SCALES = ("to_output_scale", "to_left_grad_scale", "to_right_grad_scale")
MATMUL = (*TO_SCALES, "gmean", "hmean", "amean", None)

CASES = [  # (function, options, label, inputs)
    *(
        ("linear", (c,), label, {**DENSE, "x": x, "bias": zeros(5)})
        for c in ("to_output_scale", "gmean", "to_grad_input_scale", None)
        for label, x in (("", normal(6, 12)), ("3d", normal(2, 4, 12)))
    ),
    *(("linear_readout", (c,), "", DENSE) for c in (None, "to_output_scale")),
    *(("matmul", (c,), "", {"x": normal(6, 12), "y": normal(12, 5)}) for c in MATMUL),
    ("matmul", (None,), "3d", {"x": normal(3, 6, 12), "y": normal(3, 12, 5)}),
    *(
        ("add", (c,), label, {"x": normal(6, 8), "y": y})
        for c in ("to_output_scale", None)
        for label, y in (("", normal(6, 8)), ("broadcast", normal(8)))
    ),
    ("layer_norm", (), "", {**NORM, "bias": normal(48)}),
    ("rms_norm", (), "", NORM),
    ("embedding", (), "", {"table": normal(11, 8), "ids": integers(11, 4, 6)}),
    *(("cross_entropy", (r, m), "", LOGITS) for r in REDUCTIONS for m in (1.0, 2.0)),
    *(("mse_loss", (r,), "", ERROR) for r in REDUCTIONS),
    ("residual_apply", (0.5,), "", {"x": normal(6, 8), "kernel": normal(8, 8)}),
    ("residual_split", (0.5,), "", {"x": normal(6, 8)}),
    ("residual_add", (0.5,), "", {"residual": normal(6, 8), "skip": normal(6, 8)}),
]


def name_case(function, options, label=""):
    options = [*map(str, options), *([label] if label else [])]
    return f"{function}[{','.join(options)}]" if options else function


def run_case(function, options, label, inputs):
    """The golden arrays of one case, by key."""
    name = name_case(function, options, label)
    rng = np.random.default_rng(list(name.encode()))  # the same whatever the order
    inputs = {arg: draw(rng) for arg, draw in inputs.items()}
    tensors = {
        arg: torch.tensor(value, requires_grad=True)
        if value.dtype == np.float32
        else torch.tensor(value, dtype=torch.int64)
        for arg, value in inputs.items()
    }
    out = FUNCTIONS[function](*tensors.values(), *options)
    cotangent = normal(*out.shape)(rng)
    out.backward(torch.tensor(cotangent))
    arrays = {f"{name}/in/{arg}": value for arg, value in inputs.items()}
    arrays |= {f"{name}/out": out.detach().numpy(), f"{name}/cotangent": cotangent}
    grads = {arg: t.grad for arg, t in tensors.items() if t.requires_grad}
    return arrays | {f"{name}/grad/{arg}": g.numpy() for arg, g in grads.items()}


def main():
    versions = {"unit_scaling": unit_scaling.__version__, "torch": torch.__version__}
    arrays = {f"version/{key}": np.array(str(v)) for key, v in versions.items()}
    for case in CASES:
        arrays |= run_case(*case)
    for mults in ((1, 1), (0.5, 2), (2, 0.25)):
        tau = transformer_residual_scaling_rule(*mults)
        for layers in (2, 8, 24):
            name = name_case("transformer_residual_scaling_rule", (*mults, layers))
            arrays[f"{name}/out"] = np.array([tau(i, layers) for i in range(layers)])
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
