"""Sources of training pictures: folders and webdataset-style tar shards. Both list their samples the same way.

A folder has `x.png` with `x.txt` (and `x.ref.png`, what an edit starts from), at any depth; or a `captions.jsonl`
or `metadata.jsonl` with one object a line: `file_name`, the caption's field, optionally `reference`. A shard has
members `key.jpg|png|webp`, `key.txt` or `key.json`, optionally `key.ref.png`. Shards are read in place: members are
found by their headers once and then read by offset, never unpacked.
"""

from __future__ import annotations

import difflib
import glob
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from imagerl.rl.data.image_files import PICTURE_SUFFIXES, Blob, Entry
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.reading import parse_json, read_bytes

LISTS = ("captions.jsonl", "metadata.jsonl")
REFERENCE = ".ref"


class Shard(Protocol):
    """A part of a source that is listed as a whole."""

    @property
    def path(self) -> str: ...

    def entries(self) -> list[Entry]: ...


@dataclass(frozen=True, slots=True)
class TarShard:
    path: str
    caption_field: str

    def entries(self) -> list[Entry]:
        """List the samples in file order. A shard that is cut short gives what is whole and one `truncated` entry;
        one that cannot be read at all gives one `unreadable` entry."""
        members: dict[str, dict[str, Blob]] = {}
        problem = None
        try:
            length = os.stat(self.path).st_size
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    name = os.path.basename(member.name)
                    stem, dot, extension = name.partition(".")
                    if not member.isfile() or not stem or not dot:
                        continue
                    key = os.path.join(os.path.dirname(member.name), stem)
                    # By offset: shards are large, and what is shuffled would otherwise be unpacked or kept in memory.
                    blob = Blob(self.path, member.offset_data, member.size)
                    if blob.offset + member.size <= length:
                        members.setdefault(key, {})[f".{extension.lower()}"] = blob
                    else:
                        problem = "truncated"
                # tarfile takes a damaged header for the end; a real end is zeros, or that of the file
                if any(Blob(self.path, archive.offset, min(512, length - archive.offset)).read()):
                    problem = "truncated"
        except (tarfile.TarError, EOFError):
            problem = "truncated" if members else "unreadable"
        except OSError:
            problem = "unreadable"
        found = [self._entry(key, parts) for key, parts in members.items()]
        entries = [entry for entry in found if entry is not None]
        return entries if problem is None else [*entries, Entry(self.path, problem=problem)]

    def _entry(self, key: str, parts: dict[str, Blob]) -> Entry | None:
        picture = _first(parts, PICTURE_SUFFIXES)
        caption = _first(parts, (".txt", ".json"))
        if picture is None and caption is None:
            return None
        return Entry(
            key=f"{self.path}:{key}",
            picture=picture,
            caption=caption,
            reference=_first(parts, [REFERENCE + suffix for suffix in PICTURE_SUFFIXES]),
            caption_field=self.caption_field if ".txt" not in parts else None,
        )


@dataclass(slots=True)
class FolderShard:
    path: str
    caption_field: str
    _entries: list[Entry] | None = None  # listed once: what is added during a run must not change its order

    def entries(self) -> list[Entry]:
        """List the samples in the order of the list, or of the file names. Raises ImageRLError when there are two
        lists."""
        if self._entries is None:
            folder = Path(self.path)
            lists = [folder / name for name in LISTS if (folder / name).is_file()]
            if len(lists) > 1:
                raise ImageRLError(f"{self.path} has both {LISTS[0]} and {LISTS[1]}; keep one of them")
            found = _listed(lists[0], self.caption_field) if lists else _beside(_files(folder))
            self._entries = list(found)
        return list(self._entries)


def _files(folder: Path) -> dict[str, str]:
    """Map each path within the folder to its path, sorted, hidden files left out."""
    files = sorted(file for file in folder.rglob("*") if not file.name.startswith(".") and file.is_file())
    return {str(file.relative_to(folder)): str(file) for file in files}


def _beside(files: dict[str, str]) -> Iterable[Entry]:
    stems: dict[str, str] = {}
    for name in files:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in PICTURE_SUFFIXES:
            stems.setdefault(stem, name)
    for stem, name in stems.items():
        # A picture called x.ref.png is a sample of its own where there is no x.png.
        if stem.endswith(REFERENCE) and stem.removesuffix(REFERENCE) in stems:
            continue
        caption = files.get(f"{stem}.txt")
        reference = stems.get(stem + REFERENCE)
        yield Entry(
            key=files[name],
            picture=Blob(files[name]),
            caption=Blob(caption) if caption else None,
            reference=Blob(files[reference]) if reference else None,
        )


def _listed(file: Path, caption_field: str) -> Iterable[Entry]:
    for number, line in enumerate(read_bytes(file).splitlines(), 1):
        if not line.strip():
            continue
        key = f"{file} line {number}"
        try:
            row = parse_json(line.decode("utf-8-sig"), key)
        except (ValueError, ImageRLError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("reference", ""), str | None):
            yield Entry(key, problem="bad_caption")
            continue
        name, reference = row.get("file_name"), row.get("reference")
        if not isinstance(name, str) or not name:
            yield Entry(key, problem="missing_picture")
            continue
        caption: Any = row.get(caption_field)
        yield Entry(
            key=key,
            picture=Blob(str(file.parent / name)),
            caption=caption,
            reference=Blob(str(file.parent / reference)) if reference else None,
        )


def open_source(path: str, caption_field: str = "caption") -> list[Shard]:
    """Open the shards that a recipe's path means: a folder of pictures is one, tar files are one each. `path` is a
    folder (of pictures, or of .tar files), a .tar file, or a pattern such as `data/*.tar`.

    Raises:
        ImageRLError: nothing there, a compressed tar, or a folder that holds both kinds or neither.
    """
    place = Path(path).expanduser()
    if not place.exists():
        matches = sorted(glob.glob(str(place), recursive=True))
        if not matches:
            raise ImageRLError(f"data: there is nothing at {path}{_hint(place)}")
        return _tars(matches, path, caption_field)
    if place.is_file():
        return _tars([str(place)], path, caption_field)
    tars = sorted(str(file) for file in place.iterdir() if ".tar" in file.name)
    pictures = any((place / name).is_file() for name in LISTS) or any(
        file.suffix.lower() in PICTURE_SUFFIXES for file in place.rglob("*")
    )
    if tars and pictures:
        raise ImageRLError(
            f"data: {path} holds both tar shards and pictures; name {path}/*.tar or move one away"
        )
    if tars:
        return _tars(tars, path, caption_field)
    if not pictures:
        raise ImageRLError(
            f"data: {path} holds neither pictures ({', '.join(PICTURE_SUFFIXES)}) nor .tar shards; give the "
            "folder that does"
        )
    return [FolderShard(str(place), caption_field)]


def _tars(files: list[str], path: str, caption_field: str) -> list[Shard]:
    for file in files:
        if not os.path.isfile(file):
            raise ImageRLError(f"data: {file} is no regular file; name the .tar files alone")
        if not file.endswith(".tar"):
            what = "is compressed; unpack it to a plain .tar" if ".tar." in file else "is no .tar file"
            raise ImageRLError(f"data: {file} {what}" if file != path else f"data: {path} {what}")
    return [TarShard(file, caption_field) for file in files]


def _first(parts: dict[str, Blob], suffixes: Iterable[str]) -> Blob | None:
    return next((parts[suffix] for suffix in suffixes if suffix in parts), None)


def _hint(place: Path) -> str:
    names = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, 1)
    return f'; did you mean "{place.parent / near[0]}"?' if near else "; check data.train and data.heldout"
