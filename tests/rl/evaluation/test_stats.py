from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from imagerl.rl.evaluation.stats import (
    TOO_FEW,
    Interval,
    area_under_curve,
    by_prompt,
    change,
    compare,
    crossed_interval,
    direction,
    improvement_probability,
    mean_interval,
    number,
    paired_difference,
    paired_scores,
    span,
    summarise,
    verdict,
    wilson_interval,
)
from imagerl.rl.files.metrics import to_json

# ---- shares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Worked examples of Newcombe 1998, table I, method 3 (score without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, n)
    assert interval.mean == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_is_symmetric_and_holds_its_mean_at_the_ends() -> None:
    for successes in range(8):
        low, mirrored = wilson_interval(successes, 7), wilson_interval(7 - successes, 7)
        assert low.low == pytest.approx(1 - mirrored.high)
        assert 0 <= low.low <= low.mean <= low.high <= 1
    assert wilson_interval(7, 7).high == 1 and wilson_interval(7, 7).low < 0.7


@pytest.mark.parametrize(("successes", "n", "level"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95)])
def test_wilson_refuses_nonsense(successes: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match=r"must be|must not be greater|greater than or equal"):
        wilson_interval(successes, n, level)


def test_wilson_covers_what_it_promises() -> None:
    # Exact coverage at n = 60, p = 0.1 by summing the binomial law; 80 % must not pass for 95 %.
    def exact(level: float) -> float:
        n, p = 60, 0.1
        return sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k in range(n + 1)
            if (i := wilson_interval(k, n, level)).low <= p <= i.high
        )

    assert 0.93 < exact(0.95) < 0.97
    assert exact(0.80) < 0.87


# ---- means over prompts ------------------------------------------------------------------------------------


def test_a_mean_has_students_interval() -> None:
    # 1 to 9: mean 5, deviation √7.5, standard error √7.5 / 3 = 0.912871; t of 8 degrees at 97.5 % is 2.306004
    interval = mean_interval(range(1, 10))
    assert (interval.mean, interval.n) == (5.0, 9)
    assert interval.high - 5 == pytest.approx(0.912871 * 2.306004, rel=1e-5)
    assert 5 - interval.low == pytest.approx(0.912871 * 2.306004, rel=1e-5)
    values = np.random.default_rng(3).normal(2.0, 3.0, size=400)
    told = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.9)
    interval = mean_interval(values, 0.9)
    assert (interval.low, interval.high) == pytest.approx((told.low, told.high), rel=1e-12)


def test_too_few_values_have_no_bounds_and_none_are_an_error() -> None:
    # A sign test of five differences of one sign: p = 2 / 2⁵ = 6 %; of six 3 %; at 99 % it takes 2 / 2⁸ < 1 %.
    for values, level in (([0.25], 0.95), ([1.0, 2, 3, 4, 5], 0.95), ([1.0] * 5 + [0.0] * 200, 0.95)):
        interval = mean_interval(values, level)
        assert interval.mean == pytest.approx(np.mean(values)) and not interval.bounded
    assert mean_interval([1.0, 2, 3, 4, 5, 6]).bounded
    assert not mean_interval([1.0, 2, 3, 4, 5, 6, 7], 0.99).bounded
    assert mean_interval([1.0, 2, 3, 4, 5, 6, 7, 8], 0.99).bounded
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="need finite values"):
            mean_interval(bad)


def test_values_that_are_all_alike_have_the_interval_of_their_share() -> None:
    """Without spread Student's interval would be a point: 64 pictures that all lost their colours say no "−1 to −1"."""
    share = wilson_interval(64, 64).low  # 64 / (64 + 1.96²) = 0.9434
    assert share == pytest.approx(0.9434, abs=1e-4)
    lost = mean_interval([-1.0] * 64)
    assert (lost.low, lost.high) == (-1.0, pytest.approx(-share)) and verdict(lost) == "lower"
    rose = mean_interval([0.3 - 0.1 + 1e-17 * i for i in range(64)])
    assert (rose.low, rose.high) == (pytest.approx(0.2 * share), pytest.approx(0.2))
    assert not mean_interval([0.0] * 64).bounded and not mean_interval([-1.0, -1.0]).bounded


def _coverage(interval_of, truth: float, repeats: int) -> float:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(11)
    hits = [interval.low <= truth <= interval.high for interval in (interval_of(rng) for _ in range(repeats))]
    return float(np.mean(hits))


@pytest.mark.parametrize(("n", "least"), [(8, 0.94), (256, 0.94)])
def test_a_mean_covers_what_it_promises(n: int, least: float) -> None:
    """At 8 prompts a percentile bootstrap of the same values covers 88 %."""
    assert least < _coverage(lambda rng: mean_interval(rng.normal(1.0, 1.0, n)), 1.0, 4000) < 0.96
    skewed = _coverage(lambda rng: mean_interval(rng.exponential(1.0, 80)), 1.0, 2000)
    assert 0.92 < skewed < 0.96


def test_paired_difference_covers_and_is_narrower_than_unpaired() -> None:
    widths = []

    def interval(rng: np.random.Generator) -> Interval:
        skill = rng.normal(0, 5.0, size=60)
        before = dict(enumerate(skill + rng.normal(0, 1.0, size=60)))
        after = dict(enumerate(skill + 0.5 + rng.normal(0, 1.0, size=60)))
        result = paired_difference(before, after)
        widths.append(result.high - result.low)
        return result

    assert 0.935 < _coverage(interval, truth=0.5, repeats=2000) < 0.965
    assert np.mean(widths) == pytest.approx(2 * 2.001 * math.sqrt(2 / 60), rel=0.02)  # the skill cancels


def test_paired_difference_uses_common_prompts_only() -> None:
    before = {1: 0.0, 2: 0.0, 3: 1.0, 9: 1.0, 4: math.nan}
    after = {3: 1.0, 2: 1.0, 1: 0.0, 7: 0.0, 4: 1.0}
    result = paired_difference(before, after)
    assert (result.mean, result.n) == (pytest.approx(1 / 3), 3)
    with pytest.raises(ValueError, match="no prompt in common"):
        paired_difference({1: 0.0}, {2: 1.0})


# ---- seeds and prompts -------------------------------------------------------------------------------------


def test_crossed_interval_by_hand() -> None:
    """3 runs × 6 prompts, value = run + prompt + a checkerboard that sums to 0 in every row and column."""
    of_runs, of_prompts = np.array([0.0, 3.0, 6.0]), np.array([1.0, 2, 3, 4, 5, 6])
    rest = np.outer([1.0, -1.0, 0.0], [1.0, -1, 1, -1, 1, -1])
    interval = crossed_interval(of_runs[:, None] + of_prompts + rest)
    # M_seeds = 6 · 9 = 54, M_prompts = 3 · 3.5 = 10.5, M_rest = 12 / (2 · 5) = 1.2, so B = 9.3
    freedom = 63.3 / (54 / 2 + 9.3 / 5)
    half = scipy_stats.t.ppf(0.975, freedom) * math.sqrt(63.3 / 18)
    assert freedom == pytest.approx(2.193, abs=1e-3) and interval.n == 3
    assert interval.mean == 6.5 and interval.high - 6.5 == pytest.approx(half, rel=1e-9)
    assert 6.5 - interval.low == pytest.approx(half, rel=1e-9)


def test_crossed_interval_has_both_ends_as_limits() -> None:
    """Runs alike: Student's over prompts. Prompts alike: Student's over runs."""
    rng = np.random.default_rng(2)
    prompts = rng.normal(1, 1, 40)
    many, over_prompts = crossed_interval(np.stack([prompts] * 4)), mean_interval(prompts)
    assert (many.low, many.high) == pytest.approx((over_prompts.low, over_prompts.high), rel=1e-12)
    runs = rng.normal(1, 1, 4)
    told = scipy_stats.ttest_1samp(runs, 0).confidence_interval(0.95)
    few = crossed_interval(np.stack([runs] * 40, axis=1))
    assert (few.low, few.high) == pytest.approx((told.low, told.high), rel=1e-12)


def test_what_runs_cannot_tell_has_no_bounds() -> None:
    scores = np.random.default_rng(0).normal(1, 0.1, (3, 40))
    assert crossed_interval(scores).bounded
    for few in (scores[:1], scores[:2], scores[:, :1], scores[:, :5], np.zeros((3, 40))):
        assert not crossed_interval(few).bounded and verdict(crossed_interval(few)) == "no difference shown"
    changed = np.zeros((3, 40))
    changed[:, :5] = 1.0  # five prompts, in all runs alike
    assert not crossed_interval(changed).bounded
    perfect = crossed_interval(np.ones((3, 256)))
    assert (perfect.low, perfect.high) == (pytest.approx(wilson_interval(256, 256).low), 1.0)
    with pytest.raises(ValueError, match="finite"):
        crossed_interval(np.array([[1.0, math.nan]]))


def differences(rng: np.random.Generator, runs: int, spread: float, hits: bool) -> np.ndarray:
    """[S, 256] of paired differences whose truth is 0: runs apart by `spread`, prompts by 0.2, 0.55 in all from prompt
    to prompt. As `hits` they are those of two models that hit or miss, so −1, 0 or 1."""
    a, b = rng.normal(0, spread, (runs, 1)), rng.normal(0, 0.2, (1, 256))
    if not hits:
        return a + b + rng.normal(0, 0.51, (runs, 256))
    skill = rng.beta(1.4, 0.6, (1, 256))
    ours, theirs = (
        rng.random((runs, 256)) < np.clip(skill + side * (a + b) / 2, 0, 1) for side in (1.0, -1.0)
    )
    return ours.astype(float) - theirs


@pytest.mark.parametrize("hits", [False, True])
@pytest.mark.parametrize("runs", [3, 5, 10])
def test_false_verdicts_are_3_to_7_per_cent_whatever_the_spread_of_seeds(runs: int, hits: bool) -> None:
    """The whole table is in docs/compare.md. Bounds are those asked for; one standard error is 0.7 points. A bootstrap
    over seeds and prompts gave 0.2 % at three seeds that are alike, and 18 % at three that are 10 points apart."""
    for spread in (0.0, 0.03, 0.1):
        rng = np.random.default_rng([runs, round(100 * spread)])
        found = [verdict(crossed_interval(differences(rng, runs, spread, hits))) for _ in range(1000)]
        wrong = np.mean([one != "no difference shown" for one in found])
        assert 0.03 <= wrong <= 0.07, (spread, wrong)
        assert 0.25 < np.mean([one == "higher" for one in found]) / wrong < 0.75, spread


def test_a_true_difference_is_found() -> None:
    """10 points with seeds 2 points apart: the usual case of the tiny model."""
    rng = np.random.default_rng(4)
    for runs, least in ((3, 0.6), (5, 0.9)):
        found = [verdict(crossed_interval(0.1 + differences(rng, runs, 0.02, False))) for _ in range(300)]
        assert found.count("higher") / 300 > least and "lower" not in found


def test_pairs_leave_out_what_some_run_could_not_score() -> None:
    ours = np.array([[1.0, 2.0, 3.0], [1.0, math.nan, 5.0]])
    theirs = np.array([[0.5, 2.0, 1.0], [1.0, 0.0, 1.0]])
    assert paired_scores(ours, theirs).tolist() == [[0.5, 2.0], [0.0, 4.0]]
    with pytest.raises(ValueError, match="no prompt"):
        paired_scores(np.array([[math.nan]]), np.array([[1.0]]))


def test_probability_of_improvement_counts_pairs() -> None:
    # 3 beats 1 and 2, ties 3; 2 beats 1, ties 2: (2.5 + 1.5) / 6
    assert improvement_probability([3, 2], [1, 2, 3]) == pytest.approx(4 / 6)
    rng = np.random.default_rng(1)
    a, b = rng.integers(5, size=6).tolist(), rng.integers(5, size=4).tolist()
    u = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in itertools.product(a, b))
    assert improvement_probability(a, b) == pytest.approx(u / 24)
    assert improvement_probability(a, b) + improvement_probability(b, a) == pytest.approx(1.0)


def test_area_is_the_mean_height() -> None:
    # trapezoids: (0 + 1)/2 · 1 + (1 + 3)/2 · 3 = 6.5 over a width of 4
    assert area_under_curve([0, 1, 4], np.array([0.0, 1.0, 3.0])) == pytest.approx(6.5 / 4)
    many = np.random.default_rng(0).normal(size=(5, 7))
    xs = [2.0, 3.0, 7.0, 7.5, 9.0]
    by_hand = sum((xs[i + 1] - xs[i]) * (many[i] + many[i + 1]) / 2 for i in range(4)) / 7
    assert area_under_curve(xs, many) == pytest.approx(by_hand)
    assert area_under_curve([5], np.array([[0.25, 0.5]])).tolist() == [0.25, 0.5]
    for bad in ([0, 0, 1], [0, 2], [3, 2, 1]):
        with pytest.raises(ValueError, match="increasing"):
            area_under_curve(bad, np.zeros(3))


# ---- rows --------------------------------------------------------------------------------------------------


def test_summarise_chooses_the_interval_by_the_values() -> None:
    rows = [{"index": i, "prompt": "x", "exact_match": float(i % 4 == 0), "total": i / 40} for i in range(40)]
    result = summarise(rows)
    assert result == {
        "exact_match": wilson_interval(10, 40),
        "total": mean_interval([i / 40 for i in range(40)]),
    }


def test_summarise_leaves_out_missing_values_and_says_so() -> None:
    rows = [{"a": 1.0}, {"a": None}, {"a": math.nan}, {"a": 0.0}, {"b": math.nan}]
    assert summarise(rows) == {"a": wilson_interval(1, 2)}
    assert summarise([]) == {}


def test_samples_of_one_prompt_count_once() -> None:
    rows = [{"index": i // 2, "hit": float(i % 2 or i > 9)} for i in range(20)]
    assert by_prompt(rows, "hit") == dict.fromkeys(range(5), 0.5) | dict.fromkeys(range(5, 10), 1.0)
    assert summarise(rows)["hit"] == mean_interval([0.5] * 5 + [1.0] * 5)


def test_compare_restricts_all_three_numbers_to_common_prompts() -> None:
    before = [{"index": i, "hit": 0.0} for i in range(4)] + [{"index": 99, "hit": 1.0}]
    after = [{"index": i, "hit": float(i < 3), "new": 1.0} for i in range(4)]
    result = compare(before, after)
    assert set(result) == {"hit"}
    assert (result["hit"]["before"], result["hit"]["after"]) == (0.0, 0.75)
    assert result["hit"]["difference"].mean == 0.75


# ---- words -------------------------------------------------------------------------------------------------


def test_verdict() -> None:
    assert verdict(Interval(0.1, 0.02, 0.2, 3)) == "higher"
    assert verdict(Interval(-0.1, -0.2, -0.02, 3)) == "lower"
    for low, high in ((-0.1, 0.3), (0.0, 0.3), (-0.3, 0.0), (math.nan, math.nan), (0.1, 0.1)):
        assert verdict(Interval(0.1, low, high, 3)) == "no difference shown"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([1.0] * 6 + [0.0] * 6, "higher"),
        ([-1.0] * 6, "lower"),
        ([1.0] * 5, "no difference shown"),  # a sign test of five: p = 0.06
        ([1.0] * 3 + [0.0] * 5, "no difference shown"),  # one step, 8 prompts, three flips: p = 0.25
        ([0.0] * 20, "no difference shown"),
        ([1.0, -1.0] * 10, "no difference shown"),
        ([1.0] * 5 + [0.0] * 200, "no difference shown"),  # Student's alone would say higher
    ],
)
def test_verdicts_on_rows(changes: list[float], told: str) -> None:
    before, after = (
        [{"index": i, "x": 0.5 + share * change} for i, change in enumerate(changes)] for share in (0.0, 1.0)
    )
    assert verdict(compare(before, after)["x"]["difference"]) == told


def test_numbers_in_words() -> None:
    gap = Interval(0.25, 0.125, 0.375, 200)
    assert change(gap, rate=True) == "+25.0 points, 95 % interval +12.5 to +37.5, n=200: higher"
    assert change(Interval(-0.01, -0.0201, 0.0001, 9), digits=4) == (
        "−0.0100, 95 % interval −0.0201 to +0.0001, n=9: no difference shown"
    )
    assert number(0.5, rate=True) == "50.0 %" and number(None) == number(math.nan) == "–"
    assert span(Interval(1.0, 0.985, 1.0, 256), rate=True) == "98.5 % to 100.0 %"
    assert span(Interval(0.9, 0.78, 1.045, 3), rate=True) == "78.0 % to 100.0 %"
    assert span(Interval(0.9, 0.78, 1.045, 3), rate=True, sign=True) == "+78.0 to +104.5"


@pytest.mark.parametrize(
    ("values", "told"),
    [([-1.0, -1.0], "−1.000"), ([0.4], "+0.400"), ([0.0] * 256, "+0.000"), ([0.5] * 3, "+0.500")],
)
def test_degenerate_intervals_say_so(values: list[float], told: str) -> None:
    """No "−1.000 to −1.000, n=2" and no "nan to nan", from the values or from a file of results."""
    interval = mean_interval(values)
    kept = json.loads(to_json({"mean": interval.mean, "low": interval.low, "high": interval.high}))
    n = len(values)
    for one in (interval, Interval.read({**kept, "n": n}), Interval.read({"mean": interval.mean, "n": n})):
        assert change(one) == f"{told}, {TOO_FEW}, n={n}: no difference shown" and span(one) == TOO_FEW


def test_the_first_word_of_a_name_says_which_way_is_better() -> None:
    better = {"exact_match": 1, "lossless": 1, "mine/costly": 1, "mine/errorless_lines": 1}
    worse = {"colours/fault_ink": -1, "mine/loss": -1, "mine/error_rate": -1}
    neither = {"kl": 0, "judge/tokens_in": 0, "judge/time_s": 0, "judge/cost": 0, "vlm/sigma_1": 0}
    for metric, expected in (better | worse | neither).items():
        assert direction(metric) == expected, metric
    assert direction("length", ["length"]) == -1 and direction("length/words", ["length"]) == 0
