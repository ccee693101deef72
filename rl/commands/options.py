"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from imagerl.rl.errors import ImageRLError

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="recipe overrides, values in YAML")
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="continue the run in run.output_dir; a number after it: from that step"),
]
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


def resume_point(resume: bool, words: list[str] | None) -> tuple[bool | int, list[str]]:
    """Return whether to continue a run, or from which step, and the overrides, among which the number of `--resume 20`
    arrives. Raises ImageRLError for numbers that say no step."""
    steps = [word for word in words or [] if word.isdecimal()]
    overrides = [word for word in words or [] if word not in steps]
    if steps and (not resume or len(steps) > 1):
        raise ImageRLError(f'"{steps[-1]}" is no override; write --resume STEP with one step, or key=value')
    return (int(steps[0]) if steps else resume), overrides


def refuse_both(resume: bool | int, overwrite: bool) -> None:
    """Raise ImageRLError when a run is to be continued and deleted."""
    if resume is not False and overwrite:
        raise ImageRLError("--resume continues the run and --overwrite deletes it; give only one")
