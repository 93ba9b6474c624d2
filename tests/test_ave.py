import os
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavish_fast import media, tasks
from lavish_fast.backbones import Encoded
from lavish_fast.config import AVE_CLASSES, AVEConfig, Config, SwinV2Config
from lavish_fast.tasks import ave
from parity import tiny_config

HEADER = "Category&VideoID&Quality&StartTime&EndTime"
ROWS = [
    "Bark&dog-1&good&0&10",
    "Male speech, man speaking&_talk&good&2&5",
    "Bark&dog-2&good&7&10",
    "Bark&dog-1&good&3&4",
    "Bark&quiet&good&0&0",
    "Male speech, man speaking&talk2&good&9&10",
]
CLASSES = ("Bark", "Male speech, man speaking", "background")


def make_config(classes=CLASSES, frames=10):
    backbone = SwinV2Config(
        img_size=32, embed_dim=16, depths=(1,), num_heads=(1,), window_size=4, pretrained_window_sizes=(0,)
    )
    return Config(backbone=backbone, classes=classes, frames=frames)


def write_order(folder, **orders):
    for split, order in orders.items():
        with h5py.File(folder / f"{split}_order.h5", "w") as file:
            file["order"] = np.array(order, dtype=np.int64)


def write_index(root, rows=ROWS, text=None):
    root.mkdir(exist_ok=True, parents=True)
    (root / "Annotations.txt").write_bytes(("\n".join(rows) if text is None else text).encode())
    write_order(root, train=[0, 1, 5], val=[2], test=[3, 4])
    return root


# Head and loss


def test_head_is_two_linear_maps_and_a_softmax():
    config = tiny_config(classes=("a", "b", "c", "background"), head=AVEConfig(hidden=5))
    head, width = ave.Head(config).double(), config.width
    audio, video = torch.randn(2, 7, width, dtype=torch.float64)
    x = torch.cat((video, audio), 1)  # as the released Swin-V2 network has them
    w = head.fc2.weight @ head.fc1.weight
    logits = x @ w.T + head.fc2.weight @ head.fc1.bias + head.fc2.bias
    torch.testing.assert_close(head(Encoded([], [audio, video])), logits.softmax(1))
    shapes = [tuple(p.shape) for p in ave.Head(tiny_config()).parameters()]
    assert shapes == [(512, 2 * width), (512,), (3, 512), (3,)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_mean_binary_cross_entropy(dtype):
    probabilities = torch.rand(6, 4, dtype=torch.float64).softmax(1).to(dtype).requires_grad_()
    labels = torch.tensor([[0, 3, 1], [2, 2, 0]])
    expected = 0.0
    for row, label in zip(probabilities.double(), labels.flatten().tolist()):
        expected -= sum((p if k == label else 1 - p).log() for k, p in enumerate(row)) / 24
    loss = ave.loss(probabilities, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert probabilities.grad.isfinite().all()
    assert ave.loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1]])).item() == 100  # BCELoss bounds each logarithm


def test_importing_the_head_imports_no_decoder():
    code = "import sys, lavish_fast.tasks.ave; sys.exit(bool({'av', 'torchaudio', 'h5py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Metric


def decide_by_hand(probabilities, seconds, rule):
    """Plain Python, second by second."""
    rows = probabilities.tolist()
    decided = []
    for clip in (rows[i : i + seconds] for i in range(0, len(rows), seconds)):
        background = len(clip[0]) - 1
        if rule == "argmax":
            decided.append([row.index(max(row)) for row in clip])
            continue
        means = [sum(row[k] for row in clip) / seconds for k in range(background)]
        event = means.index(max(means))
        decided.append([event if 1 - row[-1] > 0.5 else background for row in clip])
    return decided


@pytest.mark.parametrize("rule", ave.RULES)
@pytest.mark.parametrize("seed", range(20))
def test_accuracy_equals_counting_by_hand_whatever_the_batch_size(rule, seed):
    generator = torch.Generator().manual_seed(seed)
    clips, seconds, classes = 7, 1 + seed % 10, 2 + seed % 28
    logits = torch.randn(clips * seconds, classes, generator=generator, dtype=torch.float64) * 2
    logits[:, -1] += 1
    probabilities = logits.softmax(1)
    labels = torch.randint(classes, (clips, seconds), generator=generator)
    by_hand = decide_by_hand(probabilities, seconds, rule)
    correct = sum(a == b for row, truth in zip(by_hand, labels.tolist()) for a, b in zip(row, truth))
    assert ave.decide(probabilities, seconds, rule).tolist() == by_hand
    for size in (1, 2, 3, 7):
        metric = ave.Metric(rule)
        for i in range(0, clips, size):
            metric.update(probabilities[i * seconds : (i + size) * seconds], labels[i : i + size])
        assert (metric.correct, metric.total) == (correct, clips * seconds)
        assert metric.results()["segment accuracy"] == correct / (clips * seconds)


def test_ties_and_the_two_rules():
    probabilities = torch.tensor([[0.4, 0.4, 0.2], [0.0, 0.5, 0.5], [0.2, 0.4, 0.4], [0.3, 0.0, 0.7]])
    assert ave.decide(probabilities, 4, "argmax").tolist() == [[0, 1, 1, 2]]
    # Class 1 has the highest mean; a background probability of exactly 0.5 is no event.
    assert ave.decide(probabilities, 4, "cmbs").tolist() == [[1, 2, 1, 2]]


def test_cmbs_rule_gives_equal_means_to_the_first_class():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    assert ave.decide(probabilities, 2, "cmbs").tolist() == [[0, 0]]
    assert ave.decide(probabilities, 2, "argmax").tolist() == [[0, 1]]


def test_accuracy_of_nothing_and_of_all_wrong():
    metric = ave.Metric()
    assert np.isnan(metric.results()["segment accuracy"])
    metric.update(torch.eye(3), torch.tensor([[1, 2, 0]]))
    assert metric.results() == {"segment accuracy": 0.0, "correct": 0, "total": 3}
    with pytest.raises(ValueError, match=r"probabilities: expected \(B\*T, K\) for labels of shape \(1, 4\)"):
        metric.update(torch.eye(3), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="rule: expected one of argmax, cmbs, got 'best'"):
        ave.decide(torch.eye(3), 3, "best")


# Annotations


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_annotations_of_each_flavour(tmp_path, header, mark, newline, end):
    path = tmp_path / "Annotations.txt"
    lines = [HEADER] * header + ROWS
    path.write_bytes((mark + newline.join(lines) + end.replace("\n", newline)).encode())
    rows = ave.read_annotations(path)
    assert rows[:2] == (
        ave.Annotation("Bark", "dog-1", 0, 10),
        ave.Annotation("Male speech, man speaking", "_talk", 2, 5),
    )
    assert len(rows) == 6
    assert ave.class_names(rows) == CLASSES


def test_labels_of_the_seconds():
    labels = [ave.segment_labels(row, CLASSES, 10).tolist() for row in map(ave._parse_row, ROWS)]
    assert labels[0] == [0] * 10
    assert labels[1] == [2, 2, 1, 1, 1, 2, 2, 2, 2, 2]
    assert labels[3] == [2, 2, 2, 0] + [2] * 6
    assert labels[4] == [2] * 10
    assert ave.segment_labels(ave.Annotation("Bark", "a", 1, 10), CLASSES, 3).tolist() == [2, 0, 0]
    assert ave.segment_labels(ave.Annotation("Bark", "a", 5, 2), CLASSES, 10).tolist() == [2] * 10
    assert ave.segment_labels(ave._parse_row(ROWS[0]), CLASSES, 10).dtype == torch.int64


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Bark&a&good&0", "Category&VideoID"),
        ("", "Category&VideoID"),
        ("Bark&a&good&0&1&2", "Category&VideoID"),
        ("&a&good&0&1", "category of an event, got ''"),
        ("background&a&good&0&1", "category of an event, got 'background'"),
        ("Bark&a&good&-1&1", "whole seconds, got '-1'"),
        ("Bark&a&good&0&1.5", "whole seconds, got '1.5'"),
        ("Bark&a&good&0&", "whole seconds, got ''"),
        ("Bark&a&good&0&٣", "whole seconds"),
        ("Bark&a&good&0&" + "9" * 5000, "whole seconds"),
        ("Bark&&good&0&1", "video id that is a plain file name, got ''"),
        *((f"Bark&{name}&good&0&1", "plain file name") for name in ("../a", "a/b", "/etc/passwd", "..", ".", "a\\b")),
        *((f"Bark&{name}&good&0&1", "plain file name") for name in ("C:a", "a\0b", "a\tb", "a..b")),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = tmp_path / "Annotations.txt"
    path.write_text("\n".join([HEADER, ROWS[0], row, ROWS[1]]))
    with pytest.raises(ValueError, match=rf"Annotations\.txt, line 3: expected .*{re.escape(message)}"):
        ave.read_annotations(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", HEADER.encode(), b"Bark&\xff&good&0&1"])
def test_a_file_without_rows_is_named(tmp_path, content):
    path = tmp_path / "Annotations.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Annotations\.txt: expected .* got"):
        ave.read_annotations(path)


@given(st.text(max_size=40) | st.lists(st.text("aB/.\\&10-", max_size=6), max_size=7).map("&".join))
def test_any_line_is_a_safe_row_or_one_clear_error(line):
    try:
        row = ave._parse_row(line)
    except ValueError as caught:
        error = str(caught)
    else:
        error = "expected, got"
        assert line.split("&")[:2] == [row.category, row.video_id]
        assert (Path("/data") / f"{row.video_id}.mp4").resolve().parent == Path("/data")
        assert row.start >= 0
        assert row.end >= 0
    assert re.match("expected.* got", error, re.DOTALL)


@given(
    st.lists(
        st.builds(
            ave.Annotation,
            st.sampled_from(["Bark", "Clock, tower", "Bus"]),
            st.from_regex(r"[A-Za-z0-9_-]{1,11}", fullmatch=True),
            st.integers(0, 12),
            st.integers(0, 12),
        ),
        min_size=1,
    )
)
def test_rows_survive_writing_and_reading(rows):
    lines = [f"{r.category}&{r.video_id}&good&{r.start}&{r.end}" for r in rows]
    assert [ave._parse_row(line) for line in lines] == rows
    labels = [ave.segment_labels(r, ave.class_names(rows), 10) for r in rows]
    for row, got in zip(rows, labels):
        inside = [row.start <= second < row.end for second in range(10)]
        assert [ave.class_names(rows)[k] for k in got] == [row.category if i else "background" for i in inside]


# Splits

LISTS = {
    "order": {},
    "set": {
        "trainSet.txt": [ROWS[0], ROWS[1], ROWS[5]],
        "valSet.txt": [ROWS[2]],
        # The second row has other times than Annotations.txt: its video's rows are meant.
        "testSet.txt": [ROWS[3], "Bark&quiet&good&0&3"],
    },
    "set with a header": {
        "trainSet.txt": [HEADER, ROWS[0], ROWS[1], ROWS[5]],
        "valSet.txt": [HEADER, ROWS[2]],
        "testSet.txt": [HEADER, ROWS[3], ROWS[4]],
    },
    "ids": {"train.txt": ["dog-1", "_talk", ""], "val.txt": ["talk2", "dog-2 "], "test.txt": ["quiet"]},
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("folder", ["", "data"])
def test_splits_of_each_kind(tmp_path, kind, folder):
    root = write_index(tmp_path / folder)
    annotations = ave.read_annotations(root / "Annotations.txt")
    if LISTS[kind]:
        for path in root.glob("*_order.h5"):
            path.unlink()
    for name, lines in LISTS[kind].items():
        (root / name).write_text("\n".join(lines))
    expected = {"train": (0, 1, 5), "val": (2,), "test": (3, 4)}
    if kind == "ids":  # an id stands for all its rows
        expected = {"train": (0, 3, 1), "val": (5, 2), "test": (4,)}
    assert ave.read_splits(tmp_path, annotations) == expected


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("range", ValueError, r"val_order\.h5: expected row indices from 0 to 5, got 6"),
        ("negative", ValueError, r"val_order\.h5: expected row indices from 0 to 5, got -1"),
        ("floats", ValueError, r"val_order\.h5: expected a list of row indices, got shape \(1,\) of float64"),
        ("shape", ValueError, r"val_order\.h5: expected a list of row indices, got shape \(1, 1\)"),
        ("name", ValueError, r"val_order\.h5: expected an HDF5 file with a data set named order"),
        ("group", ValueError, r"val_order\.h5: expected"),
        ("text", ValueError, r"val_order\.h5: expected an HDF5 file"),
        ("missing", FileNotFoundError, r"expected val_order\.h5 beside the other splits, got none"),
        ("none", FileNotFoundError, r"expected train_order\.h5, trainSet\.txt or train\.txt"),
        ("unknown id", ValueError, r"val\.txt: expected ids of Annotations\.txt, got 'elsewhere'"),
        ("unknown row", ValueError, r"valSet\.txt: expected ids of Annotations\.txt, got 'elsewhere'"),
        ("bad row", ValueError, r"valSet\.txt, line 1: expected Category"),
    ],
)
def test_faulty_splits_are_named(tmp_path, fault, error, message):
    write_index(tmp_path)
    annotations = ave.read_annotations(tmp_path / "Annotations.txt")
    path = tmp_path / "val_order.h5"
    if fault in ("range", "negative"):
        write_order(tmp_path, val=[6 if fault == "range" else -1])
    elif fault in ("floats", "shape", "name", "group"):
        with h5py.File(path, "w") as file:
            data = {"floats": np.zeros(1), "shape": np.zeros((1, 1), int), "name": np.zeros(1, int)}
            if fault == "group":
                file.create_group("order")
            else:
                file["other" if fault == "name" else "order"] = data[fault]
    elif fault == "text":
        path.write_text("not an HDF5 file")
    elif fault == "missing":
        path.unlink()
    else:
        for order in tmp_path.glob("*_order.h5"):
            order.unlink()
        if fault != "none":
            suffix = ".txt" if fault == "unknown id" else "Set.txt"
            line = {"unknown id": "elsewhere", "unknown row": "Bark&elsewhere&good&0&1", "bad row": "elsewhere"}[fault]
            for split in ave.SPLITS:
                (tmp_path / f"{split}{suffix}").write_text("quiet" if suffix == ".txt" else ROWS[4])
            (tmp_path / f"val{suffix}").write_text(line)
    with pytest.raises(error, match=message):
        ave.read_splits(tmp_path, annotations)


# The data set


def fake_clip(path, *, frames, img_size, spectrogram, frame_rate, patches=False, antialias=False):
    """A clip that tells which file it is of; a file of one byte is a bad one."""
    if not Path(path).is_file():
        raise media.MediaError(path, "expected a file, got none")
    if Path(path).stat().st_size == 1:
        raise media.MediaError(path, "expected a media file, got 1 byte")
    size = float(Path(path).stat().st_size)
    audio = torch.full((frames, spectrogram.frames, spectrogram.mel_bins), size)
    return media.Clip(audio, torch.full((frames, 3, img_size, img_size), size), 10.0, ())


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Five videos in three folders and, for talk2, frames with a wav file."""
    monkeypatch.setattr(media, "load_clip", fake_clip)
    write_index(tmp_path)
    for name, size in {"AVE/dog-1.mp4": 11, "videos/_talk.webm": 12, "dog-2.MKV": 13, "AVE/quiet.mp4": 14}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "videos" / "_talk.json").write_text("{}")
    frames, audio = tmp_path / "frames" / "talk2", tmp_path / "audio"
    frames.mkdir(parents=True)
    audio.mkdir()
    from PIL import Image

    for number in range(1, 4):
        Image.fromarray(np.full((24, 24, 3), 40 * number, np.uint8)).save(frames / f"{number}.jpg")
    with wave.open(str(audio / "talk2.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.zeros(32000, np.int16).tobytes())
    return tmp_path


def test_items_of_each_layout(data):
    config = make_config(frames=4)
    train = ave.Dataset(data, "train", config)
    assert [row.video_id for row in train.rows] == ["dog-1", "_talk", "talk2"]
    assert len(train) == 3
    dog, talk, extracted = (train[i] for i in range(3))
    assert dog["audio"].unique().tolist() == [11]
    assert dog["audio"].shape == (4, 192, 192)
    assert dog["video"].shape == (4, 3, 32, 32)
    assert dog["id"] == "dog-1"
    assert dog["labels"].tolist() == [0] * 4
    assert talk["video"].unique().tolist() == [12]
    assert talk["labels"].tolist() == [2, 2, 1, 1]
    # The first frame is the darkest.
    assert extracted["video"].mean((1, 2, 3)).diff().min() >= 0
    assert extracted["video"].shape == (4, 3, 32, 32)
    assert [row.start for row in ave.Dataset(data, "test", config).rows] == [3, 0]
    assert ave.Dataset(data, "val", config)[0]["video"].unique().tolist() == [13]
    assert len(ave.Dataset(data, "train", config, skip=("dog-1",))) == 2
    # A folder without frames beside its sound is as good as none.
    (data / "frames" / "dog-1").mkdir()
    shutil.copy(data / "audio" / "talk2.wav", data / "audio" / "dog-1.wav")
    assert torch.equal(ave.Dataset(data, "train", config)[0]["video"], dog["video"])


def test_unreadable_clips_are_set_aside(data):
    (data / "AVE" / "dog-1.mp4").write_bytes(b"x")
    (data / "videos" / "_talk.webm").unlink()
    train = ave.Dataset(data, "train", make_config())
    loader = torch.utils.data.DataLoader(train, batch_size=3, collate_fn=tasks.collate, num_workers=1)
    (batch,) = loader
    assert len(batch) == 1
    assert batch.ids == ("talk2",)
    assert batch.inputs["audio"].shape == (1, 10, 192, 192)
    assert batch.labels.tolist() == [[2] * 9 + [1]]
    assert batch.failed == (
        f"{data}/AVE/dog-1.mp4: expected a media file, got 1 byte",
        f"{data}/AVE/_talk.mp4: expected a file, got none",
    )
    nothing = tasks.collate([train[0]])
    assert len(nothing) == 0
    assert nothing.to(torch.device("cpu")).failed == batch.failed[:1]


def test_clips_are_decoded_once_if_cached(data, monkeypatch):
    calls = []
    monkeypatch.setattr(media, "load_clip", lambda path, **options: calls.append(path) or fake_clip(path, **options))
    for cache, expected in ((True, 1), (False, 2)):
        calls.clear()
        dataset = ave.Dataset(data, "val", make_config(), cache=cache)
        assert torch.equal(dataset[0]["video"], dataset[0]["video"])
        assert len(calls) == expected


def test_warnings_and_options_of_the_decoder_are_passed_on(data, monkeypatch):
    def load(path, *, antialias, **options):
        assert antialias
        return fake_clip(path, **options)._replace(warnings=("quiet.mp4: no audio stream",))

    monkeypatch.setattr(media, "load_clip", load)
    with pytest.warns(UserWarning, match=r"quiet\.mp4: no audio stream"):
        ave.Dataset(data, "test", make_config(), antialias=True)[1]


def test_faulty_arguments_of_the_data_set_are_named(data):
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'dev'"):
        ave.Dataset(data, "dev", make_config())
    with pytest.raises(ValueError, match="number 0 'Meow', got 'Bark'"):
        ave.Dataset(data, "val", make_config(("Meow", *CLASSES[1:])))
    with pytest.raises(ValueError, match="classes: expected the configuration's 29, got 3: Bark, Male speech"):
        ave.Dataset(data, "val", make_config(AVE_CLASSES))
    (data / "Annotations.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected Annotations\.txt"):
        ave.Dataset(data, "val", make_config())


# verify


def test_verify_of_a_whole_data_set(data):
    report = ave.verify(data, make_config())
    assert report.ok, report.problems
    assert (report.rows, report.header) == (6, False)
    assert report.splits == {"train": 3, "val": 1, "test": 2}
    assert report.missing == {"train": (), "val": (), "test": ()}
    assert not report.published
    assert report.duplicates == ("dog-1",)
    assert report.shared == {"train and val": (), "train and test": ("dog-1",), "val and test": ()}
    text = str(report)
    for expected in (
        "Annotations.txt: 6 rows, without a header",
        "splits: train 3, val 1, test 2",
        "note: 1 videos have more than one row: dog-1",
        "note: 1 videos are in train and test: dog-1",
        "note: 1 rows have start >= end, so that all is background: quiet",
    ):
        assert expected in text
    assert any("rows end after second 4" in note for note in ave.verify(data, make_config(frames=4)).notes)


def test_verify_reports_each_problem(data):
    (data / "AVE" / "dog-1.mp4").unlink()
    report = ave.verify(data, make_config())
    assert not report.ok
    assert report.missing == {"train": ("dog-1",), "val": (), "test": ("dog-1",)}
    assert report.problems[0] == "train: 1 of 3 videos have no media: dog-1"

    write_index(data, [HEADER, ROWS[0], "Bark&../x&good&0&1", "Bark&a&good&0", *ROWS[1:]])
    report = ave.verify(data, make_config())
    assert report.header
    assert report.rows == 8
    assert [re.search(r"line \d+", text)[0] for text in report.problems] == ["line 3", "line 4"]

    write_index(data)
    assert "classes: expected the configuration's 29" in ave.verify(data, make_config(AVE_CLASSES)).problems[0]
    report = ave.verify(data, make_config(AVE_CLASSES))
    notes = report.notes
    assert not report.published
    assert "Annotations.txt: AVE has 4143 rows, got 6" in notes
    assert "train: AVE has 3339 rows, got 3" in notes
    assert not any("AVE has" in note for note in ave.verify(data, make_config()).notes)

    write_order(data, val=[17])
    assert "got 17" in ave.verify(data, make_config()).problems[0]
    write_order(data, val=[])
    assert "1 rows are in no split" in ave.verify(data, make_config()).notes
    (data / "Annotations.txt").unlink()
    assert "expected Annotations.txt" in ave.verify(data, make_config()).problems[0]
    assert not ave.verify(data / "nowhere", make_config()).ok


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_decodes(tmp_path, workers):
    write_index(tmp_path)
    for row in ROWS:
        (tmp_path / f"{row.split('&')[1]}.mp4").write_bytes(b"x")
    assert ave.verify(tmp_path, make_config()).ok
    report = ave.verify(tmp_path, make_config(), decode=True, workers=workers)
    assert not report.ok
    assert len(report.undecodable) == 5
    assert set(report.undecodable) <= set(report.problems)
    assert report.undecodable[0].startswith(f"{tmp_path}/dog-1.mp4: expected a media file")


# The real index files

AVE = Path(os.environ.get("LAVISH_AVE", Path(__file__).parents[1] / ".." / "shared" / "ave"))
needs_ave = pytest.mark.skipif(
    not (AVE / "Annotations.txt").is_file(), reason="AVE's index files are not in ../shared/ave nor in $LAVISH_AVE"
)


@needs_ave
def test_the_real_index_files():
    annotations = ave.read_annotations(AVE / "Annotations.txt")
    assert len(annotations) == 4143
    assert annotations[0] == ave.Annotation("Church bell", "RUhOCu3LNXM", 0, 10)
    assert ave.class_names(annotations) == AVE_CLASSES == make_config(AVE_CLASSES).classes
    splits = ave.read_splits(AVE, annotations)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3339, "val": 402, "test": 402}
    assert sorted(sum(splits.values(), ())) == list(range(4143))
    # Every event second has the class of its row, and nothing else has.
    labels = torch.stack([ave.segment_labels(row, AVE_CLASSES, 10) for row in annotations])
    assert int((labels != 28).sum()) == sum(row.end - row.start for row in annotations)


@needs_ave
def test_verify_on_the_real_index_files():
    report = ave.verify(AVE, make_config(AVE_CLASSES))
    assert not report.header
    assert report.published
    assert len(report.duplicates) == 45
    assert {pair: len(ids) for pair, ids in report.shared.items()} == {
        "train and val": 10,
        "train and test": 8,
        "val and test": 0,
    }
    # There are no media beside the index files; a video with two rows in a split is named once.
    annotations = ave.read_annotations(AVE / "Annotations.txt")
    for split, rows in ave.read_splits(AVE, annotations).items():
        assert set(report.missing[split]) == {annotations[i].video_id for i in rows}
        assert len(set(report.missing[split])) == len(report.missing[split])
    assert len(report.problems) == 3
    assert "1 rows have start >= end, so that all is background: VWi2ENBuTbw" in report.notes
    assert not any("AVE has" in note for note in report.notes)


@needs_ave
def test_rows_of_the_real_split_lists_are_found(tmp_path):
    # The lists that AVE ships repeat the rows of Annotations.txt.
    (tmp_path / "Annotations.txt").write_bytes((AVE / "Annotations.txt").read_bytes())
    lines = (AVE / "Annotations.txt").read_text(encoding="utf-8").split("\n")
    annotations = ave.read_annotations(AVE / "Annotations.txt")
    orders = ave.read_splits(AVE, annotations)
    for split, order in orders.items():
        (tmp_path / f"{split}Set.txt").write_text("\n".join(lines[i] for i in order), encoding="utf-8")
    assert ave.read_splits(tmp_path, annotations) == orders
