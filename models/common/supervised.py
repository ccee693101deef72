"""Supervised training, what families share: predict the tokens of given pictures after their captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagerl.models.base import SupervisedScores
from imagerl.rl.types import Prompt, Rows, SamplingParams

if TYPE_CHECKING:
    from imagerl.models.common.policy import BasePolicy

MAX_LOGITS_PER_CHUNK = 1 << 25  # float32 logits alive at once: 128 MiB, whatever the vocabulary
AS_IT_IS = SamplingParams(temperature=1.0, token_guidance=1.0)


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return −log p of ids `targets` [N] after hidden states [N, D] under the whole vocabulary of `head` [V, D], in
    float32. Memory is one chunk of logits; chunks are recomputed in the backward pass."""

    def chunk(rows: Tensor, ids: Tensor) -> Tensor:
        # float32: a log-softmax over some 200,000 columns loses small differences in bfloat16.
        return F.cross_entropy(F.linear(rows, head).float(), ids, reduction="none")

    size = max(1, MAX_LOGITS_PER_CHUNK // head.shape[0])
    parts = list(zip(hidden.split(size), targets.split(size), strict=True))
    if len(parts) == 1:
        return chunk(*parts[0])
    return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])


def noise_levels(uniform: Tensor, shift: float) -> Tensor:
    """Turn uniform numbers in [0, 1) into σ, shifted as the scheduler's own schedule is (arXiv 2403.03206, eq. 23)."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def either(drop: Tensor, dropped: Rows, given: Rows) -> Rows:
    """Return rows [B, ...]: those of `dropped` where `drop` [B] bool is set, the `given` ones elsewhere."""
    return {
        name: torch.where(drop.view(-1, *[1] * (rows.ndim - 1)), dropped[name], rows)
        for name, rows in given.items()
    }


class TokenModule(nn.Module):
    """The half that writes tokens, which learns the distribution that it draws from at temperature 1, unguided."""

    def __init__(self, ar: nn.Module, unconditional: Callable[[Rows], Rows] | None = None) -> None:
        """`unconditional` makes of prompts those that guidance on the logits asks for beside them: a share of samples
        is learnt after these."""
        super().__init__()
        self.ar = ar
        self._unconditional = unconditional

    def forward(self, prompts: Rows, targets: Rows, draws: Rows) -> SupervisedScores:
        if self._unconditional is not None:
            prompts = either(draws["drop"], self._unconditional(prompts), prompts)
        nll = -self.ar(prompts, targets["tokens"], AS_IT_IS).logprobs.sum(1)
        return SupervisedScores(nll, torch.zeros_like(nll), torch.zeros_like(nll))


class TokenLessons:
    """Implements `models.base.Lessons` for a policy whose decoder does not learn."""

    parts: Mapping[str, Sequence[str]] = {"ar": ("full", "lora")}
    predicts_prompts = False

    def __init__(self, policy: BasePolicy, module: nn.Module) -> None:
        self.policy = policy
        self.trainable = module

    @staticmethod
    def part_of(name: str) -> str:
        return "ar"

    def targets(self, prompts: Sequence[Prompt], pictures: Tensor) -> Rows:
        with torch.autocast(pictures.device.type, enabled=False):  # which would blur neighbouring codes
            return {"tokens": self.policy.tokens_of(pictures)}

    def counted(self, prompts: Rows, tokens: Tensor) -> Tensor:
        images = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        return torch.stack([images, torch.zeros_like(images)], 1)
