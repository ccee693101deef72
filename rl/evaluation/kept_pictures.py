"""A folder of drawn pictures, each found by its prompt and sample."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.grids import save_image
from imagerl.rl.types import RolloutGroup


def save_group(folder: Path, group: RolloutGroup) -> None:
    """Save the pictures of one prompt, named by its index and the sample: `00012_00.png`."""
    for sample, picture in enumerate(group.images):
        save_image(Image.fromarray(picture), folder / f"{group.prompt.index:05d}_{sample:02d}.png")


def refuse_filled(folder: Path) -> None:
    """Raise ImageRLError when a folder for pictures holds something already, or is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ImageRLError(f"{folder} is not empty; choose another folder for the pictures, or remove it")
