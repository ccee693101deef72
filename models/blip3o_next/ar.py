"""The autoregressive half: a Qwen3 language model with image tokens in its vocabulary.

`ARPolicy` scores given tokens with gradients (what the trainer differentiates); drawing new ones is
`models.blip3o_next.ar_sampler`. Both use the same distribution: a softmax over the image columns of the vocabulary
alone, divided by the temperature. Nothing but an image token has any probability inside an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imagerl.models.common.adaptable import Adaptable
from imagerl.models.common.tokens import positions_of, score_tokens
from imagerl.rl.types import ImageRLError, Rows, SamplingParams, TokenScores

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


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

    @property
    def head(self) -> Tensor:
        """The image columns [V, D] of the language model's head."""
        return self.lm.lm_head.weight[self.vocabulary.columns]

    def hidden_states(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor) -> Tensor:
        """Return final-norm hidden states [B, T + 1, D] of `<S0>` (the prompt's last id) and of T image tokens.

        `prompt_ids`, `prompt_mask` [P, L] left-padded; `tokens` [B, T] 0-based image tokens, B = P·G in
        group-major order. With G > 1 a prompt is read once for its whole group, gradients included."""
        if len(prompt_ids) < len(tokens):
            image_ids = tokens + self.vocabulary.image_start_token_id
            return self._hidden_states_of_groups(prompt_ids, prompt_mask.bool(), image_ids)
        return self.sequence_states(prompt_ids, prompt_mask, tokens)[:, prompt_ids.shape[1] - 1 :]

    def sequence_states(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor) -> Tensor:
        """Return final-norm hidden states [B, L + T, D] of sequences: prompts [B, L], then image tokens [B, T]."""
        ids = torch.cat([prompt_ids, tokens + self.vocabulary.image_start_token_id], dim=1)
        mask = torch.cat([prompt_mask.bool(), torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        out = self.lm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
        )
        return out.last_hidden_state

    def _hidden_states_of_groups(self, prompt_ids: Tensor, prompt_mask: Tensor, image_ids: Tensor) -> Tensor:
        group, rest = divmod(len(image_ids), len(prompt_ids))
        if rest:
            raise ValueError(f"{len(image_ids)} samples are not groups of {len(prompt_ids)} prompts")
        prompt = self.lm.model(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            position_ids=positions_of(prompt_mask),
            use_cache=True,
        )
        prompt.past_key_values.batch_repeat_interleave(group)  # differentiable: gradients of a group add up
        image_mask = torch.ones_like(image_ids, dtype=torch.bool)
        mask = torch.cat([prompt_mask.repeat_interleave(group, 0), image_mask], dim=1)
        image = self.lm.model(
            input_ids=image_ids,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, prompt_ids.shape[1] :],
            past_key_values=prompt.past_key_values,
            use_cache=True,
        )
        first = prompt.last_hidden_state[:, -1:].repeat_interleave(group, 0)
        return torch.cat([first, image.last_hidden_state], dim=1)

    def forward(self, prompts: Rows, tokens: Tensor, sampling: SamplingParams) -> TokenScores:
        """Score `tokens` [B, T] after the prompt. The last token is predicted, never fed."""
        hidden = self.hidden_states(prompts["ids"], prompts["mask"], tokens[:, :-1])
        return score_tokens(hidden, self.head, tokens, sampling.temperature)
