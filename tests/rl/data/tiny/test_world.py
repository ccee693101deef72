from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from imagerl.rl.data.tiny.world import (
    BACKGROUNDS,
    FONTS,
    HEIGHT,
    INKS,
    MARGIN,
    WIDTH,
    Scene,
    prompt_set,
    random_scene,
    render,
    split_of,
    texts,
    words,
)
from imagerl.rl.errors import ImageRLError


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene)).astype(int)


def test_words_are_words() -> None:
    assert len(words()) > 3000
    assert list(words()) == sorted(set(words()))
    assert all(re.fullmatch("[A-Z]{3,6}", word) for word in words())


def test_splits_share_no_text_and_cover_all_words() -> None:
    train, heldout = set(texts("train")), set(texts("heldout"))
    assert not train & heldout
    assert set(words()) <= train | heldout
    assert 0.17 < len(heldout) / len(train | heldout) < 0.23
    assert len(texts("train")) == len(train) and len(texts("heldout")) == len(heldout)
    numbers = [text for text in train | heldout if not text.isalpha()]
    assert all(re.fullmatch("[0-9]{3,6}", text) for text in numbers)
    assert 0.15 < len(numbers) / len(words()) <= 0.25


def test_splits_are_the_same_for_ever() -> None:
    """Fixed values: a text that changed sides would leak into what earlier models were trained on."""
    assert all(split_of(text) == "train" for text in ("CAT", "DOG", "ZEBRA", "HOUSE", "123", "90210"))
    assert all(split_of(text) == "heldout" for text in ("QXZ", "APPLE", "ROT", "7225"))
    assert texts("heldout")[:4] == ("ROT", "7225", "SLICE", "TELL")
    assert prompt_set("heldout", 1)[0].text == 'a sign that says "ROT" in green on a yellow background'


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ImageRLError, match=r"no split 'test'; use one of: train, heldout"):
        texts("test")


def test_prompts_carry_what_rewards_may_know() -> None:
    for prompt in prompt_set("train", 50, seed=3):
        columns = prompt.columns
        wanted = f'a sign that says "{columns["target"]}" in {columns["ink"]} on a {columns["background"]} background'
        assert prompt.text == wanted
        assert columns["ink_rgb"] == list(INKS[str(columns["ink"])])
        assert columns["background_rgb"] == list(BACKGROUNDS[str(columns["background"])])
        assert set(columns) == {"target", "ink", "background", "ink_rgb", "background_rgb"}


def test_prompt_sets_are_prefixes_of_each_other_and_the_seed_recolours_them() -> None:
    small, large, other = prompt_set("train", 20), prompt_set("train", 40), prompt_set("train", 20, seed=1)
    assert small == large[:20] and [prompt.index for prompt in large] == list(range(40))
    assert [p.columns["target"] for p in small] == [p.columns["target"] for p in other]
    assert [p.columns["ink"] for p in small] != [p.columns["ink"] for p in other]
    everything = prompt_set("heldout")
    assert len(everything) == len(texts("heldout"))
    assert {p.columns["ink"] for p in everything} == set(INKS)
    assert {p.columns["background"] for p in everything} == set(BACKGROUNDS)


def test_rendering_is_repeatable_and_shows_every_part_of_a_scene() -> None:
    scene = Scene("ZEBRA", "red", "cyan", FONTS[0])
    assert render(scene).size == (WIDTH, HEIGHT) and render(scene).mode == "RGB"
    assert np.array_equal(pixels(scene), pixels(scene))
    others = [Scene("ZEBRO", "red", "cyan", FONTS[0]), Scene("ZEBRA", "blue", "cyan", FONTS[0])]
    others += [Scene("ZEBRA", "red", "pink", FONTS[0]), Scene("ZEBRA", "red", "cyan", FONTS[1])]
    assert not any(np.array_equal(pixels(scene), pixels(other)) for other in others)


@pytest.mark.parametrize("font", FONTS)
def test_text_fills_the_picture_but_not_its_margins(font: str) -> None:
    for text in ["WWWWWW", "QQQ", "JJJJJJ", "000000", "111", *texts("train")[:60]]:
        inked = (pixels(Scene(text, "black", "white", font)) < 250).any(2)
        rows, columns = inked.any(1).nonzero()[0], inked.any(0).nonzero()[0]
        assert columns[0] >= MARGIN - 1 and columns[-1] <= WIDTH - MARGIN, text
        assert rows[0] >= 2 and rows[-1] < HEIGHT - 2, text
        assert rows[-1] - rows[0] >= 8, text
        assert abs(columns[0] + columns[-1] - (WIDTH - 1)) <= 3, text  # in the middle
        assert abs(rows[0] + rows[-1] - (HEIGHT - 1)) <= 3, text


@pytest.mark.parametrize("ink", INKS)
def test_colours_are_those_asked_for(ink: str) -> None:
    for background, rgb in BACKGROUNDS.items():
        picture = pixels(Scene("HIM", ink, background, "DejaVuSansMono-Bold.ttf"))
        assert (picture[0] == rgb).all() and (picture[-1] == rgb).all() and (picture[:, 0] == rgb).all()
        assert (picture == INKS[ink]).all(2).sum() >= 10  # strokes are wide enough to be fully inked


def test_scenes_use_every_ink_background_and_font() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng, "CAT") for _ in range(300)]
    assert {scene.ink for scene in scenes} == set(INKS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.font for scene in scenes} == set(FONTS)
    assert {random_scene(rng, "CAT", FONTS[:1]).font for _ in range(20)} == {FONTS[0]}


def test_held_out_texts_are_as_near_to_training_texts_as_the_readme_says() -> None:
    train, heldout = texts("train"), texts("heldout")
    assert not set(train) & set(heldout)
    assert sum(any(text in other for other in train) for text in heldout) == 161
    readme = (Path(__file__).parents[4] / "models" / "tiny" / "README.md").read_text()
    assert f"161 of the {len(heldout)} stand within a training text" in readme
    assert "as ARROW does in NARROW" in readme and "ARROW" in heldout and "NARROW" in train
