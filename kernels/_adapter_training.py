"""What the kernels of an adapter's training share: tiles that they read alike, and how tokens are shared out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from lavish_fast.kernels import adapter
from lavish_fast.kernels._launch import Launch
from lavish_fast.kernels._tiles import Norm, columns
from lavish_fast.kernels._weights import NORMS, Eps, Weights
from torch import Tensor

TOKENS = 64  # at least, of a program of those that share a stream's
SHARERS = 256  # programs at most that share a stream's tokens


@triton.jit
def alone(tile):
    """The same tile, as a sum of one. Else what is made of it on its way into a product is made where every warp has
    all of a factor, and of parameters that go through shared memory one by one."""
    return tl.sum(tile[None, :, :], 0).to(tile.dtype)


@triton.jit
def load_bottleneck(rows, mask_n, GROUPS: tl.constexpr, D_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tensor with D numbers a token: for each group its tiles (BLOCK_N, BLOCK_D)."""
    PARTS: tl.constexpr = (D_G + BLOCK_D - 1) // BLOCK_D
    tiles = ()
    for i in tl.static_range(GROUPS * PARTS):
        offs_d = i % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
        tile = tl.load(rows + i // PARTS * D_G + offs_d[None, :], mask=mask_n & (offs_d < D_G)[None, :], other=0.0)
        tiles += (alone(tile),)
    return tiles


@triton.jit
def of_dout(tiles, t: tl.constexpr, rows, stride_c, mask_n, C_G: tl.constexpr, CHUNK: tl.constexpr):
    """Tile t of dout, float32. Where registers allow it, all are there: one by one, each would wait for memory."""
    if len(tiles) == 0:
        offs, mask_c = columns(t, C_G, CHUNK)
        return load(rows, stride_c, mask_n, offs, mask_c)
    else:
        return tiles[t].to(tl.float32)


@triton.jit
def load(rows, stride_c, mask_n, offs, mask_c):
    """One tile, float32."""
    return tl.load(rows + offs[None, :] * stride_c, mask=mask_n & mask_c[None, :], other=0.0).to(tl.float32)


# A LayerNorm y = w x̂ + b, x̂ = (x - mean) / s, over C channels: with v = w dy, dx = (v - avg(v) - x̂ avg(v x̂)) / s.
@triton.jit
def layer_norm_bwd(v, xhat, rstd, average, slope):
    return rstd[:, None] * (v - average[:, None] - xhat * slope[:, None])


class Shared(NamedTuple):
    """What the launches of one step have in common. constants: as `adapter.tiling` has them, with STREAMS and EPS."""

    images: int
    N: int
    weights: tuple[Weights, ...]
    constants: dict[str, Any]

    @property
    def blocks(self) -> int:
        """Of tokens of an image."""
        return triton.cdiv(self.N, self.constants["BLOCK_N"])

    @property
    def programs(self) -> int:
        return self.constants["STREAMS"] * self.images * self.blocks

    def sharers(self, itemsize: int) -> int:
        """Programs that share a stream's tokens in `_adapter_bwd_sums`: with those for all channels and streams some
        thousand at most, which fills a card a few times."""
        groups, R = self.constants["GROUPS"], self.images * self.N
        tiles = groups * triton.cdiv(self.constants["C"] // groups, 128 // itemsize)
        return triton.cdiv(R, shared_out(R, 1024 // (tiles * self.constants["STREAMS"])))

    def launch(self, kernel: Any, args: tuple, **constants: int) -> Launch:
        """A program for each block of tokens."""
        return Launch(kernel, (self.programs,), args, self.constants | constants)


def shared_by(
    op: str,
    xs: Sequence[Tensor],
    weights: Sequence[Weights],
    post_norm: Norm | None,
    eps: Sequence[float],
    architecture: int,
) -> Shared:
    """op: whose tuning rows."""
    n, N, C = xs[0].shape
    D, channels = weights[0].down.shape
    norms = *(getattr(weights[0], name) for name in NORMS), post_norm
    constants = adapter.tiling(op, architecture, xs[0].dtype, N, C, D, C // channels) | {"STREAMS": len(xs)}
    constants["EPS"] = Eps(*(None if norm is None else value for norm, value in zip(norms, eps)))
    filled = (w._replace(**{name: getattr(w, name) or kind() for name, kind in NORMS.items()}) for w in weights)
    return Shared(n, N, tuple(w._replace(gate_av=None, gate=None) for w in filled), constants)


def shared_out(R: int, sharers: int = SHARERS) -> int:
    """Tokens of a program of those, `sharers` at most, that share a stream's R."""
    return TOKENS * triton.cdiv(max(triton.cdiv(R, max(sharers, 1)), 1), TOKENS)


def bound(tokens: int, like: Tensor) -> int | tl.constexpr:
    """That of a kernel's loop. The interpreter, which runs on a CPU, takes none that it does not know."""
    return tl.constexpr(tokens) if like.is_cpu else tokens
