"""BERT: masked batches, both parametrisations, loss scales, SQuAD, and the runs."""

import dataclasses
import functools as ft
import json
import math
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import experiments.bert as bert
import jax_unit_scaling as jus
from experiments.bert import compare, pretrain as pretraining
from experiments.bert.data import load_text, masked_batch, predictions
from experiments.bert.finetune import FinetuneConfig, _batch, finetune
from experiments.bert.model import TINY, MaskedLM, SpanModel
from experiments.bert.pretrain import PretrainConfig, pretrain
from experiments.bert.squad import (
    Question,
    Windows,
    decode,
    exact,
    f1,
    normalise,
    read_questions,
    score,
    windows,
)
from experiments.bert.training import (
    fresh,
    load_weights,
    make_optimiser,
    make_training,
    warmup_linear,
)
from experiments.shared.layers import make_loss
from experiments.shared.loss_scale import LossScale
from experiments.shared.precision import PRECISIONS
from experiments.shared.record import read_lines, read_metrics
from experiments.shared.tokens import (
    CLS,
    MASK,
    SEP,
    SPECIAL,
    encode,
    learn_word_pieces,
    word_pieces,
)

SAMPLE = Path(bert.__file__).with_name("sample.json")
IDS = np.arange(5, 5005, dtype=np.int32)  # each piece once, so that places show


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text with the words of the sample."""
    path = tmp_path_factory.mktemp("text")
    questions = read_questions(SAMPLE)
    parts = [x for q in questions for x in (q.context, q.text)]
    for split in ("train", "valid", "test"):
        (path / f"{split}.txt").write_text("\n".join(parts * 8) + "\n")
    return path


def _small(folder, out, **options):
    model = dataclasses.replace(TINY, depth=1, positions=96)
    default = {"model": model, "vocabulary": 300, "rate": 2**-6, "warmup": 5}
    size = {"steps": 12, "batch": 8, "accumulate": 1, "length": 32, "eval_batches": 2}
    return PretrainConfig(out=out, data=folder, **default | size | options)


# ---------------------------------------------------------------- data


def test_masks_are_placed_and_drawn_as_in_bert():
    batch = masked_batch(IDS, pieces=5005, step=3, seed=0, batch=400, length=64)
    rows = np.arange(400)[:, None]
    assert batch.places.shape == (400, predictions(64)) == (400, 10)
    shown = batch.ids[rows, batch.places]
    n = shown.size
    for share, p in (
        ((shown == MASK).mean(), 0.8),
        ((shown == batch.labels).mean(), 0.1),
    ):
        # Four standard errors; a random piece is the true one once in 5000.
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n) + 1 / 5000
    whole = batch.ids.copy()
    whole[rows, batch.places] = batch.labels
    assert (whole[:, 0] == CLS).all() and (whole[:, -1] == SEP).all()
    text = whole[whole >= len(SPECIAL)].reshape(400, 61)  # all but three are text
    np.testing.assert_array_equal(np.diff(text), 1)
    assert (np.diff(batch.places) > 0).all() and (np.diff(batch.segments) >= 0).all()
    # The second segment begins behind the [SEP] in the middle.
    begins = batch.segments.argmax(1)
    np.testing.assert_array_equal(whole[rows[:, 0], begins - 1], SEP)
    assert begins.min() >= 61 // 4 + 2 and begins.max() <= 3 * 61 // 4 + 2
    # Every place of the text is as likely.
    counts = np.bincount(batch.places.ravel(), minlength=64)[1:63]
    assert counts.min() > 30 and counts.max() < 110


def test_a_batch_is_a_function_of_seed_and_step():
    def of(**change):
        given = {"pieces": 5005, "step": 3, "seed": 0, "batch": 4, "length": 32}
        return masked_batch(IDS, **given | change)

    for a, b in zip(of(), of(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (of().ids != of(step=4).ids).any() and (of().ids != of(seed=1).ids).any()
    with pytest.raises(ValueError, match="`length` must be 7 or more, .* got 6 and"):
        of(length=6)


def test_pieces_of_words_give_the_text_back(folder):
    text = (folder / "train.txt").read_text()
    pieces = learn_word_pieces(text, 300, lowercase=False)
    assert tuple(pieces[:5]) == SPECIAL and len({*pieces}) == len(pieces) <= 300
    encoder = word_pieces(pieces, lowercase=False)
    ids = encode(encoder, text)
    assert (ids >= len(SPECIAL)).all() and ids.max() < len(pieces)
    found, wanted = encoder.decode(ids.tolist()), text
    assert found.replace(" ", "") == "".join(wanted.split())
    assert encode(word_pieces(pieces, lowercase=True), "IDA")[0] >= len(SPECIAL)


def test_a_text_is_encoded_once(folder, tmp_path):
    first = load_text(tmp_path, folder, vocabulary=300)
    again = load_text(tmp_path, folder, vocabulary=300)
    np.testing.assert_array_equal(first.train, again.train)
    assert first.pieces == again.pieces
    with pytest.raises(ValueError, match="another vocabulary: 300, not 200"):
        load_text(tmp_path, folder, vocabulary=200)


# ---------------------------------------------------------------- model


def _model(**options):
    config = dataclasses.replace(TINY, width=64, **options)
    graph, params = fresh(
        lambda rngs: MaskedLM(config, 256, 16 * 64, rngs=rngs), seed=0
    )
    ids = np.random.default_rng(0).integers(5, 256, 10000).astype(np.int32)
    batch = masked_batch(ids, pieces=256, step=0, seed=0, batch=16, length=64)
    return graph, params, batch


def _recorded(monkeypatch, graph, params, batch):
    """The rms of what each layer gives."""
    found = {}
    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.LayerNorm, nnx.Embed)
    kinds += (jus.nnx.Linear, jus.nnx.LinearGeneral, jus.nnx.LayerNorm, jus.nnx.Embed)
    with monkeypatch.context() as patched:
        for kind in kinds:
            plain = kind.__call__

            def call(self, *args, plain=plain, **options):
                y = plain(self, *args, **options)
                found[f"{type(self).__name__} {len(found)}"] = float(
                    jnp.sqrt(jnp.mean(y.astype(jnp.float32) ** 2))
                )
                return y

            patched.setattr(kind, "__call__", call)
        logits = nnx.merge(graph, params)(batch.ids, batch.segments, batch.places)
    return found | {"logits": float(logits.std())}


def test_every_activation_begins_near_unit_scale(monkeypatch):
    """Between 1/2 and 2; attention's output, a mean of values, may have 1/4."""
    found = _recorded(monkeypatch, *_model())
    values = np.array([*found.values()])
    assert len(found) > 2 * 6 + 5
    assert values.min() > 1 / 4 and values.max() < 2, found
    assert np.mean(values > 1 / 2) > 0.8, found
    regular = _recorded(monkeypatch, *_model(parametrisation="regular"))
    assert regular.keys() == found.keys()
    assert min(regular.values()) < 1 / 16


def test_one_flag_switches_the_parametrisation():
    shapes, scales = {}, {}
    for kind in ("unit", "regular"):
        graph, params, b = _model(parametrisation=kind)
        loss = make_loss(kind)

        @jax.jit
        def grads(params, graph=graph, loss=loss, b=b):
            def of(params):
                logits = nnx.merge(graph, params)(b.ids, b.segments, b.places)
                return loss(logits, b.labels)

            value, grads = jax.value_and_grad(of)(params)
            return value, [jnp.sqrt(jnp.mean(g**2)) for g in jax.tree.leaves(grads)]

        value, found = grads(params)
        assert abs(value - math.log(256)) < 0.8  # unit logits add a half
        shapes[kind] = [x.shape for x in jax.tree.leaves(params)]
        scales[kind] = np.array(found)
    assert shapes["unit"] == shapes["regular"]
    used = scales["unit"] > 1e-6  # a key's bias moves no softmax
    assert (scales["unit"][used] > 1 / 100).all() and (scales["unit"] < 16).all()
    assert np.median(scales["unit"]) > 20 * np.median(scales["regular"])


@pytest.mark.parametrize("parametrisation", ["regular", "unit"])
def test_scanned_blocks_are_the_same_model(parametrisation):
    config = dataclasses.replace(TINY, parametrisation=parametrisation)
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
    segments, places = jnp.zeros_like(ids), jnp.tile(jnp.arange(3), (2, 1))

    def loss(graph, params):
        logits = nnx.merge(graph, params)(ids, segments, places)
        return jnp.sin(logits).sum()

    graphs, trees = zip(
        *(
            fresh(
                lambda rngs, scan=scan: MaskedLM(
                    dataclasses.replace(config, scan=scan), 64, 16, rngs=rngs
                ),
                0,
            )
            for scan in (False, True)
        ),
        strict=True,
    )
    grads = jax.jit(
        lambda p: [jax.value_and_grad(ft.partial(loss, g))(p) for g in graphs]
    )
    chex.assert_trees_all_equal(*trees)
    chex.assert_trees_all_close(*grads(trees[0]), rtol=1e-4, atol=1e-5)


def test_padding_is_not_seen():
    config = dataclasses.replace(TINY, depth=1)
    graph, params = fresh(lambda rngs: SpanModel(config, 64, 32, rngs=rngs), seed=0)
    ids = np.arange(5, 21)[None].repeat(2, 0)
    ids[1, 12:] = 0
    seen = np.arange(16)[None] < np.array([[12], [12]])
    allowed = seen & (np.arange(16) > 4)
    logits = nnx.merge(graph, params)(ids, 0 * ids, seen, allowed)
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5)
    assert (logits[..., :5] < -1e8).all() and (abs(logits[..., 5:12]) < 10).all()


# ---------------------------------------------------------------- training


def test_the_schedule_is_linear_up_and_down():
    rate = warmup_linear(2.0, warmup=10, steps=50)
    found = [float(rate(i)) for i in (0, 5, 10, 30, 50)]
    np.testing.assert_allclose(found, [0, 1, 2, 1, 0], atol=1e-6)


def test_lamb_is_optax_lamb_on_weights_and_adam_on_biases():
    params = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([3.0, -4.0])}
    grads = jax.tree.map(lambda x: 0.1 * x**2, params)

    def update(optimiser, params):
        return optimiser.update(grads, optimiser.init(params), params)[0]

    for size in (1.0, 100.0):  # an update is a share of the weights
        scaled = params | {"kernel": size * params["kernel"]}
        ours = update(make_optimiser("lamb", "unit", lambda _: 0.01), scaled)
        lamb = update(optax.lamb(0.01, weight_decay=0.01), scaled)
        np.testing.assert_allclose(ours["kernel"], lamb["kernel"], rtol=1e-5)
        np.testing.assert_allclose(ours["bias"], -0.01 * np.ones(2), rtol=1e-4)
        norm = np.linalg.norm(ours["kernel"]) / np.linalg.norm(scaled["kernel"])
        np.testing.assert_allclose(norm, 0.01, rtol=1e-5)


def _steps(loss_scale, factors):
    """States after steps whose gradients are the factors."""
    training = make_training(
        lambda p, factor: (p * factor).sum(),
        optax.sgd(1.0),
        PRECISIONS["float32"],
        loss_scale=loss_scale,
    )
    states = [training.begin(jnp.zeros(3), 0)]
    step = jax.jit(training.step)
    for factor in factors:
        states.append(step(states[-1], jnp.float32(factor))[0])
    return states


def test_a_dynamic_loss_scale_grows_shrinks_and_skips():
    states = _steps(LossScale(8.0, grow_every=2), [1, 1, np.inf, 1, np.nan, 1, 1, 1])
    assert [float(s.scale.value) for s in states] == [8, 8, 16, 8, 8, 4, 4, 8, 8]
    assert [int(s.scale.skipped) for s in states] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    # A step that was skipped leaves the parameters; others are not multiplied.
    assert [float(s.params[0]) for s in states] == [0, -1, -2, -2, -3, -3, -4, -5, -6]
    # The factor is a real one: it overflows what would not without.
    large = _steps(LossScale(2.0**24, grow_every=2), [2.0**120, 2.0**100])
    assert [int(s.scale.skipped) for s in large] == [0, 1, 1]
    limited = _steps(LossScale(2.0, grow_every=1, limits=(1, 4)), [1, 1, np.inf] * 2)
    assert [float(s.scale.value) for s in limited] == [2, 4, 4, 2, 4, 4, 2]


def test_a_fixed_loss_scale_skips_nothing():
    states = _steps(LossScale(1024.0), [1, np.inf, 1])
    assert [float(s.params[0]) for s in states[:2]] == [0, -1]
    assert not np.isfinite(states[-1].params).any()
    assert float(states[-1].scale.value) == 1024 and int(states[-1].scale.skipped) == 0
    with pytest.raises(ValueError, match="`initial` must be within `limits` .* 0.5"):
        LossScale(0.5)
    with pytest.raises(ValueError, match="`grow_every` must be 1 or more, .* got 0"):
        LossScale(grow_every=0)


def test_pieces_of_a_batch_are_the_batch():
    def after(accumulate):
        training = make_training(
            lambda p, x: jnp.mean((p - x) ** 2),
            optax.sgd(1.0),
            PRECISIONS["float32"],
            accumulate=accumulate,
        )
        state = training.begin(jnp.zeros(2), 0)
        state, value = jax.jit(training.step)(state, jnp.arange(8.0).reshape(4, 2))
        return [*state.params, value]

    np.testing.assert_allclose(after(1), after(4), rtol=1e-6)


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):
    """A run that has ended, and its metrics."""
    config = _small(folder, tmp_path_factory.mktemp("bert"), checkpoint_every=5)
    return config, pretrain(config, progress=False)


def test_a_killed_run_ends_with_the_same_numbers(pretrained, tmp_path, monkeypatch):
    whole, final = pretrained
    config = dataclasses.replace(whole, out=tmp_path)
    # The same pieces of words: those learnt anew may differ.
    (tmp_path / "text").symlink_to(whole.out / "text")

    with monkeypatch.context() as patched:

        def killed(ids, *, step, **options):
            if step == 8:
                raise KeyboardInterrupt
            return masked_batch(ids, step=step, **options)

        patched.setattr(pretraining, "masked_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, progress=False)
    assert pretrain(config, progress=False) == final
    assert read_metrics(config.out) == read_metrics(whole.out)
    a, b = (np.load(c.out / "weights.npz") for c in (config, whole))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16, master", "float16", "fp8, master"])
@pytest.mark.parametrize("optimiser", ["lamb", "adamw"])
def test_it_learns_in_low_precision(folder, tmp_path, precision, optimiser):
    model = dataclasses.replace(TINY, depth=1, precision=precision)
    rate = 2**-5 if optimiser == "lamb" else 2**-2
    config = _small(
        folder, tmp_path, model=model, optimiser=optimiser, rate=rate, steps=120
    )
    assert pretrain(config, progress=False)["valid_nats"] < 0.8 * math.log(300)


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="`batch` must be a multiple of .* got 9"):
        PretrainConfig(batch=9, accumulate=2)
    with pytest.raises(ValueError, match="`warmup` must be between 0 and `steps` 5"):
        PretrainConfig(steps=5, warmup=5)
    with pytest.raises(ValueError, match="`length` must be at most .* 384, got 512"):
        PretrainConfig(length=512)
    with pytest.raises(ValueError, match="`precision` must be one of .* got 'half'"):
        dataclasses.replace(TINY, precision="half")
    with pytest.raises(ValueError, match="`width` must be a multiple of `head_size`"):
        dataclasses.replace(TINY, width=30)
    with pytest.raises(FileNotFoundError, match="no pre-training run ended there"):
        load_weights(tmp_path / "weights.npz", {})
    np.savez(tmp_path / "weights.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"has \(3,\) for the parameter a of"):
        load_weights(tmp_path / "weights.npz", {"a": jnp.zeros(2)})


# ---------------------------------------------------------------- SQuAD


@pytest.mark.parametrize(
    "answer, truth, same, overlap",
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("in 1871", "1871", 0, 2 / 3),  # one of two words, one of one
        ("the red red stone", "red stone wall", 0, 2 / 3),  # 2 of 3 and 2 of 3
        ("a cat", "dog", 0, 0),
        ("", "dog", 0, 0),
        ("the", "", 1, 1),
    ],
)
def test_exact_match_and_f1_are_the_official_ones(answer, truth, same, overlap):
    assert exact(answer, truth) == same
    np.testing.assert_allclose(f1(answer, truth), overlap)


def test_answers_are_normalised_in_the_official_order():
    # Punctuation goes first, so that what it parts becomes one word.
    assert normalise("The  U.S.A.: an\tother-day ") == "usa otherday"


def test_a_score_takes_the_best_truth_and_no_answer_alone():
    questions = read_questions(SAMPLE)
    assert [len(q.answers) for q in questions] == [2, 1, 1, 0, 2, 1, 0]
    answers = {q.id: q.answers[-1] if q.answers else "" for q in questions}
    assert {*score(questions, answers).values()} == {100.0}
    answers |= {"light-2": "keeper Ida Holm", "tea-3": "sold", "tea-2": ""}
    found = score(questions, answers)
    np.testing.assert_allclose(found["exact"], 100 * 4 / 7)
    np.testing.assert_allclose(found["f1"], 100 * (4 + 0.8) / 7)
    np.testing.assert_allclose(found["HasAns_f1"], 100 * (3 + 0.8) / 5)
    np.testing.assert_allclose(found["NoAns_exact"], 50)
    with pytest.raises(ValueError, match=r"none for the questions \['light-1'\]"):
        score(questions[:1], {})


@pytest.fixture(scope="module")
def encoder(folder):
    text = (folder / "train.txt").read_text()
    return word_pieces(learn_word_pieces(text, 300, lowercase=False), lowercase=False)


@pytest.mark.parametrize("length, stride", [(96, 16), (40, 8), (28, 7)])
def test_spans_map_back_to_characters_across_windows(encoder, length, stride):
    questions = read_questions(SAMPLE)
    found = windows(questions, encoder, length=length, stride=stride)
    logits = np.zeros((len(found.ids), 2, length))
    rows = np.arange(len(found.ids))
    for side in (0, 1):
        logits[rows, side, found.spans[:, side]] = 5
    answers = decode(questions, found, logits, may_be_none=True)
    assert answers == {q.id: q.answers[0] if q.answers else "" for q in questions}
    with_answer = {*found.questions[found.spans[:, 0] > 0].tolist()}
    assert with_answer == {i for i, q in enumerate(questions) if q.answers}
    for i, q in enumerate(questions):
        own = found.questions == i
        inside = found.allowed[own][:, 1:]
        covered = {
            int(c) for b, e in found.offsets[own][:, 1:][inside] for c in range(b, e)
        }
        letters = {k for k, c in enumerate(q.context) if not c.isspace()}
        assert covered == letters
        assert (length == 28) <= (own.sum() > 1)
    assert (found.ids[~found.seen] == 0).all() and (found.ids[:, 0] == CLS).all()


def test_decoding_keeps_order_length_and_the_threshold(encoder):
    questions = read_questions(SAMPLE)[:1]
    found = windows(questions, encoder, length=96, stride=16)
    first = int(np.flatnonzero(found.allowed[0])[1])
    logits = np.zeros((1, 2, 96))
    logits[0, 0, first + 6] = logits[0, 1, first + 2] = 9  # it would end first
    logits[0, 1, first + 40] = 8  # too long
    logits[0, 1, first + 7] = 1
    logits[0, 0, 2] = 99  # within the question

    def of(**options):
        return decode(questions, found, logits, **{"may_be_none": False} | options)

    def text(i, j):
        begin, end = found.offsets[0, first + i, 0], found.offsets[0, first + j, 1]
        return {"light-1": questions[0].context[begin:end]}

    assert of() == text(6, 7)
    assert of(longest=60) == text(6, 40)
    logits[0, :, 0] = 6  # 12 for none, 10 for the span
    assert of(may_be_none=True) == {"light-1": ""}
    assert of(may_be_none=True, threshold=3.0) == of() == text(6, 7)


def test_no_answer_has_the_least_score_of_all_windows(encoder):
    questions = read_questions(SAMPLE)[:1]
    found = windows(questions, encoder, length=40, stride=8)
    logits = np.zeros((len(found.ids), 2, 40))
    logits[:, :, 0] = 5  # but for one window, which has an answer
    logits[1, 0, found.spans[1, 0]] = 3
    assert decode(questions, found, logits, may_be_none=True)["light-1"] == ""
    logits[1, :, 0] = 1
    assert decode(questions, found, logits, may_be_none=True)["light-1"] != ""


def test_an_answer_may_touch_what_is_beside_it(encoder):
    context = "Its lamp (whale oil), burned until 1871."
    question = Question("q", "What?", context, ("whale oil",), (10,))
    found = windows([question], encoder, length=64, stride=8)
    (first, last), offsets = found.spans[0], found.offsets[0]
    assert context[offsets[first, 0] : offsets[last, 1]] == "whale oil"


def test_files_of_another_form_are_named(tmp_path, encoder):
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="bad.json is not a file of SQuAD's form"):
        read_questions(path)
    given = json.loads(SAMPLE.read_text())
    given["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 3
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match="light-1 has its answer '1871' at char"):
        read_questions(path)
    with pytest.raises(ValueError, match="`length` 24 leaves .* than `stride` 20"):
        windows(read_questions(SAMPLE), encoder, length=24, stride=20)


def test_an_epoch_sees_every_window_once():
    found = (np.arange(10),) * 7
    config = FinetuneConfig(Path(), SAMPLE, SAMPLE, batch=4)
    seen = np.concatenate([_batch(config, Windows(*found), i).ids for i in range(5)])
    for epoch in seen.reshape(2, 10):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert (seen[:10] != seen[10:]).any()


def test_pretrained_and_fine_tuned_it_answers_the_sample(pretrained, tmp_path):
    config = FinetuneConfig(
        pretrained=pretrained[0].out,
        train=SAMPLE,
        dev=SAMPLE,
        out=tmp_path / "squad",
        rate=2**-5,
        epochs=120,
        batch=8,
        length=96,
        stride=32,
    )
    found = finetune(config, progress=False)
    assert found["exact"] == found["f1"] == found["NoAns_exact"] == 100.0
    answers = json.loads((tmp_path / "squad" / "predictions.json").read_text())
    assert answers["light-2"] == "Ida Holm" and answers["tea-3"] == ""
    assert finetune(config, progress=False) == found  # from its last checkpoint
    with pytest.raises(ValueError, match="at most the 96 positions .* got 97"):
        finetune(dataclasses.replace(config, length=97))
    with pytest.raises(FileNotFoundError, match="`pretrained` must be the folder of a"):
        finetune(dataclasses.replace(config, pretrained=tmp_path))


# ---------------------------------------------------------------- comparison


def test_the_comparison_trains_what_is_missing_and_draws(folder, tmp_path, monkeypatch):
    config = dataclasses.replace(
        bert.PRESETS["smoke"][1],
        out=tmp_path,
        data=folder,
        model=dataclasses.replace(TINY, depth=1),
        kinds=("regular float32", "unit-scaled float16"),
        regular_log2_rates=(-5,),
        unit_log2_rates=(-5,),
        vocabulary=300,
    )
    found = bert.run(config)
    assert [(r.kind, r.log2_rate) for r in found] == [
        ("regular float32", -5),
        ("unit-scaled float16", -5),
    ]
    assert all(len(r.losses) == config.steps and r.step_ms > 0 for r in found)
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    table = (tmp_path / "table.md").read_text()
    assert (
        "| regular float32 | 2^-5 |" in table
        and "| unit-scaled float16 | 2^-5 |" in table
    )

    begun = []
    train = compare._train
    monkeypatch.setattr(compare, "_train", lambda *a: begun.append(a[2]) or train(*a))
    # In no time: one step, then the end. All are then compared at that step.
    more = dataclasses.replace(
        config, kinds=(*config.kinds, "regular float16, dynamic"), seconds=0.0
    )
    again = bert.run(more)
    assert begun == ["regular float16, dynamic"] and again[:2] == found
    assert again[-1].log2_rate == -5 and len(again[-1].losses) == 1
    rows = compare.rows(more, again)
    assert rows[-1]["steps"] == "1" and rows[-1]["ms a step"] == "nan"
    assert rows[0]["final loss"] == f"{found[0].losses[0]:.4f}"
    shared, lines = read_lines(tmp_path / "runs.jsonl")
    assert len(lines) == 3 and lines[0]["jax"] == jax.__version__
    assert shared["settings"]["seed"] == 0 and "out" not in shared["settings"]
    with pytest.raises(ValueError, match=r"`kinds` must be of .* got \['regular'\]"):
        dataclasses.replace(config, kinds=("regular",))


def test_a_family_s_first_kind_chooses_the_rate():
    def of(kind, rate, valid):
        return compare.Run(kind, rate, (1.0,), valid, 1.0, 0, "cpu", "0.10.2")

    config = bert.PRESETS["cpu"][1]
    found = [
        of("regular float32", r, v) for r, v in ((-7, 3.0), (-6, 2.0), (-5, math.nan))
    ]
    assert compare._rates(config, "regular float32", found) == config.regular_log2_rates
    assert compare._rates(config, "regular float16", found) == (-6,)
    assert compare._rates(config, "unit-scaled fp8", found) == config.unit_log2_rates


def test_it_runs_where_tyro_is_missing():
    code = (
        "import sys; sys.modules['tyro'] = None\n"
        "import experiments.bert, experiments.bert.pretrain, experiments.bert.finetune"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_the_presets_have_the_papers_shapes():
    base, large = (pretraining.PRESETS[n][1] for n in ("base", "large-2"))
    assert (base.model.depth, base.model.width) == (12, 768)
    assert (large.model.depth, large.model.width) == (24, 1024)
    assert base.batch // base.accumulate == 4 * 8
    assert large.batch // large.accumulate == 4 * 2
    assert (large.length, large.steps, large.warmup) == (384, 8437, 275)

    def count(config):
        shapes = jax.eval_shape(
            lambda: nnx.state(MaskedLM(config, 30400, 1, rngs=nnx.Rngs(0)))
        )
        return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))

    # BERT-Base has 110 million, with a pooler and 512 positions in place of 384.
    assert 108e6 < count(base.model) < 111e6
