"""Estimates of KL(policy || reference) from the log-probs of sampled actions. Pure functions.

With p = exp(logprobs) the policy, q = exp(ref_logprobs) the frozen reference, actions drawn from p and
d = log q - log p (Schulman, "Approximating KL divergence", 2020):

| name | per action      | mean over p                             | gradient, mean over p |
|------|-----------------|-----------------------------------------|-----------------------|
| k1   | -d              | KL(p || q), high variance, any sign     | 0: no regularisation  |
| k2   | d^2 / 2         | KL(p || q) + O(d^3), biased, >= 0       | grad KL(p || q)       |
| k3   | exp(d) - d - 1  | KL(p || q), low variance, >= 0          | grad KL(q || p)       |

The gradient column is what a loss that contains the estimate descends when actions are held fixed, as they
are in an update. It is not the gradient of the value column, which would also need the term
of the moving distribution: k3 estimates one KL and pulls along the gradient of the other, k1 along none.
All of it holds while actions come from p itself; later updates on the same rollout are biased by
the ratio. Units are nats per action.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from imagerl.rl.config.algorithm_table import KLEstimator


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return log p - log q, shape of the inputs.

    Value: unbiased for KL(p || q). Gradient: grad log p, whose mean over p is 0, so in a loss it adds
    variance and regularises nothing; as a penalty in the reward it is the right one (`kl_penalty`).
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return (log p - log q)^2 / 2, shape of the inputs.

    Value: KL(p || q) up to third order, biased far from the reference. Gradient: (log p - log q) grad log p,
    whose mean over p is exactly grad KL(p || q), the mode-seeking divergence of the RL objective.
    """
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return q/p - log(q/p) - 1, shape of the inputs; GRPO's estimator, arXiv 2402.03300 equation 4.

    Value: unbiased for KL(p || q) and never negative. Gradient: (1 - q/p) grad log p, whose mean over p is
    grad KL(q || p), the mass-covering divergence; the two agree to first order near the reference.
    """
    d = ref_logprobs - logprobs
    # exp(d) - d - 1 cancels near the reference: in float32 the 5e-9 at d = 1e-4 would come out as 0.
    return torch.expm1(d) - d


ESTIMATORS: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(name: KLEstimator, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Apply the estimator called `name`, per action. Raises ValueError for an unknown name."""
    if name not in ESTIMATORS:
        raise ValueError(f"KL estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    return ESTIMATORS[name](logprobs, ref_logprobs)


def kl_sums(logprobs: Tensor, ref_logprobs: Tensor, action_mask: Tensor) -> dict[str, Tensor]:
    """Sum all three estimates over the actions, for the log: `kl_k1`, `kl_k2`, `kl_k3`, float64 scalars.

    No gradient: use `kl_estimate` in a loss. Masked positions may hold anything. Inputs are [B, N].
    """
    p, q = masked(logprobs.detach(), action_mask), masked(ref_logprobs.detach(), action_mask)
    return {f"kl_{name}": estimate(p, q).sum(dtype=torch.float64) for name, estimate in ESTIMATORS.items()}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, action_mask: Tensor, kl_coef: float) -> Tensor:
    """Return the cost of each action, kl_coef * k1: KL control in the reward, not the loss (arXiv 2009.01325).

    Always k1: with it the policy gradient of the penalised reward is exactly that of
    E[r] - kl_coef * KL(p || q) of whole sequences. k2 or k3 as a reward would be biased. A sample pays the
    sum over its N actions, not their mean, so a kl_coef tuned for a loss that averages is about N times
    too large here.

    Args:
        logprobs: [B, N] of the policy that sampled the actions (`old_logprobs` or `rollout_logprobs`).
        ref_logprobs: [B, N].
        action_mask: [B, N] bool; other positions may hold anything.

    Returns:
        [B, N] float64 in the unit of the reward, 0 where masked, without gradient.
    """
    p, q = (masked(values.detach().double(), action_mask) for values in (logprobs, ref_logprobs))
    return kl_coef * k1(p, q)


def adapted_coef(kl_coef: float, kl: float, target: float, rate: float) -> float:
    """Return the next step's coefficient, kl_coef * (1 + rate * e) with e = kl / target - 1 within ±0.2.

    A proportional controller in log space (arXiv 1909.08593 section 2.2, where rate is 0.1).

    Args:
        kl: measured on samples of the present policy, nats per action, as is `target`. What is not finite, such as
            that of a step without any action, leaves the coefficient alone.
    """
    if not math.isfinite(kl):
        return kl_coef
    # Bounded, since the KL of one step is noisy: no single step may move the coefficient far.
    return kl_coef * (1 + rate * min(max(kl / target - 1, -0.2), 0.2))


def masked(values: Tensor, action_mask: Tensor) -> Tensor:
    """Put 0 where the mask is False, whatever stood there: a product with the mask would keep NaN.

    The gradient of those positions is 0 too.
    """
    return values.where(action_mask, torch.zeros((), dtype=values.dtype, device=values.device))
