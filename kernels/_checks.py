"""Why a fused kernel cannot take these tensors, as a list of sentences; an empty list means that it can."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (8, 0)  # the compute capability that bfloat16 and the build tests begin at
# Both are settled once for a process, and torch.compile need not ask.
_INSTALLED = triton is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs its kernels in Python, on CPU tensors


def reasons(*tensors: Tensor | None, same_dtype: Sequence[Tensor] = (), differentiable: bool = False) -> list[str]:
    """What every kernel asks of its tensors.

    same_dtype: those of one type, the first of them the stream. differentiable: whether they may require gradients.
    """
    given = [t for t in tensors if t is not None]
    found = [] if _INSTALLED else ["expected triton to be installed, got none"]
    kinds = sorted({str(t.device) for t in given})
    allowed = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
    if any(t.device.type not in allowed for t in given):
        found.append(f"expected CUDA tensors, got {', '.join(kinds)}")
    elif len(kinds) > 1:
        found.append(f"expected tensors on one device, got {', '.join(kinds)}")
    elif given and given[0].is_cuda:
        card = torch.cuda.get_device_properties(given[0].device)  # which torch.compile takes as a constant
        if (card.major, card.minor) < _OLDEST:
            found.append(f"expected compute capability 8.0 or newer, got {card.major}.{card.minor}")
    names = sorted({str(t.dtype).removeprefix("torch.") for t in same_dtype})
    if len(names) > 1:
        found.append(f"expected tensors of one type, got {', '.join(names)}")
    elif same_dtype and same_dtype[0].dtype not in DTYPES:
        found.append(f"expected float32, float16 or bfloat16, got {names[0]}")
    if not differentiable and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        found.append("expected evaluation without gradients, got tensors that require them")
    return found


def trainable(frozen: dict[str, Tensor]) -> list[str]:
    """Which of the tensors, given by name, of which there is no gradient, require one."""
    asked = [name for name, t in frozen.items() if torch.is_grad_enabled() and t.requires_grad]
    return [f"{name}: expected a frozen tensor, got one that requires a gradient" for name in asked]


def misfits(expected: Sequence[tuple[str, Tensor, tuple[int, ...]]]) -> list[str]:
    """What is wrong with the type, shape or layout of tensors, given each with its name and the shape it should have.

    The last dimension must be contiguous, and a parameter (of two dimensions or fewer) as a whole.
    """
    found = []
    for name, t, shape in expected:
        if t.dtype not in DTYPES:
            found.append(f"expected {name} of float32, float16 or bfloat16, got {t.dtype}")
        if tuple(t.shape) != shape:
            found.append(f"expected {name} of shape {shape}, got {tuple(t.shape)}")
        elif t.stride(-1) != 1 or (t.ndim < 3 and not t.is_contiguous()):
            found.append(f"expected {name} with its last dimension contiguous, got strides {t.stride()}")
    return found
