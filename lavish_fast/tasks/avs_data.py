"""The data set of audio-visual segmentation: a reader of AVSBench's single-source part, S4, and of others laid out so.

    s4_meta_data.csv                                               name, start, category, split
    s4_data/visual_frames/SPLIT/CATEGORY/NAME/NAME_1.png ...       T frames
    s4_data/gt_masks/SPLIT/CATEGORY/NAME/NAME_1.png ...            T masks; of a training clip only the first is read
    s4_data/audio_wav/SPLIT/CATEGORY/NAME.wav

Nothing else is read: not the pickled log-mels, nor the raw videos, for the masks are of the frames that were extracted.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lavish_fast import tasks
from lavish_fast.config import Config
from lavish_fast.tasks import SPLITS, some

if TYPE_CHECKING:
    from lavish_fast.media import Clip, MediaError

META = "s4_meta_data.csv"
MASK_THRESHOLD = 128  # of 255

_SIZES = {"train": 3452, "val": 740, "test": 740}  # of S4
_CATEGORIES = 23
_FRAMES, _MASKS, _AUDIO = "visual_frames", "gt_masks", "audio_wav"


@dataclass(frozen=True)
class Row:
    """One row of the list of clips."""

    name: str
    category: str
    split: str

    @property
    def folder(self) -> Path:
        """Of its frames, below visual_frames, and of its masks, below gt_masks."""
        return Path(self.split, self.category, self.name)


def read_meta(path: str | os.PathLike) -> tuple[Row, ...]:
    """The rows of s4_meta_data.csv: a header, then name, start, category and split; the start is not used.

    Raises: FileNotFoundError, or ValueError naming file, line, what was expected and what came.
    """
    rows = _read_rows(Path(path))
    for row in rows:
        if isinstance(row, ValueError):
            raise row
    return tuple(rows)


def find(root: str | os.PathLike) -> tuple[Path, tuple[Row, ...]]:
    """The folder s4_data/, and the clips. Raises: as `read_meta`."""
    meta = _meta_path(Path(root))
    return _data_path(meta), read_meta(meta)


def frames_and_wav(data: Path, folder: Path) -> tuple[Path, Path]:
    """Where the frames and the sound of a clip, `Row.folder`, lie in s4_data/."""
    frames = data / _FRAMES / folder
    return frames, _wav_path(frames)


class Dataset(tasks.Clips):
    """One split of a data set in S4's layout.

    Args:
        root: the folder with s4_meta_data.csv and s4_data/, or the one that has them in Single-source/.
        split: "train", "val" or "test".
        config: gives T, the size of frames and masks (`config.head.size`) and of spectrograms.
        antialias: of the resizing of frames, as for `media.load_clip`; S4's are of the right size.
        skip: names of clips to leave out.
        cache: keep decoded clips in memory, in each process that reads them (4 MB a clip).

    An item is a dict: video (T, 3, size, size) and audio (T, frames, mel bins) float32, labels (M, size, size) uint8 of
    0 and 1, the masks of the first M frames, 1 in training and T otherwise, and id, the clip's name. For a clip that
    cannot be read it is the `media.MediaError` instead, which `tasks.collate` sets aside.

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
        meta = _meta_path(Path(root))
        self.rows = tuple(row for row in read_meta(meta) if row.split == split and row.name not in skip)
        self._data = _data_path(meta)
        self._options = _media_options(config) | {"antialias": antialias}

    def item(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        clip, masks = self.kept(str(row.folder), lambda: self._read(row))
        return {"video": clip.video, "audio": clip.audio, "labels": masks, "id": row.name}

    def _read(self, row: Row) -> tuple[Clip, Tensor]:
        clip, masks = _load(self._data / _FRAMES / row.folder, **self._options)
        return tasks.warned(clip), masks


def settle(config: Config, root: str | os.PathLike) -> Config:
    """The configuration as it is: a data set of masks fixes nothing of it."""
    return config


@dataclass(frozen=True)
class Report(tasks.Report):
    """What `verify` found. rows: of s4_meta_data.csv. categories: how many. The rest as in `tasks.Report`."""

    rows: int
    categories: int

    @property
    def heading(self) -> str:
        return f"{META}: {self.rows} rows, {self.categories} categories"


def verify(
    root: str | os.PathLike,
    config: Config,
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Looks through a data set before training: the list, and that each clip has its frames, masks and sound.

    Args:
        decode: also decode every file, in `workers` processes, by default one a CPU core; sees masks of another size.
        progress: called as progress(files decoded, files in all) after each.

    Raises: nothing for a faulty data set; the report says what is wrong.
    """
    from lavish_fast.media import MediaError

    problems: list[str] = []
    notes: list[str] = []
    found: list[Row | ValueError] = []
    try:
        meta = _meta_path(Path(root))
        found = _read_rows(meta)
    except (OSError, ValueError) as error:
        problems.append(str(error))
    rows = [row for row in found if isinstance(row, Row)]
    problems += [str(row) for row in found if isinstance(row, ValueError)]
    by_split = {split: [row for row in rows if row.split == split] for split in SPLITS} if rows else {}
    missing: dict[str, tuple[str, ...]] = {}
    whole = []
    for split, of_split in by_split.items():
        faults: dict[str, MediaError] = {}
        for row in of_split:
            try:
                whole.append(_check_files(_data_path(meta) / _FRAMES / row.folder, config.frames))
            except MediaError as error:
                faults[row.name] = error
        missing[split] = tuple(faults)
        if faults:
            text = f"{split}: {len(faults)} of {len(of_split)} clips lack files or have too many: {some(tuple(faults))}"
            problems.append(f"{text}; first {next(iter(faults.values()))}")
    undecodable: tuple[str, ...] = ()
    if decode:
        options = {"workers": workers, "progress": progress, "load": _load_clip} | _media_options(config)
        decoded = tasks.decode(list(dict.fromkeys(whole)), **options)
        undecodable = decoded.undecodable
        notes += decoded.notes
    problems += undecodable

    names = {split: Counter(row.name for row in of_split) for split, of_split in by_split.items()}
    for split, counts in names.items():
        if twice := [name for name, count in counts.items() if count > 1]:  # an evaluation keeps one mask a name
            problems.append(f"{split}: {len(twice)} names come more than once: {some(twice)}")
    for a, b in combinations(names, 2):
        if both := [name for name in names[a] if name in names[b]]:
            notes.append(f"{len(both)} names are in {a} and {b}: {some(both)}")
    sizes = {split: len(of_split) for split, of_split in by_split.items()}
    categories = len({row.category for row in rows})
    others = [f"{split}: S4 has {_SIZES[split]} clips, got {n}" for split, n in sizes.items() if n != _SIZES[split]]
    if rows and categories != _CATEGORIES:
        others.append(f"S4 has {_CATEGORIES} categories, got {categories}")
    notes += others
    reported = sizes, missing, undecodable, tuple(problems), tuple(notes), not others
    return Report(*reported, rows=len(found), categories=categories)


def _read_rows(path: Path) -> list[Row | ValueError]:
    """Each row, or what is wrong with it. Raises: ValueError where there is no such list at all."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        lines = [(reader.line_num, line) for line in reader if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}") from None
    except csv.Error as error:
        raise ValueError(f"{path}: expected comma-separated values, got: {error}") from None
    header = lines[0][1] if lines else []
    if len(header) < 4 or header[2:4] != ["category", "split"]:
        raise ValueError(f"{path}: expected a header name, start, category, split, got {','.join(header)!r}")
    if len(lines) == 1:
        raise ValueError(f"{path}: expected a row for each clip, got a header alone")
    rows: list[Row | ValueError] = []
    for number, fields in lines[1:]:
        try:
            rows.append(_parse_row(fields, len(header)))
        except ValueError as error:
            rows.append(ValueError(f"{path}, line {number}: {error}"))
    return rows


def _parse_row(fields: Sequence[str], columns: int) -> Row:
    if len(fields) != columns:
        raise ValueError(f"expected {columns} fields as in the header, got {len(fields)}: {','.join(fields)!r}")
    name, _, category, split = fields[:4]
    # Names are joined into paths, so none may name anything outside its folder.
    for what, value in (("name", name), ("category", category)):
        if value in ("", ".") or ".." in value or not value.isprintable() or set(value) & set("/\\:"):
            raise ValueError(f"expected a {what} that is a plain file name, got {value!r}")
    if split not in SPLITS:
        raise ValueError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")
    return Row(name, category, split)


def _meta_path(root: Path) -> Path:
    places = (root / META, root / "Single-source" / META)
    if (path := next((path for path in places if path.is_file()), None)) is None:
        raise FileNotFoundError(f"{root}: expected {META} there or in Single-source/, got none")
    return path


def _data_path(meta: Path) -> Path:
    return meta.parent / "s4_data"


def _media_options(config: Config) -> dict[str, Any]:
    return {"frames": config.frames, "img_size": config.head.size, "spectrogram": config.spectrogram}


def _load(folder: Path, *, frames: int, img_size: int, **options: Any) -> tuple[Clip, Tensor]:
    """The clip of a folder of frames, and its masks. Raises: MediaError naming the file and the reason."""
    from lavish_fast import media

    _check_files(folder, frames)
    masks = torch.stack([_read_mask(path, img_size) for path in _mask_paths(folder, frames)])
    clip = media.load_frames_and_wav(folder, _wav_path(folder), frames=frames, img_size=img_size, **options)
    return clip, masks


def _load_clip(folder: Path, **options: Any) -> Clip:
    return _load(folder, **options)[0]


def check_frames(folder: Path, frames: int) -> None:
    """Raises: MediaError unless the folder has T frames, NAME_1 to NAME_T, and no other picture."""
    from lavish_fast.media import MediaError

    pictures = [path.stem for path in _pictures(folder, "frames")]
    expected = [f"{folder.name}_{i}" for i in range(1, frames + 1)]
    if absent := [name for name in expected if name not in pictures]:
        raise MediaError(folder, f"expected {frames} frames, got no {some(absent)}")
    if len(pictures) > frames:
        raise MediaError(folder, f"expected {frames} frames, got {len(pictures)}")


def _check_files(folder: Path, frames: int) -> Path:
    """The folder, once it is known to have T frames, and masks and sound beside.

    Raises: MediaError naming the folder or file, what was expected and what came.
    """
    from lavish_fast.media import MediaError

    check_frames(folder, frames)
    masks = _mask_paths(folder, frames)
    count = len(_pictures(masks[0].parent, "masks"))
    if absent := [path.name for path in masks if not path.is_file()]:
        raise MediaError(masks[0].parent, f"expected {len(masks)} masks, got no {some(absent)}")
    # In training only the first mask is read, though there may be more.
    if 1 < len(masks) < count:
        raise MediaError(masks[0].parent, f"expected {len(masks)} masks, got {count}")
    if not _wav_path(folder).is_file():
        raise MediaError(_wav_path(folder), "expected a sound, got none")
    return folder


def _pictures(folder: Path, what: str) -> list[Path]:
    from lavish_fast.decoding import IMAGE_SUFFIXES, MediaError

    if not folder.is_dir():
        raise MediaError(folder, f"expected a folder of {what}, got none")
    return [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]


def _mask_paths(folder: Path, frames: int) -> list[Path]:
    split, category, name = folder.parts[-3:]
    masks = folder.parents[3] / _MASKS / split / category / name
    return [masks / f"{name}_{i}.png" for i in range(1, 2 if split == "train" else frames + 1)]


def _wav_path(folder: Path) -> Path:
    split, category, name = folder.parts[-3:]
    return folder.parents[3] / _AUDIO / split / category / f"{name}.wav"


def _read_mask(path: Path, size: int) -> Tensor:
    """(size, size) uint8: 1 where the picture's grey is at least 128, without dithering."""
    from PIL import Image

    from lavish_fast import decoding

    grey = np.asarray(Image.fromarray(decoding.read_image(path)).convert("L"))
    if grey.shape != (size, size):
        raise decoding.MediaError(path, f"expected a mask of {size}x{size} pixels, got {grey.shape[1]}x{grey.shape[0]}")
    return torch.from_numpy((grey >= MASK_THRESHOLD).astype(np.uint8))
