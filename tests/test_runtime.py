"""`optimize` and `explain`."""

import copy
import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavish_fast import Model, explain, optimize
from lavish_fast.config import Config, SwinV2Config
from parity import AVE_GOLDENS, VIT, golden, randomise, relative_error, tiny_config, tiny_inputs, tiny_model


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
    return tiny_model()


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
