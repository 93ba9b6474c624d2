"""CUDA-graph capture. Without a GPU a graph is pretended, so that what surrounds it is tested everywhere."""

import contextlib
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

from lavish_fast import Model
from lavish_fast.inference import Inference
from lavish_fast.runtime import capture
from parity import randomise, relative_error, tiny_config, tiny_inputs


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


class Counter(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))
        self.calls = 0

    def forward(self, x, y):
        self.calls += 1
        return self.weight * x + y


@pytest.fixture
def log(monkeypatch):
    """What happens, in order, on a machine whose graphs replay nothing."""
    log = []

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def scope(name):
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    monkeypatch.setattr(torch.cuda, "device", lambda device: scope("device"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: scope("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: scope("graph"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return log


def inputs(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).as_subclass(OnCuda) for shape in shapes]


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ((), "none"),
        ((torch.zeros(2),), "cpu"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), "cpu, meta"),
        (([torch.zeros(2)], None), "list, NoneType"),
    ],
)
def test_inputs_elsewhere_are_refused(given, got):
    function = Counter()
    with pytest.raises(ValueError, match=f"^capture: expected tensors on one CUDA device, got {got}$"):
        capture(function, *given)
    assert not function.calls


def test_the_order_of_a_capture(log):
    function = Counter()
    replay = capture(lambda *x: (log.append("call"), function(*x))[1], *inputs((2, 3), (3,)))
    warm_up = ["wait", "stream begins", "call", "call", "call", "stream ends", "wait"]
    assert log == ["device begins", *warm_up, "graph begins", "call", "graph ends", "device ends"]
    log.clear()
    replay(*inputs((2, 3), (3,)))
    assert log == ["replay"], "a replay runs no Python of the function"


@pytest.mark.usefixtures("log")
def test_inputs_are_copied_into_the_graphs_own():
    seen, given = [], inputs((2, 3), (3,))
    before = [x.clone() for x in given]
    replay = capture(lambda *x: seen.append(x) or x[0] + x[1], *given)
    static = seen[-1]
    assert all(own.data_ptr() != x.data_ptr() for own, x in zip(static, given))
    others = inputs((2, 3), (3,), seed=1)
    others[0].requires_grad_()
    out = replay(*others)
    assert all(torch.equal(own, x) for own, x in zip(static, others))
    assert all(torch.equal(x, old) for x, old in zip(given, before)), "the example inputs are the caller's"
    assert not any(own.requires_grad for own in static), "a replay must not keep the caller's autograd graph"
    assert not out.requires_grad
    assert replay(*given) is out


def test_other_inputs_than_the_captured_are_refused(log):
    seen = []
    replay = capture(lambda *x: seen.append(x) or x[0] + x[1], *inputs((2, 3), (3,)))
    before = [own.clone() for own in seen[-1]]
    for wrong, got in (
        (inputs((2, 3), (1, 3), seed=1), r"\(2, 3\) float32, \(1, 3\) float32"),
        (inputs((2, 3), (1,), seed=1), r"\(2, 3\) float32, \(1,\) float32"),
        (inputs((2, 3), (3,), dtype=torch.float64, seed=1), r"\(2, 3\) float64, \(3,\) float64"),
        (inputs((2, 3), seed=1), r"\(2, 3\) float32"),
        ([], "none"),
    ):
        log.clear()
        with pytest.raises(
            ValueError, match=rf"^captured graph: expected \(2, 3\) float32, \(3,\) float32, got {got}$"
        ):
            replay(*wrong)
        assert not log
    assert all(torch.equal(own, old) for own, old in zip(seen[-1], before)), "nothing may be copied before a refusal"


@pytest.mark.usefixtures("log")
def test_the_weights_live_as_long_as_the_graph():
    function = Counter()
    weight = weakref.ref(function.weight)
    replay = capture(function, *inputs((2, 3), (3,)))
    del function
    gc.collect()
    assert weight() is not None
    del replay
    gc.collect()
    assert weight() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_replays_equal_eager(dtype):
    inference = Inference(randomise(Model(tiny_config()))).cuda().to(dtype)
    replay = capture(inference, *(x.cuda() for x in tiny_inputs(dtype=dtype)))
    results = []
    for seed in range(1, 21):
        given = [x.cuda() for x in tiny_inputs(seed=seed, dtype=dtype)]
        results.append(replay(*given).clone())
        assert relative_error(results[-1], inference(*given)) <= 4 * torch.finfo(dtype).eps
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(results)), "the inputs must matter"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_outlives_its_function_and_refuses_other_shapes():
    inference, given = Inference(randomise(Model(tiny_config()))).cuda(), [x.cuda() for x in tiny_inputs()]
    expected = inference(*given)
    replay = capture(inference, *given)
    del inference
    gc.collect()
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    torch.testing.assert_close(replay(*given), expected)
    del junk
    with pytest.raises(ValueError, match=r"captured graph: expected .*\(2, 3, 32, 32\).*, got .*\(1, 3, 32, 32\)"):
        replay(*(x[:1] for x in given))
    with pytest.raises(ValueError, match=r"captured graph: expected .*float32.*, got .*bfloat16"):
        replay(*(x.bfloat16() for x in given))
