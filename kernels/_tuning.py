"""Launch constants as plain data. `python -m benchmarks tune` measures on the card at hand and prints rows to paste.

DEFAULTS: by op, for any card from sm_80 on (99 KiB of shared memory): rows tried in order, the first whose `bytes`
(of an element) and `width` are both at least the tensor's. ROWS: measured, by (op, architecture, dtype, width).
"""

from __future__ import annotations

from typing import Any

import torch

# A row for each kernel that holds rows: these are of different needs.
ADAPTER_TRAINING = tuple(f"adapter_training_{kernel}" for kernel in ("down", "up", "bwd_up", "bwd_down"))
_FORWARD = [
    {"bytes": 2, "width": 192, "BLOCK_N": 64, "CHUNK": 32, "BLOCK_D": 64, "num_warps": 8},
    {"bytes": 2, "width": 384, "BLOCK_N": 16, "CHUNK": 64, "BLOCK_D": 64, "num_warps": 8},
    {"bytes": 2, "width": 768, "BLOCK_N": 16, "CHUNK": 128, "BLOCK_D": 64, "num_warps": 8},
    {"bytes": 2, "width": 2048, "BLOCK_N": 16, "CHUNK": 128, "BLOCK_D": 32, "num_warps": 8},
    {"bytes": 4, "width": 384, "BLOCK_N": 16, "CHUNK": 32, "BLOCK_D": 64, "num_warps": 8},
    {"bytes": 4, "width": 2048, "BLOCK_N": 16, "CHUNK": 64, "BLOCK_D": 64, "num_warps": 8},
]
_BACKWARD = [
    {"bytes": 2, "width": 192, "BLOCK_N": 16, "CHUNK": 64, "BLOCK_D": 64, "num_warps": 4},
    *_FORWARD[1:],
]

DEFAULTS: dict[str, list[dict[str, Any]]] = {
    "adapter": [  # width: of the stream, C
        {"bytes": 2, "width": 192, "BLOCK_N": 64, "CHUNK": 32, "BLOCK_D": 64, "num_warps": 8},
        {"bytes": 2, "width": 384, "BLOCK_N": 16, "CHUNK": 64, "BLOCK_D": 64, "num_warps": 8},
        {"bytes": 2, "width": 768, "BLOCK_N": 16, "CHUNK": 128, "BLOCK_D": 64, "num_warps": 8},
        {"bytes": 2, "width": 2048, "BLOCK_N": 16, "CHUNK": 128, "BLOCK_D": 128, "num_warps": 8},
        {"bytes": 4, "width": 192, "BLOCK_N": 16, "CHUNK": 32, "BLOCK_D": 64, "num_warps": 4},
        {"bytes": 4, "width": 2048, "BLOCK_N": 16, "CHUNK": 64, "BLOCK_D": 64, "num_warps": 8},
    ],
    **dict.fromkeys(ADAPTER_TRAINING[:2], _FORWARD),  # width: as of adapter
    **dict.fromkeys(ADAPTER_TRAINING[2:], _BACKWARD),
    "gather_latents": [
        {"bytes": 2, "width": 2048, "most_tokens": 256, "chunk": 18432, "num_warps": 4, "num_stages": 3},
        {"bytes": 4, "width": 2048, "most_tokens": 192, "chunk": 5120, "num_warps": 4, "num_stages": 3},
    ],
    "gather_latents_bwd": [  # most_tokens: the forward's too, where there will be a backward
        {"bytes": 2, "width": 2048, "most_tokens": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2},
        {"bytes": 4, "width": 2048, "most_tokens": 192, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2},
    ],
    "window_attention": [  # width: tokens of a window, twice for heads wider than 32
        {"bytes": 2, "width": 144, "BLOCK_M": 16, "BLOCK_N": 128, "RELOAD": False, "programs": 1440, "num_warps": 1},
        {"bytes": 2, "width": 256, "BLOCK_M": 16, "BLOCK_N": 32, "RELOAD": True, "programs": 1440, "num_warps": 2},
        {"bytes": 2, "width": 288, "BLOCK_M": 32, "BLOCK_N": 64, "RELOAD": True, "programs": 720, "num_warps": 2},
        {"bytes": 4, "width": 256, "BLOCK_M": 16, "BLOCK_N": 32, "RELOAD": True, "programs": 720, "num_warps": 4},
        {"bytes": 4, "width": 288, "BLOCK_M": 16, "BLOCK_N": 16, "RELOAD": True, "programs": 720, "num_warps": 4},
    ],
    "window_attention_bwd": [  # width: as of window_attention
        {"bytes": 2, "width": 48, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1},
        {"bytes": 2, "width": 144, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1},
        {"bytes": 2, "width": 288, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 2},
        {"bytes": 4, "width": 144, "BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8},
    ],
}

ROWS: dict[tuple[str, int, str, int], dict[str, Any]] = {
    # On an H200: 0.4308 ms, 0.5693 before.
    ("adapter", 90, "bfloat16", 192): {"BLOCK_N": 16, "CHUNK": 64, "BLOCK_D": 64, "num_warps": 4, "maxnreg": 80},
    # On an H200: 0.1546 ms, 0.1907 before.
    ("adapter", 90, "bfloat16", 768): {"BLOCK_N": 16, "CHUNK": 128, "BLOCK_D": 64, "num_warps": 8, "maxnreg": 128},
}

# What tuning tries: every combination of an op's values.
CANDIDATES: dict[str, dict[str, tuple]] = {
    "adapter": {
        "BLOCK_N": (16, 32),
        "CHUNK": (64, 128),
        "BLOCK_D": (64,),
        "num_warps": (4, 8),
        "maxnreg": (None, 128, 80),  # registers a thread: fewer, and more programs an SM, for a few spills
    },
    **{
        op: {
            "BLOCK_N": (16, 32),
            "CHUNK": (64, 128),
            "BLOCK_D": (64,),
            "num_warps": (4, 8, 16),
            "maxnreg": (None, 128),
        }
        for op in ADAPTER_TRAINING
    },
    "gather_latents": {
        "most_tokens": (64, 128, 256),
        "chunk": (9216, 18432),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    "gather_latents_bwd": {
        "most_tokens": (64, 128, 256),
        "BLOCK_D": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2),
    },
    "window_attention": {
        "BLOCK_M": (16, 32, 64),
        "BLOCK_N": (32, 64, 128),
        "RELOAD": (False, True),
        "programs": (1440,),
        "num_warps": (1, 2, 4),
    },
    "window_attention_bwd": {
        "BLOCK_M": (16, 32),
        "BLOCK_N": (16, 32, 128),
        "num_warps": (1, 2, 4),
    },
}


def row(op: str, architecture: int, dtype: torch.dtype, width: int) -> tuple[dict[str, Any], str]:
    """The constants for a tensor of this type and width, and where they come from: "measured ..." or "default ..."."""
    name = str(dtype).removeprefix("torch.")
    if (measured := ROWS.get((op, architecture, name, width))) is not None:
        return dict(measured), f"measured on sm_{architecture}, {name}, width {width}"
    for entry in DEFAULTS[op]:
        if entry["bytes"] >= dtype.itemsize and entry["width"] >= width:
            constants = {key: value for key, value in entry.items() if key not in ("bytes", "width")}
            return constants, f"default up to width {entry['width']}"
    raise KeyError(f"{op}: no default for {name} of width {width}")
