"""AVE, audio-visual event localisation: the head, the loss, the metric and the data set.

A clip of T seconds has one label a second: the event that is both seen and heard, or background
(Tian et al., Audio-Visual Event Localization in Unconstrained Videos, ECCV 2018).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import tasks
from lavish_fast.backbones import Encoded
from lavish_fast.config import AVE_CLASSES, Config
from lavish_fast.tasks import SPLITS, some
from lavish_fast.vggish import FEATURES, PATCH

if TYPE_CHECKING:
    from lavish_fast.media import Clip

BACKGROUND = "background"
RULES = ("argmax", "cmbs")

_AVE_ROWS = 4143
_AVE_SPLITS = {"train": 3339, "val": 402, "test": 402}
_FIELDS = "Category&VideoID&Quality&StartTime&EndTime"


HEAD_NAMES = {"mlp_class": "fc1", "mlp_class_2": "fc2"}


class Head(nn.Module):
    """Two linear maps with nothing between them, then a softmax: the released network's classifier.

    With `vggish` the second reads VGGish's 128 features of each second as well (the paper's Table 3).
    """

    reads_stages = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(len(config.streams) * config.width, config.head.hidden)
        beside = FEATURES if config.head.vggish else 0
        self.fc2 = nn.Linear(config.head.hidden + beside, len(config.classes))

    def forward(self, encoded: Encoded, *vggish: Tensor) -> Tensor:
        """Class probabilities (B * T, K). vggish: its features (B * T, 128), where it is beside."""
        hidden = self.fc1(tasks.side_by_side(self.config, encoded))
        return torch.softmax(self.fc2(torch.cat([hidden, *(x.to(hidden.dtype) for x in vggish)], -1)), dim=-1)


def inputs(config: Config, audio: Any, video: Tensor | None = None, patches: Tensor | None = None) -> dict[str, Tensor]:
    """What the backbone sees of each stream that runs, by name, audio first: (B * T, 3, H, W).

    Then, with VGGish, its patches (B * T, 96, 64).

    Args:
        audio: spectrograms (B, T, frames, mel bins), or a list whose first entry is that; None if unused.
        video: frames (B, T, 3, S, S), ImageNet-normalised; None if unused.
        patches: with VGGish, its log-mel patches (B, T, 96, 64), one for each second (`lavish_fast.vggish`).

    Raises: ValueError naming the input, what was expected and what came.
    """
    read = {"audio": tasks.spectrograms, "video": tasks.frames}
    given = {stream: {"audio": audio, "video": video}[stream] for stream in config.streams}
    found = {stream: read[stream](config, stream, x) for stream, x in given.items()}
    if config.head.vggish:
        given["patches"] = patches
        found["patches"] = tasks.checked("patches", patches, PATCH).flatten(0, 1)
    tasks.check_clips(**given)
    return found


def fitted(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    """The configuration as it is: a released AVE network has the data set's classes."""
    return config


def settle(config: Config, root: str | os.PathLike) -> Config:
    """The configuration with the classes of the data set in a folder.

    Raises: FileNotFoundError or ValueError, as `read_annotations`.
    """
    return replace(config, classes=classes_of(root))


def loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the softmax's output against the one-hot label, mean over all B*T*K entries.

    That is the released code's loss. Computed in float32 or wider; not under autocast, which PyTorch refuses.

    Args:
        probabilities: (B*T, K), in [0, 1].
        labels: (B, T) class indices.
    """
    probabilities = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32))
    target = F.one_hot(labels.flatten(), probabilities.shape[-1]).to(probabilities.dtype)
    return F.binary_cross_entropy(probabilities, target)


def decide(probabilities: Tensor, seconds: int, rule: str = "argmax") -> Tensor:
    """The class of each second.

    Args:
        probabilities: (B*T, K), background last.
        seconds: T.
        rule: "argmax": the most probable of the K classes, second by second. "cmbs": a second is an event where
            p(background) < 0.5, and all events of a clip have one class, the one of the K - 1 with the highest
            mean probability over the T seconds. CMBS (Xia and Zhao, CVPR 2022) has an event score and a class
            score of their own; reading both off one softmax is our interpretation.

    Returns: (B, T) class indices; the first of equals.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    clips = probabilities.unflatten(0, (-1, seconds))  # (B, T, K)
    if rule == "argmax":
        return clips.argmax(-1)
    background = clips.shape[-1] - 1
    event_class = clips[..., :background].mean(1).argmax(-1, keepdim=True)  # (B, 1)
    return torch.where(clips[..., background] < 0.5, event_class, background)


def kept(probabilities: Tensor, clips: int) -> Tensor:
    """What evaluation keeps of each clip: probabilities (clips, T, K), float32."""
    return probabilities.float().unflatten(0, (clips, -1))


@dataclass
class Metric:
    """Segment accuracy: correct seconds over all. It counts, so neither batch size nor number of ranks matters.

    rule: as for `decide`.
    """

    rule: str = "argmax"
    correct: int = 0
    total: int = 0

    def update(self, probabilities: Tensor, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Counts a batch: probabilities (B*T, K), labels (B, T)."""
        if probabilities.ndim != 2 or len(probabilities) != labels.numel():
            raise ValueError(
                f"probabilities: expected (B*T, K) for labels of shape {tuple(labels.shape)}, "
                f"got {tuple(probabilities.shape)}"
            )
        self.correct += int((decide(probabilities, labels.shape[1], self.rule) == labels).sum())
        self.total += labels.numel()

    def merge(self, other: Metric) -> None:
        """Counts what another has counted."""
        self.correct += other.correct
        self.total += other.total

    def results(self) -> dict[str, float]:
        """The share of correct seconds, NaN before any was counted, and both counts."""
        accuracy = self.correct / self.total if self.total else float("nan")
        return {"segment accuracy": accuracy, "correct": self.correct, "total": self.total}


@dataclass(frozen=True)
class Annotation:
    """One row of Annotations.txt: the event fills the seconds [start, end) of the clip."""

    category: str
    video_id: str
    start: int
    end: int


def read_annotations(path: str | os.PathLike) -> tuple[Annotation, ...]:
    """The rows of a file in AVE's format, `Category&VideoID&Quality&StartTime&EndTime`.

    With or without that line as a header; a byte-order mark, CRLF and a missing last newline are all right.
    A row with start >= end is kept: AVE has one, and its seconds are background.

    Raises: FileNotFoundError, or ValueError naming file, line, what was expected and what came.
    """
    _, rows = _read_rows(Path(path))
    for row in rows:
        if isinstance(row, ValueError):
            raise row
    return tuple(rows)


def class_names(annotations: Iterable[Annotation]) -> tuple[str, ...]:
    """The categories in order of first appearance, then background: for AVE, the index order of its label files."""
    return (*dict.fromkeys(row.category for row in annotations), BACKGROUND)


def classes_of(root: str | os.PathLike) -> tuple[str, ...]:
    """The classes of the data set in a folder. Raises: FileNotFoundError or ValueError, as `read_annotations`."""
    return class_names(read_annotations(_annotations_path(Path(root))))


def segment_labels(annotation: Annotation, classes: Sequence[str], seconds: int) -> Tensor:
    """(T,) class indices, int64: the category in [start, end), background (the last class) elsewhere."""
    labels = torch.full((seconds,), len(classes) - 1)
    labels[annotation.start : annotation.end] = classes.index(annotation.category)
    return labels


def read_splits(root: str | os.PathLike, annotations: Sequence[Annotation]) -> dict[str, tuple[int, ...]]:
    """The rows of Annotations.txt in "train", "val" and "test", as indices.

    Read from the first of these that is there, in `root` or `root`/data: train_order.h5, val_order.h5 and
    test_order.h5 (data set `order`: row indices); trainSet.txt, valSet.txt and testSet.txt (rows as in
    Annotations.txt); train.txt, val.txt and test.txt (a video id a line). A line of a list stands for the row it
    repeats, or else for every row of its video.

    Raises: FileNotFoundError or ValueError naming the file, what was expected and what came.
    """
    root = Path(root)
    for pattern, read in (("{}_order.h5", _read_order), ("{}Set.txt", _read_set), ("{}.txt", _read_ids)):
        files = {split: _find(root, pattern.format(split)) for split in SPLITS}
        if missing := [pattern.format(split) for split in SPLITS if files[split] is None]:
            if len(missing) < len(SPLITS):
                raise FileNotFoundError(f"{root}: expected {', '.join(missing)} beside the other splits, got none")
            continue
        return {split: read(files[split], annotations) for split in SPLITS}
    raise FileNotFoundError(f"{root}: expected train_order.h5, trainSet.txt or train.txt there or in data/, got none")


class Dataset(tasks.Clips):
    """One split of a data set in AVE's layout.

    Args:
        root: the folder. Annotations.txt and the splits (see `read_splits`) lie in it or in its data/; a clip's
            media are frames/ID/*.jpg with audio/ID.wav where both are extracted, or else the first of AVE/ID.mp4,
            videos/ID.mp4, ID.mp4 (or another suffix of a video file).
        split: "train", "val" or "test".
        config: gives T, the size of frames and spectrograms, and the classes, which must be the data set's.
        antialias: of the resizing, as for `media.load_clip`.
        skip: video ids to leave out.
        cache: keep decoded clips in memory, in each process that reads them (6 MB a clip at 192 x 192 pixels).

    An item is a dict: audio (T, frames, mel bins) and video (T, 3, S, S) float32, labels (T,) int64, id; with VGGish
    its patches (T, 96, 64) too. For a clip that cannot be read it is the `media.MediaError` instead, which
    `tasks.collate` sets aside.

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
        annotations = read_annotations(_annotations_path(self.root))
        if problem := _class_problem(annotations, config):
            raise ValueError(f"{self.root}: {problem}")
        indices = read_splits(self.root, annotations)[split]
        self.rows = tuple(annotations[i] for i in indices if annotations[i].video_id not in skip)
        self._media = _find_media(self.root)

    def item(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        clip = self.kept(row.video_id, lambda: self._read(row.video_id))
        labels = segment_labels(row, self.config.classes, self.config.frames)
        item = {"audio": clip.audio, "video": clip.video, "labels": labels, "id": row.video_id}
        return item | ({} if clip.patches is None else {"patches": clip.patches})

    def _read(self, video_id: str) -> Clip:
        path = self._media.get(video_id, self.root / "AVE" / f"{video_id}.mp4")
        options = _media_options(self.config) | {"patches": self.config.head.vggish}
        return tasks.warned(_load_media(path, **options, antialias=self.antialias))


@dataclass(frozen=True)
class Report(tasks.Report):
    """What `verify` found.

    rows, header: of Annotations.txt. duplicates: videos with more than one row. shared: videos in two splits, by
    "train and val" ... The rest as in `tasks.Report`.
    """

    rows: int
    header: bool
    duplicates: tuple[str, ...]
    shared: Mapping[str, tuple[str, ...]]

    @property
    def heading(self) -> str:
        return f"Annotations.txt: {self.rows} rows, {'with' if self.header else 'without'} a header"


def verify(
    root: str | os.PathLike,
    config: Config,
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Looks through a data set before training.

    Reported and not removed, for comparability: AVE has 45 videos with several rows, some of them in two splits
    (10 in train and val, 8 in train and test). Sizes other than AVE's own are noted when the classes are AVE's.

    Args:
        decode: also decode every file, in `workers` processes, by default one a CPU core.
        progress: called as progress(files decoded, files in all) after each.

    Raises: nothing for a faulty data set; the report says what is wrong.
    """
    root = Path(root)
    problems: list[str] = []
    notes: list[str] = []
    header, rows = False, []
    try:
        header, rows = _read_rows(_annotations_path(root))
    except (OSError, ValueError) as error:
        problems.append(str(error))
    annotations = [row for row in rows if isinstance(row, Annotation)]
    broken = [str(row) for row in rows if isinstance(row, ValueError)]
    problems += broken
    splits: dict[str, tuple[int, ...]] = {}
    # With a broken row the indices of the others mean nothing.
    if annotations and not broken:
        if problem := _class_problem(annotations, config):
            problems.append(problem)
        try:
            splits = read_splits(root, annotations)
        except (OSError, ValueError) as error:
            problems.append(str(error))

    ids = {split: list(dict.fromkeys(annotations[i].video_id for i in indices)) for split, indices in splits.items()}
    media = _find_media(root)
    missing = {split: tuple(i for i in ids[split] if i not in media) for split in ids}
    for split, absent in missing.items():
        if absent:
            problems.append(f"{split}: {len(absent)} of {len(ids[split])} videos have no media: {some(absent)}")
    undecodable: tuple[str, ...] = ()
    if decode:
        paths = [media[i] for i in dict.fromkeys(chain(*ids.values())) if i in media]
        options = {"workers": workers, "progress": progress, "load": _load_media} | _media_options(config)
        found = tasks.decode(paths, **options)
        undecodable = found.undecodable
        notes += found.notes
    problems += undecodable

    duplicates = tuple(i for i, count in Counter(row.video_id for row in annotations).items() if count > 1)
    if duplicates:
        notes.append(f"{len(duplicates)} videos have more than one row: {some(duplicates)}")
    shared = {}
    for a, b in combinations(ids, 2):
        both = set(ids[b])
        shared[f"{a} and {b}"] = tuple(i for i in ids[a] if i in both)
    notes += [f"{len(both)} videos are in {pair}: {some(both)}" for pair, both in shared.items() if both]
    if splits and (unused := len(annotations) - len(set().union(*splits.values()))):
        notes.append(f"{unused} rows are in no split")
    if void := [row.video_id for row in annotations if row.start >= row.end]:
        notes.append(f"{len(void)} rows have start >= end, so that all is background: {some(void)}")
    if late := [row.video_id for row in annotations if row.end > config.frames]:
        notes.append(f"{len(late)} rows end after second {config.frames}: {some(late)}")
    published = config.classes == AVE_CLASSES
    if published:
        sizes = {"Annotations.txt": (_AVE_ROWS, len(annotations))}
        sizes |= {split: (_AVE_SPLITS[split], len(indices)) for split, indices in splits.items()}
        others = [f"{name}: AVE has {ave} rows, got {got}" for name, (ave, got) in sizes.items() if ave != got]
        notes += others
        published = not others
    sizes = {split: len(indices) for split, indices in splits.items()}
    found = (sizes, missing, undecodable, tuple(problems), tuple(notes), published)
    return Report(*found, rows=len(rows), header=header, duplicates=duplicates, shared=shared)


def _read_rows(path: Path) -> tuple[bool, list[Annotation | ValueError]]:
    """Whether there is a header, and each row or what is wrong with it."""
    lines = _read_lines(path)
    header = lines[0].startswith("Category&")
    rows: list[Annotation | ValueError] = []
    for number, line in enumerate(lines[header:], 1 + header):
        try:
            rows.append(_parse_row(line))
        except ValueError as error:
            rows.append(ValueError(f"{path}, line {number}: {error}"))
    if not rows:
        raise ValueError(f"{path}: expected rows {_FIELDS}, got a header alone")
    return header, rows


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: expected a line for each clip, got an empty file")
    return lines


def _parse_row(line: str) -> Annotation:
    fields = line.split("&")
    if len(fields) != 5:
        raise ValueError(f"expected {_FIELDS}, got {line!r}")
    category, video_id, _, start, end = fields
    if not category or category == BACKGROUND:
        raise ValueError(f"expected the category of an event, got {category!r}")
    for value in (start, end):
        if not re.fullmatch("[0-9]{1,9}", value):
            raise ValueError(f"expected a time in whole seconds, got {value!r}")
    return Annotation(category, _checked_id(video_id), int(start), int(end))


def _checked_id(video_id: str) -> str:
    # Ids are joined into paths, so none may name anything outside its folder.
    if video_id in ("", ".") or ".." in video_id or not video_id.isprintable() or set(video_id) & set("/\\:"):
        raise ValueError(f"expected a video id that is a plain file name, got {video_id!r}")
    return video_id


def _read_order(path: Path, annotations: Sequence[Annotation]) -> tuple[int, ...]:
    import h5py
    import numpy as np

    try:
        with h5py.File(path, "r") as file:
            order = file["order"][()]
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: expected an HDF5 file with a data set named order, got: {error}") from None
    order = np.asarray(order)
    if order.ndim != 1 or order.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected a list of row indices, got shape {order.shape} of {order.dtype}")
    for index in order.tolist():
        if not 0 <= index < len(annotations):
            raise ValueError(f"{path}: expected row indices from 0 to {len(annotations) - 1}, got {index}")
    return tuple(order.tolist())


def _read_set(path: Path, annotations: Sequence[Annotation]) -> tuple[int, ...]:
    return _match(path, read_annotations(path), annotations)


def _read_ids(path: Path, annotations: Sequence[Annotation]) -> tuple[int, ...]:
    return _match(path, [line.strip() for line in _read_lines(path) if line.strip()], annotations)


def _match(path: Path, keys: Iterable[Annotation | str], annotations: Sequence[Annotation]) -> tuple[int, ...]:
    """The rows that each key stands for: the very row, or every row of the video."""
    rows: dict[Annotation | str, list[int]] = {}
    for index, row in enumerate(annotations):
        rows.setdefault(row, []).append(index)
        rows.setdefault(row.video_id, []).append(index)
    found: dict[int, None] = {}
    for key in keys:
        video_id = key if isinstance(key, str) else key.video_id
        if video_id not in rows:
            raise ValueError(f"{path}: expected ids of Annotations.txt, got {video_id!r}")
        found |= dict.fromkeys(rows.get(key, rows[video_id]))
    return tuple(found)


def _find(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / "data" / name) if path.is_file()), None)


def _annotations_path(root: Path) -> Path:
    if (path := _find(root, "Annotations.txt")) is None:
        raise FileNotFoundError(f"{root}: expected Annotations.txt there or in data/, got none")
    return path


def _class_problem(annotations: Sequence[Annotation], config: Config) -> str | None:
    got = class_names(annotations)
    if got == config.classes:
        return None
    if len(got) != len(config.classes):
        return f"classes: expected the configuration's {len(config.classes)}, got {len(got)}: {some(got)}"
    index, (a, b) = next((i, pair) for i, pair in enumerate(zip(config.classes, got)) if pair[0] != pair[1])
    return f"classes: expected the configuration's, number {index} {a!r}, got {b!r}"


def find_videos(root: Path) -> dict[str, Path]:
    """The video files by id: of root/, its videos/ and its AVE/, of which the last one wins."""
    from lavish_fast.media import VIDEO_SUFFIXES

    found: dict[str, Path] = {}
    for folder in (root, root / "videos", root / "AVE"):
        if folder.is_dir():
            found |= {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEO_SUFFIXES}
    return found


def _find_media(root: Path) -> dict[str, Path]:
    """By video id: the folder that has frames and a wav file, or else the video file."""
    found, frames = find_videos(root), root / "frames"
    if frames.is_dir():
        folders = (path for path in frames.iterdir() if _wav_path(path).is_file() and has_pictures(path))
        found |= {path.name: path for path in folders}
    return found


def has_pictures(folder: Path) -> bool:
    """Whether it is a folder with extracted frames."""
    from lavish_fast.decoding import IMAGE_SUFFIXES

    return folder.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def _wav_path(frames: Path) -> Path:
    return frames.parents[1] / "audio" / f"{frames.name}.wav"


def _media_options(config: Config) -> dict[str, Any]:
    return {"frames": config.frames, "img_size": config.backbone.img_size, "spectrogram": config.spectrogram}


def _load_media(path: Path, *, frame_rate: float | None = None, **options: Any) -> Clip:
    """frame_rate: at which the released pipeline extracts a video's frames, if it is not `media.FRAME_RATE`."""
    from lavish_fast import media

    if path.is_dir():
        return media.load_frames_and_wav(path, _wav_path(path), **options)
    return media.load_clip(path, frame_rate=frame_rate or media.FRAME_RATE, **options)
