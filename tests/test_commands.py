"""`lavish-fast` segment, answer, classify, prepare --extract and sweep, through `main`."""

import dataclasses
import json
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lavish_fast import Config, Model, checkpoint, media, plots, training
from lavish_fast.commands import segment, sweep
from lavish_fast.config import AVQAConfig
from lavish_fast.tasks import action, ave, avqa_data, avs, avs_data
from parity import randomise, tiny_config
from test_action import TEST, TRAIN, write_clips, write_lists
from test_action import make_config as action_config
from test_avqa import write_questions
from test_avs import make_config as avs_config
from test_avs import plain_f, write_s4
from test_cli import CONFIG, assert_one_line, dataset, ear, run, write_dataset, write_video  # noqa: F401
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
        assert row["seconds"] == pytest.approx(clip.times[i], abs=1e-3)
        assert row["area"] == pytest.approx(mask.float().mean().item(), abs=2e-3)
        saved = np.asarray(Image.open(tmp_path / "out" / "long" / f"{i:03}_mask.png"))
        assert (saved == mask.numpy()).mean() > 0.99
        assert Image.open(tmp_path / "out" / "long" / f"{i:03}.png").size == (32, 32)
    assert (tmp_path / "out" / "short.png").read_bytes().startswith(b"\x89PNG")
    with av.open(str(tmp_path / "out" / "short.mp4")) as container:
        assert [(s.type, s.codec_context.name) for s in container.streams] == [("video", "h264")]
        assert (container.streams[0].width, container.streams[0].height) == (64, 48)
    assert not list((tmp_path / "out").glob(".*"))


def test_masks_are_where_their_frames_are_shown(run, trained, tmp_path):  # noqa: F811
    encode(tmp_path / "a.mp4", film(4), tone(600, 12, 16000), size=(32, 32))
    result = run("segment", tmp_path / "a.mp4", *trained["avs"][1], "--out", tmp_path / "out")
    assert result.code == 0, result.err
    rows = lines(tmp_path / "out" / "segment.jsonl")
    assert [row["seconds"] for row in rows] == pytest.approx([i / 3 for i in range(12)], abs=0.5)


def test_segment_leaves_no_pictures_of_an_earlier_run(run, trained, videos, tmp_path):  # noqa: F811
    folder = tmp_path / "short"
    folder.mkdir()
    for name in ("002.png", "007.png", "007_mask.png", "1000_mask.png", "7.png", "007.jpg", "other.png"):
        (folder / name).write_text("of an earlier run, or of someone else")
    result = run("segment", videos / "short.mkv", *trained["avs"][1], "--out", tmp_path)
    assert result.code == 0, result.err
    ours = {f"{i:03}{end}.png" for i in range(3) for end in ("", "_mask")}
    assert {path.name for path in folder.iterdir()} == ours | {"7.png", "007.jpg", "other.png"}


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
    # Nor outside of the folder, nor in it itself, where a video's name is one of dots.
    for name in ("..mp4", "...mp4"):
        (tmp_path / name).write_bytes((videos / "short.mkv").read_bytes())
    kept = tmp_path / "000.png"
    kept.write_text("of someone else")
    out = tmp_path / "out"
    result = run("segment", tmp_path / "..mp4", tmp_path / "...mp4", *trained["avs"][1], "--out", out)
    assert result.code == 0, result.err
    names = {f"{name}{end}" for name in ("_", "_-2") for end in ("", ".png", ".mp4")}
    assert {path.name for path in out.iterdir()} == names | {"segment.jsonl"}
    assert kept.read_text() == "of someone else"
    assert {path.name for path in tmp_path.iterdir()} == {"..mp4", "...mp4", "long.mp4", "000.png", "out"}
    assert segment.summary([0.0, 0.0]) == "nothing is marked in 2 frames"
    assert segment.summary([0.1, 0.0, 0.3]) == "2 of 3 frames marked, in 20% of their pixels"


def test_folders_are_read_without_what_the_commands_wrote(run, trained, videos, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "short.mkv").write_bytes((videos / "short.mkv").read_bytes())
    monkeypatch.chdir(tmp_path)
    for out in ("segment", "segment", "again"):
        result = run("segment", ".", *trained["avs"][1], "--out", out)
        assert result.code == 0, result.err
        assert {row["video"] for row in lines(tmp_path / out / "segment.jsonl")} == {"in/short.mkv"}
    result = run("classify", ".", *trained["action"][1])
    assert [row["video"] for row in lines(tmp_path / "classify" / "classify.jsonl")] == ["in/short.mkv"]
    # A kill leaves films and no list of them. What is asked for by its name is read.
    (tmp_path / "again" / "segment.jsonl").unlink()
    assert run("segment", ".", *trained["avs"][1], "--out", "again").code == 0
    assert run("classify", "again", *trained["action"][1]).code == 0
    assert [row["video"] for row in lines(tmp_path / "classify" / "classify.jsonl")] == ["again/short.mp4"]


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


def test_a_file_that_cannot_be_shown_does_not_end_the_others(run, trained, videos, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    (out / "long.png").mkdir(parents=True)  # in the picture's way
    longest = tmp_path / f"{'n' * 251}.mkv"
    longest.write_bytes((videos / "short.mkv").read_bytes())
    result = run("classify", videos, longest, *trained["action"][1], "--out", out)
    assert result.code == 1
    error, *silent = result.err.splitlines()
    assert re.fullmatch(rf"lavish-fast: {videos / 'long.mp4'}: .*long\.png'", error)
    assert len(silent) == 2
    assert "2 of 3 videos" in result.out
    bad, *good = lines(out / "classify.jsonl")
    assert set(bad) == {"video", "error"}
    assert bad["error"].startswith(f"{videos / 'long.mp4'}: ")
    assert [row["video"] for row in good] == [str(videos / "short.mkv"), str(longest)]
    assert (out / f"{longest.stem}.png").is_file()


def test_a_run_that_shows_nothing_leaves_the_earlier_results(run, trained, videos, tmp_path, monkeypatch):  # noqa: F811
    command = ("classify", videos, *trained["action"][1], "--out", tmp_path)
    assert run(*command).code == 0
    before, true, until = lines(tmp_path / "classify.jsonl"), plots.save, []

    def save(*args):
        if not until:
            raise KeyboardInterrupt
        until.pop()
        true(*args)

    monkeypatch.setattr(plots, "save", save)
    for pictures, left in ((0, before), (1, before[:1])):
        until[:] = range(pictures)
        assert run(*command).code == 130
        assert lines(tmp_path / "classify.jsonl") == left
    assert not list(tmp_path.glob(".*"))


def test_models_of_other_tasks_are_refused(run, trained, videos):  # noqa: F811
    for command, task, other in (("segment", "avs", "avqa"), ("classify", "action", "avs"), ("localize", "ave", "avs")):
        result = run(command, videos, *trained[other][1])
        assert result.code == 2
        assert_one_line(result.err, "--checkpoint", f"expected a model for {task}, got one for {other}")


# evaluate


def test_the_official_f_score_has_the_batches_of_the_list(run, trained, tmp_path):  # noqa: F811
    model, options = trained["avs"]
    names = ("c", "a", "d", "b", "e")  # neither sorted, nor paired as if they were
    write_s4(tmp_path, [f"{name},0,dog,test" for name in names])
    clips = avs.Dataset(tmp_path, "test", model.config)
    assert [item["id"] for item in clips] == list(names)
    with torch.no_grad():
        logits = model(clips[0]["video"][None], clips[0]["audio"][None])[0][:, 0]  # those of every clip
    # Objects of several sizes, so that each clip has a threshold of its own.
    scored = [(logits, logits > logits.quantile(q)) for q in (0.95, 0.1, 0.5, 0.85, 0.05)]
    for name, (_, masks) in zip(names, scored):
        for i, mask in enumerate(masks.numpy(), 1):
            path = tmp_path / "s4_data/gt_masks/test/dog" / name / f"{name}_{i}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    evaluate = ("evaluate", "avs", "--data", tmp_path, *options, "--workers", 0, "--out", tmp_path / "out")
    result = run(*evaluate, "--batch-size", 3, "--official-batch", 2)
    assert result.code == 0, result.err

    expected = (plain_f(scored[:2], 2) + plain_f(scored[2:4], 2) + plain_f(scored[4:], 2)) / 3
    scores = json.loads((tmp_path / "out" / "evaluate.json").read_text())["scores"]
    assert scores["official F-score (batch 2)"] == pytest.approx(expected, rel=1e-3)
    in_order_of_names = plain_f([scored[i] for i in (1, 3, 0, 2, 4)], 2)
    assert scores["official F-score (batch 2)"] != pytest.approx(in_order_of_names, rel=1e-2)
    assert re.search(rf"official F-score \(batch 2\) +│ +{expected:.2%} ", result.out)
    rows = lines(tmp_path / "out" / "predictions.jsonl")
    assert [(row["id"], row["frame"]) for row in rows] == [(name, i) for name in names for i in range(len(logits))]
    shares = (logits.sigmoid() > 0.5).float().mean((1, 2)).tolist()
    assert [row["area"] for row in rows] == pytest.approx(shares * len(names), abs=2e-3)
    run(*evaluate)
    assert "official" not in (tmp_path / "out" / "evaluate.json").read_text()


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
        assert re.search(f"problem: .*expected {missing}" if missing else "every listed file is there", result.out)
        assert ("to be had from" in result.out) == bool(missing)
        assert ("s4_meta_data.csv: 5 rows, 3 categories\n" in result.out) == (not missing)
    write_questions(tmp_path / "avqa")
    result = run("prepare", "avqa", tmp_path / "avqa")
    assert re.search(r"split +┃ questions ┃ videos without media", result.out)
    result = run("prepare", "avs", tmp_path / "action", "--extract")
    assert (result.code, result.err) == (1, "")
    assert "problem: " in result.out
    (tmp_path / "avs" / "s4_data" / "audio_wav" / "val").rename(tmp_path / "val")
    result = run("prepare", "avs", tmp_path / "avs", "--extract")
    assert result.code == 1
    assert_one_line(result.err, "1 clips have no video in raw_videos/")


@pytest.mark.usefixtures("small")
def test_prepare_says_that_nothing_is_missing_of_what_is_published_alone(run, tmp_path, monkeypatch):  # noqa: F811
    write_s4(tmp_path)
    monkeypatch.setattr(avs_data, "_SIZES", {"train": 2, "val": 1, "test": 2})
    monkeypatch.setattr(avs_data, "_CATEGORIES", 3)
    result = run("prepare", "avs", tmp_path)
    assert result.code == 0
    assert "nothing is missing; --decode would also try every file" in result.out
    for name, value in (("_CATEGORIES", 23), ("_SIZES", {"train": 3, "val": 1, "test": 2})):
        with monkeypatch.context() as patch:
            patch.setattr(avs_data, name, value)
            result = run("prepare", "avs", tmp_path, "--decode")
            assert result.code == 0
            assert "nothing is missing" not in result.out
            assert "every listed file is there\n" in result.out


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
    # Those that are there are swept again with further ones.
    result = run(*command, "--latents", "2")
    assert result.code == 0, result.err
    assert [row["latents"] for row in json.loads((out / "sweep.json").read_text())["rows"]] == [1, 2, 3]
    assert (out / "latents.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "latents.svg").read_text()

    # Another setting would not compare.
    (out / "sweep.json").write_text(json.dumps(first))
    result = run(*command, "--latents", "1", "--lr", 0.5)
    assert result.code == 1
    assert_one_line(result.err, "latents-3", "config.lr", "0.5")
    for latents in ("0", "1,two", ""):
        result = run(*command, "--latents", latents)
        assert result.code == 2
        assert_one_line(result.err, "--latents", "expected whole numbers from 1", repr(latents))


def test_a_sweep_counts_steps_that_are_not_finite_apart(run, dataset, tmp_path, monkeypatch):  # noqa: F811
    item = ave.Dataset.item

    def with_nan(self, i):
        clip = item(self, i)
        return clip | {"audio": clip["audio"] * float("nan")} if clip["id"] == "clip0" else clip

    monkeypatch.setattr(ave.Dataset, "item", with_nan)
    command = ("sweep", "latents", "--task", "ave", "--data", dataset, "--out", tmp_path / "out")
    command += (*files_of(CONFIG, tmp_path), "--workers", 0, "--batch-size", 1)
    for epochs in (1, 2):
        result = run(*command, "--latents", "1", "--epochs", epochs)
        assert result.code == 0, result.err
        assert f"\n{epochs} steps skipped (not finite)\n" in result.out
        (row,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
        assert (len(row["not_finite"]), row["skipped"]) == (epochs, [])


def files_of(config, folder):
    """The options that name a configuration's file and that of weights for its backbone."""
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    checkpoint.write_tensors(folder / "backbone.safetensors", Model(config).backbone.state_dict(), {})
    return "--config", folder / "config.json", "--backbone", folder / "backbone.safetensors"


def test_sweep_with_vggish_beside(run, dataset, ear, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = ("sweep", "latents", "--task", "ave", "--data", dataset, "--out", out, *files_of(CONFIG, tmp_path))
    result = run(*command, "--vggish", ear, "--latents", 1, "--epochs", 1, "--workers", 0)
    assert result.code == 0, result.err
    best = Model.from_pretrained(out / "latents-1" / "best")
    assert torch.equal(best.vggish.fc.weight, checkpoint.read_tensors(ear)["fc.weight"])


def test_sweep_refuses_models_without_latents(run, dataset, tmp_path):  # noqa: F811
    alone = dataclasses.replace(CONFIG, adapter=dataclasses.replace(CONFIG.adapter, cross_modal=False))
    command = ("sweep", "latents", "--task", "ave", "--data", dataset, "--out", tmp_path / "out")
    for config, more, got in (
        (CONFIG, ("--modality", "video"), "got video"),
        (CONFIG, ("--modality", "audio"), "got audio"),
        (alone, (), "got adapter.cross_modal false"),
    ):
        result = run(*command, *files_of(config, tmp_path), *more)
        assert result.code == 2
        assert_one_line(result.err, "expected both streams", f"{got}: all models would be the same")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small")
def test_the_fold_is_said_and_silent_clips_are_counted(run, tmp_path):  # noqa: F811
    root, out = tmp_path / "data", tmp_path / "out"
    for fold in (1, 2):  # the second with as many clips to train on
        write_lists(root, fold=fold, test=TEST[: 3 - fold])
    write_clips(root, [*TRAIN[:2], TEST[0]], sound=False)
    write_clips(root, [*TRAIN[2:], TEST[1]])
    files = files_of(CONFIGS["action"], tmp_path)
    fast = ("--workers", 2, "--epochs")
    command = ("train", "action", "--data", root, "--out", out, *files, "--fold", 2, *fast)
    for more in ((1,), (2, "--resume")):
        result = run(*command, *more)
        assert result.code == 0, result.err
        assert "2 clips without sound, read as silence\n" in result.out
        assert "silence" not in result.err
    result = run(*command, 3, "--resume", "--fold", 1)
    assert result.code == 1
    assert_one_line(result.err, "expected fold 2, got 1")

    command = ("evaluate", "action", "--data", root, "--checkpoint", out / "best", "--workers", 1, "--out", out)
    for fold, more in ((1, ()), (2, ("--fold", 2))):
        result = run(*command, *more)
        assert result.code == 0, result.err
        facts = json.loads((out / "evaluate.json").read_text())
        assert (facts["fold"], facts["silent"]) == (fold, ["v_Archery_g01_c01"])
        assert re.search(rf"fold +│ {fold} ", result.out)
        assert re.search(r"without sound +│ 1 clips, read as silence ", result.out)
        assert f"{3 - fold} of {3 - fold} " in result.out

    command = ("sweep", "latents", "--task", "action", "--data", root, "--out", out / "sweep", *files, "--fold", 2)
    result = run(*command, "--latents", 1, *fast, 1)
    assert result.code == 0, result.err
    assert json.loads((out / "sweep" / "sweep.json").read_text())["fold"] == 2
    assert "2 clips without sound, read as silence\n" in result.out
    assert "fold 2\n" in run("prepare", "action", root, "--fold", 2).out


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
