"""The autoregressive half of Janus-Pro (arXiv 2501.17811): a Llama that writes image tokens by layers of their own.

Image tokens do not pass through the text vocabulary: `generation_embeddings` and `generation_aligner` embed them, and
`generation_head` scores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from imagerl.models.common.adaptable import Adaptable
from imagerl.models.common.tokens import (
    PromptIds,
    image_states,
    score_tokens,
    unconditional,
    with_unconditional,
)
from imagerl.rl.types import Rows, SamplingParams, TokenScores

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import JanusForConditionalGeneration


class Blank(NamedTuple):
    """How the unconditional prompt is made of a prompt: all of its ids but the `kept` ones become `pad`."""

    kept: tuple[int, ...]  # begin of sequence, begin of image
    pad: int


class JanusAR(Adaptable):
    """All that has gradients: the language model and the generation layers of a `JanusForConditionalGeneration`, which
    shares them. LoRA adapters are the language model's alone."""

    not_adaptable = ("embed_tokens",)

    def __init__(self, model: JanusForConditionalGeneration, blank: Blank) -> None:
        parts = model.model
        super().__init__(parts.language_model)
        # Padding is what the unconditional prompt is written in, so it has a gradient like any other id.
        self.lm.embed_tokens.padding_idx = None
        self.generation_embeddings = parts.generation_embeddings
        self.generation_aligner = parts.generation_aligner
        self.generation_head = parts.generation_head
        self.blank = blank

    @property
    def codes(self) -> int:
        """The number of image tokens, V."""
        return int(self.generation_embeddings.num_embeddings)

    def attach_adapter(self, adapter: PeftModel) -> None:
        """Freeze the generation layers too, which PEFT does not know of."""
        super().attach_adapter(adapter)
        for part in (self.generation_embeddings, self.generation_aligner, self.generation_head):
            part.requires_grad_(False)

    def merge_adapter(self) -> None:
        adapted = self.adapter is not None
        super().merge_adapter()
        if adapted:
            self.requires_grad_(True)

    def image_embedding(self) -> Tensor:
        """Return what the language model reads for each image token, [V, D]."""
        embedded: Tensor = self.generation_aligner(self.generation_embeddings.weight)
        return embedded

    def embed(self, prompt_ids: Tensor, tokens: Tensor) -> Tensor:
        """Embed sequences [B, L + T, D] of prompts [B, L], then image tokens [B, T]."""
        image = self.generation_aligner(self.generation_embeddings(tokens))
        return torch.cat([self.lm.embed_tokens(prompt_ids), image], dim=1)

    def prompt_ids(self, prompts: Rows, guidance: float) -> PromptIds:
        """Return prompts [P], each with its unconditional one where there is guidance on the logits."""
        if guidance == 1:
            return PromptIds(prompts["ids"], prompts["mask"])
        return with_unconditional(prompts["ids"], prompts["mask"], *self.blank)

    def unconditional(self, prompts: Rows) -> Rows:
        """Return the unconditional prompt of each prompt [P]."""
        return prompts | {"ids": unconditional(prompts["ids"], *self.blank)}

    def branches(self, prompts: Rows, tokens: Tensor, guidance: float) -> Sequence[Tensor]:
        """Return final-norm hidden states [B, T + 1, D] of the prompts' last ids and of tokens [B, T] after them, and
        with guidance on the logits those after the unconditional prompts. P prompts stand for B = P·G samples."""
        ids = self.prompt_ids(prompts, guidance)
        count = 1 if ids.rows is None else 2
        return image_states(self.lm, self.embed, ids, tokens.repeat(count, 1)).chunk(count)

    def forward(self, prompts: Rows, tokens: Tensor, sampling: SamplingParams) -> TokenScores:
        """Score `tokens` [B, T] after the prompts. The last token is predicted, never fed."""
        guidance = sampling.token_guidance
        branches = self.branches(prompts, tokens[:, :-1], guidance)
        return score_tokens(
            branches, self.generation_head, self.codes, tokens, sampling.temperature, guidance
        )
