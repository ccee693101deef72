"""What `models/tiny_edit` and `models/tiny_shapes` must be able to do, on a few pictures that no run has drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.families import model_folder
from imagerl.rewards.colours import score_colours
from imagerl.rewards.composition.reward import CompositionReward
from imagerl.rl.config.recipe import load_yaml_recipe
from imagerl.rl.data.tiny.edits import edit_set, question_set
from imagerl.rl.data.tiny.shapes import shape_set
from imagerl.rl.rollout.engine import to_uint8
from imagerl.rl.types import Prompt, SamplingParams
from tests.models.helpers import load_policy
from tools.tiny.config import PretrainRecipe

FILES = ("README.md", "config.json", "model.safetensors", "pretraining.json", "tokenizer.json")
CASES = 12


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return load_policy("tiny_edit")[0]


def drawn_by(policy: ImagePolicy, prompts: list[Prompt], flow_steps: int = 2) -> np.ndarray:
    """One picture [H, W, 3] uint8 of each prompt."""
    numbers = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(prompts), policy.num_actions, generator=numbers, dtype=torch.float64)
    noise = torch.randn(len(prompts), *policy.latent_shape, generator=numbers)
    given = policy.encode(prompts)
    with torch.no_grad():
        drawn = policy.sample_tokens(given, uniforms, SamplingParams())
        return to_uint8(policy.decode(given, drawn, noise, SamplingParams(flow_steps=flow_steps)))


@pytest.mark.parametrize(("name", "most"), [("tiny_edit", 30e6), ("tiny_shapes", 10e6)])
def test_it_is_small_and_whole(name: str, most: float) -> None:
    folder = model_folder(name)
    assert folder.resolve() == Path(__file__).parents[3] / "models" / name
    assert all((folder / file).is_file() for file in FILES)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= most


def test_shapes_are_drawn_as_asked_for_by_the_recipe_that_ships() -> None:
    """A third of 528 were right when it was made; of 60, at least 8."""
    prompts = shape_set("heldout", 60)
    pictures = [Image.fromarray(picture) for picture in drawn_by(load_policy("tiny_shapes")[0], prompts, 4)]
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in ("include", "exclude", "tag")}
    rewards = CompositionReward("shapes")(images=pictures, **columns).rewards
    assert sum(map(float, rewards)) >= 8
    made = json.loads((model_folder("tiny_shapes") / "pretraining.json").read_text())["recipe"]
    shipped = load_yaml_recipe(PretrainRecipe, "tools/tiny/tiny_shapes_pretrain.yaml").model_dump(mode="json")
    assert {**made, "run": shipped["run"]} == shipped


def test_it_edits(policy: ImagePolicy) -> None:
    """Colours as told and as they were; 99 % are over many pictures."""
    prompts = edit_set("heldout", CASES)
    scores = [
        score_colours(picture, prompt.columns["ink_rgb"], prompt.columns["background_rgb"])
        for picture, prompt in zip(drawn_by(policy, prompts), prompts, strict=True)
    ]
    assert np.sum(scores) >= 2 * CASES - 1


def test_it_reads(policy: ImagePolicy) -> None:
    """92 % are right over many questions."""
    prompts = question_set("heldout", CASES)
    pictures = [prompt.columns["reference"] for prompt in prompts]
    answers = policy.answer(pictures, [prompt.text for prompt in prompts], 16)
    right = [answer == prompt.columns["answer"] for answer, prompt in zip(answers, prompts, strict=True)]
    assert sum(right) >= CASES - 3
