"""From rewards to advantages: pure functions over the whole step's rewards, computed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from imagerl.rl.config.algorithm_table import Baseline, Scale


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """The rewards from which advantages are made: the samples of a whole step, of all ranks, group-major."""

    rewards: Tensor  # [B] float64 totals; NaN where a sample has no usable value
    components: Tensor  # [B, K] float64, what each reward returned, NaN where nothing
    weights: tuple[float, ...]  # [K] of the rewards in the total
    group_size: int
    action_mask: Tensor  # [B, N] bool
    penalty: Tensor | None = None  # [B, N] float64: what the KL of each action takes from the reward
    moving_mean: float | None = None  # of the rewards of earlier steps; None: there were none
    credit: Tensor | None = None  # [B, N] float64: what each action is given beside its sample's advantage

    @staticmethod
    def join(parts: Sequence[AdvantageInputs]) -> AdvantageInputs:
        """Join the samples of consecutive ranks."""
        penalties = [part.penalty for part in parts if part.penalty is not None]
        credits = [part.credit for part in parts if part.credit is not None]
        return replace(
            parts[0],
            rewards=torch.cat([part.rewards for part in parts]),
            components=torch.cat([part.components for part in parts]),
            action_mask=torch.cat([part.action_mask for part in parts]),
            penalty=torch.cat(penalties) if penalties else None,
            credit=torch.cat(credits) if credits else None,
        )


@dataclass(frozen=True, slots=True)
class AdvantageOutput:
    """The advantages of B samples, with the counts that a reader of the log needs in order to trust them."""

    advantages: Tensor  # [B] or [B, N] float32, 0 wherever nothing can be learned
    valid: Tensor  # [B] bool, False: no usable reward, the sample must not train
    zero_variance_groups: int  # groups of two or more valid samples whose rewards are all equal
    incomparable_groups: int  # groups with fewer than two valid samples
    metrics: dict[str, float]

    def rows(self, which: slice) -> AdvantageOutput:
        """Select some samples; counts and metrics stay those of all."""
        return replace(self, advantages=self.advantages[which], valid=self.valid[which])

    def with_credit(self, credit: Tensor) -> AdvantageOutput:
        """Add credit [B, N] to the advantages of the actions of valid samples."""
        whole = self.advantages if self.advantages.ndim == 2 else self.advantages[:, None]
        return replace(self, advantages=whole + credit.to(whole.dtype) * self.valid[:, None])


def advantages_of(
    inputs: AdvantageInputs, *, baseline: Baseline, scale: Scale, eps: float, decouple: bool = False
) -> AdvantageOutput:
    """Compute the advantages of any row of `rl.config.algorithm_table`.

    `whiten` standardises the differences to the baseline over all actions of the step instead of dividing by a spread
    of rewards, and takes from action t the penalties of the actions from t on (REINFORCE++, arXiv 2501.03262; as
    verl's implementation of it). All others take the sum of a sample's penalties from its reward: the
    same gradient in the mean, since what an action cannot change has none.

    Raises:
        ValueError: see `group_advantages`.
    """
    if decouple:
        return decoupled_advantages(inputs, baseline=baseline, scale=scale, eps=eps)
    size, moving = inputs.group_size, inputs.moving_mean
    if scale != "whiten":
        penalised = inputs.rewards if inputs.penalty is None else inputs.rewards - inputs.penalty.sum(dim=1)
        return group_advantages(penalised, size, scale, eps, baseline, moving)
    output = group_advantages(inputs.rewards, size, "none", eps, baseline, moving)
    values = output.advantages.double()[:, None]  # [B, 1]
    mask = inputs.action_mask & output.valid[:, None]
    if inputs.penalty is not None:
        # Two flips make the running sum one from each action to the end: earlier penalties are not its doing.
        values = values - inputs.penalty.where(mask, 0.0).flip(1).cumsum(1).flip(1)  # [B, N]
    # A value per sample stands for all of its actions, so it counts once for each.
    counts = mask.double() if values.shape[1] > 1 else mask.double().sum(dim=1, keepdim=True)
    whitened = _whitened(values, counts, eps)
    advantages = (whitened if whitened.shape[1] > 1 else whitened[:, 0]).float()
    return replace(output, advantages=advantages, metrics=output.metrics | spread(advantages, output.valid))


def decoupled_advantages(
    inputs: AdvantageInputs, *, baseline: Baseline = "group_mean", scale: Scale = "group", eps: float = 1e-4
) -> AdvantageOutput:
    """Sum each reward's own advantages with the rewards' weights and divide by (std over the step + eps): GDPO,
    arXiv 2601.05242. A reward with a small spread is heard beside one with a large one.

    A reward that has no value for a sample adds 0 there. A sample without a total is left out of all of them. With
    one reward this is GRPO but for the last division. The sum has mean 0 already, as has each group's.
    """
    total = group_advantages(inputs.rewards, inputs.group_size, "none", eps, baseline)
    summed = torch.zeros(len(inputs.rewards), dtype=torch.float64)
    for weight, values in zip(inputs.weights, inputs.components.unbind(dim=1), strict=True):
        if weight:
            # NaN, not 0: a sample that does not train must not move the mean that others are compared with.
            known = values.where(total.valid, torch.nan)
            part = group_advantages(known, inputs.group_size, scale, eps, baseline).advantages
            summed += weight * part.double()
    advantages = (summed / (_std(summed[total.valid]) + eps)).float()
    # Groups with fewer than two valid samples are all 0 as well, hence the subtraction.
    silent = (advantages == 0).view(-1, inputs.group_size).all(dim=1).sum()
    zero_variance = int(silent) - total.incomparable_groups
    return AdvantageOutput(
        advantages,
        total.valid,
        zero_variance,
        total.incomparable_groups,
        total.metrics | spread(advantages, total.valid) | {"zero_variance_groups": float(zero_variance)},
    )


def group_advantages(
    rewards: Tensor,
    group_size: int,
    scale: Scale = "group",
    eps: float = 1e-4,
    baseline: Baseline = "group_mean",
    moving_mean: float | None = None,
) -> AdvantageOutput:
    """Subtract a baseline from the rewards and divide by a spread.

    With r_i the n rewards of one group and m their mean, the baseline of sample i is

    - `group_mean`: m, GRPO, arXiv 2402.03300 section 4.1.2;
    - `leave_one_out`: the mean of the group's others, so that the advantage is n / (n - 1) * (r_i - m) and
      the gradient unbiased: RLOO, arXiv 2402.14740;
    - `batch_mean`: the mean of all rewards of the step: REINFORCE with a baseline;
    - `moving_average`: `moving_mean`, or the step's mean where there is none yet.

    The difference is divided by

    - `group`: std of the group + eps, GRPO;
    - `batch`: std of all rewards of the step + eps, arXiv 2508.08221: a group of nearly
      equal rewards is not blown up to unit variance;
    - `none`: 1, Dr. GRPO, arXiv 2503.20783: no weight on prompts by their difficulty.

    Standard deviations are unbiased (n - 1), as in verl and TRL. A reward that is NaN or infinite is left
    out of every mean and std, and its sample gets advantage 0 and `valid` False. With a baseline of the
    group, one with fewer than two valid rewards has nothing to compare with and gets 0, and equal rewards
    give exactly 0, not rounding noise divided by eps.

    Args:
        rewards: [B] in group-major order; NaN where a sample has no value. Pass the rewards of the
            whole step, of all ranks: `batch` depends on all of them.
        group_size: samples per prompt; divides B.
        eps: in the unit of the rewards. TRL uses 1e-4, verl 1e-6.

    Raises:
        ValueError: rewards are not [B] with B a positive multiple of group_size, or scale or baseline is
            unknown, or a group's spread is to divide differences to another baseline.
    """
    if rewards.dim() != 1 or group_size < 1 or not len(rewards) or len(rewards) % group_size:
        raise ValueError(
            f"need rewards of whole groups, got shape {tuple(rewards.shape)} for group_size {group_size}"
        )
    within_group = baseline in ("group_mean", "leave_one_out")
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline must be one of {', '.join(get_args(Baseline))}, got {baseline!r}")
    if scale not in (("group", "batch", "none") if within_group else ("batch", "none")):
        raise ValueError(
            f"scale must be group, batch or none, and not group with a baseline of the batch, got {scale!r}"
        )
    grouped = rewards.detach().double().view(-1, group_size)  # [P, G]
    valid = grouped.isfinite()
    count = valid.sum(dim=1, keepdim=True)  # [P, 1]
    # Extremes tell equality exactly; a mean of equal numbers can differ from them in the last bit.
    highest = grouped.where(valid, -torch.inf).amax(dim=1, keepdim=True)
    lowest = grouped.where(valid, torch.inf).amin(dim=1, keepdim=True)
    comparable = count >= 2
    equal = comparable & (highest == lowest)

    mean = grouped.where(valid, 0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (grouped - mean).where(valid & comparable & ~equal, 0.0)
    group_std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()  # [P, 1]
    if within_group:
        learnable = valid & comparable & ~equal
        advantages = centred
        if baseline == "leave_one_out":
            advantages = centred * count / (count - 1).clamp(min=1)
    else:
        level = moving_mean if baseline == "moving_average" and moving_mean is not None else None
        all_equal = highest.max() == lowest.min()
        # Equal rewards still differ from a moving average, so there they do teach.
        learnable = valid & ~all_equal if level is None else valid
        advantages = grouped - (grouped[valid].mean() if level is None else level)
    if scale == "group":
        advantages = advantages / (group_std + eps)
    elif scale == "batch":
        advantages = advantages / (_std(grouped[valid]) + eps)
    # eps = 0 beside a spread that underflows to 0 would otherwise leave 0 / 0.
    advantages = advantages.where(learnable, 0.0)

    zero_variance, incomparable = int(equal.sum()), int((~comparable).sum())
    metrics = {
        "groups": float(len(grouped)),
        "zero_variance_groups": float(zero_variance),
        "incomparable_groups": float(incomparable),
        "invalid_samples": float((~valid).sum()),
        **spread(advantages.flatten(), valid.flatten()),
        "reward_std_within_groups": float(group_std[comparable].mean()) if comparable.any() else 0.0,
    }
    return AdvantageOutput(
        advantages.flatten().float(), valid.flatten(), zero_variance, incomparable, metrics
    )


def moved_mean(previous: float | None, rewards: Tensor, decay: float) -> float | None:
    """Return decay * previous + (1 - decay) * mean of the finite rewards [B]; at first that mean alone."""
    known = rewards.double()[rewards.isfinite()]
    if not len(known):
        return previous
    mean = float(known.mean())
    return mean if previous is None else decay * previous + (1 - decay) * mean


def shuffled(rewards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Deal the rewards [B] out at random over the whole batch, for the control run.

    Mean and spread of the step's rewards stay what they are while their link to the samples is cut, so a
    policy that still improves does so for another reason than the reward.
    """
    order = torch.randperm(len(rewards), generator=generator)
    return rewards[order.to(rewards.device)]


def _whitened(values: Tensor, counts: Tensor, eps: float) -> Tensor:
    """Return (x - mean) / (std + eps) of [B, M], each entry counted `counts` times [B, M]; 0 where never."""
    total = counts.sum()
    mean = (counts * values).sum() / total.clamp(min=1)
    centred = values - mean
    std = ((counts * centred.square()).sum() / (total - 1).clamp(min=1)).sqrt()
    return (centred / (std + eps)).where(counts > 0, 0.0)


def spread(advantages: Tensor, valid: Tensor) -> dict[str, float]:
    """Measure the advantages [B] or [B, N] of the valid samples [B]."""
    used = advantages[valid].double()
    return {
        "advantage_std": _std(used.flatten()),
        "advantage_abs_max": float(used.abs().max()) if used.numel() else 0.0,
        "informative_samples": float((used != 0).view(len(used), -1).any(dim=1).sum()) if len(used) else 0.0,
    }


def _std(values: Tensor) -> float:
    """Return the unbiased standard deviation of [n]; 0 for fewer than two values."""
    return float(values.std()) if len(values) > 1 else 0.0
