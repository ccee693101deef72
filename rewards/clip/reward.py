"""Measure CLIP alignment: whether a picture shows what the words say, and whether an edit changed it as the words did.

One class serves all models that give a picture and a caption features to compare: CLIP, SigLIP, PickScore, HPSv2; and
heads on the picture's features alone, such as the aesthetic predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from PIL import Image

from imagerl.rewards.clip.heads import SIMILARITIES, PictureHead, cosine, direction, similarity
from imagerl.rewards.clip.memory import Remembered
from imagerl.rewards.clip.models import load_clip
from imagerl.rewards.hub import read_tensors, weights_file
from imagerl.rewards.pictures import decoded
from imagerl.rl.files.bounds import Count
from imagerl.rl.types import ImageRLError, RewardOutput


class ClipReward:
    """The value of `head` for a picture's and its caption's features, with their `cosine` beside it.

    `model`, `pretrained`, `library`, `device`, `dtype` and `batch_size` are those of `load_clip`. `head` is one of
    `cosine`, `clipscore`, `logit` and `probability`, or the file of a network on the picture's features alone, with
    `activation` between its layers. `column` names a column of captions; without it the prompt is the caption. A sample
    without a caption has no value (None), unless the head needs none.

    Raises ImageRLError when the model or the head cannot be loaded, they do not fit, or the column is missing."""

    __name__ = "clip"

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        library: str = "auto",
        head: str = "cosine",
        activation: str = "none",
        column: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: Count = 64,
    ) -> None:
        self._network = None
        if head not in SIMILARITIES:
            state = read_tensors(weights_file(head, "clip", SIMILARITIES), "clip")
            self._network = PictureHead(state, head, activation)
        self.model = load_clip(model, pretrained, library, device, dtype, batch_size)
        self._head = head
        self._column = column
        self._captions = Remembered(self.model.encode_captions)
        if self._network is not None:
            self._network.check_width(self.model.width)
        else:
            cosine(torch.zeros(1, self.model.width), self.model.encode_captions(["a"]))

    def __call__(
        self, *, prompts: Sequence[str], images: Sequence[Image.Image], **columns: list[Any]
    ) -> RewardOutput:
        if self._network is not None:
            return RewardOutput(self._network(self.model.encode_pictures(decoded(images))).tolist())
        captions = captions_of(columns, self._column, prompts, "clip")
        asked = [index for index, caption in enumerate(captions) if caption]
        values: list[float | None] = [None] * len(images)
        cosines: list[float | None] = [None] * len(images)
        if asked:
            words = [captions[index] for index in asked]
            alike = cosine(
                self.model.encode_pictures(decoded([images[index] for index in asked])),
                self._captions(words, words),
            )
            scores = similarity(self._head, alike, self.model.scale, self.model.bias)
            for index, score, value in zip(asked, scores.tolist(), alike.tolist(), strict=True):
                values[index], cosines[index] = score, value
        reason = None if len(asked) == len(images) else "a sample has no caption to compare its picture with"
        return RewardOutput(values, {} if self._head == "cosine" else {"cosine": cosines}, reason)


class ClipDirectionReward:
    """Cosine of what changed in a picture and in its description, in a model's features: 0 for an unchanged source.

    Columns: `reference`, the picture to edit, and `caption_before` and `caption_after`, which describe it and what it
    shall become; `before` and `after` give other names. None in one of them, or one text in both: not applicable. The
    other settings are those of `load_clip`.

    Raises ImageRLError when the model cannot be loaded or a column is missing."""

    __name__ = "clip_direction"

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        library: str = "auto",
        before: str = "caption_before",
        after: str = "caption_after",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: Count = 64,
    ) -> None:
        self.model = load_clip(model, pretrained, library, device, dtype, batch_size)
        self._columns = before, after
        self._captions = Remembered(self.model.encode_captions)
        self._references = Remembered(self.model.encode_pictures)

    def __call__(
        self,
        *,
        images: Sequence[Image.Image],
        reference: Sequence[Image.Image | None] | None = None,
        **columns: list[Any],
    ) -> RewardOutput:
        if reference is None:
            raise ImageRLError("reward 'clip_direction' needs the column reference in the prompt set")
        before, after = (captions_of(columns, name, (), "clip_direction") for name in self._columns)
        asked = [
            index
            for index, (source, old, new) in enumerate(zip(reference, before, after, strict=True))
            if source is not None and old and new and old != new
        ]
        values: list[float | None] = [None] * len(images)
        if asked:
            sources = decoded([reference[index] for index in asked])
            old, new = ([captions[index] for index in asked] for captions in (before, after))
            turned = direction(
                self.model.encode_pictures(decoded([images[index] for index in asked])),
                self._references([_digest(source) for source in sources], sources),
                self._captions(new, new),
                self._captions(old, old),
            )
            for index, value in zip(asked, turned.tolist(), strict=True):
                values[index] = value
        reason = None if len(asked) == len(images) else "a sample lacks a reference, or captions that differ"
        return RewardOutput(values, {}, reason)


def captions_of(
    columns: Mapping[str, Any], column: str | None, prompts: Sequence[str], label: str
) -> list[str]:
    """Return a column's captions, else the prompts; "" where there is none. Raises ImageRLError where it has none."""
    if column is not None and column not in columns:
        raise ImageRLError(f"reward {label!r} needs the column {column} in the prompt set")
    given = prompts if column is None else columns[column]
    for caption in given:
        if not isinstance(caption, str | None):
            raise ImageRLError(f"reward {label!r}: the column {column} must hold texts, not {caption!r}")
    return [(caption or "").strip() for caption in given]


def _digest(picture: Image.Image) -> bytes:
    return blake2b(picture.tobytes() + repr(picture.size).encode(), digest_size=16).digest()
