"""Launch constants for the card at hand: every candidate is checked against float64 first, then timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lavish_fast.kernels import _launch, _tuning

from benchmarks import measure
from benchmarks.cases import CASES, PRESETS, Case, Problem
from benchmarks.run import Truth
from lavish_fast import ops

OPS = tuple(_tuning.CANDIDATES)


@dataclass(frozen=True)
class Tuned:
    """The best constants of an op for a type and width, and milliseconds with them and with what is used without."""

    key: tuple[str, int, str, int]
    constants: dict[str, Any]
    milliseconds: float
    before: float
    tried: int
    failed: dict[str, int]  # why, and how many candidates

    def row(self) -> str:
        """The line of `_tuning.ROWS`."""
        return f"    {self.key!r}: {self.constants!r},  # {self.milliseconds:.4f} ms, {self.before:.4f} before"


def tune(op: str, preset: str, dtype: torch.dtype, batch: int, device: str, seconds: float) -> Iterator[Tuned]:
    """The best of `_tuning.CANDIDATES[op]` at each width of a preset, at `batch` clips."""
    case, sizes = CASES[op], PRESETS[preset]
    settings = {}
    for setting in case.settings(sizes):
        settings.setdefault(setting["stage"], setting)  # the first adapter's: one row serves a width
    for setting in settings.values():
        yield _tune(op, case, case.problem(sizes, setting, 1), dtype, batch, device, seconds)


def _tune(op: str, case: Case, problem: Problem, dtype: torch.dtype, batch: int, device: str, seconds: float) -> Tuned:
    name = str(dtype).removeprefix("torch.")
    truth = Truth(problem, "reference", device, training=False)
    once, inputs = (problem.batch(repeats, dtype, device) for repeats in (1, batch))
    call = problem.build("fused", dtype, device, training=False)
    control = problem.build("reference", dtype, device, training=False)
    precision = measure.PRECISIONS[name]
    with torch.no_grad():
        budget = 2 * truth.errors("reference", control, control(*once), 1)[0] + 4 * precision.eps
        with ops.recording() as choices:
            call(*once)
    width = next(choice.width for choice in choices if choice.op == op)
    key = (op, _launch.architecture(inputs[0].device), name, width)
    measured = _tuning.ROWS.pop(key, None)
    failed: dict[str, int] = {}
    try:
        before = _milliseconds(call, inputs, device, seconds)
        best = (before, _tuning.row(op, key[1], dtype, width)[0])
        for constants in candidates(op):
            _tuning.ROWS[key] = constants
            try:
                with torch.no_grad():
                    error = truth.errors("fused", call, call(*inputs), batch)[0]
                if error > min(budget, precision.cap):
                    raise ArithmeticError("wrong")
                best = min(best, (_milliseconds(call, inputs, device, seconds), constants), key=lambda pair: pair[0])
            except Exception as exception:  # too much shared memory, say: the next one may do
                why = "wrong" if isinstance(exception, ArithmeticError) else type(exception).__name__
                failed[why] = failed.get(why, 0) + 1
    finally:
        _tuning.ROWS.pop(key, None)
        if measured is not None:
            _tuning.ROWS[key] = measured
    return Tuned(key, best[1], best[0], before, len(list(candidates(op))), failed)


def candidates(op: str) -> Iterator[dict[str, Any]]:
    """Every combination of `_tuning.CANDIDATES[op]`."""
    values = _tuning.CANDIDATES[op]
    return (dict(zip(values, combination)) for combination in itertools.product(*values.values()))


def _milliseconds(call: Callable, inputs: tuple, device: str, seconds: float) -> float:
    with torch.no_grad():
        call(*inputs)
        return measure.quantiles(measure.time_rounds([lambda: call(*inputs)], device, seconds)[0])[1]
