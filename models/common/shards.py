"""Safetensors folders, one tensor at a time: reading into ready memory, and writing in shards.

A checkpoint is never mapped or held whole beside the model that it fills. The format is eight bytes with the length
of a JSON header, the header, and the numbers; nothing in it can run code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from imagerl.rl.errors import one_line
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import is_regular, parse_json, read_text
from imagerl.rl.types import ImageRLError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000  # one is in memory beside the model while it is converted
MAX_HEADER = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of a tensor."""

    file: Path
    start: int  # first byte in the file
    size: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


class StoredTensor(BaseModel):
    """A header's entry for a tensor."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0, strict=True)]]
    data_offsets: tuple[Annotated[int, Field(ge=0, strict=True)], Annotated[int, Field(ge=0, strict=True)]]


class Index(BaseModel):
    """model.safetensors.index.json, as far as it is used."""

    weight_map: dict[str, str]  # tensor -> file


class Shards:
    """The tensors of a folder by name. Only headers are read until a tensor is asked for.

    Raises ImageRLError with one line when there are no weights, a shard is missing or cut short, or all there is
    are pickles, which are never opened."""

    def __init__(self, folder: Path, weights: str = WEIGHTS) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        index = _read_index(folder / f"{weights}.index.json")
        files = sorted(set(index.values())) if index is not None else [weights]
        for name in files:
            if not is_regular(folder / name):
                raise ImageRLError(_absent(folder, name, index))
            found = _read_header(folder / name)
            if twice := sorted(found.keys() & self.entries.keys()):
                raise _damaged(folder / name, f"{twice[0]} is in {self.entries[twice[0]].file.name} too")
            self.entries.update(found)
        lost = sorted((index or {}).keys() - self.entries.keys())
        if lost:
            raise ImageRLError(
                f"{folder / weights}.index.json names {len(lost)} tensors such as {lost[0]} that are not in its files; "
                "copy the folder again"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def read(self, name: str) -> Tensor:
        """Read one tensor as stored, in memory of its own. Raises KeyError for an unknown name."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.size:
            # a scalar cannot be viewed as bytes; the reshape copies nothing
            target = tensor.reshape(-1).view(torch.uint8).numpy().data
            with open(entry.file, "rb", buffering=0) as file:
                file.seek(entry.start)
                filled = 0
                while filled < entry.size:
                    count = file.readinto(target[filled:])
                    if not count:
                        raise _damaged(entry.file, "it ends too early")
                    filled += count
        return tensor

    def in_order(self) -> Iterator[str]:
        """List all names as they lie on the disk, which is read front to back."""
        return iter(
            sorted(self.entries, key=lambda name: (self.entries[name].file, self.entries[name].start))
        )


def require_finite(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor itself. Raises ImageRLError when it holds NaN or infinity: no picture comes of them.

    In no memory of its own: the smallest or the largest of numbers that are not all finite is not."""
    if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):
        raise ImageRLError(f"{name} holds numbers that are not finite; copy the model again")
    return tensor


def own_memory(module: nn.Module) -> None:
    """Move the weights into memory of torch's own. `from_pretrained` leaves them where they lie in the mapped
    file, and on addresses that are no multiple of 64 some kernels add up in another order: equal weights, but pixels
    that differ by 1e-6."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def save_shards(
    state: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None = None,
    max_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as model.safetensors, or as numbered shards with an index where that would exceed `max_bytes`.

    `dtype` is what floating-point numbers are stored in; the default keeps each tensor's own. Beside the model at
    most one shard is in memory."""
    sizes = {name: _stored_size(tensor, dtype) for name, tensor in state.items()}
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    files = [WEIGHTS]
    if len(parts) > 1:
        files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, part in zip(files, parts, strict=True):
        save_tensors({name: state[name] for name in part}, folder / file, dtype)


def save_tensors(state: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None = None) -> None:
    """Write one safetensors file. The tensors may lie on a GPU and may share memory."""
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        tensor = tensor.cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()  # the format refuses two names for one memory
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    save_file(stored, file, metadata={"format": "pt"})


def _stored_size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    if dtype is None or not tensor.is_floating_point():
        return tensor.numel() * tensor.element_size()
    return tensor.numel() * torch.empty((), dtype=dtype).element_size()


def _read_index(file: Path) -> dict[str, str] | None:
    """Map tensor names to files, or return None where one file holds all."""
    if not is_regular(file):
        return None
    try:
        index = validated(Index, parse_json(read_text(file, MAX_HEADER), "its text"), "it").weight_map
    except ImageRLError as error:
        raise _damaged(file, str(error)) from error
    outside = [shard for shard in index.values() if Path(shard).name != shard]
    if outside or not index:
        raise _damaged(
            file, f"it points outside the folder, to {outside[0]}" if outside else "it names no tensor"
        )
    return index


def _absent(folder: Path, name: str, index: Mapping[str, str] | None) -> str:
    if index is not None:
        lost = sum(file == name for file in index.values())
        return f"{folder} lacks the shard {name} with {lost} tensors; copy it again"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    hint = f" ({pickles[0]} is a pickle and is not loaded; convert it to safetensors)" if pickles else ""
    return f"{folder} has no {name}{hint}"


def _read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of a file, which lie one behind the other from its header to its end, as the format wants
    it: two names for one place, or bytes that no name stands for, are damage."""
    total = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(total - 8, MAX_HEADER):
                raise ValueError("no safetensors header")
            header = parse_json(stream.read(length).decode(), "its header")
        if not isinstance(header, dict):
            raise ValueError("no safetensors header")
        header.pop("__metadata__", None)
        stored = validated(dict[str, StoredTensor], header, "its header")
    except (OSError, ValueError, struct.error, ImageRLError) as error:
        raise _damaged(file, one_line(error)) from error
    entries, end = {}, 8 + length
    for name, value in sorted(stored.items(), key=lambda one: one[1].data_offsets):
        start, stop = (8 + length + offset for offset in value.data_offsets)
        if value.dtype not in DTYPES:
            raise ImageRLError(f"{file} stores numbers as {value.dtype}; convert them to BF16 or F32")
        dtype, shape = DTYPES[value.dtype], tuple(value.shape)
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise _damaged(file, f"the place of {name} does not fit its shape")
        if start != end:
            raise _damaged(file, f"{name} does not begin where the tensor before it ends")
        entries[name], end = Entry(file, start, stop - start, dtype, shape), stop
    if end != total:
        raise _damaged(file, f"{total} bytes instead of {end}")
    return entries


def _damaged(file: Path, why: str) -> ImageRLError:
    return ImageRLError(f"{file} is damaged or cut short ({why}); copy it again")
