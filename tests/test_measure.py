import contextlib
import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.measure import (
    EXECUTIONS,
    PRECISIONS,
    MatrixWork,
    Memory,
    Unavailable,
    execute,
    is_out_of_memory,
    quantiles,
    relative_error,
    time_rounds,
)

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_relative_error():
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x, x) == 0
    assert relative_error(x * 1.01, x) == pytest.approx(0.01, rel=1e-4)
    # The difference is beyond float32, the error is not.
    assert relative_error(x.double() * (1 + 1e-12), x.double()) == pytest.approx(1e-12, rel=1e-3)
    for got in (torch.tensor([3.0, math.nan]), torch.tensor([3.0, math.inf]), x[None], x[:1], torch.ones(2, 2)):
        assert relative_error(got, x) == math.inf
    assert relative_error(torch.zeros(2, 3), torch.zeros(3, 2)) == math.inf
    assert relative_error(torch.ones(2, 3), torch.ones(3, 2)) == math.inf
    assert relative_error(x, torch.tensor([3.0, math.nan])) == math.inf
    assert relative_error(x * 0, x * 0) == math.inf  # of nothing there is no parity


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_precision_sets_and_restores(name, before):
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    original = [s.allow_tf32 for s in settings]
    try:
        for s, value in zip(settings, before):
            s.allow_tf32 = value
        with contextlib.suppress(KeyError), measure.precision(name, "cpu"):  # restored after a failure too
            inside = [s.allow_tf32 for s in settings]
            autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            raise KeyError
        assert inside == [name == "tf32"] * 2
        assert autocast == ((True, False) if name == "bfloat16-autocast" else (False, True))
        assert product.dtype == (torch.bfloat16 if autocast[0] else torch.float32)
        assert [s.allow_tf32 for s in settings] == list(before)
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    finally:
        for s, value in zip(settings, original):
            s.allow_tf32 = value


def test_eps():
    assert {name: p.eps for name, p in PRECISIONS.items()} == {
        "float64": 2**-52,
        "float32": 2**-23,
        "tf32": 2**-10,
        "bfloat16-autocast": 2**-7,
        "bfloat16": 2**-7,
        "float16": 2**-10,
    }


def test_quantiles():
    assert quantiles([5, 1, 2, 4, 3, 6]) == (2, 3.5, 5)
    assert quantiles([1.0, 1.0, 1.0]) == (1, 1, 1)


# Memory


def test_memory_of_a_step_on_a_cpu():
    weight = nn.Linear(512, 1024, bias=False)  # 2 MiB
    weight.register_buffer("constant", torch.zeros(2**18), persistent=False)  # 1 MiB
    x = torch.zeros(2**18)  # 1 MiB

    def step():
        for _ in range(3):  # freed before the next, so that it does not count twice
            torch.zeros(2**21)  # 8 MiB

    memory = Memory("cpu")
    assert memory.peak(step, weight, x) == pytest.approx(12, rel=0.05)
    assert memory.peak(step, weight, x, x) == pytest.approx(12, rel=0.05)
    assert memory.peak(step) == pytest.approx(8, rel=0.05)


def test_what_an_earlier_profile_saw_does_not_hide_memory():
    kept = []
    Memory("cpu").peak(lambda: kept.append(torch.zeros(2**21)))

    def step():
        kept.clear()
        torch.zeros(2**20)  # 4 MiB

    assert Memory("cpu").peak(step) == pytest.approx(4, rel=0.05)


def test_two_tensors_at_once_count_twice():
    def step():
        x = torch.zeros(2**20)
        del x
        x = torch.zeros(2**20)
        return x + torch.zeros(2**20)  # three of 4 MiB

    assert Memory("cpu").peak(step) == pytest.approx(12, rel=0.05)


class Card:
    """Stands in for a card's allocator: what is held, and the most since the last reset."""

    def __init__(self, monkeypatch):
        self.held = self.most = 2**20
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "most", self.held))
        for name in ("empty_cache", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)

    def take(self, mib):
        self.held += mib * 2**20
        self.most = max(self.most, self.held)


def test_what_building_alone_took_is_not_a_captured_paths_peak(monkeypatch):
    card = Card(monkeypatch)
    memory = Memory("cuda")
    card.take(8)  # wide weights
    card.take(4)  # narrow ones
    card.take(-8)
    memory.note_built()
    card.take(2)  # a graph's own, while it is captured
    card.take(-1)
    memory.note_capture()
    assert memory.peak(lambda: None) == 4 + 2


# Matrix work


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x).relu().flatten(2).mT
        return self.linear(x @ x.mT @ x).sum()


def test_matrix_work_is_torchs_count():
    torch.manual_seed(0)
    network, x = Small(), torch.randn(2, 3, 6, 6)
    totals = []
    for backward in (False, True):
        work = MatrixWork()
        with FlopCounterMode(display=False) as theirs:
            out = network(x)
            if backward:
                out.backward()
        with work:
            out = network(x)
            if backward:
                out.backward()
        totals.append(sum(op.total_flops for op in work.ops(4, 1)))
        assert totals[-1] == theirs.get_total_flops() > 0
    assert totals[1] > 2.5 * totals[0]


def test_matrix_work_scales_and_counts_bytes():
    a, b = torch.ones(4, 6), torch.ones(6, 10)
    with MatrixWork() as work:
        for _ in range(3):
            torch.mm(a, b)
    (op,) = work.ops(2, 1)
    assert (op.name, op.calls, op.flops, op.bytes) == ("mm", 3, 2 * 4 * 6 * 10, 2 * (24 + 60 + 40))
    (op,) = work.ops(4, 2.5)
    assert (op.calls, op.flops, op.bytes) == (3, 1200, 1240)
    # Weights, also a part of them, are read once for all clips.
    with MatrixWork([torch.ones(12), b]) as work:
        torch.mm(a, b)
        torch.mm(a, b[:, 5:])
    whole, part = work.ops(4, 2.5)
    assert (whole.flops, whole.bytes) == (1200, 4 * (2.5 * (24 + 40) + 60))
    assert (part.flops, part.bytes) == (600, 4 * (2.5 * (24 + 20) + 30))


# Execution


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("execution", "training", "reason"),
    [
        ("graph", False, "CUDA device"),
        ("blocks+graph", False, "CUDA device"),
        ("reduce-overhead", False, "CUDA device"),
        ("freezing", True, "inference alone"),
    ],
)
def test_what_cannot_be_had_says_why(monkeypatch, execution, training, reason):
    monkeypatch.setattr(nn.Module, "compile", lambda *args, **options: pytest.fail("compiled before it was refused"))
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled before it was refused"))
    with pytest.raises(Unavailable, match=reason):
        execute(Blocks(), execution, [torch.ones(1, 4)], training=training)


@pytest.mark.parametrize("function", [nn.Linear(4, 4), torch.relu])
def test_blocks_need_blocks(function):
    with pytest.raises(Unavailable, match="no list of blocks"):
        execute(function, "blocks", [torch.ones(1, 4)], training=False)


def test_executions_compile_what_they_say(monkeypatch):
    blocks, whole = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: blocks.append((module, options)))
    monkeypatch.setattr(torch, "compile", lambda function, **options: whole.append(options) or function)
    network, x = Blocks(), torch.ones(1, 4)
    assert execute(network, "eager", [x], training=True) is network
    assert blocks == whole == []
    assert execute(network, "blocks", [x], training=True) is network
    assert blocks == [(block, {"dynamic": False}) for block in network.blocks]
    assert whole == []
    for execution in ("compile", "max-autotune", "freezing"):
        assert execute(network, execution, [x], training=False) is network
    assert len(blocks) == 3
    assert whole == [
        {"options": {"freezing": False}, "dynamic": False},
        {"mode": "max-autotune-no-cudagraphs", "dynamic": False},
        {"options": {"freezing": True}, "dynamic": False},
    ]
    assert {"eager", "blocks", "compile", "max-autotune", "freezing"} < EXECUTIONS.keys()


# The clock


def test_rounds_take_turns():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    fast, slow = time_rounds([call("a", 0.002), call("b", 0.11)], "cpu", 0.025)
    assert order[:4] == ["a", "b", "a", "b"]  # one of each before the clock, then in turns
    assert order[:8] == ["a", "b"] * 4
    assert order[8:] == ["a"] * (len(order) - 8)
    assert len(slow) == 3  # a slow one three times whatever it is allowed
    assert 5 <= len(fast) <= 12
    assert len(order) == len(fast) + len(slow) + 2
    assert min(fast) >= 2
    assert min(slow) >= 110


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 5), (100, 200)])
def test_numbers_of_rounds(seconds, rounds):
    (times,) = time_rounds([lambda: time.sleep(1e-4)], "cpu", seconds)
    assert len(times) == rounds


def test_rounds_of_a_slow_one():
    assert [measure._rounds(taken, 0.2) for taken in (0.1, 10, 50, 99, 101, 1000)] == [200, 20, 5, 5, 3, 3]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("out of resource: shared memory"), False),
        (ValueError("memory"), False),
    ],
)
def test_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_launches_need_a_card():
    assert measure.launches(lambda: pytest.fail("called"), "cpu") is None


# On a card


@pytest.mark.gpu
@CUDA
def test_launches_are_counted():
    x = torch.ones(1000, device="cuda")

    def call():
        with torch.profiler.record_function("a range is no kernel"):
            x.add_(1)
            x.mul_(2)
            x.sub_(1)
        x.cpu()  # neither is a copy

    call()
    assert measure.launches(call, "cuda") == {"launches": 3, "kernels": 3}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            x.add_(1)
    graph.replay()
    counts = measure.launches(graph.replay, "cuda")
    assert (counts["launches"], counts["kernels"]) == (1, 4)


@pytest.mark.gpu
@CUDA
def test_rounds_on_a_card():
    a = torch.randn(4096, 4096, device="cuda")
    a @ a  # the first brings the library up
    short, long = time_rounds([lambda: a @ a, lambda: [a @ a for _ in range(4)]], "cuda", 0.05)
    assert 5 <= len(short) <= 200
    assert len(long) >= 5
    assert quantiles(long)[1] == pytest.approx(4 * quantiles(short)[1], rel=0.3)
    # Slower than the time that there is, and still enough for quantiles.
    (slow,) = time_rounds([lambda: torch.cuda._sleep(2**28)], "cuda", 0.0)
    assert len(slow) >= 3


@pytest.mark.gpu
@CUDA
def test_memory_on_a_card_leaves_checks_out():
    memory = Memory("cuda")
    weight = torch.ones(2**20, device="cuda")  # 4 MiB
    torch.zeros(2**25, device="cuda")  # what a check may take
    assert memory.peak(lambda: weight + F.relu(weight)) == pytest.approx(12, rel=0.05)
