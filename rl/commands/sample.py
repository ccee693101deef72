"""`imagerl sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imagerl.rl.commands.options import Family, FlowSteps, Guidance, Seed, Temperature, TokenGuidance


def sample(
    prompts: Annotated[list[str], typer.Argument(help="captions to draw")],
    model: Annotated[
        str | None, typer.Option(help='model or adapter folder; default: "tiny", with --edit "tiny_edit"')
    ] = None,
    edit: Annotated[
        Path | None, typer.Option(help="a picture; the captions are then instructions that change it")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("samples"),
    count: Annotated[
        int, typer.Option("-n", "--count", min=1, max=2**16, help="pictures of each prompt")
    ] = 4,
    seed: Seed = 0,
    temperature: Temperature = None,
    guidance: Guidance = None,
    flow_steps: FlowSteps = None,
    token_guidance: TokenGuidance = None,
    family: Family = None,
) -> None:
    """Draw pictures, or edit one, and a grid of them."""
    from imagerl.api import sampling

    drawn = sampling.sample(
        prompts,
        model,
        n=count,
        edit=edit,
        out=out,
        seed=seed,
        temperature=temperature,
        guidance=guidance,
        flow_steps=flow_steps,
        token_guidance=token_guidance,
        family=family,
    )
    print(f"{len(drawn)} pictures and {out / 'grid.png'}")
