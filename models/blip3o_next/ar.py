"""The autoregressive half: a Qwen3 language model with image tokens in its vocabulary.

`ARPolicy` scores given tokens with gradients (what the trainer differentiates); drawing new ones is
`models.common.token_sampler`. Both use the same distribution: a softmax over the image columns of the vocabulary
alone, divided by the temperature. Nothing but an image token has any probability inside an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imagerl.models.common.adaptable import Adaptable
from imagerl.models.common.tokens import PromptIds, image_states, score_tokens, sequence_states
from imagerl.rl.types import ImageRLError, Rows, SamplingParams, TokenScores

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


TAGS = 2  # ids between a prompt or thought and the image tokens: `<im_start>` and `<S0>`


@dataclass(frozen=True, slots=True)
class ImageVocabulary:
    """The image's place in the text vocabulary; the fields of the published config.json."""

    image_start_tag_id: int
    image_end_tag_id: int
    scale_start_token_id: int
    scale_end_token_id: int
    num_scale_tokens: int
    image_start_token_id: int
    image_end_token_id: int
    num_image_tokens: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageVocabulary:
        missing = [f.name for f in fields(cls) if f.name not in config]
        if missing:
            raise ImageRLError(
                f"config.json lacks {', '.join(missing)}: this is no BLIP3o-NEXT style model folder"
            )
        vocabulary = cls(**{f.name: int(config[f.name]) for f in fields(cls)})
        span = vocabulary.image_end_token_id - vocabulary.image_start_token_id + 1
        if span != vocabulary.num_image_tokens:
            raise ImageRLError(
                f"config.json: {span} image token ids but num_image_tokens={vocabulary.num_image_tokens}"
            )
        return vocabulary

    def to_config(self) -> dict[str, int]:
        return asdict(self)

    @property
    def columns(self) -> slice:
        return slice(self.image_start_token_id, self.image_end_token_id + 1)


class ARPolicy(Adaptable):
    """The module that reinforcement learning trains: everything that has a gradient and nothing else."""

    lm: Qwen3ForCausalLM
    not_adaptable = ("lm_head", "model.embed_tokens")

    def __init__(self, lm: Qwen3ForCausalLM, vocabulary: ImageVocabulary) -> None:
        super().__init__(lm)
        self.vocabulary = vocabulary
        self.thought_ids: Tensor | None = None  # [W] of the text that may stand before a picture

    @property
    def head(self) -> Tensor:
        """The image columns [V, D] of the language model's head."""
        return self.lm.lm_head.weight[self.vocabulary.columns]

    def embed(self, prompt_ids: Tensor, tokens: Tensor) -> Tensor:
        """Embed sequences [B, L + T, D] of prompts [B, L], then image tokens [B, T]."""
        ids = torch.cat([prompt_ids, tokens + self.vocabulary.image_start_token_id], dim=1)
        embedded: Tensor = self.lm.model.embed_tokens(ids)
        return embedded

    def hidden_states(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor) -> Tensor:
        """Return final-norm hidden states [B, T + 1, D] of `<S0>` (the prompt's last id) and of T image tokens.

        `prompt_ids`, `prompt_mask` [P, L] left-padded; `tokens` [B, T] 0-based image tokens, B = P·G in
        group-major order. With G > 1 a prompt is read once for its whole group, gradients included."""
        return image_states(self.lm.model, self.embed, PromptIds(prompt_ids, prompt_mask), tokens)

    def sequence_states(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor) -> Tensor:
        """Return final-norm hidden states [B, L + T, D] of sequences: prompts [B, L], then image tokens [B, T]."""
        return sequence_states(self.lm.model, self.embed, prompt_ids, prompt_mask, tokens)

    def forward(self, prompts: Rows, tokens: Tensor, sampling: SamplingParams) -> TokenScores:
        """Score `tokens` [B, T] after the prompt, and before them the thoughts [B, N] that stand in its rows, if any.
        The last token is predicted, never fed."""
        # Cut out once: the gradient of a part is as large as the whole head, and would be made anew by every chunk.
        head = self.head
        if "thought" not in prompts:
            hidden = self.hidden_states(prompts["ids"], prompts["mask"], tokens[:, :-1])
            return self._scored([hidden], head, tokens, sampling)
        thought, length = prompts["thought"], prompts["ids"].shape[1]
        hidden = self.sequence_states(prompts["ids"], prompts["mask"], tokens[:, :-1])
        first = (
            length - TAGS - thought.shape[1] - 1
        )  # of the prompt's last id, which predicts the thought's first
        text_head = self.lm.lm_head.weight[self.thought_ids]
        text = self._scored([hidden[:, first : first + thought.shape[1]]], text_head, thought, sampling)
        image = self._scored([hidden[:, length - 1 :]], head, tokens, sampling)
        return TokenScores(*(torch.cat(pair, dim=1) for pair in zip(text, image, strict=True)))

    def _scored(
        self, hidden: list[Tensor], head: Tensor, tokens: Tensor, sampling: SamplingParams
    ) -> TokenScores:
        return score_tokens(
            hidden, lambda states: F.linear(states, head), len(head), tokens, sampling.temperature
        )
