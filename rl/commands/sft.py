"""`imagerl sft`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from imagerl.rl.commands.options import Overrides, Overwrite, Resume, refuse_both, resume_point


def sft(
    recipe: Annotated[str, typer.Argument(help="fine-tuning recipe YAML")],
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a model on pictures with captions."""
    from imagerl.api import training
    from imagerl.rl.config.sft import load_sft_recipe

    point, words = resume_point(resume, overrides)
    settings = load_sft_recipe(recipe, words)
    refuse_both(point, overwrite)
    training.train(settings, resume=point, overwrite=overwrite, command=sys.argv)
