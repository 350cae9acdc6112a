"""Masked-language-model batches of sequence pairs, from a text in pieces of words.

A sequence is [CLS] A [SEP] B [SEP], a window of the text cut in two. There is no
next-sentence prediction, and no padding.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..shared.data import Ids, load_corpus, text_of
from ..shared.record import claim
from ..shared.tokens import (
    CLS,
    MASK,
    SEP,
    SPECIAL,
    encode,
    learn_word_pieces,
    read_word_pieces,
    save_word_pieces,
)

MASKED = 0.15  # of a sequence, as in BERT
VALID_SEED = 2**31  # no run's own


class Text(NamedTuple):
    """The training and the validation text in pieces of words."""

    pieces: int
    train: Ids
    valid: Ids


def load_text(
    out: Path,
    data: Path | None,
    *,
    vocabulary: int,
    lowercase: bool = False,
    characters: int | None = None,
) -> Text:
    """Learns pieces of words and encodes a text by them, or reads what it did before.

    Args:
        out: the folder that keeps pieces.json and ids.npz.
        data: as in `load_corpus`.
        vocabulary: the number of pieces at most.
        lowercase: whether capitals and accents are dropped.
        characters: how many of the training text are read, by default all.
    """
    corpus = load_corpus(data, "bytes")
    about = {"vocabulary": vocabulary, "lowercase": lowercase, "characters": characters}
    claim(out, about | {"text": corpus.name, "fingerprint": corpus.fingerprint})
    if not (out / "ids.npz").exists():
        train, valid = text_of(corpus.train)[:characters], text_of(corpus.valid)
        pieces = learn_word_pieces(train, vocabulary, lowercase=lowercase)
        save_word_pieces(out / PIECES, pieces, lowercase=lowercase)
        encoder = read_word_pieces(out / PIECES)
        np.savez(
            out / "ids.npz", train=encode(encoder, train), valid=encode(encoder, valid)
        )
    found = np.load(out / "ids.npz")
    count = len(json.loads((out / PIECES).read_text())["pieces"])
    return Text(count, found["train"], found["valid"])


PIECES = "pieces.json"


class MaskedBatch(NamedTuple):
    """Ids and segments [batch, length]; places and true ids [batch, predictions]."""

    ids: Ids
    segments: Ids
    places: Ids
    labels: Ids


def masked_batch(
    ids: Ids, *, pieces: int, step: int, seed: int, batch: int, length: int
) -> MaskedBatch:
    """Windows at random places, a function of `seed` and `step` alone.

    Of each sequence the same number of places is predicted: 80% show [MASK] there, 10%
    a random piece, 10% what stands there.

    Raises:
        ValueError: if the text is shorter than a sequence.
    """
    inside = length - 3
    if inside < 4 or len(ids) < inside:
        raise ValueError(
            f"`length` must be 7 or more, and the text as long, got {length} and "
            f"{len(ids)} pieces."
        )
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(ids) - inside + 1, size=batch)
    window = ids[starts[:, None] + np.arange(inside)]
    cut = rng.integers(inside // 4, 3 * inside // 4 + 1, size=(batch, 1))  # of A
    place = np.arange(length)
    segments = place > cut + 1
    source = np.clip(place - 1 - segments, 0, inside - 1)
    full = np.take_along_axis(window, source, 1)
    full[:, 0] = CLS
    full[(place == cut + 1) | (place == length - 1)] = SEP

    chosen = np.argsort(rng.random((batch, inside)), 1)[:, : predictions(length)]
    chosen.sort(1)
    labels = np.take_along_axis(window, chosen, 1)
    draw = rng.random(labels.shape)
    other = rng.integers(len(SPECIAL), pieces, size=labels.shape)
    shown = np.where(draw < 0.8, MASK, np.where(draw < 0.9, other, labels))
    places = chosen + 1 + (chosen >= cut)
    np.put_along_axis(full, places, shown.astype(full.dtype), 1)
    whole: list[Any] = [x.astype(np.int32) for x in (full, segments, places, labels)]
    return MaskedBatch(*whole)


def predictions(length: int) -> int:
    """How many places of a sequence are predicted."""
    return max(1, round(MASKED * length))
