"""MUSIC-AVQA's json: its questions, their types and answers, the vocabulary, a question as indices.

The rules are those of the released loader, down to its treatment of a question's end, because the order of the
vocabulary is the order of a released network's word embedding.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavish_fast.config import Config
from lavish_fast.tasks import SPLITS, some
from lavish_fast.tasks.ave import _checked_id

PAD = "<pad>"
TYPES = (
    ("Audio", "Counting"),
    ("Audio", "Comparative"),
    ("Visual", "Counting"),
    ("Visual", "Location"),
    ("Audio-Visual", "Existential"),
    ("Audio-Visual", "Counting"),
    ("Audio-Visual", "Location"),
    ("Audio-Visual", "Comparative"),
    ("Audio-Visual", "Temporal"),
)


@dataclass(frozen=True)
class Question:
    """One entry of the json. kind: one of `TYPES`. words: with the template's values, without the question mark."""

    question_id: int
    video_id: str
    kind: tuple[str, str]
    words: tuple[str, ...]
    answer: str


def read_questions(path: str | os.PathLike) -> tuple[Question, ...]:
    """The questions of a file in MUSIC-AVQA's format, in file order.

    An entry is an object with `video_id`, `question_id`, `question_content`, `templ_values` and `type` (both strings
    that hold a JSON list), and `anser`, spelt so, or `answer`. The question is split at single spaces, the last
    character of the last word is taken off, whatever it is, and words with a "<" are replaced by the template's values
    in turn.

    Raises: FileNotFoundError, or ValueError naming file, entry (from 0), what was expected and what came.
    """
    rows = read_rows(Path(path))
    for row in rows:
        if isinstance(row, ValueError):
            raise row
    return tuple(rows)


def questions_path(root: str | os.PathLike, split: str) -> Path:
    """The split's file, avqa-SPLIT.json: the first of root/, root/json/ and root/data/json/ that has it.

    That of MUSIC-AVQA's later json_update/ is read when it lies in one of these places, or when root is that folder.

    Raises: FileNotFoundError; ValueError for another split than "train", "val" and "test".
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    name = f"avqa-{split}.json"
    for folder in ("", "json", "data/json"):
        if (path := Path(root) / folder / name).is_file():
            return path
    raise FileNotFoundError(f"{root}: expected {name} there, in json/ or in data/json/, got none")


def vocabulary(questions: Iterable[Question]) -> tuple[str, ...]:
    """The padding, then the words in order of first appearance: of avqa-train.json, the released embedding's order."""
    return (PAD, *dict.fromkeys(word for question in questions for word in question.words if word != PAD))


def answers(questions: Iterable[Question]) -> tuple[str, ...]:
    """The answers in order of first appearance: of avqa-train.json, the order of the released network's logits."""
    return tuple(dict.fromkeys(question.answer for question in questions))


def settle(config: Config, root: str | os.PathLike) -> Config:
    """The configuration with the vocabulary and the answers of avqa-train.json.

    Raises: FileNotFoundError or ValueError, as `questions_path` and `read_questions`.
    """
    questions = read_questions(questions_path(root, "train"))
    head = dataclasses.replace(config.head, words=vocabulary(questions))
    return dataclasses.replace(config, classes=answers(questions), head=head)


def encode_question(text: str, config: Config) -> Tensor:
    """A question as people type it, as indices (length,) int64 for the model.

    Case, punctuation, extra spaces and underscores do not matter: "is the Acoustic guitar louder?" has the vocabulary's
    words "Is" and "acoustic_guitar". Of words that differ in case alone, the first of a question is the capitalised
    one. Entries of several words are found, the longest first.

    Raises: ValueError naming the word that the vocabulary lacks and those nearest to it, or too many words.
    """
    known: dict[str, list[str]] = {}
    for word in config.head.words:
        if word != PAD and (plain := _plain(word)):
            known.setdefault(plain, []).append(word)
    longest = max((plain.count(" ") + 1 for plain in known), default=1)
    typed = _plain(text, fold=False).split()
    words: list[str] = []
    position = 0
    while position < len(typed):
        for stop in range(min(position + longest, len(typed)), position, -1):
            phrase = " ".join(typed[position:stop])
            if phrase.casefold() in known:
                break
        else:
            raise ValueError(f"question: {unknown(typed[position], config.head.words)}")
        first = not words
        same = known[phrase.casefold()]
        words.append(min(same, key=lambda w: (w[:1].isupper() != first, w != phrase)))
        position = stop
    if not words:
        raise ValueError(f"question: expected words, got {text!r}")
    return encode(words, {word: i for i, word in enumerate(config.head.words)}, config.head.length)


def read_rows(path: Path) -> list[Question | ValueError]:
    """Each entry or what is wrong with it."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no UTF-8 or no JSON
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(rows, list) or not rows:
        got = "an empty list" if rows == [] else type(rows).__name__
        raise ValueError(f"{path}: expected a list of questions, got {got}")
    parsed: list[Question | ValueError] = []
    for number, row in enumerate(rows):
        try:
            parsed.append(_parse(row))
        except ValueError as error:
            parsed.append(ValueError(f"{path}, entry {number}: {error}"))
    return parsed


def _parse(row: Any) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    answer = "answer" if "anser" not in row and "answer" in row else "anser"
    for name, kind in (("question_id", int), ("video_id", str), ("question_content", str), (answer, str)):
        if type(row.get(name)) is not kind:
            raise ValueError(f"{name}: expected {kind.__name__}, got {row.get(name)!r}")
    question_type = tuple(_list_in(row, "type"))
    if question_type not in TYPES:
        raise ValueError(f"type: expected one of {', '.join(' '.join(kind) for kind in TYPES)}, got {row['type']!r}")
    words = row["question_content"].rstrip().split(" ")
    words[-1] = words[-1][:-1]
    values = _list_in(row, "templ_values")
    places = [i for i, word in enumerate(words) if "<" in word]
    if len(places) > len(values):
        raise ValueError(f"templ_values: expected {len(places)} for {row['question_content']!r}, got {values!r}")
    for i, value in zip(places, values):
        words[i] = value
    if not any(words) or not row[answer]:
        raise ValueError(f"expected a question and an answer, got {row['question_content']!r} and {row[answer]!r}")
    return Question(row["question_id"], _checked_id(row["video_id"]), question_type, tuple(words), row[answer])


def _list_in(row: Mapping[str, Any], name: str) -> list[str]:
    """The list of strings that a string holds as JSON."""
    try:
        values = json.loads(row[name])
    except (KeyError, TypeError, ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name}: expected a string with a JSON list of strings, got {row.get(name)!r}")
    return values


def encode(words: Sequence[str], indices: Mapping[str, int], length: int) -> Tensor:
    """(length,) int64, padded."""
    if len(words) > length:
        raise ValueError(f"expected at most {length} words, got {len(words)}: {' '.join(words)}")
    for word in (*words, PAD):
        if word not in indices:
            raise ValueError(unknown(word, tuple(indices)))
    return torch.tensor([indices[word] for word in (*words, *(PAD,) * (length - len(words)))])


def unknown(word: str, known: Sequence[str], what: str = "a word of the vocabulary") -> str:
    plain = {}
    for name in known:
        plain.setdefault(_plain(name), name)
    near = [plain[name] for name in difflib.get_close_matches(_plain(word), plain, n=3)]
    return f"expected {what}, {'near to it ' if near else ''}{some(near or known)}, got {word!r}"


def _plain(text: str, fold: bool = True) -> str:
    """Words without punctuation around them, one space apart; without case too. NFKC turns "？" into "?"."""
    text = unicodedata.normalize("NFKC", text).replace("_", " ")
    text = " ".join(word for part in text.split() if (word := part.strip(string.punctuation + "¿¡‘’“”«»…")))
    return text.casefold() if fold else text
