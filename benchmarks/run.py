"""Measures cases: parity first, then the clock. Every candidate gives one row, whatever becomes of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure, results, roofline
from benchmarks.cases import CASES, MODES, PRESETS, Problem, Trained, refusal
from benchmarks.measure import PRECISIONS, MatrixWork, Unavailable, relative_error
from lavish_fast import ops

# Our own: at most twice the reference's error in the same precision. The others are held to the caps alone.
STRICT = ("model", "concatenated", "folded", "fused", "optimized")
_ROUNDS_KEPT = 100
_RATE = 1e-6
_UNTIL_CAPTURED = 4  # steps of TrainingStep, three of which are no graph
_ALL = dict.fromkeys(("path", "execution", "dtype"), "all")


@dataclass
class Candidate:
    """One way to compute one problem, and what came of it."""

    key: dict[str, Any]
    row: dict[str, Any] = field(default_factory=dict)
    call: Callable | None = None


@dataclass(frozen=True)
class Selection:
    """What to measure: every combination of these, where a case has it.

    precisions, executions: None for the usual ones (`_usual`). paths: None for all of a case's. seconds: of timing per
    candidate. budget: seconds after which nothing new begins.
    """

    device: str
    preset: str
    batches: Sequence[int]
    cases: Sequence[str] = tuple(CASES)
    modes: Sequence[str] = MODES
    precisions: Sequence[str] | None = None
    executions: Sequence[str] | None = None
    paths: Sequence[str] | None = None
    seconds: float = 0.2
    budget: float = float("inf")

    def groups(self) -> list[dict[str, Any]]:
        """What is measured side by side: a case in a mode at a setting and a batch size."""
        preset = PRESETS[self.preset]
        return [
            {"case": name, "mode": mode, "preset": self.preset, "batch": batch, "setting": setting}
            for name in self.cases
            for mode in CASES[name].modes
            if mode in self.modes
            for setting in CASES[name].settings(preset)
            for batch in CASES[name].batches(self.batches)
        ]

    def candidates(self, group: dict[str, Any], paths: Iterable[str]) -> Iterator[dict[str, str]]:
        """The candidates of a group, by path, execution and dtype."""
        for path in paths:
            if self.paths is not None and path not in self.paths:
                continue
            if path == "optimized" and self.device == "cpu" and not (self.paths or self.executions):
                continue  # it compiles, which on a CPU is for those who ask
            usual = list(_usual(self.device, group, path))
            for execution in self.executions or dict.fromkeys(execution for execution, _ in usual):
                ours = [name for e, name in usual if e == execution] or [name for _, name in usual]
                for name in self.precisions or dict.fromkeys(ours):
                    yield {"path": path, "execution": execution, "dtype": name}


# What is compiled on a card, and how. By blocks, the code of one serves all blocks of its shape.
_COMPILED = {
    ("ave", "released"): "blocks",
    ("ave", "released-bmm"): "blocks",
    ("ave", "folded"): "blocks",
    ("ave", "fused"): "blocks",
    ("backbone", "timm"): "blocks",
    ("window_attention", "timm-order"): "compile",
    ("window_attention", "reference"): "compile",
    ("adapter", "reference"): "compile",
}


def _usual(device: str, group: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Executions and precisions that are measured unless others are asked for.

    Nothing is compiled on a CPU: there Inductor's C++ takes minutes for a network of any size.
    """
    case, training = group["case"], group["mode"] == "training"
    network = case not in ops.OPS
    precisions = ["float32"] if case == "latents" and device == "cpu" else ["float32", "bfloat16"]
    if path == "optimized":
        executions = ("own", "step") if training else ("own",)
        yield from ((execution, name) for name in ("float32", "bfloat16") for execution in executions)
        return
    if case == "ave" and path in ("reference", "released", "released-bmm"):
        precisions.append("bfloat16-autocast")
    if device == "cuda":
        precisions.append("tf32")
    precisions += CASES[case].extra_precisions
    yield from (("eager", name) for name in precisions)
    compiled = _COMPILED.get((case, path))
    if device == "cuda" and compiled:
        yield compiled if training or not network else "blocks+graph", "bfloat16"
        if network and path.startswith("released") and not training:
            yield "blocks+graph", "bfloat16-autocast"


class Truth:
    """A problem's outputs, in training with gradients, in float64, and the matrix products that they take."""

    def __init__(self, problem: Problem, path: str, device: str, training: bool) -> None:
        self.problem, self.training = problem, training
        function = problem.build(path, torch.float64, device, training=training)
        inputs = problem.batch(1, torch.float64, device, training=training)
        weights = function.parameters() if isinstance(function, nn.Module) else ()
        # Attention as plain products, which can be counted.
        with MatrixWork(weights) as self.work, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training):
            outputs = (step(problem, function, function, inputs, 1) if training else function)(*inputs)
        self.outputs = problem.rows(outputs).detach()
        self.gradients = problem.gradients(path, function, inputs, 1) if training else {}

    def errors(
        self, path: str, function: Callable, outputs: Any, repeats: int, inputs: Sequence[Tensor] = ()
    ) -> dict[str, float]:
        """The error of outputs; in training also of each input's gradient, and of parameters', together and by kind.

        Together alone would not do: beside the head's gradient adapters may have none at all and it hardly shows.
        """
        errors = {"outputs": relative_error(self.problem.rows(outputs), _repeat(self.outputs, repeats))}
        if not self.training:
            return errors
        expected, got = self.gradients, self.problem.gradients(path, function, inputs, repeats)
        if got.keys() != expected.keys():
            return errors | {"gradients": float("inf")}
        for i in self.problem.differentiated:
            wanted = _repeat(expected[i], repeats if self.problem.batched[i] else 1)
            errors[f"input {i}"] = relative_error(got[i], wanted)
        squares: dict[str, Tensor] = {}  # of the difference, of what is there, of the truth
        for name in filter(lambda name: isinstance(name, str), expected):
            ours, truth = got[name].flatten(), expected[name].flatten()
            sums = torch.stack([x.square().sum() for x in (ours - truth, ours, truth)])
            squares[_kind(name)] = squares.get(_kind(name), 0) + sums
        if squares:
            whole = sum(squares.values())
            errors["parameters"] = _root(whole[0] / whole[2])
            for kind, (apart, ours, truth) in squares.items():
                # Of the smaller of the two: no gradient at all is infinitely far, however noisy the kind. But that of
                # a bias whose sum a norm takes away is nothing but rounding, and measured by all parameters'.
                size = min(ours, truth) if truth > 1e-12 * whole[2] else whole[2]
                errors[f"parameters, {kind}"] = _root(apart / size)
        return errors


def _root(square: Tensor) -> float:
    return square.sqrt().item() if square.isfinite() else float("inf")


def _kind(parameter: str) -> str:
    """What a parameter is, wherever it is: gate_av, down, bn1.weight."""
    parts = [part for part in parameter.split(".") if not part.isdigit()]
    return ".".join(parts[-2 if parts[-1] in ("weight", "bias") else -1 :])


def _is_kind(error: str) -> bool:
    return error.startswith("parameters, ")


def budgets(
    precision: measure.Precision, errors: Iterable[str], control: Mapping[str, float] | None, *, training: bool
) -> dict[str, float]:
    """How large each of a Truth's `errors` may be.

    control: those of the reference in this precision, for paths that are held to twice as much, and of kinds of
    parameters to four times.
    """
    found = {}
    for what in errors:
        kind = _is_kind(what)
        # Rounding may be larger than a kind's gradient: what others than our own are asked for is that there is one.
        cap = (100 if kind else 1) * precision.gradient_cap
        if what == "outputs":
            cap = min(100 * precision.cap, cap) if training else precision.cap
        if control is not None:
            # A kind may be a few numbers, such as gate_av, whose rounding is a matter of chance.
            error = max(control.get(what, 0.0), control["parameters"] if kind else 0.0)
            cap = min(cap, (4 if kind else 2) * error + 4 * precision.eps)
        found[what] = cap
    return found


def step(
    problem: Problem, module: Callable, function: Callable, inputs: Sequence[Tensor], repeats: int
) -> Callable[..., Any]:
    """Forward and backward, called with the inputs, which leaves the gradients in them and in the parameters.

    function: `module` as it is run.
    """
    device = inputs[0].device
    parameters = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    leaves = [*parameters, *(inputs[i] for i in problem.differentiated)]
    labels = None if problem.labels is None else _repeat(problem.labels.to(device), repeats)
    upstream: list[Tensor] = []

    def call(*inputs: Tensor) -> Any:
        for leaf in leaves:
            leaf.grad = None
        outputs = function(*inputs)
        if problem.loss is None:
            if not upstream:
                upstream.append(problem.upstream(outputs, repeats))
            # Without the nodes that accumulate, which a CUDA graph would find on another stream.
            gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
            for leaf, gradient in zip(leaves, gradients):
                leaf.grad = gradient
            return outputs
        # Outside autocast, as every training loop has it.
        with torch.autocast(device.type, enabled=False):
            loss = problem.loss(outputs, labels)
        loss.backward()
        return outputs

    return call


def measure_all(
    selection: Selection, report: Callable[[dict[str, Any]], None], limits: Mapping[str, roofline.Limits]
) -> Iterator[str]:
    """Measures a selection, and reports each row as soon as it is there; yields what each group is, before it.

    limits: the device's by roofline's names of types; those that are not among them are measured.
    """
    started, limits = time.monotonic(), dict(limits)
    shared: dict[str, Any] = {}
    for key in selection.groups():
        yield " ".join([key["case"], key["mode"], *(f"{k} {v}" for k, v in key["setting"].items())])
        # Batches of a case share its truth.
        what = str([key[name] for name in ("case", "mode", "setting")])
        if shared.get("what") != what:
            shared = {"what": what}
        for row in Group(selection, key, limits, shared, started).measure():
            report(row)


class Group:
    """The candidates of one problem at one batch size: those that are measured side by side."""

    def __init__(
        self,
        selection: Selection,
        key: dict[str, Any],
        limits: dict[str, roofline.Limits],
        shared: dict[Any, Any],
        started: float,
    ) -> None:
        self.selection, self.key, self.limits, self.started = selection, key, limits, started
        self.shared = shared
        self.device, self.training = selection.device, key["mode"] == "training"
        self.clips = 1 if key["batch"] == 1 else 2
        self.repeats = key["batch"] // self.clips

    def measure(self) -> Iterator[dict[str, Any]]:
        if self._late():
            yield self._row(_ALL, "skipped", "the time budget was spent")
            return
        try:
            self._prepare_problem()
            candidates = list(self._candidates())
            refused = [self._refuse(candidate) for candidate in candidates]
            if not all(refused):
                self._prepare_truth()
        except Unavailable as error:
            yield self._row(_ALL, "skipped", str(error))
            return
        except Exception as error:
            memory = measure.is_out_of_memory(error)
            what = "out of memory" if memory else "failed"
            yield self._row(_ALL, what, f"already the float64 truth: {type(error).__name__}: {_one_line(error)}")
            return
        # On a CPU they take turns, see time_rounds; on a GPU each has the memory to itself.
        for together in [candidates] if self.device == "cpu" else [[c] for c in candidates]:
            if ready := [c for c in together if not c.row and self._prepare(c)]:
                self.time(ready)
            for candidate in together:
                candidate.call = None
                yield candidate.row
            gc.collect()

    def prepare(self, path: str, execution: str, dtype: str) -> Candidate:
        """One candidate, checked: with a `call` to time, or a row that says why it has none."""
        candidate = Candidate({"path": path, "execution": execution, "dtype": dtype})
        try:
            self._prepare_problem()
            if self.training and self.problem.trains is not None and path not in self.problem.trains:
                raise Unavailable(f"{path} has no training step")
            if not self._refuse(candidate):
                self._prepare_truth()
                self._prepare(candidate)
        except Exception as error:
            self._fail(candidate, error)
        return candidate

    def _prepare_problem(self) -> None:
        if ("problem", self.clips) not in self.shared:
            case, preset = CASES[self.key["case"]], PRESETS[self.selection.preset]
            problem = case.problem(preset, self.key["setting"], self.clips)
            if isinstance(problem.truth, nn.Module):
                problem.truth.to(self.device)  # once; the paths' copies are made of it
            self.shared["problem", self.clips] = problem
        self.problem: Problem = self.shared["problem", self.clips]

    def _prepare_truth(self) -> None:
        if ("truth", self.clips) not in self.shared:
            self.shared["truth", self.clips] = Truth(self.problem, "reference", self.device, self.training)
        self.truth: Truth = self.shared["truth", self.clips]
        self.control: dict[str, dict[str, float]] = {}

    def _candidates(self) -> Iterator[Candidate]:
        trains = self.problem.trains
        paths = [path for path in self.problem.paths if not self.training or trains is None or path in trains]
        yield from (Candidate(key) for key in self.selection.candidates(self.key, paths))

    def _late(self) -> bool:
        return time.monotonic() - self.started > self.selection.budget

    def _row(self, key: dict[str, Any], status: str, reason: str | None = None, **values: Any) -> dict[str, Any]:
        environment = {"date": results.now(), **results.environment(self.device)}
        return {**environment, **self.key, **key, "status": status, "reason": reason, **values}

    def _fail(self, candidate: Candidate, error: Exception) -> None:
        text = _one_line(error)
        cause = error
        while cause is not None and not isinstance(cause, Unavailable):
            cause = cause.__cause__ or cause.__context__
        if measure.is_out_of_memory(error):
            status = "out of memory"
        elif cause is not None:
            status, text = "skipped", str(cause)
        else:
            status, text = "failed", f"{type(error).__name__}: {text}"
        candidate.call, candidate.row = None, self._row(candidate.key, status, text)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _refuse(self, candidate: Candidate) -> bool:
        """Whether it is known beforehand that a candidate cannot run; its row then says why."""
        key = candidate.key
        reason = refusal(self.key["case"], self.key["mode"], key["path"], key["dtype"], self.device)
        if (key["path"] == "optimized") != (key["execution"] in ("own", "step")):
            reason = "lavish_fast.optimize compiles and captures for itself: executions own and step are its alone"
        if reason:
            candidate.row = self._row(key, "skipped", reason)
        return reason is not None

    def _prepare(self, candidate: Candidate) -> bool:
        """Builds, runs once and checks a candidate. False: its row already says why it gets no time."""
        if self._late():
            candidate.row = self._row(candidate.key, "skipped", "the time budget was spent")
            return False
        try:
            self._check(candidate)
        except Exception as error:
            self._fail(candidate, error)
            return False
        return candidate.row["status"] == "ok"

    def _check(self, candidate: Candidate) -> None:
        path, execution, name = (candidate.key[k] for k in ("path", "execution", "dtype"))
        precision = PRECISIONS[name]
        control = self._control(name) if path in STRICT else None
        if execution != "eager":
            torch._dynamo.reset()
        memory = measure.Memory(self.device)
        module = self.problem.build(path, precision.weights, self.device, training=self.training)
        inputs = self.problem.batch(self.repeats, precision.weights, self.device, training=self.training)
        memory.note_built()
        optimizer = _adam(module) if self.training and self.problem.loss is not None else None
        with measure.precision(name, self.device), torch.set_grad_enabled(self.training):
            start = time.perf_counter()
            function = measure.execute(module, execution, inputs, training=self.training)
            step = self._step(module, function, inputs, optimizer, whole=execution == "step")
            outputs = step(update=False)
            self._synchronise()
            first = time.perf_counter() - start
            start = time.perf_counter()
            outputs = step(update=False)  # again: what was compiled or captured for later calls counts
            self._synchronise()
            second = time.perf_counter() - start
            if "graph" in execution or execution in ("reduce-overhead", "own", "step"):
                memory.note_capture()
            errors = self.truth.errors(path, module, outputs, self.repeats, inputs)
        del outputs
        allowed = budgets(precision, errors, control, training=self.training)
        wrong = [what for what in errors if not errors[what] <= allowed[what]]
        ok = not wrong
        # The one that is nearest to its budget, or farthest beyond it. A kind's only where it is wrong: paths with
        # other budgets would show other kinds' errors, not to be compared.
        shown = wrong or [what for what in errors if not _is_kind(what)]
        what = max(shown, key=lambda what: errors[what] / allowed[what])
        error, budget = errors[what], allowed[what]
        candidate.row = self._row(
            candidate.key,
            "ok" if ok else "wrong",
            None if ok else f"error {error:.2g} of {what} is over the budget of {budget:.2g}",
            # JSON has no infinity
            error=error if error < float("inf") else None,
            error_budget=budget,
            compile_s=max(first - second, 0.0) if execution != "eager" else None,
        )

        def call() -> None:
            with measure.precision(name, self.device), torch.set_grad_enabled(self.training):
                step(update=True)

        if ok:
            held = [module, getattr(module, "network", None), getattr(module, "fast", None)]
            held = [part for part in held if isinstance(part, nn.Module)]
            if optimizer is not None:
                call()  # makes the optimizer's state
                held += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
            candidate.row["peak_mib"] = memory.peak(call, *inputs, *held)
            candidate.row |= measure.launches(call, self.device) or {"launches": None, "kernels": None}
            candidate.call = call

    def _control(self, name: str) -> dict[str, float]:
        """The errors of the reference, as it is, in this precision."""
        if name not in self.control:
            weights = PRECISIONS[name].weights
            module = self.problem.build("reference", weights, self.device, training=self.training)
            inputs = self.problem.batch(1, weights, self.device, training=self.training)
            with measure.precision(name, self.device), torch.set_grad_enabled(self.training):
                outputs = self._step(module, module, inputs, repeats=1)(update=False)
            self.control[name] = self.truth.errors("reference", module, outputs, 1, inputs)
        return self.control[name]

    def _step(
        self,
        module: Callable,
        function: Callable,
        inputs: tuple[Tensor, ...],
        optimizer: torch.optim.Adam | None = None,
        repeats: int = 0,
        *,
        whole: bool = False,
    ) -> Callable:
        """One forward, or forward, backward and, with an `optimizer`, its update; returns the outputs.

        whole: whether `TrainingStep` takes it.
        """
        if not self.training:
            return lambda update: function(*inputs)
        if whole:
            return self._whole(module, optimizer, inputs)
        run = step(self.problem, module, function, inputs, repeats or self.repeats)

        def updated(update: bool) -> Any:
            outputs = run(*inputs)
            if update and optimizer is not None:
                optimizer.step()
            return outputs

        return updated

    def _whole(self, module: Trained, optimizer: torch.optim.Adam, inputs: tuple[Tensor, ...]) -> Callable:
        from lavish_fast.step import TrainingStep

        labels = _repeat(self.problem.labels.to(self.device), self.repeats)
        taken = TrainingStep(module.fast, self.problem.loss, optimizer)
        first = True

        def step(update: bool) -> Any:
            nonlocal first
            # Without a rate the weights stay, and the gradients' mean is there to be checked.
            optimizer.param_groups[0]["lr"] = _RATE if update else 0.0
            for _ in range(_UNTIL_CAPTURED if first else 1):
                taken.accumulate(*inputs, labels=labels)
                taken.finish()
            first = False
            return None if update else module(*inputs)

        return step

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, candidates: list[Candidate]) -> None:
        """Times candidates side by side; their rows have the times."""
        try:
            times = measure.time_rounds([c.call for c in candidates], self.device, self.selection.seconds)
            for candidate, measured in zip(candidates, times):
                self._add_times(candidate, measured)
        except Exception as error:
            if len(candidates) == 1:
                self._fail(candidates[0], error)
            else:  # which of them it was shows when each is alone
                for candidate in candidates:
                    self.time([candidate])

    def _add_times(self, candidate: Candidate, times: list[float]) -> None:
        low, median, high = measure.quantiles(times)
        precision = PRECISIONS[candidate.key["dtype"]]
        if precision.limit not in self.limits:
            self.limits[precision.limit] = roofline.measure_limits(self.device, precision.limit)
        itemsize, batch = precision.weights.itemsize if not precision.autocast else 2, self.key["batch"]
        if self.problem.work is None:
            work = self.truth.work.ops(itemsize, batch / self.clips)
        else:
            work = self.problem.work(batch, itemsize, self.training)
        limits = self.limits[precision.limit]
        flops, moved = sum(op.total_flops for op in work), sum(op.total_bytes for op in work)
        least = roofline.floor(work, limits) * 1e3
        candidate.row |= {
            "median_ms": median,
            "q20_ms": low,
            "q80_ms": high,
            "samples_per_s": batch / median * 1e3,
            "flops": flops,
            "bytes": moved,
            "work": "matrix products" if self.problem.work is None else "roofline",
            "tflops_per_s": flops / median / 1e9,
            "gb_per_s": moved / median / 1e6,
            "limit_tflops": limits.tflops,
            "limit_gb_per_s": limits.gb_per_s,
            "roofline_ms": least,
            "roofline_share": least / median,
            "clocks": results.clocks(self.device),
            "times_ms": [round(t, 4) for t in times[:_ROUNDS_KEPT]],
        }


def _adam(module: nn.Module) -> torch.optim.Adam:
    """One kernel for all parameters, whichever path's: what is compared is the networks."""
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=_RATE, fused=True)


def _repeat(x: Tensor, repeats: int) -> Tensor:
    return x.repeat(repeats, *(1,) * (x.ndim - 1))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
