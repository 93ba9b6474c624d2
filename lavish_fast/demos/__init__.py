"""The demos: LAVISH learns each task from generated clips, on a CPU, in minutes.

A tiny frozen Swin-V2 that has only ever seen pictures (`lavish_fast.pretrain` made it) gets adapters and a task's head,
which learn from clips whose answer takes both the eye and the ear. The same is done with the frames alone and the
sound alone.

A module a task. What `run` reads of each of them:

- `CONFIG`, `TRAIN`: the model and how it is trained. `CLIPS`: clips of each split, by its name.
- `TRUTH`: a file of the data set that no other has.
- `write_dataset(root, *, train, val, test, seed, progress)`: writes the clips in the layout that the task's own
  `Dataset` reads, deterministically; progress is called as progress(clips written, clips in all).
- `perfect_senses(root)`: by variant, what a model reaches on the test split that recognises everything in the streams
  it has, and by "chance" what one reaches that has none; from 0 to 1.
- `SCORE`: what the task's first score is called in summary.json. `MORE`: which of its other scores are shown beside it.
  `TITLE`, `NOTES`: of the report.
- `picture(config, item, kept)`: an item of the test split and what `tasks.<task>.kept` says of it, as a figure and a
  caption. `table(config, item, kept)`: the same for the terminal.
- `invitation(data, name, checkpoint)`: the words of the command to try next, with a clip of the data set and the best
  model.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lavish_fast import checkpoint, plots, tasks, training
from lavish_fast.config import MODALITIES, SpectrogramConfig, SwinV2Config
from lavish_fast.model import Model

BACKBONE = SwinV2Config(
    img_size=64,
    embed_dim=48,
    depths=(1, 2, 1),
    num_heads=(3, 6, 12),
    window_size=8,
    pretrained_window_sizes=(0, 0, 0),
)
WEIGHTS = "package:tiny_swin_v2"
SPECTROGRAM = SpectrogramConfig(mel_bins=64, frames=64, frame_shift_ms=15.6)
PICTURES = 8


def load(task: str) -> ModuleType:
    """The module of a task's demo."""
    return importlib.import_module(f"lavish_fast.demos.{task}")


def run(task: str, out: Path, *, seed: int, console: Console) -> None:
    """Writes clips, trains the three variants, evaluates them on unseen clips, and writes out/report.html.

    out/data is the data set, out/runs/VARIANT a run each, whose best/ is a checkpoint for the other commands;
    out/summary.json has the table's numbers.

    Raises: ValueError where `out` holds something else than an earlier demo of the task.
    """
    started = time.perf_counter()
    demo = load(task)
    data, runs = out / "data", out / "runs"
    if out.exists() and any(out.iterdir()) and not (data / demo.TRUTH).is_file():
        raise ValueError(f"{out}: expected no such folder, or an earlier demo's, got one with other files")
    shutil.rmtree(runs, ignore_errors=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = sum(demo.CLIPS.values())
        bar = progress.add_task("writing clips", total=total)
        written = lambda done, _: progress.update(bar, completed=done)  # noqa: E731
        demo.write_dataset(data, **demo.CLIPS, seed=seed, progress=written)
        module = tasks.load(task)
        config = module.settle(demo.CONFIG, data)
        sets = {split: module.Dataset(data, split, config, cache=True) for split in demo.CLIPS}
        bar = progress.add_task("reading clips", total=sum(map(len, sets.values())))
        for split in sets.values():
            for i in range(len(split)):
                split[i]
                progress.advance(bar)

        results, models, history = {}, {}, {}
        shown = progress if console.is_terminal else None  # elsewhere training prints a line an epoch
        settings = dataclasses.replace(demo.TRAIN, seed=seed)
        for modality in MODALITIES:
            console.print(f"[bold]{modality}")
            torch.manual_seed(seed)
            model = Model(dataclasses.replace(config, modality=modality)).load_backbone()
            training.fit(model, sets["train"], sets["val"], settings, runs / modality, progress=shown)
            log = (runs / modality / "log.jsonl").read_text(encoding="utf-8").splitlines()
            history[modality] = [json.loads(line) for line in log]
            models[modality] = Model.from_pretrained(runs / modality / "best")
            options = {"batch_size": settings.batch_size, "progress": shown}
            results[modality] = training.evaluate(models[modality], sets["test"], **options)

    seconds = time.perf_counter() - started
    senses = demo.perfect_senses(data)
    summary = {m: _numbers(demo, models[m], results[m], senses[m], senses["chance"]) for m in MODALITIES}
    facts = summary | {"seconds": round(seconds, 1), "seed": seed}
    checkpoint.write_text(out / "summary.json", json.dumps(facts, indent=2) + "\n")
    best = results["audio+video"]
    score = next(iter(best.scores))
    rows = _rows(demo, score, summary)
    _print_summary(console, rows, demo.MORE)

    names = list(best.predictions)
    items = {item["id"]: item for item in sets["test"]}
    console.print(demo.table(config, items[names[0]], best.predictions[names[0]]))
    clips = [(name, *demo.picture(config, items[name], best.predictions[name])) for name in names[:PICTURES]]
    sizes = f"{demo.CLIPS['train']} clips to learn from, {demo.CLIPS['test']} unseen ones here"
    plots.report(
        out / "report.html",
        title=demo.TITLE,
        summary_rows=rows,
        clips=clips,
        notes=[f"{sizes}; {seconds:.0f} s; seed {seed}.", *demo.NOTES],
        curves=(plots.training_curves(history), f"loss and validation {score} by epoch"),
    )
    single = max(results["video"].score, results["audio"].score)
    console.print(
        f"audio+video is {100 * (best.score - single):.1f} points above the better single stream. "
        f"{seconds:.0f} s in all.\nLook at [bold]{escape(str(out / 'report.html'))}[/bold], or try\n"
        f"  {escape(shlex.join(map(str, demo.invitation(data, names[0], runs / 'audio+video' / 'best'))))}",
        soft_wrap=True,
    )


def _numbers(
    demo: ModuleType, model: Model, result: training.Evaluation, perfect_senses: float, chance: float
) -> dict[str, Any]:
    """Of a variant: scores from 0 to 1, the number of trainable parameters, clips a second in evaluation."""
    return {
        demo.SCORE: result.score,
        **{name: result.scores[name] for name in demo.MORE},
        "perfect_senses": perfect_senses,
        "chance": chance,
        "trainable_parameters": sum(p.numel() for _, p in model.trainable_parameters()),
        "clips_per_second": result.clips_per_second,
    }


def _rows(demo: ModuleType, score: str, summary: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "variant": modality,
            score: f"{numbers[demo.SCORE]:.1%}",
            **{name: f"{numbers[name]:.1%}" for name in demo.MORE},
            "perfect senses": f"{numbers['perfect_senses']:.1%}",
            "chance": f"{numbers['chance']:.1%}",
            "trainable parameters": f"{numbers['trainable_parameters']:,}",
            "clips/s": f"{numbers['clips_per_second']:.1f}",
        }
        for modality, numbers in summary.items()
    ]


def _print_summary(console: Console, rows: list[dict[str, str]], more: Sequence[str]) -> None:
    table = Table(title="Unseen clips")
    # Beside a task's further scores these do not fit into 80 columns; the report has them.
    left_out = ("trainable parameters", "clips/s") if more else ()
    columns = [column for column in rows[0] if column not in left_out]
    for column in columns:
        table.add_column(column.replace(" ", "\n"), justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console.print(table)
