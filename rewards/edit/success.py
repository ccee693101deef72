"""Score whether a picture was edited as told and the rest left alone, for edits whose perfect result is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from imagerl.rewards.colours import score_colours
from imagerl.rewards.edit.similarity import ssim
from imagerl.rewards.ocr.reward import OCRReward, exact_match, score_text
from imagerl.rl.files.bounds import Count, Threads
from imagerl.rl.types import RewardOutput

PARTS = ("text", "ink", "background")


class EditReward:
    """`score_text` of what PaddleOCR reads, or 0 where ink or background are not as the edited picture must have
    them.

    Beside it: `success` (the text exact and both colours right), `exact_match`, `ink` and `background`;
    `success_text`, `success_ink` and `success_background` for edits of that part alone; `kept_error` (mean
    absolute, in 0..1) and `kept_similarity` (SSIM) against the ideal over the pixels in which reference and ideal
    agree, None where there are none.

    Wants the columns of `rl.data.tiny.edits`: `target`, `ink_rgb`, `background_rgb`, `edited`, `reference`, `ideal`.
    Settings are those of `OCRReward`."""

    __name__ = "edit"

    def __init__(
        self,
        mode: Literal["full", "recognise"] = "full",
        min_confidence: float = 0.5,
        models: Literal["auto", "offline", "download"] = "auto",
        threads: Threads = 1,
        recognition_width: Count = 160,
    ) -> None:
        self.reader = OCRReward(mode, min_confidence, models, threads, recognition_width)

    def __call__(
        self,
        *,
        images: Sequence[Image.Image],
        target: Sequence[str],
        ink_rgb: Sequence[Sequence[float]],
        background_rgb: Sequence[Sequence[float]],
        edited: Sequence[str],
        reference: Sequence[Image.Image],
        ideal: Sequence[Image.Image],
        **_: object,
    ) -> RewardOutput:
        names = ("success", "exact_match", "ink", "background", "kept_error", "kept_similarity")
        parts: dict[str, list[float | None]] = {name: [] for name in names}
        parts |= {f"success_{part}": [] for part in PARTS}
        rewards: list[float | None] = []
        for index, (image, read) in enumerate(zip(images, self.reader.read(images), strict=True)):
            pixels = np.asarray(image.convert("RGB"))
            ink, background = score_colours(pixels, ink_rgb[index], background_rgb[index])
            exact = exact_match(read, target[index])
            success = exact * ink * background
            error, likeness = kept_fidelity(pixels, reference[index], ideal[index])
            rewards.append(score_text(read, target[index]) * ink * background)
            for name, value in zip(names, (success, exact, ink, background, error, likeness), strict=True):
                parts[name].append(value)
            for part in PARTS:
                parts[f"success_{part}"].append(success if part == edited[index] else None)
        return RewardOutput(rewards, parts)


def kept_fidelity(
    pixels: np.ndarray, reference: Image.Image, ideal: Image.Image
) -> tuple[float | None, float | None]:
    """Return mean absolute error and mean SSIM of a picture [H, W, 3] uint8 against the ideal where that
    equals the reference; None where no pixel does, or too few for SSIM."""
    wanted = np.asarray(ideal.convert("RGB"))
    kept = (np.asarray(reference.convert("RGB")) == wanted).all(-1)
    if not kept.any():
        return None, None
    got, best = pixels / 255.0, wanted / 255.0
    likeness = ssim(got, best, kept.astype(np.float64))
    return float(np.abs(got - best)[kept].mean()), None if np.isnan(likeness) else likeness
