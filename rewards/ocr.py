"""Text accuracy: does the picture say what the prompt asked for?

The score is that of BLIP3o-NEXT (arXiv 2510.15857) and Flow-GRPO (arXiv 2505.05470), read by PaddleOCR."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image
from rapidfuzz.distance import Levenshtein

from rewards.ocr_engine import Line, OCREngine
from rl.types import ImageRLError, RewardOutput

# A single quote opens only where no word ends and closes only where none goes on: apostrophes are no quotes.
# A double quote after a digit is an inch mark.
_QUOTED = re.compile(
    r"“(?P<curly>[^”]*)”"
    r'|(?<!\d)"(?P<double>[^"]*)"'
    r"|(?<!\w)‘(?P<curly_single>.+?)’(?!\w)"
    r"|(?<!\w)'(?P<single>.+?)'(?!\w)",
    re.DOTALL,
)


def normalise(text: str) -> str:
    """Lower case, without white space."""
    return "".join(text.split()).lower()


def quoted_text(prompt: str) -> str | None:
    """The first quoted text of a prompt, or None."""
    for match in _QUOTED.finditer(prompt):
        text = match.group(match.lastgroup or 0)
        if text.strip():
            return text
    return None


def score_text(read: str, target: str) -> float:
    """1 − d / len(target) in [0, 1], on normalised texts.

    d is 0 when the target is part of what was read, else the Levenshtein distance capped at len(target).
    Raises ValueError for a blank target."""
    wanted, got = normalise(target), normalise(read)
    if not wanted:
        raise ValueError("the target text is blank")
    distance = 0 if wanted in got else min(Levenshtein.distance(got, wanted), len(wanted))
    return 1.0 - distance / len(wanted)


def exact_match(read: str, target: str) -> float:
    """1.0 when the texts are equal but for case and white space, else 0.0: stricter than a perfect
    `score_text`, which forgives whatever stands around the target."""
    return float(normalise(read) == normalise(target))


def join_lines(lines: Sequence[Line], min_confidence: float) -> str:
    """The text of the lines that the engine is sure enough of. Lines below the floor are mostly invented."""
    return " ".join(line.text for line in lines if line.confidence >= min_confidence)


class OCRReward:
    """`score_text` of what PaddleOCR reads, with `exact_match` and `confidence` beside it.

    The target is the column `target`, else the first quoted text of the prompt; without either the sample has
    no value (None). `mode`, `models`, `threads` and `recognition_width` are those of `OCREngine`.

    Raises ImageRLError when PaddleOCR cannot be loaded or a setting is impossible."""

    __name__ = "ocr"

    def __init__(
        self,
        mode: Literal["full", "recognise"] = "full",
        min_confidence: float = 0.5,
        models: Literal["auto", "offline", "download"] = "auto",
        threads: int = 1,
        recognition_width: int = 160,
    ) -> None:
        if not 0.0 <= min_confidence <= 1.0:
            raise ImageRLError(f"reward 'ocr': min_confidence must lie in 0..1, not {min_confidence}")
        self.min_confidence = min_confidence
        self.engine = OCREngine(
            mode=mode, models=models, threads=threads, recognition_width=recognition_width
        )

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """What each picture says, above the confidence floor."""
        return [join_lines(lines, self.min_confidence) for lines in self.engine.read(images)]

    def __call__(
        self,
        *,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        target: Sequence[str | None] | None = None,
        **_: Any,
    ) -> RewardOutput:
        given = target if target is not None else [None] * len(prompts)
        targets = [text or quoted_text(prompt) for text, prompt in zip(given, prompts, strict=True)]
        rewards: list[float | None] = [None] * len(prompts)
        exact: list[float | None] = [None] * len(prompts)
        confidence: list[float | None] = [None] * len(prompts)
        wanted = [index for index, text in enumerate(targets) if text and text.strip()]
        for index, lines in zip(wanted, self.engine.read([images[i] for i in wanted]), strict=True):
            read = join_lines(lines, self.min_confidence)
            rewards[index] = score_text(read, targets[index] or "")
            exact[index] = exact_match(read, targets[index] or "")
            confidence[index] = sum(line.confidence for line in lines) / len(lines) if lines else 0.0
        return RewardOutput(rewards, {"exact_match": exact, "confidence": confidence})
