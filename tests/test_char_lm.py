"""The character-level experiment: its data, and a run from end to end."""

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.char_lm.demo import DemoConfig, demo
from experiments.char_lm.histogram import initial_histograms
from experiments.char_lm.model import ModelConfig, make_model
from experiments.char_lm.sweep import SweepConfig, sweep
from experiments.char_lm.tracking import TrackingConfig, cost, summary
from experiments.char_lm.train import (
    TrainConfig,
    make_task,
    read_scales,
    train,
)
from experiments.shared.data import load_corpus, train_batch
from experiments.shared.layers import make_loss
from experiments.shared.record import read_metrics
from jax_unit_scaling import analysis


@pytest.fixture
def folder(tmp_path):
    text = "the quick brown fox jumps over the lazy dog, naïvely. " * 200
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def _config(folder, **more):
    model = ModelConfig(width=32, depth=1, head_size=16, **more)
    return TrainConfig(
        out=folder / "run",
        data=folder,
        model=model,
        steps=20,
        batch=4,
        length=32,
        checkpoint_every=10,
        eval_characters=1000,
        learning_rate=1.0 if model.parametrisation == "unit" else 2.0**-7,
    )


@pytest.mark.parametrize("parametrisation", ["unit", "regular"])
@pytest.mark.parametrize("precision", ["float32", "float16", "fp8"])
def test_a_run_learns(folder, parametrisation, precision):
    config = _config(folder, parametrisation=parametrisation, precision=precision)
    uniform = np.log2(len(load_corpus(folder).vocabulary))
    final = train(config)
    if (parametrisation, precision) != ("regular", "fp8"):  # which may well stall
        assert final["valid_bits"] < uniform
    assert np.isfinite(final["valid_bits"])


@pytest.mark.parametrize(
    "parametrisation", ["unit", pytest.param("regular", marks=pytest.mark.slow)]
)
def test_scales_are_recorded_at_an_interval_and_change_nothing(folder, parametrisation):
    config = _config(folder, parametrisation=parametrisation)
    tracked = dataclasses.replace(config, out=folder / "tracked", track_every=8)
    train(config, progress=False), train(tracked, progress=False)
    losses = [
        [r["loss_bits"] for r in read_metrics(c.out) if "loss_bits" in r]
        for c in (config, tracked)
    ]
    # The same step, compiled with other fusions: some units in the last place.
    np.testing.assert_allclose(*losses, rtol=1e-5)
    scales, steps = read_scales(tracked.out)
    assert steps == [0, 8, 16]
    (kernel,) = [t for n, t in scales.items() if n.endswith("readout/kernel")]
    init = make_task(config, len(load_corpus(folder).vocabulary)).state[0]
    want = np.sqrt(np.mean(np.square(init["readout"]["kernel"][...])))
    assert kernel.forward.scale.shape == kernel.backward.scale.shape == (3,)
    np.testing.assert_allclose(kernel.forward.scale[0], want, rtol=1e-6)
    assert (kernel.forward.scale[1:] != kernel.forward.scale[:-1]).all()
    assert "Scales over time" in (tracked.out / "scales.html").read_text()
    assert (tracked.out / "scales.png").stat().st_size > 10_000


def test_the_values_at_initialisation_are_those_of_the_model(folder):
    config = _config(folder, parametrisation="regular")
    corpus = load_corpus(folder)
    b = train_batch(corpus.train, step=0, seed=0, batch=4, length=32)
    vocabulary = len(corpus.vocabulary)
    found = initial_histograms(config.model, vocabulary, 0, b.inputs, b.targets)
    graph, params = nnx.split(make_model(config.model, vocabulary, 0))
    loss = lambda p: make_loss(config.model.parametrisation)(
        nnx.merge(graph, p)(b.inputs), b.targets
    )
    grads = jax.jit(jax.grad(loss))(params)
    for name, values in (("weights", params), ("weight gradients", grads)):
        want = analysis.histogram(jax.tree.leaves(values))
        got = dict(zip(found[name].exponent, found[name].share, strict=True))
        for exponent, share in zip(want.exponent, want.share, strict=True):
            # Compiled, a gradient on the edge of a binade may be in the other.
            assert abs(got.get(exponent, 0) - share) < 1e-3, exponent
    # Inputs of q, k, v, up and the readout are normalised; those of out and down not.
    seen = found["activations"]
    scale = np.sqrt(seen.share @ (7 / 3 * 4.0**seen.exponent) / seen.share.sum())
    assert 0.3 < scale < 1.2


def test_a_killed_run_loses_one_interval_and_ends_with_the_same_numbers(folder):
    config = dataclasses.replace(_config(folder), steps=300, checkpoint_every=50)
    whole = dataclasses.replace(config, out=folder / "whole")
    final = train(whole, progress=False)

    code = (
        "import pickle, sys; from experiments.char_lm.train import train; "
        "train(pickle.load(sys.stdin.buffer), progress=False)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as run:
        run.stdin.write(pickle.dumps(config))
        run.stdin.close()
        while not (config.out / "checkpoints" / "100").exists():
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        run.kill()
    reached = read_metrics(config.out)[-1]["step"]
    saved = max(int(p.name) for p in (config.out / "checkpoints").glob("[1-9]*0"))
    assert reached < 300 and saved >= reached - config.checkpoint_every

    assert train(config, progress=False) == final
    assert read_metrics(config.out) == read_metrics(whole.out)


def test_a_corrupt_checkpoint_is_named(folder):
    config = _config(folder)
    train(config, progress=False)
    for file in (config.out / "checkpoints" / "20").rglob("*"):
        if file.is_file():
            file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint \S*/20 cannot be read"):
        train(config, progress=False)
    shutil.rmtree(config.out / "checkpoints" / "20")  # as the error says
    assert np.isfinite(train(config, progress=False)["valid_bits"])


@pytest.mark.parametrize("parametrisation", ["unit", "regular"])
def test_the_training_step_rounds_on_every_platform(folder, parametrisation):
    config = _config(folder, parametrisation=parametrisation, precision="fp8")
    task = make_task(config, 64)
    ids = jax.ShapeDtypeStruct((config.batch, config.length), np.int32)
    platforms = ("tpu", "cuda", "cpu")
    module = jax.export.export(task.step, platforms=platforms)(task.state, ids, ids)
    text = module.mlir_module()
    # Forward each of 6 products (q, k, v, out, up, down), attention and the readout
    # rounds its operands, backward each rounds its cotangent.
    assert len(re.findall(r"call @_quantize", text)) == 7 * 2 + 3 + 8
    assert "round_nearest_even" in text and "f8E" not in text
    # So does evaluation, forward.
    text = str(jax.make_jaxpr(task.nats)(task.state, ids, ids))
    assert len(re.findall(r"name=_quantize\b", text)) == 7 * 2 + 3


def test_a_folder_of_another_run_is_refused(folder):
    config = _config(folder)
    train(config)
    with pytest.raises(ValueError, match="another config"):
        train(dataclasses.replace(config, seed=1))
    (folder / "test.txt").write_text("other characters: é" * 100, encoding="utf-8")
    with pytest.raises(ValueError, match="another vocabulary"):
        train(config)


@pytest.mark.slow
def test_the_demo_compares_six_runs_and_draws_them(folder, capsys):
    config = DemoConfig(
        out=folder / "demo",
        data=folder,
        steps=12,
        width=32,
        depth=1,
        batch=2,
        length=16,
    )
    rows = demo(config)
    assert len(rows) == 6
    for picture in ("loss.png", "scales.png"):
        assert (config.out / picture).stat().st_size > 10_000
    assert "gap to float32" in capsys.readouterr().out


@pytest.mark.slow
def test_the_sweep_finds_the_best_rate(folder, capsys):
    demo = DemoConfig(
        folder / "sweep", folder, steps=12, width=32, depth=1, batch=2, length=16
    )
    rates = {"regular_log2_rates": (-20, -7), "unit_log2_rates": (-1,)}
    config = SweepConfig(demo, ("float32", "float16"), (1.0, 0.25), **rates, seeds=1)
    points = sweep(config)
    slow, fast = [p.mean for p in points[:2]]
    # both weights in float32, the better one in float16
    assert len(points) == 2 * (2 + 1) + (2 + 1)
    assert fast < slow
    printed = capsys.readouterr().out
    assert "2^-7" in printed and "2^-20" not in printed
    assert (demo.out / "sweep.png").stat().st_size > 10_000


@pytest.mark.slow
def test_what_tracking_costs_is_written_down(tmp_path, capsys):
    config = TrackingConfig(tmp_path, width=64, depth=1, vocabulary=8, repeats=1)
    record = cost(config)
    assert record == json.loads((tmp_path / "tracking.json").read_text())
    for found in record["models"].values():
        assert found["tensors"] > 10 and found["compile"] > found["tracked"][0]
    assert "once" in capsys.readouterr().out


def test_the_table_of_what_tracking_costs_is_that_of_the_record():
    folder = Path(__file__).parent.parent / "experiments"
    record = json.loads((folder / "char_lm/figures/tracking.json").read_text())
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for row in summary(record):
        assert f"| {' | '.join(row.values())} |" in readme
