"""The schema of a recipe that trains a small CLIP on the tiny world."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.sft.pretraining.config import PretrainRun, StageConfig


class ClipStage(StageConfig):
    """Contrastive training: of all captions of a batch, which one does a picture show, and the reverse."""

    wrong_captions: int = Field(
        3,
        ge=0,
        le=1024,
        description="captions a picture with one thing wrong in each, beside those of other pictures",
    )
    poor_pictures: int = Field(
        0,
        ge=0,
        le=2**16,
        description="pictures a batch that answer no caption: blank, noise, text over everything",
    )


class ClipRecipe(RecipeModel):
    """A whole run: what to build, how long to train it, and how it is measured."""

    kind: Literal["clip"] = Field(description="marks the schema")
    run: PretrainRun = Field(description="seed, place and hardware of the run")
    vocabulary: int = Field(
        320, gt=256, le=10**6, description="size of the text tokenizer, trained on captions"
    )
    model: dict[str, Any] = Field(description="open_clip's model_cfg: embed_dim, vision_cfg, text_cfg")
    preprocess: dict[str, Any] = Field(description="open_clip's preprocess_cfg")
    training: ClipStage = Field(description="how long it is trained, on what")
    measured: int = Field(512, ge=64, le=10**6, description="held-out pictures that retrieval is measured on")
