"""Two result files side by side: what became faster, what slower, and what is noise.

The intervals cover the spread within the files, and nothing else. Rounds of one run share a process, a clock speed and
a machine's neighbours, so a file with one run of each case says nothing of how the next run would fall: such drift is
covered only where each file holds several runs of the same case. Few runs tell little of it: where runs drift by as
much as rounds scatter, equal code is called different one time in two from one run a file, one in five from two, and
one in twenty or less from four on.
"""

from __future__ import annotations

import json
import math
from collections import namedtuple
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from benchmarks.results import KEY

RESAMPLES = 2000
MIN_ROUNDS = 3


# What was measured, each as text; the setting as JSON, keys sorted.
Key = namedtuple("Key", KEY)


@dataclass(frozen=True)
class Comparison:
    """One case in two files, A and B.

    a_ms, b_ms: the median of the runs' median times, NaN where there is none. ratio: a_ms / b_ms, above 1 where B is
    faster. interval: the ratio's 95 % interval. verdict: a short sentence. note: what failed although the case
    could be compared. runs: that were compared, of A and of B. a_machines, b_machines: devices and their threads.
    """

    key: Key
    a_ms: float
    b_ms: float
    interval: tuple[float, float]
    verdict: str
    note: str
    runs: tuple[int, int]
    a_machines: tuple[str, ...]
    b_machines: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.a_ms / self.b_ms


def compare(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[Comparison]:
    """Every case of either file, in order of appearance.

    A case's rows are runs, their single times rounds; a row without single times counts as one round. The time of a
    case is the median of its runs' medians. The ratio's 95 % interval is the bootstrap's (2,000 resamples, always the
    same seed): runs are drawn with replacement, then rounds within each run. A case that is in one file only, or that
    failed, is listed with the reason.
    """
    runs = [_by_key(rows) for rows in (a, b)]
    return [_compare(key, runs[0].get(key, []), runs[1].get(key, [])) for key in dict.fromkeys([*runs[0], *runs[1]])]


def _by_key(rows: list[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    found: dict[Key, list[dict[str, Any]]] = {}
    for row in rows:
        values = {name: str(row[name]) for name in Key._fields}
        values["setting"] = json.dumps(row["setting"], sort_keys=True)
        found.setdefault(Key(**values), []).append(row)
    return found


def _compare(key: Key, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Comparison:
    runs = [[np.array(row.get("times_ms") or [row["median_ms"]], float) for row in rows if _ok(row)] for rows in (a, b)]
    a_ms, b_ms = (float(np.median([np.median(run) for run in side])) if side else math.nan for side in runs)
    failures = [_failures(rows, name) for name, rows in (("A", a), ("B", b))]
    problems = "; ".join(filter(None, failures))
    interval, note = (math.nan, math.nan), ""
    if not (a and b):
        verdict = f"only in {'A' if a else 'B'}" + (f"; {problems}" if problems else "")
    elif not all(runs):
        verdict = problems
    else:
        note = problems
        if min(sum(map(len, side)) for side in runs) < MIN_ROUNDS:
            verdict = "too few rounds"
        else:
            interval = _interval(*runs)
            verdict = _verdict(a_ms / b_ms, interval)
    return Comparison(
        key, a_ms, b_ms, interval, verdict, note, (len(runs[0]), len(runs[1])), _machines(a), _machines(b)
    )


def _ok(row: dict[str, Any]) -> bool:
    return row["status"] == "ok"


def _failures(rows: list[dict[str, Any]], name: str) -> str:
    failed = [row for row in rows if not _ok(row)]
    if not failed:
        return ""
    share = "" if len(failed) == len(rows) else f" ({len(failed)} of {len(rows)} runs)"
    reasons = dict.fromkeys((str(row["status"]), row.get("reason")) for row in failed)
    return "; ".join(f"{status} in {name}{share}" + (f": {reason}" if reason else "") for status, reason in reasons)


def _machines(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{row['device']}, threads: {row['threads']}" for row in rows))


def _interval(a: list[np.ndarray], b: list[np.ndarray]) -> tuple[float, float]:
    random = np.random.default_rng(0)
    low, high = np.quantile(_resampled(a, random) / _resampled(b, random), (0.025, 0.975))
    return float(low), float(high)


def _resampled(runs: list[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """RESAMPLES medians of run medians, runs drawn first, then rounds within them."""
    drawn = random.integers(len(runs), size=(RESAMPLES, len(runs)))
    medians = np.empty(drawn.shape)
    for i, run in enumerate(runs):
        here = drawn == i
        medians[here] = np.median(run[random.integers(len(run), size=(here.sum(), len(run)))], axis=1)
    return np.median(medians, axis=1)


def _verdict(ratio: float, interval: tuple[float, float]) -> str:
    if interval[0] <= 1 <= interval[1]:
        return "noise"
    factor, word = (ratio, "faster") if interval[0] > 1 else (1 / ratio, "slower")
    return f"B is {factor:.{2 if factor >= 1.01 else 4}f}x {word}"


def caveats(comparisons: Iterable[Comparison]) -> list[str]:
    """Sentences on what the ratios hide: other devices or numbers of threads, drift between runs."""
    comparisons = list(comparisons)
    pairs = dict.fromkeys((c.a_machines, c.b_machines) for c in comparisons if c.a_machines and c.b_machines)
    found = [
        f"Not the same machine: A on {' and '.join(a)}; B on {' and '.join(b)}."
        for a, b in pairs
        if a != b or len(a) > 1
    ]
    if any(min(c.runs) == 1 for c in comparisons):
        found.append("A file has one run of some cases: their intervals do not cover the drift between runs.")
    return found


def table(comparisons: list[Comparison]) -> Table:
    """A line per case. What all cases share is above it, after what makes them hard to compare."""
    values = {name: {getattr(c.key, name) for c in comparisons} for name in Key._fields}
    varying = [name for name in Key._fields if len(values[name]) > 1]
    shared = [f"{name} {getattr(comparisons[0].key, name)}" for name in Key._fields if len(values[name]) == 1]
    # Text, because errors and settings have brackets that rich would take for markup.
    text = Table(title=Text("\n".join([*caveats(comparisons), ", ".join(shared)])), title_justify="left")
    for name in varying:
        text.add_column(name)
    for name in ("A ms", "B ms", "A / B", "95 %"):
        text.add_column(name, justify="right", no_wrap=True)
    text.add_column("verdict")
    for c in comparisons:
        interval = "" if math.isnan(c.interval[0]) else f"{c.interval[0]:.3f}-{c.interval[1]:.3f}"
        verdict = f"{c.verdict}; {c.note}" if c.note else c.verdict
        cells = [_number(c.a_ms, ".4g"), _number(c.b_ms, ".4g"), _number(c.ratio, ".3f"), interval, verdict]
        text.add_row(*(Text(cell) for cell in (*(getattr(c.key, name) for name in varying), *cells)))
    return text


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"
