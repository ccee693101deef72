"""`imagerl compare`: recipes against each other at one budget, with intervals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from imagerl.rl.compare.jobs import Outcome
    from imagerl.rl.compare.plan import Plan, PlannedRun


def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE... [key=value]...", help="recipes, and overrides of all of them"),
    ],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="runs of each recipe, with seeds 0, 1, ...")],
    budget: Annotated[str, typer.Option(help="of each run: images=N drawn, or minutes=M of training")],
    output: Annotated[str, typer.Option(help="folder of the comparison")] = "runs/compare",
    baseline: Annotated[
        str | None, typer.Option(help="what the others are held against; default: the first")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="runs at a time; each on a GPU of its own")] = 1,
    evals: Annotated[
        int | None,
        typer.Option(min=1, help="held-out evaluations of a run after its first; default: recipe's"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue, widen or share in the one in --output")
    ] = False,
) -> None:
    """Train recipes with several seeds at an equal budget, and tell what differs."""
    from imagerl.rl.compare.plan import Plan, label_recipes, parse_budget, split_arguments

    paths, overrides = split_arguments(arguments)
    if not paths:
        raise ImageRLError("nothing to compare: name recipes, as in recipes/compare/grpo.yaml")
    recipes = label_recipes(paths)
    spend = parse_budget(budget)
    if evals and spend.unit != "images":
        raise ImageRLError(
            "--evals needs a budget of images; with minutes set eval.every, which counts steps"
        )
    chosen = None if baseline is None else Path(baseline).stem
    plan = Plan(spend, list(range(seeds)), recipes, chosen or next(iter(recipes)), overrides, evals)
    run_comparison(plan, Path(output), jobs, resume, keep_baseline=chosen is None)


def run_comparison(plan: Plan, folder: Path, jobs: int, resume: bool, keep_baseline: bool = True) -> None:
    """Run what is missing of a plan, then write page and tables of all that its folder holds.

    Raises ImageRLError for what cannot be compared, before anything runs, and at the end when runs failed."""
    from imagerl.api.training import read_prompts
    from imagerl.rewards.base import check_entries
    from imagerl.rl.compare import jobs as comparison_jobs
    from imagerl.rl.compare.plan import plan_runs
    from imagerl.rl.files.environment import write_environment
    from imagerl.rl.files.writing import clean_leftovers

    whole = plan.joined_to(folder, resume, keep_baseline)
    plan_runs(whole, folder)
    own = plan_runs(plan, folder)
    for run in own:
        check_entries(spec.model_dump() for spec in (*run.recipe.rewards.functions, *run.recipe.gold))
    environments = comparison_jobs.job_environments(jobs, own)
    for run in own:
        run.refuse_other()
    for recipe in {run.label: run.recipe for run in own}.values():  # seeds share their prompts
        read_prompts(recipe)
    whole.write(folder)
    clean_leftovers(folder)
    write_environment(folder, sys.argv)
    outcomes = comparison_jobs.execute(own, environments)
    tell(folder, outcomes)
    refuse_failures(own, outcomes)


def tell(folder: Path, outcomes: dict[PlannedRun, Outcome]) -> None:
    """Write page and tables, and print the verdicts."""
    from imagerl.rl.compare.page import is_rate, sentence, write_comparison_page
    from imagerl.rl.compare.results import collect
    from imagerl.rl.compare.tables import write_tables

    results = collect(folder)
    write_tables(results, folder)
    page = write_comparison_page(results, folder)
    for one in [*results.gains, *results.contrasts]:
        if one.metric == results.metrics[0] and one.kind == "final":
            print(sentence(one, is_rate(results, one.metric)))
    for line in results.notes:
        print(f"note: {line}")
    print(f"report: {page}")
    left = [run for run, outcome in outcomes.items() if outcome in ("stopped", "elsewhere")]
    unfinished = [run for run in left if not run.finished]  # another process may have done it since
    if unfinished:
        print(f"{len(unfinished)} runs are not finished or run elsewhere; continue with --resume")


def refuse_failures(runs: Sequence[PlannedRun], outcomes: dict[PlannedRun, Outcome]) -> None:
    """Raise ImageRLError when a run failed: the command did not do all it was asked to."""
    from imagerl.rl.compare.jobs import log_path

    failed = [run for run in runs if outcomes[run] == "failed"]
    if failed:
        raise ImageRLError(
            f"{len(failed)} of {len(runs)} runs failed, the first {failed[0].name} (see {log_path(failed[0])}); "
            "mend the cause and add --resume"
        )
