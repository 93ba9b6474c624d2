"""A stand-in for CUDA graphs on a CPU: ops that run again on the tensors of the first run, without their Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavish_fast import graphs, step


class Recording(TorchDispatchMode):
    """The ops of a function. Unlike a capture the recording runs them, so that the first replay does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor is read on the host"
        outputs = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, outputs))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for function, args, kwargs, outputs in self.calls:
            given = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for static, x in zip(tree_leaves(outputs), tree_leaves(function(*args, **kwargs))):
                if isinstance(static, Tensor) and _place(static) not in given:
                    static.copy_(x)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Lets `TrainingStep` record where it would capture. Returns the recordings, in order."""
    recordings: list[Recording] = []

    def record(function: Callable[[], None], stream: Any, pool: Any) -> Recording:
        recordings.append(Recording())
        with recordings[-1]:
            function()
        return recordings[-1]

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(step, "captures", lambda network, cuda_graphs: cuda_graphs is not False)
    return recordings
