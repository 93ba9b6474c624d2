"""Weights in and out: the released names to ours and back, frozen backbones, safetensors written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

_ADAPTERS = re.compile(r"(audio|vis)_adapter_blocks_(p[12])\.(\d+)\.(.+)")
_OURS = re.compile(r"adapters\.(\d+)\.(audio|video)_(p[12])\.(.+)")
_ADAPTER_NAMES = {
    "my_tokens": "latents",
    "down_sampler.weight": "down",
    "up_sampler.weight": "up",
    "gate": "gate",
    "gate_av": "gate_av",
}
# Entries of the released networks that no forward pass reads, or that follow from the others.
_DEAD = re.compile(
    r"adapter_token_downsampler\.|.*\.gate_tk$|.*\.relative_(coords_table|position_index)$|.*\.attn_mask$"
    r"|.*\.k_bias$|(swin|ViT\.v)\.head\."
)


def from_official(state_dict: Mapping[str, Tensor], head: Mapping[str, str | None]) -> dict[str, Tensor]:
    """A released network's state dict under our names, its dead entries left out.

    head: `HEAD_NAMES` of the task. Names that are not known stay as they are, so that a strict load names them.
    """
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    renamed = {}
    for key, value in state_dict.items():
        if _DEAD.match(key):
            continue
        if match := _ADAPTERS.match(key):
            stream, place, index, rest = match.groups()
            name = _ADAPTER_NAMES.get(rest, rest.replace("ln_post", "ln_after"))
            if name in ("down", "up"):
                value = value.flatten(1)  # a 1x1 convolution's weight (D, C / G, 1, 1)
            renamed[f"adapters.{index}.{'video' if stream == 'vis' else stream}_{place}.{name}"] = value
        elif match := re.match(r"swin\.layers\.(\d+)\.downsample\.(.+)", key):
            # timm 0.6 keeps patch merging at the end of a stage, later versions at the start of the next.
            renamed[f"backbone.layers.{int(match[1]) + 1}.downsample.{match[2]}"] = value
        elif match := re.match(r"(?:swin|ViT\.v)\.(.+)", key):
            renamed[f"backbone.{match[1]}"] = value
        elif prefix := _prefix(key, head):
            if head[prefix] is not None:
                renamed[f"head.{head[prefix]}{key.removeprefix(prefix)}"] = value
        else:
            renamed[key] = value
    return renamed


def _prefix(key: str, names: Iterable[str]) -> str | None:
    """The longest of some dotted names that a tensor's name is, or begins with."""
    return max((name for name in names if f"{key}.".startswith(f"{name}.")), key=len, default=None)


def to_official(state_dict: Mapping[str, Tensor], kind: str, head: Mapping[str, str | None]) -> dict[str, Tensor]:
    """The inverse of `from_official` for a backbone of this kind ("swinv2" or "vit"), without the dead entries."""
    prefix = "ViT.v." if kind == "vit" else "swin."
    adapter_names = {ours: theirs for theirs, ours in _ADAPTER_NAMES.items()}
    head = {f"head.{ours}": theirs for theirs, ours in head.items() if ours is not None}
    renamed = {}
    for key, value in state_dict.items():
        if match := _OURS.match(key):
            index, stream, place, rest = match.groups()
            name = adapter_names.get(rest, rest.replace("ln_after", "ln_post"))
            if rest in ("down", "up"):
                value = value[:, :, None, None]
            renamed[f"{'vis' if stream == 'video' else stream}_adapter_blocks_{place}.{index}.{name}"] = value
        elif ours := _prefix(key, head):
            renamed[head[ours] + key.removeprefix(ours)] = value
        elif match := re.match(r"backbone\.layers\.(\d+)\.downsample\.(.+)", key):
            renamed[f"{prefix}layers.{int(match[1]) - 1}.downsample.{match[2]}"] = value
        else:
            renamed[prefix + key.removeprefix("backbone.")] = value
    return renamed


def load_strict(module: nn.Module, state_dict: Mapping[str, Tensor], what: str) -> None:
    """Loads exactly these tensors. Raises: ValueError naming what is missing, unexpected or of another shape."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in sorted(own.keys() - state_dict.keys())]
    problems += [f"unexpected {name}" for name in sorted(state_dict.keys() - own.keys())]
    problems += [
        f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(state_dict[name].shape)}"
        for name in sorted(own.keys() & state_dict.keys())
        if own[name].shape != state_dict[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{what}: expected the {len(own)} tensors of this configuration, got: {shown}")
    module.load_state_dict(dict(state_dict))


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file read with weights_only: nothing in it is executed.

    Raises: FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of weights, got none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: expected safetensors or a plain state dict, got an unreadable file: {reason}"
        ) from None
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path}: expected a state dict of tensors, got {type(tensors).__name__}")
    return dict(tensors)


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary file beside `path`, then moves it there: a kill leaves the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same for a name: what a kill leaves is overwritten next time. And short: that of `path` may be too long
    # for anything more.
    temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.part")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
    """A small text file, written atomically."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written atomically."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(contiguous, file, dict(metadata)))


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def fingerprint(module: nn.Module) -> str:
    """A checksum of a module's weights, the same in float64, float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def backbone_tensors(source: str | os.PathLike | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a frozen backbone, under the names that their source has.

    Args:
        source: a state dict; the path of a file; "package:NAME" for weights that come with this package; "hub:REPO" for
            those of a Hugging Face repository; or the name of a timm model. The last two are fetched.

    Raises: ValueError or FileNotFoundError naming the source.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if os.path.isfile(source):
        return read_tensors(source)
    kind, _, name = str(source).rpartition(":")
    if kind == "package":
        with resources.as_file(resources.files("lavish_fast") / "data" / f"{name}.safetensors") as path:
            return read_tensors(path)
    if kind == "hub":
        return _fetched(source, lambda: read_tensors(_hub_file(name)))
    if Path(source).suffix in (".safetensors", ".pt", ".pth", ".bin") or os.sep in str(source):
        return read_tensors(source)
    import timm

    if not timm.is_model(name):
        raise FileNotFoundError(f"backbone: expected a file, or a timm model's name, got {name!r}")
    return _fetched(source, lambda: timm.create_model(name, pretrained=True, num_classes=0).state_dict())


def _hub_file(repo: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(repo, "model.safetensors")
    except EntryNotFoundError:
        return hf_hub_download(repo, "pytorch_model.bin")


def _fetched(source: str, fetch: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        return fetch()
    except Exception as error:  # of the network, of the repository, of the file: each library has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"backbone: expected to fetch the weights {source!r}, got: {reason}; without a network give a local file"
        ) from None


def read_config(path: str | os.PathLike) -> dict:
    """The JSON object of a config.json. Raises: FileNotFoundError, or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint's {CONFIG_NAME}, got none")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
