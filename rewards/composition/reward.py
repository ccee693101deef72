"""Score composition: whether the objects asked for are there, as many, in their colours and places.

Specifications are GenEval's metadata (arXiv 2310.11513), unchanged; so is the rule. Its detector, which needs mmdet, is
not: photographs are looked at by an open-vocabulary detector of transformers, drawn pictures by exact programs."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from imagerl.rewards.clip.models import load_clip
from imagerl.rewards.composition.detectors import ClipColours, Detector, OpenVocabularyDetector
from imagerl.rewards.composition.rule import (
    COLOURS,
    Found,
    Specification,
    faults,
    nothing_else,
    specification,
)
from imagerl.rewards.composition.tiny import SHAPES, TinyDetector
from imagerl.rewards.pictures import decoded
from imagerl.rl.files.bounds import Count, Share
from imagerl.rl.types import ImageRLError, RewardOutput

DRAWN = {"tiny_world": ("word",), "shapes": SHAPES}  # with the classes that are found there
CREDITS = {"whole": "correct", "exact": "exact", "partial": "fulfilled"}  # with the part that each pays
FAULTS = ("missing", "colour", "position", "too many")


class CompositionReward:
    """1 when a picture answers its whole specification, else 0; with `credit: exact` 1 only when there is nothing more,
    with `partial` the share of its entries that are as asked. Beside it `correct`, `fulfilled` (that share), `exact`
    (correct, and there is nothing more of the classes that are named or, in drawn pictures, known: GenEval forbids more
    only when counting), one part for each tag (`tag_counting`: `correct` where the tag is that), and which share of the
    entries failed by what (`fault_colour`, ...).

    Wants the columns of GenEval's metadata: `include`, and where there are any `exclude` and `tag`. None in `include`:
    not applicable. `detector` is `tiny_world` or `shapes` for drawn pictures, else a folder or a hub name; colours in
    photographs are told by `clip`, a model as in the reward `clip`, with `pretrained` and `library`. Objects count from
    `threshold`, where the tag is `counting` from `counting_threshold`.

    Raises ImageRLError: what cannot be loaded, a missing column, a specification that is not in GenEval's format, a
    colour asked for without `clip`."""

    __name__ = "composition"

    def __init__(
        self,
        detector: str,
        clip: str | None = None,
        pretrained: str | None = None,
        library: str = "auto",
        credit: str = "whole",
        threshold: Share = 0.3,
        counting_threshold: Share | None = None,
        max_overlap: Share = 0.5,
        device: str = "auto",
        batch_size: Count = 16,
    ) -> None:
        if credit not in CREDITS:
            raise ImageRLError(f"reward 'composition': credit must be {', '.join(CREDITS)}, not {credit!r}")
        self._credit = credit
        self._counting = threshold if counting_threshold is None else counting_threshold
        self._threshold = threshold
        self._drawn, self._known = detector in DRAWN, DRAWN.get(detector, ())
        lowest = min(self._threshold, self._counting)
        self._detector: Detector = (
            TinyDetector(detector)
            if self._drawn
            else OpenVocabularyDetector(detector, lowest, max_overlap, device, batch_size)
        )
        self._colours = None if clip is None else ClipColours(load_clip(clip, pretrained, library, device))

    def __call__(
        self,
        *,
        images: Sequence[Image.Image],
        include: Sequence[object] | None = None,
        exclude: Sequence[object] | None = None,
        tag: Sequence[str | None] | None = None,
        **_: object,
    ) -> RewardOutput:
        if include is None:
            raise ImageRLError("reward 'composition' needs the column include in the prompt set")
        nothing = [None] * len(images)
        rows = list(zip(include, exclude or nothing, tag or nothing, strict=True))
        asked = [index for index, row in enumerate(rows) if row[0] is not None]
        wanted = [specification(*rows[index]) for index in asked]
        for spec in wanted:
            self._check_colours(spec)
        pictures = decoded([images[index] for index in asked])
        found = (
            self._detector(pictures, [list(dict.fromkeys((*spec.classes, *self._known))) for spec in wanted])
            if asked
            else []
        )
        parts: dict[str, list[float | None]] = {}
        values: list[float | None] = list(nothing)
        for index, spec, picture, objects in zip(asked, wanted, pictures, found, strict=True):
            row = self._judge(spec, picture, objects)
            values[index] = row[CREDITS[self._credit]]
            for name, value in row.items():
                parts.setdefault(name, list(nothing))[index] = value
        reason = None if len(asked) == len(images) else "a sample has no specification (column include)"
        return RewardOutput(values, parts, reason)

    def _judge(
        self, spec: Specification, picture: Image.Image, found: dict[str, list[Found]]
    ) -> dict[str, float]:
        least = self._counting if spec.tag == "counting" else self._threshold
        sure = {name: [one for one in objects if one.confidence >= least] for name, objects in found.items()}

        def name_colours(objects: Sequence[Found], name: str) -> Sequence[str]:
            if self._drawn:
                return [one.colour or "" for one in objects]
            assert self._colours is not None
            return self._colours(picture, objects, name)

        told = faults(sure, spec, name_colours)
        right = sum(fault is None for fault in told)
        correct = right == len(told)
        row = {
            "correct": float(correct),
            "exact": float(correct and nothing_else(sure, spec)),
            "fulfilled": right / len(told),
        }
        row |= {f"fault_{name.replace(' ', '_')}": told.count(name) / len(told) for name in FAULTS}  # type: ignore[arg-type]
        return row | ({f"tag_{spec.tag}": row["correct"]} if spec.tag else {})

    def _check_colours(self, spec: Specification) -> None:
        """Raise ImageRLError when a colour is asked for that nothing here could tell."""
        for wanted in spec.include:
            if wanted.colour is None or self._drawn:
                continue
            if self._colours is None:
                raise ImageRLError(
                    f"reward 'composition': a {wanted.colour} {wanted.name} is asked for: name a colour model in clip"
                )
            if wanted.colour not in COLOURS:
                raise ImageRLError(
                    f"reward 'composition': {wanted.colour!r} is none of the colours that are told apart: "
                    f"{', '.join(COLOURS)}"
                )
