"""Frozen dataclasses and the paper's presets: the only home of sizes.

Source of the numbers: LAVISH (CVPR 2023), supplementary material, and the released AVE options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

MODALITIES = ("audio+video", "video", "audio")

# The AVE data set's classes in order of first appearance in Annotations.txt; the last one is background.
AVE_CLASSES = (
    "Church bell",
    "Male speech, man speaking",
    "Bark",
    "Fixed-wing aircraft, airplane",
    "Race car, auto racing",
    "Female speech, woman speaking",
    "Helicopter",
    "Violin, fiddle",
    "Flute",
    "Ukulele",
    "Frying (food)",
    "Truck",
    "Shofar",
    "Motorcycle",
    "Acoustic guitar",
    "Train horn",
    "Clock",
    "Banjo",
    "Goat",
    "Baby cry, infant cry",
    "Bus",
    "Chainsaw",
    "Cat",
    "Horse",
    "Toilet flush",
    "Rodents, rats, mice",
    "Accordion",
    "Mandolin",
    "background",
)

# UCF101's classes in the order of classInd.txt.
UCF101_CLASSES = (
    "ApplyEyeMakeup", "ApplyLipstick", "Archery", "BabyCrawling", "BalanceBeam", "BandMarching", "BaseballPitch",
    "Basketball", "BasketballDunk", "BenchPress", "Biking", "Billiards", "BlowDryHair", "BlowingCandles",
    "BodyWeightSquats", "Bowling", "BoxingPunchingBag", "BoxingSpeedBag", "BreastStroke", "BrushingTeeth",
    "CleanAndJerk", "CliffDiving", "CricketBowling", "CricketShot", "CuttingInKitchen", "Diving", "Drumming",
    "Fencing", "FieldHockeyPenalty", "FloorGymnastics", "FrisbeeCatch", "FrontCrawl", "GolfSwing", "Haircut",
    "Hammering", "HammerThrow", "HandstandPushups", "HandstandWalking", "HeadMassage", "HighJump", "HorseRace",
    "HorseRiding", "HulaHoop", "IceDancing", "JavelinThrow", "JugglingBalls", "JumpingJack", "JumpRope", "Kayaking",
    "Knitting", "LongJump", "Lunges", "MilitaryParade", "Mixing", "MoppingFloor", "Nunchucks", "ParallelBars",
    "PizzaTossing", "PlayingCello", "PlayingDaf", "PlayingDhol", "PlayingFlute", "PlayingGuitar", "PlayingPiano",
    "PlayingSitar", "PlayingTabla", "PlayingViolin", "PoleVault", "PommelHorse", "PullUps", "Punch", "PushUps",
    "Rafting", "RockClimbingIndoor", "RopeClimbing", "Rowing", "SalsaSpin", "ShavingBeard", "Shotput",
    "SkateBoarding", "Skiing", "Skijet", "SkyDiving", "SoccerJuggling", "SoccerPenalty", "StillRings",
    "SumoWrestling", "Surfing", "Swing", "TableTennisShot", "TaiChi", "TennisSwing", "ThrowDiscus",
    "TrampolineJumping", "Typing", "UnevenBars", "VolleyballSpiking", "WalkingWithDog", "WallPushups",
    "WritingOnBoard", "YoYo",
)  # fmt: skip


@dataclass(frozen=True)
class SwinV2Config:
    """Swin-V2, by the argument names and defaults of timm's `SwinTransformerV2`.

    One default differs: `drop_path_rate` is 0 unless asked for (timm: 0.1), because the backbone is frozen.
    """

    kind: ClassVar[str] = "swinv2"
    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
    drop_path_rate: float = 0.0

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Of each stage its blocks and its channels."""
        return tuple((depth, self.embed_dim * 2**i) for i, depth in enumerate(self.depths))

    @property
    def block_widths(self) -> tuple[int, ...]:
        """The number of channels of each block's stream, first block first."""
        return tuple(width for depth, width in self.stages for _ in range(depth))


@dataclass(frozen=True)
class ViTConfig:
    """ViT with a cls token, by the argument names and defaults of timm's `VisionTransformer`."""

    kind: ClassVar[str] = "vit"
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Of each stage, here of the one, its blocks and its channels."""
        return ((self.depth, self.embed_dim),)

    @property
    def block_widths(self) -> tuple[int, ...]:
        """The number of channels of each block's stream, first block first."""
        return (self.embed_dim,) * self.depth


@dataclass(frozen=True)
class VideoMAEConfig:
    """VideoMAE's ViT; frames and tubelet are the frames of a clip and of one token."""

    kind: ClassVar[str] = "videomae"
    img_size: int = 224
    patch_size: int = 16
    frames: int = 16
    tubelet: int = 2
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Of each stage, here of the one, its blocks and its channels."""
        return ((self.depth, self.embed_dim),)

    @property
    def block_widths(self) -> tuple[int, ...]:
        """The number of channels of each block's stream, first block first."""
        return (self.embed_dim,) * self.depth


@dataclass(frozen=True)
class ResNetConfig:
    """A ResNet of bottlenecks, by the argument names and defaults of timm's `ResNet`; the default is ResNet-152.

    img_size: the side of the frames; the network takes any. layers: bottlenecks a stage. channels: of each stage's
    3x3 convolutions, a quarter of what the stage puts out.
    """

    kind: ClassVar[str] = "resnet"
    img_size: int = 224
    in_chans: int = 3
    layers: tuple[int, ...] = (3, 8, 36, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Of each stage its blocks, one place for adapters each, and its channels."""
        return tuple((1, width) for width in self.block_widths)

    @property
    def block_widths(self) -> tuple[int, ...]:
        """The number of channels of each stage's map, first stage first."""
        return tuple(4 * width for width in self.channels)


BackboneConfig = SwinV2Config | ViTConfig | VideoMAEConfig | ResNetConfig
BACKBONES = {c.kind: c for c in (SwinV2Config, ViTConfig, VideoMAEConfig, ResNetConfig)}
# timm arguments that change nothing here: the ImageNet head is never used, qkv_bias is True in every such model.
_IGNORED_ARGUMENTS = {"num_classes", "global_pool"}
_MUST_BE = {"qkv_bias": True, "class_token": True, "strict_img_size": True, "always_partition": False}
_MUST_BE |= {k: 0.0 for k in ("drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate", "attn_drop_rate")}


@dataclass(frozen=True)
class AdapterConfig:
    """One LAVISH adapter (paper, section 3.2), with the released code's options.

    latents: latent tokens m. reduction: the bottleneck is C / reduction wide. groups: of the 1x1 convolutions.
    audio_gate: whether the audio stream's adapters have the outer gate; the video stream's always do
    (the released option `is_gate`). cross_modal: False leaves out the latent tokens' path. p1, p2: whether
    there are adapters beside the attention, beside the MLP. first_block: ViT only; blocks before it are
    skipped altogether, frozen block and adapters alike (the released option `start_tune_layers`). gate_first: whether
    the outer gate comes before LN_after, as in the released AVS code. zero_latents: whether latents begin at zero, as
    in the released AVS and AVQA code, or uniform in [0, 1).
    """

    latents: int = 2
    reduction: int = 8
    groups: int = 2
    batch_norm: bool = True
    ln_before: bool = True
    ln_after: bool = True
    audio_gate: bool = True
    cross_modal: bool = True
    p1: bool = True
    p2: bool = True
    first_block: int = 0
    gate_first: bool = False
    zero_latents: bool = False


@dataclass(frozen=True)
class SpectrogramConfig:
    """Kaldi log-mel filter banks of windows, one for each frame (AVE: protocol of the released data loader).

    A window of `window_seconds` at `sample_rate` gives about 188 frames of `mel_bins`, normalised as
    (x - mean) / (2 std), then zero-padded to `frames` rows. Input to the model: (T, frames, mel_bins). With
    `window_seconds` 0 there is one spectrogram of the whole clip, of any length, averaged to `frames` rows.
    """

    sample_rate: int = 16000
    window_seconds: float = 1.0
    mel_bins: int = 192
    frame_shift_ms: float = 5.2
    frames: int = 192
    mean: float = -4.984795570373535
    std: float = 3.7079780101776123


VIT_SPECTROGRAM = SpectrogramConfig(mel_bins=128, frame_shift_ms=10.0, frames=102, mean=-4.1426, std=3.2001)
# The released AVS and AVQA data loaders.
AVS_SPECTROGRAM = SpectrogramConfig(
    window_seconds=1.95, frame_shift_ms=10.0, mean=-5.210531711578369, std=3.5918314456939697
)
AVQA_SPECTROGRAM = SpectrogramConfig(
    window_seconds=1.95, frame_shift_ms=10.0, mean=-5.385333061218262, std=3.5928637981414795
)
# The whole clip as one picture of VideoMAE's size; mean and std of LAVISH's other spectrograms of 10 ms frames.
ACTION_SPECTROGRAM = SpectrogramConfig(
    window_seconds=0.0, mel_bins=224, frame_shift_ms=10.0, frames=224, mean=-4.1426, std=3.2001
)


@dataclass(frozen=True)
class AVEConfig:
    """Event localisation: the classifier's hidden width; whether VGGish's features of the sound join before its last
    linear layer (the paper's Table 3), and the file that VGGish's frozen weights come from."""

    hidden: int = 512
    vggish: bool = False
    vggish_weights: str | None = None


@dataclass(frozen=True)
class AVSConfig:
    """Segmentation: channels of the decoder, the stages (from 0) in which sound and picture meet by TPAVI, the side of
    frames and masks, and hidden, the channels between the decoder's map and the mask."""

    channels: int = 256
    tpavi_stages: tuple[int, ...] = (0, 1, 2, 3)
    size: int = 224
    hidden: int = 128


@dataclass(frozen=True)
class AVQAConfig:
    """Question answering: the vocabulary of the questions in the order of its embedding, "<pad>" among it, words of a
    question, and the width that all is fused at."""

    words: tuple[str, ...] = field(default=("<pad>", *(f"word {i}" for i in range(1, 93))), repr=False)
    length: int = 14
    width: int = 512


@dataclass(frozen=True)
class ActionConfig:
    """Action recognition."""


HEADS = {"ave": AVEConfig, "avs": AVSConfig, "avqa": AVQAConfig, "action": ActionConfig}
TASKS = tuple(HEADS)
# What a head has before a data set or a checkpoint names its classes.
_CLASSES = {
    "ave": AVE_CLASSES,
    "avs": (),
    "avqa": tuple(f"answer {i}" for i in range(1, 43)),
    "action": UCF101_CLASSES,
}


@dataclass(frozen=True)
class Config:
    """Everything that fixes a model's shapes and its inputs.

    task: "ave" (event localisation), "avs" (segmentation), "avqa" (question answering) or "action" (recognition).
    modality: "audio+video", or "video" / "audio" for the paper's Table 1 variants. classes: of "ave" the events,
    background last; of "avqa" the answers; of "action" the actions; of "avs" none. frames: T, frames and audio windows
    a clip. head: the task's own sizes. backbone_weights: where the frozen weights come from: a timm model name, a
    path, or None for random. `classes` and `head` have the task's defaults.
    """

    backbone: BackboneConfig
    task: str = "ave"
    adapter: AdapterConfig = AdapterConfig()
    spectrogram: SpectrogramConfig = SpectrogramConfig()
    modality: str = "audio+video"
    classes: tuple[str, ...] = field(default=None, repr=False)
    frames: int = 10
    head: AVEConfig | AVSConfig | AVQAConfig | ActionConfig = None
    backbone_weights: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        if self.classes is None:
            object.__setattr__(self, "classes", _CLASSES[self.task])
        if self.head is None:
            object.__setattr__(self, "head", HEADS[self.task]())
        if not isinstance(self.classes, tuple):
            raise ValueError(f"classes: expected names, got {self.classes!r}")
        if type(self.head) is not HEADS[self.task]:
            raise ValueError(f"head: expected {HEADS[self.task].__name__}, got {type(self.head).__name__}")
        if self.modality not in MODALITIES:
            raise ValueError(f"modality: expected one of {', '.join(MODALITIES)}, got {self.modality!r}")
        if self.task == "ave" and len(self.classes) < 2:
            raise ValueError(f"classes: expected at least one class and background, got {self.classes!r}")
        if self.task == "ave" and self.head.vggish and "audio" not in self.streams:
            raise ValueError(f"head.vggish: expected it with the sound, got {self.modality}")
        rate = self.spectrogram.sample_rate
        if self.task == "ave" and self.head.vggish and rate != 16000:
            raise ValueError(f"head.vggish: expected its own spectrogram.sample_rate of 16000, got {rate}")
        if self.task in ("avqa", "action") and not self.classes:
            raise ValueError("classes: expected at least one, got none")
        if self.frames < 1:
            raise ValueError(f"frames: expected at least 1, got {self.frames}")
        if self.task == "avs":
            stages = len(self.backbone.stages)
            if not 2 <= stages <= 4:
                raise ValueError(f"backbone: expected one of two to four stages for avs, got {stages}")
            if not set(self.head.tpavi_stages) <= set(range(stages)):
                raise ValueError(
                    f"head.tpavi_stages: expected stages from 0 to {stages - 1}, got {self.head.tpavi_stages}"
                )
        a = self.adapter
        for name in ("latents", "reduction", "groups"):
            if getattr(a, name) < 1:
                raise ValueError(f"adapter.{name}: expected at least 1, got {getattr(a, name)}")
        for width in sorted(set(self.backbone.block_widths)):
            if width % (a.reduction * a.groups):
                raise ValueError(
                    f"adapter: expected reduction * groups to divide every width, "
                    f"got {a.reduction} * {a.groups} and a width of {width}"
                )
        if self.backbone.kind == "resnet" and a.p2:
            raise ValueError("adapter.p2: expected False for resnet, whose stages have one place, got True")
        clip, seconds = self.backbone.kind == "videomae", self.spectrogram.window_seconds
        if clip and (self.task != "action" or self.frames != self.backbone.frames or seconds):
            raise ValueError(
                f"backbone: expected videomae with the task action, its {self.backbone.frames} frames and a "
                f"spectrogram of the whole clip (window_seconds 0), got {self.task}, {self.frames} frames and {seconds}"
            )
        if not clip and not seconds:
            raise ValueError(f"spectrogram.window_seconds: expected a window for each frame, got {seconds}")
        if a.first_block and self.backbone.kind != "vit":
            raise ValueError(f"adapter.first_block: expected 0 for {self.backbone.kind}, got {a.first_block}")
        if not 0 <= a.first_block < len(self.backbone.block_widths):
            raise ValueError(
                f"adapter.first_block: expected less than {len(self.backbone.block_widths)} blocks, got {a.first_block}"
            )

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that run, ("audio", "video") or one of them."""
        return ("audio", "video") if self.modality == "audio+video" else (self.modality,)

    @property
    def images(self) -> int:
        """Images of a clip in each stream: VideoMAE takes all of a clip's frames as one."""
        return 1 if self.backbone.kind == "videomae" else self.frames

    @property
    def width(self) -> int:
        """C, the number of channels of the last block's stream."""
        return self.backbone.block_widths[-1]

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """The names that `from_preset` knows."""
        return tuple(_PRESETS)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Config:
        """A named configuration, e.g. "ave-swinv2-large" (the paper's AVE table), with fields changed at will.

        Raises: ValueError for an unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
        return dataclasses.replace(_PRESETS[name], **changes)

    @classmethod
    def from_official(cls, opt: Any, *, task: str, backbone: Mapping[str, Any], **changes: Any) -> Config:
        """The configuration of a released network.

        Args:
            opt: the released code's options, a mapping or a namespace (`num_tokens`, `Adapter_downsample`, ...).
            task: as in `Config`.
            backbone: `kind` ("swinv2" or "vit") and that timm class's constructor arguments.
            changes: fields of Config to set besides.

        Raises: ValueError naming the option or argument that is missing or cannot be honoured.
        """
        opt = dict(opt) if isinstance(opt, Mapping) else dict(vars(opt))
        options = {**_OFFICIAL_DEFAULTS, **opt}
        for name in ("num_tokens", "Adapter_downsample", "num_conv_group"):
            if name not in options:
                raise ValueError(f"opt.{name}: expected the released option, got none")
        adapter = AdapterConfig(
            latents=int(options["num_tokens"]),
            reduction=int(options["Adapter_downsample"]),
            groups=int(options["num_conv_group"]),
            batch_norm=bool(options["is_bn"]),
            ln_before=bool(options["is_before_layernorm"]),
            ln_after=bool(options["is_post_layernorm"]),
            audio_gate=bool(options["is_gate"]),
            cross_modal=bool(options["is_multimodal"]),
            p1=bool(options["is_audio_adapter_p1"]),
            p2=bool(options["is_audio_adapter_p2"]),
            first_block=int(options["start_tune_layers"]) if backbone.get("kind") == "vit" else 0,
        )
        parsed = _backbone_from_mapping(backbone)
        spectrogram = VIT_SPECTROGRAM if parsed.kind == "vit" else SpectrogramConfig()
        values = {"task": task, "backbone": parsed, "adapter": adapter, "spectrogram": spectrogram}
        if task == "avs":  # it has no LN_before, even when asked
            own = dataclasses.replace(adapter, ln_before=False, gate_first=True, zero_latents=True)
            values |= {"adapter": own, "spectrogram": AVS_SPECTROGRAM, "frames": 5}
        elif task == "avqa":
            own = dataclasses.replace(adapter, zero_latents=True)
            values |= {"adapter": own, "spectrogram": AVQA_SPECTROGRAM}
        elif task != "ave":
            raise ValueError(f"task: expected one with released code, ave, avs or avqa, got {task!r}")
        return cls(**values | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json; `from_dict` reads it back."""
        values = dataclasses.asdict(self)
        values["backbone"] = {"kind": self.backbone.kind} | values["backbone"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`. Raises: ValueError naming an unknown or missing field."""
        values = dict(values)
        for name, section in (("adapter", AdapterConfig), ("spectrogram", SpectrogramConfig)):
            if name in values:
                values[name] = _build(section, values[name], name)
        if "backbone" in values:
            values["backbone"] = _backbone_from_mapping(values["backbone"])
        if isinstance(values.get("classes"), list):
            values["classes"] = tuple(map(str, values["classes"]))
        task = values.get("task", "ave")
        if isinstance(values.get("head"), Mapping) and task in TASKS:
            lists = {name: tuple(value) for name, value in values["head"].items() if isinstance(value, list)}
            values["head"] = _build(HEADS[task], values["head"] | lists, "head")
        return _build(cls, values, "config")


# The released AVE options that its README leaves at their defaults.
_OFFICIAL_DEFAULTS = {
    "is_bn": 1,
    "is_before_layernorm": 1,
    "is_post_layernorm": 1,
    "is_gate": 1,
    "is_multimodal": 1,
    "is_audio_adapter_p1": 1,
    "is_audio_adapter_p2": 1,
    "start_tune_layers": 0,
}


def _build(section: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(section)}
    if unknown := sorted(map(str, set(values) - known)):
        raise ValueError(f"{where}: expected fields among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    for f in dataclasses.fields(section):
        expected = type(f.default)
        if f.name not in values or f.default is None or f.default is dataclasses.MISSING:
            continue
        if type(values[f.name]) is not expected and (expected, type(values[f.name])) != (float, int):
            raise ValueError(f"{where}.{f.name}: expected {expected.__name__}, got {values[f.name]!r}")
    return section(**values)


def _backbone_from_mapping(values: Mapping[str, Any]) -> BackboneConfig:
    if not isinstance(values, Mapping):
        raise ValueError(f"backbone: expected a mapping, got {type(values).__name__}")
    values = dict(values)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in BACKBONES:
        raise ValueError(f"backbone.kind: expected one of {', '.join(BACKBONES)}, got {kind!r}")
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in _IGNORED_ARGUMENTS:
            continue
        if name in _MUST_BE:
            if value != _MUST_BE[name]:
                raise ValueError(f"backbone.{name}: expected {_MUST_BE[name]}, got {value!r}")
            continue
        if isinstance(value, list):
            value = tuple(value)
        if name in ("img_size", "patch_size", "window_size") and isinstance(value, tuple):
            if len(set(value)) != 1:
                raise ValueError(f"backbone.{name}: expected a square, got {value}")
            value = value[0]
        kept[name] = value
    if "depths" in kept and kind == "swinv2":
        kept.setdefault("pretrained_window_sizes", (0,) * len(kept["depths"]))
    return _build(BACKBONES[kind], kept, "backbone")


def _swin(embed_dim: int, depths: tuple[int, ...], heads: int, weights: str, pretrained_window: int = 0) -> Config:
    # The tiny and small weights were trained with window 8 at 256 pixels: the continuous position bias carries
    # over to window 12 when it is told the window it was trained with.
    backbone = SwinV2Config(
        img_size=192,
        window_size=12,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=tuple(heads * 2**i for i in range(4)),
        pretrained_window_sizes=(pretrained_window,) * 4,
    )
    return Config(backbone=backbone, backbone_weights=weights)


def _vit(embed_dim: int, depth: int, heads: int, weights: str) -> Config:
    backbone = ViTConfig(embed_dim=embed_dim, depth=depth, num_heads=heads)
    return Config(backbone=backbone, spectrogram=VIT_SPECTROGRAM, backbone_weights=weights)


_SWINS = {
    "swinv2-large": _swin(192, (2, 2, 18, 2), 6, "swinv2_large_window12_192.ms_in22k"),
    "swinv2-base": _swin(128, (2, 2, 18, 2), 4, "swinv2_base_window12_192.ms_in22k"),
    "swinv2-small": _swin(96, (2, 2, 18, 2), 3, "swinv2_small_window8_256.ms_in1k", 8),
    "swinv2-tiny": _swin(96, (2, 2, 6, 2), 3, "swinv2_tiny_window8_256.ms_in1k", 8),
}
_VITS = {
    "vit-large": _vit(1024, 24, 16, "vit_large_patch16_224.augreg_in21k"),
    "vit-base": _vit(768, 12, 12, "vit_base_patch16_224.augreg_in21k"),
    "vit-small": _vit(384, 12, 6, "vit_small_patch16_224.augreg_in21k"),
    "vit-tiny": _vit(192, 12, 3, "vit_tiny_patch16_224.augreg_in21k"),
}
# The paper's latents, reduction and groups; without BatchNorm and audio gates as the released README trains them.
_AVS = AdapterConfig(
    latents=16,
    reduction=4,
    batch_norm=False,
    ln_before=False,
    audio_gate=False,
    gate_first=True,
    zero_latents=True,
)
_AVQA = AdapterConfig(latents=16, reduction=4, batch_norm=False, zero_latents=True)
_PRESETS = {f"ave-{name}": config for name, config in (_SWINS | _VITS).items()}
for _name, _config in _SWINS.items():
    _PRESETS[f"avs-{_name}"] = dataclasses.replace(
        _config, task="avs", adapter=_AVS, spectrogram=AVS_SPECTROGRAM, frames=5, classes=None, head=None
    )
    _PRESETS[f"avqa-{_name}"] = dataclasses.replace(
        _config, task="avqa", adapter=_AVQA, spectrogram=AVQA_SPECTROGRAM, classes=None, head=None
    )
_PRESETS["ave-swinv2-large-vggish"] = dataclasses.replace(_SWINS["swinv2-large"], head=AVEConfig(vggish=True))
_PRESETS["ave-resnet152"] = Config(
    backbone=ResNetConfig(), adapter=AdapterConfig(p2=False), backbone_weights="resnet152.tv_in1k"
)
# 7.39 M trainable parameters in the adapters, the paper's Table 2.
_PRESETS["action-videomae-base"] = Config(
    backbone=VideoMAEConfig(),
    task="action",
    adapter=AdapterConfig(reduction=4),
    spectrogram=ACTION_SPECTROGRAM,
    frames=16,
    backbone_weights="hub:MCG-NJU/videomae-base-finetuned-kinetics",
)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. The defaults are the paper's for AVE (the released README has lr 5e-5).

    batch_size: clips per device that go through the model at once. accumulate: such batches to a step of the
    optimiser. lr, head_lr: Adam's learning rates of adapters and head; every `lr_step` epochs, if given, both are
    multiplied by `lr_gamma`. patience: epochs without a better validation accuracy after which training stops.
    amp: "bf16" for bfloat16, "fp16" for float16 with loss scaling. workers: processes that decode. save_every: steps
    between the checkpoints within an epoch; without it there is one at the end of each epoch. on_nan: "skip" for a
    step without effect where a clip gives probabilities that are not finite, "stop" for the end of the run.
    checkpointing: whether blocks run again in the backward pass, for less memory.
    """

    batch_size: int = 2
    epochs: int = 50
    lr: float = 5e-6
    head_lr: float = 4e-6
    lr_step: int | None = None
    lr_gamma: float = 0.35
    accumulate: int = 1
    patience: int = 5
    amp: str | None = None
    seed: int = 0
    workers: int = 2
    save_every: int | None = None
    on_nan: str = "skip"
    checkpointing: bool = False

    @classmethod
    def of_task(cls, task: str) -> TrainConfig:
        """The paper's settings for a task; for action recognition, of which it says none, our own."""
        return cls(**_TRAINING[task])

    def __post_init__(self) -> None:
        minima = {"batch_size": 1, "epochs": 1, "lr_step": 1, "accumulate": 1, "patience": 1}
        for name, least in (minima | {"seed": 0, "workers": 0, "save_every": 1}).items():
            value = getattr(self, name)
            optional = name in ("lr_step", "save_every")
            if not (value is None and optional) and (type(value) is not int or value < least):
                raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")
        for name in ("lr", "head_lr", "lr_gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if self.amp not in (None, "bf16", "fp16"):
            raise ValueError(f"amp: expected None, 'bf16' or 'fp16', got {self.amp!r}")
        if self.on_nan not in ("skip", "stop"):
            raise ValueError(f"on_nan: expected 'skip' or 'stop', got {self.on_nan!r}")
        if self.seed >= 2**32:
            raise ValueError(f"seed: expected less than 2**32, got {self.seed}")
        if not isinstance(self.checkpointing, bool):
            raise ValueError(f"checkpointing: expected True or False, got {self.checkpointing!r}")


_TRAINING = {
    "ave": {},
    "avs": {"batch_size": 4, "epochs": 30, "lr": 1e-4, "head_lr": 1e-4},
    "avqa": {"batch_size": 1, "epochs": 30, "lr": 8e-5, "head_lr": 3e-6, "lr_step": 8, "lr_gamma": 0.1},
    "action": {"batch_size": 8, "lr": 1e-4, "head_lr": 1e-3},
}
