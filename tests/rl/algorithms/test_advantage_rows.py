"""Baselines, whitening and decoupling: what algorithms make of rewards beyond GRPO's way."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from imagerl.rl.algorithms.advantages import (
    AdvantageInputs,
    advantages_of,
    group_advantages,
    moved_mean,
)
from imagerl.rl.algorithms.loading import user_advantages
from imagerl.rl.config.algorithm_table import ALGORITHMS, Baseline

PARITY = Path(os.environ.get("IMAGERL_PARITY_DIR", Path(__file__).parents[2] / "data" / "parity"))
NAN = math.nan


def given(
    rewards: Any, group_size: int = 4, actions: int = 5, components: Any = None, **more: Any
) -> AdvantageInputs:
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    parts = rewards[:, None] if components is None else torch.as_tensor(components, dtype=torch.float64)
    defaults = {
        "weights": (1.0,) * parts.shape[1],
        "action_mask": torch.ones(len(rewards), actions, dtype=torch.bool),
    }
    return AdvantageInputs(rewards, parts, group_size=group_size, **(defaults | more))


def row(name: str) -> dict[str, Any]:
    """Arguments of `advantages_of` for an algorithm of the table."""
    values = ALGORITHMS[name]  # type: ignore[index]
    scale, eps = values.scale_rewards, values.advantage_eps
    return {"baseline": values.baseline, "scale": scale, "eps": eps, "decouple": values.decouple_rewards}


@pytest.mark.parametrize(
    ("name", "key", "eps"),
    [
        ("grpo", "adv/grpo_std_eps1e-6", 1e-6),
        ("dr_grpo", "adv/dr_grpo", 1e-6),
        ("rloo", "adv/rloo", 1e-6),
        ("reinforce_plus_plus_baseline", "adv/reinforce_pp_baseline_T5", 1e-8),
    ],
)
def test_agrees_with_the_public_implementation(name: str, key: str, eps: float) -> None:
    public = load_file(PARITY / "algorithms.safetensors")
    result = advantages_of(given(public["rewards"]), **row(name) | {"eps": eps})
    torch.testing.assert_close(result.advantages, public[key], rtol=0, atol=1e-6)
    assert result.zero_variance_groups == 1 and result.metrics["informative_samples"] == 8


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = [0.1, 0.4, 1.0, NAN, 3.0, 1.0, 1.0, 0.0]
    result = group_advantages(torch.tensor(rewards, dtype=torch.float64), 4, "none", baseline="leave_one_out")
    expected = [0.1 - 0.7, 0.4 - 0.55, 1.0 - 0.25, 0, 3 - 2 / 3, 1 - 4 / 3, 1 - 4 / 3, 0 - 5 / 3]
    torch.testing.assert_close(result.advantages, torch.tensor(expected))


def test_baselines_of_the_batch() -> None:
    rewards = torch.tensor([1.0, 3.0, 8.0, NAN], dtype=torch.float64)
    mean = group_advantages(rewards, 2, "none", baseline="batch_mean")
    assert mean.advantages.tolist() == [-3.0, -1.0, 4.0, 0.0]
    moving = group_advantages(rewards, 2, "none", baseline="moving_average", moving_mean=2.0)
    assert moving.advantages.tolist() == [-1.0, 1.0, 6.0, 0.0]
    first = group_advantages(rewards, 2, "none", baseline="moving_average")
    assert torch.equal(first.advantages, mean.advantages)
    scaled = group_advantages(rewards, 2, "batch", eps=0.5, baseline="batch_mean")
    torch.testing.assert_close(scaled.advantages, mean.advantages / (math.sqrt(13) + 0.5))
    # Equal rewards within a group still say something when compared with those of other prompts.
    other = group_advantages(torch.tensor([1.0, 1.0, 4.0, 4.0]), 2, "none", baseline="batch_mean")
    assert other.advantages.tolist() == [-1.5, -1.5, 1.5, 1.5] and other.zero_variance_groups == 2
    equal = group_advantages(torch.full((6,), 0.1), 2, "none", baseline="batch_mean")
    assert torch.equal(equal.advantages, torch.zeros(6))


def test_the_moving_mean_by_hand() -> None:
    assert moved_mean(None, torch.tensor([1.0, 3.0, NAN]), 0.9) == 2.0
    assert moved_mean(2.0, torch.tensor([3.0, 5.0, math.inf]), 0.75) == 2.5
    assert moved_mean(2.0, torch.tensor([NAN]), 0.75) == 2.0
    assert moved_mean(None, torch.tensor([NAN]), 0.75) is None


# ---- REINFORCE++ -------------------------------------------------------------------------------------------


def naive_reinforce_plus_plus(
    rewards: np.ndarray, penalty: np.ndarray, mask: np.ndarray, groups: int | None
) -> np.ndarray:
    """Returns to go, action by action, then standardised over all actions that train."""
    rewards = rewards.copy()
    if groups:
        for start in range(0, len(rewards), groups):
            rewards[start : start + groups] -= rewards[start : start + groups].mean()
    returns = np.zeros(mask.shape)
    for i in range(len(rewards)):
        for t in range(mask.shape[1]):
            returns[i, t] = rewards[i] - penalty[i, t:][mask[i, t:]].sum()
    used = returns[mask]
    return np.where(mask, (returns - used.mean()) / (used.std(ddof=1) + 1e-8), 0.0)


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_reinforce_plus_plus_against_the_equations(name: str) -> None:
    random = np.random.default_rng(0)
    rewards, penalty = random.normal(size=8), 0.3 * random.normal(size=(8, 5))
    mask = np.arange(5) < np.array([5, 3, 1, 4, 5, 5, 2, 5])[:, None]
    penalty[~mask] = 99.0
    inputs = given(rewards, action_mask=torch.from_numpy(mask), penalty=torch.from_numpy(penalty))
    result = advantages_of(inputs, **row(name)).advantages
    expected = naive_reinforce_plus_plus(rewards, penalty, mask, 4 if name.endswith("baseline") else None)
    torch.testing.assert_close(result, torch.from_numpy(expected).float(), rtol=0, atol=1e-5)
    without = advantages_of(replace(inputs, penalty=None), **row(name)).advantages
    expected = naive_reinforce_plus_plus(rewards, 0 * penalty, mask, 4 if name.endswith("baseline") else None)
    assert without.shape == (8,)  # the same for all actions of a sample
    torch.testing.assert_close(without, torch.from_numpy(expected[:, 0]).float(), rtol=0, atol=1e-5)


def test_whitened_advantages_have_mean_0_and_std_1_over_the_actions() -> None:
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 5, 1, 4])[:, None]
    inputs = given(torch.arange(8.0) ** 2, action_mask=mask)
    values = advantages_of(inputs, **row("reinforce_plus_plus")).advantages[:, None].expand(8, 5)[mask]
    assert abs(float(values.mean())) < 1e-6 and float(values.std()) == pytest.approx(1)


def test_a_penalty_is_a_lower_reward_for_all_other_rows() -> None:
    penalty = torch.rand(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = torch.arange(8.0, dtype=torch.float64)
    for name in ("grpo", "rloo", "dr_grpo", "reinforce"):
        taken = advantages_of(given(rewards, penalty=penalty), **row(name))
        lower = advantages_of(given(rewards - penalty.sum(1)), **row(name))
        assert torch.equal(taken.advantages, lower.advantages)


# ---- GDPO --------------------------------------------------------------------------------------------------


def naive_gdpo(components: np.ndarray, weights: list[float], group: int) -> np.ndarray:
    summed = np.zeros(len(components))
    for k, weight in enumerate(weights):
        for start in range(0, len(components), group):
            own = components[start : start + group, k]
            summed[start : start + group] += weight * (own - own.mean()) / (own.std(ddof=1) + 1e-4)
    return (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)


def test_gdpo_against_the_equations() -> None:
    components = np.random.default_rng(1).normal(size=(12, 3)) * [1.0, 100.0, 0.01]
    weights = [1.0, 0.5, -2.0]
    inputs = given(components @ weights, components=components, weights=tuple(weights))
    result = advantages_of(inputs, **row("gdpo"))
    expected = torch.from_numpy(naive_gdpo(components, weights, 4)).float()
    torch.testing.assert_close(result.advantages, expected, rtol=0, atol=1e-6)


def test_gdpo_hears_a_reward_of_small_spread() -> None:
    """Which of two answers is better by the small reward does not show in the total, nor in GRPO."""
    components = [[0, 0.001], [100, 0.0], [0, 0.0], [100, 0.001]]
    totals = [sum(pair) for pair in components]
    inputs = given(totals, components=components)
    coupled, decoupled = (advantages_of(inputs, **row(name)).advantages for name in ("grpo", "gdpo"))
    assert float(coupled[0] - coupled[2]) < 1e-4 and float(decoupled[0] - decoupled[2]) > 1


def test_gdpo_leaves_out_what_is_missing() -> None:
    components = [[1, 1], [2, NAN], [3, 5], [5, 3], [0, NAN], [1, NAN], [2, NAN], [7, NAN]]
    totals = [2, NAN, 8, 8, 0, 1, 2, 7]  # the second reward does not apply to the second group
    result = advantages_of(given(totals, components=components), **row("gdpo"))
    assert result.valid.tolist() == [True, False] + [True] * 6
    kept = [[1, 1], [3, 5], [5, 3]]
    first = sum(
        group_advantages(torch.tensor([values[k] for values in kept], dtype=torch.float64), 3).advantages
        for k in (0, 1)
    )
    second = group_advantages(torch.tensor([0, 1, 2, 7], dtype=torch.float64), 4).advantages
    together = torch.cat([first, second])
    torch.testing.assert_close(
        result.advantages[result.valid], together / (together.std() + 1e-4), rtol=0, atol=1e-5
    )
    assert result.advantages[1] == 0


def test_gdpo_counts_groups_in_which_every_reward_is_equal() -> None:
    components = [[1, 2], [2, 1], [1, 1], [1, 1]]  # equal totals hide a difference in the first group
    result = advantages_of(given([3, 3, 2, 2], 2, components=components, weights=(1.0, 2.0)), **row("gdpo"))
    assert result.zero_variance_groups == 1 and result.metrics["zero_variance_groups"] == 1
    assert result.advantages[0] == -result.advantages[1] != 0 and result.advantages[2:].eq(0).all()


# ---- every row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_missing_reward_does_not_poison(name: str) -> None:
    rewards = [0.1, NAN, 0.9, 0.4, NAN, NAN, NAN, NAN, 1.5, 2.0, math.inf, 0.0]
    result = advantages_of(given(rewards), **row(name))
    assert result.advantages.isfinite().all()
    assert result.valid.tolist() == [math.isfinite(value) for value in rewards]
    assert torch.equal(result.advantages[~result.valid], torch.zeros(6))
    assert result.advantages[result.valid].ne(0).all()
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_order_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)[:, None] * 4 + torch.randperm(4, generator=generator)
    order = order.flatten()
    expected = advantages_of(given(rewards), **row(name)).advantages[order]
    torch.testing.assert_close(advantages_of(given(rewards[order]), **row(name)).advantages, expected)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_equal_rewards_teach_nothing(name: str) -> None:
    result = advantages_of(given([0.1] * 8), **row(name))
    assert torch.equal(result.advantages, torch.zeros(8)) and result.metrics["informative_samples"] == 0


def test_ranks_are_joined_in_order() -> None:
    parts = [
        given(torch.arange(4.0), penalty=torch.ones(4, 5)),
        given(torch.ones(8), penalty=torch.zeros(8, 5)),
    ]
    joined = AdvantageInputs.join(parts)
    assert joined.rewards.tolist() == [0, 1, 2, 3] + [1] * 8
    assert joined.penalty is not None and joined.penalty.sum() == 20 and joined.action_mask.shape == (12, 5)
    output = advantages_of(joined, **row("grpo")).rows(slice(0, 4))
    assert output.advantages.shape == output.valid.shape == (4,) and output.zero_variance_groups == 2


@pytest.mark.parametrize(
    "baseline", [b for b in get_args(Baseline) if "group" not in b and b != "leave_one_out"]
)
def test_a_spread_of_the_group_needs_a_baseline_of_the_group(baseline: Any) -> None:
    with pytest.raises(ValueError, match="not group with a baseline of the batch"):
        group_advantages(torch.rand(4), 2, "group", baseline=baseline)
    with pytest.raises(ValueError, match="group_mean, leave_one_out"):
        group_advantages(torch.rand(4), 2, baseline="median")  # type: ignore[arg-type]


def test_a_users_own_function() -> None:
    inputs = given([1.0, NAN, 3.0, 4.0])
    result = user_advantages(inputs, lambda inputs: inputs.rewards * 2)
    assert result.advantages.tolist() == [2, 0, 6, 8] and result.metrics["informative_samples"] == 3
    per_action = user_advantages(inputs, lambda inputs: inputs.rewards[:, None].expand(4, 5))
    assert per_action.advantages.shape == (4, 5) and per_action.advantages[1].eq(0).all()
    with pytest.raises(ValueError, match=r"\[B\] or \[B, N\] = \[4, 5\], not \[3\]"):
        user_advantages(inputs, lambda inputs: inputs.rewards[:3])
    with pytest.raises(ValueError, match="NaN or inf"):
        user_advantages(inputs, lambda inputs: inputs.rewards / 0)
