"""Constructed edits: the right one earns most, the unchanged picture nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagerl.rewards.edit.success import EditReward, kept_fidelity
from imagerl.rl.data.tiny.edits import PARTS, edit_set
from imagerl.rl.data.tiny.world import Scene, render
from imagerl.rl.types import Prompt, RewardOutput

PROMPTS = edit_set("heldout", 6)


@pytest.fixture(scope="module")
def reward() -> EditReward:
    return EditReward(mode="recognise", models="offline")


def score(reward: EditReward, images: list[Image.Image], prompts: list[Prompt] = PROMPTS) -> RewardOutput:
    columns: dict[str, list[Any]] = {
        name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns
    }
    return reward(
        prompts=[p.text for p in prompts], completions=[[]] * len(prompts), images=images, **columns
    )


def test_the_perfect_edit_scores_one_in_everything(reward: EditReward) -> None:
    output = score(reward, [prompt.columns["ideal"] for prompt in PROMPTS])
    assert output.rewards == [1.0] * 6
    for name in ("success", "exact_match", "ink", "background"):
        assert output.breakdown[name] == [1.0] * 6
    alike = [value for value in output.breakdown["kept_similarity"] if value is not None]
    assert len(alike) >= 4 and alike == pytest.approx([1.0] * len(alike))
    assert output.breakdown["kept_error"] == [0.0] * 6
    for part in PARTS:
        wanted = [1.0 if prompt.columns["edited"] == part else None for prompt in PROMPTS]
        assert output.breakdown[f"success_{part}"] == wanted


def test_the_unchanged_source_fails_every_edit(reward: EditReward) -> None:
    output = score(reward, [prompt.columns["reference"] for prompt in PROMPTS])
    assert output.breakdown["success"] == [0.0] * 6
    for failing, part in (("exact_match", "text"), ("ink", "ink"), ("background", "background")):
        for prompt, value in zip(PROMPTS, output.breakdown[failing], strict=True):
            assert value == (0.0 if prompt.columns["edited"] == part else 1.0)
    assert output.breakdown["kept_error"] == [0.0] * 6  # nothing was touched
    colour_edits = [r for r, p in zip(output.rewards, PROMPTS, strict=True) if p.columns["edited"] != "text"]
    assert colour_edits == [0.0] * 4


def test_a_wrong_letter_costs_its_share_and_the_success(reward: EditReward) -> None:
    columns = PROMPTS[2].columns
    assert columns["target"] == "SLICE"
    scene = Scene("SLIDE", columns["ink"], columns["background"], "DejaVuSansMono-Bold.ttf")
    output = score(reward, [render(scene)], [PROMPTS[2]])
    assert output.rewards == [pytest.approx(0.8)] and output.breakdown["success"] == [0.0]


def test_fidelity_looks_only_where_nothing_had_to_change() -> None:
    columns = PROMPTS[1].columns  # of an ink: the ground stays
    reference, ideal = columns["reference"], columns["ideal"]
    pixels = np.asarray(ideal).copy()
    kept = (np.asarray(reference) == np.asarray(ideal)).all(-1)
    pixels[~kept] = 0
    error, likeness = kept_fidelity(pixels, reference, ideal)
    assert error == 0.0 and likeness == pytest.approx(1.0)
    pixels = np.asarray(ideal).copy()
    pixels[kept] = np.where(pixels[kept] > 100, pixels[kept] - 51, pixels[kept] + 51)
    error, likeness = kept_fidelity(pixels, reference, ideal)
    assert error == pytest.approx(0.2) and likeness is not None and likeness < 0.99


def test_fidelity_is_unknown_where_everything_had_to_change() -> None:
    black, white = (Image.new("RGB", (64, 32), colour) for colour in ("black", "white"))
    assert kept_fidelity(np.asarray(white), black, white) == (None, None)
