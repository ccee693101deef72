"""The state of a run on disk: folders `step_000020` that are complete or absent.

A checkpoint holds one safetensors file per group of tensors ("model", "optimizer"), `state.json` with the
trainer's counters, and `manifest.json` with the size and SHA-256 of each. Tensors go by parameter name and
are whole, so the number of processes and the ZeRO stage may change between saving and loading. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.writing import atomic_folder, clean_leftovers, remove_folder, write_error

FORMAT = 1
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # their folder inside a run folder
STATE = "state.json"
TENSORS = ".safetensors"
_FOLDER = re.compile(r"step_(\d+)")
_logger = logging.getLogger(__name__)


class _Version(BaseModel):
    versions: dict[str, str] = Field(default_factory=dict)


class _File(BaseModel):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Manifest(_Version):
    model_config = ConfigDict(strict=True)

    format: int
    step: int
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], _File]  # in the folder itself


class _State(BaseModel):
    """The names under which every kind of run keeps its state."""

    first_eval: list[dict[str, object]] | None = None
    last_eval: list[dict[str, object]] | None = None
    looked: int = 0
    processes: int = Field(1, ge=1)
    recipe: dict[str, object] = Field(default_factory=dict)
    budget: dict[str, float] = Field(default_factory=dict)
    trainer: dict[str, object] = Field(default_factory=dict)
    watch: dict[str, object] = Field(default_factory=dict)
    data: list[dict[str, object]] = Field(default_factory=list)  # of each process


class DamagedCheckpoint(ImageRLError):
    """A checkpoint differs from its manifest."""


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint as `save_checkpoint` was given it, read back and verified."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]  # group -> name -> tensor, on the CPU
    state: dict[str, Any]
    versions: dict[str, str]


def save_checkpoint(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    keep: int = 2,
) -> Path:
    """Write `directory/step_<step>` atomically, then delete all but the newest `keep` checkpoints.

    A checkpoint of the same step is replaced. Checkpoints of later steps belong to a future that this run
    has left (it was resumed from an earlier one) and go too, but only once the new one is complete.

    Args:
        directory: the `checkpoints` folder of a run; one process writes to it at a time.
        tensors: group -> name -> tensor; each group becomes `<group>.safetensors`.
        state: anything JSON can hold; floats come back bit for bit.

    Raises:
        ImageRLError: disk full or not writable; earlier checkpoints are intact and no leftovers remain.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    directory = Path(directory)
    final = directory / f"step_{step:06d}"
    with atomic_folder(final, replace=True) as folder:
        for group, named in tensors.items():
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            try:
                save_file(plain, folder / f"{group}.safetensors")
            except SafetensorError as error:
                raise write_error(final, error) from error
        _write_json(folder / STATE, dict(state))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(folder.iterdir())
        }
        manifest = {"format": FORMAT, "step": step, "files": files, "versions": package_versions()}
        _write_json(folder / MANIFEST, manifest)
    complete = list_checkpoints(directory)
    abandoned = [folder for folder in complete if step_of(folder) > step]
    reached = [folder for folder in complete if step_of(folder) <= step]
    for folder in abandoned + reached[: -max(keep, 1)]:
        remove_folder(folder)
    return final


def list_checkpoints(directory: str | Path) -> list[Path]:
    """List the complete checkpoints in `directory`, oldest first. Their content is not verified."""
    return [folder for folder in _step_folders(directory) if (folder / MANIFEST).is_file()]


def _step_folders(directory: str | Path) -> list[Path]:
    found = [path for path in Path(directory).glob("step_*") if _FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """Find the newest complete checkpoint, or None. Cleans up after killed processes first."""
    directory = Path(directory)
    if not directory.is_dir():
        return None
    clean_leftovers(directory)
    complete = list_checkpoints(directory)
    return complete[-1] if complete else None


def newest_sound(directory: str | Path) -> Checkpoint | None:
    """Find the newest checkpoint that agrees with its manifest, or None. Each newer one is named in
    a warning. Cleans up after killed processes first.

    Raises:
        ImageRLError: all are damaged, or one is of another version.
    """
    latest_checkpoint(directory)
    folders = _step_folders(directory)
    while folders:
        try:
            return load_checkpoint(folders.pop())
        except DamagedCheckpoint as error:
            if not folders:
                raise ImageRLError(f"{error}, but none is left: begin again with --overwrite") from None
            _logger.warning("%s: going on from %s", error, folders[-1].name)
    return None


def step_of(folder: Path) -> int:
    """Read the training step from a checkpoint folder's name."""
    match = _FOLDER.fullmatch(folder.name)
    if not match:
        raise ImageRLError(
            f"{folder} is not a checkpoint folder; its name should read step_000020 or similar"
        )
    return int(match[1])


def load_checkpoint(
    folder: str | Path, groups: Collection[str] | None = None, verify: bool = True, read: bool = True
) -> Checkpoint:
    """Read and verify one checkpoint folder, or only these `groups` of its tensors. Without `verify` contents are not
    hashed: another process has done so. Without `read` tensors are verified only.

    Raises:
        DamagedCheckpoint: a file is missing, truncated or altered.
        ImageRLError: there is no such checkpoint, or another version wrote it.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    step = step_of(folder)
    if not folder.is_dir():
        raise ImageRLError(f"there is no checkpoint {folder}; see the step_* folders in {folder.parent}")
    content = _read_json(folder / MANIFEST)
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        wrote = validated(_Version, content, str(folder / MANIFEST)).versions.get("imagerl", "unknown")
        raise ImageRLError(
            f"{folder} has checkpoint format {content['format']}, this version reads {FORMAT}; "
            f"use the version that wrote it ({wrote})"
        )
    try:
        manifest = validated(_Manifest, content, "it")
    except ImageRLError as error:
        raise _damaged(folder / MANIFEST, str(error)) from error
    if manifest.step != step:
        raise _damaged(folder / MANIFEST, f"it does not describe step {step}")
    stored = {STATE, *(path.name for path in folder.glob("*.safetensors"))}
    if unlisted := stored - manifest.files.keys():
        raise _damaged(folder / MANIFEST, f"it does not list {min(unlisted)}")
    wanted = [
        name
        for name in manifest.files
        if groups is None or not name.endswith(TENSORS) or name.removesuffix(TENSORS) in groups
    ]
    for name in wanted:
        path, expected = folder / name, manifest.files[name]
        if not path.is_file():
            raise _damaged(path, "it is missing")
        if path.stat().st_size != expected.bytes:
            raise _damaged(path, f"it has {path.stat().st_size} bytes instead of {expected.bytes}")
        if verify and sha256_of(path) != expected.sha256:
            raise _damaged(path, "its SHA-256 is not the one in the manifest")
    tensors = {
        name.removesuffix(TENSORS): load_file(folder / name)
        for name in wanted
        if read and name.endswith(TENSORS)
    }
    state = _read_json(folder / STATE)
    try:
        validated(_State, state, "it")
    except ImageRLError as error:
        raise _damaged(folder / STATE, str(error)) from error
    return Checkpoint(folder, step, tensors, state, manifest.versions)


def _damaged(path: Path, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"checkpoint file {path} is damaged ({reason}); an earlier one can be used instead"
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"it cannot be read: {error}") from error


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1))  # in order, so that a resumed run lists metrics alike


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("imagerl", "torch", "transformers", "deepspeed", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
