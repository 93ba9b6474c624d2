"""Launch constants for the card at hand: a candidate is checked against float64 before its time counts.

A kernel of inference is timed by its op's forward, one of training by its op's forward and backward, gradients checked.
On a card each is replayed as a CUDA graph: what the host does between launches would hide the kernels.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from lavish_fast.kernels import _tuning
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import CASES, PRESETS
from benchmarks.run import Truth, budgets, step

OPS = tuple(_tuning.CANDIDATES)
_HOPELESS = 3  # times the best: a candidate that takes as long at once is not timed further

Key = tuple[str, int, str, int]


@dataclass(frozen=True)
class Tuned:
    """The best constants of an op for a type and width, and milliseconds with them and with what is used without.

    Infinite milliseconds: neither those in use nor any other gave the right numbers.
    """

    key: Key
    constants: dict[str, Any]
    milliseconds: float
    before: float
    tried: int
    dropped: dict[str, int]  # why, and how many candidates

    def row(self) -> str:
        """The line of `_tuning.ROWS`."""
        if math.isinf(self.milliseconds):
            return f"    # {self.key!r}: none is right"
        return f"    {self.key!r}: {self.constants!r},  # {self.milliseconds:.4f} ms, {self.before:.4f} before"


def case_of(op: str) -> tuple[str, str]:
    """The case and the mode that an op's kernel is timed by, e.g. adapter_training_up by the adapter's training."""
    if op in CASES:
        return op, "inference"
    return next(name for name in CASES if op.startswith(f"{name}_")), "training"


@dataclass(frozen=True)
class Target:
    """An op's case at one stage of a preset."""

    op: str
    preset: str
    stage: int
    dtype: torch.dtype
    batch: int
    device: str


class Run:
    """One call of the op's case: forward, in training with the backward, which leaves its gradients in the inputs."""

    def __init__(self, target: Target, path: str, batch: int) -> None:
        name, mode = case_of(target.op)
        case, preset = CASES[name], PRESETS[target.preset]
        # The first adapter's setting: one row serves a width.
        setting = next(setting for setting in case.settings(preset) if setting["stage"] == target.stage)
        self.path, self.batch, self.training = path, batch, mode == "training"
        self.problem = case.problem(preset, setting, 1)
        device = target.device
        self.function = self.problem.build(path, target.dtype, device, training=self.training)
        self.inputs = self.problem.batch(batch, target.dtype, device, training=self.training)
        self._call = self.function
        if self.training:
            self._call = step(self.problem, self.function, self.function, self.inputs, batch)

    def __call__(self) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return self._call(*self.inputs).detach()  # no node outlives the call: a graph would meet its stream

    def errors(self, truth: Truth, outputs: Tensor) -> dict[str, float]:
        return truth.errors(self.path, self.function, outputs, self.batch, self.inputs)


def stages(op: str, preset: str) -> list[int]:
    return list(dict.fromkeys(setting["stage"] for setting in CASES[case_of(op)[0]].settings(PRESETS[preset])))


def tune(
    target: Target, seconds: float, *, builders: Executor | None = None, until: float = float("inf")
) -> Iterator[Tuned]:
    """The best of `_tuning.CANDIDATES[op]` for the width of a stage: first what is used without, then after each.

    seconds: of timing per candidate. builders: processes that build the candidates first, side by side. until: the
    moment of `time.monotonic` after which none begins.
    """
    name = str(target.dtype).removeprefix("torch.")
    precision, every = measure.PRECISIONS[name], list(candidates(target.op))
    if builders is not None:
        list(builders.map(build, [target] * len(every), every))
    run, control = Run(target, "fused", target.batch), Run(target, "reference", 1)
    truth = Truth(run.problem, "reference", target.device, run.training)
    own = control.errors(truth, control())

    def right(outputs: Tensor) -> bool:
        errors = run.errors(truth, outputs)
        allowed = budgets(precision, errors, own, training=run.training)
        return all(error <= allowed[what] for what, error in errors.items())

    with _asked(target.op) as keys:
        run()
    if len(keys) != 1:
        raise ValueError(f"{target.op}: expected launches of one width, got {sorted(keys) or 'none'}")
    key, tried, dropped = keys.pop(), 0, {}
    with _trying(key, None):
        outputs = run()
        before = _milliseconds(_replayed(run, target.device), target.device, seconds)
        best = before, _tuning.row(key[0], key[1], target.dtype, key[3])[0]
        if not right(outputs):
            best, dropped = (math.inf, {}), {"default wrong": 1}
    yield Tuned(key, best[1], best[0], before, tried, dropped)
    for constants in every:
        if time.monotonic() > until:
            break
        tried += 1
        why = None
        with _trying(key, constants):
            try:
                outputs = run()
                call = _replayed(run, target.device)
                if _milliseconds(call, target.device, 0.0) > _HOPELESS * best[0]:
                    why = "slow"
                elif not right(outputs):
                    why = "wrong"
                else:
                    taken = _milliseconds(call, target.device, seconds)
                    best = min(best, (taken, constants), key=lambda pair: pair[0])
            except Exception as error:  # too much shared memory, say: the next one may do
                why = type(error).__name__
        if why:
            dropped = dropped | {why: dropped.get(why, 0) + 1}
        yield Tuned(key, best[1], best[0], before, tried, dropped)


def candidates(op: str) -> Iterator[dict[str, Any]]:
    """Every combination of `_tuning.CANDIDATES[op]`."""
    values = _tuning.CANDIDATES[op]
    return (dict(zip(values, combination)) for combination in itertools.product(*values.values()))


def build(target: Target, constants: dict[str, Any]) -> None:
    """Runs a candidate, whatever comes of it: what Triton builds stays in its cache on the disk."""
    run, key = _built(target)
    with _trying(key, constants), suppress(Exception):
        run()


@lru_cache(maxsize=1)
def _built(target: Target) -> tuple[Run, Key]:
    run = Run(target, "fused", target.batch)
    with _asked(target.op) as keys:
        run()
    return run, keys.pop()


@contextmanager
def _asked(op: str) -> Iterator[set[Key]]:
    """The keys of the rows that launches of `op` look up inside."""
    found, look_up = set(), _tuning.row

    def row(name: str, architecture: int, dtype: torch.dtype, width: int) -> Any:
        if name == op:
            found.add((name, architecture, str(dtype).removeprefix("torch."), width))
        return look_up(name, architecture, dtype, width)

    _tuning.row = row
    try:
        yield found
    finally:
        _tuning.row = look_up


@contextmanager
def _trying(key: Key, constants: dict[str, Any] | None) -> Iterator[None]:
    """With these constants as the measured row, or with none."""
    measured = _tuning.ROWS.pop(key, None)
    if constants is not None:
        _tuning.ROWS[key] = constants
    try:
        yield
    finally:
        _tuning.ROWS.pop(key, None)
        if measured is not None:
            _tuning.ROWS[key] = measured


def _replayed(run: Run, device: str) -> Callable[[], Any]:
    if device != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _milliseconds(call: Callable, device: str, seconds: float) -> float:
    return measure.quantiles(measure.time_rounds([call], device, seconds)[0])[1]
