"""Is the reward being gamed? A run's watch over itself: its reward against metrics that it is not trained on, variety
within groups, blank pictures. Pure functions of measured numbers, and the little that must be remembered.

Optimising a proxy first raises what it stands for and then lowers it (arXiv 2210.10760). So an alarm is raised on
what has happened since a watched metric's best evaluation, prompt by prompt on the same random numbers: the total
reward rose and the metric fell, both beyond chance. The best of many noisy evaluations is too good, and many looks find
what is not there: `comparison_level` pays for both. A correlation over a handful of evaluations is logged beside it
and decides nothing: that of five unrelated points is beyond ±0.5 four times in ten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.stats import TOTAL, Interval, Row, direction, paired_difference, verdict
from imagerl.rl.training.reward_stats import correlation

MIN_EVALUATIONS = 3  # for a correlation; that of two is always ±1
DIVERSITY = ("diversity/tokens", "diversity/pixels")
BLANK = "pictures/blank"
ALARMS = ("hacking", "diversity", "blank")

Metrics = dict[str, float]


# ---- of evaluations ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One watched metric in an evaluation: its values and those of the total reward, by prompt index."""

    step: int
    total: Mapping[int, float]
    gold: Mapping[int, float]

    @property
    def means(self) -> tuple[float, float]:
        """Return the means of total and metric, over the prompts that have a value."""
        return _mean(self.total.values()), _mean(self.gold.values())


@dataclass(frozen=True, slots=True)
class Change:
    """The change since the peak of a watched metric."""

    peak_step: int
    gold: Interval
    total: Interval

    def hacked(self, max_fall: float) -> bool:
        """Tell whether the metric fell by over `max_fall` and the total rose, with intervals clear of no change."""
        moved = verdict(self.gold), verdict(self.total)
        return self.gold.mean < -max_fall and moved == ("lower", "higher")


def comparison_level(level: float, earlier: int, watched: int) -> float:
    """Return the confidence of the interval for one comparison with the best of `earlier` evaluations, such that a run
    in which none of the `watched` metrics falls while the total rises raises no alarm with probability `level` or more,
    however many evaluations it has.

    Of α = 1 − level, α / k(k + 1) is spent on the evaluation that has k earlier ones; that is α over all k = 1, 2, …
    It is shared among the metrics and among the k pairs with an earlier one, of which the best is but one: choosing it
    by its noise gains nothing (Bonferroni). An alarm needs a fall *and* a rise, so each may err that often on its side;
    both sides of the interval have twice that."""
    spent = (1 - level) / (earlier * (earlier + 1))
    return 1 - 2 * spent / (earlier * watched)


def change_since(peak: HeldOut, now: HeldOut, level: float) -> Change | None:
    """Return paired differences over the prompts that both could score; None where there are none."""
    try:
        gold = paired_difference(peak.gold, now.gold, level=level)
        total = paired_difference(peak.total, now.total, level=level)
    except ValueError:
        return None
    return Change(peak.step, gold, total)


# ---- of steps ----------------------------------------------------------------------------------------------


def lost_diversity(start: Metrics, recent: Metrics, min_diversity: float) -> bool:
    """Tell whether tokens or pixels of a group differ by less than that part of the difference at first."""
    return any(recent[key] < min_diversity * start[key] for key in DIVERSITY)


def gone_blank(start: Metrics, recent: Metrics, max_blank: float) -> bool:
    return recent[BLANK] - start[BLANK] > max_blank


def sentence(kind: str, step: int, detail: str) -> str:
    """Put an alarm into one line, for the log and the report."""
    meaning = {
        "hacking": "the reward is being gamed",
        "diversity": "samples of a prompt have become alike",
        "blank": "pictures have become blank",
    }
    return f"step {step}: {meaning[kind]}: {detail}"


def hacking_detail(name: str, metrics: Mapping[str, float]) -> str:
    key = f"monitor/{name}"
    return (
        f"since step {metrics[f'{key}/peak_step']:g} the held-out total rose by "
        f"{metrics[f'{key}/total_since_peak']:.3f} and {name} fell by {-metrics[f'{key}/since_peak']:.3f}"
    )


def step_detail(kind: str, start: Mapping[str, float], recent: Mapping[str, float]) -> str:
    if kind == "blank":
        return f"{recent[BLANK]:.0%} of them, {start[BLANK]:.0%} at first"
    return (
        f"they differ in {recent[DIVERSITY[0]]:.1%} of their tokens, {start[DIVERSITY[0]]:.1%} at first; pixels by "
        f"{recent[DIVERSITY[1]]:.3f}, {start[DIVERSITY[1]]:.3f} at first"
    )


# ---- a run's watch -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """The watch's memory of a run. `state` and `restore` make a resumed run's watch that of one never stopped."""

    settings: MonitorsConfig
    names: list[str]  # of the watched metrics, as evaluations call them
    start: list[Metrics] = field(default_factory=list)  # of the first `window` steps
    recent: list[Metrics] = field(default_factory=list)  # of the last `window` steps
    means: dict[str, list[list[float]]] = field(default_factory=dict)  # by name: [total, gold] an evaluation
    looks: dict[str, int] = field(default_factory=dict)  # by name: evaluations so far
    peaks: dict[str, HeldOut] = field(default_factory=dict)
    sounding: list[str] = field(default_factory=list)  # alarms that were on when last looked at
    hacked: bool = False
    best: float | None = None  # highest mean of the watched metrics at an evaluation
    best_step: int | None = None
    best_total: float | None = None  # highest held-out mean of the total
    waited: int = 0  # evaluations since

    @property
    def halts(self) -> bool:
        """Tell whether the run is to end here."""
        return (self.settings.stop and self.hacked) or self.plateaued

    @property
    def plateaued(self) -> bool:
        """Tell whether the held-out total has not risen for as long as one was ready to wait."""
        return 0 < self.settings.patience <= self.waited

    def after_step(self, step: int, metrics: Mapping[str, float]) -> tuple[Metrics, list[str]]:
        """Return the metrics that a training step adds, and the alarms that it sets off."""
        keys = (*DIVERSITY, BLANK)
        if not all(key in metrics for key in keys):
            return {}, []
        seen = {key: float(metrics[key]) for key in keys}
        if len(self.start) < self.settings.window:
            self.start.append(seen)
        self.recent = [*self.recent, seen][-self.settings.window :]
        start, recent = average(self.start), average(self.recent)
        on = {
            "diversity": lost_diversity(start, recent, self.settings.min_diversity),
            "blank": gone_blank(start, recent, self.settings.max_blank),
        }
        alarms = [
            sentence(kind, step, step_detail(kind, start, recent))
            for kind in on
            if self._begins(kind, on[kind])
        ]
        return {f"alarm/{kind}": float(is_on) for kind, is_on in on.items()}, alarms

    def after_evaluation(self, step: int, rows: Sequence[Row]) -> tuple[Metrics, list[str]]:
        """Return the same for a held-out evaluation, from its rows with the watched metrics and the total.

        Raises:
            ImageRLError: a watched metric is not among those measured.
        """
        metrics: Metrics = {}
        alarms: list[str] = []
        found: list[float] = []
        total = _mean([row.get(TOTAL, math.nan) for row in rows])
        if self.best_total is None or total > self.best_total:
            self.best_total, self.waited = (total, 0) if math.isfinite(total) else (None, 0)
        else:
            self.waited += 1
        for name in self.names:
            now = held_out(step, rows, name)
            found.append(now.means[1])
            metrics |= self._compare(name, now)
            on = bool(metrics.get(f"monitor/{name}/alarm"))
            self.hacked = self.hacked or on
            if self._begins(f"hacking/{name}", on):
                alarms.append(sentence("hacking", step, hacking_detail(name, metrics)))
        if self.names:
            metrics["alarm/hacking"] = max(metrics.get(f"monitor/{name}/alarm", 0.0) for name in self.names)
            gold = _mean(found)
            if self.best is None or gold >= self.best:
                self.best, self.best_step = (gold, step) if math.isfinite(gold) else (None, None)
        return metrics, alarms

    def _compare(self, name: str, now: HeldOut) -> Metrics:
        key, (total, gold) = f"monitor/{name}", now.means
        if not (math.isfinite(total) and math.isfinite(gold)):
            return {}
        past = self.means[name] = [*self.means.get(name, []), [total, gold]][-self.settings.window :]
        if name not in self.peaks or gold >= self.peaks[name].means[1]:
            self.peaks[name] = now
        earlier = self.looks.get(name, 0)
        self.looks[name] = earlier + 1
        level = comparison_level(self.settings.level, max(earlier, 1), len(self.names))
        change = change_since(self.peaks[name], now, level)
        if change is None:
            return {}
        metrics = {
            f"{key}/peak_step": float(change.peak_step),
            f"{key}/since_peak": change.gold.mean,
            f"{key}/total_since_peak": change.total.mean,
            f"{key}/alarm": float(change.hacked(self.settings.max_fall)),
        }
        together = correlation(*np.array(past).T) if len(past) >= MIN_EVALUATIONS else math.nan
        return metrics | ({f"{key}/correlation": together} if math.isfinite(together) else {})

    def _begins(self, alarm: str, on: bool) -> bool:
        """Note whether an alarm is on; true when it was not before."""
        begins = on and alarm not in self.sounding
        self.sounding = sorted({*self.sounding, alarm} if on else {*self.sounding} - {alarm})
        return begins

    # ---- what outlives a step ------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Return the state as JSON takes it."""
        peaks = {
            name: {"step": peak.step, "total": _pairs(peak.total), "gold": _pairs(peak.gold)}
            for name, peak in self.peaks.items()
        }
        names = (
            "start",
            "recent",
            "means",
            "looks",
            "sounding",
            "hacked",
            "best",
            "best_step",
            "best_total",
            "waited",
        )
        return {name: getattr(self, name) for name in names} | {"peaks": peaks}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned; from nothing when it is empty."""
        for name in state.keys() - {"peaks"}:
            setattr(self, name, state[name])
        self.peaks = {
            name: HeldOut(peak["step"], dict(peak["total"]), dict(peak["gold"]))
            for name, peak in state.get("peaks", {}).items()
        }


def watched(settings: MonitorsConfig, gold: Sequence[str]) -> list[str]:
    """Name the watched metrics. Raises ImageRLError for one that may fall."""
    odd = next((name for name in settings.watch or () if direction(name) != 1), None)
    if odd is not None:
        raise ImageRLError(
            f"monitors.watch: a fall of {odd} is no loss; watch what should rise, as exact_match"
        )
    return list(gold) if settings.watch is None else settings.watch


def held_out(step: int, rows: Sequence[Row], name: str) -> HeldOut:
    """Pick one metric of an evaluation's rows, values that could not be scored left out.

    Raises:
        ImageRLError: no row has it.
    """
    if rows and not any(name in row for row in rows):
        known = ", ".join(sorted({key for row in rows for key in row} - {"index", "prompt"}))
        raise ImageRLError(f'monitors.watch: evaluations have no "{name}"; they have {known}')
    total, gold = (
        {row["index"]: float(row[key]) for row in rows if math.isfinite(row.get(key, math.nan))}
        for key in (TOTAL, name)
    )
    return HeldOut(step, total, gold)


def average(records: Sequence[Mapping[str, float]]) -> Metrics:
    """Average each number over records that have the same keys."""
    return {key: _mean([record[key] for record in records]) for key in records[0]}


def _mean(values: Iterable[float]) -> float:
    known = [float(value) for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _pairs(values: Mapping[int, float]) -> list[list[float]]:
    return [[index, value] for index, value in values.items()]
