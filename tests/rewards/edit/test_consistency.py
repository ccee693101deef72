"""Constructed edits: copying the source earns nothing, repainting everything little, the right edit most, and a
better edit never less than a worse one."""

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imagerl.rewards.base import LoadedReward
from imagerl.rewards.check.checks import check
from imagerl.rewards.edit.consistency import (
    EditConsistencyReward,
    ink_similarity,
    progress,
    region_to_keep,
    stroke_similarity,
)
from imagerl.rl.data.tiny.edits import edits_of
from imagerl.rl.data.tiny.pictures import check_edits, repainted
from imagerl.rl.data.tiny.world import FONTS, Scene, render
from imagerl.rl.types import ImageRLError, Prompt

SOURCE = Scene("HOUSE", "black", "white", FONTS[0])
COLOURED = (("ink", "red"), ("ink", "blue"), ("background", "yellow"), ("background", "cyan"))
READ: list[int] = []


def count_ink(images: list[Any], target: list[str], **_: Any) -> list[float]:
    """Stands for OCR: the share of dark pixels, as far as it is that of the target drawn black on white."""
    READ.append(len(images))
    wanted = [render(replace(SOURCE, text=text)) for text in target]
    return [1 - min(1.0, 4 * abs(_dark(a) - _dark(b))) for a, b in zip(images, wanted, strict=True)]


def _dark(image: Any) -> float:
    return float((np.asarray(image.convert("L")) < 128).mean())


@pytest.fixture(scope="module")
def reward() -> EditConsistencyReward:
    return EditConsistencyReward(judges={"text": f"{__file__}:count_ink"})


def score(
    reward: EditConsistencyReward, image: Any, result: Scene, part: str, ideal: bool = False, **columns: Any
) -> dict[str, float]:
    given = {**result.columns(), **({"ideal": render(result)} if ideal else {}), **columns}
    output = reward(
        prompts=["edit"],
        images=[image],
        reference=[render(SOURCE)],
        edited=[part],
        completions=[[1]],
        **{name: [value] for name, value in given.items()},
    )
    parts = {name: values[0] for name, values in output.breakdown.items()}
    return {"reward": output.rewards[0], **parts}  # type: ignore[dict-item]


@pytest.mark.parametrize("ideal", [False, True])
@pytest.mark.parametrize(("part", "value"), COLOURED)
def test_what_edits_earn(reward: EditConsistencyReward, part: str, value: str, ideal: bool) -> None:
    result = replace(SOURCE, **{part: value})
    other = {"ink": "green", "background": "pink", "text": "CHAIR"}
    repainted = replace(SOURCE, **other | {part: value})
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))

    def earned(image: Any) -> float:
        return score(reward, image, result, part, ideal)["reward"]

    right = earned(render(result))
    assert right > 0.9
    assert earned(render(SOURCE)) == 0.0  # copying is doing nothing
    assert earned(render(repainted)) < 0.1
    assert earned(Image.new("RGB", (64, 32), "white")) < 0.01
    assert earned(noise) < 0.1
    assert earned(render(replace(result, text="CHAIR"))) < 0.5  # the colour is right and the word is gone
    assert earned(render(result).filter(ImageFilter.GaussianBlur(0.7))) < right


@pytest.mark.parametrize("ideal", [False, True])
def test_repainting_earns_little_and_less_of_it_more(reward: EditConsistencyReward, ideal: bool) -> None:
    """Held-out edits of every font and colour: what was asked for on a new picture, the right edit, and mixtures."""
    steps = np.linspace(0, 1, 5)
    for index, edit in enumerate(edits_of("heldout", 36)):
        prompt = Prompt(index, edit.instruction, edit.columns())
        new, right = repainted(edit.source, edit.result, random.Random(index)), render(edit.result)
        pictures = [Image.blend(new, right, t) for t in steps]
        columns = {
            name: [value] * len(steps) for name, value in prompt.columns.items() if ideal or name != "ideal"
        }
        output = reward(prompts=[prompt.text] * len(steps), images=pictures, **columns)
        kept = np.array(output.breakdown["kept"], dtype=float)
        assert kept[0] < 0.12 and kept[-1] > 0.7, (edit, kept)
        assert (np.diff(kept) > -0.02).all(), (edit, kept)
        assert output.rewards[0] < 0.12  # type: ignore[operator]


def test_strokes_and_inks_by_hand() -> None:
    source = np.full((8, 16, 3), 255.0)
    source[2:6, 2:6] = 0.0
    other_ground, other_ink, elsewhere = source.copy(), source.copy(), np.full((8, 16, 3), 255.0)
    other_ground[source == 255] = 200.0
    other_ink[2:6, 2:6] = (200, 0, 0)
    elsewhere[2:6, 10:14] = 0.0
    faint = 255 - (255 - source) * 0.25
    assert stroke_similarity(other_ground, source) == pytest.approx(1.0)
    assert stroke_similarity(other_ink, source) == pytest.approx(1.0)
    assert stroke_similarity(elsewhere, source) == 0.0
    assert ink_similarity(other_ground, source) == ink_similarity(elsewhere, source) == 1.0
    assert ink_similarity(faint, source) == pytest.approx(0.25 / 0.5)  # half of the way that counts as all
    assert ink_similarity(other_ink, source) == 0.0
    assert ink_similarity(np.full_like(source, 255.0), source) == 0.0  # no ink at all
    near = source.copy()
    near[2:6, 2:6] = (40, 0, 0)  # across the line from white to black: 40·√(2/3) = 32.66
    assert ink_similarity(near, source) == pytest.approx(1 - 32.66 / 80, abs=1e-3)


@pytest.mark.parametrize(("part", "value"), COLOURED)
def test_half_an_edit_earns_half(reward: EditConsistencyReward, part: str, value: str) -> None:
    result = replace(SOURCE, **{part: value})
    steps = np.linspace(0, 1, 6)
    earned = [
        score(reward, Image.blend(render(SOURCE), render(result), t), result, part)["reward"] for t in steps
    ]
    assert all(b > a + 0.1 for a, b in itertools.pairwise(earned))
    assert earned == pytest.approx(steps, abs=0.11)


@pytest.mark.parametrize(("part", "value"), [*COLOURED, ("text", "CAT")])
def test_more_damage_earns_less(reward: EditConsistencyReward, part: str, value: str) -> None:
    """A growing bar over what should have stayed."""
    result = replace(SOURCE, **{part: value})
    earned = []
    for width in (0, 8, 16, 32, 64):
        image = render(result)
        bar = (width, 32 if part == "background" else 6)
        image.paste((0, 160, 90), (0, 0, *bar))
        earned.append(score(reward, image, result, part, ideal=True)["kept"])
    assert all(b < a or a == b == 0 for a, b in itertools.pairwise(earned))
    assert earned[0] > 0.9 and earned[-1] < 0.5


def test_text_edits_keep_the_ink(reward: EditConsistencyReward) -> None:
    result = replace(SOURCE, text="CAT")
    right = score(reward, render(result), result, "text")
    assert right["done"] == right["inside"] == 1.0 and right["reward"] > 0.9
    assert score(reward, render(replace(result, ink="red")), result, "text")["inside"] == 0.0
    assert score(reward, render(SOURCE), result, "text")["reward"] == 0.0
    assert score(reward, render(replace(result, background="pink")), result, "text")["reward"] < 0.2


def test_progress_by_hand() -> None:
    assert progress(0.8, 0.6) == pytest.approx(0.5)
    assert progress(0.6, 0.6) == progress(0.2, 0.6) == 0.0
    assert progress(1.0, 0.0) == 1.0
    assert progress(0.7, 1.0) == 0.7  # nothing to do, so only to keep


def test_regions_by_hand() -> None:
    source = np.full((6, 20, 3), 255.0)
    source[2:4, 5:10] = 0.0  # a bar of ink
    everything = np.ones((6, 20))
    ideal = source.copy()
    ideal[2:4, 5:10] = (200, 0, 0)
    grown = everything.copy()
    grown[1:5, 4:11] = 0.0
    np.testing.assert_array_equal(region_to_keep(source, None, None, ideal), grown)
    np.testing.assert_array_equal(region_to_keep(source, "ink", None, None), grown)
    rows = everything.copy()
    rows[1:5] = 0.0
    np.testing.assert_array_equal(region_to_keep(source, "text", None, None), rows)
    np.testing.assert_array_equal(
        region_to_keep(source, "background", None, None), (source[..., 0] == 0) * 1.0
    )
    np.testing.assert_array_equal(region_to_keep(source, "style", None, None), everything)
    np.testing.assert_array_equal(region_to_keep(source, "ink", 1 - grown, ideal), grown)  # a given mask wins


def test_a_given_mask(reward: EditConsistencyReward) -> None:
    result = replace(SOURCE, ink="red")
    image = render(result)
    image.paste("green", (0, 0, 64, 4))
    free, bound = (
        score(reward, image, result, "ink", mask=Image.fromarray(_rows(first, 28))) for first in (0, 4)
    )
    assert free["colour"] > 0.99 and bound["colour"] < 0.5


def _rows(first: int, last: int) -> np.ndarray:
    mask = np.zeros((32, 64), np.uint8)
    mask[first:last] = 255
    return mask


def test_features_of_ones_own(tmp_path: Any) -> None:
    (tmp_path / "mean.py").write_text(
        "import numpy as np\n"
        "def colours(pictures):\n"
        "    return [np.asarray(p, float).reshape(1, -1, 3).mean(1, keepdims=True) for p in pictures]\n"
    )
    mine = EditConsistencyReward(features=f"{tmp_path}/mean.py:colours")
    result = replace(SOURCE, background="yellow")
    a, b = (np.asarray(render(s), float).reshape(-1, 3).mean(0) for s in (result, SOURCE))
    told = score(mine, render(result), result, "background")["features"]
    assert told == pytest.approx(2 * (a @ b) / (a @ a + b @ b), abs=1e-6)


def test_a_source_is_judged_once_for_its_group(reward: EditConsistencyReward) -> None:
    READ.clear()
    result = replace(SOURCE, text="CAT")
    source = render(SOURCE)
    output = reward(
        prompts=["edit"] * 4,
        images=[render(result)] * 4,
        reference=[source] * 4,
        edited=["text"] * 4,
        completions=[[i] for i in range(4)],
        target=["CAT"] * 4,
    )
    judge = reward._loaded[reward.judges["text"]]
    assert judge._function.__module__ != __name__  # loaded from the file, with a counter of its own
    counter = judge._function.__globals__["READ"]
    assert counter[-1] == 5  # four pictures and one source
    assert len(set(output.rewards)) == 1


def test_what_does_not_apply_is_none(reward: EditConsistencyReward) -> None:
    source, result = render(SOURCE), replace(SOURCE, ink="red")
    output = reward(
        prompts=["a", "b", "c"],
        images=[render(result)] * 3,
        reference=[None, source, source],
        edited=["ink", None, "ink"],
        ink_rgb=[[200, 0, 0], [200, 0, 0], None],
    )
    assert list(output.rewards) == [None, None, None]
    assert output.reason == "a sample has no reference or says not what is edited"


def test_mistakes_are_one_line(reward: EditConsistencyReward) -> None:
    image = render(SOURCE)
    with pytest.raises(ImageRLError, match="needs the columns reference and edited"):
        reward(prompts=["a"], images=[image])
    with pytest.raises(ImageRLError, match="no judge for edited='style', only for text, ink, background"):
        reward(prompts=["a"], images=[image], reference=[image], edited=["style"])
    with pytest.raises(ImageRLError, match="needs the column ink_rgb for edited='ink'"):
        reward(prompts=["a"], images=[image], reference=[image], edited=["ink"])
    for settings in ({"judges": {"style": "clop"}}, {"keepers": {"ink": "clop"}}):
        with pytest.raises(ImageRLError, match="no reward is named 'clop'"):
            EditConsistencyReward(**settings)
    for factors in ([], ["done", "copied"]):
        with pytest.raises(ImageRLError, match="factors are done and kept"):
            EditConsistencyReward(factors=factors)
    with pytest.raises(ImageRLError, match="does not exist"):
        EditConsistencyReward(features="nowhere.py:features")


def test_keepers_say_what_else_must_stay() -> None:
    """The word under a new ink: its strokes alone leave another word too much."""
    judge = f"{__file__}:count_ink"
    reward = EditConsistencyReward(judges={"text": judge}, keepers={"background": judge})
    result = replace(SOURCE, background="yellow")
    other = replace(result, text="I")
    plain = score(EditConsistencyReward(judges={"text": judge}), render(other), result, "background")
    kept = score(reward, render(other), result, "background")
    wanted = count_ink([render(other)], [SOURCE.text])[0]
    assert kept["judged"] == wanted < 1.0
    assert kept["kept"] == pytest.approx(plain["kept"] * wanted)
    assert kept["reward"] == pytest.approx(kept["done"] * kept["kept"])
    assert plain["judged"] is None
    right = score(reward, render(result), result, "background")
    assert right["judged"] > 0.95 and right["reward"] > 0.85


@pytest.mark.parametrize("factor", ["done", "kept"])
def test_one_factor_alone_is_an_ablation(factor: str) -> None:
    reward, result = EditConsistencyReward(factors=[factor]), replace(SOURCE, ink="red")
    for image in (render(SOURCE), render(result), Image.new("RGB", (64, 32), "white")):
        found = score(reward, image, result, "ink")
        assert found["reward"] == found[factor]
    assert score(reward, render(SOURCE), result, "ink")["reward"] == (0.0 if factor == "done" else 1.0)


def test_another_size_is_scaled(reward: EditConsistencyReward) -> None:
    result = replace(SOURCE, background="yellow")
    large = render(result).resize((128, 64), Image.Resampling.NEAREST)
    assert score(reward, large, result, "background")["reward"] > 0.9


def test_it_passes_its_own_check() -> None:
    """With the judge of colours for all three, so that no OCR is loaded."""
    pictures = [picture for picture in check_edits(6) if picture.prompt.columns["edited"] != "text"]
    report = check(LoadedReward("edit_consistency", EditConsistencyReward()), pictures)
    assert not report.failed, report.failed
    rows = {row.kind: row for row in report.kinds}
    assert rows["source copied"].mean == 0.0
    assert rows["all repainted"].mean < 0.2 < 0.9 < rows["honest"].mean
