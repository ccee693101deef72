from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from imagerl.rl.algorithms.losses import (
    entropy_threshold,
    highest_entropy,
    policy_weights,
    truncated_importance,
)


def test_truncated_importance_by_hand() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0, 300.0]], requires_grad=True)
    rollout = torch.tensor([[-1.0, -1.5, 1.0, -300.0]])
    weights = truncated_importance(old, rollout, cap=1.2)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 1.2, math.exp(-2), 1.2]]))
    assert not weights.requires_grad


def test_truncated_importance_corrects_the_mean() -> None:
    """Samples of q weighed by p / q have the mean under p, up to what the cap takes away."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    value = torch.arange(20.0, dtype=torch.float64)
    drawn = torch.multinomial(q.exp(), 1_000_000, True, generator=generator)
    wanted = float((p.exp() * value).sum())
    assert abs(float(value[drawn].mean()) - wanted) > 0.05 * wanted
    weighed = value[drawn] * truncated_importance(p[drawn], q[drawn], cap=1e6)
    assert float(weighed.mean()) == pytest.approx(wanted, rel=0.01)
    capped = float((value[drawn] * truncated_importance(p[drawn], q[drawn], cap=2.0)).mean())
    assert capped == pytest.approx(float((q.exp() * (p - q).exp().clamp(max=2) * value).sum()), rel=0.01)


def test_weights_are_the_product_of_what_is_asked_for() -> None:
    old, rollout = torch.tensor([[0.0, 1.0, math.nan]]), torch.tensor([[0.0, 0.0, 0.0]])
    mask, selected = torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]])
    assert policy_weights(old, rollout, mask, None, None) is None
    importance = policy_weights(old, rollout, mask, 2.0, None)
    chosen = policy_weights(old, rollout, mask, None, selected)
    both = policy_weights(old, rollout, mask, 2.0, selected)
    assert importance is not None and importance.tolist() == [[1.0, 2.0, 1.0]]
    assert chosen is not None and chosen.tolist() == [[0.0, 1.0, 0.0]]
    assert both is not None and both.tolist() == [[0.0, 2.0, 1.0]]  # the last is masked in the loss


def test_entropy_threshold_is_of_all_actions() -> None:
    assert entropy_threshold(np.arange(11.0), 0.2) == 8.0
    assert entropy_threshold(np.arange(11.0), 1.0) == 0.0
    assert entropy_threshold(np.array([]), 0.2) == np.inf
    entropy, mask = torch.tensor([[1.0, 8.0, 9.0]]), torch.tensor([[True, True, False]])
    assert highest_entropy(entropy, mask, 8.0).tolist() == [[False, True, False]]
