"""The cases of `python -m benchmarks run`, each checked first: small ones on a CPU, the paper's on a card."""

import time

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.run import Group, Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SELECTION = Selection(DEVICE, "paper" if DEVICE == "cuda" else "small", [8 if DEVICE == "cuda" else 2])
SHARED = {}  # one float64 truth at a time


def candidates():
    for key in SELECTION.groups():
        setting = "-".join(f"{name}{value}" for name, value in key["setting"].items())
        for candidate in SELECTION.candidates(key, CASES[key["case"]].paths):
            names = filter(None, [key["case"], key["mode"], setting, *candidate.values()])
            yield pytest.param(key, candidate, id="-".join(names))


@pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=False)
@pytest.mark.parametrize(("key", "candidate"), candidates())
def test_case(benchmark, key, candidate):
    what = str([key[name] for name in ("case", "mode", "setting")])
    if SHARED.get("what") != what:
        SHARED.clear()
        SHARED["what"] = what
    group = Group(SELECTION, key, {}, SHARED, time.monotonic())
    candidate = group.prepare(**candidate)
    if candidate.row["status"] == "skipped":
        pytest.skip(candidate.row["reason"])
    assert candidate.row["status"] == "ok", candidate.row["reason"]

    def call():
        candidate.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{key['case']} {key['mode']} {key['setting'] or ''}"
    benchmark.extra_info |= {name: candidate.row[name] for name in ("error", "peak_mib", "batch")}
    benchmark(call)
