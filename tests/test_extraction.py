"""Extracted frames and sound against the videos that they are of."""

import os
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavish_fast import extraction, media
from lavish_fast.config import AVQAConfig
from lavish_fast.tasks import ave, avqa_data, avs_data
from parity import tiny_config
from test_avs import make_config as avs_config
from test_media import COLOURS, encode, film, tone


def noisy(hertz, seconds, rate):
    """A tone on noise: without it the logarithm would show the sixteenth bit of a sample."""
    return tone(hertz, seconds, rate) + np.random.default_rng(0).normal(0, 0.02, seconds * rate).astype(np.float32)


def moving(seconds, rate=10, size=(64, 48)):
    """Pictures with a smooth pattern, each unlike the others."""
    y, x = np.mgrid[: size[1], : size[0]] / 8
    return [
        (round(1000 * i / rate), np.stack([128 + 100 * np.sin(x + i / 3), 128 + 100 * np.cos(y - i / 5), 0 * x], -1))
        for i in range(round(seconds * rate))
    ]


def run(plan):
    return [plan.load(video, **plan.options) for video in plan.videos]


@pytest.mark.parametrize(("task", "frames"), [("ave", 13), ("avqa", 5)])  # ffmpeg -r 3 and -r 1 of four seconds
def test_extracted_clips_are_those_of_the_videos(tmp_path, task, frames):
    (tmp_path / "videos").mkdir()
    sound = np.tile(noisy(700, 4, 44100), (2, 1))
    video = encode(tmp_path / "videos" / "some.mp4", moving(4), sound, sound_rate=44100)
    config = tiny_config(frames=4) if task == "ave" else tiny_config(task="avqa", frames=4, head=AVQAConfig())
    options = ave._media_options(config) if task == "ave" else avqa_data.media_options(config)
    expected = ave._load_media(Path(video), **options)
    assert ave._find_media(tmp_path) == {"some": Path(video)}

    plan = extraction.plan(task, tmp_path, config)
    assert (plan.videos, plan.done, plan.missing) == ((Path(video),), 0, ())
    assert run(plan) == [()]
    # What is extracted is read from now on.
    path = ave._find_media(tmp_path)["some"]
    assert path == tmp_path / "frames" / "some"
    assert abs(len(list(path.iterdir())) - frames) <= 1
    clip = ave._load_media(path, **options)
    assert clip.duration == pytest.approx(expected.duration, abs=0.1)
    pictures = [media.denormalise(x.video).int() for x in (clip, expected)]
    assert (pictures[0] - pictures[1]).abs().float().mean() < 3
    assert (pictures[1].roll(1, 0) - pictures[1]).abs().float().mean() > 30
    assert (clip.audio - expected.audio).abs().max() < 0.02

    plan = extraction.plan(task, tmp_path, config)
    assert (plan.videos, plan.done) == ((), 1)


def test_what_a_kill_leaves_is_done_again(tmp_path, monkeypatch):
    video = encode(tmp_path / "some.mp4", film(1), tone(700, 1, 16000))
    config = tiny_config(frames=1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(extraction.plan("ave", tmp_path, config))
    assert sorted(os.listdir(tmp_path / "frames")) == []
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "write_wav", killed)
        with pytest.raises(KeyboardInterrupt):
            run(extraction.plan("ave", tmp_path, config))
    before = sorted(os.listdir(tmp_path / "frames" / "some"))
    assert before
    assert ave._find_media(tmp_path) == {"some": Path(video)}
    (tmp_path / "frames" / ".some.part").mkdir()
    (tmp_path / "frames" / ".some.part" / "000009.jpg").write_bytes(b"half a pic")
    run(extraction.plan("ave", tmp_path, config))
    assert os.listdir(tmp_path / "frames") == ["some"]
    assert sorted(os.listdir(tmp_path / "frames" / "some")) == before
    assert extraction.plan("ave", tmp_path, config).done == 1


def test_what_an_interrupted_download_leaves_is_replaced(tmp_path, monkeypatch):
    video = encode(tmp_path / "some.mp4", film(2), tone(700, 2, 16000))
    config = tiny_config(frames=2)
    frames, wav = tmp_path / "frames" / "some", tmp_path / "audio" / "some.wav"
    frames.mkdir(parents=True)
    # Some pictures, and no sound.
    (frames / "000009.jpg").write_bytes(b"half a pic")

    remove = shutil.rmtree

    def killed(path, *_, **options):
        if not options:  # what is left of an earlier run may be removed
            raise KeyboardInterrupt
        remove(path, **options)

    for module, name in ((shutil, "rmtree"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                run(extraction.plan("ave", tmp_path, config))
        assert extraction.plan("ave", tmp_path, config).videos == (Path(video),)
    run(extraction.plan("ave", tmp_path, config))
    whole = sorted(os.listdir(frames))
    assert whole[:3] == ["000001.jpg", "000002.jpg", "000003.jpg"]
    assert "000009.jpg" not in whole
    assert os.listdir(tmp_path / "frames") == ["some"]
    assert wav.is_file()
    assert extraction.plan("ave", tmp_path, config).done == 1

    # No pictures, and the data set's own sound.
    for path in frames.iterdir():
        path.unlink()
    (frames / "list.txt").write_text("no picture")
    wav.write_bytes(b"its own")
    for task in ("ave", "avqa"):
        assert extraction.plan(task, tmp_path, config).videos == (Path(video),)
    run(extraction.plan("ave", tmp_path, config))
    assert sorted(os.listdir(frames)) == whole
    assert wav.read_bytes() == b"its own"
    assert extraction.plan("ave", tmp_path, config).done == 1


def test_of_s4_what_is_whole_is_kept_and_what_is_not_is_replaced(tmp_path):
    (tmp_path / "s4_meta_data.csv").write_text("name,start,category,split\ndog,0,dog,val")
    video = tmp_path / "raw_videos" / "val" / "dog" / "dog.mp4"
    video.parent.mkdir(parents=True)
    encode(video, film(3), noisy(500, 3, 16000))
    frames, wav = avs_data.frames_and_wav(tmp_path / "s4_data", Path("val/dog/dog"))
    config = avs_config()  # three frames
    own = {f"dog_{i}.png": b"its own" for i in (1, 2, 3)}

    def write(pictures):
        frames.mkdir(parents=True, exist_ok=True)
        for path in frames.iterdir():
            path.unlink()
        for name, content in pictures.items():
            (frames / name).write_bytes(content)

    def plan():
        return extraction.plan("avs", tmp_path, config)

    wav.parent.mkdir(parents=True)
    wav.write_bytes(b"its own")
    for pictures in ({}, {"dog_1.png": b"its own"}, own | {"dog_1.jpg": b"again"}):
        write(pictures)
        assert (plan().videos, plan().done) == ((video,), 0)
        run(plan())
        assert sorted(os.listdir(frames)) == list(own)
        assert all(Image.open(frames / name).size == (32, 32) for name in own)
        assert wav.read_bytes() == b"its own"
        assert (plan().videos, plan().done) == ((), 1)
    write(own)
    wav.unlink()
    assert plan().videos == (video,)
    run(plan())
    assert {path.name: path.read_bytes() for path in frames.iterdir()} == own
    assert wav.read_bytes().startswith(b"RIFF")
    (frames / "dog_3.png").unlink()
    video.unlink()
    assert plan().missing == ("dog",)


def test_a_silent_video_stays_silent_and_a_broken_one_leaves_nothing(tmp_path):
    encode(tmp_path / "quiet.mp4", film(2))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    config = tiny_config(frames=2)
    plan = extraction.plan("ave", tmp_path, config)
    results = dict(media.load_clips(plan.videos, workers=0, load=plan.load, **plan.options))
    assert isinstance(results.pop(tmp_path / "broken.mp4"), media.MediaError)
    assert list(results.values()) == [(f"{tmp_path}/quiet.mp4: no audio stream, silence used",)]
    assert os.listdir(tmp_path / "frames") == ["quiet"]
    assert os.listdir(tmp_path / "audio") == ["quiet.wav"]
    clip = ave._load_media(tmp_path / "frames" / "quiet", **ave._media_options(config))
    assert clip.silent
    assert [plan.videos, plan.done] == [(tmp_path / "broken.mp4", tmp_path / "quiet.mp4"), 0]


@pytest.mark.parametrize("raw", ["raw_videos", "s4_data/raw_videos"])
def test_s4_is_extracted_from_its_raw_videos(tmp_path, raw):
    rows = ["dog.1,0,dog,train", "cat,3,cat,test", "gone,0,cat,val"]
    (tmp_path / "s4_meta_data.csv").write_text("\n".join(["name,start,category,split", *rows]))
    folder = tmp_path / raw
    for name, seconds in (("train/dog/dog.1", 3), ("test/cat/cat", 2)):
        (folder / name).parent.mkdir(parents=True)
        encode(folder / f"{name}.mp4", film(seconds), noisy(500, seconds, 16000))
    config = avs_config()  # three frames of 32 x 32
    plan = extraction.plan("avs", tmp_path, config)
    assert [video.relative_to(folder).as_posix() for video in plan.videos] == [
        "train/dog/dog.1.mp4",
        "test/cat/cat.mp4",
    ]
    assert plan.missing == ("gone",)
    run(plan)
    assert extraction.plan("avs", tmp_path, config).done == 2

    colours = {}
    for name in ("train/dog/dog.1", "test/cat/cat"):
        stem = name.rpartition("/")[2]
        data = tmp_path / "s4_data"
        paths = [data / "visual_frames" / name / f"{stem}_{i}.png" for i in (1, 2, 3)]
        assert sorted((data / "visual_frames" / name).iterdir()) == paths
        pictures = [np.asarray(Image.open(path)) for path in paths]
        assert {picture.shape for picture in pictures} == {(32, 32, 3)}
        colours[stem] = [np.abs(COLOURS - picture[16, 16]).max(1).argmin() for picture in pictures]
        assert (data / "audio_wav" / f"{name}.wav").is_file()
    # Each second's end; a video that ends early shows its last frame.
    assert colours == {"dog.1": [0, 1, 2], "cat": [0, 1, 1]}

    mask = tmp_path / "s4_data" / "gt_masks" / "train" / "dog" / "dog.1" / "dog.1_1.png"
    mask.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(mask)
    item = avs_data.Dataset(tmp_path, "train", config)[0]
    assert item["video"].shape == (3, 3, 32, 32)
    clip = media.load_clip(folder / "train/dog/dog.1.mp4", frames=3, img_size=32, spectrogram=config.spectrogram)
    assert (item["audio"] - clip.audio).abs().max() < 0.02


def test_other_data_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="action: expected a data set that is extracted, ave, avs or avqa"):
        extraction.plan("action", tmp_path, tiny_config())
    with pytest.raises(FileNotFoundError, match=r"expected s4_meta_data\.csv"):
        extraction.plan("avs", tmp_path, avs_config())


def test_a_wav_file_holds_the_samples_to_its_last_bit(tmp_path):
    waveform = torch.tensor([-1.0, -0.5, 0.0, 0.25, 32767 / 32768, 1.0])
    extraction.write_wav(tmp_path / "x.wav", waveform)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        samples = np.frombuffer(file.readframes(9), "<i2")
    assert samples.tolist() == [-32768, -16384, 0, 8192, 32767, 32767]
