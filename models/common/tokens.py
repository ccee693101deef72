"""Read prompts, each once for all its samples, and score and draw tokens by their logits: what must be the same where
samples are drawn and where they are replayed. A model is transformers' stack of layers without a head, such as a
`LlamaModel` or `Qwen3Model`.

With guidance on the logits (arXiv 2306.17806) a token's distribution is softmax(u + guidance·(c − u)) of the logits c
after the prompt and u after the unconditional one, and the gradient flows through both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from imagerl.rl.types import TokenScores

MAX_LOGITS_PER_CHUNK = 1 << 25  # float32 logits alive at once while scoring: 128 MiB, whatever the vocabulary
Logits = Callable[[Tensor], Tensor]
"""Final-norm hidden states [..., D] -> logits [..., V] of the image tokens."""
Embed = Callable[[Tensor, Tensor], Tensor]
"""Prompt ids [B, L] and image tokens [B, T] -> their embeddings [B, L + T, D]."""


class PromptIds(NamedTuple):
    """Left-padded prompts, each of which is read once. `rows` are the P prompts among them, then the unconditional
    prompt of each; None: all R, unguided."""

    ids: Tensor  # [R, L] int64
    mask: Tensor  # [R, L] bool
    rows: Tensor | None = None  # [2·P]


def positions_of(mask: Tensor) -> Tensor:
    """Return position ids [B, L] of left-padded sequences: the first real token stands at 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad to ids and mask [B, L] int64 and bool."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def unconditional(ids: Tensor, kept: Sequence[int], pad: int) -> Tensor:
    """Return prompts [P, L] in which all ids but the `kept` ones are `pad`."""
    return torch.where(torch.isin(ids, torch.tensor(kept, device=ids.device)), ids, pad)


def with_unconditional(ids: Tensor, mask: Tensor, kept: Sequence[int], pad: int) -> PromptIds:
    """Put unconditional prompts beside prompts [P, L]. Prompts of one length share theirs, so that a set of prompts has
    few."""
    bare = unconditional(ids, kept, pad)
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


def guided_logits(logits: Logits, branches: Sequence[Tensor], guidance: float) -> Tensor:
    """Return float32 logits [..., V] of hidden states, or guided ones of two branches: conditional, unconditional."""
    conditional, *rest = (logits(hidden).float() for hidden in branches)
    if not rest:
        return conditional
    return rest[0] + guidance * (conditional - rest[0])


def score_tokens(
    branches: Sequence[Tensor],
    logits: Logits,
    codes: int,
    tokens: Tensor,
    temperature: float,
    guidance: float = 1.0,
) -> TokenScores:
    """Return log-probs and entropies of `tokens` [B, T] given the hidden states [B, T, D] of one branch, or of two, and
    `logits` of V = `codes` columns.

    The softmax is in float32: in bfloat16 its log-probs carry errors of 1e-2. Peak memory is one chunk of logits,
    whatever B, T and V; chunks are recomputed in the backward pass."""

    def score(chunk_tokens: Tensor, *hidden: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (guided_logits(logits, hidden, guidance) / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, chunk_tokens[:, None])[:, 0], entropy

    flat = [hidden.flatten(0, 1) for hidden in branches]
    rows = max(1, MAX_LOGITS_PER_CHUNK // (codes * len(flat)))
    chunks = list(zip(tokens.flatten().split(rows), *(hidden.split(rows) for hidden in flat), strict=True))
    if len(chunks) == 1:
        logprobs, entropy = score(*chunks[0])
    else:
        scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
        logprobs, entropy = (torch.cat(parts) for parts in zip(*scored, strict=True))
    return TokenScores(logprobs.view_as(tokens), entropy.view_as(tokens))


def draw_tokens(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token [B] of each row of logits [B, V] float32 by inverting its cumulative distribution at uniforms [B],
    so that a sample depends on its own numbers alone; also return their log-probs [B]."""
    logprobs = logits.log_softmax(-1)
    # float64: a running float32 sum over 65,536 columns is off by more than a rare token's probability.
    cumulative = logprobs.double().exp().cumsum(-1)
    target = uniforms.to(cumulative) * cumulative[:, -1]
    token = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]
