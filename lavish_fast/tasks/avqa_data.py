"""MUSIC-AVQA as a data set: questions with their clips and negative frames, the metric, and what a download lacks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavish_fast import tasks
from lavish_fast.config import Config
from lavish_fast.tasks import SPLITS, some
from lavish_fast.tasks.ave import _find_media, _load_media, _media_options
from lavish_fast.tasks.avqa_questions import (
    TYPES,
    Question,
    answers,
    encode,
    questions_path,
    read_questions,
    read_rows,
    unknown,
    vocabulary,
)

if TYPE_CHECKING:
    from lavish_fast.media import Clip

# Questions of MUSIC-AVQA in json/, which the published results are of, and in json_update/; its vocabulary and answers.
_SIZES = {"train": (32087, None), "val": (4595, 4568), "test": (9185, 9129)}
_WORDS, _ANSWERS = 93, 42
FRAME_RATE = 1.0  # frames a second that MUSIC-AVQA extracts
_TRIES = 8  # at reading a negative frame, where files are broken


class Dataset(tasks.Clips):
    """The questions of one split, each with its clip.

    Args:
        root: the folder. For its questions see `questions_path`; a clip's media are frames/ID/*.jpg with audio/ID.wav
            where both are extracted, or else the first of AVE/ID.mp4, videos/ID.mp4, ID.mp4 (or another suffix of a
            video file), of which frames are taken as MUSIC-AVQA extracts them, one a second.
        split: "train", "val" or "test".
        config: gives T, the size of frames and spectrograms, the vocabulary and the answers (see `settle`).
        antialias: of the resizing, as for `media.load_clip`.
        skip: video ids to leave out, with all their questions.
        cache: keep decoded clips in memory, in each process that reads them (6 MB a clip at 192 x 192 pixels).

    An item is a dict: audio (T, frames, mel bins) and positive (T, 3, S, S) float32, question (length,) and labels ()
    int64, id (the question's, as text). For a clip that cannot be read it is the `media.MediaError` instead.

    In "train", where both streams run, an item has T frames of other videos of the split too, as negative (T, 3, S, S):
    where the split has extracted frames, a picture each of T random videos, or else the frames of one random clip in
    random order, so that one clip more is decoded and not T. They are drawn anew in every epoch, from a generator
    seeded with the epoch and the item's index: the same in every process and after a resume. Files that cannot be
    read are passed over. Elsewhere no answer depends on negative frames, and none are read.

    Raises: FileNotFoundError or ValueError naming the file, what was expected and what came.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        config: Config,
        *,
        antialias: bool = False,
        skip: Collection[str] = (),
        cache: bool = False,
    ) -> None:
        super().__init__(root, split, config, antialias=antialias, cache=cache)
        path = questions_path(root, split)
        self.rows = tuple(q for q in read_questions(path) if q.video_id not in skip)
        words = {word: i for i, word in enumerate(config.head.words)}
        classes = {answer: i for i, answer in enumerate(config.classes)}
        self._encoded, self._labels = [], []
        for question in self.rows:
            try:
                self._encoded.append(encode(question.words, words, config.head.length))
            except ValueError as error:
                raise ValueError(f"{path}: question {question.question_id}: {error}") from None
            if question.answer not in classes:
                problem = unknown(question.answer, config.classes, "one of the answers")
                raise ValueError(f"{path}: question {question.question_id}: {problem}")
            self._labels.append(torch.tensor(classes[question.answer]))
        self._media = _find_media(self.root)
        self._others: list[str] | None = None
        # Shared, for processes that read ahead and live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if split == "train" and len(config.streams) == 2:
            ids = [i for i in dict.fromkeys(q.video_id for q in self.rows) if i in self._media]
            self._others = [i for i in ids if self._media[i].is_dir()] or ids

    def item(self, index: int) -> dict[str, Any]:
        question = self.rows[index]
        clip = self._clip(question.video_id)
        item = {"audio": clip.audio, "positive": clip.video}
        if self._others is not None:
            item["negative"] = self._negative(question.video_id, index)
        return item | {
            "question": self._encoded[index],
            "labels": self._labels[index],
            "id": str(question.question_id),
        }

    def set_epoch(self, epoch: int) -> None:
        """Of which epoch, from 0, negative frames are drawn from now on, in the loader's processes too."""
        self._epoch.fill_(epoch)

    def metric(self) -> Metric:
        """A metric that knows the type of each question. Raises: ValueError for an id with two types."""
        types: dict[str, tuple[str, str]] = {}
        for question in self.rows:
            name = str(question.question_id)
            if types.setdefault(name, question.kind) != question.kind:
                raise ValueError(
                    f"question {name}: expected one type for each id, got {types[name]} and {question.kind}"
                )
        return Metric(types)

    def _negative(self, video_id: str, index: int) -> Tensor:
        """(T, 3, S, S) of other videos."""
        from lavish_fast import decoding, media

        generator = torch.Generator().manual_seed(int(self._epoch) * len(self) + index)
        others = [i for i in self._others if i != video_id]
        if not others:
            reason = "expected another video of the split with media, for negative frames, got none"
            raise media.MediaError(self._path(video_id), reason)
        frames, size = self.config.frames, self.config.backbone.img_size

        def draw(choices: Sequence[Any]) -> Any:
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        def picture() -> Tensor:
            image = draw(decoding.list_images(self._path(draw(others))))
            return media.resize(decoding.read_image(image), size, self.antialias)

        if self._path(others[0]).is_dir():
            return torch.stack([_first_readable(picture) for _ in range(frames)])
        clip = _first_readable(lambda: self._clip(draw(others)))
        return clip.video[torch.randperm(frames, generator=generator)]

    def _path(self, video_id: str) -> Path:
        return self._media.get(video_id, self.root / "videos" / f"{video_id}.mp4")

    def _clip(self, video_id: str) -> Clip:
        options = media_options(self.config) | {"antialias": self.antialias}
        return self.kept(video_id, lambda: tasks.warned(_load_media(self._path(video_id), **options)))


@dataclass
class Metric:
    """Right answers over questions: of all, of each type, and of the audio, visual and audio-visual types together.

    It only counts, so neither the batch size nor the order nor the number of ranks matters.

    types: by question id, one of `TYPES`. correct, total: questions by type.
    """

    types: Mapping[str, tuple[str, str]]
    correct: Counter[tuple[str, str]] = field(default_factory=Counter)
    total: Counter[tuple[str, str]] = field(default_factory=Counter)

    def update(self, outputs: Any, labels: Tensor, ids: Sequence[str]) -> None:
        """Counts a batch: the head's outputs or its first, the answers' logits (B, K); labels (B,); question ids."""
        logits = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        if logits.ndim != 2 or not len(logits) == len(ids) == labels.numel():
            raise ValueError(
                f"logits: expected (B, K) for {len(ids)} questions and labels of shape {tuple(labels.shape)}, "
                f"got {tuple(logits.shape)}"
            )
        if strange := [name for name in ids if name not in self.types]:
            raise ValueError(f"ids: expected those of questions whose type is known, got {some(strange)}")
        right = (logits.argmax(-1) == labels.flatten()).tolist()
        for name, fine in zip(ids, right):
            self.correct[self.types[name]] += fine
            self.total[self.types[name]] += 1

    def merge(self, other: Metric) -> None:
        """Counts what another has counted."""
        self.correct.update(other.correct)
        self.total.update(other.total)

    def results(self) -> dict[str, float]:
        """The share of right answers: "accuracy", of all questions, NaN before any was counted; where there are such
        questions, "audio", "visual", "audio-visual", and "audio counting" ... of each type. Then both counts.
        """
        groups = {"accuracy": TYPES}
        groups |= {m.lower(): [kind for kind in TYPES if kind[0] == m] for m in dict(TYPES)}
        groups |= {" ".join(kind).lower(): [kind] for kind in TYPES}
        results = {}
        for name, kinds in groups.items():
            correct, total = (sum(counts[kind] for kind in kinds) for counts in (self.correct, self.total))
            if total or name == "accuracy":
                results[name] = correct / total if total else float("nan")
        return results | {"correct": self.correct.total(), "total": self.total.total()}


def verify(
    root: str | os.PathLike,
    config: Config,
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tasks.Report:
    """Looks through a data set before training.

    Words and answers are checked against those of avqa-train.json: `settle` gives the model just these. Sizes other
    than MUSIC-AVQA's own are noted, of the vocabulary and the answers too.

    Args:
        decode: also decode every file, in `workers` processes, by default one a CPU core.
        progress: called as progress(files decoded, files in all) after each.

    Raises: nothing for a faulty data set; the report says what is wrong.
    """
    root = Path(root)
    problems: list[str] = []
    notes: list[str] = []
    others: list[str] = []  # than the published sizes
    questions: dict[str, list[Question]] = {}
    for split in SPLITS:
        try:
            path = questions_path(root, split)
            rows = read_rows(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        notes.append(f"{split}: {path}")
        problems += [str(row) for row in rows if isinstance(row, ValueError)]
        questions[split] = [row for row in rows if isinstance(row, Question)]

    words, known = vocabulary(questions.get("train", ())), answers(questions.get("train", ()))
    for split, rows in questions.items():
        if "train" in questions:
            for name, of, used in (
                ("words", words, (word for q in rows for word in q.words)),
                ("answers", known, (q.answer for q in rows)),
            ):
                if strange := [repr(x) for x in dict.fromkeys(used) if x not in of]:
                    problems.append(f"{split}: expected {name} of avqa-train.json, got {some(strange)}")
        long = [str(q.question_id) for q in rows if len(q.words) > config.head.length]
        if long:
            problems.append(f"{split}: {len(long)} questions have more than {config.head.length} words: {some(long)}")
        counts = Counter(q.question_id for q in rows)
        if twice := [str(i) for i, count in counts.items() if count > 1]:
            problems.append(f"{split}: {len(twice)} question ids come more than once: {some(twice)}")
        published, updated = _SIZES[split]
        if len(rows) == updated:
            others.append(f"{split}: {updated} questions are of json_update/; published results are of {published}")
        elif len(rows) != published:
            others.append(f"{split}: MUSIC-AVQA has {published} questions, got {len(rows)}")
    if "train" in questions:
        sizes = {"words": (_WORDS, len(words)), "answers": (_ANSWERS, len(known))}
        others += [f"MUSIC-AVQA has {n} {name}, got {got}" for name, (n, got) in sizes.items() if n != got]
    notes += others
    ids = {split: list(dict.fromkeys(q.video_id for q in rows)) for split, rows in questions.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := sorted(set(ids.get(a, ())) & set(ids.get(b, ()))):
            notes.append(f"{len(both)} videos are in {a} and {b}: {some(both)}")

    media = _find_media(root)
    missing = {split: tuple(i for i in ids[split] if i not in media) for split in ids}
    for split, absent in missing.items():
        if absent:
            problems.append(f"{split}: {len(absent)} of {len(ids[split])} videos have no media: {some(absent)}")
    undecodable: tuple[str, ...] = ()
    if decode:
        paths = [media[i] for i in dict.fromkeys(i for each in ids.values() for i in each) if i in media]
        options = {"workers": workers, "progress": progress, "load": _load_media} | media_options(config)
        found = tasks.decode(paths, **options)
        undecodable = found.undecodable
        notes += found.notes
    problems += undecodable
    sizes = {split: len(rows) for split, rows in questions.items()}
    return tasks.Report(sizes, missing, undecodable, tuple(problems), tuple(notes), not others)


def _first_readable(read: Callable[[], Any]) -> Any:
    """What `read` returns, called again where it raises a MediaError."""
    from lavish_fast.media import MediaError

    for left in reversed(range(_TRIES)):
        try:
            return read()
        except MediaError:
            if not left:
                raise


def media_options(config: Config) -> dict[str, Any]:
    """Arguments of `media.load_clip`."""
    return _media_options(config) | {"frame_rate": FRAME_RATE}
