"""Tuning: candidates are checked before they are timed, and what is printed is a row to paste."""

import itertools

import pytest
import torch
from lavish_fast.kernels import _tuning

from benchmarks import measure, tune
from benchmarks.cases import CASES, PRESETS
from kernel_parity import DEVICE


@pytest.fixture
def small(monkeypatch):
    """One stage of gather_latents, few candidates, and a clock that likes the last one most."""
    case = CASES["gather_latents"]
    values = dict(_tuning.CANDIDATES["gather_latents"])
    first = next(iter(values))
    candidates = {name: list(options)[: 2 if name == first else 1] for name, options in values.items()}
    monkeypatch.setitem(_tuning.CANDIDATES, "gather_latents", candidates)
    monkeypatch.setitem(
        CASES, "gather_latents", case.__class__(**{**vars(case), "settings": lambda _: [{"stage": 3, "latents": 2}]})
    )
    clock = itertools.count(10, -1)
    monkeypatch.setattr(measure, "time_rounds", lambda calls, *_: [[float(next(clock))] * 5])
    return candidates


def tuned():
    (found,) = tune.tune("gather_latents", "small", torch.float32, 1, DEVICE, 0.0)
    return found


def test_the_fastest_is_found_and_nothing_is_left_behind(small):
    before = dict(_tuning.ROWS)
    found = tuned()
    every = list(tune.candidates("gather_latents"))
    assert len(every) == found.tried == 2
    assert (found.constants, found.milliseconds, found.before) == (every[1], 8.0, 10.0)
    assert found.failed == {}
    assert before == _tuning.ROWS
    key, constants = eval("{" + found.row() + "\n}").popitem()
    assert key[0] == "gather_latents"
    assert key[2:] == ("float32", PRESETS["small"].swin.backbone.embed_dim * 4)
    assert constants == every[1]


def test_a_wrong_or_failing_candidate_is_never_timed(small, monkeypatch):
    from lavish_fast.kernels import gather_latents

    every = list(tune.candidates("gather_latents"))
    key = ("gather_latents", 0, "float32", PRESETS["small"].swin.backbone.embed_dim * 4)
    true = gather_latents.launches

    def launches(*args, **kwargs):
        found = true(*args, **kwargs)
        if _tuning.ROWS.get(key) == every[0]:
            raise MemoryError("out of shared memory")
        return [] if _tuning.ROWS.get(key) == every[1] else found

    monkeypatch.setattr(gather_latents, "launches", launches)
    found = tuned()
    assert found.failed == {"MemoryError": 1, "wrong": 1}
    assert found.milliseconds == found.before == 10.0
    assert found.constants == _tuning.row(*(key[0], key[1], torch.float32, key[3]))[0]
