"""CUDA graphs. Without a GPU a graph is pretended, so that what surrounds it is tested everywhere."""

import contextlib
import gc
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn

from lavish_fast import Model
from lavish_fast.graphs import Graphs, capture
from lavish_fast.inference import Inference
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

        def wait_event(self, event):
            log.append(f"wait for {event}")

        def record_event(self):
            log.append("record")
            return "event"

    class Graph:
        def replay(self):
            log.append("replay")

        def pool(self):
            return self

    @contextlib.contextmanager
    def scope(name):
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    monkeypatch.setattr(torch.cuda, "device", lambda device: scope("device"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: scope("stream"))

    def graph(graph, pool=None, *, capture_error_mode):
        assert capture_error_mode == "thread_local", "another thread's call to CUDA must not end a capture"
        return scope("graph" if pool is None else "graph of the pool")

    monkeypatch.setattr(torch.cuda, "graph", graph)
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


class Row(nn.Module):
    """Doubles its input, and notes how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return 2 * x


def test_graphs_pad_to_the_next_size_and_share_their_memory(log):
    function = Row()
    graphs = Graphs(function, [8, 2, 4])
    (x,) = inputs((3, 5))
    assert graphs(x).shape == (3, 5)
    assert set(function.rows) == {4}
    assert log[-4:] == ["graph ends", "replay", "record", "device ends"]
    log.clear()
    assert graphs(x[:2]).shape == (2, 5)
    assert "graph of the pool begins" in log
    assert log.index("wait for event") < log.index("replay"), "the last call may still run"
    log.clear()
    assert graphs(torch.cat((x, x, x, x, x))[:13]).shape == (13, 5)  # 8 + 5
    assert log.count("replay") == 2
    assert set(function.rows) == {4, 2, 8}
    assert graphs(x[:0]).shape == (0, 5)
    assert len(graphs._inputs) == 1


@pytest.fixture
def replays(log, monkeypatch):
    """Graphs that replay what was captured, in its place."""

    class Recorded:
        def __init__(self, function, own, outputs):
            self.call, self.outputs, self.pool = lambda: function(*own), outputs, lambda: self

        def replay(self):
            for static, x in zip(self.outputs, self.call(), strict=True):
                static.copy_(x)

    def capture(function, own, pool):
        outputs = function(*own)
        return Recorded(function, own, outputs), outputs

    monkeypatch.setattr("lavish_fast.graphs._capture", capture)


@pytest.mark.usefixtures("replays")
def test_graphs_of_inputs_with_a_row_per_so_many_images():
    def function(images, questions=None):
        first = images.view(-1, 2, 5).sum(1)
        return images + 1, first if questions is None else first + questions

    graphs = Graphs(function, [4, 8])
    (images,) = inputs((12, 5))
    (questions,) = inputs((6, 5))
    for clips in (1, 2, 3, 6):  # 6 clips are 8 and 4 images
        given = images[: 2 * clips], questions[:clips]
        for count in (1, 2):
            for got, expected in zip(graphs(*given[:count]), function(*given[:count]), strict=True):
                assert torch.equal(got, expected)
    assert len(graphs._graphs) == 4


@pytest.mark.usefixtures("replays")
def test_graphs_are_of_one_number_of_images_to_a_row():
    # Questions about clips of other lengths than the first call's.
    def function(images, questions):
        clips = images.unflatten(0, (len(questions), -1))
        return images + 1, clips.sum(1) + questions

    graphs = Graphs(function, [4, 8])
    for clips, frames in ((1, 4), (2, 2), (1, 2), (3, 4), (4, 1), (1, 4), (1, 3), (5, 2), (3, 3)):
        for width in (5, 7):
            images, questions = inputs((clips * frames, width), (clips, width), seed=frames)
            for got, expected in zip(graphs(images, questions), function(images, questions), strict=True):
                assert torch.equal(got, expected), (clips, frames)
    frames_and_sizes = {(1 / size_and_kinds[2][0], size_and_kinds[0]) for size_and_kinds in graphs._graphs}
    assert frames_and_sizes == {(4, 4), (4, 8), (2, 4), (2, 8), (1, 4)}, "three frames divide neither size"


def test_graphs_copy_inputs_in_and_results_out(log):
    graphs = Graphs(lambda x: x, [4])  # its output is its input's buffer
    (x,) = inputs((3, 5))
    first = graphs(x)
    assert torch.equal(first, x)
    graphs(torch.zeros_like(x))
    assert torch.equal(first, x), "a result is the caller's own"


def test_a_thousand_calls_capture_no_more_than_the_sizes(log):
    function = Row()
    graphs = Graphs(function, [1, 2, 4, 8])
    (x,) = inputs((20, 3))
    for call in range(1000):
        rows = 1 + call * 7 % 20
        assert len(graphs(x[:rows])) == rows
    assert len(graphs._graphs) == 4
    assert log.count("graph begins") + log.count("graph of the pool begins") == 4


def test_threads_take_turns(log):
    inside, seen = [], []

    class Slow(nn.Module):
        def forward(self, x):
            return x

    graphs = Graphs(Slow(), [4])

    def call(value):
        for _ in range(20):
            x = torch.full((3, 2), float(value)).as_subclass(OnCuda)
            inside.append(value)
            seen.append(torch.equal(graphs(x), x))

    threads = [threading.Thread(target=call, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160
    assert all(seen), "a thread got another's rows"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_replays_equal_eager(dtype):
    inference = Inference(randomise(Model(tiny_config())).cuda(), dtype=dtype)
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
    inference, given = Inference(randomise(Model(tiny_config())).cuda()), [x.cuda() for x in tiny_inputs()]
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
