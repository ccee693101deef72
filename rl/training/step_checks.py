"""Reasons to stop in the middle of a step. Ranks call these with gathered values, so that all of them stop alike."""

from __future__ import annotations

import numpy as np

from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import RewardScores


def refuse_failures(drawn: RewardScores, limit: float) -> None:
    """Raise ImageRLError when too many samples of the step have no reward."""
    lost = float(np.isnan(drawn.totals).mean())
    if lost > limit:
        why = "; ".join(f"{label}: {reason}" for label, reason in drawn.reasons.items()) or "no value"
        raise ImageRLError(
            f"{lost:.0%} of the samples have no reward (rewards.max_failure_rate is {limit:g}): {why}"
        )


def refuse_gap(gap: float, limit: float) -> None:
    """Raise ImageRLError, before the weights change, when sampler and trainer disagree beyond rounding: then one of
    them does not compute the distribution that both claim."""
    if not gap <= limit:  # NaN too
        raise ImageRLError(
            f"sampler and trainer disagree by {gap:.2g} on a log-prob (rollout.max_logprob_diff "
            f"is {limit:g}); use engine.precision=fp32, or raise the limit if bfloat16 explains it"
        )
