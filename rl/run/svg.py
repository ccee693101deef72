"""Charts as inline SVG whose colours are CSS variables, so that a page can switch light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from imagerl.rl.run.charts import COLOURS, SMOOTH_FROM, Chart, Series, smooth

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
            f'<svg role="img" aria-label="{escape(chart.description)}" viewBox="0 0 {WIDTH:.0f} {height:.0f}" '
            'xmlns="http://www.w3.org/2000/svg" font-size="10.5" fill="var(--muted)">',
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
