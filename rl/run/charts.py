"""The charts of a page: which curves each has, what it means and what is healthy. Drawn by `svg.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

COLOURS = 7  # of curves in a chart: --s1 to --s7 of style.css.j2
SMOOTH_FROM = 40  # points; shorter curves are drawn as they are


@dataclass(slots=True)
class Series:
    """One curve. `low` and `high` bound a band, or error bars where the chart draws points."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(slots=True)
class Chart:
    """A chart of curves. `note` says in one sentence what the curve means and what is healthy."""

    title: str
    note: str
    series: list[Series]
    kind: str = "line"  # line | points | stack | path: `steps` hold another number than the step
    percent: bool = False
    log: bool = False
    zero: bool = False  # the axis starts at 0
    smoothed: bool = True
    last_step: float = 0
    axis: str = "step"  # what the horizontal axis counts
    svg: str = field(default="", init=False)

    @property
    def labelled(self) -> bool:
        """Tell whether the curves need a legend: a single plain line is named by the title."""
        return len(self.series) > 1 or self.kind == "points" or self.series[0].low is not None

    @property
    def description(self) -> str:
        """Describe the chart in words, for those who cannot see it."""
        told = []
        for series in self.series:
            points = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
            if points:
                (s0, v0), (s1, v1) = points[0], points[-1]
                ends = f"{v0:.4g} at {self.axis} {s0:.6g}, {v1:.4g} at {self.axis} {s1:.6g}"
                told.append(f"{series.label}: {ends}")
        return f"{self.title}. " + "; ".join(told)


def training_charts(training: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Make every chart of a training from its metrics; a chart without data has no series."""
    steps = [record["step"] for record in training]

    def column(key: str) -> list[float]:
        return [as_float(record.get(key)) for record in training]

    def series(**labels: str) -> list[Series]:
        return [
            Series(label, steps, column(key))
            for label, key in labels.items()
            if any(math.isfinite(v) for v in column(key))
        ]

    keys = list(dict.fromkeys(key for record in training for key in record))
    reward = series(mean="reward/mean")
    for one in reward:
        spread = column("reward/std")
        one.label = "mean ± standard deviation"
        one.low = [m - s for m, s in zip(one.values, spread, strict=True)]
        one.high = [m + s for m, s in zip(one.values, spread, strict=True)]
    names = [m[1] for key in keys if (m := re.fullmatch(r"reward/(.+)/mean", key))]
    components = [Series(name, steps, column(f"reward/{name}/mean")) for name in names]
    shares = [key for key in keys if key.startswith("share/")]
    shares.sort(key=lambda key: (key == "share/other", -sum(v for v in column(key) if math.isfinite(v))))
    expected = [r["policy/ratio_is_one_expected"] for r in training if "policy/ratio_is_one_expected" in r]
    by_design = "It is 1 by design here: one update per rollout." if expected and all(expected) else ""
    rate = column("lr")
    return [
        Chart(
            "Training total",
            "Weighted sum of the rewards over all samples of a step. The band is one standard deviation.",
            reward,
        ),
        *parts("Rewards in training", "Raw values, before weights.", components),
        Chart(
            "KL to the reference",
            "Three estimates, nats per token. k1 and k3 are unbiased; k3 is never negative and less noisy.",
            series(k1="kl/k1", k2="kl/k2", k3="kl/k3"),
        ),
        Chart(
            "Entropy",
            "Nats per token. A fall to zero means that variety is gone.",
            series(entropy="policy/entropy"),
        ),
        Chart(
            "Probability ratio",
            f"New over old policy, mean per token. {by_design}",
            series(ratio="policy/ratio_mean"),
        ),
        Chart(
            "Clipped tokens",
            "Share of tokens whose ratio left the trust region.",
            series(below="policy/clip_low", above="policy/clip_high"),
            percent=True,
            zero=True,
        ),
        Chart("Gradient norm", "Before clipping.", series(norm="grad_norm"), zero=True),
        Chart(
            "Learning rate",
            "As scheduled.",
            series(rate="lr") if len(set(rate)) > 1 else [],
            zero=True,
            smoothed=False,
        ),
        Chart(
            "Nothing to learn from",
            "Groups whose samples all scored the same, and samples that could not be scored.",
            series(equal_groups="advantages/zero_variance_groups", failed_samples="reward/failed"),
            zero=True,
        ),
        Chart(
            "Sampler against trainer",
            "Difference of their log-probs for the same tokens. Anything but rounding is an error.",
            series(largest="rollout/logprob_diff_max", mean="rollout/logprob_diff_mean"),
            log=True,
        ),
        Chart(
            "Where the time goes",
            "Share of each phase in the wall time of a step.",
            [Series(key.removeprefix("share/"), steps, column(key)) for key in shares[:COLOURS]],
            kind="stack",
            percent=True,
        ),
        Chart(
            "Speed",
            "Images per second, all phases included.",
            series(images_per_second="images_per_s"),
            zero=True,
        ),
    ]


def parts(title: str, note: str, curves: Sequence[Series], **style: Any) -> list[Chart]:
    """Make as many charts as there must be for each curve to have a colour of its own, and none without a curve."""
    places = range(0, len(curves), COLOURS)
    charts = [Chart(title, note, list(curves[start : start + COLOURS]), **style) for start in places]
    return [chart for chart in charts if any(len(series.steps) for series in chart.series)]


def as_float(value: object) -> float:
    """Return the number, or NaN for what is missing."""
    return float(value) if isinstance(value, int | float) else math.nan


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Take the trailing mean over a twentieth of the curve (at least 5 points), gaps left out; raw if it is short."""
    raw = np.asarray(values, dtype=np.float64)
    if len(raw) < SMOOTH_FROM:
        return raw
    window = max(5, len(raw) // 20)
    known = np.isfinite(raw)
    sums = np.cumsum(np.where(known, raw, 0.0))
    counts = np.cumsum(known.astype(np.float64))
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
