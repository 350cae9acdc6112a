"""Text as ids: a folder of three files, or Python's own standard library."""

import dataclasses
import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

SPLITS = ("train", "valid", "test")
Unit = Literal["characters", "bytes"]
Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as ids of its characters, or of its bytes, in three splits."""

    name: str
    vocabulary: tuple[str, ...]
    train: Ids
    valid: Ids
    test: Ids

    @property
    def fingerprint(self) -> str:
        """Differs where the vocabulary or any split does."""
        digest = hashlib.sha256("".join(self.vocabulary).encode())
        for split in SPLITS:
            digest.update(getattr(self, split).tobytes())
        return digest.hexdigest()[:16]


def text_of(split: Ids) -> str:
    """The text of a corpus of bytes."""
    return split.astype(np.uint8).tobytes().decode()


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs, the characters that follow, and which of them count: [batch, length]."""

    inputs: Ids
    targets: Ids
    mask: np.ndarray[Any, np.dtype[np.bool_]]


def load_corpus(path: Path | None = None, unit: Unit = "characters") -> Corpus:
    """Reads train.txt, valid.txt and test.txt in `path`, or the standard library.

    The vocabulary is that of the characters in use, or of all 256 bytes of UTF-8: in a
    text that is mostly ASCII bits of either are about the same, and rare characters
    make a large readout.

    Raises:
        FileNotFoundError: if the folder or one of the files is missing.
        ValueError: if a file is empty or not UTF-8.
    """
    texts = _standard_library() if path is None else _folder(path)
    name = "Python's standard library" if path is None else str(path)
    if unit == "bytes":
        ids = {k: np.frombuffer(t.encode(), np.uint8) for k, t in texts.items()}
        splits = {k: x.astype(np.int32) for k, x in ids.items()}
        return Corpus(name, tuple(map(chr, range(256))), **splits)
    codes = {k: np.frombuffer(t.encode("utf-32-le"), "<u4") for k, t in texts.items()}
    used = np.unique(np.concatenate([np.unique(c) for c in codes.values()]))
    lookup = np.zeros(int(used.max()) + 1, np.int32)
    lookup[used] = np.arange(len(used), dtype=np.int32)
    vocabulary = tuple(map(chr, used.tolist()))
    return Corpus(name, vocabulary, **{k: lookup[c] for k, c in codes.items()})


def _folder(path: Path) -> dict[str, str]:
    files = {split: path / f"{split}.txt" for split in SPLITS}
    if missing := [str(f) for f in files.values() if not f.is_file()]:
        raise FileNotFoundError(
            f"`data` must be a folder with train.txt, valid.txt and test.txt; missing: "
            f"{', '.join(missing)}."
        )
    return {split: _read(f) for split, f in files.items()}


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 text: {e}. Convert it first.") from e
    if not text:
        raise ValueError(f"{file} is empty: put text into it.")
    return text


def _standard_library() -> dict[str, str]:
    """The sources, split by file: 1% each of valid and test, by a stable hash."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few of its own tests of encodings
            continue
        share = zlib.crc32(relative.as_posix().encode()) % 100
        parts[{0: "valid", 1: "test"}.get(share, "train")].append(text)
    return {split: "".join(texts) for split, texts in parts.items()}


def train_batch(
    ids: Ids, *, step: int, seed: int, batch: int, length: int, overlap: int = 0
) -> Batch:
    """Windows at random places, a function of `seed` and `step` alone.

    So a run that goes on after a kill sees what it would have seen. The first `overlap`
    targets of a window do not count: they have too little before them.
    """
    _check_length(ids, length, overlap)
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(ids) - length, size=batch)
    windows = ids[starts[:, None] + np.arange(length + 1)]
    mask = np.broadcast_to(np.arange(length) >= overlap, (batch, length))
    return Batch(windows[:, :-1], windows[:, 1:], mask)


def eval_batches(
    ids: Ids, *, batch: int, length: int, limit: int | None = None, overlap: int = 0
) -> Iterator[Batch]:
    """Every target once, in order, in windows of one shape; the last are padded.

    A window begins `overlap` characters before the last one's end, to see them: their
    targets have been counted already, but for the text's first.
    """
    _check_length(ids, length, overlap)
    targets = min(len(ids) - 1, limit or len(ids))
    stride = length - overlap
    for start in range(0, targets, batch * stride):
        starts = start + stride * np.arange(batch)[:, None]
        places = starts + np.arange(length)
        counts = (places >= starts + overlap) | (starts == 0)
        mask = counts & (places < targets)
        places = np.minimum(places, targets - 1)
        yield Batch(ids[places], ids[places + 1], mask)


def _check_length(ids: Ids, length: int, overlap: int) -> None:
    if not 0 <= overlap < length:
        raise ValueError(
            f"`overlap` must be from 0 to `length` - 1 = {length - 1}, got {overlap}."
        )
    if len(ids) <= length:
        raise ValueError(
            f"a split must be longer than `length` {length}, got {len(ids)} characters."
        )
