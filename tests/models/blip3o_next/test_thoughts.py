"""Text before the image tokens: drawn as it is scored, whatever its length and padding, and trained with them."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.evaluate import kl_to_reference
from imagerl.rl.files.metrics import is_timing
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.rollout.preparing import refuse_impossible
from imagerl.rl.types import Prompt, Rows, SamplingParams, Thoughts, TokenTrajectory
from tests.models.helpers import lively_policy, uniforms
from tests.small_run import small_trainer

PROMPTS = [Prompt(0, "CAT"), Prompt(1, 'a sign that says "42" in red on a white background')]
GROUP, LONGEST = 3, 7
LENGTHS = [0, 3, LONGEST, 1, 6, 2]  # of thoughts, without the id that ends them; one is cut
SAMPLING = SamplingParams(temperature=0.8, thought_tokens=LONGEST)
LAST = 1 - 1e-12  # draws the last id that there is, the one that ends a thought


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return lively_policy()


def numbers(seed: int = 1) -> Tensor:
    """Uniforms of six thoughts, of LENGTHS."""
    drawn = torch.rand(6, LONGEST, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.9
    for row, length in enumerate(LENGTHS):
        drawn[row, length : length + 1] = LAST
    return drawn


def drawn(policy: ImagePolicy) -> tuple[Rows, Thoughts, TokenTrajectory]:
    encoded = policy.encode(PROMPTS)
    thoughts = policy.think(encoded, numbers(), SAMPLING)
    rows = policy.after_thoughts(encoded, thoughts)
    return rows, thoughts, policy.sample_tokens(rows, uniforms(policy, 6), SAMPLING)


def test_thoughts_end_where_they_say_or_are_cut(policy: ImagePolicy) -> None:
    _, thoughts, _ = drawn(policy)
    assert thoughts.action_mask.sum(1).tolist() == [1, 4, 7, 2, 7, 3]
    assert (thoughts.action_mask.int().diff(dim=1) <= 0).all()
    assert [len(text) > 0 for text in policy.thought_texts(thoughts)] == [n > 0 for n in LENGTHS]
    named = set(policy.text_tokenizer.get_added_vocab().values())
    assert named & set(policy.thought_ids.tolist()) == {policy.vocabulary.image_start_tag_id}


def test_both_segments_have_the_log_probs_of_the_plain_language_model(policy: ImagePolicy) -> None:
    """Each sample alone and without padding, by transformers: prompt, thought, tags, image tokens."""
    rows, thoughts, trajectory = drawn(policy)
    with torch.no_grad():
        scores = policy.trainable(rows, trajectory.tokens, SAMPLING)
    assert scores.logprobs.shape == scores.entropy.shape == (6, LONGEST + policy.num_actions)
    known, columns = policy.thought_ids, policy.vocabulary.columns
    for row, length in enumerate(LENGTHS):
        prompt = policy.prompts.captions([PROMPTS[row // GROUP].text])[0]
        text = known[thoughts.tokens[row, :length]].tolist()
        image = (trajectory.tokens[row] + columns.start).tolist()
        ids = torch.tensor([*prompt[:-2], *text, *prompt[-2:], *image])
        with torch.no_grad():
            logits = policy.trainable.lm(ids[None]).logits[0].double() / SAMPLING.temperature
        first = len(prompt) - 3
        actions = int(thoughts.action_mask[row].sum())
        own = logits[first : first + actions, known].log_softmax(-1)
        wanted = own.gather(-1, thoughts.tokens[row, :actions, None])[:, 0]
        torch.testing.assert_close(scores.logprobs[row, :actions].double(), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            scores.entropy[row, :actions].double(), -(own.exp() * own).sum(-1), rtol=0, atol=1e-5
        )
        own = logits[-len(image) - 1 : -1, columns].log_softmax(-1)
        wanted = own.gather(-1, trajectory.tokens[row, :, None])[:, 0]
        torch.testing.assert_close(scores.logprobs[row, LONGEST:].double(), wanted, rtol=0, atol=1e-5)
        # and as they were drawn
        torch.testing.assert_close(
            thoughts.rollout_logprobs[row, :actions], scores.logprobs[row, :actions], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            trajectory.rollout_logprobs[row], scores.logprobs[row, LONGEST:], rtol=0, atol=1e-5
        )


def test_thoughts_are_drawn_from_the_distribution_that_is_scored(policy: ImagePolicy) -> None:
    """The second id, given the first: counts over uniform numbers against softmax of the plain language model."""
    encoded = policy.encode(PROMPTS[:1])
    count = 6000
    places = torch.rand(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places[:, 0] = 0.3
    thoughts = policy.think(encoded, places, SAMPLING)
    first = int(thoughts.tokens[0, 0])
    assert (thoughts.tokens[:, 0] == first).all()
    ids = torch.cat([encoded["ids"][0, :-2], policy.thought_ids[first : first + 1]])
    with torch.no_grad():
        logits = policy.trainable.lm(ids[None]).logits[0, -1, policy.thought_ids].double()
    expected = (logits / SAMPLING.temperature).softmax(-1).numpy() * count
    counts = np.bincount(thoughts.tokens[:, 1].numpy(), minlength=len(expected))
    rare = expected < 5
    found, wanted = [*counts[~rare], counts[rare].sum()], [*expected[~rare], expected[rare].sum()]
    assert len(found) > 20 and chisquare(found, np.array(wanted) * count / sum(wanted)).pvalue > 1e-3
    assert chisquare(found).pvalue < 1e-12


def test_the_gradient_is_that_of_the_log_probs(policy: ImagePolicy) -> None:
    """Along a random direction, by differences, thoughts and image tokens weighed at random, padding at none."""
    rows, thoughts, trajectory = drawn(policy)
    draws = torch.Generator().manual_seed(2)
    weights = torch.randn(6, LONGEST + policy.num_actions, generator=draws)
    weights[:, :LONGEST] *= thoughts.action_mask
    parameters = list(policy.trainable.parameters())
    directions = [torch.randn(p.shape, generator=draws) * p.abs().mean() for p in parameters]

    def objective(step: float) -> Tensor:
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data += step * direction
        value = (weights * policy.trainable(rows, trajectory.tokens, SAMPLING).logprobs).sum()
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data -= step * direction
        return value

    gradient = torch.autograd.grad(objective(0.0), parameters, materialize_grads=True)
    slope = sum((g * d).sum() for g, d in zip(gradient, directions, strict=True))
    with torch.no_grad():
        estimate = (objective(1e-3) - objective(-1e-3)) / 2e-3
    torch.testing.assert_close(torch.as_tensor(slope), estimate, rtol=1e-2, atol=1e-3)


def test_a_sample_does_not_depend_on_those_beside_it(policy: ImagePolicy) -> None:
    rollout = RolloutEngine(policy, SAMPLING, 0, nullcontext)
    rows, thoughts, trajectory = rollout.trajectory(PROMPTS, GROUP, "test")
    alone_rows, alone, alone_trajectory = rollout.trajectory(PROMPTS[1:], GROUP, "test")
    assert thoughts is not None and alone is not None
    assert torch.equal(thoughts.tokens[GROUP:], alone.tokens)
    assert torch.equal(trajectory.tokens[GROUP:], alone_trajectory.tokens)
    assert alone_rows["ids"].shape[1] <= rows["ids"].shape[1]


# ---- training ----------------------------------------------------------------------------------------------

THINK = ("rollout.thought_tokens=5", "algorithm.kl_coef=0.1", "rollout.prompts_per_step=2", "optim.lr=0.01")


@pytest.mark.parametrize("more", [(), ("algorithm.updates_per_rollout=2", "algorithm.name=dr_grpo")])
def test_a_step_trains_thoughts_and_tokens_and_says_so(more: tuple[str, ...]) -> None:
    trainer = small_trainer(*THINK, *more, policy=lively_policy())
    first, second = trainer.step(0), trainer.step(1)
    for metrics in (first, second):
        assert metrics["rollout/logprob_diff_max"] <= 1e-5
        assert 1 <= metrics["thought/length"] <= 5 and metrics["thought/entropy"] > 0
        assert 0 <= metrics["thought/full"] <= 1
        assert not any(key.startswith("policy/thought") for key in metrics)
    assert first["thought/kl"] == 0 < second["thought/kl"]
    groups = [
        group for part in trainer.rollouts.rollout.generate(trainer.sampler.step(2), 4, 2) for group in part
    ]
    (batch,) = trainer._assemble(groups, 2)
    actions = sum(int(group.thoughts.action_mask.sum()) for group in groups if group.thoughts)
    assert batch.action_mask.shape == (8, 5 + 8) and int(batch.action_mask.sum()) == actions + 8 * 8


def test_the_text_itself_learns() -> None:
    """A reward that only thoughts can earn, none of image tokens: the share of letters from one half of the text."""
    shares: list[float] = []
    policy = lively_policy()
    think, half = policy.think, len(policy.thought_ids) // 2

    def watched(*given: Any) -> Thoughts:
        thoughts = think(*given)
        low = (thoughts.tokens < half) & thoughts.action_mask
        shares[:] = (low.sum(1) / thoughts.action_mask.sum(1)).tolist()
        return thoughts

    policy.think = watched  # type: ignore[method-assign]
    options = (*THINK, "algorithm.kl_coef=0", "rollout.group_size=16", "optim.lr=0.02", "run.steps=8")
    trainer = small_trainer(*options, policy=policy, low=lambda completions, **_: list(shares))
    found = [trainer.step(step)["reward/mean"] for step in range(8)]
    assert np.mean(found[-2:]) > np.mean(found[:2]) + 0.2


def test_a_resumed_run_is_the_same_bit_for_bit() -> None:
    def steps(trainer: Any, which: range) -> list[dict[str, float]]:
        return [{k: v for k, v in trainer.step(step).items() if not is_timing(k)} for step in which]

    whole = small_trainer(*THINK)
    expected = steps(whole, range(3))
    begun = small_trainer(*THINK)
    assert steps(begun, range(2)) == expected[:2]
    resumed = small_trainer(*THINK, state=begun.engine.state_dict())
    resumed.restore(json.loads(json.dumps(begun.state())), begun.tensors())
    assert steps(resumed, range(2, 3)) == expected[2:]


def test_the_kl_of_what_was_drawn_counts_the_thoughts(policy: ImagePolicy) -> None:
    """Nothing to the policy's own reference; moved away from it, the thoughts' actions have their part."""
    policy.freeze_reference()
    rollout = RolloutEngine(policy, SAMPLING, 0, nullcontext)
    groups = [group for part in rollout.generate(PROMPTS, GROUP, 0) for group in part]
    assert kl_to_reference(rollout, groups) == pytest.approx([0.0] * len(PROMPTS) * GROUP, abs=1e-6)
    for group in groups:  # as if the policy had thought its thoughts more surely
        assert group.thoughts is not None
        group.thoughts.rollout_logprobs += 0.5
    wanted = [
        (math.exp(-0.5) + 0.5 - 1) * int(own.sum()) / (int(own.sum()) + policy.num_actions)
        for group in groups
        for own in group.thoughts.action_mask  # type: ignore[union-attr]
    ]
    assert kl_to_reference(rollout, groups) == pytest.approx(wanted, rel=1e-4)


def test_what_cannot_think_is_told_before(policy: ImagePolicy, tmp_path: Path) -> None:
    room = 512 - 8 - policy.prompts.longest(PROMPTS)
    refuse_impossible(policy.prompts, PROMPTS, SamplingParams(thought_tokens=room))
    with pytest.raises(ImageRLError, match=f"has room for {room}; set it to {room} or less"):
        refuse_impossible(policy.prompts, PROMPTS, SamplingParams(thought_tokens=room + 1))
    with pytest.raises(ImageRLError, match=r"engine\.zero_stage to 2 or less"):
        small_trainer(*THINK, "engine={name: deepspeed, zero_stage: 3}")
