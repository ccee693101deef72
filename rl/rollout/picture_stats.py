"""Statistics of drawn pictures, a few numbers each, and of how much those of a group differ. Pure functions
of pixels and tokens, cheap enough for every training step.

They say nothing of quality. They show drift: a policy that games its reward nearly always moves one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from imagerl.rl.types import RolloutGroup

SIDE = 128  # pixels; of a larger picture every n-th pixel is looked at
THUMBNAIL = 16  # pixels, the longer side of what is compared within a group: layout and colour, no texture
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
BLANK = 0.02  # largest standard deviation of a channel, of 1, at which a picture shows nothing


def picture_stats(images: np.ndarray) -> dict[str, np.ndarray]:
    """Return statistics [B] of pictures [B, H, W, 3] uint8, each in [0, 1].

    `brightness` and `contrast` are mean and standard deviation of the luma; `saturation` is HSV's, (max − min) / max
    of a pixel, averaged; `clipped` the share of channel values at 0 or 255; `blank` 1 for a picture of one colour."""
    sampled = thinned(images)
    channels = np.moveaxis(sampled.reshape(len(images), -1, 3), -1, 0)  # [3, B, pixels]
    pixels = channels.astype(np.float32, order="C") / np.float32(255)
    grey = sum(np.float32(weight) * channel for weight, channel in zip(LUMA, pixels, strict=True))
    high, low = pixels.max(axis=0), pixels.min(axis=0)
    saturation = (high - low) / np.maximum(high, np.float32(1 / 255))
    return {
        "brightness": np.mean(grey, axis=1),
        "contrast": np.std(grey, axis=1),
        "saturation": saturation.mean(axis=1),
        "clipped": ((pixels == 0) | (pixels == 1)).mean(axis=(0, 2)),
        "blank": (pixels.std(axis=2).max(axis=0) < BLANK).astype(np.float64),
    }


def token_diversity(tokens: Tensor) -> float:
    """Return the share of positions at which two of the sequences [G, T] differ, mean over all pairs: 0 if all are
    equal."""
    size = len(tokens)
    differing = (tokens[:, None] != tokens[None, :]).double().mean()  # over G² pairs, G of them with itself
    return float(differing) * size / (size - 1)


def pixel_diversity(images: np.ndarray) -> float:
    """Return the root mean square difference, of 1, between two of the pictures [N, H, W, 3] uint8 as thumbnails.

    The mean square over all pairs is twice the unbiased variance, so that it costs N and not N² comparisons."""
    return float(np.sqrt(2 * thumbnails(images).var(axis=0, ddof=1).mean()))


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Shrink pictures to [B, h, w, 3] float32 in [0, 1]: means of square blocks; what is left over at the lower and
    right rim is cut."""
    sampled = thinned(images)
    batch, height, width, _ = sampled.shape
    block = min(-(-max(height, width) // THUMBNAIL), height, width)
    rows, columns = height // block, width // block
    blocks = sampled[:, : rows * block, : columns * block].reshape(batch, rows, block, columns, block, 3)
    means: np.ndarray = blocks.mean(axis=(2, 4), dtype=np.float32) / np.float32(255)
    return means


def thinned(images: np.ndarray) -> np.ndarray:
    """Take every n-th pixel of every n-th row, n such that no side is longer than SIDE."""
    step = max(1, -(-max(images.shape[1:3]) // SIDE))
    return images[:, ::step, ::step]


def group_stats(group: RolloutGroup) -> dict[str, float]:
    """Return means over a group's pictures, and its variety, under the keys of docs/run-folder.md."""
    means = {f"pictures/{name}": float(v.mean()) for name, v in picture_stats(group.images).items()}
    return means | {
        "diversity/tokens": token_diversity(group.tokens),
        "diversity/pixels": pixel_diversity(group.images),
    }


def mean_of_groups(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average over the groups of a step."""
    return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())}
