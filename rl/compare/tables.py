"""The CSV files behind a comparison: one row a run, one row a step, one row a contrast."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from imagerl.rl.compare.results import Contrast, Results
from imagerl.rl.evaluation.stats import Interval
from imagerl.rl.files.writing import write_atomic

RUNS, STEPS, CONTRASTS = "runs.csv", "steps.csv", "contrasts.csv"


def write_tables(results: Results, folder: Path) -> None:
    """Write the three. A number that does not exist is an empty cell."""
    for name, rows in (
        (RUNS, run_rows(results)),
        (STEPS, step_rows(results)),
        (CONTRASTS, contrast_rows(results)),
    ):
        write_atomic(folder / name, to_csv(rows))


def run_rows(results: Results) -> list[dict[str, object]]:
    """Build a row a run: `start/`, `final/` and `mean/` are held-out metrics before and after training and over the
    budget."""
    rows = []
    for run in results.runs:
        row: dict[str, object] = {
            "recipe": run.label,
            "seed": run.seed,
            "finished": int(run.finished),
            "steps": max((record["step"] for record in run.steps), default=0),
            "images": run.spent("images"),
            "minutes": run.spent("minutes"),
        }
        if run.finished:
            for metric in results.metrics:
                row[f"start/{metric}"] = _mean(run.evaluations[0].values[metric])
                row[f"final/{metric}"] = _mean(run.at(metric, "final", ""))
                row[f"mean/{metric}"] = _mean(run.at(metric, "mean", results.plan.budget.unit))
        for key in ("reward/mean", "kl/k3", "flow/kl"):
            known = [record[key] for record in run.steps if record.get(key) is not None]
            row[f"last/{key}"] = known[-1] if known else None
        rows.append(row)
    return rows


def step_rows(results: Results) -> list[dict[str, object]]:
    """Return every metric of every step; `images` and `minutes` are those spent up to its end."""
    first = ("recipe", "seed", "step", "images", "minutes")
    rows = []
    for run in results.runs:
        for record in run.steps:
            row = {"recipe": run.label, "seed": run.seed, **record}
            rows.append({key: row[key] for key in [*first, *(k for k in row if k not in first)]})
    return rows


def contrast_rows(results: Results) -> list[dict[str, object]]:
    return [_contrast_row(one) for one in [*results.contrasts, *results.gains]]


def to_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Write rows under the union of their keys, in order of appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if _missing(value) else value for key, value in row.items()})
    return buffer.getvalue()


def _contrast_row(one: Contrast) -> dict[str, object]:
    def bounds(prefix: str, interval: Interval) -> dict[str, float]:
        return {f"{prefix}low": interval.low, f"{prefix}high": interval.high}

    return {
        "recipe": one.label,
        "baseline": one.baseline,
        "metric": one.metric,
        "kind": one.kind,
        "seeds": len(one.seeds),
        "prompts": one.prompts,
        "difference": one.difference.mean,
        **bounds("", one.difference),
        **bounds("corrected_", one.corrected),
        **bounds("these_runs_", one.these_runs),
        "spread_over_seeds": one.spread,
        "probability_of_improvement": one.improvement,
        "verdict": one.verdict,
        "holds_corrected": int(one.holds_corrected),
    }


def _mean(values: Iterable[float]) -> float:
    known = [float(value) for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
