"""Rewards of several requests as those of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rl.types import RewardScores


def merge_scores(parts: Sequence[RewardScores]) -> RewardScores:
    """Scores of consecutive requests as one."""
    failures: dict[str, int] = {}
    for part in parts:
        for label, count in part.failures.items():
            failures[label] = failures.get(label, 0) + count
    return RewardScores(
        totals=np.concatenate([part.totals for part in parts]),
        components=join_components([(len(part.totals), part.components) for part in parts]),
        failures=failures,
        reasons={label: reason for part in parts for label, reason in part.reasons.items()},
        gated=join_components([(len(part.totals), part.gated) for part in parts]),
        weights=dict(parts[0].weights),
    )


def join_components(parts: Sequence[tuple[int, Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Components of consecutive samples as one; NaN where a part lacks one, as when a reward failed there."""
    names = dict.fromkeys(name for _, components in parts for name in components)
    return {
        name: np.concatenate([components.get(name, np.full(size, np.nan)) for size, components in parts])
        for name in names
    }
