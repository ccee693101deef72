"""Recipes against each other at one budget, with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from imagerl.api.cards import Plot
    from imagerl.api.recipes import Overrides
    from imagerl.rl.compare.jobs import Outcome
    from imagerl.rl.compare.plan import Plan, PlannedRun
    from imagerl.rl.compare.results import Contrast, Results


class ComparisonResult:
    """Runs of several recipes and what differs between them, read from their folder."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ImageRLError when the folder holds no comparison."""
        from imagerl.rl.compare.results import collect

        self.folder = Path(folder)
        self.results: Results = collect(self.folder)

    @property
    def report(self) -> Path:
        """The page that tells all of it."""
        return self.folder / "report.html"

    @property
    def verdicts(self) -> list[Contrast]:
        """What training did to each recipe, then each recipe against the baseline, in the headline metric."""
        headline = self.results.metrics[:1]
        every = [*self.results.gains, *self.results.contrasts]
        return [one for one in every if [one.metric] == headline and one.kind in ("final", "best")]

    def plot(self) -> Plot:
        """Draw every curve of the report."""
        from imagerl.api.cards import Plot
        from imagerl.rl.compare.page import comparison_charts

        charts = comparison_charts(self.results)
        for chart in charts:
            chart.last_step = max(step for series in chart.series for step in series.steps)
        return Plot(charts)

    def _sentences(self) -> list[str]:
        from imagerl.rl.compare.page import is_rate, sentence

        return [sentence(one, is_rate(self.results, one.metric)) for one in self.verdicts]

    def __repr__(self) -> str:
        notes = [f"note: {line}" for line in self.results.notes]
        return "\n".join([*self._sentences(), *notes, f"report: {self.report}"])

    def _repr_html_(self) -> str:
        from imagerl.api.cards import card
        from imagerl.rl.compare.page import is_rate
        from imagerl.rl.evaluation.stats import number, span
        from imagerl.rl.run.report import title

        results, metric = self.results, (self.results.metrics or [""])[0]
        rate = is_rate(results, metric or None)
        standings: dict[str, dict[str, tuple[str, str]]] = {}
        for one in results.standings:
            if one.metric == metric:
                shown = number(one.mean.mean, rate), span(one.mean, rate)
                standings.setdefault(one.label, {})[one.kind] = shown
        rows: list[list[object]] = [[label, told["final"], told["mean"]] for label, told in standings.items()]
        finished = sum(run.finished for run in results.runs)
        planned = len(results.plan.recipes) * len(results.plan.seeds)
        return card(
            title=self.folder.resolve().name,
            state=f"{results.plan.budget} each, {finished} of {planned} runs finished",
            good=finished == planned,
            head=[title(metric), "After training", "Mean over the budget"],
            rows=rows,
            charts=self.plot().charts[:2],
            notes=[*self._sentences(), *results.notes, f"The whole report: {self.report}"],
        )


def compare(
    recipes: Sequence[str | PathLike[str]],
    overrides: Overrides = (),
    /,
    *,
    budget: str,
    seeds: int = 3,
    output: str | PathLike[str] = "runs/compare",
    baseline: str | None = None,
    jobs: int = 1,
    evals: int | None = None,
    resume: bool = False,
    command: Sequence[str] | None = None,
) -> ComparisonResult:
    """Train recipes with seeds 0, 1, ... at an equal budget, "images=N" drawn or "minutes=M" of training each, and tell
    what differs.

    Recipes are files or names of those that ship: each run is a process of its own. `baseline` names the one that the
    others are held against, by default the first; `evals` is the number of held-out evaluations of a run after its
    first. With `resume` the comparison in `output` is continued, or widened by recipes and seeds.

    Raises ImageRLError for what cannot be compared, before anything runs, and at the end when runs failed."""
    from imagerl.rl.compare.plan import Plan, label_recipes, parse_budget, split_arguments

    if isinstance(recipes, str) or not all(isinstance(recipe, str | PathLike) for recipe in recipes):
        raise ImageRLError(
            "give a list of recipe files or names: runs are processes of their own, which functions of this one "
            "cannot reach; put a reward into a file and name it by import_path"
        )
    pairs = overrides.items() if isinstance(overrides, Mapping) else ()
    words = [f"{key}={json.dumps(value)}" for key, value in pairs] or list(overrides)
    paths, chosen = split_arguments([*(fspath(recipe) for recipe in recipes), *words])
    if not paths:
        raise ImageRLError("nothing to compare: name recipes, as in recipes/compare/grpo.yaml")
    labels, spend = label_recipes(paths), parse_budget(budget)
    if evals and spend.unit != "images":
        raise ImageRLError("evals needs a budget of images; with minutes set eval.every, which counts steps")
    held = None if baseline is None else Path(baseline).stem
    plan = Plan(spend, list(range(seeds)), labels, held or next(iter(labels)), chosen, evals)
    return run_comparison(plan, Path(output), jobs, resume, held is None, command)


def run_comparison(
    plan: Plan,
    folder: Path,
    jobs: int,
    resume: bool,
    keep_baseline: bool = True,
    command: Sequence[str] | None = None,
) -> ComparisonResult:
    """Run what is missing of a plan, then write page and tables of all that its folder holds.

    Raises ImageRLError like `compare`."""
    from imagerl.api.exporting import is_run
    from imagerl.api.training import read_prompts
    from imagerl.rewards.base import check_entries
    from imagerl.rl.compare import jobs as comparison_jobs
    from imagerl.rl.compare.page import write_comparison_page
    from imagerl.rl.compare.plan import plan_runs
    from imagerl.rl.compare.tables import write_tables
    from imagerl.rl.files.environment import write_environment
    from imagerl.rl.files.writing import clean_leftovers

    whole = plan.joined_to(folder, resume, keep_baseline)
    plan_runs(whole, folder)
    own = plan_runs(plan, folder)
    for run in own:
        check_entries(spec.model_dump() for spec in (*run.recipe.rewards.functions, *run.recipe.gold))
        if is_run(run.recipe.model.path):
            raise ImageRLError(
                f"{run.label}: model.path is a run, {run.recipe.model.path}, whose newest step may be another one for "
                "the next run that begins from it; give an export of it: imagerl export RUN MODEL"
            )
    environments = comparison_jobs.job_environments(jobs, own)
    for run in own:
        run.refuse_other()
    for recipe in {run.label: run.recipe for run in own}.values():  # seeds share their prompts
        read_prompts(recipe)
    whole.write(folder)
    clean_leftovers(folder)
    write_environment(folder, command or whole.command)
    outcomes = comparison_jobs.execute(own, environments)
    result = ComparisonResult(folder)
    write_tables(result.results, folder)
    write_comparison_page(result.results, folder)
    print(result)
    left = [run for run, outcome in outcomes.items() if outcome in ("stopped", "elsewhere")]
    unfinished = [run for run in left if not run.finished]  # another process may have done it since
    if unfinished:
        print(f"{len(unfinished)} runs are not finished or run elsewhere; continue with --resume")
    refuse_failures(own, outcomes)
    return result


def refuse_failures(runs: Sequence[PlannedRun], outcomes: dict[PlannedRun, Outcome]) -> None:
    """Raise ImageRLError when a run failed: not all that was asked for is done."""
    from imagerl.rl.compare.jobs import log_path

    failed = [run for run in runs if outcomes[run] == "failed"]
    if failed:
        raise ImageRLError(
            f"{len(failed)} of {len(runs)} runs failed, the first {failed[0].name} (see {log_path(failed[0])}); "
            "mend the cause and add --resume"
        )
