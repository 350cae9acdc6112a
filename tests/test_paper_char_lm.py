"""The 2023 paper's models, their precisions, the search for a rate, and the sweep."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_unit_scaling as jus
from experiments.char_lm.paper import PRESETS, Config, run
from experiments.char_lm.paper.model import (
    Model,
    ModelConfig,
    causal_product,
)
from experiments.char_lm.paper.report import (
    Run,
    half_width,
    median_bits,
    results,
    rows,
)
from experiments.char_lm.paper.search import Search, settings
from experiments.char_lm.paper.training import Setting, make_training
from experiments.shared.layers import make_loss
from experiments.shared.precision import PRECISIONS, Precision, store
from experiments.shared.record import read_lines

SMALL = {"width": 32, "depth": 1, "head_size": 16, "kernel_size": 3, "groups": 4}
IDS = np.random.default_rng(0).integers(0, 64, (4, 24))


def _model(**options):
    return Model(ModelConfig(**SMALL | options), 64, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("mixer", ["attention", "conv", "rnn"])
def test_a_unit_scaled_model_is_causal_and_begins_near_unit_scale(mixer):
    """Where regular gradients are far from it."""
    targets, mask = jnp.asarray(np.roll(IDS, -1, 1)), jnp.ones(IDS.shape, bool)
    other = IDS.copy()
    other[:, 12:] = (other[:, 12:] + 1) % 64

    def scales(parametrisation):
        graph, params = nnx.split(_model(parametrisation=parametrisation, mixer=mixer))
        loss = make_loss(parametrisation)

        @jax.jit
        def logits_and_grads(ids):
            def of(params):
                logits = nnx.merge(graph, params)(ids)
                return loss(logits, targets, mask), logits

            grads, logits = jax.grad(of, has_aux=True)(params)
            return logits, [jnp.sqrt(jnp.mean(g**2)) for g in jax.tree.leaves(grads)]

        (a, grads), (b, _) = map(logits_and_grads, (IDS, other))
        np.testing.assert_allclose(a[:, :12], b[:, :12], atol=1e-5)
        assert (abs(a[:, 12:] - b[:, 12:]).max(-1) > 1e-3).all()
        return np.std(a), np.array(grads)

    logits, grads = scales("unit")
    np.testing.assert_allclose(logits, 1.0, rtol=0.15)
    # Attention's queries and keys, without a factor behind the softmax, have less.
    low = 1 / 64 if mixer == "attention" else 1 / 8
    assert (grads < 8).all() and (grads > low).all()
    assert (scales("regular")[1] < 1 / 8).all()


@pytest.mark.parametrize("kind", [nnx.Conv, jus.nnx.Conv])
def test_the_product_of_windows_is_the_convolution(kind):
    def layer(**product):
        return kind(
            8,
            12,
            3,
            padding="CAUSAL",
            feature_group_count=4,
            rngs=nnx.Rngs(0),
            **product,
        )

    x = jax.random.normal(jax.random.key(0), (2, 9, 8))
    got = layer(conv_general_dilated=causal_product)(x)
    np.testing.assert_allclose(got, layer()(x), atol=1e-5)


def test_weights_without_a_master_are_rounded_to_a_neighbour_without_bias():
    # A third of the way between two numbers of float16.
    x = jnp.full(9000, 1 + 2.0**-10 / 3)
    stochastic = np.asarray(
        store(x, PRECISIONS["float16"], jax.random.key(0)), np.float64
    )
    assert {*stochastic} == {1.0, 1 + 2.0**-10}
    share = np.mean(stochastic > 1)
    # Four standard errors of a share of 9000 draws.
    np.testing.assert_allclose(share, 1 / 3, atol=4 * math.sqrt(2 / 9 / 9000))
    nearest = store(x, PRECISIONS["float16, nearest"], jax.random.key(0))
    assert nearest.dtype == jnp.float16 and (nearest == 1).all()
    assert store(x, Precision("float16"), jax.random.key(0)).dtype == jnp.float32


@pytest.mark.slow
def test_only_rounding_makes_small_updates_count():
    """A rate of an eighth of float16's spacing at 1: to nearest, nothing moves."""
    rate, steps = 2.0**-13, 16

    def moved(precision):
        model = ModelConfig("regular", "conv", precision=precision, **SMALL)
        training = make_training(
            Setting(model), 64, steps=steps, overlap=0, halvings=0.0
        )
        state = training.init(0)
        batches = jnp.broadcast_to(IDS, (steps, *IDS.shape))
        end, _ = jax.jit(training.steps)(state, rate, 2.0**10, batches, batches)
        gain = lambda state: np.asarray(state[0]["last_norm"]["scale"][...], np.float64)
        return np.abs(gain(end) - gain(state)).mean()

    exact = moved("float16, master")
    assert exact > 2.0**-11
    assert moved("float16, nearest") == 0
    # Each of 32 gains takes or does not take steps of 2^-10 (2^-11 below 1).
    np.testing.assert_allclose(moved("float16"), exact, rtol=0.5)


@pytest.mark.parametrize("optimiser", ["adamw", "momentum"])
def test_a_loss_scale_changes_nothing_in_float32(optimiser):
    model = ModelConfig("regular", "conv", **SMALL)
    training = make_training(
        Setting(model, optimiser), 64, steps=4, overlap=2, halvings=1.0
    )
    batches = jnp.broadcast_to(IDS, (4, *IDS.shape))
    steps = jax.jit(training.steps)
    losses = [
        steps(training.init(0), 2.0**-6, scale, batches, batches)[1]
        for scale in (1.0, 2048.0)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_float16_needs_a_loss_scale_only_if_regular():
    """The share of a kernel's gradients below float16's normal numbers, with the loss
    of 96 ids times what makes it the mean over 2^10 times as many."""
    targets, mask = jnp.asarray(np.roll(IDS, -1, 1)), jnp.ones(IDS.shape, bool)

    def lost(parametrisation, *loss_scales):
        model = _model(
            parametrisation=parametrisation, mixer="conv", precision="float16"
        )
        graph, params = nnx.split(model)
        loss = make_loss(parametrisation)

        @jax.jit
        def share(loss_scale):
            grads = jax.grad(
                lambda p: loss_scale * loss(nnx.merge(graph, p)(IDS), targets, mask)
            )(jax.tree.map(lambda p: p.astype(jnp.float16), params))
            kernel = grads["mixers"][0]["kernel"][...]
            return jnp.mean(abs(kernel) < jnp.finfo(jnp.float16).smallest_normal)

        return [float(share(scale)) for scale in loss_scales]

    plain, scaled = lost("regular", 2.0**-10, 2.0)
    assert plain > 0.5 and scaled < 0.01
    (unit,) = lost("unit", 1.0)  # its loss sends back the gradient of a sum
    assert unit < 0.01


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`precision` must be one of .*'fp16'"):
        ModelConfig(precision="fp16")
    with pytest.raises(ValueError, match="`residual` must be 'fixed' or 'mean'"):
        ModelConfig(residual="default")
    with pytest.raises(ValueError, match="multiple of `groups` 8, got 12"):
        ModelConfig(width=12, head_size=4)
    with pytest.raises(ValueError, match="`steps` must be 1 or more, got 0"):
        Config(steps=0)


def test_the_presets_are_the_papers():
    precisions, mixers = ("float32", "float16"), ("attention", "conv", "rnn")
    assert PRESETS["table"][1].steps == 2**19 and PRESETS["gpu"][1].steps < 2**10
    table = settings("table", precisions, mixers)
    assert len(table) == 20  # 4 models in 5 ways
    assert {s.model.depth for s in table if s.model.mixer != "rnn"} == {8}
    figure = settings("figure", precisions, mixers)
    # 5 models, 3 norms, 3 residuals (one of them regular only), 2 optimisers.
    assert len(figure) == 5 * 3 * 2 * (2 * 5 + 3)
    assert len({*figure}) == len(figure)
    first_of = {s.name: s.kind for s in reversed(figure)}
    assert {*first_of.values()} == {"regular float32"}


def test_the_search_ends_where_it_gets_worse():
    loss = {-9: 2.5, -8: 2.1, -7: 2.0, -6: 2.02, -5: 2.2, -4: math.inf, -3: math.inf}

    def tried(start, count, worse):
        search, found = Search(worse=worse), {}
        rates = range(start, start + count)
        while rates:
            found |= {r: loss.get(r, 3.0) for r in rates}
            rates = search.next(found, count)
        return sorted(found)

    assert tried(-8, 1, 0.1) == [-8, -7, -6, -5]
    assert tried(-8, 1, 0.0) == [-8, -7, -6]
    assert tried(-8, 2, 0.3) == [-8, -7, -6, -5, -4, -3]
    assert tried(-6, 1, 0.0) == [-8, -7, -6, -5]  # and downwards
    assert tried(-4, 1, 0.1) == [-8, -7, -6, -5, -4]  # where the first ones fail
    flat = Search(limits=(-3, 2), worse=0.1)
    assert flat.next({0: 5.0, 1: 5.0}, 2) == (-2, -1)
    assert flat.next(dict.fromkeys(range(-2, 2), 5.0), 2) == ()
    assert Search(near=3).first(table_setting("unit"), -6) == (-7, -6, -5)
    assert Search(count=2).first(table_setting("unit"), None) == (-8, -7)


def table_setting(parametrisation, precision="float32", **more):
    return Setting(ModelConfig(parametrisation, precision=precision), **more)


def test_the_table_compares_seed_by_seed_at_each_best_rate():
    def runs(setting, log2_rate, bits):
        return [
            Run(setting, 10, log2_rate, seed, 0.0, b, b) for seed, b in enumerate(bits)
        ]

    wide, narrow = table_setting("unit"), table_setting("unit", "float16")
    regular = table_setting("regular")
    found = [
        *runs(regular, -8, (2.0, 2.2)),
        *runs(wide, -8, (9.0, 9.0)),
        *runs(wide, -7, (2.1, 2.3)),
        *runs(narrow, -7, (2.11, 2.32)),
        *runs(narrow, -6, (None, 1.0)),  # a seed that failed is no best rate
    ]
    assert median_bits(found, narrow, 2) == {-7: pytest.approx(2.215), -6: math.inf}
    assert median_bits(found, narrow, 3) == {}
    table = {row["trained as"]: row for row in rows(results(found))}
    row = table["unit-scaled float16"]
    assert row["best rate"] == "2^-7"
    # t(0.975, 1) = 12.706; of 0.01 and 0.02 the standard error is 0.005.
    assert row["beside own float32"] == "+0.015 ± 0.064"
    assert row["beside regular float32"].startswith("+0.115")
    assert table["regular float32"]["beside own float32"] == ""
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def _smoke(folder, **more):
    return Config(
        out=folder,
        data=folder,
        search=Search(-7, -4, count=2, near=1, worse=0.0, limits=(-7, -3)),
        mixers=("conv",),
        seeds=2,
        steps=8,
        batch=2,
        length=16,
        overlap=2,
        steps_at_once=4,
        eval_batch=2,
        eval_characters=64,
        width=8,
        depth=1,
        **more,
    )


def test_the_sweep_goes_on_where_it_was_killed(tmp_path, capsys, monkeypatch):
    text = "the quick brown fox jumps over the lazy dog. " * 40
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text)
    config = _smoke(tmp_path, precisions=("float32",))
    runs = run(config)
    assert {r.setting.kind for r in runs} == {"regular float32", "unit-scaled float32"}
    assert {r.log2_rate for r in runs} >= {-7, -6} and len(runs) % 4 == 0
    assert "test bits" in capsys.readouterr().out
    assert (tmp_path / "scatter.png").stat().st_size > 10_000
    assert "| unit-scaled float32 |" in (tmp_path / "table.md").read_text()
    path = tmp_path / "runs.jsonl"
    whole = path.read_text().splitlines()
    assert len(read_lines(path)[1]) == len(runs)
    assert read_lines(path)[1][0]["device"]
    # As a kill leaves it: the last setting's results are not all there.
    path.write_text("\n".join(whole[:-4]) + "\n" + whole[-4][:30])
    again = run(config)
    assert sorted(map(repr, again)) == sorted(map(repr, runs))
    # Nothing is missing: nothing is trained.
    monkeypatch.setattr("experiments.char_lm.paper.sweep.train", None)
    assert len(run(config)) == len(runs)
    with pytest.raises(ValueError, match="runs of another settings"):
        run(dataclasses.replace(config, steps=9))


@pytest.mark.slow
def test_the_sweep_trains_a_recurrence_in_every_precision(tmp_path):
    text = "the quick brown fox jumps over the lazy dog. " * 40
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text)
    config = dataclasses.replace(
        _smoke(tmp_path, precisions=(*PRECISIONS,)),
        mixers=("rnn",),
        search=Search(-7, -7, count=1, near=1, limits=(-7, -7)),
        seeds=1,
    )
    found = results(run(config))
    # Regular and unit-scaled in 8 precisions, 5 of them also with a loss scale.
    assert len(found) == 2 * 8 + 5
    assert all(map(math.isfinite, (r.mean for r in found)))
