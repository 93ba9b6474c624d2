import json
import wave
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lavish_fast.demos.avs import CONFIG
from lavish_fast.synthetic import SAMPLE_RATE, avs
from lavish_fast.synthetic.avs import HOLLOW, SOLID
from lavish_fast.tasks.avs import Dataset, verify

SIZES = {"train": 16, "val": 2, "test": 6}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return avs.write_dataset(tmp_path_factory.mktemp("avs") / "new", **SIZES, seed=3, workers=1)


def _truth(root):
    return [avs.Clip(**json.loads(line)) for line in (root / avs.TRUTH).read_text().splitlines()]


def _pictures(root, kind, clip):
    files = sorted((root / "s4_data" / kind / clip.split / clip.category / clip.id).iterdir())
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_the_reader_of_s4_finds_nothing_missing(root):
    report = verify(root, CONFIG, decode=True, workers=1)
    assert report.ok, str(report)
    assert report.splits == SIZES
    assert report.categories == len({clip.category for clip in _truth(root)})
    item = Dataset(root, "test", CONFIG)[0]
    assert item["labels"].shape == (5, 64, 64)
    assert item["labels"].sum((1, 2)).min() > 0


def test_the_bytes_depend_on_the_seed_alone(root, tmp_path):
    again = avs.write_dataset(tmp_path / "again", **SIZES, seed=3, workers=2)
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert [f for f in files if (root / f).read_bytes() != (again / f).read_bytes()] == []
    other = avs.write_dataset(tmp_path / "other", train=1, val=0, test=0, seed=4, workers=1)
    sounds = [next(folder.rglob("clip_0000.wav")).read_bytes() for folder in (root, other)]
    assert sounds[0] != sounds[1]


def test_what_is_solid_sounds_in_two_of_three_clips(root):
    clips = [avs.plan_clip(1, i, "train") for i in range(3000)]
    for name, often, rarely in (("category", SOLID, HOLLOW), ("other", HOLLOW, SOLID)):
        counts = Counter(getattr(clip, name) for clip in clips)
        assert sum(counts[category] for category in often) == 2000
        assert counts[often[0]] == pytest.approx(1000, rel=0.1)
        assert counts[rarely[0]] == pytest.approx(500, rel=0.1)
    assert all((clip.category in SOLID) == (clip.other in HOLLOW) for clip in clips)
    assert [clip.split for clip in _truth(root)] == [split for split, size in SIZES.items() for _ in range(size)]


def test_the_mask_is_one_of_two_objects(root):
    # The background is muted: what stands out of a frame is the two objects.
    for clip in _truth(root):
        frames, masks = _pictures(root, "visual_frames", clip), _pictures(root, "gt_masks", clip)
        assert (len(frames), len(masks)) == (5, 1 if clip.split == "train" else 5)
        for frame, mask in zip(frames.astype(int), masks):
            inside, outside = frame[mask], frame[~mask]
            colour = np.median(inside, axis=0)
            assert np.abs(inside - colour).max(axis=1).mean() < 40, "one colour"
            assert 0.02 < mask.mean() < 0.2
            # The other half holds an object too, which is not masked.
            contrast = np.abs(outside - np.median(outside, axis=0)).max(axis=1)
            assert (contrast > 60).mean() > 0.02


def test_the_sound_is_of_five_seconds_and_full_of_events(root):
    for clip in _truth(root):
        with wave.open(str(root / "s4_data" / "audio_wav" / clip.split / clip.category / f"{clip.id}.wav")) as file:
            assert (file.getnchannels(), file.getframerate()) == (1, SAMPLE_RATE)
            sound = np.frombuffer(file.readframes(-1), "<i2") / 32768
        assert sound.shape == (5 * SAMPLE_RATE,)
        assert np.abs(sound.reshape(5, -1)).max(axis=1).min() > 0.05


def test_one_modality_is_not_enough(root, tmp_path):
    senses = avs.perfect_senses(root)
    assert senses["audio+video"] == 1
    assert senses["audio"] == senses["chance"]
    assert 0.03 < senses["chance"] < 0.25
    assert senses["video"] == pytest.approx(2 / 3), "of the six clips to test on"
    # Where the sounding one is says nothing: as often left as right, as above as below.
    places = []
    for number in range(200):
        mask = avs.Scene(np.random.default_rng(number), avs.Clip("", "train", "Drum", "Rain")).mask(0)
        places.append([place.mean() / 64 for place in mask.nonzero()])
    assert np.mean(places, axis=0) == pytest.approx([0.5, 0.5], abs=0.05)
    with pytest.raises(ValueError, match="expected masks of the split train, got none"):
        avs.perfect_senses(avs.write_dataset(tmp_path, train=0, val=0, test=1, workers=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"test": -1}, "test: expected at least 0, got -1"), ({"workers": 0}, "workers: expected at least 1, got 0")],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        avs.write_dataset(tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()
