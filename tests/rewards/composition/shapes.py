"""Drawings of a few plain shapes on grey, and specifications of them in GenEval's format (arXiv 2310.11513).

Counts and places can be judged exactly there. No model that ships draws them; the reward `composition` is tried on
them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.data.tiny.world import BACKGROUNDS, INKS, SPLITS
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Prompt

SIZE = 96  # pixels a side
CELLS = 3  # a side; one shape at most in each
SIZES = (12, 18, 24)  # a cross has arms of a third: whole pixels
SUPERSAMPLING = 4
GREY = (153, 153, 153)
SHAPES = ("square", "circle", "triangle", "cross")
COLOURS = INKS | BACKGROUNDS | {"orange": (255, 140, 0), "brown": (120, 70, 20)}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = ("", "one", "two", "three", "four")
# Where the second shape lies, by what the caption says of it: (columns, rows) from the first.
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    colour: str
    cell: tuple[int, int]  # column and row
    size: int = 18  # pixels a side, one of SIZES
    shift: tuple[int, int] = (0, 0)  # pixels from the cell's centre

    @property
    def corner(self) -> tuple[float, float]:
        across, down = (
            (place + 0.5) * SIZE / CELLS + move for place, move in zip(self.cell, self.shift, strict=True)
        )
        return across - self.size / 2, down - self.size / 2


def specification(rng: random.Random, tag: str) -> dict[str, Any]:
    """Return one line of metadata: `tag`, `include`, `prompt`, and `exclude` where the tag is counting."""
    first, second = rng.sample(SHAPES, 2)
    one, other = rng.sample(list(COLOURS), 2)
    if tag == "counting":
        count = rng.randint(2, 4)
        return {
            "tag": tag,
            "include": [{"class": first, "count": count}],
            "exclude": [{"class": first, "count": count + 1}],
            "prompt": f"a drawing of {NUMBERS[count]} {first}{'es' if first == 'cross' else 's'}",
        }
    include: list[dict[str, Any]] = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    if tag == "single_object":
        return {"tag": tag, "include": include[:1], "prompt": f"a drawing of a {first}"}
    if tag == "two_object":
        return {"tag": tag, "include": include, "prompt": f"a drawing of a {first} and a {second}"}
    if tag == "position":
        relation = rng.choice(list(STEPS))
        include[1]["position"] = [relation, 0]
        return {"tag": tag, "include": include, "prompt": f"a drawing of a {second} {relation} a {first}"}
    include[0]["color"] = one
    if tag == "colors":
        return {"tag": tag, "include": include[:1], "prompt": f"a drawing of a {one} {first}"}
    include[1]["color"] = other
    return {"tag": tag, "include": include, "prompt": f"a drawing of a {one} {first} and a {other} {second}"}


def answer(rng: random.Random, wanted: Mapping[str, Any]) -> list[Shape]:
    """Place shapes that fulfil a specification, elsewhere and in other colours wherever it leaves them free."""
    free = [(column, row) for column in range(CELLS) for row in range(CELLS)]
    rng.shuffle(free)
    shapes: list[Shape] = []
    for entry in wanted["include"]:
        for _ in range(entry["count"]):
            colour = entry.get("color") or rng.choice(list(COLOURS))
            cell = free.pop()
            if "position" in entry:
                step = STEPS[entry["position"][0]]
                base = tuple(
                    min(CELLS - 2, max(1, place)) for place in shapes[0].cell
                )  # the middle: room on all sides
                shapes[0] = _at(shapes[0], (base[0], base[1]))
                cell = (base[0] + step[0], base[1] + step[1])
            shapes.append(_at(Shape(entry["class"], colour, cell, rng.choice(SIZES)), cell, rng))
    return shapes


def _at(shape: Shape, cell: tuple[int, int], rng: random.Random | None = None) -> Shape:
    shift = shape.shift if rng is None else (rng.randint(-2, 2), rng.randint(-2, 2))
    return Shape(shape.name, shape.colour, cell, shape.size, shift)


def draw(shapes: Sequence[Shape]) -> Image.Image:
    """Draw the shapes: RGB, SIZE×SIZE."""
    picture = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, GREY)
    pen = ImageDraw.Draw(picture)
    for shape in shapes:
        left, top = (side * SUPERSAMPLING for side in shape.corner)
        third = shape.size * SUPERSAMPLING / 3
        right, bottom = left + 3 * third - 1, top + 3 * third - 1  # Pillow draws the last pixel, too
        fill = COLOURS[shape.colour]
        if shape.name == "circle":
            pen.ellipse((left, top, right, bottom), fill)
        elif shape.name == "triangle":
            pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill)
        elif shape.name == "cross":
            pen.rectangle((left + third, top, right - third, bottom), fill)
            pen.rectangle((left, top + third, right, bottom - third), fill)
        else:
            pen.rectangle((left, top, right, bottom), fill)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def shape_set(split: str, size: int | None = None, seed: int = 0) -> list[Prompt]:
    """Return `size` prompts (120 when None), the six tags in turn, with GenEval's columns.

    Raises ImageRLError for another split. Splits differ by their draws alone."""
    if split not in SPLITS:
        raise ImageRLError(f"tiny_shapes has no split {split!r}; use one of: {', '.join(SPLITS)}")
    prompts = []
    for index in range(120 if size is None else size):
        wanted = specification(
            random.Random(derive_seed("tiny_shapes", split, seed, index)), TAGS[index % len(TAGS)]
        )
        columns = {"tag": wanted["tag"], "include": wanted["include"], "exclude": wanted.get("exclude")}
        prompts.append(Prompt(index, wanted["prompt"], columns))
    return prompts


def truth(prompt: Prompt) -> Image.Image:
    """Draw a correct picture of a prompt of this world."""
    return draw(answer(random.Random(derive_seed("tiny_shapes truth", prompt.index)), prompt.columns))
