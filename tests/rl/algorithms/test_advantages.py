import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagerl.rl.algorithms.advantages import group_advantages, shuffled

PARITY = Path(os.environ.get("IMAGERL_PARITY_DIR", Path(__file__).parents[2] / "data" / "parity"))
NAN = math.nan


def rewards_of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def public() -> dict[str, torch.Tensor]:
    return load_file(PARITY / "algorithms.safetensors")


@pytest.mark.parametrize(("scale", "key"), [("group", "adv/grpo_std_eps1e-6"), ("none", "adv/dr_grpo")])
def test_agrees_with_the_public_implementation(public, scale, key):
    result = group_advantages(public["rewards"], 4, scale, eps=1e-6)
    assert torch.equal(public["group_index"], torch.arange(12) // 4)
    torch.testing.assert_close(result.advantages, public[key], rtol=0, atol=1e-6)
    assert result.zero_variance_groups == 1


def test_hand_values_of_every_scale():
    # Group means 1 and 4; group stds sqrt(2) and sqrt(8); std of (0, 2, 2, 6) is sqrt(19 / 3).
    rewards = rewards_of(0, 2, 2, 6)
    centred = torch.tensor([-1.0, 1.0, -2.0, 2.0])
    stds = {
        "none": torch.ones(4),
        "group": torch.tensor([2.0, 2.0, 8.0, 8.0]).sqrt() + 0.5,
        "batch": torch.full((4,), 19 / 3).sqrt() + 0.5,
    }
    for scale, std in stds.items():
        result = group_advantages(rewards, 2, scale, eps=0.5)
        torch.testing.assert_close(result.advantages, centred / std)


def test_a_missing_reward_leaves_the_rest_of_its_group_as_if_it_had_never_been():
    result = group_advantages(rewards_of(0.1, NAN, 0.9, 0.4, math.inf, 1, 0, 0), 4)
    without = group_advantages(rewards_of(0.1, 0.9, 0.4, 1, 0, 0), 3)
    assert result.valid.tolist() == [True, False, True, True, False, True, True, True]
    assert torch.equal(result.advantages[result.valid], without.advantages)
    assert torch.equal(result.advantages[~result.valid], torch.zeros(2))
    assert result.metrics["invalid_samples"] == 2


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_equal_rewards_give_exactly_zero_and_are_counted(scale, eps):
    # The mean of three 0.1 differs from 0.1 in the last bit, so subtracting alone leaves noise.
    result = group_advantages(rewards_of(0.1, 0.1, 0.1, 0.7, 0.7, NAN, 0.2, 0.1, 0.3), 3, scale, eps)
    assert torch.equal(result.advantages[:6], torch.zeros(6))
    assert result.advantages[6:].ne(0).sum() >= 2
    assert (result.zero_variance_groups, result.incomparable_groups) == (2, 0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_with_one_or_no_reward_are_zero(scale):
    result = group_advantages(rewards_of(NAN, NAN, 5, NAN, 1, 3), 2, scale)
    assert torch.equal(result.advantages[:4], torch.zeros(4))
    assert result.advantages[4] < 0 < result.advantages[5]
    assert (result.zero_variance_groups, result.incomparable_groups) == (0, 2)
    nothing = group_advantages(rewards_of(NAN, NAN), 2, scale)
    assert torch.equal(nothing.advantages, torch.zeros(2))
    assert not nothing.valid.any()
    assert all(math.isfinite(v) for v in nothing.metrics.values())


def test_rewards_far_from_zero_keep_their_precision():
    small = group_advantages(torch.tensor([0.0, 1e-3, 2e-3, 4e-3], dtype=torch.float64), 4)
    moved = group_advantages(torch.tensor([0.0, 1e-3, 2e-3, 4e-3], dtype=torch.float64) + 1e6, 4)
    torch.testing.assert_close(small.advantages, moved.advantages, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_order_of_groups_and_within_groups_does_not_matter(scale):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(24, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)[:, None] * 4 + torch.randperm(4, generator=generator)
    order = order.flatten()
    expected = group_advantages(rewards, 4, scale).advantages[order]
    torch.testing.assert_close(group_advantages(rewards[order], 4, scale).advantages, expected)


@pytest.mark.parametrize(
    ("rewards", "size"), [(torch.ones(5), 2), (torch.ones(4, 1), 2), (torch.ones(4), 0), (torch.ones(0), 2)]
)
def test_incomplete_groups_are_refused(rewards, size):
    with pytest.raises(ValueError, match="whole groups"):
        group_advantages(rewards, size)


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="group, batch or none"):
        group_advantages(torch.rand(4), 2, "std")  # type: ignore[arg-type]


def test_shuffled_deals_the_same_rewards_out_again():
    rewards = torch.arange(64.0)
    one, same = (shuffled(rewards, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, same)
    assert torch.equal(one.sort().values, rewards)
    # Over the batch, not within groups: most samples get the reward of another prompt.
    assert (one.long() // 8 != torch.arange(64) // 8).sum() > 32
