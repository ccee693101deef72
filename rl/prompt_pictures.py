"""Pictures that a prompt file names: paths in some columns, opened when a prompt is drawn, so that a set of any size
fits in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from rl.errors import ImageRLError
from rl.image_files import BadSample, to_rgb
from rl.types import Prompt

PICTURE_COLUMNS = ("reference", "mask", "ideal")  # the picture to edit, where it may change, a perfect result


def picture_paths(columns: Mapping[str, Any], folder: Path, place: str) -> dict[str, Any]:
    """Columns of a row with paths for the names of pictures, which are relative to the prompt file's folder.

    Raises ImageRLError, beginning with `place`, when one is no name of a file that is there."""
    found = dict(columns)
    for name in PICTURE_COLUMNS:
        if (given := found.get(name)) is None:
            continue
        if not isinstance(given, str) or not (folder / given).is_file():
            raise ImageRLError(
                f'{place}: "{name}" should be the path of a picture, and there is none at {given!r}'
            )
        found[name] = folder / given
    return found


def with_pictures(prompt: Prompt) -> Prompt:
    """The prompt with its pictures opened, RGB.

    Raises ImageRLError when a file is no picture that Pillow reads."""
    paths = {name: value for name, value in prompt.columns.items() if isinstance(value, Path)}
    if not paths:
        return prompt
    return replace(
        prompt, columns={**prompt.columns, **{name: open_picture(path, name) for name, path in paths.items()}}
    )


def identity(prompt: Prompt) -> str:
    """What makes a prompt the same as another one: its text, and for an edit the picture too."""
    picture = prompt.columns.get("reference")
    if isinstance(picture, Image.Image):
        return f"{prompt.text} (of picture {picture_hash(prompt)[:12]})"
    return f"{prompt.text} (of {picture})" if isinstance(picture, Path) else prompt.text


def picture_hash(prompt: Prompt) -> str:
    """SHA-256 of the picture to edit, of its file's bytes whatever that is called; "" without one."""
    picture = prompt.columns.get("reference")
    if isinstance(picture, Image.Image):
        return hashlib.sha256(picture.tobytes()).hexdigest()
    return hashlib.sha256(picture.read_bytes()).hexdigest() if isinstance(picture, Path) else ""


def open_picture(path: Path, place: str) -> Image.Image:
    """A picture file as upright RGB. `place` begins the message of the ImageRLError for one that cannot be read."""
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except FileNotFoundError:
        raise ImageRLError(f"{place}: there is no picture {path}") from None
    except (OSError, ValueError, SyntaxError, BadSample, Image.DecompressionBombError) as error:
        why = " ".join(str(error).split())[:200]
        raise ImageRLError(
            f"{place}: {path} cannot be read as a picture ({why}); save it again as PNG or JPEG"
        ) from error
