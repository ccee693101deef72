from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from imagerl.rl.rollout.scores import average_decodes, merge_scores
from imagerl.rl.training.resampling import replace_groups, resample, silent_groups
from imagerl.rl.types import Prompt, RewardScores, RolloutGroup

NAN = np.nan


def scores_of(*totals: float, failures: int = 0) -> RewardScores:
    values = np.array(totals)
    return RewardScores(values, {"r": values / 2}, {"r": failures}, {}, {"r": values * 10}, {"r": 1})


def group(index: int, size: int = 2) -> RolloutGroup:
    zeros = torch.zeros(size, 3)
    images = np.zeros((size, 1, 1, 3), dtype=np.uint8)
    return RolloutGroup(Prompt(index, f"prompt {index}"), zeros.long(), zeros, zeros.bool(), images)


def names(groups: Sequence[RolloutGroup]) -> list[int]:
    return [group.prompt.index for group in groups]


def test_silent_groups_have_nothing_to_compare() -> None:
    totals = np.array([0.1, 0.1, 0.1, 0.5, 0.5, NAN, NAN, NAN, 2.0, 1.0, 1.0, 1.0 + 1e-9])
    assert silent_groups(totals, 3) == [0, 1, 2]
    assert silent_groups(totals[-3:], 3) == []


def test_groups_are_replaced_in_place() -> None:
    replaced = replace_groups(scores_of(1, 2, 3, 3, 5, 5), [1, 2], scores_of(7, 8, 9, 10), 2)
    assert replaced.totals.tolist() == [1, 2, 7, 8, 9, 10]
    assert replaced.components["r"].tolist() == [0.5, 1, 3.5, 4, 4.5, 5]
    fresh = RewardScores(np.array([7.0, 8.0]), {}, {}, {})  # as when the reward failed for all
    assert replaced.gated["r"].tolist() == [10, 20, 70, 80, 90, 100]  # what GDPO compares
    lacking = replace_groups(scores_of(1, 2, 3, 3), [1], fresh, 2)
    assert lacking.totals.tolist() == [1, 2, 7, 8]
    np.testing.assert_array_equal(lacking.components["r"], [0.5, 1, NAN, NAN])


REWARDS = {  # by prompt: those from 10 on may come in
    **{0: (0, 1), 1: (5, 5), 2: (3, 3), 3: (1, 2)},
    **{10: (4, 4), 11: (6, 7), 12: (8, 8), 13: (1, 9), 14: (2, 3)},
}


def draw(prompts: Sequence[Prompt]) -> tuple[list[RolloutGroup], RewardScores] | None:
    if not prompts:
        return None
    totals = [value for prompt in prompts for value in REWARDS[prompt.index]]
    return [group(prompt.index) for prompt in prompts], scores_of(*totals, failures=1)


OTHERS = [Prompt(index, f"prompt {index}") for index in range(10, 15)]


@pytest.mark.parametrize(
    ("rounds", "others", "trained", "drawn"),
    [
        (0, OTHERS, [0, 1, 2, 3], 4),
        (1, OTHERS, [0, 10, 11, 3], 6),
        (2, OTHERS, [0, 12, 11, 3], 7),
        (3, OTHERS, [0, 13, 11, 3], 8),  # nothing silent is left
        (9, OTHERS, [0, 13, 11, 3], 8),
        (9, OTHERS[:3], [0, 12, 11, 3], 7),  # the prompts are used up
        (9, OTHERS[:1], [0, 10, 2, 3], 5),
    ],
)
def test_silent_groups_give_way_to_other_prompts(
    rounds: int, others: list[Prompt], trained: list[int], drawn: int
) -> None:
    first = draw([Prompt(index, "") for index in range(4)])
    assert first is not None
    groups, scores, every = resample(*first, others, rounds, draw, lambda value: [value], rank=0)
    assert names(groups) == trained
    assert scores.totals.tolist() == [value for index in trained for value in REWARDS[index]]
    assert len(every.totals) == 2 * drawn
    assert every.totals[:8].tolist() == first[1].totals.tolist()


def test_ranks_share_out_what_one_process_would_do() -> None:
    whole = draw([Prompt(index, "") for index in range(4)])
    assert whole is not None
    alone, _, _ = resample(*whole, OTHERS, 3, draw, lambda value: [value], rank=0)
    halves = [draw([Prompt(index, "") for index in part]) for part in ((0, 1), (2, 3))]
    counts = [[1, 1, 1, 0], [1, 0, 0, 0]]  # silent groups of each rank, round by round
    together: list[int] = []
    for rank, half in enumerate(halves):
        assert half is not None
        rounds = iter(zip(*counts, strict=True))

        def gather(mine: int, rank: int = rank, rounds=rounds) -> list[int]:
            everyone = list(next(rounds))
            assert everyone[rank] == mine
            return everyone

        together += names(resample(*half, OTHERS, 3, draw, gather, rank)[0])
    assert together == names(alone)


def test_all_that_was_drawn_is_counted() -> None:
    merged = merge_scores([scores_of(1, 2, failures=1), scores_of(3, 4, failures=2)])
    assert (
        merged.totals.tolist() == [1, 2, 3, 4] and merged.failures == {"r": 3} and merged.weights == {"r": 1}
    )


def marked(name: str, samples: int, mark: float) -> Any:
    """A value for any field of `RewardScores`, of the kind that its annotation says."""
    kind = {field.name: str(field.type) for field in fields(RewardScores)}[name]
    if "ndarray" not in kind:
        return {"r": 1}
    values = np.arange(samples) + mark
    return {"r": values} if "dict" in kind else values


@pytest.mark.parametrize(
    "name", [field.name for field in fields(RewardScores) if "ndarray" in str(field.type)]
)
def test_no_field_keeps_rows_of_what_was_replaced(name: str) -> None:
    old, new = (
        RewardScores(**{field.name: marked(field.name, n, mark) for field in fields(RewardScores)})
        for n, mark in ((6, 0.0), (2, 100.0))
    )
    value = getattr(replace_groups(old, [1], new, 2), name)
    assert (value["r"] if isinstance(value, dict) else value).tolist() == [0, 1, 100, 101, 4, 5]
    value = getattr(average_decodes(old, 2), name)
    assert (value["r"] if isinstance(value, dict) else value).tolist() == [0.5, 2.5, 4.5]
