"""Options that several commands share, and the policy they name."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from PIL import Image

    from imagerl.models.base import Policy
    from imagerl.rl.rollout.engine import RolloutEngine

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
    """Raises ImageRLError when a run is to be continued and deleted."""
    if resume and overwrite:
        raise ImageRLError("--resume continues the run and --overwrite deletes it; give only one")


def loaded_policy(model: str, family: str | None) -> Policy:
    """Load a policy for inference, on the GPU where there is one."""
    import torch

    from imagerl.models.families import load_policy

    return load_policy(model, "cuda" if torch.cuda.is_available() else "cpu", family=family)


def loaded_rollout(
    model: str,
    seed: int,
    temperature: float | None = None,
    guidance: float | None = None,
    flow_steps: int | None = None,
    token_guidance: float | None = None,
    family: str | None = None,
) -> RolloutEngine:
    """Load a policy that is ready to draw; None: as the model's own settings say."""
    from contextlib import nullcontext

    from imagerl.rl.rollout.engine import RolloutEngine

    policy = loaded_policy(model, family)
    given = {
        "temperature": temperature,
        "guidance": guidance,
        "flow_steps": flow_steps,
        "token_guidance": token_guidance,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return RolloutEngine(policy, replace(policy.sampling, **chosen), seed, nullcontext)


def picture_for(policy: Policy, path: Path) -> Image.Image:
    """Read a picture file as RGB. Says on stderr when the model will not see it as it is.

    Raises ImageRLError when it cannot be read."""
    from imagerl.models.common.pictures import crop_note
    from imagerl.rl.files.reading import read_picture
    from imagerl.rl.types import Prompt

    picture, (height, width) = read_picture(path), policy.prompts.canvas(Prompt(0, "")).pixels
    note = crop_note(picture, (height, width))
    if note is None and picture.size != (width, height):
        note = f"the picture is {picture.width}x{picture.height} pixels; it was resized to {width}x{height}"
    if note is not None:
        print(f"{path}: {note}", file=sys.stderr)
    return picture
