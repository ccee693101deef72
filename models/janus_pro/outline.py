"""A Janus-Pro model by its sizes alone: for what memory training it takes, before any weights are here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from imagerl.models.common.policy import PlainPrompts
from imagerl.models.janus_pro.ar import Blank
from imagerl.models.janus_pro.loading import sampling_of
from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.models.janus_pro.prompts import JanusPrompts, canvas_of
from imagerl.rl.types import Prompt

if TYPE_CHECKING:
    from transformers import JanusConfig

    from imagerl.models.base import PromptReader

TEMPLATE_TOKENS, LETTERS_PER_TOKEN = 12, 3  # of prompts, where the text tokenizer is not at hand
# name on the hub -> hidden size, layers, heads, intermediate size of the language model
PUBLISHED = {
    "deepseek-community/Janus-Pro-1B": (2048, 24, 16, 5632),
    "deepseek-community/Janus-Pro-7B": (4096, 30, 32, 11008),
}


def full_size_config(name: str) -> JanusConfig:
    """Return the sizes of a published model; what is not given are transformers' defaults, which are the published."""
    from transformers import JanusConfig

    width, layers, heads, intermediate = PUBLISHED[name]
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 102400,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 16384,
    }
    vq = {"projection_dim": width, "image_token_embed_dim": width}
    return JanusConfig(text_config=text, vision_config={"projection_dim": width}, vq_config=vq)


class EstimatedPrompts(PlainPrompts):
    """The prompts of a model that is not here."""

    def longest(self, prompts: Sequence[Prompt]) -> int:
        return TEMPLATE_TOKENS + super().longest(prompts) // LETTERS_PER_TOKEN


def published_outline(path: str) -> JanusOutline | None:
    """Return the sizes behind a name of the hub, which are known without its files."""
    name = path.partition("@")[0]
    if name not in PUBLISHED:
        return None
    config = full_size_config(name)
    return JanusOutline(config, EstimatedPrompts(canvas_of(config), token_guided=True))


class JanusOutline:
    """Implements `models.base.Outline`."""

    def __init__(self, config: JanusConfig, prompts: PromptReader) -> None:
        self.config = config
        self.prompts = prompts

    def policy(self) -> JanusPolicy:
        from accelerate import init_empty_weights
        from transformers import JanusForConditionalGeneration

        with init_empty_weights(include_buffers=False):
            model = JanusForConditionalGeneration(copy.deepcopy(self.config))  # which it changes
        model.requires_grad_(False).eval()
        prompts = cast(JanusPrompts, self.prompts)  # its sizes count: nothing is encoded here
        policy = JanusPolicy(model, prompts, Blank((0, 1), 2), sampling_of({}, "the published settings"))
        policy.trainable.requires_grad_(True)
        return policy
