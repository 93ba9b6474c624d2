"""Files to pictures and sound. Files are taken as hostile: only local regular files are opened, playlists are refused,
and sizes are capped before anything is decoded.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
FRAME_RATE = 3.0  # frames per second at which AVE videos are extracted
SILENCE = "silence used"  # the end of each warning that there is no sound
MAX_PIXELS = 8192 * 8192  # of one frame
MAX_SECONDS = 3600.0
MAX_AUDIO_DELAY = 0.05  # seconds of a late audio stream that count as jitter of the container
OPEN_TIMEOUT, READ_TIMEOUT = 60.0, 60.0  # seconds

# Demuxers that open further files, or whose input is a script.
_INDIRECT_FORMATS = {"avisynth", "concat", "dash", "hls", "imf", "lavfi", "sdp", "vapoursynth", "webm_dash_manifest"}


class MediaError(ValueError):
    """A file that gives no clip. `path`: the file; `reason`: what was expected and what came, in one line."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        # Both go into args, so that the error survives pickling.
        super().__init__(os.fspath(path), reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return " ".join(f"{self.path}: {self.reason}".splitlines())


def _local(path: str | os.PathLike[str]) -> str:
    path = os.fspath(path)
    if match := re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise MediaError(path, f"expected a local file, got the protocol {match.group()!r}")
    return path


def local_file(path: str | os.PathLike[str]) -> str:
    """The path, once it is known to be a regular file that can be read."""
    path = _local(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(path, "expected a file, got a directory")
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(path, "expected a regular file, got a pipe, socket or device")
        with open(path, "rb"):
            pass
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(path, "expected a file, got nothing at this path") from None
    except PermissionError:
        raise MediaError(path, "expected a readable file, got permission denied") from None
    except OSError as error:
        raise MediaError(path, f"expected a readable file, got {error.strerror}") from None
    except MediaError:
        raise
    except ValueError:
        raise MediaError(path, "expected a path, got a null byte in it") from None
    if not status.st_size:
        raise MediaError(path, "expected a media file, got 0 bytes")
    return path


def list_images(frames_dir: str | os.PathLike[str]) -> list[str]:
    folder = _local(frames_dir)
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    except OSError as error:
        raise MediaError(folder, f"expected a directory of frames, got {error.strerror}") from None
    if not names:
        raise MediaError(folder, "expected jpg or png frames, got none in this directory")
    names.sort(key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))
    return [os.path.join(folder, name) for name in names]


def read_image(path: str) -> np.ndarray:
    from PIL import Image

    path = local_file(path)
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(path, f"expected at most {MAX_PIXELS} pixels, got {image.width}x{image.height}")
            return np.asarray(image.convert("RGB"))
    except MediaError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds, SyntaxError among them
        raise MediaError(path, f"expected a jpg or png picture, got one that cannot be decoded ({error})") from None


@lru_cache(maxsize=1)
def _format_whitelist() -> str:
    import av

    return ",".join(sorted(av.formats_available - _INDIRECT_FORMATS))


@contextmanager
def opened(path: str) -> Iterator[InputContainer]:
    import av

    try:
        # The prefix keeps a name from being read as a protocol, whatever its characters.
        container = av.open(
            f"file:{os.path.abspath(path)}",
            options={"protocol_whitelist": "file", "format_whitelist": _format_whitelist()},
            metadata_errors="replace",
            timeout=(OPEN_TIMEOUT, READ_TIMEOUT),
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        size, text = os.path.getsize(path), getattr(error, "strerror", None) or error
        reason = f"expected a media file, got {size} bytes that do not open as one ({text})"
        raise MediaError(path, reason) from None
    with container:
        yield container


def warnings_of(path: str, warnings: list[str], damage: Counter[str]) -> tuple[str, ...]:
    lines = [*warnings]
    lines += [f"{damage[kind]} damaged {kind} packets or frames" for kind in ("video", "audio") if damage[kind]]
    if damage["file"]:
        lines.append("could not be read to its end")
    return tuple(f"{path}: {line}" for line in lines)


def stream_kinds(container: InputContainer) -> str:
    kinds = Counter(stream.type for stream in container.streams)
    return "only " + ", ".join(f"{number} {kind}" for kind, number in kinds.items()) if kinds else "no stream at all"


def _video_stream(path: str, container: InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture, within the caps and ready to decode."""
    from av.stream import Disposition

    stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
    if stream is None:
        raise MediaError(path, f"expected a video stream, got {stream_kinds(container)}")
    context = stream.codec_context
    if context is None:
        raise MediaError(path, "expected a video stream, got one of a codec without a decoder")
    _check_pixels(path, context.width, context.height)
    if container.duration:
        _check_duration(path, container.duration / 1e6)
    context.options = {"max_pixels": str(MAX_PIXELS)}
    context.thread_type = "AUTO"
    context.thread_count = torch.get_num_threads()
    return stream


def _check_pixels(path: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(path, f"expected at most {MAX_PIXELS} pixels a frame, got {width}x{height}")


def _check_duration(path: str, seconds: float) -> None:
    if seconds > MAX_SECONDS:
        raise MediaError(path, f"expected at most {MAX_SECONDS:g} s, got {seconds:.1f} s")


# One pass over the packets, which also decodes the sound; then one that decodes the frames wanted


class Source(NamedTuple):
    """What the packets of a file tell before the video is decoded.

    shown: (timestamp, duration) of each frame in ticks, in order of display; None if packets lack timestamps.
    tick, step: seconds of a tick, and of a frame by the header. origin: seconds, the start of the earlier of the
    two streams. waveform: (samples,), from the origin on. duration: seconds, from the origin on.
    """

    shown: list[tuple[int, int]] | None
    tick: Fraction
    step: Fraction
    origin: float
    waveform: Tensor
    duration: float
    warnings: list[str]


class Track:
    """The samples of an audio stream, collected packet by packet; its first sample's time is `start`, in seconds.

    channel: None for the mean of all.
    """

    def __init__(self, path: str, stream: av.AudioStream, channel: int | None, damage: Counter[str]) -> None:
        self.path, self.stream, self.channel, self.damage = path, stream, channel, damage
        self.pieces: list[tuple[int, Tensor]] = []
        self.seconds = 0.0
        self.start = 0.0

    def hear(self, packet: av.Packet | None) -> None:
        """None asks for what the decoder still holds."""
        for frame in _decoded(self.stream, packet, self.damage):
            samples = _mono(frame, self.channel)
            if samples is None or frame.sample_rate < 1:
                self.damage["audio"] += 1
                continue
            if not self.pieces:
                self.start = float(frame.time or 0.0)
            self.pieces.append((frame.sample_rate, samples))
            self.seconds += len(samples) / frame.sample_rate
            _check_duration(self.path, self.seconds)

    def waveform(self, sample_rate: int) -> Tensor:
        """(samples,) at the rate asked for, in [-1, 1]. A stream may change its rate on the way."""
        parts = []
        for rate, group in groupby(self.pieces, key=lambda piece: piece[0]):
            part = torch.cat([samples for _, samples in group])
            # The resampling kernel grows with the reduced rate; a rate near enough keeps it small.
            if rate // math.gcd(rate, sample_rate) > 2000:
                rate = round(rate / 20) * 20
            if rate != sample_rate:
                from torchaudio.functional import resample

                part = resample(part, rate, sample_rate)
            parts.append(part.clamp_(-1, 1))
        return torch.cat(parts) if parts else torch.zeros(0)


def _mono(frame: av.AudioFrame, channel: int | None) -> Tensor | None:
    """(samples,) float32 of one audio frame. None for one whose samples cannot be had."""
    import av

    frames = [frame]
    channels = frame.layout.nb_channels
    try:
        # PyAV finds the end of the planes by a null pointer, which FFmpeg does not set behind the eighth.
        if frame.format.is_planar and channels > 7:
            packer = av.AudioResampler(frame.format.packed, frame.layout, frame.sample_rate)
            frames = [*packer.resample(frame), *packer.resample(None)]
        array = np.concatenate([part.to_ndarray() for part in frames], axis=1)
    except (av.FFmpegError, OSError, ValueError):
        return None
    if len(array) != channels:
        array = array.reshape(-1, channels).T
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif array.dtype.kind == "i":
        array = array / -float(np.iinfo(array.dtype).min)
    mono = array.mean(0) if channel is None else array[channel]
    return torch.from_numpy(np.nan_to_num(mono.astype(np.float32), nan=0.0, posinf=1.0, neginf=-1.0))


def read_packets(container: InputContainer, streams: list[Any], damage: Counter[str]) -> Iterator[av.Packet]:
    import av

    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.FFmpegError, OSError):
            damage["file"] += 1
            return
        # Empty packets ask a decoder for its last frames; that is done with None, after a broken file too.
        if packet.size:
            yield packet


def _decoded(stream: Any, packet: av.Packet | None, damage: Counter[str]) -> list[Any]:
    import av

    try:
        return stream.codec_context.decode(packet)
    except av.EOFError:
        return []
    except (av.FFmpegError, OSError, ValueError):
        damage[stream.type] += 1
        return []


def silence(waveform: Tensor) -> list[str]:
    """The warning that an audio stream's samples, of which there may be none, are not to be heard."""
    if waveform.any():
        return []
    what = "nothing but zeros in" if len(waveform) else "no sound could be decoded from"
    return [f"{what} its audio stream, {SILENCE}"]


def scan(path: str, sample_rate: int, damage: Counter[str]) -> Source:
    packets: list[tuple[int | None, int]] = []
    waveform = torch.zeros(0)
    with opened(path) as container:
        video = _video_stream(path, container)
        tick, step = video.time_base, 1 / (video.average_rate or video.guessed_rate or Fraction(25))
        declared = (container.duration or 0) / 1e6
        streams, sound = [video], None
        if container.streams.audio:
            warnings = silence(waveform)
            if container.streams.audio[0].codec_context is not None:
                sound = Track(path, container.streams.audio[0], None, damage)
                streams.append(sound.stream)
        else:
            warnings = [f"no audio stream, {SILENCE}"]
        for packet in read_packets(container, streams, damage):
            if packet.stream_index != video.index:
                sound.hear(packet)
            elif not packet.is_discard:
                packets.append((packet.pts, packet.duration or 0))
        if sound:
            sound.hear(None)
    if not packets:
        raise MediaError(path, "expected at least one frame, got a video stream without any")

    shown = None if any(pts is None for pts, _ in packets) else sorted(packets)
    start, end = 0.0, len(packets) * float(step)
    if shown:
        start, end = float(shown[0][0] * tick), float(shown[-1][0] * tick + (shown[-1][1] * tick or step))
    origin, duration = start, end - start
    if sound and sound.pieces:
        origin = min(start, sound.start)
        delay = sound.start - origin
        duration = max(end - origin, delay + sound.seconds)
        _check_duration(path, duration)
        waveform = sound.waveform(sample_rate)
        warnings = silence(waveform)
        if delay > MAX_AUDIO_DELAY:
            waveform = F.pad(waveform, (round(delay * sample_rate), 0))
    _check_duration(path, duration)
    if duration < declared - max(0.5, 0.05 * declared):
        warnings.append(f"ends early, {declared:.1f} s by its header but {duration:.1f} s found")
    return Source(shown, tick, step, origin, waveform, duration, warnings)


def at_frame_rate(times: list[float], durations: list[float], rate: float = FRAME_RATE) -> list[int]:
    """Which input frame each frame of `ffmpeg -r rate` shows.

    times, durations: of the input frames in seconds, times from 0 and rising. This is ffmpeg's own rule for a
    constant output rate (`video_sync_process`, fftools/ffmpeg_filter.c), in which an input frame within 1.1
    output frames of its place is shown once: 10 s at 25 frames a second give 32 frames, not 30.
    """
    shown: list[int] = []
    repeats: deque[int] = deque((0, 0, 0), maxlen=3)
    for i, (start, duration) in enumerate(zip(times, durations)):
        place = start * rate
        place += 2.0**-17 if place > 0 else 0.0
        ahead = place - len(shown)
        until = ahead + duration * rate
        number, previous = 1, 0
        if until < -1.1:
            number = 0
        elif until > 1.1:
            number = round(until)
            if ahead > 1.1:
                previous = round(ahead - 0.6)
        shown += [max(0, i - 1) if j < previous else i for j in range(number)]
        repeats.append(previous)
    return shown + [len(times) - 1] * sorted(repeats)[1]


def _extracted(
    shown: list[tuple[int, int]], tick: Fraction, step: Fraction, origin: float, rate: float | None
) -> list[int]:
    """The keys (timestamps or numbers) of the frames that `ffmpeg -r rate` extracts; of all frames without a rate."""
    if rate is None:
        return [key for key, _ in shown]
    times = [float(key * tick) - origin for key, _ in shown]
    gaps = [after - before for before, after in pairwise(times)]
    gaps.append(gaps[-1] if gaps else float(step))
    durations = [float(length * tick) or gap for (_, length), gap in zip(shown, gaps)]
    return [shown[i][0] for i in at_frame_rate(times, durations, rate)]


def _keyed_frames(path: str, numbered: bool, damage: Counter[str]) -> Iterator[tuple[int, int, av.VideoFrame]]:
    """(timestamp, duration, frame) in ticks of each frame that decodes; numbered: (0, 1, frame), (1, 1, frame), ..."""
    with opened(path) as container:
        stream = _video_stream(path, container)
        number = 0
        for packet in chain(read_packets(container, [stream], damage), [None]):
            for frame in _decoded(stream, packet, damage):
                _check_pixels(path, frame.width, frame.height)
                if numbered or frame.pts is not None:
                    yield (number, 1, frame) if numbered else (frame.pts, frame.duration or 0, frame)
                number += 1


def take_frames(
    path: str,
    source: Source,
    rate: float | None,
    choose: Callable[[list[int]], list[int]],
    take: Callable[[list[int], float, np.ndarray], None],
    damage: Counter[str],
) -> None:
    """Hands over the frames that are chosen among those extracted, each as soon as it is decoded.

    choose: keys of all frames extracted -> keys of those wanted. take: as for `extract`, places in what was chosen.
    """

    def decode(wanted: list[int], numbered: bool, tick: Fraction, origin: float, damage: Counter[str]) -> bool:
        places: dict[int, list[int]] = {}
        for place, key in enumerate(wanted):
            places.setdefault(key, []).append(place)
        for key, _, frame in _keyed_frames(path, numbered, damage):
            if key in places:
                damage["video"] += frame.is_corrupt
                take(places.pop(key), float(key * tick) - origin, _upright(path, frame))
                if not places:
                    return True
        return False

    if source.shown is not None:
        found: Counter[str] = Counter()
        wanted = choose(_extracted(source.shown, source.tick, source.step, source.origin, rate))
        if decode(wanted, False, source.tick, source.origin, found):
            damage.update(found)
            return
    # The packets did not tell which frames can be shown: the decoder does, at the price of decoding twice.
    numbered = source.shown is None
    shown = sorted((key, length) for key, length, _ in _keyed_frames(path, numbered, Counter()))
    if not shown:
        raise MediaError(path, "expected at least one frame, got a video stream of which none can be decoded")
    tick = source.step if numbered else source.tick
    origin = min(source.origin, float(shown[0][0] * tick))
    _check_duration(path, float(shown[-1][0] * tick) - origin)
    decode(choose(_extracted(shown, tick, source.step, origin, rate)), numbered, tick, origin, damage)


def _upright(path: str, frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, turned and mirrored as the frame's display matrix says."""
    import av

    try:
        image = frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = f"expected frames that convert to RGB, got {frame.format.name} ({error})"
        raise MediaError(path, reason) from None
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # x' = a x + c y and y' = b x + d y, in 16.16 fixed point
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, a, d = image.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
