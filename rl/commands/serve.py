"""`imagerl serve`: a model that reads pictures, for whoever asks as they ask a hosted one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.commands.options import Family, Reader
from imagerl.rl.errors import ImageRLError

WAITING = 64  # questions held at a time


def serve(
    model: Reader = "tiny_edit",
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0: every interface")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 0,
    token_env: Annotated[
        str, typer.Option(help="environment variable with the token that clients send as their key")
    ] = "IMAGERL_SERVE_TOKEN",
    name: Annotated[str | None, typer.Option(help="what clients call it; default: the folder's name")] = None,
    batch: Annotated[int, typer.Option(min=1, help="questions answered together")] = 16,
    family: Family = None,
) -> None:
    """Serve a model that answers questions about pictures behind an OpenAI-compatible endpoint."""
    from PIL import Image

    from imagerl.api.drawing import load_policy
    from imagerl.rl.commands.chat_server import chat_app
    from imagerl.rl.commands.serving import run_app, token_from
    from imagerl.rl.types import Prompt

    token = token_from(token_env)
    policy = load_policy(model, family)

    def refuse(text: str) -> None:
        policy.prompts.require([Prompt(0, text, source="the question")], questions=True)

    try:
        policy.answer([Image.new("RGB", (8, 8))], ["what is written?"], 1)
    except ImageRLError as error:
        raise ImageRLError(
            f"{model} cannot answer questions about pictures ({error}); serve a model that can, such as tiny_edit"
        ) from error
    called = name or Path(model).name
    app = chat_app(policy.answer, called, batch, refuse)
    announce = lambda address: print(f"serving {called} at {address}/v1", flush=True)  # noqa: E731
    run_app(app, host, port, token, announce, WAITING)
