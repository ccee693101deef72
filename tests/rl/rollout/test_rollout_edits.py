"""Rollouts of edits: the picture of each prompt reaches both halves, whatever shares the batch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.data.tiny.edits import edit_set
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.errors import ImageRLError
from imagerl.rl.rollout.engine import RolloutEngine, reward_request
from imagerl.rl.types import Prompt, RolloutGroup, SamplingParams
from tests.models.helpers import edit_policy

PROMPTS = edit_set("train", 4)  # instructions of different lengths
GROUP = 2


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return edit_policy()[0]


def draw(policy: ImagePolicy, prompts: list[Prompt], chunk: int | None = None) -> list[RolloutGroup]:
    engine = RolloutEngine(policy, SamplingParams(flow_steps=2), 0, nullcontext)
    return [group for part in engine.generate(prompts, GROUP, 5, chunk, chunk) for group in part]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_edits_drawn_together_are_as_drawn_in_parts(policy: ImagePolicy, chunk: int) -> None:
    whole, parts = draw(policy, PROMPTS), draw(policy, PROMPTS, chunk)
    assert [group.prompt for group in parts] == PROMPTS
    for one, two in zip(whole, parts, strict=True):
        assert torch.equal(one.tokens, two.tokens)
        assert abs(one.images.astype(int) - two.images).max() <= 1


def test_the_decoder_sees_the_picture_of_each_prompt(policy: ImagePolicy) -> None:
    """A part drawn from tokens that were sampled together still gets its own references."""
    engine = RolloutEngine(policy, SamplingParams(flow_steps=2), 0, nullcontext)
    whole = draw(policy, PROMPTS)
    parts = [group for part in engine.generate(PROMPTS, GROUP, 5, decode_chunk=1) for group in part]
    for one, two in zip(whole, parts, strict=True):
        assert abs(one.images.astype(int) - two.images).max() <= 1


def test_another_picture_gives_another_edit(policy: ImagePolicy) -> None:
    columns = PROMPTS[0].columns
    other = replace(PROMPTS[0], columns={**columns, "reference": PROMPTS[1].reference})
    (one,), (two,) = draw(policy, PROMPTS[:1]), draw(policy, [other])
    assert not torch.equal(one.rollout_logprobs, two.rollout_logprobs)
    assert not np.array_equal(one.images, two.images)


def test_prompts_are_encoded_with_their_pictures(policy: ImagePolicy) -> None:
    encoded = policy.encode(PROMPTS)
    tokens, latents = policy.reference_of([prompt.columns["reference"] for prompt in PROMPTS])
    ids, mask = policy.encode_prompts([prompt.text for prompt in PROMPTS], tokens)
    assert torch.equal(encoded["ids"], ids) and torch.equal(encoded["mask"], mask)
    assert torch.equal(encoded["reference"], latents)
    assert policy.encode(prompt_set("train", 2)).keys() == {"ids", "mask"}


def test_captions_and_edits_do_not_mix(policy: ImagePolicy) -> None:
    with pytest.raises(ImageRLError, match="1 of 2 prompts have a picture to edit"):
        policy.encode([PROMPTS[0], *prompt_set("train", 1)])


def test_rewards_see_the_reference(policy: ImagePolicy) -> None:
    request = reward_request(draw(policy, PROMPTS))
    assert request.columns["reference"] == [p.reference for p in PROMPTS for _ in range(GROUP)]
