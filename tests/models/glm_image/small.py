"""Small random GLM-Image pipelines in the library's own classes: the oracle that ours must repeat.

Sizes are those of a config file beside the other parity fixtures, so `IMAGERL_PARITY_DIR` can name others."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from tests.parity import FOLDER, seeded_weight
from tools.tiny.glm_image import new_pipeline

PROMPTS = (
    'a sign that says "RIVER" in red',
    "two cats",
    "a cup with 'TEA' and “milk” beside \"ICE\"",
)


def sizes() -> dict[str, Any]:
    return json.loads((FOLDER / "glm_image.json").read_text(encoding="utf-8"))


@cache
def pipeline() -> Any:
    """The library's pipeline on seeded weights. Shared between tests: do not change it."""
    return build_pipeline()


def build_pipeline(layers: int | None = None) -> Any:
    """The same anew, or with another number of layers in both halves."""
    given = sizes()
    if layers is not None:
        given["vision_language_encoder"]["text_config"]["num_hidden_layers"] = layers
        given["transformer"]["num_layers"] = layers
    pipe = new_pipeline(given)
    for part in (pipe.text_encoder, pipe.vision_language_encoder, pipe.vae, pipe.transformer):
        seed_weights(part, given["seed"])
    return pipe


def seed_weights(module: nn.Module, seed: int) -> None:
    """Fill a module with random weights that are large enough for every part to matter."""
    for name, weight in module.named_parameters():
        weight.data = seeded_weight(name, tuple(weight.shape), seed)
    module.requires_grad_(False).eval()


def saved(folder: Path) -> Path:
    """Write the pipeline as the library does: the layout of the hub."""
    pipeline().save_pretrained(folder)
    return folder


def small_folder(folder: Path) -> Path:
    """Write a pipeline of one layer that draws 64x32 pixels, not 1024x1024, where a prompt names no size."""
    build_pipeline(layers=1).save_pretrained(folder)
    (folder / "sampling.json").write_text('{"height": 64, "width": 32}')
    return folder
