"""The speed at which rewards score, and how much of it a training step waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.measuring import Report, interleaved

Score = Callable[[], Any]


def bench_rewards(
    scores: Mapping[str, Score], pictures: int, repeats: int, workers: int, step: Report
) -> Report:
    """Return `images_per_s/<reward>` and `share/scoring/<reward>` of each reward alone, scoring the same `pictures`.

    `step` is a report of `bench_step` of the same recipe. `share/exposed` is the part of the scoring of a step's
    `pictures` that nothing hid: the wait for rewards over the time that `workers` processes need at this speed. It is
    1 when rewards run within the step (no workers)."""
    seconds = interleaved(scores, repeats, lambda: None)
    total = sum(seconds.values())
    alone = total / max(1, workers)
    wait = step["time/reward_wait_s"] if workers else total
    return {
        **{f"images_per_s/{name}": pictures / value for name, value in seconds.items()},
        "images_per_s/all": pictures / total,
        **{f"share/scoring/{name}": value / total for name, value in seconds.items()},
        "share/exposed": min(1.0, wait / alone),
        "share/reward_wait": step["share/reward_wait"] if workers else total / step["time/step_s"],
        "time/scoring_s": alone,
        "time/reward_wait_s": wait,
        "time/step_s": step["time/step_s"],
    }
