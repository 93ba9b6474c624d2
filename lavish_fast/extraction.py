"""Videos to extracted frames and sound, in the layouts that the tasks' readers take.

Sound is kept in 16 bits, as in the data sets' own wav files: near silence a spectrogram is not that of the video.
Each file is written under another name and then moved, frames before sound: a clip that has both is finished, and
what a kill leaves behind is done again. A sound that is there already stays, for it may be the data set's own.
"""

from __future__ import annotations

import os
import shutil
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lavish_fast import checkpoint, media
from lavish_fast.config import Config
from lavish_fast.tasks import ave, avqa_data, avs_data

RAW_VIDEOS = "raw_videos"
SAMPLE_RATE = 16000

_QUALITY = 95  # of JPEG
_SHOWN = 15 / 16  # of a second, the last of the 16 frames that AVSBench takes of it


@dataclass(frozen=True)
class Plan:
    """What is to be extracted. videos: files that are not done. done: how many are. missing: names without a video.

    load, options: `load(video, **options)` does one and returns its warnings.
    """

    videos: tuple[Path, ...]
    done: int
    missing: tuple[str, ...]
    load: Callable[..., tuple[str, ...]]
    options: dict[str, Any]


def plan(task: str, root: str | os.PathLike, config: Config) -> Plan:
    """What is to be extracted of a data set.

    "ave" and "avqa": of each video in AVE/, videos/ or the folder itself, frames/ID/000001.jpg ... at 3 or 1 frames a
    second, and audio/ID.wav. "avs": of each clip of s4_meta_data.csv, from raw_videos/SPLIT/CATEGORY/NAME.mp4 in the
    folder or in s4_data/, what `lavish_fast.tasks.avs_data` reads of it, but for the masks.

    Raises: ValueError for "action", whose videos are read as they are; FileNotFoundError or ValueError for a list of
        clips that cannot be read.
    """
    root = Path(root)
    if task in ("ave", "avqa"):
        videos = ave.find_videos(root).values()
        places = [_frames_and_wav(root, video) for video in videos]
        done = [wav.is_file() and ave.has_pictures(folder) for folder, wav in places]
        todo = tuple(video for video, is_done in zip(videos, done) if not is_done)
        rate = media.FRAME_RATE if task == "ave" else avqa_data.FRAME_RATE
        return Plan(todo, sum(done), (), extract_frames, {"root": root, "frame_rate": rate})
    if task != "avs":
        raise ValueError(
            f"{task}: expected a data set that is extracted, ave, avs or avqa; its videos are read as such"
        )
    data, rows = avs_data.find(root)
    raw = next((path for path in (root / RAW_VIDEOS, data / RAW_VIDEOS) if path.is_dir()), root / RAW_VIDEOS)
    folders = {raw / row.folder.with_name(f"{row.name}.mp4"): row.folder for row in rows}
    places = {video: avs_data.frames_and_wav(data, folder) for video, folder in folders.items()}
    done = {video for video, (folder, wav) in places.items() if wav.is_file() and _is_whole(folder, config.frames)}
    todo = tuple(video for video in folders if video not in done and video.is_file())
    missing = tuple(folders[video].name for video in folders if video not in done and not video.is_file())
    options = {"raw": raw, "data": data, "frames": config.frames, "size": config.head.size}
    return Plan(todo, len(done), missing, extract_s4, options)


def extract_frames(video: Path, *, root: Path, frame_rate: float) -> tuple[str, ...]:
    """Writes frames/ID/000001.jpg ..., those of `ffmpeg -r frame_rate`, and audio/ID.wav, 16 kHz, one channel.

    Returns: warnings. Raises: media.MediaError naming the file and the reason.
    """
    folder, wav = _frames_and_wav(root, video)
    with _Folder(folder) as target:

        def take(places: list[int], _: float, image: np.ndarray) -> None:
            first, *others = (target / f"{place + 1:06}.jpg" for place in places)
            _picture(image).save(first, quality=_QUALITY)
            for other in others:
                shutil.copyfile(first, other)

        sound = media.extract(video, take, frame_rate=frame_rate, sample_rate=SAMPLE_RATE)
    if not wav.is_file():
        write_wav(wav, sound.waveform)
    return sound.warnings


def extract_s4(video: Path, *, raw: Path, data: Path, frames: int, size: int) -> tuple[str, ...]:
    """Writes visual_frames/SPLIT/CATEGORY/NAME/NAME_1.png ... and audio_wav/SPLIT/CATEGORY/NAME.wav.

    Of each second the last of 16 frames, as AVSBench takes them: the one that is shown at 15/16 of it, or the video's
    last; resized bilinearly to size x size. Frames that are whole stay, for the masks are of them.

    Returns: warnings. Raises: media.MediaError naming the file and the reason.
    """
    folder, wav = avs_data.frames_and_wav(data, video.relative_to(raw).with_suffix(""))
    pictures: list[np.ndarray] = []
    last: np.ndarray | None = None

    def take(_: list[int], seconds: float, image: np.ndarray) -> None:
        nonlocal last
        while len(pictures) < frames and last is not None and seconds > len(pictures) + _SHOWN + 1e-6:
            pictures.append(last)
        last = image

    sound = media.extract(video, take, frame_rate=None, sample_rate=SAMPLE_RATE)
    pictures += [last] * (frames - len(pictures))
    if not _is_whole(folder, frames):
        with _Folder(folder) as target:
            for i, image in enumerate(pictures, 1):
                x = torch.tensor(image).permute(2, 0, 1)[None].float()
                x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
                _picture(x.round().to(torch.uint8).numpy()).save(target / f"{folder.name}_{i}.png")
    if not wav.is_file():
        write_wav(wav, sound.waveform)
    return sound.warnings


def write_wav(path: Path, waveform: Tensor) -> None:
    """A wav file of 16 bits, 16 kHz and one channel, written atomically: waveform (samples,) in [-1, 1]."""
    samples = (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16)

    def write(temporary: Path) -> None:
        with wave.open(str(temporary), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes(samples.numpy().astype("<i2").tobytes())

    checkpoint.write_atomically(path, write)


def _frames_and_wav(root: Path, video: Path) -> tuple[Path, Path]:
    return root / "frames" / video.stem, root / "audio" / f"{video.stem}.wav"


def _is_whole(folder: Path, frames: int) -> bool:
    try:
        avs_data.check_frames(folder, frames)
    except media.MediaError:
        return False
    return True


class _Folder:
    """A folder that is filled under another name, and at the end takes the place of what there is of an unfinished one.

    A kill between the two leaves less of that one, which is unfinished still.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.part")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            os.replace(self.temporary, self.path)
        shutil.rmtree(self.temporary, ignore_errors=True)


def _picture(image: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(image)
