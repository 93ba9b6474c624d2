import io
import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks.compare import caveats, compare, table
from benchmarks.results import read


def row(times=(1.0, 1.0, 1.0), **changes):
    """As the runner writes it: what has no time has no column for it."""
    times = [float(t) for t in times]
    values = {
        "case": "model",
        "mode": "forward",
        "preset": "ave-swinv2-large",
        "batch": 2,
        "setting": {"latents": 2, "groups": 2},
        "path": "reference",
        "execution": "eager",
        "dtype": "float32",
        "device": "a CPU",
        "threads": 2,
        "status": "ok",
        "reason": None,
    } | changes
    if values["status"] == "ok":
        values = {"error": 1e-7, "error_budget": 1e-5, "median_ms": float(np.median(times)), "times_ms": times} | values
    return values


def sample(random, rounds=20, factor=1.0, spread=0.05):
    return factor * np.exp(random.normal(0, spread, rounds))


def printed(comparisons):
    console = Console(file=io.StringIO(), width=200)
    console.print(table(comparisons))
    return console.file.getvalue()


def one(a, b):
    comparisons = compare(a, b)
    assert len(comparisons) == 1
    return comparisons[0]


def test_a_fifth_slower_is_found():
    random = np.random.default_rng(0)
    fast, slow = row(sample(random)), row(sample(random, factor=1.2))
    result = one([fast], [slow])
    assert result.verdict == "B is 1.21x slower"
    assert result.ratio == pytest.approx(np.median(fast["times_ms"]) / np.median(slow["times_ms"]))
    assert result.interval[0] < 1 / 1.2 < result.interval[1] < 1
    assert one([slow], [fast]).verdict == "B is 1.21x faster"


def test_equal_samples_are_called_noise_nineteen_times_in_twenty():
    random = np.random.default_rng(0)
    verdicts = [one([row(sample(random))], [row(sample(random))]).verdict for _ in range(200)]
    assert 2 <= sum(verdict != "noise" for verdict in verdicts) <= 14


def test_a_real_difference_is_seldom_called_noise():
    random = np.random.default_rng(0)
    verdicts = [one([row(sample(random))], [row(sample(random, factor=1.1))]).verdict for _ in range(50)]
    assert sum(verdict.endswith("slower") for verdict in verdicts) >= 48


def test_pooled_runs_that_drift_are_noise():
    """Rounds of 1 % within runs that lie 10 % apart: all rounds in one pot would make a difference of it."""
    random = np.random.default_rng(0)
    levels = {"a": (1.0, 1.1, 0.95, 1.05, 1.15), "b": (1.03, 0.93, 1.0, 1.12, 0.97)}
    runs = {name: [sample(random, 50, level, 0.01) for level in side] for name, side in levels.items()}
    drifting = one(*([row(times) for times in side] for side in runs.values()))
    assert drifting.verdict == "noise"
    pooled = one(*([row(np.concatenate(side))] for side in runs.values()))
    assert pooled.verdict.endswith("faster")
    # A run's rounds count once, however many they are.
    assert one([row([1.0] * 9), row([2.0] * 3), row([2.0] * 3)], [row([1.0] * 99)]).ratio == 2


def test_results_are_the_same_each_time_and_in_any_order():
    random = np.random.default_rng(0)
    a = [row(sample(random), batch=batch) for batch in (1, 2, 4)]
    b = [row(sample(random), batch=batch) for batch in (1, 2, 4)]
    results = compare(a, b)
    assert results == compare(a, b)
    assert results[::-1] == compare(a[::-1], b)


def test_rows_pair_by_what_was_measured():
    a = row()
    for name in ("case", "mode", "preset", "path", "execution", "dtype"):
        assert [c.verdict for c in compare([a], [a | {name: "other"}])] == ["only in A", "only in B"], name
    assert len(compare([a], [a | {"batch": 3}])) == 2
    assert len(compare([a], [a | {"setting": {"latents": 16, "groups": 2}}])) == 2
    assert len(compare([a], [a | {"setting": {"groups": 2, "latents": 2}}, a | {"error": 0.0, "commit": "x"}])) == 1


def test_missing_and_failed_cases_are_listed():
    oom = {"status": "out of memory", "reason": "tried to allocate 2 GiB [in /a/]"}
    failed = {"status": "failed", "reason": None}
    a = [row(case="gone"), row(case="broken now"), row(**oom, case="works now"), row(**oom, case="never")]
    a += [row(case="at times"), row(case="at times", **failed), row(case="few"), row(**failed, case="gone too")]
    b = [row(**oom, case="broken now"), row(case="works now"), row(**failed, case="never")]
    b += [row(case="at times"), row(case="few", times=[1, 1]), row(case="new")]
    comparisons = compare(a, b)
    error = "tried to allocate 2 GiB [in /a/]"
    assert {c.key.case: c.verdict for c in comparisons} == {
        "gone": "only in A",
        "broken now": f"out of memory in B: {error}",
        "works now": f"out of memory in A: {error}",
        "never": f"out of memory in A: {error}; failed in B",
        "at times": "noise",
        "few": "too few rounds",
        "gone too": "only in A; failed in A",
        "new": "only in B",
    }
    assert [c.note for c in comparisons if c.key.case == "at times"] == ["failed in A (1 of 2 runs)"]
    text = printed(comparisons)
    for c in comparisons:
        line = next(line for line in text.splitlines() if c.key.case in map(str.strip, line.split("│")))
        assert c.verdict in line, text
        assert c.note in line, text


def test_two_rounds_in_all_give_no_interval_and_three_do():
    few = one([row([1.0]), row([1.0])], [row([2.0] * 9)])
    assert few.verdict == "too few rounds"
    assert few.ratio == 0.5
    assert np.isnan(few.interval).all()
    assert one([row([1.0])] * 3, [row([2.0] * 9)]).verdict == "B is 2.00x slower"
    # A row without its single rounds is one round.
    few = one([row(times_ms=[])] * 2, [row()])
    assert (few.verdict, few.ratio) == ("too few rounds", 1)
    assert one([row([1.0] * 9)], [row([1.001] * 9)]).verdict == "B is 1.0010x slower"


def test_other_machines_and_single_runs_are_told_at_the_top():
    a, b = [row()] * 2, [row()] * 2
    assert caveats(compare(a, b)) == []
    assert caveats(compare(a[:1], b)) == [
        "A file has one run of some cases: their intervals do not cover the drift between runs."
    ]
    for change in ({"device": "a GPU"}, {"threads": 1}):
        other = [r | change for r in b]
        machine = ", threads: ".join(str((b[0] | change)[name]) for name in ("device", "threads"))
        expected = f"Not the same machine: A on a CPU, threads: 2; B on {machine}."
        assert caveats(compare(a, other)) == [expected]
        text = " ".join(printed(compare(a, other)).split())
        assert text.index(expected) < text.index("verdict")
        assert len(caveats(compare([*a, *other], [*a, *other]))) == 1


def test_the_table_has_columns_for_what_differs():
    random = np.random.default_rng(0)
    a = [row(sample(random), batch=batch) for batch in (1, 2)]
    b = [row(sample(random, factor=0.5), batch=batch) for batch in (1, 2)]
    lines = printed(compare(a, b)).splitlines()
    title = " ".join(lines[: next(i for i, line in enumerate(lines) if "verdict" in line)])
    assert 'setting {"groups": 2, "latents": 2}' in title
    header = next(line for line in lines if "verdict" in line).replace("┃", "|").split("|")
    assert [cell.strip() for cell in header if cell.strip()] == ["batch", "A ms", "B ms", "A / B", "95 %", "verdict"]
    cells = [[cell.strip() for cell in line.split("│")] for line in lines if "faster" in line]
    assert [cell[1] for cell in cells] == ["1", "2"]
    assert [cell[4] for cell in cells] == [f"{c.ratio:.3f}" for c in compare(a, b)]


def test_read_gives_the_rows_or_names_the_faulty_line(tmp_path):
    path = tmp_path / "results.jsonl"
    rows = [row(), row(status="failed", reason="x"), row(status="wrong", reason="x", error=0.5)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read(path) == rows
    faults = {
        b'{"case": ': "Expecting value",
        b"\xff\xfe\xff": "utf",
        b"[1]": "list instead of an object",
        b'{"case": "demo", "device": "a CPU"}': "an object without mode, preset, batch, setting, path",
        json.dumps(row(times_ms=[1, -1])).encode(): "times_ms and median_ms",
        json.dumps(row(times_ms=[1, float("nan")])).encode(): "times_ms and median_ms",
        json.dumps(row(times_ms=3)).encode(): "times_ms and median_ms",
        json.dumps(row(median_ms="fast")).encode(): "times_ms and median_ms",
        b"[" * 100_000: "recursion",
    }
    for line, reason in faults.items():
        path.write_bytes(json.dumps(rows[0]).encode() + b"\n" + line + b"\n")
        with pytest.raises(ValueError, match="(?s)results.jsonl, line 2: expected a result row, got .*" + reason):
            read(path)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")
