import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import torch

from lavish_fast import decoding, media
from lavish_fast.config import SpectrogramConfig
from lavish_fast.media import MediaError, denormalise, load_clip, load_clips
from lavish_fast.spectrogram import spans_of, spectrograms

SWIN = SpectrogramConfig()
# The colour of a second of film, far enough apart to survive any lossy codec.
COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 30], [30, 220, 220], [220, 30, 220]])


def tone(hertz, seconds, rate, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def film(seconds, rate=10):
    """Pictures with their times in ms: one colour a second."""
    return [(round(1000 * i / rate), COLOURS[int(i / rate) % len(COLOURS)]) for i in range(round(seconds * rate))]


def encode(
    path,
    shots=None,
    sound=None,
    sound_rate=16000,
    size=(64, 48),
    codec="libx264",
    pix_fmt="yuv420p",
    sound_codec="aac",
    sound_start=0.0,
    format=None,
    options=None,
):
    """A file of `shots`, (ms, colour or (H, W, 3) picture) each, and of `sound`, (channels, samples)."""
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        streams = []
        if shots is not None:
            video = container.add_stream(codec, rate=10)
            video.width, video.height, video.pix_fmt = *size, pix_fmt
            video.time_base = video.codec_context.time_base = Fraction(1, 10 if codec == "mpeg4" else 1000)
            if codec == "libx264":
                video.options = {"preset": "ultrafast", "crf": "12", "g": "5"}
            if codec == "libvpx-vp9":
                video.options = {"cpu-used": "8", "deadline": "realtime"}
            if codec == "libsvtav1":
                video.options = {"preset": "13", "crf": "20"}
            streams.append(video)
        if sound is not None:
            audio = container.add_stream(
                sound_codec, rate=sound_rate, layout={1: "mono", 2: "stereo", 8: "7.1"}[len(sound)]
            )
            streams.append(audio)
        for ms, colour in shots or ():
            picture = np.empty((size[1], size[0], 3), np.uint8)
            picture[:] = colour
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), ms
            if codec == "mpeg4":
                frame.time_base, frame.pts = Fraction(1, 10), ms // 100
            container.mux(video.encode(frame))
        if sound is not None and sound.size:
            frame = av.AudioFrame.from_ndarray(sound.T.reshape(1, -1), "flt", audio.layout.name)
            frame.sample_rate, frame.time_base = sound_rate, Fraction(1, sound_rate)
            frame.pts = round(sound_start * sound_rate)
            resampler = av.AudioResampler(audio.format.name, audio.layout.name, sound_rate, audio.frame_size or 1024)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(audio.encode(piece))
        for stream in streams:
            container.mux(stream.encode())
    return str(path)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def colours(clip):
    """The nearest of COLOURS at the middle of each frame, and that it is near."""
    pictures = denormalise(clip.video).numpy().astype(int)
    middle = pictures[:, pictures.shape[1] // 2, pictures.shape[2] // 2]
    distance = np.abs(middle[:, None] - COLOURS).max(-1)
    assert distance.min(1).max() < 40
    return distance.argmin(1).tolist()


def mel_bin(hertz, spectrogram=SWIN):
    def mel(f):
        return 1127 * math.log(1 + f / 700)

    width = (mel(spectrogram.sample_rate / 2) - mel(20)) / (spectrogram.mel_bins + 1)
    return (mel(hertz) - mel(20)) / width - 1


def assert_tone(clip, hertz, seconds=slice(None)):
    peaks = clip.audio[seconds, 40:140].mean(1).argmax(-1)
    assert (peaks - mel_bin(hertz)).abs().max() < 1.5


def assert_silent(audio):
    floor = (math.log(torch.finfo(torch.float32).eps) - SWIN.mean) / (2 * SWIN.std)
    torch.testing.assert_close(audio[:, :188], torch.full_like(audio[:, :188], floor), rtol=0, atol=1e-4)
    assert (audio[:, 188:] == 0).all()


def refused(path, reason, call=load_clip):
    with pytest.raises(MediaError, match=reason) as caught:
        call(path)
    error = caught.value
    assert error.path == os.fspath(path)
    assert str(error) == f"{error.path}: {error.reason}"
    assert "\n" not in str(error)
    assert error.__suppress_context__ or error.__context__ is None
    return error


# Files that give a clip


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mkv", "libx264", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("b.mkv", "libsvtav1", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mov", "mjpeg", "yuvj420p"),
        ("a.ts", "libx264", "yuv420p"),
    ],
)
def test_formats(tmp_path, name, codec, pix_fmt):
    sound = {"webm": "libopus", "mkv": "flac", "avi": "pcm_s16le"}.get(name[2:], "aac")
    wave = tone(1000, 4, 48000, 2)
    path = encode(tmp_path / name, film(4), wave, 48000, codec=codec, pix_fmt=pix_fmt, sound_codec=sound)
    clip = load_clip(path, frames=4, img_size=32)
    assert clip.audio.shape == (4, 192, 192)
    assert clip.video.shape == (4, 3, 32, 32)
    assert clip.audio.dtype == clip.video.dtype == torch.float32
    assert clip.warnings == ()
    assert clip.duration == pytest.approx(4, abs=0.1)
    # ffmpeg extracts 14 frames; the 1st, 5th, 9th and 14th show 0, 0.9, 2.2 and 3.9 s (see EXTRACTED).
    assert colours(clip) == [0, 0, 2, 3]
    assert_tone(clip, 1000)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 1), (16000, 2), (44100, 2), (48000, 2)])
def test_sound_rates(tmp_path, rate, channels):
    wave = tone(700, 2, rate, channels)
    clip = load_clip(encode(tmp_path / "a.mkv", film(2), wave, rate, sound_codec="flac"), frames=2)
    from torchaudio.functional import resample

    expected = torch.from_numpy(wave).mean(0)
    expected = expected if rate == 16000 else resample(expected, rate, 16000)
    # flac holds 16 bits: compare where the tone stands out of their noise
    expected = spectrograms(expected, 2, SWIN, reference=True)
    torch.testing.assert_close(clip.audio[:, :188, 30:60], expected[:, :188, 30:60], rtol=0, atol=0.02)
    assert_tone(clip, 700)


def test_channels_are_averaged(tmp_path):
    wave = np.concatenate([tone(1000, 2, 16000), -tone(1000, 2, 16000)])
    clip = load_clip(encode(tmp_path / "a.mkv", film(2), wave, sound_codec="flac"), frames=2)
    assert_silent(clip.audio)


def test_eight_channels(tmp_path):
    wave = np.zeros((8, 32000), np.float32)
    wave[:2] = tone(1000, 2, 16000)
    path = encode(tmp_path / "a.mkv", film(2), wave)
    with av.open(path) as container:
        assert container.streams.audio[0].codec_context.format.is_planar
    clip = load_clip(path, frames=2, img_size=32)
    assert_tone(clip, 1000)
    assert clip.warnings == ()


def test_each_second_has_its_sound(tmp_path):
    wave = np.concatenate([tone(500 * (i + 1), 1, 16000) for i in range(4)], axis=1)
    clip = load_clip(encode(tmp_path / "a.mkv", film(4), wave, sound_codec="flac"), frames=None, img_size=32)
    assert len(clip.video) == len(clip.audio) == 4
    assert_tone(clip, 500, slice(0, 1))
    assert_tone(clip, 2000, slice(3, 4))
    assert not clip.silent


def test_late_sound_is_preceded_by_silence(tmp_path):
    path = encode(tmp_path / "a.mkv", film(4), tone(1000, 2, 16000), sound_codec="flac", sound_start=2.0)
    clip = load_clip(path, frames=4, img_size=32)
    loud = clip.audio[:, 40:140].amax((1, 2)) > 0.5
    assert loud.tolist() == [False, False, True, True]
    assert clip.duration == pytest.approx(4, abs=0.1)


def test_no_sound(tmp_path):
    path = encode(tmp_path / "a.mp4", film(2))
    clip = load_clip(path, frames=2)
    assert clip.warnings == (f"{path}: no audio stream, silence used",)
    assert clip.silent
    assert_silent(clip.audio)
    assert colours(clip) == [0, 1]


@pytest.mark.parametrize(("samples", "what"), [(0, "no sound could be decoded from"), (16000, "nothing but zeros in")])
def test_sound_stream_without_sound(tmp_path, samples, what):
    path = encode(tmp_path / "a.mkv", film(2), np.zeros((1, samples), np.float32), sound_codec="flac")
    clip = load_clip(path, frames=2)
    assert clip.warnings == (f"{path}: {what} its audio stream, silence used",)
    assert clip.silent
    assert_silent(clip.audio)


@pytest.mark.parametrize("count", [1, 3])
def test_very_short(tmp_path, count):
    wave = tone(1000, 0.3 if count == 3 else 0.01, 16000)
    path = encode(tmp_path / "a.mkv", film(count / 10), wave, sound_codec="flac")
    clip = load_clip(path, frames=10, img_size=32)
    assert colours(clip) == [0] * 10
    assert len(load_clip(path, frames=None, img_size=32).video) == 1
    # The whole of the sound, with zeros up to one second, for each of the ten.
    assert (clip.audio == clip.audio[:1]).all()
    if count == 3:
        assert clip.audio[0, 10:40].max() > 0.5
        assert_silent(clip.audio[:, 70:][:, :118].new_zeros(0, 192, 192))
        assert clip.audio[0, 70:180].max() < -1.4


@pytest.mark.parametrize("size", [(67, 43), (2, 2), (64, 480)])
def test_odd_sizes(tmp_path, size):
    path = encode(tmp_path / "a.mkv", film(2), size=size, codec="ffv1", pix_fmt="bgr0")
    clip = load_clip(path, frames=2, img_size=48)
    assert clip.video.shape == (2, 3, 48, 48)
    assert np.abs(denormalise(clip.video).numpy().astype(int) - COLOURS[:2, None, None]).max() <= 1


def quarters():
    picture = np.empty((64, 96, 3), np.uint8)
    for i in range(4):
        picture[i // 2 * 32 : i // 2 * 32 + 32, i % 2 * 48 : i % 2 * 48 + 48] = COLOURS[i]
    return picture


# A display matrix (a b, c d) takes (x, y) to (a x + c y, b x + d y), y downwards. Quarters: 0 1 over 2 3.
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), [0, 1, 2, 3]),
        ((0, 1, -1, 0), [2, 0, 3, 1]),  # a quarter turn clockwise: the usual upright phone
        ((-1, 0, 0, -1), [3, 2, 1, 0]),
        ((0, -1, 1, 0), [1, 3, 0, 2]),
        ((-1, 0, 0, 1), [1, 0, 3, 2]),  # mirrored
    ],
)
def test_display_matrix(tmp_path, matrix, expected):
    path = encode(tmp_path / "a.mp4", [(0, quarters())], size=(96, 64))
    data = bytearray(read(path))
    at = data.index(b"tkhd") + 44
    a, b, c, d = (v << 16 for v in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    write(path, data)
    picture = denormalise(load_clip(path, frames=1, img_size=64).video)[0].numpy().astype(int)
    corners = picture[[16, 16, 48, 48], [16, 48, 16, 48]]
    assert np.abs(corners[:, None] - COLOURS).max(-1).argmin(1).tolist() == expected


def test_variable_frame_rate(tmp_path):
    # Second 0 has 20 frames, second 1 has one, seconds 2 and 3 have two each: by number nearly all would be red.
    times = [50 * i for i in range(20)] + [1000, 2000, 2500, 3000, 3500]
    path = encode(tmp_path / "a.mkv", [(ms, COLOURS[ms // 1000]) for ms in times])
    # `ffmpeg -r 3` extracts the frames 0 1 4 11 18 21 21 22 23 23 24 24 of this file.
    assert colours(load_clip(path, frames=12, img_size=32)) == [0, 0, 0, 0, 0, 2, 2, 2, 3, 3, 3, 3]
    assert colours(load_clip(path, frames=4, img_size=32)) == [0, 0, 2, 3]


def test_timestamps_far_from_zero(tmp_path):
    shots = [(ms + 20_000, colour) for ms, colour in film(4)]
    clip = load_clip(encode(tmp_path / "a.mkv", shots), frames=4, img_size=32)
    assert colours(clip) == [0, 0, 2, 3]
    assert clip.duration == pytest.approx(4, abs=0.2)


def test_stream_without_timestamps(tmp_path):
    clip = load_clip(encode(tmp_path / "a.h264", film(4), format="h264"), frames=4, img_size=32)
    assert sorted(colours(clip)) == colours(clip)
    assert colours(clip)[0] == 0
    assert len(set(colours(clip))) >= 3


def test_wrong_extension(tmp_path):
    made = encode(tmp_path / "a.mp4", film(2))
    os.rename(made, tmp_path / "a.txt")
    assert colours(load_clip(tmp_path / "a.txt", frames=2, img_size=32)) == [0, 1]


def test_odd_names(tmp_path):
    (tmp_path / "sub").mkdir()
    made = encode(tmp_path / "a.mp4", film(1))
    for name in ("sub/../b.mp4", "c %03d ü\n.mp4", "-d.mp4"):
        os.link(made, tmp_path / name)
        assert load_clip(tmp_path / name, frames=1, img_size=32).video.shape == (1, 3, 32, 32)


def test_big_frame(tmp_path):
    path = encode(tmp_path / "a.mkv", film(0.1), size=(7680, 4320), codec="mjpeg", pix_fmt="yuvj420p")
    assert colours(load_clip(path, frames=1)) == [0]


def test_cover_picture_is_no_video(tmp_path):
    path = str(tmp_path / "a.flac")
    picture = av.CodecContext.create("png", "w")
    picture.width, picture.height, picture.pix_fmt, picture.time_base = 32, 32, "rgb24", Fraction(1)
    png = b"".join(bytes(p) for p in [*picture.encode(av.VideoFrame(32, 32, "rgb24")), *picture.encode(None)])
    data = read(encode(path, None, tone(500, 1, 16000), sound_codec="flac"))
    # A PICTURE block (type 6) goes between STREAMINFO (the first 42 bytes) and the blocks after it.
    kind = b"image/png"
    block = struct.pack(">II", 3, len(kind)) + kind + struct.pack(">6I", 0, 32, 32, 24, 0, len(png)) + png
    assert not data[4] & 0x80
    write(path, data[:42] + b"\x06" + len(block).to_bytes(3, "big") + block + data[42:])
    with av.open(path) as container:
        assert len(container.streams.video) == 1
    refused(path, "expected a video stream, got only")


# Truncated files


def test_truncated_with_its_index_at_the_end(tmp_path):
    path = encode(tmp_path / "a.mp4", film(3), tone(500, 3, 16000))
    data = read(path)
    write(path, data[: len(data) // 2])
    refused(path, r"expected a media file, got \d+ bytes that do not open as one \(.+\)")


@pytest.mark.parametrize("kind", ["mkv", "mp4 with its index in front"])
def test_truncated_but_partly_readable(tmp_path, kind):
    noise = np.random.default_rng(0)
    shots = []
    for ms, colour in film(6):
        picture = np.full((48, 64, 3), colour, np.uint8)
        picture[:8] = noise.integers(0, 255, (8, 64, 3))  # so that every frame takes room in the file
        shots.append((ms, picture))
    options = {} if kind == "mkv" else {"movflags": "faststart"}
    path = encode(tmp_path / f"a.{kind[:3]}", shots, tone(500, 6, 16000), options=options)
    data = read(path)
    write(path, data[: len(data) * 6 // 10])
    clip = load_clip(path, frames=3, img_size=32)
    assert 1 < clip.duration < 5.5
    assert any("ends early, 6." in line for line in clip.warnings)
    assert all(line.startswith(f"{path}: ") for line in clip.warnings)
    found = colours(clip)
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] == int(clip.duration - 0.2)


def test_damaged_in_the_middle(tmp_path):
    path = encode(tmp_path / "a.mkv", film(4), tone(500, 4, 16000), codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(read(path))
    data[len(data) // 3 : len(data) // 3 + 2000] = bytes(2000)
    write(path, data)
    clip = load_clip(path, frames=4, img_size=32)
    assert clip.video.shape == (4, 3, 32, 32)
    assert torch.isfinite(clip.video).all()
    assert torch.isfinite(clip.audio).all()


def test_header_without_frames(tmp_path):
    made = encode(tmp_path / "a.mkv", film(2))
    data = read(made)
    write(made, data[: data.index(b"\x1f\x43\xb6\x75") + 4])  # up to the first cluster
    refused(made, "expected a media file, got|expected at least one frame")
    path = encode(tmp_path / "b.mkv", (), tone(500, 1, 16000), codec="mjpeg", pix_fmt="yuvj420p", sound_codec="flac")
    refused(path, "expected at least one frame, got a video stream without any")


# Files that give none


def test_no_video(tmp_path):
    path = encode(tmp_path / "a.mp4", None, tone(500, 1, 16000))
    refused(path, "expected a video stream, got only 1 audio")


def test_empty(tmp_path):
    (tmp_path / "a.mp4").touch()
    refused(tmp_path / "a.mp4", "expected a media file, got 0 bytes")


@pytest.mark.parametrize(
    "content", [b"Dear Sir or Madam,\n" * 50, bytes(5000), b"\x00\x00\x00\x20ftypisom" + bytes(99)]
)
def test_no_media(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    refused(tmp_path / "a.mp4", rf"expected a media file, got {len(content)} bytes|expected a video stream")


def test_missing_and_directory(tmp_path):
    refused(tmp_path / "none.mp4", "expected a file, got nothing at this path")
    refused(str(tmp_path), "expected a file, got a directory")
    refused("a\0b.mp4", "expected a path, got a null byte")


def test_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    refused(tmp_path / "a.mp4", "expected a regular file, got a pipe")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/a.mp4", "pipe:0", "concat:a.mp4|b.mp4", "file:a.mp4", "rtsp://x", "data:x", "lavfi:x"]
)
def test_protocols_are_refused(url):
    refused(url, "expected a local file, got the protocol")
    refused(url, "expected a local file, got the protocol", media.find_videos)


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile 'real.mp4'\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nreal.mp4\n"]
)
def test_playlists_are_refused(tmp_path, text):
    encode(tmp_path / "real.mp4", film(1))
    (tmp_path / "a.m3u8").write_text(text)
    refused(tmp_path / "a.m3u8", "expected a media file, got")


def test_unreadable(tmp_path):
    path = encode(tmp_path / "a.mp4", film(1))
    os.chmod(path, 0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # permissions do not bind root
    try:
        refused(path, "expected a readable file, got permission denied")
    finally:
        os.seteuid(user)


def test_caps_before_decoding(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mkv", film(2), tone(500, 2, 16000), sound_codec="flac")
    monkeypatch.setattr(decoding, "_keyed_frames", None)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 48 - 1)
    refused(path, r"expected at most 3071 pixels a frame, got 64x48")
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "MAX_SECONDS", 1.5)
    refused(path, r"expected at most 1.5 s, got 2.0 s")


@pytest.mark.parametrize("changes", [{"frames": 0}, {"img_size": 0}])
def test_bad_arguments(tmp_path, changes):
    with pytest.raises(ValueError, match=r"expected at least 1.*got 0") as caught:
        load_clip(encode(tmp_path / "a.mp4", film(1)), **changes)
    assert not isinstance(caught.value, MediaError)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError("a.mp4", "expected one thing,\ngot another")))
    assert (error.path, error.reason) == ("a.mp4", "expected one thing,\ngot another")
    assert str(error) == "a.mp4: expected one thing, got another"


# Sampling


# What `ffmpeg -i FILE.mp4 -r 3 %04d.png` extracts, read off pictures that carry their number.
EXTRACTED = [
    ([i / 1 for i in range(5)], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
    ([i / 5 for i in range(21)], [0, 1, 2, 3, 4, 6, 8, 9, 11, 13, 14, 16, 18, 19]),
    ([i / 10 for i in range(41)], [0, 1, 2, 6, 9, 12, 16, 19, 22, 26, 29, 32, 36, 39]),
    ([i / 25 for i in range(101)], [0, 1, 7, 15, 24, 32, 40, 49, 57, 65, 74, 82, 90, 99]),
    ([i / 20 for i in range(20)] + [1.0, 2.0, 2.5, 3.0, 3.5, 3.6], [0, 1, 5, 12, 19, 20, 21, 21, 22, 23, 23, 24]),
]


@pytest.mark.parametrize(("times", "expected"), EXTRACTED)
def test_frames_seen_at_three_a_second(times, expected):
    durations = [after - before for before, after in pairwise(times)]
    assert decoding.at_frame_rate(times[:-1], durations) == expected


@pytest.mark.parametrize("frames", [1, 2, 10, 40])
def test_chosen_frames(tmp_path, frames):
    # Each picture is of a grey of its own, losslessly.
    shots = [(100 * i, [5 * i, 5 * i, 5 * i]) for i in range(50)]
    path = encode(tmp_path / "a.mkv", shots, codec="ffv1", pix_fmt="bgr0", size=(8, 8))
    numbers = denormalise(load_clip(path, frames=frames, img_size=8).video)[:, 4, 4, 0] // 5
    extracted = decoding.at_frame_rate([i / 10 for i in range(50)], [0.1] * 50)
    chosen = np.linspace(1, len(extracted), frames, dtype=int)
    assert numbers.tolist() == [extracted[i - 1] for i in chosen]


@pytest.mark.parametrize(("shots", "frames"), [(50, 16), (50, 50), (7, 16), (1, 3)])
def test_frames_of_the_file_itself(tmp_path, shots, frames):
    path = encode(
        tmp_path / "a.mkv", [(100 * i, [5 * i] * 3) for i in range(shots)], codec="ffv1", pix_fmt="bgr0", size=(8, 8)
    )
    numbers = denormalise(load_clip(path, frames=frames, img_size=8, frame_rate=None).video)[:, 4, 4, 0] // 5
    assert numbers.tolist() == [int(i * (shots - 1) / max(frames - 1, 1)) for i in range(frames)]


def test_another_frame_rate(tmp_path):
    shots = [(100 * i, [5 * i] * 3) for i in range(50)]
    path = encode(tmp_path / "a.mkv", shots, codec="ffv1", pix_fmt="bgr0", size=(8, 8))
    numbers = denormalise(load_clip(path, frames=50, img_size=8, frame_rate=10.0).video)[:, 4, 4, 0] // 5
    assert numbers.tolist() == list(range(50))
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"frame_rate: expected a positive number or None, got {rate}"):
            load_clip(path, frame_rate=rate)


def picture(seed=0, size=(240, 320)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("antialias", [False, True])
def test_resize(tmp_path, antialias):
    noise = picture()
    path = encode(tmp_path / "a.mkv", [(0, noise)], codec="ffv1", pix_fmt="bgr0", size=(320, 240))
    got = load_clip(path, frames=1, antialias=antialias).video
    x = torch.from_numpy(noise).permute(2, 0, 1)[None].float() / 255
    x = torch.nn.functional.interpolate(x, (192, 192), mode="bicubic", align_corners=False, antialias=antialias)
    assert x.max() > 1.01  # the overshoot is kept
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(got, (x - mean[:, None, None]) / std[:, None, None], rtol=0, atol=1e-5)
    other = load_clip(path, frames=1, antialias=not antialias).video
    assert (got - other).abs().mean() > 0.1


def test_denormalise_is_the_inverse():
    noise = picture(size=(16, 16))
    torch.testing.assert_close(denormalise(media.resize(noise, 16, False)[None])[0], torch.from_numpy(noise))


# The extracted layout


def extracted(folder, count=30, suffix="png"):
    from PIL import Image

    folder.mkdir()
    for i in range(1, count + 1):
        Image.new("RGB", (20, 10), (i, 0, 0)).save(folder / f"{i}.{suffix}")
    (folder / "notes.txt").touch()
    return folder


def test_frames_and_wav(tmp_path):
    frames = extracted(tmp_path / "frames")
    wave = np.concatenate([tone(1000, 10, 16000), tone(3000, 10, 16000)])
    wav = encode(tmp_path / "a.wav", None, wave, sound_codec="pcm_s16le")
    clip = media.load_frames_and_wav(frames, wav, img_size=16)
    # By number, not by name: 10.png comes after 9.png.
    assert denormalise(clip.video)[:, 8, 8, 0].tolist() == np.linspace(1, 30, 10, dtype=int).tolist()
    assert_tone(clip, 1000)  # the first channel
    assert clip.duration == 10
    assert clip.warnings == ()
    expected = spectrograms(torch.from_numpy(np.round(wave[0] * 32768) / 32768).float(), 10, SWIN, reference=True)
    torch.testing.assert_close(clip.audio[..., 50:80], expected[..., 50:80], rtol=0, atol=0.02)
    assert len(media.load_frames_and_wav(frames, wav, frames=None, img_size=16).video) == 10


def test_frames_and_wav_errors(tmp_path):
    wav = encode(tmp_path / "a.wav", None, tone(500, 1, 16000), sound_codec="pcm_s16le")
    frames = extracted(tmp_path / "frames", 2, "jpg")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "expected jpg or png frames", lambda path: media.load_frames_and_wav(path, wav))
    refused(tmp_path / "no", "expected a directory of frames", lambda path: media.load_frames_and_wav(path, wav))
    refused(tmp_path / "b.wav", "nothing at this path", lambda path: media.load_frames_and_wav(frames, path))
    silent = encode(tmp_path / "a.mp4", film(1))
    refused(silent, "expected an audio stream, got only 1 video", lambda path: media.load_frames_and_wav(frames, path))
    (frames / "2.jpg").write_bytes(b"no picture")
    refused(str(frames / "2.jpg"), "expected a jpg or png picture", lambda _: media.load_frames_and_wav(frames, wav))


# Many files


def fragile(path, **kwargs):
    """`load_clip`, but some names kill, stop or confuse the process."""
    if "kill" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in path:
        os._exit(7)
    if "hang" in path:
        time.sleep(60)
    if "confuse" in path:
        raise IndexError("out of\nrange")
    return load_clip(path, **kwargs)


def test_load_clips_survives_everything(tmp_path):
    good = [encode(tmp_path / f"good{i}.mp4", film(1)) for i in range(3)]
    bad = [str(tmp_path / f"{name}.mp4") for name in ("kill", "exit", "missing", "confuse", "hang")]
    paths = [good[0], bad[0], bad[1], good[1], bad[2], bad[3], bad[4], good[2]]
    results = list(load_clips(iter(paths), workers=2, timeout=4, load=fragile, frames=2, img_size=32))
    assert [path for path, _ in results] == paths
    found = dict(results)
    for path in good:
        torch.testing.assert_close(found[path].video, load_clip(path, frames=2, img_size=32).video)
    reasons = {
        bad[0]: "expected a clip, got a decoder that died (SIGKILL)",
        bad[1]: "expected a clip, got a decoder that died (exit code 7)",
        bad[2]: "expected a file, got nothing at this path",
        bad[3]: "expected a clip, got IndexError: out of range",
        bad[4]: "expected a clip within 4 s, got none",
    }
    for path, reason in reasons.items():
        assert isinstance(found[path], MediaError)
        assert str(found[path]) == f"{path}: {reason}"


def test_load_clips_here(tmp_path):
    good = encode(tmp_path / "a.mp4", film(1))
    (path, clip), (other, error) = load_clips([good, tmp_path], workers=0, frames=2, img_size=16)
    assert path == good
    assert clip.video.shape == (2, 3, 16, 16)
    assert other == tmp_path
    assert "got a directory" in str(error)


def test_load_clips_takes_no_more_paths_than_needed(tmp_path):
    good = encode(tmp_path / "a.mp4", film(1))
    taken = []
    results = load_clips((taken.append(i) or good for i in range(1000)), workers=1, frames=1, img_size=16)
    next(results)
    results.close()
    assert len(taken) <= 3


def test_load_clips_arguments():
    with pytest.raises(TypeError, match="colour"):
        load_clips([], colour="red")
    with pytest.raises(ValueError, match="workers"):
        load_clips([], workers=-1)
    assert list(load_clips([], workers=2)) == []


def test_a_clip_knows_when_its_frames_are_shown_and_what_its_spectrograms_are_of(tmp_path):
    path = encode(tmp_path / "a.mkv", film(4), tone(440, 12, 16000), sound_codec="flac")
    clip = load_clip(path, frames=None, img_size=32)
    assert clip.times == pytest.approx([i / 3 for i in range(12)], abs=0.5)
    assert colours(clip) == [int(t) for t in clip.times]
    assert clip.duration == pytest.approx(12, abs=0.1)
    np.testing.assert_allclose(clip.spans, [(x, x + 1) for x in np.linspace(0, 10.9, 12)], atol=0.1)
    late = encode(tmp_path / "b.mkv", film(2), tone(440, 2, 16000), sound_codec="flac", sound_start=1.0)
    clip = load_clip(late, frames=2, img_size=32, spectrogram=SpectrogramConfig(window_seconds=0.0))
    assert clip.times == pytest.approx([0, 1.9], abs=0.11)
    assert clip.spans == (pytest.approx((0, 3), abs=0.1),)
    silent = load_clip(encode(tmp_path / "c.mkv", film(2)), frames=2, img_size=32)
    assert silent.spans == ()
    assert spans_of(8000, 3, SWIN) == ((0.0, 1.0),) * 3
    assert spans_of(17600, 2, SWIN) == ((0.0, 1.1),) * 2


def test_find_videos(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/2.MP4", "b/1.webm", "a.mkv", "notes.txt", "b/c/x.jpg"):
        (tmp_path / name).write_bytes(b"x")
    found = [file.relative_to(tmp_path).as_posix() for file in media.find_videos(tmp_path)]
    assert found == ["a.mkv", "b/1.webm", "b/c/2.MP4"]
    assert media.find_videos(tmp_path, skip=lambda folder: folder.name == "b") == [tmp_path / "a.mkv"]
    assert media.find_videos(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]
    refused(tmp_path / "none", "nothing at this path", media.find_videos)


def test_import_is_light():
    code = "import sys, lavish_fast.media; sys.exit(bool({'av', 'torchaudio', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
