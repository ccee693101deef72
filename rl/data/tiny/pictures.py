"""Pictures of the tiny world to check rewards on: honest ones, ones with a fault, and ones made to cheat."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.data.tiny.edits import edit_set, edits_of
from imagerl.rl.data.tiny.world import (
    BACKGROUNDS,
    FONTS,
    HEIGHT,
    INKS,
    LETTERS,
    SUPERSAMPLING,
    WIDTH,
    Scene,
    font_of,
    prompt_set,
    render,
)
from imagerl.rl.types import CheckPicture, Prompt

Draw = Callable[[Scene, random.Random], Image.Image]
PURE = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))


def check_pictures(count: int, seed: int = 0) -> list[CheckPicture]:
    """Draw every kind of picture for `count` held-out prompts; those of a prompt stand together, the honest
    one first. The same for the same seed. Raises ImageRLError for more prompts than there are."""
    prompts = prompt_set("heldout", count, seed)
    pictures = []
    for index, prompt in enumerate(prompts):
        prompt = replace(prompt, columns={**prompt.columns, **_scene(prompt).specification()})
        rng = random.Random(derive_seed("tiny_world check pictures", seed, index))
        scene = _scene(prompt)
        for kind, role, draw in KINDS:
            pictures.append(CheckPicture(kind, role, prompt, draw(scene, rng)))
        stranger = _scene(prompts[(index + 1) % count])
        # With a single prompt the next one is the same, and its picture an honest one.
        if stranger.text != scene.text:
            pictures.append(CheckPicture("another prompt's picture", "other", prompt, render(stranger)))
    return pictures


def check_edits(count: int, seed: int = 0) -> list[CheckPicture]:
    """Draw them for `count` edits of text, ink and background in turn, with the columns `reference` (the picture to
    edit), `ideal` and `edited` beside those of the result."""
    edits, pictures = edits_of("heldout", count, seed), []
    for index, (prompt, edit) in enumerate(zip(edit_set("heldout", count, seed), edits, strict=True)):
        rng = random.Random(derive_seed("tiny_world check edits", seed, index))
        for kind, role, draw in EDIT_KINDS:
            pictures.append(CheckPicture(kind, role, prompt, draw(edit.source, edit.result, rng)))
        stranger = render(edits[(index + 1) % count].result)
        pictures.append(CheckPicture("another edit's result", "other", prompt, stranger))
    return pictures


def repainted(source: Scene, result: Scene, rng: random.Random) -> Image.Image:
    """Draw what was asked for on a picture that is otherwise new."""
    fresh = {
        "text": "".join(rng.choices(LETTERS, k=5)),
        "ink": _another(list(INKS), result.ink, rng),
        "background": _another(list(BACKGROUNDS), result.background, rng),
    }
    kept = next(name for name in fresh if getattr(source, name) != getattr(result, name))
    return render(replace(result, **{name: value for name, value in fresh.items() if name != kept}))


def _scene(prompt: Prompt) -> Scene:
    columns = prompt.columns
    return Scene(columns["target"], columns["ink"], columns["background"], FONTS[0])


def _another(of: Sequence[str], but: str, rng: random.Random) -> str:
    return rng.choice([name for name in of if name != but])


def _honest(scene: Scene, rng: random.Random) -> Image.Image:
    return render(scene)


def _wrong_letter(scene: Scene, rng: random.Random) -> Image.Image:
    place = rng.randrange(len(scene.text))
    letter = _another(LETTERS, scene.text[place], rng)
    text = scene.text[:place] + letter + scene.text[place + 1 :]
    return render(Scene(text, scene.ink, scene.background, scene.font))


def _wrong_ink(scene: Scene, rng: random.Random) -> Image.Image:
    return render(Scene(scene.text, _another(list(INKS), scene.ink, rng), scene.background, scene.font))


def _blurred(scene: Scene, rng: random.Random) -> Image.Image:
    return render(scene).filter(ImageFilter.GaussianBlur(2.0))


def _faint(scene: Scene, rng: random.Random) -> Image.Image:
    return Image.blend(_blank(scene, rng), render(scene), 0.25)


def _blank(scene: Scene, rng: random.Random) -> Image.Image:
    return Image.new("RGB", (WIDTH, HEIGHT), BACKGROUNDS[scene.background])


def _noise(scene: Scene, rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (WIDTH, HEIGHT), rng.randbytes(WIDTH * HEIGHT * 3))


def _saturated(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw stripes of pure colours."""
    colours = np.array(PURE, dtype=np.uint8)[(np.arange(WIDTH) // 8 + rng.randrange(6)) % 6]
    return Image.fromarray(np.repeat(colours[None], HEIGHT, axis=0))


def _repeated(scene: Scene, rng: random.Random) -> Image.Image:
    return render(Scene(f"{scene.text} {scene.text}", scene.ink, scene.background, scene.font))


def _everywhere(scene: Scene, rng: random.Random) -> Image.Image:
    """Write the wanted text in rows over the whole picture, cut off at its rim."""
    return _written(scene, [f"{scene.text} " * 8] * 4, 8, 0)


def _corner(scene: Scene, rng: random.Random) -> Image.Image:
    """Write the prompt itself, small, instead of what it asks for."""
    return _written(scene, textwrap.wrap(scene.caption, 21), 5, 1)


def _written(scene: Scene, lines: Sequence[str], size: int, corner: int) -> Image.Image:
    """Write lines of text of a size in pixels, from a corner at (corner, corner)."""
    picture = Image.new("RGB", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING), BACKGROUNDS[scene.background])
    font = font_of(scene.font, size * SUPERSAMPLING)
    place = (corner * SUPERSAMPLING, corner * SUPERSAMPLING)
    ImageDraw.Draw(picture).multiline_text(place, "\n".join(lines), INKS[scene.ink], font, spacing=0)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


KINDS: tuple[tuple[str, str, Draw], ...] = (
    ("honest", "honest", _honest),
    ("one letter wrong", "graded", _wrong_letter),
    ("wrong ink", "graded", _wrong_ink),
    ("blurred", "graded", _blurred),
    ("faint", "graded", _faint),
    ("blank", "degenerate", _blank),
    ("noise", "degenerate", _noise),
    ("saturated", "degenerate", _saturated),
    ("text over everything", "hack", _everywhere),
    ("word repeated", "hack", _repeated),
    ("prompt in a corner", "hack", _corner),
)

DrawEdit = Callable[[Scene, Scene, random.Random], Image.Image]
EDIT_KINDS: tuple[tuple[str, str, DrawEdit], ...] = (
    ("honest", "honest", lambda source, result, rng: render(result)),
    ("half way", "graded", lambda source, result, rng: Image.blend(render(source), render(result), 0.5)),
    ("blurred", "graded", lambda source, result, rng: render(result).filter(ImageFilter.GaussianBlur(0.7))),
    ("source copied", "degenerate", lambda source, result, rng: render(source)),
    ("blank", "degenerate", lambda source, result, rng: _blank(result, rng)),
    ("noise", "degenerate", lambda source, result, rng: _noise(result, rng)),
    ("saturated", "degenerate", lambda source, result, rng: _saturated(result, rng)),
    ("all repainted", "hack", repainted),
    ("text over everything", "hack", lambda source, result, rng: _everywhere(result, rng)),
    ("word repeated", "hack", lambda source, result, rng: _repeated(result, rng)),
    ("caption in a corner", "hack", lambda source, result, rng: _corner(result, rng)),
)
