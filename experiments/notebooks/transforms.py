# %% [markdown]
# # Low precision for a model as it is
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jax-unit-scaling/jax-unit-scaling/blob/main/experiments/transforms.ipynb)
#
# A small GPT of plain Flax layers, not changed for this library, meets its function
# transformations: `track_scales` shows the scales of all tensors, `simulate_fp8` what
# 8-bit formats make of them, `unit_scale` holds every tensor at unit scale, and
# `audit_gradients` tells a true gradient from a false one. It runs on a CPU, GPU or TPU
# in a few minutes.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jax_unit_scaling") is None:
    package = "jax-unit-scaling[plots] @ "
    package += "git+https://github.com/jax-unit-scaling/jax-unit-scaling"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %%
import functools as ft
import io
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from flax import nnx
from IPython.display import Image, display

import jax_unit_scaling as jus
from jax_unit_scaling import analysis

rich.reconfigure(width=150)
print("jax", jax.__version__, "on", jax.default_backend())


def show(figure):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    display(Image(png.getvalue()))


# %% [markdown]
# ## The model and its data
#
# Nothing here knows of unit scaling. The text is Python's own standard library.


# %%
class Block(nnx.Module):
    def __init__(self, width, heads, *, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, vocabulary, length, width, depth, heads, *, rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, rngs=rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.readout = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, ids):
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


stdlib = Path(sysconfig.get_path("stdlib"))
files = ("argparse", "ast", "dataclasses", "inspect", "textwrap", "typing")
text = "".join((stdlib / f"{name}.py").read_text("utf-8") for name in files)
characters, data = np.unique(np.array(list(text)), return_inverse=True)
data = data.astype(np.int32)
BATCH, LENGTH = 8, 64


def batch(step):
    starts = np.random.default_rng(step).integers(0, len(data) - LENGTH - 1, BATCH)
    return data[starts[:, None] + np.arange(LENGTH + 1)]


model = GPT(len(characters), LENGTH, width=64, depth=2, heads=2, rngs=nnx.Rngs(0))
graph, params = nnx.split(model, nnx.Param, ...)[0], nnx.state(model, nnx.Param)


def loss(params, ids):
    logits = nnx.merge(graph, params, nnx.State({}))(ids[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return losses.mean()


# %% [markdown]
# ## The scales of its tensors
#
# `track_value_and_grad` is `jax.value_and_grad` that also returns, for each tensor and
# its cotangent, a few numbers: scale, range, what each format would lose. First the
# weights and products. (→ is the tensor, ← its cotangent.)

# %%
track = jax.jit(jus.track_value_and_grad(loss, where=analysis.computed))
_, _, scales = track(params, batch(0))
products = scales.where(lambda site: site.name.endswith("dot_general"))
rich.print(analysis.summary(products, title="Products at initialisation"))

# %% [markdown]
# The scale of each product against depth, the readout at the bottom. The cotangents
# are below all that E4M3 holds, and at the lower end of E5M2.

# %%
show(analysis.depth(products))

# %% [markdown]
# ## Training it, in float32 and with 8-bit formats
#
# `simulate_fp8` rounds the operands of every product to E4M3 and the cotangents to E5M2;
# `simulate_format` takes any formats. `unit_scale` runs the whole step once on example
# arguments, and then holds each tensor as data times a constant power of two.

# %%
fp8 = jus.simulate_fp8(loss)
e4m3 = jus.simulate_format(loss, jus.E4M3, jus.E4M3)
steps = {
    "float32": jax.value_and_grad(loss),
    "float32, unit_scale": jus.unit_scale(jax.value_and_grad(loss), params, batch(0)),
    "FP8 (E4M3, E5M2), naive": jax.value_and_grad(fp8),
    "FP8 (E4M3, E5M2), unit_scale": jus.unit_scale(
        jax.value_and_grad(fp8), params, batch(0)
    ),
    "E4M3 in both passes, naive": jax.value_and_grad(e4m3),
    "E4M3 in both passes, unit_scale": jus.unit_scale(
        jax.value_and_grad(e4m3), params, batch(0)
    ),
}
optimiser = optax.adam(3e-3)


@ft.partial(jax.jit, static_argnums=0)
def update(value_and_grad, params, state, ids):
    value, grads = value_and_grad(params, ids)
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def train(value_and_grad, count=200):
    trained, state, losses = params, optimiser.init(params), []
    for i in range(count):
        trained, state, value = update(value_and_grad, trained, state, batch(i))
        losses.append(float(value))
    return losses


runs = {name: train(step) for name, step in steps.items()}
final = {name: np.mean(losses[-20:]) for name, losses in runs.items()}
rows = [
    {
        "computed in": name,
        "loss of the last 20 steps": f"{value:.4f}",
        "beside float32": f"{value / final['float32'] - 1:+.2%}",
    }
    for name, value in final.items()
]
rich.print(analysis.table(rows))

# %%
smooth = {
    name: [(i, np.mean(losses[i : i + 10])) for i in range(0, len(losses), 10)]
    for name, losses in runs.items()
}
show(analysis.curves(smooth, x="step", y="training loss (nats)"))

# %% [markdown]
# How `unit_scale` holds the tensors, and why some are left as they are:

# %%
report = steps["FP8 (E4M3, E5M2), unit_scale"].report()
left = [held for held in report if held.reason]
print(f"{len(report)} tensors; {len(left)} of them not, or not surely, of unit scale:")
for held in left[:8]:
    print(" ", held)

# %% [markdown]
# ## Is the gradient true?
#
# This model has no unit-scaled operation, so its gradients are those of the function.

# %%
print(jus.audit_gradients(loss)(params, batch(0)))

# %% [markdown]
# Unit-scaled operations may send back another factor than forward. Where two ways meet,
# these have to agree, or the gradient points elsewhere. Here is a residual connection
# around an unconstrained GELU: the audit names it.


# %%
def broken(weight, x):
    x = jus.linear(x, weight)
    return jus.mse_loss(x + jus.gelu(x, constraint=None), jnp.zeros_like(x))


x = jax.random.normal(jax.random.key(0), (256, 64))
weight = jax.random.normal(jax.random.key(1), (64, 64))
print(jus.audit_gradients(broken)(weight, x))

# %% [markdown]
# ## Two steps, beside each other
#
# `compare` joins the scales of two models, or of one at two steps; `analysis.report`
# writes all of it into one HTML file, and `analysis.timeline` draws a whole run.

# %%
trained, state = params, optimiser.init(params)
for i in range(100):
    trained, state, _ = update(steps["float32"], trained, state, batch(i))
_, _, later = track(trained, batch(100))
kernels = [s.where(lambda site: site.name.endswith("kernel")) for s in (scales, later)]
comparison = analysis.compare(*kernels, names=("step 0", "step 100"))
rich.print(comparison.table)
show(comparison.picture)
analysis.report(later, "scales.html", title="Scales after 100 steps")
