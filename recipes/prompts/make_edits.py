"""Write edits_train.jsonl, edits_heldout.jsonl and edits/: rendered shop signs, and what to change on them.

    python recipes/prompts/make_edits.py

An example of the layout, to be replaced by photographs and instructions of your own. The same seed gives the same
files. A row has `prompt` and `reference`, and what the rewards need: `edited`, `target`, `ink_rgb`, `background_rgb`.
No text stands in both files."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SEED = 20_240_602
SIZES = {"train": 32, "heldout": 16}
SIDE = 512  # pixels
TEXTS = (
    *("BREAD", "GARDEN", "HARBOUR", "TICKETS", "LETTERS", "RIVER", "MARKET", "MUSEUM", "KITCHEN", "LANTERN"),
    *("BICYCLE", "STATION", "ORCHARD", "THEATRE", "ISLAND", "BRIDGE", "LIBRARY", "FLOWERS", "COFFEE", "TOYS"),
    *("BOOKS", "SHOES", "HONEY", "CANDLES", "PAPER", "MUSIC", "CHEESE", "PLANTS", "CLOCKS", "HATS", "SPICES"),
    *("WOOL", "GLASS", "PEARS", "SOAP", "BUTTONS", "MAPS", "KITES", "TEA", "ROPES", "SAILS", "BELLS", "FISH"),
    *("APPLES", "PENS", "DRUMS", "SILK", "LAMPS"),
)
INKS = {"black": (0, 0, 0), "red": (200, 0, 0), "blue": (0, 0, 200), "green": (0, 110, 0)}
GROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 235, 120),
    "cyan": (170, 235, 255),
    "pink": (255, 200, 220),
}
PARTS = ("text", "ink", "background")


def draw(text: str, ink: str, ground: str) -> Image.Image:
    """A board with one word in its middle."""
    picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground])
    font = ImageFont.load_default(min(110, 1.4 * SIDE / len(text)))
    ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), text, INKS[ink], font, anchor="mm")
    return picture


def row(
    name: str, part: str, shown: str, new: str, numbers: random.Random, folder: Path
) -> dict[str, object]:
    """One edit; its picture is written into `folder`/edits."""
    scene = {
        "text": shown,
        "ink": numbers.choice(list(INKS)),
        "background": numbers.choice(list(GROUNDS)),
    }
    draw(scene["text"], scene["ink"], scene["background"]).quantize(32).save(
        folder / "edits" / f"{name}.png", optimize=True
    )
    others = {"text": [new], "ink": list(INKS), "background": list(GROUNDS)}[part]
    value = numbers.choice([other for other in others if other != scene[part]])
    instruction = {
        "text": f'Replace the word on the sign with "{value}"',
        "ink": f"Change the colour of the letters to {value}",
        "background": f"Paint the board {value}",
    }[part]
    result = scene | {part: value}
    return {
        "prompt": instruction,
        "reference": f"edits/{name}.png",
        "edited": part,
        "target": result["text"],
        "ink_rgb": INKS[result["ink"]],
        "background_rgb": GROUNDS[result["background"]],
    }


def main() -> None:
    numbers, folder = random.Random(SEED), Path(__file__).parent
    (folder / "edits").mkdir(exist_ok=True)
    texts = list(TEXTS)
    numbers.shuffle(texts)
    start = 0
    for split, size in SIZES.items():
        own = texts[start : start + size]
        start += size
        # a picture shows the word that another row asks for, so that no split shows the other's words
        rows = [
            row(f"{split}_{i:02d}", PARTS[i % 3], own[i - 1] if i % 3 == 0 else text, text, numbers, folder)
            for i, text in enumerate(own)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"edits_{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
