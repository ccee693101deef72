"""The table and the figure of docs/compare.md: `python docs/make_comparison.py runs/compare` prints the one and draws
the other, as docs/comparison.png."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imagerl.rl.compare.results import Contrast, Results, Standing, collect
from imagerl.rl.evaluation.stats import Interval, number, span

PICTURE = Path(__file__).with_name("comparison.png")
HEADLINE = "exact_match"
COLUMNS = (
    *("recipe", "after training", "against its start", "against grpo", "over the budget, against grpo"),
    *("seeds apart", "OCR reward", "ink right", "images", "minutes"),
)


def table(results: Results) -> str:
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(row(results, label) for label in results.labels)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(results: Results, label: str) -> list[str]:
    """One recipe as table cells; points of exact match with 95 % intervals."""
    final, reward, ink = (standing(results, label, name) for name in (HEADLINE, "ocr", "colours/ink"))
    runs = list(results.finished(label).values())
    against = {c.kind: c for c in results.contrasts if (c.label, c.metric) == (label, HEADLINE)}
    minutes = [run.spent("minutes") for run in runs]
    return [
        label,
        f"{100 * final.mean.mean:.1f} %",
        points(gain(results, label).difference),
        *(points(against[kind].difference) if kind in against else "" for kind in ("final", "mean")),
        f"{100 * against['final'].spread:.1f}" if "final" in against else "",
        f"{reward.mean.mean:.3f}",
        f"{100 * ink.mean.mean:.1f} %",
        f"{sum(run.spent('images') for run in runs) / len(runs):.0f}",
        f"{sum(minutes) / len(minutes):.1f}",
    ]


def standing(results: Results, label: str, metric: str) -> Standing:
    return next(s for s in results.standings if (s.label, s.metric, s.kind) == (label, metric, "final"))


def gain(results: Results, label: str) -> Contrast:
    return next(c for c in results.gains if (c.label, c.metric) == (label, HEADLINE))


def points(gap: Interval) -> str:
    return f"{number(gap.mean, True, True)} ({span(gap, True, True)})"


def figure(results: Results) -> Figure:
    """Every run's held-out exact match, and every recipe's difference to the baseline."""
    drawing = Figure(figsize=(9.6, 0.34 * len(results.labels) + 1.3), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    places = {label: -number for number, label in enumerate(results.labels)}
    start = next(run for run in results.runs if run.finished).evaluations[0].values[HEADLINE].mean()
    left.axvline(100 * start, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    left.annotate(" untrained", (100 * start, 0.75), color="0.45", fontsize=8, annotation_clip=False)
    for label, place in places.items():
        one = standing(results, label, HEADLINE)
        bar(left, one.mean, place)
        left.plot(
            [100 * v for v in one.by_seed.values()], [place] * len(one.by_seed), "o", ms=3.5, color="0.25"
        )
    right.axvline(0, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    for contrast in results.contrasts:
        if (contrast.metric, contrast.kind) == (HEADLINE, "final"):
            bar(right, contrast.difference, places[contrast.label])
    left.set_yticks(list(places.values()), list(places))
    left.set_xlabel("held-out exact match, %")
    right.set_xlabel(f"difference to {results.plan.baseline}, points")
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    return drawing


def bar(axes: Axes, interval: Interval, place: float) -> None:
    low, mean, high = (100 * value for value in (interval.low, interval.mean, interval.high))
    axes.plot([low, high], [place, place], color="#2a62c8", alpha=0.45, linewidth=4, solid_capstyle="round")
    axes.plot([mean], [place], "D", color="#2a62c8", ms=5)


if __name__ == "__main__":
    compared: Any = collect(Path(sys.argv[1]))
    print(table(compared))
    figure(compared).savefig(PICTURE, dpi=110)
