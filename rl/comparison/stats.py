"""What a comparison of algorithms may claim. Pure functions of scores: of runs, or of runs × held-out prompts.

Three questions, three intervals. Do *these* models differ on other prompts: `prompts_interval`. Would other seeds, on
other prompts, differ: `crossed_interval`, which verdicts rest on. How far do runs scatter: `seeds_interval`, which with
three seeds covers about 70 % where it says 95 % (tests/rl/comparison/test_stats.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from rl.seeding import derive_seed
from rl.stats import Interval

Verdict = Literal["higher", "lower", "no difference shown"]
N_BOOT = 4000


def area_under_curve(xs: Sequence[float], values: np.ndarray) -> np.ndarray:
    """Mean height of curves over their whole range of x, by trapezoids, in the unit of the values.

    Args:
        xs: [K] increasing, such as images drawn when each evaluation was made.
        values: [K, ...]. What a curve is at one point only, it is throughout.

    Raises:
        ValueError: no points, not one x per value, or x not increasing.
    """
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not len(x) or len(x) != len(y) or (np.diff(x) <= 0).any():
        raise ValueError(f"need increasing x and one for each value, got {list(xs)} for {len(y)} values")
    if len(x) == 1:
        return y[0]
    widths = np.diff(x).reshape(-1, *[1] * (y.ndim - 1))
    return (widths * (y[1:] + y[:-1]) / 2).sum(axis=0) / (x[-1] - x[0])


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean along the last axis of what is left without a quarter, rounded down, of the values at each end: of fewer
    than four values the plain mean (arXiv 2108.13264, there as `scipy.stats.trim_mean(values, 0.25)`)."""
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)


def seeds_interval(scores: Sequence[float], seed: int = 0, level: float = 0.95) -> Interval:
    """Interquartile mean of one algorithm's runs, bootstrapped over them. Of one run the bounds are NaN."""
    runs = np.asarray(scores, dtype=np.float64)
    drawn = runs[np.random.default_rng(seed).integers(len(runs), size=(N_BOOT, len(runs)))]
    return _interval(float(interquartile_mean(runs)), interquartile_mean(drawn), len(runs), level)


def improvement_probability(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How likely a run of ours beats one of theirs: share of all pairs, ties count half (arXiv 2108.13264, section
    4.3; Mann-Whitney's U / (n·m)). [..., n] and [..., m] -> [...]."""
    gaps = (
        np.asarray(ours, dtype=np.float64)[..., :, None] - np.asarray(theirs, dtype=np.float64)[..., None, :]
    )
    return ((gaps > 0) + 0.5 * (gaps == 0)).mean(axis=(-2, -1))


def improvement_interval(
    ours: Sequence[float], theirs: Sequence[float], seed: int = 0, level: float = 0.95
) -> Interval:
    """`improvement_probability` with a bootstrap that resamples the runs of each algorithm apart (stratified)."""
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    drawn = improvement_probability(*(v[rng.integers(len(v), size=(N_BOOT, len(v)))] for v in (a, b)))
    runs = min(len(a), len(b))
    return _interval(float(improvement_probability(a, b)), drawn, runs, level)


def crossed_interval(scores: np.ndarray, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of runs × prompts [S, P], or of paired differences, with seeds *and* prompts resampled, independently of
    each other: all runs are judged on the same prompts (the pigeonhole bootstrap, Owen 2007,
    doi:10.1214/07-AOAS122). It errs towards wide. With one run the bounds are NaN; `n` counts runs."""
    return _resampled(scores, seed, level, over_seeds=True)


def prompts_interval(scores: np.ndarray, seed: int = 0, level: float = 0.95) -> Interval:
    """The same mean for exactly these runs, only prompts resampled; says nothing of other seeds."""
    return _resampled(scores, seed, level, over_seeds=False)


def paired_scores(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """ours − theirs, both [S, P] with the same seeds and prompts in the same order, prompts that any run could not
    score (NaN) left out. Raises ValueError when none is left."""
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    known = gaps[:, np.isfinite(gaps).all(axis=0)]
    if not known.size:
        raise ValueError("no prompt was scored in all runs")
    return known


def verdict(interval: Interval) -> Verdict:
    """What an interval of a difference shows: a sign, or nothing when it holds 0 or has no bounds."""
    return "higher" if interval.low > 0 else "lower" if interval.high < 0 else "no difference shown"


def _resampled(scores: np.ndarray, seed: int, level: float, over_seeds: bool) -> Interval:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"need finite scores [runs, prompts], got shape {values.shape}")
    runs, prompts = values.shape
    by_run = _shares(prompts, seed, "prompts") @ values.T  # [N_BOOT, runs]
    means = (by_run * _shares(runs, seed, "runs")).sum(axis=1) if over_seeds else by_run.mean(axis=1)
    resampled = runs if over_seeds else prompts
    return _interval(float(values.mean()), means, resampled, level, n=runs)


@lru_cache(maxsize=8)
def _shares(count: int, seed: int, what: str) -> np.ndarray:
    """[N_BOOT, count]: the share that each of `count` things has in each resample, which is all that a mean needs to
    know of it."""
    rng = np.random.default_rng(derive_seed(seed, what, count))
    return rng.multinomial(count, np.full(count, 1 / count), N_BOOT) / count


def _interval(mean: float, drawn: np.ndarray, resampled: int, level: float, n: int | None = None) -> Interval:
    """Percentiles of what was drawn; of a single value nothing can be drawn but itself."""
    count = resampled if n is None else n
    if resampled == 1:
        return Interval(mean, math.nan, math.nan, count)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, min(float(low), mean), max(float(high), mean), count)
