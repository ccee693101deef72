"""Identify a model by one number for everything in its folder that decides what it draws."""

from __future__ import annotations

import hashlib
from pathlib import Path

from imagerl.models.blip3o_next.adapters import ADAPTER_CONFIG, adapter_base
from imagerl.models.blip3o_next.loading import model_folder

DECIDING = (".safetensors", ".json", ".jinja", ".txt", ".model")  # weights, settings, text tokenizer
ABOUT = ("provenance.json", "pretraining.json")  # how it came to be: says nothing about what it does


def model_fingerprint(path: str) -> str:
    """Return SHA-256 over the names and contents of a model's files; for an adapter, over those of its base too.

    Raises ImageRLError when there is no such model."""
    folder = model_folder(path)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix in DECIDING and file.name not in ABOUT and not hidden and file.is_file():
            name = file.relative_to(folder).as_posix()
            digest.update(f"{name} {_file_digest(file)}\n".encode())
    if (folder / ADAPTER_CONFIG).is_file():
        digest.update(f"base {model_fingerprint(adapter_base(folder))}\n".encode())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
