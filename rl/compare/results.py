"""Results of a comparison's runs, read from their folders, and what follows from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import trim_mean

from imagerl.rl.compare.plan import UNITS, Plan
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.against import read_evaluation
from imagerl.rl.evaluation.stats import (
    Interval,
    Row,
    area_under_curve,
    crossed_interval,
    headline,
    improvement_probability,
    mean_interval,
    paired_scores,
    verdict,
)
from imagerl.rl.files.metrics import read_metrics
from imagerl.rl.files.reading import read_json, read_text
from imagerl.rl.files.yaml_text import parse_yaml
from imagerl.rl.run.report import gold_metrics

# after training, averaged over the run (area under the curve / budget), or after training at the best temperature
Kind = Literal["final", "mean", "best"]
UNTRAINED = "untrained"


@dataclass(slots=True)
class Evaluated:
    """A held-out evaluation; `values` maps a metric to one number per prompt [P], NaN where it has none."""

    step: int
    images: float
    minutes: float
    values: dict[str, np.ndarray]


@dataclass(slots=True)
class RunResult:
    """One run. `steps` are the records of metrics.jsonl merged by step, with `images` and `minutes` so far."""

    label: str
    seed: int
    folder: Path
    finished: bool
    steps: list[dict[str, Any]]
    evaluations: list[Evaluated]
    prompts: list[str]
    recipe: dict[str, Any]
    best: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None = (
        None  # before and after, at best temperatures
    )

    def at(self, metric: str, kind: Kind, unit: str) -> np.ndarray:
        """Return [P] of a metric, after training or as the mean over the budget."""
        if kind == "best" and self.best:
            return self.best[1][metric]
        if kind == "final":
            return self.evaluations[-1].values[metric]
        xs = [getattr(evaluated, unit) for evaluated in self.evaluations]
        return area_under_curve(xs, np.stack([evaluated.values[metric] for evaluated in self.evaluations]))

    def spent(self, unit: str) -> float:
        return float(self.steps[-1][unit]) if self.steps else 0.0


@dataclass(slots=True)
class Contrast:
    """One algorithm against another in one metric, paired on seeds and prompts.

    `difference` is for other seeds and prompts; `corrected` is the same at a level that counts all contrasts of the
    metric (Bonferroni); `these_runs` is for other prompts alone; `spread` is the standard deviation over seeds;
    `improvement` is the share of pairs of runs in which ours is the better one."""

    label: str
    baseline: str
    metric: str
    kind: Kind
    seeds: list[int]
    prompts: int
    difference: Interval
    corrected: Interval
    these_runs: Interval
    spread: float
    improvement: float
    verdict: str
    holds_corrected: bool


@dataclass(slots=True)
class Standing:
    """One algorithm in one metric: mean for other seeds and prompts, and the interquartile mean of these seeds
    (arXiv 2108.13264; of fewer than four the plain mean)."""

    label: str
    metric: str
    kind: Kind
    mean: Interval
    iqm: float
    by_seed: dict[int, float]


@dataclass(slots=True)
class Results:
    """Everything that page and tables say. Only finished runs count in `standings`, `contrasts` and `gains`."""

    plan: Plan
    runs: list[RunResult]
    metrics: list[str]  # the headline first
    gold: list[str]
    standings: list[Standing] = field(default_factory=list)
    contrasts: list[Contrast] = field(default_factory=list)
    gains: list[Contrast] = field(default_factory=list)  # against the same run before training
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """List those with a finished run, the baseline first."""
        done = {run.label for run in self.runs if run.finished}
        return sorted(
            (label for label in self.plan.recipes if label in done), key=lambda x: x != self.plan.baseline
        )

    def finished(self, label: str) -> dict[int, RunResult]:
        return {run.seed: run for run in self.runs if run.label == label and run.finished}


def collect(folder: Path) -> Results:
    """Read all runs of a comparison's folder, whatever is there so far, and compare them.

    Raises ImageRLError when the folder holds no comparison, or a file of a run is damaged."""
    plan = Plan.read(folder)
    runs = []
    for label in plan.recipes:
        for place in sorted((folder / label).glob("seed-*"), key=lambda path: path.name):
            if place.is_dir() and re.fullmatch(r"seed-\d+", place.name):
                run = read_run(label, int(place.name.removeprefix("seed-")), place)
                if run is not None:
                    runs.append(run)
    done = [run for run in runs if run.finished]
    metrics = _common_metrics(done)
    gold = _gold(done, metrics)
    # Runs are judged by what was rewarded.
    first = headline([name for name in metrics if name not in gold] or metrics)
    metrics.sort(key=lambda name: name != first)
    results = Results(plan, runs, metrics, gold)
    refuse_other_prompts(done)
    kinds: tuple[Kind, ...] = ("final", "mean")
    for metric in metrics:
        try:
            for kind in kinds:
                _compare(results, metric, kind)
            if metric == metrics[0] and all(run.best for run in done):
                _compare(results, metric, "best")
        except ValueError as error:
            results.notes.append(f"{metric} is not compared: {error}")
    results.notes += _notes(results)
    return results


def read_run(label: str, seed: int, folder: Path) -> RunResult | None:
    """Read a run's folder; None when it has not begun."""
    if not (folder / "recipe.yaml").exists():
        return None
    merged: dict[int, dict[str, Any]] = {}
    for record in read_metrics(folder):
        merged.setdefault(record["step"], {}).update(record)
    images = seconds = 0.0
    for step in sorted(merged):
        images += merged[step].get("rollout/images") or 0.0
        seconds += merged[step].get("time/step_s") or 0.0
        merged[step] |= {"images": images, "minutes": seconds / 60}
    evaluations, prompts = [], []
    for path in sorted((folder / "eval").glob("*_step_*.json")):
        step = int(path.stem.rpartition("_")[2])
        if step in merged:  # else it is of a part of the run that was lost and comes again
            rows = _load(path)["per_prompt"]
            prompts = [str(row["prompt"]) for row in rows]
            spent = merged[step]
            evaluations.append(Evaluated(step, spent["images"], spent["minutes"], _columns(rows)))
    return RunResult(
        label,
        seed,
        folder,
        (folder / "eval" / "comparison.json").exists() and len(evaluations) > 1,
        [merged[step] for step in sorted(merged)],
        evaluations,
        prompts,
        parse_yaml(read_text(folder / "recipe.yaml"), str(folder / "recipe.yaml")),
        _at_best(folder / "eval" / "comparison.json"),
    )


def _at_best(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
    told = read_json(path).get("best_temperature") if path.exists() else None
    return (_columns(told["per_prompt"]["before"]), _columns(told["per_prompt"]["after"])) if told else None


def refuse_other_prompts(runs: Sequence[RunResult]) -> None:
    """Raise ImageRLError when two runs were evaluated on other held-out prompts, as after a change of the file."""
    for run in runs[1:]:
        if run.prompts != runs[0].prompts:
            raise ImageRLError(
                f"{run.folder} and {runs[0].folder} were evaluated on other prompts; remove one"
            )


def _compare(results: Results, metric: str, kind: Kind) -> None:
    plan, unit = results.plan, results.plan.budget.unit
    assert unit in UNITS
    labels = results.labels
    scores = {
        label: {seed: run.at(metric, kind, unit) for seed, run in results.finished(label).items()}
        for label in labels
    }
    for label, by_seed in scores.items():
        table = np.stack([by_seed[seed] for seed in sorted(by_seed)])
        known = paired_scores(table, np.zeros_like(table))
        means = dict(zip(sorted(by_seed), known.mean(axis=1).tolist(), strict=True))
        iqm = float(trim_mean(list(means.values()), 0.25))
        results.standings.append(Standing(label, metric, kind, crossed_interval(known), iqm, means))
    others = [label for label in labels if label != plan.baseline and plan.baseline in scores]
    for label in others:
        made = contrast(scores[label], scores[plan.baseline], len(others))
        if made is not None:
            results.contrasts.append(Contrast(label, plan.baseline, metric, kind, **made))
    if kind != "mean":
        for label in labels:
            finished = results.finished(label).items()
            before = {
                seed: (run.best[0] if kind == "best" and run.best else run.evaluations[0].values)[metric]
                for seed, run in finished
            }
            made = contrast(scores[label], before, len(labels))
            if made is not None:
                results.gains.append(Contrast(label, UNTRAINED, metric, kind, **made))


def contrast(
    ours: Mapping[int, np.ndarray], theirs: Mapping[int, np.ndarray], count: int
) -> dict[str, Any] | None:
    """Compute the numbers of a `Contrast` from [P] values of each seed; None without a common seed. `count`: how many
    contrasts the corrected interval is to allow for."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    gaps = paired_scores(np.stack([ours[s] for s in seeds]), np.stack([theirs[s] for s in seeds]))
    difference = crossed_interval(gaps)
    corrected = crossed_interval(gaps, level=1 - 0.05 / count)
    means = gaps.mean(axis=1)
    our_runs, their_runs = ([float(np.nanmean(v)) for v in side.values()] for side in (ours, theirs))
    return {
        "seeds": seeds,
        "prompts": gaps.shape[1],
        "difference": difference,
        "corrected": corrected,
        "these_runs": mean_interval(gaps.mean(axis=0)),
        "spread": float(means.std(ddof=1)) if len(seeds) > 1 else math.nan,
        "improvement": improvement_probability(our_runs, their_runs),
        "verdict": verdict(difference),
        "holds_corrected": verdict(corrected) != "no difference shown",
    }


def _common_metrics(runs: Sequence[RunResult]) -> list[str]:
    """List the metrics that every finished run has at every evaluation."""
    if not runs:
        return []
    return [
        name
        for name in runs[0].evaluations[0].values
        if all(name in evaluated.values for run in runs for evaluated in run.evaluations)
    ]


def _gold(runs: Sequence[RunResult], metrics: Sequence[str]) -> list[str]:
    found = {
        metric
        for run in runs
        for metric in gold_metrics(run.recipe, (run.recipe.get("eval") or {}).get("suite", ""), metrics)
    }
    return [metric for metric in metrics if metric in found]


def _notes(results: Results) -> list[str]:
    """List what a reader should know before believing the table."""
    notes = []
    for label in results.plan.recipes:
        missing = [seed for seed in results.plan.seeds if seed not in results.finished(label)]
        if missing:
            notes.append(f"{label} lacks a finished run of seed {', '.join(map(str, missing))}")
    done = [run for run in results.runs if run.finished]
    if done and results.metrics:
        starts = [run.evaluations[0].values[results.metrics[0]] for run in done]
        differing = [
            r.label for r, s in zip(done, starts, strict=True) if not np.array_equal(s, starts[0], True)
        ]
        if differing:
            names = ", ".join(dict.fromkeys(differing))
            notes.append(f"the evaluation before training differs from {done[0].label}'s in: {names}")
    return notes


def _columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(key for row in rows for key in row if key not in ("index", "prompt", "sample"))
    return {
        name: np.array([math.nan if row.get(name) is None else float(row[name]) for row in rows])
        for name in names
        if all(isinstance(row.get(name), int | float | None) for row in rows)
    }


def _load(path: Path) -> dict[str, Any]:
    try:
        return read_evaluation(path)
    except ImageRLError as error:
        raise ImageRLError(f"{error}; remove its run folder and compare with --resume") from None
