import math
import subprocess
import sys

import pytest

from benchmarks import cases, ladder, results
from benchmarks.ladder import climb, draw, figure
from benchmarks.measure import EXECUTIONS, PRECISIONS

RUNGS = ladder.RUNGS["inference"]


def row(key, **changes):
    """A row that the runner could have written."""
    values = {
        "device": "a CPU",
        "threads": 1,
        "status": "ok",
        "reason": None,
        "median_ms": 20.0,
        "q20_ms": 18.0,
        "q80_ms": 25.0,
        "samples_per_s": 100.0,
        "peak_mib": 2048.0,
        "error": 1.2e-3,
        "roofline_share": 0.25,
    }
    return key | values | changes


def option(command, name):
    return command[command.index(name) + 1]


@pytest.fixture
def processes(monkeypatch):
    """Plays the processes: what each command was given, and what each writes, returns or raises."""
    commands, outcomes, measured = [], {}, []

    def run(command, *, cwd, capture_output, timeout):
        assert capture_output
        if command[3] == "roofline":
            measured.append(command[4:])
            results.Path(option(command, "--out")).touch()
            return subprocess.CompletedProcess(command, 0, b"", b"")
        commands.append((command, cwd, timeout))
        how = tuple(option(command, name) for name in ("--path", "--execution", "--dtype"))
        outcome = outcomes.get(how[0], {})
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, subprocess.CompletedProcess):
            return outcome
        key = {"case": "ave", "mode": option(command, "--mode"), "preset": option(command, "--preset"), "setting": {}}
        key |= {"batch": int(option(command, "--batch")), **dict(zip(("path", "execution", "dtype"), how))}
        with open(option(command, "--out"), "x"):  # a file of its own, that nobody wrote before
            pass
        if outcome is not None:
            results.append(results.Path(option(command, "--out")), [row(key) | outcome])
        return subprocess.CompletedProcess(command, 0, b"", b"")

    results.environment("cpu")  # asks git, once
    monkeypatch.setattr(ladder.subprocess, "run", run)
    return commands, outcomes, measured


def climbed(execution="blocks", mode="inference", **limits):
    return list(climb("cpu", mode, "small", 4, execution, 1.5, **({"timeout": 60.0} | limits)))


def test_one_fresh_process_a_rung(processes):
    commands, *_ = processes
    rows = climbed()
    assert len(rows) == len(commands) == len(RUNGS)
    for command, cwd, timeout in commands:
        assert command[:4] == [sys.executable, "-m", "benchmarks", "run"]
        assert (cwd / "benchmarks" / "ladder.py").is_file()
        assert timeout == 60
        given = {name: option(command, name) for name in command[4::2]}
        assert given.keys() == {
            *("--case", "--mode", "--device", "--preset", "--batch", "--path", "--execution", "--dtype"),
            *("--seconds", "--out", "--limits"),
        }
        assert [given[n] for n in ("--case", "--mode", "--device", "--preset", "--batch", "--seconds")] == [
            *("ave", "inference", "cpu", "small", "4", "1.5")
        ]
    ways = [tuple(option(command, n) for n in ("--path", "--execution", "--dtype")) for command, *_ in commands]
    assert ways == [
        ("released", "eager", "float32"),
        ("released", "eager", "bfloat16"),
        ("released-bmm", "blocks", "bfloat16"),
        ("concatenated", "blocks", "bfloat16"),
        ("folded", "blocks", "bfloat16"),
        ("xformers", "blocks", "bfloat16"),
        ("fused", "blocks", "bfloat16"),
        ("fused", "blocks+graph", "bfloat16"),
        ("optimized", "own", "bfloat16"),
    ]
    assert ways == [(r["path"], r["execution"], r["dtype"]) for r in rows]
    assert len({option(command, "--out") for command, *_ in commands}) == len(RUNGS)
    assert not any(results.Path(option(command, "--out")).exists() for command, *_ in commands)
    assert {r["status"] for r in rows} == {"ok"}


@pytest.mark.parametrize("mode", ladder.RUNGS)
def test_all_rungs_have_the_same_limits(processes, mode):
    commands, _, measured = processes
    climbed(mode=mode)
    assert [option(command, "--dtype") for command in measured] == ["float32", "bfloat16"]
    (limits,) = {option(command, "--out") for command in measured}
    assert {option(command, "--limits") for command, *_ in commands} == {limits}
    assert all("--measure" in command and option(command, "--device") == "cpu" for command in measured)


def test_limits_that_could_not_be_measured_are_left_to_the_rungs(processes, monkeypatch):
    commands, *_ = processes
    true = ladder.subprocess.run

    def run(command, **options):
        if command[3] == "roofline":
            raise subprocess.TimeoutExpired(command, 60)
        return true(command, **options)

    monkeypatch.setattr(ladder.subprocess, "run", run)
    assert {row["status"] for row in climbed()} == {"ok"}
    assert not any("--limits" in command for command, *_ in commands)


def test_the_ladder_of_training(processes):
    commands, *_ = processes
    rows = climbed(mode="training")
    assert {option(command, "--mode") for command, *_ in commands} == {row["mode"] for row in rows} == {"training"}
    ways = [tuple(option(command, n) for n in ("--path", "--execution", "--dtype")) for command, *_ in commands]
    assert ways == [
        ("released", "eager", "float32"),
        ("released", "eager", "bfloat16-autocast"),
        ("released-bmm", "blocks", "bfloat16-autocast"),
        ("concatenated", "blocks", "bfloat16"),
        ("fused", "blocks", "bfloat16"),
        ("optimized", "own", "bfloat16"),
        ("optimized", "step", "bfloat16"),
    ]
    del commands[:]
    rows = climbed("eager", mode="training")
    assert [option(command, "--path") for command, *_ in commands] == ["released", "released", "concatenated", "fused"]
    assert [row["status"] for row in rows] == ["ok", "ok", "skipped", "ok", "ok", "skipped", "skipped"]


def test_some_rungs_alone(processes):
    commands, *_ = processes
    rows = climbed(mode="training", rungs=ladder.RUNGS["training"][3:5])
    assert [option(command, "--path") for command, *_ in commands] == ["concatenated", "fused"]
    assert [row["path"] for row in rows] == ["concatenated", "fused"]


def test_the_rows_of_rungs_that_are_not_measured_anew():
    rung, other = RUNGS[:2]
    like = {"device": "card", "threads": 2, "mode": "inference", "preset": "paper", "batch": 2}
    rows = [like | {"rung": rung.label, "date": i} for i in range(3)]
    rows += [like | {"rung": rung.label, "date": 3, name: "another"} for name in like]
    assert ladder.latest(rows, rung, like) == rows[2]
    assert ladder.latest(rows, other, like) is None


@pytest.mark.parametrize("mode", ladder.RUNGS)
def test_every_rung_can_be_asked_for(mode):
    paths = cases.CASES["ave"].paths if mode == "inference" else cases._TRAINS
    for rung in ladder.RUNGS[mode]:
        assert rung.path in paths
        assert rung.dtype in PRECISIONS
        assert rung.execution is None or rung.execution in EXECUTIONS


def test_an_eager_ladder_compiles_nothing(processes):
    commands, *_ = processes
    rows = climbed("eager")
    assert [option(command, "--execution") for command, *_ in commands] == ["eager"] * 6 + ["graph"]
    for row, path in ((rows[2], "released-bmm"), (rows[-1], "optimized")):
        assert (row["path"], row["status"], row["reason"]) == (path, "skipped", "asked for eager")
    assert len(rows) == len(RUNGS)


def test_whatever_becomes_of_a_rung_is_a_row(processes):
    _, outcomes, _ = processes
    outcomes |= {
        "released": subprocess.TimeoutExpired("python", 60),
        "released-bmm": subprocess.CompletedProcess([], -9, b"", b"first line\nKilled: \xff memory\n"),
        "concatenated": subprocess.CompletedProcess([], 3, b"", b""),
        "folded": None,  # died before it wrote
        "xformers": {"status": "skipped", "reason": "no card"},
        "fused": {"status": "out of memory", "reason": "the truth", "path": "all", "dtype": "all", "execution": "all"},
    }
    rows = climbed()
    assert [(r["status"], r["reason"]) for r in rows] == [
        ("skipped", "it took longer than 60 s"),
        ("skipped", "it took longer than 60 s"),
        ("failed", "exit code -9: Killed: \ufffd memory"),
        ("failed", "exit code 3: no output"),
        ("failed", "exit code 0: no output"),
        ("skipped", "no card"),
        ("out of memory", "the truth"),
        ("out of memory", "the truth"),
        ("ok", None),
    ]
    for rung, found in zip(RUNGS, rows):
        assert (found["path"], found["dtype"]) == (rung.path, rung.dtype)
        assert found["execution"] == (rung.execution or "blocks")
        assert set(results.KEY) | {"device", "threads", "status"} <= found.keys()


def test_without_a_timeout(processes):
    commands, *_ = processes
    climbed(timeout=math.inf)
    assert {timeout for *_, timeout in commands} == {None}


def test_a_budget_for_all_rungs(processes, monkeypatch):
    commands, *_ = processes
    clock = iter([100.0, 100.0, 100.0, 100.0, 150.0, 170.0, *[180.0] * 6])  # two of them for the limits
    monkeypatch.setattr(ladder.time, "monotonic", lambda: next(clock))
    rows = climbed(budget=80.0)
    assert [timeout for *_, timeout in commands] == [60.0, 30.0, 10.0]
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["skipped"] * 6
    assert {row["reason"] for row in rows[3:]} == {"the time budget was spent"}


# The picture


def rungs():
    speeds = [10.0, 30.0, None, 60.0, 70.0, None, 90.0, 100.0, 110.0]
    reasons = iter([("failed", "exit code -9: Killed"), ("skipped", "xformers' attention takes CUDA tensors, " * 3)])
    found = []
    for rung, speed in zip(RUNGS, speeds):
        key = {
            "mode": "inference",
            "preset": "small",
            "batch": 2,
            "path": rung.path,
            "execution": "eager",
            "dtype": rung.dtype,
        }
        if speed is None:
            status, reason = next(reasons)
            found.append((rung, key | {"device": "a CPU", "status": status, "reason": reason}))
        else:
            times = {"median_ms": 2000 / speed, "q20_ms": 1800 / speed, "q80_ms": 2500 / speed}
            found.append((rung, row(key, samples_per_s=speed, **times)))
    return found


def test_a_bar_a_rung_and_reasons_for_the_others():
    chart = figure(rungs())
    chart.draw_without_rendering()
    (axes,) = chart.axes
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in axes.patches}
    assert len(bars) == len(axes.patches) == len(RUNGS)
    measured = [round(bars[8 - i].get_width(), 6) for i in range(9) if not bars[8 - i].get_hatch()]
    assert measured == [10, 30, 60, 70, 90, 100, 110]
    assert [i for i in range(9) if bars[8 - i].get_hatch()] == [2, 5]
    at = {}
    for text in axes.texts:
        at.setdefault(8 - round(text.get_position()[1]), []).append(text.get_text())
    for i, (rung, _) in enumerate(rungs()):
        assert rung.label in at[i]
    assert "failed: exit code -9: Killed" in at[2]
    assert any(text.startswith("skipped: xformers' attention") and text.endswith("...") for text in at[5])
    assert {"10/s  1.00x", "2.0 GiB", "1.2e-03", "25%"} < set(at[0])
    assert "100/s  10.00x" in at[7]
    spans = [sorted(line.get_xdata()) for line in axes.lines]
    assert spans[0] == pytest.approx([10 * 0.8, 10 / 0.9])
    assert len(spans) == 7
    titles = [text.get_text() for text in chart.texts]
    assert titles == ["AVE inference, small preset, batch 2, a CPU"]
    # Nothing is cut off.
    width, height = chart.canvas.get_width_height()
    for text in (*axes.texts, *chart.texts):
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text


def test_a_ladder_without_a_time():
    failed = [(rung, {**rungs()[2][1], "path": rung.path}) for rung in RUNGS]
    (axes,) = figure(failed).axes
    assert all(bar.get_hatch() for bar in axes.patches)


def test_memory_below_a_gibibyte():
    assert (ladder._mib(1023.4), ladder._mib(1024)) == ("1023 MiB", "1.0 GiB")


def test_pictures_are_written_and_the_svg_is_the_same_each_time(tmp_path):
    paths = draw(rungs(), tmp_path / "a" / "ladder")
    assert paths == [tmp_path / "a" / "ladder.svg", tmp_path / "a" / "ladder.png"]
    assert paths[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    svg = paths[0].read_text()
    assert "<svg" in svg
    assert all(rung.label in svg for rung in RUNGS)  # as text
    assert draw(rungs(), tmp_path / "b" / "ladder")[0].read_text() == svg
    assert "dc:date" not in svg
