"""What experiments share: text, batches, and the record of a run."""

import json

import numpy as np
import pytest

from experiments.shared.data import eval_batches, load_corpus, train_batch
from experiments.shared.evaluate import mean_bits
from experiments.shared.record import append_lines, claim, open_lines, read_lines


@pytest.fixture
def folder(tmp_path):
    text = "the quick brown fox jumps over the lazy dog, naïvely. " * 200
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_standard_library_is_megabytes_of_text():
    corpus = load_corpus()
    assert len(corpus.train) > 5e6 and len(corpus.valid) > 1e4
    assert list(corpus.vocabulary) == sorted(set(corpus.vocabulary))
    text = "".join(np.array(corpus.vocabulary)[corpus.train[: 10**6]])
    assert "def " in text


def test_batches_are_a_function_of_seed_and_step(folder):
    ids = load_corpus(folder).train
    a, b, c = (train_batch(ids, step=s, seed=0, batch=4, length=16) for s in (3, 3, 4))
    np.testing.assert_array_equal(a.inputs, b.inputs)
    assert (a.inputs != c.inputs).any()
    np.testing.assert_array_equal(a.inputs[:, 1:], a.targets[:, :-1])


@pytest.mark.parametrize("limit", [None, 100])
def test_evaluation_sees_each_target_once(folder, limit):
    ids = load_corpus(folder).valid
    batches = list(eval_batches(ids, batch=3, length=16, limit=limit))
    seen = np.concatenate([b.targets[b.mask] for b in batches])
    np.testing.assert_array_equal(seen, ids[1:][: limit or len(ids)])


def test_bad_text_gets_an_error_that_names_the_file(folder):
    with pytest.raises(FileNotFoundError, match="missing: .*train.txt, .*valid.txt"):
        load_corpus(folder / "nowhere")
    (folder / "valid.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"valid\.txt is empty"):
        load_corpus(folder)
    (folder / "valid.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"valid\.txt is not UTF-8"):
        load_corpus(folder)
    with pytest.raises(ValueError, match="must be longer than `length` 16"):
        train_batch(np.arange(5), step=0, seed=0, batch=1, length=16)


def test_bytes_are_those_of_the_text(folder):
    corpus = load_corpus(folder, "bytes")
    assert len(corpus.vocabulary) == 256
    text = (folder / "train.txt").read_text(encoding="utf-8")
    assert bytes(corpus.train.astype(np.uint8)).decode() == text


def test_targets_in_an_overlap_are_seen_before_and_not_counted(folder):
    ids = load_corpus(folder).valid
    seen, before = [], []
    for b in eval_batches(ids, batch=3, length=16, overlap=4):
        seen.append(b.targets[b.mask])
        before += [np.flatnonzero(row).min(initial=99) for row in b.mask if row.any()]
    np.testing.assert_array_equal(np.concatenate(seen), ids[1:])
    assert before[0] == 0 and {*before[1:]} == {4}
    batch = train_batch(ids, step=0, seed=0, batch=2, length=16, overlap=4)
    np.testing.assert_array_equal(batch.mask.sum(0) > 0, np.arange(16) >= 4)
    with pytest.raises(ValueError, match="`overlap` must be from 0 to .* 15, got 16"):
        train_batch(ids, step=0, seed=0, batch=2, length=16, overlap=16)


def test_bits_are_those_of_each_target_once(folder):
    ids = load_corpus(folder).valid
    counts = np.bincount(ids[1:])
    nats = -np.log(np.maximum(counts, 1) / counts.sum())
    size = {"batch": 3, "length": 16, "limit": None}
    entropy = nats @ counts / counts.sum() / np.log(2)
    for overlap in (0, 5):
        bits = mean_bits(lambda _, y: nats[y], ids, **size, overlap=overlap)
        np.testing.assert_allclose(bits, entropy, rtol=1e-12)
    two = mean_bits(lambda _, y: np.stack([nats[y], 2 * nats[y]]), ids, **size)
    np.testing.assert_allclose(two, [entropy, 2 * entropy], rtol=1e-12)


def test_a_folder_holds_one_run_and_says_how_it_was_made(tmp_path):
    claim(tmp_path / "run", {"config": {"seed": 0, "out": tmp_path}})
    claim(tmp_path / "run", {"config": {"seed": 0, "out": tmp_path}})
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {"jax", "flax", "python", "device", "command"} < {*found}
    assert found["command"].startswith("python ")
    with pytest.raises(ValueError, match="`out` .*/run holds a run of another config"):
        claim(tmp_path / "run", {"config": {"seed": 1}})


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert open_lines(path, {"steps": 3}) == []
    append_lines(path, [{"run": 1}, {"run": 2}])
    with path.open("a") as f:
        f.write('{"run": 3, "bi')
    assert open_lines(path, {"steps": 3}) == [{"run": 1}, {"run": 2}]
    append_lines(path, [{"run": 3}])
    assert read_lines(path) == ({"steps": 3}, [{"run": i} for i in (1, 2, 3)])
    with pytest.raises(ValueError, match="with runs of another steps: 3, not 4"):
        open_lines(path, {"steps": 4})
