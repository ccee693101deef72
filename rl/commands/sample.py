"""`imagerl sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    import numpy as np

    from imagerl.api.drawing import loaded_rollout, picture_for
    from imagerl.rl.files.metrics import image_grid, save_image
    from imagerl.rl.types import Prompt

    model = model or ("tiny" if edit is None else "tiny_edit")
    rollout = loaded_rollout(model, seed, temperature, guidance, flow_steps, token_guidance, family)
    columns = {} if edit is None else {"reference": picture_for(rollout.policy, edit)}
    wanted = [Prompt(index, text, columns) for index, text in enumerate(prompts)]
    rollout.policy.prompts.require(wanted)
    captions, images = [], []
    for (group,) in rollout.generate(wanted, count, "sample", 1, 1):
        for number, image in enumerate(group.images):
            save_image(_picture(image), out / f"{group.prompt.index:03d}_{number:02d}.png")
            captions.append(group.prompt.text)
            images.append(image)
    scale = max(1, 192 // images[0].shape[1])
    grid = save_image(image_grid(np.stack(images), count, captions, scale), out / "grid.png")
    print(f"{len(images)} pictures and {grid}")


def _picture(image: Any) -> Any:
    from PIL import Image

    return Image.fromarray(image)
