import math

import numpy as np
import pytest

from rl.stats import bootstrap_mean, by_prompt, compare, paired_difference, summarise, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Worked examples of Newcombe 1998, table I, method 3 (score without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_values(successes, n, low, high):
    interval = wilson_interval(successes, n)
    assert interval.mean == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_is_symmetric_and_holds_its_mean_at_the_ends():
    for successes in range(8):
        low, mirrored = wilson_interval(successes, 7), wilson_interval(7 - successes, 7)
        assert low.low == pytest.approx(1 - mirrored.high)
        assert 0 <= low.low <= low.mean <= low.high <= 1
    assert wilson_interval(7, 7).high == 1 and wilson_interval(7, 7).low < 0.7


@pytest.mark.parametrize(("successes", "n", "level"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95)])
def test_wilson_refuses_nonsense(successes, n, level):
    with pytest.raises(ValueError, match=r"need 0 <= successes|level must be"):
        wilson_interval(successes, n, level)


def test_bootstrap_agrees_with_the_exact_bootstrap_distribution():
    # Means of 4 draws from {0, 1}, two of each: Binomial(4, 1/2) / 4, whose 2.5 % and 97.5 % points are
    # 0 and 1 (mass 1/16 each) and whose 20 % and 80 % points are 1/4 and 3/4 (cumulative 5/16, 15/16).
    wide = bootstrap_mean([0, 1, 0, 1], seed=0, n_boot=4000)
    assert (wide.mean, wide.low, wide.high, wide.n) == (0.5, 0.0, 1.0, 4)
    narrow = bootstrap_mean([0, 1, 0, 1], seed=0, n_boot=4000, level=0.6)
    assert (narrow.low, narrow.high) == (0.25, 0.75)


def test_bootstrap_width_is_that_of_the_standard_error():
    values = np.random.default_rng(3).normal(2.0, 3.0, size=400)
    interval = bootstrap_mean(values, seed=1, n_boot=20_000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.high - interval.mean == pytest.approx(half, rel=0.05)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.05)


def test_bootstrap_depends_on_the_seed_alone():
    values = list(np.random.default_rng(0).normal(size=30))
    assert bootstrap_mean(values, seed=5) == bootstrap_mean(np.array(values), seed=5)
    assert bootstrap_mean(values, seed=5) != bootstrap_mean(values, seed=6)


def test_one_value_has_no_interval_and_none_is_an_error():
    alone = bootstrap_mean([0.25])
    assert alone.mean == 0.25 and math.isnan(alone.low) and math.isnan(alone.high)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="need finite values"):
            bootstrap_mean(bad)


def _coverage(interval_of, truth, repeats):
    rng = np.random.default_rng(11)
    hits = [interval.low <= truth <= interval.high for interval in (interval_of(rng) for _ in range(repeats))]
    return np.mean(hits)


def test_wilson_covers_what_it_promises():
    # Exact coverage at n = 60, p = 0.1 by summing the binomial law; 80 % must not pass for 95 %.
    def exact(level):
        n, p = 60, 0.1
        return sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k)
            for k in range(n + 1)
            if (i := wilson_interval(k, n, level)).low <= p <= i.high
        )

    assert 0.93 < exact(0.95) < 0.97
    assert exact(0.80) < 0.87


def test_bootstrap_covers_what_it_promises():
    def interval(rng):
        return bootstrap_mean(rng.exponential(1.0, size=80), seed=0, n_boot=400)

    assert 0.90 < _coverage(interval, truth=1.0, repeats=400) < 0.97


def test_paired_difference_covers_and_is_narrower_than_unpaired():
    widths = []

    def interval(rng):
        skill = rng.normal(0, 5.0, size=60)
        before = dict(enumerate(skill + rng.normal(0, 1.0, size=60)))
        after = dict(enumerate(skill + 0.5 + rng.normal(0, 1.0, size=60)))
        result = paired_difference(before, after, n_boot=400)
        widths.append(result.high - result.low)
        return result

    assert 0.90 < _coverage(interval, truth=0.5, repeats=300) < 0.985
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(2 / 60), rel=0.05)  # the skill cancels


def test_paired_difference_uses_common_prompts_only():
    before = {1: 0.0, 2: 0.0, 3: 1.0, 9: 1.0, 4: math.nan}
    after = {3: 1.0, 2: 1.0, 1: 0.0, 7: 0.0, 4: 1.0}
    result = paired_difference(before, after)
    assert (result.mean, result.n) == (pytest.approx(1 / 3), 3)
    with pytest.raises(ValueError, match="no prompt in common"):
        paired_difference({1: 0.0}, {2: 1.0})


def test_summarise_chooses_the_interval_by_the_values():
    rows = [
        {"index": i, "prompt": "x", "exact_match": float(i % 4 == 0), "reward": i / 40} for i in range(40)
    ]
    result = summarise(rows, seed=2)
    assert set(result) == {"exact_match", "reward"}
    assert result["exact_match"] == wilson_interval(10, 40)
    assert result["reward"] == bootstrap_mean([i / 40 for i in range(40)], seed=2)


def test_summarise_leaves_out_missing_values_and_says_so():
    rows = [{"a": 1.0}, {"a": None}, {"a": math.nan}, {"a": 0.0}, {"b": math.nan}]
    assert summarise(rows) == {"a": wilson_interval(1, 2)}
    assert summarise([]) == {}


def test_samples_of_one_prompt_count_once():
    rows = [{"index": i // 2, "hit": float(i % 2)} for i in range(20)]
    assert by_prompt(rows, "hit") == dict.fromkeys(range(10), 0.5)
    assert summarise(rows)["hit"].n == 10
    assert summarise(rows)["hit"].low == summarise(rows)["hit"].high == 0.5


def test_compare_restricts_all_three_numbers_to_common_prompts():
    before = [{"index": i, "hit": 0.0} for i in range(4)] + [{"index": 99, "hit": 1.0}]
    after = [{"index": i, "hit": float(i < 3), "new": 1.0} for i in range(4)]
    result = compare(before, after)
    assert set(result) == {"hit"}
    assert (result["hit"]["before"], result["hit"]["after"]) == (0.0, 0.75)
    assert result["hit"]["difference"].mean == 0.75
