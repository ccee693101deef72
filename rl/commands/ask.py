"""`imagerl ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.commands.options import Reader
from imagerl.rl.errors import one_line


def ask(
    picture: Annotated[Path, typer.Argument(help="a picture file")],
    questions: Annotated[list[str], typer.Argument(help='questions about it, such as "what is written?"')],
    model: Reader = "tiny_edit",
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 64,
) -> None:
    """Let a model that reads pictures answer questions about one, each on a line of its own."""
    import torch

    from imagerl.api.drawing import picture_for
    from imagerl.models.blip3o_next.loading import load_policy
    from imagerl.rl.types import Prompt

    policy, _ = load_policy(model, "cuda" if torch.cuda.is_available() else "cpu")
    policy.prompts.require([Prompt(number, text) for number, text in enumerate(questions)], questions=True)
    tokens = policy.picture_tokens([picture_for(policy, picture)])
    for answer in policy.answer(tokens.expand(len(questions), -1), questions, max_tokens):
        print(one_line(answer))
