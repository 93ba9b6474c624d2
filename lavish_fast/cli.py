"""The command `lavish-fast`: what people type. Exit codes: 0 done, 1 failed work, 2 bad usage, 130 interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lavish_fast.config import Config, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from lavish_fast.media import Clip
    from lavish_fast.model import Model
    from lavish_fast.ops import Choice
    from lavish_fast.training import Evaluation

_PRESETS = {
    "ave": "ave-swinv2-large",
    "avs": "avs-swinv2-large",
    "avqa": "avqa-swinv2-large",
    "action": "action-videomae-base",
}
_CHUNK = 10  # seconds that go through the model at once; AVE's clips are that long
_KNOWN = (ValueError, OSError, RuntimeError, ImportError, ArithmeticError)

app = typer.Typer(
    name="lavish-fast",
    help="LAVISH: audio-visual events in video files, by a frozen vision transformer that also listens.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command and exits. Errors are one line on stderr, unless --debug asks for the traceback."""
    options = SimpleNamespace(debug=False)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(args, standalone_mode=False, obj=options, prog_name="lavish-fast")
        except Exception as error:
            if options.debug:
                raise
            # Typer makes an Abort of an EOFError.
            cause = (isinstance(error, typer.Abort) and error.__cause__) or error
            code = getattr(cause, "exit_code", 1)
            _say_error(_one_line(cause))
    if code == 130:
        _say_error("interrupted")
    sys.exit(code or 0)


def _one_line(error: Exception) -> str:
    if hasattr(error, "format_message"):  # bad usage, found by typer or below
        text = error.format_message()
    elif isinstance(error, _KNOWN) and str(error):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (--debug before the command shows where)"
    return " ".join(text.split())


def _say_error(text: str) -> None:
    rank = f" (rank {_rank()})" if _rank() else ""
    if text:  # there is none where help was printed instead
        print(f"lavish-fast{rank}: {_printable(text)}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {_printable(str(message))}", file=sys.stderr)


def _rank() -> int:
    """Of this process under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def _printable(text: str | Path) -> str:
    """Names of files may hold anything: line breaks, terminal codes, bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _console() -> Console:
    from rich.console import Console

    return Console(quiet=_rank() > 0, highlight=False)


@contextmanager
def _bad_usage(*errors: type[Exception]) -> Iterator[None]:
    """These errors are what was typed to blame for."""
    try:
        yield
    except errors as error:
        raise typer.BadParameter(str(error)) from error


# Arguments that several commands have

Task = Annotated[
    Literal["ave", "avs", "avqa", "action"],
    typer.Argument(help="Event localisation, segmentation, question answering or action recognition."),
]
Data = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="Folder of a data set in the layout of the task's own.")
]
Checkpoint = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="Folder of a trained model, such as the best/ of a run.")
]
Backbone = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="The frozen weights: a file or a timm model's name. The configuration names them otherwise.",
    ),
]
_OF_TASK = "the paper's for the task"
BatchSize = Annotated[int, typer.Option(help="Clips that go through the model at once, per device.")]
Amp = Annotated[
    Literal["bf16", "fp16"] | None, typer.Option(help="bfloat16, or float16 with loss scaling in training.")
]
Workers = Annotated[int, typer.Option(help="Processes that decode.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from lavish_fast import __version__

        print(f"lavish_fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    context.obj.debug = debug


@app.command()
def demo(
    task: Task = "ave",
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder for clips, models and report.html.", show_default="demo, or demo-TASK"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the clips and of the training.")] = 0,
) -> None:
    """Learn a task from small generated clips on this machine in minutes, and report how well."""
    from lavish_fast import demos

    demos.run(task, out or Path("demo" if task == "ave" else f"demo-{task}"), seed=seed, console=_console())


@app.command()
def localize(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", exists=True, help="Video files, or folders.")],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for localize.jsonl and a picture a video.")] = Path(
        "localize"
    ),
    backbone: Backbone = None,
) -> None:
    """Name the event in each second of videos.

    Writes OUT/localize.jsonl, a line a second, and a picture for each video. A file that cannot be read is reported
    and left out, and the exit code is 1.
    """
    import torch
    from rich.markup import escape
    from rich.progress import track

    from lavish_fast import media, plots

    with _bad_usage(media.MediaError):
        files = list(dict.fromkeys(file for video in videos for file in media.find_videos(video)))
    if not files:
        raise typer.BadParameter(f"expected video files in {videos[0]}, got none", param_hint="VIDEO...")
    model = _load(checkpoint, backbone, "ave")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    console, classes, failed = _console(), model.config.classes, 0
    out.mkdir(parents=True, exist_ok=True)
    clips = media.load_clips(
        files,
        frames=None,
        img_size=model.config.backbone.img_size,
        spectrogram=model.config.spectrogram,
    )
    pictures = _picture_names(files)
    with open(out / "localize.jsonl", "w", encoding="utf-8") as lines:
        progress = track(
            clips, "localize", len(files), console=console, transient=True, disable=not console.is_terminal
        )
        for (file, clip), picture in zip(progress, pictures):
            if isinstance(clip, media.MediaError):
                failed += 1
                _say_error(str(clip))
                print(json.dumps({"video": str(file), "error": str(clip)}), file=lines, flush=True)
                continue
            for message in clip.warnings:
                _show_warning(message)
            probabilities = _probabilities(model, clip)
            seconds = clip.duration / len(probabilities)
            rows = _segments(probabilities, probabilities.argmax(1), classes, seconds)
            for row in rows:
                print(json.dumps({"video": str(file)} | row), file=lines, flush=True)
            figure = plots.timeline(clip, probabilities, classes, title=_printable(file.name), seconds=seconds)
            plots.save(figure, out / picture)
            console.print(_event_table(_printable(file), rows), f"events: {escape(_summary(rows))}", "", sep="\n")
    console.print(f"{len(files) - failed} of {len(files)} videos, in {escape(_printable(out))}/", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _probabilities(model: Model, clip: Clip) -> Tensor:
    """(T, K) of a clip of any length: the model takes each second on its own."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        chunks = zip(clip.audio.split(_CHUNK), clip.video.split(_CHUNK))
        return torch.cat([model(a[None].to(device), v[None].to(device)).float().cpu() for a, v in chunks])


def _load(checkpoint: Path, backbone: str | None, task: str) -> Model:
    from lavish_fast.model import Model

    with _bad_usage(FileNotFoundError):
        model = Model.from_pretrained(checkpoint, backbone=backbone)
    if model.config.task != task:
        raise typer.BadParameter(
            f"expected a model for {task}, got one for {model.config.task}", param_hint="--checkpoint"
        )
    return model


def _segments(probabilities: Tensor, decided: Tensor, classes: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """A row for each segment: probabilities (T, K), class indices (T,). start and end are in seconds."""
    return [
        {
            "segment": i,
            "start": round(i * seconds, 3),
            "end": round((i + 1) * seconds, 3),
            "event": classes[k],
            "probability": round(float(probabilities[i, k]), 6),
        }
        for i, k in enumerate(decided.tolist())
    ]


def _span(start: float, end: float) -> str:
    return f"{round(start, 1):g}-{round(end, 1):g}"


def _event_table(name: str, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from lavish_fast.tasks.ave import BACKGROUND

    table = Table(title=Text(name), title_justify="left", title_style="bold")
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("event")
    table.add_column("probability", justify="right")
    for row in rows:
        style = "dim" if row["event"] == BACKGROUND else ""
        table.add_row(_span(row["start"], row["end"]), Text(row["event"]), f"{row['probability']:.2f}", style=style)
    return table


def _summary(rows: list[dict[str, Any]]) -> str:
    """ "Bark 2-6 s (0.93); Truck 8-10 s (0.71)": neighbours of one event merged, with their mean probability."""
    from lavish_fast.tasks.ave import BACKGROUND

    events = []
    for event, run in groupby(rows, key=lambda row: row["event"]):
        run = list(run)
        if event != BACKGROUND:
            mean = sum(row["probability"] for row in run) / len(run)
            events.append(f"{event} {_span(run[0]['start'], run[-1]['end'])} s ({mean:.2f})")
    return "; ".join(events) or "none"


def _picture_names(files: Sequence[Path]) -> list[str]:
    """A name for each file's picture. Two names that some file systems hold equal are told apart by a number."""
    names: dict[str, str] = {}
    for file in files:
        candidates = (f"{file.stem}{'' if n == 1 else f'-{n}'}.png" for n in range(1, len(files) + 1))
        name = next(name for name in candidates if name.casefold() not in names)
        names[name.casefold()] = name
    return list(names.values())


@app.command()
def train(
    task: Task,
    data: Data,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for best/, last/, log.jsonl and tensorboard/.")],
    preset: Annotated[
        str | None, typer.Option(help="A named configuration.", show_default="TASK-swinv2-large, action-videomae-base")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A config.json instead of a preset.")
    ] = None,
    backbone: Backbone = None,
    modality: Annotated[
        Literal["audio+video", "video", "audio"] | None, typer.Option(help="The streams that run.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs at most.", show_default=_OF_TASK)] = None,
    patience: Annotated[
        int | None, typer.Option(help="Epochs without a better validation score before it ends.", show_default=_OF_TASK)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Clips that go through the model at once, per device.", show_default=_OF_TASK)
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches to a step.", show_default=_OF_TASK)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the adapters.", show_default=_OF_TASK)] = None,
    head_lr: Annotated[float | None, typer.Option(help="Learning rate of the head.", show_default=_OF_TASK)] = None,
    lr_step: Annotated[
        int | None, typer.Option(help="Multiply both by --lr-gamma every so many epochs.", show_default=_OF_TASK)
    ] = None,
    lr_gamma: Annotated[float | None, typer.Option(help="See --lr-step.", show_default=_OF_TASK)] = None,
    amp: Amp = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and drop path.")] = TrainConfig.seed,
    workers: Workers = TrainConfig.workers,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between the checkpoints within an epoch.")
    ] = TrainConfig.save_every,
    on_nan: Annotated[
        Literal["skip", "stop"],
        typer.Option(help="What to do with a step where a clip gives NaN."),
    ] = TrainConfig.on_nan,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Run blocks again in the backward pass, for less memory.")
    ] = TrainConfig.checkpointing,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/last.")] = False,
) -> None:
    """Train adapters and head on a data set.

    Classes and vocabulary are the data set's. The model that is best on the validation split is kept in OUT/best.
    Files that cannot be read are reported and left out. Runs under torchrun on several devices.
    """
    import torch

    from lavish_fast import tasks, training
    from lavish_fast.model import Model

    given = {"batch_size": batch_size, "epochs": epochs, "lr": lr, "head_lr": head_lr, "lr_step": lr_step}
    given |= {"lr_gamma": lr_gamma, "accumulate": accumulate, "patience": patience}
    with _bad_usage(ValueError):
        how = dataclasses.replace(
            TrainConfig.of_task(task),
            **{name: value for name, value in given.items() if value is not None},
            amp=amp,
            seed=seed,
            workers=workers,
            save_every=save_every,
            on_nan=on_nan,
            checkpointing=checkpointing,
        )
    module = tasks.load(task)
    chosen = _model_config(task, preset, config)
    chosen = module.settle(dataclasses.replace(chosen, modality=modality or chosen.modality), data)
    if backbone is not None:
        # The checkpoint names it, and is loaded from other folders than this one.
        backbone = os.path.abspath(backbone) if os.path.isfile(backbone) else backbone
        chosen = dataclasses.replace(chosen, backbone_weights=backbone)
    if chosen.backbone_weights is None:
        raise typer.BadParameter(f"expected one, since {config} names none", param_hint="--backbone")
    sets = [module.Dataset(data, split, chosen) for split in ("train", "val")]
    torch.manual_seed(seed)
    with _bad_usage(FileNotFoundError):
        model = Model(chosen).load_backbone()
    fit = training.fit(model, *sets, how, out, resume=resume)
    console = _console()
    best = f"best validation score {fit.best_score:.1%}, in epoch {fit.best_epoch} of {fit.epochs}"
    console.print(f"{best}: {_printable(out / 'best')}", markup=False, soft_wrap=True)
    if fit.skipped:
        console.print(f"{len(fit.skipped)} files could not be read and were left out")


def _model_config(task: str, preset: str | None, path: Path | None) -> Config:
    from lavish_fast import checkpoint

    if preset and path:
        raise typer.BadParameter("expected one of them, got both", param_hint="--preset / --config")
    with _bad_usage(ValueError, TypeError):
        chosen = (
            Config.from_dict(checkpoint.read_config(path)) if path else Config.from_preset(preset or _PRESETS[task])
        )
    if chosen.task != task:
        raise typer.BadParameter(f"expected one for {task}, got {preset or path} for {chosen.task}")
    return chosen


@app.command()
def evaluate(
    task: Task,
    data: Data,
    checkpoint: Checkpoint,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="The clips to evaluate on.")] = "test",
    rule: Annotated[
        Literal["argmax", "cmbs"], typer.Option(help="How probabilities become events; cmbs: one event a clip.")
    ] = "argmax",
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for evaluate.json and predictions.jsonl.")
    ] = None,
    backbone: Backbone = None,
    batch_size: BatchSize = TrainConfig.batch_size,
    amp: Amp = None,
    workers: Workers = TrainConfig.workers,
) -> None:
    """The scores of a trained model on a data set.

    Files that cannot be read are reported and left out, and the exit code is 1.
    """
    from lavish_fast import tasks, training

    model = _load(checkpoint, backbone, task)
    module = tasks.load(task)
    clips = module.Dataset(data, split, model.config)
    with _bad_usage(ValueError):
        TrainConfig(batch_size=batch_size, workers=workers)  # for its checks alone
    metric = None
    if rule != "argmax":
        if task != "ave":
            raise typer.BadParameter(f"expected it with ave alone, got {task}", param_hint="--rule")
        metric = module.Metric(rule)
    result = training.evaluate(model, clips, batch_size=batch_size, metric=metric, amp=amp, workers=workers)
    if _rank() == 0:
        for line in result.skipped:
            _say_error(line)
        facts = {"split": split} | ({"rule": rule} if task == "ave" else {})
        facts |= {
            name: f"{value}" if isinstance(value, int) else f"{value:.2%}" for name, value in result.scores.items()
        }
        facts |= {
            "clips": f"{len(clips) - len(result.skipped)} of {len(clips)}",
            "clips/s": f"{result.clips_per_second:.1f}",
        }
        _console().print(_facts_table(facts))
        if out:
            _write_evaluation(out, result, model.config, {"split": split} | ({"rule": rule} if task == "ave" else {}))
    if result.skipped:
        raise typer.Exit(1)


def _write_evaluation(out: Path, result: Evaluation, config: Config, how: dict[str, str]) -> None:
    from lavish_fast import checkpoint
    from lavish_fast.tasks import ave

    facts = {"task": config.task} | how | {"scores": dict(result.scores)}
    facts |= {"skipped": result.skipped, "clips_per_second": result.clips_per_second}
    checkpoint.write_text(out / "evaluate.json", json.dumps(facts, indent=2) + "\n")
    lines = []
    for name, kept in result.predictions.items():
        if config.task == "ave":
            decided = ave.decide(kept, len(kept), how["rule"])[0]
            lines += [{"video": name} | row for row in _segments(kept, decided, config.classes, 1.0)]
        elif config.classes:
            best = int(kept.argmax())
            lines.append({"id": name, "class": config.classes[best], "probability": round(float(kept[best]), 6)})
    if lines:
        checkpoint.write_text(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@app.command()
def prepare(
    task: Task,
    data: Data,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every file, which takes long.")] = False,
) -> None:
    """Say what a data set lacks; the exit code is 1 when training would not see all of it."""
    from rich.table import Table

    from lavish_fast import tasks

    module, config = tasks.load(task), Config.from_preset(_PRESETS[task])
    with suppress(OSError, ValueError):  # the report says it
        config = module.settle(config, data)
    report = module.verify(data, config, decode=decode)
    console = _console()
    if report.splits:
        table = Table("split")
        for name in ("clips", "videos without media"):
            table.add_column(name, justify="right")
        for split, clips in report.splits.items():
            missing = len(report.missing[split])
            table.add_row(split, str(clips), str(missing), style="red" if missing else "")
        console.print(table)
    for kind, lines in (("problem", report.problems), ("note", report.notes)):
        for line in lines:
            console.print(f"{kind}: {_printable(line)}", markup=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)
    console.print("nothing is missing" + ("" if decode else "; --decode would also try every file"))


@app.command()
def info() -> None:
    """Show versions, devices, and the path that each op takes here and why."""
    from rich.table import Table

    from lavish_fast import __version__

    console = _console()
    versions = {"lavish_fast": __version__, "python": sys.version.split()[0]}
    versions |= {name: _version(name) for name in ("torch", "torchaudio", "triton", "xformers", "timm", "av")}
    console.print(_facts_table(versions, "versions"))
    console.print(_facts_table(_devices(), "devices"))
    table = Table("op", "path", "why not fused", title="ops", title_justify="left", title_style="bold")
    for choice in _paths():
        table.add_row(choice.op, choice.path, "; ".join(choice.reasons))
    console.print(table)


def _version(name: str) -> str:
    import importlib
    import logging

    # A package whose extensions do not load may only log it; that is caught here, and shown beside the version.
    logged: list[str] = []
    catch = lambda record: logged.append(record.getMessage())  # noqa: E731
    logging.getLogger(name).addFilter(catch)
    try:
        version = getattr(importlib.import_module(name), "__version__", "unknown version")
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"cannot load: {_one_line(error)}"
    except Exception as error:  # a library that does not load may raise anything
        return f"cannot load: {' '.join(str(error).split()) or type(error).__name__}"
    finally:
        logging.getLogger(name).removeFilter(catch)
    return version + "".join(f" ({' '.join(text.split())})" for text in logged[:1])


def _devices() -> dict[str, str]:
    import platform

    import torch

    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    devices = {"cpu": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    return devices if len(devices) > 1 else devices | {"cuda": "none"}


def _paths() -> list[Choice]:
    """What each op chooses here in inference, on small tensors."""
    import torch

    from lavish_fast import ops
    from lavish_fast.adapter import BlockAdapters, LavishAdapter
    from lavish_fast.backbones.swin_v2 import Block, WindowAttention
    from lavish_fast.config import AdapterConfig

    width, heads, size = 96, 3, 6
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad(), ops.recording() as choices:
        block = Block(width, WindowAttention(width, heads, size, size, 0, 0), 1, 0.0).eval()
        adapters = BlockAdapters(
            {f"{stream}_p1": LavishAdapter(width, AdapterConfig()) for stream in ("audio", "video")}
        )
        x = torch.randn(1, size * size, width)
        ops.gather_latents(adapters["audio_p1"].latents, x)
        adapters.eval()(block, [x, x])
        ops.attention(x[None], x[None], x[None], 1.0)
    return list({choice.op: choice for choice in choices}.values())


def _facts_table(facts: Mapping[str, str], title: str | None = None) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    for name, value in facts.items():
        table.add_row(name, Text(_printable(value)))
    return table


if __name__ == "__main__":
    main()
