"""The families, one line each, and the way from a `model.path` to a policy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from imagerl.models.base import Family, Outline, Policy, PromptReader
from imagerl.models.common.adapters import ADAPTER_CONFIG, adapter_base
from imagerl.models.common.checks import require_loaded, require_members
from imagerl.models.common.hub import SHIPPED, is_hub_name, snapshot
from imagerl.rl.files.importing import import_callable
from imagerl.rl.files.reading import is_regular, read_json
from imagerl.rl.types import ImageRLError

FAMILIES: dict[str, str] = {  # name -> its `models.base.Family`
    "blip3o_next": "imagerl.models.blip3o_next.family:Blip3oNext",
    "janus_pro": "imagerl.models.janus_pro.family:JanusPro",
    "glm_image": "imagerl.models.glm_image.family:GlmImage",
}
SETTINGS = ("config.json", "model_index.json")  # by which a folder is recognised, the first that is there
MAX_SETTINGS = 1 << 22  # bytes of one
DECIDING = (".safetensors", ".json", ".jinja", ".txt", ".model")  # weights, settings, text tokenizer
ABOUT = ("provenance.json", "pretraining.json")  # how it came to be: says nothing about what it does


def find_family(name: str) -> Family:
    """Return the family of a name, or a user's own as `file.py:Class`.

    Raises ImageRLError when there is none."""
    if name not in FAMILIES and ":" not in name:
        raise ImageRLError(
            f"model.family {name!r} is none of {', '.join(FAMILIES)}; one of your own is file.py:Class"
        )
    made = import_callable(FAMILIES.get(name, name), "model.family")
    try:
        family: Family = made()
    except TypeError as error:
        raise ImageRLError(
            f"model.family {name!r} must name a class whose __init__ takes nothing more: {error}"
        ) from error
    require_members(family, Family, "BaseFamily of models/common/policy.py")
    return family


def family_of(folder: Path, name: str | None = None) -> Family:
    """Return the family of a model folder: a user's own where it is named, else that which recognises its settings.

    Raises ImageRLError when none does, or another than the named one."""
    if name is not None and name not in FAMILIES:
        return find_family(name)
    settings = folder_settings(folder)
    for known in FAMILIES:
        if (family := find_family(known)).recognises(settings):
            if name not in (None, known):
                raise ImageRLError(
                    f"{folder} holds a model of {known}, not of {name}; leave model.family out, or give another folder"
                )
            return family
    kind = next((settings[key] for key in ("model_type", "_class_name") if key in settings), None)
    raise ImageRLError(
        f"{folder} holds a model{f' of type {kind!r}' if kind else ''} that is of none of the families "
        f"{', '.join(FAMILIES)}; for one of your own set model.family to file.py:Class"
    )


def folder_settings(folder: Path) -> Mapping[str, object]:
    """Read the settings that say what a model folder holds. Raises ImageRLError when there are none."""
    file = next((folder / name for name in SETTINGS if (folder / name).is_file()), None)
    if file is None:
        raise ImageRLError(f"{folder} has no config.json; {_way_to_a_model(folder)}")
    settings = read_json(file, MAX_SETTINGS)
    if not isinstance(settings, dict):
        raise ImageRLError(f"{file} holds no settings; give the folder of a model or of an export")
    return settings


def _way_to_a_model(folder: Path) -> str:
    """Say what to do when a folder is no model."""
    if (folder / "model" / "config.json").is_file():
        return f"the model is in {folder / 'model'}"
    if any((folder / name).exists() for name in ("checkpoints", "optimizer.safetensors")):
        return f"it is a run's; make a model of it with: imagerl export {folder} OUT"
    return "give the folder of a model or of an export"


def model_folder(path: str) -> Path:
    """Return the folder a recipe's `model.path` means: a shipped model, a path, or a model of the hub as
    `owner/name` or `owner/name@revision`, which is downloaded once."""
    try:
        folder = Path(__file__).parent / path if path in SHIPPED else Path(path).expanduser()
        found = folder.is_dir()
    except (OSError, RuntimeError):  # a name too long, or of a user who is not here
        found = False
    if not found and is_hub_name(path):
        return snapshot(path)
    if not found:
        raise ImageRLError(
            f"model {path!r} is no folder; give a model folder, a name of the Hugging Face hub such as "
            f"BLIP3o/BLIP3o-NEXT-SFT-3B, or {SHIPPED[0]!r} for the shipped one"
        )
    return folder


def is_adapter(folder: Path) -> bool:
    return is_regular(folder / ADAPTER_CONFIG)


def base_folder(path: str) -> Path:
    """Return `model_folder`; for an adapter, that of its whole base model."""
    folder = model_folder(path)
    return base_folder(adapter_base(folder)) if is_adapter(folder) else folder


def load_policy(
    path: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    family: str | None = None,
) -> Policy:
    """Load a policy with all its parts in `dtype`.

    `path` is a shipped model, a model folder of any family, a folder with a LoRA adapter, whose base is then loaded
    under it, adapters of its own merged, or a name of the hub; `family` is that of the recipe, None: as recognised.

    Raises ImageRLError with one line when the folder is not a model, or its files are damaged or do not fit."""
    folder = model_folder(path)
    if not is_adapter(folder):
        policy = family_of(folder, family).load(folder, device, dtype)
        require_loaded(policy, folder)
        return policy
    policy = load_policy(adapter_base(folder), device, dtype, family)
    policy.merge_lora()  # of a base that is an adapter folder itself
    policy.load_adapter(folder)
    return policy


def load_prompts(path: str, family: str | None = None) -> PromptReader:
    """Return what the model at `path`, as `load_policy` takes it, can be asked; no weights are read."""
    folder = base_folder(path)
    reader = family_of(folder, family).prompts(folder)
    require_members(reader, PromptReader, "PlainPrompts of models/common/policy.py")
    return reader


def load_outline(path: str, family: str | None = None) -> Outline:
    """Return the sizes of the model at `path`, as `load_policy` takes it, or of one of the hub that is not here."""
    for candidate in map(find_family, FAMILIES if family is None else [family]):
        if known := candidate.published(path):
            return known
    folder = base_folder(path)
    return family_of(folder, family).outline(folder)


def fingerprint(path: str) -> str:
    """Return SHA-256 over the names and contents of all files of a model that decide what it draws; for an adapter,
    over those of its base too.

    Raises ImageRLError when there is no such model."""
    folder = model_folder(path)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix in DECIDING and file.name not in ABOUT and not hidden and file.is_file():
            name = file.relative_to(folder).as_posix()
            with open(file, "rb") as stream:
                own = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{name} {own}\n".encode())
    if is_adapter(folder):
        digest.update(f"base {fingerprint(adapter_base(folder))}\n".encode())
    return digest.hexdigest()
