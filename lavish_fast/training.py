"""The loop: training and evaluation on one or many devices, resumable.

Under torchrun every process is one rank: the ranks divide each step's clips between them and sum their gradients
once a step. The trainable parameters are few (10 M for Swin-V2-L), so nothing is gained by overlapping that sum
with the backward pass, and summing over segments stays exact when a rank has fewer clips than another.
BatchNorm takes its statistics from each rank's own batch; the running ones are averaged before they are used.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lavish_fast import checkpoint, tasks
from lavish_fast.config import TrainConfig
from lavish_fast.runtime import optimize
from lavish_fast.step import TrainingStep
from lavish_fast.tasks import Batch

if TYPE_CHECKING:
    from lavish_fast.model import Model

# What may differ when a run is resumed: it decides how long and how fast, not what is computed.
_FREE = ("epochs", "patience", "workers", "on_nan", "checkpointing")
_NOT_FINITE = "expected finite outputs, got NaN or infinity"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Fit:
    """What `fit` did. best_score: on the validation set (0 to 1), in epoch best_epoch, counted from 1.

    skipped: a line for each file that could not be read. silent: ids of the clips that are said to be without sound.
    not_finite: a line for each step that was not taken because of NaN or infinity.
    """

    best_score: float
    best_epoch: int
    epochs: int
    steps: int
    skipped: tuple[str, ...]
    silent: tuple[str, ...]
    not_finite: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on the clips that could be read.

    scores: by name, the one that selects a model first; shares are from 0 to 1. clips: how many were scored. skipped:
    a line for each file that could not be read, which several clips may share. silent: ids of the clips that are said
    to be without sound. predictions: by clip id, on the CPU, what the task's `kept` says.
    """

    scores: Mapping[str, float]
    clips: int
    skipped: tuple[str, ...]
    silent: tuple[str, ...]
    clips_per_second: float
    predictions: Mapping[str, Tensor]

    @property
    def score(self) -> float:
        """The first of the scores."""
        return next(iter(self.scores.values()))


def fit(
    model: Model,
    train_set: Dataset,
    val_set: Dataset,
    config: TrainConfig,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Fit:
    """Trains adapters and head with Adam, two learning rates, as the paper does.

    After each epoch the model is evaluated on the validation set; the best one is kept in out/best, written by
    `save_pretrained`. (The released code selects on the test set.) Training ends after `config.epochs`, or after
    `config.patience` epochs without a better score. `model` is left as the last step left it.

    A micro-batch counts by its clips, so k of them are one batch k times as large, but for BatchNorm. A clip
    that cannot be read is left out with a warning. So is, by default, a step in which a clip gives outputs that are
    not finite: parameters, Adam's state and BatchNorm's buffers stay as they were. The same happens without a
    warning where gradients overflow in float16, which halves the loss scale. Validation leaves such clips out, with a
    warning as well. The model runs as `lavish_fast.optimize`
    makes it for training, in a `lavish_fast.TrainingStep`: on a GPU its steps are CUDA graphs.

    Args:
        train_set, val_set: the task's `Dataset`, or anything with its items; `metric()` and `fold` are optional, as is
            `set_epoch(epoch)`, which is called before each epoch of training, counted from 0.
        out: last/ is the state to resume from, best/ the best model; log.jsonl has a line a step and an epoch,
            tensorboard/ the same as curves. Each file is replaced in one move, so a kill leaves the old or the new.
        resume: go on from out/last, also from the middle of an epoch: on a CPU, bit for bit as if never stopped.
            `epochs`, `patience`, `workers`, `on_nan` and `checkpointing` may be changed, nothing else.
        progress: a running bar to use. Without it there is one on a terminal, and elsewhere a line an epoch.
        device: a GPU where there is one, if not given.

    Raises: ValueError or FileNotFoundError naming what was expected and what came; with `on_nan="stop"`
        FloatingPointError naming the clips whose outputs are not finite. That step is not taken.
    """
    out, device = Path(out), _device(device)
    for name, data in (("train set", train_set), ("validation set", val_set)):
        if not len(data):
            raise ValueError(f"{name}: expected clips, got none")
    path = out / "last" / "state.safetensors"
    if resume and not path.is_file():
        raise FileNotFoundError(f"{path}: expected the state of a run to resume, got none")
    if not resume and path.is_file():
        raise ValueError(f"{out}: expected a folder without a run, or to be asked to resume, got {path}")

    rank, world = _join(device)
    if world > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        # A rank whose micro-batch has no clip that can be read would leave the others waiting for its statistics.
        raise ValueError("model: expected BatchNorm of one process each, got SyncBatchNorm, which fit cannot train")
    with _display(progress, rank) as (bar, say):
        model.to(device)
        if world > 1:
            weights = model.state_dict()
            for tensor in weights.values():
                dist.broadcast(tensor, 0)
            model.load_state_dict(weights)  # constants that the backbone keeps are made anew
        steps = _Steps(len(train_set), config, rank, world)
        loader = _loader(train_set, config.workers, device, batch_sampler=steps, persistent_workers=config.workers > 0)
        run = _Run(model, config, steps, path, device)
        if hasattr(train_set, "fold"):
            run.identity["fold"] = train_set.fold
        set_epoch = getattr(train_set, "set_epoch", None)
        if resume:
            run.load()
        state = run.state
        with _Log(out, state) as log:
            while state.epoch < config.epochs and state.epoch - state.best_epoch < config.patience:
                if set_epoch:
                    set_epoch(state.epoch)
                clips_per_second = _train_epoch(run, loader, log, bar)
                run.average_buffers()
                options = {"batch_size": config.batch_size, "amp": config.amp, "workers": config.workers}
                result = evaluate(model, val_set, **options, on_nan=config.on_nan, progress=bar, device=device)
                if rank == 0:
                    run.note(result.skipped)
                state.epoch, state.step = state.epoch + 1, 0
                if result.score > state.best_score:
                    state.best_score, state.best_epoch = result.score, state.epoch
                    if rank == 0:
                        model.save_pretrained(out / "best")
                loss, state.loss, state.segments = state.loss / state.segments, 0.0, 0
                state.skipped = list(dict.fromkeys(itertools.chain(*_gather(state.skipped))))
                state.silent = list(dict.fromkeys(itertools.chain(*_gather(state.silent), result.silent)))
                log.epoch(state, loss, result, clips_per_second)
                run.save()
                say(
                    f"epoch {state.epoch}/{config.epochs}  loss {loss:.4f}  val {result.score:.1%}"
                    f"  {clips_per_second:.1f} clips/s"
                    + (f"  {len(state.skipped)} files skipped" if state.skipped else "")
                    + (f"  {len(state.not_finite)} steps skipped (not finite)" if state.not_finite else "")
                    + (f"  {state.overflows} overflows" if state.overflows else "")
                )
        found = (tuple(state.skipped), tuple(state.silent), tuple(state.not_finite))
        return Fit(state.best_score, state.best_epoch, state.epoch, state.steps, *found)


@torch.no_grad()
def evaluate(
    model: Model,
    dataset: Dataset,
    *,
    batch_size: int = 2,
    metric: Any = None,
    amp: str | None = None,
    workers: int = 0,
    on_nan: str = "stop",
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> Evaluation:
    """The scores of a model in evaluation mode. Under torchrun each clip is counted once, by one rank.

    Args:
        metric: the task's `Metric`; the data set's own if not given.
        amp, workers: as in `TrainConfig`. progress, device: as for `fit`.
        on_nan: "skip" leaves clips with non-finite outputs out, as ones that cannot be read.

    Raises: ValueError when no clip can be read; with `on_nan="stop"` FloatingPointError naming clips with non-finite
        outputs.
    """
    device = _device(device)
    task = tasks.load(model.config.task)
    if metric is None:
        metric = dataset.metric() if hasattr(dataset, "metric") else task.Metric()
    predictions: dict[str, Tensor] = {}
    skipped: list[str] = []
    silent: list[str] = []
    broken: list[str] = []
    clips = 0
    rank, world = _join(device)
    with _display(progress, rank) as (bar, _), _evaluating(model.to(device)):
        mine = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
        loader = _loader(mine, workers, device, batch_size=batch_size)
        start = time.perf_counter()
        for batch in _track(loader, bar):
            skipped += batch.failed
            silent += batch.silent
            if not len(batch):
                continue
            batch = batch.to(device)
            outputs, fine = _outputs(model, batch, amp)
            if not all(fine):
                broken += [name for name, is_fine in zip(batch.ids, fine) if not is_fine]
                batch = batch.only(fine)
                if not len(batch):
                    continue
                outputs, _ = _outputs(model, batch, amp)
            clips += len(batch)
            metric.update(outputs, batch.labels, batch.ids)
            predictions |= zip(batch.ids, task.kept(outputs, len(batch)).cpu())
        seconds = time.perf_counter() - start
        skipped += [f"{name}: {_NOT_FINITE}" for name in broken]
        parts = _gather((metric, skipped, predictions, clips, silent, broken))
    if on_nan == "stop" and (broken := [name for part in parts for name in part[5]]):
        raise FloatingPointError(f"{', '.join(broken)}: {_NOT_FINITE}")
    skipped = tuple(dict.fromkeys(itertools.chain(*(part[1] for part in parts))))
    predictions = {name: x for part in parts for name, x in part[2].items()}
    if not predictions:
        raise ValueError(f"evaluation: expected a clip that can be read, got none of {len(dataset)}: {skipped[:1]}")
    metric = parts[0][0]
    for other, *_ in parts[1:]:
        metric.merge(other)
    clips = sum(part[3] for part in parts)
    silent = tuple(itertools.chain(*(part[4] for part in parts)))
    return Evaluation(metric.results(), clips, skipped, silent, clips / seconds, predictions)


@dataclass
class _State:
    """Where a run stands."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps taken in the epoch that is under way
    steps: int = 0  # steps taken in all
    loss: float = 0.0  # over the epoch's segments so far, summed
    segments: int = 0
    best_score: float = -1.0
    best_epoch: int = 0
    log_bytes: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)
    silent: list[str] = dataclasses.field(default_factory=list)
    overflows: int = 0  # steps that were not taken because of them
    not_finite: list[str] = dataclasses.field(default_factory=list)  # a line for each step not taken because of it


class _Run:
    """The model, its optimiser and where they stand: all that a checkpoint holds."""

    def __init__(self, model: Model, config: TrainConfig, steps: _Steps, path: Path, device: torch.device) -> None:
        self.model, self.config, self.steps, self.path, self.device = model, config, steps, path, device
        self.state = _State()
        head = [p for name, p in model.trainable_parameters() if name.startswith("head.")]
        adapters = [p for name, p in model.trainable_parameters() if not name.startswith("head.")]
        self.parameters = adapters + head
        self.optimizer = torch.optim.Adam([{"params": adapters}, {"params": head}], fused=True)
        options = {"dtype": _DTYPES.get(config.amp), "checkpointing": config.checkpointing}
        compile = device.type == "cuda"  # on a CPU it takes longer than it saves
        self.network = optimize(model, training=True, compile=compile, cuda_graphs=False, **options)
        self.take = TrainingStep(
            self.network, tasks.load(model.config.task).loss, self.optimizer, batch_sizes=[config.batch_size]
        )
        self.identity = {
            "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE},
            "model": model.config.to_dict() | model.fingerprints(),
            "train_clips": steps.clips,
            "processes": steps.world,
        }

    def step(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """One step of the optimiser over some micro-batches. Returns loss and clips, over all ranks."""
        for group, lr in zip(self.optimizer.param_groups, (self.config.lr, self.config.head_lr)):
            decays = self.state.epoch // self.config.lr_step if self.config.lr_step else 0
            group["lr"] = lr * self.config.lr_gamma**decays
        # No random state outlives a step, so that there is none to restore.
        _seed(self.config.seed, self.state.steps, self.steps.rank)
        fine: list[tuple[tuple[str, ...], Tensor]] = []
        for batch in batches:
            self.note(batch.failed)
            self.state.silent += batch.silent
            if len(batch):
                batch = batch.to(self.device)
                fine.append((batch.ids, self.take.accumulate(**batch.inputs, labels=batch.labels)))
        loss, segments, clips, failed, overflow = torch.stack(self.take.finish()).tolist()
        if failed or (overflow and not self.take.scales):
            loss = segments = clips = 0
            self._failed(fine)
        self.state.overflows += int(overflow)
        self.state.loss += loss * segments
        self.state.segments += int(segments)
        self.state.step += 1
        self.state.steps += 1
        return loss, int(clips)

    def _failed(self, fine: list[tuple[tuple[str, ...], Tensor]]) -> None:
        """Notes a step that was not taken, or ends the run. fine: ids of clips, and whether they are not to blame."""
        names = [name for ids, good in fine for name, is_fine in zip(ids, good.tolist()) if not is_fine]
        names = ", ".join(itertools.chain(*_gather(names)))
        what = f"{names}: {_NOT_FINITE}" if names else "expected finite gradients, got NaN or infinity"
        if self.config.on_nan == "stop":
            raise FloatingPointError(what)
        line = f"step {self.state.steps + 1}: {what}"
        self.state.not_finite.append(line)
        if self.steps.rank == 0:
            warnings.warn(f"skipped {line}", stacklevel=2)

    def average_buffers(self) -> None:
        """Makes BatchNorm's running statistics the mean over the ranks."""
        if self.steps.world > 1:
            for name, tensor in self.model.trainable_state_dict().items():
                if name.rpartition(".")[2] in ("running_mean", "running_var"):
                    dist.all_reduce(tensor)
                    tensor /= self.steps.world

    def note(self, failed: Iterable[str]) -> None:
        """Warns of files that cannot be read, each once."""
        for line in failed:
            if line not in self.state.skipped:
                self.state.skipped.append(line)
                warnings.warn(f"skipped {line}", stacklevel=2)

    def save(self) -> None:
        """Writes the state, in rank 0."""
        facts = {"identity": self.identity, "state": dataclasses.asdict(self.state)}
        if self.steps.rank == 0:
            tensors = {f"model.{name}": tensor for name, tensor in self.model.trainable_state_dict().items()}
            for index, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"adam.{index}.{name}": tensor for name, tensor in values.items()}
            tensors |= {f"scaler.{name}": tensor for name, tensor in self.take.state_dict().items()}
            checkpoint.write_tensors(self.path, tensors, {"run": json.dumps(facts)})

    def load(self) -> None:
        """Takes up what `save` wrote. Raises: ValueError naming the file and what does not fit."""
        tensors = checkpoint.read_tensors(self.path)
        try:
            facts = json.loads(checkpoint.read_metadata(self.path)["run"])
            saved, state = _flat(facts["identity"]), _State(**facts["state"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: expected the state of a training run, got none: {error!r}") from None
        ours = _flat(json.loads(json.dumps(self.identity)))
        for name in sorted(saved.keys() | ours.keys()):
            if saved.get(name) != ours.get(name):
                raise ValueError(f"{self.path}: expected {name} {saved.get(name)!r}, got {ours.get(name)!r}")
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_trainable_state_dict(model, str(self.path))
        adam = {}
        for index, parameter in enumerate(self.parameters):
            values = {name: tensors.get(f"adam.{index}.{name}") for name in ("step", "exp_avg", "exp_avg_sq")}
            shapes = [None if tensor is None else tensor.shape for tensor in values.values()]
            if shapes == [torch.Size(), parameter.shape, parameter.shape]:
                adam[index] = values
            elif shapes != [None] * 3:  # a parameter that never had a gradient has no state
                raise ValueError(f"{self.path}: expected Adam's state of shape {tuple(parameter.shape)}, got {shapes}")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": adam})
        scaler = {name.removeprefix("scaler."): t for name, t in tensors.items() if name.startswith("scaler.")}
        try:
            self.take.load_state_dict(scaler)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.state = state


class _Steps(torch.utils.data.Sampler):
    """The clips of each micro-batch of one rank: `accumulate` micro-batches a step, perhaps empty ones at the end.

    An epoch's order follows from seed and epoch alone; `start` steps of it are left out.
    """

    def __init__(self, clips: int, config: TrainConfig, rank: int, world: int) -> None:
        self.clips, self.config, self.rank, self.world = clips, config, rank, world
        self.per_step = config.batch_size * config.accumulate * world
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.config.seed + self.epoch)
        order = torch.randperm(self.clips, generator=generator).tolist()
        size = self.config.batch_size
        for first in range(self.start * self.per_step, self.clips, self.per_step):
            mine = order[first : first + self.per_step][self.rank :: self.world]
            yield from (mine[i * size : (i + 1) * size] for i in range(self.config.accumulate))

    def __len__(self) -> int:
        return (self.count - self.start) * self.config.accumulate

    @property
    def count(self) -> int:
        """Steps in an epoch."""
        return -(-self.clips // self.per_step)


def _train_epoch(run: _Run, loader: DataLoader, log: _Log, bar: Progress) -> float:
    """The rest of the epoch that is under way. Returns clips per second."""
    state, config = run.state, run.config
    run.steps.epoch, run.steps.start = state.epoch, state.step
    run.model.train()
    run.network.train()
    batches = iter(loader)
    task = bar.add_task(f"epoch {state.epoch + 1}/{config.epochs}", total=run.steps.count, completed=state.step)
    clips, start = 0, time.perf_counter()
    while state.step < run.steps.count:
        loss, done = run.step(itertools.islice(batches, config.accumulate))
        clips += done
        speed = clips / (time.perf_counter() - start)
        log.step(state, loss, run.optimizer.param_groups, speed)
        best = f"  best val {state.best_score:.1%}" if state.best_epoch else ""
        text = f"epoch {state.epoch + 1}/{config.epochs}  loss {loss:.4f}  {speed:.1f} clips/s{best}"
        bar.update(task, advance=1, description=text)
        if config.save_every and state.steps % config.save_every == 0:
            run.average_buffers()
            run.save()
    bar.remove_task(task)
    if not state.segments:
        if failed := state.not_finite:
            raise ValueError(f"training: expected a step that is finite, got none of {run.steps.count}: {failed[0]}")
        skipped = f": {state.skipped[0]}" if state.skipped else ""
        raise ValueError(f"training: expected a clip that can be read, got none of {run.steps.clips}{skipped}")
    return clips / (time.perf_counter() - start)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def _outputs(model: nn.Module, batch: Batch, amp: str | None) -> tuple[Any, list[bool]]:
    """The outputs, and of which clips they are finite."""
    with torch.autocast(batch.labels.device.type, _DTYPES.get(amp), enabled=amp is not None):
        outputs = model(**batch.inputs)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    return outputs, first.reshape(len(batch), -1).isfinite().all(1).tolist()


class _Log:
    """log.jsonl and TensorBoard's files, written by rank 0. What was logged after the checkpoint is cut off."""

    def __init__(self, out: Path, state: _State) -> None:
        self.file = self.board = None
        if _rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            out.mkdir(parents=True, exist_ok=True)
            self.file = open(out / "log.jsonl", "ab")  # noqa: SIM115
            self.file.truncate(min(state.log_bytes, self.file.tell()))
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=state.steps)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()
            self.board.close()

    def step(self, state: _State, loss: float, groups: list[dict[str, Any]], clips_per_second: float) -> None:
        lr, head_lr = (group["lr"] for group in groups)
        curves = {"train/loss": loss, "train/lr": lr, "train/head_lr": head_lr}
        row = {"step": state.steps, "epoch": state.epoch + 1, "loss": loss, "lr": lr, "head_lr": head_lr}
        self._write(state, row | {"clips_per_second": round(clips_per_second, 3)}, curves)

    def epoch(self, state: _State, loss: float, result: Evaluation, clips_per_second: float) -> None:
        row = {"epoch": state.epoch, "steps": state.steps, "train_loss": loss, "val_score": result.score}
        row |= {"val": dict(result.scores), "best_epoch": state.best_epoch}
        row |= {"clips_per_second": round(clips_per_second, 3), "skipped": state.skipped}
        row |= {"overflows": state.overflows, "not_finite": state.not_finite}
        self._write(
            state, row, {f"val/{name}": value for name, value in result.scores.items()} | {"train/epoch_loss": loss}
        )

    def _write(self, state: _State, row: dict[str, Any], curves: dict[str, float]) -> None:
        if self.file:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
            state.log_bytes = self.file.tell()
            for name, value in curves.items():
                self.board.add_scalar(name, value, state.steps)


def _loader(dataset: Dataset, workers: int, device: torch.device, **options: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=tasks.collate,
        pin_memory=device.type == "cuda",
        # Without its own, each iterator would draw from the global generator, and a resumed epoch has one more.
        generator=torch.Generator(),
        **options,
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(device or "cpu")


def _join(device: torch.device) -> tuple[int, int]:
    """(rank, number of ranks). Under torchrun the group is made at the first call, for the life of the process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return _rank(), dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: Any) -> list[Any]:
    """The value of each rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def _display(progress: Progress | None, rank: int) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A bar, and what prints a line beside it; both are silent but in rank 0."""
    if progress is not None and rank == 0:
        yield progress, lambda line: None
        return
    console = Console(quiet=rank > 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=rank > 0 or not console.is_terminal) as bar:
        yield bar, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def _track(batches: Sized, bar: Progress) -> Iterator[Any]:
    task = bar.add_task("evaluate", total=len(batches))
    for batch in batches:
        yield batch
        bar.advance(task)
    bar.remove_task(task)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _seed(*key: int) -> None:
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
