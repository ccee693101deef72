"""The claims that measured numbers allow: means with calibrated intervals or none, and one verdict for all who judge.

Pure functions; nothing is drawn at random. Three intervals: `wilson_interval` of shares, `mean_interval` over prompts
(of *these* models), `crossed_interval` over seeds and prompts (of other runs, on other prompts). An interval without
bounds says "too few to tell", and `verdict` reads nothing else. docs/compare.md has the rates that were simulated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
from scipy.special import stdtrit
from scipy.stats import binomtest, mannwhitneyu

from imagerl.rl.files.metrics import fixed

PLACES = ("index", "sample")  # keys of a row that say what it is about
TOTAL = "total"  # held-out: the weighted sum of the rewards, which training raises; no reward has that name
HEADLINES = ("success", "exact_match")  # what a run is judged by, the first of them that was measured
FEWEST_SEEDS = (
    3  # of two, one number tells their spread: verdicts would be wrong in up to 10 % (docs/compare.md)
)
TOO_FEW = "too few to tell"
# The first word of parts of rewards of which less is better, and of those of which neither is.
LESS_IS_BETTER = {"fault", "faults", "error", "errors", "loss"}
NEITHER = {"kl", "sigma", "questions", "cached", "retries", "tokens", "time", "cost"}
ALIKE = 1e-9  # relative: what is closer differs by rounding

Verdict = Literal["higher", "lower", "no difference shown"]


def headline(metrics: Iterable[str]) -> str | None:
    """Pick the metric to name first: one of HEADLINES, else the first; None where nothing was measured."""
    names = list(metrics)
    return next((name for name in HEADLINES if name in names), names[0] if names else None)


def direction(metric: str, penalties: Collection[str] = ()) -> int:
    """Tell whether more of a metric is better (1), less (−1), or neither (0), from its name and which rewards have a
    negative weight. Of what these are made of, nothing is known."""
    owner, _, part = metric.rpartition("/")
    word = part.partition("_")[0]
    if word in NEITHER or owner in penalties:
        return 0
    return -1 if word in LESS_IS_BETTER or metric in penalties else 1


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval, in the unit of the values; `n` values went into it. Bounds are NaN where
    these are too few to tell how far off the mean may be."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def bounded(self) -> bool:
        """Tell whether it says anything: a point is no interval either."""
        return self.low < self.high

    @staticmethod
    def read(told: Mapping[str, Any]) -> Interval:
        """Read it from a JSON object, where a number that does not exist is null or missing."""
        mean, low, high = (math.nan if (v := told.get(k)) is None else v for k in ("mean", "low", "high"))
        return Interval(mean, low, high, told.get("n") or 0)


Row = Mapping[str, Any]
"""One prompt, or one sample of it, in an evaluation: {"index": 3, "prompt": "a sign …", "exact_match": 1.0}."""


class Compared(TypedDict):
    """A metric before and after, over the prompts that both have a value for."""

    before: float
    after: float
    difference: Interval


Comparison = dict[str, Compared]  # by metric


def verdict(difference: Interval) -> Verdict:
    """Tell what the interval of a difference shows: a sign, or nothing where it holds 0 or has no bounds."""
    if not difference.bounded or difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "higher" if difference.low > 0 else "lower"


# ---- intervals ---------------------------------------------------------------------------------------------


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return the Wilson score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953), which stays
    within [0, 1] and keeps its coverage near 0 and 1. Raises ValueError for n < 1, successes outside [0, n], or such a
    level."""
    told = binomtest(successes, n).proportion_ci(_checked(level), "wilson")
    return Interval(successes / n, float(told.low), float(told.high), n)


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Return Student's t interval of the mean of values, or of paired differences.

    It has no bounds where so few values are not 0 that even a sign test could not reach the level (fewer than six at
    95 %). Where all are alike they have no spread to learn from; then the share of values that are so is a proportion
    of n out of n, whose Wilson interval bounds the mean as if all others were 0.

    Raises:
        ValueError: no values, a value that is not finite, or level outside (0, 1).
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data) or not np.isfinite(data).all():
        raise ValueError(f"need finite values, got {len(data)}")
    mean, n = float(data.mean()), len(data)
    if np.count_nonzero(data) < _fewest(level):
        return Interval(mean, math.nan, math.nan, n)
    if np.ptp(data) <= ALIKE * abs(mean):
        low, high = sorted((mean, mean * wilson_interval(n, n, level).low))
        return Interval(mean, low, high, n)
    half = _critical(n - 1, level) * float(data.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def crossed_interval(scores: np.ndarray, level: float = 0.95) -> Interval:
    """Average runs × prompts [S, P], or their paired differences, for other seeds *and* other prompts; n = S.

    The mean squares of a two-way table without repeats give the variance of the mean, (M_seeds + B) / SP, with
    B = max(M_prompts − M_rest, 0) the part of the prompts (Cornfield & Tukey 1956, doi:10.1214/aoms/1177728067). The
    degrees of freedom are the harmonic mean of S − 1 and P − 1, weighted by M_seeds and B. Satterthwaite's, weighted
    by their squares, are too many for three seeds: false verdicts in up to 8 %.

    No bounds with fewer than FEWEST_SEEDS runs, or where `mean_interval` over prompts has none.

    Raises:
        ValueError: not a table of finite values.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"need finite scores [runs, prompts], got shape {values.shape}")
    (runs, prompts), mean = values.shape, float(values.mean())
    by_run, by_prompt = values.mean(axis=1), values.mean(axis=0)
    over_prompts = mean_interval(by_prompt, level)
    if runs < FEWEST_SEEDS or prompts < 2 or not over_prompts.bounded:
        return Interval(mean, math.nan, math.nan, runs)
    if np.ptp(values) <= ALIKE * abs(mean):
        return Interval(mean, over_prompts.low, over_prompts.high, runs)
    rest = np.square(values - by_run[:, None] - by_prompt + mean).sum() / ((runs - 1) * (prompts - 1))
    of_seeds = prompts * float(by_run.var(ddof=1))
    # The estimate may come out below 0, a variance may not.
    of_prompts = max(runs * float(by_prompt.var(ddof=1)) - float(rest), 0.0)
    both = of_seeds + of_prompts
    # Nothing varies beyond rounding: a t interval would be a point and claim certainty.
    if both <= 1e-12 * float(np.square(values).mean()):  # runs alike, prompts apart as by chance
        return Interval(mean, math.nan, math.nan, runs)
    freedom = both / (of_seeds / (runs - 1) + of_prompts / (prompts - 1))
    half = _critical(freedom, level) * math.sqrt(both / (runs * prompts))
    return Interval(mean, mean - half, mean + half, runs)


def paired_scores(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return ours − theirs, both [S, P] with the same seeds and prompts in the same order, prompts that any run could
    not score (NaN) left out. Raises ValueError when none is left."""
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    known = gaps[:, np.isfinite(gaps).all(axis=0)]
    if not known.size:
        raise ValueError("no prompt was scored in all runs")
    return known


def improvement_probability(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Tell how often a run of ours beats one of theirs: share of all pairs, ties count half (arXiv 2108.13264, section
    4.3; Mann-Whitney's U / nm). A count, without an interval: of three runs each, none says 95 % and means it."""
    return float(mannwhitneyu(ours, theirs).statistic) / (len(ours) * len(theirs))


def area_under_curve(xs: Sequence[float], values: np.ndarray) -> np.ndarray:
    """Return the mean height of curves over their whole range of x, by trapezoids, in the unit of the values.

    Args:
        xs: [K] increasing, such as images drawn when each evaluation was made.
        values: [K, ...]. What a curve is at one point only, it is throughout.

    Raises:
        ValueError: no points, not one x per value, or x not increasing.
    """
    x, y = np.asarray(xs, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not len(x) or len(x) != len(y) or (np.diff(x) <= 0).any():
        raise ValueError(f"need increasing x and one for each value, got {list(xs)} for {len(y)} values")
    return y[0] if len(x) == 1 else np.trapezoid(y, x, axis=0) / (x[-1] - x[0])


# ---- rows of an evaluation ---------------------------------------------------------------------------------


def paired_difference(
    before: Mapping[int, float], after: Mapping[int, float], level: float = 0.95
) -> Interval:
    """Return `mean_interval` of after − before over the prompts that both have a finite value for.

    Arguments map a prompt's identity to its value. Easy and hard prompts cancel out of the difference, so that the
    interval is narrower than that of two separate means.

    Raises:
        ValueError: no prompt in common.
    """
    common = sorted(k for k in before.keys() & after.keys() if _finite(before[k]) and _finite(after[k]))
    if not common:
        raise ValueError("before and after have no prompt in common")
    return mean_interval([after[k] - before[k] for k in common], level)


def by_prompt(rows: Sequence[Row], metric: str) -> dict[int, float]:
    """Return the metric of each prompt: rows of one `index` are averaged, rows without a finite value left out.

    Without an `index` every row is a prompt of its own.
    """
    grouped: dict[int, list[float]] = {}
    for position, row in enumerate(rows):
        if _finite(row.get(metric)):
            grouped.setdefault(row.get("index", position), []).append(float(row[metric]))
    return {index: math.fsum(values) / len(values) for index, values in grouped.items()}


def summarise(per_prompt: Sequence[Row]) -> dict[str, Interval]:
    """Return an interval of each numeric key but `index` and `sample`: Wilson where the values are all 0 or 1, else t.

    Several rows of one prompt count as one value, their mean, because they are not independent.
    None and NaN (samples that could not be scored) are left out; `Interval.n` tells how many remained.
    """
    result = {}
    for metric in _metrics(per_prompt):
        # One value a prompt: its samples share the prompt, so they are not independent.
        values = list(by_prompt(per_prompt, metric).values())
        if set(values) <= {0.0, 1.0}:
            result[metric] = wilson_interval(round(sum(values)), len(values))
        else:
            result[metric] = mean_interval(values)
    return result


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Compare every metric that both sides have.

    All three are over the common prompts, so that after − before is exactly the difference shown.
    """
    result: Comparison = {}
    for metric in _metrics(before):
        old, new = by_prompt(before, metric), by_prompt(after, metric)
        common = old.keys() & new.keys()
        if common:
            result[metric] = {
                "before": math.fsum(old[k] for k in common) / len(common),
                "after": math.fsum(new[k] for k in common) / len(common),
                "difference": paired_difference(old, new),
            }
    return result


# ---- in words ----------------------------------------------------------------------------------------------


def number(value: float | None, rate: bool = False, sign: bool = False, digits: int = 3) -> str:
    """Write a mean or a bound: of a `rate` in per cent, of a signed one (a difference) in points, "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    scaled = fixed(100 * value if rate else value, 1 if rate else digits, sign)
    return scaled.replace("-", "−") + (" %" if rate and not sign else "")


def span(interval: Interval, rate: bool = False, sign: bool = False, digits: int = 3) -> str:
    """Write the bounds, `low to high`, those of a share within 0 and 100 %, or that there are none."""
    if not interval.bounded:
        return TOO_FEW
    bounds = (interval.low, interval.high)
    if rate and not sign:  # Student's may lie beyond what a share can be
        bounds = (max(bounds[0], 0.0), min(bounds[1], 1.0))
    return " to ".join(number(bound, rate, sign, digits) for bound in bounds)


def change(difference: Interval, rate: bool = False, digits: int = 3) -> str:
    """Write a difference with its interval and verdict, as closing lines and tables print it."""
    shown = number(difference.mean, rate, True, digits) + (" points" if rate else "")
    bounds = ("95 % interval " if difference.bounded else "") + span(difference, rate, True, digits)
    return f"{shown}, {bounds}, n={difference.n}: {verdict(difference)}"


def results_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of what `compare` found, in words."""
    rows = []
    for metric, result in comparison.items():
        rate, difference = metric in HEADLINES, result["difference"]
        means = [number(result["before"], rate), number(result["after"], rate)]
        told = [
            number(difference.mean, rate, sign=True),
            span(difference, rate, sign=True),
            verdict(difference),
        ]
        rows.append([metric, *means, *told])
    return ["metric", "before", "after", "difference", "95 % interval", "verdict"], rows


def _fewest(level: float) -> int:
    """Return the least n for which chance gives n differences one sign in less than 1 − level: 2 / 2^n."""
    return math.ceil(math.log2(2 / (1 - _checked(level))))


def _critical(freedom: float, level: float) -> float:
    """Return the two-sided bound of Student's t."""
    return float(stdtrit(freedom, 0.5 + level / 2))


def _metrics(rows: Sequence[Row]) -> list[str]:
    """List the keys with a finite value in some row, in order of appearance."""
    return list(dict.fromkeys(k for row in rows for k, v in row.items() if k not in PLACES and _finite(v)))


def _finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return level
