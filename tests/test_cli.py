"""The command `lavish-fast`, through `main`, which is what the entry point calls."""

import dataclasses
import functools
import inspect
import json
import re
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import lavish_fast
from lavish_fast import Config, Model, checkpoint, cli, media, ops, training
from lavish_fast.commands import info, localize, terminal, watch
from lavish_fast.commands import train as train_command
from lavish_fast.config import TrainConfig
from parity import Ear, tiny_config

CLASSES = ("Bell", "Drum [low]", "background")  # brackets are markup to rich
CONFIG = tiny_config(classes=CLASSES, frames=2)


def write_video(path, seconds=2, hertz=440.0, level=120, audio=True):
    """A grey level and a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = 16000
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=4)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=rate, layout="mono") if audio else None
        for i in range(4 * seconds):
            picture = np.full((64, 64, 3), level, np.uint8)
            picture[:, 8 * (i % 8) :][:, :8] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 4)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound:
            wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(rate * seconds) / rate)
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))


def write_dataset(root):
    rows = []
    for i in range(6):
        event = CLASSES[i % 2]
        write_video(root / "AVE" / f"clip{i}.mp4", hertz=300 * (1 + i % 2), level=60 + 100 * (i % 2))
        rows.append(f"{event}&clip{i}&good&0&{1 + i % 2}")
    (root / "Annotations.txt").write_text("\n".join(rows))
    for split, ids in (("train", (0, 1)), ("val", (2, 3)), ("test", (4, 5))):
        (root / f"{split}.txt").write_text("".join(f"clip{i}\n" for i in ids))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with checkpoint/ and backbone.safetensors: a small model whose weights are all random."""
    folder = tmp_path_factory.mktemp("trained")
    model = Model(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise + name.endswith("gate"))
    model.save_pretrained(folder / "checkpoint")
    checkpoint.write_tensors(folder / "backbone.safetensors", model.backbone.state_dict(), {})
    return folder


@pytest.fixture
def options(trained):
    return ["--checkpoint", trained / "checkpoint", "--backbone", trained / "backbone.safetensors"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    write_dataset(root)
    return root


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return SimpleNamespace(code=end.value.code, out=captured.out, err=captured.err)

    return run


def assert_one_line(err, *parts):
    assert err.count("\n") == 1, err
    assert err.startswith("lavish-fast: ")
    for part in parts:
        assert str(part) in err


# localize


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of one name, one without sound."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a" / "clip.mp4", seconds=3)
    write_video(folder / "b" / "clip.mp4", audio=False)
    return folder


def test_localize_reports_a_bad_file_and_goes_on(run, options, videos, trained, tmp_path):
    good, bad = videos / "a" / "clip.mp4", tmp_path / "bad.mp4"
    bad.write_text("no video")
    result = run("localize", bad, good, *options, "--out", tmp_path / "out")

    assert result.code == 1
    assert_one_line(result.err, bad, "expected a media file")
    rows = [json.loads(line) for line in (tmp_path / "out" / "localize.jsonl").read_text().splitlines()]
    assert rows[0]["video"] == str(bad)
    assert set(rows[0]) == {"video", "error"}
    model = Model.from_pretrained(trained / "checkpoint", backbone=trained / "backbone.safetensors")
    clip = media.load_clip(good, frames=None, img_size=32, spectrogram=CONFIG.spectrogram)
    with torch.no_grad():
        expected = model(clip.audio[None], clip.video[None])
    assert len(rows[1:]) == len(expected) == 3
    for i, (row, p) in enumerate(zip(rows[1:], expected)):
        assert row["video"] == str(good)
        assert row["segment"] == i
        assert row["event"] == CLASSES[p.argmax()]
        assert row["probability"] == pytest.approx(p.max().item(), abs=2e-5)
        assert row["start"] == pytest.approx(i * clip.duration / 3, abs=1e-3)
        assert row["end"] == pytest.approx((i + 1) * clip.duration / 3, abs=1e-3)
        assert f"{row['probability']:.2f}" in result.out
    assert "events: " in result.out
    assert "1 of 2 videos" in result.out
    assert (tmp_path / "out" / "clip.png").read_bytes().startswith(b"\x89PNG")


def test_localize_takes_folders_and_names_each_picture(run, options, videos, tmp_path, monkeypatch):
    # Decoded here: the test above has the worker processes.
    monkeypatch.setattr(media, "load_clips", functools.partial(media.load_clips, workers=0))
    result = run("localize", videos, videos / "a" / "clip.mp4", *options, "--out", tmp_path)
    assert result.code == 0
    assert result.err == f"warning: {videos / 'b' / 'clip.mp4'}: no audio stream, silence used\n"
    rows = [json.loads(line) for line in (tmp_path / "localize.jsonl").read_text().splitlines()]
    assert [row["video"] for row in rows] == [str(videos / "a" / "clip.mp4")] * 3 + [str(videos / "b" / "clip.mp4")] * 2
    assert {file.name for file in tmp_path.iterdir()} == {"localize.jsonl", "clip.png", "clip-2.png"}


def test_pictures_of_equal_names_are_told_apart():
    files = [Path(name) for name in ("a.mp4", "x/a.mov", "A.mkv", "a-2.mp4", "b.mp4")]
    assert watch.places(files) == ["a", "a-2", "A-3", "a-2-2", "b"]


def test_a_long_clip_in_chunks_equals_the_clip_at_once(trained):
    model = Model.from_pretrained(trained / "checkpoint", backbone=trained / "backbone.safetensors")
    clip = media.Clip(torch.randn(23, 32, 32), torch.randn(23, 3, 32, 32), 23.0)
    with torch.no_grad():
        torch.testing.assert_close(localize.per_second(model, clip), model(clip.audio[None], clip.video[None]))


def test_summary_merges_neighbours_and_leaves_background_out():
    p = torch.tensor([[0.1, 0.1, 0.8], [0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.7, 0.2, 0.1]])
    rows = localize.segments(p, p.argmax(1), CLASSES, 1.06)
    assert localize.summary(rows) == "Bell 1.1-3.2 s (0.85); Drum [low] 3.2-4.2 s (0.60); Bell 4.2-5.3 s (0.70)"
    assert localize.summary(rows[:1]) == "none"
    assert [row["end"] for row in rows] == [1.06, 2.12, 3.18, 4.24, 5.3]


def test_names_of_files_cannot_write_to_the_terminal():
    assert terminal.printable("a\x1b[31m\n\udcff.mp4") == "a\ufffd[31m\ufffd\ufffd.mp4"


# Bad usage is 2, failed work is 1, each with one line


def test_bad_usage(run, options, trained, dataset, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    train = ("train", "ave", "--data", dataset, "--out", tmp_path / "out")
    video = dataset / "AVE" / "clip0.mp4"
    for name, text in (("list", "[]"), ("bare", "{}"), ("odd", '{"backbone": {"kind": "swinv2", "depths": ["a"]}}')):
        (tmp_path / f"{name}.json").write_text(text)
    files = ("--config", trained / "checkpoint" / "config.json", "--backbone")
    cases = [
        (("localize", tmp_path / "missing.mp4", *options), ("VIDEO", "missing.mp4")),
        (("localize", empty, *options), ("expected video files", empty)),
        (("localize", video, "--checkpoint", tmp_path / "missing"), ("--checkpoint", "missing")),
        (("localize", video, "--checkpoint", empty), ("config.json", "got none")),
        (("localize", video, *options[:2], "--backbone", "no/file.pt"), ("no/file.pt", "got none")),
        (("localize", video), ("--checkpoint",)),
        ((*train, "--preset", "ave-swin-huge"), ("ave-swinv2-large", "'ave-swin-huge'")),
        ((*train, "--preset", "ave-vit-tiny", "--config", tmp_path / "list.json"), ("--preset / --config", "got both")),
        ((*train, "--config", tmp_path / "list.json"), ("list.json", "expected a JSON object")),
        ((*train, "--config", tmp_path / "bare.json"), ("bare.json: expected a lavish_fast configuration, got: ",)),
        ((*train, "--config", tmp_path / "odd.json"), ("odd.json: expected a lavish_fast configuration, got: ",)),
        ((*train, *files, "vit_tini"), ("expected a file, or a timm model's name, got 'vit_tini'",)),
        ((*train, *files, empty), ("expected a file", empty)),
        ((*train, "--preset", "ave-swinv2-large-vggish", "--vggish", video, "--modality", "video"), ("vggish",)),
        ((*train, "--preset", "ave-swinv2-large-vggish"), ("--vggish", "expected its weights")),
        ((*train, "--preset", "ave-vit-tiny", "--lr-gamma", 0.5), ("--lr-gamma", "expected it with --lr-step")),
        ((*train, "--epochs", 0), ("epochs", "from 1", "got 0")),
        ((*train, "--lr", "nan"), ("lr", "positive", "nan")),
        ((*train, "--amp", "fp8"), ("--amp", "bf16", "fp16")),
        ((*train, "--backbone", "no/file.pt", "--preset", "ave-vit-tiny"), ("no/file.pt", "got none")),
        (("train", "avx", "--data", dataset, "--out", tmp_path), ("task", "avx")),
        (("evaluate", "ave", "--data", dataset, *options, "--batch-size", 0), ("batch_size", "got 0")),
        (("evaluate", "ave", "--data", dataset, *options, "--official-batch", 4), ("--official-batch", "avs alone")),
        (("evaluate", "ave", "--data", dataset, *options, "--official-batch", 0), ("--official-batch", "equal to 1")),
        (("localize", video, *options, "--vggish", video), ("--vggish", "expected it for a model with VGGish beside")),
        (("evaluate", "ave", "--data", dataset, *options, "--vggish", video), ("--vggish", "VGGish beside")),
        ((*train, "--preset", "ave-vit-tiny", "--fold", 2), ("--fold", "expected it with action alone, got ave")),
        (("evaluate", "ave", "--data", dataset, *options, "--fold", 2), ("--fold", "action alone, got ave")),
        (("sweep", "latents", "--task", "ave", *train[2:], "--fold", 2), ("--fold", "action alone, got ave")),
        (("prepare", "ave", dataset, "--fold", 2), ("--fold", "action alone, got ave")),
        (("prepare", "action", dataset, "--fold", 4), ("--fold", "equal to 3")),
        (("prepare", "ave", tmp_path / "missing"), ("DIR", "missing", "AVE-ECCV18")),
        (("prepare", "action", dataset, "--extract"), ("action", "ave, avs or avqa")),
        (("listen",), ("listen",)),
        (("info", "--loud"), ("--loud",)),
    ]
    for args, parts in cases:
        result = run(*args)
        assert result.code == 2, args
        assert result.out == ""
        assert_one_line(result.err, *parts)


def corrupt(trained, folder):
    folder.mkdir()
    (folder / "config.json").write_bytes((trained / "checkpoint" / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((trained / "checkpoint" / "model.safetensors").read_bytes()[:1000])
    return folder


def test_a_corrupt_checkpoint_is_one_line_or_a_traceback_with_debug(run, trained, dataset, tmp_path):
    folder = corrupt(trained, tmp_path / "corrupt")
    args = ["localize", str(dataset / "AVE" / "clip0.mp4"), "--checkpoint", str(folder)]
    result = run(*args)
    assert result.code == 1
    assert_one_line(result.err, folder / "model.safetensors", "expected safetensors", "got an unreadable file")

    command = [sys.executable, "-m", "lavish_fast.cli", "--debug", *args]
    debug = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert debug.returncode == 1
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.splitlines()[-1].startswith(f"ValueError: {folder / 'model.safetensors'}")


def test_another_backbone_is_refused(run, trained, dataset, tmp_path):
    checkpoint.write_tensors(tmp_path / "other.safetensors", Model(CONFIG).backbone.state_dict(), {})
    options = ("--checkpoint", trained / "checkpoint", "--backbone", tmp_path / "other.safetensors")
    result = run("localize", dataset / "AVE", *options)
    assert result.code == 1
    assert_one_line(result.err, "backbone", "trained on", "checksum")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("out of\n  memory"), 1, "out of memory"),
        (PermissionError(13, "Permission denied", "out"), 1, "[Errno 13] Permission denied: 'out'"),
        (KeyError("latents"), 1, "KeyError: 'latents' (--debug before the command shows where)"),
        (EOFError(), 1, "EOFError:  (--debug before the command shows where)"),
    ],
)
def test_whatever_fails_is_one_line(run, monkeypatch, error, code, line):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(lavish_fast, "demos", SimpleNamespace(run=fail), raising=False)
    result = run("demo")
    assert (result.code, result.out) == (code, "")
    assert result.err.strip() == f"lavish-fast: {' '.join(line.split())}"
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            cli.main(["--debug", "demo"])


# The other commands


def test_demo_is_handed_its_options(run, monkeypatch):
    calls = []

    def fake(task, out, *, seed, console):
        calls.append((task, out, seed))
        console.print("done")

    monkeypatch.setattr(lavish_fast, "demos", SimpleNamespace(run=fake), raising=False)
    assert run("demo").out == "done\n"
    assert run("demo", "avs").code == run("demo", "avs", "--out", "x", "--seed", 3).code == 0
    assert calls == [("ave", Path("demo"), 0), ("avs", Path("demo-avs"), 0), ("avs", Path("x"), 3)]


@pytest.fixture
def train_options(trained, dataset, tmp_path):
    # The classes of the file are not the data set's, which count.
    config = dataclasses.replace(CONFIG, classes=("x", "background"), modality="video")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    files = ("--config", tmp_path / "config.json", "--backbone", trained / "backbone.safetensors")
    return ["train", "ave", "--data", dataset, "--out", tmp_path / "out", *files, "--modality", "audio+video"]


def test_train_and_evaluate(run, train_options, trained, dataset, tmp_path, monkeypatch):
    result = run(*train_options, "--epochs", 1, "--workers", 0, "--head-lr", 0.01)
    assert result.code == 0, result.err
    accuracy = re.search(r"best validation score ([\d.]+%), in epoch 1 of 1", result.out)[1]
    best = tmp_path / "out" / "best"
    saved = Config.from_dict(checkpoint.read_config(best / "config.json"))
    assert (saved.classes, saved.modality) == (CLASSES, "audio+video")

    # Without --resume nothing is overwritten.
    again = run(*train_options, "--epochs", 1, "--workers", 0, "--head-lr", 0.01)
    assert again.code == 1
    assert_one_line(again.err, tmp_path / "out", "to be asked to resume")
    resumed = run(*train_options, "--epochs", 2, "--workers", 0, "--head-lr", 0.01, "--resume")
    assert resumed.code == 0, resumed.err
    assert "of 2" in resumed.out

    # The checkpoint knows its backbone, which need not be named again.
    evaluate = ("evaluate", "ave", "--data", dataset, "--checkpoint", best, "--workers", 0)
    result = run(*evaluate, "--split", "val", "--out", tmp_path / "val")
    assert result.code == 0, result.err
    facts = json.loads((tmp_path / "val" / "evaluate.json").read_text())
    best_score = max(float(a) for a in re.findall(r"best validation score ([\d.]+)%", resumed.out)) / 100
    scores = facts["scores"]
    assert scores["segment accuracy"] == pytest.approx(best_score, abs=1e-3)
    assert best_score >= float(accuracy[:-1]) / 100
    assert scores["correct"] / scores["total"] == scores["segment accuracy"]
    assert f"{scores['segment accuracy']:.2%}" in result.out
    rows = [json.loads(line) for line in (tmp_path / "val" / "predictions.jsonl").read_text().splitlines()]
    assert [(row["video"], row["segment"]) for row in rows] == [(f"clip{i}", s) for i in (2, 3) for s in (0, 1)]
    truth = [CLASSES[0], CLASSES[2], CLASSES[1], CLASSES[1]]
    assert sum(row["event"] == label for row, label in zip(rows, truth)) == scores["correct"]

    # A relative name in a configuration's file is of the folder where it was trained.
    monkeypatch.chdir(trained)
    values = saved.to_dict() | {"backbone_weights": "backbone.safetensors"}
    (tmp_path / "relative.json").write_text(json.dumps(values))
    files = ("--config", tmp_path / "relative.json", "--out", tmp_path / "relative")
    result = run("train", "ave", "--data", dataset, *files, "--epochs", 1, "--workers", 0)
    assert result.code == 0, result.err
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", "ave", "--data", dataset, "--checkpoint", "relative/best", "--workers", 0).code == 0

    cmbs = run(*evaluate, "--rule", "cmbs", "--out", tmp_path / "test")
    assert cmbs.code == 0, cmbs.err
    assert json.loads((tmp_path / "test" / "evaluate.json").read_text())["rule"] == "cmbs"


def test_evaluate_leaves_a_bad_file_out_and_says_so(run, options, tmp_path):
    write_dataset(tmp_path)
    (tmp_path / "AVE" / "clip4.mp4").write_text("no video")
    with open(tmp_path / "Annotations.txt", "a") as file:
        file.write("\nDrum [low]&clip4&good&0&1")
    result = run("evaluate", "ave", "--data", tmp_path, *options, "--workers", 0)
    assert result.code == 1
    # The file is reported once, and both rows of it are not scored.
    assert_one_line(result.err, "clip4.mp4", "expected a media file")
    assert "1 of 3" in result.out


@pytest.fixture
def ear(tmp_path, monkeypatch):
    """The file of weights of an `Ear`, which is in VGGish's place."""
    monkeypatch.setattr("lavish_fast.model.VGGish", Ear)
    save_file(Ear().state_dict(), tmp_path / "ear.safetensors")
    return tmp_path / "ear.safetensors"


def test_vggish_is_asked_for_by_its_weights(run, train_options, dataset, tmp_path, ear):
    fast = ("--epochs", 1, "--workers", 0)
    result = run(*train_options, *fast, "--vggish", ear)
    assert result.code == 0, result.err
    best = tmp_path / "out" / "best"
    saved = Config.from_dict(checkpoint.read_config(best / "config.json"))
    assert saved.head.vggish_weights == str(ear)
    assert not any("vggish" in name for name in checkpoint.read_tensors(best / "model.safetensors"))
    found = run("localize", dataset / "AVE" / "clip0.mp4", "--checkpoint", best, "--out", tmp_path / "found")
    assert found.code == 0, found.err
    assert len((tmp_path / "found" / "localize.jsonl").read_text().splitlines()) == 2

    moved = ear.rename(tmp_path / "moved.safetensors")
    for command in (("localize", dataset / "AVE" / "clip0.mp4"), ("evaluate", "ave", "--data", dataset)):
        command += ("--checkpoint", best, "--out", tmp_path / command[0])
        result = run(*command)
        assert result.code == 2
        assert_one_line(result.err, ear, "expected a file of weights, got none")
        result = run(*command, "--vggish", moved)
        assert result.code == 0, result.err

    (tmp_path / "config.json").write_text(json.dumps(saved.to_dict() | {"head": {"vggish": True}}))
    result = run(*train_options, *fast, "--out", tmp_path / "other")
    assert result.code == 2
    assert_one_line(result.err, "--vggish", "expected its weights, which the configuration does not name")


def test_every_training_option_arrives(run, train_options, monkeypatch):
    wanted = TrainConfig(3, 4, 0.1, 0.2, 5, 0.6, 7, 8, "fp16", 9, 10, 11, "stop", True)
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert all(getattr(wanted, name) != getattr(TrainConfig(), name) for name in names)
    defaults = {name: inspect.signature(train_command.train).parameters[name].default for name in names}
    assert TrainConfig(**{name: value for name, value in defaults.items() if value is not None}) == TrainConfig()

    calls = []

    def fake(model, train_set, val_set, config, out, *, resume):
        calls.append((len(train_set), len(val_set), config, out, resume))
        return training.Fit(0.5, 1, 2, 3, ("a line",), ("a clip", "another"), ("a step",) * 4)

    monkeypatch.setattr(training, "fit", fake)
    valued = [name for name in names if name != "checkpointing"]
    flags = [arg for name in valued for arg in (f"--{name.replace('_', '-')}", getattr(wanted, name))]
    result = run(*train_options, *flags, "--checkpointing", "--resume")
    assert result.code == 0, result.err
    assert calls == [(2, 2, wanted, train_options[5], True)]
    assert "1 files could not be read" in result.out
    assert "4 steps skipped (not finite)" in result.out
    assert "2 clips without sound, read as silence" in result.out


def test_under_torchrun_one_process_speaks(train_options, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["-m", "lavish_fast.cli", *map(str, train_options), "--epochs", "1", "--workers", "0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best validation score") == 1
    assert result.stdout.count("epoch 1/1") == 1
    assert (tmp_path / "out" / "best" / "model.safetensors").is_file()


def test_prepare_says_what_is_missing(run, tmp_path):
    write_dataset(tmp_path)
    result = run("prepare", "ave", tmp_path)
    assert result.code == 0, result.out
    assert "Annotations.txt: 6 rows, without a header\n" in result.out
    assert "nothing is missing" not in result.out  # AVE has more
    assert "every listed file is there; --decode would also try every file" in result.out

    (tmp_path / "AVE" / "clip3.mp4").unlink()
    (tmp_path / "AVE" / "clip4.mp4").write_text("no video")
    result = run("prepare", "ave", tmp_path)
    assert result.code == 1
    assert "problem: val: 1 of 2 videos have no media: clip3\n" in result.out
    assert "clip4" not in result.out
    result = run("prepare", "ave", tmp_path, "--decode")
    assert result.code == 1
    assert re.search("problem: .*clip4.mp4: expected a media file", result.out)

    (tmp_path / "Annotations.txt").write_text("Bell&clip0&good&0\n")
    result = run("prepare", "ave", tmp_path)
    assert result.code == 1
    assert "Annotations.txt, line 1" in result.out


def test_info_without_triton_and_with_a_broken_xformers(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    (tmp_path / "xformers.py").write_text("raise OSError('libcudart.so.13: cannot open\\n shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("info")
    assert (result.code, result.err) == (0, "")
    lines = {line.split("│")[1].strip(): line for line in result.out.splitlines() if line.startswith("│")}
    assert "not installed" in lines["triton"]
    assert "cannot load: libcudart.so.13: cannot open shared object file" in lines["xformers"]
    assert torch.__version__ in lines["torch"]
    assert f"{torch.get_num_threads()} threads" in lines["cpu"]
    for op in ops.OPS:
        choice = next(choice for choice in info._paths() if choice.op == op)
        assert choice.path in lines[op]
        assert "; ".join(choice.reasons) in lines[op]


def test_info_shows_what_a_package_logs_instead_of_failing(monkeypatch, tmp_path):
    (tmp_path / "grumbling.py").write_text(
        "import logging\n__version__ = '1.2'\nlogging.getLogger('grumbling').warning('no\\n CUDA extension')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert info._version("grumbling") == "1.2 (no CUDA extension)"


COMMANDS = [
    ["demo"],
    ["localize"],
    ["segment"],
    ["answer"],
    ["classify"],
    ["prepare"],
    ["train"],
    ["evaluate"],
    ["info"],
]
COMMANDS += [["sweep"], ["sweep", "latents"]]


def test_help_and_version(run):
    assert run("--version").out == f"lavish_fast {lavish_fast.__version__}\n"
    help = run("--help")
    assert help.code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command[0]}\b", help.out)
        assert run(*command, "--help").code == 0
    bare = run()
    assert (bare.code, bare.err) == (2, "")
    assert "Usage" in bare.out + bare.err


def test_help_has_every_name_whole_in_80_columns():
    for args in ([], *COMMANDS):
        results = [
            CliRunner().invoke(cli.app, [*args, "--help"], env={"COLUMNS": columns}, obj=SimpleNamespace())
            for columns in ("80", "200")
        ]
        # Options, and the commands at the beginnings of lines; what does not fit is cut, with a point for its end.
        narrow, wide = (set(re.findall(r"--[\w-]+(?!…)\b|(?<=^│ )[a-z]+\b", r.output, re.M)) for r in results)
        assert narrow == wide
        assert "--help" in wide


def test_the_installed_command_runs():
    command = Path(sys.executable).with_name("lavish-fast")
    result = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"lavish_fast {lavish_fast.__version__}\n", "")


def test_importing_the_package_leaves_torch_to_who_asks_for_the_model():
    code = "import sys, lavish_fast; assert 'torch' not in sys.modules; from lavish_fast import Model; Model.forward"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code.partition(" from ")[0]], check=True)
    assert time.perf_counter() - start < 3
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light():
    code = """if True:
        import sys, time
        import torch
        start = time.process_time()
        import lavish_fast, lavish_fast.cli
        seconds = time.process_time() - start
        assert seconds < 1, f"{seconds} s of the processor, beyond torch's"
        heavy = {"triton", "xformers", "timm", "av", "matplotlib", "torchaudio", "tensorboard", "h5py"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert not torch.cuda.is_initialized()
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
