"""Take one denoising step of a flow-matching sampler, deterministic or stochastic. Pure functions.

With x_sigma = (1 - sigma) * x_0 + sigma * noise and the velocity v = noise - x_0, every sampler here moves from
sigma to sigma' < sigma by a Gaussian transition whose mean is *linear* in what the network sees and says:

    x' ~ N(a * x + b * v, std^2),   a, b and std depending on the schedule alone.

With the step d = sigma' - sigma < 0, the noise level eta, and g the diffusion coefficient at sigma:

| kind  | a, b                                                    | std                | paper             |
|-------|---------------------------------------------------------|--------------------|-------------------|
| ode   | 1, d                                                    | 0                  | Euler             |
| sde   | 1 + g^2 d / 2 sigma, (1 + g^2 (1 - sigma) / 2 sigma) d  | g sqrt(-d)         | 2505.05470        |
|       |                          g = eta sqrt(sigma / (1 - sigma))                   |                   |
| dance | the same                 g = eta                        | g sqrt(-d)         | 2505.07818        |
| cps   | (1 - sigma') + r, (1 - sigma) r - sigma (1 - sigma')    | sigma' sin(eta pi/2) | 2509.05952      |
|       |                          r = sigma' cos(eta pi / 2)     |                    |                   |

sde and dance discretise the stochastic process with the marginals of the ode; cps splits x' into predicted x_0
and predicted noise, and renews a part of the noise, so that no extra noise is left in the picture.

Everything is float32: a next sample rounded to bfloat16 before it is scored has another log-prob than that of
the distribution it was drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

StepKind = Literal["ode", "sde", "dance", "cps"]


class StepCoefficients(NamedTuple):
    """The N steps of a schedule; float32 on the CPU. The next sample is latents·x + velocity·v + std·noise."""

    latents: Tensor  # [N] a
    velocity: Tensor  # [N] b
    std: Tensor  # [N] of the whole transition, that is, with sqrt(-d) in it; 0: deterministic


def step_coefficients(kind: StepKind, sigmas: Tensor, noise_level: float = 0.0) -> StepCoefficients:
    """Compute the coefficients of all steps of a schedule.

    At sigma = 1 the diffusion coefficient of `sde` is infinite. As in the public code its 1 - sigma is then
    taken at the second noise level, `sigmas[1]`, and nothing else changes; likewise at a sigma that rounding made of 1.

    Args:
        sigmas: [N + 1] falling noise levels in [0, 1].
        noise_level: eta; `ode` ignores it. 0.7 is Flow-GRPO's, 0.3 DanceGRPO's. At 0 all kinds equal `ode`.

    Raises:
        ValueError: an unknown kind, noise levels that do not fall, or a noise_level below 0 (above 1 for cps).
    """
    if kind not in KINDS:
        raise ValueError(f"kind of step must be one of {', '.join(KINDS)}, got {kind!r}")
    if sigmas.dim() != 1 or len(sigmas) < 2 or not (sigmas[1:] < sigmas[:-1]).all():
        raise ValueError("sigmas must be one falling list of at least two noise levels")
    if noise_level < 0 or (kind == "cps" and noise_level > 1):
        raise ValueError(f"noise_level {noise_level} is outside of the range of {kind}")
    exact = sigmas.double().cpu()
    return StepCoefficients(*(value.float() for value in KINDS[kind](exact, noise_level)))


def transition_mean(coefficients: StepCoefficients, step: int, latents: Tensor, velocity: Tensor) -> Tensor:
    """Return the mean [B, C, h, w] of the next latents in float32, whatever precision the velocity comes in."""
    a, b = float(coefficients.latents[step]), float(coefficients.velocity[step])
    return a * latents.float() + b * velocity.float()


def next_latents(mean: Tensor, std: float, noise: Tensor | None = None) -> Tensor:
    """Return mean + std·noise, both [B, C, h, w]. The noise is the caller's, from a generator of each sample's own.

    Raises:
        ValueError: a stochastic step without noise.
    """
    if not std:
        return mean
    if noise is None:
        raise ValueError("a stochastic step needs noise")
    return mean + std * noise.float()


def transition_logprob(following: Tensor, mean: Tensor, std: float, reduce: str = "mean") -> Tensor:
    """Return log N(following; mean, std^2) of each sample, [B] float32, in nats per dimension.

    The *mean* over the latents' dimensions, as all public code has it, not the log-density, which is the
    `sum`: a ratio of densities in thousands of dimensions would be 0 or inf, and so clips are about 1e-4 wide.

    `cps` is scored like the others. flow_grpo scores it without constants and without 1 / (2 std^2):
    `cps_logprob_as_flow_grpo`.

    Args:
        following: [B, ...] what was drawn; a constant of the update, so its gradient is cut.
        mean: [B, ...] of the policy that is asked, with gradient.
        std: of the transition, that is, StepCoefficients.std; must not be 0.

    Raises:
        ValueError: std is 0: a deterministic step has no density, or an unknown `reduce`.
    """
    if not std > 0:
        raise ValueError("a deterministic step has no log-prob")
    scaled = (following.detach().float() - mean.float()) / std
    per_dimension = -scaled.square() / 2 - math.log(std) - math.log(2 * math.pi) / 2
    return _reduce(per_dimension, reduce)


def cps_logprob_as_flow_grpo(following: Tensor, mean: Tensor) -> Tensor:
    """Return -mean (following - mean)^2 [B]: the "log-prob" of flow_grpo's CPS variant.

    It is the Gaussian one times 2 std^2 plus a constant, so its ratios are those of `transition_logprob` to the
    power of 2 std^2 (below 1): late steps are damped. For comparisons; clips tuned with it do not carry over.
    """
    return _reduce(-(following.detach().float() - mean.float()).square(), "mean")


def _reduce(per_dimension: Tensor, how: str) -> Tensor:
    flat = per_dimension.flatten(1)
    if how == "mean":
        return flat.mean(dim=1)
    if how == "sum":
        return flat.sum(dim=1)
    raise ValueError(f"reduce must be mean or sum, got {how!r}")


def _ode(sigmas: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor]:
    step = sigmas.diff()
    return torch.ones_like(step), step, torch.zeros_like(step)


def _diffusion(sigmas: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Euler–Maruyama's coefficients for dx = (v + g^2 / (2 sigma) (x + (1 - sigma) v)) dsigma + g dw,
    whose marginals are those of dx = v dsigma: the score of the marginal at sigma is -(x + (1 - sigma) v) /
    sigma."""
    sigma, step = sigmas[:-1], sigmas.diff()
    pull = g.square() / (2 * sigma)
    return 1 + pull * step, (1 + pull * (1 - sigma)) * step, g * (-step).sqrt()


def _sde(sigmas: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor]:
    sigma = sigmas[:-1]
    distance = 1 - torch.where(sigma > 1 - 1e-6, sigmas[1], sigma)
    return _diffusion(sigmas, noise_level * (sigma / distance).sqrt())


def _dance(sigmas: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor]:
    return _diffusion(sigmas, torch.full_like(sigmas[:-1], noise_level))


def _cps(sigmas: Tensor, noise_level: float) -> tuple[Tensor, Tensor, Tensor]:
    sigma, following = sigmas[:-1], sigmas[1:]
    renewed = following * math.sin(noise_level * math.pi / 2)
    kept = following * math.cos(noise_level * math.pi / 2)
    # x_0 = x - sigma v and noise = x + (1 - sigma) v, in the shares (1 - sigma') and `kept`
    return (1 - following) + kept, (1 - sigma) * kept - sigma * (1 - following), renewed


KINDS: dict[StepKind, Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]]] = {
    "ode": _ode,
    "sde": _sde,
    "dance": _dance,
    "cps": _cps,
}
