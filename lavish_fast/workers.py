"""Clips of many files, decoded in worker processes that may die without ending the run."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch

from lavish_fast.decoding import MediaError

if TYPE_CHECKING:
    import os

    from lavish_fast.media import Clip


def load_one(load: Callable[..., Clip], path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Clip | MediaError:
    try:
        return load(path, **kwargs)
    except MediaError as error:
        return error
    except Exception as error:  # one strange file must not end a run over thousands
        return MediaError(path, f"expected a clip, got {type(error).__name__}: {error}")


def _work(connection: Connection, load: Callable[..., Clip], kwargs: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    connection.send_bytes(b"")
    while True:
        try:
            path = connection.recv()
        except EOFError:
            return
        # Plain pickle: multiprocessing's own would pass tensors as shared memory, which dies with this process.
        connection.send_bytes(pickle.dumps(load_one(load, path, kwargs), protocol=5))


class _Slot:
    """A place in the order of results, empty until its file is done."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.result: Clip | MediaError | None = None


class _Worker:
    """A process that decodes one file at a time. A process of our own for each pipe tells who died, and of what."""

    def __init__(self, load: Callable[..., Clip], kwargs: dict[str, Any], timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.timeout = timeout
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_work, args=(child, load, kwargs), daemon=True)
        self.process.start()
        child.close()
        self.started = False
        self.slot: _Slot | None = None
        self.deadline = math.inf

    def give(self, slot: _Slot) -> None:
        self.slot = slot
        if self.started:
            self.deadline = time.monotonic() + self.timeout
        with suppress(OSError):  # a worker that died between two files: `take` finds the end of the pipe
            self.connection.send(slot.path)

    def take(self) -> bool:
        """Reads what has come. False once the process is gone."""
        assert self.slot is not None
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):
            self.stop()
            code = self.process.exitcode or 0
            if not self.started:
                raise RuntimeError(
                    f"load_clips: expected a worker process to start, got exit code {code}; "
                    "a script needs `if __name__ == '__main__':` around its call, or workers=0"
                ) from None
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.slot.result = MediaError(self.slot.path, f"expected a clip, got a decoder that died ({cause})")
            return False
        if message:
            self.slot.result, self.slot, self.deadline = pickle.loads(message), None, math.inf
        else:
            self.started = True
            self.deadline = time.monotonic() + self.timeout
        return True

    def give_up(self) -> None:
        assert self.slot is not None
        self.slot.result = MediaError(self.slot.path, f"expected a clip within {self.timeout:g} s, got none")
        self.stop(kill=True)

    def stop(self, kill: bool = False) -> None:
        self.connection.close()
        if kill:
            self.process.kill()
        self.process.join()


def load_in_workers(
    paths: Iterator[str | os.PathLike[str]],
    workers: int,
    timeout: float,
    load: Callable[..., Clip],
    kwargs: dict[str, Any],
) -> Iterator[tuple[str | os.PathLike[str], Clip | MediaError]]:
    crew: list[_Worker] = []
    slots: deque[_Slot] = deque()
    try:
        while True:
            while len(slots) < 2 * workers:
                worker = next((w for w in crew if w.slot is None), None)
                if worker is None and len(crew) == workers:
                    break
                path = next(paths, None)
                if path is None:
                    break
                if worker is None:
                    worker = _Worker(load, kwargs, timeout)
                    crew.append(worker)
                slots.append(_Slot(path))
                worker.give(slots[-1])
            if not slots:
                return
            if (first := slots[0]).result is not None:
                slots.popleft()
                yield first.path, first.result
                continue
            busy = {w.connection: w for w in crew if w.slot is not None}
            left = min(w.deadline for w in busy.values()) - time.monotonic()
            for connection in wait(list(busy), timeout=None if left == math.inf else max(0.0, left)):
                if not busy[connection].take():
                    crew.remove(busy[connection])
            for late in [w for w in crew if w.slot is not None and w.deadline < time.monotonic()]:
                late.give_up()
                crew.remove(late)
    finally:
        for worker in crew:
            worker.stop(kill=True)
