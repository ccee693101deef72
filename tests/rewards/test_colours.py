"""The colour check on rendered words, sharp and blurred."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imagerl.rewards.colours import ColoursReward, estimate_background, nearness, score_colours
from imagerl.rl.data.tiny import world as tiny_world
from imagerl.rl.data.tiny.world import BACKGROUNDS, INKS, Scene
from imagerl.rl.types import ImageRLError

SCENES = [
    Scene(text, ink, background, font)
    for text, font in (("ILL", tiny_world.FONTS[2]), ("MOTHER", tiny_world.FONTS[0]))
    for ink in INKS
    for background in BACKGROUNDS
]


def picture(scene: Scene, blur: float) -> np.ndarray:
    return np.asarray(tiny_world.render(scene).filter(ImageFilter.GaussianBlur(blur)))


@pytest.mark.parametrize("blur", [0.0, 0.8])
def test_tells_every_pair_of_colours_apart(blur: float) -> None:
    for scene in SCENES:
        image = picture(scene, blur)
        for ink in INKS:
            for background in BACKGROUNDS:
                got = score_colours(image, INKS[ink], BACKGROUNDS[background])
                wanted = (float(ink == scene.ink), float(background == scene.background))
                assert got == wanted, (scene, ink, background)


def test_noise_does_not_matter_much() -> None:
    rng = np.random.default_rng(0)
    scene = random.Random(0).choice(SCENES)
    noisy = np.clip(picture(scene, 0.5) + rng.normal(0, 8, (32, 64, 3)), 0, 255).astype(np.uint8)
    assert score_colours(noisy, INKS[scene.ink], BACKGROUNDS[scene.background]) == (1.0, 1.0)


def test_blank_and_faint_pictures_have_no_ink() -> None:
    blank = np.full((32, 64, 3), 255, dtype=np.uint8)
    assert score_colours(blank, INKS["black"], BACKGROUNDS["white"]) == (0.0, 1.0)
    assert score_colours(blank, BACKGROUNDS["white"], BACKGROUNDS["white"]) == (0.0, 1.0)
    faint = np.asarray(Image.blend(Image.fromarray(blank), Image.fromarray(picture(SCENES[0], 0.0)), 0.3))
    assert score_colours(faint, INKS[SCENES[0].ink], BACKGROUNDS["white"])[0] == 0.0


def test_background_is_the_rim() -> None:
    image = np.zeros((32, 64, 3), dtype=np.uint8)
    image[:2], image[-2:], image[:, :2], image[:, -2:] = 90, 90, 90, 90
    assert estimate_background(image).tolist() == [90, 90, 90]


def test_reward_and_its_parts() -> None:
    scene = Scene("CAT", "red", "pink", tiny_world.FONTS[0])
    image = tiny_world.render(scene)
    output = ColoursReward()(
        images=[image] * 4,
        ink_rgb=[INKS["red"], INKS["blue"], INKS["red"], None],
        background_rgb=[BACKGROUNDS["pink"], BACKGROUNDS["pink"], BACKGROUNDS["white"], None],
        prompts=[""] * 4,
    )
    assert list(output.rewards) == [1.0, 0.0, 0.0, None]
    assert list(output.breakdown["ink"]) == [1.0, 0.0, 1.0, None]
    assert list(output.breakdown["background"]) == [1.0, 1.0, 0.0, None]
    with pytest.raises(ImageRLError, match="ink_rgb and background_rgb"):
        ColoursReward()(images=[image])


def test_nearness_by_hand() -> None:
    """Ink all of the way, half of it, at the ground; and a ground that is as far off as ink and ground are apart."""
    white, red, pink = (255.0, 255.0, 255.0), (255.0, 0.0, 0.0), (255.0, 102.0, 102.0)

    def card(ink: tuple[float, ...], ground: tuple[float, ...]) -> np.ndarray:
        image = np.full((32, 64, 3), ground, dtype=np.uint8)
        image[10:20, 20:40] = ink
        return image

    assert nearness(card(red, white), red, white) == 1.0
    assert nearness(card((255.0, 127.5, 127.5), white), red, white) == pytest.approx(0.5, abs=0.004)
    assert nearness(card(white, white), red, white) == nearness(card(white, red), red, white) == 0.0
    assert nearness(card(red, pink), red, white) == pytest.approx(1 * (1 - 153 / 255))
    picture = Image.fromarray(card((255.0, 200.0, 200.0), white))
    columns = {"images": [picture, picture], "ink_rgb": [red, None], "background_rgb": [white, white]}
    graded = ColoursReward(graded=True)(**columns)
    assert graded.rewards == [pytest.approx(55 / 255), None] and graded.breakdown["ink"] == [0.0, None]
    assert ColoursReward()(**columns).rewards == [0.0, None]
