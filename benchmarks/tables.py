"""The paper's tables and Figure 1 from result rows: the compute columns, with the paper's own numbers beside ours.

Rows are those of one device. What was measured more than once counts by its latest run, and of the ways to compute a
thing the fastest is shown, with what it is and its error.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from benchmarks import results, roofline
from benchmarks.cases import LATENTS, MODES, PRESETS
from lavish_fast import Model
from lavish_fast.config import Config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

RELEASED = ("released", "released-bmm")  # the paths of the released code's order
_NONE = "not measured"
_HOW = "fastest by"
_APART = "*"
_PAPERS_SPEEDS = "The paper's speeds are of an A6000; of inference or of training, it does not say."


@dataclass(frozen=True)
class Published:
    """A line of the paper's Table 2: trainable parameters in millions, samples/s on an A6000."""

    name: str
    trainable_m: float
    samples_per_s: float | None = None


TABLE_2 = {
    "xdc": Published("XDC", 45),
    "avts": Published("AVTS", 45),
    "gdt": Published("GDT", 39.2),
    "mbt": Published("MBT", 172, 4.42),
    "ave-vit": Published("LAVISH, ViT-B", 7.4, 6.36),
}
TABLE_4 = {"CMBS": 0.72, "LAVISH": 1.40}  # samples/s on an A6000
TRAINABLE_M = {"ave-swinv2-large": 10.1}  # the paper's, in millions
BEST_LATENTS = 2  # of Figure 1, by accuracy


# Rows


def load(folder: str | os.PathLike, *others: str) -> list[Row]:
    """The rows of bench*.jsonl, ladder*.jsonl and `others` in a device's folder of results.

    Raises: FileNotFoundError without that folder, ValueError naming the file and line that is no result row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of results")
    paths = [path for name in ("bench", "ladder", *others) for path in sorted(folder.glob(f"{name}*.jsonl"))]
    return [row for path in paths for row in results.read(path)]


def latest(rows: Iterable[Row], preset: str, case: str, mode: str = "inference") -> list[Row]:
    """The last run of everything that was measured of a case. A run that was skipped hides none that took place.

    Raises: ValueError where the rows are of more than one device.
    """
    rows = list(rows)
    if len(devices := dict.fromkeys(row["device"] for row in rows)) > 1:
        raise ValueError(f"rows: expected those of one device, got {'; '.join(devices)}")
    found: dict[str, Row] = {}
    for row in rows:
        if (row["preset"], row["case"], row["mode"]) == (preset, case, mode):
            key = json.dumps([row[name] for name in results.KEY], sort_keys=True)
            found[key] = max(row, found.get(key, row), key=_age)  # of equals the first, here the later row
    return list(found.values())


def _age(row: Row) -> tuple[bool, str]:
    return row["status"] != "skipped", row["date"]


def best(rows: Iterable[Row]) -> Row | None:
    """The row with the most samples per second of those that are right."""
    return max((row for row in rows if row["status"] == "ok"), key=lambda row: row["samples_per_s"], default=None)


def as_published(rows: Iterable[Row]) -> list[Row]:
    """Those of the released order as the released code runs it: eager, in float32."""
    published = ("released", "eager", "float32")
    return [row for row in rows if (row["path"], row["execution"], row["dtype"]) == published]


def is_compiled(row: Row) -> bool:
    return row["execution"] not in ("eager", "graph")


def speedup(row: Row | None, other: Row | None) -> float | None:
    """How many times as many samples per second `row` has; None where one of them is missing."""
    return row["samples_per_s"] / other["samples_per_s"] if row and other else None


def ratio(row: Row | None, other: Row | None) -> str:
    """The speedup as text, with an asterisk where the two are of other commits or days; empty without one of them."""
    if row is None or other is None:
        return ""
    apart = any(row[name][:10] != other[name][:10] for name in ("commit", "date"))
    return _times(speedup(row, other)) + _APART * apart


# Parameters


@dataclass(frozen=True)
class Size:
    """Numbers of parameters. trainable: of the whole, adapters and head included."""

    trainable: int
    frozen: int
    adapters: int = 0
    head: int = 0


def count(network: nn.Module) -> Size:
    """The parameters of a network, by whether they ask for a gradient."""

    def trainable(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    total, parts = sum(p.numel() for p in network.parameters()), {}
    if isinstance(network, Model):
        parts = {"adapters": trainable(network.adapters), "head": trainable(network.head)}
    return Size(trainable(network), total - trainable(network), **parts)


@cache
def size_of(config: Config) -> Size:
    with torch.device("meta"):
        return count(Model(config))


@cache
def table_2_sizes() -> dict[str, Size]:
    """The networks of Table 2 at the paper's sizes, by case."""
    from benchmarks.baselines.encoders import CONFIGS, AudioVisualEncoders
    from benchmarks.baselines.mbt import MBT

    with torch.device("meta"):
        sizes = {name: count(AudioVisualEncoders(CONFIGS[name])) for name in ("xdc", "avts", "gdt")}
        sizes["mbt"] = count(MBT())
    return sizes | {"ave-vit": size_of(PRESETS["paper"].vit)}


def parameters() -> Table:
    """Trainable and frozen parameters of every preset of the library."""
    columns = ("preset", "adapters", "head", "trainable", "M", "paper's M", "frozen", "share")
    table = _table("Parameters of the presets", columns, left=("preset",))
    for name in Config.presets():
        size = size_of(Config.from_preset(name))
        numbers = (f"{number:,}" for number in (size.adapters, size.head, size.trainable))
        published = f"{TRAINABLE_M[name]:.1f}" if name in TRAINABLE_M else ""
        share = f"{size.trainable / (size.trainable + size.frozen):.1%}"
        table.add_row(name, *numbers, f"{size.trainable / 1e6:.2f}", published, f"{size.frozen:,}", share)
    return table


def networks(rows: Sequence[Row], preset: str) -> Table:
    """Every preset of every task: what it trains, and its inference as it is and as `optimize` makes it."""
    columns = ("task", "preset", "trainable M", "clips/s reference", "clips/s fast", "ratio", _HOW, "error")
    title = f"Inference of the presets{_where(rows, preset)}"
    table, before = _table(title, columns, left=("task", "preset", _HOW)), None
    measured = latest(rows, preset, "networks")
    presets = {name: Config.from_preset(name) for name in Config.presets()}
    tasks = list(dict.fromkeys(config.task for config in presets.values()))
    for name, config in sorted(presets.items(), key=lambda preset: tasks.index(preset[1].task)):
        found = [row for row in measured if row["setting"] == {"network": name}]
        plain = best(row for row in found if (row["path"], row["dtype"]) == ("reference", "float32"))
        fast_rows = [row for row in found if row["path"] == "optimized"]
        fast = best(fast_rows)
        speed, _, how, error = _cells(fast, fast_rows)
        reference = _NONE if plain is None else _number(plain["samples_per_s"])
        millions = f"{size_of(config).trainable / 1e6:.2f}"
        task = config.task if config.task != before else ""
        table.add_row(task, name, millions, reference, speed, ratio(fast, plain), how, error)
        before = config.task
    text = "Reference: the model as it is, eager in float32. Fast: `lavish_fast.optimize`, errors to float64."
    return _caption(table, text, _of_preset(preset))


# Tables 2 and 4


def table_2(rows: Sequence[Row], preset: str) -> Table:
    """Trainable parameters and samples per second of each method of Table 2."""
    columns = ("method", "trainable M", "paper's", "mode", "samples/s", "paper's", "batch", _HOW, "error")
    title = f"Table 2, UCF101: the compute columns{_where(rows, preset)}"
    table = _table(title, columns, left=("method", "mode", _HOW))
    for case, published in TABLE_2.items():
        size = table_2_sizes()[case]
        millions = f"{size.trainable / 1e6:.1f}"
        if size.adapters:
            millions = f"{size.adapters / 1e6:.2f} + {size.head / 1e6:.2f}"
        speed = f"{published.samples_per_s or '-'}"
        for mode in MODES:
            found = latest(rows, preset, case, mode)
            first = (published.name, millions, f"{published.trainable_m:g}") if mode == MODES[0] else ("", "", "")
            measured, *how = _cells(best(found), found)
            table.add_row(*first, mode, measured, speed, *how)
        table.add_section()
    return _caption(
        table,
        "Parameters are those of the paper's networks, at any preset. LAVISH: adapters, as the paper's 7.4 M, and the "
        "head of the AVE network that is timed here.",
        _PAPERS_SPEEDS,
        _of_preset(preset),
    )


def table_4_rows(rows: Sequence[Row], preset: str, mode: str) -> dict[str, tuple[Row | None, list[Row]]]:
    """The contenders of Table 4: the fastest row of each, and all that it was chosen from."""
    cmbs, lavish = latest(rows, preset, "cmbs", mode), latest(rows, preset, "ave", mode)
    choices = {
        "CMBS, float64 as published": [row for row in cmbs if row["dtype"] == "float64"],
        "CMBS, other precisions": [row for row in cmbs if row["dtype"] != "float64"],
        "LAVISH, released, as published": as_published(lavish),
        "LAVISH, released order": [row for row in lavish if row["path"] in RELEASED],
        "LAVISH, ours": [row for row in lavish if row["path"] not in RELEASED],
    }
    return {name: (best(found), found) for name, found in choices.items()}


def table_4_ratios(rows: Sequence[Row], preset: str, mode: str) -> dict[str, str]:
    """How many times as fast as CMBS LAVISH is: both as published, and the fastest of each."""
    chosen = [row for row, _ in table_4_rows(rows, preset, mode).values()]
    cmbs, lavish = best(filter(None, chosen[:2])), best(filter(None, chosen[2:]))
    return {"as published": ratio(chosen[2], chosen[0]), "fastest": ratio(lavish, cmbs)}


def table_4(rows: Sequence[Row], preset: str) -> Table:
    """CMBS against LAVISH."""
    columns = ("mode", "network", "samples/s", "paper's", "batch", _HOW, "error")
    title = f"Table 4, AVE: CMBS against LAVISH{_where(rows, preset)}"
    table = _table(title, columns, left=("mode", "network", _HOW))
    for mode in MODES:
        for i, (name, (row, found)) in enumerate(table_4_rows(rows, preset, mode).items()):
            speed = f"{TABLE_4[name.split(',')[0]]:.2f}" if name.endswith("as published") else ""
            measured, *how = _cells(row, found)
            table.add_row("" if i else mode, name, measured, speed, *how)
        for name, times in table_4_ratios(rows, preset, mode).items():
            published = _times(TABLE_4["LAVISH"] / TABLE_4["CMBS"]) if name == "as published" else ""
            table.add_row("", f"LAVISH / CMBS, {name}", times or _NONE, published)
        table.add_section()
    return _caption(
        table,
        "As published: CMBS in float64, LAVISH eager in float32.",
        _PAPERS_SPEEDS,
        _of_preset(preset),
    )


# Figure 1


def gflops(preset: str) -> dict[int, float]:
    """GFLOPs of one clip by the number of latent tokens, from the shapes."""
    config, found = PRESETS[preset].swin, {}
    for latents in LATENTS:
        changed = replace(config, adapter=replace(config.adapter, latents=latents))
        found[latents] = sum(op.total_flops for op in roofline.model_ops(changed, 1, itemsize=4)) / 1e9
    return found


def latents_curve(rows: Sequence[Row], preset: str) -> dict[int, Row]:
    """The measured rows by the number of latent tokens, all computed in one way.

    That way is the fastest per clip of those that were measured at the most points.
    """
    ways: dict[tuple, dict[int, Row]] = {}
    for row in latest(rows, preset, "latents"):
        if row["status"] == "ok" and row["setting"]["latents"] in LATENTS:
            way = tuple(row[name] for name in ("path", "execution", "dtype", "batch"))
            ways.setdefault(way, {})[row["setting"]["latents"]] = row
    most = max(map(len, ways.values()), default=0)
    full = (points for points in ways.values() if len(points) == most)
    return min(full, key=lambda points: sum(1 / row["samples_per_s"] for row in points.values()), default={})


def figure_1(rows: Sequence[Row], preset: str) -> Table:
    """Cost against the number of latent tokens, as a table."""
    work, curve = gflops(preset), latents_curve(rows, preset)
    base = curve.get(BEST_LATENTS)
    title = f"Figure 1, AVE: cost against latent tokens{_where(rows, preset)}"
    against = f"against {BEST_LATENTS}"
    table = _table(title, ("latents", "GFLOPs a clip", against, "median ms", "20-80 % ms", f"time {against}"))
    for latents, flops in work.items():
        cells = [
            str(latents),
            f"{flops:#.4g}" if flops < 100 else f"{flops:,.2f}",
            _times(flops / work[BEST_LATENTS], 3),
        ]
        if row := curve.get(latents):
            spread = f"{_number(row['q20_ms'])}-{_number(row['q80_ms'])}"
            relative = ratio(base, row)  # of speeds, at one batch size
            cells += [_number(row["median_ms"]), spread, relative]
        else:
            cells += [_NONE, "", ""]
        table.add_row(*cells)
    slope = (work[LATENTS[-1]] - work[LATENTS[0]]) / (LATENTS[-1] - LATENTS[0])
    return _caption(
        table,
        f"Each latent token adds {slope * 1e3:,.4g} MFLOPs to a clip. The paper: cost grows linearly, accuracy is "
        f"best at {BEST_LATENTS}.",
        f"Measured: {_how(row)}, batch {row['batch']}." if (row := best(curve.values())) else "",
    )


def figure_1_chart(rows: Sequence[Row], preset: str) -> Figure:
    """Two panels over the number of latent tokens: GFLOPs of a clip, and the measured time with its 20-80 % range."""
    from matplotlib.figure import Figure

    ink, muted, blue, orange, grey = "#1f2933", "#7b8794", "#0072b2", "#e69f00", "#dde2e7"
    work, curve = gflops(preset), latents_curve(rows, preset)
    points = sorted(curve)
    row = curve[points[0]] if curve else None
    times = {latents: curve[latents]["median_ms"] for latents in points}
    chart = Figure(figsize=(10, 3.9), dpi=120, facecolor="white", layout="constrained")
    chart.get_layout_engine().set(w_pad=0.15, h_pad=0.1, wspace=0.04)
    device = f", {row['device']}" if row else ""
    title = f"Cost against latent tokens: AVE inference, {preset} preset{device}"
    chart.suptitle(title, x=0.015, ha="left", color=ink, fontsize=12, weight="bold", parse_math=False)
    unit = f"ms, a batch of {row['batch']}" if row and row["batch"] > 1 else "ms a clip"
    panels = (
        (f"GFLOPs a clip, from the shapes{_growth(work)}", work),
        (f"Measured {unit}{_growth(times)}", times),
    )
    for axes, (label, values) in zip(chart.subplots(1, 2), panels):
        axes.set_title(label, fontsize=10.5, color=ink, loc="left")
        if not values:
            axes.text(0.5, 0.5, _NONE, color=muted, fontsize=11, ha="center", va="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(grey)
            continue
        axes.set_xlabel("latent tokens", fontsize=9.5, color=muted)
        axes.tick_params(labelsize=9.5, colors=muted, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(grey)
        axes.grid(axis="y", color=grey, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.plot([*values], [*values.values()], color=blue, linewidth=2, marker="o", markersize=5)
        if values is times:
            low, high = ([curve[latents][name] for latents in points] for name in ("q20_ms", "q80_ms"))
            axes.fill_between(points, low, high, color=blue, alpha=0.16, linewidth=0)
            axes.set_xlabel(f"latent tokens ({_how(row)}; band: 20-80 %)", fontsize=9.5, color=muted)
        if BEST_LATENTS in values:
            axes.plot(BEST_LATENTS, values[BEST_LATENTS], "o", color=orange, markersize=8, markeredgecolor="white")
        axes.set_xticks([BEST_LATENTS, *LATENTS[3:]])
        axes.set_xlim(0, LATENTS[-1] + 2)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.margins(y=0.14)
    chart.axes[0].annotate(
        f"{BEST_LATENTS}: best accuracy in the paper",
        (BEST_LATENTS, work[BEST_LATENTS]),
        xytext=(12, -3),
        textcoords="offset points",
        va="top",
        color=ink,
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
    return chart


def _growth(values: Mapping[int, float]) -> str:
    if not {LATENTS[0], LATENTS[-1]} <= values.keys():
        return ""
    return f": {values[LATENTS[-1]] / values[LATENTS[0]] - 1:+.1%} from {LATENTS[0]} to {LATENTS[-1]}"


def draw_figure_1(rows: Sequence[Row], preset: str, stem: Path) -> list[Path]:
    """Writes the picture as SVG and PNG, and returns where."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".svg", ".png")]
    with rc_context({"svg.hashsalt": "figure 1", "svg.fonttype": "none"}):
        chart = figure_1_chart(rows, preset)
        for path in paths:
            chart.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


# The headline

CONTENDERS = (
    "LAVISH, ours",
    "timm's bare backbone, eager",
    "timm's bare backbone, compiled",
    "LAVISH, released, as published",
    "LAVISH, released, compiled",
)


def contenders(rows: Sequence[Row], preset: str) -> dict[int, dict[str, Row | None]]:
    """The fastest rows by batch size: of LAVISH here, timm's bare Swin-V2 on the same images, the released order."""
    lavish = latest(rows, preset, "ave")
    timm = [row for row in latest(rows, preset, "backbone") if row["path"] == "timm"]
    timm = [row for row in timm if row["setting"] == {"backbone": "swin"}]
    choices = (
        [row for row in lavish if row["path"] not in RELEASED],
        [row for row in timm if not is_compiled(row)],
        [row for row in timm if is_compiled(row)],
        as_published(lavish),
        [row for row in lavish if row["path"] in RELEASED and is_compiled(row)],
    )
    return {
        batch: {name: best(row for row in found if row["batch"] == batch) for name, found in zip(CONTENDERS, choices)}
        for batch in sorted({row["batch"] for found in choices for row in found})
    }


def headline(rows: Sequence[Row], preset: str) -> Table:
    """Whether LAVISH with all its adapters is faster than timm's compiled bare backbone on the same images."""
    columns = ("batch", "network", "samples/s", "ours / this", _HOW, "error")
    title = f"LAVISH with all its adapters against timm's bare backbone, inference{_where(rows, preset)}"
    table, answers = _table(title, columns, left=("network", _HOW)), []
    ours, _, compiled, *_ = CONTENDERS
    for batch, chosen in (contenders(rows, preset) or {"": dict.fromkeys(CONTENDERS)}).items():
        for name, row in chosen.items():
            measured, _, how, error = _cells(row)
            times = "" if name == ours else ratio(chosen[ours], row)
            table.add_row(str(batch) if name == ours else "", name, measured, times, how, error)
        table.add_section()
        times = speedup(chosen[ours], chosen[compiled])
        answer = _NONE
        if times is not None:
            answer = f"{'yes' if times > 1 else 'no'}, {ratio(chosen[ours], chosen[compiled])}"
        answers.append(f"{answer} at batch {batch}" if batch else answer)
    return _caption(
        table,
        f"Is LAVISH faster than timm's compiled bare backbone on the same images? {'; '.join(answers).capitalize()}.",
        "The bare backbone has neither adapters nor head. As published: eager in float32.",
    )


# All of it


def report(rows: Sequence[Row], preset: str) -> list[Table]:
    """Every table, the headline first. rows: of one device. preset: "paper" or "small", whose rows are used."""
    made = [function(rows, preset) for function in (headline, table_2, table_4, figure_1)]
    return [*made, parameters(), networks(rows, preset)]


def write(folder_of_rows: str | os.PathLike, preset: str, out_folder: str | os.PathLike) -> list[Path]:
    """Writes tables.md, figure_1.svg and figure_1.png of a device's rows, and returns where."""
    rows, out = load(folder_of_rows), Path(out_folder)
    text = "\n".join(markdown(table) for table in report(rows, preset))
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(text, encoding="utf-8")
    return [out / "tables.md", *draw_figure_1(rows, preset, out / "figure_1")]


def markdown(table: Table) -> str:
    """A table as GitHub's markdown, its title above and its caption below."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rules = ["---:" if column.justify == "right" else ":---" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns))
    lines = [f"### {table.title}", "", line(column.header for column in table.columns), line(rules), *map(line, rows)]
    return "\n".join([*lines, "", *([str(table.caption), ""] if table.caption else [])])


def _table(title: str, columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    # Text, because a device's name may have brackets that rich would take for markup.
    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    for column in columns:
        wraps = column == _HOW
        table.add_column(column, justify="left" if column in left else "right", no_wrap=not wraps)
    return table


def _caption(table: Table, *sentences: str) -> Table:
    if any(str(cell).endswith(f"x{_APART}") for column in table.columns for cell in column.cells):
        sentences += ("Ratios with an asterisk are of rows of two commits or days.",)
    table.caption = Text(" ".join(filter(None, sentences)))
    return table


def _where(rows: Sequence[Row], preset: str) -> str:
    devices = dict.fromkeys(row["device"] for row in rows)
    return "".join(f", {part}" for part in (*devices, f"{preset} preset"))


def _of_preset(preset: str) -> str:
    if preset == "paper":
        return ""
    return f"Our speeds are of the {preset} preset, networks and clips cut down: not to be compared with the paper's."


def _cells(row: Row | None, found: Sequence[Row] = ()) -> tuple[str, str, str, str]:
    """Speed, batch, how and error; of what has no speed, what became of it."""
    if row is None:
        statuses = Counter(row["status"] for row in found)
        return _NONE, "", ", ".join(f"{number} {status}" for status, number in statuses.items()), ""
    return _number(row["samples_per_s"]), str(row["batch"]), _how(row), f"{row['error']:.1e}"


def _how(row: Row) -> str:
    return f"{row['path']} {row['execution']} {row['dtype']}"


def _number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.{max(0, 2 - len(str(int(value))) + 1)}f}" if value >= 1 else f"{value:.3g}"


def _times(factor: float, digits: int = 2) -> str:
    return f"{factor:.{digits}f}x"
