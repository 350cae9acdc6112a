"""Texts as ids of pieces of words, which are learnt from them by `tokenizers`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from .data import Ids

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))


def byte_pairs(text: str, vocabulary: int) -> Any:
    """A byte-pair encoder that is trained on a text."""
    encoder = tokenizers.ByteLevelBPETokenizer()
    lines = text.splitlines(keepends=True)
    encoder.train_from_iterator(lines, vocab_size=vocabulary, show_progress=False)
    return encoder


def learn_word_pieces(text: str, vocabulary: int, *, lowercase: bool) -> list[str]:
    """At most `vocabulary` pieces of words, the special ones first.

    Pieces that are equally frequent are chosen between by chance, in the package: write
    down what came out.
    """
    encoder = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    lines = text.splitlines(keepends=True)
    encoder.train_from_iterator(
        lines, vocab_size=vocabulary, show_progress=False, special_tokens=[*SPECIAL]
    )
    return [*SPECIAL, *sorted(encoder.get_vocab().keys() - {*SPECIAL})]


def word_pieces(pieces: list[str], *, lowercase: bool) -> Any:
    """BERT's encoder with these pieces."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    return tokenizers.BertWordPieceTokenizer(ids, lowercase=lowercase)


def save_word_pieces(path: Path, pieces: list[str], *, lowercase: bool) -> None:
    path.write_text(json.dumps({"lowercase": lowercase, "pieces": pieces}))


def read_word_pieces(path: Path) -> Any:
    """The encoder whose pieces were saved."""
    return word_pieces(**json.loads(path.read_text()))


def encode(encoder: Any, text: str) -> Ids:
    """A whole text, 256 lines at a time, without special pieces."""
    lines = text.splitlines(keepends=True)
    parts = ["".join(lines[i : i + 256]) for i in range(0, len(lines), 256)]
    found = encoder.encode_batch(parts, add_special_tokens=False)
    return np.concatenate([np.asarray(x.ids, np.int32) for x in found])
