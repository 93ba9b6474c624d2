"""`lavish-fast info`: what is installed here, and which path each op takes."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from lavish_fast.commands import terminal

if TYPE_CHECKING:
    from lavish_fast.ops import Choice


def info() -> None:
    """Show versions, devices, and the path that each op takes here and why."""
    from rich.table import Table

    from lavish_fast import __version__

    console = terminal.console()
    versions = {"lavish_fast": __version__, "python": sys.version.split()[0]}
    versions |= {name: _version(name) for name in ("torch", "torchaudio", "triton", "xformers", "timm", "av")}
    console.print(terminal.facts_table(versions, "versions"))
    console.print(terminal.facts_table(_devices(), "devices"))
    table = Table("op", "path", "why not fused", title="ops", title_justify="left", title_style="bold")
    for choice in _paths():
        table.add_row(choice.op, choice.path, "; ".join(choice.reasons))
    console.print(table)


def _version(name: str) -> str:
    import importlib
    import logging

    # A package whose extensions do not load may only log it; that is caught here, and shown beside the version.
    logged: list[str] = []
    catch = lambda record: logged.append(record.getMessage())  # noqa: E731
    logging.getLogger(name).addFilter(catch)
    try:
        version = getattr(importlib.import_module(name), "__version__", "unknown version")
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"cannot load: {terminal.one_line(error)}"
    except Exception as error:  # a library that does not load may raise anything
        return f"cannot load: {' '.join(str(error).split()) or type(error).__name__}"
    finally:
        logging.getLogger(name).removeFilter(catch)
    return version + "".join(f" ({' '.join(text.split())})" for text in logged[:1])


def _devices() -> dict[str, str]:
    import platform

    import torch

    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    devices = {"cpu": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
    return devices if len(devices) > 1 else devices | {"cuda": "none"}


def _paths() -> list[Choice]:
    """What each op chooses here in inference, on small tensors."""
    import torch

    from lavish_fast import ops
    from lavish_fast.adapter import BlockAdapters, LavishAdapter
    from lavish_fast.backbones.swin_v2 import Block, WindowAttention
    from lavish_fast.config import AdapterConfig

    width, heads, size = 96, 3, 6
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad(), ops.recording() as choices:
        block = Block(width, WindowAttention(width, heads, size, size, 0, 0), 1, 0.0).eval()
        adapters = BlockAdapters(
            {f"{stream}_p1": LavishAdapter(width, AdapterConfig()) for stream in ("audio", "video")}
        )
        x = torch.randn(1, size * size, width)
        ops.gather_latents(adapters["audio_p1"].latents, x)
        adapters.eval()(block, [x, x])
        ops.attention(x[None], x[None], x[None], 1.0)
    return list({choice.op: choice for choice in choices}.values())
