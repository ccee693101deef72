"""The autoregressive half: a GLM language model that writes a small preview of the picture, then the picture.

`TokenWriter` scores given tokens with gradients and draws new ones, by the same distribution: a softmax over the image
codes alone, divided by the temperature. The library also lets an image end at any token, and cuts the tail of the
distribution off; neither has log-probs that training could use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagerl.models.common.adaptable import Adaptable
from imagerl.models.common.tokens import draw_tokens, score_tokens
from imagerl.rl.types import Rows, SamplingParams, TokenScores, TokenTrajectory


class TokenWriter(Adaptable):
    """The module that reinforcement learning trains: language model and head, without the vision tower.

    Prompts are rows of `ids`, `mask` [P, L], left-padded, and of positions on the three axes of the rotary embedding:
    `places` [P, 3, L] of the ids, `grid` [P, 3, T + 1] of the image tokens that follow."""

    def __init__(self, lm: nn.Module, lm_head: nn.Linear, codes: int) -> None:
        super().__init__(lm)
        self.lm_head = lm_head
        self.codes = codes
        self.recomputes = False

    def logits(self, hidden: Tensor) -> Tensor:
        """Map final-norm hidden states [..., D] to logits [..., V] of the image codes."""
        return F.linear(hidden, self.lm_head.weight[: self.codes])

    def read(self, prompts: Rows) -> tuple[Tensor, Any]:
        """Read prompts: final-norm hidden states [P, D] of their last ids, and the keys and values of all."""
        out = self.lm(
            input_ids=prompts["ids"],
            attention_mask=prompts["mask"],
            position_ids=prompts["places"].transpose(0, 1),
            use_cache=True,
        )
        return out.last_hidden_state[:, -1], out.past_key_values

    def go_on(self, tokens: Tensor, cache: Any, mask: Tensor, places: Tensor) -> Tensor:
        """Read image tokens [B, N] after what the cache holds; returns hidden states [B, N, D].

        `mask` [B, L + N] of everything, `places` [B, 3, N] of the tokens."""
        out = self.lm(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=places.transpose(0, 1),
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def hidden_states(self, prompts: Rows, tokens: Tensor) -> Tensor:
        """Return hidden states [B, T, D] that T tokens [B, T] are predicted from; B = P·G, group-major. A prompt is
        read once for its group, gradients included, unless layers are recomputed."""
        if self.recomputes and torch.is_grad_enabled():
            return self._recomputed_states(prompts, tokens)
        first, cache = self.read(prompts)
        group = _group(prompts, tokens)
        cache.batch_repeat_interleave(group)  # differentiable: gradients of a group add up
        mask, grid = (prompts[name].repeat_interleave(group, 0) for name in ("mask", "grid"))
        seen = tokens[:, :-1]  # the last token is predicted, never read
        whole = torch.cat([mask, torch.ones_like(seen, dtype=mask.dtype)], 1)
        rest = self.go_on(seen, cache, whole, grid[:, :, : seen.shape[1]])
        return torch.cat([first.repeat_interleave(group, 0)[:, None], rest], 1)

    def _recomputed_states(self, prompts: Rows, tokens: Tensor) -> Tensor:
        """The same without keys and values, which a layer that is recomputed would write twice."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        ids, mask, places, grid = (
            prompts[name].repeat_interleave(_group(prompts, tokens), 0)
            for name in ("ids", "mask", "places", "grid")
        )
        seen = tokens[:, :-1]
        layers = [layer for layer in self.lm.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:  # themselves alone, so that nothing within them is in training mode
            layer.training = True
        try:
            hidden: Tensor = self.lm(
                input_ids=torch.cat([ids, seen], 1),
                attention_mask=torch.cat([mask, torch.ones_like(seen, dtype=mask.dtype)], 1),
                position_ids=torch.cat([places, grid[:, :, : seen.shape[1]]], 2).transpose(0, 1),
                use_cache=False,
            ).last_hidden_state
        finally:
            for layer in layers:
                layer.training = False
        return hidden[:, ids.shape[1] - 1 :]

    def forward(self, prompts: Rows, tokens: Tensor, sampling: SamplingParams) -> TokenScores:
        """Score `tokens` [B, T] after prompts [P]."""
        hidden = self.hidden_states(prompts, tokens)
        return score_tokens([hidden], self.logits, self.codes, tokens, sampling.temperature)

    @torch.no_grad()
    def sample(self, prompts: Rows, uniforms: Tensor, sampling: SamplingParams) -> TokenTrajectory:
        """Draw T tokens for each of G samples of P prompts, by uniforms [P·G, T] in [0, 1): the inverse of the
        cumulative distribution there, so that a sample depends on its own numbers alone."""
        hidden, cache = self.read(prompts)
        group = _group(prompts, uniforms)
        cache.batch_repeat_interleave(group)
        hidden = hidden.repeat_interleave(group, 0)
        mask, grid = (prompts[name].repeat_interleave(group, 0) for name in ("mask", "grid"))
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        for step in range(uniforms.shape[1]):
            if step:
                mask = F.pad(mask, (0, 1), value=1)
                place = grid[:, :, step - 1 : step]
                hidden = self.go_on(tokens[-1][:, None], cache, mask, place)[:, 0]
            token, logprob = draw_tokens(
                self.logits(hidden).float() / sampling.temperature, uniforms[:, step]
            )
            tokens.append(token)
            logprobs.append(logprob)
        drawn = torch.stack(tokens, 1)
        whole = torch.ones_like(drawn, dtype=torch.bool)
        return TokenTrajectory(drawn, torch.stack(logprobs, 1), whole)


def _group(prompts: Rows, samples: Tensor) -> int:
    """Return G of P prompts and P·G samples."""
    group, rest = divmod(len(samples), len(prompts["ids"]))
    if rest:
        raise ValueError(f"{len(samples)} samples are not groups of {len(prompts['ids'])} prompts")
    return group
