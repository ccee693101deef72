"""Draws docs/editing.png from pictures of the first held-out edits, before and after training:

imagerl export runs/edits/seed-1 runs/edit_export
imagerl eval --suite edit --n 12 --pictures runs/edits_before
imagerl eval --suite edit --n 12 --model runs/edit_export --pictures runs/edits_after
python docs/make_editing.py runs/edits_before runs/edits_after"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from imagerl.rl.data.tiny.edits import Edit, edits_of
from imagerl.rl.data.tiny.world import render

PICTURE = Path(__file__).with_name("editing.png")
EDITS, COLUMNS = 12, 2  # of edits; each shows four pictures
SCALE, GAP, TITLE = 2, 8, 18


def row(index: int, edit: Edit, folders: list[Path]) -> list[Image.Image]:
    drawn = [Image.open(folder / f"{index:05d}_00.png").convert("RGB") for folder in folders]
    return [render(edit.source), *drawn, render(edit.result)]


def sheet(folders: list[Path]) -> Image.Image:
    rows = [(edit, row(index, edit, folders)) for index, edit in enumerate(edits_of("heldout", EDITS))]
    width, height = (SCALE * side + GAP for side in rows[0][1][0].size)
    block, line = 4 * width + GAP, height + TITLE
    picture = Image.new("RGB", (COLUMNS * block + GAP, TITLE + EDITS // COLUMNS * line), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for column in range(COLUMNS):
        for place, title in enumerate(("to edit", "the shipped model", "after RL", "perfect")):
            draw.text((GAP + column * block + place * width, 4), title, fill="#676c75", font=font)
    for number, (edit, pictures) in enumerate(rows):
        left, top = GAP + number % COLUMNS * block, TITLE + number // COLUMNS * line
        for place, one in enumerate(pictures):
            enlarged = one.resize((SCALE * one.width, SCALE * one.height), Image.Resampling.NEAREST)
            picture.paste(enlarged, (left + place * width, top + 4))
        draw.text((left, top + height - 4), edit.instruction, fill="black", font=font)
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(
            "usage: python docs/make_editing.py BEFORE AFTER, folders of `imagerl eval --suite edit --pictures`"
        )
    sheet([Path(folder) for folder in sys.argv[1:]]).save(PICTURE)
    print(PICTURE)
