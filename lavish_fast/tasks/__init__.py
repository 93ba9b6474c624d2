"""The tasks, a module each: head, loss, metric and data set of one task side by side.

What the rest of the package calls in each of them:

- `Head(config)`, a module: `forward(encoded, *extras)` -> the network's outputs, a tensor or a tuple that begins with
  what the metric reads. `reads_stages`: whether it reads the ends of all stages.
- `inputs(config, ...)`: the released network's arguments, checked, as a dict by name: first the images of each stream
  that runs, (B * T, 3, H, W), audio first; then what else `Model.classify` takes. Further images go through the frozen
  backbone alone before they reach the head.
- `loss(outputs, labels)`: a scalar, the mean over the labels' entries.
- `Metric`: `update(outputs, labels, ids)`, `merge(other)`, `results()`, by name, that which selects a model first.
- `kept(outputs, clips)`: what evaluation keeps of each clip, a tensor with a row for each.
- `Dataset(root, split, config)`: items are dicts with the model's arguments by name, "labels" and "id", perhaps
  "silent", or the `media.MediaError` of a clip that cannot be read; `metric()` makes its `Metric`.
- `settle(config, root)`: the configuration with what the data set fixes. `verify(root, config)`: a `Report`, with
  `decode=True` of every file too; its `progress` is called with the files tried and the files in all.
- `HEAD_NAMES`: dotted prefixes of the head's tensors in the released state dict, and ours below "head."; None for
  entries that the released network never reads.
- `fitted(config, tensors)`: the configuration with what the tensors' shapes say and the released options do not.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavish_fast.backbones import Encoded
from lavish_fast.config import Config

if TYPE_CHECKING:
    from lavish_fast.media import Clip, MediaError


SPLITS = ("train", "val", "test")


def load(name: str) -> ModuleType:
    """The module of a task."""
    return importlib.import_module(f"lavish_fast.tasks.{name}")


def side_by_side(config: Config, encoded: Encoded) -> Tensor:
    """The streams' features (n, C) as one: video then audio for Swin-V2, audio then video for others, as released."""
    return torch.cat(encoded.pooled[::-1] if config.backbone.kind == "swinv2" else encoded.pooled, -1)


def frames(config: Config, name: str, x: Any, side: int | None = None) -> Tensor:
    """Frames (B, T, 3, S, S) as images (B * T, 3, S, S); S is the backbone's unless another side is given.

    Raises: ValueError naming the input, what was expected and what came.
    """
    side = side or config.backbone.img_size
    return checked(name, x, (3, side, side)).flatten(0, 1)


def spectrograms(config: Config, name: str, x: Any) -> Tensor:
    """Spectrograms (B, T, frames, mel bins), or a list whose first entry is that, as images (B * T, 3, H, W).

    Raises: ValueError naming the input, what was expected and what came.
    """
    if isinstance(x, (list, tuple)):
        x = x[0] if len(x) else None
    side = config.backbone.img_size
    # A ViT takes spectrograms of any size; Swin-V2's windows are laid out for one size of image.
    shape = (
        (side, side) if config.backbone.kind == "swinv2" else (config.spectrogram.frames, config.spectrogram.mel_bins)
    )
    return checked(name, x, shape).unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(0, 1)


def checked(name: str, x: Any, shape: tuple[int, ...]) -> Tensor:
    """An input once it is known to be a floating tensor (B, T, *shape). Raises: ValueError that names it."""
    wanted = f"{name}: expected a floating tensor (B, T, {', '.join(map(str, shape))})"
    if not isinstance(x, Tensor):
        raise ValueError(f"{wanted}, got {type(x).__name__}")
    if x.ndim != 2 + len(shape) or tuple(x.shape[2:]) != shape or not x.is_floating_point():
        raise ValueError(f"{wanted}, got {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}")
    return x


def check_clips(**given: Any) -> None:
    """Raises: ValueError where inputs, by name, (B, T, ...) each or a list that begins with that, are not of the same
    clips and frames."""
    shapes = {name: tuple((x[0] if isinstance(x, (list, tuple)) else x).shape[:2]) for name, x in given.items()}
    if len(set(shapes.values())) > 1:
        names, got = " and ".join(shapes), " and ".join(map(str, shapes.values()))
        raise ValueError(f"{names}: expected the same clips and seconds (B, T), got {got}")


@dataclass(frozen=True)
class Batch:
    """B clips side by side; B is 0 when none could be read.

    inputs: the model's arguments by name, (B, ...) each. labels: (B, ...). ids: of the clips.
    failed: one line for each clip that could not be read, naming file and reason. silent: ids of the clips that are
    said to be without sound.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    ids: tuple[str, ...]
    failed: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, chosen: Sequence[bool]) -> Batch:
        """The batch without the clips that are not chosen."""
        kept = torch.tensor(chosen, device=self.labels.device)
        ids = tuple(name for name, is_chosen in zip(self.ids, chosen) if is_chosen)
        return replace(self._with(lambda x: x[kept]), ids=ids)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on another device."""
        return self._with(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch with its tensors in pinned memory; DataLoader calls it."""
        return self._with(Tensor.pin_memory)

    def _with(self, function) -> Batch:
        inputs = {name: function(x) for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, labels=function(self.labels))


def collate(items: Iterable[dict[str, Any] | MediaError]) -> Batch:
    """Items of a data set as a batch. Those that are errors are set aside in `failed`, as text."""
    clips, failed = [], []
    for item in items:
        failed.append(str(item)) if isinstance(item, Exception) else clips.append(item)
    if not clips:
        return Batch({}, torch.empty(0), (), tuple(failed))
    stacked = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0] if name not in ("id", "silent")}
    labels = stacked.pop("labels")
    silent = tuple(clip["id"] for clip in clips if clip.get("silent"))
    return Batch(stacked, labels, tuple(clip["id"] for clip in clips), tuple(failed), silent)


class Clips(torch.utils.data.Dataset):
    """What the tasks' data sets share: arguments, and clips that are decoded once if they are to be kept.

    rows: of the data set's list, one an item.
    """

    rows: Sequence[Any]

    def __init__(self, root: str | os.PathLike, split: str, config: Config, *, antialias: bool, cache: bool) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        self.root, self.config, self.antialias = Path(root), config, antialias
        self._cache: dict[str, Any] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any] | MediaError:
        from lavish_fast.media import MediaError

        try:
            return self.item(index)
        except MediaError as error:
            return error

    def item(self, index: int) -> dict[str, Any]:
        """An item. Raises: `media.MediaError` for a clip that cannot be read."""
        raise NotImplementedError

    def metric(self) -> Any:
        """What the split is measured by."""
        return load(self.config.task).Metric()

    def kept(self, name: str, read: Callable[[], Any]) -> Any:
        """What `read` gives for a clip, or gave before, if clips are to be kept."""
        if self._cache and name in self._cache:
            return self._cache[name]
        found = read()
        if self._cache is not None:
            self._cache[name] = found
        return found


def warned(clip: Clip) -> Clip:
    """The clip, after its warnings."""
    for message in clip.warnings:
        warnings.warn(message, stacklevel=2)
    return clip


@dataclass(frozen=True)
class Report:
    """What a task's `verify` found.

    splits: rows per split. missing: per split, the clips that lack files. undecodable: a line for each file that does
    not decode. problems: sentences, each a reason why training would not see the whole data set. notes: what to know
    besides. published: whether there are as many rows and classes as in the data set that results are published of.
    """

    splits: Mapping[str, int]
    missing: Mapping[str, tuple[str, ...]]
    undecodable: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    published: bool

    @property
    def heading(self) -> str:
        """On the list itself."""
        return ""

    @property
    def ok(self) -> bool:
        """Whether nothing is missing or broken."""
        return not self.problems

    def __str__(self) -> str:
        lines = [self.heading] if self.heading else []
        if self.splits:
            lines.append("splits: " + ", ".join(f"{split} {size}" for split, size in self.splits.items()))
        lines += [f"problem: {text}" for text in self.problems]
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True)
class Decoded:
    """What `decode` found: a line for each file that does not decode, the names of clips without sound, and notes."""

    undecodable: tuple[str, ...]
    silent: tuple[str, ...]
    notes: tuple[str, ...]


def decode(
    paths: Collection[str | os.PathLike],
    *,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
    load: Callable[..., Clip] | None = None,
    **options: Any,
) -> Decoded:
    """Tries every file of a data set. Arguments: as for `media.load_clips` and for the tasks' `verify`."""
    from lavish_fast import media

    undecodable, silent, warned = [], [], []
    clips = media.load_clips(paths, workers=workers, load=load or media.load_clip, **options)
    for tried, (path, clip) in enumerate(clips, 1):
        if isinstance(clip, media.MediaError):
            undecodable.append(str(clip))
        else:
            if clip.silent:
                path = Path(path)
                silent.append(path.stem if path.suffix.lower() in media.VIDEO_SUFFIXES else path.name)
            warned += [message for message in clip.warnings if not message.endswith(media.SILENCE)]
        if progress:
            progress(tried, len(paths))
    notes = []
    if silent:
        notes.append(f"{len(silent)} of {len(paths)} clips have no sound, {media.SILENCE}: {some(silent)}")
    if warned:
        notes.append(f"{len(warned)} warnings: {some(warned)}")
    return Decoded(tuple(undecodable), tuple(silent), tuple(notes))
