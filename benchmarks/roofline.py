"""The least work of a forward or a training step: FLOPs and bytes of every op, from the shapes alone.

FLOPs are those of matrix products and convolutions, 2 per multiply-add, as PyTorch's flop counter has them. Norms,
softmax and GELU have none; their bytes count.

Bytes take each op for one ideal kernel: inputs read once, outputs written once, weights read once a call. Both streams
are one batch for whatever is frozen (a ViT's streams, of unequal length, as rows of one matrix), so that frozen weights
are read once for both. What is computed row by row or element by element rides in the op that makes or loads its rows:
softmax, GELU, a ViT's norms and residual sums, the norms of patch embedding and merging, LN_before in read_latents.
Swin's residual sum is an op of its own, behind a norm that needs whole rows of a product: it reads the branch, the
stream and the adapter's output, whose BN2, LN_after and gate it applies, and writes the stream.

Training is forward and backward, without loss and optimiser. Frozen weights get no gradient, nor does anything before
the first adapter. Kept for the backward is what the forward writes anyway, fc1's output before its GELU (the forward
then writes that one alone), and the latents' softmax weights. Norms, GELU, ReLU and the scores of the attention are
computed again from rows that are read anyway.
- A frozen product: one more for its input's gradient (FLOPs x2); reads the gradient and the weights, writes a gradient.
- Attention: 5 products to the forward's 2 (S again, dP, dV, dQ, dK); reads q, k, v and the gradient, writes three.
- Adapters and head: gradients of input and weights (x3), without what their kernels may compute again. BatchNorm on
  the batch's statistics needs sums over the batch first, so up's backward reads gradient and output twice.
- A stream's gradient has up to four parts (residual, frozen branch, reader, read): whoever adds to the sum reads it.
An op's forward and backward are one entry, whose time is bound by their sum.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lavish_fast.config import AdapterConfig, Config

HEAD_HIDDEN = 512  # AVEHead's default; its module imports torch
DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True)
class Op:
    """One kernel's least work. stage: from 1; 0 before and after the stages, and for an op by itself.

    calls: in one pass of the whole batch. flops, bytes: of one call.
    """

    name: str
    stage: int
    calls: int
    flops: int
    bytes: int

    @property
    def total_flops(self) -> int:
        return self.calls * self.flops

    @property
    def total_bytes(self) -> int:
        return self.calls * self.bytes


@dataclass(frozen=True)
class Limits:
    """What a device reaches: matrix products in 1e12 FLOP/s, memory traffic (read plus written) in 1e9 bytes/s."""

    tflops: float
    gb_per_s: float


def seconds(op: Op, limits: Limits) -> float:
    """The least time of all calls of an op: by FLOPs or by bytes, whichever takes longer."""
    return op.calls * max(op.flops / (limits.tflops * 1e12), op.bytes / (limits.gb_per_s * 1e9))


def floor(ops: Iterable[Op], limits: Limits) -> float:
    """The least time in seconds of ops run one after another."""
    return sum(seconds(op, limits) for op in ops)


def gather_latents(
    n: int,
    tokens: int,
    width: int,
    latents: int,
    itemsize: int,
    training: bool = False,
    *,
    input_grad: bool = True,
) -> Op:
    """S = L + softmax(L Yᵀ) Y: L (m, C), Y (n, N, C) -> (n, m, C). input_grad: whether Y gets a gradient."""
    stream, summary, table = n * tokens * width, n * latents * width, latents * width
    products, elements = 2, stream + table + summary
    if training:
        weights = n * tokens * latents
        products += 2 + 2 * input_grad
        elements += weights + (summary + stream + weights + table) + (table + stream) * input_grad
    return _op("gather_latents", products * stream * latents, elements * itemsize)


def read_latents(
    n: int,
    tokens: int,
    width: int,
    latents: int,
    itemsize: int,
    training: bool = False,
    *,
    input_grad: bool = True,
) -> Op:
    """X' = X + g_av softmax(X Sᵀ) S: X (n, N, C), S (n, m, C) -> (n, N, C). input_grad: whether X gets a gradient."""
    stream, summary = n * tokens * width, n * latents * width
    products, elements = 2, 2 * stream + summary + 1
    if training:
        weights = n * tokens * latents
        products += 3 + input_grad
        elements += weights + (2 * stream + weights + 2 * summary + 2) + stream * input_grad
    return _op("read_latents", products * stream * latents, elements * itemsize)


def grouped_linear(
    n: int,
    tokens: int,
    in_features: int,
    out_features: int,
    groups: int,
    itemsize: int,
    training: bool = False,
    *,
    input_grad: bool = True,
) -> Op:
    """A trained 1x1 convolution in groups, without bias: (n, N, C) -> (n, N, D), weight (D, C / G)."""
    rows, weight = n * tokens, in_features * out_features // groups
    products, elements = 1, rows * (in_features + out_features) + weight
    if training:
        products += 1 + input_grad
        elements += rows * (in_features + out_features) + weight + (rows * in_features + weight) * input_grad
    return _op("grouped_linear", products * rows * weight, elements * itemsize)


def adapter(
    n: int,
    tokens: int,
    other_tokens: int,
    width: int,
    config: AdapterConfig,
    itemsize: int,
    training: bool = False,
    *,
    input_grad: bool = True,
) -> Op:
    """A whole adapter as one kernel at its best: x (n, N, C) and other (n, M, C) read once, one (n, N, C) written.

    The FLOPs are the sum of its parts, without what such a kernel would compute again. In training the backward
    reads both streams and the gradient, and writes two gradients (unless input_grad is False) and the parameters'.
    The passes that BatchNorm needs for the batch's statistics are left out.
    """
    bottleneck = width // config.reduction
    inner = _needs_inner_gradient(config, input_grad)
    parts = [
        grouped_linear(n, tokens, width, bottleneck, config.groups, itemsize, training, input_grad=inner),
        grouped_linear(n, tokens, bottleneck, width, config.groups, itemsize, training),
    ]
    inputs = tokens
    parameters = 2 * width * bottleneck // config.groups + 1
    parameters += 2 * (width + bottleneck) * config.batch_norm + 2 * width * (config.ln_before + config.ln_after)
    if config.cross_modal:
        for part, count in ((gather_latents, other_tokens), (read_latents, tokens)):
            parts.append(part(n, count, width, config.latents, itemsize, training, input_grad=input_grad))
        inputs += other_tokens
        parameters += config.latents * width + 1
    elements = n * (inputs + tokens) * width + parameters
    if training:
        elements += n * (inputs * (1 + input_grad) + tokens) * width + 2 * parameters
    return Op("adapter", 0, 1, sum(part.flops for part in parts), elements * itemsize)


def window_attention(
    n: int,
    windows: int,
    tokens: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    training: bool = False,
) -> Op:
    """Swin-V2's cosine attention: q, k, v (n, windows, heads, N, d) -> the same.

    Reads the position bias (heads, N, N) and the scales too, float32 or wider. A shift's mask follows from the
    indices, so that none is read.
    """
    constants = heads * (tokens * tokens + 1) * max(itemsize, 4)
    op = attention(n * windows, tokens, heads, head_dim, itemsize, training)
    return replace(op, name="window_attention", bytes=op.bytes + constants * (1 + training))


def attention(n: int, tokens: int, heads: int, head_dim: int, itemsize: int, training: bool = False) -> Op:
    """softmax(scale q kᵀ) v, the frozen ViT's: q, k, v (n, heads, N, d) -> the same, scores never in memory."""
    stream = n * tokens * heads * head_dim
    products, elements = (7, 11 * stream) if training else (2, 4 * stream)
    return _op("attention", products * stream * tokens, elements * itemsize)


def model_ops(
    config: Config,
    batch: int,
    *,
    itemsize: int,
    training: bool = False,
    adapters: bool = True,
    fused: bool = False,
) -> list[Op]:
    """Every op of one forward, or of one training step, over `batch` clips, in the order of the stages.

    Equal ops of a stage are one entry with that many calls; an op that is twice in a stage with different work (the
    streams of a ViT, the first block in training) is two entries of one name.

    Args:
        itemsize: bytes an element, of weights and activations alike.
        adapters: False leaves out adapters and head: the bare backbone on the same images and, in training, with the
            gradients that the adapters would ask it for. Blocks that `first_block` skips are left out all the same.
        fused: each adapter as one op, at its best, instead of the four kernels that it is made of.
    """
    if not countable(config):
        raise ValueError(
            f"roofline: expected event localisation on a Swin-V2 or ViT, without VGGish, got {config.task} on "
            f"{config.backbone.kind}"
        )
    listing = _Listing(config, batch * config.frames, itemsize, training, adapters, fused)
    return [replace(op, calls=calls) for op, calls in Counter(listing.ops()).items()]


def countable(config: Config) -> bool:
    """Whether `model_ops` knows the whole network."""
    return config.task == "ave" and config.backbone.kind in ("swinv2", "vit") and not config.head.vggish


class _Listing:
    def __init__(self, config: Config, n: int, itemsize: int, training: bool, adapters: bool, fused: bool) -> None:
        self.config, self.n, self.itemsize = config, n, itemsize
        self.training, self.adapters, self.fused = training, adapters, fused
        # A stream alone has no other to read.
        cross_modal = config.adapter.cross_modal and len(config.streams) == 2
        self.settings, self.backbone = replace(config.adapter, cross_modal=cross_modal), config.backbone
        self.swin = config.backbone.kind == "swinv2"
        patch, side = config.backbone.patch_size, config.backbone.img_size
        self.patches = dict.fromkeys(config.streams, (side // patch) ** 2)
        if not self.swin and "audio" in self.patches:
            self.patches["audio"] = (config.spectrogram.frames // patch) * (config.spectrogram.mel_bins // patch)
        self.backward = False  # whether the streams carry a gradient: from the first adapter on

    def ops(self) -> Iterator[Op]:
        backbone, first = self.backbone, self.settings.first_block
        yield self._patch_embed()
        depths = backbone.depths if self.swin else (len(backbone.block_widths),)
        stages = [stage for stage, depth in enumerate(depths, 1) for _ in range(depth)]
        tokens = {stream: count + (not self.swin) for stream, count in self.patches.items()}
        for i in range(first, len(stages)):
            stage, width = stages[i], backbone.block_widths[i]
            if i > first and stage != stages[i - 1]:
                tokens = {stream: count // 4 for stream, count in tokens.items()}
                rows = self.n * sum(tokens.values())
                merge = self._frozen("merge", rows, 2 * width, width, bias=0, parameters=2 * width, again=rows * width)
                yield replace(merge, stage=stage)
            heads = backbone.num_heads[stage - 1] if self.swin else backbone.num_heads
            for op in self._block(width, heads, tokens):
                yield replace(op, stage=stage)
        yield self._pool(backbone.block_widths[-1], tokens)
        if self.adapters:
            yield self._head()

    def _block(self, width: int, heads: int, tokens: dict[str, int]) -> Iterator[Op]:
        rows, hidden = self.n * sum(tokens.values()), int(width * self.backbone.mlp_ratio)
        stream = rows * width
        # Into a branch: its gradient joins the stream's; a ViT's norm stands there and loads its input once more.
        enter = {"parameters": 0, "again": stream} if self.swin else {"parameters": 2 * width, "again": 2 * stream}
        for place in ("p1", "p2"):
            adapted = getattr(self.settings, place)
            # Out of it: a ViT's last product adds the stream and the adapter's output to its own.
            leave = {} if self.swin else {"reads": stream * (1 + (adapted and self.adapters))}
            if place == "p1":
                yield self._frozen("qkv", rows, width, 3 * width, **enter)
                yield from self._attention(width, heads, tokens)
                yield self._frozen("proj", rows, width, width, **leave)
            else:
                yield self._frozen("fc1 + gelu", rows, width, hidden, **enter)
                yield self._frozen("fc2", rows, hidden, width, again=rows * hidden, **leave)
            if adapted and self.adapters:
                for name, count in tokens.items():
                    other = sum(tokens.values()) - count
                    yield from self._adapter(width, count, other, gate=name == "video" or self.settings.audio_gate)
            if self.swin:
                elements = stream * (3 + (adapted and self.adapters)) + 2 * width
                elements += (3 * stream + 2 * width) * self.backward
                yield _op(f"norm{place[1]} + residual", 0, elements * self.itemsize)
            self.backward |= adapted and self.training

    def _attention(self, width: int, heads: int, tokens: dict[str, int]) -> Iterator[Op]:
        if not self.swin:
            for count in tokens.values():
                yield attention(self.n, count, heads, width // heads, self.itemsize, self.backward)
            return
        count = next(iter(tokens.values()))
        # The stage's side is no larger than the window where the whole map is one window.
        window = min(self.backbone.window_size**2, count)
        images, windows = self.n * len(tokens), count // window
        yield window_attention(images, windows, window, heads, width // heads, self.itemsize, self.backward)

    def _adapter(self, width: int, tokens: int, other: int, gate: bool) -> Iterator[Op]:
        s, n, size, training, flows = self.settings, self.n, self.itemsize, self.training, self.backward
        bottleneck = width // s.reduction
        stream = n * tokens * width
        if self.fused:
            op = adapter(n, tokens, other, width, s, size, training, input_grad=flows)
            yield _more(op, (stream + n * other * width * s.cross_modal) * flows * size)
            return
        if s.cross_modal:
            gather = gather_latents(n, other, width, s.latents, size, training, input_grad=flows)
            read = read_latents(n, tokens, width, s.latents, size, training, input_grad=flows)
            yield _more(gather, n * other * width * flows * size)
            yield _more(read, (stream * flows + 2 * width * s.ln_before * (1 + 2 * training)) * size)
        norm = 2 * width * s.ln_before * (not s.cross_modal)
        inner = _needs_inner_gradient(s, flows)
        down = grouped_linear(n, tokens, width, bottleneck, s.groups, size, training, input_grad=inner)
        up = grouped_linear(n, tokens, bottleneck, width, s.groups, size, training)
        norm += 2 * bottleneck * s.batch_norm
        again = n * tokens * bottleneck * s.batch_norm + stream * (flows and not s.cross_modal)
        yield _more(replace(down, name="down"), (norm * (1 + 2 * training) + again * training) * size)
        norm = 2 * width * (s.batch_norm + s.ln_after) + gate
        again = stream * ((s.batch_norm or s.ln_after or gate) + 2 * s.batch_norm)
        yield _more(replace(up, name="up"), (norm * (1 + 2 * training) + again * training) * size)

    def _frozen(
        self,
        name: str,
        rows: int,
        in_features: int,
        out_features: int,
        *,
        bias: int = 1,
        parameters: int = 0,
        reads: int = 0,
        again: int = 0,
    ) -> Op:
        """A frozen linear. parameters: of a norm in it. reads, again: elements besides, in forward and backward."""
        weight = in_features * out_features
        elements = rows * (in_features + out_features) + weight + bias * out_features + parameters + reads
        if self.backward:
            elements += rows * (in_features + out_features) + weight + parameters + again
        return _op(name, rows * weight * (1 + self.backward), elements * self.itemsize)

    def _patch_embed(self) -> Op:
        patch, width = self.backbone.patch_size**2, self.backbone.block_widths[0]
        patches = self.n * sum(self.patches.values())
        # A spectrogram is one channel in memory, three in the product.
        pixels = {"audio": patch, "video": patch * self.backbone.in_chans}
        elements = self.n * sum(count * pixels[stream] for stream, count in self.patches.items())
        weight = patch * self.backbone.in_chans * width
        elements += weight + width + patches * width
        if self.swin:
            elements += 2 * width
        else:
            side = self.backbone.img_size // self.backbone.patch_size
            elements += self.n * len(self.patches) * width + (side**2 + 2) * width  # cls rows; position, cls token
        return _op("patch_embed", patches * weight, elements * self.itemsize)

    def _pool(self, width: int, tokens: dict[str, int]) -> Op:
        out = self.n * len(tokens) * width
        stream = self.n * sum(tokens.values()) * width
        read = stream if self.swin else out
        elements = read + out + 2 * width + (read + out + 2 * width + stream) * self.backward
        return _op("pool", 0, elements * self.itemsize)

    def _head(self) -> Op:
        in_features, classes = len(self.config.streams) * self.config.width, len(self.config.classes)
        fc1, fc2 = in_features * HEAD_HIDDEN, HEAD_HIDDEN * classes
        parameters = fc1 + fc2 + HEAD_HIDDEN + classes
        products, elements = fc1 + fc2, self.n * (in_features + classes) + parameters
        if self.training:
            products = fc1 * (2 + self.backward) + fc2 * 3
            elements += self.n * (in_features * (1 + self.backward) + classes) + 2 * parameters
        return _op("head", self.n * products, elements * self.itemsize)


def _needs_inner_gradient(config: AdapterConfig, input_grad: bool) -> bool:
    """Whether something before `down` is trained, or asks for a gradient."""
    return input_grad or config.cross_modal or config.ln_before


def _op(name: str, multiply_adds: int, size: int) -> Op:
    return Op(name, 0, 1, 2 * multiply_adds, size)


def _more(op: Op, size: int) -> Op:
    return replace(op, bytes=op.bytes + size)


def measure_limits(device: str, dtype: str) -> Limits:
    """What this device reaches now: a large copy, and a large square matrix product of random numbers.

    8192^3 on CUDA. On a CPU the largest size up to 2048^3 that takes a fraction of a second. The best of several
    rounds after warm-ups: a limit is what nothing exceeds, whatever else runs on the machine.

    Args:
        device: "cuda", "cuda:1", "cpu" ...
        dtype: float64, float32, tf32 (CUDA only), bfloat16 or float16.
    """
    import torch

    cuda = torch.device(device).type == "cuda"
    if dtype not in DTYPES or (dtype == "tf32" and not cuda):
        known = [name for name in DTYPES if cuda or name != "tf32"]
        raise ValueError(f"dtype: expected one of {', '.join(known)} on {device}, got {dtype!r}")
    source = torch.ones(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device)
    gb_per_s = 2 * source.numel() / copy / 1e9

    def product(side: int) -> Callable[[], object]:
        kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        return lambda: torch.mm(a, b)

    settings, side = torch.backends.cuda.matmul, 8192
    before = settings.allow_tf32
    try:
        settings.allow_tf32 = dtype == "tf32"
        if not cuda:
            # A type that the CPU only emulates is a hundred times slower.
            side = 256
            while side < 2048 and _best_seconds(product(side), device, rounds=1) < 0.03:
                side *= 2
        taken = _best_seconds(product(side), device)
    finally:
        settings.allow_tf32 = before
    return Limits(2 * side**3 / taken / 1e12, gb_per_s)


def _best_seconds(run: Callable[[], object], device: str, rounds: int = 0) -> float:
    """The least time of `run` after warm-ups, by CUDA events or the clock. rounds: 0 for as many as suit the device."""
    import torch

    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            for _ in range(20):
                run()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds or 20)]
            for start, end in events:
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
        return min(start.elapsed_time(end) for start, end in events) / 1e3
    run()
    times = []
    for _ in range(rounds or 5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def table(ops: Iterable[Op], limits: Limits, batch: int | None = None) -> Table:
    """A line per stage and op with its share of the least time, then the total.

    batch: clips in the pass; with it the total has the most samples/s that the limits allow.
    """
    groups: dict[tuple[int, str], list[Op]] = {}
    for op in ops:
        groups.setdefault((op.stage, op.name), []).append(op)
    everything = [op for group in groups.values() for op in group]
    total = floor(everything, limits)
    title = f"Least work at {limits.tflops:.4g} TFLOP/s and {limits.gb_per_s:.4g} GB/s"
    text = Table(title=title, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for column in ("stage", "op", "calls", "GFLOP", "MB", "FLOP/B", "bound", "ms", "share"):
        text.add_column(column, justify="left" if column in ("op", "bound") else "right", no_wrap=True)
    for (stage, name), group in groups.items():
        text.add_row(str(stage or ""), name, *_cells(group, limits, total))
    text.add_section()
    text.add_row("", "total", *_cells(everything, limits, total), style="bold")
    if batch is not None:
        text.caption = f"{batch / total:.4g} samples/s at most: {batch} in {total * 1e3:.4g} ms"
    return text


def _cells(group: list[Op], limits: Limits, total: float) -> list[str]:
    flops, size = sum(op.total_flops for op in group), sum(op.total_bytes for op in group)
    taken = floor(group, limits)
    by_compute = sum(seconds(op, limits) for op in group if op.flops / op.bytes > limits.tflops * 1e3 / limits.gb_per_s)
    return [
        str(sum(op.calls for op in group)),
        _digits(flops / 1e9),
        _digits(size / 1e6),
        _digits(flops / size),
        "FLOPs" if 2 * by_compute > taken else "bytes",
        f"{taken * 1e3:.3f}" if taken < 1 else f"{taken * 1e3:.0f}",
        f"{taken / total:.1%}",
    ]


def _digits(value: float) -> str:
    """Three digits or all before the point."""
    return f"{value:.0f}" if value >= 100 or not value else f"{value:.3g}"
