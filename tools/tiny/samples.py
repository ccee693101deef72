"""Samples that the tiny models are trained on: each batch is rendered as a pure function of seed, stage and step."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.data.tiny.edits import PARTS, Edit, Question, new_value
from imagerl.rl.data.tiny.shapes import Drawing, draw, random_drawing
from imagerl.rl.data.tiny.world import (
    DIGITS,
    FONTS,
    HEIGHT,
    LETTERS,
    WIDTH,
    Scene,
    random_scene,
    render,
    split_of,
    texts,
)
from tools.tiny.config import StageConfig


def pretraining_text(rng: random.Random) -> str:
    """Draw a word, random letters or a number, never a held-out text. Random letters teach spelling as such."""
    while True:
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(texts("train"))
        alphabet = LETTERS if kind < 0.85 else DIGITS
        text = "".join(rng.choices(alphabet, k=rng.randint(3, 6)))
        if split_of(text) == "train":
            return text


def other_text(rng: random.Random, text: str) -> str:
    """Draw a pretraining text that differs from `text`."""
    while (drawn := pretraining_text(rng)) == text:
        pass
    return drawn


def random_edit(rng: random.Random, fonts: Sequence[str] = FONTS, text_share: float = 1 / 3) -> Edit:
    """Draw an edit of a pretraining picture. `text_share` of them replace the text, the others change a colour."""
    source = random_scene(rng, pretraining_text(rng), fonts)
    part = "text" if rng.random() < text_share else rng.choice(PARTS[1:])
    return Edit(source, part, new_value(rng, source, part, other_text(rng, source.text)))


def random_question(rng: random.Random, fonts: Sequence[str] = FONTS, text_share: float = 1 / 3) -> Question:
    """Draw a question about a pretraining picture, `text_share` of them for its text."""
    scene = random_scene(rng, pretraining_text(rng), fonts)
    return Question(scene, "text" if rng.random() < text_share else rng.choice(PARTS[1:]))


def scenes(seed: int, stage: str, step: int, count: int, fonts: Sequence[str] = FONTS) -> list[Scene]:
    rng = random.Random(derive_seed(seed, stage, step))
    return [random_scene(rng, pretraining_text(rng), fonts) for _ in range(count)]


def samples(seed: int, name: str, step: int, count: int, stage: StageConfig) -> Sequence[Scene | Drawing]:
    """Return captioned pictures of words in the stage's fonts, of shapes where it has none."""
    if stage.fonts:
        return scenes(seed, name, step, count, stage.fonts)
    rng = random.Random(derive_seed(seed, name, step))
    return [random_drawing(rng) for _ in range(count)]


def pictures(batch: Iterable[Scene | Drawing], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Tensor:
    """Render scenes, those of words in a width and height, as [B, 3, H, W] in [-1, 1]."""
    drawn = [render(one, size) if isinstance(one, Scene) else draw(one.shapes) for one in batch]
    pixels = np.stack([np.asarray(picture) for picture in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def edits(
    seed: int, stage: str, step: int, count: int, text_share: float, fonts: Sequence[str] = FONTS
) -> list[Edit]:
    rng = random.Random(derive_seed(seed, stage, "edits", step))
    return [random_edit(rng, fonts, text_share) for _ in range(count)]


def questions(
    seed: int, stage: str, step: int, count: int, text_share: float, fonts: Sequence[str] = FONTS
) -> list[Question]:
    rng = random.Random(derive_seed(seed, stage, "questions", step))
    return [random_question(rng, fonts, text_share) for _ in range(count)]


def captions(seed: int, count: int, stage: StageConfig | None = None) -> list[str]:
    """Return captions of a stage's world, or of words, to train a text tokenizer on."""
    some = scenes(seed, "captions", 0, count) if stage is None else samples(seed, "captions", 0, count, stage)
    return [one.caption for one in some]
