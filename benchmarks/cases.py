"""What is measured: each case's sizes, its paths, its truth in float64, and the least work that it takes.

A case is a network or an op. Its paths compute the same from the same weights; the first is plain PyTorch, and the
others' errors are judged by what it does in the same precision. Inputs are drawn at random for one or two clips, which
a larger batch repeats: outputs, BatchNorm's statistics and gradients are then those of the small batch, so that every
clip of any batch is checked against one float64 run.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from lavish_fast.kernels import _checks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from benchmarks import roofline
from benchmarks.baselines.mbt import MBTConfig
from benchmarks.measure import PRECISIONS, Unavailable
from lavish_fast import Model, attention, backbones, ops, reference, tasks
from lavish_fast.adapter import LavishAdapter, arithmetic
from lavish_fast.backbones.swin_v2 import CONSTANTS, WindowAttention
from lavish_fast.concatenated import Concatenated
from lavish_fast.config import (
    VIT_SPECTROGRAM,
    AdapterConfig,
    AVQAConfig,
    AVSConfig,
    Config,
    ResNetConfig,
    SpectrogramConfig,
    SwinV2Config,
    VideoMAEConfig,
    ViTConfig,
)
from lavish_fast.tasks import ave
from lavish_fast.vggish import PATCH

MODES = ("inference", "training")
LATENTS = (1, 2, 4, 8, 16, 32, 64)  # the paper's Figure 1
_AVS = AdapterConfig(latents=16, reduction=4)  # and AVQA: the paper's settings


@dataclass(frozen=True)
class Preset:
    """The sizes of every case. small: the shapes of the paper's, each side and width cut down."""

    swin: Config
    vit: Config
    mbt: MBTConfig
    frames: int  # of the other encoders' video
    side: int


PRESETS = {
    "paper": Preset(
        Config.from_preset("ave-swinv2-large"),
        # Table 2's settings: 7.4 M trainable parameters.
        Config.from_preset("ave-vit-base", adapter=AdapterConfig(reduction=4)),
        MBTConfig(),
        frames=32,
        side=224,
    ),
    "small": Preset(
        Config(
            SwinV2Config(img_size=64, embed_dim=32, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), window_size=4),
            spectrogram=SpectrogramConfig(mel_bins=64, frames=64, frame_shift_ms=15.6),
            frames=4,
        ),
        Config(
            ViTConfig(img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=2),
            adapter=AdapterConfig(reduction=4),
            spectrogram=replace(VIT_SPECTROGRAM, mel_bins=32, frames=26, frame_shift_ms=40.0),
            frames=4,
        ),
        MBTConfig((8, 64, 64), (2, 8, 8), (100, 32), (4, 8), width=64, depth=4, heads=2, mlp=256, fusion_layer=2),
        frames=4,
        side=64,
    ),
}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random gates, norms and BatchNorm buffers: fresh ones make adapters zero and would hide every fault."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name, tensor in tensors.items():
        if name.endswith(("gate", "gate_av")):
            tensor.copy_(torch.empty_like(tensor).uniform_(0.3, 0.7, generator=generator))
        elif name.endswith("running_var"):
            tensor.copy_(torch.empty_like(tensor).uniform_(0.5, 1.5, generator=generator))
        elif name.endswith("running_mean") or (tensor.ndim == 1 and name.endswith("bias")):
            tensor.copy_(torch.empty_like(tensor).normal_(0, 0.1, generator=generator))
        elif name.endswith("bn3.weight"):  # the last of a bottleneck: fifty that double their input leave float32
            tensor.copy_(torch.empty_like(tensor).normal_(0.2, 0.02, generator=generator))
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.copy_(torch.empty_like(tensor).normal_(1, 0.1, generator=generator))
    module.load_state_dict(tensors)
    return module


def _draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal float64 numbers that every precision represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).half().bfloat16().double()


@dataclass(frozen=True)
class Rearranged:
    """A path that narrows the weights itself, after it has folded constants into them; and its form for training."""

    make: Callable[[nn.Module, torch.dtype], Callable]
    train: Callable[[nn.Module, torch.dtype], nn.Module] | None = None


class Trained(nn.Module):
    """A model, and a form of it that trains its parameters: the names of the one, the calls of the other."""

    def __init__(self, model: Model, fast: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.__dict__["fast"] = fast.train()

    @property
    def blocks(self) -> nn.ModuleList | None:
        return getattr(self.fast, "blocks", None)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fast(*inputs)


@dataclass
class Problem:
    """One case at one size, for one or two clips.

    truth: a module in float32 that computes it, or a function. inputs: float64, on the CPU. batched: which of them
    hold clips along their first axis. wide: the places of those that stay float32 beside narrower ones. paths: from
    the truth to what computes it otherwise. loss: of outputs and labels, where there is a training step; without it a
    backward begins with a gradient of the outputs that is drawn. differentiated: the places of inputs whose gradients
    training wants. trains: the paths that have a backward, None for all. rows: outputs as a tensor with a row per clip
    or image, in which errors show. work: the least work of `batch` clips (batch, itemsize, training), None to count the
    truth's matrix products. parameter_name: the truth's name of a path's parameter. for_training: the truth's weights,
    a copy, as training has them.
    """

    truth: Callable
    inputs: tuple[Tensor, ...]
    paths: Mapping[str, Callable[[Callable], Callable]]
    work: Callable[[int, int, bool], list[roofline.Op]] | None = None
    loss: Callable[[Any, Tensor], Tensor] | None = None
    labels: Tensor | None = None
    batched: tuple[bool, ...] | None = None
    wide: tuple[int, ...] = ()
    differentiated: tuple[int, ...] = ()
    rows: Callable[[Any], Tensor] = lambda out: out
    trains: tuple[str, ...] | None = None
    parameter_name: Callable[[str, str], str] = lambda path, name: name
    for_training: Callable[[Callable], Callable] = lambda truth: truth

    def __post_init__(self) -> None:
        self.batched = self.batched or (True,) * len(self.inputs)

    def build(self, path: str, dtype: torch.dtype, device: str, *, training: bool) -> Callable:
        """The path's module, or function, with the truth's weights."""
        make, truth = self.paths[path], copy.deepcopy(self.truth)
        if training:
            truth = self.for_training(truth)
        if isinstance(make, Rearranged):
            return (make.train if training else make.make)(truth.to(device).eval(), dtype)
        built = make(truth)
        if isinstance(built, nn.Module):
            built = built.to(device, dtype).train(training)
        return built

    def batch(self, repeats: int, dtype: torch.dtype, device: str, *, training: bool = False) -> tuple[Tensor, ...]:
        """The inputs, their clips repeated."""
        wide = torch.promote_types(dtype, torch.float32)
        types = [
            (wide if i in self.wide else dtype) if x.is_floating_point() else x.dtype for i, x in enumerate(self.inputs)
        ]
        inputs = [x.to(device, kind) for x, kind in zip(self.inputs, types)]
        return tuple(
            (x.repeat(repeats, *(1,) * (x.ndim - 1)) if batched else x)
            .detach()
            .requires_grad_(training and i in self.differentiated)
            for i, (x, batched) in enumerate(zip(inputs, self.batched))
        )

    def upstream(self, outputs: Tensor, repeats: int) -> Tensor:
        """A gradient of the outputs for a backward to begin with: normal numbers, repeated as the clips are."""
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            rows = self.rows(leaf)
            drawn = _draw(len(rows) // repeats, *rows.shape[1:], seed=9).to(rows)
            (gradient,) = torch.autograd.grad(rows, leaf, drawn.repeat(repeats, *(1,) * (rows.ndim - 1)))
        return gradient.contiguous()

    def gradients(self, path: str, module: Callable, inputs: Sequence[Tensor], repeats: int) -> dict[str | int, Tensor]:
        """The gradients that a backward left: of parameters by the truth's names, of inputs by their places.

        Without a loss, which is a mean, those of what all clips share are sums over them: here of one repeat.
        """
        found: dict[str | int, Tensor] = {i: inputs[i] for i in self.differentiated}
        if isinstance(module, nn.Module):
            found |= {self.parameter_name(path, name): p for name, p in module.named_parameters()}
        summed = [
            name for name in found if self.loss is None and not (name in self.differentiated and self.batched[name])
        ]
        return {
            name: t.grad.detach().double() / (repeats if name in summed else 1)
            for name, t in found.items()
            if t.grad is not None
        }


@dataclass(frozen=True)
class Case:
    """A thing to measure.

    settings: its sizes at a preset, as plain data. problem: at one of them, for `clips` clips. batches: which of the
    batch sizes that are asked for make sense. paths: those of its problems.
    """

    about: str
    settings: Callable[[Preset], list[dict[str, Any]]]
    problem: Callable[[Preset, dict[str, Any], int], Problem]
    modes: tuple[str, ...] = ("inference",)
    extra_precisions: tuple[str, ...] = ()
    batches: Callable[[Sequence[int]], Sequence[int]] = lambda batches: batches
    paths: tuple[str, ...] = ("reference",)


# Networks


def _gentle(model: Model) -> Model:
    """With gates of 0.06 to 0.14, and before latents of 0.012 to 0.028.

    In a network of the paper's depth with gates of 0.5 and random weights gradients of training grow from block to
    block and amplify rounding beyond any use: float32's are off by seven times their size, with gates of 0.1 by 6e-5.
    Latents are long vectors, of 16 and more, and the gates before them amplify more: at 0.1 the released order's
    gradients in bfloat16 are off by hundreds of times their size in the first blocks, at 0.02 by less than twice.
    Inference has neither trouble, and with gates this small would not show the latents in bfloat16.
    """
    for name, tensor in model.state_dict().items():
        if name.endswith((".gate", ".gate_av")):
            tensor.mul_(0.2 if name.endswith(".gate") else 0.04)
    return model


def _one(preset: Preset) -> list[dict[str, Any]]:
    return [{}]


def _clips(config: Config, clips: int) -> tuple[Tensor, Tensor]:
    side, sound = config.backbone.img_size, config.spectrogram
    audio = _draw(clips, config.frames, sound.frames, sound.mel_bins, seed=1)
    return audio, _draw(clips, config.frames, 3, side, side, seed=2)


def _logits(probabilities: Tensor) -> Tensor:
    """Softmax's input but for a constant: between probabilities that are nearly equal an error would not show."""
    logits = probabilities.double().log()
    return logits - logits.mean(-1, keepdim=True)


def _lavish(
    config: Config, clips: int, paths: Mapping[str, Callable], trains: tuple[str, ...] | None = None
) -> Problem:
    torch.manual_seed(0)
    return Problem(
        randomise(Model(config)),
        _clips(config, clips),
        {"reference": lambda model: model.set_path("reference"), **paths},
        work=lambda batch, itemsize, training: roofline.model_ops(
            config, batch, itemsize=itemsize, training=training, fused=True
        ),
        loss=ave.loss,
        labels=torch.arange(clips * config.frames).view(clips, -1) % len(config.classes),
        rows=lambda out: _logits(out).unflatten(0, (-1, config.frames)).flatten(1),
        trains=trains,
        parameter_name=_parameter_name,
        for_training=_gentle,
    )


def _parameter_name(path: str, name: str) -> str:
    from benchmarks.baselines.released import parameter_name

    return parameter_name(name) if path.startswith("released") else name.removeprefix("model.")


def _released(form: str) -> Callable[[Model], nn.Module]:
    def build(model: Model) -> nn.Module:
        from benchmarks.baselines.released import ReleasedAVE

        return ReleasedAVE.from_model(model, form)

    return build


_NARROWS = ("concatenated", "folded", "xformers", "fused", "optimized")
_TRAINS = ("reference", "released", "released-bmm", "concatenated", "fused", "optimized")


def _ave(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    from lavish_fast.inference import Inference
    from lavish_fast.runtime import optimize

    def inference(**options: Any) -> Rearranged:
        return Rearranged(lambda model, dtype: Inference(model, dtype=dtype, **options))

    def both(path: str) -> Rearranged:
        return Rearranged(
            inference(fold=False, path=path).make,
            lambda model, dtype: Trained(model, Concatenated(model, dtype=dtype, path=path)),
        )

    paths = {
        "model": lambda model: model.set_path("auto"),
        "released": _released("conv"),
        "released-bmm": _released("bmm"),
        "concatenated": both("reference"),
        "folded": inference(path="reference"),
        "xformers": inference(path="reference", attention="xformers"),
        "fused": both("fused"),
        "optimized": Rearranged(
            lambda model, dtype: optimize(model, dtype=dtype),
            lambda model, dtype: Trained(model, optimize(model, training=True, dtype=dtype)),
        ),
    }
    return _lavish(preset.swin, clips, paths, _TRAINS)


def _latents(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    adapter = replace(preset.swin.adapter, latents=setting["latents"])
    return _lavish(replace(preset.swin, adapter=adapter), clips, {})


def _networks(preset: Preset) -> dict[str, Config]:
    """Every preset of every task; at small sizes the first of each task on each kind of backbone, cut down."""
    networks = {name: Config.from_preset(name) for name in Config.presets()}
    if preset == PRESETS["paper"]:
        return networks
    side = preset.side
    sections = {"avs": AVSConfig(channels=16, size=side), "avqa": AVQAConfig(width=32)}
    picture = {"spectrogram": preset.vit.spectrogram, "frames": preset.vit.frames}
    square = {"spectrogram": preset.swin.spectrogram, "frames": preset.swin.frames}
    clip = SpectrogramConfig(window_seconds=0.0, mel_bins=side, frames=side, frame_shift_ms=10.0)
    video = VideoMAEConfig(side, 8, preset.frames, embed_dim=preset.vit.backbone.embed_dim, depth=2, num_heads=2)
    small = {
        "swinv2": square | {"backbone": preset.swin.backbone},
        "vit": picture | {"backbone": preset.vit.backbone},
        "videomae": {"backbone": video, "spectrogram": clip, "frames": preset.frames},
        "resnet": square | {"backbone": ResNetConfig(side, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32))},
    }
    found: dict[tuple[str, str], tuple[str, Config]] = {}
    for name, config in networks.items():
        task, kind = key = config.task, config.backbone.kind
        if key not in found:
            head = {"head": sections[task]} if task in sections else {}
            found[key] = name, replace(config, **small[kind], **head)
    return dict(found.values())


def _network(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    from lavish_fast.runtime import optimize

    config = _networks(preset)[setting["network"]]
    count, task = clips * config.frames, tasks.load(config.task)
    side, sound = config.backbone.img_size, config.spectrogram
    if config.task == "avs":
        side = config.head.size
    windows = config.images if sound.window_seconds == 0 else config.frames
    audio = _draw(clips, windows, sound.frames, sound.mel_bins, seed=1)
    video = _draw(clips, config.frames, 3, side, side, seed=2)
    labels = torch.arange(clips) % max(len(config.classes), 1)
    inputs = (audio, video)
    if config.task == "ave":
        labels = torch.arange(count).view(clips, -1) % len(config.classes)
        if config.head.vggish:
            inputs += (_draw(clips, config.frames, *PATCH, seed=4),)
    elif config.task == "avs":
        inputs, labels = (video, audio), (_draw(clips, 1, side, side, seed=3) > 0).float()
    elif config.task == "avqa":
        words = torch.arange(clips * config.head.length).view(clips, -1) % len(config.head.words)
        inputs = audio, video, _draw(*video.shape, seed=4), words

    def rows(outputs: Any) -> Tensor:
        if config.task == "ave":
            return _logits(outputs).unflatten(0, (-1, config.frames)).flatten(1)
        if config.task == "avs":  # its maps as well
            logits, maps, _ = outputs
            return torch.cat([x.unflatten(0, (-1, config.frames)).flatten(1) for x in (logits, *maps)], 1)
        if config.task == "avqa":
            return torch.cat([outputs[0], *(x.unflatten(0, (-1, config.frames)).flatten(1) for x in outputs[1:])], 1)
        return outputs

    torch.manual_seed(0)
    return Problem(
        _without_dropout(randomise(Model(config))),
        inputs,
        {
            "reference": lambda model: model.set_path("reference"),
            "optimized": Rearranged(
                lambda model, dtype: optimize(model, dtype=dtype),
                lambda model, dtype: Trained(model, optimize(model, training=True, dtype=dtype)),
            ),
        },
        loss=task.loss,
        labels=labels,
        rows=rows,
        parameter_name=_parameter_name,
        for_training=_gentle,
    )


def _ave_vit(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    return _lavish(preset.vit, clips, {})


def _backbone(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    config = getattr(preset, setting["backbone"])
    torch.manual_seed(0)
    side = config.backbone.img_size

    def timm(truth: nn.Module) -> nn.Module:
        from timm.models.swin_transformer_v2 import SwinTransformerV2
        from timm.models.vision_transformer import VisionTransformer

        cls = SwinTransformerV2 if config.backbone.kind == "swinv2" else VisionTransformer
        module = cls(**vars(config.backbone), num_classes=0).requires_grad_(False)
        module.load_state_dict(truth.state_dict())
        return module

    # The images of a clip, and as many more in the place of its spectrograms.
    return Problem(
        randomise(backbones.build(config.backbone)),
        (_draw(2 * clips * config.frames, 3, side, side, seed=2),),
        {"reference": lambda module: module, "timm": timm},
        # The listing of a model whose spectrograms are images: for a ViT they are not, so count one stream twice.
        work=lambda batch, itemsize, _: roofline.model_ops(
            replace(config, modality="video", frames=2 * config.frames), batch, itemsize=itemsize, adapters=False
        ),
    )


def _cmbs(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    from benchmarks.baselines import cmbs

    torch.manual_seed(0)
    config = preset.swin
    network = _without_dropout(randomise(cmbs.CMBS(config.backbone, len(config.classes) - 1)))
    labels = torch.arange(clips * config.frames).view(clips, -1) % len(config.classes)
    # The audio patches are log magnitudes, whatever their scale.
    inputs = (_draw(clips, config.frames, 1, 96, 64, seed=1), _clips(config, clips)[1])

    def rows(scores: cmbs.Scores) -> Tensor:
        return torch.cat([scores.is_event[..., 0].T, scores.event, scores.gate[..., 0].T, scores.av_score], 1)

    return Problem(network, inputs, {"reference": lambda m: m}, loss=cmbs.loss, labels=labels, rows=rows)


def _mbt(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    from benchmarks.baselines.mbt import MBT

    torch.manual_seed(0)
    video, sound = preset.mbt.video, preset.mbt.spectrogram
    return _classifier(
        randomise(MBT(preset.mbt)), _draw(clips, 3, *video, seed=2), _draw(clips, *sound, seed=1), preset.mbt.classes
    )


def _encoders(name: str) -> Callable[[Preset, dict[str, Any], int], Problem]:
    def problem(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
        if find_spec("torchvision") is None:
            raise Unavailable("torchvision is missing: pip install -e '.[benchmarks]'")
        from benchmarks.baselines.encoders import CONFIGS, INPUTS, AudioVisualEncoders

        torch.manual_seed(0)
        (channels, frames, height, width), sound, _ = INPUTS[name]
        size = (channels, min(frames, preset.frames), min(height, preset.side), min(width, preset.side))
        network = randomise(AudioVisualEncoders(CONFIGS[name]))
        problem = _classifier(
            network, _draw(clips, *size, seed=2), _draw(clips, *sound, seed=1), network.classifier.out_features
        )
        # BatchNorm on one row of features has no statistics.
        alone = clips == 1 and any(isinstance(module, nn.BatchNorm1d) for module in network.modules())
        return replace(problem, trains=()) if alone else problem

    return problem


def _classifier(network: nn.Module, video: Tensor, sound: Tensor, classes: int) -> Problem:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)

    labels = torch.arange(len(video)) % classes
    return Problem(_without_dropout(network), (video, sound), {"reference": lambda m: m}, loss=loss, labels=labels)


def _without_dropout(network: nn.Module) -> nn.Module:
    """Gradients of two runs can then be compared; what dropout takes is small beside the rest."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return network


# Ops


def _stages(preset: Preset) -> Iterator[tuple[int, int, int, WindowAttention]]:
    """Per stage, from 1: width, tokens and the attention of its last block (shifted, where the stage shifts)."""
    backbone = preset.swin.backbone
    for i, (depth, heads) in enumerate(zip(backbone.depths, backbone.num_heads)):
        size = backbone.img_size // backbone.patch_size // 2**i
        window, width = min(backbone.window_size, size), backbone.embed_dim * 2**i
        shift = window // 2 if depth > 1 and size > window else 0
        yield i + 1, width, size**2, WindowAttention(width, heads, size, window, shift, 0)


def _adapter_settings(preset: Preset) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "latents": a.latents, "reduction": a.reduction, "groups": a.groups}
        for a in (preset.swin.adapter, _AVS)
        for stage, *_ in _stages(preset)
    ]


def _latent_settings(preset: Preset) -> list[dict[str, Any]]:
    return [{name: s[name] for name in ("stage", "latents")} for s in _adapter_settings(preset)]


def _stage_settings(preset: Preset) -> list[dict[str, Any]]:
    return [{"stage": stage} for stage, *_ in _stages(preset)]


def _stage(preset: Preset, setting: dict[str, Any], clips: int) -> tuple[int, int, int]:
    """Images of one stream, tokens and width at the setting's stage."""
    width, tokens = next((width, tokens) for stage, width, tokens, _ in _stages(preset) if stage == setting["stage"])
    return clips * preset.swin.frames, tokens, width


def _sdpa(backend: SDPBackend) -> Callable:
    def call(*tensors: Tensor | None) -> Tensor:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the reasons, many lines of them
                return attention.sdpa(*tensors, backend=backend)
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise Unavailable(f"PyTorch's {backend.name} does not take these tensors") from None
            raise

    return call


def _gather_latents(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    n, tokens, width = _stage(preset, setting, clips)
    return Problem(
        lambda latents, other: ops.gather_latents(latents, other, path="reference"),
        (_draw(setting["latents"], width, seed=1).abs(), _draw(n, tokens, width, seed=2)),
        {"reference": lambda truth: truth, "fused": lambda truth: partial(ops.gather_latents, path="fused")},
        batched=(False, True),
        differentiated=(0, 1),
        work=lambda batch, itemsize, training: [
            roofline.gather_latents(batch * n // clips, tokens, width, setting["latents"], itemsize, training)
        ],
    )


class Step(nn.Module):
    """Both streams' residual step, X + LN(B) + LAV(X, Y), each with the same adapter; the norm is frozen."""

    def __init__(self, adapter: nn.Module, norm: nn.LayerNorm, path: str = "reference") -> None:
        super().__init__()
        self.adapter, self.norm, self.path = adapter, norm.requires_grad_(False), path

    def forward(self, x: Tensor, other: Tensor, branch: Tensor) -> Tensor:
        with arithmetic(self.adapter, x):
            return self._streams(x, other, branch).to(x.dtype)

    def _streams(self, x: Tensor, other: Tensor, branch: Tensor) -> Tensor:
        xs, branches = (x, other), (branch, branch)
        if isinstance(self.adapter, LavishAdapter):
            out = ops.adapter(xs, branches, (self.adapter,) * 2, self.norm, nn.Identity(), path=self.path)
            return out.flatten(0, 1) if isinstance(out, Tensor) else torch.cat(out)
        maps = [t.permute(0, 2, 1).unsqueeze(-1) for t in xs]
        adapted = [self.adapter(*pair).squeeze(-1).permute(0, 2, 1) for pair in (maps, maps[::-1])]
        return torch.cat([t + self.norm(b) + a for t, b, a in zip(xs, branches, adapted)])


def _adapter(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    n, tokens, width = _stage(preset, setting, clips)
    config = AdapterConfig(**{name: setting[name] for name in ("latents", "reduction", "groups")})
    torch.manual_seed(0)

    def by(build: Callable[[Step], Step]) -> Rearranged:
        def train(truth: Step, dtype: torch.dtype) -> Step:
            """Streams of `dtype` through trained parameters that stay wide, as a training step has them."""
            step, device = build(truth), truth.norm.weight.device
            step.norm.to(device, dtype)
            step.adapter.to(device, torch.promote_types(dtype, torch.float32))
            return step.train()

        return Rearranged(lambda truth, dtype: build(truth).to(truth.norm.weight.device, dtype).eval(), train)

    def released(form: str) -> Rearranged:
        def build(truth: Step) -> Step:
            from benchmarks.baselines.released import ReleasedAdapter

            adapter = ReleasedAdapter(width, config, gate=True, form=form)
            tensors = truth.adapter.state_dict()
            for name in ("down", "up"):
                tensors[f"{name}.weight"] = tensors.pop(name)[:, :, None, None]
            adapter.load_state_dict(tensors)
            return Step(adapter, truth.norm)

        return by(build)

    def name(path: str, name: str) -> str:
        return name.removesuffix(".weight") if name in ("adapter.down.weight", "adapter.up.weight") else name

    return Problem(
        randomise(Step(LavishAdapter(width, config), nn.LayerNorm(width))),
        tuple(_draw(n, tokens, width, seed=seed) for seed in (1, 2, 3)),
        {
            "reference": by(lambda truth: truth),
            "released": released("conv"),
            "released-bmm": released("bmm"),
            "fused": by(lambda truth: Step(truth.adapter, truth.norm, "fused")),
        },
        differentiated=(0, 1, 2),
        # The streams one after the other, with all of a batch's clips in each.
        rows=lambda out: out.unflatten(0, (2, -1)).transpose(0, 1).flatten(1),
        # A stream is the other's other, and read once for both; the branch, as large, takes its place.
        work=lambda batch, itemsize, training: [
            roofline.adapter(2 * batch * n // clips, tokens, tokens, width, config, itemsize, training)
        ],
        parameter_name=name,
    )


def _window_attention(preset: Preset, setting: dict[str, Any], clips: int) -> Problem:
    torch.manual_seed(0)
    frozen = next(attention for stage, *_, attention in _stages(preset) if stage == setting["stage"]).double()
    heads, window, windows = frozen.heads, frozen.window**2, (frozen.size // frozen.window) ** 2
    nn.init.normal_(frozen.cpb_mlp[2].weight, std=0.2)
    frozen.make_constants()
    n = 2 * clips * preset.swin.frames  # both streams
    width = frozen.proj.in_features
    names = [name for name in CONSTANTS if getattr(frozen, name) is not None]
    # logit_scale before its exponential; the order of tokens is no number of any precision.
    constants = [frozen.logit_scale.detach()] + [getattr(frozen, name) for name in names[1:] if name != "order"]

    def by(path: str) -> Callable:
        """What the network has between its two products, from the first one's output."""
        attend = path if callable(path) else partial(ops.window_attention, path=path)

        def call(qkv: Tensor, logit_scale: Tensor, *constants: Tensor) -> Tensor:
            given = dict(zip(names[1:], constants)) | {"scale": logit_scale.clamp(max=math.log(100)).exp()}
            given["order"] = None if frozen.order is None else frozen.order.to(qkv.device)
            given = [given.get(name) for name in CONSTANTS]
            return attend(qkv, *given, window=frozen.window, shift=frozen.shift)

        return call

    def library(backend: SDPBackend) -> Callable:
        def attend(qkv: Tensor, scale: Tensor, table: Tensor, *constants: Tensor | None, **_: int) -> Tensor:
            return reference.window_attention(qkv, scale, *constants, attend=_sdpa(backend))

        return attend

    return Problem(
        by("reference"),
        (_draw(n, windows * window, 3 * width, seed=1), *constants),
        {
            "reference": lambda truth: truth,
            "timm-order": lambda truth: TimmOrder(frozen),
            **{name: lambda truth, b=backend: by(library(b)) for name, backend in _SDPA.items()},
            **{name: lambda truth, p=name: by(p) for name in ("sdpa", "xformers", "fused")},
        },
        batched=(True, *(False for _ in constants)),
        differentiated=(0,),
        wide=tuple(range(1, len(constants) + 1)),
        work=lambda batch, itemsize, training: [
            roofline.window_attention(
                batch * n // clips,
                windows,
                window,
                heads,
                width // heads,
                itemsize,
                training,
            )
        ],
    )


class TimmOrder(nn.Module):
    """What timm does between its two products: rolls, windows, position bias from its MLP on every forward.

    qkv (n, T, 3C) -> (n, T, C); the truth's position bias is passed in and not read.
    """

    def __init__(self, frozen: WindowAttention) -> None:
        super().__init__()
        from timm.models.swin_transformer_v2 import WindowAttention as Timm

        self.heads, self.window, self.size, self.shift = frozen.heads, frozen.window, frozen.size, frozen.shift
        timm = Timm(frozen.proj.in_features, (frozen.window, frozen.window), frozen.heads)
        timm.cpb_mlp.load_state_dict(frozen.cpb_mlp.state_dict())
        self.cpb_mlp = timm.cpb_mlp.requires_grad_(False)
        self.register_buffer("coordinates", timm.relative_coords_table)
        self.register_buffer("index", timm.relative_position_index.flatten())

    def forward(self, qkv: Tensor, logit_scale: Tensor, *constants: Tensor) -> Tensor:
        from timm.models.swin_transformer_v2 import window_partition, window_reverse

        n, tokens, channels = qkv.shape
        map_ = qkv.view(n, self.size, self.size, channels)
        if self.shift:
            map_ = map_.roll((-self.shift, -self.shift), (1, 2))
        parts = window_partition(map_, (self.window, self.window)).flatten(1, 2)
        out = self._attend(parts, logit_scale, constants[2] if self.shift else None)
        out = window_reverse(
            out.view(-1, self.window, self.window, channels // 3), (self.window, self.window), (self.size, self.size)
        )
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return out.reshape(n, tokens, channels // 3)

    def _attend(self, qkv: Tensor, logit_scale: Tensor, mask: Tensor | None) -> Tensor:
        tokens = self.window**2
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        logits = logits * logit_scale.clamp(max=math.log(100)).exp().to(q.dtype)
        table = self.cpb_mlp(self.coordinates).view(-1, self.heads)
        position = table[self.index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        logits = logits + 16 * position.sigmoid()
        if mask is not None:
            windows = len(mask)
            logits = logits.unflatten(0, (-1, windows)) + mask.unsqueeze(1).to(q.dtype)
            logits = logits.flatten(0, 1)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


_SDPA = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _least(batches: Sequence[int]) -> Sequence[int]:
    return [min(batches)]


def _most(batches: Sequence[int]) -> Sequence[int]:
    """Ops are compared at the size at which most of their time is their own."""
    return [max(batches)]


_OP = ("reference", "fused")
CASES = {
    "ave": Case(
        "the AVE network, LAVISH on Swin-V2",
        _one,
        _ave,
        MODES,
        paths=(
            "reference",
            "released",
            "released-bmm",
            "model",
            "concatenated",
            "folded",
            "xformers",
            "fused",
            "optimized",
        ),
    ),
    "networks": Case(
        "every preset of every task, as it is and as `optimize` makes it",
        lambda preset: [{"network": name} for name in _networks(preset)],
        _network,
        MODES,
        batches=_least,
        paths=("reference", "optimized"),
    ),
    "ave-vit": Case("the AVE network, LAVISH on ViT-B with r = 4 (Table 2)", _one, _ave_vit, MODES),
    "latents": Case(
        "the AVE network against its latent tokens (Figure 1)",
        lambda _: [{"latents": m} for m in LATENTS],
        _latents,
        batches=_least,
    ),
    "cmbs": Case("CMBS: frozen Swin-V2 and VGGish, and its head (Table 4)", _one, _cmbs, MODES, ("float64",)),
    "mbt": Case("MBT-B/16x2 (Table 2)", _one, _mbt, MODES),
    **{
        name: Case(f"{name.upper()}: R(2+1)D-18 and a ResNet (Table 2)", _one, _encoders(name), MODES)
        for name in ("xdc", "avts", "gdt")
    },
    "backbone": Case(
        "the bare backbone on the images of a clip",
        lambda _: [{"backbone": "swin"}, {"backbone": "vit"}],
        _backbone,
        paths=("reference", "timm"),
    ),
    "gather_latents": Case(
        "latents gather from a stream", _latent_settings, _gather_latents, MODES, batches=_most, paths=_OP
    ),
    "adapter": Case(
        "both streams' residual step with their adapters",
        _adapter_settings,
        _adapter,
        MODES,
        batches=_most,
        paths=("reference", "released", "released-bmm", "fused"),
    ),
    "window_attention": Case(
        "Swin-V2's attention between its two products",
        _stage_settings,
        _window_attention,
        MODES,
        batches=_most,
        paths=("reference", "timm-order", *_SDPA, "sdpa", "xformers", "fused"),
    ),
}
PATHS = tuple(dict.fromkeys(path for case in CASES.values() for path in case.paths))


def refusal(case: str, mode: str, path: str, precision: str, device: str) -> str | None:
    """Why something cannot be measured on this device, as far as that is known beforehand."""
    if device == "cpu" and precision == "tf32":
        return "tf32 is the arithmetic of CUDA's tensor cores"
    if device == "cpu" and mode == "training" and case in ("xdc", "avts", "gdt") and precision.startswith("bfloat16"):
        return "torch's CPU weight gradient of a (3, 1, 1) convolution in bfloat16 is not a number"
    if path == "xformers" and device != "cuda":
        return f"xformers' attention takes CUDA tensors, got {device}"
    if path == "xformers" and find_spec("xformers") is None:
        return "xformers is missing: pip install 'xformers==0.0.35'"
    if path == "fused" and device != "cuda":
        return f"the kernels take CUDA tensors, got {device}"
    if case == "ave" and PRECISIONS[precision].autocast and path in _NARROWS:
        return "it narrows the weights itself, and has autocast around the trained ones"
    if path == "fused":
        x = torch.empty(0, device=device, dtype=PRECISIONS[precision].weights)
        return "; ".join(_checks.reasons(x, same_dtype=(x,))) or None
    return None
