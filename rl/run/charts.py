"""Line charts as inline SVG whose colours are CSS variables, so that a page can switch light and dark."""

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
    parts = [m[1] for key in keys if (m := re.fullmatch(r"reward/(.+)/mean", key))]
    components = [Series(p, steps, column(f"reward/{p}/mean")) for p in parts]
    width = COLOURS
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


# ---- drawing -----------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 400.0, 182.0  # of a chart, in the units of its own coordinates; pages scale it
LEFT, RIGHT, TOP, BOTTOM = 44.0, 6.0, 8.0, 20.0
DENSEST = 600  # points of a curve; of more, the lowest and the highest of each piece are drawn


def render(chart: Chart) -> str:
    """Render the chart as an `<svg>` element, in milliseconds: a page is written while its run trains."""
    from markupsafe import escape

    frame = _Frame.of(chart)
    colours = [f"var(--s{number})" for number in range(1, COLOURS + 1)]
    if chart.kind == "stack":
        curves = _stack(frame, chart.series, colours)
    else:
        drawn = {"points": _points, "path": _path}.get(chart.kind, _line)
        curves = [
            part for s, c in zip(chart.series, colours, strict=False) for part in drawn(frame, s, c, chart)
        ]
    label = (
        []
        if chart.kind != "path"
        else [
            f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT + 12:.0f}" text-anchor="middle">{escape(chart.axis)}</text>'
        ]
    )
    height = HEIGHT + (16 if label else 0)
    return "".join(
        [
            f'<svg role="img" aria-label="{escape(chart.description)}" viewBox="0 0 {WIDTH:.0f} {height:.0f}">',
            *frame.axes(chart),
            *curves,
            *label,
            "</svg>",
        ]
    )


@dataclass(slots=True)
class _Frame:
    """The axes of a chart: limits in the units of its numbers (logarithms where `log`), and where these lie."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    @classmethod
    def of(cls, chart: Chart) -> _Frame:
        log = chart.log and _largest(chart) > 0
        xs = [float(step) for series in chart.series for step in series.steps if math.isfinite(step)] or [0.0]
        if chart.kind == "path":
            left, right = min(xs), max(xs)
            margin = 0.02 * (right - left) or 1.0
            x = left - margin, right + margin
        else:
            x = 0.0, max(1.0, chart.last_step, *xs)
        values = [v for series in chart.series for v in _shown(series, chart) if math.isfinite(v)]
        if log:
            values = [math.log10(v) for v in values if v > 0]
        low, high = min(values, default=0.0), max(values, default=1.0)
        if chart.kind == "stack":
            return cls(x, (0.0, 1.0), False)
        margin = 0.05 * (high - low) or (0.05 * abs(high) or (0.01 if chart.percent else 1.0))
        bottom, top = low - margin, high + margin
        if chart.percent:  # no axis goes where no share can be
            bottom, top = max(bottom, 0.0) if low >= 0 else bottom, min(top, 1.0) if high <= 1 else top
        if chart.zero and not log:
            bottom, top = 0.0, top if high > 0 else 0.01 if chart.percent else 1.0
        return cls(x, (bottom, top), log)

    def place(self, step: float, value: float) -> tuple[float, float] | None:
        """Return where a point lies; None for one that does not exist."""
        if not (math.isfinite(value) and math.isfinite(step)) or (self.log and value <= 0):
            return None
        value = math.log10(value) if self.log else value
        (left, right), (low, high) = self.x, self.y
        across = LEFT + (WIDTH - LEFT - RIGHT) * (step - left) / (right - left)
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def axes(self, chart: Chart) -> list[str]:
        """Draw grid lines and numbers."""
        unit, factor = (" %", 100) if chart.percent else ("", 1)
        parts = []
        for value in self._ticks_upwards():
            _, y = self.place(self.x[0], value) or (0.0, 0.0)
            if chart.kind != "stack":
                parts.append(_segment(LEFT, y, WIDTH - RIGHT, y, "var(--rule)", 0.7))
            parts.append(
                f'<text x="{LEFT - 6:.0f}" y="{y + 3.5:.1f}" text-anchor="end">{factor * value:.4g}{unit}</text>'
            )
        base = HEIGHT - BOTTOM
        parts.append(_segment(LEFT, base, WIDTH - RIGHT, base, "var(--rule)", 1))
        for step in ticks(*self.x, 6, whole=chart.kind != "path"):
            x = LEFT + (WIDTH - LEFT - RIGHT) * (step - self.x[0]) / (self.x[1] - self.x[0])
            end = "end" if x > WIDTH - 20 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 5:.0f}" text-anchor="{end}">{step:.6g}</text>')
        return parts

    def _ticks_upwards(self) -> list[float]:
        if not self.log:
            return ticks(*self.y, 5)
        whole = [10.0**power for power in range(math.ceil(self.y[0]), math.floor(self.y[1]) + 1)]
        apart = -(-len(whole) // 5)
        return whole[::apart] if len(whole) > 1 else [10 ** self.y[0], 10 ** self.y[1]]


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Return round numbers within [low, high], at most about that many and evenly spaced."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _shown(series: Series, chart: Chart) -> list[float]:
    """List every number that a chart draws of a series."""
    bounds = [b for b in (series.low, series.high) if b is not None]
    ease = smooth if chart.smoothed and chart.kind == "line" else np.asarray
    return [*map(float, series.values), *(float(v) for b in bounds for v in ease(b))]


def _line(frame: _Frame, series: Series, colour: str, chart: Chart) -> list[str]:
    ease = smooth if chart.smoothed else np.asarray
    parts = []
    if series.low is not None and series.high is not None:
        parts.append(_band(frame, series.steps, ease(series.low), ease(series.high), colour, 0.13))
    if chart.smoothed and len(series.values) >= SMOOTH_FROM:
        parts.append(_curve(frame, series.steps, series.values, colour, 0.7, 0.35))
    if sum(map(math.isfinite, series.values)) == 1:
        parts += _dots(frame, series.steps, series.values, colour, 3)
    return [*parts, _curve(frame, series.steps, ease(series.values), colour, 1.6)]


def _points(frame: _Frame, series: Series, colour: str, chart: Chart) -> list[str]:
    bars = []
    if series.low is not None and series.high is not None:
        for step, low, high in zip(series.steps, series.low, series.high, strict=True):
            ends = frame.place(step, low), frame.place(step, high)
            if ends[0] and ends[1]:
                bars.append(_segment(*ends[0], *ends[1], colour, 1.3, 0.55))
    dots = _dots(frame, series.steps, series.values, colour, 2.6)
    return [*bars, _curve(frame, series.steps, series.values, colour, 1.5), *dots]


def _path(frame: _Frame, series: Series, colour: str, chart: Chart) -> list[str]:
    """Draw points in the order of time, the last one large."""
    dots = _dots(frame, series.steps, series.values, colour, 1.5, 0.6)
    last = _dots(frame, series.steps[-1:], series.values[-1:], colour, 4)
    return [_curve(frame, series.steps, series.values, colour, 1, 0.6, every=True), *dots, *last]


def _stack(frame: _Frame, series: Sequence[Series], colours: Sequence[str]) -> list[str]:
    parts, base = [], np.zeros(len(series[0].steps))
    for one, colour in zip(series, colours, strict=False):
        top = base + np.nan_to_num(smooth(one.values))
        parts.append(_band(frame, one.steps, base, top, colour, 0.75))
        base = top
    return parts


def _curve(
    frame: _Frame,
    steps: Sequence[float],
    values: Sequence[float] | np.ndarray,
    colour: str,
    width: float,
    opacity: float = 1,
    every: bool = False,
) -> str:
    """Draw a line, with gaps where there is no value."""
    parts, pen = [], "M"
    for point in (
        frame.place(*pair)
        for pair in ((zip(steps, values, strict=True)) if every else thinned(steps, values))
    ):
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    style = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"'
    return f'<path d="{"".join(parts)}" {style}/>' if parts else ""


def thinned(steps: Sequence[float], values: Sequence[float] | np.ndarray) -> list[tuple[float, float]]:
    """Return the points of a curve; of more than DENSEST only the lowest and the highest of each piece."""
    pairs = [(float(s), float(v)) for s, v in zip(steps, values, strict=True)]
    if len(pairs) <= DENSEST:
        return pairs
    size = -(-2 * len(pairs) // DENSEST)
    known = [pair for pair in pairs if math.isfinite(pair[1])]
    pieces = (known[start : start + size] for start in range(0, len(known), size))
    ends = ((min(p, key=lambda pair: pair[1]), max(p, key=lambda pair: pair[1])) for p in pieces)
    return [pair for two in ends for pair in sorted(set(two))]


def _band(
    frame: _Frame, steps: Sequence[float], low: np.ndarray, high: np.ndarray, colour: str, opacity: float
) -> str:
    places = range(0, len(steps), max(1, len(steps) // DENSEST))
    ends = [(frame.place(steps[i], float(low[i])), frame.place(steps[i], float(high[i]))) for i in places]
    known = [(below, above) for below, above in ends if below and above]
    outline = [*(above for _, above in known), *(below for below, _ in reversed(known))]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
    return f'<polygon points="{points}" fill="{colour}" fill-opacity="{opacity}"/>' if len(known) > 1 else ""


def _dots(
    frame: _Frame,
    steps: Sequence[float],
    values: Sequence[float],
    colour: str,
    radius: float,
    opacity: float = 1,
) -> list[str]:
    places = [frame.place(*pair) for pair in zip(steps, values, strict=True)]
    return [
        f'<circle cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="{radius}" fill="{colour}" fill-opacity="{opacity}"/>'
        for p in places
        if p
    ]


def _segment(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float, opacity: float = 1
) -> str:
    style = f'stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"'
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _largest(chart: Chart) -> float:
    return max((v for series in chart.series for v in series.values if math.isfinite(v)), default=0.0)
