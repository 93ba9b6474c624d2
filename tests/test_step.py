"""Whole steps of training. Without a GPU a recording stands in for a graph."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lavish_fast import Model, TrainingStep, optimize
from lavish_fast.step import Outcome
from parity import VIT, randomise, tiny_config, tiny_inputs, tiny_model
from recorded import record_on_cpu

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def model():
    return tiny_model()


def add(step, batch):
    *inputs, labels = batch
    return step.accumulate(*inputs, labels=labels)


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
    monkeypatch.setattr("lavish_fast.step._GROWTH_STEPS", 2)
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
