"""kernels/window_attention.py: against the steps of Swin-V2's attention in float64, and what else must hold."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from lavish_fast.kernels import _tuning
from lavish_fast.kernels import window_attention as kernels
from lavish_fast.kernels.window_attention import window_attention
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kernel_parity import (
    DEVICE,
    DTYPES,
    assert_built,
    assert_within_budget,
    built,
    draw,
    every_second,
    guarded,
    misaligned,
    padded_rows,
    poisoned,  # noqa: F401
    tokens_outside,
)

STAGES = [(48, 6, 12, 6), (48, 6, 12, 0), (24, 12, 12, 6), (12, 24, 12, 0), (6, 48, 6, 0)]  # size, heads, window, shift


def assert_same_numbers(got: Tensor, expected: Tensor, layout, d: int) -> None:
    """Bit for bit, but on a card for rows of 24 channels a head with padding, which makes them multiples of 16.

    Then, unlike the plain rows, they are read in wider pieces, and the norms are summed in another order.
    """
    if DEVICE == "cpu" or layout is not padded_rows or d != 24:
        assert torch.equal(got, expected)
    else:
        ulp = torch.finfo(got.dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=4 * ulp)


def attend(qkv: Tensor, logit_scale: Tensor, table: Tensor, window: int, shift: int) -> Tensor:
    """The steps one by one: roll, cut into windows, attend, put together, roll back. At least float32 inside."""
    n, tokens, channels = qkv.shape
    size, heads, N = math.isqrt(tokens), logit_scale.numel(), window**2
    side, wide = size // window, torch.promote_types(qkv.dtype, torch.float32)

    def cut(x: Tensor) -> Tensor:  # (n, size, size, channels) -> (n, windows, N, channels)
        x = x.roll((-shift, -shift), (1, 2)).unflatten(2, (side, window)).unflatten(1, (side, window))
        return x.transpose(2, 3).reshape(x.shape[0], side**2, N, -1)

    q, k, v = cut(qkv.view(n, size, size, channels)).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    cosines = F.normalize(q.to(wide), dim=-1) @ F.normalize(k.to(wide), dim=-1).mT
    offset = [
        (i // window - j // window + window - 1) * (2 * window - 1) + i % window - j % window + window - 1
        for i in range(N)
        for j in range(N)
    ]
    logits = cosines * logit_scale.to(wide) + table.to(wide)[:, offset].view(heads, N, N)
    if shift:
        # The three bands of the rolled map that Swin's own code paints, along both axes.
        regions = torch.zeros(1, size, size, 1, device=qkv.device)
        bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for i, rows in enumerate(bands):
            for j, columns in enumerate(bands):
                regions[:, rows, columns] = 3 * i + j
        regions = cut(regions.roll((shift, shift), (1, 2)))  # (1, windows, N, 1)
        logits = logits + torch.where(regions == regions.mT, 0.0, -100.0).to(wide).unsqueeze(2)
    out = logits.softmax(-1).to(v.dtype) @ v  # (n, windows, heads, N, d)
    out = out.transpose(2, 3).reshape(n, side, side, window, window, -1).transpose(2, 3)
    return out.reshape(n, size, size, -1).roll((shift, shift), (1, 2)).reshape(n, tokens, -1)


def inputs(size: int, heads: int, window: int, d: int = 32, n: int = 1, dtype: torch.dtype = torch.float32, seed=0):
    """Scales from 3 to 100, the clamp, and biases from 0 to 16, as the network has them."""
    qkv = draw(n, size**2, 3 * heads * d, seed=3 * seed, dtype=dtype)
    scale = torch.linspace(math.log(100), math.log(3), heads).exp().view(heads, 1, 1).to(DEVICE)
    table = 16 * draw(heads, (2 * window - 1) ** 2, seed=3 * seed + 1).sigmoid()
    return qkv, scale, table


def assert_parity(qkv: Tensor, scale: Tensor, table: Tensor, window: int, shift: int) -> Tensor:
    got = window_attention(qkv, scale, table, window, shift)
    truth = attend(qkv.double(), scale.double(), table.double(), window, shift)
    assert_within_budget(got, attend(qkv, scale, table, window, shift), truth)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "window", "shift", "d"),
    [
        (4, 4, 0, 32), (8, 4, 2, 16), (16, 4, 1, 32), (6, 6, 0, 32), (12, 6, 3, 24), (7, 7, 0, 64), (14, 7, 3, 32),
        (8, 8, 0, 64), (16, 8, 7, 32), (12, 12, 0, 32), (24, 12, 6, 32), (12, 12, 0, 16), (16, 16, 0, 32),
    ],
)  # fmt: skip
def test_parity(size, window, shift, d, dtype):
    assert_parity(*inputs(size, 2, window, d, dtype=dtype), window, shift)


@pytest.mark.parametrize("window", [2, 3, 5, 9, 10, 11, 13, 14, 15, 16])
def test_parity_of_other_windows(window):
    """On one window that is shifted over itself, which has all four regions, of many small images or one large."""
    assert_parity(*inputs(window, 1, window, n=max(1, 144 // window**2)), window, window // 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 17, 24, 33, 48, 64])
def test_parity_of_other_heads(d, dtype):
    assert_parity(*inputs(8, 3, 4, d, n=2, dtype=dtype), 4, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_of_the_widest_head_in_the_largest_window(dtype):
    assert_parity(*inputs(12, 1, 12, 64, dtype=dtype), 12, 6)


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 4, 5])
def test_parity_of_every_shift(shift):
    assert_parity(*inputs(12, 1, 6), 6, shift)


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_parity_of_seeds(seed):
    assert_parity(*inputs(6, 2, 6, n=3, seed=seed), 6, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "heads", "window", "shift"), STAGES)
def test_parity_in_full_size(size, heads, window, shift, dtype):
    for n in (1, 20):
        assert_parity(*inputs(size, heads, window, n=n, dtype=dtype, seed=7), window, shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "window", "shift"), [(12, 12, 0), (12, 6, 3), (7, 7, 0), (4, 4, 2)])
def test_weights_of_a_row_sum_to_one(size, window, shift, dtype):
    qkv, scale, table = inputs(size, 2, window, dtype=dtype)
    qkv[..., 128:] = 1
    got = window_attention(qkv, scale, table, window, shift)
    assert (got - 1).abs().max() < 1e-3


@pytest.mark.parametrize("window", [6, 12])
def test_the_split_over_programs_does_not_change_a_bit(window, monkeypatch):
    given = inputs(window, 1, window)
    expected = window_attention(*given, window, 0)
    for programs in (1, 4, 6):
        rows = [entry | {"programs": programs} for entry in _tuning.DEFAULTS["window_attention"]]
        monkeypatch.setitem(_tuning.DEFAULTS, "window_attention", rows)
        assert torch.equal(window_attention(*given, window, 0), expected)


def test_programs_share_the_tiles_evenly(monkeypatch):
    qkv, scale, table = (t.to("meta") for t in inputs(12, 2, 12))
    split = {}
    for programs in range(1, 40):
        rows = [entry | {"programs": programs} for entry in _tuning.DEFAULTS["window_attention"]]
        monkeypatch.setitem(_tuning.DEFAULTS, "window_attention", rows)
        out = torch.empty(1, 144, 64, device="meta")
        (launch,) = kernels.launches(qkv, scale, table, 12, 0, out, 90)
        split[programs] = launch.constants["PARTS"]
        assert launch.grid == (2 * split[programs],)
    assert set(split.values()) == {1, 2, 3, 5}  # 9, 5, 3 and 2 tiles a program
    assert split[1] == split[3] == 1
    assert split[4] == 2
    assert split[39] == 5


def test_an_image_is_the_same_alone_and_in_any_batch():
    qkv, scale, table = inputs(6, 1, 6, n=4)
    batch = window_attention(qkv, scale, table, 6, 3)
    for i in (0, 3):
        assert torch.equal(batch[i : i + 1], window_attention(qkv[i : i + 1], scale, table, 6, 3))
    order = [2, 0, 3, 1]
    assert torch.equal(batch[order], window_attention(qkv[order], scale, table, 6, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "heads", "window", "shift"), STAGES)
def test_an_image_in_full_size_is_the_same_alone(size, heads, window, shift, dtype):
    """The more images, the fewer programs share a window."""
    qkv, scale, table = inputs(size, heads, window, n=64, dtype=dtype)
    batch = window_attention(qkv, scale, table, window, shift)
    for n in (1, 4, 10, 20):
        assert torch.equal(batch[:n], window_attention(qkv[:n], scale, table, window, shift))


def test_windows_without_a_shift_are_images_of_their_own():
    qkv, scale, table = inputs(12, 2, 6)
    windows = qkv.view(2, 6, 2, 6, -1).transpose(1, 2).reshape(4, 36, -1)
    got = window_attention(qkv, scale, table, 6, 0).view(2, 6, 2, 6, -1).transpose(1, 2).reshape(4, 36, -1)
    assert torch.equal(got, window_attention(windows, scale, table, 6, 0))


def test_permuted_heads_give_permuted_outputs():
    qkv, scale, table = inputs(6, 4, 6)
    order = [2, 0, 3, 1]
    permuted = qkv.unflatten(-1, (3, 4, 32))[..., order, :].flatten(-3)
    got = window_attention(permuted, scale[order].contiguous(), table[order].contiguous(), 6, 3)
    expected = window_attention(qkv, scale, table, 6, 3).unflatten(-1, (4, 32))[..., order, :].flatten(-2)
    assert torch.equal(got, expected)


def test_regions_do_not_mix():
    """Values of 1e30 at the tokens that the roll wraps around are not seen by the others, at exp(-100)."""
    qkv, scale, table = inputs(8, 1, 4)
    clean = window_attention(qkv, scale / 100, table, 4, 2).view(8, 8, 32)
    loud = qkv.view(8, 8, 96).clone()
    loud[:2, :, 64:] = 1e30
    got = window_attention(loud.view(1, 64, 96), scale / 100, table, 4, 2).view(8, 8, 32)
    torch.testing.assert_close(got[2:], clean[2:], rtol=1e-6, atol=1e-6)
    assert (got[:2] > 1e29).all()


def test_an_empty_batch_keeps_its_shape():
    assert window_attention(*inputs(12, 2, 6, n=0), 6, 3).shape == (0, 144, 64)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("window", "d"), [(4, 32), (7, 24)])
@pytest.mark.parametrize("layout", [guarded, every_second, padded_rows, tokens_outside, misaligned])
def test_any_layout_amid_nan_gives_the_same_bits(layout, window, d, dtype):
    qkv, scale, table = inputs(window, 1, window, d, n=2, dtype=dtype)
    got = window_attention(layout(qkv), guarded(scale), guarded(table), window, window // 2)
    assert_same_numbers(got, window_attention(qkv, scale, table, window, window // 2), layout, d)


def test_one_image_expanded_over_the_batch():
    qkv, scale, table = inputs(8, 2, 4)
    got = window_attention(qkv.expand(3, -1, -1), scale, table, 4, 2)
    assert torch.equal(got, window_attention(qkv, scale, table, 4, 2).expand(3, -1, -1))


@pytest.mark.parametrize(("n", "strides"), [(3, (2**30, 96, 1)), (1, (2**32, 3 * 2**26, 1))])
def test_offsets_beyond_32_bits(n, strides):
    """Images, or the tokens of one, lie up to 2^31 elements apart or more; what lies between is never touched."""
    qkv, scale, table = inputs(4, 1, 4, n=n, dtype=torch.float16)
    last = (n - 1) * strides[0] + 15 * strides[1] + 96
    storage = torch.UntypedStorage(2 * last, device=DEVICE)
    far = torch.tensor([], dtype=torch.float16, device=DEVICE).set_(storage, 0, (n, 16, 96), strides)
    far.copy_(qkv)
    assert torch.equal(window_attention(far, scale, table, 4, 2), window_attention(qkv, scale, table, 4, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_times_a_thousand(dtype):
    """Squared norms reach 1e9, far beyond float16."""
    qkv, scale, table = inputs(6, 2, 6, 64, n=2, dtype=dtype)
    assert_parity(1000 * qkv, scale, table, 6, 3)
    assert_parity(qkv / 1000, scale, table, 6, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_input_is_returned(dtype):
    _, scale, table = inputs(6, 2, 6)
    qkv = torch.full((1, 36, 192), 3.0, dtype=dtype, device=DEVICE)
    got = window_attention(qkv, scale, table, 6, 3)
    torch.testing.assert_close(got, torch.full_like(got, 3.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1e-3])
def test_zero_vectors_leave_the_bias(value, dtype):
    """Queries or keys of zeros have logits of bias alone; vectors near to zero have directions still."""
    for part in (0, 1):
        qkv, scale, table = inputs(6, 2, 6, dtype=dtype)
        qkv[:, ::5, 64 * part : 64 * part + 64] *= value
        assert_parity(qkv, scale, table, 6, 0)


def test_tiny_vectors_are_normalised_as_the_reference_does():
    """Squared norms of 1e-24 and less, where the bound on the norm takes over."""
    qkv, scale, table = inputs(6, 2, 6)
    qkv[..., :64] *= torch.logspace(-14, -10, 36, device=DEVICE)[:, None]
    assert_parity(qkv, scale, table, 6, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand_are_exact(dtype):
    """Offsets (0, 0) at +1e4 and all others at -1e4: every token sees itself alone."""
    for window in (6, 12):
        qkv, scale, table = inputs(window, 2, window, dtype=dtype)
        table.fill_(-1e4)
        table[:, (2 * window - 1) ** 2 // 2] = 1e4
        assert torch.equal(window_attention(qkv, scale, table, window, 0), qkv[..., 128:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("where", [(1,), (1, 7), (1, 7, 5), (1, 7, 37), (1, 7, 70)])
def test_a_nan_stays_in_its_image(where):
    qkv, scale, table = inputs(6, 1, 6, n=3)
    clean = window_attention(qkv, scale, table, 6, 0)
    qkv[where] = float("nan")
    got = window_attention(qkv, scale, table, 6, 0)
    assert got[1, 7].isnan().any()
    assert torch.equal(got[::2], clean[::2])


def test_repeats_are_equal():
    given = inputs(6, 2, 6, n=2)
    first = window_attention(*given, 6, 3)
    assert all(torch.equal(first, window_attention(*given, 6, 3)) for _ in range(2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "heads", "window", "shift"), STAGES)
def test_250_repeats_are_equal(size, heads, window, shift, dtype):
    given = inputs(size, heads, window, n=60, dtype=dtype)
    first = window_attention(*given, window, shift)
    assert all(torch.equal(first, window_attention(*given, window, shift)) for _ in range(250))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    _, scale, table = inputs(48, 6, 12)
    qkv = torch.randn(1700, 2304, 576, dtype=torch.bfloat16, device=DEVICE)
    assert qkv.numel() > 2**31
    parts = [window_attention(part, scale, table, 12, 6) for part in qkv.split(340)]
    assert torch.equal(window_attention(qkv, scale, table, 12, 6), torch.cat(parts))
    del qkv, parts
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "heads", "window", "shift"), STAGES)
def test_a_graph_replays_on_new_inputs(size, heads, window, shift):
    held = inputs(size, heads, window, n=20, dtype=torch.bfloat16)
    window_attention(*held, window, shift)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = window_attention(*held, window, shift)
    for seed in range(20):
        for old, new in zip(held, inputs(size, heads, window, n=20, dtype=torch.bfloat16, seed=seed)):
            old.copy_(new)
        graph.replay()
        assert torch.equal(got, window_attention(*held, window, shift))


@pytest.mark.parametrize(
    ("N", "most", "expected"),
    [
        (144, 128, [(0, 128), (128, 16)]),
        (36, 128, [(0, 32), (32, 16)]),
        (4, 128, [(0, 16)]),
        (196, 32, [(0, 32), (32, 32), (64, 32), (96, 32), (128, 32), (160, 32), (192, 16)]),
        (256, 128, [(0, 128), (128, 128)]),
    ],
)
def test_tiles_cover_the_keys(N, most, expected):
    assert kernels.tiles(N, most) == tuple(expected)


def test_every_reason_is_named():
    qkv, scale, table = inputs(12, 2, 6)
    for bad, names in [
        ((qkv.double(), scale, table, 6, 3), ["expected float32, float16 or bfloat16, got float64"]),
        ((qkv, scale.half(), table, 6, 3), ["logit_scale: expected float32, got float16"]),
        ((qkv, scale, table.double(), 6, 3), ["table: expected float32, got float64"]),
        ((qkv, scale.flatten(), table, 6, 3), [r"logit_scale: expected \(heads, 1, 1\), got \(2,\)"]),
        ((qkv, scale, table[:, 1:].contiguous(), 6, 3), [r"table: expected \(2, 121\), got \(2, 120\)"]),
        ((qkv, scale, table.repeat(1, 2)[:, ::2], 6, 3), [r"table: expected a contiguous tensor, got strides"]),
        ((qkv, scale[:1].expand(2, -1, -1), table, 6, 3), ["logit_scale: expected a contiguous tensor, got strides"]),
        ((qkv[0], scale, table, 6, 3), [r"qkv: expected \(n, T, 3C\), got \(144, 192\)"]),
        ((qkv.repeat(1, 1, 2)[..., ::2], scale, table, 6, 3), ["qkv: expected contiguous channels, got strides"]),
        ((qkv[:, :143], scale, table, 6, 3), ["tokens of a square map that windows of 6 divide, got 143"]),
        ((qkv[:, :100], scale, table, 6, 3), ["tokens of a square map that windows of 6 divide, got 100"]),
        ((qkv[:, :0], scale, table, 6, 3), ["tokens of a square map that windows of 6 divide, got 0"]),
        ((qkv[..., :191], scale, table, 6, 3), ["qkv: expected 3 x 2 heads of equal width, got 191 channels"]),
        ((qkv[..., :90], scale, table, 6, 3), ["qkv: expected heads of 16 to 64 channels, got 15"]),
        ((qkv.repeat(1, 1, 3)[..., :390], scale, table, 6, 3), ["qkv: expected heads of 16 to 64 channels, got 65"]),
        ((qkv, scale, table, 6, 6), ["shift: expected 0 to window - 1, got 6 with window 6"]),
        ((qkv, scale, table, 6, -1), ["shift: expected 0 to window - 1, got -1 with window 6"]),
        ((qkv, scale, table[:, :1].contiguous(), 1, 0), ["window: expected 2 to 16, got 1"]),
        (
            (*inputs(17, 2, 17), 17, 3),
            ["window: expected 2 to 16, got 17", "qkv: expected 288 tokens a window or fewer, got 289"],
        ),
        ((*inputs(14, 1, 14, d=48), 14, 3), ["qkv: expected 144 tokens a window or fewer, got 196"]),
        (
            (qkv[0].double(), scale.half(), table.half(), 6, 6),
            ["got float64", "logit_scale: expected float32", "table: expected float32", "shift: ", "qkv: expected"],
        ),
    ]:
        assert len(kernels.reasons(*bad)) == len(names), kernels.reasons(*bad)
        with pytest.raises(ValueError, match="^window_attention: .*" + ".*; .*".join(names)):
            window_attention(*bad)


def test_gradients_of_the_frozen_are_refused():
    """That of qkv is in test_kernel_window_attention_bwd.py."""
    qkv, scale, table = inputs(4, 2, 4)
    table.requires_grad_()
    (reason,) = kernels.reasons(qkv, scale, table, 4, 0)
    assert reason == "table: expected a frozen tensor, got one that requires a gradient"
    with pytest.raises(ValueError, match="table: expected a frozen tensor"):
        window_attention(qkv, scale, table, 4, 0)
    with torch.no_grad():
        assert not kernels.reasons(qkv, scale, table, 4, 0)


def test_tensors_elsewhere_are_refused():
    (reason,) = kernels.reasons(*(t.to("meta") for t in inputs(4, 2, 4)), 4, 0)
    assert reason == "expected CUDA tensors, got meta"


def test_opcheck():
    torch.library.opcheck(kernels.window_attention_fwd, (*inputs(8, 2, 4), 4, 2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break_for_any_batch(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(qkv, scale, table):
        return window_attention(qkv, scale, table, 4, 2) * 2

    for n in (1, 2, 3, 7, 16):
        given = inputs(4, 1, 4, n=n)
        assert torch.equal(compiled(*given), window_attention(*given, 4, 2) * 2)
    assert counter.frame_count <= 3


def test_a_thread_loads_the_biases_that_are_its_own():
    found = built(
        "window_attention",
        r"""
for case, launch in cases:
    if case == "bfloat16 d=32 window=12 shift=0 heads=24":
        print(json.dumps(len(re.findall(r"\bst\.shared", build(launch)["ptx"]))))
""",
    )
    # Of inference and of training: of queries, keys and values alone. Biases would be 20 more.
    assert len(found) == 2
    assert max(found) < 50


def test_builds_for_each_card_within_its_limits():
    assert_built("window_attention")
