"""The generated MUSIC-AVQA, and the demo that learns from it."""

import dataclasses
import html
import json
import shlex
from collections import Counter

import pytest
from rich.console import Console

from lavish_fast import demos
from lavish_fast.config import MODALITIES
from lavish_fast.demos.avqa import CLIPS, CONFIG, MORE, picture
from lavish_fast.synthetic import avqa
from lavish_fast.synthetic.avqa import KINDS
from lavish_fast.tasks import avqa as task
from lavish_fast.tasks.avqa_questions import read_questions

SIZES = {"train": 12, "val": 1, "test": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return avqa.write_dataset(tmp_path_factory.mktemp("avqa") / "new", **SIZES, seed=3, workers=1)


def _truth(root):
    clips = [avqa.Clip(**json.loads(line)) for line in (root / avqa.TRUTH).read_text().splitlines()]
    return {clip.id: clip for clip in clips}


def test_the_reader_of_music_avqa_finds_nothing_missing(root):
    config = task.settle(CONFIG, root)
    assert set(config.classes) == {*KINDS, "yes", "no", "zero", "one"}
    report = task.verify(root, config, decode=True, workers=0)
    assert report.ok, str(report)
    assert report.splits == {split: 4 * clips for split, clips in SIZES.items()}
    item = task.Dataset(root, "train", config)[0]
    assert item["audio"].shape == (2, 64, 64)
    assert item["negative"].shape == item["positive"].shape == (2, 3, 64, 64)


def test_the_answers_are_what_is_seen_and_heard(root):
    truth = _truth(root)
    for split in SIZES:
        for q in read_questions(root / f"avqa-{split}.json"):
            clip = truth[q.video_id]
            assert clip.split == split
            expected = {
                ("Audio", "Comparative"): clip.heard,
                ("Visual", "Location"): clip.seen,
                ("Audio-Visual", "Existential"): "yes" if clip.seen == clip.heard else "no",
                ("Audio-Visual", "Counting"): "one" if clip.seen == clip.heard else "zero",
            }
            assert q.answer == expected[q.kind]
            assert (clip.counted in q.words) == (q.kind[1] == "Counting")
            assert clip.counted in (clip.seen, clip.heard)


def test_the_bytes_depend_on_the_seed_alone(root, tmp_path):
    again = avqa.write_dataset(tmp_path / "again", **SIZES, seed=3, workers=1)
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert [f for f in files if (root / f).read_bytes() != (again / f).read_bytes()] == []
    plans = [[avqa.plan_clip(seed, i, "train") for i in range(12)] for seed in (3, 4)]
    assert plans[0] != plans[1]


def test_half_of_the_sounds_are_the_objects():
    for first in range(0, 120, 12):
        clips = [avqa.plan_clip(1, i, "train") for i in range(first, first + 12)]
        pairs = Counter((clip.seen, clip.heard) for clip in clips)
        assert pairs == {(a, b): 1 + (a == b) for a in KINDS for b in KINDS}


@pytest.mark.parametrize("seed", range(3))
def test_one_modality_is_not_enough(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(avqa, "_write_clip", lambda *_: None)
    avqa.write_dataset(tmp_path, **CLIPS, seed=seed, workers=1)
    senses = avqa.perfect_senses(tmp_path)
    assert senses["audio+video"] == 1
    for stream in ("audio", "video"):
        assert senses[stream] == pytest.approx((1 + 0.5 + 0.5 + 0.75) / 4, abs=0.04)
    assert senses["chance"] == pytest.approx((1 / 3 + 1 / 3 + 0.5 + 0.5) / 4, abs=0.04)


def test_the_demo_answers_by_type(tmp_path, monkeypatch):
    demo = demos.load("avqa")
    monkeypatch.setattr(demo, "CLIPS", {"train": 12, "val": 1, "test": 3})
    monkeypatch.setattr(demo, "TRAIN", dataclasses.replace(demo.TRAIN, batch_size=24, epochs=1))
    monkeypatch.setattr(demos, "PICTURES", 3)
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    demos.run("avqa", tmp_path / "demo", seed=1, console=console)
    text, page = console.export_text(), (tmp_path / "demo" / "report.html").read_text()
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for modality in MODALITIES:
        numbers = summary[modality]
        parts = numbers["audio"] + numbers["visual"] + 2 * numbers["audio-visual"]
        assert numbers["accuracy"] == pytest.approx(parts / 4), "one question of the sound, one of the picture"
        for name in ("accuracy", *MORE):
            assert f"{numbers[name]:.1%}" in text
            assert f"{numbers[name]:.1%}" in page
    assert page.count("<img") == 1 + 3, "the curves, and a picture for each of the first questions"
    words = shlex.split(text.partition("lavish-fast answer ")[2])
    assert (tmp_path / words[0]).is_file()
    assert f"An unseen clip: {words[1]}" in text
    config = task.settle(demo.CONFIG, tmp_path / "demo" / "data")
    task.encode_question(words[1], config)  # the model knows the words that are suggested
    assert html.escape(demo.NOTES[0]) in page


def test_the_picture_has_question_and_answers(root):
    config = task.settle(CONFIG, root)
    items = task.Dataset(root, "test", config)
    item, asked = items[3], items.rows[3]
    kind, truth = asked.words[3], asked.answer
    other = {"one": "zero", "zero": "one"}[truth]
    for answer, caption in ((truth, f"right: {truth}"), (other, f"wrong: the answer is {truth}, not {other}")):
        kept = item["audio"].new_full((len(config.classes),), 0.05)
        kept[config.classes.index(answer)] = 0.7
        figure, text = picture(config, item, kept)
        assert text == caption
        shown = [t.get_text() for t in figure.texts] + [t.get_text() for axes in figure.axes for t in axes.texts]
        assert f"How many sounding {kind} in the video?" in shown
        assert f"0.70  {answer}" in shown
