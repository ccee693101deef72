"""Line charts as inline SVG whose colours are CSS variables, so that a page can switch light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Placeholders that matplotlib draws with; the SVG carries `var(--…)` in their place.
SERIES_COLOURS = ("#010101", "#020202", "#030303", "#040404", "#050505", "#060606", "#070707")
_INK, _RULE = "#0a0a0a", "#0b0b0b"
_VARIABLES = {colour: f"var(--s{i})" for i, colour in enumerate(SERIES_COLOURS, 1)} | {
    _INK: "var(--muted)",
    _RULE: "var(--rule)",
}
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
        parts = []
        for series in self.series:
            points = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if math.isfinite(v)]
            if points:
                (s0, v0), (s1, v1) = points[0], points[-1]
                ends = f"{v0:.4g} at {self.axis} {s0:.6g}, {v1:.4g} at {self.axis} {s1:.6g}"
                parts.append(f"{series.label}: {ends}")
        return f"{self.title}. " + "; ".join(parts)


def training_charts(training: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Make every chart of a training from its metrics; a chart without data has no series."""
    steps = [record["step"] for record in training]

    def column(key: str) -> list[float]:
        return [as_float(record.get(key)) for record in training]

    def series(**labels: str) -> list[Series]:
        return [
            Series(label.replace("_", " "), steps, column(key))
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
    parts = [m[1] for key in keys if (m := re.fullmatch(r"reward/(.+)/mean", key))]
    components = [Series(p, steps, column(f"reward/{p}/mean")) for p in parts]
    width = len(SERIES_COLOURS)
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
        *(
            Chart("Rewards in training", "Raw values, before weights.", components[i : i + width])
            for i in range(0, len(components), width)
        ),
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
            [Series(key.removeprefix("share/"), steps, column(key)) for key in shares[:width]],
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


def render(chart: Chart, prefix: str) -> str:
    """Render the chart as an `<svg>` element. `prefix` keeps its ids apart from those of other charts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    settings = {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 9, "text.parse_math": False}
    with rc_context(settings):
        figure = Figure(figsize=(5.4, 2.45), layout="constrained")
        axes = figure.add_subplot()
        if chart.kind == "stack":
            _draw_stack(axes, chart.series)
            axes.set_ylim(0, 1)
        else:
            for series, colour in zip(chart.series, SERIES_COLOURS, strict=False):
                _draw_series(axes, series, colour, chart)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        axes.tick_params(length=0, colors=_INK, labelcolor=_INK, which="both", pad=5)
        if chart.kind != "stack":
            axes.grid(axis="y", color=_RULE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=chart.kind != "path", steps=[1, 2, 2.5, 5, 10]))
        if chart.log and _largest(chart) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        if chart.zero:
            # A curve that is 0 throughout would otherwise sit on an axis of arbitrary reach.
            axes.set_ylim(0, None if _largest(chart) > 0 else 0.01 if chart.percent else 1)
        unit, factor = (" %", 100) if chart.percent else ("", 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:.4g}{unit}"))
        if chart.kind == "path":
            axes.set_xlabel(chart.axis, color=_INK)
        else:
            reach = max(1, chart.last_step, *(step for series in chart.series for step in series.steps))
            axes.set_xlim(0 if chart.kind == "stack" else -0.01 * reach, reach * 1.01)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue().decode(), prefix, chart.description)


def _draw_series(axes: Axes, series: Series, colour: str, chart: Chart) -> None:
    values = np.asarray(series.values, dtype=np.float64)
    bounds = series.low is not None and series.high is not None
    if chart.kind == "path":  # in the order of time, the end filled
        axes.plot(series.steps, values, color=colour, linewidth=1.2, marker=".", markersize=5, alpha=0.6)
        axes.plot(series.steps[-1:], values[-1:], color=colour, marker="o", markersize=7)
        return
    if chart.kind == "points":
        if bounds:
            low, high = (np.asarray(b, dtype=np.float64) for b in (series.low, series.high))
            errors = np.nan_to_num(np.stack([values - low, high - values])).clip(min=0)
            axes.errorbar(series.steps, values, errors, fmt="none", ecolor=colour, elinewidth=1.4, alpha=0.55)
        axes.plot(series.steps, values, color=colour, linewidth=1.6, marker="o", markersize=4.5)
        return
    ease = smooth if chart.smoothed else np.asarray
    if bounds:
        assert series.low is not None and series.high is not None
        axes.fill_between(
            series.steps, ease(series.low), ease(series.high), color=colour, alpha=0.13, linewidth=0
        )
    if chart.smoothed and len(values) >= SMOOTH_FROM:
        axes.plot(series.steps, values, color=colour, linewidth=0.7, alpha=0.3)
    marker = "o" if len(values) == 1 else None
    axes.plot(
        series.steps,
        ease(values),
        color=colour,
        linewidth=1.8,
        marker=marker,
        solid_joinstyle="round",
        clip_on=chart.log,  # a line along the zero axis keeps its full width
    )


def _draw_stack(axes: Axes, series: list[Series]) -> None:
    base = np.zeros(len(series[0].steps))
    for one, colour in zip(series, SERIES_COLOURS, strict=False):
        top = base + np.nan_to_num(smooth(one.values))
        axes.fill_between(one.steps, base, top, color=colour, alpha=0.75, linewidth=0)
        base = top


def _largest(chart: Chart) -> float:
    return max((v for series in chart.series for v in series.values if math.isfinite(v)), default=0.0)


def _inline(svg: str, prefix: str, description: str) -> str:
    """Strip what only a file needs, make ids unique, and swap placeholders for CSS variables."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'((?:xlink:)?href="|url\()#', rf"\g<1>#{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return f'<svg role="img" aria-label="{escape(description)}" {svg[len("<svg ") :]}'
