"""Pictures drawn of captions, or a picture changed by instructions."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from PIL import Image

READABLE = 192  # pixels of width: smaller pictures are enlarged on a grid


class Samples:
    """Pictures [N, H, W, 3] with the caption of each, in rows of `columns`: a notebook shows them as a grid."""

    def __init__(self, captions: Sequence[str], pictures: np.ndarray, columns: int) -> None:
        self.captions = list(captions)
        self.pictures = pictures
        self.columns = columns

    @property
    def images(self) -> list[Image.Image]:
        from PIL import Image

        return [Image.fromarray(picture) for picture in self.pictures]

    @property
    def grid(self) -> Image.Image:
        from imagerl.rl.files.grids import image_grid

        scale = max(1, READABLE // self.pictures.shape[2])
        return image_grid(self.pictures, self.columns, self.captions, scale)

    def __len__(self) -> int:
        return len(self.captions)

    def __repr__(self) -> str:
        height, width = self.pictures.shape[1:3]
        return f"{len(self)} pictures of {width}x{height} pixels, of {len(set(self.captions))} prompts"

    def _repr_png_(self) -> bytes:
        import io

        buffer = io.BytesIO()
        self.grid.save(buffer, "PNG")
        return buffer.getvalue()


def sample(
    prompts: str | Sequence[str],
    model: str | PathLike[str] | None = None,
    *,
    n: int = 4,
    edit: str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    seed: int = 0,
    temperature: float | None = None,
    guidance: float | None = None,
    flow_steps: int | None = None,
    token_guidance: float | None = None,
    family: str | None = None,
) -> Samples:
    """Draw `n` pictures of each caption, or change a picture file, `edit`, as each instruction says.

    `model` is a folder, "tiny", or the result of `train`; None: "tiny", for an edit "tiny_edit". Pictures are written
    into the folder `out`, where one is given, as they are drawn. None elsewhere: as the model's own settings say.

    Raises ImageRLError for a prompt that the model cannot draw, and for what it cannot read or write."""
    from PIL import Image

    from imagerl.api.drawing import loaded_rollout, picture_for
    from imagerl.api.evaluating import as_model
    from imagerl.rl.files.grids import save_image
    from imagerl.rl.types import Prompt

    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or n < 1:
        raise ImageRLError("there is nothing to draw: give prompts, and n of 1 or more")
    with as_model(model or ("tiny" if edit is None else "tiny_edit")) as (_, folder):
        rollout = loaded_rollout(folder, seed, temperature, guidance, flow_steps, token_guidance, family)
    policy = rollout.policy
    columns = {} if edit is None else {"reference": picture_for(policy, Path(edit))}
    wanted = [Prompt(index, text, columns) for index, text in enumerate(texts)]
    policy.prompts.require(wanted)
    captions, pictures = [], []
    for (group,) in rollout.generate(wanted, n, "sample", 1, 1):
        for number, picture in enumerate(group.images):
            captions.append(group.prompt.text)
            pictures.append(picture)
            if out is not None:
                name = f"{group.prompt.index:03d}_{number:02d}.png"
                save_image(Image.fromarray(picture), Path(fspath(out)) / name)
    drawn = Samples(captions, np.stack(pictures), n)
    if out is not None:
        save_image(drawn.grid, Path(fspath(out)) / "grid.png")
    return drawn
