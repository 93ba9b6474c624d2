"""Action recognition on a data set in UCF101's layout: the head, the loss, the metric and the data set.

A clip has one label, its action (Soomro et al., UCF101, CRCV-TR-12-01). The LAVISH paper gives the backbone, the number
of trained parameters and the accuracy (its Table 2); no code and no recipe were released. What is ours:

- The streams. VideoMAE reads T frames as one clip and the spectrogram of the whole clip as a still picture (see
  `lavish_fast.backbones.videomae`). A backbone of pictures reads T frames and T one-second spectrograms, and their
  features are averaged.
- The head. One linear map of both streams' features, video first.
- The sampling. T frames spread evenly over the clip, whole, resized to S x S; one view in training and in testing.
- Silence. Half of UCF101 has no sound. Its clips are read as silent ones, and counted.
- Validation. UCF101 has none: groups 24 and 25 of the training list, which no fold tests on.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavish_fast import tasks
from lavish_fast.config import UCF101_CLASSES, Config
from lavish_fast.tasks import some

if TYPE_CHECKING:
    from lavish_fast.backbones import Encoded
    from lavish_fast.media import Clip

FOLDS = (1, 2, 3)
VAL_GROUPS = (24, 25)

_UCF101_CLIPS = 13320
_UCF101_LISTS = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}  # clips to train and to test on, by fold
_LISTS = "ucfTrainTestlist"

HEAD_NAMES: dict[str, str | None] = {}


def fitted(config: Config, tensors: Mapping[str, Tensor]) -> Config:
    """Raises: ValueError; there is no released network for action recognition."""
    raise ValueError("task: expected one with a released network, got 'action', for which there is none")


class Head(nn.Module):
    """One linear map of both streams' features, video first, averaged over the images of a clip."""

    reads_stages = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.images = config.images
        self.fc = nn.Linear(len(config.streams) * config.width, len(config.classes))

    def forward(self, encoded: Encoded) -> Tensor:
        """Logits (B, K) of features (B * images, C) a stream."""
        features = torch.cat(list(encoded.pooled)[::-1], -1)
        return self.fc(features.unflatten(0, (-1, self.images)).mean(1))


def inputs(config: Config, audio: Tensor | None = None, video: Tensor | None = None) -> dict[str, Tensor]:
    """What the backbone sees of each stream that runs, by name, audio first.

    Args:
        audio: (B, 1, frames, mel bins), the whole clip's spectrogram; (B, T, frames, mel bins) for a backbone of
            pictures. None if unused.
        video: (B, T, 3, S, S), ImageNet-normalised; None if unused.

    Returns: audio (n, 3, frames, mel bins); video (B, 3, T, S, S) for VideoMAE, or else (n, 3, S, S).

    Raises: ValueError naming the input, what was expected and what came.
    """
    count, side, spectrogram = config.images, config.backbone.img_size, config.spectrogram
    shapes = {"audio": (count, spectrogram.frames, spectrogram.mel_bins), "video": (config.frames, 3, side, side)}
    given = {"audio": audio, "video": video}
    for stream in config.streams:
        x, shape = given[stream], shapes[stream]
        wanted = f"{stream}: expected a floating tensor (B, {', '.join(map(str, shape))})"
        if not isinstance(x, Tensor):
            raise ValueError(f"{wanted}, got {type(x).__name__}")
        if x.ndim != 1 + len(shape) or tuple(x.shape[1:]) != shape or not x.is_floating_point():
            raise ValueError(f"{wanted}, got {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}")
    if len(config.streams) == 2 and len(audio) != len(video):
        raise ValueError(f"audio and video: expected the same clips B, got {len(audio)} and {len(video)}")
    found = {}
    if "audio" in config.streams:
        found["audio"] = audio.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
    if "video" in config.streams:
        found["video"] = video.transpose(1, 2) if config.backbone.kind == "videomae" else video.flatten(0, 1)
    return found


def kept(outputs: Tensor, clips: int) -> Tensor:
    """What evaluation keeps of each clip: probabilities (clips, K), float32."""
    return outputs.float().softmax(-1)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K), mean over clips, in float32 or wider. labels: (B,) class indices."""
    return F.cross_entropy(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), labels)


class Metric:
    """Top-1 accuracy over clips, and its mean over the classes that occur. It only counts.

    A clip whose logits are not all finite is wrong.
    """

    def __init__(self) -> None:
        self.right: Counter[int] = Counter()
        self.total: Counter[int] = Counter()

    def update(self, outputs: Tensor, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Counts a batch: logits (B, K), labels (B,)."""
        if outputs.ndim != 2 or labels.ndim != 1 or len(outputs) != len(labels):
            raise ValueError(
                f"outputs: expected (B, K) for labels of shape {tuple(labels.shape)}, got {tuple(outputs.shape)}"
            )
        right = (outputs.argmax(-1) == labels) & outputs.isfinite().all(-1)
        self.total.update(labels.tolist())
        self.right.update(labels[right].tolist())

    def merge(self, other: Metric) -> None:
        """Adds what another one has counted."""
        self.right.update(other.right)
        self.total.update(other.total)

    def results(self) -> dict[str, float]:
        """Both shares, NaN before any clip was counted."""
        if not self.total:
            return {"accuracy": float("nan"), "class_accuracy": float("nan")}
        shares = [self.right[label] / count for label, count in sorted(self.total.items())]
        accuracy = sum(self.right.values()) / sum(self.total.values())
        return {"accuracy": accuracy, "class_accuracy": sum(shares) / len(shares)}


@dataclass(frozen=True)
class Row:
    """A clip of a list: CATEGORY/NAME, NAME with its suffix."""

    category: str
    name: str

    @property
    def id(self) -> str:
        return Path(self.name).stem

    @property
    def group(self) -> int | None:
        """Clips of one group are cut from one source: v_Archery_g08_c01.avi is of group 8."""
        match = re.search(r"_g(\d{1,6})_c\d+$", self.id)
        return int(match[1]) if match else None


def read_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """The classes of a file like classInd.txt, a line `NUMBER CLASS` each, numbered from 1.

    Raises: FileNotFoundError, or ValueError naming file, line, what was expected and what came.
    """
    classes: list[str] = []
    for number, line in enumerate(_read_lines(Path(path)), 1):
        fields = line.split()
        if len(fields) != 2 or fields[0] != str(number):
            raise ValueError(f"{path}, line {number}: expected `{number} CLASS`, got {line!r}")
        name = _checked(f"{path}, line {number}", "a class", fields[1])
        if name in classes:
            raise ValueError(f"{path}, line {number}: expected each class once, got {name!r} again")
        classes.append(name)
    if len(classes) < 2:
        raise ValueError(f"{path}: expected at least two classes, got {len(classes)}")
    return tuple(classes)


def classes_of(root: str | os.PathLike) -> tuple[str, ...]:
    """The classes of the data set in a folder. Raises: FileNotFoundError or ValueError, as `read_classes`."""
    return read_classes(_find(Path(root), "classInd.txt"))


def settle(config: Config, root: str | os.PathLike) -> Config:
    """The configuration with the classes of the data set. Raises: as `classes_of`."""
    return dataclasses.replace(config, classes=classes_of(root))


def read_list(path: str | os.PathLike, classes: Sequence[str]) -> tuple[Row, ...]:
    """The clips of a file like trainlist01.txt, a line `CLASS/NAME.avi LABEL` each; testlist01.txt has no labels.

    A label is the number of the class, from 1. NAME need not be that of the class: UCF101 has clips of
    HandstandPushups named v_HandStandPushups.

    Raises: FileNotFoundError, or ValueError naming file, line, what was expected and what came.
    """
    rows = _rows(Path(path), classes)
    for row in rows:
        if isinstance(row, ValueError):
            raise row
    return tuple(rows)


def read_splits(root: str | os.PathLike, classes: Sequence[str], fold: int = 1) -> dict[str, tuple[Row, ...]]:
    """The clips of "train", "val" and "test" in one of UCF101's three folds, 1 to 3.

    Read from trainlist0K.txt and testlist0K.txt in `root` or its ucfTrainTestlist/. If there is a vallist0K.txt it is
    "val"; UCF101 has none, and "val" is groups 24 and 25 of the training list, 8 % of the clips. No fold tests on
    them: the folds' tests are groups 1 to 7, 8 to 14 and 15 to 21.

    Raises: FileNotFoundError or ValueError naming the file, what was expected and what came.
    """
    root = Path(root)
    files = _list_files(root, fold)
    lists = {split: read_list(path, classes) for split, path in files.items()}
    return _held_out(lists, files["train"])


class Dataset(tasks.Clips):
    """One split of a data set in UCF101's layout.

    Args:
        root: the folder. classInd.txt and the lists (see `read_splits`) lie in it or in its ucfTrainTestlist/, a
            clip in UCF-101/CLASS/NAME.avi or CLASS/NAME.avi.
        split: "train", "val" or "test".
        config: gives T, the size of frames and spectrograms, and the classes, which must be the data set's.
        antialias: of the resizing, as for `media.load_clip`.
        skip: ids of clips to leave out, their names without suffix.
        cache: keep decoded clips in memory, in each process that reads them (10 MB a clip of 16 frames of 224 pixels).
        fold: 1, 2 or 3.

    An item is a dict: audio (1 or T, frames, mel bins) and video (T, 3, S, S) float32, labels () int64, id, and silent,
    whether the clip has no sound and is read as silence. For a clip that cannot be read it is the `media.MediaError`
    instead.

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
        fold: int = 1,
    ) -> None:
        super().__init__(root, split, config, antialias=antialias, cache=cache)
        classes = classes_of(self.root)
        if problem := _class_problem(classes, config):
            raise ValueError(f"{self.root}: {problem}")
        self.fold = fold
        self.rows = tuple(row for row in read_splits(self.root, classes, fold)[split] if row.id not in skip)

    def item(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        clip = self.kept(row.id, lambda: self._read(row))
        label = torch.tensor(self.config.classes.index(row.category))
        return {"audio": clip.audio, "video": clip.video, "labels": label, "id": row.id, "silent": clip.silent}

    def _read(self, row: Row) -> Clip:
        from lavish_fast.media import SILENCE, load_clip

        clip = load_clip(_media_path(self.root, row), **media_options(self.config), antialias=self.antialias)
        for message in clip.warnings:
            if not message.endswith(SILENCE):
                warnings.warn(message, stacklevel=3)
        return clip


@dataclass(frozen=True)
class Report(tasks.Report):
    """What `verify` found.

    classes: how many there are. fold: the one looked at. silent: ids of clips without sound; None unless the files
    were decoded. The rest as in `tasks.Report`.
    """

    classes: int
    fold: int
    silent: tuple[str, ...] | None

    @property
    def heading(self) -> str:
        silent = "" if self.silent is None else f", {len(self.silent)} clips without sound"
        return f"classInd.txt: {self.classes} classes; fold {self.fold}{silent}"


def verify(
    root: str | os.PathLike,
    config: Config,
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    fold: int = 1,
) -> Report:
    """Looks through a data set before training. Sizes other than UCF101's own are noted when the classes are its.

    Args:
        decode: also decode every file, in `workers` processes, by default one a CPU core, and count the clips
            without sound.
        progress: called as progress(files decoded, files in all) after each.
        fold: the one to look at.

    Raises: ValueError for a fold other than 1, 2 and 3, nothing for a faulty data set; the report says what is wrong.
    """
    _check_fold(fold)
    root = Path(root)
    problems: list[str] = []
    notes: list[str] = []
    classes: tuple[str, ...] = ()
    splits: dict[str, tuple[Row, ...]] = {}
    listed = {}
    try:
        classes = classes_of(root)
        if problem := _class_problem(classes, config):
            problems.append(problem)
        files = _list_files(root, fold)
        found = {split: _rows(path, classes) for split, path in files.items()}
        problems += [str(row) for row in chain(*found.values()) if isinstance(row, ValueError)]
        lists = {split: tuple(row for row in rows if isinstance(row, Row)) for split, rows in found.items()}
        listed = {split: len(rows) for split, rows in lists.items()}
        splits = lists  # as they are, if nothing can be held out
        splits = _held_out(lists, files["train"])
        if "val" not in lists:
            notes.append(f"val: {len(splits['val'])} clips of groups 24 and 25, held out of the training list")
    except (OSError, ValueError) as error:
        problems.append(str(error))

    paths = {row: _media_path(root, row) for row in dict.fromkeys(chain(*splits.values()))}
    there = {row for row, path in paths.items() if path.is_file()}
    missing = {split: tuple(row.id for row in rows if row not in there) for split, rows in splits.items()}
    for split, absent in missing.items():
        if absent:
            problems.append(f"{split}: {len(absent)} of {len(splits[split])} clips have no file: {some(absent)}")
    undecodable: tuple[str, ...] = ()
    silent = None
    if decode:
        files = [paths[row] for row in paths if row in there]
        decoded = tasks.decode(files, workers=workers, progress=progress, **media_options(config))
        undecodable, silent = decoded.undecodable, decoded.silent
        notes += decoded.notes
    problems += undecodable

    for a, b in combinations(splits, 2):
        shared = set(splits[b])
        if both := [row.id for row in splits[a] if row in shared]:
            problems.append(f"{len(both)} clips are in {a} and {b}: {some(both)}")
            continue
        sources = {(row.category, row.group) for row in splits[b] if row.group is not None}
        if near := [row.id for row in splits[a] if (row.category, row.group) in sources]:
            notes.append(f"{len(near)} clips of {a} are of a group that is also in {b}: {some(near)}")
    published = config.classes == UCF101_CLASSES
    if published:
        train, test = _UCF101_LISTS[fold]
        sizes = {"classes": (101, len(classes)), "train list": (train, listed.get("train", 0))}
        sizes |= {"test list": (test, listed.get("test", 0)), "clips": (_UCF101_CLIPS, sum(listed.values()))}
        others = [f"{name}: UCF101 has {ucf}, got {got}" for name, (ucf, got) in sizes.items() if ucf != got]
        notes += others
        published = not others
    sizes = {split: len(rows) for split, rows in splits.items()}
    return Report(
        sizes,
        missing,
        undecodable,
        tuple(problems),
        tuple(notes),
        published,
        classes=len(classes),
        fold=fold,
        silent=None if silent is None else tuple(silent),
    )


def _rows(path: Path, classes: Sequence[str]) -> list[Row | ValueError]:
    """Each clip of a list, or what is wrong with its line."""
    rows: list[Row | ValueError] = []
    seen: set[str] = set()
    for number, line in enumerate(_read_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            row = _parse_row(where, line, classes)
            if row.id in seen:
                raise ValueError(f"{where}: expected each clip once, by a name of its own, got {row.id!r} again")
            seen.add(row.id)
            rows.append(row)
        except ValueError as error:
            rows.append(error)
    return rows


def _parse_row(where: str, line: str, classes: Sequence[str]) -> Row:
    fields = line.split()
    parts = fields[0].split("/") if fields else []
    if len(parts) != 2 or len(fields) > 2:
        raise ValueError(f"{where}: expected `CLASS/NAME.avi LABEL`, got {line!r}")
    row = Row(*(_checked(where, what, part) for what, part in zip(("a class", "a clip"), parts, strict=True)))
    if row.category not in classes:
        raise ValueError(f"{where}: expected a class of classInd.txt, got {row.category!r}")
    label = classes.index(row.category) + 1
    if len(fields) == 2 and fields[1] != str(label):
        raise ValueError(f"{where}: expected the label {label} of {row.category}, got {fields[1]!r}")
    return row


def _checked(where: str, what: str, name: str) -> str:
    # Names are joined into paths, so none may lead out of its folder.
    if name in ("", ".") or ".." in name or not name.isprintable() or set(name) & set("/\\:"):
        raise ValueError(f"{where}: expected {what} that is a plain file name, got {name!r}")
    return name


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}") from None
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: expected a line for each entry, got an empty file")
    return lines


def _check_fold(fold: int) -> None:
    if fold not in FOLDS:
        raise ValueError(f"fold: expected one of {', '.join(map(str, FOLDS))}, got {fold!r}")


def _list_files(root: Path, fold: int) -> dict[str, Path]:
    """The list of each split that has one."""
    _check_fold(fold)
    files = {"train": _find(root, f"trainlist{fold:02}.txt"), "test": _find(root, f"testlist{fold:02}.txt")}
    val = files["train"].with_name(f"vallist{fold:02}.txt")
    return files | ({"val": val} if val.is_file() else {})


def _held_out(lists: Mapping[str, tuple[Row, ...]], path: Path) -> dict[str, tuple[Row, ...]]:
    """The three splits, "val" taken from the training list if it has no list of its own."""
    train, val = lists["train"], lists.get("val")
    if val is None:
        val = tuple(row for row in train if row.group in VAL_GROUPS)
        train = tuple(row for row in train if row.group not in VAL_GROUPS)
        if not val:
            raise ValueError(
                f"{path}: expected clips of groups 24 or 25, or a vallist beside it, to validate on, got none"
            )
    return {"train": train, "val": val, "test": lists["test"]}


def _find(root: Path, name: str) -> Path:
    for path in (root / name, root / _LISTS / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{root}: expected {name} there or in {_LISTS}/, got none")


def _class_problem(classes: tuple[str, ...], config: Config) -> str | None:
    if classes == config.classes:
        return None
    if len(classes) != len(config.classes):
        return f"classes: expected the configuration's {len(config.classes)}, got {len(classes)}: {some(classes)}"
    index, (a, b) = next((i, pair) for i, pair in enumerate(zip(config.classes, classes)) if pair[0] != pair[1])
    return f"classes: expected the configuration's, number {index + 1} {a!r}, got {b!r}"


def _media_path(root: Path, row: Row) -> Path:
    inside = root / "UCF-101" / row.category / row.name
    return inside if inside.is_file() else root / row.category / row.name


def media_options(config: Config) -> dict[str, Any]:
    """Arguments of `media.load_clip`."""
    options = {"frames": config.frames, "img_size": config.backbone.img_size, "spectrogram": config.spectrogram}
    return options | {"frame_rate": None}
