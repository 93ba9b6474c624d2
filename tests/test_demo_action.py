"""The generated UCF101, and the demo that learns from it."""

import dataclasses
import html
import json
from collections import Counter

import av
import numpy as np
import pytest
from rich.console import Console

from lavish_fast import demos
from lavish_fast.config import MODALITIES
from lavish_fast.demos.action import CLIPS, CONFIG, NOTES, picture
from lavish_fast.synthetic import action
from lavish_fast.synthetic.action import CLASSES
from lavish_fast.tasks import action as task

SIZES = {"train": 9, "val": 3, "test": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return action.write_dataset(tmp_path_factory.mktemp("action") / "new", **SIZES, seed=3, workers=1)


@pytest.fixture(scope="module")
def truth(root):
    clips = [action.Clip(**json.loads(line)) for line in (root / action.TRUTH).read_text().splitlines()]
    return {clip.id: clip for clip in clips}


def test_the_reader_of_ucf101_finds_nothing_missing(root, truth):
    config = task.settle(CONFIG, root)
    assert config.classes == CLASSES
    report = task.verify(root, config, decode=True, workers=0)
    assert report.ok, str(report)
    assert (report.splits, report.classes) == (SIZES, 9)
    assert set(report.silent) == {clip.id for clip in truth.values() if clip.silent}
    assert len(report.silent) in (1, 2), "one in the first nine clips, at most one in the others"


def test_a_silent_clip_has_no_sound_track(root, truth):
    for clip in truth.values():
        with av.open(str(root / "UCF-101" / clip.category / f"{clip.id}.mp4")) as file:
            assert len(file.streams.audio) == (not clip.silent)
            assert float(file.streams.video[0].duration * file.streams.video[0].time_base) == pytest.approx(2)


def test_the_bytes_depend_on_the_seed_alone(root, tmp_path):
    again = action.write_dataset(tmp_path / "again", **SIZES, seed=3, workers=1)
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert [f for f in files if (root / f).read_bytes() != (again / f).read_bytes()] == []
    assert action.plan_clip(4, 0, "train") != action.plan_clip(3, 0, "train")


def test_every_shape_comes_with_every_sound():
    clips = [action.plan_clip(1, i, "train") for i in range(81 * 9)]
    assert Counter(clip.category for clip in clips) == dict.fromkeys(CLASSES, 81)
    assert len({(clip.seen, clip.heard) for clip in clips}) == 9
    assert Counter(clip.category for clip in clips if clip.silent) == dict.fromkeys(CLASSES, 9)
    groups = np.array([clip.silent for clip in clips]).reshape(-1, 9)
    assert (groups.sum(1) == 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_one_modality_is_not_enough(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(action, "_write_clip", lambda *_: None)
    action.write_dataset(tmp_path, **CLIPS, seed=seed, workers=1)
    senses = action.perfect_senses(tmp_path)
    # Nine of the 81 clips are silent, one of each class: of those both together know the shape, hearing alone nothing.
    assert senses == pytest.approx({"audio+video": 75 / 81, "video": 27 / 81, "audio": 25 / 81, "chance": 1 / 9})


def test_the_demo_names_the_classes(tmp_path, monkeypatch):
    demo = demos.load("action")
    monkeypatch.setattr(demo, "CLIPS", {"train": 9, "val": 2, "test": 3})
    monkeypatch.setattr(demo, "TRAIN", dataclasses.replace(demo.TRAIN, batch_size=5, epochs=1))
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    demos.run("action", tmp_path / "demo", seed=1, console=console)
    text, page = console.export_text(), (tmp_path / "demo" / "report.html").read_text()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for modality in MODALITIES:
        assert f"{summary[modality]['accuracy']:.1%}" in text
    assert page.count("<img") == 1 + 3, "the curves, and a picture for each clip"
    right, wrong = page.count("<figcaption>right</figcaption>"), page.count("<figcaption>wrong: it is ")
    assert (right / 3, right + wrong) == (summary["audio+video"]["accuracy"], 3)
    assert html.escape(NOTES[0]) in page
    video = text.partition("lavish-fast classify ")[2].split()[0]
    assert (tmp_path / video).is_file()


def test_the_picture_says_whether_it_is_right(root):
    config = task.settle(CONFIG, root)
    item = task.Dataset(root, "test", config)[0]
    right = int(item["labels"])
    probabilities = item["audio"].new_full((9,), 0.05)
    for label, caption in ((right, "right"), ((right + 1) % 9, f"wrong: it is {CLASSES[right]}, not ")):
        kept = probabilities.clone()
        kept[label] = 0.6
        figure, text = picture(config, item, kept)
        assert text.startswith(caption)
        shown = [t.get_text() for axes in figure.axes for t in axes.texts]
        assert f"0.60  {CLASSES[label]}" in shown
