"""Pictures of the tiny world to check rewards on: honest ones, ones with a fault, and ones made to cheat."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from rl.seeding import derive_seed
from rl.tiny_world import (
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
from rl.types import CheckPicture, Prompt

Draw = Callable[[Scene, random.Random], Image.Image]
PURE = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))


def check_pictures(count: int, seed: int = 0) -> list[CheckPicture]:
    """Every kind of picture for `count` held-out prompts; the pictures of a prompt stand together, the honest
    one first. The same for the same seed. Raises ImageRLError for more prompts than there are."""
    prompts = prompt_set("heldout", count, seed)
    pictures = []
    for index, prompt in enumerate(prompts):
        rng = random.Random(derive_seed("tiny_world check pictures", seed, index))
        scene = _scene(prompt)
        for kind, role, draw in KINDS:
            pictures.append(CheckPicture(kind, role, prompt, draw(scene, rng)))
        stranger = _scene(prompts[(index + 1) % count])
        if stranger.text != scene.text:
            pictures.append(CheckPicture("another prompt's picture", "other", prompt, render(stranger)))
    return pictures


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
    """Stripes of pure colours."""
    colours = np.array(PURE, dtype=np.uint8)[(np.arange(WIDTH) // 8 + rng.randrange(6)) % 6]
    return Image.fromarray(np.repeat(colours[None], HEIGHT, axis=0))


def _repeated(scene: Scene, rng: random.Random) -> Image.Image:
    return render(Scene(f"{scene.text} {scene.text}", scene.ink, scene.background, scene.font))


def _everywhere(scene: Scene, rng: random.Random) -> Image.Image:
    """The wanted text in rows over the whole picture, cut off at its rim."""
    return _written(scene, [f"{scene.text} " * 8] * 4, 8, 0)


def _corner(scene: Scene, rng: random.Random) -> Image.Image:
    """The prompt itself, small, instead of what it asks for."""
    return _written(scene, textwrap.wrap(scene.caption, 21), 5, 1)


def _written(scene: Scene, lines: Sequence[str], size: int, corner: int) -> Image.Image:
    """Lines of text of a size in pixels, from a corner at (corner, corner)."""
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
