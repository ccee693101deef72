from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from rl.errors import ImageRLError
from rl.monitoring.config import MonitorsConfig
from rl.monitoring.watch import HeldOut, Watch, change_since, watched

PROMPTS = 40


def rows(gold: list[float]) -> list[dict[str, Any]]:
    return [{"index": i, "prompt": "a", "gold": value} for i, value in enumerate(gold)]


def hits(number: int) -> list[float]:
    return [float(i < number) for i in range(PROMPTS)]


def flat(value: float) -> list[float]:
    return [value + 0.001 * i for i in range(PROMPTS)]


def evaluate(
    watch: Watch, *history: tuple[list[float], list[float]]
) -> list[tuple[dict[str, float], list[str]]]:
    """(reward, gold) by evaluation, 10 steps apart."""
    return [watch.after_evaluation(10 * i, rows(gold), reward) for i, (reward, gold) in enumerate(history)]


def picture_metrics(tokens: float = 0.4, pixels: float = 0.2, blank: float = 0.0) -> dict[str, float]:
    return {"diversity/tokens": tokens, "diversity/pixels": pixels, "pictures/blank": blank}


# ---- evaluations -------------------------------------------------------------------------------------------


def test_change_is_paired_over_common_prompts() -> None:
    peak = HeldOut(3, {0: 0.0, 1: 0.5, 2: 1.0}, {0: 1.0, 1: 1.0, 2: 0.0, 9: 1.0})
    now = HeldOut(8, {0: 0.1, 1: 0.6, 2: 1.1}, {0: 0.0, 1: 1.0, 2: 0.0, 7: 1.0})
    change = change_since(peak, now, 0.95)
    assert change is not None and change.peak_step == 3
    assert change.gold.mean == pytest.approx(-1 / 3) and change.gold.n == 3
    assert (change.reward.mean, change.reward.low, change.reward.high) == pytest.approx((0.1, 0.1, 0.1))
    assert change_since(HeldOut(0, {1: 0.0}, {}), now, 0.95) is None


def test_reward_up_and_gold_down_is_an_alarm_once() -> None:
    watch = Watch(MonitorsConfig(), ["gold"])
    first, peak, fell, still = evaluate(
        watch, (flat(0.1), hits(20)), (flat(0.2), hits(30)), (flat(0.4), hits(15)), (flat(0.5), hits(10))
    )
    assert [m["alarm/hacking"] for m, _ in (first, peak, fell, still)] == [0, 0, 1, 1]
    assert [len(alarms) for _, alarms in (first, peak, fell, still)] == [0, 0, 1, 0]
    assert fell[1] == [
        "step 20: the reward is being gamed: since step 10 the held-out reward rose by 0.200 and gold fell by 0.375"
    ]
    assert fell[0]["monitor/gold/peak_step"] == 10
    assert fell[0]["monitor/gold/since_peak"] == pytest.approx(-15 / 40)
    assert fell[0]["monitor/reward"] == pytest.approx(0.4 + 0.001 * 19.5)
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
    ((metrics, _),) = evaluate(watch, ([math.nan, *flat(0.3)[1:]], broken))
    assert metrics["monitor/reward"] == pytest.approx(0.3 + 0.001 * 20)
    assert watch.peaks["gold"].means[1] == pytest.approx(19 / 39)
    (nothing, _) = Watch(MonitorsConfig(), ["gold"]).after_evaluation(0, rows([math.nan]), [0.5])
    assert nothing == {"monitor/reward": 0.5, "alarm/hacking": 0.0}


def test_watched_names() -> None:
    assert watched(MonitorsConfig(), ["ocr", "colours"], "ocr") == ["reward", "colours"]
    assert watched(MonitorsConfig(watch=["exact_match"]), ["ocr"], "ocr") == ["exact_match"]
    with pytest.raises(ImageRLError, match='no "exact_mach"; they have gold'):
        evaluate(Watch(MonitorsConfig(), ["exact_mach"]), (flat(0.1), hits(1)))


def test_nothing_watched_is_no_alarm() -> None:
    assert Watch(MonitorsConfig(), []).after_evaluation(0, rows([1.0]), [0.5]) == (
        {"monitor/reward": 0.5},
        [],
    )


def test_only_a_run_that_asks_for_it_ends() -> None:
    history = (flat(0.2), hits(30)), (flat(0.4), hits(10))
    for stop in (False, True):
        watch = Watch(MonitorsConfig(stop=stop), ["gold"])
        evaluate(watch, *history)
        assert watch.hacked and watch.halts is stop


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
        expected = whole.after_evaluation(step, rows(gold), reward)
        assert stopped.after_evaluation(step, rows(gold), reward) == expected
        state = json.loads(json.dumps(stopped.state()))
        stopped = Watch(MonitorsConfig(window=3), ["gold"])
        stopped.restore(state)
        assert stopped == whole
    assert whole.hacked and whole.sounding == ["blank", "diversity", "hacking/gold"]
    fresh = Watch(MonitorsConfig(), ["gold"])
    fresh.restore({})
    assert fresh == Watch(MonitorsConfig(), ["gold"])
