"""Pictures as PNG files, for rewards that live in another process."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def to_png(picture: Any) -> bytes | None:
    """A PIL picture as a PNG file, lossless; modes that PNG has not become RGB. None for what is no picture."""
    if not isinstance(picture, Image.Image):
        return None
    if picture.mode not in PNG_MODES:
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # a few times faster than the default, a few per cent larger
    return file.getvalue()


def open_png(data: bytes) -> Image.Image:
    """A picture with all its pixels read. Raises what Pillow raises for a broken file."""
    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    picture.load()
    return picture.copy()  # plain, without the file behind it
