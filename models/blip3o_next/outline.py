"""A BLIP3o-NEXT model by its sizes alone: for what memory training it takes, before any weights are here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from imagerl.models.base import PromptReader
from imagerl.models.blip3o_next.loading import canvas_of, load_prompts, read_config
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.published import HUB_NAMES, from_published, full_size_config, is_published
from imagerl.models.blip3o_next.weights import empty_policy
from imagerl.models.common.policy import PlainPrompts
from imagerl.models.common.shards import Shards
from imagerl.rl.types import Prompt

TEMPLATE_TOKENS, LETTERS_PER_TOKEN = 40, 3  # of prompts, where the text tokenizer is not at hand


class EstimatedPrompts(PlainPrompts):
    """The prompts of a model that is not here."""

    def longest(self, prompts: Sequence[Prompt]) -> int:
        edits = any(prompt.columns.get("reference") is not None for prompt in prompts)
        picture = self.canvas(prompts[0]).tokens + 2 if edits else 0
        return TEMPLATE_TOKENS + super().longest(prompts) // LETTERS_PER_TOKEN + picture


class SizedModel:
    """Implements `models.base.Outline`."""

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None) -> None:
        self.config = config
        self._folder = folder

    @classmethod
    def of(cls, folder: Path) -> SizedModel:
        config = read_config(folder)
        return cls(from_published(config, Shards(folder).shapes) if is_published(config) else config, folder)

    @classmethod
    def published(cls, path: str) -> SizedModel | None:
        """Return the sizes behind a name of the hub, which are known without its files."""
        name = path.partition("@")[0]
        return cls(full_size_config(edit="edit" in name)) if name in HUB_NAMES else None

    @cached_property
    def prompts(self) -> PromptReader:
        if self._folder is None:
            return EstimatedPrompts(canvas_of(self.config))
        return load_prompts(self._folder)

    def policy(self) -> ImagePolicy:
        policy = empty_policy(self.config, None)
        policy.trainable.eval()
        for part in (policy.decoder, policy.image_tokenizer):
            if part is not None:
                part.requires_grad_(False).eval()
        return policy
