"""CUDA graphs and `optimize`. Without a GPU a graph is pretended, so that what surrounds it is tested everywhere."""

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavish_fast import Model, TrainingStep, explain, optimize, runtime
from lavish_fast.config import Config, SwinV2Config, ViTConfig
from lavish_fast.inference import Inference
from lavish_fast.runtime import Graphs, Outcome, capture
from parity import AVE_GOLDENS, golden, randomise, relative_error, tiny_config, tiny_inputs
from recorded import record_on_cpu


def add(step, batch):
    *inputs, labels = batch
    return step.accumulate(*inputs, labels=labels)


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

    monkeypatch.setattr(runtime, "_capture", capture)


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


def logits(probabilities):
    values = probabilities.double().log()
    return values - values.mean(-1, keepdim=True)


@pytest.mark.parametrize("name", AVE_GOLDENS)
def test_goldens(name, record_property):
    # One clip: the same class wins in every second, and nothing is off by more than rounding.
    released = golden(name)
    model, given = released.model(torch.float32).eval(), [x[:1] for x in released.inputs(torch.float32)]
    seconds = given[0].shape[1]
    expected = released.expect["eval_probs"][:seconds]
    truth = logits(released.model(torch.float64).eval()(*(x.double() for x in given)).detach())
    for dtype in (torch.float32, torch.bfloat16):
        fast = optimize(model, dtype=dtype, compile=False)
        got = fast(*given)
        assert got.dtype == torch.float32
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        error = relative_error(logits(got), truth)
        own = relative_error(logits(released.model(dtype).eval()(*(x.to(dtype) for x in given)).detach()), truth)
        record_property(str(dtype), (error, own))
        assert error <= (1e-5 if dtype == torch.float32 else 2 * own + 4 * torch.finfo(dtype).eps)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomise(Model(tiny_config())).eval()


VIT = ViTConfig(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)


@pytest.mark.parametrize("changes", [{"modality": "video"}, {"modality": "audio"}, {"backbone": VIT}])
def test_every_model_is_taken(changes):
    other = randomise(Model(tiny_config(**changes))).eval()
    audio, video = tiny_inputs()
    given = {"video": (None, video), "audio": (audio,)}.get(changes.get("modality"), (audio, video))
    with torch.no_grad():
        expected = other(*given)
    assert relative_error(logits(optimize(other, compile=False)(*given)), logits(expected)) <= 1e-5
    assert {row["path"] for row in explain(optimize(other, compile=False))} <= {"reference", "sdpa"}


def test_calls_are_the_models(model):
    audio, video = tiny_inputs(3)
    fast = optimize(model, compile=False)
    expected = fast(audio, video)
    assert torch.equal(fast([audio], video), expected)
    assert torch.equal(fast(audio.bfloat16().float(), video), fast(audio.bfloat16(), video))
    assert fast(audio[:0], video[:0]).shape == (0, 3)
    assert not fast(audio.requires_grad_(), video).requires_grad
    with pytest.raises(ValueError, match=r"video: expected a floating tensor \(B, T, 3, 32, 32\), got NoneType"):
        fast(audio)
    with pytest.raises(ValueError, match="audio: expected a tensor on cpu, got one on meta"):
        fast(audio.detach().to("meta"), video)


@pytest.mark.parametrize("changes", [{}, {"backbone": VIT}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_has_no_say(changes, dtype):
    model = randomise(Model(tiny_config(**changes))).eval()
    fast = optimize(model, dtype=dtype, compile=False)
    expected = fast(*tiny_inputs())
    for other in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", other):
            assert torch.equal(fast(*tiny_inputs()), expected)


def test_it_does_not_follow_the_model(model):
    given, state = tiny_inputs(), {name: t.clone() for name, t in model.state_dict().items()}
    fast = optimize(model, compile=False)
    before = fast(*given)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        for t in model.state_dict().values():
            t.zero_()
    assert torch.equal(fast(*given), before)


def test_threads_get_their_own_results(model, monkeypatch):
    fast = optimize(model, compile=False)
    given = [tiny_inputs(1, seed=seed) for seed in range(4)]
    expected = [fast(*x) for x in given]
    # PyTorch's choice among attention kernels is the whole process's: a thread that sets it may leave it set.
    attention, switched = F.scaled_dot_product_attention, []

    def watch(*args, **options):
        switched.append(not torch.backends.cuda.math_sdp_enabled())
        return attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(lambda i: fast(*given[i % 4]), range(40)), expected * 10):
            torch.testing.assert_close(got, wanted)
    assert switched
    assert not any(switched)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "fast"}, "path: expected 'auto', 'fused' or 'reference', got 'fast'"),
        ({"dtype": torch.int8}, "dtype: expected a floating type such as torch.bfloat16, got torch.int8"),
        ({"dtype": "bfloat16"}, "dtype: expected a floating type such as torch.bfloat16, got bfloat16"),
        ({"cuda_graphs": True}, "cuda_graphs: expected a model on a CUDA device, got one on cpu"),
        ({"batch_sizes": ()}, r"batch_sizes: expected clips, at least 1 each, got \(\)"),
        ({"batch_sizes": (0, 2)}, r"batch_sizes: expected clips, at least 1 each, got \(0, 2\)"),
        ({"batch_sizes": [True]}, r"batch_sizes: expected clips, at least 1 each, got \[True\]"),
        ({"batch_sizes": 4}, "batch_sizes: expected clips, at least 1 each, got 4"),
        ({"batch_sizes": ["2"], "training": True}, r"batch_sizes: expected clips, at least 1 each, got \['2'\]"),
        ({"dtype": torch.float64, "path": "fused"}, "expected float32, float16 or bfloat16, got float64"),
    ],
)
def test_bad_arguments_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        optimize(model, **options)


def test_something_else_than_a_model_is_named():
    with pytest.raises(ValueError, match=r"model: expected a lavish_fast.Model, got Linear"):
        optimize(nn.Linear(2, 2))


def test_explaining_something_else_is_named():
    with pytest.raises(ValueError, match=r"model: expected a lavish_fast.Model or what optimize returns, got Linear"):
        explain(nn.Linear(2, 2))


def test_explaining_training_draws_no_random_numbers(model):
    backbone = dataclasses.replace(model.config.backbone, drop_path_rate=0.5)
    dropping = Model(dataclasses.replace(model.config, backbone=backbone))
    fast = optimize(dropping, training=True, compile=False)
    before = torch.get_rng_state()
    explain(fast)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_norm_without_running_statistics_is_named(model):
    bare = copy.deepcopy(model)
    norm = next(module for module in bare.modules() if isinstance(module, nn.BatchNorm1d))
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    with pytest.raises(ValueError, match="expected running statistics of each BatchNorm, got none"):
        optimize(bare, compile=False)


def test_explain(model):
    rows = explain(model)
    assert [(row["op"], row["blocks"], row["shape"]) for row in rows] == [
        ("window_attention", "0-1", (64, 48)),
        ("adapter", "0-1", (64, 16)),
        ("gather_latents", "0-1", (64, 16)),
        ("window_attention", "2", (16, 96)),
        ("adapter", "2", (16, 32)),
        ("gather_latents", "2", (16, 32)),
    ]
    assert {row["path"] for row in rows if row["op"] != "window_attention"} == {"reference"}
    text = str(rows)
    assert "expected CUDA tensors, got cpu" in text
    assert "64 x 48 float32" in text
    assert [line for line in text.splitlines() if len(line) > 120] == []
    assert model.train().training
    explain(model)
    assert model.training
    fast = optimize(model, dtype=torch.bfloat16, path="reference", compile=False)
    assert {(row["path"], row["why"]) for row in explain(fast)} == {("reference", "asked for")}
    assert str(explain(fast)) == str(explain(fast.network))


def test_compiled():
    # One code for every batch size. One block: each of its parts takes ten seconds.
    backbone = SwinV2Config(
        img_size=32, embed_dim=16, depths=(1,), num_heads=(1,), window_size=4, pretrained_window_sizes=(0,)
    )
    torch.manual_seed(0)
    model = randomise(Model(tiny_config(backbone=backbone))).eval()
    torch.compiler.reset()
    frames = torch._dynamo.utils.counters["stats"]
    before = frames["unique_graphs"]
    fast = optimize(model)
    for batch in (2, 3, 1, 5):
        given = tiny_inputs(batch, seed=batch)
        with torch.no_grad():
            expected = model(*given)
        assert relative_error(logits(fast(*given)), logits(expected)) <= 1e-5
    # The attention and, for both places, the step.
    assert frames["unique_graphs"] == before + 2


@pytest.fixture(scope="module")
def large():
    """Swin-V2-L with random gates, norms and buffers, one second of audio and video, and its logits in float64."""
    torch.manual_seed(0)
    model = randomise(Model(Config.from_preset("ave-swinv2-large", frames=1))).eval()
    side = model.config.backbone.img_size
    given = torch.randn(1, 1, side, side), torch.randn(1, 1, 3, side, side)
    with torch.no_grad():
        truth = logits(copy.deepcopy(model).double()(*(x.double() for x in given)))
    return model, given, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swin_v2_large_keeps_its_budget(large, dtype):
    model, given, truth = large
    with torch.no_grad():
        own = relative_error(logits(copy.deepcopy(model).to(dtype)(*(x.to(dtype) for x in given))), truth)
    error = relative_error(logits(optimize(model, dtype=dtype, compile=False)(*given)), truth)
    assert 0 < own <= 0.05, "the truth must be another's"
    assert error <= (1e-5 if dtype == torch.float32 else 2 * own + 4 * torch.finfo(dtype).eps)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile with a backend that runs what dynamo gives it: the inputs' sizes in every graph."""
    graphs = []

    def backend(module, _):
        inputs = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        graphs.append([size for x in inputs if isinstance(x, torch.Tensor) for size in x.shape])
        return module

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.parametrize(("changes", "kinds"), [({}, 5), ({"backbone": VIT}, 1), ({"modality": "video"}, 5)])
def test_only_the_batch_is_dynamic(model, graphs, changes, kinds):
    # Two stages, the first with two blocks, one of them shifted: three attentions and two steps.
    other = randomise(Model(tiny_config(**changes))).eval()
    fast = optimize(other)
    for batch in (2, 1, 3):
        audio, video = tiny_inputs(batch, seed=batch)
        given = (None, video) if changes.get("modality") == "video" else (audio, video)
        with torch.no_grad():
            expected = other(*given)
        assert relative_error(logits(fast(*given)), logits(expected)) <= 1e-5
    assert len(graphs) == kinds
    for sizes in graphs:  # the number of images, of each tensor that has one
        assert len({str(size) for size in sizes if isinstance(size, torch.SymInt)}) == 1, sizes


def test_many_models_stay_compiled(graphs):
    # Dynamo keeps eight results with a piece of code and then goes on uncompiled, without a word.
    for width in range(16, 16 * 11, 16):
        config = SwinV2Config(
            img_size=32, embed_dim=width, depths=(1,), num_heads=(1,), window_size=4, pretrained_window_sizes=(0,)
        )
        optimize(randomise(Model(tiny_config(backbone=config))).eval())(*tiny_inputs(1))
    assert len(graphs) == 20


@pytest.mark.parametrize("kind", ["swinv2", "vit"])
def test_every_drop_path_stays_compiled(graphs, kind):
    # Each block has a rate of its own, and Dynamo keeps a handful of results with a piece of code: here two.
    backbone = {
        "swinv2": SwinV2Config(
            img_size=32, embed_dim=16, depths=(3,), num_heads=(1,), window_size=8, pretrained_window_sizes=(0,),
            drop_path_rate=0.1,
        ),
        "vit": dataclasses.replace(VIT, depth=3, drop_path_rate=0.1),
    }[kind]  # fmt: skip
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        optimize(Model(tiny_config(backbone=backbone)), training=True)(*tiny_inputs())
    assert len(graphs) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu(model, dtype):
    model = model.cuda()
    fast = optimize(model, dtype=dtype, compile=False, batch_sizes=(1, 4))
    plain = optimize(model, dtype=dtype, compile=False, cuda_graphs=False)
    for batch in (1, 2, 4, 7, 3):
        given = [x.cuda() for x in tiny_inputs(batch, seed=batch)]
        # The graph's batch is padded, and its products may be other kernels'.
        assert relative_error(fast(*given), plain(*given)) <= 4 * torch.finfo(dtype).eps
    held = torch.cuda.memory_allocated()
    for call in range(1000):
        fast(*(x[: 1 + call % 4] for x in given))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held + (1 << 20)


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


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def mean_loss(probabilities, labels):
    """`ave.loss`. F.one_hot reads its argument on the host, but for a GPU's."""
    target = labels.flatten()[:, None] == torch.arange(probabilities.shape[-1], device=labels.device)
    return nn.functional.binary_cross_entropy(probabilities, target.to(probabilities.dtype))


# Adam's usual one makes whole steps of gradients that are rounding, as LN_before's bias has before BatchNorm.
EPS = 1e-3


def trained(model):
    return {name: t.detach().cpu().clone() for name, t in model.trainable_state_dict().items()}


def clips(count, seed, device="cpu", nan=()):
    audio, video = tiny_inputs(count, seed=seed)
    for clip in nan:
        video[clip, 1] = float("nan")
    labels = torch.randint(3, (count, 3), generator=torch.Generator().manual_seed(seed))
    return [x.to(device) for x in (audio, video, labels)]


def schedule(device="cpu"):
    """The micro-batches of eight steps: two to a step, a last one that is smaller, a clip that is NaN in the sixth."""
    steps = [[clips(2, 10 * step + part, device) for part in (0, 1)] for step in range(8)]
    steps[4][1] = clips(1, 41, device)
    steps[5][1] = clips(2, 51, device, nan=[1])
    return steps


def take(model, steps, rates=(1e-3,) * 4 + (1e-2,) * 4, dtype=None, **options):
    """Runs steps. Returns what is trained, flags of clips, outcomes, the state of Adam and of the loss scale."""
    fast = optimize(model, training=True, dtype=dtype, compile=False, cuda_graphs=False)
    parameters = [p for p in fast.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1, eps=EPS, fused=True)
    step = TrainingStep(fast, mean_loss, optimizer, **options)
    flags, outcomes, scales = [], [], []
    for batches, rate in zip(steps, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        flags += [add(step, batch).tolist() for batch in batches]
        outcomes.append(torch.stack(step.finish()).tolist())
        scales += [value.item() for value in step.state_dict().values()]
    adam = [t.cpu() for state in optimizer.state_dict()["state"].values() for t in state.values()]
    return SimpleNamespace(tensors=trained(model), flags=flags, outcomes=outcomes, scales=scales, adam=adam, step=step)


def assert_same(got, expected, **tolerance):
    assert got.flags == expected.flags
    torch.testing.assert_close(got.outcomes, expected.outcomes, **tolerance)
    torch.testing.assert_close(got.tensors, expected.tensors, **tolerance)
    torch.testing.assert_close(got.adam, expected.adam, **tolerance)
    assert got.scales == expected.scales


def by_hand(model, steps, rates):
    """The same as a plain loop, whose steps all are good."""
    fast = optimize(model, training=True, compile=False)
    parameters = [p for p in fast.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, eps=EPS, fused=True)
    for batches, rate in zip(steps, rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        for audio, video, labels in batches:
            (mean_loss(fast(audio, video), labels) * labels.numel()).backward()
        segments = sum(labels.numel() for _, _, labels in batches)
        for p in parameters:
            p.grad /= segments
        optimizer.step()
    return trained(model)


def test_steps_are_those_of_a_plain_loop_captured_or_not(model, monkeypatch):
    models, steps, rates = [copy.deepcopy(model) for _ in range(3)], schedule(), [1e-3] * 4 + [1e-2] * 4
    plain = take(models[0], steps)
    good = [i for i in range(8) if i != 5]
    expected = by_hand(models[1], [steps[i] for i in good], [rates[i] for i in good])
    torch.testing.assert_close(plain.tensors, expected, rtol=1e-6, atol=1e-7)
    assert plain.flags == [[True] * len(batch[2]) for step in steps for batch in step][:11] + [[True, False]] + 4 * [
        [True, True]
    ]
    names = [dict(zip(Outcome._fields, outcome)) for outcome in plain.outcomes]
    assert [n["segments"] for n in names] == [12, 12, 12, 12, 9, 0, 12, 12]
    assert [n["clips"] for n in names] == [4, 4, 4, 4, 3, 0, 4, 4]
    assert [n["failed"] for n in names] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert not any(n["overflow"] for n in names)
    assert [n["loss"] > 0 for n in names] == [i != 5 for i in range(8)]

    recordings = record_on_cpu(monkeypatch)
    assert_same(take(models[2], steps), plain, rtol=0, atol=0)
    assert [recording.replays for recording in recordings] == [8 * 2 - 1 - 3, 8 - 3], "the odd batch runs as it is"


@pytest.mark.parametrize("changes", [{"modality": "video"}, {"modality": "audio"}, {"backbone": VIT}])
@pytest.mark.parametrize("whole", [False, True])
def test_every_model_takes_steps(changes, whole):
    model = randomise(Model(tiny_config(**changes))).train()
    network = model if whole else optimize(model, training=True, compile=False)
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], fused=True)
    step = TrainingStep(network, mean_loss, optimizer)
    audio, video, labels = clips(2, 0)
    audio, video = {"video": (None, video), "audio": ([audio], None)}.get(model.config.modality, (audio, video))
    assert step.accumulate(audio, video, labels=labels).tolist() == [True, True]
    outcome = step.finish()
    loss = mean_loss(other(audio, video), labels)
    loss.backward()
    torch.testing.assert_close(outcome.loss, loss.detach().double())
    for (name, p), (_, q) in zip(model.trainable_parameters(), other.trainable_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
        assert not torch.equal(p, q), name


@pytest.mark.parametrize("changes", [{}, {"backbone": VIT}])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_steps_take_inputs_of_any_type(changes, own):
    model = randomise(Model(tiny_config(**changes))).to(own)
    audio, video, labels = clips(2, 0)
    for network in (model, optimize(model, training=True, compile=False)):
        optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0, fused=True)
        step, losses = TrainingStep(network.eval(), mean_loss, optimizer), []
        for dtype in (torch.bfloat16, torch.float64):
            step.accumulate(audio.bfloat16().to(dtype), video.bfloat16().to(dtype), labels=labels)
            losses.append(step.finish().loss)
        assert torch.equal(*losses)


@pytest.mark.parametrize("captured", [False, True])
def test_loss_scaling_is_gradscalers(model, monkeypatch, captured):
    # 2^30 overflows float16's gradients until it is halved often enough; then it doubles after two good steps.
    monkeypatch.setattr(runtime, "_GROWTH_STEPS", 2)
    other, steps = copy.deepcopy(model), [[clips(2, seed), clips(2, seed + 100)] for seed in range(24)]
    recordings = record_on_cpu(monkeypatch) if captured else []
    got = take(model, steps, [1e-3] * 24, torch.float16, loss_scale=2.0**30)
    assert len(recordings) == 2 * captured

    fast = optimize(other, training=True, dtype=torch.float16, compile=False, cuda_graphs=False)
    parameters = [p for p in fast.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=EPS, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)
    scales, overflows = [], []
    for batches in steps:
        optimizer.zero_grad()
        for audio, video, labels in batches:
            scaler.scale(mean_loss(fast(audio, video), labels) * len(labels)).backward()
        optimizer.grad_scale = torch.tensor(4.0)  # clips: a divisor beside its own
        before = {name: t.clone() for name, t in fast.state_dict().items()}
        scaler.step(optimizer)
        after = fast.state_dict()
        overflows.append(all(torch.equal(t, after[name]) for name, t in before.items()))
        scaler.update()
        scales += [scaler.get_scale(), scaler._get_growth_tracker()]
    assert got.scales == scales
    assert [bool(outcome[-1]) for outcome in got.outcomes] == overflows
    assert 5 < sum(overflows) < 20, "both must happen"
    for name, t in trained(other).items():
        if "running" not in name and "num_batches" not in name:  # GradScaler leaves those of a step that it skips
            torch.testing.assert_close(got.tensors[name], t, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("where", ["loss", "finish"])
def test_a_step_that_an_error_ends_is_none(model, monkeypatch, where):
    fast = optimize(model, training=True, compile=False)
    optimizer = torch.optim.Adam([p for p in fast.parameters() if p.requires_grad], lr=1e-3, eps=EPS, fused=True)
    failing = []

    def loss(probabilities, labels):
        if failing:
            raise MemoryError
        return mean_loss(probabilities, labels)

    step, expected, batch = TrainingStep(fast, loss, optimizer), copy.deepcopy(model), clips(2, 1)
    before = trained(model)
    add(step, clips(2, 0))
    if where == "loss":
        failing.append(True)
    else:
        monkeypatch.setattr(optimizer, "step", lambda: loss(None, failing.append(True)))
    with pytest.raises(MemoryError):
        add(step, clips(2, 2)) if where == "loss" else step.finish()
    for name, t in trained(model).items():
        assert torch.equal(t, before[name]), name
    failing.clear()
    monkeypatch.undo()
    add(step, batch)
    assert step.finish().clips == 2
    torch.testing.assert_close(trained(model), by_hand(expected, [[batch]], [1e-3]), rtol=1e-6, atol=1e-7)


def test_reset_reads_what_is_trained_anew(model):
    (_, gate), *others = [(name, p) for name, p in model.trainable_parameters() if name.endswith("gate")]
    optimizer = torch.optim.Adam([gate], lr=1e-3, fused=True)
    step = TrainingStep(model, mean_loss, optimizer)
    before = gate.detach().clone()
    add(step, clips(2, 0))
    step.finish()
    assert not torch.equal(gate, before)
    gate.requires_grad_(False)
    optimizer.add_param_group({"params": [others[0][1]], "lr": 1e-2})
    step.reset()
    before = gate.detach().clone(), others[0][1].detach().clone()
    add(step, clips(2, 0))
    step.finish()
    assert torch.equal(gate, before[0])
    torch.testing.assert_close((others[0][1] - before[1]).abs(), torch.full_like(before[1], 1e-2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_overflow_leaves_everything_as_it_was(model, scaled):
    before, rate = trained(model), 1e-3
    fast = optimize(model, training=True, compile=False)
    optimizer = torch.optim.Adam([p for p in fast.parameters() if p.requires_grad], lr=rate, fused=True)
    step = TrainingStep(
        fast, lambda p, labels: 3e38 * p.log().square().mean(), optimizer, **{"loss_scale": 8.0} if scaled else {}
    )
    assert step.scales == scaled
    add(step, clips(2, 0))
    outcome = step.finish()
    assert (outcome.failed.item(), outcome.overflow.item()) == (0, 1)
    assert all(torch.equal(t, before[name]) for name, t in trained(model).items())
    assert all(not t.any() for state in optimizer.state.values() for t in state.values())
    assert step.state_dict() == ({"scale": torch.tensor(4.0), "growth": torch.tensor(0)} if scaled else {})
    add(step, clips(2, 0, nan=[0]))
    step.finish()
    assert not scaled or step.state_dict()["scale"] == 4, "a clip that is NaN says nothing of the scale"


def test_clips_are_blamed(model):
    fast = optimize(model, training=True, compile=False)
    step = TrainingStep(
        fast, mean_loss, torch.optim.Adam([p for p in fast.parameters() if p.requires_grad], fused=True)
    )
    assert add(step, clips(3, 0, nan=[1])).tolist() == [True, False, True]
    with torch.no_grad():
        model.head.fc1.bias.fill_(float("nan"))
    assert add(step, clips(3, 0, nan=[1])).tolist() == [True, False, True]
    assert add(step, clips(3, 0)).tolist() == [False] * 3
    assert step.finish().failed == 5
    assert step.finish().failed == 0
    assert torch.stack(step.finish()).eq(0).all(), "nothing was added"
    before = trained(model)
    add(step, clips(3, 0, nan=[1]))
    step.reset()
    assert torch.stack(step.finish()).eq(0).all(), "what was added is forgotten"
    torch.testing.assert_close(trained(model), before, rtol=0, atol=0, equal_nan=True)


def test_an_optimisers_state_can_be_loaded_between_steps(model, monkeypatch):
    recordings, finals = record_on_cpu(monkeypatch), []
    for reload in (False, True):
        own, steps = copy.deepcopy(model), [[clips(2, seed)] for seed in range(10)]
        fast = optimize(own, training=True, compile=False, cuda_graphs=False)
        optimizer = torch.optim.Adam([p for p in fast.parameters() if p.requires_grad], lr=1e-2, fused=True)
        step = TrainingStep(fast, mean_loss, optimizer)
        for i, (batch,) in enumerate(steps):
            if reload and i == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            add(step, batch)
            step.finish()
            if i == 6:
                optimizer.zero_grad()  # harmless between steps
        finals.append(trained(own))
        assert optimizer.param_groups[0]["lr"] == 1e-2
        assert not optimizer.param_groups[0]["capturable"]
    assert len(recordings) == 2 + 4
    torch.testing.assert_close(finals[1], finals[0], rtol=0, atol=0)


def test_bad_steps_are_named(model):
    fast = optimize(model, training=True, compile=False)
    parameters = [p for p in fast.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, fused=True)
    for arguments, message in (
        ((nn.Linear(2, 2), mean_loss, adam), r"network: expected a Model or what optimize\(.*\) returns, got Linear"),
        ((optimize(model, compile=False), mean_loss, adam), "network: expected a Model .*, got Fast"),
        ((fast, mean_loss, torch.optim.SGD(parameters, fused=True)), "optimizer: expected Adam .*fused=True, got SGD"),
        ((fast, mean_loss, torch.optim.Adam(parameters)), "optimizer: expected Adam .*fused=True, got Adam without it"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            TrainingStep(*arguments)
    with pytest.raises(ValueError, match="loss_scale: expected a positive number, got 0"):
        TrainingStep(fast, mean_loss, adam, loss_scale=0)
    with pytest.raises(ValueError, match="cuda_graphs: expected a model on a CUDA device, got one on cpu"):
        TrainingStep(fast, mean_loss, adam, cuda_graphs=True)
    for sizes in ((), (0, -1), 2):
        with pytest.raises(ValueError, match="batch_sizes: expected clips, at least 1 each, got "):
            TrainingStep(fast, mean_loss, adam, batch_sizes=sizes)
    step = TrainingStep(fast, mean_loss, adam)
    audio, video, labels = clips(2, 0)
    for given, message in (
        ((audio, None, labels), r"video: expected a floating tensor \(B, T, 3, 32, 32\), got NoneType"),
        ((audio, video.to("meta"), labels), "video: expected a tensor on cpu, got one on meta"),
        ((audio, video, labels[:1]), r"labels: expected a tensor \(2, \.\.\.\) on cpu, got \(1, 3\) on cpu"),
        ((audio, video, labels.to("meta")), r"labels: expected a tensor \(2, \.\.\.\) on cpu, got \(2, 3\) on meta"),
        ((audio, video, [0, 1]), r"labels: expected a tensor \(2, \.\.\.\) on cpu, got list"),
        ((audio[:0], video[:0], labels[:0]), r"labels: expected a segment, got \(0, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            add(step, given)
    with pytest.raises(ValueError, match=r"loss scale: expected \[\], got \['scale'\]"):
        step.load_state_dict({"scale": torch.ones(())})


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(("dtype", "limits"), [(None, (1e-4, 1e-5)), (torch.bfloat16, (1e-2, 1e-3))])
def test_captured_steps_on_a_gpu(model, dtype, limits):
    model = model.cuda()
    steps = schedule("cuda")
    got = take(copy.deepcopy(model), steps, dtype=dtype)
    expected = take(model, steps, dtype=dtype, cuda_graphs=False)
    assert [run._graph is not None for *_, run in got.step._micro.values()] == [True]
    assert got.step._last._graph is not None
    assert_same(got, expected, rtol=limits[0], atol=limits[1])


@pytest.mark.gpu
@GPU
def test_captured_loss_scaling_on_a_gpu(model):
    model = model.cuda()
    steps = [[clips(2, seed, "cuda"), clips(2, seed + 50, "cuda")] for seed in range(30)]
    options = {"dtype": torch.float16, "loss_scale": 2.0**40}
    got = take(copy.deepcopy(model), steps, [1e-3] * 30, **options)
    expected = take(model, steps, [1e-3] * 30, **options, cuda_graphs=False)
    overflows = [outcome[-1] for outcome in got.outcomes]
    assert 5 < sum(overflows) < 30
    assert overflows[-1] == 0
    assert_same(got, expected, rtol=1e-3, atol=1e-4)
    before = torch.cuda.memory_allocated()
    for batches in steps:
        add(got.step, batches[0])
        got.step.finish()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
