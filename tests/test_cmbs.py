"""CMBS: the head against the released one, and what the whole baseline trains."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from benchmarks.baselines.cmbs import CMBS, CMBSHead, Scores, head_tensors, loss
from lavish_fast import backbones
from lavish_fast.config import Config, SwinV2Config
from parity import GOLDENS, randomise, relative_error

TINY = SwinV2Config(
    img_size=32, embed_dim=16, depths=(2, 1), num_heads=(1, 2), window_size=4, pretrained_window_sizes=(0, 0)
)
EXPECTED = ("is_event_scores", "event_scores", "audio_visual_gate", "av_score")
DEAD = ("encoder_layer.", "decoder_layer.", "decoder.layers.0.self_attn.", "_norm.", "ave_bottleneck.")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def golden():
    path = GOLDENS / "cmbs_head.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in LAVISH_GOLDENS ({GOLDENS})")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parts = {"state_dict": {}, "input": {}, "expect": {}}
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        parts[part][name] = tensor
    return config, parts


def released(golden, dtype):
    config, parts = golden
    options = {name: config[name] for name in ("alpha", "beta", "gamma")}
    head = CMBSHead(width=config["d_model"], **options).to(dtype).eval()
    head.load_state_dict(head_tensors(parts["state_dict"]))
    return head


def make_head(**options):
    torch.manual_seed(0)
    return randomise(CMBSHead(**options)).double().eval()


@pytest.fixture(scope="module")
def head():
    return make_head()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CMBS(TINY, classes=5)
    randomise(model.backbone)
    randomise(model.head)
    return model.double().eval()


def inputs(batch=2, seconds=2, seed=0):
    return noise(batch, seconds, 1, 96, 64, seed=seed), noise(batch, seconds, 3, 32, 32, seed=seed + 1)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_head_is_the_released_one(golden, dtype, budget, grad):
    parts = golden[1]
    with torch.set_grad_enabled(grad):  # without gradients PyTorch takes other kernels
        scores = released(golden, dtype)(
            parts["input"]["visual_feature"].to(dtype), parts["input"]["audio_feature"].to(dtype)
        )
    for got, name in zip(scores, EXPECTED, strict=True):
        assert got.dtype == dtype
        assert got.shape == parts["expect"][name].shape
        assert relative_error(got, parts["expect"][name]) < budget, name


def test_only_dead_parameters_are_dropped(golden):
    state_dict = golden[1]["state_dict"]
    live = {name: tensor.shape for name, tensor in state_dict.items() if not any(word in name for word in DEAD)}
    assert {name: tensor.shape for name, tensor in CMBSHead().state_dict().items()} == live
    assert {name: tensor.shape for name, tensor in head_tensors(state_dict).items()} == live
    with pytest.raises(RuntimeError, match="Unexpected key"):
        CMBSHead().load_state_dict(state_dict)


def test_head_tensors_keeps_what_it_does_not_know(head):
    state_dict = head.state_dict()
    dead = {
        "audio_encoder.encoder_layer.norm1.bias": torch.zeros(256),
        "video_decoder.decoder.layers.0.self_attn.in_proj_bias": torch.zeros(768),
        "video_norm.weight": torch.zeros(256),
    }
    unknown = {"spatial_channel_att.extra.weight": torch.zeros(1)}
    assert head_tensors(state_dict | dead | unknown).keys() == (state_dict | unknown).keys()


@torch.no_grad()
@pytest.mark.parametrize("changed", ["video", "audio"])
def test_every_score_depends_on_both_streams_of_its_own_clip(head, changed):
    given = {"video": noise(2, 5, 6, 6, 512), "audio": noise(2, 5, 128, seed=1)}
    before = head(**given)
    given[changed] = given[changed].clone()
    given[changed][1, 2] += 0.5  # one second of the second clip
    after = head(**given)
    for name, old, new in zip(Scores._fields, before, after, strict=True):
        clip = 1 if name in ("is_event", "gate") else 0  # the axis
        difference = (new - old).abs().movedim(clip, 0)
        assert difference[0].max() < 1e-12, name
        assert difference[1].max() > 1e-6, name


@torch.no_grad()
def test_shapes_are_those_of_the_released_head_for_maps_and_clips_of_any_size():
    head = make_head(classes=7)
    for side, seconds in (((7, 7), 10), ((6, 6), 10), ((1, 2), 1), ((2, 3), 3)):
        scores = head(noise(2, seconds, *side, 512), noise(2, seconds, 128))
        assert [tuple(score.shape) for score in scores] == [(seconds, 2, 1), (2, 7), (seconds, 2, 1), (2, 7)]
        assert ((scores.gate > 0) & (scores.gate < 1)).all()


@torch.no_grad()
def test_places_have_no_order_but_seconds_do(head):
    video, audio = noise(1, 5, 2, 3, 512), noise(1, 5, 128, seed=1)
    scores = head(video, audio)
    turned = head(video.flip(3, 2), audio)
    reversed_ = head(video.flip(1), audio.flip(1))
    for name, score, same, other in zip(Scores._fields, scores, turned, reversed_, strict=True):
        assert relative_error(same, score) < 1e-12, name
        assert relative_error(other.flip(0) if name in ("is_event", "gate") else other, score) > 1e-6, name


@torch.no_grad()
def test_event_is_raised_by_the_streams_own_scores():
    options = [make_head(gamma=gamma)(noise(2, 5, 2, 2, 512), noise(2, 5, 128)) for gamma in (0.0, 0.3)]
    assert relative_error(options[1].event, options[0].event + 0.3 * options[0].av_score) < 1e-12
    assert relative_error(options[1].event, options[0].event) > 1e-3


@torch.no_grad()
def test_dropouts_are_the_released_ones():
    head, calls = make_head(), []
    for name, module in head.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, *_, name=name: calls.append((name, module.p)))
    head.train()(noise(1, 4, 2, 2, 512), noise(1, 4, 128))
    expected = [("dropout", 0.2), ("spatial_channel_att.dropout", 0.2)]
    expected += [("AVInter.dropout", 0.1), ("VAInter.dropout", 0.1)]
    for stream in ("video", "audio"):
        expected += 3 * [(f"{stream}_decoder.decoder.layers.0.dropout", 0.1)]
        expected += [(f"{stream}_encoder.encoder.layers.{i}.dropout{j}", 0.1) for i in (0, 1) for j in ("", 1, 2)]
    assert sorted(calls) == sorted(expected)
    attention = {name: m.dropout for name, m in head.named_modules() if isinstance(m, torch.nn.MultiheadAttention)}
    assert attention == {name: 0.2 if "Inter" in name else 0.1 for name in attention}


@torch.no_grad()
def test_dropouts_are_set_by_their_rates_and_off_in_eval():
    given = noise(1, 4, 2, 2, 512), noise(1, 4, 128)
    none = dict.fromkeys(("dropout", "visual_dropout", "inter_dropout"), 0.0)
    quiet = make_head(**none)
    expected = quiet(*given).event
    assert relative_error(make_head()(*given).event, expected) < 1e-12
    assert relative_error(quiet.train()(*given).event, expected) < 1e-12
    for rate in none:
        assert relative_error(make_head(**none | {rate: 0.3}).train()(*given).event, expected) > 1e-4, rate


def test_loss_is_the_formula():
    is_event, event = noise(3, 4, 1), noise(4, 28, seed=1)
    labels = torch.tensor([[28, 3, 3], [28, 28, 28], [7, 28, 7], [28, 28, 9]])
    expected = 0.0
    for clip, target in enumerate((3, 0, 7, 9)):
        expected += (math.log(sum(math.exp(x) for x in event[clip].tolist())) - event[clip, target].item()) / 4
        for second in range(3):
            x = is_event[second, clip, 0].item()
            expected += math.log1p(math.exp(-x if labels[clip, second] != 28 else x)) / 12
    got = loss(Scores(is_event, event, torch.empty(0), torch.empty(0)), labels)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_only_projection_and_head_are_trained(model):
    model.train()
    model.zero_grad()
    patches, video = inputs()
    maps, audio = model.encode(patches.flatten(0, 1).requires_grad_(), video.flatten(0, 1).requires_grad_())
    assert not maps.requires_grad
    assert not audio.requires_grad
    loss(model(patches, video), torch.tensor([[5, 1], [2, 5]])).backward()
    model.eval()
    for name, p in model.named_parameters():
        frozen = name.startswith(("backbone.", "vggish."))
        assert p.requires_grad != frozen, name
        assert (p.grad is None) == frozen, name
        assert frozen or torch.isfinite(p.grad).all(), name
    # Adding the same to all scores of a softmax, or to all keys, changes nothing: those alone may have no gradient.
    still = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() < 1e-15}
    assert all(name.endswith("key.bias") for name in still), still


@torch.no_grad()
def test_encoders_are_the_backbone_and_vggish(model):
    patches, images = (x.flatten(0, 1) for x in inputs(1, 3))
    maps, audio = model.encode(patches, images)
    assert maps.shape == (3, 4, 4, 32)
    assert relative_error(maps.mean((1, 2)), model.backbone(images)) < 1e-12
    assert torch.equal(audio, model.vggish(patches))


@torch.no_grad()
def test_a_clip_alone_is_the_clip_in_a_batch(model):
    patches, video = inputs()
    together = model(patches, video)
    assert [tuple(x.shape) for x in together] == [(2, 2, 1), (2, 5), (2, 2, 1), (2, 5)]
    assert {x.dtype for x in together} == {torch.float64}
    for i in range(2):
        alone = model(patches[i : i + 1], video[i : i + 1])
        for name, got, batch in zip(Scores._fields, alone, together, strict=True):
            assert relative_error(got, batch[:, i : i + 1] if batch.ndim == 3 else batch[i : i + 1]) < 1e-12, name


@torch.no_grad()
def test_every_score_depends_on_sound_and_frames(model):
    first, other = inputs(1), inputs(1, seed=7)
    before = model(*first)
    for given in ((other[0], first[1]), (first[0], other[1])):
        for name, old, new in zip(Scores._fields, before, model(*given), strict=True):
            assert relative_error(new, old) > 1e-9, name


def test_the_default_is_the_papers(monkeypatch):
    asked = []
    monkeypatch.setattr(backbones, "build", lambda config: asked.append(config) or torch.nn.Identity())
    with torch.device("meta"):
        model = CMBS()
    assert asked == [Config.from_preset("ave-swinv2-large").backbone]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1536 * 512 + 512 + 9_200_473
