"""`lavish-fast train` and `evaluate`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lavish_fast.commands import options, terminal, watch
from lavish_fast.commands.localize import segments
from lavish_fast.config import Config, TrainConfig

if TYPE_CHECKING:
    from lavish_fast.training import Evaluation


def train(
    task: options.Task,
    data: options.Data,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for best/, last/, log.jsonl and tensorboard/.")],
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/last.")] = False,
) -> None:
    """Train adapters and head on a data set.

    Classes and vocabulary are the data set's. The model that is best on the validation split is kept in OUT/best.
    Files that cannot be read are reported and left out. Runs under torchrun on several devices.
    """
    import torch

    from lavish_fast import tasks, training
    from lavish_fast.model import Model

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
    of_data = options.of_data(task, fold)
    sets = [tasks.load(task).Dataset(data, split, chosen, **of_data) for split in ("train", "val")]
    torch.manual_seed(seed)
    with terminal.bad_usage(FileNotFoundError):
        model = Model(chosen).load_backbone()
        if model.vggish is not None:
            model.load_vggish()
    fit = training.fit(model, *sets, how, out, resume=resume)
    console = terminal.console()
    best = f"best validation score {fit.best_score:.1%}, in epoch {fit.best_epoch} of {fit.epochs}"
    console.print(f"{best}: {terminal.printable(out / 'best')}", markup=False, soft_wrap=True)
    if fit.skipped:
        console.print(f"{len(fit.skipped)} files could not be read and were left out")
    if fit.not_finite:
        console.print(f"{len(fit.not_finite)} steps skipped (not finite)")
    if fit.silent:
        console.print(f"{len(fit.silent)} clips without sound, read as silence")


def settings(task: str, **given: Any) -> TrainConfig:
    """The task's own settings of training, but for those that are given and not None."""
    with terminal.bad_usage(ValueError):
        given = {name: value for name, value in given.items() if value is not None}
        how = dataclasses.replace(TrainConfig.of_task(task), **given)
    if "lr_gamma" in given and how.lr_step is None:
        raise typer.BadParameter("expected it with --lr-step, which says when, got it alone", param_hint="--lr-gamma")
    return how


def configuration(
    task: str,
    data: Path,
    *,
    preset: str | None,
    path: Path | None,
    backbone: str | None,
    modality: str | None,
    vggish: Path | None = None,
) -> Config:
    """The model's configuration: a preset's or a file's, with what the data set fixes and what is given."""
    from lavish_fast import tasks

    if preset and path:
        raise typer.BadParameter("expected one of them, got both", param_hint="--preset / --config")
    if vggish is not None and task != "ave":
        raise typer.BadParameter(f"expected it with ave alone, got {task}", param_hint="--vggish")
    with terminal.bad_usage(ValueError):
        chosen = _read(path) if path else Config.from_preset(preset or options.PRESETS[task])
        if chosen.task != task:
            raise ValueError(f"expected one for {task}, got {preset or path} for {chosen.task}")
        chosen = dataclasses.replace(chosen, modality=modality or chosen.modality)
        if vggish or (task == "ave" and chosen.head.vggish):
            weights = _lasting(vggish or chosen.head.vggish_weights, "--vggish")
            head = dataclasses.replace(chosen.head, vggish=True, vggish_weights=weights)
            chosen = dataclasses.replace(chosen, head=head)
    weights = _lasting(backbone or chosen.backbone_weights, "--backbone")
    return tasks.load(task).settle(dataclasses.replace(chosen, backbone_weights=weights), data)


def _read(path: Path) -> Config:
    from lavish_fast import checkpoint

    values = checkpoint.read_config(path)
    try:
        return Config.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a lavish_fast configuration, got: {error}") from None


def _lasting(weights: str | Path | None, option: str) -> str:
    """What a checkpoint calls its frozen weights, for it is loaded from other folders than this one."""
    if weights is None:
        raise typer.BadParameter("expected its weights, which the configuration does not name", param_hint=option)
    return os.path.abspath(weights) if os.path.isfile(weights) else str(weights)


def evaluate(
    task: options.Task,
    data: options.Data,
    checkpoint: options.Checkpoint,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="The clips to evaluate on.")] = "test",
    rule: Annotated[
        Literal["argmax", "cmbs"], typer.Option(help="How probabilities become events; cmbs: one event a clip.")
    ] = "argmax",
    official_batch: Annotated[
        int | None, typer.Option(min=1, help="avs: also AVSBench's own F-score, at this batch size.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for evaluate.json and predictions.jsonl.")
    ] = None,
    backbone: options.Backbone = None,
    vggish: options.VGGish = None,
    fold: options.Fold = 1,
    batch_size: options.BatchSize = TrainConfig.batch_size,
    amp: options.Amp = None,
    workers: options.Workers = TrainConfig.workers,
) -> None:
    """The scores of a trained model on a data set.

    Files that cannot be read are reported and left out, and the exit code is 1.
    """
    from lavish_fast import tasks, training

    of_data = options.of_data(task, fold)
    model = watch.load_model(checkpoint, backbone, task, vggish)
    module = tasks.load(task)
    clips = module.Dataset(data, split, model.config, **of_data)
    with terminal.bad_usage(ValueError):
        TrainConfig(batch_size=batch_size, workers=workers)  # for its checks alone
    metric = None
    if rule != "argmax":
        if task != "ave":
            raise typer.BadParameter(f"expected it with ave alone, got {task}", param_hint="--rule")
        metric = module.Metric(rule)
    if official_batch is not None:
        if task != "avs":
            raise typer.BadParameter(f"expected it with avs alone, got {task}", param_hint="--official-batch")
        metric = module.Metric(official_batch, [row.name for row in clips.rows])
    result = training.evaluate(model, clips, batch_size=batch_size, metric=metric, amp=amp, workers=workers)
    if terminal.rank() == 0:
        for line in result.skipped:
            terminal.say_error(line)
        how = {"split": split} | of_data | ({"rule": rule} if task == "ave" else {})
        facts = {name: f"{x}" if isinstance(x, int) else f"{x:.2%}" for name, x in result.scores.items()}
        facts |= {
            "clips": f"{result.clips} of {len(clips)}",
            "clips/s": f"{result.clips_per_second:.1f}",
        }
        if task == "action":
            facts["without sound"] = f"{len(result.silent)} clips, read as silence"
        terminal.console().print(terminal.facts_table(how | facts))
        if out:
            _write_evaluation(out, result, model.config, how)
    if result.skipped:
        raise typer.Exit(1)


def _write_evaluation(out: Path, result: Evaluation, config: Config, how: dict[str, Any]) -> None:
    from lavish_fast import checkpoint
    from lavish_fast.tasks import ave

    facts = {"task": config.task} | how | {"scores": dict(result.scores)}
    facts |= {"skipped": result.skipped, "clips_per_second": result.clips_per_second}
    if config.task == "action":
        facts["silent"] = result.silent
    checkpoint.write_text(out / "evaluate.json", json.dumps(facts, indent=2) + "\n")
    lines = []
    for name, kept in result.predictions.items():
        if config.task == "ave":
            decided = ave.decide(kept, len(kept), how["rule"])[0]
            lines += [{"video": name} | row for row in segments(kept, decided, config.classes, 1.0)]
        elif config.task == "avs":
            areas = kept.float().mean((1, 2)).tolist()
            lines += [{"id": name, "frame": i, "area": round(area, 6)} for i, area in enumerate(areas)]
        else:
            best = int(kept.argmax())
            lines.append({"id": name, "class": config.classes[best], "probability": round(float(kept[best]), 6)})
    checkpoint.write_text(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
