"""The ladder: what each technique adds to the one below it, each in a fresh process; speed, memory and error."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rung:
    """One technique more than the rung before. execution None: the one that the ladder is asked for."""

    label: str
    path: str
    dtype: str = "bfloat16"
    execution: str | None = None


RUNGS = {
    "inference": (
        Rung("released order, float32", "released", "float32", "eager"),
        Rung("+ bfloat16", "released", execution="eager"),
        Rung("+ torch.compile", "released-bmm"),
        Rung("+ streams in one batch", "concatenated"),
        Rung("+ constants folded", "folded"),
        Rung("+ xformers attention", "xformers"),
        Rung("+ fused kernels", "fused"),
        Rung("+ CUDA graph", "fused", execution="blocks+graph"),
        Rung("lavish_fast.optimize", "optimized", execution="own"),
    ),
    # From the streams in one batch on, frozen weights and streams are bfloat16, and trained weights float32.
    "training": (
        Rung("released order, float32", "released", "float32", "eager"),
        Rung("+ bfloat16 autocast", "released", "bfloat16-autocast", "eager"),
        Rung("+ torch.compile", "released-bmm", "bfloat16-autocast"),
        Rung("+ streams in one batch", "concatenated"),
        Rung("+ fused kernels", "fused"),
        Rung("+ CUDA graphs: optimize", "optimized", execution="own"),
        Rung("+ whole step captured", "optimized", execution="step"),
    ),
}


def climb(
    device: str,
    mode: str,
    preset: str,
    batch: int,
    execution: str,
    seconds: float,
    *,
    rungs: Sequence[Rung] | None = None,
    timeout: float = math.inf,
    budget: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """The row of each of a mode's RUNGS, also of one whose process dies or takes longer than `timeout` seconds.

    rungs: these of them alone. budget: seconds that all of them may take. The device's limits are measured once, for
    all rungs.
    """
    until = time.monotonic() + budget
    rungs = RUNGS[mode] if rungs is None else rungs
    with tempfile.TemporaryDirectory() as folder:
        limits = Path(folder) / "limits.jsonl"
        for dtype in dict.fromkeys(rung.dtype.removesuffix("-autocast") for rung in rungs):
            command = ["roofline", "--measure", "--device", device, "--dtype", dtype, "--out", str(limits)]
            with suppress(subprocess.TimeoutExpired):  # the rungs then measure their own
                _benchmarks(command, min(timeout, until - time.monotonic()))
        for i, rung in enumerate(rungs):
            how = rung.execution or execution
            if execution == "eager":
                how = how.removeprefix("blocks+")
            key = {"case": "ave", "mode": mode, "preset": preset, "batch": batch, "setting": {}}
            key |= {"path": rung.path, "execution": how, "dtype": rung.dtype}
            if execution == "eager" and (rung.path == "optimized" or rung.path == "released-bmm"):
                yield _row(device, key, "skipped", "asked for eager")
                continue
            given = min(timeout, until - time.monotonic())
            if given <= 0:
                yield _row(device, key, "skipped", "the time budget was spent")
                continue
            out = Path(folder) / f"{i}.jsonl"
            command = ["run", "--case", "ave", "--mode", mode]
            command += ["--device", device, "--preset", preset, "--batch", str(batch), "--path", rung.path]
            command += ["--execution", how, "--dtype", rung.dtype, "--seconds", str(seconds), "--out", str(out)]
            if limits.is_file():
                command += ["--limits", str(limits)]
            try:
                done = _benchmarks(command, given)
            except subprocess.TimeoutExpired:
                yield _row(device, key, "skipped", f"it took longer than {given:.0f} s")
                continue
            if out.is_file() and (rows := results.read(out)):
                yield rows[-1] | key  # a truth that failed has no path
            else:
                last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
                yield _row(device, key, "failed", f"exit code {done.returncode}: {last[0][:200]}")


def latest(rows: Sequence[dict[str, Any]], rung: Rung, like: dict[str, Any]) -> dict[str, Any] | None:
    """The last row of a rung, of the sizes, the mode, the card and the number of threads of another."""
    same = "device", "threads", "mode", "preset", "batch"
    found = [r for r in rows if r.get("rung") == rung.label and all(r[name] == like[name] for name in same)]
    return found[-1] if found else None


def _benchmarks(arguments: Sequence[str], seconds: float) -> subprocess.CompletedProcess:
    """`python -m benchmarks` in a fresh process. Raises: subprocess.TimeoutExpired."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    wait = seconds if seconds < math.inf else None
    return subprocess.run(command, cwd=results.ROOT.parents[1], capture_output=True, timeout=wait)


def _row(device: str, key: dict[str, Any], status: str, reason: str) -> dict[str, Any]:
    return {"date": results.now(), **results.environment(device), **key, "status": status, "reason": reason}


def figure(rungs: Sequence[tuple[Rung, dict[str, Any]]]) -> Figure:
    """Samples per second as bars, memory and error beside them; a rung without a time says why."""
    from matplotlib.figure import Figure

    ink, muted, blue, grey = "#1f2933", "#7b8794", "#0072b2", "#dde2e7"
    top = max((row["samples_per_s"] for _, row in rungs if row["status"] == "ok"), default=1.0)
    first = next((row["samples_per_s"] for _, row in rungs if row["status"] == "ok"), None)
    height = 0.5 * len(rungs) + 1.3
    chart = Figure(figsize=(10, height), dpi=120, facecolor="white")
    axes = chart.add_axes((0.2, 0.45 / height, 0.45, 1 - 1.2 / height))
    for i, (rung, row) in enumerate(rungs):
        y = len(rungs) - 1 - i
        axes.text(-0.02 * top, y, rung.label, ha="right", va="center", color=ink, fontsize=10)
        if row["status"] != "ok":
            axes.barh(y, top, 0.62, color="none", edgecolor=grey, hatch="///", linewidth=0)
            text = _shorten(f"{row['status']}: {row['reason']}", 62)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(0.01 * top, y, text, ha="left", va="center", color=muted, fontsize=8, bbox=box)
            continue
        speed = row["samples_per_s"]
        axes.barh(y, speed, 0.62, color=blue, alpha=0.9)
        low, high = (row["batch"] / row[q] * 1e3 for q in ("q80_ms", "q20_ms"))
        axes.plot([low, high], [y, y], color=ink, linewidth=1)
        text = f"{speed:.3g}/s  {speed / first:.2f}x"
        axes.text(0.01 * top, y, text, ha="left", va="center", color="white" if speed > 0.2 * top else ink, fontsize=9)
        for x, value in ((1.1, _mib(row["peak_mib"])), (1.27, f"{row['error']:.1e}"), (1.44, _share(row))):
            axes.text(x * top, y, value, ha="left", va="center", color=ink, fontsize=9)
    for x, title in ((1.1, "memory"), (1.27, "error"), (1.44, "of the limit")):
        axes.text(x * top, len(rungs) - 0.35, title, ha="left", va="bottom", color=muted, fontsize=9)
    axes.set_xlim(0, top)
    axes.set_ylim(-0.6, len(rungs) - 0.4)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=muted, labelsize=8)
    axes.set_xlabel("clips per second: the median, and as a line the 20-80 % range", color=muted, fontsize=8)
    row = rungs[0][1]
    title = f"AVE {row['mode']}, {row['preset']} preset, batch {row['batch']}, {row['device']}"
    chart.text(0.012, 1 - 0.18 / height, title, ha="left", va="top", color=ink, fontsize=11, weight="bold")
    return chart


def _mib(value: float) -> str:
    return f"{value / 1024:.1f} GiB" if value >= 1024 else f"{value:.0f} MiB"


def _share(row: dict[str, Any]) -> str:
    return f"{row['roofline_share']:.0%}"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def draw(rows: Sequence[tuple[Rung, dict[str, Any]]], stem: Path) -> list[Path]:
    """Writes the picture as SVG and PNG, and returns where."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
    with rc_context({"svg.hashsalt": "ladder", "svg.fonttype": "none"}):
        chart = figure(rows)
        for path in paths:
            chart.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
