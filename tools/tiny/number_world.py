"""The world of the small models of other families: numbers of three digits in one font, a part of them held out."""

from __future__ import annotations

import json
import random
from pathlib import Path

from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.data.tiny.world import FONTS, Scene, random_scene, split_of
from tools.tiny.render import write_folder, written

FONT = FONTS[0]


def numbers(split: str) -> list[str]:
    """Return the numbers of three digits of a split, shuffled."""
    found = [text for text in (f"{number:03d}" for number in range(1000)) if split_of(text) == split]
    random.Random(derive_seed("janus numbers")).shuffle(found)
    return found


def scenes(split: str, count: int, *seed: int) -> list[Scene]:
    """Draw scenes; the first have a number each, in order."""
    rng, pool = random.Random(derive_seed("janus scenes", split, *seed)), numbers(split)
    return [random_scene(rng, pool[place % len(pool)], [FONT]) for place in range(count)]


def write_world(folder: Path, size: tuple[int, int], count: int, seed: int) -> None:
    """Write `train` and `heldout` pictures of a width and height with captions, two of each held-out number, and the
    prompts of both splits."""
    for split, pictured in (("train", count), ("heldout", 2 * len(numbers("heldout")))):
        batch = scenes(split, pictured, seed)
        write_folder(folder / split, written(batch, size))
        rows = ({"prompt": scene.caption, **scene.columns()} for scene in batch)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
