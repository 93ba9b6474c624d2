"""The runner on a CPU: what each candidate's row says, whatever becomes of it."""

import json
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import measure, results, roofline
from benchmarks import run as runner
from benchmarks.cases import CASES, PRESETS, Case, Problem, Trained, _draw
from benchmarks.measure import PRECISIONS, Unavailable, relative_error
from benchmarks.run import Selection, Truth, measure_all

# What every row has, and what it has besides when there is a time.
ALWAYS = {
    "case",
    "mode",
    "preset",
    "batch",
    "setting",
    "path",
    "execution",
    "dtype",
    "status",
    "reason",
    "commit",
    "device",
    "torch",
    "timm",
    "threads",
    "date",
}
CHECKED = {"error", "error_budget", "compile_s"}
TIMED = {"median_ms", "q20_ms", "q80_ms", "times_ms", "samples_per_s", "flops", "bytes", "work", "tflops_per_s"}
TIMED |= {"gb_per_s", "limit_tflops", "limit_gb_per_s", "roofline_ms", "roofline_share", "peak_mib", "clocks"}
TIMED |= {"launches", "kernels"}
LIMITS = roofline.Limits(0.1, 5.0)


class Net(nn.Module):
    """A layer, a BatchNorm on the batch's statistics and a layer: (B, 6) -> (B, 3)."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu())


class Scaled(nn.Module):
    """What it holds, with outputs or gradients that are off by a factor."""

    def __init__(self, net, outputs=1.0, gradients=1.0):
        super().__init__()
        self.net, self.outputs = net, outputs
        if gradients != 1.0:
            for parameter in net.parameters():
                parameter.register_hook(lambda gradient: gradient * gradients)

    def __deepcopy__(self, memo):
        # Hooks are not copied.
        return self

    def forward(self, x):
        return self.net(x) * self.outputs


def net(truth):
    copy = Net()
    copy.load_state_dict(truth.state_dict())
    return copy


def fail(error):
    def build(truth):
        raise error

    return build


def make(paths, **changes):
    def problem(preset, setting, clips):
        torch.manual_seed(0)
        values = {
            "truth": Net(),
            "inputs": (_draw(clips * 4, 6, seed=1),),
            "paths": {"reference": lambda truth: truth, **paths},
            "loss": lambda out, labels: nn.functional.cross_entropy(out, labels),
            "labels": torch.arange(clips * 4) % 3,
            "parameter_name": lambda path, name: name.removeprefix("net."),
        }
        return Problem(**(values | changes))

    return problem


@pytest.fixture
def case(monkeypatch):
    """Makes a case called "net" with these paths beside the reference."""

    def case(modes=("inference", "training"), settings=({},), **paths):
        monkeypatch.setitem(CASES, "net", Case("", lambda preset: list(settings), make(paths), modes))

    monkeypatch.setattr(roofline, "measure_limits", lambda device, dtype: LIMITS)
    case()
    return case


def rows_of(**changes):
    values = {
        "device": "cpu",
        "preset": "small",
        "batches": [1],
        "cases": ["net"],
        "modes": ["inference"],
        "precisions": ["float32"],
        "executions": ["eager"],
        "seconds": 0.0,
    }
    rows = []
    for _ in measure_all(Selection(**(values | changes)), rows.append, {}):
        pass
    for row in rows:
        json.dumps(row, allow_nan=False)
    return rows


def by_path(rows):
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_a_row_has_all_columns(case, mode, batch, tmp_path):
    (row,) = rows_of(modes=[mode], batches=[batch])
    assert (row["status"], row["reason"]) == ("ok", None)
    assert row.keys() >= ALWAYS | CHECKED | TIMED
    key = ("net", mode, "small", batch, {}, "reference", "eager", "float32")
    assert tuple(row[name] for name in results.KEY) == key
    assert 0 < row["error"] <= row["error_budget"]
    assert row["compile_s"] is row["launches"] is row["kernels"] is row["clocks"] is None
    assert len(row["times_ms"]) == 5
    assert row["q20_ms"] <= row["median_ms"] <= row["q80_ms"]
    assert statistics.median(row["times_ms"]) == pytest.approx(row["median_ms"], abs=1e-4)
    assert row["samples_per_s"] == pytest.approx(1000 * batch / row["median_ms"])
    products = 2 * 4 * batch * (6 * 8 + 8 * 3)
    # The first layer's inputs need no gradient.
    assert row["flops"] == (products if mode == "inference" else 3 * products - 2 * 4 * batch * 6 * 8)
    if mode == "inference":  # weights and biases once, inputs and outputs of both layers for each clip
        assert row["bytes"] == 4 * (6 * 8 + 8 + 8 * 3 + 3 + 4 * batch * (6 + 8 + 8 + 3))
    assert row["tflops_per_s"] == pytest.approx(row["flops"] / row["median_ms"] * 1e3 / 1e12)
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] * 1e3 / 1e9)
    assert row["roofline_share"] == pytest.approx(row["roofline_ms"] / row["median_ms"])
    assert row["roofline_ms"] >= row["flops"] / LIMITS.tflops / 1e9
    weights, inputs = sum(p.nbytes for p in Net().state_dict().values()), 4 * batch * 6 * 4
    assert row["peak_mib"] * 2**20 > weights + inputs
    results.append(tmp_path / "rows.jsonl", [row])
    assert results.read(tmp_path / "rows.jsonl") == [row]


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_wrong_outputs_get_no_time(case, mode):
    case(
        right=lambda truth: Scaled(net(truth)),
        wrong=lambda truth: Scaled(net(truth), outputs=1.01),
        broken=lambda truth: Scaled(net(truth), outputs=math.nan),
    )
    rows = by_path(rows_of(modes=[mode], batches=[4]))
    assert rows["right"]["status"] == "ok"
    for path in ("wrong", "broken"):
        row = rows[path]
        assert row["status"] == "wrong"
        assert re.fullmatch(r"error \S+ of outputs is over the budget of \S+", row["reason"])
        assert not row.keys() & TIMED
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=0.01)
    assert rows["broken"]["error"] is None


def test_wrong_gradients_get_no_time_in_training(case):
    case(
        right=lambda truth: Scaled(net(truth)),
        wrong=lambda truth: Scaled(net(truth), gradients=1.1),
        missing=lambda truth: Scaled(_frozen(truth)),
    )
    assert {row["status"] for row in rows_of()} == {"ok"}
    rows = by_path(rows_of(modes=["training"]))
    assert [rows[path]["status"] for path in ("reference", "right", "wrong", "missing")] == [
        "ok",
        "ok",
        "wrong",
        "wrong",
    ]
    assert rows["wrong"]["error"] == pytest.approx(0.1, rel=0.01)
    assert rows["missing"]["error"] is None
    assert not (rows["wrong"].keys() | rows["missing"].keys()) & TIMED


def _frozen(truth):
    copy = net(truth)
    copy.first.requires_grad_(False)
    return copy


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of\nmemory"), "out of memory", "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", "DefaultCPUAllocator"),
        (KeyError("weights"), "failed", "KeyError: 'weights'"),
        (Unavailable("not on a Tuesday"), "skipped", "not on a Tuesday"),
    ],
)
def test_a_failure_is_a_row_and_the_run_goes_on(case, error, status, reason):
    case(bad=fail(error), good=net)
    rows = by_path(rows_of(batches=[1, 1])[3:])
    assert (rows["bad"]["status"], reason in rows["bad"]["reason"]) == (status, True)
    assert "\n" not in rows["bad"]["reason"]
    assert rows["bad"].keys() >= ALWAYS
    assert not rows["bad"].keys() & TIMED
    assert rows["reference"]["status"] == rows["good"]["status"] == "ok"


def test_unavailable_may_be_wrapped(case):
    def build(truth):
        try:
            raise Unavailable("no such card")
        except Unavailable as error:
            raise RuntimeError("compiler: a long story") from error

    case(bad=build)
    row = by_path(rows_of())["bad"]
    assert (row["status"], row["reason"]) == ("skipped", "no such card")


def test_a_failure_under_the_clock_is_its_own(case):
    class Tires(nn.Module):
        """Fails at the fifth call: prepared twice, profiled once, timed."""

        def __init__(self, net):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x):
            self.calls += 1
            if self.calls >= 5:
                raise RuntimeError("tired")
            return self.net(x)

    case(tires=lambda truth: Tires(net(truth)), good=net)
    rows = by_path(rows_of())
    assert (rows["tires"]["status"], rows["tires"]["reason"]) == ("failed", "RuntimeError: tired")
    for path in ("reference", "good"):
        assert rows[path]["status"] == "ok"
        assert rows[path].keys() >= TIMED


def test_limits_that_cannot_be_measured_fail_their_rows(case, monkeypatch):
    def limits(device, dtype):
        if dtype == "bfloat16":
            raise torch.OutOfMemoryError("no room")
        return LIMITS

    monkeypatch.setattr(roofline, "measure_limits", limits)
    rows = rows_of(precisions=["bfloat16", "float32"])
    assert [(row["dtype"], row["status"]) for row in rows] == [("bfloat16", "out of memory"), ("float32", "ok")]


@pytest.mark.parametrize(
    ("error", "status"), [(ImportError("no torchvision"), "failed"), (torch.OutOfMemoryError("large"), "out of memory")]
)
def test_a_case_that_cannot_begin_is_a_row(case, monkeypatch, error, status):
    def problem(preset, setting, clips):
        raise error

    monkeypatch.setitem(CASES, "bad", Case("", lambda preset: [{}], problem))
    monkeypatch.setitem(CASES, "bad truth", Case("", lambda preset: [{}], make({"reference": fail(error)})))
    rows = rows_of(cases=["bad", "bad truth", "net"])
    assert [(row["case"], row["path"], row["status"]) for row in rows] == [
        ("bad", "all", status),
        ("bad truth", "all", status),
        ("net", "reference", "ok"),
    ]
    assert str(error) in rows[0]["reason"]
    assert str(error) in rows[1]["reason"]


def test_without_budget_all_is_skipped(case):
    case(settings=({}, {"n": 1}))
    rows = rows_of(budget=0, batches=[1, 2], modes=["inference", "training"])
    assert len(rows) == 8
    assert {row["path"] for row in rows} == {"all"}  # not even the truth was made
    assert {(row["status"], row["reason"]) for row in rows} == {("skipped", "the time budget was spent")}
    assert all(row.keys() >= ALWAYS for row in rows)


def test_what_is_refused_is_skipped(case):
    (row,) = rows_of(precisions=["tf32"])
    assert (row["status"], row["reason"]) == ("skipped", "tf32 is the arithmetic of CUDA's tensor cores")
    (row,) = rows_of(executions=["graph"])
    assert (row["status"], row["reason"]) == ("skipped", "CUDA graphs take a CUDA device")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_row_has_no_execution_that_did_not_take_place(case, mode):
    case(optimized=net)
    rows = rows_of(modes=[mode], executions=["eager", "blocks", "own", "step"])
    assert [(row["path"], row["execution"]) for row in rows if row["status"] == "ok"] == [
        ("reference", "eager"),
        ("optimized", "own"),
    ]
    reasons = {(row["path"], row["execution"]): row["reason"] for row in rows if row["status"] == "skipped"}
    for what in (("reference", "own"), ("reference", "step"), ("optimized", "eager"), ("optimized", "blocks")):
        assert reasons[what].endswith("executions own and step are its alone")


# Selection


def test_the_truth_is_not_computed_for_what_is_refused(case, monkeypatch):
    monkeypatch.setattr(runner, "Truth", lambda *_: pytest.fail("there is nothing to compare with it"))
    case(fused=lambda truth: truth)
    (row,) = rows_of(paths=["fused"], precisions=["float32"])
    assert row["status"] == "skipped"


def keys(selection, paths=("reference", "released", "folded")):
    return [
        (group["case"], group["mode"], group["batch"], *candidate.values())
        for group in selection.groups()
        for candidate in selection.candidates(group, paths)
    ]


def test_selection():
    cpu = Selection("cpu", "small", [1, 4], cases=["ave"], modes=["inference"])
    assert len(keys(cpu)) == 2 * (3 + 3 + 2)
    assert {key[4] for key in keys(cpu)} == {"eager"}
    assert {key[2] for key in keys(cpu)} == {1, 4}
    only = replace(cpu, paths=["folded"], precisions=["float16"], executions=["graph", "eager"], batches=[2])
    assert keys(only) == [("ave", "inference", 2, "folded", how, "float16") for how in ("graph", "eager")]
    card = keys(replace(cpu, device="cuda", batches=[1]))
    assert ("ave", "inference", 1, "folded", "blocks+graph", "bfloat16") in card
    assert ("ave", "inference", 1, "released", "blocks+graph", "bfloat16-autocast") in card
    assert ("ave", "inference", 1, "reference", "eager", "tf32") in card
    assert not any(key[4] == "blocks+graph" for key in keys(replace(cpu, device="cuda", modes=["training"])))
    # Ops at one size, the largest.
    ops = Selection("cpu", "small", [1, 4], cases=["gather_latents"])
    assert {group["batch"] for group in ops.groups()} == {4}
    assert {group["mode"] for group in ops.groups()} == {"inference", "training"}
    assert len(ops.groups()) == 2 * len(CASES["gather_latents"].settings(PRESETS["small"]))


def test_a_selection_is_what_is_measured(case):
    case(other=net, third=net)
    rows = rows_of(paths=["third", "reference"], precisions=["float64", "float32"], batches=[2])
    assert [(row["path"], row["dtype"], row["batch"]) for row in rows] == [
        (path, dtype, 2) for path in ("reference", "third") for dtype in ("float64", "float32")
    ]
    assert {row["status"] for row in rows} == {"ok"}
    assert rows_of(paths=["none"]) == []


def test_paths_that_do_not_train_are_left_out(case, monkeypatch):
    monkeypatch.setitem(
        CASES, "net", Case("", lambda _: [{}], make({"other": net}, trains=("reference",)), ("training",))
    )
    assert [row["path"] for row in rows_of(modes=["training"])] == ["reference"]


# Parity


def test_strict_paths_are_judged_by_the_reference(case):
    case(folded=net, loose=net)
    rows = by_path(rows_of(batches=[2]))
    problem = CASES["net"].problem(PRESETS["small"], {}, 2)
    truth = Truth(problem, "reference", "cpu", False)
    module = problem.build("reference", torch.float32, "cpu", training=False)
    with torch.no_grad():
        error = relative_error(module(*problem.batch(1, torch.float32, "cpu")), truth.outputs)
    eps = PRECISIONS["float32"].eps
    assert rows["folded"]["error_budget"] == pytest.approx(2 * error + 4 * eps)
    assert rows["loose"]["error_budget"] == rows["reference"]["error_budget"] == 1e-5

    # Over its own budget, though within the others'.
    off = 1 + 5e-6
    case(folded=lambda truth: Scaled(net(truth), off), loose=lambda truth: Scaled(net(truth), off))
    rows = by_path(rows_of(batches=[2]))
    assert (rows["folded"]["status"], rows["loose"]["status"]) == ("wrong", "ok")
    # In training both errors have a budget.
    case(
        folded=lambda truth: Scaled(net(truth), gradients=1.001),
        loose=lambda truth: Scaled(net(truth), gradients=1.001),
    )
    rows = by_path(rows_of(batches=[2], modes=["training"]))
    assert (rows["folded"]["status"], rows["loose"]["status"]) == ("wrong", "ok")
    assert rows["loose"]["error"] == pytest.approx(1e-3, rel=0.01)
    assert rows["loose"]["error_budget"] == PRECISIONS["float32"].gradient_cap


@pytest.mark.parametrize("batch", [1, 6])
def test_an_op_begins_its_backward_with_a_drawn_gradient(monkeypatch, case, batch):
    """A function of inputs that a batch repeats and of one that its clips share; each has a gradient to be checked."""

    def by(x_gradient=1.0, w_gradient=1.0):
        def call(x, w):
            x, w = (t * f + t.detach() * (1 - f) for t, f in ((x, x_gradient), (w, w_gradient)))
            return (x @ w).tanh()

        return lambda truth: call

    def problem(preset, setting, clips):
        paths = {"reference": by(), "right": by(), "x": by(1.01), "w": by(1, 1.01), "none": by(0, 1)}
        inputs = _draw(clips * 4, 6, seed=1), _draw(6, 3, seed=2)
        return Problem(by()(None), inputs, paths, batched=(True, False), differentiated=(0, 1))

    monkeypatch.setitem(CASES, "op", Case("", lambda _: [{}], problem, ("inference", "training")))
    rows = by_path(rows_of(cases=["op"], modes=["training"], batches=[batch]))
    for path, status in {"reference": "ok", "right": "ok", "x": "ok", "w": "ok", "none": "wrong"}.items():
        assert rows[path]["status"] == status, path
    # The caps alone hold these, which are not our own; each shows its gradient's error.
    assert rows["x"]["error"] == pytest.approx(0.01, rel=0.01)
    assert rows["w"]["error"] == pytest.approx(0.01, rel=0.01)
    assert rows["reference"]["error"] < 1e-6
    assert all(row["status"] == "ok" for row in rows_of(cases=["op"], batches=[batch]))


@pytest.mark.parametrize("repeats", [1, 3])
def test_gradients_are_the_truths(case, repeats):
    problem = CASES["net"].problem(PRESETS["small"], {}, 2)
    truth = Truth(problem, "reference", "cpu", True)
    group = make_group(2 * repeats)
    module = problem.build("reference", torch.float32, "cpu", training=True)
    step = group._step(module, module, problem.batch(repeats, torch.float32, "cpu"))
    outputs = step(update=False)
    assert outputs.shape == (8 * repeats, 3)
    assert max(truth.errors("reference", module, outputs, repeats).values()) < 1e-5
    # By hand, in float64, on the clips as they are.
    expected = Net().double()
    expected.load_state_dict(problem.truth.state_dict())
    nn.functional.cross_entropy(expected(problem.inputs[0]), problem.labels).backward()
    for ours, theirs in zip(module.parameters(), expected.parameters()):
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def make_group(batch, mode="training"):
    selection = Selection("cpu", "small", [batch], cases=["net"], modes=[mode])
    (key,) = selection.groups()
    group = runner.Group(selection, key, {}, {}, 0.0)
    group._prepare_problem()
    group._prepare_truth()
    return group


def test_a_training_step_updates_the_weights(case):
    group = make_group(2)
    module = group.problem.build("reference", torch.float32, "cpu", training=True)
    before = [p.detach().clone() for p in module.parameters()]
    step = group._step(module, module, group.problem.batch(1, torch.float32, "cpu"), runner._adam(module))
    step(update=False)
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before))
    gradients = [p.grad.clone() for p in module.parameters()]
    step(update=True)
    # Not summed up: each step's gradients are its own.
    assert all(torch.allclose(p.grad, old) for p, old in zip(module.parameters(), gradients))
    for p, old, gradient in zip(module.parameters(), before, gradients):
        moved = (p.detach() - old)[gradient.abs() > 1e-4]
        assert (moved.abs() > 5e-7).all()
        assert (moved.abs() < 2e-6).all()
        assert (moved.sign() == -gradient[gradient.abs() > 1e-4].sign()).all()


def test_every_path_has_the_same_optimiser(case, monkeypatch):
    made, true = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **options: made.append(options) or true(*args, **options))
    case(folded=lambda truth: Trained(net(truth), net(truth)))
    assert {row["status"] for row in rows_of(modes=["training"])} <= {"ok", "wrong"}
    assert made == [{"lr": 1e-6, "fused": True}] * 2


def test_the_timed_step_updates_the_weights(case):
    built = []
    case(other=lambda truth: built.append(Scaled(net(truth))) or built[-1])
    assert by_path(rows_of(modes=["training"]))["other"]["status"] == "ok"
    torch.manual_seed(0)
    moved = (built[0].net.second.weight.detach() - Net().second.weight.detach()).abs()
    # One before memory is measured, one for it, one before the clock and five under it, each of about 1e-6.
    assert 4e-6 < moved.max() < 1e-5


def test_memory_has_frozen_copies_and_the_optimisers_state(case):
    class Fast(nn.Module):
        """Runs what it shares; 4 MiB of its own."""

        def __init__(self, shared, frozen):
            super().__init__()
            self.shared, self.frozen = shared, nn.Parameter(torch.zeros(frozen), requires_grad=False)

        def forward(self, x):
            return self.shared(x)

    def path(frozen, extra):
        def build(truth):
            model = net(truth)
            model.extra = nn.Parameter(torch.ones(extra))
            model.forward = lambda x: Net.forward(model, x) + 0 * model.extra.sum()
            return Trained(model, Fast(model, frozen))

        return build

    def mib(frozen, extra):
        case(other=path(frozen, extra))
        group = make_group(1)
        group.problem.gradients = lambda *_: group.truth.gradients  # the truth does not have the one that is extra
        return group.prepare("other", "eager", "float32").row["peak_mib"]

    least = mib(1, 1)
    assert mib(2**20, 1) - least == pytest.approx(4, rel=0.01)
    # The parameter, its gradient and two moments.
    assert mib(1, 2**20) - least == pytest.approx(16, rel=0.01)


def test_memory_begins_when_all_is_built(case, monkeypatch):
    order = []

    class Memory(measure.Memory):
        def __init__(self, device):
            order.append("begins")
            super().__init__(device)

        def note_built(self):
            order.append("built")

    class Seen(Scaled):
        def forward(self, x):
            order.append("runs")
            return super().forward(x)

    monkeypatch.setattr(measure, "Memory", Memory)
    case(other=lambda truth: order.append("builds") or Seen(net(truth)))
    rows_of(paths=["other"])
    assert order[:4] == ["begins", "builds", "built", "runs"]


def test_labels_repeat_with_their_clips(monkeypatch, case):
    seen = []

    def loss(out, labels):
        seen.append(labels)
        return out.mean()

    labels = torch.arange(8).view(8, 1)  # one second a clip
    monkeypatch.setitem(CASES, "net", Case("", lambda _: [{}], make({}, loss=loss, labels=labels), ("training",)))
    group = make_group(6)
    module = group.problem.build("reference", torch.float32, "cpu", training=True)
    group._step(module, module, group.problem.batch(3, torch.float32, "cpu"))(update=False)
    assert torch.equal(seen[-1], torch.cat((labels, labels, labels)))


def test_a_group_shares_its_truth(case, monkeypatch):
    made = []

    class Counted(Truth):
        def __init__(self, problem, *args):
            made.append(len(problem.inputs[0]) // 4)
            super().__init__(problem, *args)

    monkeypatch.setattr(runner, "Truth", Counted)
    rows_of(batches=[1, 2, 4, 8], precisions=["float32", "float64"])
    assert made == [1, 2]
    rows_of(batches=[2], modes=["inference", "training"])
    assert made == [1, 2, 2, 2]


# On a card

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@CUDA
def test_a_captured_graph_is_measured(monkeypatch):
    case_ = Case("", lambda preset: [{}], make({"other": net}), ("inference", "training"))
    monkeypatch.setitem(CASES, "net", case_)
    rows = rows_of(device="cuda", batches=[2], executions=["eager", "graph"], modes=["inference"])
    assert [(row["execution"], row["status"]) for row in rows] == [("eager", "ok"), ("graph", "ok")] * 2
    eager, graph = rows[:2]
    assert graph["launches"] < eager["launches"]
    assert graph["kernels"] >= eager["kernels"]
    assert graph["error"] <= graph["error_budget"]
    assert graph["peak_mib"] >= eager["peak_mib"] > 0
    (row,) = rows_of(device="cuda", batches=[2], executions=["graph"], modes=["training"], paths=["other"])
    assert (row["status"], row["reason"]) == ("skipped", "for inference alone")


@pytest.mark.gpu
@CUDA
def test_a_graph_under_autocast_stays_right(monkeypatch):
    """Narrow copies of trained weights are part of the graph, not memory that was freed."""
    monkeypatch.setitem(CASES, "net", Case("", lambda preset: [{}], make({})))
    problem = CASES["net"].problem(PRESETS["small"], {}, 2)
    module = problem.build("reference", torch.float32, "cuda", training=False)
    inputs = problem.batch(1, torch.float32, "cuda")
    with measure.precision("bfloat16-autocast", "cuda"), torch.no_grad():
        function = measure.execute(module, "graph", inputs, training=False)
    with measure.precision("bfloat16-autocast", "cuda"), torch.no_grad():
        torch.full((2**22,), math.nan, device="cuda", dtype=torch.bfloat16)
        module.first.weight.mul_(2)
        expected = module(*inputs)
        assert relative_error(function(*inputs), expected) < 1e-3
