"""The latents L (m, C) gather from the other stream Y (n, N, C), for one direction or both in one launch.

    S = L + softmax(L Yᵀ) Y, (directions, n, m, C), taken transposed: Sᵀ = Lᵀ + Yᵀ softmax(Y Lᵀ), softmax over tokens

A program owns one direction, one image and one block of its tokens, and goes over the channels twice: for the block's
logits, then, from the last channels back to the first, for its product. The second time Y comes out of L2, where going
backwards meets first what was read last. Tokens and then channels are the rows of the products, so that Hopper's
64-row instruction takes Y from shared memory as it lies there, and only the few latents are padded, to 16.

A block is tiled by powers of two from 64 on, 144 tokens by 128 + 64; what that masks costs no bandwidth. If one block
covers N, it finishes S. Otherwise each writes its product, its largest logits and the sums of its weights, and a second
kernel merges them. Where N is split depends on the shape of one image and never on n: the same bits in any batch.

float32: logits, softmax, products, sums, and S until its one rounding. The weights are rounded to Y's type in between.
Tensors of float32 are summed in two levels, over a block of channels or a tile of tokens and then over those.

Least work: n N C elements read once, 4 m n N C operations. In 16 bits, with 144 tokens padded to 192 and m to 16, that
is 43 operations a byte, a fifth of what tensor cores do in a byte's time: bandwidth decides, first HBM's, then L2's.
Splitting adds 8 m C bytes a block, half written, half read: 3 % of Y in stage 1 with m = 2, 25 % with m = 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from lavish_fast.kernels import _checks, _launch, _tuning
from lavish_fast.kernels import gather_latents_bwd as backward
from lavish_fast.kernels._launch import Launch
from torch import Tensor

_LATENTS, _WIDTHS, _TOKENS = (1, 64), (48, 2048), (1, 4096)  # m, C and N, from and to
_NARROWEST = 192  # C in 16 bits on a card: at 96 sums were wrong, see `_tiling`, and have not been tried there since
_LOG2E = tl.constexpr(1.4426950408889634)


class Direction(NamedTuple):
    """L (m, C) and Y (n, N, C) as a kernel takes them; channels are contiguous."""

    latents_ptr: Tensor
    stride_l_m: int
    other_ptr: Tensor
    stride_y_n: int
    stride_y_t: int


@triton.jit
def _own(directions):
    """This program's direction: L, its stride, Y at this program's image, its stride, and the image's place in S."""
    latents_ptr, stride_l_m, other_ptr, stride_y_n, stride_y_t = directions[0]
    if len(directions) == 2:
        first = tl.program_id(2) == 0
        latents_ptr = tl.where(first, latents_ptr, directions[1][0])
        stride_l_m = tl.where(first, stride_l_m, directions[1][1])
        other_ptr = tl.where(first, other_ptr, directions[1][2])
        stride_y_n = tl.where(first, stride_y_n, directions[1][3])
        stride_y_t = tl.where(first, stride_y_t, directions[1][4])
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(2) * tl.num_programs(0).to(tl.int64) + image
    return latents_ptr, stride_l_m, other_ptr + image * stride_y_n, stride_y_t, place


@triton.jit
def _weigh(latents_ptrs, mask_m, other_ptr, stride_y_t, start, N, C: tl.constexpr, TILES: tl.constexpr):
    """One block's softmax: by tile, pointers to Y, masks and weights (TILES[i], M); largest logits and sums (M,)."""
    BLOCK_C: tl.constexpr = latents_ptrs.shape[0]
    M: tl.constexpr = latents_ptrs.shape[1]
    offs_c = tl.arange(0, BLOCK_C)
    other_ptrs, masks, logits = (), (), ()
    for i in tl.static_range(len(TILES)):
        offs_n = start + tl.arange(0, TILES[i])
        other_ptrs += (other_ptr + offs_n.to(tl.int64)[:, None] * stride_y_t + offs_c[None, :],)
        masks += ((offs_n < N)[:, None],)
        # Tokens beyond N are read as zeros, so their logits stay what they are here.
        logits += (tl.where(masks[i], tl.zeros([offs_n.shape[0], M], tl.float32), float("-inf")),)
        start += TILES[i]

    for c in range(0, C, BLOCK_C):
        mask_c = c + offs_c < C
        latents = tl.load(latents_ptrs + c, mask=mask_c[:, None] & mask_m, other=0.0)
        added = ()
        for i in tl.static_range(len(TILES)):
            y = tl.load(other_ptrs[i] + c, mask=masks[i] & mask_c[None, :], other=0.0)
            added += (backward.accumulate(y, latents, logits[i], masks[i]),)
        logits = added

    high = tl.full([M], float("-inf"), tl.float32)
    for i in tl.static_range(len(TILES)):
        high = tl.maximum(high, tl.max(logits[i], 0))
    total = tl.zeros([M], tl.float32)
    weights = ()
    for i in tl.static_range(len(TILES)):
        # Scaled after the subtraction, which is exact near the largest logit however large that is.
        weight = tl.exp2((logits[i] - high[None, :]) * _LOG2E)
        total += tl.sum(weight, 0)
        weights += (weight.to(other_ptr.dtype.element_ty),)
    return other_ptrs, masks, weights, high, total


@triton.jit
def _product(weights, other_ptrs, masks, c, mask_c, mask_m):
    """The channels from c on of Yᵀ times the weights, (BLOCK_C, M)."""
    product = tl.zeros([mask_c.shape[0], weights[0].shape[1]], tl.float32)
    for i in tl.static_range(len(weights)):
        y = tl.load(tl.trans(other_ptrs[i]) + c, mask=mask_c & tl.trans(masks[i]), other=0.0)
        product = backward.accumulate(y, weights[i], product, mask_c & mask_m)
    return product


@triton.jit
def _gather_latents_fwd(
    directions,
    s_ptr,  # (directions, n, m, C)
    m,
    N,
    C: tl.constexpr,
    M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S where one block covers the tokens of an image."""
    latents_ptr, stride_l_m, other_ptr, stride_y_t, place = _own(directions)
    offs_c = tl.arange(0, BLOCK_C)[:, None]
    offs_m = tl.arange(0, M)[None, :]
    mask_m = offs_m < m
    latents_ptrs = latents_ptr + offs_m.to(tl.int64) * stride_l_m + offs_c
    s_ptrs = s_ptr + (place * m + offs_m) * C + offs_c
    other_ptrs, masks, weights, _, total = _weigh(latents_ptrs, mask_m, other_ptr, stride_y_t, 0, N, C, TILES)
    last = (C - 1) // BLOCK_C * BLOCK_C
    for back in range(0, C, BLOCK_C):
        c = last - back
        mask_c = c + offs_c < C
        latents = tl.load(latents_ptrs + c, mask=mask_c & mask_m, other=0.0)
        product = _product(weights, other_ptrs, masks, c, mask_c, mask_m)
        tl.store(s_ptrs + c, latents + product / total[None, :], mask=mask_c & mask_m)


@triton.jit
def _gather_latents_split(
    directions,
    products_ptr,  # (directions, n, blocks, m, C) float32, as highs (directions, n, blocks, m) and totals
    highs_ptr,
    totals_ptr,
    m,
    N,
    C: tl.constexpr,
    M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One of several blocks of an image: what `_gather_latents_combine` merges."""
    latents_ptr, stride_l_m, other_ptr, stride_y_t, place = _own(directions)
    offs_c = tl.arange(0, BLOCK_C)[:, None]
    offs_m = tl.arange(0, M)[None, :]
    mask_m = offs_m < m
    latents_ptrs = latents_ptr + offs_m.to(tl.int64) * stride_l_m + offs_c
    start = tl.program_id(1) * BLOCK_N
    other_ptrs, masks, weights, high, total = _weigh(latents_ptrs, mask_m, other_ptr, stride_y_t, start, N, C, TILES)
    rows = (place * tl.num_programs(1) + tl.program_id(1)) * m + offs_m
    tl.store(highs_ptr + rows, high[None, :], mask=mask_m)
    tl.store(totals_ptr + rows, total[None, :], mask=mask_m)
    last = (C - 1) // BLOCK_C * BLOCK_C
    for back in range(0, C, BLOCK_C):
        c = last - back
        mask_c = c + offs_c < C
        product = _product(weights, other_ptrs, masks, c, mask_c, mask_m)
        tl.store(products_ptr + rows * C + c + offs_c, product, mask=mask_c & mask_m)


@triton.jit
def _gather_latents_combine(
    directions,
    products_ptr,
    highs_ptr,
    totals_ptr,
    s_ptr,
    saved,  # for the backward or None: largest logits and sums (directions, n, m), sums less L (directions, n, m, C)
    blocks,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One latent of one image: its blocks' products on the scale of the largest logit of all."""
    latents_ptr, stride_l_m, _, _, place = _own(directions)
    m, row = tl.num_programs(1), tl.program_id(1)
    offs_b = tl.arange(0, BLOCKS)
    offs_c = tl.arange(0, BLOCK_C)
    mask_b = offs_b < blocks
    rows = (place * blocks + offs_b) * m + row
    high = tl.load(highs_ptr + rows, mask=mask_b, other=float("-inf"))
    scale = tl.exp2((high - tl.max(high, 0)) * _LOG2E)
    total = tl.sum(scale * tl.load(totals_ptr + rows, mask=mask_b, other=0.0), 0)
    if saved is not None:
        tl.store(saved[0] + place * m + row, tl.max(high, 0))
        tl.store(saved[1] + place * m + row, total)
    for c in range(0, C, BLOCK_C):
        mask_c = c + offs_c < C
        product = tl.load(
            products_ptr + rows[:, None] * C + c + offs_c[None, :], mask=mask_b[:, None] & mask_c[None, :], other=0.0
        )
        gathered = tl.sum(scale[:, None] * product, 0) / total
        if saved is not None:
            tl.store(saved[2] + (place * m + row) * C + c + offs_c, gathered, mask=mask_c)
        latents = tl.load(latents_ptr + row.to(tl.int64) * stride_l_m + c + offs_c, mask=mask_c, other=0.0)
        tl.store(s_ptr + (place * m + row) * C + c + offs_c, latents + gathered, mask=mask_c)


def _tiles(N: int, most: int, largest: int) -> tuple[int, ...]:
    """The tiles of a block, for an even share of N of `most` tokens or fewer.

    They are powers of two from 64 to `largest`, the larger first, and as few as can be. None is below 64, where tensor
    cores take another instruction: Triton 3.6 gives the latents that both would read in one loop a buffer too few.
    """
    block = 64 * triton.cdiv(triton.cdiv(N, triton.cdiv(N, most)), 64)
    rest = block % largest
    below = tuple(1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1)
    return (largest,) * (block // largest) + below


def _tiling(m: int, N: int, C: int, dtype: torch.dtype, architecture: int, trained: bool) -> tuple[dict, dict]:
    """How a block's logits are taken, and the forward's other constants.

    trained: as the backward takes them too, for what the forward saves belongs to logits of the very same bits.
    """
    constants, _ = _tuning.row("gather_latents", architecture, dtype, C)
    # Tensor cores take 16 latents at once, which the forward's products of float32 have no use for.
    M = max(1 if dtype == torch.float32 and not trained else 16, triton.next_power_of_2(m))
    most = constants.pop("most_tokens")
    if trained:
        most = _tuning.row("gather_latents_bwd", architecture, dtype, C)[0]["most_tokens"]
    if trained or dtype == torch.float32:
        # Or logits and dP, of 4 M bytes a token each, do not fit into registers, nor do logits beside a product.
        most = min(most, 16384 // dtype.itemsize // M)
    # In float32 a tile is a sum of its own.
    tiles = _tiles(N, most, 64 if dtype == torch.float32 else 256)
    widest = constants.pop("chunk") // (sum(tiles) + M)
    # On sm_90 the ptxas of Triton 3.6, 12.8, has the second product's descriptors begin with a register that is set too
    # late or never, and wrong numbers and addresses follow: where the walks have one trip, and where tokens and
    # channels both come by 64. So blocks of 32 for up to 128 channels, and of fewer than C beyond.
    block_c = min(32 if C <= 128 else 1 << (C - 1).bit_length() - 1, 256, 1 << widest.bit_length() - 1)
    if dtype == torch.float32:
        # Sums in two levels err the least with as many terms in either. A product takes 16 at least.
        block_c = min(block_c, 16 if C < 512 else 32)
    constants["num_warps"] *= 2 if M * dtype.itemsize > 32 else 1
    return {"C": C, "M": M, "TILES": tiles, "BLOCK_C": block_c}, constants


def _is_split(other: Tensor, m: int) -> bool:
    """Whether several blocks share an image, so that its backward needs what only the forward sees as a whole."""
    tiling, _ = _tiling(m, *other.shape[1:], other.dtype, _launch.architecture(other.device), True)
    return other.shape[1] > sum(tiling["TILES"])


def launches(
    latents: Sequence[Tensor], others: Sequence[Tensor], s: Tensor, architecture: int, saved: Sequence[Tensor] = ()
) -> list[Launch]:
    """What fills s (directions, n, m, C), and `saved` where an image is split. Directions of one N share launches."""
    if others[0].shape[1] != others[-1].shape[1]:
        each = []
        for i in (slice(0, 1), slice(1, 2)):
            each += launches(latents[i], others[i], s[i], architecture, [t[i] for t in saved])
        return each
    (n, N, C), m = others[0].shape, latents[0].shape[0]
    tiling, constants = _tiling(m, N, C, others[0].dtype, architecture, len(saved) > 0)
    block = sum(tiling["TILES"])
    blocks = triton.cdiv(N, block)
    constants |= tiling
    directions = _directions(latents, others)
    if blocks == 1:
        return [Launch(_gather_latents_fwd, (n, 1, len(directions)), (directions, s, m, N), constants)]
    highs, totals = torch.empty(2, len(directions), n, blocks, m, dtype=torch.float32, device=s.device)
    products = torch.empty(len(directions), n, blocks, m, C, dtype=torch.float32, device=s.device)
    parts = (directions, products, highs, totals)
    constants["BLOCK_N"] = block
    padded = triton.next_power_of_2(blocks)
    chunk = min(triton.next_power_of_2(C), 4096 // padded)
    return [
        Launch(_gather_latents_split, (n, blocks, len(directions)), (*parts, m, N), constants),
        Launch(
            _gather_latents_combine,
            (n, m, len(directions)),
            (*parts, s, tuple(saved) or None, blocks),
            {"C": C, "BLOCKS": padded, "BLOCK_C": chunk, "num_warps": 4},
        ),
    ]


def _directions(latents: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Direction, ...]:
    return tuple(Direction(l, l.stride(0), y, y.stride(0), y.stride(1)) for l, y in zip(latents, others))


@torch.library.custom_op("lavish_fast::gather_latents", mutates_args=())
def _infer(latents: list[Tensor], others: list[Tensor]) -> Tensor:
    s = others[0].new_empty(len(others), others[0].shape[0], *latents[0].shape)
    _launch.run(launches(latents, others, s, _launch.architecture(s.device)), s.device)
    return s


@_infer.register_fake
def _(latents: list[Tensor], others: list[Tensor]) -> Tensor:
    return others[0].new_empty(len(others), others[0].shape[0], *latents[0].shape)


@torch.library.custom_op("lavish_fast::gather_latents_trained", mutates_args=())
def _train(latents: list[Tensor], others: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, *saved = _outputs(latents, others)
    _launch.run(launches(latents, others, s, _launch.architecture(s.device), saved), s.device)
    return s, *saved


@_train.register_fake
def _outputs(latents: list[Tensor], others: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S, and for the backward each latent's largest logit, sum of weights and P Y, if any image is split."""
    m, C = latents[0].shape
    directions, n = len(others), others[0].shape[0]
    kept = directions if any(_is_split(y, m) for y in others) else 0
    highs, totals = (others[0].new_empty(kept, n, m, dtype=torch.float32) for _ in range(2))
    gathered = others[0].new_empty(kept, n, m, C, dtype=torch.float32)
    return others[0].new_empty(directions, n, m, C), highs, totals, gathered


@torch.library.custom_op("lavish_fast::gather_latents_backward", mutates_args=())
def _backward(
    latents: list[Tensor],
    others: list[Tensor],
    ds: Tensor,
    saved: list[Tensor],
    of_latents: list[bool],
    of_others: list[bool],
) -> list[Tensor]:
    """The gradients asked for, dL (m, C) of each and then dY (n, N, C) of each."""
    architecture = _launch.architecture(ds.device)
    kinds = list(zip(of_latents, of_others, (y.shape[1] for y in others)))
    together = [slice(0, len(kinds))] if len(set(kinds)) == 1 else [slice(0, 1), slice(1, 2)]
    dlatents, dothers = [], []
    for i in together:
        summed, wanted, _ = kinds[i.start]
        if not summed and not wanted:
            continue
        dys = [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in others[i]] if wanted else None
        tiling, _ = _tiling(len(latents[0]), *others[i][0].shape[1:], ds.dtype, architecture, trained=True)
        kept = [t[i] for t in saved]
        launch, parts = backward.launch(
            _directions(latents[i], others[i]), ds[i], kept, dys, summed, tiling, architecture
        )
        _launch.run([launch], ds.device)
        if summed:
            dlatents += [part.sum((0, 1)).to(ds.dtype) for part in parts]
        dothers += dys or []
    return dlatents + dothers


@_backward.register_fake
def _(latents, others, ds, saved, of_latents, of_others):
    asked = [t for t, of in zip((*latents, *others), (*of_latents, *of_others)) if of]
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in asked]


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.directions = len(inputs[0])
    ctx.save_for_backward(*inputs[0], *inputs[1], *output[1:])


def _differentiate(ctx, ds, *_) -> tuple[list[Tensor | None], list[Tensor | None]]:
    needs, k = ctx.needs_input_grad, ctx.directions
    if ds is None:
        return [None] * k, [None] * k
    tensors = ctx.saved_tensors
    found = iter(_backward(tensors[:k], tensors[k : 2 * k], ds, tensors[2 * k :], *needs))
    return tuple([next(found) if need else None for need in of] for of in needs)


torch.library.register_autograd("lavish_fast::gather_latents_trained", _differentiate, setup_context=_save)


def gather_latents(latents: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """S[i] = L + softmax(L Yᵀ) Y of latents[i] (m, C) and others[i] (n, N_i, C), one or two of each.

    Returns (directions, n, m, C) in their type, differentiable once in all of them.
    Raises: ValueError with every reason why the kernel cannot take them.
    """
    if found := reasons(latents, others):
        raise ValueError("gather_latents: " + "; ".join(found))
    latents, others = list(latents), list(others)
    if torch.is_grad_enabled() and any(t.requires_grad for t in latents + others):
        return _train(latents, others)[0]
    return _infer(latents, others)


def reasons(latents: Sequence[Tensor], others: Sequence[Tensor]) -> list[str]:
    """Why the kernel cannot take these tensors; nothing if it can."""
    given = (*latents, *others)
    found = _checks.reasons(*given, same_dtype=(*others, *latents), differentiable=True)
    if not 1 <= len(latents) <= 2 or len(latents) != len(others):
        return [*found, f"expected one or two latents and as many others, got {len(latents)} and {len(others)}"]
    if any(l.ndim != 2 for l in latents) or any(y.ndim != 3 for y in others):
        shapes = ", ".join(str(tuple(t.shape)) for t in given)
        return [*found, f"expected latents (m, C) and others (n, N, C), got {shapes}"]
    (m, C), n = latents[0].shape, others[0].shape[0]
    for l in latents:
        if l.shape[0] != m or l.shape[1] != C:
            found.append(f"latents: expected {(m, C)}, got {tuple(l.shape)}")
    for y in others:
        if y.shape[0] != n or y.shape[2] != C:
            found.append(f"others: expected {n} images of {C} channels, got {tuple(y.shape)}")
    for name, tensors in (("latents", latents), ("others", others)):
        found += [
            f"{name}: expected contiguous channels, got strides {t.stride()}" for t in tensors if t.stride(-1) != 1
        ]
    tokens = [("N", y.shape[1], _TOKENS) for y in others]
    if others[0].is_cuda and others[0].element_size() == 2 and C < _NARROWEST:
        found.append(f"C: expected at least {_NARROWEST} in 16 bits on a card, where fewer gave wrong sums, got {C}")
    for name, size, (least, most) in (("m", m, _LATENTS), ("C", C, _WIDTHS), *tokens):
        if not least <= size <= most:
            found.append(f"{name}: expected {least} to {most}, got {size}")
    return found


def builds(architecture: int) -> Iterator[tuple[str, list[Launch]]]:
    """Every stage of the paper's preset and a ViT's block; the other types; the most and the fewest of everything."""
    stages = [(2304, 192), (576, 384), (144, 768), (36, 1536)]
    cases = [(torch.bfloat16, 2, *stage) for stage in stages]
    cases += [(torch.float16, 16, 197, 768), (torch.bfloat16, 64, 144, 768), (torch.bfloat16, 64, 4096, 2048)]
    cases += [(torch.bfloat16, 2, 36, 96), (torch.float16, 16, 97, 96), (torch.bfloat16, 2, 36, 48)]
    cases += [(torch.float32, 2, 144, 768), (torch.float32, 64, 4096, 2048), (torch.float32, 64, 2304, 192)]
    cases += [(torch.float32, 2, 36, 96), (torch.float32, 16, 577, 384), (torch.float32, 2, 300, 48)]
    for dtype, m, N, C in cases:
        latents = torch.empty(m, C, dtype=dtype, device="meta")
        other = torch.empty(20, N, C, dtype=dtype, device="meta")
        s = torch.empty(2, 20, m, C, dtype=dtype, device="meta")
        name = f"{str(dtype).removeprefix('torch.')} m={m} N={N} C={C}"
        saved = [torch.empty(2, 20, m, *more, device="meta") for more in ((), (), (C,))]
        tiling, _ = _tiling(m, N, C, dtype, architecture, trained=True)
        pair = _directions([latents] * 2, [other] * 2)
        differentiated, _ = backward.launch(pair, s, saved, [other] * 2, True, tiling, architecture)
        forms = (launches([latents] * 2, [other] * 2, s, architecture, kept) for kept in ((), saved))
        yield name, [*chain(*forms), differentiated]
