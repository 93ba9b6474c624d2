import av
import numpy as np
import pytest

from lavish_fast import synthetic
from lavish_fast.synthetic import CATEGORIES, FPS, SAMPLE_RATE, ave
from lavish_fast.synthetic.ave import BACKGROUND, SECONDS, SPLITS

SIZES = {"train": 8, "val": 2, "test": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    calls = []
    folder = tmp_path_factory.mktemp("synthetic") / "new" / "folder"
    written = ave.write_dataset(folder, **SIZES, seed=3, progress=lambda *c: calls.append(c))
    assert written == folder
    assert calls == [(i + 1, 12) for i in range(12)]
    return folder


@pytest.fixture(scope="module")
def decoded(root):
    """Per clip: the truth, frames (90, H, W, 3) and the wave (samples,)."""
    return [(clip, *_decode(root, clip)) for split in SPLITS for clip in ave.read_clips(root, split)]


@pytest.fixture(scope="module")
def many():
    return [ave.plan_clip(1, i) for i in range(4000)]


def _decode(root, clip):
    path = str(root / "videos" / f"{clip.id}.mp4")
    with av.open(path) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    with av.open(path) as file:
        wave = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
    return frames, wave


def _rows(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_index_files_have_the_format_of_ave(root):
    rows = _rows(root / "Annotations.txt")
    splits = [_rows(root / f"{split}Set.txt") for split in SPLITS]
    assert [len(s) for s in splits] == list(SIZES.values())
    assert [row for split in splits for row in split] == rows
    assert len(set(rows)) == 12
    for row in rows:
        category, clip, quality, start, end = row.split("&")
        assert category in CATEGORIES
        assert (root / "videos" / f"{clip}.mp4").is_file()
        assert quality == "good"
        assert 0 <= int(start) < int(end) <= SECONDS
    assert {row.split("&")[0] for row in splits[0]} == set(CATEGORIES)
    assert not any(c.lower() in row.split("&")[1] for row in rows for c in CATEGORIES)


def test_files_are_h264_and_aac_of_ten_seconds(root):
    for row in _rows(root / "Annotations.txt")[:3]:
        with av.open(str(root / "videos" / f"{row.split('&')[1]}.mp4")) as file:
            video, audio = file.streams.video[0], file.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert float(video.duration * video.time_base) == pytest.approx(SECONDS)
            assert float(audio.duration * audio.time_base) == pytest.approx(SECONDS, abs=0.05)
            assert (video.width, video.height, video.average_rate) == (128, 128, FPS)
            assert (audio.rate, audio.layout.name) == (SAMPLE_RATE, "mono")
            assert [frame.time for frame in file.decode(video=0)] == pytest.approx(np.arange(90) / FPS)


def test_the_bytes_depend_on_the_seed_alone(root, tmp_path):
    again = ave.write_dataset(tmp_path / "again", **SIZES, seed=3, workers=1)
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert len(files) == 12 + 5
    assert [f for f in files if (root / f).read_bytes() != (again / f).read_bytes()] == []

    other = ave.write_dataset(tmp_path / "other", train=1, val=0, test=0, seed=4, workers=1)
    first = "videos/clip_0000.mp4"
    assert (other / first).read_bytes() != (root / first).read_bytes()


def test_an_event_is_what_is_seen_and_heard(many):
    for clip in many:
        assert 0 <= clip.start < clip.end <= SECONDS
        assert len(clip.seen) == len(clip.heard) == SECONDS
        for seen, heard, label in zip(clip.seen, clip.heard, clip.labels):
            assert label == (seen if seen is not None and seen == heard else BACKGROUND)
            if label != BACKGROUND:
                assert label == clip.category
    for first in range(0, len(many), 8):
        group = many[first : first + 8]
        assert {clip.category for clip in group} == set(CATEGORIES)
        assert sorted(clip.end - clip.start for clip in group) == [2, 3, 4, 5, 6, 7, 8, 10]


def test_background_has_every_kind_of_distractor(many):
    kinds = [
        (clip.seen[k] and "object", clip.heard[k] and "sound", clip.category in (clip.seen[k], clip.heard[k]))
        for clip in many
        for k, label in enumerate(clip.labels)
        if label == BACKGROUND
    ]
    expected = {
        ("object", None, True): 0.15,
        (None, "sound", True): 0.15,
        (None, None, False): 0.05,
        ("object", "sound", True): 0.65,
    }
    assert set(kinds) == set(expected)
    for kind, share in expected.items():
        assert kinds.count(kind) / len(kinds) == pytest.approx(share, abs=0.02)


def test_one_modality_is_not_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(ave, "_write_clip", lambda *job: None)
    ave.write_dataset(tmp_path, train=3200, val=8, test=1600, seed=5, workers=1)
    accuracies = ave.perfect_senses(tmp_path, "test")
    assert set(accuracies) == {"audio+video", "video", "audio", "chance"}
    assert accuracies["audio+video"] == 1
    assert accuracies["video"] == pytest.approx(0.65, abs=0.015)
    assert accuracies["audio"] == pytest.approx(0.65, abs=0.015)
    assert accuracies["chance"] == 7 / 16


def test_the_default_data_set_keeps_the_modalities_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(ave, "_write_clip", lambda *job: None)
    ave.write_dataset(tmp_path, workers=1)
    for split in SPLITS:
        accuracies = ave.perfect_senses(tmp_path, split)
        assert accuracies["audio+video"] == 1
        assert 0.6 <= accuracies["video"] <= 0.7
        assert 0.6 <= accuracies["audio"] <= 0.7


def test_frames_show_what_the_truth_says(decoded):
    # The background is muted noise, an object is one saturated or dark patch: the same clip's empty scene is drawn
    # again and compared with the file's frames.
    for number, (clip, frames, _) in enumerate(decoded):
        assert frames.shape == (SECONDS * FPS, 128, 128, 3)
        empty = np.stack(list(synthetic.frames(synthetic.generator(3, number, "video"), (None,) * SECONDS)))
        changed = (np.abs(frames.astype(int) - empty).max(axis=3) > 45).mean(axis=(1, 2))
        shown = np.repeat([seen is not None for seen in clip.seen], FPS)
        assert changed[shown].min() > 0.01
        assert changed[~shown].max(initial=0) < 0.002


def test_sounds_are_where_the_truth_says(decoded):
    silent, sounding = [], []
    for clip, _, wave in decoded:
        assert len(wave) == pytest.approx(SECONDS * SAMPLE_RATE, abs=1024)
        for k, heard in enumerate(clip.heard):
            second = wave[k * SAMPLE_RATE : (k + 1) * SAMPLE_RATE]
            (silent if heard is None else sounding).append(np.abs(second).max())
    assert silent
    assert max(silent) < 0.07 < 0.1 < min(sounding)


def test_no_audio_window_of_ave_hears_another_second(decoded):
    # linspace(0, len - 17600, 10) starts window k up to 0.1 s before second k.
    for number, (clip, _, wave) in enumerate(decoded):
        clean = synthetic.waveform(synthetic.generator(3, number, "audio"), clip.heard)
        noise = synthetic.waveform(synthetic.generator(3, number, "audio"), (None,) * SECONDS)
        sound = clean - noise
        for length in (len(clean), len(wave)):
            for k, start in enumerate(np.linspace(0, length - 17600, SECONDS, dtype=int)):
                assert not sound[start : k * SAMPLE_RATE].any()
                assert start + 16000 <= (k + 1) * SAMPLE_RATE
                if clip.heard[k] is not None:
                    assert sound[start : start + 16000].any()


def test_sound_and_picture_are_in_step(decoded):
    # The file's sound against what went into the encoder: AAC's delay must be gone.
    for number, (clip, _, wave) in enumerate(decoded[:4]):
        clean = synthetic.waveform(synthetic.generator(3, number, "audio"), clip.heard)
        size = 1 << 19
        match = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(clean, size).conj(), size)
        lag = int(match.argmax())
        assert min(lag, size - lag) <= 2


@pytest.mark.parametrize("index", [None, *range(len(CATEGORIES))])
def test_single_pictures_and_sounds(index):
    rng = np.random.default_rng(0)
    for size in (64, 96):
        image = synthetic.random_image(rng, index, size)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
    for rate, seconds in ((16000, 1.0), (32000, 1.5)):
        sound = synthetic.random_sound(rng, index, seconds, rate)
        assert sound.shape == (round(seconds * rate),)
        assert sound.dtype == np.float32
        assert (np.abs(sound).max() > 0.1) == (index is not None)
        assert np.abs(sound).max() <= 1


def test_shapes_differ_in_every_orientation():
    # Drawn alone, the same size: no turn of one shape covers another.
    blank = np.zeros((96, 96, 3), np.uint8)
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)

    def mask(index, angle):
        return synthetic.render_frame(blank, index, 0.5, 0.5, angle, size=0.6, colour=np.full(3, 250.0))[..., 0] > 99

    upright = [mask(i, 0.0) for i in range(len(CATEGORIES))]
    for i, shape in enumerate(upright):
        for j in range(i):
            overlaps = [(shape & m).sum() / (shape | m).sum() for m in (mask(j, angle) for angle in turns)]
            assert max(overlaps) < 0.9, (CATEGORIES[i], CATEGORIES[j])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": -1}, "train: expected at least 0, got -1"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"train": 0, "val": 0, "test": 0}, "expected at least one clip, got none"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ave.write_dataset(tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()


def test_an_unknown_split_is_named(root):
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'dev'"):
        ave.read_clips(root, "dev")
