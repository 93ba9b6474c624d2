"""Peak memory against the batch: what a step holds, weights, inputs and all, and what each clip adds to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from benchmarks.tables import latest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


@dataclass
class Curve:
    """Of one path. mib: the peak by batch size; too_large: the batches that ran out of memory."""

    label: str
    mib: dict[int, float] = field(default_factory=dict)
    too_large: list[int] = field(default_factory=list)

    def per_clip(self) -> dict[int, float]:
        return {batch: mib / batch for batch, mib in self.mib.items()}


def curves(rows: Iterable[Mapping[str, Any]], preset: str, mode: str) -> list[Curve]:
    """One of each path of the AVE network, the one that needs most at the largest batch first.

    Of a path's executions and types it is the one that was measured at most batch sizes, of equals the leanest.
    """
    ways: dict[tuple[str, str, str], Curve] = {}
    for row in latest(rows, preset, "ave", mode):
        way = row["path"], row["execution"], row["dtype"]
        curve = ways.setdefault(way, Curve(" ".join(way)))
        if row["status"] == "ok":
            curve.mib[row["batch"]] = row["peak_mib"]
        elif row["status"] == "out of memory":
            curve.too_large.append(row["batch"])
    chosen: dict[str, Curve] = {}
    for (path, *_), curve in ways.items():
        if curve.mib:
            chosen[path] = min(chosen.get(path, curve), curve, key=lambda c: (-len(c.mib), sum(c.mib.values())))
    for curve in chosen.values():
        curve.mib = dict(sorted(curve.mib.items()))
        curve.too_large.sort()
    return sorted(chosen.values(), key=lambda curve: -max(curve.per_clip().items())[1])


def table(curves: Sequence[Curve]) -> Table:
    """MiB a clip by batch size."""
    batches = sorted({batch for curve in curves for batch in (*curve.mib, *curve.too_large)})
    out = Table("MiB a clip", box=box.SIMPLE_HEAD)
    for batch in batches:
        out.add_column(str(batch), justify="right")
    for curve in curves:
        cells = curve.per_clip()
        texts = {b: f"{cells[b]:,.0f}" if b in cells else "too large" for b in (*cells, *curve.too_large)}
        out.add_row(curve.label, *(texts.get(batch, "") for batch in batches))
    return out


def figure(curves: Sequence[Curve], title: str) -> Figure:
    """Two panels over the batch: the peak in GiB, and MiB a clip; a line a path, and which batches were too large."""
    from matplotlib.figure import Figure

    ink, muted, grey = "#1f2933", "#7b8794", "#dde2e7"
    lines = -(-len(curves) // 2)
    height = 4.1 + 0.24 * lines
    chart = Figure(figsize=(10, height), dpi=120, facecolor="white")
    chart.text(0.012, 1 - 0.18 / height, title, ha="left", va="top", color=ink, fontsize=11, weight="bold")
    bottom = (0.75 + 0.24 * lines) / height
    panels = (
        ("peak memory, GiB", lambda curve: {batch: mib / 1024 for batch, mib in curve.mib.items()}),
        ("MiB a clip", Curve.per_clip),
    )
    batches = sorted({batch for curve in curves for batch in curve.mib})
    for i, (name, values) in enumerate(panels):
        axes = chart.add_axes((0.07 + 0.49 * i, bottom, 0.42, 1 - bottom - 0.8 / height))
        for curve, colour in zip(curves, _COLOURS * len(curves)):
            points = values(curve)
            label = curve.label
            if curve.too_large:
                label += f" (out of memory at {', '.join(map(str, curve.too_large))})"
            axes.plot([*points], [*points.values()], color=colour, linewidth=2, marker="o", markersize=5, label=label)
        axes.set_title(name, fontsize=10, color=ink, loc="left")
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set_ylim(0)
        axes.set_xlabel("clips at once", fontsize=9, color=muted)
        axes.tick_params(labelsize=9, colors=muted, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(grey)
        axes.grid(axis="y", color=grey, linewidth=0.8)
        axes.set_axisbelow(True)
    handles = chart.axes[0].get_legend_handles_labels()
    chart.legend(*handles, loc="lower left", bbox_to_anchor=(0.05, 0), ncols=2, frameon=False, fontsize=9)
    return chart


def draw(curves: Sequence[Curve], title: str, stem: Path) -> list[Path]:
    """Writes the picture as SVG and PNG, and returns where."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".svg", ".png")]
    with rc_context({"svg.hashsalt": "memory", "svg.fonttype": "none"}):
        chart = figure(curves, title)
        for path in paths:
            chart.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
