"""Losses on the forward process: finished samples are noised again, and the velocity there is pulled towards
good samples and away from bad ones. No step needs a density, so samples may come from any sampler. Pure functions
of `MatchingInputs`, normalised per sample, then per batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from imagerl.rl.algorithms.flow_kl import squared_distance
from imagerl.rl.algorithms.kl import masked
from imagerl.rl.algorithms.losses import action_weights
from imagerl.rl.algorithms.surrogates import clipped_ratio
from imagerl.rl.types import LossOutput

MatchingWeight = Literal["uniform", "sigma", "sigma_squared", "huber", "ghuber"]
GHUBER_POWER = 0.25


@dataclass(frozen=True, slots=True)
class MatchingInputs:
    """The arguments of a loss on the forward process: an action is a noise level with a noise, at which the network
    is asked for the velocity of a finished sample. M of them per sample; velocities are [B, M, C, h, w]: [96, 4, 24,
    4, 8]."""

    velocity: Tensor  # with gradient
    old_velocity: Tensor | None  # of the policy that drew the samples; None: the present one
    ref_velocity: Tensor | None  # of the frozen reference; None without KL
    latents: Tensor  # [B, C, h, w] the finished samples
    noise: Tensor  # [B, M, C, h, w]; the network saw (1 - sigma) latents + sigma noise
    sigma: Tensor  # [B, M] in (0, 1]
    advantages: Tensor  # [B, M] or [B, 1]
    action_mask: Tensor  # [B, M] bool
    denominator: float


def nft_loss(
    inputs: MatchingInputs,
    *,
    beta: float = 1.0,
    advantage_max: float = 5.0,
    kl_coef: float = 0.0,
    min_weight: float = 1e-5,
) -> LossOutput:
    """Compute DiffusionNFT (arXiv 2509.16117): r · error(v⁺) + (1 − r) · error(v⁻) with the implicit policies
    v⁺ = (1 − beta) v_old + beta v and v⁻ = (1 + beta) v_old − beta v, so that what a bad sample teaches is to
    move the other way.

    r = 1/2 + clip(A, ±advantage_max) / (2 advantage_max) is the optimality probability. An error is the squared
    distance of the predicted from the finished latents, x − sigma v, divided by its own mean absolute value
    (at least min_weight, no gradient): the paper's adaptive weight.

    As in the public code the sum is multiplied by advantage_max / beta, which leaves the gradient at the old
    policy independent of both, and the KL term is kl_coef · mean (v − v_ref)², in squared velocities.

    Returns:
        The loss, and sums over the actions: `actions`, `positive`, `negative` errors, `old_distance` =
        mean (v − v_old)², and with a reference `kl` = mean (v − v_ref)².

    Raises:
        ValueError: kl_coef without ref_velocity, or a denominator that is not positive.
    """
    velocity = inputs.velocity.float()
    old = (inputs.velocity if inputs.old_velocity is None else inputs.old_velocity).detach().float()
    positive = _adaptive_error(inputs, (1 - beta) * old + beta * velocity, min_weight)
    negative = _adaptive_error(inputs, (1 + beta) * old - beta * velocity, min_weight)
    advantages = masked(inputs.advantages.expand_as(positive), inputs.action_mask)
    optimality = (advantages.clamp(-advantage_max, advantage_max) / advantage_max + 1) / 2
    per_action = (optimality * positive + (1 - optimality) * negative) * advantage_max / beta
    sums = {"positive": positive, "negative": negative, "old_distance": squared_distance(velocity, old)}
    return _finish(inputs, per_action, kl_coef, sums)


def old_policy_decay(updates: int, after: int, rate: float, most: float) -> float:
    """Return η of DiffusionNFT's old policy, θ_old ← η θ_old + (1 − η) θ, made after each rollout's updates (arXiv
    2509.16117, algorithm 1): 0 for `after` updates, then `rate` more with each, up to `most`."""
    return min(max(updates - after, 0) * rate, most)


def awm_loss(
    inputs: MatchingInputs,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    advantage_max: float = 5.0,
    kl_coef: float = 0.0,
    weight: MatchingWeight = "uniform",
) -> LossOutput:
    """Compute advantage-weighted matching (arXiv 2509.25050): the policy gradient in which the log-prob of a
    sample is its bound, minus the flow-matching loss, `matching_logprobs`. At the old policy the gradient is
    that of A · ‖v − (noise − x)‖², the pretraining loss times the advantage.

    The clipped surrogate is Flow-GRPO's. The published clip of ±1 removes hardly anything, and the weight
    `uniform` is the one that the paper recommends; `ghuber` is the default of its code. Advantages are clamped,
    and not divided by advantage_max as there: that is a factor of the learning rate.

    Returns, Raises: as `nft_loss`, with `ratio`, `ratio_deviation`, `clip_low`, `clip_high` for the errors.
    """
    logprobs = matching_logprobs(inputs.velocity, inputs, weight)
    if inputs.old_velocity is None:
        old_logprobs = logprobs.detach()
    else:
        old_logprobs = matching_logprobs(inputs.old_velocity, inputs, weight).detach()
    mask = inputs.action_mask
    ratio = torch.exp(masked(logprobs - old_logprobs, mask))
    advantages = masked(inputs.advantages.expand_as(ratio), mask).clamp(-advantage_max, advantage_max)
    surrogate = clipped_ratio(ratio, advantages, clip_low, clip_high)
    old = inputs.velocity if inputs.old_velocity is None else inputs.old_velocity
    sums = {
        "ratio": ratio,
        "ratio_deviation": (ratio - 1).abs(),
        "clip_low": surrogate.low,
        "clip_high": surrogate.high,
        "old_distance": squared_distance(inputs.velocity, old),
    }
    return _finish(inputs, -surrogate.objective, kl_coef, sums)


MATCHING_LOSSES: dict[str, Callable[..., LossOutput]] = {"nft": nft_loss, "awm": awm_loss}


def matching_logprobs(velocity: Tensor, inputs: MatchingInputs, weight: MatchingWeight) -> Tensor:
    """Return minus the flow-matching loss of each action, [B, M]: with e = mean (v − (noise − x))²,

    uniform e, sigma e·sigma, sigma_squared e·sigma², huber √e·sigma, ghuber e^p·sigma / p with p = 1/4. The last
    two are made 0 at e = 0 up to 1e-5, as in the public code.
    """
    if weight not in get_args(MatchingWeight):
        raise ValueError(f"weight must be one of {', '.join(get_args(MatchingWeight))}, got {weight!r}")
    error = squared_distance(velocity, inputs.noise.float() - inputs.latents.float()[:, None])
    if weight == "uniform":
        return -error
    if weight == "sigma":
        return -error * inputs.sigma
    if weight == "sigma_squared":
        return -error * inputs.sigma.square()
    tiny = 1e-10  # keeps the roots' gradients finite
    power = 0.5 if weight == "huber" else GHUBER_POWER
    scale = 1.0 if weight == "huber" else 1 / GHUBER_POWER
    bent: Tensor = (error + tiny) ** power - tiny**power
    return -bent * scale * inputs.sigma


def _adaptive_error(inputs: MatchingInputs, velocity: Tensor, min_weight: float) -> Tensor:
    """Divide the squared error of the latents predicted from a velocity by their mean absolute error, [B, M].

    x − sigma v − x_0 = sigma (noise − x_0 − v), so neither x nor the prediction is formed."""
    target = inputs.noise.float() - inputs.latents.float()[:, None]
    error = (target - velocity).flatten(2) * inputs.sigma[..., None]
    with torch.no_grad():
        size = error.double().abs().mean(dim=2).clamp(min=min_weight).float()
    return error.square().mean(dim=2) / size


def _finish(
    inputs: MatchingInputs, per_action: Tensor, kl_coef: float, sums: dict[str, Tensor]
) -> LossOutput:
    if not inputs.denominator > 0:
        raise ValueError(f"denominator must be positive, got {inputs.denominator}: nothing trains")
    mask = inputs.action_mask
    if inputs.ref_velocity is not None:
        distance = squared_distance(inputs.velocity, inputs.ref_velocity.detach())
        per_action = per_action + kl_coef * distance if kl_coef else per_action
        sums = {**sums, "kl": distance}
    elif kl_coef:
        raise ValueError("kl_coef needs ref_velocity")
    weights = action_weights(mask, "sequence").to(per_action.dtype)
    loss = (weights * masked(per_action, mask)).sum() / inputs.denominator
    with torch.no_grad():
        metrics = {"actions": mask.sum(dtype=torch.float64)}
        metrics |= {name: masked(value, mask).sum(dtype=torch.float64) for name, value in sums.items()}
    return LossOutput(loss, metrics)
