"""A small data set in MUSIC-AVQA's layout: four questions about each clip, of what is heard, seen, and both.

A clip of 2 seconds shows one object of three kinds and has one sound, in half of the clips that of the object. Asked
are which sound is heard, which object is seen, whether the one is the other's, and, of a kind that is seen or heard,
how many of it sound: one, where it is both. Whoever sees perfectly but cannot hear answers the second question; half of
the first and of the third are right by guessing that the object sounds, and of the fourth 3/4, for a kind that is
asked for and not seen does not sound here. That is 69 % of all answers. Hearing alone gives the same, both together
100 %.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lavish_fast import synthetic

TRUTH = "synthetic_avqa.jsonl"
SECONDS = 2

KINDS = ("drum", "bird", "siren")  # a disc, a star and a cross
# Pairs of what is seen and what is heard: as many that agree as that do not.
_PAIRS = [(a, b) for a in KINDS for b in KINDS if a != b] + 2 * [(a, a) for a in KINDS]


@dataclass(frozen=True)
class Clip:
    """One clip's truth: the kinds of the object that is seen and of the sound, and the kind that is counted."""

    id: str
    split: str
    seen: str
    heard: str
    counted: str

    @property
    def questions(self) -> Iterator[tuple[tuple[str, str], str, tuple[str, ...], str]]:
        """Type, text, values of the text's template, and answer of each question."""
        agree = self.seen == self.heard
        yield ("Audio", "Comparative"), "Which sound is the loudest?", (), self.heard
        yield ("Visual", "Location"), "What kind of object is in the video?", (), self.seen
        yield (
            ("Audio-Visual", "Existential"),
            "Is this sound from the object in the video?",
            (),
            "yes" if agree else "no",
        )
        text = "How many sounding <Object> in the video?"
        yield ("Audio-Visual", "Counting"), text, (self.counted,), "one" if agree else "zero"


def plan_clip(seed: int, index: int, split: str) -> Clip:
    """The truth of clip number `index`, a function of the two numbers alone.

    In every twelve clips from a multiple of twelve on each kind is seen and heard four times, twice at once.
    """
    group, place = divmod(index, len(_PAIRS))
    seen, heard = _PAIRS[int(synthetic.generator(seed, group, "deck").permutation(len(_PAIRS))[place])]
    counted = (seen, heard)[int(synthetic.generator(seed, index, "plan").integers(2))]
    return Clip(f"clip_{index:04d}", split, seen, heard, counted)


def write_dataset(
    root: str | Path,
    *,
    train: int = 120,
    val: int = 24,
    test: int = 36,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set, deterministically: the same bytes for a seed, whatever the number of workers.

    Args:
        root: the folder, made if it is missing; files of the same names are replaced. It receives
            videos/{id}.mp4 (h264, 9 frames per second of 128x128 pixels, AAC, mono, 16 kHz, 2 seconds),
            avqa-train.json, avqa-val.json and avqa-test.json, and synthetic_avqa.jsonl (a `Clip` a line).
        train, val, test: clips of each split, with four questions each; balanced where these are multiples of 12.
        workers, progress: as for `synthetic.write_clips`.

    Returns: root. Raises: ValueError for a negative count or seed, no clip at all, or no worker.
    """
    sizes = {"train": train, "val": val, "test": test}
    synthetic.check_sizes(sizes, seed=seed, workers=workers)
    splits = [split for split, size in sizes.items() for _ in range(size)]
    clips = [plan_clip(seed, index, split) for index, split in enumerate(splits)]
    root = Path(root)
    (root / "videos").mkdir(parents=True, exist_ok=True)
    # The questions are written last: where they stand, the videos that they ask about are complete.
    files = {split: root / f"avqa-{split}.json" for split in sizes}
    for path in files.values():
        path.unlink(missing_ok=True)
    synthetic.write_lines(root / TRUTH, (json.dumps(asdict(clip)) for clip in clips))
    write = partial(_write_clip, root / "videos", seed, clips)
    synthetic.write_clips(write, len(clips), workers=workers, progress=progress)
    entries = _entries(clips)
    for split, path in files.items():
        rows = [next(entries) for clip in clips if clip.split == split for _ in clip.questions]
        synthetic.write_lines(path, [json.dumps(rows, indent=1)])
    return root


def perfect_senses(root: str | Path) -> dict[str, float]:
    """The accuracies (0 to 1) on the test split of perfect senses, each with the most frequent answer for what it has.

    That is the answer most frequent in the training split for the question's words and what is seen or heard; "chance"
    has the words alone.
    """
    lines = (Path(root) / TRUTH).read_text(encoding="utf-8").splitlines()
    clips = [Clip(**json.loads(line)) for line in lines]
    senses = {"audio+video": ("seen", "heard"), "video": ("seen",), "audio": ("heard",), "chance": ()}
    found = {}
    for name, streams in senses.items():
        train, test = (
            [
                ((text, values, *(getattr(clip, stream) for stream in streams)), answer)
                for clip in clips
                if clip.split == split
                for _, text, values, answer in clip.questions
            ]
            for split in ("train", "test")
        )
        found[name] = synthetic.majority_accuracy(train, test)
    return found


def _entries(clips: list[Clip]) -> Iterator[dict[str, Any]]:
    """The questions as MUSIC-AVQA's json has them, `anser` included."""
    number = 0
    for clip in clips:
        for kind, text, values, answer in clip.questions:
            yield {
                "video_id": clip.id,
                "question_id": number,
                "type": json.dumps(kind),
                "question_content": text,
                "templ_values": json.dumps(values),
                "question_deleted": 0,
                "anser": answer,
            }
            number += 1


def _write_clip(folder: Path, seed: int, clips: list[Clip], index: int) -> None:
    clip = clips[index]
    seen, heard = ((kind.capitalize(),) * SECONDS for kind in (clip.seen, clip.heard))
    frames = synthetic.frames(synthetic.generator(seed, index, "video"), seen)
    wave = synthetic.waveform(synthetic.generator(seed, index, "audio"), heard)
    synthetic.write_video(folder / f"{clip.id}.mp4", frames, wave)
