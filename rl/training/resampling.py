"""Other prompts in place of groups that teach nothing: the dynamic sampling of DAPO, arXiv 2503.14476 section 3.2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from imagerl.rl.rollout.scores import map_samples, merge_scores
from imagerl.rl.training.half import Gather
from imagerl.rl.types import Prompt, RewardScores, RolloutGroup

Drawn = tuple[list[RolloutGroup], RewardScores]


def resample(
    groups: Sequence[RolloutGroup],
    scores: RewardScores,
    others: Sequence[Prompt],
    rounds: int,
    draw: Callable[[Sequence[Prompt]], Drawn | None],
    gather: Gather,
    rank: int,
) -> tuple[list[RolloutGroup], RewardScores, RewardScores]:
    """Draw `others`, in their order, in place of silent groups until none is left, `rounds` are over or the prompts
    used up. The groups of all ranks are served in order, so that the result does not depend on their number.

    Args:
        groups, scores: what this rank has drawn; each group of the same size.
        others: prompts that may come in, the same on every rank.
        draw: groups and scores of some prompts; None for no prompts.
        gather: every rank's value, in order of rank.

    Returns:
        This rank's groups to train on, their scores, and the scores of all samples that it has drawn.
    """
    groups, size, drawn = list(groups), len(scores.totals) // len(groups), [scores]
    for _ in range(rounds):
        of_halves = [silent_groups(totals, size) for totals in scores.halves.values() or [scores.totals]]
        silent = [group for group in of_halves[0] if all(group in own for own in of_halves)]
        counts = gather(len(silent))
        if not sum(counts) or not others:
            break
        before = sum(counts[:rank])
        fresh = draw(others[before : before + len(silent)])
        others = others[sum(counts) :]
        if fresh is None:
            continue
        places = silent[: len(fresh[0])]  # fewer than wanted once the prompts run out
        scores = replace_groups(scores, places, fresh[1], size)
        drawn.append(fresh[1])
        for place, group in zip(places, fresh[0], strict=True):
            groups[place] = group
    return groups, scores, merge_scores(drawn)


def silent_groups(totals: np.ndarray, group_size: int) -> list[int]:
    """Find groups whose rewards [B] tell no sample from another: all equal, or fewer than two usable."""
    groups = totals.reshape(-1, group_size)
    known = [group[np.isfinite(group)] for group in groups]
    return [i for i, values in enumerate(known) if len(values) < 2 or values.min() == values.max()]


def replace_groups(
    scores: RewardScores, places: Sequence[int], fresh: RewardScores, group_size: int
) -> RewardScores:
    """Replace the groups at `places` in `scores` by those of `fresh`, in order. Failures are of all drawn."""
    order = np.arange(len(scores.totals)).reshape(-1, group_size)
    order[list(places)] = len(scores.totals) + np.arange(len(fresh.totals)).reshape(-1, group_size)
    return map_samples(merge_scores([scores, fresh]), lambda values: values[order.ravel()])
