"""`python -m benchmarks` as people type it, and benchmarks/gpu.sh."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import cases, results
from lavish_fast.config import AdapterConfig
from parity import ROOT, tiny_config


@pytest.fixture
def tiny(monkeypatch):
    """A small preset that takes milliseconds."""
    swin = replace(tiny_config(), adapter=AdapterConfig(reduction=4))
    monkeypatch.setitem(cases.PRESETS, "small", replace(cases.PRESETS["small"], swin=swin))


def run(*arguments, code=0):
    result = CliRunner().invoke(command.app, [str(a) for a in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    assert (result.return_value or 0) == code, result.output
    return result.output


def typed(*arguments, **options):
    """In a process of its own."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 120} | options
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], **options)


def test_run_writes_a_row_for_each_candidate_and_says_what_came_of_it(tiny, tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ("run", "--case", "ave", "--mode", "inference", "--device", "cpu", "--preset", "small", "--batch", "2")
    output = run(*arguments, "--path", "reference,released,fused", "--dtype", "float32", "--seconds", 0, "--out", out)
    rows = results.read(out)
    assert [(row["path"], row["status"]) for row in rows] == [
        ("reference", "ok"),
        ("released", "ok"),
        ("fused", "skipped"),
    ]
    assert "2 ok, 1 skipped" in output
    assert "the kernels take CUDA tensors, got cpu" in output
    assert f"{rows[1]['median_ms']:.3f} ms" in output
    run(*arguments, "--path", "reference", "--dtype", "float32", "--seconds", 0, "--out", out)
    assert results.read(out)[:3] == rows


def test_run_fails_when_a_path_is_wrong(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.run.Truth.errors", lambda *_: {"outputs": 0.5})
    arguments = ("--case", "latents", "--device", "cpu", "--preset", "small", "--batch", "1", "--out", tmp_path / "r")
    assert "7 wrong" in run("run", *arguments, "--budget", 1000, code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--case", "nope"], "case: expected some of ave, networks, ave-vit, latents, cmbs"),
        (["run", "--mode", "nope"], "mode: expected some of inference, training, got nope"),
        (["run", "--path", "released,nope"], "path: expected some of reference, released"),
        (["run", "--dtype", "fp8"], "dtype: expected some of float64, float32"),
        (["run", "--execution", "turbo"], "execution: expected some of eager, compile"),
        (["run", "--device", "tpu"], "device: expected some of cpu, cuda, got tpu"),
        (["run", "--preset", "huge"], "preset: expected some of paper, small, got huge"),
        (["run", "--batch", "3", "--device", "cpu"], "batch: expected 1 or even numbers of clips, got 3"),
        (["run", "--batch", "two", "--device", "cpu"], "batch: expected 1 or even numbers of clips, got two"),
        (["ladder", "--mode", "sleeping"], "mode: expected some of inference, training, got sleeping"),
        (["ladder", "--rungs", "0,2"], "rungs: expected some of 1, 2, 3"),
        (["ladder", "--execution", "blocks,eager"], "execution: expected one of blocks, eager"),
        (["memory", "--mode", "sleeping"], "mode: expected some of inference, training, got sleeping"),
        (["profile", "--device", "cpu"], "device: expected cuda, whose kernels are listed, got cpu"),
        (["tune", "--device", "cpu"], "device: expected cuda, whose kernels are tuned, got cpu"),
        (["roofline", "--model", "big"], "model: expected some of ave-swinv2-large"),
        (["roofline", "--tflops", "5"], "limits: expected both --tflops and --gb-per-s"),
        (["roofline", "--tflops", "0", "--gb-per-s", "9"], "expected positive numbers, got 0 TFLOP/s and 9 GB/s"),
        (["roofline", "--tflops", "5", "--gb-per-s", "0"], "expected positive numbers, got 5 TFLOP/s and 0 GB/s"),
    ],
)
def test_bad_usage_lists_what_exists(arguments, message):
    with pytest.raises(command.typer.BadParameter) as raised:
        run(*arguments)
    assert message in raised.value.message


@pytest.mark.parametrize("name", ["run", "ladder", "profile", "roofline"])
def test_a_card_that_is_not_here_is_bad_usage(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(command.typer.BadParameter) as raised:
        run(name, "--device", "cuda", *(["--measure"] if name == "roofline" else []))
    assert raised.value.message == "device: expected one that is here: cpu, got cuda"


def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "a").write_text("{}\n")
    for arguments, message in (
        (("compare", str(tmp_path / "a"), str(tmp_path / "b")), f"{tmp_path}/a, line 1: expected a result row"),
        (("tables", "--rows", str(tmp_path / "none")), f"{tmp_path}/none"),
    ):
        done = typed(*arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr


def test_roofline_with_given_limits_imports_no_torch():
    code = "import sys; from benchmarks.__main__ import app; app(sys.argv[1:], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    arguments = ["roofline", "--tflops", "790", "--gb-per-s", "4300", "--batch", "16"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "window_attention" in done.stdout
    assert "samples/s at most" in done.stdout


def test_roofline_measures_once_and_remembers(tmp_path, monkeypatch):
    from benchmarks import roofline

    measured = []

    def limits(*arguments):
        measured.append(arguments)
        return roofline.Limits(0.1, 20.0)

    monkeypatch.setattr(roofline, "measure_limits", limits)
    out = tmp_path / "limits.jsonl"
    for dtype in ("float32", "float32", "bfloat16"):
        run("roofline", "--device", "cpu", "--dtype", dtype, "--out", out)
    assert measured == [("cpu", "float32"), ("cpu", "bfloat16")]
    run("roofline", "--device", "cpu", "--dtype", "float32", "--measure", "--out", out)
    assert len(measured) == 3
    out.write_text("[]\n")
    with pytest.raises(ValueError, match=r"limits\.jsonl, line 1: expected measured limits"):
        run("roofline", "--device", "cpu", "--dtype", "float32", "--out", out)


def test_run_takes_the_limits_that_roofline_wrote(tiny, tmp_path, monkeypatch):
    from benchmarks import roofline

    results.append(tmp_path / "limits", [{"dtype": "float32", "tflops": 0.5, "gb_per_s": 7.0}])
    monkeypatch.setattr(roofline, "measure_limits", lambda device, dtype: roofline.Limits(2.0, 3.0))
    arguments = ("--case", "ave", "--mode", "inference", "--device", "cpu", "--preset", "small", "--batch", "1")
    arguments += ("--path", "reference", "--dtype", "float32,bfloat16", "--seconds", 0)
    run("run", *arguments, "--limits", tmp_path / "limits", "--out", tmp_path / "rows.jsonl")
    rows = results.read(tmp_path / "rows.jsonl")
    assert [(row["limit_tflops"], row["limit_gb_per_s"]) for row in rows] == [(0.5, 7.0), (2.0, 3.0)]


def test_compare_and_tables_read_what_run_wrote(tiny, tmp_path):
    for _ in range(2):
        arguments = ("--case", "ave", "--mode", "inference", "--device", "cpu", "--preset", "small", "--batch", "1")
        arguments += ("--path", "released", "--dtype", "float32", "--seconds", 0)
        run("run", *arguments, "--out", tmp_path / "bench.jsonl")
    shutil.copy(tmp_path / "bench.jsonl", tmp_path / "bench2.jsonl")
    output = run("compare", tmp_path / "bench.jsonl", tmp_path / "bench2.jsonl")
    assert "A / B" in output
    output = run("tables", "--rows", tmp_path)
    assert "Table 4" in output
    assert (tmp_path / "tables.md").is_file()
    assert (tmp_path / "figure_1.png").is_file()


def test_memory_is_drawn_from_what_run_wrote(tiny, tmp_path):
    assert "no training of case ave was measured at the paper preset" in run("memory", "--rows", tmp_path)
    assert list(tmp_path.iterdir()) == []
    arguments = ("--case", "ave", "--mode", "training", "--device", "cpu", "--preset", "small", "--batch", "1,2")
    arguments += ("--path", "released,concatenated", "--dtype", "float32", "--seconds", 0)
    run("run", *arguments, "--out", tmp_path / "bench.jsonl")
    profiled = results.read(tmp_path / "bench.jsonl")[-1] | {"batch": 4, "peak_mib": 4321.0}
    results.append(tmp_path / "profile.jsonl", [profiled])
    output = run("memory", "--rows", tmp_path, "--out", tmp_path / "drawn")
    for row in [*results.read(tmp_path / "bench.jsonl"), profiled]:
        assert f"{row['path']} eager float32" in output
        assert f"{row['peak_mib'] / row['batch']:,.0f}" in output
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "memory-training.png",
        "memory-training.svg",
    ]


def test_tune_goes_on_after_a_target_that_the_kernel_refuses(monkeypatch):
    from benchmarks import tune

    def tuned(target, seconds, **_):
        if target.stage < 3:
            raise ValueError("adapter: expected tensors that it takes, got: C: [192]")
        key = target.op, 90, "float32", 128
        for tried in (4, 5):
            yield tune.Tuned(key, {"BLOCK_N": 16}, 1.0, 2.0, tried, {"default wrong": 1} if target.stage == 4 else {})

    monkeypatch.setattr(command, "_device", lambda given: "cuda")
    monkeypatch.setattr(tune, "tune", tuned)
    output = run("tune", "--op", "adapter", "--preset", "small", "--builders", "0", code=1)
    assert output.count("refused: adapter: expected tensors that it takes, got: C: [192]") == 2
    assert output.count("{'BLOCK_N': 16}") == 2
    assert "5 tried, 1 default wrong" in output
    assert "5 tried\n" in run("tune", "--op", "adapter", "--preset", "small", "--builders", "0", "--stage", "3")


def test_what_tuning_has_found_is_there_when_it_is_interrupted(monkeypatch):
    from benchmarks import tune

    def tuned(target, seconds, **_):
        yield tune.Tuned((target.op, 90, "float32", 128), {"BLOCK_N": 16}, 1.0, 2.0, 3, {"slow": 1})
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_device", lambda given: "cuda")
    monkeypatch.setattr(tune, "tune", tuned)
    output = run("tune", "--op", "adapter", "--preset", "small", "--builders", "0", "--stage", "3", code=130)
    assert "{'BLOCK_N': 16}" in output
    assert "3 tried, 1 slow" in output


def test_ladder_climbs_in_processes_of_their_own(tmp_path, monkeypatch):
    from benchmarks import ladder

    first, _, third, _, _, sixth, *_ = ladder.RUNGS["inference"]
    monkeypatch.setitem(ladder.RUNGS, "inference", (first, third, sixth))
    out = tmp_path / "ladder.jsonl"
    arguments = ("--device", "cpu", "--preset", "small", "--batch", "1", "--execution", "eager", "--seconds", "0")
    run("ladder", *arguments, "--out", out)
    rows = results.read(out)
    assert [(row["rung"], row["status"]) for row in rows] == [
        ("released order, float32", "ok"),
        ("+ torch.compile", "skipped"),
        ("+ xformers attention", "skipped"),
    ]
    assert (tmp_path / "ladder.svg").is_file()
    assert (tmp_path / "ladder.png").is_file()


def test_the_ladder_of_training_has_a_file_and_pictures_of_its_own(tmp_path, monkeypatch):
    from benchmarks import ladder

    monkeypatch.setattr(results, "ROOT", tmp_path)
    asked = []

    def climb(device, mode, *rest, **limits):
        for rung in ladder.RUNGS[mode]:
            asked.append(mode)
            key = {"case": "ave", "mode": mode, "preset": "small", "batch": 2, "setting": {}, "path": rung.path}
            key |= {"execution": "eager", "dtype": rung.dtype, "device": "a CPU", "threads": 1}
            yield key | {"status": "skipped", "reason": "no time"}

    monkeypatch.setattr(ladder, "climb", climb)
    output = run("ladder", "--mode", "training", "--device", "cpu", "--execution", "eager")
    folder = results.folder("cpu")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"ladder-training.{suffix}" for suffix in ("jsonl", "png", "svg")
    ]
    assert asked == ["training"] * len(ladder.RUNGS["training"])
    assert "+ CUDA graphs: optimize" in output
    assert [row["rung"] for row in results.read(folder / "ladder-training.jsonl")] == [
        rung.label for rung in ladder.RUNGS["training"]
    ]
    assert "AVE training, small preset" in (folder / "ladder-training.svg").read_text()


# benchmarks/gpu.sh


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter that lacks the modules named in LACKS, and writes down what it is asked to run."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/usr/bin/env bash
if [[ $1 == -c && $2 == *find_spec* ]]; then
    for module in $LACKS; do [[ $2 == *"'$module'"* ]] && exit 0; done
    exit 1
fi
[[ $1 == -c && $2 == *is_available* && $CARD ]] && exit 0
[[ $1 == -c ]] && exec {sys.executable} "$@"
echo "$*" >>{tmp_path}/calls
[[ $* == *"--case ave,backbone"* ]] && exit ${{FAILS:-0}}
sleep ${{SLEEPS:-0}}
"""
    )
    path.chmod(0o755)
    return path


def gpu(python, *arguments, **environment):
    command = [shutil.which("bash"), ROOT / "benchmarks" / "gpu.sh", *map(str, arguments)]
    environment = os.environ | {"PYTHON": str(python)} | {name: str(value) for name, value in environment.items()}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_gpu_sh_runs_every_part(fake_python, tmp_path):
    done = gpu(fake_python, "--dry", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    for part in ("-m pytest -m gpu", "roofline --measure", "window_attention", "--case cmbs,mbt"):
        assert part in calls, part
    for mode, name in (("inference", "ladder"), ("training", "ladder-training")):
        assert f"--mode {mode} --batch 1 --execution eager" in calls
        assert f"--out {tmp_path}/out/{name}.jsonl" in calls
    assert f"memory --rows {tmp_path}/out --preset small" in calls
    steps = (tmp_path / "out" / "steps.txt").read_text()
    assert steps.count("done") == 10
    assert "skipped" not in steps
    # What takes a card is left out.
    assert not any(part in calls for part in ("test_kernel_", "tune", "profile", "worksteal"))


def test_gpu_sh_on_a_card(fake_python, tmp_path):
    done = gpu(fake_python, "--out", tmp_path / "out", CARD=1)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert "-n 12 --dist worksteal -k not buil tests/test_kernel_adapter.py" in calls
    assert "benchmarks tune --stage 3 --seconds 0.02 --budget 21" in calls
    assert "benchmarks profile --batch 8" in calls
    assert "--mode training --batch 2,8,32 --path released,concatenated,fused --execution eager" in calls
    assert "--mode training --batch 2,16 --path optimized --execution step --dtype bfloat16" in calls
    limits = [int(line.split()[-2]) for line in done.stdout.splitlines() if line.startswith("== ")]
    assert len(limits) == 14
    assert sum(limits[:-1]) <= 540, "the last has what the others left"


def test_gpu_sh_gives_every_step_its_share_of_a_larger_budget(fake_python, tmp_path):
    done = gpu(fake_python, "--dry", "--out", tmp_path / "out", "--budget", 5400)
    assert "== roofline, bfloat16, at most 80 s" in done.stdout


def test_gpu_sh_lists_what_is_missing_and_goes_on_without(fake_python, tmp_path):
    done = gpu(fake_python, "--dry", "--out", tmp_path / "out", LACKS="xformers pytest")
    assert done.returncode == 0, done.stderr
    assert "missing: xformers (no xformers attention)" in done.stdout
    assert "-m pytest" not in (tmp_path / "calls").read_text()


def test_gpu_sh_runs_the_tests_one_after_another_without_xdist(fake_python, tmp_path):
    done = gpu(fake_python, "--out", tmp_path / "out", CARD=1, LACKS="xdist")
    assert done.returncode == 0, done.stderr
    assert "worksteal" not in (tmp_path / "calls").read_text()
    assert "-k not buil tests/test_kernel_adapter.py" in (tmp_path / "calls").read_text()


def test_gpu_sh_needs_torch(fake_python, tmp_path):
    done = gpu(fake_python, "--dry", "--out", tmp_path / "out", LACKS="torch timm")
    assert done.returncode == 2
    assert "gpu.sh: expected torch timm" in done.stderr


def test_gpu_sh_keeps_its_budget_and_lists_what_it_skipped(fake_python, tmp_path):
    done = gpu(fake_python, "--dry", "--out", tmp_path / "out", "--budget", 18, SLEEPS=2)
    steps = (tmp_path / "out" / "steps.txt").read_text()
    assert done.returncode == 0, done.stderr
    assert steps.count("done") == 2
    assert steps.count("skipped") == 8


def test_gpu_sh_goes_on_after_a_part_that_failed_and_says_so(fake_python, tmp_path):
    done = gpu(fake_python, "--dry", "--out", tmp_path / "out", FAILS=3)
    steps = (tmp_path / "out" / "steps.txt").read_text()
    assert done.returncode == 1
    assert "exit 3    inference" in steps
    assert steps.count("done") == 9


def test_gpu_sh_refuses_what_it_does_not_know(fake_python):
    done = gpu(fake_python, "--wet")
    assert done.returncode == 2
    assert "got --wet" in done.stderr


def test_gpu_sh_without_a_card_says_how_to_go_on(fake_python, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = gpu(fake_python, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "--dry runs on a CPU" in done.stderr


def test_rows_of_the_repository_can_be_read():
    paths = [*results.ROOT.glob("*/bench*.jsonl"), *results.ROOT.glob("*/ladder*.jsonl")]
    assert paths
    for path in paths:
        assert results.read(path), path
