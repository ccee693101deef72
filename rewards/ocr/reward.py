"""Score text accuracy: whether the picture says what the prompt asked for.

The score is that of BLIP3o-NEXT (arXiv 2510.15857) and Flow-GRPO (arXiv 2505.05470), read by PaddleOCR."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image
from rapidfuzz.distance import Levenshtein

from imagerl.rewards.ocr.engine import Line, OCREngine
from imagerl.rl.files.bounds import Count, Threads
from imagerl.rl.types import ImageRLError, RewardOutput

# A single quote opens only where no word ends and closes only where none goes on: apostrophes are no quotes.
# A double quote after a digit is an inch mark.
_QUOTED = re.compile(
    r"“(?P<curly>[^”]*)”"
    r"|„(?P<low>[^“”]*)[“”]"
    r"|«(?P<angle>[^»]*)»"
    r"|「(?P<corner>[^」]*)」"
    r'|(?<!\d)"(?P<double>[^"]*)"'
    r"|(?<!\w)‘(?P<curly_single>.+?)’(?!\w)"
    r"|(?<!\w)'(?P<single>.+?)'(?!\w)",
    re.DOTALL,
)


_FOLDED = str.maketrans(
    dict.fromkeys("‘’‚‛′", "'") | dict.fromkeys("“”„‟″", '"') | dict.fromkeys("‐‑‒–—−", "-")
)
_EMOJI = range(0x1F000, 0x20000)


def normalise(text: str) -> str:
    """Lower the case and drop white space, emoji and invisible characters. Characters that look alike are one:
    composed and decomposed, full-width and plain (Unicode NFKC), straight and curly quotes, dashes of any
    length."""
    plain = unicodedata.normalize("NFKC", text).translate(_FOLDED)
    return "".join(c for c in plain if not (c.isspace() or _is_ornament(c))).lower()


def _is_ornament(character: str) -> bool:
    """Tell whether it is an emoji, a modifier of one, or invisible: no reader can be asked for these."""
    invisible = unicodedata.category(character) in ("Cf", "Cc") or "\ufe00" <= character <= "\ufe0f"
    return invisible or ord(character) in _EMOJI


def quoted_text(prompt: str) -> str | None:
    """Return the first quoted text of a prompt, or None."""
    for match in _QUOTED.finditer(prompt):
        text = match.group(match.lastgroup or 0)
        if text.strip():
            return text
    return None


def score_text(read: str, target: str) -> float:
    """Return 1 − d / len(target) in [0, 1], on normalised texts.

    d is 0 when the target is part of what was read, else the Levenshtein distance capped at len(target).
    Raises ValueError for a blank target."""
    wanted, got = normalise(target), normalise(read)
    if not wanted:
        raise ValueError("the target text is blank")
    distance = 0 if wanted in got else min(Levenshtein.distance(got, wanted), len(wanted))
    return 1.0 - distance / len(wanted)


def exact_match(read: str, target: str) -> float:
    """Return 1.0 when the texts are equal but for case and white space, else 0.0: stricter than a perfect
    `score_text`, which forgives whatever stands around the target."""
    return float(normalise(read) == normalise(target))


def letter_regions(lines: Sequence[Line], min_confidence: float, target: str) -> list[tuple[float, ...]]:
    """Return one region a letter of the normalised target: 1 where it was read and 0 where not, and its place.

    Letters are matched by the edits that turn what was read into the target. A letter that was not read lies between
    its neighbours, and where nothing was read the letters share the picture's width. A region reaches over 0.8 of the
    distance to the next letter on both sides, and from top to bottom: tokens beside a letter shape it too."""
    wanted = normalise(target)
    read, at = "", []
    for line in lines:
        if line.confidence >= min_confidence:
            for character, (x, _) in zip(line.text, line.centres, strict=True):
                plain = normalise(character)
                read += plain
                at += [x] * len(plain)
    value, place = np.zeros(len(wanted)), np.full(len(wanted), np.nan)
    for edit in Levenshtein.opcodes(read, wanted):
        if edit.tag in ("equal", "replace"):
            value[edit.dest_start : edit.dest_end] = edit.tag == "equal"
            place[edit.dest_start : edit.dest_end] = at[edit.src_start : edit.src_end]
    known, letters = np.isfinite(place), np.arange(len(wanted))
    step = 1 / len(wanted)
    if known.sum() > 1:
        step = float(np.median(np.diff(place[known]) / np.diff(letters[known])))
    if known.any():
        nearest = letters[known][np.abs(letters[:, None] - letters[known]).argmin(axis=1)]
        place = np.where(known, place, place[nearest] + (letters - nearest) * step)
    else:
        place = (letters + 0.5) * step
    reach = 0.8 * abs(step)
    sides = np.clip([place - reach, place + reach], 0, 1).T
    return [
        (float(v), float(left), 0.0, float(right), 1.0) for v, (left, right) in zip(value, sides, strict=True)
    ]


def join_lines(lines: Sequence[Line], min_confidence: float) -> str:
    """Join the lines that the engine is sure enough of. Lines below the floor are mostly invented."""
    return " ".join(line.text for line in lines if line.confidence >= min_confidence)


class OCRReward:
    """`score_text` of what PaddleOCR reads, with `exact_match` and `confidence` beside it.

    The target is the column `target`, else the first quoted text of the prompt. Without either, or where the engine
    has no letter for one of the target's, the sample has no value (None) and the output's `reason` says why.
    `exact_share` of the reward is given for `exact_match` instead: letters that are nearly right, or right but
    with others around them, then earn less. `mode`, `models`, `threads` and `recognition_width` are `OCREngine`'s.

    Raises ImageRLError when PaddleOCR cannot be loaded or a setting is impossible."""

    __name__ = "ocr"

    def __init__(
        self,
        mode: Literal["full", "recognise"] = "full",
        min_confidence: float = 0.5,
        models: Literal["auto", "offline", "download"] = "auto",
        threads: Threads = 1,
        recognition_width: Count = 160,
        exact_share: float = 0.0,
    ) -> None:
        for name, value in (("min_confidence", min_confidence), ("exact_share", exact_share)):
            if not 0.0 <= value <= 1.0:
                raise ImageRLError(f"reward 'ocr': {name} must lie in 0..1, not {value}")
        self.min_confidence = min_confidence
        self.exact_share = exact_share
        self.engine = OCREngine(
            mode=mode, models=models, threads=threads, recognition_width=recognition_width
        )

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """Return each picture's text above the confidence floor."""
        return [join_lines(lines, self.min_confidence) for lines in self.engine.read(images)]

    def __call__(
        self,
        *,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        target: Sequence[str | None] | None = None,
        **_: object,
    ) -> RewardOutput:
        given = target if target is not None else [None] * len(prompts)
        targets = [target_of(*pair) for pair in zip(given, prompts, strict=True)]
        problems = [self._problem(text, prompt) for text, prompt in zip(targets, prompts, strict=True)]
        rewards: list[float | None] = [None] * len(prompts)
        exact: list[float | None] = [None] * len(prompts)
        confidence: list[float | None] = [None] * len(prompts)
        regions: list[list[tuple[float, ...]]] = [[] for _ in prompts]
        wanted = [index for index, problem in enumerate(problems) if problem is None]
        for index, lines in zip(wanted, self.engine.read([images[i] for i in wanted]), strict=True):
            read, text = join_lines(lines, self.min_confidence), targets[index] or ""
            score, equal = score_text(read, text), exact_match(read, text)
            rewards[index] = score + self.exact_share * (equal - score)
            exact[index] = equal
            regions[index] = letter_regions(lines, self.min_confidence, text)
            confidence[index] = sum(line.confidence for line in lines) / len(lines) if lines else 0.0
        reason = next((problem for problem in problems if problem), None)
        return RewardOutput(rewards, {"exact_match": exact, "confidence": confidence}, reason, regions)

    def _problem(self, text: str | None, prompt: str) -> str | None:
        """Say why this target cannot be read, or return None."""
        if text is None:
            return f"no column target and no quoted text in {prompt[:60]!r}"
        wanted = normalise(text)
        if not wanted:
            return f"the target {text[:60]!r} holds nothing that can be read"
        known = self.engine.characters
        unknown = [c for c in wanted if known and not {c, c.upper()} & known]
        if not unknown:
            return None
        problem = f"the OCR model has no character {unknown[0]!r}, which the target {text[:60]!r} asks for"
        warnings.warn(f"reward 'ocr': {problem}; such prompts have no value", stacklevel=2)
        return problem


def wanted_text(given: object, prompt: str) -> str:
    """Return the text of `target_of`, normalised as it is compared; "" where a picture need not show any text."""
    return normalise(target_of(given, prompt) or "") if _is_text(given) else ""


def target_of(given: object, prompt: str) -> str | None:
    """Return the text that a picture must show: what the column holds, numbers as text, else what the prompt quotes.

    Raises ImageRLError when the column holds something else."""
    if not _is_text(given):
        raise ImageRLError(f"reward 'ocr': the column target must hold texts, not {given!r}")
    text = "" if given is None else str(given)
    return text if text.strip() else quoted_text(prompt)


def _is_text(given: object) -> bool:
    return isinstance(given, str | int | float | None) and not isinstance(given, bool)
