"""`imagerl compare`: recipes against each other at one budget, with intervals."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


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
    from imagerl.api import comparing
    from imagerl.rl.compare.plan import split_arguments

    recipes, overrides = split_arguments(arguments)
    comparing.compare(
        recipes,
        overrides,
        budget=budget,
        seeds=seeds,
        output=output,
        baseline=baseline,
        jobs=jobs,
        evals=evals,
        resume=resume,
        command=sys.argv,
    )
