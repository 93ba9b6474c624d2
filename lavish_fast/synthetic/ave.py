"""A small data set in AVE's file format: real mp4 files whose events need both the eye and the ear.

Eight categories, each a shape together with a sound. As in AVE (Tian et al., ECCV 2018) a second is an event only
while its source is both seen and heard. A clip of 10 seconds has one event [start, end) of its category; around it
stand blocks of 1-3 seconds that are background but look or sound like events:

    share of the background   seen                      heard
    0.15                      the category              silence
    0.15                      nothing                   the category
    0.05                      nothing                   silence
    0.65                      the category or another   the other one of the two

Of every eight events seven last 2, 3, ... 8 seconds and one the whole clip: 9/16 of all seconds are events, 7/16
(43.75 %) background. Whoever sees perfectly but cannot hear is sure only that a second without an object is
background, and does best to call every object an event (which it is in 62 % of the seconds that show one): that is
right in 9/16 + 0.2 * 7/16 = 65 % of all seconds. Hearing alone gives the same, both together 100 %.
`perfect_senses` counts these on the files at hand.

The three figures are for whoever meets one second at a time, as LAVISH does on AVE. Nothing in a second tells of its
neighbours: every sound falls silent at the end of each second, and an object moves the same in and out of events.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from lavish_fast import synthetic
from lavish_fast.synthetic import CATEGORIES

BACKGROUND = "background"
SPLITS = ("train", "val", "test")
TRUTH = "synthetic.jsonl"
SECONDS = 10

_LENGTHS = (2, 3, 4, 5, 6, 7, 8, SECONDS)  # as many as CATEGORIES


@dataclass(frozen=True)
class Clip:
    """One clip's truth. seen, heard: a category or None for each second; the event is [start, end) in seconds."""

    id: str
    category: str
    start: int
    end: int
    seen: tuple[str | None, ...]
    heard: tuple[str | None, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each second, as AVE's annotation gives it."""
        return tuple(self.category if self.start <= k < self.end else BACKGROUND for k in range(SECONDS))

    @property
    def row(self) -> str:
        """The row of Annotations.txt."""
        return f"{self.category}&{self.id}&good&{self.start}&{self.end}"


def plan_clip(seed: int, index: int) -> Clip:
    """The truth of clip number `index` (see the module's docstring), a function of the two numbers alone.

    Every eight clips from a multiple of eight on have the eight categories and the eight lengths once each.
    """
    count = len(CATEGORIES)
    group, place = divmod(index, count)
    deck = synthetic.generator(seed, group, "deck")
    category = int(deck.permutation(count)[place])
    length = int(deck.permutation(_LENGTHS)[place])
    rng = synthetic.generator(seed, index, "plan")
    start = int(rng.integers(0, SECONDS - length + 1))
    end = start + length
    seen: list[int | None] = [category] * SECONDS
    heard: list[int | None] = [category] * SECONDS
    for first, last in ((0, start), (end, SECONDS)):
        while first < last:
            stop = min(last, first + int(rng.integers(1, 4)))
            other = (category + int(rng.integers(1, count))) % count
            states = ((category, None), (None, category), (None, None), (category, other), (other, category))
            state = states[rng.choice(5, p=(0.15, 0.15, 0.05, 0.325, 0.325))]
            for k in range(first, stop):
                seen[k], heard[k] = state
            first = stop

    names = (*CATEGORIES, None)
    tracks = (tuple(names[-1 if c is None else c] for c in track) for track in (seen, heard))
    return Clip(f"clip_{index:04d}", CATEGORIES[category], start, end, *tracks)


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
        root: the folder, made if it is missing; files of the same names are replaced. It receives
            videos/{id}.mp4 (h264, 9 frames per second of 128x128 pixels, AAC, mono, 16 kHz, 10 seconds),
            {train,val,test}Set.txt and Annotations.txt (rows `Category&VideoID&good&start&end`, end exclusive),
            and synthetic.jsonl (a `Clip` a line: what is seen and what is heard in each second).
        train, val, test: clips of each split; categories are balanced where these are multiples of 8.
        workers, progress: as for `synthetic.write_clips`.

    Returns: root. Raises: ValueError for a negative count or seed, no clip at all, or no worker.
    """
    sizes = {"train": train, "val": val, "test": test}
    synthetic.check_sizes(sizes, seed=seed, workers=workers)
    total = sum(sizes.values())
    root = Path(root)
    videos = root / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    # The index is written last: where it stands, the videos that it names are complete.
    index_file = root / "Annotations.txt"
    index_file.unlink(missing_ok=True)
    clips = [plan_clip(seed, index) for index in range(total)]
    synthetic.write_lines(root / TRUTH, (json.dumps(asdict(clip)) for clip in clips))
    synthetic.write_clips(partial(_write_clip, videos, seed), total, workers=workers, progress=progress)
    rest = iter(clips)
    for split, size in sizes.items():
        synthetic.write_lines(_split_file(root, split), (next(rest).row for _ in range(size)))
    synthetic.write_lines(index_file, (clip.row for clip in clips))
    return root


def read_clips(root: str | Path, split: str) -> list[Clip]:
    """The truth of a split's clips, in the split's order. Raises: ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    root = Path(root)
    clips = {}
    for line in (root / TRUTH).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        clips[values["id"]] = Clip(**values | {name: tuple(values[name]) for name in ("seen", "heard")})
    rows = _split_file(root, split).read_text(encoding="utf-8").splitlines()
    return [clips[row.split("&")[1]] for row in rows]


def perfect_senses(root: str | Path, split: str = "test") -> dict[str, float]:
    """The best segment accuracies (0 to 1) that a model of one second at a time can reach on a split.

    "video" and "audio" know each second's seen or heard category without error and answer with the label that goes
    with it most often in the training split; "audio+video" knows both, and so the label. "chance" knows nothing: it
    always gives the training split's most frequent label.
    """
    train, clips = read_clips(root, "train"), read_clips(root, split)
    if not train or not clips:
        raise ValueError(f"train, {split}: expected at least one clip each, got {len(train)} and {len(clips)}")
    observe: dict[str, Callable[[Clip, int], str | None]] = {
        "audio+video": lambda clip, k: clip.seen[k] if clip.seen[k] == clip.heard[k] else None,
        "video": lambda clip, k: clip.seen[k],
        "audio": lambda clip, k: clip.heard[k],
        "chance": lambda clip, k: None,
    }
    return {name: _accuracy_by_majority(train, clips, observation) for name, observation in observe.items()}


def _accuracy_by_majority(train: list[Clip], clips: list[Clip], observe: Callable[[Clip, int], str | None]) -> float:
    counts: dict[str | None, Counter[str]] = {}
    for clip in train:
        for k, label in enumerate(clip.labels):
            counts.setdefault(observe(clip, k), Counter())[label] += 1
    answers = {observed: labels.most_common(1)[0][0] for observed, labels in counts.items()}
    hits = (answers.get(observe(clip, k), BACKGROUND) == label for clip in clips for k, label in enumerate(clip.labels))
    return sum(hits) / (len(clips) * SECONDS)


def _split_file(root: Path, split: str) -> Path:
    return root / f"{split}Set.txt"


def _write_clip(folder: Path, seed: int, index: int) -> None:
    clip = plan_clip(seed, index)
    frames = synthetic.frames(synthetic.generator(seed, index, "video"), clip.seen)
    wave = synthetic.waveform(synthetic.generator(seed, index, "audio"), clip.heard)
    synthetic.write_video(folder / f"{clip.id}.mp4", frames, wave)
