"""The objectives that the policy term of a loss maximises: importance ratios and their bounds. Pure functions.

`level_ratio` gives the ratio that an action carries, a `Clip` makes it an objective. All tensors are [B, N] with 0
for log-probs and advantages where the mask is False; what comes out there is finite and means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from imagerl.rl.config.algorithm_table import Clip, RatioLevel

# exp(50) is 5e21, far beyond any clip. Without the bound exp could be inf, whose gradient behind a clip is
# 0 * inf = NaN.
MAX_LOG_RATIO = 50.0


class Bounds(NamedTuple):
    """The limits of a ratio. For `soft` the two temperatures count, for all others the two clips."""

    low: float
    high: float
    soft_positive: float = 1.0
    soft_negative: float = 1.05


class Surrogate(NamedTuple):
    """The objective of each action, with the ratio and the clips that the log shows."""

    objective: Tensor  # [B, N] with gradient
    ratio: Tensor  # [B, N] importance ratio that the action carries
    low: Tensor  # [B, N] bool: the lower bound took effect
    high: Tensor  # [B, N] bool: the upper bound took effect


def level_ratio(log_ratio: Tensor, action_mask: Tensor, level: RatioLevel) -> Tensor:
    """Return the log of the importance ratio that each action carries, [B, N].

    With l_t = logprobs - old_logprobs of a sample of n actions:

    - `token`: l_t;
    - `sequence`: mean of l_t, the same for all actions of a sample (GSPO, arXiv 2507.18071);
    - `product`: sum of l_t, the exact ratio of whole samples (RLOO, arXiv 2402.14740).

    The last two have the sample's value but each action's own gradient (GSPO-token in that paper): averaged
    over the sample they have exactly the gradient of the mean or sum, and advantages or weights may still differ
    between actions. A level whose value *and* gradient were the sample's could not leave a single action out.

    Raises:
        ValueError: unknown level.
    """
    if level == "token":
        return log_ratio
    count = action_mask.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
    if level == "product":
        log_ratio = log_ratio * count
    elif level != "sequence":
        raise ValueError(f"ratio_level must be one of {', '.join(get_args(RatioLevel))}, got {level!r}")
    mean = log_ratio.detach().sum(dim=1, keepdim=True) / count
    # The bracket is 0 and only carries the gradient.
    return mean + (log_ratio - log_ratio.detach())


def surrogate(
    clip: Clip,
    level: RatioLevel,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    bounds: Bounds,
) -> Surrogate:
    """Compute the surrogate called `clip` on the ratio called `level`; see `CLIPS`. Raises ValueError for unknown
    names."""
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    log_ratio = logprobs - old_logprobs
    if clip == "geometric":
        return _geometric(log_ratio, advantages, action_mask, bounds)
    ratio = _exp(level_ratio(log_ratio, action_mask, level))
    return CLIPS[clip](ratio, logprobs, advantages, bounds)


def clipped_ratio(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Surrogate:
    """Return min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), arXiv 1707.06347 equation 7; with high > low
    arXiv 2503.14476. An action whose bound took effect has no gradient. Also that of denoising steps."""
    clipped = ratio.clamp(1 - low, 1 + high)
    below = (ratio < 1 - low) & (advantages < 0)
    above = (ratio > 1 + high) & (advantages > 0)
    return Surrogate(torch.minimum(ratio * advantages, clipped * advantages), ratio, below, above)


def _ratio(ratio: Tensor, logprobs: Tensor, advantages: Tensor, bounds: Bounds) -> Surrogate:
    return clipped_ratio(ratio, advantages, bounds.low, bounds.high)


def _weight(ratio: Tensor, logprobs: Tensor, advantages: Tensor, bounds: Bounds) -> Surrogate:
    """Return clip(ratio, 1 - low, 1 + high) * A * logprobs, the clipped ratio a constant: CISPO, arXiv 2506.13585.
    Every action keeps a gradient, of bounded weight, whatever the sign of A.

    verl bounds the same way. TRL takes one number, the cap itself: its `epsilon_high=5` is clip_low 1,
    clip_high 4 here."""
    weight = ratio.detach().clamp(1 - bounds.low, 1 + bounds.high)
    # Whatever the sign of A: here a bound caps the weight of an action and does not end its gradient.
    low, high = ratio < 1 - bounds.low, ratio > 1 + bounds.high
    return Surrogate(weight * advantages * logprobs, ratio, low, high)


def _soft(ratio: Tensor, logprobs: Tensor, advantages: Tensor, bounds: Bounds) -> Surrogate:
    """Return 4 / t * sigmoid(t * (ratio - 1)) * A with t = soft_positive where A > 0, else soft_negative: SAPO,
    arXiv 2511.20347. On-policy the gradient is that of ratio * A."""
    positive, negative = (
        advantages.new_tensor(bounds.soft_positive),
        advantages.new_tensor(bounds.soft_negative),
    )
    temperature = torch.where(advantages > 0, positive, negative)
    # The sigmoid has slope t / 4 at ratio 1; 4 / t makes it 1, as of the plain ratio.
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(gate * advantages, ratio, never, never)


def _none(ratio: Tensor, logprobs: Tensor, advantages: Tensor, bounds: Bounds) -> Surrogate:
    """Return ratio * A: importance sampling without any bound. On-policy this is REINFORCE."""
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(ratio * advantages, ratio, never, never)


def _geometric(log_ratio: Tensor, advantages: Tensor, action_mask: Tensor, bounds: Bounds) -> Surrogate:
    """Return the geometric mean over a sample's actions of the ratios, each bounded before the mean on the side that
    its advantage pushes to, times A: GMPO, arXiv 2507.20673. The bounds are in log space, that is exp(-low) and
    exp(high)."""
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=bounds.high), log_ratio.clamp(min=-bounds.low))
    mean = _exp(level_ratio(bounded, action_mask, "sequence"))
    low = (log_ratio < -bounds.low) & (advantages < 0)
    high = (log_ratio > bounds.high) & (advantages > 0)
    return Surrogate(mean * advantages, mean, low, high)


def _exp(log_ratio: Tensor) -> Tensor:
    # No lower bound is needed: exp underflows to 0, and so does its gradient.
    return torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO))


CLIPS: dict[Clip, Callable[..., Surrogate]] = {
    "ratio": _ratio,
    "weight": _weight,
    "soft": _soft,
    "geometric": _geometric,
    "none": _none,
}
