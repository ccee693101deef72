"""Score whether the edit was made, and nothing else: a product, so neither copying the source nor repainting it
pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from imagerl.rewards.base import load_reward
from imagerl.rewards.boundary.guard import answered
from imagerl.rewards.boundary.targets import SAMPLE_NAMES, import_target
from imagerl.rewards.colours import estimate_background, estimate_ink
from imagerl.rewards.edit.similarity import (
    colour_similarity,
    correlation,
    feature_similarity,
    gradient_features,
    ssim,
)
from imagerl.rl.types import ImageRLError, RewardOutput

COLOUR = "colour"
JUDGES = {"text": "ocr", "ink": COLOUR, "background": COLOUR}  # by the column `edited`
JUDGE_SETTINGS: dict[str, dict[str, object]] = {"ocr": {"mode": "recognise"}}
FACTORS = ("done", "kept")
PARTS = (*FACTORS, "colour", "structure", "features", "inside", "judged")
CHANGED = 24 / 255  # difference of source and ideal from which a pixel belongs to the edited region
CORE = 0.8  # share of ink from which a pixel is the inside of a stroke, whatever the ground
INK_RANGE = 80.0  # distance in 8-bit sRGB, across the line to the ground, at which inks share nothing
INK_STRENGTH = 0.5  # how far along that line the ink must be; thin blurred strokes never reach 1
CONTRAST = 16.0  # the same, below which a picture has no ink


def progress(score: float, source_score: float) -> float:
    """Return an edit's progress: 0 at the source's own score, 1 at a full score. A source that fulfils the
    instruction leaves nothing to do but to keep it: then it is the score."""
    return score if source_score >= 1 else max(0.0, (score - source_score) / (1 - source_score))


def colour_score(picture: np.ndarray, part: str, wanted: Sequence[float], source: np.ndarray) -> float:
    """Return how far ink or background of [H, W, 3] went from the source's colour to the wanted one."""
    now, before = _colour_of(picture, part), _colour_of(source, part)
    target = np.asarray(wanted, dtype=np.float64)
    way = float(np.linalg.norm(target - before))
    return max(0.0, 1.0 - float(np.linalg.norm(target - now)) / max(way, CONTRAST))


def score_kept(
    picture: np.ndarray,
    source: np.ndarray,
    weight: np.ndarray,
    part: str | None,
    features: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, float]:
    """Score what was left alone: `colour`, `structure` (SSIM) and `features` where `weight` [H, W] is 1, and
    `inside`: what the edited part of a picture of one ink on one ground keeps of itself. `kept` is the product of
    colour, the mean of structure and features, which see the same thing with other eyes, and inside; what is NaN is
    left out.

    `picture` and `source` are [H, W, 3] in 0..255, `features` those of both, gradients by default. `inside` is the
    ink's colour for a new text, the strokes for a new ink, and both for a new background, whose outside may be too
    small to look at; NaN for another `part`."""
    a, b = picture / 255, source / 255
    pair = (gradient_features(a), gradient_features(b)) if features is None else features
    kept = {
        "colour": colour_similarity(a, b, weight),
        "structure": ssim(a, b, weight),
        "features": feature_similarity(*pair, weight),
        "inside": _inside(picture, source, part),
    }
    shape = (kept["structure"] + kept["features"]) / 2
    factors = [value for value in (kept["colour"], shape, kept["inside"]) if np.isfinite(value)]
    return kept | {"kept": float(np.prod(factors))}


def region_to_keep(
    source: np.ndarray, part: str | None, mask: np.ndarray | None, ideal: np.ndarray | None
) -> np.ndarray:
    """Return [H, W] float64, 1 where a picture must stay as the source [H, W, 3] in 0..255.

    Outside the given mask ([H, W], 1 where it may change); else where the ideal result equals the source, less a rim
    of a pixel; else, by what is edited in a picture of one ink on one ground, away from the strokes or inside them;
    else everywhere."""
    if mask is not None:
        return 1.0 - np.asarray(mask, dtype=np.float64)
    if ideal is not None:
        changed = np.abs(ideal - source).max(axis=-1) > CHANGED * 255
        return 1.0 - _grown(changed)
    share = ink_share(source)
    if part == "background":
        return (share > CORE).astype(np.float64)
    if part in ("ink", "text"):
        touched = _grown(share > 1 - CORE)
        if part == "text":  # another word may be longer: the whole line may change
            touched[touched.any(axis=1)] = 1.0
        return 1.0 - touched
    return np.ones(source.shape[:2])


def ink_share(picture: np.ndarray) -> np.ndarray:
    """Return [H, W] in [0, 1]: how far each pixel lies on the way from the picture's own ground to its ink."""
    ground = estimate_background(picture)
    line = estimate_ink(picture, ground) - ground
    if np.linalg.norm(line) < CONTRAST:
        return np.zeros(picture.shape[:2])
    return np.clip((picture - ground) @ line / (line @ line), 0.0, 1.0)


def ink_similarity(picture: np.ndarray, source: np.ndarray) -> float:
    """Return the share of the source's ink colour in a picture's ink, in [0, 1], whatever the ground of either.

    Pixels of a stroke are mixtures of ground and ink, so what counts is the distance from the line between the
    picture's ground and the source's ink: a blurred stroke keeps its colour, a faint or missing one has none."""
    ground, wanted = estimate_background(picture), _colour_of(source, "ink")
    ink, line = estimate_ink(picture, ground) - ground, wanted - ground
    length = float(line @ line)
    if length < CONTRAST**2:  # the ground has the colour of the ink: there is no line
        return 0.0
    strength = float(ink @ line) / length
    across = float(np.linalg.norm(ink - strength * line))
    return float(np.clip(strength / INK_STRENGTH, 0, 1)) * max(0.0, 1.0 - across / INK_RANGE)


def stroke_similarity(picture: np.ndarray, source: np.ndarray) -> float:
    """Return the share of the source's strokes that a picture's explain, in any colours: the squared
    correlation of their ink shares. Means of rows are taken out, because words on one line have the line in
    common."""
    a, b = (share - share.mean(axis=1, keepdims=True) for share in (ink_share(picture), ink_share(source)))
    return correlation(a, b) ** 2


def _inside(picture: np.ndarray, source: np.ndarray, part: str | None) -> float:
    if part == "text":
        return ink_similarity(picture, source)
    if part == "ink":
        return stroke_similarity(picture, source)
    if part == "background":
        return ink_similarity(picture, source) * stroke_similarity(picture, source)
    return float("nan")


def _colour_of(picture: np.ndarray, part: str) -> np.ndarray:
    ground = estimate_background(picture)
    return ground if part == "background" else estimate_ink(picture, ground)


def _grown(region: np.ndarray) -> np.ndarray:
    """Grow a region [H, W] by a rim of one pixel, where colours blend."""
    image = Image.fromarray(region.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(3))
    return (np.asarray(image) > 0).astype(np.float64)


class EditConsistencyReward:
    """`done` × `kept`, with what they are made of beside them. `factors` names one of them alone: an ablation.

    Columns: `reference`, the picture to edit; `edited`, what the instruction changes, which picks the judge; what
    that judge needs (`target`, `ink_rgb`, `background_rgb`); and, where there are any, `mask` (a picture, white where
    it may change) and `ideal` (a perfect result). None in `reference` or `edited`: not applicable.

    `judges` maps values of `edited` to rewards by name or import path, or to `colour`; the judge's score in [0, 1] for
    the source counts as no progress. `keepers` likewise names rewards that say what else is still there, such as
    `{ink: ocr}`: the text of a picture whose ink changes; their score, `judged`, is a factor of `kept`.

    `features` is an import path of a function from a list of PIL pictures to arrays
    [h, w, D], such as a network's or the tokenizer's continuous features; None: gradients.

    Raises ImageRLError for unknown factors, and when a judge cannot be loaded or a column is missing."""

    __name__ = "edit_consistency"

    def __init__(
        self,
        judges: Mapping[str, str] | None = None,
        judge_settings: Mapping[str, Mapping[str, object]] | None = None,
        features: str | None = None,
        keepers: Mapping[str, str] | None = None,
        factors: Sequence[str] = FACTORS,
    ) -> None:
        if not factors or not set(factors) <= set(FACTORS):
            raise ImageRLError(
                f"reward 'edit_consistency': factors are {' and '.join(FACTORS)}, not {list(factors)}"
            )
        self.judges = {**JUDGES, **(judges or {})}
        self.keepers = dict(keepers or {})
        self.factors = tuple(factors)
        self._settings = {**JUDGE_SETTINGS, **(judge_settings or {})}
        self._features = import_target(features) if features else None
        self._loaded: dict[str, Callable[..., object]] = {}
        for name in {*(judges or {}).values(), *self.keepers.values()} - {COLOUR}:
            self._loaded_judge(name)  # mistakes show at the start

    def __call__(
        self,
        *,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        reference: Sequence[Image.Image | None] | None = None,
        edited: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> RewardOutput:
        if reference is None or edited is None:
            raise ImageRLError(
                "reward 'edit_consistency' needs the columns reference and edited in the prompt set"
            )
        columns = {name: values for name, values in columns.items() if name not in SAMPLE_NAMES}
        edits = {
            row: _Edit(
                part, prompts[row], images[row], source, {name: columns[name][row] for name in columns}
            )
            for row, (source, part) in enumerate(zip(reference, edited, strict=True))
            if source and part
        }
        found = dict(zip(edits, self._kept(list(edits.values())), strict=True))
        for part in dict.fromkeys(edit.part for edit in edits.values()):
            rows = [row for row, edit in edits.items() if edit.part == part]
            for row, done in zip(rows, self._done(part, [edits[row] for row in rows]), strict=True):
                found[row]["done"] = done
            if (keeper := self.keepers.get(part)) is not None:
                told = self._ask(keeper, [(edits[row], edits[row].image) for row in rows])
                for row, score in zip(rows, told, strict=True):
                    kept = found[row]["kept"]
                    found[row] |= {
                        "judged": score,
                        "kept": None if score is None or kept is None else kept * score,
                    }
        parts: dict[str, list[float | None]] = {name: [None] * len(images) for name in PARTS}
        values: list[float | None] = [None] * len(images)
        for row, scores in found.items():
            for name, value in scores.items():
                parts[name][row] = value if value is not None and np.isfinite(value) else None
            values[row] = _product([parts[name][row] for name in self.factors])
        reason = None if len(edits) == len(images) else "a sample has no reference or says not what is edited"
        return RewardOutput(values, parts, reason)

    def _kept(self, edits: Sequence[_Edit]) -> list[dict[str, float | None]]:
        """Return `score_kept` of each sample; a picture of another size than its source is scaled to it."""
        pictures = [
            edit.image.convert("RGB").resize(edit.source.size, Image.Resampling.BOX) for edit in edits
        ]
        own = self._features_of(pictures)
        sources = {id(edit.source): edit.source for edit in edits}
        theirs = dict(zip(sources, self._features_of(list(sources.values())), strict=True))
        regions: dict[object, np.ndarray] = {}
        kept: list[dict[str, float | None]] = []
        for edit, picture, features in zip(edits, pictures, own, strict=True):
            source, size = _array(edit.source), edit.source.size
            mask, ideal = edit.columns.get("mask"), edit.columns.get("ideal")
            key = (id(edit.source), id(mask), id(ideal), edit.part)
            if key not in regions:
                free = None if mask is None else np.asarray(mask.convert("L").resize(size)) / 255
                best = None if ideal is None else _array(ideal.resize(size))
                regions[key] = region_to_keep(source, edit.part, free, best)
            pair = None if self._features is None else (features, theirs[id(edit.source)])
            kept.append({**score_kept(_array(picture), source, regions[key], edit.part, pair)})
        return kept

    def _features_of(self, pictures: list[Image.Image]) -> list[Any]:
        if self._features is None or not pictures:
            return [None] * len(pictures)
        made = self._features([picture.convert("RGB") for picture in pictures])
        return [np.asarray(features, dtype=np.float64) for features in made]

    def _done(self, part: str, edits: Sequence[_Edit]) -> list[float | None]:
        """Return the progress of samples with one kind of edit; None where its judge has no value. A source that
        serves a whole group is judged once."""
        if part not in self.judges:
            known = ", ".join(self.judges)
            raise ImageRLError(
                f"reward 'edit_consistency': no judge for edited={part!r}, only for {known}; name one in judges"
            )
        if self.judges[part] == COLOUR:
            return [edit.colour_score() for edit in edits]
        first: dict[object, _Edit] = {}
        for edit in edits:
            first.setdefault(edit.key, edit)
        shown = [(edit, edit.image) for edit in edits] + [(edit, edit.source) for edit in first.values()]
        told = self._ask(self.judges[part], shown)
        before = dict(zip(first, told[len(edits) :], strict=True))
        return [
            None if score is None or (start := before[edit.key]) is None else progress(score, start)
            for edit, score in zip(edits, told, strict=False)
        ]

    def _ask(self, judge: str, shown: Sequence[tuple[_Edit, Image.Image]]) -> list[float | None]:
        """Ask a judge about pictures, each with the columns of its sample."""
        samples: dict[str, list[Any]] = {
            "prompts": [edit.prompt for edit, _ in shown],
            "completions": [[] for _ in shown],
            "images": [picture for _, picture in shown],
            **{name: [edit.columns[name] for edit, _ in shown] for name in shown[0][0].columns},
        }
        return answered(self._loaded_judge(judge), samples).rewards

    def _loaded_judge(self, name: str) -> Callable[..., Any]:
        """Load a judge when first needed: a set without text edits needs no OCR."""
        if name not in self._loaded:
            self._loaded[name] = load_reward(name, **self._settings.get(name, {}))[1]
        return self._loaded[name]


@dataclass(frozen=True, slots=True)
class _Edit:
    """One sample: a picture, the source that it was made of, and the columns of its prompt."""

    part: str
    prompt: str
    image: Image.Image
    source: Image.Image
    columns: Mapping[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """Return what a judge of the source looks at."""
        return id(self.source), self.prompt, *(str(self.columns[name]) for name in sorted(self.columns))

    def colour_score(self) -> float | None:
        """Return the progress towards the column `ink_rgb` or `background_rgb`; None where that is None."""
        if f"{self.part}_rgb" not in self.columns:
            raise ImageRLError(
                f"reward 'edit_consistency' needs the column {self.part}_rgb for edited={self.part!r}"
            )
        wanted = self.columns[f"{self.part}_rgb"]
        if wanted is None:
            return None
        return colour_score(_array(self.image), self.part, wanted, _array(self.source))


def _product(factors: Sequence[float | None]) -> float | None:
    """Multiply; None where a factor is None."""
    return None if None in factors else float(np.prod([factor for factor in factors if factor is not None]))


def _array(image: Image.Image) -> np.ndarray:
    """Return [H, W, 3] float64 in 0..255."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)
