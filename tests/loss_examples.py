"""Tensors that every loss is tried on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imagerl.rl.algorithms.losses import loss_denominator, policy_loss
from imagerl.rl.config.algorithm_table import ALGORITHMS, Normaliser
from imagerl.rl.types import LossInputs

LENGTHS = [7, 3, 5, 1, 7, 2]
LOSS_FIELDS = ("ratio_level", "clip", "clip_low", "clip_high", "kl_estimator", "normaliser")


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of `policy_loss` for an algorithm of the table."""
    row = ALGORITHMS[name].defaults()  # type: ignore[index]
    return {field: row[field] for field in LOSS_FIELDS} | changes


def example(
    normaliser: Normaliser = "sequence",
    dtype: torch.dtype = torch.float64,
    lengths: list[int] = LENGTHS,
    seed: int = 0,
) -> LossInputs:
    """Six samples of unequal lengths whose ratios lie on both sides of every clip."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), 7)
    logprobs, moved, reference = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    advantages = torch.randn(shape[0], 1, generator=generator, dtype=dtype)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    logprobs = logprobs - 3
    return LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        old_logprobs=logprobs + 0.4 * moved,
        ref_logprobs=logprobs + 0.3 * reference,
        advantages=advantages,
        action_mask=mask,
        denominator=loss_denominator(mask, normaliser, max_length=7),
    )


def rows(inputs: LossInputs, index: Any) -> LossInputs:
    """Some samples of a batch, as leaves of their own; the denominator stays that of the batch."""
    assert inputs.ref_logprobs is not None
    weights = inputs.policy_weights
    return replace(
        inputs,
        logprobs=inputs.logprobs.detach()[index].requires_grad_(),
        old_logprobs=inputs.old_logprobs[index],
        ref_logprobs=inputs.ref_logprobs[index],
        advantages=inputs.advantages[index],
        action_mask=inputs.action_mask[index],
        policy_weights=None if weights is None else weights[index],
    )


def backward(inputs: LossInputs, **settings: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradient with respect to the log-probs, and the metrics."""
    output = policy_loss(inputs, **settings)
    (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs)
    return output.loss.detach(), gradient, output.metrics
