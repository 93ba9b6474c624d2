"""The command `python -m benchmarks`. Exit codes: 0 done, 1 wrong or failed, 2 bad usage, 130 interrupted."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import results

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.roofline import Limits
    from benchmarks.run import Selection

app = typer.Typer(
    name="benchmarks",
    help="What lavish_fast is measured by: parity first, then the clock.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")]
PresetName = Annotated[str | None, typer.Option(help="small or paper; by default paper on cuda, small on a CPU.")]
Out = Annotated[Path | None, typer.Option(help="File that rows are appended to; by default under benchmarks/results.")]


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports as an error that there is no card
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # so does Inductor
    try:
        code = app(standalone_mode=False, prog_name="python -m benchmarks")
    except (typer.Abort, KeyboardInterrupt):
        print("benchmarks: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        if not hasattr(error, "format_message") and not isinstance(error, (ValueError, OSError, ImportError)):
            raise
        print(f"benchmarks: {' '.join(text.split())}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)


def _console() -> Console:
    from rich.console import Console

    # A file or a pipe has no width of its own: wide enough for every table.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def choose(what: str, given: str | None, known: Iterable[str], default: Iterable[str]) -> list[str]:
    """The names of a comma-separated list, each of which has to be known; without a list the default.

    Raises: typer.BadParameter listing what exists.
    """
    if given is None:
        return list(default)
    known, names = list(known), [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise typer.BadParameter(f"{what}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return list(dict.fromkeys(names))


def choose_one(what: str, given: str | None, known: Iterable[str], default: str) -> str:
    """The same for an option that takes one name."""
    names = choose(what, given, known, [default])
    if len(names) > 1:
        raise typer.BadParameter(f"{what}: expected one of {', '.join(known)}, got {given}")
    return names[0]


def _device(given: str | None) -> str:
    import torch

    cuda = torch.cuda.is_available()
    device = choose_one("device", given, ("cpu", "cuda"), "cuda" if cuda else "cpu")
    if device == "cuda" and not cuda:
        raise typer.BadParameter("device: expected one that is here: cpu, got cuda")
    return device


def _preset(given: str | None, device: str) -> str:
    from benchmarks.cases import PRESETS

    return choose_one("preset", given, PRESETS, "paper" if device == "cuda" else "small")


def _batches(given: str | None, device: str) -> list[int]:
    if given is None:
        return [1, 2] if device == "cpu" else [1, 2, 4, 8, 16, 32]
    try:
        batches = list(dict.fromkeys(int(part) for part in given.split(",")))
    except ValueError:
        batches = [0]
    if any(batch < 1 or (batch > 1 and batch % 2) for batch in batches):
        raise typer.BadParameter(f"batch: expected 1 or even numbers of clips, got {given}")
    return batches


@app.command()
def run(
    case: Annotated[str | None, typer.Option(help="Cases, by commas; all without it.")] = None,
    mode: Annotated[str | None, typer.Option(help="inference, training.")] = None,
    path: Annotated[str | None, typer.Option(help="Ways to compute a case: reference, released, timm ...")] = None,
    execution: Annotated[str | None, typer.Option(help="eager, compile, blocks, graph ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float64, float32, tf32, bfloat16-autocast ...")] = None,
    batch: Annotated[str | None, typer.Option(help="Clips at once, by commas.")] = None,
    preset: PresetName = None,
    device: Device = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing per candidate.")] = 0.2,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which nothing new begins.")] = float("inf"),
    limits: Annotated[Path | None, typer.Option(exists=True, help="What `roofline --out` wrote.")] = None,
    out: Out = None,
) -> int:
    """Measures cases and appends a row for each candidate.

    Without --execution and --dtype each case has its usual ones: eager, and on a card the baselines also compiled.
    """
    import torch

    from benchmarks.cases import CASES, MODES, PATHS
    from benchmarks.measure import EXECUTIONS, PRECISIONS
    from benchmarks.roofline import DTYPES
    from benchmarks.run import Selection

    device = _device(device)
    if device == "cuda":
        torch.cuda.init()  # rows and their folder have the name of the card that it takes
        if find_spec("pynvml") is None:
            _console().print("no clocks, power and driver: nvidia-ml-py is missing: pip install -e '.\\[benchmarks]'")
    selection = Selection(
        device,
        _preset(preset, device),
        _batches(batch, device),
        cases=choose("case", case, CASES, CASES),
        modes=choose("mode", mode, MODES, MODES),
        precisions=None if dtype is None else choose("dtype", dtype, PRECISIONS, ()),
        executions=None if execution is None else choose("execution", execution, EXECUTIONS, ()),
        paths=None if path is None else choose("path", path, PATHS, ()),
        seconds=seconds,
        budget=budget,
    )
    known = {name: found for name in DTYPES if limits and (found := _last_limits(limits, name))}
    return measure(selection, out or results.folder(device) / "bench.jsonl", _console(), known)


@app.command()
def ladder(
    mode: Annotated[str, typer.Option(help="inference or training.")] = "inference",
    preset: PresetName = None,
    device: Device = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips at once.")] = 2,
    execution: Annotated[
        str, typer.Option(help="How the rungs above bfloat16 run: blocks (compiled) or eager.")
    ] = "blocks",
    seconds: Annotated[float, typer.Option(min=0, help="Of timing per rung.")] = 2.0,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds that one rung may take in all.")] = float("inf"),
    budget: Annotated[float, typer.Option(min=0, help="Seconds that all of them may take.")] = float("inf"),
    rungs: Annotated[
        str | None, typer.Option(help="Which to measure, by commas from 1; the others' last rows are in the file.")
    ] = None,
    out: Out = None,
) -> int:
    """What each technique adds, a fresh process a rung: appends rows, draws ladder.svg and .png beside them.

    Those of training are called ladder-training.
    """
    from benchmarks import ladder as module

    mode = choose_one("mode", mode, module.RUNGS, mode)
    device = _device(device)
    preset = _preset(preset, device)
    execution = choose_one("execution", execution, ("blocks", "eager"), "blocks")
    _batches(str(batch), device)
    name = "ladder.jsonl" if mode == "inference" else f"ladder-{mode}.jsonl"
    out = out or results.folder(device) / name
    every = {str(i): rung for i, rung in enumerate(module.RUNGS[mode], 1)}
    wanted = [every[i] for i in choose("rungs", rungs, every, every)]
    console, measured = _console(), []
    with console.status("") as status:
        options = {"rungs": wanted, "timeout": timeout, "budget": budget}
        climb = module.climb(device, mode, preset, batch, execution, seconds, **options)
        for rung in wanted:
            status.update(rung.label)
            row = {**next(climb), "rung": rung.label}
            measured.append(row)
            results.append(out, [row])
            console.print(f"{rung.label:26}{line(row)}", soft_wrap=True)
    kept = results.read(out)
    drawn = [(rung, module.latest(kept, rung, row)) for rung in every.values()]
    pictures = module.draw([(rung, row) for rung, row in drawn if row is not None], out.with_suffix(""))
    console.print(f"rows in {out}, pictures in {', '.join(map(str, pictures))}", soft_wrap=True)
    return 1 if any(row["status"] in ("wrong", "failed") for row in measured) else 0


@app.command()
def profile(
    mode: Annotated[str, typer.Option(help="inference or training.")] = "inference",
    path: Annotated[str, typer.Option(help="As for run.")] = "optimized",
    execution: Annotated[str, typer.Option(help="As for run.")] = "own",
    dtype: Annotated[str, typer.Option(help="As for run.")] = "bfloat16",
    batch: Annotated[str, typer.Option(help="Clips at once, by commas.")] = "2,32",
    preset: PresetName = None,
    device: Device = None,
    out: Out = None,
) -> int:
    """Where the AVE network's time goes on a card, kernel by kernel: tables, and a row for each batch size.

    The row has a call's time by the clock too, as of `run`; the kernels' sum less than it is what the card waited.
    """
    from benchmarks import profile as module
    from benchmarks.cases import CASES, MODES
    from benchmarks.measure import EXECUTIONS, PRECISIONS
    from benchmarks.run import Group, Selection

    device = _device(device)
    if device != "cuda":
        raise typer.BadParameter("device: expected cuda, whose kernels are listed, got cpu")
    mode = choose_one("mode", mode, MODES, mode)
    how = {
        "path": choose_one("path", path, CASES["ave"].paths, path),
        "execution": choose_one("execution", execution, EXECUTIONS, execution),
        "dtype": choose_one("dtype", dtype, PRECISIONS, dtype),
    }
    selection = Selection(device, _preset(preset, device), _batches(batch, device), cases=["ave"], modes=[mode])
    console, failed, shared, limits = _console(), False, {}, {}
    for key in selection.groups():
        group = Group(selection, key, limits, shared, time.monotonic())
        candidate = group.prepare(**how)
        if candidate.call is not None:
            group.time([candidate])
        row = candidate.row
        console.print(line(row), soft_wrap=True)
        if candidate.call is None:
            failed = True
            continue
        kernels = module.kernels(candidate.call)
        console.print(module.table(kernels, f"{mode} of {key['batch']} clips, {path} {execution} {dtype}"))
        results.append(out or results.folder(device) / "profile.jsonl", [{**row, "kernels_us": module.row(kernels)}])
    return int(failed)


@app.command()
def tune(
    op: Annotated[str | None, typer.Option(help="One or more kernels, by default all.")] = None,
    preset: PresetName = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Clips at once.")] = 8,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing per candidate.")] = 0.05,
    stage: Annotated[int | None, typer.Option(min=1, help="One stage of the backbone, by default all.")] = None,
    builders: Annotated[int | None, typer.Option(min=0, help="Processes that build candidates; one a core.")] = None,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which no candidate begins.")] = float("inf"),
    device: Device = None,
) -> int:
    """Finds launch constants for the card at hand and prints rows to paste into kernels/_tuning.py."""
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import nullcontext
    from multiprocessing import get_context

    import torch

    from benchmarks import tune as module

    device = _device(device)
    if device != "cuda":
        raise typer.BadParameter("device: expected cuda, whose kernels are tuned, got cpu")
    dtype = choose_one("dtype", dtype, ("bfloat16", "float16", "float32"), "bfloat16")
    preset, until = _preset(preset, device), time.monotonic() + budget
    targets = [
        module.Target(name, preset, at, getattr(torch, dtype), batch, device)
        for name in choose("op", op, module.OPS, module.OPS)
        for at in module.stages(name, preset)
        if stage in (None, at)
    ]
    if not targets:
        raise typer.BadParameter(f"stage: expected one of the backbone's, got {stage}")
    builders = results.cores() if builders is None else builders
    # A process that has begun with CUDA cannot be forked.
    processes = ProcessPoolExecutor(builders, get_context("spawn")) if builders else nullcontext()
    console, wrong = _console(), False
    with console.status("") as status, processes as pool:
        for target in targets:
            name, tuned = f"{target.op} stage {target.stage}", None
            status.update(f"{name}: building")
            try:
                for tuned in module.tune(target, seconds, builders=pool, until=until):
                    status.update(f"{name}: {tuned.tried} tried, {tuned.milliseconds:.4f} ms")
            except ValueError as error:  # of one width; the kernel may take the next
                console.print(f"    # {name}: refused: {error}", soft_wrap=True, markup=False)
                continue
            finally:  # also of what was interrupted
                if tuned is not None:
                    console.print(tuned.row(), soft_wrap=True)
                    left = [f"{tuned.tried} tried", *(f"{count} {why}" for why, count in tuned.dropped.items())]
                    console.print(f"    # stage {target.stage}: {', '.join(left)}", soft_wrap=True)
            wrong |= not tuned.dropped.keys().isdisjoint(("wrong", "default wrong"))
    return 1 if wrong else 0


@app.command()
def roofline(
    model: Annotated[str, typer.Option(help="A preset of lavish_fast.Config.")] = "ave-swinv2-large",
    batch: Annotated[int, typer.Option(min=1, help="Clips at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="float64, float32, tf32, bfloat16, float16.")] = "bfloat16",
    training: Annotated[bool, typer.Option("--training", help="A training step instead of a forward.")] = False,
    bare: Annotated[bool, typer.Option("--bare", help="The backbone alone, without adapters and head.")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="Each adapter as one kernel instead of four.")] = False,
    tflops: Annotated[float | None, typer.Option(help="The device's matrix products, 1e12 FLOP/s.")] = None,
    gb_per_s: Annotated[float | None, typer.Option(help="Its memory, 1e9 bytes/s, read plus written.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure both limits again.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda: whose limits.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of measured limits, by default under results/.")] = None,
) -> None:
    """Bytes, FLOPs and the least time of every op, from the shapes alone.

    Limits that are not given are the last that were measured on this device; they are measured where there are none.
    """
    from benchmarks import roofline as module
    from lavish_fast.config import Config

    known = [name for name in Config.presets() if module.countable(Config.from_preset(name))]
    model = choose_one("model", model, known, model)
    dtype = choose_one("dtype", dtype, module.DTYPES, dtype)
    device = choose_one("device", device, ("cpu", "cuda"), "cuda" if results.has_card() else "cpu")
    if (tflops is None) != (gb_per_s is None):
        raise typer.BadParameter("limits: expected both --tflops and --gb-per-s, or neither")
    console = _console()
    if tflops is None or gb_per_s is None:
        device = _device(device)
        out = out or results.folder(device) / "limits.jsonl"
        limits = None if measure else _last_limits(out, dtype)
        if limits is None:
            with console.status(f"measuring {device}"):
                limits = module.measure_limits(device, dtype)
            row = {"date": results.now(), **results.environment(device), "dtype": dtype, **vars(limits)}
            results.append(out, [row])
        source = f"measured on {results.device_name(device)}"
    else:
        if not (tflops > 0 and gb_per_s > 0):
            raise typer.BadParameter(f"limits: expected positive numbers, got {tflops:g} TFLOP/s and {gb_per_s:g} GB/s")
        limits, source = module.Limits(tflops, gb_per_s), "given"
    itemsize = {"float64": 8, "float32": 4, "tf32": 4}.get(dtype, 2)
    ops = module.model_ops(
        Config.from_preset(model), batch, itemsize=itemsize, training=training, adapters=not bare, fused=fused
    )
    console.print(module.table(ops, limits, batch))
    what = "training step" if training else "forward"
    console.print(
        f"{model}, {what} of {batch} clips in {dtype}; limits {source}: "
        f"{limits.tflops:.4g} TFLOP/s, {limits.gb_per_s:.4g} GB/s",
        soft_wrap=True,
    )


def _last_limits(path: Path, dtype: str) -> Limits | None:
    import json

    from benchmarks.roofline import Limits

    found = None
    for number, text in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(text)
            if row["dtype"] == dtype:
                found = Limits(float(row["tflops"]), float(row["gb_per_s"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected measured limits, got {text[:60]!r}") from None
    return found


@app.command()
def tables(
    rows: Annotated[Path | None, typer.Option(help="Folder of rows; by default this device's.")] = None,
    preset: Annotated[str | None, typer.Option(help="small or paper; by default the one with more rows.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables.md and Figure 1; by default that of the rows.")
    ] = None,
) -> None:
    """The compute columns of the paper's Tables 2 and 4 and Figure 1, and whether LAVISH beats timm's bare backbone."""
    from benchmarks import tables as module
    from benchmarks.cases import PRESETS

    folder, found, preset = _rows(rows, preset, PRESETS)
    console = _console()
    for table in module.report(found, preset):
        console.print(table)
        console.print()
    console.print(f"in {', '.join(map(str, module.write(folder, preset, out or folder)))}", soft_wrap=True)


def _rows(
    rows: Path | None, preset: str | None, presets: Iterable[str], *others: str
) -> tuple[Path, list[dict[str, Any]], str]:
    """A folder of rows, by default this device's, its rows, and the preset, by default the one with more of them."""
    from benchmarks.tables import load

    folder = rows or results.folder("cuda" if results.has_card() else "cpu")
    found = load(folder, *others)
    measured = Counter(row["preset"] for row in found if row["status"] == "ok")
    return folder, found, choose_one("preset", preset, presets, max(presets, key=measured.__getitem__))


@app.command()
def memory(
    mode: Annotated[str, typer.Option(help="inference or training.")] = "training",
    rows: Annotated[Path | None, typer.Option(help="Folder of rows; by default this device's.")] = None,
    preset: Annotated[str | None, typer.Option(help="small or paper; by default the one with more rows.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the picture; by default that of the rows.")] = None,
) -> None:
    """Peak memory of the AVE network against the batch, and MiB a clip: a table, memory-training.svg and .png.

    From rows of `run --case ave --mode training --batch 1,2,4,8,16,32,64` and of `profile`, which has a peak too.
    """
    from benchmarks import memory as module
    from benchmarks.cases import MODES, PRESETS

    mode = choose_one("mode", mode, MODES, mode)
    folder, found, preset = _rows(rows, preset, PRESETS, "profile")
    curves, console = module.curves(found, preset, mode), _console()
    if not curves:
        console.print(f"{folder}: no {mode} of case ave was measured at the {preset} preset", soft_wrap=True)
        return
    console.print(module.table(curves))
    title = f"AVE {mode}: memory against the batch, {preset} preset, {found[0]['device']}"
    pictures = module.draw(curves, title, (out or folder) / f"memory-{mode}")
    console.print(f"in {', '.join(map(str, pictures))}", soft_wrap=True)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A file of rows.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """How much faster B is than A, with 95 % intervals; says when a difference is noise."""
    from benchmarks import compare as module

    _console().print(module.table(module.compare(results.read(a), results.read(b))))


def measure(selection: Selection, out: Path, console: Console, limits: dict[str, Limits]) -> int:
    """Measures with a progress bar, a line a row; returns the exit code."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks.run import measure_all

    counts: Counter[str] = Counter()

    def report(row: dict[str, Any]) -> None:
        results.append(out, [row])
        counts[row["status"]] += 1
        console.print(line(row), soft_wrap=True)

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(selection.groups()))
        for description in measure_all(selection, report, limits):
            progress.update(task, description=description)
            progress.advance(task)
    shown = ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "nothing: no case has that path"
    console.print(f"{shown}; rows in {out}", soft_wrap=True)
    return 1 if counts["wrong"] or counts["failed"] or not counts else 0


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    from rich.markup import escape

    values = row["setting"].items()
    setting = " ".join(value if isinstance(value, str) else f"{name[0]}{value}" for name, value in values)
    what = f"{row['case']} {row['mode'][:5]} b{row['batch']} {setting}".ljust(34)
    how = f"{row.get('path', '')} {row.get('execution', '')} {row.get('dtype', '')}".ljust(40)
    if row["status"] != "ok":
        return f"[dim]{what} {how}[/] [yellow]{row['status']}[/]: {escape(str(row['reason']))}"
    memory = f"{row['peak_mib']:,.0f} MiB"
    compiled = "" if row["compile_s"] is None else f" compile {row['compile_s']:.0f} s"
    return (
        f"{what} {how} {row['median_ms']:9.3f} ms {row['samples_per_s']:9.2f}/s {row['tflops_per_s']:7.3f} TFLOP/s "
        f"{row['roofline_share']:6.1%} error {row['error']:.1e} {memory}{compiled}"
    )


if __name__ == "__main__":
    main()
