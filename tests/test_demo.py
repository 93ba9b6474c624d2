"""The demos on a handful of clips, and the backbone that they share. CI runs a real one and checks its numbers."""

import dataclasses
import html
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lavish_fast import Model, checkpoint, demos, pretrain, synthetic, tasks, training
from lavish_fast.config import MODALITIES, TASKS
from lavish_fast.demos import ave, avs

SHARES = {"perfect_senses", "chance"}


@pytest.fixture(params=["ave", "avs"])
def small(request, monkeypatch):
    """A task whose demo is a handful of clips."""
    demo = demos.load(request.param)
    monkeypatch.setattr(demo, "CLIPS", {"train": 4, "val": 2, "test": 3})
    monkeypatch.setattr(demo, "TRAIN", dataclasses.replace(demo.TRAIN, batch_size=4, epochs=1))
    return request.param


def test_the_demo_leaves_what_it_promises(small, tmp_path):
    out, demo = tmp_path / "my demo [v2]", demos.load(small)
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    demos.run(small, out, seed=1, console=console)
    text = console.export_text()
    summary, senses = json.loads((out / "summary.json").read_text()), demo.perfect_senses(out / "data")
    for modality in MODALITIES:
        model = Model.from_pretrained(out / "runs" / modality / "best")
        assert (model.config.task, model.config.modality) == (small, modality)
        numbers = summary[modality]
        assert numbers["trainable_parameters"] == sum(p.numel() for _, p in model.trainable_parameters())
        for shown in (f"{numbers['trainable_parameters']:,}", *(f"{numbers[k]:.1%}" for k in SHARES | {demo.SCORE})):
            assert shown in text
        assert (numbers["perfect_senses"], numbers["chance"]) == (senses[modality], senses["chance"])
    # The last lines can be pasted, whatever the folder's name.
    look, command = text.splitlines()[-2:]
    assert look == f"Look at {out / 'report.html'}, or try"
    _, _, video, option, best = shlex.split(command)
    assert Path(video).is_file()
    assert (option, best) == ("--checkpoint", str(out / "runs" / "audio+video" / "best"))
    page = (out / "report.html").read_text()
    assert page.count("<img") == 1 + 3, "the curves, and a picture for each clip"
    assert re.search(f"<figcaption>loss and validation (segment )?{demo.SCORE} by epoch</figcaption>", page)
    assert demo.TITLE in page
    assert all(html.escape(note) in page for note in demo.NOTES)
    config = tasks.load(small).settle(demo.CONFIG, out / "data")
    assert tasks.load(small).verify(out / "data", config, decode=True, workers=1).ok


def test_the_demo_does_the_same_for_a_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(avs, "CLIPS", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(avs, "TRAIN", dataclasses.replace(avs.TRAIN, batch_size=2, epochs=1))
    runs = []
    for _ in range(2):  # the second one over the first one's files
        demos.run("avs", tmp_path, seed=1, console=Console(quiet=True))
        runs.append(load_file(tmp_path / "runs" / "audio+video" / "last" / "state.safetensors"))
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


def test_the_demo_does_not_touch_other_folders(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("dear", synthetic.ave.TRUTH):  # something else's, or another task's demo's
        (tmp_path / "data" / name).write_text("dear")
        with pytest.raises(ValueError, match="expected no such folder, or an earlier demo's, got one with other files"):
            demos.run("avs", tmp_path, seed=0, console=Console(quiet=True))
        assert [file.read_text() for file in (tmp_path / "data").iterdir()] == ["dear"]
        (tmp_path / "data" / name).unlink()


@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_demo_starts_again(monkeypatch, tmp_path, task):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    def run():
        with pytest.raises(KeyboardInterrupt):
            demos.run(task, tmp_path, seed=1, console=Console(quiet=True))

    monkeypatch.setattr(synthetic, "write_clips", interrupt)
    run()
    report = tasks.load(task).verify(tmp_path / "data", demos.load(task).CONFIG)
    assert (report.ok, report.splits) == (False, {}), "it is no data set yet"
    monkeypatch.setattr(synthetic, "write_clips", lambda *args, **options: None)
    monkeypatch.setattr(training, "fit", interrupt)
    run()  # as far as to the training


def test_the_shipped_backbone_knows_shapes():
    tensors = checkpoint.backbone_tensors(ave.CONFIG.backbone_weights)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) < 3e6
    model = Model(ave.CONFIG).load_backbone().eval()
    images, shapes, _ = pretrain.batch(seed=7, step=0, count=384, size=64)
    with torch.no_grad():
        features = model.backbone(images)
    # Each shape's mean feature on one half of the pictures names the shapes of the other half.
    some, others = shapes < 8, slice(192, None)
    means = torch.stack([features[:192][some[:192] & (shapes[:192] == k)].mean(0) for k in range(8)])
    named = torch.cdist(features[others][some[others]], means).argmin(1)
    assert (named == shapes[others][some[others]]).float().mean() > 0.6, "chance is 1 in 8"


def test_pretraining_pictures():
    rng = np.random.default_rng(0)
    pictures = [pretrain.texture(rng, kind, 32) for kind in range(pretrain.TEXTURES)]
    assert {p.shape for p in pictures} == {(32, 32, 3)}
    assert all(p.std() > 1 for p in pictures)
    images, shapes, textures = pretrain.batch(seed=3, step=2, count=40, size=64)
    assert images.shape == (40, 3, 64, 64)
    assert set(shapes.tolist()) <= set(range(pretrain.SHAPES))
    has_shape, has_texture = shapes < len(synthetic.SHAPES), textures < pretrain.TEXTURES
    assert not (has_shape & has_texture).any()
    assert torch.equal(images, pretrain.batch(seed=3, step=2, count=40, size=64)[0])


def test_pretraining_takes_steps():
    backbone, _ = pretrain.pretrain(ave.CONFIG, steps=2, batch_size=4)
    # In the first step norms of zero hide the blocks' weights; in the second every parameter has a gradient.
    still = {name for name, weight in backbone.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert not still, f"parameters without a gradient: {sorted(still)}"
