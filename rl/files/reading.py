"""Files that users give, read within bounds: text, JSON and pictures. Imports nothing of ours but `rl.errors`.

Whatever comes from outside passes through here once. Only regular files are opened, so that no pipe is waited for; no
more is read than a limit; numbers are finite, nesting is bounded, text can be written again as UTF-8; and the size of
a picture is judged by its header, before a pixel is decoded."""

from __future__ import annotations

import difflib
import io
import json
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from imagerl.rl.errors import ImageRLError, one_line

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

MAX_BYTES = 1 << 28  # of a text or a picture file
MAX_PIXELS = 1 << 26  # of a picture
MAX_DEPTH = 32  # of lists and mappings in one another
MAX_VALUES = 10_000_000  # in one document
MAX_INTEGER = 1 << 63  # what other languages and array libraries still hold
# Pillow's raster formats that decode within this process: its EPS reader, for one, runs another program.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")


# ---- bytes and text ----------------------------------------------------------------------------------------


def _at_once(path: str, flags: int) -> int:
    """Open a pipe that nobody writes to as well, which would otherwise wait for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def open_regular(path: str | Path, most: int = MAX_BYTES) -> Iterator[BinaryIO]:
    """Open a file to read. Raises ImageRLError when it is missing, no regular file, or of more than `most` bytes."""
    try:
        file = open(path, "rb", opener=_at_once)  # noqa: SIM115  closed below
    except FileNotFoundError:
        raise ImageRLError(f'no file "{path}"{_similar_name(Path(path))}') from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        why = getattr(error, "strerror", None) or error
        raise ImageRLError(f'cannot read "{path}": {why}') from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageRLError(f'"{path}" is a pipe, a socket or a device; save its content as a file')
        if status.st_size > most:
            raise ImageRLError(f'"{path}" has {status.st_size} bytes; at most {most} are read')
        yield file


def read_bytes(path: str | Path, most: int = MAX_BYTES) -> bytes:
    """Read a whole file. Raises ImageRLError like `open_regular`."""
    with open_regular(path, most) as file:
        try:
            return file.read(most)
        except OSError as error:
            raise ImageRLError(f'cannot read "{path}": {error.strerror or error}') from None


def read_text(path: str | Path, most: int = MAX_BYTES) -> str:
    """Read a text file, line ends as "\\n". Raises ImageRLError like `open_regular`, and when it is not UTF-8."""
    try:
        text = read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImageRLError(f'"{path}" is not UTF-8 text (byte {error.start}); save it as UTF-8') from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_regular(path: str | Path) -> bool:
    """Tell whether there is such a file. False for every name that the system refuses, such as one of 5,000 letters."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _similar_name(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, [beside.name for beside in path.parent.iterdir()], 1)
    except OSError:
        return ""
    return f'; did you mean "{path.parent / near[0]}"?' if near else ""


# ---- plain data --------------------------------------------------------------------------------------------


def parse_json(text: str, place: str) -> Any:
    """Parse one JSON document as plain data. Raises ImageRLError, beginning with `place`, for what is no JSON, names a
    key twice, or does not pass `require_plain`."""
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}" if "\n" in text else f"column {error.colno}"
        raise ImageRLError(f"{place}: not JSON ({error.msg}, {where})") from None
    except ValueError as error:  # a key twice, or a number of thousands of digits
        raise ImageRLError(f"{place}: not JSON ({one_line(error).partition(';')[0]})") from None
    except RecursionError:
        raise ImageRLError(f"{place}: lists and mappings are nested more than {MAX_DEPTH} deep") from None
    return require_plain(value, place)


def read_json(path: str | Path, most: int = MAX_BYTES) -> Any:
    """Read the JSON document in a file. Raises ImageRLError like `read_text` and `parse_json`."""
    return parse_json(read_text(path, most), str(path))


def require_plain(value: T, place: str) -> T:
    """Return the value itself, of any format that is parsed into lists, mappings and scalars.

    Raises ImageRLError, beginning with `place`: nested too deeply (or in itself), too many values, a number that is
    not finite or beyond 64 bits, text that is no Unicode, or a value that JSON does not have, such as a date."""
    pending: list[tuple[object, int]] = [(value, 0)]
    count = 0
    while pending:
        part, depth = pending.pop()
        count += 1
        if isinstance(part, str):
            if not part.isascii() and any("\ud800" <= letter <= "\udfff" for letter in part):
                raise ImageRLError(f"{place}: a text holds half of a surrogate pair, which is no character")
        elif isinstance(part, bool) or part is None:
            pass
        elif isinstance(part, int):
            if abs(part) >= MAX_INTEGER:
                raise ImageRLError(f"{place}: a whole number has more than 64 bits")
        elif isinstance(part, float):
            if not math.isfinite(part):
                raise ImageRLError(f"{place}: a number is not finite; write null where there is none")
        elif isinstance(part, dict | list):
            if depth >= MAX_DEPTH:
                raise ImageRLError(f"{place}: lists and mappings are nested more than {MAX_DEPTH} deep")
            inside = [*part, *part.values()] if isinstance(part, dict) else part
            pending += ((one, depth + 1) for one in inside)
        else:
            raise ImageRLError(
                f"{place}: {str(part)[:40]!r} is a {type(part).__name__}; write it as text, in quotes"
            )
        if count + len(pending) > MAX_VALUES:
            raise ImageRLError(f"{place}: holds more than {MAX_VALUES} values")
    return value


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return mapping


# ---- pictures ----------------------------------------------------------------------------------------------


def open_undecoded(file: BinaryIO, max_pixels: float | None = None) -> Image.Image:
    """Open a picture, reading only its header. Raises what Pillow raises, and ValueError for one of more than
    `max_pixels` (None: MAX_PIXELS) or of another format than PICTURE_FORMATS."""
    from PIL import Image, UnidentifiedImageError

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # sizes are judged here
    try:
        picture = Image.open(file, formats=PICTURE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(PICTURE_FORMATS)}") from None
    most = MAX_PIXELS if max_pixels is None else max_pixels
    if picture.width * picture.height > most:
        raise ValueError(f"it has {picture.width}x{picture.height} pixels; at most {most} are decoded")
    return picture


def check_picture(path: Path, place: str = "") -> None:
    """Check that a file begins as a picture that is not too large; nothing is decoded. Raises ImageRLError, beginning
    with `place`."""
    with as_picture(path, place), open_regular(path) as file:
        open_undecoded(file)


def read_picture(source: Image.Image | Path | str | bytes, place: str = "") -> Image.Image:
    """Read a picture, or the one in a file or its bytes, as upright 8-bit RGB.

    Raises ImageRLError, beginning with `place`, when the file is missing, damaged, no picture, of more than MAX_PIXELS,
    or of a mode without a known range."""
    if isinstance(source, bytes):
        with as_picture("the picture", place):
            return to_rgb(open_undecoded(io.BytesIO(source)))
    if not isinstance(source, Path | str):
        with as_picture("the picture", place):
            return to_rgb(source)
    with as_picture(source, place):
        return to_rgb(open_undecoded(io.BytesIO(read_bytes(source))))


@contextmanager
def as_picture(name: object, place: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into one line about the picture of that name."""
    before = f"{place}: " if place else ""
    try:
        yield
    except ImageRLError as error:
        raise ImageRLError(f"{before}{error}") from error
    except Exception as error:  # a decoder on unchecked bytes raises anything
        why = one_line(error)[:200] or type(error).__name__
        raise ImageRLError(
            f"{before}{name} cannot be read as a picture ({why}); save it again as PNG or JPEG"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn into 8-bit RGB, upright: EXIF turns applied, 16-bit greys scaled (Pillow would clip them), transparency laid
    on white; the first frame. Raises what Pillow raises, and ValueError for floats, whose range nobody agrees on."""
    import numpy as np
    from PIL import Image, ImageOps

    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ValueError("32-bit float pixels have no fixed range")
    if upright.mode.startswith("I"):
        grey = np.asarray(upright).astype(np.float64)
        upright = Image.fromarray((grey.clip(0, 65535) / 257).round().astype(np.uint8))  # 65535 -> 255
    if upright.has_transparency_data:
        coloured = upright.convert("RGBA")
        ground = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(ground, coloured).convert("RGB")
    return upright.convert("RGB")
