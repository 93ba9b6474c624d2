"""Tuning: candidates are checked before they are timed, and what is printed is a row to paste."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lavish_fast.kernels import _tuning

from benchmarks import measure, tune
from benchmarks.cases import PRESETS
from kernel_parity import DEVICE, poisoned  # noqa: F401
from test_cases import TINY

EMBED = TINY.swin.backbone.embed_dim
WIDTH = EMBED * 4  # of stage 3


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", TINY)
    monkeypatch.setattr(_tuning, "ROWS", {})


def target(op="gather_latents", stage=3):
    return tune.Target(op, "small", stage, torch.float32, 1, DEVICE)


def tuned(*arguments, **options) -> tune.Tuned:
    *_, last = tune.tune(*arguments, **options)
    return last


@pytest.fixture
def clock(monkeypatch):
    """A clock that runs backwards: what is timed later is faster."""
    times = itertools.count(20, -1)

    def time_rounds(calls, *_):
        if DEVICE == "cuda":  # a graph has no gradients before it is replayed; the interpreter is slow
            calls[0]()
        return [[float(next(times))] * 5]

    monkeypatch.setattr(measure, "time_rounds", time_rounds)


@pytest.fixture
def few(monkeypatch, clock):
    """Two candidates of gather_latents."""
    values = dict(_tuning.CANDIDATES["gather_latents"])
    first = next(iter(values))
    candidates = {name: list(options)[: 2 if name == first else 1] for name, options in values.items()}
    monkeypatch.setitem(_tuning.CANDIDATES, "gather_latents", candidates)
    return list(tune.candidates("gather_latents"))


def test_the_fastest_is_found_and_nothing_is_left_behind(few):
    before = dict(_tuning.ROWS)
    found = tuned(target(), 0.0)
    assert len(few) == found.tried == 2
    # The default once, each candidate once alone and once for its time.
    assert (found.constants, found.milliseconds, found.before) == (few[1], 16.0, 20.0)
    assert found.dropped == {}
    assert before == _tuning.ROWS
    key, constants = eval("{" + found.row() + "\n}").popitem()
    assert key == ("gather_latents", 0 if DEVICE == "cpu" else key[1], "float32", WIDTH)
    assert constants == few[1]


def test_a_measured_row_stays_and_is_not_what_before_means(few, monkeypatch):
    architecture = tuned(target(), 0.0).key[1]
    key, row = ("gather_latents", architecture, "float32", WIDTH), {"not": "constants of it"}
    monkeypatch.setitem(_tuning.ROWS, key, row)
    # With the row no launch would succeed.
    monkeypatch.setattr(tune, "_asked", lambda op: _Asked({key}))
    monkeypatch.setattr(tune.Run, "__call__", lambda run: None)
    monkeypatch.setattr(tune.Run, "errors", lambda *_: {"outputs": 0.0})
    assert tuned(target(), 0.0).dropped == {}
    assert _tuning.ROWS[key] is row


class _Asked(set):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_wrong_or_failing_candidate_is_never_timed(few, monkeypatch):
    from lavish_fast.kernels import gather_latents

    true = gather_latents.launches

    def launches(*args, **kwargs):
        found = true(*args, **kwargs)
        tried = list(_tuning.ROWS.values())
        if few[0] in tried:
            raise MemoryError("out of shared memory")
        return [] if few[1] in tried else found

    monkeypatch.setattr(gather_latents, "launches", launches)
    found = tuned(target(), 0.0)
    assert found.dropped == {"MemoryError": 1, "wrong": 1}
    assert found.milliseconds == found.before == 20.0
    assert found.constants == _tuning.row("gather_latents", found.key[1], torch.float32, WIDTH)[0]


def test_a_hopeless_candidate_is_neither_checked_nor_timed(few, monkeypatch):
    # The default, the first alone, the second alone and for its time.
    times = iter([10.0, 31.0, 29.0, 9.0])
    monkeypatch.setattr(measure, "time_rounds", lambda *_: [[next(times)] * 5])
    checked, true = [], tune.Run.errors
    monkeypatch.setattr(tune.Run, "errors", lambda run, *a: checked.append(run.path) or true(run, *a))
    found = tuned(target(), 0.0)
    assert (found.constants, found.milliseconds, found.dropped) == (few[1], 9.0, {"slow": 1})
    assert checked == ["reference", "fused", "fused"]


def without_defaults(monkeypatch, but):
    """gather_latents writes nothing unless one of the constants in `but` is tried."""
    from lavish_fast.kernels import gather_latents

    true = gather_latents.launches

    def launches(*args, **kwargs):
        found = true(*args, **kwargs)  # looks the constants up
        return found if any(row in but for row in _tuning.ROWS.values()) else []

    monkeypatch.setattr(gather_latents, "launches", launches)


def test_wrong_constants_in_use_are_not_the_best(few, monkeypatch):
    without_defaults(monkeypatch, but=few[:1])
    # The candidate that is right is slower than those in use.
    times = iter([1.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(measure, "time_rounds", lambda *_: [[next(times)] * 5])
    found = tuned(target(), 0.0)
    assert (found.constants, found.milliseconds, found.before) == (few[0], 5.0, 1.0)
    assert found.dropped == {"default wrong": 1, "wrong": 1}


def test_where_nothing_is_right_there_is_no_row_to_paste(few, monkeypatch):
    without_defaults(monkeypatch, but=())
    found = tuned(target(), 0.0)
    assert found.dropped == {"default wrong": 1, "wrong": 2}
    assert found.row().endswith("none is right")
    assert eval("{" + found.row() + "\n}") == {}


def test_what_is_best_so_far_is_there_after_each_candidate(few):
    found = list(tune.tune(target(), 0.0))
    assert [(each.tried, each.milliseconds) for each in found] == [(0, 20.0), (1, 18.0), (2, 16.0)]
    assert [each.constants for each in found[1:]] == few


def test_a_spent_budget_leaves_what_was_found(few):
    found = tuned(target(), 0.0, until=0.0)
    assert (found.tried, found.milliseconds, found.dropped) == (0, found.before, {})


@pytest.mark.parametrize("op", _tuning.DEFAULTS)
def test_every_kernel_has_a_case_that_launches_it(op, monkeypatch, clock):
    """In training, where the kernel is a part of it; its gradients are among what is checked."""
    name, mode = tune.case_of(op)
    widths = {"gather_latents": EMBED * 8, "adapter": EMBED * 8, "window_attention": 2 * 4}  # heads of 64 channels
    row, _ = _tuning.row(op, 0, torch.float32, widths[name])
    monkeypatch.setitem(_tuning.CANDIDATES, op, {constant: (value,) for constant, value in row.items()})
    seen, true = [], tune.Run.errors
    monkeypatch.setattr(tune.Run, "errors", lambda run, *a: seen.append(true(run, *a)) or seen[-1])
    found = tuned(target(op, 4), 0.0)
    assert (mode == "training") == (op not in tune.CASES)
    assert (found.key[0], *found.key[2:]) == (op, "float32", widths[name])
    assert (found.tried, found.dropped) == (1, {})
    assert found.constants == row
    # Of the reference, of the kernel with the default and of the candidate.
    gradients = {"gather_latents": 2, "adapter": 3 + 1 + 13, "window_attention": 1}[name]
    assert [len(errors) for errors in seen] == [1 + gradients * (mode == "training")] * 3


def test_a_wrong_gradient_is_found(monkeypatch, clock):
    from lavish_fast.kernels import window_attention_bwd

    op, true = "window_attention_bwd", window_attention_bwd.launches
    row, _ = _tuning.row(op, 0, torch.float32, 4)
    monkeypatch.setitem(_tuning.CANDIDATES, op, {constant: (value,) for constant, value in row.items()})
    monkeypatch.setattr(window_attention_bwd, "launches", lambda *a: [] if _tuning.ROWS else true(*a))
    assert tuned(target(op, 4), 0.0).dropped == {"wrong": 1}


def test_builders_run_every_candidate_once_and_fail_in_silence(few, monkeypatch):
    ran, true = [], tune.Run.__call__

    def call(run):
        tried = [row for row in _tuning.ROWS.values() if row in few]
        ran.extend(tried)
        if few[0] in tried:
            raise MemoryError("out of shared memory")
        return true(run)

    monkeypatch.setattr(tune.Run, "__call__", call)
    with ThreadPoolExecutor(1) as pool:
        found = tuned(target(), 0.0, builders=pool)
    tune._built.cache_clear()
    assert [few.index(row) for row in ran[:2]] == [0, 1]
    assert found.dropped == {"MemoryError": 1}
    assert found.constants == few[1]
    assert not any(row in few for row in _tuning.ROWS.values())


def test_stages():
    assert tune.stages("adapter_training_up", "paper") == tune.stages("window_attention", "small") == [1, 2, 3, 4]
    with pytest.raises(StopIteration):
        tune.case_of("nonsense_bwd")
