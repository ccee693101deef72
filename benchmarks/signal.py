"""The part of a step's gradient that another step's shares, the weights held still: what there is to learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.measuring import Report


def gradients(train: Callable[[], object]) -> Tensor:
    """Return the gradients [N, numbers] of the N updates that `train` would make: the weights stay what they are."""
    found: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found.append(torch.cat([p.grad.flatten() for p in trained]).clone())
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    handle = register_optimizer_step_pre_hook(look)
    try:
        train()
    finally:
        handle.remove()
    return torch.stack(found)


def shared(gradients: Tensor) -> Report:
    """Return the mean cosine between gradients [N, numbers] of independent steps, and its standard error.

    A step's gradient is the true one and noise; the cosine c of two is the true one's part of a squared norm. After
    (1 - c) / c steps the mean of all gradients is as much signal as noise. The error is the jackknife's over steps, as
    each belongs to many pairs; of few steps it is a quarter too large."""
    directions = torch.nn.functional.normalize(gradients.double(), dim=1)
    cosines, count = directions @ directions.T, len(gradients)
    cosines.fill_diagonal_(0)
    mean = cosines.sum() / (count * (count - 1))
    without = (cosines.sum() - 2 * cosines.sum(1)) / ((count - 1) * (count - 2))
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    report = {"signal/cosine": float(mean), "signal/cosine_error": float(error), "signal/steps": float(count)}
    return report | ({"signal/steps_to_half": float((1 - mean) / mean)} if mean > 2 * error else {})
