"""Policy losses over actions, an action being an image token or a denoising step.

Pure functions: `LossInputs` in, `LossOutput` out, no collective and no average over what they happen to be
given. The normaliser is split in two so that microbatches and ranks add up to one batch exactly:
`action_weights` needs a sample's own mask only, `loss_denominator` is counted once over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Literal, get_args

import torch
from torch import Tensor

from rl.kl import KLEstimator, k3, kl_estimate, kl_sums, masked
from rl.types import ImageRLError, LossInputs, LossOutput

Normaliser = Literal["sequence", "tokens", "constant"]


def loss_denominator(action_mask: Tensor, normaliser: Normaliser, max_length: int) -> float:
    """What the weighted sum over all actions is divided by. Additive: sum it over ranks.

    - `sequence`: samples that train, so the loss is the mean over samples of the mean over their actions
      (GRPO, arXiv 2402.03300 equation 3);
    - `tokens`: actions that train (DAPO, arXiv 2503.14476 equation 8), long samples weigh more;
    - `constant`: samples that train times max_length (Dr. GRPO, arXiv 2503.20783), no length bias at all.

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
    """Weight of each action in the sum that `loss_denominator` divides: [B, N] float64, 0 where masked.

    1 / (actions of the sample) for `sequence`, else 1.
    """
    _check(normaliser)
    weights = action_mask.double()
    if normaliser == "sequence":
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return weights


def grpo_loss(
    inputs: LossInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k3",
    normaliser: Normaliser = "sequence",
) -> LossOutput:
    """Clipped surrogate with a KL term (PPO, arXiv 1707.06347 equation 7; GRPO, arXiv 2402.03300 equation 3).

    loss = sum of weight * (-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * KL)
    over the actions, divided by `inputs.denominator`; ratio = exp(logprobs - old_logprobs).
    clip_high > clip_low is DAPO's asymmetric clip. With old_logprobs = logprobs.detach() the ratio is 1,
    nothing is clipped and the gradient is that of -A * logprobs, the plain policy gradient.

    The KL is that of equation 4 as published. TRL 1.16 by default multiplies it by the ratio
    (`use_bias_correction_kl`, arXiv 2512.02556), which changes its gradient even on-policy; with that
    switched off the two losses are equal.

    Positions outside the mask may hold NaN or inf anywhere: they reach neither loss nor gradient.

    Args:
        inputs: [B, N] tensors. `denominator` comes from `loss_denominator` with the same normaliser; where
            the engine averages gradients over W ranks it is the global count divided by W. `ref_logprobs`
            are needed if kl_coef > 0; if given, KL is measured even at kl_coef 0.

    Returns:
        The loss, and sums over the given actions (float64 scalars without gradient): `actions`; `ratio`;
        `ratio_deviation` = |ratio - 1|, exactly 0 on-policy; `clip_low`, `clip_high` = actions whose gradient
        the lower or upper clip removed; `old_kl` = k3 of the policy against `old_logprobs`, how far this
        update has moved; with a reference `kl_k1`, `kl_k2`, `kl_k3`.

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

    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_action = -torch.minimum(ratio * advantages, clipped * advantages)
    if kl_coef and inputs.ref_logprobs is not None:
        ref_logprobs = masked(inputs.ref_logprobs.detach(), mask)
        per_action = per_action + kl_coef * kl_estimate(kl_estimator, logprobs, ref_logprobs)
    weights = action_weights(mask, normaliser).to(per_action.dtype)
    loss = (weights * per_action).sum() / inputs.denominator

    with torch.no_grad():
        sums = {
            "actions": mask,
            "ratio": masked(ratio, mask),
            "ratio_deviation": (ratio - 1).abs(),
            "clip_low": (ratio < 1 - clip_low) & (advantages < 0),
            "clip_high": (ratio > 1 + clip_high) & (advantages > 0),
            "old_kl": k3(logprobs, old_logprobs),
        }
        metrics = {name: values.sum(dtype=torch.float64) for name, values in sums.items()}
        if inputs.ref_logprobs is not None:
            metrics |= kl_sums(logprobs, inputs.ref_logprobs, mask)
    return LossOutput(loss, metrics)


def _check(normaliser: Normaliser) -> None:
    if normaliser not in get_args(Normaliser):
        raise ValueError(f"normaliser must be one of {', '.join(get_args(Normaliser))}, got {normaliser!r}")


LOSSES: dict[str, Callable[..., LossOutput]] = {"grpo": grpo_loss}


def resolve_loss(name: str) -> Callable[..., LossOutput]:
    """The loss called `name` in a recipe's `algorithm.name`; called with `LossInputs` and keyword settings.

    Raises:
        ImageRLError: no such loss; names the nearest and all that exist.
    """
    if name in LOSSES:
        return LOSSES[name]
    nearest = get_close_matches(name, LOSSES, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ImageRLError(f"algorithm.name: unknown algorithm {name!r}; {hint}known: {', '.join(LOSSES)}")
