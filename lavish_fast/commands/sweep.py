"""`lavish-fast sweep`: one model for each value of a setting."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish_fast.commands import options, terminal
from lavish_fast.commands.train import configuration, settings
from lavish_fast.config import Config, TrainConfig

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from lavish_fast.training import Fit

app = typer.Typer(
    help="Train a model for each value of a setting, and compare them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def _group() -> None:
    # Without it typer would make a group of one command into that command.
    pass


@app.command()
def latents(
    task: options.TaskOption,
    data: options.Data,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for sweep.json, latents.png, latents.svg and latents-M/ each.")
    ],
    latents: Annotated[str, typer.Option(metavar="M,M,...", help="Numbers of latent tokens.")] = "1,2,4,8,16,32",
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    backbone: options.Backbone = None,
    vggish: options.VGGish = None,
    fold: options.Fold = 1,
    modality: options.Modality = None,
    epochs: options.Epochs = None,
    patience: options.Patience = None,
    batch_size: options.TrainBatchSize = None,
    accumulate: options.Accumulate = None,
    lr: options.LearningRate = None,
    head_lr: options.HeadLearningRate = None,
    lr_step: options.LearningRateStep = None,
    lr_gamma: options.LearningRateGamma = None,
    amp: options.Amp = None,
    seed: options.Seed = TrainConfig.seed,
    workers: options.Workers = TrainConfig.workers,
    save_every: options.SaveEvery = TrainConfig.save_every,
    on_nan: options.OnNan = TrainConfig.on_nan,
    checkpointing: options.Checkpointing = TrainConfig.checkpointing,
) -> None:
    """Score and cost by the number of latent tokens, the paper's Figure 1.

    Trains a model for each number as `train` does, all with the same settings, and evaluates the best of each run on
    the test split. Runs that are finished are kept, and one that was stopped goes on, so that the same command resumes
    a sweep, and one with further numbers extends it: those in OUT/sweep.json are swept with them. GFLOPs are of one
    clip, a multiplication and an addition each counting as one, in matrix products and convolutions.
    """
    import torch

    from lavish_fast import checkpoint, plots, tasks, training
    from lavish_fast.model import Model

    swept, path = set(), out / "sweep.json"
    if path.is_file():
        swept = {row["latents"] for row in checkpoint.read_config(path)["rows"]}
    counts = sorted({*_counts(latents), *swept})
    how = settings(
        task,
        epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        head_lr=head_lr,
        lr_step=lr_step,
        lr_gamma=lr_gamma,
        amp=amp,
        seed=seed,
        workers=workers,
        save_every=save_every,
        on_nan=on_nan,
        checkpointing=checkpointing,
    )
    chosen = configuration(task, data, preset=preset, path=config, backbone=backbone, modality=modality, vggish=vggish)
    if len(chosen.streams) < 2 or not chosen.adapter.cross_modal:
        got = "adapter.cross_modal false" if len(chosen.streams) == 2 else chosen.modality
        raise typer.BadParameter(
            f"expected both streams, between which the latent tokens are, got {got}: all models would be the same",
            param_hint="--modality / --config",
        )
    of_data = options.of_data(task, fold)
    sets = {split: tasks.load(task).Dataset(data, split, chosen, **of_data) for split in ("train", "val", "test")}
    clip = _first_clip(sets["test"])
    with terminal.bad_usage(FileNotFoundError):
        weights = checkpoint.backbone_tensors(chosen.backbone_weights)
    console, rows = terminal.console(), []
    for count in sorted(counts, key=lambda count: count not in swept):  # other settings are refused before they cost
        folder = out / f"latents-{count}"
        console.print(f"[bold]latents: {count}")
        adapter = dataclasses.replace(chosen.adapter, latents=count)
        torch.manual_seed(seed)
        model = Model(dataclasses.replace(chosen, adapter=adapter)).load_backbone(weights)
        if model.vggish is not None:
            with terminal.bad_usage(FileNotFoundError):
                model.load_vggish()
        resume = (folder / "last" / "state.safetensors").is_file()
        fit = training.fit(model, sets["train"], sets["val"], how, folder, resume=resume)
        scores = _kept_scores(folder, fit)
        if scores is None:
            best = Model.from_pretrained(folder / "best", backbone=weights)
            result = training.evaluate(best, sets["test"], batch_size=how.batch_size, amp=how.amp, workers=how.workers)
            scores = {"scores": dict(result.scores), "skipped": result.skipped, "steps": fit.steps}
            if terminal.rank() == 0:
                checkpoint.write_text(folder / "test.json", json.dumps(scores, indent=2) + "\n")
        rows.append(
            {
                "latents": count,
                "gflops": flops(model.config, clip) / 1e9,
                "trainable_parameters": sum(p.numel() for _, p in model.trainable_parameters()),
                "epochs": fit.epochs,
                "best_epoch": fit.best_epoch,
                "validation_score": fit.best_score,
                "scores": scores["scores"],
                "skipped": [*fit.skipped, *scores["skipped"]],
                "not_finite": list(fit.not_finite),
            }
        )
    rows.sort(key=lambda row: row["latents"])
    if terminal.rank() == 0:
        name = next(iter(rows[0]["scores"]))
        facts = {"task": task} | of_data | {"settings": dataclasses.asdict(how), "rows": rows}
        checkpoint.write_text(path, json.dumps(facts, indent=2) + "\n")
        figure = plots.latents(counts, [row["scores"][name] for row in rows], [row["gflops"] for row in rows], name)
        for suffix in ("png", "svg"):
            plots.save(figure, out / f"latents.{suffix}")
        console.print(_table(rows, name))
        console.print(f"{terminal.printable(out / 'latents.png')}", markup=False, soft_wrap=True)
    if fit.silent:
        console.print(f"{len(fit.silent)} clips without sound, read as silence")
    if failed := sum(len(row["not_finite"]) for row in rows):
        console.print(f"{failed} steps skipped (not finite)")
    skipped = list(dict.fromkeys(line for row in rows for line in row["skipped"]))
    if skipped:
        console.print(f"{len(skipped)} files could not be read and were left out")
        raise typer.Exit(1)


def flops(config: Config, clip: Mapping[str, Tensor]) -> int:
    """Operations of a model's matrix products and convolutions on one clip, its inputs by name, (1, ...) each.

    Counted on the reference path without computing anything; a multiplication and an addition are two.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from lavish_fast import tasks
    from lavish_fast.model import Model

    inputs = tasks.load(config.task).inputs(config, **clip).values()
    with torch.no_grad(), FakeTensorMode() as fake:
        model = Model(config).eval().set_path("reference")
        with FlopCounterMode(display=False) as counter:
            model.classify(*(fake.from_tensor(x.cpu()) for x in inputs))
    return counter.get_total_flops()


def _first_clip(clips: Any) -> Mapping[str, Tensor]:
    """The inputs of the first clip that can be read, as a batch. Raises: ValueError where there is none."""
    from lavish_fast import tasks

    failed: tuple[str, ...] = ()
    for i in range(len(clips)):
        batch = tasks.collate([clips[i]])
        if len(batch):
            return batch.inputs
        failed += batch.failed
    raise ValueError(f"test split: expected a clip that can be read, got none of {len(clips)}: {failed[:1]}")


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"expected whole numbers from 1, commas between, got {text!r}", param_hint="--latents")
    return sorted({int(part) for part in parts})


def _kept_scores(folder: Path, fit: Fit) -> dict[str, Any] | None:
    """What was written of the test split, if the run has not gone on since."""
    from lavish_fast import checkpoint

    path = folder / "test.json"
    scores = checkpoint.read_config(path) if path.is_file() else {}
    return scores if scores.get("steps") == fit.steps else None


def _table(rows: list[dict[str, Any]], name: str) -> Table:
    from rich.table import Table

    table = Table("latents", f"test {name}", "validation", "GFLOPs a clip", "trainable parameters", "best epoch")
    for column in table.columns:
        column.justify = "right"
    best = max(row["scores"][name] for row in rows)
    for row in rows:
        cells = (str(row["latents"]), f"{row['scores'][name]:.1%}", f"{row['validation_score']:.1%}")
        cells += (f"{row['gflops']:.4g}", f"{row['trainable_parameters']:,}")
        cells += (f"{row['best_epoch']} of {row['epochs']}",)
        table.add_row(*cells, style="bold" if row["scores"][name] == best else "")
    return table
