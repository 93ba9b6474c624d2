"""`lavish-fast` segment, answer, classify, prepare --extract and sweep, through `main`."""

import dataclasses
import json
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lavish_fast import Config, Model, checkpoint, media, training
from lavish_fast.commands import segment, sweep
from lavish_fast.config import AVQAConfig
from lavish_fast.tasks import action, avqa_data, avs
from parity import randomise, tiny_config
from test_action import make_config as action_config
from test_avs import make_config as avs_config
from test_avs import write_s4
from test_cli import CONFIG, assert_one_line, dataset, run, write_dataset, write_video  # noqa: F401
from test_media import encode, film, tone

WORDS = ("<pad>", "How", "many", "violin", "guitar", "is", "playing")
ANSWERS = ("yes", "no", "[two]", "three", "four", "five")
CONFIGS = {
    "avs": avs_config(),
    "avqa": tiny_config(task="avqa", classes=ANSWERS, head=AVQAConfig(words=WORDS, length=6, width=16)),
    "action": action_config(),
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    load_clips = media.load_clips
    monkeypatch.setattr(media, "load_clips", lambda paths, **options: load_clips(paths, **options | {"workers": 0}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By task, a random model and the options that name its files."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for task, config in CONFIGS.items():
        torch.manual_seed(1)
        model = randomise(Model(config)).eval()
        model.save_pretrained(folder / task)
        weights = folder / f"{task}.safetensors"
        checkpoint.write_tensors(weights, model.backbone.state_dict(), {})
        found[task] = (model, ["--checkpoint", folder / task, "--backbone", weights])
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven seconds, and one without sound, of an odd size."""
    folder = tmp_path_factory.mktemp("videos")
    encode(folder / "long.mp4", film(7), tone(600, 7, 16000), size=(96, 64))
    encode(folder / "short.mkv", film(1), size=(63, 47), codec="libx264", pix_fmt="yuv444p")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# segment


def test_segment(run, trained, videos, tmp_path):  # noqa: F811
    model, options = trained["avs"]
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    result = run("segment", videos / "long.mp4", bad, videos / "short.mkv", *options, "--out", tmp_path / "out")
    assert result.code == 1
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["lavish-fast", "warning"]
    assert "2 of 3 videos" in result.out
    rows = lines(tmp_path / "out" / "segment.jsonl")
    by_video = {name: [row for row in rows if row["video"].endswith(name)] for name in ("long.mp4", "bad.mp4", ".mkv")}
    assert set(by_video["bad.mp4"][0]) == {"video", "error"}
    # A frame a second, but no fewer than the model takes.
    assert [len(by_video[name]) for name in ("long.mp4", ".mkv")] == [7, 3]

    clip = segment.load_seconds(videos / "long.mp4", least=3, img_size=32, spectrogram=model.config.spectrogram)
    with torch.no_grad():
        windows = [model(clip.video[None, i : i + 3], clip.audio[None, i : i + 3]) for i in (0, 3, 4)]
    masks = torch.cat([avs.kept(outputs, 1)[0] for outputs in windows])[[0, 1, 2, 3, 4, 5, 8]]
    assert 0 < masks.float().mean() < 1
    for i, (row, mask) in enumerate(zip(by_video["long.mp4"], masks)):
        assert row["frame"] == i
        assert row["seconds"] == pytest.approx(i * clip.duration / 6, abs=1e-3)
        assert row["area"] == pytest.approx(mask.float().mean().item(), abs=2e-3)
        saved = np.asarray(Image.open(tmp_path / "out" / "long" / f"{i:03}_mask.png"))
        assert (saved == mask.numpy()).mean() > 0.99
        assert Image.open(tmp_path / "out" / "long" / f"{i:03}.png").size == (32, 32)
    assert (tmp_path / "out" / "short.png").read_bytes().startswith(b"\x89PNG")
    with av.open(str(tmp_path / "out" / "short.mp4")) as container:
        assert [(s.type, s.codec_context.name) for s in container.streams] == [("video", "h264")]
        assert (container.streams[0].width, container.streams[0].height) == (64, 48)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_film_has_the_nearest_mask_on_every_frame_and_its_sound(videos, tmp_path):
    masks = np.zeros((3, 8, 8), bool)
    masks[1, :, :4] = True
    seen = []
    segment.write_film(videos / "long.mp4", tmp_path / "film", masks, [0.0, 3.04, 6.0], True, seen.append)
    clip = {}
    sound = media.extract(
        tmp_path / "film", lambda _, seconds, image: clip.setdefault(round(seconds, 3), image), frame_rate=None
    )
    original = {}
    expected = media.extract(
        videos / "long.mp4", lambda _, seconds, image: original.setdefault(round(seconds, 3), image), frame_rate=None
    )
    assert clip.keys() == original.keys()
    assert seen == sorted(original)
    for seconds, image in original.items():
        change = np.abs(clip[seconds].astype(int) - image).mean(-1)
        marked = 1.52 < seconds < 4.52
        assert (change[:, :40].mean() > 18) == marked, seconds
        assert change[:, 56:].mean() < 12
    assert len(sound.waveform) == pytest.approx(len(expected.waveform), abs=2000)
    spectrum = [x.waveform[16000:32000].numpy() for x in (sound, expected)]
    assert {np.abs(np.fft.rfft(x)).argmax() for x in spectrum} == {600}
    assert spectrum[0].std() == pytest.approx(spectrum[1].std(), rel=0.1)


def test_segment_never_writes_over_a_video(run, trained, videos, tmp_path):  # noqa: F811
    before = (videos / "long.mp4").read_bytes()
    (tmp_path / "long.mp4").write_bytes(before)
    # Nor over another's: both would be long.mp4.
    for files in ([videos / "long.mp4"], [tmp_path / "long.mp4", videos / "long.mp4"]):
        result = run("segment", *files, *trained["avs"][1], "--out", videos)
        assert result.code == 2
        assert_one_line(result.err, "--out", "expected another folder than that of", videos)
    assert (videos / "long.mp4").read_bytes() == before
    assert segment.summary([0.0, 0.0]) == "nothing is marked in 2 frames"
    assert segment.summary([0.1, 0.0, 0.3]) == "2 of 3 frames marked, in 20% of their pixels"


# answer, classify


def test_answer(run, trained, videos, tmp_path):  # noqa: F811
    model, options = trained["avqa"]
    result = run("answer", videos / "long.mp4", "how many Violin?", *options, "--out", tmp_path)
    assert result.code == 0, result.err
    clip = media.load_clip(videos / "long.mp4", **avqa_data.media_options(model.config))
    asked = torch.tensor([[1, 2, 3, 0, 0, 0]])
    with torch.no_grad():
        expected = model(audio=clip.audio[None], positive=clip.video[None], question=asked)[0].softmax(-1)[0]
    order = expected.argsort(descending=True).tolist()[:5]
    (row,) = lines(tmp_path / "answer.jsonl")
    assert (row["question"], row["answer"]) == ("how many Violin?", ANSWERS[order[0]])
    assert list(row["top"]) == [ANSWERS[k] for k in order]
    assert list(row["top"].values()) == pytest.approx(expected[order].tolist(), abs=1e-4)
    assert result.out.splitlines()[0] == "how many Violin?"
    cells = re.findall(r"│ (\S+) +│ +([\d.]+) │", result.out)
    assert cells == [(ANSWERS[k], f"{expected[k]:.2f}") for k in order]
    assert f"answer: {ANSWERS[order[0]]}" in result.out
    assert (tmp_path / "long.png").is_file()


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("How many vioilns?", ("near to it violin", "got 'vioilns'")),
        ("", ("question", "expected words")),
        ("is is is is is is is", ("at most 6 words", "got 7")),
    ],
)
def test_answer_names_what_cannot_be_asked(run, trained, videos, question, parts, tmp_path):  # noqa: F811
    result = run("answer", videos / "long.mp4", question, *trained["avqa"][1], "--out", tmp_path / "out")
    assert result.code == 2
    assert_one_line(result.err, *parts)
    assert not (tmp_path / "out").exists()


def test_classify(run, trained, videos, tmp_path):  # noqa: F811
    model, options = trained["action"]
    result = run("classify", videos, *options, "--out", tmp_path)
    assert result.code == 0, result.err
    rows = lines(tmp_path / "classify.jsonl")
    assert [(row["video"], row["silent"]) for row in rows] == [
        (str(videos / "long.mp4"), False),
        (str(videos / "short.mkv"), True),
    ]
    for row in rows:
        clip = media.load_clip(row["video"], **action.media_options(model.config))
        with torch.no_grad():
            expected = model(clip.audio[None], clip.video[None]).softmax(-1)[0]
        classes = model.config.classes
        assert row["action"] == classes[expected.argmax()]
        assert row["top"] == pytest.approx({name: p.item() for name, p in zip(classes, expected)}, abs=1e-4)
    assert f"{videos / 'long.mp4'}\n" in result.out
    assert f"{videos / 'short.mkv'} (silent)\n" in result.out
    assert {path.name for path in tmp_path.iterdir()} == {"classify.jsonl", "long.png", "short.png"}


def test_models_of_other_tasks_are_refused(run, trained, videos):  # noqa: F811
    for command, task, other in (("segment", "avs", "avqa"), ("classify", "action", "avs"), ("localize", "ave", "avs")):
        result = run(command, videos, *trained[other][1])
        assert result.code == 2
        assert_one_line(result.err, "--checkpoint", f"expected a model for {task}, got one for {other}")


# prepare


@pytest.fixture
def small(monkeypatch):
    """Presets with small frames."""
    configs = {"ave": CONFIG, **CONFIGS}
    monkeypatch.setattr(Config, "from_preset", classmethod(lambda cls, name: configs[name.split("-")[0]]))


@pytest.mark.usefixtures("small")
def test_prepare_extracts_and_goes_on(run, tmp_path):  # noqa: F811
    write_dataset(tmp_path)
    (tmp_path / "AVE" / "clip4.mp4").write_text("no video")
    result = run("prepare", "ave", tmp_path, "--extract", "--decode")
    assert result.code == 1
    assert_one_line(result.err, "clip4.mp4", "expected a media file")
    assert "5 videos extracted, 0 were already, 1 cannot be read" in result.out
    assert "6 clips tried, 1 cannot be read" in result.out
    assert "to be had from AVE: github.com/YapengTian/AVE-ECCV18" in result.out
    write_video(tmp_path / "AVE" / "clip4.mp4", audio=False)
    result = run("prepare", "ave", tmp_path, "--extract", "--decode")
    assert result.code == 0, result.out
    assert result.err == f"warning: {tmp_path}/AVE/clip4.mp4: no audio stream, silence used\n"
    assert "1 videos extracted, 5 were already" in result.out
    assert "note: 1 of 6 clips have no sound, silence used: clip4" in result.out
    assert "to be had" not in result.out


@pytest.mark.usefixtures("small")
def test_prepare_speaks_of_each_data_set(run, tmp_path):  # noqa: F811
    write_s4(tmp_path / "avs")
    for task, missing in (("avqa", "avqa-train.json"), ("action", "classInd.txt"), ("avs", None)):
        folder = tmp_path / task
        folder.mkdir(exist_ok=True)
        result = run("prepare", task, folder)
        assert result.code == (1 if missing else 0)
        assert re.search(f"problem: .*expected {missing}" if missing else "nothing is missing", result.out)
        assert ("to be had from" in result.out) == bool(missing)
    result = run("prepare", "avs", tmp_path / "action", "--extract")
    assert (result.code, result.err) == (1, "")
    assert "problem: " in result.out
    (tmp_path / "avs" / "s4_data" / "audio_wav" / "val").rename(tmp_path / "val")
    result = run("prepare", "avs", tmp_path / "avs", "--extract")
    assert result.code == 1
    assert_one_line(result.err, "1 clips have no video in raw_videos/")


# sweep


def test_sweep_trains_resumes_and_extends(run, dataset, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    checkpoint.write_tensors(tmp_path / "backbone.safetensors", Model(CONFIG).backbone.state_dict(), {})
    files = ("--config", tmp_path / "config.json", "--backbone", tmp_path / "backbone.safetensors")
    out = tmp_path / "out"
    command = ("sweep", "latents", "--task", "ave", "--data", dataset, "--out", out, *files, "--epochs", 1)
    command += ("--workers", 0, "--batch-size", 1)
    result = run(*command, "--latents", "3")
    assert result.code == 0, result.err
    first = json.loads((out / "sweep.json").read_text())
    weights = (out / "latents-3" / "best" / "model.safetensors").stat().st_mtime_ns

    evaluated = []
    true = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda model, *a, **k: evaluated.append(model) or true(model, *a, **k))
    result = run(*command, "--latents", "3,1")
    assert result.code == 0, result.err
    facts = json.loads((out / "sweep.json").read_text())
    assert [row["latents"] for row in facts["rows"]] == [1, 3]
    assert facts["rows"][1] == first["rows"][0]
    assert (out / "latents-3" / "best" / "model.safetensors").stat().st_mtime_ns == weights
    # Once on the validation and once on the test split, for the new run alone.
    assert [model.config.adapter.latents for model in evaluated] == [1, 1]
    for count, row in zip((1, 3), facts["rows"]):
        best = Model.from_pretrained(out / f"latents-{count}" / "best")
        assert best.config.adapter.latents == count
        assert row["trainable_parameters"] == sum(p.numel() for _, p in best.trainable_parameters())
        score = row["scores"]["segment accuracy"]
        assert re.search(rf"│ +{count} +│ +{100 * score:.1f}% ", result.out)
    assert (out / "latents.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "latents.svg").read_text()

    # Another setting would not compare.
    result = run(*command, "--latents", "3", "--lr", 0.5)
    assert result.code == 1
    assert_one_line(result.err, "latents-3", "config.lr", "0.5")
    for latents in ("0", "1,two", ""):
        result = run(*command, "--latents", latents)
        assert result.code == 2
        assert_one_line(result.err, "--latents", "expected whole numbers from 1", repr(latents))


@pytest.mark.parametrize("task", ["ave", *CONFIGS])
def test_operations_grow_with_the_latents_as_counted_by_hand(task):
    config = {"ave": CONFIG, **CONFIGS}[task]
    side, spectrogram = config.backbone.img_size, config.spectrogram
    size = config.head.size if task == "avs" else side
    video = torch.zeros(1, config.frames, 3, size, size)
    audio = torch.zeros(
        1, config.images if task == "action" else config.frames, spectrogram.frames, spectrogram.mel_bins
    )
    clip = {"audio": audio, "positive" if task == "avqa" else "video": video}
    if task == "avqa":
        clip["question"] = torch.zeros(1, 6, dtype=torch.int64)
    counts = []
    for latents in (1, 2, 5) if task == "ave" else (1, 2):
        adapter = dataclasses.replace(config.adapter, latents=latents)
        counts.append(sweep.flops(dataclasses.replace(config, adapter=adapter), clip))
    per_latent = counts[1] - counts[0]
    assert 0 < per_latent < counts[0]
    if task == "ave":
        assert counts[2] - counts[1] == 3 * per_latent
        # Four products of a latent with each token of each of four adapters a block: L Yᵀ, its use, X Sᵀ, its use.
        tokens = [(64, 16), (64, 16), (16, 32)]  # of each block, and their channels
        assert per_latent == config.frames * sum(4 * 4 * 2 * n * c for n, c in tokens)
