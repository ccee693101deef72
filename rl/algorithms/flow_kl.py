"""KL of denoising steps, exact where tokens need estimates: two Gaussians with the same variance. Pure functions.

For N(m, s^2) and N(m', s^2) per dimension KL = (m - m')^2 / (2 s^2), the same in both directions, with s the
standard deviation of the *transition*, std·sqrt(|dt|). Units are nats per dimension: like the log-probs of steps
these are means over the latents' dimensions, so one kl_coef serves every size of picture; times the number of
dimensions they are the KL in nats. Their gradient is that of the KL itself, towards the other mean, and does not
vanish on average as that of k1 does.
"""

from __future__ import annotations

from torch import Tensor


def gaussian_kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """Return the exact KL of each step, [B, S]: mean over dimensions of (mean - other)^2 / (2 std^2).

    Args:
        mean, other: [B, S, ...] means of the two transitions, with gradient where it is wanted.
        std: [S] or [B, S] standard deviation of both transitions, sqrt(|dt|) included.
    """
    return squared_distance(mean, other) / (2 * std.square())


def kl_as_flow_grpo(mean: Tensor, other: Tensor, std: Tensor, dt: Tensor) -> Tensor:
    """Return flow_grpo's KL term of each step of its `sde`, [B, S]: it divides by 2·std_dev_t^2 where the transition's
    standard deviation is std_dev_t·sqrt(|dt|), and so is `gaussian_kl` times |dt|.

    It weighs long steps more, and at N equal steps it is N times smaller: a kl_coef from there is N times too
    large here.

    Args:
        std: [S] or [B, S] as in `gaussian_kl`, that is, with sqrt(|dt|).
        dt: the same shape, change of sigma of each step; its sign does not matter.
    """
    return gaussian_kl(mean, other, std) * dt.abs()


def squared_distance(left: Tensor, right: Tensor) -> Tensor:
    """Average (left - right)^2 over dimensions, [B, S] from [B, S, ...], in float32."""
    return (left.float() - right.float()).square().flatten(2).mean(dim=2)
