"""A model loaded to draw with."""

from __future__ import annotations

import sys
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from imagerl.models.blip3o_next.policy import ImagePolicy
    from imagerl.rl.rollout.engine import RolloutEngine


def load_policy(model: str | PathLike[str]) -> ImagePolicy:
    """Load a model or adapter folder, "tiny", or the result of `train`, for inference, on the GPU where there is one.

    Raises ImageRLError when it is no model."""
    import torch

    from imagerl.api.runs import TrainingResult
    from imagerl.models.blip3o_next import loading

    if isinstance(model, TrainingResult):
        return model.policy()
    return loading.load_policy(fspath(model), "cuda" if torch.cuda.is_available() else "cpu")[0]


def loaded_rollout(
    model: str, seed: int, temperature: float | None, guidance: float | None, flow_steps: int | None
) -> tuple[ImagePolicy, RolloutEngine]:
    """Load a policy for inference, on the GPU where there is one; None: as the model's own settings say."""
    from contextlib import nullcontext

    import torch

    from imagerl.models.blip3o_next.loading import load_policy
    from imagerl.rl.rollout.engine import RolloutEngine
    from imagerl.rl.types import SamplingParams

    policy, config = load_policy(model, "cuda" if torch.cuda.is_available() else "cpu")
    given = {"temperature": temperature, "guidance": guidance, "flow_steps": flow_steps}
    chosen = {name: value for name, value in given.items() if value is not None}
    sampling = SamplingParams(**config["sampling"] | chosen)
    return policy, RolloutEngine(policy, sampling, seed, nullcontext)


def picture_for(policy: ImagePolicy, path: Path) -> Image.Image:
    """Read a picture file as RGB. Says on stderr when the model will not see it as it is.

    Raises ImageRLError when it cannot be read."""
    from imagerl.models.common.pictures import crop_note
    from imagerl.rl.files.reading import read_picture

    picture, (height, width) = read_picture(path), policy.decoder.picture_size
    note = crop_note(picture, (height, width))
    if note is None and picture.size != (width, height):
        note = f"the picture is {picture.width}x{picture.height} pixels; it was resized to {width}x{height}"
    if note is not None:
        print(f"{path}: {note}", file=sys.stderr)
    return picture
