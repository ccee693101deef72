"""Run sequences of a prompt and image tokens through a language model, each prompt once for all its samples.

The model is transformers' stack of layers without a head, such as a `LlamaModel` or `Qwen3Model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from imagerl.models.common.tokens import positions_of

Embed = Callable[
    [Tensor, Tensor], Tensor
]  # prompt ids [B, L], image tokens [B, T] -> their embeddings [B, L + T, D]


class PromptIds(NamedTuple):
    """Left-padded prompts, each of which is read once."""

    ids: Tensor  # [R, L] int64
    mask: Tensor  # [R, L] bool
    rows: Tensor | None = (
        None  # [2·P]: the P prompts, then the unconditional prompt of each; None: all R, unguided
    )


def with_unconditional(ids: Tensor, mask: Tensor, kept: Sequence[int], pad: int) -> PromptIds:
    """Put unconditional prompts beside prompts [P, L]: all ids but the `kept` ones are `pad`. Prompts of one length
    share theirs, so that a set of prompts has few."""
    bare = torch.where(torch.isin(ids, torch.tensor(kept, device=ids.device)), ids, pad)
    both = torch.cat([bare, mask.long()], dim=1)
    if isinstance(ids, FakeTensor):  # without content nothing is known to be equal
        bare, which = both, torch.arange(len(ids))
    else:
        bare, which = both.unique(dim=0, return_inverse=True)
    bare_ids, bare_mask = bare.chunk(2, dim=1)
    rows = torch.cat([torch.arange(len(ids), device=ids.device), len(ids) + which])
    return PromptIds(torch.cat([ids, bare_ids]), torch.cat([mask.bool(), bare_mask.bool()]), rows)


def image_states(model: Any, embed: Embed, prompts: PromptIds, tokens: Tensor) -> Tensor:
    """Return final-norm hidden states [B, T + 1, D] of the prompts' last ids and of image tokens [B, T] after them.

    A prompt that stands before several samples, B = G·P in group-major order, is read once for all of them, gradients
    included. Where prompts have `rows`, B counts both branches, the unconditional one second."""
    ids, mask, rows = prompts.ids, prompts.mask.bool(), prompts.rows
    count = len(ids) if rows is None else len(rows)
    group, rest = divmod(len(tokens), count)
    if rest:
        raise ValueError(f"{len(tokens)} samples are not groups of {count} prompts")
    if group == 1:
        if rows is not None:
            ids, mask = ids[rows], mask[rows]
        return sequence_states(model, embed, ids, mask, tokens)[:, ids.shape[1] - 1 :]
    prompt = model(
        inputs_embeds=embed(ids, tokens.new_empty(len(ids), 0)),
        attention_mask=mask,
        position_ids=positions_of(mask),
        use_cache=True,
    )
    cache, first = prompt.past_key_values, prompt.last_hidden_state[:, -1:]
    if rows is None:
        cache.batch_repeat_interleave(group)  # differentiable: gradients of a group add up
        mask, first = (t.repeat_interleave(group, 0) for t in (mask, first))
    else:
        rows = rows.repeat_interleave(group)
        cache.batch_select_indices(rows)
        mask, first = mask[rows], first[rows]
    mask = torch.cat([mask, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
    image = model(
        inputs_embeds=embed(ids.new_empty(len(tokens), 0), tokens),
        attention_mask=mask,
        position_ids=positions_of(mask)[:, ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first, image.last_hidden_state], dim=1)


def sequence_states(model: Any, embed: Embed, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Return final-norm hidden states [B, L + T, D] of sequences: prompts [B, L], then image tokens [B, T]."""
    mask = torch.cat([mask.bool(), torch.ones_like(tokens, dtype=torch.bool)], dim=1)
    out = model(
        inputs_embeds=embed(ids, tokens),
        attention_mask=mask,
        position_ids=positions_of(mask),
        use_cache=False,
    )
    states: Tensor = out.last_hidden_state
    return states
