"""Policy losses over actions, an action being an image token or a denoising step.

Pure functions: `LossInputs` in, `LossOutput` out, no collective and no average over what they happen to be
given. The normaliser is split in two so that microbatches and ranks add up to one batch exactly:
`action_weights` needs a sample's own mask only, `loss_denominator` is counted once over the global batch.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from torch import Tensor

from imagerl.rl.algorithms.kl import k3, kl_estimate, kl_sums, masked
from imagerl.rl.algorithms.surrogates import Bounds, surrogate
from imagerl.rl.config.algorithm_table import Clip, KLEstimator, Normaliser, RatioLevel
from imagerl.rl.types import LossInputs, LossOutput


def loss_denominator(action_mask: Tensor, normaliser: Normaliser, max_length: int) -> float:
    """Count what the weighted sum over all actions is divided by. Additive: sum it over ranks.

    - `sequence`: samples that train, so the loss is the mean over samples of the mean over their actions
      (GRPO, arXiv 2402.03300 equation 3);
    - `tokens`: actions that train (DAPO, arXiv 2503.14476 equation 8), long samples weigh more;
    - `constant`: samples that train times max_length (Dr. GRPO, arXiv 2503.20783), no length bias at all;
    - `sum`: samples that train, each with the sum over its actions (LUSPO, arXiv 2602.05261; REINFORCE).

    A sample without any action (all False) counts in none of them, so that lost rewards do not shrink the
    step. TRL divides by all rows instead; without such samples the two are equal.

    Args:
        action_mask: [B, N] bool of the *global* batch of one optimizer step.
        max_length: the most actions a sample can have; only `constant` reads it.

    Returns:
        The count, 0.0 when nothing trains: then there is no step to make.
    """
    _check(normaliser)
    if normaliser == "tokens":
        return float(action_mask.sum())
    samples = float(action_mask.any(dim=1).sum())
    return samples * max_length if normaliser == "constant" else samples


def action_weights(action_mask: Tensor, normaliser: Normaliser) -> Tensor:
    """Return the weight of each action in the sum that `loss_denominator` divides: [B, N] float64, 0 where masked.

    1 / (actions of the sample) for `sequence`, else 1. A gradient under `sum` is thus about max_length times
    that under `sequence`, and so is the weight of a KL or entropy term.
    """
    _check(normaliser)
    weights = action_mask.double()
    if normaliser == "sequence":
        # A sample without actions would be 0 / 0; its numerators are 0, so any positive divisor will do.
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return weights


def policy_loss(
    inputs: LossInputs,
    *,
    ratio_level: RatioLevel = "token",
    clip: Clip = "ratio",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    soft_positive: float = 1.0,
    soft_negative: float = 1.05,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    normaliser: Normaliser = "sequence",
) -> LossOutput:
    """Compute the loss of every algorithm in `rl.config.algorithm_table`; the defaults are GRPO's (arXiv 2402.03300
    equation 3).

    loss = sum of weight * (-policy_weight * surrogate + kl_coef * kl_weight * KL) over the actions, divided by
    `inputs.denominator`. The surrogate is that of `rl.algorithms.surrogates`; with `clip="ratio"` it is PPO's
    min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logprobs - old_logprobs). With
    old_logprobs = logprobs.detach() the ratio is 1, nothing is clipped, and every clip and level has the
    gradient of -A * logprobs, the plain policy gradient.

    The KL is that of equation 4 as published. TRL 1.16 by default multiplies it by the ratio
    (`use_bias_correction_kl`, arXiv 2512.02556), which changes its gradient even on-policy; with that
    switched off the losses are equal.

    Positions outside the mask may hold NaN or inf anywhere: they reach neither loss nor gradient.

    Args:
        inputs: [B, N] tensors. `denominator` comes from `loss_denominator` with the same normaliser; where
            the engine averages gradients over W ranks it is the global count divided by W. `ref_logprobs`
            are needed if kl_coef > 0; if given, KL is measured even at kl_coef 0.

    Returns:
        The loss, and sums over the given actions (float64 scalars without gradient): `actions`; `ratio`, the one
        that the level gives each action; `ratio_deviation` = |ratio - 1|, exactly 0 on-policy, and its square
        `ratio_deviation_squared`; `clip_low`, `clip_high` = actions on which the lower or upper bound took
        effect; `old_kl` = k3 of KL(old policy || policy), how far updates have moved: the actions are the old
        policy's; with policy weights `policy_weight`; with a reference `kl_k1`, `kl_k2`, `kl_k3`.

    Raises:
        ValueError: kl_coef without ref_logprobs, a denominator that is not positive, advantages that are
            neither [B, N] nor [B, 1], or an unknown name.
    """
    if not inputs.denominator > 0:
        raise ValueError(f"denominator must be positive, got {inputs.denominator}: nothing trains")
    if kl_coef and inputs.ref_logprobs is None:
        raise ValueError("kl_coef needs ref_logprobs")
    if inputs.advantages.dim() != 2:  # [B] would broadcast over actions and pass unseen where B == N
        raise ValueError(f"advantages must be [B, N] or [B, 1], got shape {tuple(inputs.advantages.shape)}")
    mask = inputs.action_mask
    # Zeros go in before any arithmetic: inf - inf or exp(inf) at a masked place is NaN even times 0.
    logprobs, old_logprobs = masked(inputs.logprobs, mask), masked(inputs.old_logprobs.detach(), mask)
    advantages = masked(inputs.advantages.expand_as(logprobs), mask)

    bounds = Bounds(clip_low, clip_high, soft_positive, soft_negative)
    maximised = surrogate(clip, ratio_level, logprobs, old_logprobs, advantages, mask, bounds)
    per_action = -maximised.objective
    if inputs.policy_weights is not None:
        policy_weights = masked(inputs.policy_weights.detach().to(per_action.dtype), mask)
        per_action = per_action * policy_weights
    if kl_coef and inputs.ref_logprobs is not None:
        ref_logprobs = masked(inputs.ref_logprobs.detach(), mask)
        kl = kl_estimate(kl_estimator, logprobs, ref_logprobs)
        if inputs.kl_weights is not None:
            kl = kl * masked(inputs.kl_weights.detach().to(kl.dtype), mask)
        per_action = per_action + kl_coef * kl
    weights = action_weights(mask, normaliser).to(per_action.dtype)
    loss = (weights * per_action).sum() / inputs.denominator

    with torch.no_grad():
        ratio = masked(maximised.ratio, mask)
        deviation = masked(ratio - 1, mask)
        sums = {
            "actions": mask,
            "ratio": ratio,
            "ratio_deviation": deviation.abs(),
            "ratio_deviation_squared": deviation.square(),
            "clip_low": maximised.low & mask,
            "clip_high": maximised.high & mask,
            # The old policy drew the actions, so it is k3's first argument: the other order would be biased.
            "old_kl": k3(old_logprobs, logprobs),
        }
        if inputs.policy_weights is not None:
            sums["policy_weight"] = policy_weights
        metrics = {name: values.sum(dtype=torch.float64) for name, values in sums.items()}
        if inputs.ref_logprobs is not None:
            metrics |= kl_sums(logprobs, inputs.ref_logprobs, mask)
    return LossOutput(loss, metrics)


def _check(normaliser: Normaliser) -> None:
    if normaliser not in get_args(Normaliser):
        raise ValueError(f"normaliser must be one of {', '.join(get_args(Normaliser))}, got {normaliser!r}")


# ---- weights of the policy term of single actions: `LossInputs.policy_weights` ------------------------------


def policy_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    action_mask: Tensor,
    importance_cap: float | None,
    selected: Tensor | None,
) -> Tensor | None:
    """Multiply the weights that a recipe asks for, [B, N]: truncated importance, and 0 where not `selected` (a bool
    [B, N], see `highest_entropy`). None where it asks for neither."""
    if importance_cap is None:
        return None if selected is None else (selected & action_mask).to(old_logprobs.dtype)
    weights = truncated_importance(
        masked(old_logprobs, action_mask), masked(rollout_logprobs, action_mask), importance_cap
    )
    return weights if selected is None else masked(weights, selected)


def truncated_importance(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Return min(probability under the trainer / under the sampler, cap) of each action, [B, N].

    It corrects for samples that were drawn from another distribution than `old_logprobs` are of: older weights, or
    another precision. Without the cap it is unbiased per action and of unbounded variance ("TIS", Yao et al., "On
    the Rollout-Training Mismatch in Modern RL Systems", NeurIPS 2025 workshop; V-trace, arXiv 1802.01561). Where
    the two agree it is 1.
    """
    return torch.exp((old_logprobs - rollout_logprobs).detach()).clamp(max=cap)


def entropy_threshold(entropies: np.ndarray, top: float) -> float:
    """Return the entropy that a share `top` of the actions reaches: their (1 - top) quantile, interpolated linearly.

    Training on those alone is arXiv 2506.01939, which takes 0.2. Pass the entropies [n], nats, of all actions of
    the global batch, so that neither microbatches nor ranks matter. Infinite for n = 0.
    """
    return float(np.quantile(entropies.astype(np.float64), 1 - top)) if len(entropies) else np.inf


def highest_entropy(entropy: Tensor, action_mask: Tensor, threshold: float) -> Tensor:
    """Mark the actions whose entropy is at least the threshold, [B, N] bool, False where masked."""
    return (entropy.double() >= threshold) & action_mask
