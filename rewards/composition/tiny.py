"""Find objects in drawn pictures, exactly: the word of the tiny world and its ground, and plain shapes on grey."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from imagerl.rewards.colours import estimate_background, estimate_ink, score_colours
from imagerl.rewards.composition.rule import Found

WORD, BACKGROUND = "word", "background"
# The inks and grounds of the tiny world; tests hold them to `rl.data.tiny.world`.
INKS = {
    "black": (0, 0, 0),
    "red": (200, 0, 0),
    "blue": (0, 0, 200),
    "green": (0, 110, 0),
    "purple": (110, 0, 140),
}
GROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 235, 120),
    "cyan": (170, 235, 255),
    "pink": (255, 200, 220),
}
SHAPE_COLOURS = {
    "red": (200, 0, 0),
    "yellow": (255, 235, 0),
    "green": (0, 110, 0),
    "blue": (0, 0, 200),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
GREY = (153, 153, 153)  # what shapes stand on
CONTRAST = 60.0  # distance in 8-bit sRGB from which a pixel is not the ground
LEAST = 12  # pixels of an object
SURE = 0.8  # intersection over union with a shape's own outline
SHAPES = ("square", "circle", "triangle", "cross")
OUTLINE = 96  # pixels a side, of which outlines of any size are made


def find_words(image: Image.Image, classes: Sequence[str]) -> dict[str, list[Found]]:
    """Find the words of a picture of one ink on one ground, told apart by gaps of half a letter, and the ground."""
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    ground = estimate_background(pixels)
    colour = next((name for name, rgb in GROUNDS.items() if score_colours(pixels, rgb, rgb)[1]), None)
    found = {BACKGROUND: [Found((0, 0, width, height), colour=colour)], WORD: []}
    ink = estimate_ink(pixels, ground)
    line = ink - ground
    if np.linalg.norm(line) >= CONTRAST:
        share = (pixels - ground) @ line / (line @ line)
        ink_name = next(
            (name for name, rgb in INKS.items() if score_colours(pixels, rgb, ground.tolist())[0]), None
        )
        inked = share > 0.5
        heights = [np.ptp(np.nonzero(letter)[0]) + 1 for letter in regions(inked)]
        gap = max(2, int(np.median(heights)) // 2) if heights else 2
        for top, bottom in _runs(inked.any(axis=1), 1):
            for left, right in _runs(inked[top:bottom].any(axis=0), gap):
                if inked[top:bottom, left:right].sum() >= LEAST:
                    found[WORD].append(Found((left, top, right, bottom), colour=ink_name))
    return {name: found.get(name, []) for name in classes}


def find_shapes(image: Image.Image, classes: Sequence[str]) -> dict[str, list[Found]]:
    """Find shapes of one colour each on GREY that do not touch, by each connected region's colour and outline."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    names = [*SHAPE_COLOURS]
    palette = np.array([*SHAPE_COLOURS.values(), GREY], dtype=np.float64)
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(axis=-1)
    off = np.linalg.norm(pixels - np.array(GREY), axis=-1) >= CONTRAST
    found: dict[str, list[Found]] = {name: [] for name in classes}
    for region in regions(off):
        inside = nearest[region]
        colour = int(np.bincount(inside[inside < len(names)], minlength=len(names)).argmax())
        line = palette[colour] - palette[-1]
        # The share of each pixel that the shape covers: at a dozen pixels a side the rim is half of it.
        cover = region * np.clip((pixels - palette[-1]) @ line / (line @ line), 0, 1)
        rows, columns = np.nonzero(cover >= 0.5)
        if not rows.size:
            continue
        box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
        shape = _shape_of(cover[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
        if shape in found:
            found[shape].append(Found(box, colour=names[colour]))
    return found


def regions(inside: np.ndarray) -> list[np.ndarray]:
    """Return the connected parts (by edges) of [H, W] bool of at least LEAST pixels, each [H, W] bool."""
    from scipy.ndimage import label

    labels, count = label(inside)
    parts = [labels == number for number in range(1, count + 1)]
    return [part for part in parts if part.sum() >= LEAST]


def outlines() -> dict[str, np.ndarray]:
    """Return the part of its box that a shape fills, [OUTLINE, OUTLINE] bool."""
    y, x = (np.mgrid[0:OUTLINE, 0:OUTLINE] + 0.5) / OUTLINE
    return {
        "square": np.ones_like(x, dtype=bool),
        "circle": (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25,
        "triangle": np.abs(x - 0.5) <= y / 2,
        "cross": (np.abs(x - 0.5) <= 1 / 6) | (np.abs(y - 0.5) <= 1 / 6),
    }


_OUTLINES = outlines()


def _shape_of(cover: np.ndarray) -> str | None:
    """Return the shape whose outline covers a box's contents [H, W] in [0, 1] best, or None."""
    size = (cover.shape[1], cover.shape[0])
    overlaps = {}
    for name, outline in _OUTLINES.items():
        ideal = np.asarray(Image.fromarray(outline.astype(np.float32)).resize(size, Image.Resampling.BOX))
        overlaps[name] = np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum()
    best = max(overlaps, key=lambda name: overlaps[name])
    return best if overlaps[best] >= SURE else None


def _runs(filled: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """Return stretches [start, end) of a line of bool; those less than `gap` apart are one."""
    places = np.flatnonzero(filled)
    if not places.size:
        return []
    breaks = np.flatnonzero(np.diff(places) > gap)
    starts = [places[0], *places[breaks + 1]]
    ends = [*places[breaks], places[-1]]
    return [(int(start), int(end) + 1) for start, end in zip(starts, ends, strict=True)]


class TinyDetector:
    """`tiny_world` or `shapes`, as a detector."""

    def __init__(self, world: str) -> None:
        self._find = find_words if world == "tiny_world" else find_shapes

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]
    ) -> list[dict[str, list[Found]]]:
        return [self._find(image, names) for image, names in zip(images, classes, strict=True)]
