"""Janus-Pro as a family: a Llama writes image tokens, guided on their logits, and a VQ decoder draws them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from imagerl.models.janus_pro.loading import (
    MODEL_TYPE,
    OLD_MODEL_TYPE,
    load_policy,
    load_prompts,
    read_config,
)
from imagerl.models.janus_pro.outline import JanusOutline, published_outline
from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.models.janus_pro.prompts import JanusPrompts

LAYOUTS = {"janus": "the hub's layout, for transformers' JanusForConditionalGeneration and for imagerl"}


class JanusPro:
    """Implements `models.base.Family`."""

    layouts: Mapping[str, str] = LAYOUTS

    def recognises(self, settings: Mapping[str, object]) -> bool:
        return settings.get("model_type") in (MODEL_TYPE, OLD_MODEL_TYPE)

    def load(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> JanusPolicy:
        return load_policy(folder, device, dtype)

    def outline(self, folder: Path) -> JanusOutline:
        return JanusOutline(read_config(folder), load_prompts(folder))

    def published(self, name: str) -> JanusOutline | None:
        return published_outline(name)

    def prompts(self, folder: Path) -> JanusPrompts:
        return load_prompts(folder)
