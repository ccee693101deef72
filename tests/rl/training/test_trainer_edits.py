"""Training on edits: everything that scores tokens sees the picture that they were drawn for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.data.seeding import GroupedSampler
from imagerl.rl.data.tiny.edits import edit_set
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.evaluation.kept_pictures import with_sources
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import Prompt, SamplingParams
from tests.models.helpers import edit_policy, random_tokens
from tests.small_run import small_trainer

EDITS = edit_set("train", 8)


def likeness(images: list[Any], ideal: list[Any], **_: Any) -> list[float]:
    return [
        -float(np.abs(np.asarray(a, dtype=float) - np.asarray(b)).mean() / 255)
        for a, b in zip(images, ideal, strict=True)
    ]


def edit_trainer(*overrides: str) -> Trainer:
    policy, _ = edit_policy()
    policy.trainable.requires_grad_(True)
    trainer = small_trainer("algorithm.kl_coef=0.01", *overrides, policy=policy, likeness=likeness)
    trainer.sampler = GroupedSampler(EDITS, 2, 0)
    return trainer


@pytest.mark.parametrize("size", [8, 4, 2])  # microbatches of whole groups, of one, and of less
def test_the_first_step_is_on_policy_and_the_second_is_not(size: int) -> None:
    """Sampler, trainer and reference agree on every token of every edit; then the policy leaves the reference."""
    trainer = edit_trainer(f"engine.micro_batch_size={size}")
    first, second = trainer.step(0), trainer.step(1)
    assert first["rollout/logprob_diff_max"] < 1e-4
    assert abs(first["kl/k3"]) < 1e-6 < second["kl/k3"]
    assert first["reward/likeness/std"] > 0 and first["grad_norm"] > 0
    assert second["rollout/logprob_diff_max"] < 1e-4


def scores(policy: ImagePolicy, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    given = policy.encode(prompts, to_draw=False)
    assert given.keys() == {"ids", "mask"}
    tokens = random_tokens(policy, len(prompts))
    with torch.no_grad():
        own = policy.trainable(given, tokens, SamplingParams()).logprobs
    return own, policy.reference_scores(given, tokens, SamplingParams()).logprobs


def test_the_reference_sees_the_picture() -> None:
    policy, _ = edit_policy()
    policy.freeze_reference()
    own, frozen = scores(policy, EDITS)
    assert torch.allclose(own, frozen, atol=1e-6)
    others = [
        replace(prompt, columns={**prompt.columns, "reference": other.columns["reference"]})
        for prompt, other in zip(EDITS, EDITS[1:] + EDITS[:1], strict=True)
    ]
    _, elsewhere = scores(policy, others)
    assert (frozen - elsewhere).abs().amax(dim=1).min() > 1e-3  # each of them


def test_grids_show_what_an_edit_starts_from() -> None:
    images = np.zeros((2, 16, 32, 3), dtype=np.uint8)
    shown, captions = with_sources(images, EDITS[:2])
    assert captions == ["to edit", EDITS[0].text, "to edit", EDITS[1].text]
    assert {picture.shape for picture in shown} == {(16, 32, 3)} and shown[0].any() and not shown[1].any()
    assert with_sources(images, prompt_set("train", 2))[1] == [p.text for p in prompt_set("train", 2)]
