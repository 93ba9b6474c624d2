"""Action recognition: the head, the loss, the metric, and a data set in UCF101's layout."""

import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lavish_fast import Model, media, optimize, tasks
from lavish_fast.config import UCF101_CLASSES, AdapterConfig, Config, SpectrogramConfig, VideoMAEConfig
from lavish_fast.tasks import action
from parity import randomise, tiny_config
from test_media import encode, film, tone

CLASSES = ("Archery", "HandstandPushups", "PlayingCello")
WHOLE = SpectrogramConfig(window_seconds=0.0, mel_bins=32, frames=32, frame_shift_ms=10.0)
BACKBONE = VideoMAEConfig(img_size=32, patch_size=8, frames=4, embed_dim=32, depth=2, num_heads=4)


def make_config(**changes):
    values = {"task": "action", "backbone": BACKBONE, "adapter": AdapterConfig(reduction=4), "spectrogram": WHOLE}
    return Config(**(values | {"classes": CLASSES, "frames": 4} | changes))


def encoded(*pooled):
    return SimpleNamespace(pooled=list(pooled))


# Head, inputs and loss


def test_head_is_one_linear_map_video_first():
    head = action.Head(make_config()).double()
    audio, video = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = video @ head.fc.weight[:, :32].T + audio @ head.fc.weight[:, 32:].T + head.fc.bias
    torch.testing.assert_close(head(encoded(audio, video)), expected)
    alone = action.Head(make_config(modality="video")).double()
    torch.testing.assert_close(alone(encoded(video)), video @ alone.fc.weight.T + alone.fc.bias)


def test_head_averages_over_the_pictures_of_a_clip():
    head = action.Head(tiny_config(task="action")).double()  # three frames a clip
    audio, video = torch.randn(2, 6, 32, dtype=torch.float64)
    features = torch.stack([torch.cat((video[i : i + 3].mean(0), audio[i : i + 3].mean(0))) for i in (0, 3)])
    torch.testing.assert_close(head(encoded(audio, video)), features @ head.fc.weight.T + head.fc.bias)


def test_inputs_of_videomae_are_one_clip_and_one_picture():
    audio, video = torch.randn(2, 1, 32, 32), torch.randn(2, 4, 3, 32, 32)
    given = action.inputs(make_config(), audio, video)
    assert list(given) == ["audio", "video"]
    assert torch.equal(given["audio"], audio.repeat(1, 3, 1, 1))
    assert torch.equal(given["video"], torch.stack(list(video.unbind(1)), 2))
    assert list(action.inputs(make_config(modality="audio"), audio)) == ["audio"]
    assert list(action.inputs(make_config(modality="video"), video=video)) == ["video"]


def test_inputs_of_other_backbones_are_pictures():
    audio, video = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 3, 32, 32)
    given = action.inputs(tiny_config(task="action"), audio, video)
    assert torch.equal(given["video"][4], video[1, 1])
    assert given["audio"].shape == (6, 3, 32, 32)
    assert torch.equal(given["audio"][4], audio[1, 1].expand(3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"audio": torch.zeros(2, 4, 32, 32)},
            r"audio: expected a floating tensor \(B, 1, 32, 32\), got \(2, 4, 32, 32\)",
        ),
        ({"audio": torch.zeros(2, 1, 32, 16)}, r"audio: .*got \(2, 1, 32, 16\)"),
        ({"audio": None}, "audio: .*got NoneType"),
        ({"video": torch.zeros(2, 3, 4, 32, 32)}, r"video: expected .* \(B, 4, 3, 32, 32\), got \(2, 3, 4, 32, 32\)"),
        ({"video": torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8)}, "video: .* uint8"),
        ({"video": torch.zeros(3, 4, 3, 32, 32)}, "audio and video: expected the same clips B, got 2 and 3"),
    ],
)
def test_other_inputs_are_refused(changes, message):
    given = {"audio": torch.zeros(2, 1, 32, 32), "video": torch.zeros(2, 4, 3, 32, 32)} | changes
    with pytest.raises(ValueError, match=message):
        action.inputs(make_config(), **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_config(frames=8), "expected videomae with .* its 4 frames .*, got action, 8 frames"),
        (lambda: make_config(spectrogram=SpectrogramConfig()), r"a spectrogram of the whole clip .* and 1\.0"),
        (lambda: make_config(task="ave"), "expected videomae with the task action, .* got ave"),
        (lambda: tiny_config(task="action", spectrogram=WHOLE), r"expected a window for each frame, got 0\.0"),
    ],
)
def test_configurations_that_do_not_go_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_mean_cross_entropy(dtype):
    logits = torch.randn(4, 3, dtype=torch.float64).to(dtype)
    labels = torch.tensor([0, 2, 1, 2])
    rows = [[math.exp(x) for x in row] for row in logits.double().tolist()]
    expected = -sum(math.log(row[label] / sum(row)) for row, label in zip(rows, labels.tolist())) / 4
    found = action.loss(logits, labels)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_importing_the_task_imports_no_decoder():
    code = (
        "import sys, lavish_fast.tasks.action; sys.exit(bool({'av', 'torchaudio', 'h5py', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_network_was_released():
    with pytest.raises(ValueError, match="got 'action', for which there is none"):
        action.fitted(make_config(), {})


def test_streams_of_different_lengths_read_each_other_and_train():
    model = randomise(Model(make_config())).eval()
    audio, video = torch.randn(2, 1, 32, 32), torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        logits = model(audio, video)
        assert logits.shape == (2, 3)
        torch.testing.assert_close(model(audio[:1], video[:1]), logits[:1], rtol=1e-4, atol=1e-5)
        for changed in ((audio.roll(1, 0), video), (audio, video.flip(1))):
            assert (model(*changed) - logits).abs().max() > 1e-3
        fast = optimize(model, compile=False)
        torch.testing.assert_close(fast(audio, video), logits, rtol=1e-4, atol=1e-5)
        assert fast(audio[:0], video[:0]).shape == (0, 3)
    trained = torch.nn.ModuleList((model.adapters, model.head))
    model.train()
    action.loss(model(audio, video), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained.parameters())


# Metric


@pytest.mark.parametrize("seed", range(20))
def test_accuracy_equals_counting_by_hand_whatever_the_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    clips, classes = 11, 2 + seed % 6
    logits = torch.randn(clips, classes, generator=generator)
    labels = torch.randint(classes, (clips,), generator=generator)
    right = {label: [] for label in labels.tolist()}
    for row, label in zip(logits.tolist(), labels.tolist()):
        right[label].append(row.index(max(row)) == label)
    expected = {
        "accuracy": sum(map(sum, right.values())) / clips,
        "class_accuracy": sum(sum(found) / len(found) for found in right.values()) / len(right),
    }
    order = torch.randperm(clips, generator=generator)
    for size in (1, 2, 3, 7, 11):
        metrics = action.Metric(), action.Metric()  # as if on two devices
        for i in range(0, clips, size):
            part = order[i : i + size]
            metrics[i // size % 2].update(logits[part], labels[part], [str(j) for j in part.tolist()])
        metrics[0].merge(metrics[1])
        assert metrics[0].results() == pytest.approx(expected, rel=1e-12)
        assert next(iter(metrics[0].results())) == "accuracy"


def test_accuracy_of_nothing_of_ties_and_of_nan():
    metric = action.Metric()
    assert all(math.isnan(value) for value in metric.results().values())
    metric.update(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0]), ["a"])  # the first of equals
    assert metric.results()["accuracy"] == 1
    metric.update(torch.full((1, 3), math.nan), torch.tensor([0]), ["b"])
    assert metric.results()["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"outputs: expected \(B, K\) for labels of shape \(2,\), got \(3, 3\)"):
        metric.update(torch.eye(3), torch.tensor([0, 1]), ["a", "b"])


# Lists


def lines(*names, labels=True):
    return [f"{name} {CLASSES.index(name.split('/')[0]) + 1}" if labels else name for name in names]


TRAIN = lines(
    "Archery/v_Archery_g08_c01.avi",
    "Archery/v_Archery_g24_c01.avi",
    "HandstandPushups/v_HandStandPushups_g09_c02.avi",
    "HandstandPushups/v_HandStandPushups_g25_c01.avi",
    "PlayingCello/v_PlayingCello_g08_c01.avi",
)
TEST = lines("Archery/v_Archery_g01_c01.avi", "PlayingCello/v_PlayingCello_g07_c03.avi", labels=False)


def write_lists(root, classes=CLASSES, fold=1, folder="ucfTrainTestlist", end="\n", **lists):
    lists = {"train": TRAIN, "test": TEST} | lists
    (root / folder).mkdir(parents=True, exist_ok=True)
    texts = {"classInd": [f"{i} {name}" for i, name in enumerate(classes, 1)]}
    texts |= {f"{split}list{fold:02}": rows for split, rows in lists.items()}
    for name, rows in texts.items():
        (root / folder / f"{name}.txt").write_bytes((end.join(rows) + end).encode())
    return root


def write_clips(root, names, sound=True, folder="UCF-101"):
    for i, name in enumerate(names):
        path = root / folder / name.split()[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = tone(500, 2, 16000) if sound else None
        encode(path, [(100 * k, color) for k, (_, color) in enumerate(film(2))][i:], wave, **AVI)
    return root


AVI = {"codec": "mpeg4", "sound_codec": "pcm_s16le"}


def ids(rows):
    return [row.id for row in rows]


@pytest.mark.parametrize("folder", ["ucfTrainTestlist", "."])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \r\n"])
def test_lists_are_read(tmp_path, folder, end):
    write_lists(tmp_path, folder=folder, end=end)
    assert action.classes_of(tmp_path) == CLASSES
    splits = action.read_splits(tmp_path, CLASSES)
    assert list(splits) == ["train", "val", "test"]
    assert ids(splits["train"]) == ["v_Archery_g08_c01", "v_HandStandPushups_g09_c02", "v_PlayingCello_g08_c01"]
    assert ids(splits["val"]) == ["v_Archery_g24_c01", "v_HandStandPushups_g25_c01"]
    assert ids(splits["test"]) == ["v_Archery_g01_c01", "v_PlayingCello_g07_c03"]
    assert splits["val"][1].category == "HandstandPushups"


def test_settle_takes_the_classes_of_the_data_set(tmp_path):
    write_lists(tmp_path)
    config = make_config(classes=("one", "two"))
    assert action.settle(config, tmp_path) == make_config()


def test_folds_and_a_list_for_validation(tmp_path):
    write_lists(tmp_path)
    write_lists(tmp_path, fold=3, train=TRAIN[:2], test=TEST[:1], val=lines("Archery/other.avi"))
    splits = action.read_splits(tmp_path, CLASSES, fold=3)
    assert {split: ids(rows) for split, rows in splits.items()} == {
        "train": ["v_Archery_g08_c01", "v_Archery_g24_c01"],
        "val": ["other"],
        "test": ["v_Archery_g01_c01"],
    }
    with pytest.raises(FileNotFoundError, match=r"expected trainlist02.txt there or in ucfTrainTestlist/, got none"):
        action.read_splits(tmp_path, CLASSES, fold=2)
    with pytest.raises(ValueError, match="fold: expected one of 1, 2, 3, got 4"):
        action.read_splits(tmp_path, CLASSES, fold=4)
    write_lists(tmp_path, train=TRAIN[:1])
    with pytest.raises(
        ValueError, match=r"trainlist01.txt: expected clips of groups 24 or 25, or a vallist .* got none"
    ):
        action.read_splits(tmp_path, CLASSES)


FAULTS = [
    ("Archery/v_Archery_g08_c01.avi 1 1", "expected `CLASS/NAME.avi LABEL`"),
    ("v_Archery_g08_c01.avi 1", "expected `CLASS/NAME.avi LABEL`"),
    ("UCF-101/Archery/v_Archery_g08_c01.avi 1", "expected `CLASS/NAME.avi LABEL`"),
    ("", "expected `CLASS/NAME.avi LABEL`, got ''"),
    ("Archery/v_Archery_g08_c01.avi 2", "expected the label 1 of Archery, got '2'"),
    ("Archery/v_Archery_g08_c01.avi one", "expected the label 1 of Archery, got 'one'"),
    ("Swimming/v_Swimming_g08_c01.avi 1", "expected a class of classInd.txt, got 'Swimming'"),
    ("../v_Archery_g08_c01.avi 1", "expected a class that is a plain file name, got '..'"),
    ("Archery/.. 1", "expected a clip that is a plain file name, got '..'"),
    ("Archery/..\\x.avi 1", "expected a clip that is a plain file name"),
    ("Archery/C:x.avi 1", "expected a clip that is a plain file name, got 'C:x.avi'"),
    ("/x.avi 1", "expected a class that is a plain file name, got ''"),
    ("Archery/v_Archery_g24_c01.avi 1", "expected each clip once, by a name of its own, got 'v_Archery_g24_c01' again"),
    ("PlayingCello/v_Archery_g24_c01.avi 3", "expected each clip once, by a name of its own, got 'v_Archery_g24_c01'"),
]


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_a_broken_line_is_one_clear_error(tmp_path, line, message):
    write_lists(tmp_path, train=[*TRAIN[:2], line, *TRAIN[2:]])
    path = tmp_path / "ucfTrainTestlist" / "trainlist01.txt"
    with pytest.raises(ValueError, match="line 3") as caught:
        action.read_list(path, CLASSES)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}, line 3: expected ")
    report = action.verify(write_clips(tmp_path, [*TRAIN, *TEST]), make_config())
    assert not report.ok
    assert report.problems == (str(caught.value),)
    assert report.splits == {"train": 3, "val": 2, "test": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1 Archery\n3 PlayingCello\n", "line 2: expected `2 CLASS`, got '3 PlayingCello'"),
        (b"Archery\nPlayingCello\n", "line 1: expected `1 CLASS`, got 'Archery'"),
        (b"1 Archery\n2 Archery\n", "line 2: expected each class once, got 'Archery' again"),
        (b"1 Archery\n2 ../x\n", "line 2: expected a class that is a plain file name, got '../x'"),
        (b"1 Archery\n", "expected at least two classes, got 1"),
        (b"\n\n", "expected a line for each entry, got an empty file"),
        (b"1 \xff\xfe\n", "expected UTF-8 text, got byte 0xff"),
    ],
)
def test_a_broken_list_of_classes(tmp_path, text, message):
    write_lists(tmp_path)
    (tmp_path / "ucfTrainTestlist" / "classInd.txt").write_bytes(text)
    with pytest.raises(ValueError, match=r"classInd\.txt") as caught:
        action.classes_of(tmp_path)
    assert message in str(caught.value)
    report = action.verify(tmp_path, make_config())
    assert report.problems == (str(caught.value),)


def test_ucf101s_classes():
    assert len(set(UCF101_CLASSES)) == 101
    assert list(UCF101_CLASSES) == sorted(UCF101_CLASSES, key=str.lower)
    assert [UCF101_CLASSES[i - 1] for i in (1, 23, 37, 48, 101)] == [
        *("ApplyEyeMakeup", "CricketBowling", "HandstandPushups", "JumpRope", "YoYo")
    ]


# The data set


@pytest.mark.parametrize("folder", ["UCF-101", "."])
def test_an_item_is_a_clip(tmp_path, folder):
    write_clips(write_lists(tmp_path), [*TRAIN, *TEST], folder=folder)
    dataset = action.Dataset(tmp_path, "train", make_config())
    assert len(dataset) == 3
    item = dataset[1]
    assert item["id"] == "v_HandStandPushups_g09_c02"
    assert item["labels"].dtype == torch.int64
    assert item["labels"].shape == ()
    assert item["labels"] == 1
    clip = media.load_clip(
        tmp_path / folder / "HandstandPushups" / "v_HandStandPushups_g09_c02.avi",
        frames=4,
        img_size=32,
        spectrogram=WHOLE,
        frame_rate=None,
    )
    assert torch.equal(item["audio"], clip.audio)
    assert torch.equal(item["video"], clip.video)
    batch = {name: item[name][None] for name in ("audio", "video")}
    assert {name: x.shape for name, x in action.inputs(make_config(), **batch).items()} == {
        "audio": (1, 3, 32, 32),
        "video": (1, 3, 4, 32, 32),
    }
    assert not item["silent"]


def test_frames_are_spread_over_the_whole_clip(tmp_path):
    colours = [(100 * i, [8 * i] * 3) for i in range(30)]
    path = tmp_path / "UCF-101" / "Archery" / "v_Archery_g08_c01.avi"
    path.parent.mkdir(parents=True)
    encode(path, colours, codec="ffv1", pix_fmt="bgr0", size=(8, 8))
    write_lists(tmp_path)
    video = action.Dataset(tmp_path, "train", make_config())[0]["video"]
    assert (media.denormalise(video)[:, 16, 16, 0] // 8).tolist() == [0, 9, 19, 29]


def test_clips_without_sound_are_silent_and_counted(tmp_path):
    write_lists(tmp_path)
    write_clips(tmp_path, TRAIN[:3], sound=False)
    write_clips(tmp_path, [*TRAIN[3:], *TEST])
    dataset = action.Dataset(tmp_path, "train", make_config(), cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        items = [dataset[i] for _ in range(2) for i in range(3)]
    floor = (math.log(np.finfo(np.float32).eps) - WHOLE.mean) / (2 * WHOLE.std)
    for item, silent in zip(items, (True, True, False) * 2):
        assert ((item["audio"] - floor).abs().max() < 1e-4) == silent == item["silent"]
    batch = tasks.collate(items[:3])
    assert batch.silent == ("v_Archery_g08_c01", "v_HandStandPushups_g09_c02")
    assert set(batch.inputs) == {"audio", "video"}
    report = action.verify(tmp_path, make_config(), decode=True, workers=0)
    assert report.ok
    assert report.silent == ("v_Archery_g08_c01", "v_HandStandPushups_g09_c02", "v_Archery_g24_c01")
    assert "fold 1, 3 clips without sound" in str(report)
    assert sum("silence" in note for note in report.notes) == 1


def test_clips_that_cannot_be_read(tmp_path):
    write_clips(write_lists(tmp_path), [*TRAIN[1:], *TEST])
    broken = tmp_path / "UCF-101" / "PlayingCello" / "v_PlayingCello_g08_c01.avi"
    broken.write_bytes(b"RIFF" + bytes(100))
    dataset = action.Dataset(tmp_path, "train", make_config())
    assert isinstance(dataset[0], media.MediaError)
    assert "v_Archery_g08_c01.avi: expected a file, got nothing" in str(dataset[0])
    assert isinstance(dataset[2], media.MediaError)
    report = action.verify(tmp_path, make_config(), decode=True, workers=0)
    assert report.missing == {"train": ("v_Archery_g08_c01",), "val": (), "test": ()}
    assert report.problems[0] == "train: 1 of 3 clips have no file: v_Archery_g08_c01"
    assert len(report.undecodable) == 1
    assert report.undecodable[0].startswith(f"{broken}: expected a media file")
    assert action.verify(tmp_path, make_config()).undecodable == ()
    kept = action.Dataset(tmp_path, "train", make_config(), skip=("v_Archery_g08_c01", "v_PlayingCello_g08_c01"))
    assert ids(kept.rows) == ["v_HandStandPushups_g09_c02"]


def test_a_data_set_of_other_classes_is_refused(tmp_path):
    write_lists(tmp_path)
    with pytest.raises(ValueError, match="classes: expected the configuration's, number 2 'Diving', got 'Handstand"):
        action.Dataset(tmp_path, "train", make_config(classes=("Archery", "Diving", "PlayingCello")))
    with pytest.raises(ValueError, match="classes: expected the configuration's 2, got 3: Archery, Handstand"):
        action.Dataset(tmp_path, "train", make_config(classes=("Archery", "Diving")))
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'dev'"):
        action.Dataset(tmp_path, "dev", make_config())
    with pytest.raises(FileNotFoundError, match=r"expected classInd.txt there or in ucfTrainTestlist/, got none"):
        action.Dataset(tmp_path / "nothing", "train", make_config())
    assert action.verify(tmp_path / "nothing", make_config()).problems == (
        f"{tmp_path / 'nothing'}: expected classInd.txt there or in ucfTrainTestlist/, got none",
    )


def test_verify_reports_what_is_in_two_splits(tmp_path):
    test = [*TEST, "Archery/v_Archery_g08_c01.avi", "PlayingCello/v_PlayingCello_g08_c09.avi"]
    report = action.verify(write_clips(write_lists(tmp_path, test=test), [*TRAIN, *test]), make_config())
    assert report.problems == ("1 clips are in train and test: v_Archery_g08_c01",)
    write_lists(tmp_path, test=[*TEST, test[-1]])
    report = action.verify(tmp_path, make_config())
    assert report.ok
    assert "1 clips of train are of a group that is also in test: v_PlayingCello_g08_c01" in report.notes
    assert "val: 2 clips of groups 24 and 25, held out of the training list" in report.notes


@pytest.mark.parametrize(("fold", "train", "test"), [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_verify_knows_ucf101s_sizes(tmp_path, fold, train, test):
    config = make_config(classes=UCF101_CLASSES)
    names = [f"{UCF101_CLASSES[i % 101]}/v_{i}_g{i % 25 + 1:02}_c01.avi" for i in range(13320)]
    write_lists(tmp_path, UCF101_CLASSES, fold, train=names[:train], test=names[train:])
    report = action.verify(tmp_path, config, fold=fold)
    assert not any("UCF101 has" in note for note in report.notes)
    assert report.published
    assert report.splits["train"] + report.splits["val"] == train
    assert len(report.missing["test"]) == test
    assert max(map(len, str(report).splitlines())) < 300
    write_lists(tmp_path, UCF101_CLASSES, fold, train=names[1:train], test=names[train:])
    report = action.verify(tmp_path, config, fold=fold)
    notes = report.notes
    assert not report.published
    assert f"train list: UCF101 has {train}, got {train - 1}" in notes
    assert "clips: UCF101 has 13320, got 13319" in notes
