"""Score and draw tokens by their logits: the arithmetic that must be the same where samples are drawn and replayed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagerl.rl.types import TokenScores

MAX_LOGITS_PER_CHUNK = 1 << 25  # float32 logits alive at once while scoring: 128 MiB, whatever the vocabulary


def positions_of(mask: Tensor) -> Tensor:
    """Return position ids [B, L] of left-padded sequences: the first real token stands at 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad to ids and mask [B, L] int64 and bool."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def score_tokens(hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float) -> TokenScores:
    """Return log-probs and entropies of `tokens` [B, T] given hidden states [B, T, D] and the head's image
    columns [V, D]. The softmax is in float32: in bfloat16 its log-probs carry errors of 1e-2. Peak memory is
    one chunk of logits, whatever B, T and V; chunks are recomputed in the backward pass."""

    def score(chunk_hidden: Tensor, chunk_tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(chunk_hidden, head).float() / temperature
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, chunk_tokens[:, None])[:, 0], entropy

    flat_hidden, flat_tokens = hidden.flatten(0, 1), tokens.flatten()
    rows = max(1, MAX_LOGITS_PER_CHUNK // head.shape[0])
    chunks = list(zip(flat_hidden.split(rows), flat_tokens.split(rows), strict=True))
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
