"""The tiny world of shapes: up to four plain shapes on grey, asked for in GenEval's six kinds of prompts (arXiv
2310.11513) with its metadata, so that numbers, colours and places can be judged exactly.

A quarter of the prompts of each kind is held out, chosen by a hash: no run ever learns one, though it may learn the
same pair in the other order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import Any

from PIL import Image, ImageDraw

from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.data.tiny.world import HEIGHT, SPLITS, WIDTH
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Prompt

CELL = 16  # pixels a side; one shape at most in each
COLUMNS, ROWS = WIDTH // CELL, HEIGHT // CELL
SIZE = 12  # pixels a side, in the middle of its cell
SUPERSAMPLING = 4
GREY = (153, 153, 153)
SHAPES = ("square", "circle", "triangle", "cross")
COLOURS = {
    "red": (200, 0, 0),
    "yellow": (255, 235, 0),
    "green": (0, 110, 0),
    "blue": (0, 0, 200),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
# Where the second shape lies, by what the caption says of it: (columns, rows) from the first.
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
HELDOUT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    colour: str
    cell: tuple[int, int]  # column and row


def _metadata(tag: str, caption: str, *include: dict[str, Any]) -> dict[str, Any]:
    return {
        "tag": tag,
        "include": [{"count": 1} | entry for entry in include],
        "prompt": f"a photo of {caption}",
    }


def _all_metadata() -> Iterator[dict[str, Any]]:
    """Yield a line of GenEval's metadata for everything that can be asked for. As there, only a number is exact."""
    for name in SHAPES:
        yield _metadata("single_object", f"a {name}", {"class": name})
        for colour in COLOURS:
            yield _metadata("colors", f"a {colour} {name}", {"class": name, "color": colour})
        for count, colour in product(NUMBERS, ("", *COLOURS)):
            entry = {"class": name, "count": count} | ({"color": colour} if colour else {})
            words = f"{NUMBERS[count]} {colour} {name}{'es' if name == 'cross' else 's'}".replace("  ", " ")
            yield _metadata("counting", words, entry) | {"exclude": [{"class": name, "count": count + 1}]}
    for one, other in permutations(SHAPES, 2):
        yield _metadata("two_object", f"a {one} and a {other}", {"class": one}, {"class": other})
        for relation in STEPS:
            placed = {"class": other, "position": [relation, 0]}
            yield _metadata("position", f"a {other} {relation} a {one}", {"class": one}, placed)
        for first, second in permutations(COLOURS, 2):
            entries = {"class": one, "color": first}, {"class": other, "color": second}
            yield _metadata("color_attr", f"a {first} {one} and a {second} {other}", *entries)


@cache
def metadata(split: str) -> dict[str, list[dict[str, Any]]]:
    """Return GenEval's metadata of every prompt of a split, by tag, in a fixed shuffled order.

    Raises ImageRLError for another split."""
    if split not in SPLITS:
        raise ImageRLError(f"tiny_shapes has no split {split!r}; use one of: {', '.join(SPLITS)}")
    by_tag: dict[str, list[dict[str, Any]]] = {tag: [] for tag in TAGS}
    for line in sorted(_all_metadata(), key=lambda line: derive_seed("tiny_shapes split", line["prompt"])):
        by_tag[line["tag"]].append(line)
    for tag, lines in by_tag.items():  # a share of each tag, however few prompts it has
        held_out = round(len(lines) * HELDOUT_SHARE)
        by_tag[tag] = lines[:held_out] if split == "heldout" else lines[held_out:]
    return by_tag


def shape_set(split: str, size: int | None = None) -> list[Prompt]:
    """Return `size` prompts of a split with GenEval's columns: its tags in turn, so that all weigh the same, and each
    tag's prompts over and over, as GenEval draws every prompt four times. None: each prompt at least once."""
    by_tag = metadata(split)
    prompts = []
    for index in range(len(TAGS) * max(map(len, by_tag.values())) if size is None else size):
        lines = by_tag[TAGS[index % len(TAGS)]]
        line = lines[index // len(TAGS) % len(lines)]
        prompts.append(
            Prompt(index, line["prompt"], {key: line.get(key) for key in ("tag", "include", "exclude")})
        )
    return prompts


def answer(rng: random.Random, wanted: Mapping[str, Any]) -> list[Shape]:
    """Place shapes that fulfil a line of metadata, elsewhere and in other colours wherever it leaves them free."""
    cells = [*product(range(COLUMNS), range(ROWS))]
    rng.shuffle(cells)
    position = wanted["include"][-1].get("position")
    if position:
        step = STEPS[position[0]]
        pairs = [(cell, (cell[0] + step[0], cell[1] + step[1])) for cell in cells]
        cells = [*next(pair for pair in pairs if pair[1] in cells)]
    shapes: list[Shape] = []
    for entry in wanted["include"]:
        colour = entry.get("color") or rng.choice([*COLOURS])  # several of a kind look alike
        shapes += [Shape(entry["class"], colour, cells.pop(0)) for _ in range(entry["count"])]
    return shapes


@dataclass(frozen=True, slots=True)
class Drawing:
    """A caption of the training split and shapes that fulfil it."""

    caption: str
    shapes: tuple[Shape, ...]


def random_drawing(rng: random.Random) -> Drawing:
    """Draw a kind of prompt, one of its training prompts, and an answer to that."""
    wanted = rng.choice(metadata("train")[rng.choice(TAGS)])
    return Drawing(wanted["prompt"], tuple(answer(rng, wanted)))


def draw(shapes: Sequence[Shape]) -> Image.Image:
    """Draw the shapes: RGB, WIDTH×HEIGHT."""
    picture = Image.new("RGB", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING), GREY)
    pen = ImageDraw.Draw(picture)
    for shape in shapes:
        left, top = ((place * CELL + (CELL - SIZE) / 2) * SUPERSAMPLING for place in shape.cell)
        third = SIZE * SUPERSAMPLING / 3
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
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def truth(prompt: Prompt) -> Image.Image:
    """Draw a correct picture of a prompt of this world."""
    return draw(answer(random.Random(derive_seed("tiny_shapes truth", prompt.index)), prompt.columns))
