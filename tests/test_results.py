import json
import math
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import results
from benchmarks.results import append, read

ROW = {
    "case": "ave",
    "mode": "inference",
    "preset": "small",
    "batch": 2,
    "setting": {"latents": 2},
    "path": "reference",
    "execution": "eager",
    "dtype": "float32",
    "device": "a CPU",
    "threads": 2,
    "status": "ok",
    "median_ms": 1.5,
    "times_ms": [1.0, 1.5, 2.0],
}


def test_rows_come_back_and_are_only_added_to(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    append(path, [ROW, ROW | {"batch": 4}])
    before = path.read_bytes()
    append(path, iter([ROW | {"device": "Prozessor, 2 Kerne, größer"}]))
    append(path, [])
    assert path.read_bytes().startswith(before)
    assert [(row["batch"], row["device"]) for row in read(path)] == [
        (2, "a CPU"),
        (4, "a CPU"),
        (2, "Prozessor, 2 Kerne, größer"),
    ]
    assert read(path)[0] == ROW
    assert len(path.read_bytes().splitlines()) == 3


def test_a_row_is_on_the_disk_before_the_next_is_made(tmp_path):
    path = tmp_path / "rows.jsonl"

    def rows():
        yield ROW
        assert read(path) == [ROW]
        yield ROW | {"batch": 4}

    append(path, rows())
    assert len(read(path)) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_has_not_is_refused(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    append(path, [ROW])
    with pytest.raises(ValueError, match="JSON compliant"):
        append(path, [ROW | {"error": value}])
    assert read(path) == [ROW]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"case": "ave"', "Expecting"),
        ("[1]", "list instead of an object"),
        (json.dumps({k: v for k, v in ROW.items() if k not in ("path", "threads")}), "without path, threads"),
        (json.dumps(ROW | {"times_ms": [1.0, 0]}), "not all positive"),
        (json.dumps(ROW | {"times_ms": 1.0}), "not all positive"),
        (json.dumps(ROW | {"median_ms": None}), "not all positive"),
        (json.dumps(ROW | {"median_ms": True}), "not all positive"),
        (json.dumps(ROW | {"median_ms": math.inf}), "not all positive"),
        ("[" * 100_000, "expected a result row"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{line}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: expected a result row") as error:
        read(path)
    assert reason in str(error.value)


@pytest.mark.parametrize("changes", [{"status": "wrong"}, {"kernels_us": []}])
def test_a_row_without_a_time_needs_none(tmp_path, changes):
    row = {k: v for k, v in ROW.items() if k not in ("median_ms", "times_ms")} | changes
    append(tmp_path / "rows.jsonl", [row])
    assert read(tmp_path / "rows.jsonl") == [row]


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl")


# Where


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "nvidia-geforce-rtx-4090-laptop-gpu"),
        ("Intel(R) Xeon(R) @ 2.20GHz, 8 cores", "intel-r-xeon-r-2-20ghz-8-cores"),
    ],
)
def test_folders(monkeypatch, name, folder):
    monkeypatch.setattr(results, "_nvml", lambda what: {"name": name}[what])
    assert results.device_name("cuda") == name
    assert results.folder("cuda") == results.ROOT / folder


def test_this_processor():
    name = results.device_name("cpu")
    assert name.endswith(f", {results.cores()} cores")
    assert len(name) > len(f", {results.cores()} cores")
    assert results.folder("cpu").parent == results.ROOT
    assert results.folder("cpu").name.endswith(f"-{results.cores()}-cores")
    assert results.cores() >= 1


def test_a_card_without_nvml_is_named_by_torch(monkeypatch):
    monkeypatch.setattr(results, "_nvml", lambda what: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert results.folder("cuda").name == "nvidia-h200"


@pytest.mark.parametrize("initialised", [True, False])
def test_the_card_that_is_read_is_torchs(monkeypatch, initialised):
    """NVML lists another card first."""
    cards = {"GPU-aa-1": ("NVIDIA T4", 585), "GPU-bb-2": ("NVIDIA H200", 1980)}

    class Nvml(ModuleType):
        NVMLError, NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = KeyError, 1, 2, 0
        nvmlInit = nvmlShutdown = staticmethod(lambda: None)
        nvmlDeviceGetHandleByIndex = staticmethod([*cards].__getitem__)
        nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: cards[uuid] and uuid)
        nvmlDeviceGetName = staticmethod(lambda card: cards[card][0])
        nvmlDeviceGetClockInfo = staticmethod(lambda card, which: cards[card][1])
        nvmlDeviceGetPowerUsage = nvmlDeviceGetTemperature = staticmethod(lambda *_: 40)

    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=["bb-2"][index]))
    name, mhz = cards["GPU-bb-2" if initialised else "GPU-aa-1"]
    assert results.device_name("cuda") == name
    assert results.clocks("cuda")["sm_mhz"] == mhz


def test_clocks_need_a_card(monkeypatch):
    monkeypatch.setattr(results, "_nvml", lambda what: {"sm_mhz": 1980})
    assert results.clocks("cuda") == {"sm_mhz": 1980}
    assert results.clocks("cpu") is None
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert results.clocks("cuda") is None


# What rows say of where they were made


def test_environment(monkeypatch):
    results.environment.cache_clear()
    row = results.environment("cpu")
    assert row["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert row["threads"] == torch.get_num_threads()
    assert {"commit", "device", "python", "torch", "triton", "timm", "torchvision", "xformers"} <= row.keys()
    assert "driver" not in row
    results.environment.cache_clear()
    monkeypatch.setattr(results, "_PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(results, "_nvml", lambda what: f"its {what}")
    row = results.environment("cuda")
    assert (row["no-such-package"], row["driver"], row["device"]) == (None, "its driver", "its name")
    results.environment.cache_clear()


def test_commit_says_when_the_code_was_changed(monkeypatch, tmp_path):
    def git(*args):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=none")
        return subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    folder = tmp_path / "benchmarks"
    (folder / "results" / "card").mkdir(parents=True)
    monkeypatch.setattr(results, "__file__", str(folder / "results.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results._commit() is None  # no repository
    rows, code = folder / "results" / "card" / "rows.jsonl", folder / "results.py"
    for file in (rows, code):
        file.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert results._commit() == commit
    rows.write_text("1\n2\n")
    (folder / "untracked.py").write_text("")
    assert results._commit() == commit
    code.write_text("2\n")
    assert results._commit() == f"{commit}+changes"
    monkeypatch.setenv("PATH", "")
    assert results._commit() is None


def test_now_has_a_time_zone():
    assert results.now().endswith("+00:00")
