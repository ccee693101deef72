"""Spatial credit by hand, and that it is what the gradient needs."""

import numpy as np
import pytest
import torch

from imagerl.rl.algorithms.advantages import AdvantageOutput
from imagerl.rl.algorithms.credit import coverage, region_credit

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
NONE = (np.nan,) * 5


def test_coverage_by_hand() -> None:
    """A grid of 2 rows and 4 columns; the box begins in the second cell and ends in the lower row."""
    boxes = np.array([[0.3125, 0.0, 0.75, 0.75], [0.0, 0.0, 1.0, 1.0], [0.4, 0.5, 0.4, 0.5]])
    upper, lower = [0, 0.75, 1, 0], [0, 0.375, 0.5, 0]
    np.testing.assert_allclose(coverage(boxes, (2, 4)), [upper + lower, [1] * 8, [0] * 8], atol=1e-12)


def test_credit_by_hand() -> None:
    """Two groups of two samples, two letters each; the second group's samples are alike, so that nothing is learned."""
    groups = [
        [[(1, *LEFT), (0, *RIGHT)], [(0, *LEFT), (0.5, *RIGHT)]],
        [[(1, *LEFT), (1, *RIGHT)], [(1, *RIGHT), (1, *LEFT)]],
    ]
    credit = region_credit(np.array(groups).reshape(4, 2, 5), 2, (1, 4))
    np.testing.assert_allclose(credit[:2], [[0.5, 0.5, -0.25, -0.25], [-0.5, -0.5, 0.25, 0.25]])
    assert credit.dtype == torch.float64 and not credit[2:].any()


def test_missing_regions_take_no_part() -> None:
    regions = np.array([[(1, *LEFT), (1, *RIGHT)], [(0, *LEFT), NONE], [NONE, NONE]])
    credit = region_credit(regions, 3, (1, 2))
    np.testing.assert_allclose(credit, [[0.5, 0], [-0.5, 0], [0, 0]])


def test_only_differences_within_a_group_count() -> None:
    draws = np.random.default_rng(0)
    regions = np.concatenate([draws.random((6, 3, 1)), np.sort(draws.random((6, 3, 4)))], axis=2)
    moved = regions + np.array([5.0, 0, 0, 0, 0])
    torch.testing.assert_close(region_credit(moved, 3, (3, 5)), region_credit(regions, 3, (3, 5)))


def test_the_mean_gradient_is_that_of_the_whole_picture_with_less_noise() -> None:
    """Tokens that are independent coins, each of which decides one region: credit and the sum of all regions as one
    reward have the same mean gradient, p (1 − p) (G − 1) / G, and credit a far smaller variance."""
    tokens, size, groups = 8, 4, 40_000
    draws = torch.Generator().manual_seed(0)
    coins = (torch.rand(groups * size, tokens, generator=draws, dtype=torch.float64) < 0.3).double()
    sides = np.arange(tokens + 1) / tokens
    boxes = np.stack([sides[:-1], np.zeros(tokens), sides[1:], np.ones(tokens)], axis=1)
    regions = np.concatenate([coins.numpy()[..., None], np.broadcast_to(boxes, (*coins.shape, 4))], axis=2)
    total = coins.sum(dim=1).reshape(groups, size)
    whole = (total - total.mean(dim=1, keepdim=True)).reshape(-1, 1)
    score = coins - 0.3  # d log-prob / d logit
    wanted = 0.3 * 0.7 * (size - 1) / size
    by_credit, by_whole = score * region_credit(regions, size, (1, tokens)), score * whole
    for gradient in (by_credit, by_whole):
        assert gradient.mean(dim=0).tolist() == pytest.approx([wanted] * tokens, abs=0.01)
    assert 5 * by_credit.var() < by_whole.var()


def test_credit_is_added_to_valid_samples_only() -> None:
    output = AdvantageOutput(torch.tensor([1.0, -1.0]), torch.tensor([True, False]), 0, 0, {})
    credit = torch.tensor([[0.5, 0.0], [0.25, 0.25]], dtype=torch.float64)
    assert output.with_credit(credit).advantages.tolist() == [[1.5, 1.0], [-1.0, -1.0]]
    every = AdvantageOutput(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([True, True]), 0, 0, {})
    assert every.with_credit(credit).advantages.tolist() == [[1.5, 2.0], [0.25, 0.25]]
    assert every.with_credit(credit).advantages.dtype == torch.float32
