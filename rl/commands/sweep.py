"""`imagerl sweep`: one recipe with several settings, held against each other as recipes are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.errors import ImageRLError


def sweep(
    base: Annotated[str, typer.Argument(metavar="RECIPE", help="recipe YAML, or the name of a shipped one")],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="key=[a, b]... [key=value]...", help="values to try, and overrides of all runs"
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="runs of each setting, with seeds 0, 1, ...")],
    budget: Annotated[str, typer.Option(help="of each run: images=N drawn, or minutes=M of training")],
    output: Annotated[str, typer.Option(help="folder of the sweep")] = "runs/sweep",
    jobs: Annotated[int, typer.Option(min=1, max=1024, help="runs at a time; each on a GPU of its own")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="continue or widen the one in --output")] = False,
) -> None:
    """Train a recipe with every combination of settings at an equal budget, and tell what differs."""
    from imagerl.api.comparing import run_comparison
    from imagerl.rl.compare.plan import Plan, label_recipes, parse_budget, split_arguments
    from imagerl.rl.compare.sweep import split_axes, write_grid

    axes, others = split_axes(settings)
    odd, overrides = split_arguments(
        [*(f"{key}=" for key in axes), *others]
    )  # axes too, for what is refused there
    if odd:
        raise ImageRLError(f'"{odd[0]}" is no setting; write key=[a, b] or key=value, after one recipe')
    spend = parse_budget(budget)
    overrides = overrides[len(axes) :]
    recipes = label_recipes(write_grid(base, axes, Path(output) / "recipes", overrides))
    plan = Plan(spend, list(range(seeds)), recipes, next(iter(recipes)), overrides)
    run_comparison(plan, Path(output), jobs, resume, command=sys.argv)
