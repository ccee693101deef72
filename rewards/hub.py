"""Find files and folders of models: here, or on the hub where their name says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagerl.rl.errors import ImageRLError, why


def weights_file(name: str, label: str, others: Sequence[str] = ()) -> str:
    """Return the path of a file of weights: one that is here, or owner/repository/file, fetched from the hub once.

    Raises ImageRLError for the reward `label` when there is none; `others` are what else could have been named."""
    path = Path(name).expanduser()
    if path.is_file():
        return str(path)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 2:
        also = (
            f", and it is none of {', '.join(others)}"
            if others
            else "; give a path, or owner/repository/file"
        )
        raise ImageRLError(f"reward {label!r}: there is no file {name}{also}")
    from huggingface_hub import hf_hub_download

    owner, repository, file = name.split("/")
    try:
        return hf_hub_download(f"{owner}/{repository}", file)
    except Exception as error:  # the hub's client has many
        raise ImageRLError(f"reward {label!r}: {name} cannot be fetched ({why(error)})") from error


def model_source(name: str, label: str, key: str) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` loads: a folder that is here, or owner/repository on the hub, and no code of
    either. Raises ImageRLError for what is neither; `key` is the setting."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise ImageRLError(f"reward {label!r}: there is no folder {name}; correct {key}")
    local = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
    return str(folder) if folder.is_dir() else name, local


def device_of(name: str, label: str) -> torch.device:
    """Return the device of a name; auto is a GPU where there is one. Raises ImageRLError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ImageRLError(f"reward {label!r}: there is no device {name!r}; use auto, cpu or cuda") from error


def read_tensors(path: str, label: str) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of one of torch.save that holds nothing else. Raises ImageRLError."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # safetensors, zip and pickle have many; the file is not ours
        raise ImageRLError(
            f"reward {label!r}: {path} cannot be read as a file of tensors ({why(error)})"
        ) from error


def load_exactly(module: torch.nn.Module, state: dict[str, Tensor], label: str, place: str) -> None:
    """Load weights into a module. Raises ImageRLError unless they are all of them and fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ImageRLError(f"reward {label!r}: {place} holds other weights: {why(error)}") from error
