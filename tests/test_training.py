import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from lavish_fast import Model, TrainingStep, checkpoint, optimize, runtime, tasks, training
from lavish_fast.config import AdapterConfig, TrainConfig
from lavish_fast.graphs import record
from lavish_fast.tasks import ave
from parity import tiny_config
from recorded import record_on_cpu

CPU = torch.device("cpu")
fit, evaluate = (partial(function, device="cpu") for function in (training.fit, training.evaluate))

SECONDS = 3
CLASSES = ("bell", "dog", "background")
# With a step this small the parameters stand still and gradients of different runs can be compared.
STILL = {"lr": 1e-12, "head_lr": 1e-12}


def make_model(seed=0, batch_norm=True, drop_path=0.0, backbone_seed=0):
    config = tiny_config(adapter=AdapterConfig(reduction=4, batch_norm=batch_norm), classes=CLASSES, frames=SECONDS)
    config = replace(config, backbone=replace(config.backbone, drop_path_rate=drop_path))
    model = Model(config)
    for part, part_seed in ((model.backbone, backbone_seed), (model.adapters, seed), (model.head, seed + 1)):
        generator = torch.Generator().manual_seed(part_seed)
        part.load_state_dict({name: drawn(name, tensor, generator) for name, tensor in part.state_dict().items()})
    return model


def drawn(name, like, generator):
    if not like.is_floating_point():
        return like
    value = 0.15 * torch.randn(like.shape, generator=generator)
    if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
        return value.abs() + 0.8
    return value + 0.5 if name.endswith(("gate", "gate_av")) else value


def make_clips(count, seed=0):
    """Clips whose picture and sound both tell the class."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for index in range(count):
        labels = torch.randint(len(CLASSES), (SECONDS,), generator=generator)
        audio = torch.randn(SECONDS, 32, 32, generator=generator) * 0.3
        video = torch.randn(SECONDS, 3, 32, 32, generator=generator) * 0.3
        for second, label in enumerate(labels.tolist()):
            video[second, label] += 1
            audio[second, :, 10 * label : 10 * label + 10] += 1
        clips.append({"audio": audio, "video": video, "labels": labels, "id": f"clip{seed}_{index}"})
    return clips


def settings(**changes):
    return TrainConfig(**{"workers": 0, "epochs": 1, "lr": 1e-3, "head_lr": 1e-3} | changes)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.trainable_parameters()}


def true_gradients(model, clips):
    """Of the mean loss over all segments of the clips, which go through the model at once."""
    batch = tasks.collate(clips)
    model.zero_grad()
    model.train()
    ave.loss(model(**batch.inputs), batch.labels).backward()
    return gradients(model)


def relative_error(got, expected):
    assert got.keys() == expected.keys()
    difference = sum((got[name] - expected[name]).square().sum() for name in expected)
    return float(difference / sum(tensor.square().sum() for tensor in expected.values())) ** 0.5


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [row.get("loss", row.get("train_loss")) for row in rows(out)]


@pytest.fixture(autouse=True)
def one_thread():
    # The tensors are so small that threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


BAD = ValueError("bad.mp4: no frames")


@pytest.mark.parametrize(("clips", "batch_size", "accumulate"), [(4, 1, 4), (3, 1, 4), (3, 2, 2), (7, 2, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.filterwarnings("ignore:skipped bad.mp4")
def test_accumulated_gradient_is_that_of_one_large_batch(tmp_path, clips, batch_size, accumulate, dtype, tolerance):
    data = [clip | {name: clip[name].to(dtype) for name in ("audio", "video")} for clip in make_clips(clips)]
    expected = true_gradients(make_model(batch_norm=False).to(dtype), data)
    assert all(gradient.norm() > 0 for gradient in expected.values())
    config = settings(batch_size=batch_size, accumulate=accumulate, **STILL)
    for place, items in (("whole", data), ("with_unreadable", [*data[:2], BAD, *data[2:]])):
        if len(items) <= batch_size * accumulate:
            model = make_model(batch_norm=False).to(dtype)
            fit(model, items, data[:1], config, tmp_path / place)
            assert relative_error(gradients(model), expected) <= tolerance


def test_each_epoch_sees_each_clip_once_in_an_order_of_its_own():
    config = settings(batch_size=2, accumulate=2, seed=3)
    orders = []
    for epoch in (0, 1):
        parts = []
        for rank in (0, 1, 2):
            steps = training._Steps(25, config, rank, 3)
            steps.epoch = epoch
            batches = list(steps)
            assert len(batches) == len(steps) == steps.count * 2 == 6
            assert all(len(batch) <= 2 for batch in batches)
            steps.start = 2
            assert list(steps) == batches[4:]
            parts += [index for batch in batches for index in batch]
        assert sorted(parts) == list(range(25))
        orders.append(parts)
    assert orders[0] != orders[1]


class Turning(list):
    """Clips whose pictures are turned in every other epoch."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        clip = super().__getitem__(index)
        return clip | {"video": clip["video"].flip(-1) if self.epoch % 2 else clip["video"]}


def test_a_train_set_may_change_by_the_epoch(tmp_path):
    clips = make_clips(3)
    runs = {"same": clips, "turning": Turning(clips)}
    for name, train in runs.items():
        fit(make_model(), train, clips, settings(epochs=2), tmp_path / name)
    same, turning = (losses(tmp_path / name) for name in runs)
    assert len(same) == 6  # of two steps and the epoch, twice
    assert same[:3] == turning[:3]
    assert all(a != b for a, b in zip(same[3:], turning[3:]))


@pytest.mark.parametrize("kill_at", [10, 11, 12])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, kill_at):
    # 4 steps an epoch; checkpoints within an epoch after steps 5, 10, 15 and 20, and after each epoch.
    train, val = Turning(make_clips(7)), make_clips(3, seed=1)
    config = settings(epochs=5, accumulate=2, batch_size=1, save_every=5, lr_step=2, patience=5)
    model = make_model(drop_path=0.3)
    whole = fit(model, train, val, config, tmp_path / "whole")
    assert whole.steps == 20

    class KilledError(Exception):
        pass

    with monkeypatch.context() as patch:
        step = training._Run.step

        def killed_step(run, batches):
            if run.state.steps == kill_at:
                raise KilledError
            return step(run, batches)

        patch.setattr(training._Run, "step", killed_step)
        with pytest.raises(KilledError):
            fit(make_model(drop_path=0.3), train, val, config, tmp_path / "parts")
    for source in (random.seed, np.random.seed, torch.manual_seed):
        source(123)
    # Other adapters than those that were trained: everything must come from the checkpoint.
    resumed = make_model(drop_path=0.3, seed=7)
    again = fit(resumed, train, val, config, tmp_path / "parts", resume=True)

    assert again == whole
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, tensor in model.trainable_state_dict().items():
        assert torch.equal(resumed.trainable_state_dict()[name], tensor), name
    for file in ("last/state.safetensors", "best/model.safetensors"):
        a, b = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_workers_change_nothing_and_a_finished_run_can_be_prolonged(tmp_path):
    train, val = make_clips(3), make_clips(2, seed=1)
    a, b = make_model(), make_model()
    fit(a, train, val, settings(epochs=3), tmp_path / "a")
    fit(b, train, val, settings(epochs=2), tmp_path / "b")
    done = fit(b, train, val, settings(epochs=3, workers=1, patience=9), tmp_path / "b", resume=True)
    assert done.epochs == 3
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for name, tensor in a.trainable_state_dict().items():
        assert torch.equal(b.trainable_state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"config": {"lr": 0.5}}, r"config\.lr 0\.001, got 0\.5"),
        ({"model": {"batch_norm": False}}, r"model\.adapter\.batch_norm True, got False"),
        ({"model": {"backbone_seed": 5}}, r"model\.backbone_sha256"),
        ({"clips": 4}, "train_clips 3, got 4"),
    ],
)
def test_resuming_something_else_is_refused(tmp_path, changes, expected):
    val = make_clips(1, seed=1)
    fit(make_model(), make_clips(3), val, settings(), tmp_path)
    model = make_model(**changes.get("model", {}))
    with pytest.raises(ValueError, match=rf"state\.safetensors: expected {expected}"):
        fit(
            model,
            make_clips(changes.get("clips", 3)),
            val,
            settings(**changes.get("config", {})),
            tmp_path,
            resume=True,
        )


def test_a_run_is_neither_overwritten_nor_made_up(tmp_path):
    train = make_clips(2)
    with pytest.raises(FileNotFoundError, match=r"expected the state of a run to resume, got none"):
        fit(make_model(), train, train, settings(), tmp_path, resume=True)
    fit(make_model(), train, train, settings(), tmp_path)
    with pytest.raises(ValueError, match="expected a folder without a run"):
        fit(make_model(), train, train, settings(), tmp_path)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


@pytest.mark.parametrize("fault", ["pickle", "torch pickle", "truncated", "empty", "other tensors", "adam", "extra"])
def test_faulty_state_is_refused_by_name(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    train = make_clips(2)
    fit(make_model(), train, train, settings(), tmp_path)
    path = tmp_path / "last" / "state.safetensors"
    tensors, metadata = load_file(path), checkpoint.read_metadata(path)
    if fault == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif fault == "torch pickle":
        torch.save({"state": Payload()}, path)
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "other tensors":
        save_file(tensors, path)
    elif fault == "adam":
        save_file(tensors | {"adam.0.exp_avg": torch.zeros(3, 3, 3)}, path, metadata)
    else:
        save_file(tensors | {"model.unknown": torch.zeros(1)}, path, metadata)
    model = make_model(seed=9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"state\.safetensors: expected"):
        fit(model, train, train, settings(epochs=2), tmp_path, resume=True)
    assert not (tmp_path / "executed").exists()
    if fault != "adam":
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def make_run(path):
    model = make_model()
    steps = training._Steps(2, settings(), 0, 1)
    run = training._Run(model, settings(), steps, path, torch.device("cpu"))
    run.step([tasks.collate(make_clips(2))])
    return run


def kill_while_saving(folder, stage):
    """Saves, then is killed at a stage of saving the next state."""
    run = make_run(Path(folder) / "last" / "state.safetensors")
    run.save()
    run.state.steps += 1

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_half(tensors, path, metadata):
        whole = path.with_name("whole")
        save_file(tensors, whole, metadata)
        path.write_bytes(whole.read_bytes()[:-1000])
        whole.unlink()
        die()

    patched = {"safetensors.torch.save_file": write_half, "os.fsync": die, "os.replace": die}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, patched[stage])
        run.save()


@pytest.mark.parametrize("stage", ["safetensors.torch.save_file", "os.fsync", "os.replace"])
def test_sigkill_in_a_save_leaves_the_previous_state(tmp_path, stage):
    killed = run_python(f"test_training.kill_while_saving({str(tmp_path)!r}, {stage!r})")
    assert killed.wait() == -signal.SIGKILL
    run = make_run(tmp_path / "last" / "state.safetensors")
    assert len(list(run.path.parent.iterdir())) == 2, "the kill fell into the save"
    run.state.steps = 99
    run.load()
    assert run.state.steps == 1, "the state of before, whole"
    run.save()
    assert [path.name for path in run.path.parent.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("stage", ["os.fsync", "os.replace", "safetensors.torch.save_file"])
def test_failure_at_any_stage_of_a_save_leaves_the_previous_state(tmp_path, monkeypatch, stage):
    run = make_run(tmp_path / "last" / "state.safetensors")
    run.save()
    before = run.path.read_bytes()
    run.step([tasks.collate(make_clips(2))])

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage, fail)
    with pytest.raises(OSError, match="No space"):
        run.save()
    assert run.path.read_bytes() == before


def run_python(code, **env):
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | env
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", f"import test_training; {code}"], env=env)


def ddp_settings(processes, **changes):
    return settings(batch_size=2 // processes, accumulate=2, **changes)


def ddp_data(clips):
    return make_clips(clips), [*make_clips(4, seed=1), BAD]


# Steps of 4 clips: with 5 the second rank has none in the last step, with 7 it has one of 3.
DDP_RUNS = {"single": (5, False, STILL), "uneven": (7, False, STILL), "batch_norm": (7, True, {})}


def ddp_worker(folder):
    torch.set_num_threads(1)
    rank, results = int(os.environ["RANK"]), {}
    for name, (clips, batch_norm, options) in DDP_RUNS.items():
        # Rank 0's weights must reach the other rank.
        model = make_model(seed=rank, backbone_seed=rank, batch_norm=batch_norm)
        done = fit(model, *ddp_data(clips), ddp_settings(2, **options), Path(folder) / name)
        results[name] = {
            "weights": {key: tensor for key, tensor in model.state_dict().items() if "num_batches" not in key},
            "gradients": gradients(model),
            "accuracy": torch.tensor(done.best_score, dtype=torch.float64),
        }
    torch.save(results, Path(folder) / f"rank{rank}.pt")


def run_ranks(worker, folder):
    """What two processes of one group leave in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    call = f"test_training.{worker}({str(folder)!r})"
    processes = [run_python(call, **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore:skipped bad.mp4")
def test_two_processes_equal_one(tmp_path):
    ranks = run_ranks("ddp_worker", tmp_path)
    for name, (clips, batch_norm, options) in DDP_RUNS.items():
        a, b = (rank[name] for rank in ranks)
        assert a["accuracy"] == b["accuracy"]
        for part in ("weights", "gradients"):
            assert all(torch.equal(tensor, b[part][key]) for key, tensor in a[part].items())
        log = rows(tmp_path / name)
        assert log[-1]["val"]["total"] == 4 * SECONDS
        assert log[-1]["skipped"] == [str(BAD)]
        if batch_norm:
            fresh = make_model().state_dict()
            assert not any(torch.equal(t, fresh[key]) for key, t in a["weights"].items() if "running" in key)
            continue
        model = make_model(batch_norm=False)
        alone = fit(model, *ddp_data(clips), ddp_settings(1, **options), tmp_path / f"{name} alone")
        assert relative_error(a["gradients"], gradients(model)) <= 1e-6
        assert a["accuracy"] == alone.best_score
        expected = rows(tmp_path / f"{name} alone")
        for got, row in zip(log, expected, strict=True):
            del got["clips_per_second"], row["clips_per_second"]
            assert got == pytest.approx(row, rel=1e-6) if "loss" in row else got.keys() == row.keys()
        assert log[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-6)


def ddp_module_worker(folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, results = int(os.environ["RANK"]), {}
    for name, batch_norm, clips in (
        ("without", False, (2, 2)),
        ("evaluation", True, (2, 2)),
        ("uneven", False, (3, 1)),
    ):
        model = make_model(batch_norm=batch_norm)
        fast = optimize(model, training=True, compile=False, cuda_graphs=False).train(not batch_norm)
        first = sum(clips[:rank])
        batch = tasks.collate(make_clips(4)[first : first + clips[rank]])
        if name == "uneven":  # DistributedDataParallel takes the mean over ranks, a step that over segments
            optimizer = torch.optim.Adam([p for p in fast.parameters() if p.requires_grad], lr=1e-12, fused=True)
            step = TrainingStep(fast, ave.loss, optimizer)
            step.accumulate(**batch.inputs, labels=batch.labels)
            results["outcome"] = torch.stack(step.finish())
        else:
            parallel = torch.nn.parallel.DistributedDataParallel(fast)
            assert len(parallel.modules_buffers) == sum("running" in n or "num_batches" in n for n in fast.state_dict())
            ave.loss(parallel(**batch.inputs), batch.labels).backward()
        results[name] = gradients(model)
    torch.distributed.destroy_process_group()
    torch.save(results, Path(folder) / f"rank{rank}.pt")


def test_the_fast_form_under_distributed_data_parallel(tmp_path):
    ranks = run_ranks("ddp_module_worker", tmp_path)
    batch = tasks.collate(make_clips(4))
    for name, batch_norm in (("without", False), ("evaluation", True), ("uneven", False)):
        model = make_model(batch_norm=batch_norm)
        fast = optimize(model, training=True, compile=False).train(not batch_norm)
        loss = ave.loss(fast(**batch.inputs), batch.labels)
        loss.backward()
        for rank in ranks:
            assert relative_error(rank[name], gradients(model)) <= 1e-6
    expected = [loss.item(), 4 * SECONDS, 4, 0, 0]
    assert all(rank["outcome"].tolist() == pytest.approx(expected, rel=1e-6) for rank in ranks)


def test_unreadable_clips_are_reported_and_skipped(tmp_path, monkeypatch):
    train, val = make_clips(4), make_clips(2, seed=1)
    other = ValueError("other.mp4: truncated")
    with pytest.warns(UserWarning, match="skipped") as caught:
        done = fit(make_model(), [*train, BAD], [*val, other], settings(epochs=2), tmp_path)
    lines = [str(w.message) for w in caught if "skipped" in str(w.message)]
    assert sorted(lines) == [f"skipped {BAD}", f"skipped {other}"]
    assert done.skipped == (str(BAD), str(other))
    assert [row["val"]["total"] for row in rows(tmp_path) if "val" in row] == [2 * SECONDS] * 2
    assert rows(tmp_path)[-1]["skipped"] == list(done.skipped)
    assert done.steps == 6

    result = evaluate(make_model(), [BAD, *val], batch_size=1)
    assert (result.scores["total"], result.clips, result.skipped) == (2 * SECONDS, 2, (str(BAD),))
    # One file may be that of several clips.
    with monkeypatch.context() as patch:
        patch.setattr(training, "time", SimpleNamespace(perf_counter=iter((3.0, 7.0)).__next__))
        result = evaluate(make_model(), [BAD, *val, BAD, BAD], batch_size=2)
    assert (result.clips, result.skipped, result.clips_per_second) == (2, (str(BAD),), 2 / 4)
    for data in ([BAD], []):
        with pytest.raises(ValueError, match="evaluation: expected a clip that can be read"):
            evaluate(make_model(), data)
    with pytest.raises(ValueError, match="training: expected a clip that can be read, got none of 1"), pytest.warns():
        fit(make_model(), [BAD], val, settings(), tmp_path / "none")
    with pytest.raises(ValueError, match="train set: expected clips"):
        fit(make_model(), [], val, settings(), tmp_path / "none")


def test_clips_without_sound_come_out_of_the_workers(tmp_path):
    train, val = make_clips(3), make_clips(2, seed=1)
    train, val = ([clip | {"silent": i > 0} for i, clip in enumerate(clips)] for clips in (train, val))
    done = fit(make_model(), train, val, settings(epochs=2, workers=2), tmp_path)
    assert sorted(done.silent) == ["clip0_1", "clip0_2", "clip1_1"]
    assert evaluate(make_model(), val, workers=1).silent == ("clip1_1",)
    assert evaluate(make_model(), make_clips(1)).silent == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_non_finite_probabilities_name_the_clips_and_take_no_step(tmp_path, value, batch_norm):
    data = make_clips(3)
    data[1]["video"] = torch.full_like(data[1]["video"], value)
    model = make_model(batch_norm=batch_norm)
    before = {name: p.detach().clone() for name, p in model.trainable_parameters()}
    with pytest.raises(FloatingPointError, match=r"^clip0_1: expected finite outputs"):
        fit(model, data, data[:1], settings(batch_size=3, on_nan="stop"), tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.trainable_parameters())
    with pytest.raises(FloatingPointError, match=r"^clip0_1: expected"):
        evaluate(model.train(), data)
    assert model.training, "its mode is the caller's"


def test_sync_batch_norm_is_refused_for_several_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_join", lambda device: (0, 2))
    model, data = torch.nn.SyncBatchNorm.convert_sync_batchnorm(make_model()), make_clips(1)
    with pytest.raises(ValueError, match="expected BatchNorm of one process each, got SyncBatchNorm"):
        fit(model, data, data, settings(), tmp_path)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_leaves_clips_with_nan_out(tmp_path, batch_size):
    data = make_clips(3)
    bad = [*data[:1], data[1] | {"video": torch.full_like(data[1]["video"], float("nan"))}, *data[2:]]
    model, line = make_model(), "clip0_1: expected finite outputs, got NaN or infinity"
    found = evaluate(model, bad, batch_size=batch_size, on_nan="skip")
    assert found.scores == evaluate(model, [data[0], data[2]]).scores
    assert (found.skipped, found.clips, list(found.predictions)) == ((line,), 2, ["clip0_0", "clip0_2"])
    with pytest.warns(UserWarning, match=f"skipped {line}"):
        done = fit(model, data, bad, settings(epochs=2), tmp_path)
    assert (done.epochs, done.skipped) == (2, (line,))


def test_a_step_with_nan_is_skipped_and_named(tmp_path):
    data = make_clips(4)
    bad = [dict(clip) for clip in data]
    bad[1]["video"] = torch.full_like(bad[1]["video"], float("nan"))
    model, other = make_model(), make_model()
    with pytest.warns(UserWarning, match=r"skipped step \d: clip0_1: expected finite outputs") as caught:
        done = fit(model, bad, data, settings(batch_size=1, epochs=1), tmp_path / "bad")
    assert len([w for w in caught if "finite" in str(w.message)]) == 1
    assert done.steps == 4
    assert done.not_finite[0].endswith("clip0_1: expected finite outputs, got NaN or infinity")
    assert rows(tmp_path / "bad")[-1]["not_finite"] == list(done.not_finite)
    assert (done.skipped, rows(tmp_path / "bad")[-1]["skipped"]) == ((), [])
    longer = settings(batch_size=1, epochs=2)
    with pytest.warns(UserWarning, match="skipped"):
        again = fit(make_model(), bad, data, longer, tmp_path / "bad", resume=True)
    assert again.not_finite[0] == done.not_finite[0]
    assert len(again.not_finite) == 2
    # The state of a run that was begun before such steps were kept by themselves has none.
    path = tmp_path / "bad" / "last" / "state.safetensors"
    tensors, facts = load_file(path), json.loads(checkpoint.read_metadata(path)["run"])
    del facts["state"]["not_finite"]
    save_file(tensors, path, {"run": json.dumps(facts)})
    assert fit(make_model(), bad, data, longer, tmp_path / "bad", resume=True).not_finite == ()
    message = r"training: expected a step that is finite, got none of 1: step 1: clip0_1: expected finite outputs"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match=message):
        fit(make_model(), bad[1:2], data, settings(), tmp_path / "none")
    state = model.state_dict()
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point()), "BatchNorm's buffers too"
    # As if the clip had never been there, but for the order, which follows from the number of clips.
    step = int(done.not_finite[0].split()[1].rstrip(":")) - 1
    unreadable = [clip if i != 1 else BAD for i, clip in enumerate(data)]
    with pytest.warns(UserWarning, match="skipped"):
        fit(other, unreadable, data, settings(batch_size=1, epochs=1), tmp_path / "unreadable")
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    assert rows(tmp_path / "bad")[step]["loss"] == 0


def test_it_learns_selects_the_best_epoch_and_writes_the_logs(tmp_path, capsys):
    data = make_clips(6)
    model = make_model()
    before = evaluate(model, data)
    backbone = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    config = settings(epochs=15, lr_step=10, lr_gamma=0.5, patience=15)
    done = fit(model, data, data, config, tmp_path)

    log = rows(tmp_path)
    steps, epochs = [r for r in log if "step" in r], [r for r in log if "val_score" in r]
    assert (len(steps), len(epochs)) == (done.steps, done.epochs) == (45, 15)
    assert epochs[-1]["train_loss"] < 0.5 * epochs[0]["train_loss"]
    assert done.best_score >= max(0.9, before.score + 0.2)
    assert done.best_score == max(r["val_score"] for r in epochs)
    assert done.best_epoch == 1 + [r["val_score"] for r in epochs].index(done.best_score)
    assert [r["lr"] for r in steps[::3]] == [1e-3] * 10 + [5e-4] * 5
    assert all(torch.equal(tensor, backbone[name]) for name, tensor in model.backbone.state_dict().items())
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))

    best = Model.from_pretrained(tmp_path / "best", backbone=backbone)
    assert evaluate(best, data).score == done.best_score
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    assert lines[0].startswith("epoch 1/15  loss ")
    assert "clips/s" in lines[0]


def test_training_stops_without_improvement(tmp_path):
    data = make_clips(2)
    done = fit(make_model(), data, data, settings(epochs=20, patience=3, **STILL), tmp_path)
    assert (done.epochs, done.best_epoch) == (4, 1)


@pytest.mark.parametrize("narrow", ["bf16", "fp16"])
def test_narrow_types(tmp_path, monkeypatch, narrow):
    monkeypatch.setattr("lavish_fast.step.LOSS_SCALE", 2.0**8)  # without an overflow
    data, curves = make_clips(4), []
    for amp in (None, narrow):
        model = make_model()
        fit(model, data, data, settings(epochs=4, amp=amp), tmp_path / str(amp))
        curves.append([row["train_loss"] for row in rows(tmp_path / str(amp)) if "train_loss" in row])
    assert curves[1] == pytest.approx(curves[0], rel=0.1)
    assert curves[1] != curves[0]
    assert curves[1][-1] < 0.5 * curves[1][0]
    assert all(p.dtype == torch.float32 for _, p in model.trainable_parameters())
    exact, rounded = evaluate(model, data), evaluate(model, data, amp=narrow)
    pairs = [(exact.predictions[name], rounded.predictions[name]) for name in exact.predictions]
    assert all(torch.allclose(a, b, atol=0.05) and not torch.equal(a, b) for a, b in pairs)


def test_overflows_are_counted_and_the_scale_comes_back(tmp_path, monkeypatch):
    # 2^30 is too much for float16's gradients: some steps go by until it is halved often enough.
    monkeypatch.setattr("lavish_fast.step.LOSS_SCALE", 2.0**30)
    data, config = make_clips(4), settings(epochs=6, batch_size=1, amp="fp16", patience=6)
    model, again = make_model(), make_model(seed=7)
    fit(model, data, data, config, tmp_path / "whole")
    state = checkpoint.read_tensors(tmp_path / "whole" / "last" / "state.safetensors")
    count = rows(tmp_path / "whole")[-1]["overflows"]
    assert 2 < count < 24
    assert (state["scaler.scale"], state["scaler.growth"]) == (2.0 ** (30 - count), 24 - count)
    assert not rows(tmp_path / "whole")[-1]["skipped"]

    fit(make_model(), data, data, replace(config, epochs=2), tmp_path / "parts")
    monkeypatch.setattr("lavish_fast.step.LOSS_SCALE", 1.0)
    fit(again, data, data, config, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    path = tmp_path / "parts" / "last" / "state.safetensors"
    tensors, metadata = load_file(path), checkpoint.read_metadata(path)
    save_file({name: t for name, t in tensors.items() if not name.startswith("scaler.")}, path, metadata)
    with pytest.raises(ValueError, match=r"state\.safetensors: loss scale: expected \['growth', 'scale'\], got \[\]"):
        fit(again, data, data, replace(config, epochs=7), tmp_path / "parts", resume=True)


def test_gradients_that_are_not_finite_without_a_scale(tmp_path, monkeypatch):
    data, model, steps = make_clips(2), make_model(), training._Steps(2, settings(), 0, 1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr(ave, "loss", lambda p, labels: 1e38 * p.log().square().mean())
    with pytest.warns(UserWarning, match="skipped step 1: expected finite gradients, got NaN or infinity"):
        training._Run(model, settings(), steps, tmp_path, CPU).step([tasks.collate(data)])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(FloatingPointError, match=r"^expected finite gradients, got NaN or infinity$"):
        training._Run(model, settings(on_nan="stop"), steps, tmp_path, CPU).step([tasks.collate(data)])


@pytest.mark.filterwarnings("ignore:skipped step")
def test_recorded_and_checkpointed_runs_are_the_same(tmp_path, monkeypatch):
    data, config = make_clips(7), settings(epochs=3, batch_size=2, accumulate=2)
    data[2]["video"] = torch.full_like(data[2]["video"], float("nan"))
    val, models = make_clips(2, seed=1), [make_model() for _ in range(3)]
    fit(models[0], data, val, config, tmp_path / "plain")
    fit(models[1], data, val, replace(config, checkpointing=True), tmp_path / "checkpointed")
    recordings = record_on_cpu(monkeypatch)
    # F.one_hot reads its argument on the host, but for a GPU's.
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda x, count: x[:, None] == torch.arange(count))
    fit(models[2], data, val, config, tmp_path / "recorded")
    assert len(recordings) == 2
    for other, name in zip(models[1:], ("checkpointed", "recorded")):
        assert losses(tmp_path / name) == losses(tmp_path / "plain")
        assert all(torch.equal(t, other.state_dict()[key]) for key, t in models[0].state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("amp", "compiled"), [("bf16", True), ("fp16", False)])
def test_steps_of_a_gpu_are_captured(tmp_path, monkeypatch, amp, compiled):
    data, graphs = make_clips(5), []
    if not compiled:
        monkeypatch.setattr(runtime, "_compile", lambda *given: None)
    data[1]["video"] = torch.full_like(data[1]["video"], float("nan"))
    monkeypatch.setattr("lavish_fast.graphs.record", lambda *given: graphs.append(record(*given)) or graphs[-1])
    with pytest.warns(UserWarning, match="clip0_1: expected finite outputs"):
        done = training.fit(make_model(), data, data[2:], settings(epochs=6, batch_size=1, amp=amp), tmp_path)
    assert len(graphs) == 2
    assert done.steps == 30
    curve = [row["train_loss"] for row in rows(tmp_path) if "train_loss" in row]
    assert curve[-1] < 0.7 * curve[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_used_where_there_is_one(tmp_path):
    data, models = make_clips(4), [make_model(), make_model()]
    fit(models[0], data, data, settings(epochs=2), tmp_path / "cpu")
    for epochs, resume in ((1, False), (2, True)):
        training.fit(models[1], data, data, settings(epochs=epochs), tmp_path / "gpu", resume=resume)
    assert next(models[1].parameters()).is_cuda
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)
    assert all(p.device.type == "cpu" for p in training.evaluate(models[1], data).predictions.values())
    data[0]["video"] = data[0]["video"] * float("nan")
    with pytest.raises(FloatingPointError, match="clip0_0"):
        training.evaluate(models[1], data)


def test_evaluation_does_not_depend_on_the_batch_size():
    data, model = make_clips(7), make_model().train()
    results = [evaluate(model, data, batch_size=size) for size in (1, 2, 3, 7)]
    assert model.training
    assert len({tuple(r.scores.items()) for r in results}) == 1
    assert results[0].scores["total"] == 7 * SECONDS
    labels = {clip["id"]: clip["labels"] for clip in data}
    for result in results:
        assert result.predictions.keys() == labels.keys()
        assert result.scores["correct"] == sum(
            int((p.argmax(-1) == labels[i]).sum()) for i, p in result.predictions.items()
        )
        for name, p in result.predictions.items():
            torch.testing.assert_close(p, results[0].predictions[name])
    assert evaluate(model, data, metric=ave.Metric("cmbs")).scores["total"] == 7 * SECONDS
    with pytest.raises(ValueError, match="rule: expected one of argmax, cmbs, got 'mean'"):
        evaluate(model, data, metric=ave.Metric("mean"))


def test_a_bar_of_the_callers_is_used(tmp_path, capsys):
    seen = []

    class Watched(Progress):
        def update(self, task_id, **fields):
            seen.append(fields.get("description"))
            super().update(task_id, **fields)

    data = make_clips(2)
    with Watched(disable=True) as bar:
        fit(make_model(), data, data, settings(epochs=2), tmp_path, progress=bar)
        assert not bar.tasks
    assert [text[:9] for text in seen if text] == ["epoch 1/2", "epoch 2/2"]
    assert "best val" in seen[-1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("epochs", 1.5),
        ("lr", 0.0),
        ("head_lr", float("nan")),
        ("lr_gamma", -1),
        ("accumulate", True),
        ("patience", 0),
        ("amp", "fp8"),
        ("checkpointing", 1),
        ("seed", -1),
        ("seed", 2**32),
        ("workers", None),
        ("save_every", 0),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got"):
        replace(TrainConfig(), **{name: value})
