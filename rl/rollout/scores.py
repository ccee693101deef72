"""Functions of `RewardScores` as a whole. To map and to merge go by what a field holds, not by its name, so that none
can be forgotten: an array has a row for each sample, a mapping of arrays has them by name, all else is of the
request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from imagerl.rl.types import ImageRLError, RewardScores


def map_samples(scores: RewardScores, rows: Callable[[np.ndarray], np.ndarray]) -> RewardScores:
    """Apply `rows` to every array [B] of values by sample in the scores, to choose, order or reduce samples."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: mapped(entry) for name, entry in value.items()}
        return rows(value) if isinstance(value, np.ndarray) else value

    return replace(scores, **{field.name: mapped(getattr(scores, field.name)) for field in fields(scores)})


def component(scores: RewardScores, name: str) -> np.ndarray:
    """Return the totals [B], or the raw values of a reward or a part of one. Raises ImageRLError for another name."""
    if name == "total":
        return scores.totals
    if name not in scores.components:
        raise ImageRLError(
            f'data.curriculum.success is "{name}", and the rewards give {", ".join(["total", *scores.components])}'
        )
    return scores.components[name]


def scores_of_half(scores: RewardScores, half: str, labels: Sequence[str]) -> RewardScores:
    """Return the scores that a half of the generator learns from: its own total, and of the rewards those with the
    `labels` that teach it. Without totals by half they are the scores themselves."""
    if not scores.halves:
        return scores
    return replace(
        scores,
        totals=scores.halves[half],
        regions={label: regions for label, regions in scores.regions.items() if label in labels},
        gated={label: scores.gated[label] for label in labels},
        weights={label: scores.weights[label] for label in labels},
        halves={},
    )


def merge_scores(parts: Sequence[RewardScores]) -> RewardScores:
    """Join the scores of consecutive requests: samples one after the other, NaN where a part lacks a component, as when
    a reward failed there; failures added up, and of all else of a request the last."""
    sizes = [len(part.totals) for part in parts]

    def merged(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            names = dict.fromkeys(name for value in values for name in value)
            return {name: merged([value.get(name) for value in values]) for name in names}
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        if arrays:  # [B], or [B, K, 5] with as many regions as its request needed
            shape = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
            whole = np.full((sum(sizes), *shape), np.nan)
            for value, end, size in zip(values, np.cumsum(sizes), sizes, strict=True):
                if value is not None:
                    whole[(slice(end - size, end), *map(slice, value.shape[1:]))] = value
            return whole
        return next(value for value in reversed(values) if value is not None)

    failures: Counter[str] = Counter()
    for part in parts:
        failures.update(part.failures)
    whole = {
        field.name: merged([getattr(part, field.name) for part in parts]) for field in fields(RewardScores)
    }
    return RewardScores(**whole | {"failures": dict(failures)})


# ---- several pictures of one token sequence ----------------------------------------------------------------


def average_decodes(scores: RewardScores, decodes: int) -> RewardScores:
    """Reduce scores [B·M] of pictures to those [B] of their token sequences: means over the M pictures that have a
    value, NaN where none has. With M = 1 they are the scores themselves."""
    if decodes == 1:
        return scores
    return map_samples(scores, lambda values: _mean(values, decodes))


def _mean(values: np.ndarray, decodes: int) -> np.ndarray:
    rows = values.reshape(-1, decodes, *values.shape[1:])
    known = np.isfinite(rows)
    count = known.sum(axis=1)
    total = np.where(known, rows, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
