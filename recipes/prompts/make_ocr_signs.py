"""Write ocr_signs_train.jsonl and ocr_signs_heldout.jsonl: scenes that show a quoted text.

    python recipes/prompts/make_ocr_signs.py

The same seed gives the same files. No text stands in both."""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 20_240_601
SIZES = {"train": 400, "heldout": 100}

OPENINGS = (
    "A photo of {thing} that reads {text}, {where}.",
    "{where_first}, {thing} says {text}.",
    "{thing_first} with the words {text} on it, {where}.",
    "A close-up of {thing} with {text} written on it, {where}.",
    "An illustration of {thing} showing {text}, {where}.",
)
THINGS = (
    *("a wooden sign", "a neon sign", "a shop window", "a chalkboard", "a street sign", "a train ticket"),
    *("a coffee cup", "a book cover", "a birthday cake", "a T-shirt", "a road sign", "a paper note"),
    *("a poster", "a banner", "a mailbox", "a jar label", "a boat's bow", "a stone plaque", "a menu board"),
    *("a theatre ticket", "a cardboard box", "a suitcase tag", "a garden gate", "a lighthouse door"),
)
PLACES = (
    *("at the edge of a forest", "on a rainy evening", "in a quiet harbour", "beside a mountain road"),
    *("in soft morning light", "under a striped awning", "on a crowded market square", "in a dusty library"),
    *("on a snowy street", "next to a bicycle", "in a sunlit kitchen", "against a brick wall"),
    *("at a small railway station", "in front of a lake", "on a long wooden table", "in a greenhouse"),
)
FIRST = (
    *("Fresh", "Open", "Lost", "Quiet", "Golden", "Slow", "Second", "Winter", "Northern", "Paper", "Silver"),
    *("Lucky", "Hidden", "Salt", "Little", "Morning", "Wild", "Old", "Blue", "Last", "Green", "Night"),
)
SECOND = (
    *("Bread", "Garden", "Harbour", "Tickets", "Window", "Letters", "River", "Market", "Corner", "Museum"),
    *("Kitchen", "Lantern", "Bicycle", "Station", "Orchard", "Theatre", "Island", "Bridge", "Library", "Tea"),
)
ENDS = ("", "", "", "", "Daily", "& Co", "No 7", "Inside", "Today", "since 1931", "This Way", "24 Hours")


def texts(numbers: random.Random) -> list[str]:
    """All texts of one to four words, shuffled."""
    found = [*FIRST, *SECOND]
    found += [f"{first} {second} {end}".strip() for first in FIRST for second in SECOND for end in set(ENDS)]
    found = sorted(set(found))
    numbers.shuffle(found)
    return found


def prompt(text: str, numbers: random.Random) -> str:
    thing, where = numbers.choice(THINGS), numbers.choice(PLACES)
    return numbers.choice(OPENINGS).format(
        thing=thing,
        thing_first=thing[0].upper() + thing[1:],
        where=where,
        where_first=where[0].upper() + where[1:],
        text=f'"{text}"',
    )


def main() -> None:
    numbers = random.Random(SEED)
    pool = iter(texts(numbers))
    for split, size in SIZES.items():
        rows = [
            {"prompt": prompt(text, numbers), "target": text}
            for text, _ in zip(pool, range(size), strict=False)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(__file__).parent / f"ocr_signs_{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
