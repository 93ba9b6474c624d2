"""Model: a frozen backbone run over two streams, adapters between them in every block, a task head."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavish_fast import backbones, checkpoint, ops, tasks
from lavish_fast.adapter import BlockAdapters, LavishAdapter, arithmetic
from lavish_fast.backbones import PLACES, Encoded
from lavish_fast.config import Config
from lavish_fast.vggish import VGGish


class Network(nn.Module):
    """What a model and its faster forms share: from the released call's arguments to the head's outputs.

    Each has `config`, `head`, `vggish` (or None), `encode(*streams)` and `frozen(images)`.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The task's outputs for the arguments of the released network, by place or by name.

        | task | arguments | outputs |
        |---|---|---|
        | ave | audio, video | probabilities (B * T, K), clip by clip, second by second |
        | avs | video, audio | mask logits (B * T, 1, size, size), four feature maps, audio features |
        | avqa | audio, positive, negative, question | answer logits (B, K), match logits (B * T, 2) twice |
        | action | audio, video | class logits (B, K) |

        Of a stream that does not run, anything or nothing is given. Shapes: `tasks.<task>.inputs`.

        Raises: ValueError naming the input, what was expected and what came.
        """
        return self.classify(*tasks.load(self.config.task).inputs(self.config, *args, **kwargs).values())

    def classify(self, *inputs: Tensor) -> Any:
        """What `tasks.<task>.inputs` gives, in its order, to the head's outputs.

        Images of each stream, (n, 3, H, W), audio first; then what else the head takes, of which images go through the
        frozen backbone alone, and patches of sound (n, 96, 64) through VGGish.
        """
        streams, extras = inputs[: len(self.config.streams)], inputs[len(self.config.streams) :]
        read = {4: self.frozen, 3: self.hear}
        extras = [read[x.ndim](x) if x.ndim in read else x for x in extras]
        return self.read(self.encode(*streams), *extras)

    @torch.no_grad()
    def hear(self, patches: Tensor) -> Tensor:
        """Log-mel patches (n, 96, 64) through the frozen VGGish: features (n, 128)."""
        return self.vggish(patches[:, None].to(next(self.vggish.parameters()).dtype))

    def read(self, encoded: Encoded, *extras: Tensor) -> Any:
        """The head's outputs."""
        with arithmetic(self.head, encoded.pooled[0]):
            return self.head(encoded, *extras)

    def _ends(self) -> set[int]:
        """How many blocks have run when a stage ends that the head reads."""
        depths = [depth for depth, _ in self.config.backbone.stages]
        ends = [end - self.config.adapter.first_block for end in accumulate(depths)]
        return set(ends if self.head.reads_stages else ends[-1:])


class Model(Network):
    """LAVISH, called as the released networks are: for event localisation `model(audio, video)`, see `forward`.

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
        self.head = tasks.load(config.task).Head(config)
        heard = config.task == "ave" and config.head.vggish
        self.vggish = VGGish().requires_grad_(False) if heard else None

    def features(self, *args: Any, **kwargs: Any) -> Tensor:
        """The streams' features side by side, (n, 2C), as the released networks have them, for `forward`'s arguments.

        Video then audio for Swin-V2, audio then video for ViT; C for one stream.
        """
        inputs = tasks.load(self.config.task).inputs(self.config, *args, **kwargs)
        return tasks.side_by_side(self.config, self.encode(*list(inputs.values())[: len(self.config.streams)]))

    def encode(self, *streams: Tensor) -> Encoded:
        """Images of each stream, (n, 3, H, W), audio first, through the backbone and the adapters."""
        xs, stages, ends = [self.backbone.embed(x) for x in streams], [], self._ends()
        first = self.config.adapter.first_block
        for i, block in enumerate(self.backbone.blocks[first:], first):
            xs = [self.backbone.enter(i, x) for x in xs]
            xs = self.adapters[i - first](block, xs)
            if i - first + 1 in ends:
                stages.append(list(xs))
        stages[-1] = [self.backbone.finish(x) for x in stages[-1]]
        return Encoded(stages, [self.backbone.pool(x) for x in stages[-1]])

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """Images (n, 3, H, W) through the frozen backbone alone: tokens (n, N, C) after the final norm."""
        return self.backbone.tokens(images)

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
        parts = {part: getattr(self, part).parameters() for part in ("adapters", "head")}
        count = {part: sum(p.numel() for p in parameters if p.requires_grad) for part, parameters in parts.items()}
        trainable, total = sum(count.values()), sum(p.numel() for p in self.parameters())
        print(
            f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%}): "
            f"adapters {count['adapters']:,}, head {count['head']:,}"
        )

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Parameters and BatchNorm buffers of adapters and head, by name."""
        return {name: t for name, t in self.state_dict().items() if name.startswith(("adapters.", "head."))}

    def load_trainable_state_dict(self, tensors: Mapping[str, Tensor], what: str = "state dict") -> None:
        """Loads what `trainable_state_dict` gave, strictly. Raises: ValueError naming every tensor that is off."""
        checkpoint.load_strict(_Trainable(self), tensors, what)

    def load_backbone(self, source: str | os.PathLike | Mapping[str, Tensor] | None = None) -> Model:
        """Loads the frozen backbone's weights and returns the model.

        Args:
            source: the name of a timm model, "hub:REPO", a file, or a state dict; without it the configuration's
                `backbone_weights`. Names are timm's, or those of VideoMAE's or Hugging Face's networks.

        Raises: ValueError or FileNotFoundError naming the source or the tensors that do not fit.
        """
        source = self.config.backbone_weights if source is None else source
        if source is None:
            raise ValueError("backbone: expected a timm model's name, a file or a state dict, got none")
        what = "backbone" if isinstance(source, Mapping) else f"backbone {source}"
        tensors = backbones.own_names(self.config.backbone.kind, checkpoint.backbone_tensors(source))
        checkpoint.load_strict(self.backbone, tensors, what)
        return self

    def load_vggish(self, source: str | os.PathLike | Mapping[str, Tensor] | None = None) -> Model:
        """Loads VGGish's weights, which are published as vggish-10086976.pth, and returns the model.

        Args:
            source: a file or a state dict; without it the configuration's `vggish_weights`.

        Raises: ValueError or FileNotFoundError naming the source or the tensors that do not fit.
        """
        if self.vggish is None:
            raise ValueError("vggish: expected a configuration with it beside, got one without")
        source = self.config.head.vggish_weights if source is None else source
        if source is None:
            raise ValueError("vggish: expected a file of its weights, such as vggish-10086976.pth, got none")
        tensors = dict(source) if isinstance(source, Mapping) else checkpoint.read_tensors(source)
        checkpoint.load_strict(self.vggish, tensors, "vggish" if isinstance(source, Mapping) else f"vggish {source}")
        return self

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], config: Config) -> Model:
        """A model with the weights of a released network, e.g. `torch.load(path, weights_only=True)`.

        What the released options do not say (channels, classes, vocabulary) is read off the tensors' shapes.

        Raises: ValueError naming the tensors that do not fit the configuration.
        """
        task = tasks.load(config.task)
        tensors = checkpoint.from_official(state_dict, task.HEAD_NAMES)
        if config.task == "avs":  # its adapters have an LN_before that no forward pass reads
            tensors = {name: x for name, x in tensors.items() if ".ln_before." not in name}
        model = cls(task.fitted(config, tensors))
        checkpoint.load_strict(model, tensors, "official state dict")
        return model

    def save_pretrained(
        self, directory: str | os.PathLike, *, push_to_hub: bool = False, repo_id: str | None = None
    ) -> None:
        """Writes config.json and model.safetensors (adapters and head only) as Hub libraries do, atomically each.

        The frozen backbone is not written, nor VGGish beside it; their checksums are, so that others are refused on
        loading.
        """
        directory = Path(directory)
        checkpoint.write_text(directory / checkpoint.CONFIG_NAME, json.dumps(self.config.to_dict(), indent=2) + "\n")
        metadata = {"format": "pt"} | self.fingerprints()
        checkpoint.write_tensors(directory / checkpoint.WEIGHTS_NAME, self.trainable_state_dict(), metadata)
        if push_to_hub:
            from huggingface_hub import HfApi

            api, name = HfApi(), repo_id or directory.name
            api.create_repo(name, exist_ok=True)
            files = [checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME]
            api.upload_folder(repo_id=name, folder_path=directory, allow_patterns=files)

    def fingerprints(self) -> dict[str, str]:
        """Checksums of what is frozen: "backbone_sha256", and "vggish_sha256" where it is beside."""
        frozen = {"backbone_sha256": self.backbone, "vggish_sha256": self.vggish}
        return {name: checkpoint.fingerprint(module) for name, module in frozen.items() if module is not None}

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        backbone: str | os.PathLike | Mapping[str, Tensor] | None = None,
        vggish: str | os.PathLike | Mapping[str, Tensor] | None = None,
        **hub_options: Any,
    ) -> Model:
        """The model that `save_pretrained` wrote, in evaluation mode.

        Args:
            source: a directory, or the name of a Hub repository.
            backbone, vggish: where the frozen weights come from, as for `load_backbone` and `load_vggish`.
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
        if model.vggish is not None:
            model.load_vggish(vggish)
        written = checkpoint.read_metadata(directory / checkpoint.WEIGHTS_NAME)
        for name, got in model.fingerprints().items():
            if (expected := written.get(name)) != got:
                what = name.removesuffix("_sha256")
                raise ValueError(
                    f"{source}: expected the {what} it was trained on (checksum {str(expected)[:12]}), got {got[:12]}"
                )
        return model.eval()


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
