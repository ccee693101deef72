"""One picture and its caption from files that nobody has checked: RGB of the wanted size, or a reason to skip it.

Pictures become 8-bit RGB whatever they were: grey, palette, 16 bit, CMYK; transparency is laid on white.
"""

from __future__ import annotations

import io
import math
import os
import stat
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.reading import open_undecoded, parse_json, to_rgb

REASONS = (
    "missing_picture",
    "missing_caption",
    "missing_reference",
    "bad_caption",  # not UTF-8, damaged JSON, no string
    "empty_caption",
    "long_caption",
    "unreadable",  # the file, or the whole shard; no regular file
    "corrupt",
    "truncated",
    "too_large",
    "too_small",
    "elongated",
)
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_FILE_BYTES = 1 << 28


class BadSample(Exception):
    """A sample that cannot be trained on. `reason` is one of REASONS, `detail` what more there is to say of it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits within which a picture and a caption are usable."""

    max_pixels: int  # width · height
    min_side: int
    max_aspect: float  # long side over short side
    max_caption_chars: int


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes on disk: a whole file, or a member of a tar."""

    path: str
    offset: int = 0
    size: int | None = None  # None: the whole file

    def read(self) -> bytes:
        """Read the bytes. Raises OSError, and BadSample when they are too few, or absurdly many."""
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("unreadable")  # a pipe would be waited for
        size = status.st_size if self.size is None else self.size
        if size > MAX_FILE_BYTES:
            raise BadSample("too_large")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(size)
        if len(data) < size:
            raise BadSample("truncated")
        return data


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample as a source lists it, nothing read yet. `problem`: a reason that showed while listing."""

    key: str  # for messages: the file, or the shard and the name in it
    picture: Blob | None = None
    caption: str | Blob | None = None  # a Blob ending in `.json` has it in a field
    reference: Blob | None = None
    caption_field: str | None = None  # of a JSON caption
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One sample to train on."""

    key: str
    picture: np.ndarray  # [H, W, 3] uint8
    caption: str
    reference: np.ndarray | None  # [H, W, 3] uint8, of an edit


def load_example(entry: Entry, size: tuple[int, int], limits: Limits) -> Example:
    """Read, decode and fit one sample to `size` (height, width).

    Raises:
        BadSample: for one of REASONS.
    """
    if entry.problem is not None:
        raise BadSample(entry.problem)
    caption = _caption(entry, limits)
    if entry.picture is None:
        raise BadSample("missing_picture")
    picture = _picture(entry.picture, "missing_picture", size, limits)
    reference = None
    if entry.reference is not None:
        reference = _picture(entry.reference, "missing_reference", size, limits)
    return Example(entry.key, picture, caption, reference)


def _caption(entry: Entry, limits: Limits) -> str:
    caption: object = entry.caption
    if isinstance(caption, Blob):
        try:
            text = _read(caption, "missing_caption").decode("utf-8-sig")
            caption = text if entry.caption_field is None else parse_json(text, entry.key)
            if entry.caption_field is not None:
                if not isinstance(caption, dict):
                    raise BadSample("bad_caption")
                caption = caption.get(entry.caption_field)
        except (ValueError, ImageRLError):  # not UTF-8, or no JSON
            raise BadSample("bad_caption") from None
    if caption is None:
        raise BadSample("missing_caption")
    if not isinstance(caption, str):
        raise BadSample("bad_caption")
    if not caption.strip():
        raise BadSample("empty_caption")
    if len(caption) > limits.max_caption_chars:
        raise BadSample("long_caption")
    return caption.strip()


def _picture(blob: Blob, missing: str, size: tuple[int, int], limits: Limits) -> np.ndarray:
    data = _read(blob, missing)
    try:
        with open_undecoded(io.BytesIO(data), math.inf) as image:
            # By the header, before a single pixel is decoded: a few bytes may unpack to gigabytes.
            check_size(image.size, limits)
            return np.asarray(fit(to_rgb(image), size))
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample("too_large") from None
    except Exception as error:  # a decoder on unchecked bytes raises anything
        raise BadSample("truncated" if "truncat" in str(error).lower() else "corrupt") from None


def _read(blob: Blob, missing: str) -> bytes:
    try:
        return blob.read()
    except FileNotFoundError:
        raise BadSample(missing) from None
    except OSError:
        raise BadSample("unreadable") from None


def check_size(size: tuple[int, int], limits: Limits) -> None:
    """Raise BadSample for a (width, height) outside the limits."""
    short, long = sorted(size)
    if short * long > limits.max_pixels:
        raise BadSample("too_large")
    if short < max(1, limits.min_side):
        raise BadSample("too_small")
    if long > limits.max_aspect * short:
        raise BadSample("elongated")


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to cover (height, width) and cut to the centre, as the published trainer does; a picture of that
    size already is left as it is."""
    height, width = size
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
