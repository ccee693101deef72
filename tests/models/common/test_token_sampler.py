from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.common.token_sampler import effective_weight
from imagerl.models.common.tokens import draw_tokens
from imagerl.rl.types import SamplingParams, TokenTrajectory
from tests.models.helpers import CAPTIONS, add_lively_lora, lively_policy, uniforms

GROUP = 3


def draw(
    policy: ImagePolicy, captions: tuple[str, ...] = CAPTIONS, temperature: float = 1.0, seed: int = 0
) -> TokenTrajectory:
    ids, mask = policy.encode_prompts(captions)
    numbers = uniforms(policy, len(captions) * GROUP, seed)
    policy.refresh_sampler()
    return policy.sample_tokens({"ids": ids, "mask": mask}, numbers, SamplingParams(temperature))


@torch.no_grad()
def replay(policy: ImagePolicy, drawn: TokenTrajectory, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and hidden states of the trainer's teacher-forced pass over the drawn tokens."""
    ids, mask = (t.repeat_interleave(GROUP, 0) for t in policy.encode_prompts(CAPTIONS))
    scores = policy.trainable({"ids": ids, "mask": mask}, drawn.tokens, SamplingParams(temperature))
    return scores.logprobs, policy.trainable.hidden_states(ids, mask, drawn.tokens)


@pytest.mark.parametrize(
    ("qwen3", "temperature"),
    [
        ({}, 1.0),
        ({"tie_word_embeddings": False}, 0.7),
        ({"num_key_value_heads": 4}, 1.0),
        ({"num_key_value_heads": 1, "head_dim": 16}, 1.3),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-3}, 1.0),
    ],
    ids=[
        "grouped queries, tied head",
        "untied head",
        "one key a query",
        "one key for all",
        "other constants",
    ],
)
def test_sampler_and_trainer_agree_on_what_was_drawn(qwen3: dict[str, Any], temperature: float) -> None:
    policy = lively_policy(**qwen3)
    drawn = draw(policy, temperature=temperature)
    logprobs, hidden = replay(policy, drawn, temperature)
    assert drawn.tokens.shape == (len(CAPTIONS) * GROUP, policy.num_actions)
    assert drawn.tokens.min() >= 0 and drawn.tokens.max() < policy.vocabulary.num_image_tokens
    assert drawn.action_mask.all() and drawn.rollout_logprobs.std() > 0.1
    torch.testing.assert_close(drawn.rollout_logprobs, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.states["hidden"], hidden, rtol=1e-5, atol=1e-5)


def test_active_adapters_are_sampled_from() -> None:
    policy = lively_policy()
    plain = draw(policy)
    add_lively_lora(policy)
    drawn = draw(policy)
    logprobs, hidden = replay(policy, drawn, 1.0)
    torch.testing.assert_close(drawn.rollout_logprobs, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.states["hidden"], hidden, rtol=1e-5, atol=1e-5)
    assert not torch.equal(drawn.tokens, plain.tokens)
    with policy.trainable.base_weights():
        assert torch.equal(draw(policy).tokens, plain.tokens)


def test_effective_weight_adds_the_scaled_product() -> None:
    policy = lively_policy()
    add_lively_lora(policy)
    layer = policy.trainable.lm.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(effective_weight(layer), layer.base_layer.weight + 8.0 / 4 * b @ a)


def test_a_refreshed_sampler_follows_the_weights() -> None:
    policy = lively_policy()
    before = draw(policy)
    with torch.no_grad():
        for parameter in policy.trainable.parameters():
            parameter.mul_(1.2)
    after = draw(policy)
    assert not torch.equal(before.tokens, after.tokens)
    torch.testing.assert_close(after.rollout_logprobs, replay(policy, after, 1.0)[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_and_its_log_probs_are_still_float32() -> None:
    policy = lively_policy()
    ids, mask = policy.encode_prompts(CAPTIONS)
    policy.sampler_dtype = torch.bfloat16
    drawn = policy.sample_tokens({"ids": ids, "mask": mask}, uniforms(policy, 9), SamplingParams())
    logprobs, hidden = replay(policy, drawn, 1.0)
    assert drawn.states["hidden"].dtype == torch.bfloat16 and drawn.rollout_logprobs.dtype == torch.float32
    gap = (drawn.rollout_logprobs - logprobs).abs()
    assert 1e-5 < gap.mean() < 0.05
    assert (drawn.states["hidden"] - hidden).abs().mean() < 0.05


def test_a_sample_depends_on_its_own_numbers_alone() -> None:
    policy = lively_policy()
    ids, mask = policy.encode_prompts(CAPTIONS)
    numbers = uniforms(policy, 9)
    policy.refresh_sampler()
    together = policy.sample_tokens({"ids": ids, "mask": mask}, numbers, SamplingParams())
    for sample in range(9):
        alone_ids, alone_mask = policy.encode_prompts([CAPTIONS[sample // GROUP]])
        alone = policy.sample_tokens(
            {"ids": alone_ids, "mask": alone_mask}, numbers[sample : sample + 1], SamplingParams()
        )
        assert torch.equal(alone.tokens[0], together.tokens[sample])
        torch.testing.assert_close(
            alone.states["hidden"][0], together.states["hidden"][sample], rtol=1e-5, atol=1e-5
        )
    again = policy.sample_tokens({"ids": ids, "mask": mask}, numbers, SamplingParams())
    assert torch.equal(again.tokens, together.tokens)
    assert torch.equal(again.rollout_logprobs, together.rollout_logprobs)


def first_token_probabilities(policy: ImagePolicy, temperature: float) -> Tensor:
    ids, mask = policy.encode_prompts(CAPTIONS[:1])
    codes = policy.vocabulary.num_image_tokens
    every = torch.arange(codes)[:, None].expand(codes, policy.num_actions)
    with torch.no_grad():
        scores = policy.trainable(
            {"ids": ids.expand(codes, -1), "mask": mask.expand(codes, -1)}, every, SamplingParams(temperature)
        )
    return scores.logprobs[:, 0].double().exp()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_scored_distribution(temperature: float) -> None:
    """Evenly spaced numbers hit each token's part of [0, 1) in proportion, to within one number at either end."""
    policy = lively_policy()
    wanted = first_token_probabilities(policy, temperature)
    ids, mask = policy.encode_prompts(CAPTIONS[:1])
    count = 2000
    numbers = torch.full((count, policy.num_actions), 0.5, dtype=torch.float64)
    numbers[:, 0] = (torch.arange(count) + 0.5) / count
    policy.refresh_sampler()
    first = policy.sample_tokens({"ids": ids, "mask": mask}, numbers, SamplingParams(temperature)).tokens[
        :, 0
    ]
    assert (first.diff() >= 0).all()  # the inverse of a cumulative distribution is monotone
    shares = first.bincount(minlength=len(wanted)).double() / count
    assert wanted.sum() == pytest.approx(1, abs=1e-5) and wanted.max() < 0.9
    assert (shares - wanted).abs().max() <= 1.01 / count


def test_later_tokens_follow_the_scored_distribution_too() -> None:
    """Pearson's statistic over second tokens given the first, against its 1 - 1e-6 quantile."""
    policy = lively_policy()
    ids, mask = policy.encode_prompts(CAPTIONS[:1])
    count, codes = 4000, policy.vocabulary.num_image_tokens
    policy.refresh_sampler()
    numbers = uniforms(policy, count, seed=5)
    numbers[:, 0] = 0.5  # all samples share their first token
    drawn = policy.sample_tokens({"ids": ids, "mask": mask}, numbers, SamplingParams())
    every = drawn.tokens[:1].repeat(codes, 1)
    every[:, 1] = torch.arange(codes)
    with torch.no_grad():
        scores = policy.trainable(
            {"ids": ids.expand(codes, -1), "mask": mask.expand(codes, -1)}, every, SamplingParams()
        )
    expected = scores.logprobs[:, 1].double().exp() * count
    observed = drawn.tokens[:, 1].bincount(minlength=codes)
    likely = expected >= 5
    statistic = ((observed - expected).square() / expected)[likely].sum()
    assert likely.sum() >= 5 and observed[~likely].sum() < 100
    assert (
        statistic < 55
    )  # of at most 16 squares; chi-square with 15 degrees of freedom exceeds 53 once in 250,000


@pytest.mark.parametrize("possible", [[1, 3], [3], [0, 4], [2, 3], [0, 5]])
def test_the_ends_of_the_unit_interval_pick_no_impossible_token(possible: list[int]) -> None:
    """Probabilities below the smallest number are zero, in front of, between and behind the others."""
    logits = torch.full((2, 6), -1e5)
    logits[:, possible] = torch.tensor([0.3, -0.2])[: len(possible)]
    below_one = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0))
    ends = torch.stack([torch.zeros((), dtype=torch.float64), below_one])
    tokens, logprobs = draw_tokens(logits, ends)
    assert tokens.tolist() == [possible[0], possible[-1]]
    assert (logprobs > -5).all()
    everywhere, _ = draw_tokens(logits[:1].expand(1000, -1), torch.arange(1000, dtype=torch.float64) / 1000)
    assert set(everywhere.tolist()) == set(possible)


def test_a_rare_token_keeps_its_share_in_a_large_vocabulary() -> None:
    """65,536 equal columns: every one owns exactly its part of the interval."""
    columns = 1 << 16
    wanted = torch.tensor([0, 1, 12345, 65534, 65535])
    numbers = (wanted.double() + 0.5) / columns
    tokens, logprobs = draw_tokens(torch.zeros(5, columns), numbers)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logprobs, torch.full((5,), float(columns)).log().neg())


def test_low_temperature_is_greedy() -> None:
    policy = lively_policy()
    drawn = draw(policy, temperature=1e-3)
    other = draw(policy, temperature=1e-3, seed=1)
    assert torch.equal(drawn.tokens, other.tokens)
    head = policy.trainable.head.detach()
    assert torch.equal(drawn.tokens, (drawn.states["hidden"][:, :-1] @ head.T).argmax(-1))
    torch.testing.assert_close(drawn.rollout_logprobs, torch.zeros(9, policy.num_actions), atol=1e-3, rtol=0)


def test_drawn_tokens_can_be_trained_on() -> None:
    policy = lively_policy()
    drawn = draw(policy)
    ids, mask = (t.repeat_interleave(GROUP, 0) for t in policy.encode_prompts(CAPTIONS))
    scores = policy.trainable({"ids": ids, "mask": mask}, drawn.tokens, SamplingParams())
    (scores.logprobs - drawn.rollout_logprobs).exp().mean().backward()
    assert policy.trainable.lm.model.norm.weight.grad is not None
