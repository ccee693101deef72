"""Grids of pictures with captions, in whatever script these are written."""

from __future__ import annotations

import base64
import importlib.util
import io
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imagerl.rl.files.writing import write_atomic

CAPTION = 12  # of a picture's width is a caption's height: legible where a grid of four fills half a page
SMALLEST = 12  # pixels
HAN = "noto_cjk_sans_jp_regular"  # a package that is one font: Han, Kana, Hangul
INK = (70, 74, 82)
MAX_PICTURE = 400_000  # bytes; larger grids are embedded in pages as JPEG, 1400 px wide at most
# What may begin a line on its own: scripts that set no blanks between words.
_WORDS = re.compile(
    r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]|[^\s\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]+|\s+"
)
_logger = logging.getLogger(__name__)


def image_grid(
    images: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    captions: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Lay out pictures in rows of `columns`, with a caption under each; smaller ones stand in the middle of their cell.

    Args:
        images: N of [H, W, 3] uint8 RGB.
        captions: one per picture; three lines at most, the rest is cut with an ellipsis.
        scale: enlargement by whole pixels, so that single pixels stay visible.

    Raises:
        ValueError: no pictures, another dtype or shape, or not one caption per picture.
    """
    odd = next((i for i in images if i.ndim != 3 or i.shape[-1] != 3 or i.dtype != np.uint8), None)
    if odd is not None or not len(images):
        found = "none" if odd is None else f"{odd.dtype} {odd.shape}"
        raise ValueError(f"images must be N of [H, W, 3] uint8 with N >= 1, got {found}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    pictures = [image.repeat(scale, axis=0).repeat(scale, axis=1) for image in images]
    count, (height, width) = (
        len(pictures),
        np.max([picture.shape[:2] for picture in pictures], axis=0).tolist(),
    )
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    size = max(SMALLEST, width // CAPTION)
    margin, line_height = max(8, size // 2), round(1.3 * size)
    blocks = [_fit(caption, width, size) for caption in captions] if captions else [[] for _ in range(count)]
    caption_height = line_height * max(map(len, blocks)) + (size // 4 if captions else 0)
    canvas_size = margin + columns * (width + margin), margin + rows * (height + caption_height + margin)
    canvas = Image.new("RGB", canvas_size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, lines) in enumerate(zip(pictures, blocks, strict=True)):
        x = margin + i % columns * (width + margin)
        y = margin + i // columns * (height + caption_height + margin)
        inset = ((width - picture.shape[1]) // 2, (height - picture.shape[0]) // 2)
        canvas.paste(Image.fromarray(picture), (x + inset[0], y + inset[1]))
        for number, line in enumerate(lines):
            base = y + height + size // 4 + number * line_height + size
            place = float(x)
            for font, text in _runs(line, size):
                draw.text((place, base), text, fill=INK, font=font, anchor="ls")
                place += font.getlength(text)
    return canvas


def save_image(image: Image.Image, path: Path | str) -> Path:
    """Write a PNG atomically.

    Raises:
        ImageRLError: the disk is full or the folder cannot be written.
    """
    path, buffer = Path(path), io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
    return path


@lru_cache(maxsize=64)
def embedded_grid(path: Path, changed: int = 0) -> dict[str, object]:
    """Read a sample grid as `uri`, a data URI, with `step`, `width` and `height`; kept for a page that is written again
    and again, until the file has `changed`. Raises OSError for no picture."""
    data, kind = path.read_bytes(), "png"
    image = Image.open(io.BytesIO(data)).convert("RGB")
    size = image.size
    if len(data) > MAX_PICTURE:
        image.thumbnail((1400, 100_000))
        buffer, kind = io.BytesIO(), "jpeg"
        image.save(buffer, format="JPEG", quality=88)
        data = buffer.getvalue()
    step = int(re.sub(r"\D", "", path.stem) or 0)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"step": step, "uri": uri, "width": size[0], "height": size[1]}


def _runs(text: str, size: int) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """Cut a line into pieces that one font can draw."""
    for file, piece in groupby(text, _file_for):
        yield _font(file, size), "".join(piece)


@cache
def _file_for(character: str) -> Path:
    """Find a font that has the character: DejaVu, then that of HAN, then any of the machine's."""
    for files in (_ours, *([] if character.isascii() else [_of_the_machine])):
        for file in files():
            if ord(character) in _characters(file):
                return file
    sign = unicodedata.category(character).startswith("S")  # emoji
    _tell_missing("SYMBOLS" if sign else unicodedata.name(character, "UNNAMED").split()[0])
    return _ours()[0]


@cache
def _ours() -> list[Path]:
    """List DejaVu, which covers far more scripts than Pillow's own font, and the font of HAN."""
    files = {"matplotlib": "mpl-data/fonts/ttf/DejaVuSans.ttf", HAN: "NotoSansCJKjp-Regular.otf"}
    specs = {name: importlib.util.find_spec(name) for name in files}  # nothing is imported
    places = {n: Path(p) for n, spec in specs.items() if spec for p in spec.submodule_search_locations or []}
    return [place / files[name] for name, place in places.items()]


@cache
def _of_the_machine() -> list[Path]:
    from matplotlib.font_manager import findSystemFonts

    return sorted(map(Path, findSystemFonts()))


@cache
def _characters(file: Path) -> frozenset[int]:
    """Read which characters a font has; none of one that cannot be read."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(file, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    except (OSError, TTLibError):
        return frozenset()


@cache
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@cache
def _tell_missing(script: str) -> None:
    """Say once of a script (the first word of its characters' Unicode names) that it lacks a font here."""
    _logger.warning(
        "captions have characters (%s) that no font of this machine has; install one that has (a .ttf or .otf "
        "file in ~/.fonts will do)",
        script,
    )


def _fit(caption: str, width: int, size: int, max_lines: int = 3) -> list[str]:
    """Break a caption into lines of at most `width` pixels, the last one cut with an ellipsis."""

    def length(line: str) -> float:
        return sum(font.getlength(text) for font, text in _runs(line, size))

    lines = [""]
    for word in _WORDS.findall(" ".join(caption.split())):
        if lines[-1] and length(lines[-1] + word) > width:
            lines.append(word.lstrip())
        else:
            lines[-1] += word
    lines = [line.rstrip() for line in lines if line.strip()] or [""]
    cut = len(lines) > max_lines
    lines = lines[:max_lines]
    for i, line in enumerate(lines):
        mark = "…" if cut and i == max_lines - 1 else ""
        while line and length(line + mark) > width:
            line, mark = line[:-1].rstrip(), "…"
        lines[i] = line + mark
    return lines
