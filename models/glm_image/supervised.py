"""Supervised training of both halves: cross-entropy on the tokens of preview and picture, and the flow loss of the
transformer, which sees the picture's own tokens and sends no gradient into the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imagerl.models.base import SupervisedScores
from imagerl.models.common.supervised import TokenLessons, TokenModule
from imagerl.rl.types import Prompt, Rows, TokenTrajectory

if TYPE_CHECKING:
    from imagerl.models.glm_image.policy import GlmImagePolicy


class SupervisedModule(TokenModule):
    """Language model and, where it learns, transformer, in one module for the engine."""

    def __init__(self, policy: GlmImagePolicy, with_flow: bool) -> None:
        super().__init__(policy.trainable)
        self._flow = (policy.decoder,) if with_flow else ()  # in a tuple: it holds what never trains
        if with_flow:
            self.transformer = policy.decoder.transformer

    def forward(self, prompts: Rows, targets: Rows, draws: Rows) -> SupervisedScores:
        # Without a graph where nothing there learns: the activations are most of the memory.
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.ar.parameters())
        with torch.set_grad_enabled(learns):
            scores = super().forward(prompts, targets, draws)
        for decoder in self._flow:
            tokens = targets["tokens"]
            trajectory = TokenTrajectory(tokens, tokens.float(), torch.ones_like(tokens, dtype=torch.bool))
            condition = decoder.flow_condition(prompts, trajectory)
            residual = decoder.flow_residual(
                condition, targets["latents"], draws["uniform"], draws["noise"], draws["drop"]
            )
            scores = scores._replace(flow=residual.square().flatten(1).mean(1))
        return scores


class Lessons(TokenLessons):
    """Implements `models.base.Lessons`."""

    parts: Mapping[str, Sequence[str]] = {"ar": ("full", "lora"), "decoder": ("full",)}

    def __init__(self, policy: GlmImagePolicy, with_flow: bool) -> None:
        super().__init__(policy, SupervisedModule(policy, with_flow))
        self.decoder, self.prompts = policy.decoder, policy.prompts

    @staticmethod
    def part_of(name: str) -> str:
        return "ar" if name.startswith("ar.") else "decoder"

    def targets(self, prompts: Sequence[Prompt], pictures: Tensor) -> Rows:
        rows = super().targets(prompts, pictures)
        if any(prompt.reference is not None for prompt in prompts):  # an edit has no preview
            rows["tokens"] = rows["tokens"][:, -self.prompts.canvas(prompts[0]).tokens :]
        return rows | {"latents": self.decoder.encode(pictures).float()}
