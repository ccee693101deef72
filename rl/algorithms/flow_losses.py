"""Policy losses over the denoising steps of a stochastic sampler. Pure functions.

An action is a step: `logprobs` [B, S] are means over the latents' dimensions of the log-density of the
transition, and ratios are their exponentials. Where a loss needs a divergence it gets the exact KL of the step,
which tokens do not have. All three take `FlowLossInputs` and are normalised per sample, then per batch, like GRPO;
every sample has the same number of steps, so this is the plain mean of the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imagerl.rl.algorithms.kl import masked
from imagerl.rl.algorithms.losses import action_weights
from imagerl.rl.algorithms.surrogates import Surrogate, clipped_ratio
from imagerl.rl.types import LossInputs, LossOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowLossInputs(LossInputs):
    """The arguments of a policy loss over denoising steps, N = S. What tokens can only estimate is exact here: the
    KL of a step is known from the two means. `*_kl` are nats per latent dimension, [B, S] as [96, 3], with gradient."""

    std: Tensor  # [S] or [B, S] standard deviation of the transition, sqrt(|dt|) included
    dt: Tensor  # the same shape, change of sigma of the step
    old_kl: Tensor | None = None  # against `old_logprobs`' policy; None: it is the present one, so 0
    ref_kl: Tensor | None = None  # against the frozen reference; None without KL


def flow_grpo_loss(
    inputs: FlowLossInputs,
    *,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    advantage_max: float = 5.0,
    kl_coef: float = 0.0,
) -> LossOutput:
    """Compute Flow-GRPO (arXiv 2505.05470), also with DanceGRPO's or CPS's noise and within a window.

    -min(ratio · A, clip(ratio, 1 − clip_low, 1 + clip_high) · A) + kl_coef · KL per step, advantages clamped to
    ±advantage_max as in the public code. The clip is narrow because the log-prob is a mean over dimensions.

    On purpose unlike flow_grpo: the KL is that of the step, (m − m_ref)² / 2 std², where flow_grpo's divisor
    lacks the factor |dt|. `rl.algorithms.flow_kl.kl_as_flow_grpo` is theirs; hand it in as `ref_kl` to get their loss.

    Returns:
        The loss, and sums over the steps: `actions`, `ratio`, `ratio_deviation`, `clip_low`, `clip_high` as in
        `rl.algorithms.losses.policy_loss`; `old_kl` and, with a reference, `kl`, both exact.

    Raises:
        ValueError: kl_coef without ref_kl, or a denominator that is not positive.
    """
    ratio, advantages = _ratio(inputs), _advantages(inputs, advantage_max)
    surrogate = clipped_ratio(ratio, advantages, clip_low, clip_high)
    return _finish(inputs, -surrogate.objective, kl_coef, surrogate)


def grpo_guard_loss(
    inputs: FlowLossInputs,
    *,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    advantage_max: float = 5.0,
    kl_coef: float = 0.0,
) -> LossOutput:
    """Compute GRPO-Guard (arXiv 2510.22319, equation 8's ratio): Flow-GRPO with a normalised ratio and balanced steps.

    The log-ratio of two Gaussians is noise·shift/std − KL: its mean is −KL, so ratios lie below 1 and the upper
    clip is hardly reached, and its spread depends on the step's std. The normalised ratio adds the KL
    back and multiplies by std, exp((log ratio + KL) · std) = exp(mean(noise · shift)): centred, and of one
    spread for all steps. The clipped surrogate is then divided by |dt|, which evens out the gradients of steps.

    std and dt are each step's own. The public code takes their mean over the microbatch, the same where all
    samples of a microbatch are at one step, as there.

    Args:
        inputs: `old_kl` needs its gradient: half of the normalised ratio's comes through it.

    Returns, Raises: as `flow_grpo_loss`, `ratio` being the normalised one.
    """
    log_ratio = masked(inputs.logprobs - inputs.old_logprobs.detach(), inputs.action_mask)
    if inputs.old_kl is not None:  # at the old policy itself both the KL and its gradient are 0
        log_ratio = log_ratio + masked(inputs.old_kl, inputs.action_mask)
    ratio, advantages = torch.exp(log_ratio * inputs.std), _advantages(inputs, advantage_max)
    surrogate = clipped_ratio(ratio, advantages, clip_low, clip_high)
    return _finish(inputs, -surrogate.objective / inputs.dt.abs(), kl_coef, surrogate)


def flow_dppo_loss(
    inputs: FlowLossInputs,
    *,
    kl_threshold: float = 1e-5,
    advantage_max: float = 5.0,
    kl_coef: float = 0.0,
) -> LossOutput:
    """Compute Flow-DPPO (arXiv 2606.11025): no clip; a step loses its gradient once its exact KL from the old policy
    has reached kl_threshold *and* the update would take it further away, that is, ratio > 1 with A > 0 or
    ratio < 1 with A < 0. Steps that return keep theirs.

    The ratio is one noisy sample of the divergence; the KL is the divergence. kl_threshold is nats per dimension.
    Advantages are clamped to ±advantage_max like those of the other losses; as published they are not. Scaled by the
    standard deviation of a group of up to 26 none reaches 5, so there the two are the same.

    Returns, Raises: as `flow_grpo_loss`; the clip counts are of steps so masked, of negative and positive
    advantage.
    """
    ratio, advantages = _ratio(inputs), _advantages(inputs, advantage_max)
    if inputs.old_kl is None:
        far = torch.zeros_like(inputs.action_mask)
    else:
        far = masked(inputs.old_kl.detach(), inputs.action_mask) >= kl_threshold
    # The KL has no direction; the signs tell whether the update leads away from the old policy or back.
    low, high = far & (ratio < 1) & (advantages < 0), far & (ratio > 1) & (advantages > 0)
    per_step = masked(-ratio * advantages, ~(low | high))
    # The KL to the reference is added later, so that a masked step still feels its pull.
    return _finish(inputs, per_step, kl_coef, Surrogate(-per_step, ratio, low, high))


FLOW_LOSSES: dict[str, Callable[..., LossOutput]] = {
    "flow_grpo": flow_grpo_loss,
    "grpo_guard": grpo_guard_loss,
    "flow_dppo": flow_dppo_loss,
}


def _ratio(inputs: FlowLossInputs) -> Tensor:
    # Zeros go in before any arithmetic: exp(inf) at a masked place is NaN even times 0.
    mask = inputs.action_mask
    return torch.exp(masked(inputs.logprobs, mask) - masked(inputs.old_logprobs.detach(), mask))


def _advantages(inputs: FlowLossInputs, limit: float) -> Tensor:
    return masked(inputs.advantages.expand_as(inputs.logprobs), inputs.action_mask).clamp(-limit, limit)


def _finish(inputs: FlowLossInputs, per_step: Tensor, kl_coef: float, surrogate: Surrogate) -> LossOutput:
    """Add the KL to the reference, weigh the steps, and sum the metrics for the log."""
    if not inputs.denominator > 0:
        raise ValueError(f"denominator must be positive, got {inputs.denominator}: nothing trains")
    if kl_coef and inputs.ref_kl is None:
        raise ValueError("kl_coef needs ref_kl")
    mask, ratio = inputs.action_mask, surrogate.ratio
    if kl_coef and inputs.ref_kl is not None:
        per_step = per_step + kl_coef * masked(inputs.ref_kl, mask)
    weights = action_weights(mask, "sequence").to(per_step.dtype)
    loss = (weights * per_step).sum() / inputs.denominator
    with torch.no_grad():
        sums = {
            "actions": mask,
            "ratio": masked(ratio, mask),
            "ratio_deviation": masked((ratio - 1).abs(), mask),
            "old_kl": torch.zeros_like(ratio) if inputs.old_kl is None else masked(inputs.old_kl, mask),
            "clip_low": surrogate.low,
            "clip_high": surrogate.high,
        }
        if inputs.ref_kl is not None:
            sums["kl"] = masked(inputs.ref_kl, mask)
        metrics = {name: values.sum(dtype=torch.float64) for name, values in sums.items()}
    return LossOutput(loss, metrics)
