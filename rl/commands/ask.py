"""`imagerl ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.commands.options import Family, Reader
from imagerl.rl.errors import one_line


def ask(
    picture: Annotated[Path, typer.Argument(help="a picture file")],
    questions: Annotated[list[str], typer.Argument(help='questions about it, such as "what is written?"')],
    model: Reader = "tiny_edit",
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 64,
    family: Family = None,
) -> None:
    """Let a model that reads pictures answer questions about one, each on a line of its own."""
    from imagerl.api.drawing import load_policy, picture_for
    from imagerl.rl.types import Prompt

    policy = load_policy(model, family)
    policy.prompts.require([Prompt(number, text) for number, text in enumerate(questions)], questions=True)
    shown = picture_for(policy, picture)
    for answer in policy.answer([shown] * len(questions), questions, max_tokens):
        print(one_line(answer))
