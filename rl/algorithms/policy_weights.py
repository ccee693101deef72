"""Weights of the policy term of single actions: `LossInputs.policy_weights`. Pure functions, no gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imagerl.rl.algorithms.kl import masked


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
