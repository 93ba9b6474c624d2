"""The demo: LAVISH learns to localise events in real video files, on a CPU, in minutes.

A tiny frozen Swin-V2 that has only ever seen pictures (`lavish_fast.pretrain` made it) gets adapters, which learn from
the clips of `lavish_fast.synthetic`: an event counts only while it is both seen and heard. The same is done with the
frames alone and the sound alone.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from lavish_fast import checkpoint, media, plots, synthetic, training
from lavish_fast.config import MODALITIES, AdapterConfig, Config, SpectrogramConfig, SwinV2Config, TrainConfig
from lavish_fast.model import Model
from lavish_fast.tasks import ave

CONFIG = Config(
    backbone=SwinV2Config(
        img_size=64,
        embed_dim=48,
        depths=(1, 2, 1),
        num_heads=(3, 6, 12),
        window_size=8,
        pretrained_window_sizes=(0, 0, 0),
    ),
    adapter=AdapterConfig(latents=2, reduction=4, groups=2),
    spectrogram=SpectrogramConfig(mel_bins=64, frames=64, frame_shift_ms=15.6),
    backbone_weights="package:tiny_swin_v2",
)
TRAIN = TrainConfig(batch_size=4, epochs=5, lr=3e-3, head_lr=2e-3, lr_step=2, lr_gamma=0.25, workers=0)
CLIPS = {"train": 256, "val": 32, "test": 48}
PICTURES = 8


def run(out: Path, *, seed: int, console: Console) -> None:
    """Writes clips, trains the three variants, evaluates them on unseen clips, and writes out/report.html.

    out/data is the data set, out/runs/VARIANT a run each, whose best/ is a checkpoint for `lavish-fast localize`;
    out/summary.json has the table's numbers.

    Raises: ValueError where `out` holds something else than an earlier demo.
    """
    started = time.perf_counter()
    data, runs = out / "data", out / "runs"
    if out.exists() and any(out.iterdir()) and not (data / "synthetic.jsonl").is_file():
        raise ValueError(f"{out}: expected no such folder, or an earlier demo's, got one with other files")
    shutil.rmtree(runs, ignore_errors=True)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = sum(CLIPS.values())
        task = progress.add_task("writing clips", total=total)
        written = lambda done, _: progress.update(task, completed=done)  # noqa: E731
        synthetic.write_dataset(data, **CLIPS, seed=seed, progress=written)
        config = ave.settle(CONFIG, data)
        sets = {split: ave.Dataset(data, split, config, cache=True) for split in CLIPS}
        task = progress.add_task("reading clips", total=total)
        for split in sets.values():
            for i in range(len(split)):
                split[i]
                progress.advance(task)

        results, models, history = {}, {}, {}
        bar = progress if console.is_terminal else None  # elsewhere training prints a line an epoch
        for modality in MODALITIES:
            console.print(f"[bold]{modality}")
            torch.manual_seed(seed)
            model = Model(dataclasses.replace(config, modality=modality)).load_backbone()
            settings = dataclasses.replace(TRAIN, seed=seed)
            training.fit(model, sets["train"], sets["val"], settings, runs / modality, progress=bar)
            log = (runs / modality / "log.jsonl").read_text(encoding="utf-8").splitlines()
            history[modality] = [json.loads(line) for line in log]
            models[modality] = Model.from_pretrained(runs / modality / "best")
            results[modality] = training.evaluate(models[modality], sets["test"], batch_size=4, progress=bar)

    seconds = time.perf_counter() - started
    summary = _summary(data, models, results) | {"seconds": round(seconds, 1), "seed": seed}
    checkpoint.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    rows = _rows(summary)
    best = results["audio+video"]
    names = list(best.predictions)
    _print_summary(console, rows)
    items = {item["id"]: item for item in sets["test"]}
    _print_clip(console, config, items[names[0]], best.predictions[names[0]])
    pictures = [_picture(config, items[name], best.predictions[name]) for name in names[:PICTURES]]
    plots.report(
        out / "report.html",
        title="LAVISH learns to see and hear",
        summary_rows=rows,
        clips=pictures,
        notes=[
            f"{CLIPS['train']} clips to learn from, {CLIPS['test']} unseen ones here; {seconds:.0f} s; seed {seed}.",
            "A second is an event only while its source is both seen and heard. 'perfect senses' is what a model "
            "reaches that recognises everything in the streams it has.",
            "The frozen backbone was trained on drawn pictures alone; it had never seen a spectrogram.",
            "With one stream an event and its background are nearly a toss-up (62 to 38), so those two scores waver.",
        ],
        curves=plots.training_curves(history),
    )
    single = max(results["video"].score, results["audio"].score)
    console.print(
        f"audio+video is {100 * (best.score - single):.1f} points above the better single stream. "
        f"{seconds:.0f} s in all.\nLook at [bold]{out / 'report.html'}[/bold], or try\n"
        f"  lavish-fast localize {data / 'videos' / names[0]}.mp4 --checkpoint {runs / 'audio+video' / 'best'}",
        soft_wrap=True,
    )


def _summary(data: Path, models: dict[str, Model], results: dict[str, training.Evaluation]) -> dict[str, Any]:
    """By variant: accuracies from 0 to 1, the number of trainable parameters, clips a second in evaluation."""
    oracle = synthetic.oracle_accuracies(data, "test")
    return {
        modality: {
            "accuracy": result.score,
            "perfect_senses": oracle[modality],
            "chance": oracle["chance"],
            "trainable_parameters": sum(p.numel() for _, p in models[modality].trainable_parameters()),
            "clips_per_second": result.clips_per_second,
        }
        for modality, result in results.items()
    }


def _rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "variant": modality,
            "segment accuracy": f"{summary[modality]['accuracy']:.1%}",
            "perfect senses": f"{summary[modality]['perfect_senses']:.1%}",
            "chance": f"{summary[modality]['chance']:.1%}",
            "trainable parameters": f"{summary[modality]['trainable_parameters']:,}",
            "clips/s": f"{summary[modality]['clips_per_second']:.1f}",
        }
        for modality in MODALITIES
    ]


def _print_summary(console: Console, rows: list[dict[str, str]]) -> None:
    table = Table(title="Unseen clips")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _print_clip(console: Console, config: Config, item: dict[str, Any], probabilities: Tensor) -> None:
    table = Table(title=f"An unseen clip, second by second: {item['id']}")
    for column in ("second", "event", "probability", "truth"):
        table.add_column(column, justify="right" if column in ("second", "probability") else "left")
    for second, (row, label) in enumerate(zip(probabilities, item["labels"])):
        table.add_row(f"{second}", config.classes[row.argmax()], f"{row.max():.2f}", config.classes[label])
    console.print(table)


def _picture(config: Config, item: dict[str, Any], probabilities: Tensor) -> tuple[str, Any, str]:
    clip = media.Clip(item["audio"], item["video"], float(len(probabilities)), ())
    figure = plots.timeline(clip, probabilities, config.classes, title=item["id"], truth=item["labels"])
    right = int((probabilities.argmax(-1) == item["labels"]).sum())
    return item["id"], figure, f"{right} of {len(probabilities)} seconds right"
