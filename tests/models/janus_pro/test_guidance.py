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
