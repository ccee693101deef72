"""The table and the figure of docs/compare.md: `python docs/make_comparison.py runs/compare` prints the one and draws
the other, as docs/comparison.png; without a folder the figure is drawn of the table that is there."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imagerl.rl.compare.results import Contrast, Results, Standing, collect
from imagerl.rl.evaluation.stats import Interval, number, span

PICTURE, TABLE, PAGE = (Path(__file__).with_name(f"compar{end}") for end in ("ison.png", "ison.csv", "e.md"))
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


class Bars(NamedTuple):
    """What training did to a recipe, and the recipe against the baseline: mean, low, high of points of exact match."""

    seeds: list[float]  # what it did to each
    gain: Sequence[float]
    against: Sequence[float] | None  # None: the baseline itself


def measured(results: Results) -> dict[str, Bars]:
    against = {c.label: c for c in results.contrasts if (c.metric, c.kind) == (HEADLINE, "final")}
    bars = {}
    for label in results.labels:
        runs = results.finished(label).values()
        seeds = [100 * float(run.evaluations[-1].values[HEADLINE].mean() - run.evaluations[0].values[HEADLINE].mean())
                 for run in runs]  # fmt: skip
        difference = against[label].difference if label in against else None
        bars[label] = Bars(
            seeds, ends(gain(results, label).difference), ends(difference) if difference else None
        )
    return bars


def ends(interval: Interval) -> list[float]:
    return [100 * value for value in (interval.mean, interval.low, interval.high)]


def published() -> dict[str, Bars]:
    """The bars of the table in docs/compare.md, whose runs are kept nowhere but in docs/comparison.csv."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    bars = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        own = [row for row in rows if row["recipe"] == cells[0]]
        if len(cells) == len(COLUMNS) and own:
            seeds = [100 * (float(row[f"final/{HEADLINE}"]) - float(row[f"start/{HEADLINE}"])) for row in own]
            gained, compared = ([float(n.replace("−", "-")) for n in re.findall(r"[+−]?[\d.]+", cell)]
                                for cell in cells[2:4])  # fmt: skip
            bars[cells[0]] = Bars(seeds, gained, compared or None)
    return bars


def figure(bars: Mapping[str, Bars]) -> Figure:
    """Every recipe's difference to its start, run by run and with its interval, and to the baseline."""
    drawing = Figure(figsize=(9.6, 0.34 * len(bars) + 1.3), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    places = {label: -number for number, label in enumerate(bars)}
    for label, one in bars.items():
        bar(left, one.gain, places[label])
        left.plot(one.seeds, [places[label]] * len(one.seeds), "o", ms=3.5, color="0.25")
        if one.against:
            bar(right, one.against, places[label])
    (baseline,) = (label for label, one in bars.items() if not one.against)
    left.set_yticks(list(places.values()), list(places))
    left.set_xlabel("exact match: difference to the start, points")
    right.set_xlabel(f"difference to {baseline}, points")
    for axes in (left, right):
        axes.axvline(0, color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    return drawing


def bar(axes: Axes, ends: Sequence[float], place: float) -> None:
    mean, low, high = ends
    axes.plot([low, high], [place, place], color="#2a62c8", alpha=0.45, linewidth=4, solid_capstyle="round")
    axes.plot([mean], [place], "D", color="#2a62c8", ms=5)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compared: Any = collect(Path(sys.argv[1]))
        print(table(compared))
    figure(measured(compared) if len(sys.argv) > 1 else published()).savefig(PICTURE, dpi=110)
