"""Model: a frozen backbone run over two streams, adapters between them in every block, a task head."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavish_fast import backbones, checkpoint, ops
from lavish_fast.adapter import BlockAdapters, LavishAdapter
from lavish_fast.backbones import PLACES
from lavish_fast.config import Config
from lavish_fast.tasks.ave import AVEHead


class Model(nn.Module):
    """LAVISH, called as the released networks are: `model(audio, video)`.

    `Model(config)` has a random backbone; `load_backbone` puts pretrained weights in, `from_official` takes a
    released network's state dict, `from_pretrained` what `save_pretrained` wrote.

    The backbone is frozen. In training mode adapters behave as in the released code (BatchNorm on the batch's own
    statistics, per adapter and stream), with one deliberate difference: the frozen backbone's drop path is off
    unless the configuration's backbone asks for a `drop_path_rate`.

    With modality "video" or "audio" one stream runs alone (the paper's Table 1 variants). The adapters then have no
    other stream to gather from and leave the latent tokens out: X' = X. That is our reading of the paper.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbones.build(config.backbone)
        settings = config.adapter
        cross_modal = settings.cross_modal and len(config.streams) == 2
        places = [place for place in PLACES if getattr(settings, place)]
        self.adapters = nn.ModuleList(
            BlockAdapters(
                {
                    f"{stream}_{place}": LavishAdapter(
                        width,
                        settings,
                        gate=stream == "video" or settings.audio_gate,
                        cross_modal=cross_modal,
                    )
                    for place in places
                    for stream in config.streams
                }
            )
            for width in config.backbone.block_widths[settings.first_block :]
        )
        self.head = AVEHead(len(config.streams) * config.width, len(config.classes))

    def forward(self, audio: Any, video: Tensor | None = None) -> Tensor:
        """Class probabilities of every second.

        Args:
            audio: spectrograms (B, T, frames, mel bins), or a list whose first entry is that; None if unused.
            video: frames (B, T, 3, S, S), ImageNet-normalised; None if unused.

        Returns: (B * T, K), clip by clip, second by second.

        Raises: ValueError naming the input, what was expected and what came.
        """
        return self.head(self.features(audio, video))

    def features(self, audio: Any, video: Tensor | None = None) -> Tensor:
        """The head's input (B * T, 2C): video then audio for Swin-V2, audio then video for ViT; C for one stream."""
        return self._features(*images(self.config, audio, video).values())

    def classify(self, *streams: Tensor) -> Tensor:
        """Images of each stream, (n, 3, H, W), audio first, to class probabilities (n, K)."""
        return self.head(self._features(*streams))

    def _features(self, *streams: Tensor) -> Tensor:
        xs = [self.backbone.embed(x) for x in streams]
        first = self.config.adapter.first_block
        for i, block in enumerate(self.backbone.blocks[first:], first):
            xs = [self.backbone.enter(i, x) for x in xs]
            xs = self.adapters[i - first](block, xs)
        pooled = [self.backbone.pool(x) for x in xs]
        return torch.cat(pooled if self.config.backbone.kind == "vit" else pooled[::-1], -1)

    def set_path(self, path: str) -> Model:
        """Sets the path of every op, "auto", "fused" or "reference" (see `lavish_fast.ops`), and returns the model.

        Raises: ValueError for another one.
        """
        ops.check_path(path)
        for module in self.modules():
            if hasattr(module, "path"):
                module.path = path
        return self

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the adapters, then of the head: all that training changes."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many, in the adapters and in the head."""
        count = {part: sum(p.numel() for p in getattr(self, part).parameters()) for part in ("adapters", "head")}
        trainable, total = sum(count.values()), sum(p.numel() for p in self.parameters())
        print(
            f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%}): "
            f"adapters {count['adapters']:,}, head {count['head']:,}"
        )

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Parameters and BatchNorm buffers of adapters and head, by name."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("backbone.")}

    def load_trainable_state_dict(self, tensors: Mapping[str, Tensor], what: str = "state dict") -> None:
        """Loads what `trainable_state_dict` gave, strictly. Raises: ValueError naming every tensor that is off."""
        checkpoint.load_strict(_Trainable(self), tensors, what)

    def load_backbone(self, source: str | os.PathLike | Mapping[str, Tensor] | None = None) -> Model:
        """Loads the frozen backbone's weights and returns the model.

        Args:
            source: the name of a timm model, a file, or a state dict with timm's names; without it the
                configuration's `backbone_weights`.

        Raises: ValueError or FileNotFoundError naming the source or the tensors that do not fit.
        """
        source = self.config.backbone_weights if source is None else source
        if source is None:
            raise ValueError("backbone: expected a timm model's name, a file or a state dict, got none")
        what = "backbone" if isinstance(source, Mapping) else f"backbone {source}"
        checkpoint.load_strict(self.backbone, checkpoint.backbone_tensors(source), what)
        return self

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], config: Config) -> Model:
        """A model with the weights of a released network, e.g. `torch.load(path, weights_only=True)`.

        Raises: ValueError naming the tensors that do not fit the configuration.
        """
        model = cls(config)
        checkpoint.load_strict(model, checkpoint.from_official(state_dict), "official state dict")
        return model

    def save_pretrained(
        self, directory: str | os.PathLike, *, push_to_hub: bool = False, repo_id: str | None = None
    ) -> None:
        """Writes config.json and model.safetensors (adapters and head only) as Hub libraries do, atomically each.

        The frozen backbone is not written; its checksum is, so that another backbone is refused on loading.
        """
        directory = Path(directory)
        checkpoint.write_text(directory / checkpoint.CONFIG_NAME, json.dumps(self.config.to_dict(), indent=2) + "\n")
        metadata = {"format": "pt", "backbone_sha256": checkpoint.fingerprint(self.backbone)}
        checkpoint.write_tensors(directory / checkpoint.WEIGHTS_NAME, self.trainable_state_dict(), metadata)
        if push_to_hub:
            from huggingface_hub import HfApi

            api, name = HfApi(), repo_id or directory.name
            api.create_repo(name, exist_ok=True)
            files = [checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME]
            api.upload_folder(repo_id=name, folder_path=directory, allow_patterns=files)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        backbone: str | os.PathLike | Mapping[str, Tensor] | None = None,
        **hub_options: Any,
    ) -> Model:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Args:
            source: a directory, or the name of a Hub repository.
            backbone: where the frozen weights come from, as for `load_backbone`.
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only` ... of huggingface_hub.

        Raises: ValueError or FileNotFoundError naming the file, the tensors that do not fit, or a backbone whose
            checksum is not the one that the checkpoint was trained on.
        """
        directory = Path(source)
        if not directory.is_dir():
            directory = _download(str(source), hub_options)
        path = directory / checkpoint.CONFIG_NAME
        try:
            config = Config.from_dict(checkpoint.read_config(path))
        except TypeError as error:
            raise ValueError(f"{path}: expected a lavish_fast configuration, got: {error}") from None
        tensors = checkpoint.read_tensors(directory / checkpoint.WEIGHTS_NAME)
        model = cls(config)
        model.load_trainable_state_dict(tensors, str(directory / checkpoint.WEIGHTS_NAME))
        model.load_backbone(backbone)
        expected = checkpoint.read_metadata(directory / checkpoint.WEIGHTS_NAME).get("backbone_sha256")
        got = checkpoint.fingerprint(model.backbone)
        if expected != got:
            raise ValueError(
                f"{source}: expected the backbone it was trained on (checksum {str(expected)[:12]}), got {got[:12]}"
            )
        return model.eval()


def images(config: Config, audio: Any, video: Tensor | None) -> dict[str, Tensor]:
    """What the backbone sees of each stream that runs, by name, audio first: (B * T, 3, H, W).

    Raises: ValueError naming the input, what was expected and what came.
    """
    if isinstance(audio, (list, tuple)):
        audio = audio[0] if len(audio) else None
    side, spectrogram = config.backbone.img_size, config.spectrogram
    # A ViT takes spectrograms of any size; Swin-V2's windows are laid out for one size of image.
    shape = (side, side) if config.backbone.kind == "swinv2" else (spectrogram.frames, spectrogram.mel_bins)
    given = {"audio": (audio, shape), "video": (video, (3, side, side))}
    found = {}
    for stream in config.streams:
        x, expected = given[stream]
        wanted = f"{stream}: expected a floating tensor (B, T, {', '.join(map(str, expected))})"
        if not isinstance(x, Tensor):
            raise ValueError(f"{wanted}, got {type(x).__name__}")
        if x.ndim != 2 + len(expected) or tuple(x.shape[2:]) != expected or not x.is_floating_point():
            raise ValueError(f"{wanted}, got {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}")
        if stream == "audio":
            x = x.unsqueeze(2).expand(-1, -1, 3, -1, -1)
        found[stream] = x.flatten(0, 1)
    if len(found) == 2 and audio.shape[:2] != video.shape[:2]:
        raise ValueError(
            f"audio and video: expected the same clips and seconds (B, T), "
            f"got {tuple(audio.shape[:2])} and {tuple(video.shape[:2])}"
        )
    return found


class _Trainable(nn.Module):
    """A view of a model without its backbone, with the same names."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.adapters, self.head = model.adapters, model.head


def _download(repo: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        for name in (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME):
            path = hf_hub_download(repo, name, **options)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{repo}: expected a directory or a Hub repository, got neither: {reason}") from None
    return Path(path).parent
