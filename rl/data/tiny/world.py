"""The tiny world: pictures of one coloured word on a coloured ground, and the captions that ask for them.

It is small enough to be learned on two CPU cores and real enough to be read by PaddleOCR. Words are 3 to 6
letters long, numbers 3 to 6 digits. Training and held-out texts are separated by a hash of the text, so no
run, of pretraining or of RL, ever draws a held-out text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Prompt

WIDTH, HEIGHT = 64, 32
FONTS = ("DejaVuSansMono-Bold.ttf", "DejaVuSansMono.ttf", "cmtt10.ttf")  # of matplotlib; all monospaced
INKS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "red": (200, 0, 0),
    "blue": (0, 0, 200),
    "green": (0, 110, 0),
    "purple": (110, 0, 140),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "yellow": (255, 235, 120),
    "cyan": (170, 235, 255),
    "pink": (255, 200, 220),
}
SPLITS = ("train", "heldout")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
HELDOUT_SHARE = 0.2
FONT_SIZE = 22  # pixels; shrunk until the text fits
MARGIN = 2  # pixels left free on either side
SUPERSAMPLING = 3  # drawn this much larger, then averaged down: smooth strokes at any font size


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of one picture."""

    text: str
    ink: str
    background: str
    font: str

    @property
    def caption(self) -> str:
        return f'a sign that says "{self.text}" in {self.ink} on a {self.background} background'

    def specification(self) -> dict[str, object]:
        """Return columns in GenEval's format (arXiv 2310.11513): one word in its ink, on its background."""
        word = {"class": "word", "count": 1, "color": self.ink}
        background = {"class": "background", "count": 1, "color": self.background}
        return {
            "tag": "color_attr",
            "include": [word, background],
            "exclude": [{"class": "word", "count": 2}],
        }

    def columns(self) -> dict[str, object]:
        """Return the prompt set's columns, all that rewards may know. The font is not asked for."""
        return {
            "target": self.text,
            "ink": self.ink,
            "background": self.background,
            "ink_rgb": list(INKS[self.ink]),
            "background_rgb": list(BACKGROUNDS[self.background]),
        }


@cache
def words() -> tuple[str, ...]:
    """Return the English words of the tiny world, upper case, sorted."""
    return tuple((files("imagerl.rl.data.tiny") / "words.txt").read_text(encoding="ascii").split())


def split_of(text: str) -> str:
    """Return the split a text belongs to, for ever and everywhere."""
    # By a hash and not by a list: a text that is made up later has its side, too.
    return "heldout" if derive_seed("tiny_world split", text) % 1000 < 1000 * HELDOUT_SHARE else "train"


@cache
def texts(split: str) -> tuple[str, ...]:
    """Return all words and as many numbers as a quarter of the words, of one split, in a fixed shuffled order."""
    if split not in SPLITS:
        raise ImageRLError(f"tiny_world has no split {split!r}; use one of: {', '.join(SPLITS)}")
    rng = random.Random(derive_seed("tiny_world numbers"))
    # Made before the split, by one seed, so that both splits see the same pool.
    numbers = ["".join(rng.choices(DIGITS, k=rng.randint(3, 6))) for _ in range(len(words()) // 4)]
    pool = [text for text in dict.fromkeys([*words(), *numbers]) if split_of(text) == split]
    rng.shuffle(pool)
    return tuple(pool)


def random_scene(rng: random.Random, text: str, fonts: Sequence[str] = FONTS) -> Scene:
    return Scene(text, rng.choice(list(INKS)), rng.choice(list(BACKGROUNDS)), rng.choice(fonts))


def prompt_set(split: str, size: int | None = None, seed: int = 0) -> list[Prompt]:
    """Return `size` prompts of a split (all texts when None), one text each, colours drawn from `seed`.

    Raises ImageRLError when the split has fewer texts than asked for."""
    pool = texts(split)
    if size is not None and size > len(pool):
        raise ImageRLError(f"tiny_world/{split} has {len(pool)} prompts, not {size}; lower data.*.size")
    prompts = []
    for index, text in enumerate(pool[:size]):
        scene = random_scene(random.Random(derive_seed("tiny_world scene", seed, index)), text)
        prompts.append(Prompt(index=index, text=scene.caption, columns=scene.columns()))
    return prompts


def truth(prompt: Prompt) -> Image.Image:
    """Draw a correct picture of a prompt of this world, in a font that depends on its index."""
    columns = prompt.columns
    font = FONTS[derive_seed("tiny_world truth", prompt.index) % len(FONTS)]
    return render(Scene(columns["target"], columns["ink"], columns["background"], font))


@cache
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load one of FONTS at a size in pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _fitting_font(text: str, name: str, width: int) -> ImageFont.FreeTypeFont:
    """Find the largest font up to FONT_SIZE in which the text leaves the margin free. Widths scale with size."""
    full = font_of(name, FONT_SIZE * SUPERSAMPLING)
    left, _, right, _ = full.getbbox(text)
    room = (width - 2 * MARGIN) * SUPERSAMPLING
    return font_of(name, int(FONT_SIZE * SUPERSAMPLING * min(1.0, room / (right - left))))


def render(scene: Scene, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Draw the picture of a scene: RGB, of a size in pixels, the text centred."""
    width, height = (side * SUPERSAMPLING for side in size)
    font = _fitting_font(scene.text, scene.font, size[0])
    left, top, right, bottom = font.getbbox(scene.text)
    picture = Image.new("RGB", (width, height), BACKGROUNDS[scene.background])
    corner = ((width - right - left) // 2, (height - bottom - top) // 2)
    ImageDraw.Draw(picture).text(corner, scene.text, font=font, fill=INKS[scene.ink])
    return picture.resize(size, Image.Resampling.BOX)
