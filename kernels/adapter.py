"""One residual step of a block with its adapters, in evaluation: one or two streams in one launch.

    X'  = X + g_av softmax(X Sᵀ) S
    out = X + PostNorm(B) + g LN_after(BN2(up(ReLU(BN1(down(LN_before(X')))))))

X, B, out (n, N, C): the stream, the frozen branch before its post-norm, the result; S (n, m, C): the gathered latents;
down (D, C / G), up (C, D / G): products by group. S, every norm and g may be absent. Each stream has its own S and
weights; the post-norm is the frozen block's, one for both. BatchNorms go by their running statistics.

A program owns BLOCK_N tokens of one image of one stream and holds their rows whole, in registers (see _tiles.py): the
logits X Sᵀ, X' and its norm, down; then up, its norm, and the sum. 12288 to 24576 numbers of a stream are what a
program holds, so few tokens of wide streams, and its products are of 16 rows at least.

float32: logits, softmax, X', statistics, norms, gates, the sum. Rounded to the streams' type: softmax(X Sᵀ), what goes
into down and into up, and out. Variances are of differences to the mean, so that a large mean costs no digits.

Bytes: device memory gives X and B and takes out once each, 6 C a token in 16 bits, the least. L2 gives X and,
where there is a post-norm, B once more for the sum and, to BLOCK_N tokens together, 4 C D / G of weights and 4 C m of
S: 13 KB a token at C = 768, D / G = 48, BLOCK_N = 16, which is as long on its way from L2 as the streams from device
memory.
FLOPs: 4 C m + 4 C D / G a token, with D / G, and m beyond FEW, padded to powers of two from 16 on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from lavish_fast.kernels import _checks, _launch, _tuning
from lavish_fast.kernels._tiles import (
    BatchNorm,
    Norm,
    block,
    bottleneck,
    chunk,
    down_product,
    finish,
    gate_of,
    is_wide,
    load_tiles,
    moments,
    place,
    seen,
    softmax_of_latents,
    token_rows,
)
from lavish_fast.kernels._weights import NORMS, Eps, Weights, mismatches, tensors, unflattened
from torch import Tensor

_WIDEST = {2: 1536, 4: 768}  # channels whose rows fit in registers, by bytes of an element
_BOTTLENECK = 384


@triton.jit(do_not_specialize=["images"])
def _adapter_fwd(
    out_ptr,
    xs,
    branches,
    summaries_ptr,
    gates_av,
    weights,
    gates,
    post_norm,
    x_strides,
    branch_strides,
    stride_s_stream,
    stride_s_n,
    stride_s_m,
    images,
    N,
    C: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    GROUPS: tl.constexpr,
    STREAMS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    C_G: tl.constexpr = C // GROUPS
    D_G: tl.constexpr = D // GROUPS
    TILES: tl.constexpr = GROUPS * ((C_G + CHUNK - 1) // CHUNK)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    stream, image, offs_n = place(images, N, BLOCK_N)
    # Pointers are chosen, not code: both streams run the same instructions.
    w = weights[0]
    if stream == 1:
        w = weights[STREAMS - 1]
    gate_av = tl.where(stream == 0, gate_of(gates_av[0]), gate_of(gates_av[STREAMS - 1]))
    gate = tl.where(stream == 0, gate_of(gates[0]), gate_of(gates[STREAMS - 1]))
    mask_n = (offs_n < N)[:, None]
    x_rows = token_rows(xs, x_strides, stream, image, offs_n, STREAMS)
    branch_rows = token_rows(branches, branch_strides, stream, image, offs_n, STREAMS)
    out_rows = out_ptr + ((stream * images + image) * N + offs_n)[:, None] * C

    x = load_tiles(x_rows, 1, mask_n, TILES, C_G, CHUNK)
    s, p = None, None
    if summaries_ptr is not None:
        s = summaries_ptr + stream * stride_s_stream + image * stride_s_n, stride_s_m
        p = softmax_of_latents(x, s, M, C_G, BLOCK_N, BLOCK_M, CHUNK)
    x = seen(x, s, p, gate_av, M, C_G, BLOCK_M, CHUNK, dtype if is_wide(C, dtype) else tl.float32)
    mean, rstd = moments(x, None, mask_n, EPS.ln_before, C, C_G, BLOCK_N, CHUNK)
    h = down_product(x, mean, rstd, w, EPS, D, GROUPS, C_G, BLOCK_N, CHUNK, BLOCK_D, dtype)
    hidden = bottleneck(h, w.bn1, EPS.bn1, GROUPS, D_G, BLOCK_D, dtype)
    rows = out_rows, x_rows, branch_rows, mask_n
    finish(*rows, hidden, w, gate, post_norm, EPS, TILES, GROUPS, C, D, BLOCK_N, CHUNK, BLOCK_D)


def launches(
    out: Tensor,
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    summaries: Tensor | None,
    weights: Sequence[Weights],
    post_norm: Norm | None,
    eps: Sequence[float],
    architecture: int,
) -> list[_launch.Launch]:
    """The one launch."""
    streams, n, N, C = out.shape
    D, channels = weights[0].down.shape
    latents = 0 if summaries is None else summaries.shape[2]
    norms = *(getattr(weights[0], name) for name in NORMS), post_norm
    constants = tiling("adapter", architecture, out.dtype, N, C, D, C // channels)
    constants |= {"BLOCK_M": block(latents), "M": latents, "STREAMS": streams}
    constants["EPS"] = Eps(*(None if norm is None else value for norm, value in zip(norms, eps)))
    filled = [w._replace(**{name: getattr(w, name) or kind() for name, kind in NORMS.items()}) for w in weights]
    args = (
        out,
        tuple(xs),
        tuple(branches),
        summaries,
        tuple(w.gate_av for w in filled),
        tuple(w._replace(gate_av=None, gate=None) for w in filled),
        tuple(w.gate for w in filled),
        post_norm or Norm(),
        tuple(x.stride()[:2] for x in xs),
        tuple(b.stride()[:2] for b in branches),
        *((0, 0, 0) if summaries is None else summaries.stride()[:3]),
        n,
        N,
    )
    grid = (streams * n * triton.cdiv(N, constants["BLOCK_N"]),)
    return [_launch.Launch(_adapter_fwd, grid, args, constants)]


def tiling(op: str, architecture: int, dtype: torch.dtype, N: int, C: int, D: int, groups: int) -> dict:
    """What the launches of the adapters' kernels have in common; op: whose tuning rows."""
    constants, _ = _tuning.row(op, architecture, dtype, C)
    if not architecture:  # the interpreter, whose time goes by programs and tiles
        constants |= {"BLOCK_N": 64, "CHUNK": 128}
    constants["BLOCK_N"] = min(constants["BLOCK_N"], block(N))
    constants["BLOCK_D"] = chunk(D // groups, constants["BLOCK_D"])
    constants["CHUNK"] = chunk(C // groups, constants["CHUNK"])
    return constants | {"C": C, "D": D, "GROUPS": groups}


def reasons(
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    summaries: Tensor | None,
    weights: Sequence[Weights],
    post_norm: Norm | None,
) -> list[str]:
    """Why the kernel cannot take these tensors; an empty list when it can."""
    streams = [*xs, *branches, *([] if summaries is None else [summaries])]
    parameters = {f"weights[{i}].{name}": t for i, w in enumerate(weights) for name, t in tensors(w)}
    parameters |= {f"post_norm.{name}": t for name, t in (post_norm or Norm())._asdict().items()}
    parameters = {name: t for name, t in parameters.items() if t is not None}
    products = [product for w in weights for product in (w.down, w.up)]
    found = _checks.reasons(*streams, *parameters.values(), same_dtype=[*streams, *products])
    counts = len(xs), len(branches), len(weights)
    if counts not in ((1, 1, 1), (2, 2, 2)):
        return [*found, "expected xs, branches and weights of one or two streams, got {}, {} and {}".format(*counts)]
    dimensions = xs[0].ndim, weights[0].down.ndim, 4 if summaries is None else summaries.ndim
    if dimensions != (3, 2, 4):
        return [*found, "expected xs of 3, down of 2, summaries of 4 dimensions, got {}, {}, {}".format(*dimensions)]

    n, N, C = xs[0].shape
    D, channels = weights[0].down.shape
    groups = max(C // max(channels, 1), 1)
    if groups not in (1, 2, 4) or groups * channels != C or D % groups:
        found.append(f"expected 1, 2 or 4 groups of equal widths, got {C} channels and a down of {(D, channels)}")
    widest = _WIDEST.get(xs[0].element_size(), 0)
    if xs[0].is_cuda and widest < C:
        found.append(f"expected at most {widest} channels in {xs[0].dtype}, whose rows fit in registers, got {C}")
    if D > _BOTTLENECK:
        found.append(f"expected a bottleneck of at most {_BOTTLENECK}, got {D}")
    latents = 1 if summaries is None else summaries.shape[2]
    if not 1 <= latents <= 64:
        found.append(f"expected 1 to 64 latents, got {latents}")
    if summaries is not None and any(w.gate_av is None for w in weights):
        found.append("expected gate_av beside summaries, got none")
    found += mismatches(weights)
    norms = [norm for w in weights for norm in (w.bn1, w.bn2) if norm is not None]
    if any(norm.mean is norm.variance is None and norm.weight is not None for norm in norms):
        found.append("expected running statistics beside a BatchNorm's weight, got none")

    shapes = {"down": (D, channels), "up": (C, D // groups), "bn1": (D,), "gate_av": (1,), "gate": (1,)}
    expected = [
        (f"{name}[{i}]", t, (n, N, C)) for name, ts in (("xs", xs), ("branches", branches)) for i, t in enumerate(ts)
    ]
    expected += [] if summaries is None else [("summaries", summaries, (len(xs), n, latents, C))]
    expected += [(name, t, shapes.get(name.split(".")[1], (C,))) for name, t in parameters.items()]
    return found + _checks.misfits(expected)


def adapter(
    xs: Sequence[Tensor],
    branches: Sequence[Tensor],
    summaries: Tensor | None,
    weights: Sequence[Weights],
    post_norm: Norm | None,
    *,
    eps: Sequence[float],
) -> Tensor:
    """X + PostNorm(B) + g LN_after(...) of one or two streams: (streams, n, N, C), contiguous.

    Args:
        xs, branches: each stream's (n, N, C), channels contiguous, other strides at will.
        summaries: the latents that each stream reads, (streams, n, m, C), or None.
        weights: each stream's; down and up in the type of xs, the others in that or another.
        post_norm: the frozen block's, or None.
        eps: of LN_before, BN1, BN2, LN_after and the post-norm, some number for each that is absent.

    Raises: ValueError with all the `reasons`.
    """
    # Here, and not in the custom op, which is called with gradients off.
    if found := reasons(xs, branches, summaries, weights, post_norm):
        raise ValueError("adapter: " + "; ".join(found))
    flat = [t for w in weights for _, t in tensors(w)]
    present = [getattr(w, name) is not None for w in weights for name in NORMS] + [post_norm is not None]
    return _adapter(list(xs), list(branches), summaries, flat, list(post_norm or Norm()), present, list(eps))


@torch.library.custom_op("lavish_fast::adapter", mutates_args=())
def _adapter(
    xs: list[Tensor],
    branches: list[Tensor],
    summaries: Tensor | None,
    weights: list[Tensor | None],
    post_norm: list[Tensor | None],
    present: list[bool],
    eps: list[float],
) -> Tensor:
    flat, there = iter(weights), iter(present)
    streams = [unflattened(flat, there) for _ in range(len(present) // len(NORMS))]
    norm = Norm(*post_norm) if next(there) else None
    out = xs[0].new_empty(len(xs), *xs[0].shape)
    architecture = _launch.architecture(out.device)
    _launch.run(launches(out, xs, branches, summaries, streams, norm, eps, architecture), out.device)
    return out


@_adapter.register_fake
def _(xs, branches, summaries, weights, post_norm, present, eps):
    return xs[0].new_empty(len(xs), *xs[0].shape)


def builds(architecture: int) -> Iterator[tuple[str, list[_launch.Launch]]]:
    """What a machine without a card builds: the paper's stages in its two settings, and the extremes."""
    cases = [(torch.bfloat16, width, {}) for width in (192, 384, 768, 1536)]
    cases += [(torch.bfloat16, 768, {"reduction": 4, "latents": 16}), (torch.bfloat16, 768, {"norms": "folded"})]
    cases += [(torch.bfloat16, 768, {"norms": "none", "groups": 1}), (torch.float32, 192, {})]
    cases += [(torch.float32, 384, {}), (torch.float32, 768, {})]
    cases += [(torch.bfloat16, 768, {"latents": 64}), (torch.bfloat16, 1536, {"reduction": 4, "latents": 16})]
    for dtype, width, options in cases:
        name = " ".join(str(part) for part in (dtype, width, *(f"{k} {v}" for k, v in options.items())))
        yield name.removeprefix("torch."), _build(dtype, width, architecture, **options)


def _build(
    dtype: torch.dtype,
    width: int,
    architecture: int,
    *,
    reduction: int = 8,
    latents: int = 2,
    groups: int = 2,
    norms: str = "all",
) -> list[_launch.Launch]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n, N, D = 20, 110592 // width, width // reduction
    layer_norm, batch_norm = Norm(empty(width), empty(width)), lambda size: BatchNorm(*(empty(size) for _ in range(4)))
    down, up, gate = empty(D, width // groups), empty(width, D // groups), empty(1)
    w = Weights(gate, layer_norm, down, batch_norm(D), up, batch_norm(width), layer_norm, gate)
    if norms == "folded":
        w = w._replace(ln_before=Norm(), bn1=BatchNorm(bias=empty(D)), bn2=BatchNorm(bias=empty(width)), gate=None)
    elif norms == "none":
        w = w._replace(**dict.fromkeys(NORMS))
        layer_norm = None
    xs = [empty(n, N, width)] * 2
    summaries = empty(2, n, latents, width)
    return launches(empty(2, n, N, width), xs, xs, summaries, [w, w], layer_norm, (1e-5,) * 5, architecture)
