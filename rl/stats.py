"""Means with honest intervals. Pure functions of numbers; the same seed gives the same interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

# Elements of the resampling index held at once: 8 MB whatever the number of values.
_BLOCK = 1_000_000
PLACES = ("index", "sample")  # keys of a row that say what it is about
# With fewer pairs that differ, not even a sign test could tell them from chance: 2 / 2^5 > 5 %.
FEWEST_CHANGES = 6


HEADLINES = ("success", "exact_match")  # what a run is judged by, the first of them that was measured


def headline(metrics: Iterable[str]) -> str | None:
    """The metric to name first: one of HEADLINES, else the first; None where nothing was measured."""
    names = list(metrics)
    return next((name for name in HEADLINES if name in names), names[0] if names else None)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval, in the unit of the values; `n` values went into it."""

    mean: float
    low: float
    high: float
    n: int


def wilson_interval(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Unlike mean ± 1.96 standard errors it stays within [0, 1] and keeps its coverage near 0 and 1.

    Raises:
        ValueError: n < 1, successes outside [0, n], or level outside (0, 1).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + _checked(level) / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding must not leave the mean outside its own interval when p is 0 or 1.
    return Interval(p, max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p)), n)


def bootstrap_mean(
    values: Iterable[float], seed: int = 0, n_boot: int = 5000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of the mean (Efron 1979, doi:10.1214/aos/1176344552).

    A single value says nothing about its spread: the bounds are then NaN.

    Raises:
        ValueError: no values, a value that is not finite, n_boot < 1, or level outside (0, 1).
    """
    data = np.fromiter(values, dtype=np.float64)
    tail = (1 - _checked(level)) / 2
    if not len(data) or not np.isfinite(data).all() or n_boot < 1:
        raise ValueError(f"need finite values and n_boot >= 1, got {len(data)} values, n_boot {n_boot}")
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(data))
    means = np.concatenate(
        [
            data[rng.integers(len(data), size=(min(block, n_boot - start), len(data)))].mean(axis=1)
            for start in range(0, n_boot, block)
        ]
    )
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, min(float(low), mean), max(float(high), mean), len(data))


def paired_difference(
    before: Mapping[Any, float],
    after: Mapping[Any, float],
    seed: int = 0,
    n_boot: int = 5000,
    level: float = 0.95,
) -> Interval:
    """Interval of the mean of after − before over the prompts that both have a finite value for.

    Arguments map a prompt's identity to its value. Prompts are resampled whole, so that easy and hard
    ones cancel out of the difference and the interval is narrower than that of two separate means.

    Raises:
        ValueError: no prompt in common.
    """
    common = sorted(k for k in before.keys() & after.keys() if _finite(before[k]) and _finite(after[k]))
    if not common:
        raise ValueError("before and after have no prompt in common")
    return bootstrap_mean([after[k] - before[k] for k in common], seed, n_boot, level)


def by_prompt(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[Hashable, float]:
    """The metric of each prompt: rows of one `index` are averaged, rows without a finite value left out.

    Without an `index` every row is a prompt of its own.
    """
    grouped: dict[Hashable, list[float]] = {}
    for position, row in enumerate(rows):
        if _finite(row.get(metric)):
            grouped.setdefault(row.get("index", position), []).append(float(row[metric]))
    return {index: math.fsum(values) / len(values) for index, values in grouped.items()}


def summarise(
    per_prompt: Sequence[Mapping[str, Any]], seed: int = 0, n_boot: int = 5000, level: float = 0.95
) -> dict[str, Interval]:
    """Interval of every numeric key but `index` and `sample`: Wilson where the values are all 0 or 1, else bootstrap.

    Several rows of one prompt count as one value, their mean, because they are not independent.
    None and NaN (samples that could not be scored) are left out; `Interval.n` tells how many remained.
    """
    result = {}
    for metric in _metrics(per_prompt):
        values = list(by_prompt(per_prompt, metric).values())
        if set(values) <= {0.0, 1.0}:
            result[metric] = wilson_interval(sum(values), len(values), level)
        else:
            result[metric] = bootstrap_mean(values, seed, n_boot, level)
    return result


def compare(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    seed: int = 0,
    n_boot: int = 5000,
    level: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """`{"before": mean, "after": mean, "difference": Interval}` of every metric that both sides have.

    All three are over the common prompts, so that after − before is exactly the difference shown.
    """
    result: dict[str, dict[str, Any]] = {}
    for metric in _metrics(before):
        old, new = by_prompt(before, metric), by_prompt(after, metric)
        common = old.keys() & new.keys()
        if common:
            result[metric] = {
                "before": math.fsum(old[k] for k in common) / len(common),
                "after": math.fsum(new[k] for k in common) / len(common),
                "difference": paired_difference(old, new, seed, n_boot, level),
            }
    return result


def verdict(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], metric: str, difference: Interval
) -> str:
    """What the interval of a paired difference shows: "higher", "lower" or "no difference shown".

    Bootstrap intervals are too narrow where few pairs differ, so at least FEWEST_CHANGES prompts must."""
    old, new = by_prompt(before, metric), by_prompt(after, metric)
    changed = sum(old[k] != new[k] for k in old.keys() & new.keys())
    if changed < FEWEST_CHANGES or not (difference.low > 0 or difference.high < 0):
        return "no difference shown"
    return "higher" if difference.mean > 0 else "lower"


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with a finite value in some row, in order of appearance."""
    return list(dict.fromkeys(k for row in rows for k, v in row.items() if k not in PLACES and _finite(v)))


def _finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return level
