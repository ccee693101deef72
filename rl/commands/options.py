"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from imagerl.rl.errors import ImageRLError

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="recipe overrides, values in YAML")
]
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in run.output_dir")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the run in run.output_dir")]
Model = Annotated[str, typer.Option(help='model folder, LoRA adapter folder, or "tiny"')]
Reader = Annotated[str, typer.Option("--model", help='model folder, or "tiny_edit"')]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of tokens and noise")]
Temperature = Annotated[
    float | None,
    typer.Option(min=1e-3, max=100, help="sampling temperature; default: the model's own"),
]
Guidance = Annotated[
    float | None, typer.Option(min=0, max=100, help="classifier-free guidance; default: the model's own")
]
FlowSteps = Annotated[
    int | None, typer.Option(min=1, max=1000, help="denoising steps; default: the model's own")
]
TokenGuidance = Annotated[
    float | None,
    typer.Option(min=0, max=100, help="guidance on the logits of tokens; default: the model's own"),
]
Family = Annotated[
    str | None, typer.Option(help="the model's family; default: as its folder says; your own: file.py:Class")
]


def refuse_both(resume: bool, overwrite: bool) -> None:
    """Raise ImageRLError when a run is to be continued and deleted."""
    if resume and overwrite:
        raise ImageRLError("--resume continues the run and --overwrite deletes it; give only one")
