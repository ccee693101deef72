"""GLM-Image as a family: a GLM language model writes a preview and the picture's tokens, which a diffusion transformer
draws by, with glyphs of the quoted texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from imagerl.models.common.policy import BaseFamily
from imagerl.models.glm_image.loading import PIPELINE, load_policy, load_prompts
from imagerl.models.glm_image.outline import GlmOutline
from imagerl.models.glm_image.policy import GlmImagePolicy
from imagerl.models.glm_image.prompts import PromptEncoder


class GlmImage(BaseFamily):
    """Implements `models.base.Family`."""

    layouts: Mapping[str, str] = {
        "glm_image": "the layout of the published GLM-Image, for diffusers' GlmImagePipeline and for imagerl",
    }

    def recognises(self, settings: Mapping[str, object]) -> bool:
        return settings.get("_class_name") == PIPELINE

    def load(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> GlmImagePolicy:
        return load_policy(folder, device, dtype)

    def prompts(self, folder: Path) -> PromptEncoder:
        return load_prompts(folder)

    def outline(self, folder: Path) -> GlmOutline:
        return GlmOutline(folder)
