from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rl.comparison.stats import (
    area_under_curve,
    crossed_interval,
    improvement_interval,
    improvement_probability,
    interquartile_mean,
    paired_scores,
    prompts_interval,
    seeds_interval,
    verdict,
)
from rl.stats import Interval


def test_area_is_the_mean_height() -> None:
    # trapezoids: (0 + 1)/2 · 1 + (1 + 3)/2 · 3 = 6.5 over a width of 4
    assert area_under_curve([0, 1, 4], np.array([0.0, 1.0, 3.0])) == pytest.approx(6.5 / 4)
    many = np.random.default_rng(0).normal(size=(5, 7))
    xs = [2.0, 3.0, 7.0, 7.5, 9.0]
    assert area_under_curve(xs, many) == pytest.approx(np.trapezoid(many, xs, axis=0) / 7)
    assert area_under_curve([5], np.array([[0.25, 0.5]])).tolist() == [0.25, 0.5]
    for bad in ([0, 0, 1], [0, 2], [3, 2, 1]):
        with pytest.raises(ValueError, match="increasing"):
            area_under_curve(bad, np.zeros(3))


def test_interquartile_mean_drops_a_quarter_at_each_end() -> None:
    # scipy.stats.trim_mean(values, 0.25): 1 of 4 to 7 values at each end, 2 of 8
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, -50.0])) == 1.5
    assert interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, -7.0])) == pytest.approx(15 / 5)
    assert interquartile_mean(np.arange(8.0) ** 2) == pytest.approx((4 + 9 + 16 + 25) / 4)
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3.0  # nothing to drop
    table = np.random.default_rng(0).normal(size=(3, 9))
    assert interquartile_mean(table) == pytest.approx([interquartile_mean(row) for row in table])


def test_seeds_interval_is_the_exact_bootstrap() -> None:
    # Mean of 2 draws from {0, 1}: 0, 1/2, 1 with weights 1/4, 1/2, 1/4.
    wide, narrow = seeds_interval([0.0, 1.0]), seeds_interval([0.0, 1.0], level=0.4)
    assert (wide.mean, wide.low, wide.high, wide.n) == (0.5, 0.0, 1.0, 2)
    assert (narrow.low, narrow.high) == (0.5, 0.5)
    alone = seeds_interval([0.3])
    assert alone.mean == 0.3 and math.isnan(alone.low) and math.isnan(alone.high)


def test_probability_of_improvement_counts_pairs() -> None:
    # 3 beats 1 and 2, ties 3; 2 beats 1, ties 2: (2.5 + 1.5) / 6
    assert improvement_probability(np.array([3, 2]), np.array([1, 2, 3])) == pytest.approx(4 / 6)
    rng = np.random.default_rng(1)
    a, b = rng.integers(5, size=6), rng.integers(5, size=4)
    u = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(a, b))  # Mann-Whitney's U
    assert improvement_probability(a, b) == pytest.approx(u / 24)
    assert improvement_probability(a, b) + improvement_probability(b, a) == pytest.approx(1.0)
    sure = improvement_interval([5.0, 6.0, 7.0], [1.0, 2.0, 3.0])
    assert (sure.mean, sure.low, sure.high, sure.n) == (1.0, 1.0, 1.0, 3)
    open_ = improvement_interval([1.0, 2.0, 3.0], [1.5, 2.5, 0.5])
    assert open_.low < 0.5 < open_.high


def test_crossed_interval_is_the_exact_bootstrap_where_it_can_be_counted() -> None:
    # Scores 0 0 / 4 4: prompts are alike, so only the number of draws of the second run matters: 0, 2, 4 with
    # weights 1/4, 1/2, 1/4. Transposed, seeds are alike and prompts matter, which `prompts_interval` sees too.
    rows = np.array([[0.0, 0.0], [4.0, 4.0]])
    for scores in (rows, rows.T):
        whole = crossed_interval(scores)
        assert (whole.mean, whole.low, whole.high, whole.n) == (2.0, 0.0, 4.0, 2)
        inner = crossed_interval(scores, level=0.4)
        assert (inner.low, inner.high) == (2.0, 2.0)
    fixed = prompts_interval(rows)
    assert (fixed.mean, fixed.low, fixed.high) == (2.0, 2.0, 2.0)  # whatever the seeds do
    moved = prompts_interval(rows.T)
    assert (moved.low, moved.high) == (0.0, 4.0)


def test_resamples_agree_with_drawing_rows_and_columns() -> None:
    scores = np.random.default_rng(3).normal(size=(4, 30))
    rng = np.random.default_rng(7)
    drawn = [scores[np.ix_(rng.integers(4, size=4), rng.integers(30, size=30))].mean() for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    interval = crossed_interval(scores, seed=1)
    assert interval.low == pytest.approx(low, abs=0.03) and interval.high == pytest.approx(high, abs=0.03)
    assert interval != crossed_interval(scores, seed=2) and interval == crossed_interval(scores, seed=1)
    with pytest.raises(ValueError, match="finite"):
        crossed_interval(np.array([[1.0, math.nan]]))


def test_one_run_says_nothing_of_other_seeds() -> None:
    scores = np.array([[0.0, 1.0, 1.0, 1.0]])
    interval = crossed_interval(scores)
    assert interval.mean == 0.75 and math.isnan(interval.low) and verdict(interval) == "no difference shown"
    assert (
        prompts_interval(scores).low < 0.75 < prompts_interval(scores).high
        or prompts_interval(scores).high == 1
    )


def test_pairs_leave_out_what_some_run_could_not_score() -> None:
    ours = np.array([[1.0, 2.0, 3.0], [1.0, math.nan, 5.0]])
    theirs = np.array([[0.5, 2.0, 1.0], [1.0, 0.0, 1.0]])
    assert paired_scores(ours, theirs).tolist() == [[0.5, 2.0], [0.0, 4.0]]
    with pytest.raises(ValueError, match="no prompt"):
        paired_scores(np.array([[math.nan]]), np.array([[1.0]]))


def test_verdict() -> None:
    assert verdict(Interval(0.1, 0.02, 0.2, 3)) == "higher"
    assert verdict(Interval(-0.1, -0.2, -0.02, 3)) == "lower"
    for low, high in ((-0.1, 0.3), (0.0, 0.3), (-0.3, 0.0)):
        assert verdict(Interval(0.1, low, high, 3)) == "no difference shown"


def test_what_intervals_cover_with_three_seeds() -> None:
    """The reason for the verdict's interval: held-out differences of 3 runs on 32 prompts whose truth is 0, with the
    spread seen on the tiny model (prompt by prompt 0.55, seeds 2 points). A bootstrap over the seeds alone would call
    every third comparison a difference."""
    rng = np.random.default_rng(5)
    repeats, hits = 100, {"crossed": 0, "seeds": 0}
    for _ in range(repeats):
        scores = rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.2, (1, 32)) + rng.normal(0, 0.55, (3, 32))
        for name, interval in (
            ("crossed", crossed_interval(scores)),
            ("seeds", seeds_interval(scores.mean(1))),
        ):
            hits[name] += interval.low <= 0 <= interval.high
    assert hits["crossed"] / repeats >= 0.95
    assert 0.55 < hits["seeds"] / repeats < 0.85
