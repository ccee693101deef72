"""The language model as a reader of pictures: greedy text decoding with the same weights that write image tokens."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from imagerl.models.blip3o_next.ar import ARPolicy, ImageVocabulary
from imagerl.models.common.tokens import positions_of


def text_columns(vocabulary: ImageVocabulary, size: int) -> Tensor:
    """Mark, as [size] bool, the columns of the head that are text, neither image nor scale tokens nor image tags."""
    allowed = torch.ones(size, dtype=torch.bool)
    allowed[vocabulary.columns] = False
    allowed[vocabulary.scale_start_token_id : vocabulary.scale_end_token_id + 1] = False
    allowed[[vocabulary.image_start_tag_id, vocabulary.image_end_tag_id]] = False
    return allowed


@torch.no_grad()
def greedy_text(
    ar: ARPolicy, prompt_ids: Tensor, prompt_mask: Tensor, stop: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """Return the most likely text after each of left-padded prompts [P, L], token by token, without its stop token.

    At most `max_new_tokens` tokens each, and no more than the model has positions for; a row that has stopped no longer
    changes."""
    lm, mask = ar.lm, prompt_mask.bool()
    forbidden = ~text_columns(ar.vocabulary, lm.lm_head.weight.shape[0]).to(prompt_ids.device)
    answers: list[list[int]] = [[] for _ in prompt_ids]
    running = set(range(len(prompt_ids)))
    room = (lm.config.max_position_embeddings - mask.sum(1)).tolist()
    ids, positions, cache = prompt_ids, positions_of(mask), None
    for _ in range(max_new_tokens):
        out = lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits = lm.lm_head(out.last_hidden_state[:, -1]).float()
        chosen = logits.masked_fill(forbidden, float("-inf")).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if row in running and token in stop:
                running.discard(row)
            elif row in running:
                answers[row].append(token)
                if len(answers[row]) > room[row]:
                    running.discard(row)
        if not running:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return answers
