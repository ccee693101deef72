"""BLIP3o-NEXT as a family: Qwen3 writes image tokens, its hidden states condition a Sana flow decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from imagerl.models.blip3o_next.loading import REQUIRED, load_policy, load_prompts
from imagerl.models.blip3o_next.outline import SizedModel
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.prompts import PromptEncoder
from imagerl.models.blip3o_next.published import is_published

LAYOUTS = {
    "imagerl": "a model folder for imagerl",
    "blip3o": "the layout of the published BLIP3o-NEXT checkpoints, for its own code and for imagerl",
    "qwen3": "the language model alone, for transformers, vLLM and SGLang",
    "diffusers": "the decoder alone, as a diffusers pipeline",
}


class Blip3oNext:
    """Implements `models.base.Family`."""

    layouts: Mapping[str, str] = LAYOUTS

    def recognises(self, settings: Mapping[str, object]) -> bool:
        own = "_class_name" not in settings and any(key in settings for key in REQUIRED)
        return own or is_published(settings)

    def load(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> ImagePolicy:
        return load_policy(folder, device, dtype)[0]

    def prompts(self, folder: Path) -> PromptEncoder:
        return load_prompts(folder)

    def outline(self, folder: Path) -> SizedModel:
        return SizedModel.of(folder)

    def published(self, name: str) -> SizedModel | None:
        return SizedModel.published(name)
