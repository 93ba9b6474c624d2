"""The demo on a handful of clips, and the backbone that it ships. CI runs the real one and checks its numbers."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from lavish_fast import Model, checkpoint, demos, pretrain, synthetic
from lavish_fast.config import TrainConfig
from lavish_fast.demos import ave


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ave, "CLIPS", {"train": 8, "val": 8, "test": 8})
    monkeypatch.setattr(ave, "TRAIN", TrainConfig(batch_size=8, epochs=1, lr=1e-3, head_lr=1e-3, workers=0))


def test_the_demo_leaves_what_it_promises(small, tmp_path):
    out = tmp_path / "demo"
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    demos.run("ave", out, seed=1, console=console)
    text = console.export_text()
    summary = json.loads((out / "summary.json").read_text())
    for modality in ("audio+video", "video", "audio"):
        model = Model.from_pretrained(out / "runs" / modality / "best")
        assert model.config.modality == modality
        parameters = sum(p.numel() for _, p in model.trainable_parameters())
        assert summary[modality]["trainable_parameters"] == parameters
        assert f"{parameters:,}" in text
        assert f"{summary[modality]['accuracy']:.1%}" in text
    assert summary["audio+video"]["perfect_senses"] == 1
    page = (out / "report.html").read_text()
    assert page.count("<img") == 1 + 8, "the curves, and a picture for each clip"
    assert len(list((out / "data" / "videos").glob("*.mp4"))) == 24

    first = {modality: summary[modality]["accuracy"] for modality in ("audio+video", "video", "audio")}
    demos.run("ave", out, seed=1, console=Console(quiet=True))
    again = json.loads((out / "summary.json").read_text())
    assert first == {modality: again[modality]["accuracy"] for modality in first}, "the same for a seed"


def test_the_demo_does_not_touch_other_folders(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").write_text("dear")
    with pytest.raises(ValueError, match="expected no such folder, or an earlier demo's, got one with other files"):
        demos.run("ave", tmp_path, seed=0, console=Console(quiet=True))
    assert (tmp_path / "runs" / "mine").read_text() == "dear"


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
    backbone, accuracy = pretrain.pretrain(ave.CONFIG, steps=2, batch_size=4)
    assert 0 <= accuracy <= 1
    # In the first step norms of zero hide the blocks' weights; in the second every parameter has a gradient.
    still = {name for name, weight in backbone.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert not still, f"parameters without a gradient: {sorted(still)}"
