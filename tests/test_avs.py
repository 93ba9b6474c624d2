import math
import pickle
import re
import shutil
import wave
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavish_fast import Config, Model, checkpoint, media, tasks
from lavish_fast.backbones import Encoded
from lavish_fast.config import AdapterConfig, AVSConfig, SpectrogramConfig, SwinV2Config
from lavish_fast.tasks import avs, avs_data, avs_decoder, avs_metric
from parity import golden, randomise, relative_error

CHANNELS = 6
BFLOAT16 = 2e-2  # twice what ours loses on its logits; what the released network does is not known


def make_config(levels=4, **changes):
    """Four stages, or fewer, on 64 x 64 pixels, frames and masks of 32 x 32, three frames a clip."""
    ones, zeros = (1,) * levels, (0,) * levels
    backbone = SwinV2Config(64, embed_dim=8, depths=ones, num_heads=ones, window_size=4, pretrained_window_sizes=zeros)
    values = {
        "backbone": backbone,
        "task": "avs",
        "adapter": AdapterConfig(latents=3, reduction=2, ln_before=False, gate_first=True, zero_latents=True),
        "spectrogram": SpectrogramConfig(mel_bins=64, frames=64, frame_shift_ms=15.0),
        "frames": 3,
        "head": AVSConfig(channels=CHANNELS, size=32),
    }
    return Config(**(values | changes))


def make_head(config, seed=0):
    """A head in double precision in which nothing is zero or the identity, for evaluation."""
    torch.manual_seed(seed)
    return randomise(avs.Head(config).double()).eval()


def make_encoded(config, clips, seed=0):
    """Random tokens of each stage and pooled features in double precision."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return [torch.randn(*shape, generator=generator).double() for _ in config.streams]

    n = clips * config.frames
    widths = [width for _, width in config.backbone.stages]
    stages = [draw(n, (16 >> i) ** 2, width) for i, width in enumerate(widths)]
    return Encoded(stages, draw(n, widths[-1]))


# The network


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, BFLOAT16)])
def test_golden_outputs(dtype, limit, record_property):
    run = golden("avs")
    model = run.model(dtype).eval()
    assert (model.config.head.channels, model.config.head.tpavi_stages) == (64, (0, 1, 2, 3))
    audio, video = run.inputs(dtype)
    with torch.no_grad():
        logits, maps, sounds = model(video, audio)
    got = {"pred": logits}
    got |= {f"feature_map/{i}_mean": x.mean((2, 3)) for i, x in enumerate(maps)}
    got |= {f"audio_feature/{i}": x for i, x in enumerate(sounds)}
    assert got.keys() == run.expect.keys()
    for name, x in got.items():
        assert x.shape == run.expect[name].shape
        error = relative_error(x, run.expect[name])
        record_property(f"{name} relative error", error)
        assert error <= limit, name


def test_golden_names_go_back():
    run = golden("avs")
    ours = checkpoint.from_official(run.state_dict, avs.HEAD_NAMES)
    theirs = checkpoint.to_official(ours, "swinv2", avs.HEAD_NAMES)
    for name in run.state_dict.keys() - theirs.keys():
        assert name.startswith("path4.resConfUnit1.") or name.endswith((".attn_mask", ".relative_position_index")), name
    assert all(torch.equal(theirs[name].flatten(), run.state_dict[name].flatten()) for name in theirs)


@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (1, 3), ()])
def test_released_weights_say_what_the_options_do_not(stages):
    model = randomise(Model(make_config(head=AVSConfig(CHANNELS, stages, 32, hidden=8))))
    released = checkpoint.to_official(model.state_dict(), "swinv2", avs.HEAD_NAMES)
    assert released["conv1.conv2d_list.3.weight"].shape == (CHANNELS, 64, 3, 3)
    assert [i for i in range(4) if f"tpavi_b{i + 1}.W_z.1.running_var" in released] == list(stages)
    released["path4.resConfUnit1.conv1.weight"] = torch.zeros(CHANNELS, CHANNELS, 3, 3)  # never read
    again = Model.from_official(released, make_config(head=AVSConfig(size=32)))
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(state.pop(name), x) for name, x in model.state_dict().items())
    assert not state
    released["tpavi_b5.theta.weight"] = released.pop("x1_linear.bias")
    with pytest.raises(ValueError, match=r"missing head\.linears\.0\.bias; unexpected tpavi_b5\.theta\.weight"):
        Model.from_official(released, make_config())


def plain_tpavi(module, x, audio):
    """TPAVI as it is defined, by the THW x THW matrix: x (B, T, C, H, W), audio (B, T, 128)."""
    (clips, frames, channels, height, width), pixels = x.shape, x.shape[1] * x.shape[3] * x.shape[4]
    a = module.align(audio)
    spread = a[:, :, None, None].expand(-1, -1, height, width, -1).reshape(clips, pixels, channels)
    tokens = x.permute(0, 1, 3, 4, 2).reshape(clips, pixels, channels)
    similarity = module.theta(tokens) @ module.phi(spread).mT / pixels
    y = F.conv3d(
        (similarity @ module.g(tokens)).mT.reshape(clips, -1, frames, height, width),
        module.out.weight,
        module.out.bias,
    )
    bn = module.bn
    y = F.batch_norm(y, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, module.training)
    z = (y + x.transpose(1, 2)).permute(0, 2, 3, 4, 1)
    return module.norm(z).permute(0, 1, 4, 2, 3), a


@pytest.mark.parametrize("training", [False, True])
def test_tpavi_is_the_quadratic_definition(training):
    torch.manual_seed(0)
    module = randomise(avs_decoder.TPAVI(8).double()).train(training)
    x = torch.randn(2, 3, 8, 4, 5, dtype=torch.float64)
    audio = torch.randn(2, 3, avs_decoder.AUDIO_WIDTH, dtype=torch.float64)
    expected, expected_sound = plain_tpavi(module, x, audio)
    z, sound = module(x.flatten(0, 1), audio)
    torch.testing.assert_close(z.unflatten(0, (2, 3)), expected)
    torch.testing.assert_close(sound, expected_sound)
    # The sound does matter.
    assert relative_error(module(x.flatten(0, 1), audio.flip(1))[0], z) > 1e-3


def test_tpavi_begins_as_its_norm():
    module, x = avs_decoder.TPAVI(8), torch.randn(3, 8, 4, 4)
    z, _ = module(x, torch.randn(1, 3, avs_decoder.AUDIO_WIDTH))
    torch.testing.assert_close(z, F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1))


def test_tpavi_takes_memory_for_the_map_alone():
    # A clip of five maps of 56 x 56 has 15,680 pixels: the quadratic definition's matrix has 246 million entries.
    module, saved = avs_decoder.TPAVI(4), []
    x = torch.randn(5, 4, 56, 56, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        module(x, torch.randn(1, 5, avs_decoder.AUDIO_WIDTH))[0].sum().backward()
    assert max(saved) <= x.numel()


def plain_head(head, encoded, stages, stream):
    """The released decoder in its own order, with the ReLU in place that changes the maps it returns."""
    relu = torch.nn.ReLU(inplace=True)
    levels = len(encoded.stages)
    maps, sounds = [], [None] * levels
    for i, size in enumerate((8, 4, 2, 1)[:levels]):
        x = F.linear(encoded.stages[i][stream], head.linears[i].weight, head.linears[i].bias)
        side = math.isqrt(x.shape[1])
        x = x.reshape(-1, side, side, x.shape[2]).permute(0, 3, 1, 2)
        x = F.interpolate(x, (size, size), mode="bicubic")
        convs = zip(head.dilated[i], (3, 6, 12, 18))
        maps.append(torch.stack([F.conv2d(x, c.weight, c.bias, padding=d, dilation=d) for c, d in convs]).sum(0))
        if i in stages:
            audio = head.audio(encoded.pooled[0]).unflatten(0, (-1, head.frames))
            z, sounds[i] = plain_tpavi(head.tpavi[str(i)], maps[i].unflatten(0, (-1, head.frames)), audio)
            maps[i] = z.flatten(0, 1).contiguous()

    def unit(module, x):
        out = relu(x)
        out = F.conv2d(out, module.conv1.weight, module.conv1.bias, padding=1)
        out = F.conv2d(relu(out), module.conv2.weight, module.conv2.bias, padding=1)
        return out + x

    def fuse(module, first, second=None):
        out = first if second is None else first + unit(module.skip, second)
        return F.interpolate(unit(module.refine, out), scale_factor=2, mode="bilinear", align_corners=True)

    out = fuse(head.fusion[-1], maps[-1])
    for i in reversed(range(levels - 1)):
        out = fuse(head.fusion[i], out, maps[i])
    first, _, second, _, third = head.output
    out = F.interpolate(F.conv2d(out, first.weight, first.bias, padding=1), scale_factor=2, mode="bilinear")
    out = F.conv2d(out, second.weight, second.bias, padding=1).clamp(min=0)
    return F.conv2d(out, third.weight, third.bias), maps, sounds


VARIANTS = [("audio+video", (0, 1, 2, 3)), ("audio+video", (1, 3)), ("audio+video", ()), ("video", ()), ("audio", ())]


@pytest.mark.parametrize("levels", [4, 3, 2])
@pytest.mark.parametrize(("modality", "stages"), VARIANTS)
def test_head_is_the_released_decoder(modality, stages, levels):
    stages = tuple(i for i in stages if i < levels)
    # A model of one stream has no TPAVI, whatever the configuration says.
    asked = stages if modality == "audio+video" else tuple(range(levels))
    config = make_config(levels, modality=modality, head=AVSConfig(CHANNELS, asked, 32))
    head, encoded = make_head(config), make_encoded(config, 2)
    assert [int(i) for i in head.tpavi] == list(stages)
    assert (head.audio is None) == (modality != "audio+video")
    with torch.no_grad():
        expected = plain_head(head, encoded, stages, stream=len(config.streams) - 1)
        logits, maps, sounds = head(encoded)
    torch.testing.assert_close(logits, expected[0])
    assert logits.shape == (6, 1, 32, 32)
    assert len(maps) == len(sounds) == levels
    for i in range(levels):
        torch.testing.assert_close(maps[i], expected[1][i])
        assert 0 == maps[i].min() < maps[i].max()
        assert (sounds[i] is None) == (i not in stages)
        if sounds[i] is not None:
            torch.testing.assert_close(sounds[i], expected[2][i])
            assert sounds[i].shape == (2, 3, CHANNELS)


@pytest.mark.parametrize(("modality", "stages"), VARIANTS)
def test_gradients_reach_every_parameter(modality, stages):
    config = make_config(modality=modality, head=AVSConfig(CHANNELS, stages, 32))
    head = make_head(config).train()
    labels = torch.rand(2, 1, 32, 32) < 0.5
    avs.loss(head(make_encoded(config, 2)), labels).backward()
    unread = {"audio.weight", "audio.bias"} if modality == "audio+video" and not stages else set()
    assert {name for name, p in head.named_parameters() if p.grad is None} == unread
    # A bias that BatchNorm takes away again has a gradient of zero.
    absorbed = {f"tpavi.{i}.out.bias" for i in stages}
    for name, p in head.named_parameters():
        assert name in unread | absorbed or p.grad.abs().max() > 0, name


def test_a_clip_alone_equals_the_clip_in_a_batch():
    config = make_config()
    head, encoded = make_head(config), make_encoded(config, 3)
    alone = Encoded(*([[x[3:6] for x in xs] for xs in encoded.stages], [x[3:6] for x in encoded.pooled]))
    with torch.no_grad():
        torch.testing.assert_close(head(alone)[0], head(encoded)[0][3:6])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_under_autocast(dtype):
    config = make_config()
    head, encoded = make_head(config).float(), make_encoded(config, 2)
    narrow = Encoded([[x.to(dtype) for x in xs] for xs in encoded.stages], [x.to(dtype) for x in encoded.pooled])
    expected = head.double()(encoded)[0]
    head.float()
    with torch.autocast("cpu", dtype):
        logits = head(narrow)[0]
        loss = avs.loss(logits, torch.ones(2, 1, 32, 32))
    assert relative_error(logits, expected) < {torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_head_is_one_graph():
    config = make_config()
    head, encoded = make_head(config), make_encoded(config, 2)
    with torch.no_grad():
        compiled = torch.compile(head, backend="eager", fullgraph=True)(encoded)
        assert torch.equal(compiled[0], head(encoded)[0])


def test_no_clips_give_no_masks():
    config = make_config()
    with torch.no_grad():
        logits, maps, sounds = make_head(config)(make_encoded(config, 0))
    assert logits.shape == (0, 1, 32, 32)
    assert [x.shape for x in maps] == [(0, CHANNELS, s, s) for s in (8, 4, 2, 1)]
    assert [x.shape for x in sounds] == [(0, 3, CHANNELS)] * 4


def test_sizes_that_the_stages_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"head\.size: expected a multiple of 32 pixels, got 48"):
        avs.Head(make_config(head=AVSConfig(CHANNELS, size=48)))
    assert avs.Head(make_config(3, head=AVSConfig(CHANNELS, (0, 1, 2), size=48))).size == 48
    with pytest.raises(ValueError, match=r"head\.channels: expected an even number, got 5"):
        avs.Head(make_config(head=AVSConfig(5, size=32)))
    with pytest.raises(ValueError, match=r"head\.hidden: expected a multiple of 4, got 6"):
        avs.Head(make_config(head=AVSConfig(CHANNELS, size=32, hidden=6)))


def test_backbones_without_a_pyramid_are_refused():
    with pytest.raises(ValueError, match="backbone: expected one of two to four stages for avs, got 1"):
        make_config(1)
    with pytest.raises(ValueError, match=r"head\.tpavi_stages: expected stages from 0 to 2, got \(1, 3\)"):
        make_config(3, head=AVSConfig(CHANNELS, (1, 3), 32))


def make_inputs(clips=2, frames=3, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(clips, frames, 3, side, side, generator=generator)
    return video, torch.randn(clips, frames, 64, 64, generator=generator)


def test_inputs_are_the_released_ones():
    config, (video, audio) = make_config(), make_inputs()
    found = avs.inputs(config, video, [audio])
    assert list(found) == ["audio", "video"]
    assert found["audio"].shape == found["video"].shape == (6, 3, 64, 64)
    assert torch.equal(found["audio"], audio.flatten(0, 1)[:, None].expand(-1, 3, -1, -1))
    expected = F.interpolate(video.flatten(0, 1), (64, 64), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(found["video"], expected)
    assert list(avs.inputs(replace(config, modality="video"), video)) == ["video"]
    assert list(avs.inputs(replace(config, modality="audio"), None, audio)) == ["audio"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"video": None}, r"video: expected a floating tensor \(B, T, 3, 32, 32\), got NoneType"),
        ({"video": torch.zeros(2, 3, 3, 64, 64)}, r"video: expected .* \(B, T, 3, 32, 32\), got \(2, 3, 3, 64, 64\)"),
        ({"audio": torch.zeros(2, 3, 64, 65)}, r"audio: expected .* \(B, T, 64, 64\), got \(2, 3, 64, 65\)"),
        ({"audio": torch.zeros(1, 3, 64, 64)}, "expected the same clips"),
        (
            {"audio": torch.zeros(2, 4, 64, 64), "video": torch.zeros(2, 4, 3, 32, 32)},
            "expected 3 frames a clip, got 4",
        ),
    ],
)
def test_faulty_inputs_are_named(fault, message):
    video, audio = make_inputs()
    with pytest.raises(ValueError, match=message):
        avs.inputs(make_config(), **({"video": video, "audio": audio} | fault))


def test_the_model_trains():
    torch.manual_seed(0)
    model = Model(make_config()).train()
    labels = torch.zeros(2, 1, 32, 32)
    labels[0, :, :, :16] = labels[1, :, :, 16:] = 1
    optimizer = torch.optim.Adam([p for _, p in model.trainable_parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = avs.loss(model(*make_inputs()), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in model.trainable_parameters())


# The loss


def test_loss_is_that_of_the_first_frames():
    logits = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    labels = torch.rand(2, 3, 8, 8) < 0.5
    expected = F.binary_cross_entropy(logits[[0, 3], 0].sigmoid(), labels[:, 0].double())
    for masks in (labels, labels[:, :1], labels.float(), labels.to(torch.uint8)):
        torch.testing.assert_close(avs.loss((logits, [], []), masks), expected)
    torch.testing.assert_close(avs.loss(logits, labels), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_finite_in_low_precision(dtype):
    logits = torch.tensor([-3e4, 3e4, 0.0, 30.0], dtype=dtype).view(1, 1, 2, 2).requires_grad_()
    loss = avs.loss(logits, torch.tensor([1, 0, 1, 1]).view(1, 1, 2, 2))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), (2 * logits[0, 0, 0, 1].item() + math.log(2)) / 4, rtol=1e-6, atol=0)
    loss.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((6, 1, 8, 8), (2, 8, 8), r"labels: expected masks \(B, M, H, W\), got \(2, 8, 8\)"),
        ((6, 1, 8, 8), (2, 3, 8, 9), r"logits: expected \(B\*T, 1, H, W\) for masks of shape \(2, 3, 8, 9\), got"),
        ((6, 2, 8, 8), (2, 3, 8, 8), "logits: expected"),
        ((6, 1, 8, 8), (4, 1, 8, 8), "logits: expected"),
        ((6, 1, 8, 8), (2, 4, 8, 8), "logits: expected"),
        ((6, 1, 8, 8), (0, 1, 8, 8), "logits: expected"),
    ],
)
def test_masks_that_do_not_fit_are_named(logits, labels, message):
    for read in (avs.loss, lambda x, y: avs.Metric().update(x, y, ["a"] * len(y))):
        with pytest.raises(ValueError, match=message):
            read(torch.zeros(logits), torch.zeros(labels))


# The metric


def plain_scores(logits, masks):
    """The definitions frame by frame and threshold by threshold: IoU (n,), and F (frames with an object, 255)."""
    thresholds = torch.linspace(0, 1 - 1e-10, 255)
    assert thresholds[-1] == 1  # in float32
    ious, curves = [], []
    for logit, mask in zip(logits, masks):
        p = logit.sigmoid()
        predicted, pixels = p > 0.5, mask.numel()
        if not mask.any():
            ious.append(int((~predicted).sum()) / pixels)
            continue
        ious.append(int((predicted & mask).sum()) / (int((predicted | mask).sum()) + 1e-7))
        curve = []
        for t in thresholds:
            chosen = p >= t
            hit = int((chosen & mask).sum())
            precision, recall = hit / (int(chosen.sum()) + 1e-20), hit / (int(mask.sum()) + 1e-20)
            below = 0.3 * precision + recall
            curve.append(1.3 * precision * recall / below if below else 0.0)
        curves.append(curve)
    return ious, torch.tensor(curves, dtype=torch.float64).view(-1, 255)


def plain_f(videos, batch_size):
    scores = []
    for i in range(0, len(videos), batch_size):
        curves = torch.cat([plain_scores(*video)[1] for video in videos[i : i + batch_size]])
        scores.append(curves.mean(0).max().item() if len(curves) else 0.0)
    return sum(scores) / len(scores)


def make_videos(count=7, frames=3, side=12, seed=0):
    """Logits and masks of videos; some masks are empty, one video's are all; some logits are at the ends."""
    generator = torch.Generator().manual_seed(seed)
    videos = []
    for i in range(count):
        masks = torch.rand(frames, side, side, generator=generator) < torch.rand((), generator=generator)
        logits = torch.randn(frames, side, side, generator=generator) * 3 + (i + 1) * (masks.float() - 0.5) / 2
        masks[i % frames] &= i % 2 == 0
        logits[torch.rand(logits.shape, generator=generator) < 0.05] = 200.0
        logits[torch.rand(logits.shape, generator=generator) < 0.05] = -200.0
        videos.append((logits, masks & (i != 3)))
    return videos


def score(videos, batch_size=1, ids=None):
    metric = avs.Metric()
    ids = ids or [f"video {i}" for i in range(len(videos))]
    for i in range(0, len(videos), batch_size):
        logits = torch.cat([logits for logits, _ in videos[i : i + batch_size]])[:, None]
        metric.update((logits, []), torch.stack([m for _, m in videos[i : i + batch_size]]), ids[i : i + batch_size])
    return metric


def test_frame_scores_are_the_plain_ones():
    for logits, masks in make_videos():
        ious, curves = avs_metric.frame_scores(logits.sigmoid(), masks)
        expected, expected_curves = plain_scores(logits, masks)
        assert ious.tolist() == expected
        assert torch.equal(curves[masks.flatten(1).any(1)], expected_curves)
        assert not curves[~masks.flatten(1).any(1)].any()


@given(st.lists(st.tuples(st.sampled_from([*range(-3, 258)]), st.booleans()), min_size=4, max_size=12))
@settings(max_examples=100, deadline=None)
def test_probabilities_on_the_thresholds_reach_them(pixels):
    # Probabilities at a threshold, and one step of float32 to its sides.
    thresholds = torch.linspace(0, 1 - 1e-10, 255)
    p = torch.stack([thresholds[min(max(i, 0), 254)] for i, _ in pixels])
    p = torch.where(torch.tensor([i % 3 == 0 for i, _ in pixels]), torch.nextafter(p, torch.tensor(0.0)), p)
    p = torch.where(torch.tensor([i % 3 == 1 for i, _ in pixels]), torch.nextafter(p, torch.tensor(1.0)), p)
    mask = torch.tensor([inside for _, inside in pixels])
    _, (curve,) = avs_metric.frame_scores(p[None, :, None], mask[None, :, None])
    for t, got in zip(thresholds, curve.tolist()):
        hit, positive = int(((p >= t) & mask).sum()), int((p >= t).sum())
        precision, recall = hit / (positive + 1e-20), hit / (int(mask.sum()) + 1e-20)
        assert got == (1.3 * precision * recall / (0.3 * precision + recall) if hit else 0.0)


def test_results_are_the_plain_ones():
    videos = make_videos()
    results = score(videos).results()
    assert next(iter(results)) == "mIoU"
    ious = [plain_scores(*video)[0] for video in videos]
    assert results == pytest.approx(
        {
            "mIoU": sum(sum(x) / 3 for x in ious) / len(videos),
            "F-score": plain_f(videos, 1),
            "pooled F-score": plain_f(videos, len(videos)),
        },
        rel=1e-12,
    )


def test_results_do_not_depend_on_batches_order_or_ranks():
    videos = make_videos()
    ids = [f"video {i}" for i in range(7)]
    expected = score(videos).results()
    for batch_size in (2, 3, 7):
        assert score(videos, batch_size).results() == expected
    for seed in range(5):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled, names = [videos[i] for i in order], [ids[i] for i in order]
        assert score(shuffled, 2, names).results() == expected
        metric, other = score(shuffled[:3], 2, names[:3]), score(shuffled[3:], 3, names[3:])
        metric.merge(other)
        assert metric.results() == expected
        assert metric.official_f_score(2) == score(videos).official_f_score(2)


def test_the_official_f_depends_on_the_batch_size():
    videos = make_videos()
    metric = score(videos, 3)
    scores = [metric.official_f_score(size) for size in (1, 2, 4)]
    assert scores == pytest.approx([plain_f(videos, size) for size in (1, 2, 4)], rel=1e-12)
    assert len(set(scores)) == 3
    assert metric.official_f_score(100) == metric.results()["pooled F-score"]
    backwards = [f"video {i}" for i in range(7)][::-1]
    assert metric.official_f_score(2, backwards) == pytest.approx(plain_f(videos[::-1], 2), rel=1e-12)
    # Among the results in the data set's order, also where ranks had every other video.
    order = [4, 0, 6, 2, 5, 1, 3]
    names = [f"video {i}" for i in order]
    metric, other = avs.Metric(2, names), avs.Metric(2, names)
    metric.videos, other.videos = score(videos).videos[::2], score(videos).videos[1::2]
    metric.merge(other)
    results = metric.results()
    assert list(results) == ["mIoU", "F-score", "pooled F-score", "official F-score (batch 2)"]
    pairs = [plain_f([videos[i] for i in pair], 2) for pair in ((4, 0), (6, 2), (5, 1), (3,))]
    assert results["official F-score (batch 2)"] == pytest.approx(sum(pairs) / 4, rel=1e-12)
    assert results["official F-score (batch 2)"] != pytest.approx(scores[1], rel=1e-6)
    assert {**score(videos).results(), **results} == results
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        metric.official_f_score(0)
    with pytest.raises(ValueError, match="order: expected all that were scored, got none of video 1"):
        metric.official_f_score(1, [name for name in backwards if name != "video 1"])


def test_scores_by_hand():
    # Two pixels of four are the object; one of them is found, and one that is not.
    logits = torch.tensor([5.0, -5.0, 5.0, -5.0]).view(1, 2, 2)
    masks = torch.tensor([True, True, False, False]).view(1, 2, 2)
    iou = 1 / (3 + 1e-7)
    results = score([(logits, masks)]).results()
    assert results["mIoU"] == pytest.approx(iou, rel=1e-15)
    # Threshold 0 takes all pixels: p = 1/2, r = 1; from 1 to 252, that of the sure pixels: p = r = 1/2.
    assert results["F-score"] == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1), rel=1e-12)
    empty = torch.zeros_like(masks)
    assert score([(logits, empty)]).results() == {"mIoU": 0.5, "F-score": 0.0, "pooled F-score": 0.0}
    assert score([(logits * 100, masks), (logits, empty)]).results()["mIoU"] == pytest.approx((iou + 0.5) / 2)
    # Exactly one half is not above it.
    assert score([(torch.zeros(1, 2, 2), empty)]).results()["mIoU"] == 1
    assert all(math.isnan(x) for x in avs.Metric().results().values())


def test_of_low_precision_the_probability_is_float32():
    (logits, masks), *_ = make_videos()
    narrow = logits.bfloat16()
    assert score([(narrow, masks)]).results() == score([(narrow.float(), masks)]).results()
    assert score([(logits.double(), masks)]).results()["mIoU"] == score([(logits, masks)]).results()["mIoU"]


def test_nan_is_no_object():
    logits, masks = torch.full((1, 4, 4), float("nan")), torch.zeros(1, 4, 4, dtype=torch.bool)
    assert score([(logits, masks)]).results()["mIoU"] == 1
    masks[0, 0] = True
    assert score([(logits, masks)]).results() == {"mIoU": 0.0, "F-score": 0.0, "pooled F-score": 0.0}


def test_a_single_mask_is_of_the_first_frame():
    (logits, masks), *_ = make_videos()
    metric = avs.Metric()
    metric.update(logits[:, None], masks[None, :1].float(), ["a"])
    assert metric.results() == score([(logits[:1], masks[:1])]).results()


def test_faulty_labels_are_named():
    with pytest.raises(ValueError, match="labels: expected masks of 0 and 1, got other values"):
        avs.Metric().update(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 255), ["a"])
    with pytest.raises(ValueError, match="ids: expected 1, got 2"):
        avs.Metric().update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), ["a", "b"])


def test_kept_are_the_masks():
    (logits, _), *_ = make_videos()
    kept = avs.kept((logits[:, None],), 1)
    assert torch.equal(kept, (logits.sigmoid() > 0.5)[None])


# The data set

HEADER = "name,start,category,split"
ROWS = [
    "-dog_1,0,dog_barking,train",
    "dog_2,30,dog_barking,train",
    "cat_1,0,cat_meowing,val",
    "cat_2,2.5,cat_meowing,test",
    "bus,10,driving_buses,test",
]


def write_png(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def write_s4(root, rows=ROWS, frames=3, size=32):
    """A data set in S4's layout: the i-th frame is of grey 40 i, its mask the first i rows of pixels."""
    data = root / "s4_data"
    root.mkdir(parents=True, exist_ok=True)
    (root / "s4_meta_data.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    for row in rows:
        name, _, category, split = row.split(",")
        for i in range(1, frames + 1):
            write_png(
                data / "visual_frames" / split / category / name / f"{name}_{i}.png",
                np.full((size, size, 3), 40 * i, np.uint8),
            )
            if i == 1 or split != "train":
                mask = np.zeros((size, size), np.uint8)
                mask[:i] = 255
                write_png(data / "gt_masks" / split / category / name / f"{name}_{i}.png", mask)
        sound = data / "audio_wav" / split / category / f"{name}.wav"
        sound.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(sound), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(np.random.default_rng(0).integers(-9999, 9999, 48000, np.int16).tobytes())
        # Pickles are never opened: this one ends who does.
        pickled = data / "audio_log_mel" / split / category / f"{name}_log_mel.pkl"
        pickled.parent.mkdir(parents=True, exist_ok=True)
        pickled.write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit(\"a pickle was opened\")'\ntR.")
    return root


def test_a_pickle_that_is_opened_is_noticed(tmp_path):
    pickled = next(write_s4(tmp_path).rglob("*.pkl"))
    with pytest.raises(SystemExit, match="a pickle was opened"):
        pickle.loads(pickled.read_bytes())


def test_items(tmp_path):
    config = make_config()
    train = avs.Dataset(write_s4(tmp_path), "train", config)
    assert [row.name for row in train.rows] == ["-dog_1", "dog_2"]
    assert len(train) == 2
    item = train[0]
    assert list(item) == ["video", "audio", "labels", "id"]
    assert item["id"] == "-dog_1"
    assert item["video"].shape == (3, 3, 32, 32)
    assert item["audio"].shape == (3, 64, 64)
    assert item["labels"].dtype == torch.uint8
    assert item["labels"].sum((1, 2)).tolist() == [32]
    expected = (torch.tensor([40, 80, 120]) / 255 - media.IMAGENET_MEAN[0]) / media.IMAGENET_STD[0]
    torch.testing.assert_close(item["video"][:, 0].mean((1, 2)), expected)
    test = avs.Dataset(tmp_path, "test", config, skip=("bus",))
    assert [row.name for row in test.rows] == ["cat_2"]
    assert test[0]["labels"].sum((1, 2)).tolist() == [32, 64, 96]
    batch = tasks.collate([train[0], train[1]])
    assert batch.labels.shape == (2, 1, 32, 32)
    assert avs.inputs(config, **batch.inputs)["video"].shape == (6, 3, 64, 64)
    assert isinstance(train.metric(), avs.Metric)
    assert avs.settle(config, tmp_path) == config


def test_the_folder_may_hold_the_single_source_part(tmp_path):
    write_s4(tmp_path / "Single-source")
    assert len(avs.Dataset(tmp_path, "test", make_config())) == 2
    assert avs.verify(tmp_path, make_config()).ok


def test_clips_are_decoded_once_if_cached(tmp_path, monkeypatch):
    write_s4(tmp_path)
    calls, load = [], media.load_frames_and_wav
    monkeypatch.setattr(media, "load_frames_and_wav", lambda *a, **options: calls.append(a) or load(*a, **options))
    for cache, expected in ((True, 1), (False, 2)):
        calls.clear()
        dataset = avs.Dataset(tmp_path, "val", make_config(), cache=cache)
        assert torch.equal(dataset[0]["video"], dataset[0]["video"])
        assert len(calls) == expected


def test_clips_of_one_name_in_two_categories_are_two(tmp_path):
    write_s4(tmp_path, ["x,0,dog,val", "x,0,cat,val", "x,0,cat,test"])
    shutil.rmtree(tmp_path / "s4_data/visual_frames/val/cat/x")
    for i in (1, 2, 3):
        picture = np.full((32, 32, 3), 200, np.uint8)
        write_png(tmp_path / f"s4_data/visual_frames/val/cat/x/x_{i}.png", picture)
    dataset = avs.Dataset(tmp_path, "val", make_config(), cache=True)
    assert dataset[0]["video"].mean() < 0 < dataset[1]["video"].mean()
    # Predictions are kept by name.
    report = avs.verify(tmp_path, make_config())
    assert report.problems == ("val: 1 names come more than once: x",)
    assert "1 names are in val and test: x" in report.notes


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_masks_are_thresholded_and_not_dithered(tmp_path, mode):
    write_s4(tmp_path)
    grey = np.tile(np.arange(112, 144, dtype=np.uint8), (32, 1))
    picture = Image.fromarray(grey)
    if mode == "P":
        picture.putpalette([value for i in range(256) for value in (i, i, i)])
    path = tmp_path / "s4_data/gt_masks/train/dog_barking/dog_2/dog_2_1.png"
    (picture.convert("RGB") if mode == "RGB" else picture).save(path)
    assert Image.open(path).mode == mode
    item = avs.Dataset(tmp_path, "train", make_config())[1]
    assert torch.equal(item["labels"][0], torch.from_numpy((grey >= 128).astype(np.uint8)))


def drop(*names):
    return lambda data: [(data / name).unlink() for name in names]


MASKS, FRAMES = "gt_masks/test/driving_buses/bus", "visual_frames/test/driving_buses/bus"
FAULTS = {
    "a mask is missing": (drop(f"{MASKS}/bus_2.png"), r"gt_masks/.*/bus: expected 3 masks, got no bus_2"),
    "a mask too many": (
        lambda data: write_png(data / MASKS / "bus_4.png", np.zeros((32, 32), np.uint8)),
        r"/bus: expected 3 masks, got 4",
    ),
    "a mask of another suffix": (
        lambda data: (data / MASKS / "bus_2.png").rename(data / MASKS / "bus_2.PNG"),
        r"gt_masks/.*/bus: expected 3 masks, got no bus_2\.png",
    ),
    "a mask of another format": (
        lambda data: (data / MASKS / "bus_2.png").rename(data / MASKS / "bus_2.jpg"),
        r"gt_masks/.*/bus: expected 3 masks, got no bus_2\.png",
    ),
    "no masks": (
        lambda data: shutil.rmtree(data / MASKS),
        r"gt_masks/test/driving_buses/bus: expected a folder of masks, got none",
    ),
    "a frame is missing": (drop(f"{FRAMES}/bus_3.png"), r"visual_frames/.*/bus: expected 3 frames, got no bus_3"),
    "a frame too many": (
        lambda data: write_png(data / FRAMES / "bus_4.png", np.zeros((32, 32, 3), np.uint8)),
        r"/bus: expected 3 frames, got 4",
    ),
    "a frame twice": (
        lambda data: shutil.copyfile(data / FRAMES / "bus_1.png", data / FRAMES / "bus_1.jpg"),
        r"/bus: expected 3 frames, got 4",
    ),
    "no sound": (drop("audio_wav/test/driving_buses/bus.wav"), r"bus\.wav: expected a sound, got none"),
}
BROKEN = {
    "a mask of another size": (
        lambda data: write_png(data / MASKS / "bus_2.png", np.zeros((16, 32), np.uint8)),
        r"bus_2\.png: expected a mask of 32x32 pixels, got 32x16",
    ),
    "a mask that is no picture": (
        lambda data: (data / MASKS / "bus_1.png").write_bytes(b"GIF89a"),
        r"bus_1\.png: expected a jpg or png picture",
    ),
    "a sound that is none": (
        lambda data: (data / "audio_wav/test/driving_buses/bus.wav").write_bytes(b"no sound"),
        r"bus\.wav: expected a media file",
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, *BROKEN])
def test_faulty_clips_are_set_aside_and_reported(tmp_path, fault):
    spoil, message = (FAULTS | BROKEN)[fault]
    write_s4(tmp_path)
    spoil(tmp_path / "s4_data")
    test = avs.Dataset(tmp_path, "test", make_config())
    batch = tasks.collate([test[0], test[1]])
    assert batch.ids == ("cat_2",)
    assert len(batch.failed) == 1
    assert re.search(message, str(test[1]))
    report = avs.verify(tmp_path, make_config())
    if fault in FAULTS:
        assert report.missing == {"train": (), "val": (), "test": ("bus",)}
        expected = rf"test: 1 of 2 clips lack files or have too many: bus; first .*{message}"
        assert re.search(expected, report.problems[0])
    else:
        assert report.ok
        report = avs.verify(tmp_path, make_config(), decode=True, workers=0)
        assert report.problems == report.undecodable == batch.failed
    assert not report.ok
    assert len(report.problems) == 1


def test_a_training_clip_may_have_more_masks(tmp_path):
    write_s4(tmp_path)
    write_png(tmp_path / "s4_data/gt_masks/train/dog_barking/dog_2/dog_2_2.png", np.zeros((32, 32), np.uint8))
    assert avs.Dataset(tmp_path, "train", make_config())[1]["labels"].shape == (1, 32, 32)
    assert avs.verify(tmp_path, make_config()).ok


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected a header name, start, category, split, got ''"),
        ("\n".join(ROWS), r"expected a header .*, got '-dog_1,0,dog_barking,train'"),
        ("name,start,split,category\na,0,train,dog", r"expected a header .*, got 'name,start,split,category'"),
        ("name,category,split\na,dog,train", r"expected a header"),
        (HEADER, r"expected a row for each clip, got a header alone"),
        (f"{HEADER}\na,0,dog", r"line 2: expected 4 fields as in the header, got 3: 'a,0,dog'"),
        (f"{HEADER}\n\n{ROWS[0]}\na,0,dog,dev", r"line 4: expected one of the splits train, val, test, got 'dev'"),
        (f"{HEADER}\n../a,0,dog,val", r"line 2: expected a name that is a plain file name, got '\.\./a'"),
        (f"{HEADER}\na..b,0,dog,val", r"expected a name that is a plain file name"),
        (f"{HEADER}\n,0,dog,val", r"expected a name that is a plain file name, got ''"),
        (f'{HEADER}\n"a\nb",0,dog,val', r"expected a name that is a plain file name, got 'a\\nb'"),
        (f"{HEADER}\na,0,/dog,val", r"expected a category that is a plain file name, got '/dog'"),
        (f"{HEADER}\na,0,..,val", r"expected a category that is a plain file name, got '\.\.'"),
        (f"{HEADER}\na,0,c:\\dog,val", r"expected a category that is a plain file name"),
        ("\udcff".encode("utf-8", "surrogateescape"), "expected UTF-8 text, got byte 0xff"),
    ],
)
def test_faulty_lists_are_named(tmp_path, text, message):
    path = tmp_path / "s4_meta_data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"s4_meta_data\.csv.*{message}"):
        avs.Dataset(tmp_path, "val", make_config())
    problem = avs.verify(tmp_path, make_config()).problems[0]
    assert re.search(message, problem)


def test_lists_as_other_programs_write_them(tmp_path):
    text = "\ufeff" + "\r\n".join(["id,when,category,split,more", *(f"{row}," for row in ROWS)])
    (tmp_path / "s4_meta_data.csv").write_text(text, encoding="utf-8")
    rows = avs_data.read_meta(tmp_path / "s4_meta_data.csv")
    assert [f"{row.name},{row.category},{row.split}" for row in rows] == [
        ",".join(row.split(",")[i] for i in (0, 2, 3)) for row in ROWS
    ]


def test_faulty_arguments_of_the_data_set_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected s4_meta_data\.csv there or in Single-source/, got none"):
        avs.Dataset(tmp_path, "val", make_config())
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'dev'"):
        avs.Dataset(write_s4(tmp_path), "dev", make_config())
    # The data set's clips have three frames.
    item = avs.Dataset(tmp_path, "val", make_config(frames=5))[0]
    assert "expected 5 frames, got no cat_1_4, cat_1_5" in str(item)


@pytest.mark.parametrize("workers", [0, 1])
def test_verify_of_a_whole_data_set(tmp_path, workers):
    report = avs.verify(write_s4(tmp_path), make_config(), decode=True, workers=workers)
    assert report.ok, report.problems
    assert (report.rows, report.categories) == (5, 3)
    assert report.splits == {"train": 2, "val": 1, "test": 2}
    assert report.missing == {"train": (), "val": (), "test": ()}
    assert str(report).splitlines() == [
        "s4_meta_data.csv: 5 rows, 3 categories",
        "splits: train 2, val 1, test 2",
        "note: train: S4 has 3452 clips, got 2",
        "note: val: S4 has 740 clips, got 1",
        "note: test: S4 has 740 clips, got 2",
        "note: S4 has 23 categories, got 3",
    ]
    assert not report.published


def test_verify_reports_each_problem(tmp_path):
    report = avs.verify(tmp_path / "nowhere", make_config())
    assert not report.ok
    assert report.splits == {}
    write_s4(tmp_path)
    text = "\n".join([HEADER, ROWS[0], "a,0,dog,dev", "../a,0,dog,val", *ROWS[1:], "gone,0,dog,val", ROWS[2]])
    (tmp_path / "s4_meta_data.csv").write_text(text)
    report = avs.verify(tmp_path, make_config())
    assert [re.search(r"line \d+", text)[0] for text in report.problems[:2]] == ["line 3", "line 4"]
    assert report.problems[2].startswith("val: 1 of 3 clips lack files or have too many: gone; first ")
    assert report.missing["val"] == ("gone",)
    assert report.problems[3:] == ("val: 1 names come more than once: cat_1",)
    assert report.rows == 9
