"""SQuAD's files: questions, the windows of their contexts, answers, and the score.

Reference: SQuAD (Rajpurkar et al., 2016 and 2018) and its official evaluation scripts.
"""

import collections
import dataclasses
import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..shared.data import Ids
from ..shared.tokens import CLS, PAD

Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of a context; without `answers` it has none."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    """Where each answer begins in the context, in characters."""


def read_questions(path: Path) -> list[Question]:
    """All questions of a file of version 1.1 or 2.0.

    Raises:
        ValueError: if the file has another form, or an answer is not where it says.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        return [
            _question(paragraph["context"], given)
            for article in articles
            for paragraph in article["paragraphs"]
            for given in paragraph["qas"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is not a file of SQuAD's form: {e!r}.") from e


def _question(context: str, given: Mapping[str, Any]) -> Question:
    found = [] if given.get("is_impossible", False) else given["answers"]
    answers = tuple(a["text"] for a in found)
    starts = tuple(a["answer_start"] for a in found)
    for answer, start in zip(answers, starts, strict=True):
        if context[start : start + len(answer)] != answer:
            raise ValueError(
                f"question {given['id']} has its answer {answer!r} at character "
                f"{start}, where the context has {context[start : start + 20]!r}."
            )
    return Question(given["id"], given["question"], context, answers, starts)


class Windows(NamedTuple):
    """Pieces of questions and contexts, [windows, length] each but for the last three.

    A window is [CLS] question [SEP] piece of the context [SEP] [PAD] ...
    """

    ids: Ids
    segments: Ids
    seen: Bools
    """Where an id is no padding."""
    allowed: Bools
    """Where an answer may start or end: in the context, or at [CLS] for none."""
    offsets: Ids
    """The characters of the context from which to which a piece is, [.., 2]."""
    spans: Ids
    """First and last piece of the first answer, [windows, 2]; zeros if it is not in the
    window."""
    questions: Ids
    """The index of each window's question, [windows]."""


def windows(
    questions: Sequence[Question], encoder: Any, *, length: int, stride: int
) -> Windows:
    """Windows of one shape, of which the next begins `stride` pieces further on.

    Raises:
        ValueError: if a question leaves the context less than `stride` pieces.
    """
    rows: list[tuple[Any, ...]] = []
    for index, question in enumerate(questions):
        asked = encoder.encode(question.text, add_special_tokens=False).ids
        context = encoder.encode(question.context, add_special_tokens=False)
        room = length - len(asked) - 3
        if room < stride:
            raise ValueError(
                f"`length` {length} leaves {room} pieces of context behind question "
                f"{question.id}, fewer than `stride` {stride}."
            )
        rows += [
            _window(index, question, encoder, asked, context, start, room, length)
            for start in _starts(len(context.ids), room, stride)
        ]
    return Windows(*map(np.array, zip(*rows, strict=True)))


def _starts(pieces: int, room: int, stride: int) -> range:
    """Where windows begin, the last of which reaches the end."""
    more = max(0, -(-(pieces - room) // stride))
    return range(0, (more + 1) * stride, stride)


def _window(
    index: int,
    question: Question,
    encoder: Any,
    asked: list[int],
    context: Any,
    start: int,
    room: int,
    length: int,
) -> tuple[Any, ...]:
    part = slice(start, start + room)
    inside = context.ids[part]
    head = len(asked) + 2
    separator = encoder.token_to_id("[SEP]")
    full = [CLS, *asked, separator, *inside, separator]
    ids = np.full(length, PAD, np.int32)
    ids[: len(full)] = full
    place = np.arange(length)
    in_context = (place >= head) & (place < head + len(inside))
    offsets = np.zeros((length, 2), np.int32)
    offsets[in_context] = context.offsets[part]
    span = _span(question, offsets, in_context)
    seen = place < len(full)
    segments = (seen & (place >= head)).astype(np.int32)
    return ids, segments, seen, in_context | (place == 0), offsets, span, index


def _span(question: Question, offsets: Ids, in_context: Bools) -> tuple[int, int]:
    if not question.answers:
        return 0, 0
    begin = question.starts[0]
    end = begin + len(question.answers[0])
    first = np.flatnonzero(in_context & (offsets[:, 1] > begin))
    last = np.flatnonzero(in_context & (offsets[:, 0] < end))
    whole = (
        len(first)
        and len(last)
        and offsets[in_context][0, 0] <= begin
        and offsets[in_context][-1, 1] >= end
    )
    return (int(first[0]), int(last[-1])) if whole else (0, 0)


def decode(
    questions: Sequence[Question],
    found: Windows,
    logits: np.ndarray[Any, Any],
    *,
    longest: int = 30,
    may_be_none: bool,
    threshold: float = 0.0,
) -> dict[str, str]:
    """The answer to each question, by its id: the best span of all its windows.

    Args:
        questions, found: what `windows` took and gave.
        logits: [windows, 2, length], of where an answer starts and ends.
        longest: an answer's pieces at most.
        may_be_none: whether "" is an answer.
        threshold: "" is the answer if its score, the least of all windows', is so much
            above that of the best span.
    """
    place = np.arange(logits.shape[-1])
    ahead = place - place[:, None]
    order = (ahead >= 0) & (ahead < longest)
    spans: dict[int, tuple[float, str]] = {}
    none: dict[int, float] = {}
    for w, index in enumerate(found.questions.tolist()):
        starts, ends = logits[w].astype(np.float64)
        may = found.allowed[w] & (place > 0)
        scores = np.where(order & may & may[:, None], starts[:, None] + ends, -np.inf)
        i, j = np.unravel_index(scores.argmax(), scores.shape)
        begin, end = found.offsets[w, i, 0], found.offsets[w, j, 1]
        text = questions[index].context[begin:end]
        if index not in spans or scores[i, j] > spans[index][0]:
            spans[index] = float(scores[i, j]), text
        none[index] = min(none.get(index, np.inf), float(starts[0] + ends[0]))
    return {
        questions[index].id: ""
        if may_be_none and none[index] > score + threshold
        else text
        for index, (score, text) in spans.items()
    }


def normalise(text: str) -> str:
    """Without capitals, punctuation, articles, and more than one space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(answer: str, truth: str) -> float:
    """Whether both are the same, once normalised."""
    return float(normalise(answer) == normalise(truth))


def f1(answer: str, truth: str) -> float:
    """The harmonic mean of precision and recall, of words."""
    words, true = normalise(answer).split(), normalise(truth).split()
    if not words or not true:
        return float(words == true)
    same = sum((collections.Counter(words) & collections.Counter(true)).values())
    return 2 * same / (len(words) + len(true))


def score(
    questions: Sequence[Question], answers: Mapping[str, str]
) -> dict[str, float]:
    """Exact match and F1 in percent, over all, and by whether there is an answer.

    Of several true answers the best counts; a question without counts for "" alone.

    Raises:
        ValueError: if a question has not been answered.
    """
    if missing := [q.id for q in questions if q.id not in answers]:
        raise ValueError(f"`answers` has none for the questions {missing[:5]}.")
    groups = {
        "": questions,
        "HasAns_": [q for q in questions if q.answers],
        "NoAns_": [q for q in questions if not q.answers],
    }
    found = {}
    for name, group in groups.items():
        for metric in (exact, f1):
            values = [_best(metric, answers[q.id], q.answers) for q in group]
            if values:
                mean = 100 * sum(values) / len(values)
                found[f"{name}{metric.__name__}"] = mean
    return found


def _best(metric: Any, answer: str, truths: Sequence[str]) -> float:
    # As the official script does, those that normalise to nothing do not count.
    kept = [t for t in truths if normalise(t)] or [""]
    return max(metric(answer, t) for t in kept)
