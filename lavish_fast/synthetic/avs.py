"""A small data set in S4's layout: two objects move, one of them sounds, and the mask is its pixels.

A clip of 5 seconds shows a solid object and a hollow one, each in a half of the frame, left and right or top and
bottom, and has the sound of one of the two: what is solid sounds low, what is hollow sounds high. The solid one sounds
in two of three clips. Whoever sees perfectly but cannot hear does best to mask it always, for a mean IoU of 2/3 (a mask
of both is worth 1/2). Whoever hears perfectly but cannot see knows what sounds and nothing of where, which leaves the
best mask that is the same for all frames. Both together reach 100 %.

Were the two as likely, neither eye nor ear alone would tell anything of the mask, and a network would search long for
what they tell together.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from lavish_fast import synthetic
from lavish_fast.synthetic import SAMPLE_RATE

TRUTH = "synthetic_avs.jsonl"
SECONDS = 5
SIZE = 64  # of frames and masks
SOLID, HOLLOW = ("Drum", "Engine"), ("Clock", "Rain")  # a disc and a square, a ring and bars

_DIAMETERS = (0.36, 0.44)
_EXTENT = 0.46  # of the half that an object keeps to, less than a half for the corners that stick out


@dataclass(frozen=True)
class Clip:
    """One clip's truth: the object that sounds, and the other one."""

    id: str
    split: str
    category: str
    other: str


class Scene:
    """What is to be seen in a clip: the object that sounds, and the other one."""

    def __init__(self, rng: np.random.Generator, clip: Clip) -> None:
        self.background = synthetic.random_background(rng, synthetic.SIZE)
        axis = rng.integers(2)
        middles, extent = np.full((2, 2), 0.5), np.ones(2)
        middles[:, axis], extent[axis] = rng.permutation((0.25, 0.75)), _EXTENT
        self.indices = [synthetic.CATEGORIES.index(category) for category in (clip.category, clip.other)]
        self.looks = [
            synthetic.random_look(rng, self.background, _DIAMETERS, middle=middle, extent=extent) for middle in middles
        ]

    def frame(self, t: float) -> np.ndarray:
        """The picture at t seconds, (128, 128, 3) uint8."""
        frame = self.background
        for index, look in zip(self.indices, self.looks):
            frame = synthetic.render_frame(frame, index, *look.pose(t), size=look.size, colour=look.colour)
        return frame

    def mask(self, t: float) -> np.ndarray:
        """The pixels of the object that sounds, (SIZE, SIZE) bool."""
        return synthetic.render_mask(SIZE, self.indices[0], *self.looks[0].pose(t), size=self.looks[0].size)


def plan_clip(seed: int, index: int, split: str) -> Clip:
    """The truth of clip number `index`, a function of the two numbers alone.

    In every three clips from a multiple of three on the hollow object sounds once.
    """
    group, place = divmod(index, 3)
    hollow = place == synthetic.generator(seed, group, "deck").integers(3)
    kinds = (HOLLOW, SOLID) if hollow else (SOLID, HOLLOW)
    rng = synthetic.generator(seed, index, "plan")
    return Clip(f"clip_{index:04d}", split, *(kind[rng.integers(len(kind))] for kind in kinds))


def write_dataset(
    root: str | Path,
    *,
    train: int = 128,
    val: int = 32,
    test: int = 40,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set, deterministically: the same bytes for a seed, whatever the number of workers.

    Args:
        root: the folder, made if it is missing; files of the same names are replaced. It receives s4_meta_data.csv,
            and in s4_data/ five frames of 64x64 pixels and their masks a clip (a clip to learn from has the first
            alone), and its sound (mono, 16 kHz); and synthetic_avs.jsonl (a `Clip` a line). Of clips to test on
            videos/{id}.mp4 is the whole video.
        train, val, test: clips of each split; the share of either kind is exact where these are multiples of 3.
        workers, progress: as for `synthetic.write_clips`.

    Returns: root. Raises: ValueError for a negative count or seed, no clip at all, or no worker.
    """
    sizes = {"train": train, "val": val, "test": test}
    synthetic.check_sizes(sizes, seed=seed, workers=workers)
    splits = [split for split, size in sizes.items() for _ in range(size)]
    clips = [plan_clip(seed, index, split) for index, split in enumerate(splits)]
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    # The index is written last: where it stands, the clips that it names are complete.
    index_file = root / "s4_meta_data.csv"
    index_file.unlink(missing_ok=True)
    synthetic.write_lines(root / TRUTH, (json.dumps(asdict(clip)) for clip in clips))
    write = partial(_write_clip, root / "s4_data", seed, clips)
    synthetic.write_clips(write, len(clips), workers=workers, progress=progress)
    rows = (f"{clip.id},0,{clip.category},{clip.split}" for clip in clips)
    synthetic.write_lines(index_file, ["name,start,category,split", *rows])
    return root


def perfect_senses(root: str | Path) -> dict[str, float]:
    """The mIoU (0 to 1) on the test split that the module's docstring gives to perfect senses.

    "chance", and "audio" with it, is the best mask that is the same for all frames: the pixels that are masked most
    often in the training split, as many of them as are best there.
    """
    root = Path(root)
    lines = (root / TRUTH).read_text(encoding="utf-8").splitlines()
    solid = [clip.category in SOLID for clip in (Clip(**json.loads(line)) for line in lines) if clip.split == "test"]
    train, test = (_masks(root, split) for split in ("train", "test"))
    often = train.mean(0)
    masks = [often >= level for level in np.unique(often)]
    best = max(masks, key=lambda mask: _mean_iou(mask, train))
    constant = _mean_iou(best, test)
    return {"audio+video": 1.0, "video": sum(solid) / len(solid), "audio": constant, "chance": constant}


def _mean_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Of one mask (H, W) with masks (n, H, W)."""
    both, either = (mask & truth).sum((1, 2)), (mask | truth).sum((1, 2))
    return float((both / either).mean())


def _masks(root: Path, split: str) -> np.ndarray:
    paths = sorted((root / "s4_data" / "gt_masks" / split).glob("*/*/*.png"))
    if not paths:
        raise ValueError(f"{root}: expected masks of the split {split}, got none")
    return np.stack([np.asarray(Image.open(path)) > 0 for path in paths])


def _write_clip(folder: Path, seed: int, clips: list[Clip], index: int) -> None:
    clip = clips[index]
    place = Path(clip.split, clip.category)
    frames, masks = (folder / name / place / clip.id for name in ("visual_frames", "gt_masks"))
    sound = folder / "audio_wav" / place / f"{clip.id}.wav"
    for directory in (frames, masks, sound.parent):
        directory.mkdir(parents=True, exist_ok=True)

    scene = Scene(synthetic.generator(seed, index, "video"), clip)
    for second in range(SECONDS):
        name = f"{clip.id}_{second + 1}.png"
        picture = scene.frame(second + 0.5)
        # Half as large, as the pictures that the backbone has learned from.
        small = picture.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)).round().astype(np.uint8)
        Image.fromarray(small).save(frames / name)
        if second == 0 or clip.split != "train":
            Image.fromarray(scene.mask(second + 0.5)).save(masks / name)
    heard = synthetic.waveform(synthetic.generator(seed, index, "audio"), (clip.category,) * SECONDS)
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((32767 * np.clip(heard, -1, 1)).astype("<i2").tobytes())
    if clip.split == "test":
        times = np.arange(SECONDS * synthetic.FPS) / synthetic.FPS
        video = folder.parent / "videos" / f"{clip.id}.mp4"
        video.parent.mkdir(exist_ok=True)
        synthetic.write_video(video, map(scene.frame, times), heard)
