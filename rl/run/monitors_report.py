"""The monitors' part of a run's page: alarms in words, and curves. Made from metrics.jsonl and the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.evaluation.stats import TOTAL
from imagerl.rl.run.charts import Chart, Series, as_float
from imagerl.rl.run.monitors import ALARMS, BLANK, DIVERSITY, average, hacking_detail, sentence, step_detail

COLOURS = ("brightness", "contrast", "saturation", "clipped", "blank")
Records = Sequence[Mapping[str, Any]]


def alarms(records: Records, window: int = MonitorsConfig().window) -> list[str]:
    """List every alarm in one line, at the step at which it began, in order of time."""
    lines: list[str] = []
    sounding: set[tuple[str, str]] = set()
    steps = [record for record in records if BLANK in record]
    for record in records:
        for kind, name in _raised(record):
            if (kind, name) in sounding:
                continue
            if kind == "hacking":
                detail = hacking_detail(name, {key: as_float(value) for key, value in record.items()})
            else:
                place = steps.index(record) + 1
                seen = [_numbers(one) for one in (steps[:place][:window], steps[:place][-window:])]
                detail = step_detail(kind, *map(average, seen))
            lines.append(sentence(kind, record["step"], detail))
        measured = {kind for kind in ALARMS if f"alarm/{kind}" in record}
        sounding = {alarm for alarm in sounding if alarm[0] not in measured} | set(_raised(record))
    return lines


def watched_names(records: Records) -> list[str]:
    """Name the watched metrics, as the keys `monitor/<name>/peak_step` have them."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [found[1] for key in keys if (found := re.fullmatch(r"monitor/(.+)/peak_step", key))]


def monitor_charts(records: Records, suite: str) -> list[Chart]:
    """Draw total and watched metrics over time and against KL, variety, colours; a chart without data has no series."""
    training = [record for record in records if "reward/mean" in record]
    total = f"eval/{suite}/{TOTAL}"
    evaluations = [record for record in records if total in record]
    kl = {0: 0.0} | {record["step"]: as_float(record.get("kl/k3")) for record in training}
    gold = {name: f"eval/{suite}/{name}" for name in watched_names(records)}

    def over_time(label: str, key: str, source: Records) -> list[Series]:
        known = [record for record in source if math.isfinite(as_float(record.get(key)))]
        values = [float(record[key]) for record in known]
        return [Series(label, [record["step"] for record in known], values)] if known else []

    def against_kl(label: str, key: str, source: Records) -> list[Series]:
        points = [(kl.get(record["step"], math.nan), as_float(record.get(key))) for record in source]
        known = [point for point in points if all(map(math.isfinite, point))]
        return [Series(label, *map(list, zip(*known, strict=True)))] if known else []

    watched = [one for name, key in gold.items() for one in over_time(name, key, evaluations)]
    together = [one for n in gold for one in over_time(n, f"monitor/{n}/correlation", evaluations)]
    paid = against_kl("total in training", "reward/mean", training)
    if paid:
        paid += [one for name, key in gold.items() for one in against_kl(name, key, evaluations)]
    return [
        Chart(
            "Total and gold",
            "On held-out prompts: the total that is trained on, and metrics that are not. Apart is alarming.",
            [*over_time(TOTAL, total, evaluations), *watched] if watched else [],
            kind="points",
        ),
        Chart(
            "Correlation of total and gold",
            "Over the last evaluations, -1 to 1. Of a handful of points: it takes a trend to mean something.",
            together,
            kind="points",
        ),
        Chart(
            "Total against KL",
            "What the total reward was paid for in distance from the reference; the large dot is the last step.",
            paid,
            kind="path",
            axis="KL to the reference, nats per token",
        ),
        Chart(
            "Variety within groups",
            "How much samples of a prompt differ: share of their tokens, and root mean square of pixels.",
            [s for key in DIVERSITY for s in over_time(key.partition("/")[2], key, training)],
            zero=True,
        ),
        Chart(
            "Look of the pictures",
            "Means over the pictures drawn in training. Drift without need is the commonest sign of gaming.",
            [s for name in COLOURS for s in over_time(name, f"pictures/{name}", training)],
            zero=True,
        ),
    ]


def _raised(record: Mapping[str, object]) -> list[tuple[str, str]]:
    """List (kind, watched metric or "") of the alarms that a record says are on."""
    steps = [(kind, "") for kind in ALARMS if kind != "hacking" and record.get(f"alarm/{kind}")]
    return steps + [
        ("hacking", name) for name in watched_names([record]) if record.get(f"monitor/{name}/alarm")
    ]


def _numbers(records: Records) -> list[dict[str, float]]:
    return [{key: as_float(record.get(key)) for key in (*DIVERSITY, BLANK)} for record in records]
