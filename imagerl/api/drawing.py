"""A model loaded to draw with."""

from __future__ import annotations

import sys
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from imagerl.models.base import Policy
    from imagerl.rl.rollout.engine import RolloutEngine


def load_policy(model: str | PathLike[str], family: str | None = None) -> Policy:
    """Load a model or adapter folder, "tiny", or the result of `train`, for inference, on the GPU where there is one.

    Raises ImageRLError when it is no model."""
    import torch

    from imagerl.api.exporting import as_model
    from imagerl.api.runs import TrainingResult
    from imagerl.models import families

    if isinstance(model, TrainingResult):
        return model.policy()
    return families.load_policy(
        as_model(fspath(model)), "cuda" if torch.cuda.is_available() else "cpu", family=family
    )


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

    policy = load_policy(model, family)
    own = policy.sampling
    sampling = replace(
        own,
        temperature=own.temperature if temperature is None else temperature,
        guidance=own.guidance if guidance is None else guidance,
        flow_steps=own.flow_steps if flow_steps is None else flow_steps,
        token_guidance=own.token_guidance if token_guidance is None else token_guidance,
    )
    return RolloutEngine(policy, sampling, seed, nullcontext)


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
