"""`imagerl sft`."""

from __future__ import annotations

from typing import Annotated

import typer

from imagerl.rl.commands.options import Overrides, Overwrite, Resume, refuse_both


def sft(
    recipe: Annotated[str, typer.Argument(help="fine-tuning recipe YAML")],
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a model on pictures with captions."""
    from imagerl.api.fine_tuning import closing_line, run_sft
    from imagerl.rl.config.sft import load_sft_recipe

    settings = load_sft_recipe(recipe, overrides or [])
    refuse_both(resume, overwrite)
    comparison = run_sft(settings, resume, overwrite)
    if comparison:
        print(closing_line(comparison))
