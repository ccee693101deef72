"""`imagerl train`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from imagerl.rl.commands.options import Overrides, Overwrite, Resume, refuse_both, resume_point


def train(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")],
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a policy as a recipe says."""
    from imagerl.api import training
    from imagerl.rl.config.train import load_recipe

    point, words = resume_point(resume, overrides)
    settings = load_recipe(recipe, words)
    refuse_both(point, overwrite)
    training.train(settings, resume=point, overwrite=overwrite, command=sys.argv)
