"""Tell whether ink and background have the colours asked for. A gold metric: measured, not trained on.

Works for one ink on one ground, as in the tiny world. Distances are Euclidean in 8-bit sRGB, because that is
where renderers and decoders blend letters into the ground."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from imagerl.rl.types import ImageRLError, RewardOutput

FRAME = 2  # pixels; the rim taken for background
BACKGROUND_TOLERANCE = 32.0  # half the distance between white and pink, the closest grounds of the tiny world
INK_SHARE = 0.03  # share of pixels, those farthest from the ground, taken for ink: the cores of the strokes
INK_TOLERANCE = 50.0  # half the distance between the closest inks, measured across the line to the ground
INK_STRENGTH = (0.5, 1.4)  # how far along that line the ink may lie; thin blurred strokes never reach 1


def estimate_background(image: np.ndarray) -> np.ndarray:
    """Return the median colour [3] float64 of the rim of a picture [H, W, 3]."""
    inner = np.zeros(image.shape[:2], dtype=bool)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    return np.median(image[~inner].astype(np.float64), axis=0)


def estimate_ink(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Return the median colour [3] float64 of the pixels of [H, W, 3] farthest from the ground [3]."""
    pixels = image.reshape(-1, 3).astype(np.float64)
    distances = np.linalg.norm(pixels - background, axis=1)
    count = max(1, int(INK_SHARE * len(pixels)))
    return np.median(pixels[np.argsort(distances, kind="stable")[-count:]], axis=0)


def score_colours(
    image: np.ndarray, ink_rgb: Sequence[float], background_rgb: Sequence[float]
) -> tuple[float, float]:
    """Return (ink right, background right), each 0.0 or 1.0, of a picture [H, W, 3] uint8.

    The ground is right within BACKGROUND_TOLERANCE. A stroke's pixels are mixtures ground + a·(ink − ground),
    so the ink is right when its estimate lies near the line from the *measured* ground to the wanted ink, far
    enough along it: a blurred letter keeps its colour, a faint or missing one has none."""
    ground = estimate_background(image)
    ink = estimate_ink(image, ground)
    background_right = (
        np.linalg.norm(ground - np.asarray(background_rgb, dtype=np.float64)) <= BACKGROUND_TOLERANCE
    )
    line = np.asarray(ink_rgb, dtype=np.float64) - ground
    strength = float((ink - ground) @ line) / max(float(line @ line), 1.0)
    residual = float(np.linalg.norm(ink - ground - strength * line))
    contrast = float(np.linalg.norm(line)) > INK_TOLERANCE  # else any ink would lie near the line
    ink_right = contrast and INK_STRENGTH[0] <= strength <= INK_STRENGTH[1] and residual <= INK_TOLERANCE
    return float(ink_right), float(background_right)


def nearness(image: np.ndarray, ink_rgb: Sequence[float], background_rgb: Sequence[float]) -> float:
    """Return how near ink and ground of a picture [H, W, 3] uint8 come to the colours wanted, the product of both: each
    1 − distance / (distance between the two wanted colours), and at least 0."""
    ground = estimate_background(image)
    found = np.stack([estimate_ink(image, ground), ground])
    wanted = np.array([ink_rgb, background_rgb], dtype=np.float64)
    apart = max(float(np.linalg.norm(wanted[0] - wanted[1])), 1.0)
    return float(np.prod(np.clip(1 - np.linalg.norm(found - wanted, axis=1) / apart, 0, 1)))


class ColoursReward:
    """1 when ink and background are both right, or with `graded` their `nearness`; `ink` and `background`, each right
    or not, beside it.

    Wants the columns `ink_rgb` and `background_rgb`, [r, g, b] each; None there means not applicable."""

    __name__ = "colours"

    def __init__(self, graded: bool = False) -> None:
        self.graded = graded

    def __call__(
        self,
        *,
        images: Sequence[Image.Image],
        ink_rgb: Sequence[Sequence[float] | None] | None = None,
        background_rgb: Sequence[Sequence[float] | None] | None = None,
        **_: object,
    ) -> RewardOutput:
        if ink_rgb is None or background_rgb is None:
            raise ImageRLError(
                "reward 'colours' needs the columns ink_rgb and background_rgb in the prompt set"
            )
        both: list[float | None] = []
        inks: list[float | None] = []
        grounds: list[float | None] = []
        for image, ink, ground in zip(images, ink_rgb, background_rgb, strict=True):
            if ink is None or ground is None:
                values: tuple[float | None, ...] = (None, None, None)
            else:
                pixels = np.asarray(image.convert("RGB"))
                right = score_colours(pixels, ink, ground)
                values = (nearness(pixels, ink, ground) if self.graded else right[0] * right[1], *right)
            for column, value in zip((both, inks, grounds), values, strict=True):
                column.append(value)
        return RewardOutput(both, {"ink": inks, "background": grounds})
