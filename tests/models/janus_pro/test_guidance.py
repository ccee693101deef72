"""Guidance on token logits: what is drawn, what is scored and what gets a gradient are one distribution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.rl.types import Rows, SamplingParams, repeat
from tests.models.janus_pro.small import CAPTIONS, PROMPTS, policy_in, random_tokens, saved, uniforms

GUIDED = SamplingParams(temperature=0.9, token_guidance=3.0)
PLAIN = SamplingParams(temperature=0.9)
GROUP = 4


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> JanusPolicy:
    return policy_in(saved(tmp_path_factory.mktemp("janus")))


@pytest.fixture(scope="module")
def rows(policy: JanusPolicy) -> Rows:
    return policy.encode(PROMPTS)


@pytest.mark.parametrize("sampling", [GUIDED, PLAIN], ids=["guided", "plain"])
@torch.no_grad()
def test_replay_repeats_what_was_drawn_of_groups_and_of_single_samples(
    policy: JanusPolicy, rows: Rows, sampling: SamplingParams
) -> None:
    drawn = policy.sample_tokens(rows, uniforms(policy, GROUP * len(CAPTIONS)), sampling)
    assert drawn.rollout_logprobs.std() > 0.1
    for prompts in (rows, repeat(rows, GROUP)):  # a prompt read once for its group, or by each sample
        scores = policy.trainable(prompts, drawn.tokens, sampling)
        assert (scores.logprobs - drawn.rollout_logprobs).abs().max() <= 1e-5


@torch.no_grad()
def test_a_sample_depends_on_its_own_prompt_and_numbers_alone(policy: JanusPolicy, rows: Rows) -> None:
    numbers = uniforms(policy, GROUP * len(CAPTIONS))
    together = policy.sample_tokens(rows, numbers, GUIDED)
    for sample in range(0, len(numbers), 3):
        alone = policy.sample_tokens(
            policy.encode([PROMPTS[sample // GROUP]]), numbers[sample : sample + 1], GUIDED
        )
        assert torch.equal(alone.tokens[0], together.tokens[sample])
        torch.testing.assert_close(
            alone.rollout_logprobs[0], together.rollout_logprobs[sample], rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_guidance_of_one_is_no_guidance(policy: JanusPolicy, rows: Rows) -> None:
    tokens = random_tokens(policy, len(CAPTIONS))
    plain = policy.trainable(rows, tokens, PLAIN).logprobs
    almost = policy.trainable(rows, tokens, replace(PLAIN, token_guidance=1 + 1e-9)).logprobs
    torch.testing.assert_close(almost, plain, rtol=1e-5, atol=1e-5)
    assert (policy.trainable(rows, tokens, GUIDED).logprobs - plain).abs().max() > 0.1


def test_a_set_of_prompts_reads_its_unconditional_one_once(
    policy: JanusPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of one length have the same; G samples of P prompts do not read more."""
    alike = policy.encode([replace(PROMPTS[0], text=text) for text in ("xyz", "zyx", "yzx")])
    assert alike["mask"].all()
    sizes = []
    forward = policy.trainable.lm.forward
    monkeypatch.setattr(
        policy.trainable.lm,
        "forward",
        lambda **given: (sizes.append(given["inputs_embeds"].shape[:2]), forward(**given))[1],
    )
    tokens = random_tokens(policy, 3 * GROUP)
    policy.trainable(alike, tokens, GUIDED)
    length = alike["ids"].shape[1]
    assert sizes == [(3 + 1, length), (2 * 3 * GROUP, tokens.shape[1] - 1)]
    drawn = policy.trainable.prompt_ids(alike, 3.0)
    assert len(drawn.ids) == 3 + 1


def test_joint_tokens_follow_the_scored_distribution(tmp_path: Path) -> None:
    """Pearson's statistic over all pairs of first tokens of a vocabulary of 4, against its 1 - 1e-6 quantile."""
    policy = policy_in(saved(tmp_path, vq={"num_embeddings": 4}))
    prompt, count = policy.encode(PROMPTS[:1]), 6000
    drawn = policy.sample_tokens(prompt, uniforms(policy, count, seed=3)[:, :2], GUIDED).tokens
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    with torch.no_grad():
        expected = policy.trainable(prompt, pairs, GUIDED).logprobs.double().sum(1).exp() * count
    observed = (drawn[:, 0] * 4 + drawn[:, 1]).bincount(minlength=16)
    assert expected.sum() == pytest.approx(count, rel=1e-5)
    likely = expected >= 5
    assert likely.sum() >= 6
    statistic = ((observed - expected).square() / expected)[likely].sum()
    assert statistic < 55  # at most 15 degrees of freedom


def gradient_of(policy: JanusPolicy, rows: Rows, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
    policy.trainable.zero_grad()
    (policy.trainable(rows, tokens, GUIDED).logprobs * weights).sum().backward()
    return {name: p.grad for name, p in policy.trainable.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_flows_through_both_branches(
    tmp_path: Path, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against central differences along a random direction of each parameter; the norms compute in float32, so the
    differences are wide. The embedding of padding, which most of the unconditional prompt is, has no gradient:
    transformers' own embedding keeps it as it is."""
    policy = policy_in(saved(tmp_path))
    policy.trainable.double()
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # of logits
    rows = policy.encode(PROMPTS[1:2])
    tokens = random_tokens(policy, 2)
    draws = torch.Generator().manual_seed(0)
    weights = torch.randn(tokens.shape, generator=draws, dtype=torch.float64)
    if checkpointed:
        rows = repeat(rows, 2)  # layers are recomputed without a cache
        policy.trainable.lm.activation_checkpointing_enable({"use_reentrant": False})
        policy.trainable.train()
    gradients = gradient_of(policy, rows, tokens, weights)
    pad = policy.trainable.blank.pad
    assert not gradients["lm.embed_tokens.weight"][pad].any()
    parameters = dict(policy.trainable.named_parameters())
    for name in ("lm.embed_tokens.weight", "lm.layers.0.self_attn.k_proj.weight", "lm.norm.weight",
                 "generation_embeddings.weight", "generation_aligner.fc1.weight",
                 "generation_head.vision_head.weight"):  # fmt: skip
        parameter = parameters[name]
        direction = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        if "embed_tokens" in name:
            direction[pad] = 0
        direction /= direction.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 3e-3)
                scores = policy.trainable(rows, tokens, GUIDED).logprobs
                values.append((scores * weights).sum().item())
                parameter.add_(direction, alpha=-sign * 3e-3)
        numeric = (values[0] - values[1]) / 6e-3
        assert numeric == pytest.approx((gradients[name] * direction).sum().item(), rel=2e-3, abs=1e-3)


def test_a_group_that_shares_its_prompt_has_the_same_gradient(policy: JanusPolicy, rows: Rows) -> None:
    tokens = random_tokens(policy, GROUP * len(CAPTIONS))
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    shared = gradient_of(policy, rows, tokens, weights)
    shared = {name: gradient.clone() for name, gradient in shared.items()}
    own = gradient_of(policy, repeat(rows, GROUP), tokens, weights)
    assert shared.keys() == own.keys() == dict(policy.trainable.named_parameters()).keys()
    for name, gradient in own.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    policy.trainable.zero_grad()


def test_bfloat16_draws_close_to_what_is_scored(tmp_path: Path) -> None:
    policy = policy_in(saved(tmp_path))
    policy.sampler_dtype = torch.bfloat16
    rows = policy.encode(PROMPTS)
    drawn = policy.sample_tokens(rows, uniforms(policy, len(CAPTIONS)), GUIDED)
    with torch.no_grad():
        scored = policy.trainable(rows, drawn.tokens, GUIDED).logprobs
    assert drawn.rollout_logprobs.dtype == torch.float32
    assert 1e-5 < (drawn.rollout_logprobs - scored).abs().mean() < 0.2
