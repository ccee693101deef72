from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional as F

from imagerl.models.common import tokens as common_tokens
from imagerl.models.common.tokens import guided_logits, positions_of, score_tokens, with_unconditional
from imagerl.rl.types import TokenScores


def scored(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float) -> TokenScores:
    return score_tokens([hidden], lambda states: F.linear(states, head), len(head), tokens, temperature)


def test_entropy_is_that_of_the_tempered_distribution() -> None:
    random_numbers = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 5, 6, generator=random_numbers)
    head = torch.randn(7, 6, generator=random_numbers)
    tokens = torch.randint(7, (2, 5), generator=random_numbers)
    scores = scored(hidden, head, tokens, 0.7)
    wanted = Categorical(logits=hidden @ head.T / 0.7)
    torch.testing.assert_close(scores.entropy, wanted.entropy())
    torch.testing.assert_close(scores.logprobs, wanted.log_prob(tokens))
    flat = scored(torch.zeros(1, 3, 6), head, tokens[:1, :3], 1.0)
    torch.testing.assert_close(flat.entropy, torch.full((1, 3), 7.0).log())


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_scoring_in_chunks_changes_neither_scores_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    random_numbers = torch.Generator().manual_seed(4)
    hidden = torch.randn(3, 5, 6, generator=random_numbers, dtype=torch.float64)
    head = torch.randn(9, 6, generator=random_numbers, dtype=torch.float64)
    tokens = torch.randint(9, (3, 5), generator=random_numbers)
    weights = torch.randn(3, 5, generator=random_numbers)

    def run() -> tuple[Tensor, ...]:
        inputs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        scores = scored(*inputs, tokens, 0.9)
        loss = (weights * scores.logprobs).sum() + scores.entropy.square().sum()
        return scores.logprobs.detach(), scores.entropy.detach(), *torch.autograd.grad(loss, inputs)

    whole = run()
    monkeypatch.setattr(common_tokens, "MAX_LOGITS_PER_CHUNK", rows * 9)
    calls = []
    plain = common_tokens.checkpoint
    monkeypatch.setattr(common_tokens, "checkpoint", lambda *a, **k: calls.append(1) or plain(*a, **k))
    for chunked, unchunked in zip(run(), whole, strict=True):
        torch.testing.assert_close(chunked, unchunked, rtol=1e-6, atol=1e-6)
    assert len(calls) == -(-15 // rows)


def test_half_precision_weights_still_give_a_float32_softmax() -> None:
    random_numbers = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, 32, generator=random_numbers).bfloat16()
    head = torch.randn(16, 32, generator=random_numbers).bfloat16()
    scores = scored(hidden, head, torch.randint(16, (1, 4), generator=random_numbers), 1.0)
    assert scores.logprobs.dtype == scores.entropy.dtype == torch.float32


def test_positions_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_guidance_moves_logits_away_from_the_unconditional_ones() -> None:
    conditional, unconditional = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]])
    guided = guided_logits(lambda states: states, [conditional, unconditional], 5.0)
    assert guided.tolist() == [[-3.0, 7.0]]  # 2 + 5 (1 - 2), 2 + 5 (3 - 2)
    assert guided_logits(lambda states: states, [conditional], 5.0) is conditional


def test_unconditional_prompts_of_one_length_are_one_row() -> None:
    ids = torch.tensor([[0, 0, 7, 8, 9], [7, 1, 2, 3, 9], [0, 0, 7, 5, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    prompts = with_unconditional(ids, mask, kept=(7, 9), pad=0)
    assert prompts.rows is not None and len(prompts.ids) == 3 + 2
    assert torch.equal(prompts.ids[prompts.rows[:3]], ids)
    bare = [[0, 0, 7, 0, 9], [7, 0, 0, 0, 9], [0, 0, 7, 0, 9]]
    assert prompts.ids[prompts.rows[3:]].tolist() == bare
    assert torch.equal(prompts.mask[prompts.rows], mask.bool().repeat(2, 1))
