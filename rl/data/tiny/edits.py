"""Edits of pictures of the tiny world, and questions about them.

An edit changes one part of a scene, its text, ink or background, and keeps the rest, the font included. A
question asks for one part. Held-out cases show and ask for held-out texts only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.data.tiny.world import (
    BACKGROUNDS,
    INKS,
    Scene,
    random_scene,
    render,
    texts,
)
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Prompt

INSTRUCTIONS = {  # by the part of a `Scene` that changes
    "text": 'replace the text with "{}"',
    "ink": "change the text colour to {}",
    "background": "change the background to {}",
}
QUESTIONS = {  # by the part of a `Scene` that is asked for
    "text": "what is written?",
    "ink": "what colour is the text?",
    "background": "what colour is the background?",
}
PARTS = tuple(INSTRUCTIONS)
COLOURS = {"ink": INKS, "background": BACKGROUNDS}


@dataclass(frozen=True, slots=True)
class Edit:
    """One part of a picture to be changed."""

    source: Scene
    part: str  # one of PARTS
    value: str

    @property
    def instruction(self) -> str:
        return INSTRUCTIONS[self.part].format(self.value)

    @property
    def result(self) -> Scene:
        return replace(self.source, **{self.part: self.value})

    def columns(self) -> dict[str, object]:
        """Return columns of the prompt set: what the result must show, what changes, the picture to edit, a perfect
        result, in which whatever need not change is as it was, and captions of both."""
        return self.result.columns() | {
            "edited": self.part,
            "reference": render(self.source),
            "ideal": render(self.result),
            "caption_before": self.source.caption,
            "caption_after": self.result.caption,
        }


@dataclass(frozen=True, slots=True)
class Question:
    """One part of a picture to be named."""

    scene: Scene
    part: str  # one of PARTS

    @property
    def text(self) -> str:
        return QUESTIONS[self.part]

    @property
    def answer(self) -> str:
        return str(getattr(self.scene, self.part))

    def columns(self) -> dict[str, object]:
        return {"asked": self.part, "answer": self.answer, "reference": render(self.scene)}


def new_value(rng: random.Random, source: Scene, part: str, text: str) -> str:
    """Choose the new value of a part: `text`, or another colour than it has."""
    if part == "text":
        return text
    return rng.choice([name for name in COLOURS[part] if name != getattr(source, part)])


def edits_of(split: str, size: int | None = None, seed: int = 0, parts: Sequence[str] = PARTS) -> list[Edit]:
    """Return `size` edits of a split, one for every text when None: `parts` in turn, colours drawn from `seed`.

    Raises ImageRLError when the split has fewer texts than asked for."""
    pool = _pool("tiny_edits", split, size)
    edits = []
    for index, text in enumerate(pool[:size]):
        rng = random.Random(derive_seed("tiny_edits", seed, index))
        part = parts[index % len(parts)]
        shown = pool[(index + rng.randrange(1, len(pool))) % len(pool)] if part == "text" else text
        source = random_scene(rng, shown)
        edits.append(Edit(source, part, new_value(rng, source, part, text)))
    return edits


def edit_set(
    split: str, size: int | None = None, seed: int = 0, parts: Sequence[str] = PARTS
) -> list[Prompt]:
    """Return the edits of a split as prompts. Raises ImageRLError like `edits_of`."""
    edits = enumerate(edits_of(split, size, seed, parts))
    return [Prompt(index=index, text=edit.instruction, columns=edit.columns()) for index, edit in edits]


def question_set(split: str, size: int | None = None, seed: int = 0) -> list[Prompt]:
    """Return `size` questions of a split, one about every text when None: the parts in turn.

    Raises ImageRLError when the split has fewer texts than asked for."""
    pool = _pool("tiny_questions", split, size)
    prompts = []
    for index, text in enumerate(pool[:size]):
        rng = random.Random(derive_seed("tiny_questions", seed, index))
        question = Question(random_scene(rng, text), PARTS[index % len(PARTS)])
        prompts.append(Prompt(index=index, text=question.text, columns=question.columns()))
    return prompts


def _pool(name: str, split: str, size: int | None) -> tuple[str, ...]:
    pool = texts(split)
    if size is not None and size > len(pool):
        raise ImageRLError(f"{name}/{split} has {len(pool)} prompts, not {size}; ask for fewer")
    return pool
