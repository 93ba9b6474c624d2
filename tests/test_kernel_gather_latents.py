"""kernels/gather_latents.py: S = L + softmax(L Yᵀ) Y against the reference in float64, and what else must hold."""

import gc

import pytest
import torch
from lavish_fast.kernels import gather_latents as kernels
from lavish_fast.kernels.gather_latents import gather_latents
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
from lavish_fast import reference

WIDTH = 96 if DEVICE == "cpu" else 192  # the kernel takes no fewer channels on a card
STAGES = [(2304, 192), (576, 384), (144, 768), (36, 1536)]


def inputs(m: int, N: int | tuple[int, int], C: int, n: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Two directions whose logits spread by about 3, so that several tokens have a say in each latent."""
    sizes = N if isinstance(N, tuple) else (N, N)
    latents = [draw(m, C, seed=10 * seed + i, dtype=dtype, scale=3 * C**-0.5) for i in range(2)]
    others = [draw(n, size, C, seed=10 * seed + 2 + i, dtype=dtype) for i, size in enumerate(sizes)]
    return latents, others


def assert_parity(latents: list[Tensor], others: list[Tensor]) -> Tensor:
    got = gather_latents(latents, others)
    for s, l, y in zip(got, latents, others, strict=True):
        truth = reference.gather_latents(l.double(), y.double())
        assert_within_budget(s, reference.gather_latents(l, y), truth)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 3, 31, 36, 97, 144, 197, 577])
@pytest.mark.parametrize("m", [1, 2, 16, 32, 64])
def test_parity(m, N, dtype):
    assert_parity(*inputs(m, N, WIDTH, n=max(1, 4 // m), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 3, 31, 36, 97, 144, 197, 577])
def test_parity_of_stage_1(N, dtype):
    assert_parity(*inputs(2, N, 192, n=4, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "N", "C"), [(16, 300, 384), (16, 144, 768), (2, 197, 768), (2, 36, 1536), (3, 49, 1024)])
def test_parity_of_wide_streams(m, N, C, dtype):
    assert_parity(*inputs(m, N, C, n=max(1, 4 // m), dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [48, 50, 64, 101, 2048])
def test_parity_of_other_widths(C, dtype):
    if DEVICE == "cuda" and dtype.itemsize == 2 and C < WIDTH:
        pytest.skip("refused on a card")
    assert_parity(*inputs(2, 37, C, n=4, dtype=dtype, seed=3))


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_parity_of_seeds(seed):
    assert_parity(*inputs(5, 260, WIDTH, n=3, seed=seed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 16, 64])
@pytest.mark.parametrize(("N", "C"), [*STAGES, (197, 768), (4096, 2048)])
def test_parity_in_full_size(N, C, m, dtype):
    assert_parity(*inputs(m, N, C, n=20, dtype=dtype, seed=7))


@pytest.mark.parametrize("N", [36, 144, 577, (144, 36), (577, 31)])
def test_both_directions_are_two_single_ones(N):
    latents, others = inputs(2, N, WIDTH)
    both = gather_latents(latents, others)
    for i in range(2):
        assert torch.equal(both[i], gather_latents(latents[i : i + 1], others[i : i + 1])[0])
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("N", [144, 300])
def test_an_image_is_the_same_alone_and_in_any_batch(N):
    latents, others = inputs(2, N, WIDTH, n=4)
    batch = gather_latents(latents, others)
    for i in (0, 3):
        assert torch.equal(batch[:, i : i + 1], gather_latents(latents, [y[i : i + 1] for y in others]))
    order = [2, 0, 3, 1]
    assert torch.equal(batch[:, order], gather_latents(latents, [y[order] for y in others]))


@pytest.mark.parametrize("N", [144, 300])
def test_permuted_latents_give_permuted_sums(N):
    latents, others = inputs(16, N, WIDTH)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = gather_latents([l[order] for l in latents], others)
    torch.testing.assert_close(got, gather_latents(latents, others)[:, :, order], rtol=1e-5, atol=1e-6)


def test_the_order_of_tokens_does_not_matter():
    latents, others = inputs(2, 300, WIDTH)
    got = gather_latents(latents, [y.flip(1) for y in others])
    torch.testing.assert_close(got, gather_latents(latents, others), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_keeps_its_shape():
    for N in (144, 300):
        latents, others = inputs(2, N, WIDTH, n=0)
        assert gather_latents(latents, others).shape == (2, 0, 2, WIDTH)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("N", [36, 300])
@pytest.mark.parametrize("layout", [guarded, every_second, padded_rows, tokens_outside, misaligned])
def test_any_layout_amid_nan_gives_the_same_bits(layout, N, dtype):
    latents, others = inputs(2, N, WIDTH, dtype=dtype)
    got = gather_latents([padded_rows(l) for l in latents], [layout(y) for y in others])
    assert torch.equal(got, gather_latents(latents, others))


def test_one_image_expanded_over_the_batch():
    latents, others = inputs(2, 144, WIDTH, n=1)
    expanded = [y.expand(3, -1, -1) for y in others]
    assert torch.equal(gather_latents(latents, expanded), gather_latents(latents, others).expand(-1, 3, -1, -1))


def test_offsets_beyond_32_bits():
    """The third image begins 2^31 elements after the first; what lies between is never touched."""
    stride, (latents, others) = 2**30, inputs(2, 36, WIDTH, n=3, dtype=torch.float16)
    storage = torch.UntypedStorage(2 * (2 * stride + 36 * WIDTH), device=DEVICE)
    far = torch.tensor([], dtype=torch.float16, device=DEVICE).set_(storage, 0, (3, 36, WIDTH), (stride, WIDTH, 1))
    far.copy_(others[0])
    assert torch.equal(gather_latents(latents[:1], [far]), gather_latents(latents[:1], others[:1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [144, 300])
def test_inputs_times_a_thousand(N, dtype):
    """Logits reach 1e7, far beyond float16."""
    latents, others = inputs(2, N, WIDTH, dtype=dtype)
    scale = 1000 if dtype != torch.float16 else 100
    assert_parity([scale * l for l in latents], [scale * y for y in others])


def test_a_constant_stream_is_added_to_the_latents():
    latents, _ = inputs(2, 1, WIDTH)
    for value in (0.0, 3.0):
        others = [torch.full((2, N, WIDTH), value, device=DEVICE) for N in (144, 300)]
        got = gather_latents(latents, others)
        torch.testing.assert_close(got, torch.stack(latents)[:, None].expand_as(got) + value, rtol=1e-6, atol=1e-6)


def test_zero_latents_give_the_mean():
    _, others = inputs(2, 300, WIDTH)
    got = gather_latents([torch.zeros(2, WIDTH, device=DEVICE)] * 2, others)
    mean = torch.stack(others).mean(2, keepdim=True)
    torch.testing.assert_close(got, mean.expand_as(got), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "first", "second"), [(144, 5, 140), (300, 5, 290)])
def test_logits_of_ten_thousand_are_exact(N, first, second, dtype):
    """Two tokens at +1e4 share the weight, in one block or in two; the others are at -1e4."""
    C = WIDTH
    latents = torch.zeros(1, C, dtype=dtype, device=DEVICE)
    latents[0, 0] = 100
    other = draw(1, N, C, seed=8).round().to(dtype)
    other[..., 0] = -100
    other[:, [first, second], 0] = 100
    expected = latents + (other[:, first] + other[:, second])[:, None] / 2
    assert torch.equal(gather_latents([latents], [other])[0], expected)


@pytest.mark.parametrize(("N", "second"), [(144, 140), (300, 290)])
def test_logits_near_ten_thousand_keep_their_distance(N, second):
    """Weights 1 and 1/e at logits 1e4 and 1e4 - 1, within a block and between two."""
    latents = torch.zeros(1, WIDTH, device=DEVICE)
    latents[0, :2] = torch.tensor([100.0, 1.0])
    other = torch.zeros(1, N, WIDTH, device=DEVICE)
    other[0, 5, 0], other[0, second, :2] = 100, torch.tensor([100.0, -1.0])
    other[0, 5, 2] = 1
    weight = 1 / (1 + torch.tensor(-1.0, dtype=torch.float64).exp())
    assert abs(gather_latents([latents], [other])[0, 0, 0, 2].item() - weight.item()) < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("N", [36, 400])
@pytest.mark.parametrize("where", [(1,), (1, 7), (1, 7, 5)])
def test_a_nan_stays_in_its_image(where, N):
    """400 tokens make three blocks of an image, an odd number beside the power of two that merges them."""
    latents, others = inputs(2, N, WIDTH, n=3)
    clean = gather_latents(latents, others)
    others[0][where] = float("nan")
    got = gather_latents(latents, others)
    assert got[0, 1].isnan().all()
    assert torch.equal(got[1], clean[1])
    assert torch.equal(got[0, ::2], clean[0, ::2])


@pytest.mark.parametrize("N", [144, 300])
def test_repeats_are_equal(N):
    latents, others = inputs(16, N, WIDTH)
    first = gather_latents(latents, others)
    assert all(torch.equal(first, gather_latents(latents, others)) for _ in range(2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C"), STAGES)
def test_250_repeats_are_equal(N, C, dtype):
    latents, others = inputs(16, N, C, n=60, dtype=dtype)
    first = gather_latents(latents, others)
    assert all(torch.equal(first, gather_latents(latents, others)) for _ in range(250))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    latents = [draw(2, 192, seed=9, dtype=torch.bfloat16)]
    other = torch.randn(4900, 2304, 192, dtype=torch.bfloat16, device=DEVICE)
    assert other.numel() > 2**31
    parts = [gather_latents(latents, [part]) for part in other.split(700)]
    assert torch.equal(gather_latents(latents, [other]), torch.cat(parts, 1))
    del other, parts
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "C"), STAGES)
def test_a_graph_replays_on_new_inputs(N, C):
    latents, others = inputs(2, N, C, n=20, dtype=torch.bfloat16)
    gather_latents(latents, others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gather_latents(latents, others)
    for seed in range(20):
        for held, new in zip((latents, others), inputs(2, N, C, n=20, dtype=torch.bfloat16, seed=seed)):
            for old, tensor in zip(held, new):
                old.copy_(tensor)
        graph.replay()
        assert torch.equal(got, gather_latents(latents, others))


def test_blocks_cover_the_tokens_evenly():
    for most, largest in ((192, 64), (256, 256)):
        for N in range(1, 4097):
            tiles = kernels._tiles(N, most, largest)
            blocks = -(-N // sum(tiles))
            assert sum(tiles) <= most
            assert (blocks - 1) * sum(tiles) < N <= blocks * sum(tiles)
            assert list(tiles) == sorted(tiles, reverse=True)
            assert largest >= tiles[0]
            assert min(tiles) >= 64
            assert all(tiles.count(tile) == 1 for tile in tiles if tile < largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_channels_take_two_trips_or_more(dtype):
    for C in (48, 64, 65, 96, 128, 192, 1536, 2048):
        for m in (1, 16, 64):
            for N in (1, 97, 300):
                for trained in (False, True):
                    assert kernels._tiling(m, N, C, dtype, 90, trained)[0]["BLOCK_C"] < C
                (latents, _), (other, _) = inputs(m, 1, C, n=1, dtype=dtype)
                saved = [torch.empty(1, 1, m, *more, device=DEVICE) for more in ((), (), (C,))]
                given = kernels._directions([latents], [other.expand(-1, N, -1)])
                tiling, _ = kernels._tiling(m, N, C, dtype, 90, True)
                launch, _ = kernels.backward.launch(given, latents[None, None], saved, None, True, tiling, 90)
                assert launch.constants["BLOCK_D"] < C


def test_every_reason_is_named():
    latents, others = inputs(2, 36, WIDTH)
    for bad, names in [
        (([], []), ["expected one or two latents and as many others, got 0 and 0"]),
        ((latents, others[:1]), ["got 2 and 1"]),
        (
            ([latents[0][0]], others[:1]),
            [r"expected latents \(m, C\) and others \(n, N, C\), got \(\d+,\), \(2, 36, \d+\)"],
        ),
        (([latents[0].half()], others[:1]), ["expected tensors of one type, got float16, float32"]),
        (([latents[0].double()], [others[0].double()]), ["expected float32, float16 or bfloat16, got float64"]),
        (([latents[0], latents[1][:1]], others), [r"latents: expected \(2, \d+\), got \(1, \d+\)"]),
        (
            (latents, [others[0], others[1][:1, :, :95]]),
            [r"others: expected 2 images of \d+ channels, got \(1, 36, \d+\)"],
        ),
        ((latents[:1], [others[0][:, :0]]), ["N: expected 1 to 4096, got 0"]),
        ((latents[:1], [others[0][:, :1].expand(-1, 4097, -1)]), ["N: expected 1 to 4096, got 4097"]),
        (([latents[0][:0]], others[:1]), ["m: expected 1 to 64, got 0"]),
        (([latents[0][:1].expand(65, -1)], others[:1]), ["m: expected 1 to 64, got 65"]),
        (([latents[0][:, :47]], [others[0][..., :47]]), ["C: expected 48 to 2048, got 47"]),
        (
            ([latents[0].half().repeat(1, 2)[:, ::2]], [others[0].mT.contiguous().mT]),
            [
                "one type",
                r"latents: expected contiguous channels, got strides \(192, 2\)",
                "others: expected contiguous",
            ],
        ),
    ]:
        assert len(kernels.reasons(*bad)) == len(names)
        with pytest.raises(ValueError, match="^gather_latents: .*" + ".*; .*".join(names)):
            gather_latents(*bad)


def test_tensors_elsewhere_are_refused():
    (reason,) = kernels.reasons([torch.empty(2, WIDTH, device="meta")], [torch.empty(2, 36, WIDTH, device="meta")])
    assert reason == "expected CUDA tensors, got meta"


@pytest.mark.parametrize("N", [36, (36, 300)])
def test_opcheck(N):
    torch.library.opcheck(kernels._infer, inputs(2, N, WIDTH))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break_for_any_batch(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(latents, others):
        return gather_latents(latents, others) * 2

    for n in (1, 2, 3, 7, 16):
        latents, others = inputs(2, 36, WIDTH, n=n)
        assert torch.equal(compiled(latents, others), gather_latents(latents, others) * 2)
    assert counter.frame_count <= 3


def test_sums_of_float32_are_of_products_of_their_own():
    """The compiler starts each product from zero and not from the sum that it is added to, as it likes to."""
    found = built(
        "gather_latents",
        r"""
for case, launch in cases:
    if case.startswith("float32 m=2 N=144"):
        code = build(launch)["ttgir"]
        sums = re.findall(r"tt.dot %[^,]+, %[^,]+, (%\w+)", code)
        zeros = re.findall(r"(%\w+) = arith.constant dense<0.0+e\+00>", code)
        print(json.dumps([launch.kernel.fn.__name__, len(sums), sorted(set(sums) - set(zeros))]))
""",
    )
    # Of each of the three tiles: in the forward logits and S; in the backward logits, dP, dL and two of dY.
    forward, backward = ["_gather_latents_fwd", 6, []], ["_gather_latents_bwd", 15, []]
    assert found == [forward, forward, backward]


def test_builds_for_each_card_within_its_limits():
    assert_built("gather_latents")
