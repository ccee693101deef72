"""What `models/tiny_edit` must be able to do, on a few pictures that no run has drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.families import model_folder
from imagerl.rewards.colours import score_colours
from imagerl.rl.data.tiny.edits import edit_set, question_set
from imagerl.rl.rollout.engine import to_uint8
from imagerl.rl.types import Prompt, SamplingParams
from tests.models.helpers import load_policy

FILES = ("README.md", "config.json", "model.safetensors", "pretraining.json", "tokenizer.json")
CASES = 12


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return load_policy("tiny_edit")[0]


def edited(policy: ImagePolicy, prompts: list[Prompt]) -> np.ndarray:
    """One result [H, W, 3] uint8 of each prompt."""
    numbers = torch.Generator().manual_seed(0)
    uniforms = torch.rand(len(prompts), policy.num_actions, generator=numbers, dtype=torch.float64)
    noise = torch.randn(len(prompts), *policy.latent_shape, generator=numbers)
    given = policy.encode(prompts)
    with torch.no_grad():
        drawn = policy.sample_tokens(given, uniforms, SamplingParams())
        return to_uint8(policy.decode(given, drawn, noise, SamplingParams(flow_steps=2)))


def test_it_is_small_and_whole() -> None:
    folder = model_folder("tiny_edit")
    assert folder.resolve() == Path(__file__).parents[3] / "models" / "tiny_edit"
    assert all((folder / name).is_file() for name in FILES)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 30e6


def test_it_edits(policy: ImagePolicy) -> None:
    """Colours as told and as they were; 99 % are over many pictures."""
    prompts = edit_set("heldout", CASES)
    scores = [
        score_colours(picture, prompt.columns["ink_rgb"], prompt.columns["background_rgb"])
        for picture, prompt in zip(edited(policy, prompts), prompts, strict=True)
    ]
    assert np.sum(scores) >= 2 * CASES - 1


def test_it_reads(policy: ImagePolicy) -> None:
    """92 % are right over many questions."""
    prompts = question_set("heldout", CASES)
    pictures = [prompt.columns["reference"] for prompt in prompts]
    answers = policy.answer(pictures, [prompt.text for prompt in prompts], 16)
    right = [answer == prompt.columns["answer"] for answer, prompt in zip(answers, prompts, strict=True)]
    assert sum(right) >= CASES - 3
