"""Pictures that a prompt file names: paths in some columns, whose headers are judged when the file is read, and whose
pixels are decoded when a prompt is drawn, so that a set of any size fits in memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.reading import as_picture, check_picture, is_regular, open_undecoded
from imagerl.rl.types import Prompt

PICTURE_COLUMNS = ("reference", "mask", "ideal")  # the picture to edit, where it may change, a perfect result


def picture_paths(columns: Mapping[str, object], folder: Path, place: str) -> dict[str, object]:
    """Return a row's columns with paths for the names of pictures, which are relative to the prompt file's folder.

    Raises ImageRLError, beginning with `place`, when one is no name of a file that is there, or the file is no picture
    or too large a one."""
    found = dict(columns)
    for name in PICTURE_COLUMNS:
        if (given := found.get(name)) in (None, ""):  # a CSV file has no other way to say that there is none
            found |= {name: None} if name in found else {}
            continue
        if isinstance(given, bytes):
            with as_picture(f'"{name}"', place):
                open_undecoded(io.BytesIO(given))
            continue
        if not isinstance(given, str) or not is_regular(folder / given):
            raise ImageRLError(
                f'{place}: "{name}" should be the path of a picture, and there is none at {given!r:.200}'
            )
        found[name] = folder / given
        check_picture(folder / given, place)
    return found


def identity(prompt: Prompt) -> str:
    """Return what makes two prompts the same: the text, and for an edit the picture too."""
    picture = prompt.columns.get("reference")
    if isinstance(picture, Image.Image):
        return f"{prompt.text} (of picture {picture_hash(prompt)[:12]})"
    return f"{prompt.text} (of {picture})" if isinstance(picture, Path) else prompt.text


def picture_hash(prompt: Prompt) -> str:
    """Return the SHA-256 of the picture to edit, of its file's bytes whatever that is called; "" without one."""
    picture = prompt.columns.get("reference")
    if isinstance(picture, Image.Image):
        return hashlib.sha256(picture.tobytes()).hexdigest()
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else ""
