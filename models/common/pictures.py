"""Pictures that users give, brought to the size and range a model wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagerl.rl.files.reading import read_picture


def covering_size(picture: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (width, height) of the picture's aspect that covers the wanted one."""
    (width, height), (to_width, to_height) = picture, wanted
    if width * to_height >= height * to_width:
        return int(to_height * width / height), to_height
    return to_width, int(to_width * height / width)


def crop_note(picture: Image.Image, size: tuple[int, int]) -> str | None:
    """Say what `prepare_picture` will cut off at a size (H, W), or return None when the aspect fits."""
    wanted = (size[1], size[0])
    covering = covering_size(picture.size, wanted)
    if covering == wanted:
        return None
    was, now = (f"{width}x{height}" for width, height in (picture.size, wanted))
    return f"the picture is {was} pixels; it was resized and its middle {now} kept"


def fitted(
    source: Image.Image | Path | str,
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Bring any picture to `size` (H, W) pixels.

    The shorter side is resized to fit, the middle of the longer one kept, as the published code does for its
    autoencoder (bilinear there, bicubic for the tokenizer). For the tokenizer it squeezes the whole picture instead:
    we show both the same part, so tokens of pictures that are not square differ from the published ones.

    Raises ImageRLError as `read_picture` does."""
    picture, wanted = read_picture(source), (size[1], size[0])
    covering = covering_size(picture.size, wanted)
    picture = picture.resize(covering, resample)
    left, top = (round((have - keep) / 2) for have, keep in zip(covering, wanted, strict=True))
    return picture.crop((left, top, left + wanted[0], top + wanted[1]))


def prepare_picture(
    source: Image.Image | Path | str,
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """Turn any picture, `fitted`, into [3, H, W] float32 in [-1, 1]. Raises the same."""
    picture = np.array(fitted(source, size, resample))
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
