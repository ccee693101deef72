"""One page that tells a comparison: verdicts, table, curves, pictures. Made from the comparison's folder alone."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from imagerl.rl.compare.results import Contrast, Kind, Results, RunResult, Standing
from imagerl.rl.evaluation.stats import FEWEST_SEEDS, number, span
from imagerl.rl.files.grids import embedded_grid
from imagerl.rl.files.reading import read_json
from imagerl.rl.files.writing import write_atomic
from imagerl.rl.run.charts import Chart, Series, as_float
from imagerl.rl.run.report import bar, reach, render_page
from imagerl.rl.run.svg import render

PAGE = "report.html"
PER_CHART = 6  # curves beside the baseline's that one chart can hold
GRID_POINTS = 40  # places along the budget at which runs of different step sizes are brought together


def write_comparison_page(results: Results, folder: Path) -> Path:
    """Build `report.html` in the comparison's folder. Raises ImageRLError when it cannot be written."""
    path = folder / PAGE
    write_atomic(path, render_page("comparison.html.j2", _content(results, folder)))
    return path


def _content(results: Results, folder: Path) -> dict[str, object]:
    environment = folder / "environment.json"
    charts = comparison_charts(results)
    for chart in charts:
        chart.last_step = max(s for series in chart.series for s in series.steps)
        chart.svg = Markup(render(chart))
    headline = results.metrics[0] if results.metrics else None
    rate = is_rate(results, headline)
    return {
        "name": folder.resolve().name,
        "plan": results.plan,
        "budget": str(results.plan.budget),
        "unit": results.plan.budget.unit,
        "labels": results.labels,
        "headline": headline,
        "rate": rate,
        "gold": results.gold,
        "finished": sum(run.finished for run in results.runs),
        "planned": len(results.plan.recipes) * len(results.plan.seeds),
        "rows": [_row(results, label) for label in results.labels],
        "fewest_seeds": FEWEST_SEEDS,
        "verdicts": [c for c in results.contrasts if c.metric == headline],
        "learned": [c for c in results.gains if c.metric == headline],
        "others": [
            {"metric": metric, "rate": is_rate(results, metric), "standings": _of(results, metric, "final")}
            for metric in results.metrics[1:]
        ],
        "sentence": sentence,
        "charts": charts,
        "grids": _grids(results),
        "differences": differing_settings(results),
        "environment": read_json(environment) if environment.exists() else {},
        "notes": results.notes,
        "made": datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    }


def sentence(one: Contrast, rate: bool) -> str:
    """Put a contrast into plain words, for the page and the terminal."""
    what = {
        "final": "after training",
        "mean": "on average over the budget",
        "best": "after training, each model at its best temperature",
    }[one.kind]
    other = "its start" if one.baseline == "untrained" else one.baseline
    seeds = f"{len(one.seeds)} seed{'s' if len(one.seeds) > 1 else ''}"
    mean = number(one.difference.mean, rate, sign=True) + (" points" if rate else "")
    numbers, doubt = f"{mean}, {span(one.difference, rate, sign=True)}", ""
    if len(one.seeds) < FEWEST_SEEDS:
        doubt = f"; it takes {FEWEST_SEEDS} to say something of others"
    elif one.verdict != "no difference shown" and not one.holds_corrected:
        doubt = "; not with all comparisons counted"
    return f"{one.label} against {other}, {what}: {one.verdict} ({numbers}, {seeds}{doubt})"


def is_rate(results: Results, metric: str | None) -> bool:
    """Tell whether every value is 0 or 1, so that means are shares of prompts."""
    if metric is None:
        return False
    values = [run.evaluations[-1].values[metric] for run in results.runs if run.finished]
    return all(set(np.unique(v[np.isfinite(v)])) <= {0.0, 1.0} for v in values)


def comparison_charts(results: Results) -> list[Chart]:
    """Chart medians over seeds with the band of all seeds, over what was spent; the baseline is in every chart."""
    plan = results.plan
    others = [label for label in results.labels if label != plan.baseline]
    first = [label for label in results.labels if label == plan.baseline]
    parts = [first + others[i : i + PER_CHART] for i in range(0, max(1, len(others)), PER_CHART)]
    charts = []
    band = "Median over seeds; the band reaches from the lowest to the highest."
    for metric in [*results.metrics[:1], *[m for m in results.metrics[1:] if m == "total"], *results.gold]:
        kind = "gold metric, never rewarded" if metric in results.gold else "held-out"
        for labels in parts:
            charts.append(
                Chart(
                    metric,
                    f"{kind[0].upper()}{kind[1:]}. {band}",
                    [_heldout(results, label, metric) for label in labels],
                    percent=is_rate(results, metric),
                )
            )
    for title, key, note in (
        ("Training total", "reward/mean", "The weighted sum of the rewards, on training prompts."),
        ("KL of the tokens", "kl/k3", "Nats per token, k3; only where it is measured."),
    ):
        for labels in parts:
            charts.append(
                Chart(title, f"{note} {band}", [_training(results, label, key) for label in labels])
            )
    for chart in charts:
        chart.smoothed, chart.axis = False, plan.budget.unit.removesuffix("s")
    # one without steps keeps its place: a recipe has the same colour in every chart
    return [chart for chart in charts if any(len(series.steps) for series in chart.series)]


def _heldout(results: Results, label: str, metric: str) -> Series:
    def curve(run: RunResult) -> tuple[list[float], list[float]]:
        xs = [getattr(e, results.plan.budget.unit) for e in run.evaluations]
        return xs, [float(np.nanmean(e.values[metric])) for e in run.evaluations]

    return _median(label, list(results.finished(label).values()), curve, _places(results, label))


def _training(results: Results, label: str, key: str) -> Series:
    def curve(run: RunResult) -> tuple[list[float], list[float]]:
        known = [record for record in run.steps if record.get(key) is not None]
        return [record[results.plan.budget.unit] for record in known], [as_float(r[key]) for r in known]

    runs = [run for run in results.finished(label).values() if curve(run)[0]]
    return _median(label, runs, curve, None)


def _places(results: Results, label: str) -> list[float] | None:
    """Return where all runs of an algorithm were evaluated; None when they differ."""
    unit = results.plan.budget.unit
    found = {tuple(getattr(e, unit) for e in run.evaluations) for run in results.finished(label).values()}
    return list(found.pop()) if len(found) == 1 else None


def _median(
    label: str,
    runs: Sequence[RunResult],
    curve: Callable[[RunResult], tuple[list[float], list[float]]],
    places: Sequence[float] | None,
) -> Series:
    """Return median and range of curves, on common places along their common range."""
    if not runs:
        return Series(label, [], [])
    curves = [curve(run) for run in runs]
    if places is None:
        low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
        places = np.linspace(low, high, GRID_POINTS).tolist() if high > low else [low]
    stack = np.stack([np.interp(places, xs, ys) for xs, ys in curves])
    return Series(label, places, np.median(stack, 0).tolist(), stack.min(0).tolist(), stack.max(0).tolist())


def _of(results: Results, metric: str, kind: Kind) -> dict[str, Standing]:
    return {s.label: s for s in results.standings if s.metric == metric and s.kind == kind}


def _row(results: Results, label: str) -> dict[str, object]:
    """Build a line of the main table."""
    headline = results.metrics[0]
    runs = list(results.finished(label).values())
    shown = [c for c in results.contrasts if c.metric == headline and c.kind == "final"]
    one = next((c for c in shown if c.label == label), None)
    kls = [k for run in runs for record in run.steps[-2:] if (k := record.get("kl/k3")) is not None]
    return {
        "label": label,
        "baseline": label == results.plan.baseline,
        "final": _of(results, headline, "final")[label],
        "mean": _of(results, headline, "mean")[label],
        "contrast": one,
        "bar": bar(one.difference, max(reach(c.difference) for c in shown)) if one else None,
        "images": _spread([run.spent("images") for run in runs], "{:.0f}"),
        "minutes": _spread([run.spent("minutes") for run in runs], "{:.1f}"),
        "kl": f"{sum(kls) / len(kls):.4f}" if kls else "–",
    }


def _spread(values: Sequence[float], form: str) -> str:
    """Write one number, or the range where runs differ."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def _grids(results: Results) -> list[dict[str, object]]:
    """Show the fixed prompts before training and after each algorithm's, of the first seed that all have."""
    labels = results.labels
    common = set.intersection(*(set(results.finished(label)) for label in labels)) if labels else set()
    if not common:
        return []
    seed = min(common)
    grids: list[dict[str, object]] = []
    for label in labels:
        paths = sorted((results.finished(label)[seed].folder / "samples").glob("step_*.png"))
        for path, title in ((paths[0], "before training"), (paths[-1], label)) if paths else ():
            if title == label or not grids:
                grids.append({"title": title, "seed": seed, **embedded_grid(path)})
    return grids


def differing_settings(results: Results) -> dict[str, dict[str, str]]:
    """Map dotted recipe key -> label -> value, for keys in which the algorithms differ; where a run is kept, its seed
    and what follows from the budget are left out."""

    def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    recipes = {}
    for label in results.labels:
        recipes[label] = flat(next(iter(results.finished(label).values())).recipe)
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe if not key.startswith("run."))
    table = {key: {label: _shown(recipe.get(key)) for label, recipe in recipes.items()} for key in keys}
    return {key: row for key, row in table.items() if len(set(row.values())) > 1}


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
