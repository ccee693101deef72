"""From rewards to advantages: pure functions over the whole step's rewards, computed in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True, slots=True)
class AdvantageOutput:
    """Advantages of B samples and what a reader of the log must know to trust them."""

    advantages: Tensor  # [B] float32, 0 wherever nothing can be learned
    valid: Tensor  # [B] bool, False: no usable reward, the sample must not train
    zero_variance_groups: int  # groups of two or more valid samples whose rewards are all equal
    incomparable_groups: int  # groups with fewer than two valid samples
    metrics: dict[str, float]


def group_advantages(
    rewards: Tensor, group_size: int, scale: Scale = "group", eps: float = 1e-4
) -> AdvantageOutput:
    """Rewards relative to the mean of their group, divided by a spread.

    With r_i the rewards of one group and m their mean, the advantage of sample i is

    - `group`: (r_i - m) / (std of the group + eps), GRPO, arXiv 2402.03300 section 4.1.2;
    - `batch`: (r_i - m) / (std of all rewards of the step + eps), arXiv 2508.08221: a group of nearly
      equal rewards is not blown up to unit variance;
    - `none`: r_i - m, Dr. GRPO, arXiv 2503.20783: no weight on prompts by their difficulty.

    Standard deviations are unbiased (n - 1), as in verl and TRL. A reward that is NaN or infinite is left
    out of every mean and std, and its sample gets advantage 0 and `valid` False. A group with
    fewer than two valid rewards has nothing to compare with and gets 0. Equal rewards give exactly 0, not
    rounding noise divided by eps.

    Args:
        rewards: [B] in group-major order; NaN where a sample has no value. Pass the rewards of the
            whole step, of all ranks: `batch` depends on all of them.
        group_size: samples per prompt; divides B.
        eps: in the unit of the rewards. TRL uses 1e-4, verl 1e-6.

    Raises:
        ValueError: rewards are not [B] with B a positive multiple of group_size, or scale is unknown.
    """
    if rewards.dim() != 1 or group_size < 1 or not len(rewards) or len(rewards) % group_size:
        raise ValueError(
            f"need rewards of whole groups, got shape {tuple(rewards.shape)} for group_size {group_size}"
        )
    grouped = rewards.detach().double().view(-1, group_size)  # [P, G]
    valid = grouped.isfinite()
    count = valid.sum(dim=1, keepdim=True)  # [P, 1]
    # Extremes tell equality exactly; a mean of equal numbers can differ from them in the last bit.
    highest = grouped.where(valid, -torch.inf).amax(dim=1, keepdim=True)
    lowest = grouped.where(valid, torch.inf).amin(dim=1, keepdim=True)
    comparable = count >= 2
    equal = comparable & (highest == lowest)
    learnable = valid & comparable & ~equal

    mean = grouped.where(valid, 0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (grouped - mean).where(learnable, 0.0)
    group_std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()  # [P, 1]
    if scale == "group":
        advantages = centred / (group_std + eps)
    elif scale == "batch":
        advantages = centred / (_std(grouped[valid]) + eps)
    elif scale == "none":
        advantages = centred
    else:
        raise ValueError(f"scale must be group, batch or none, got {scale!r}")
    # eps = 0 beside a spread that underflows to 0 would otherwise leave 0 / 0.
    advantages = advantages.where(learnable, 0.0)

    zero_variance, incomparable = int(equal.sum()), int((~comparable).sum())
    used = advantages[valid]
    metrics = {
        "groups": float(len(grouped)),
        "zero_variance_groups": float(zero_variance),
        "incomparable_groups": float(incomparable),
        "invalid_samples": float((~valid).sum()),
        "advantage_std": _std(used),
        "advantage_abs_max": float(used.abs().max()) if len(used) else 0.0,
        "reward_std_within_groups": float(group_std[comparable].mean()) if comparable.any() else 0.0,
    }
    return AdvantageOutput(
        advantages.flatten().float(), valid.flatten(), zero_variance, incomparable, metrics
    )


def shuffled(rewards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The same rewards [B] dealt out at random over the whole batch: the control run.

    Mean and spread of the step's rewards stay what they are while their link to the samples is cut, so a
    policy that still improves does so for another reason than the reward.
    """
    order = torch.randperm(len(rewards), generator=generator)
    return rewards[order.to(rewards.device)]


def _std(values: Tensor) -> float:
    """Unbiased standard deviation of [n]; 0 for fewer than two values."""
    return float(values.std()) if len(values) > 1 else 0.0
