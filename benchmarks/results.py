"""Where results live: JSON lines under benchmarks/results/<device>/, only appended to, with what they were made on."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent / "results"
# What was measured: two rows that agree in these are two runs of the same thing.
KEY = ("case", "mode", "preset", "batch", "setting", "path", "execution", "dtype")
_PACKAGES = ("torch", "triton", "timm", "torchvision", "xformers")


def device_name(device: str) -> str:
    """What a device is called in results: the card's own name, or the processor's with its number of cores."""
    if device == "cuda":
        torch = sys.modules.get("torch")
        return _nvml("name") or (torch.cuda.get_device_name() if torch else "CUDA device")
    model = platform.machine()
    with suppress(OSError):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = match[1].strip() if match else model
    return f"{model}, {cores()} cores"


def has_card() -> bool:
    """Whether NVIDIA's driver lists a card; torch is not asked."""
    return _nvml("name") is not None


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def folder(device: str) -> Path:
    """The results of this device, e.g. benchmarks/results/nvidia-h200."""
    return ROOT / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


@cache
def environment(device: str) -> dict[str, Any]:
    """What every row says of where it was made: commit, device, driver, versions."""
    row = {"commit": _commit(), "device": device_name(device), "python": platform.python_version()}
    if device == "cuda":
        row["driver"] = _nvml("driver")
    for package in _PACKAGES:
        try:
            row[package] = version(package)
        except PackageNotFoundError:
            row[package] = None
    if "torch" in sys.modules:
        row["threads"] = sys.modules["torch"].get_num_threads()
    return row


def clocks(device: str) -> dict[str, float] | None:
    """The card's clocks (MHz), power (W) and temperature (degrees C) at this moment; None without a card."""
    return _nvml("clocks") if device == "cuda" else None


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a file of JSON lines, each on the disk before the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a result file, one JSON object a line.

    Raises: FileNotFoundError, or ValueError naming the file and the line that is no result row.
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected a result row, got {error}") from None
        rows.append(row)
    return rows


def _check(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__} instead of an object")
    if missing := [name for name in (*KEY, "device", "threads", "status") if name not in row]:
        raise ValueError(f"an object without {', '.join(missing)}")
    if row["status"] != "ok" or ("kernels_us" in row and "median_ms" not in row):  # a profile may have kernels alone
        return
    times = row.get("times_ms") or []
    if not isinstance(times, list) or not all(map(_is_time, [*times, row.get("median_ms")])):
        raise ValueError("times_ms and median_ms that are not all positive numbers")


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    # Results are appended while they are made; only other changes make the commit a half-truth.
    return commit + ("+changes" if any("benchmarks/results/" not in line for line in changed) else "")


def _card(nvml: ModuleType) -> Any:
    """The card that torch uses, or the first where it uses none yet: NVML has an order of its own, and all cards."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return nvml.nvmlDeviceGetHandleByIndex(0)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def _nvml(what: str) -> Any:
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # the package or the driver is missing; both mean that there is nothing to read
        return None
    try:
        card = _card(nvml)
        if what == "name":
            return nvml.nvmlDeviceGetName(card)
        if what == "driver":
            return nvml.nvmlSystemGetDriverVersion()
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_MEM),
            "power_w": nvml.nvmlDeviceGetPowerUsage(card) / 1000,
            "temperature_c": nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
        }
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()
