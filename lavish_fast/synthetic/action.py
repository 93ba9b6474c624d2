"""A small data set in UCF101's layout: a class is a shape together with a sound, every shape with every sound.

Three shapes and three sounds make nine classes. A clip of 2 seconds shows one shape and has one sound. Whoever sees
perfectly but cannot hear, or the other way round, is left with three classes and right in a third of the clips; both
together know the class. One clip in nine has no sound track, as half of UCF101's clips have none: there nobody knows
the sound, which leaves both together right in 1 - 2/3 * 1/9 = 92.6 % of all clips.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from lavish_fast import synthetic
from lavish_fast.synthetic import CATEGORIES, SHAPES

TRUTH = "synthetic_action.jsonl"
SECONDS = 2

_KINDS = ("Drum", "Bird", "Siren")  # disc, star and cross are seen, these are heard


def _class_name(seen: str, heard: str) -> str:
    return SHAPES[CATEGORIES.index(seen)].capitalize() + heard


CLASSES = tuple(_class_name(seen, heard) for seen in _KINDS for heard in _KINDS)


@dataclass(frozen=True)
class Clip:
    """One clip's truth: the categories whose shape and whose sound make its class, and whether the sound is missing."""

    id: str
    split: str
    seen: str
    heard: str
    silent: bool

    @property
    def category(self) -> str:
        """Its class."""
        return _class_name(self.seen, self.heard)


def plan_clip(seed: int, index: int, split: str) -> Clip:
    """The truth of clip number `index`, a function of the two numbers alone.

    In every nine clips from a multiple of nine on, a group in UCF101's sense, each class comes once and one clip is
    silent; of nine groups one after another each has a silent clip of another class.
    """
    count = len(CLASSES)
    group, place = divmod(index, count)
    label = int(synthetic.generator(seed, group, "deck").permutation(count)[place])
    seen, heard = (_KINDS[k] for k in divmod(label, len(_KINDS)))
    silent = label == int(synthetic.generator(seed, 0, "plan").permutation(count)[group % count])
    return Clip(f"v_{CLASSES[label]}_g{group + 1:02}_c01", split, seen, heard, silent)


def write_dataset(
    root: str | Path,
    *,
    train: int = 126,
    val: int = 36,
    test: int = 36,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set, deterministically: the same bytes for a seed, whatever the number of workers.

    Args:
        root: the folder, made if it is missing; files of the same names are replaced. It receives classInd.txt,
            trainlist01.txt, vallist01.txt and testlist01.txt, UCF-101/CLASS/NAME.mp4 (h264, 9 frames per second of
            128x128 pixels, 2 seconds; AAC, mono, 16 kHz, or no sound), and synthetic_action.jsonl (a `Clip` a line).
        train, val, test: clips of each split; classes are balanced where these are multiples of 9.
        workers, progress: as for `synthetic.write_clips`.

    Returns: root. Raises: ValueError for a negative count or seed, no clip at all, or no worker.
    """
    sizes = {"train": train, "val": val, "test": test}
    synthetic.check_sizes(sizes, seed=seed, workers=workers)
    splits = [split for split, size in sizes.items() for _ in range(size)]
    clips = [plan_clip(seed, index, split) for index, split in enumerate(splits)]
    root = Path(root)
    for name in CLASSES:
        (root / "UCF-101" / name).mkdir(parents=True, exist_ok=True)
    # The index is written last: where it stands, the clips that it names are complete.
    index_file = root / "classInd.txt"
    index_file.unlink(missing_ok=True)
    synthetic.write_lines(root / TRUTH, (json.dumps(asdict(clip)) for clip in clips))
    synthetic.write_clips(partial(_write_clip, root, seed, clips), len(clips), workers=workers, progress=progress)
    for split in sizes:
        rows = (clip for clip in clips if clip.split == split)
        synthetic.write_lines(root / f"{split}list01.txt", (_row(clip) for clip in rows))
    synthetic.write_lines(index_file, (f"{number} {name}" for number, name in enumerate(CLASSES, start=1)))
    return root


def perfect_senses(root: str | Path) -> dict[str, float]:
    """The accuracies (0 to 1) on the test split of perfect senses, each with the most frequent class for what it has.

    That is the class most frequent in the training split; "chance" has nothing.
    """
    lines = (Path(root) / TRUTH).read_text(encoding="utf-8").splitlines()
    clips = [Clip(**json.loads(line)) for line in lines]
    observe: dict[str, Callable[[Clip], tuple[str | None, ...]]] = {
        "audio+video": lambda clip: (clip.seen, _sound(clip)),
        "video": lambda clip: (clip.seen,),
        "audio": lambda clip: (_sound(clip),),
        "chance": lambda clip: (),
    }
    found = {}
    for name, see in observe.items():
        train, test = ([(see(c), c.category) for c in clips if c.split == split] for split in ("train", "test"))
        found[name] = synthetic.majority_accuracy(train, test)
    return found


def _sound(clip: Clip) -> str | None:
    return None if clip.silent else clip.heard


def _row(clip: Clip) -> str:
    row = f"{clip.category}/{clip.id}.mp4"
    return row if clip.split == "test" else f"{row} {CLASSES.index(clip.category) + 1}"


def _write_clip(root: Path, seed: int, clips: list[Clip], index: int) -> None:
    clip = clips[index]
    frames = synthetic.frames(synthetic.generator(seed, index, "video"), (clip.seen,) * SECONDS)
    wave = None
    if not clip.silent:
        wave = synthetic.waveform(synthetic.generator(seed, index, "audio"), (clip.heard,) * SECONDS)
    synthetic.write_video(root / "UCF-101" / clip.category / f"{clip.id}.mp4", frames, wave)
