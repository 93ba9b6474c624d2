"""Builds a kernel file's launches for cards that are not here, and prints what came out, a line of JSON each.

    python tests/build_kernels.py gather_latents 80 90

Without architectures for all three. For sm_90 every case is built, for sm_80 and sm_86, whose code differs in the
allocation of registers alone, every other one: a case costs seconds, of the adapter's training half a minute.

A process of its own, since Triton's interpreter and its compiler exclude each other in one.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

ARCHITECTURES = (80, 86, 90)
_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Card:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def unset(sass: str) -> list[str]:
    """Uniform registers that are read before anything sets them, with the first instruction that does.

    ptxas 12.8 has some such where it derives the descriptors of several matrix products, which then read other memory.
    """
    written, found = set(), {}
    for text in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", sass):
        opcode, _, operands = text.partition(" ")
        wide = 4 if ".128" in opcode else 2 if re.search(r"\.64|\.WIDE", opcode) else 1
        target = re.match(r"\s*UR(\d+)\b", operands) if re.match(r"U|R2UR|S2UR|VOTEU|REDUX", opcode) else None
        if target:
            operands = operands[target.end() :]
        for what, number in re.findall(r"(gdesc\[|desc\[)?UR(\d+)\b", operands):
            span = range(2 if what or (".64" in opcode and opcode.startswith("U")) else 1)
            if what == "gdesc[":  # of both factors, or of the second alone where the first is in registers
                span = range(2 if re.match(r"\S+ R\d", operands) else 0, 4)
            for i in span:
                if int(number) + i not in written:
                    found.setdefault(int(number) + i, text)
        if target:
            written |= {int(target[1]) + i for i in range(wide)}
    return [f"UR{number}: {found[number]}" for number in sorted(found)]


def overwritten(ttgir: str) -> list[str]:
    """Buffers in shared memory that a loop fills anew while a product of an earlier turn may still read them.

    Hopper's products run on while the warp goes on, and a loop waits until no more than some are under way. A buffer
    with so many places is free where that is less than the products of the turns since. Triton 3.6 counts them wrongly
    where what is loaded goes into a product and, in registers, into something else.
    """
    allocated = re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir)
    places = {name: int(number) for name, number in allocated}
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_index (%\w+)\[", ttgir))
    found, lines = {}, ttgir.splitlines()
    for i, line in enumerate(lines):
        if " scf.for " not in line:
            continue
        depth = len(line) - len(line.lstrip())
        end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(" " * depth + "}"))
        body = "\n".join(lines[i:end])
        products = re.findall(r"warp_group_dot (%\w+), (%\w+),[^\n]*isAsync = true", body)
        under_way = max(map(int, re.findall(r"pendings = (\d+)", body)), default=0)
        read = {views.get(name) for factors in products for name in factors}
        filled = {views.get(name) for name in re.findall(r"async_copy_global_to_local %\w+, (%\w+)", body)}
        for name in (read & filled) - {None}:
            if under_way > len(products) * (places[name] - 1):
                found[name] = f"{name}: {places[name]} of it, {under_way} of {len(products)} products under way"
    return sorted(found.values())


def _report(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([_TOOL, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "mma": len(re.findall(r"\b(?:HGMMA|HMMA)\b", sass)),
        "unset": unset(sass),
    }


def main(name: str, *architectures: str) -> None:
    module = importlib.import_module(f"lavish_fast.kernels.{name}")
    for architecture in map(int, architectures or ARCHITECTURES):
        triton.runtime.driver.set_active(Card(architecture))
        cases = list(module.builds(architecture))
        for case, launches in {80: cases[::2], 86: cases[1::2]}.get(architecture, cases):
            for launch in launches:
                built = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
                row = {"architecture": architecture, "case": case, "kernel": launch.kernel.fn.__name__}
                row |= {"shared": built.metadata.shared} | _report(built.asm["cubin"])
                row["overwritten"] = overwritten(built.asm["ttgir"])
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
