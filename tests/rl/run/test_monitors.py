from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.errors import ImageRLError
from imagerl.rl.run.monitors import HeldOut, Watch, change_since, comparison_level, watched

PROMPTS = 40


def rows(gold: list[float], total: list[float]) -> list[dict[str, Any]]:
    pairs = zip(gold, total, strict=True)
    return [{"index": i, "prompt": "a", "total": t, "gold": g} for i, (g, t) in enumerate(pairs)]


def hits(number: int) -> list[float]:
    return [float(i < number) for i in range(PROMPTS)]


def flat(value: float) -> list[float]:
    return [value + 0.001 * i for i in range(PROMPTS)]


def evaluate(
    watch: Watch, *history: tuple[list[float], list[float]]
) -> list[tuple[dict[str, float], list[str]]]:
    """(total, gold) by evaluation, 10 steps apart."""
    return [watch.after_evaluation(10 * i, rows(gold, total)) for i, (total, gold) in enumerate(history)]


def picture_metrics(tokens: float = 0.4, pixels: float = 0.2, blank: float = 0.0) -> dict[str, float]:
    return {"diversity/tokens": tokens, "diversity/pixels": pixels, "pictures/blank": blank}


# ---- evaluations -------------------------------------------------------------------------------------------


def test_change_is_paired_over_common_prompts() -> None:
    peak = HeldOut(3, {0: 0.0, 1: 0.5, 2: 1.0}, {0: 1.0, 1: 1.0, 2: 0.0, 9: 1.0})
    now = HeldOut(8, {0: 0.1, 1: 0.6, 2: 1.1}, {0: 0.0, 1: 1.0, 2: 0.0, 7: 1.0})
    change = change_since(peak, now, 0.95)
    assert change is not None and change.peak_step == 3
    assert change.gold.mean == pytest.approx(-1 / 3) and change.gold.n == 3
    assert change.total.mean == pytest.approx(0.1) and not change.total.bounded  # three prompts
    assert change_since(HeldOut(0, {1: 0.0}, {}), now, 0.95) is None


def test_reward_up_and_gold_down_is_an_alarm_once() -> None:
    watch = Watch(MonitorsConfig(), ["gold"])
    first, peak, fell, still = evaluate(
        watch, (flat(0.1), hits(20)), (flat(0.2), hits(30)), (flat(0.4), hits(15)), (flat(0.5), hits(10))
    )
    assert [m["alarm/hacking"] for m, _ in (first, peak, fell, still)] == [0, 0, 1, 1]
    assert [len(alarms) for _, alarms in (first, peak, fell, still)] == [0, 0, 1, 0]
    assert fell[1] == [
        "step 20: the reward is being gamed: since step 10 the held-out total rose by 0.200 and gold fell by 0.375"
    ]
    assert fell[0]["monitor/gold/peak_step"] == 10
    assert fell[0]["monitor/gold/since_peak"] == pytest.approx(-15 / 40)
    assert fell[0]["monitor/gold/total_since_peak"] == pytest.approx(0.2)
    assert watch.best_step == 10 and watch.best == 0.75


@pytest.mark.parametrize(
    ("reward", "gold"),
    [
        pytest.param(flat(0.4), hits(30), id="gold stays"),
        pytest.param(flat(0.4), hits(29), id="gold falls no more than by chance"),
        pytest.param(flat(0.1), hits(10), id="both fall"),
        pytest.param(
            [0.2 + (0.5 if i % 2 else -0.49) for i in range(PROMPTS)], hits(10), id="reward unclear"
        ),
    ],
)
def test_no_alarm_without_both(reward: list[float], gold: list[float]) -> None:
    _, (metrics, alarms) = evaluate(Watch(MonitorsConfig(), ["gold"]), (flat(0.2), hits(30)), (reward, gold))
    assert metrics["alarm/hacking"] == 0 and not alarms


def test_a_small_fall_is_accepted_whatever_its_certainty() -> None:
    slightly = [value - 0.01 for value in flat(0.5)]
    history = (flat(0.2), flat(0.5)), (flat(0.3), slightly)
    assert evaluate(Watch(MonitorsConfig(), ["gold"]), *history)[1][0]["alarm/hacking"] == 0
    assert evaluate(Watch(MonitorsConfig(max_fall=0.0), ["gold"]), *history)[1][0]["alarm/hacking"] == 1


def test_an_alarm_can_end_and_begin_again() -> None:
    watch = Watch(MonitorsConfig(), ["gold"])
    found = evaluate(
        watch,
        (flat(0.1), hits(30)),
        (flat(0.2), hits(10)),
        (flat(0.3), hits(30)),
        (flat(0.4), hits(10)),
    )
    assert [len(alarms) for _, alarms in found] == [0, 1, 0, 1]
    assert found[3][0]["monitor/gold/peak_step"] == 20  # the later of two equal ones


def test_correlation_is_of_the_last_evaluations() -> None:
    watch = Watch(MonitorsConfig(window=3), ["gold"])
    found = evaluate(watch, *((flat(r), hits(g)) for r, g in [(0.9, 30), (0.1, 20), (0.2, 22), (0.4, 12)]))
    assert "monitor/gold/correlation" not in found[1][0]
    expected = np.corrcoef([0.1, 0.2, 0.4], [20, 22, 12])[0, 1]
    assert found[3][0]["monitor/gold/correlation"] == pytest.approx(expected)
    constant = evaluate(Watch(MonitorsConfig(), ["gold"]), *[(flat(0.1), hits(40))] * 4)
    assert "monitor/gold/correlation" not in constant[3][0]


def test_samples_that_could_not_be_scored_are_left_out() -> None:
    watch = Watch(MonitorsConfig(), ["gold"])
    broken = [math.nan, *hits(20)[1:]]
    evaluate(watch, ([math.nan, *flat(0.3)[1:]], broken))
    assert watch.peaks["gold"].means == pytest.approx((0.3 + 0.001 * 20, 19 / 39))
    (nothing, _) = Watch(MonitorsConfig(), ["gold"]).after_evaluation(0, rows([math.nan], [0.5]))
    assert nothing == {"alarm/hacking": 0.0}


def test_watched_names() -> None:
    assert watched(MonitorsConfig(), ["ocr", "colours"]) == ["ocr", "colours"]
    assert watched(MonitorsConfig(watch=["exact_match"]), ["ocr"]) == ["exact_match"]
    with pytest.raises(
        ImageRLError, match="a fall of composition/fault_missing is no loss; watch what should"
    ):
        watched(MonitorsConfig(watch=["exact", "composition/fault_missing"]), [])
    with pytest.raises(ImageRLError, match='no "exact_mach"; they have gold'):
        evaluate(Watch(MonitorsConfig(), ["exact_mach"]), (flat(0.1), hits(1)))


def test_nothing_watched_is_no_alarm() -> None:
    assert Watch(MonitorsConfig(), []).after_evaluation(0, rows([1.0], [0.5])) == ({}, [])


def test_only_a_run_that_asks_for_it_ends() -> None:
    history = (flat(0.2), hits(30)), (flat(0.4), hits(10))
    for stop in (False, True):
        watch = Watch(MonitorsConfig(stop=stop), ["gold"])
        evaluate(watch, *history)
        assert watch.hacked and watch.halts is stop


# ---- at any number of looks --------------------------------------------------------------------------------

LOOKS = (5, 10, 20, 50)  # evaluations after the first


def drawn(rng: np.random.Generator, runs: int, shares: list[float], prompts: int = 256) -> np.ndarray:
    """[K, runs, prompts] of 0 and 1: a gold metric whose truth over all prompts is `shares` [K], prompts easy and hard
    (beta, deviation 0.2), hits of a prompt at two evaluations independent: nothing cancels but its difficulty."""
    easy = rng.beta(2.8, 1.2, (runs, prompts)) - 0.7
    hits = [rng.random((runs, prompts)) < np.clip(share + easy, 0, 1) for share in shares]
    return np.stack(hits).astype(np.float32)


def rising(rng: np.random.Generator, looks: int, runs: int, prompts: int = 256) -> np.ndarray:
    """[K, runs, prompts] of a total that has risen at every evaluation."""
    noise = rng.normal(0, 0.1, (looks, runs, prompts)).astype(np.float32)
    return noise + np.arange(looks, dtype=np.float32)[:, None, None]


def first_alarms(gold: np.ndarray, total: np.ndarray) -> np.ndarray:
    """[runs] evaluation at which the alarm first sounds, 999 for never: `Watch` for many runs at once."""
    means, prompts, each = gold.mean(axis=2), gold.shape[2], np.arange(gold.shape[1])
    first = np.full(gold.shape[1], 999)
    for k in range(1, len(gold)):
        peak = k - np.argmax(means[k::-1], axis=0)  # the last of the best
        level = comparison_level(MonitorsConfig().level, k, 1)
        critical = scipy_stats.t.ppf(0.5 + level / 2, prompts - 1) / math.sqrt(prompts)
        moved = first == 999
        for values, side in ((gold, -1), (total, 1)):
            gap = values[k] - values[peak, each]
            moved &= side * gap.mean(axis=1) > critical * gap.std(axis=1, ddof=1)
            moved &= np.count_nonzero(gap, axis=1) >= math.ceil(math.log2(2 / (1 - level)))
        first[moved & (means[peak, each] - means[k] > MonitorsConfig().max_fall)] = k
    return first


def test_a_gold_metric_that_stays_raises_no_alarm_however_often_it_is_looked_at() -> None:
    """Against the best evaluation at 99 % each, as before, 17, 39 and 87 % of the runs had a false one after 10, 20 and
    50 evaluations. One standard error is 0.7 points."""
    for prompts, share in ((256, 0.7), (64, 0.7), (256, 0.97)):
        rng = np.random.default_rng(prompts)
        firsts = [
            first_alarms(drawn(rng, 200, [share] * 51, prompts), rising(rng, 51, 200, prompts))
            for _ in range(4)
        ]
        for looks in LOOKS:
            assert np.mean(np.concatenate(firsts) <= looks) <= 0.05, (prompts, share, looks)


def test_a_total_that_stays_raises_no_alarm_either() -> None:
    """The other half: gold is lost prompt by prompt, and the total goes up and down by chance alone."""
    rng = np.random.default_rng(1)
    gold = np.stack([np.tile(np.arange(256) >= 5 * k, (400, 1)) for k in range(51)]).astype(np.float32)
    first = first_alarms(gold, rng.normal(0.5, 0.3, (51, 400, 256)))
    for looks in LOOKS:
        assert np.mean(first <= looks) <= 0.05, looks


def test_the_power_of_the_alarm() -> None:
    """A true fall of 10 points halfway through the run, and a rise by 20 that is lost again; docs/reward-hacking.md has
    the numbers. One standard error is 3 points."""
    for looks, of_step, of_hump in ((5, 0.7, 0.85), (20, 0.8, 0.9)):
        rng, part = np.random.default_rng(looks), np.arange(looks + 1) / looks
        step = np.where(part <= 0.5, 0.7, 0.6).tolist()
        hump = np.where(part < 0.5, 0.6 + 0.4 * part, 1.0 - 0.4 * part).tolist()
        for shares, least in ((step, of_step), (hump, of_hump)):
            found = first_alarms(drawn(rng, 200, shares), rising(rng, looks + 1, 200))
            assert np.mean(found < 999) > least, (looks, shares)


def test_the_simulation_is_of_the_watch() -> None:
    rng = np.random.default_rng(3)
    gold, total = drawn(rng, 6, [0.7] * 3 + [0.55] * 5, 64), rising(rng, 8, 6, 64)
    expected = first_alarms(gold, total)
    for run in range(6):
        watch, found = Watch(MonitorsConfig(), ["gold"]), 999
        for k in range(8):
            metrics, _ = watch.after_evaluation(k, rows(gold[k, run].tolist(), total[k, run].tolist()))
            found = min(found, k) if metrics["alarm/hacking"] else found
        assert found == expected[run]
    assert (expected < 999).any()


def test_what_a_run_may_spend_is_its_own() -> None:
    """Over any number of evaluations, pairs and metrics the one-sided chances add up to less than 1 − level."""
    for metrics in (1, 3):
        spent = [metrics * k * (1 - comparison_level(0.95, k, metrics)) / 2 for k in range(1, 5000)]
        assert 0.0499 < sum(spent) < 0.05
    assert comparison_level(0.9, 1, 1) == pytest.approx(0.9) and comparison_level(0.9, 2, 1) == pytest.approx(
        1 - 2 * 0.1 / 12
    )


# ---- steps -------------------------------------------------------------------------------------------------


def test_lost_variety_is_an_alarm_against_the_first_steps() -> None:
    watch = Watch(MonitorsConfig(window=3, min_diversity=0.5), [])
    tokens = (0.5, 0.4, 0.3, 0.2, 0.05)
    found = [watch.after_step(i, picture_metrics(value)) for i, value in enumerate(tokens)]
    assert [m["alarm/diversity"] for m, _ in found] == [0, 0, 0, 0, 1]  # 0.183 of 0.4, after 0.3
    assert found[4][1] == [
        "step 4: samples of a prompt have become alike: they differ in 18.3% of their tokens, 40.0% at first; "
        "pixels by 0.200, 0.200 at first"
    ]
    assert all(m["alarm/blank"] == 0 for m, _ in found)


def test_blank_pictures_are_an_alarm() -> None:
    watch = Watch(MonitorsConfig(window=3), [])
    blank = (0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5)
    found = [watch.after_step(i, picture_metrics(blank=value)) for i, value in enumerate(blank)]
    assert [m["alarm/blank"] for m, _ in found] == [0, 0, 0, 0, 0, 1, 1]  # 0.1 → 0.23, then 0.37
    assert [len(alarms) for _, alarms in found] == [0, 0, 0, 0, 0, 1, 0]
    assert "37% of them, 10% at first" in found[5][1][0]


def test_alarms_that_are_switched_off() -> None:
    watch = Watch(MonitorsConfig(window=3, min_diversity=0, max_blank=1), [])
    for step, metrics in enumerate((picture_metrics(), picture_metrics(0, 0, 1), picture_metrics(0, 0, 1))):
        found, alarms = watch.after_step(step, metrics)
        assert found == {"alarm/diversity": 0, "alarm/blank": 0} and not alarms
    assert watch.after_step(3, {"loss": 1.0}) == ({}, [])  # monitors.pictures: false


# ---- resuming ----------------------------------------------------------------------------------------------


def test_a_restored_watch_goes_on_as_if_never_stopped() -> None:
    history = [(flat(0.1), hits(20)), (flat(0.2), hits(30)), (flat(0.4), hits(15)), (flat(0.5), hits(10))]
    steps = [picture_metrics(0.5 / (i + 1), blank=0.15 * i) for i in range(8)]
    whole, stopped = (Watch(MonitorsConfig(window=3), ["gold"]) for _ in range(2))
    for step, (reward, gold) in enumerate(history):
        for half in (0, 1):
            metrics = steps[2 * step + half]
            assert whole.after_step(2 * step + half, metrics) == stopped.after_step(2 * step + half, metrics)
        expected = whole.after_evaluation(step, rows(gold, reward))
        assert stopped.after_evaluation(step, rows(gold, reward)) == expected
        state = json.loads(json.dumps(stopped.state()))
        stopped = Watch(MonitorsConfig(window=3), ["gold"])
        stopped.restore(state)
        assert stopped == whole
    assert whole.hacked and whole.sounding == ["blank", "diversity", "hacking/gold"]
    fresh = Watch(MonitorsConfig(), ["gold"])
    fresh.restore({})
    assert fresh == Watch(MonitorsConfig(), ["gold"])
