"""Pictures that users give: any file and mode Pillow reads, brought to the size and range a model wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rl.types import ImageRLError

GRAY_16 = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def read_picture(source: Image.Image | Path | str) -> Image.Image:
    """An upright RGB picture. Transparency is laid on white; 16-bit gray is scaled, not clipped.

    Raises ImageRLError when the file is missing, damaged, no picture, or of a mode without a known range."""
    name = "the picture" if isinstance(source, Image.Image) else str(source)
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        picture.load()
        return _to_rgb(ImageOps.exif_transpose(picture))
    except FileNotFoundError as error:
        raise ImageRLError(f"there is no picture {name}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = " ".join(str(error).split())[:200]
        raise ImageRLError(
            f"{name} cannot be read as a picture ({why}); save it again as PNG or JPEG"
        ) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("32-bit float pixels have no fixed range")
    if picture.mode in GRAY_16:
        values = np.asarray(picture).astype(np.float32) / 257  # 65535 -> 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def covering_size(picture: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) of the picture's aspect that covers the wanted one."""
    (width, height), (to_width, to_height) = picture, wanted
    if width * to_height >= height * to_width:
        return int(to_height * width / height), to_height
    return to_width, int(to_width * height / width)


def crop_note(picture: Image.Image, size: tuple[int, int]) -> str | None:
    """What `prepare_picture` will cut off at a size (H, W), in words, or None when the aspect fits."""
    wanted = (size[1], size[0])
    covering = covering_size(picture.size, wanted)
    if covering == wanted:
        return None
    was, now = (f"{width}x{height}" for width, height in (picture.size, wanted))
    return f"the picture is {was} pixels; it was resized and its middle {now} kept"


def prepare_picture(
    source: Image.Image | Path | str,
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """Any picture -> [3, H, W] float32 in [-1, 1] of `size` (H, W) pixels.

    The shorter side is resized to fit, the middle of the longer one kept, as the published code does for its
    autoencoder (bilinear there, bicubic for the tokenizer). For the tokenizer it squeezes the whole picture instead:
    we show both the same part, so tokens of pictures that are not square differ from the published ones.

    Raises ImageRLError as `read_picture` does."""
    picture, wanted = read_picture(source), (size[1], size[0])
    covering = covering_size(picture.size, wanted)
    picture = picture.resize(covering, resample)
    left, top = (round((have - keep) / 2) for have, keep in zip(covering, wanted, strict=True))
    picture = picture.crop((left, top, left + wanted[0], top + wanted[1]))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
