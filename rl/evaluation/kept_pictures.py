"""Drawn pictures for people: in a folder, each found by its prompt and sample, or on a grid with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.grids import save_image
from imagerl.rl.rollout.engine import with_pictures
from imagerl.rl.types import Prompt, RolloutGroup


def save_group(folder: Path, group: RolloutGroup) -> None:
    """Save the pictures of one prompt, named by its index and the sample: `00012_00.png`."""
    for sample, picture in enumerate(group.images):
        save_image(Image.fromarray(picture), folder / f"{group.prompt.index:05d}_{sample:02d}.png")


def refuse_filled(folder: Path) -> None:
    """Raise ImageRLError when a folder for pictures holds something already, or is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ImageRLError(f"{folder} is not empty; choose another folder for the pictures, or remove it")


def with_sources(
    images: Sequence[np.ndarray], prompts: Sequence[Prompt], thoughts: Sequence[str] = ()
) -> tuple[list[np.ndarray], list[str]]:
    """Return pictures [H, W, 3] and their captions, with the thoughts that were written before; before an edit's comes
    the picture that it starts from."""
    prompts = [with_pictures(prompt) for prompt in prompts]
    shown: list[np.ndarray] = []
    captions: list[str] = []
    for image, prompt, thought in zip(images, prompts, thoughts or [""] * len(prompts), strict=True):
        if prompt.reference is not None:
            source = prompt.reference.convert("RGB").resize((image.shape[1], image.shape[0]))
            shown.append(np.asarray(source))
            captions.append("to edit")
        shown.append(image)
        captions.append(f"{prompt.text} · {thought}" if thought else prompt.text)
    return shown, captions
