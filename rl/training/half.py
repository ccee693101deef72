"""The interface of a half of the generator: it knows its actions and their loss, and nothing of when it is
called, of ranks or of optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from imagerl.rl.algorithms.advantages import AdvantageInputs, AdvantageOutput
from imagerl.rl.training.step_metrics import Metrics
from imagerl.rl.types import FlowSampling, RewardScores, RolloutGroup

# A batch: actions of some samples, group-major, of a microbatch or of a step. A dataclass with `action_mask` [B, N]
# bool (all False for a sample that must not train), `advantages` [B, 1] or [B, N], and `rows(slice)`.
B = TypeVar("B", bound=Any)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HalfLoss:
    """The loss of one microbatch and its sums for the log."""

    loss: Tensor  # scalar with gradient, divided by the global denominator
    sums: dict[str, Tensor]  # scalars to be added up over microbatches and ranks, `actions` among them
    gap: Tensor  # the largest |trainer's log-prob before any update − rollout's|


class Gather(Protocol):
    """Returns the value of every rank, in order of rank. Collective."""

    def __call__(self, value: T, /) -> list[T]: ...


class Half(Protocol[B]):
    """One half of a generator in training. `B` is its batch, `scores` what its module returned for `arguments`."""

    name: str  # as in `rl.training.halves`
    prefix: str  # of its metrics
    needs_old: bool  # whether `frozen` wants the scores of the policy before the update
    per_sequence: int  # its samples of each token sequence: 1 for the tokens, M decodes for the decoder

    def sampling(self, step: int) -> FlowSampling | None:
        """Return the decoder's sampling in the rollout of training step `step`; None: as the recipe's rollout says."""
        ...

    def assemble(self, groups: Sequence[RolloutGroup], step: int) -> B:
        """Assemble the actions of some groups, without advantages yet."""
        ...

    def arguments(self, part: B) -> tuple[object, ...]:
        """Return its module's arguments for a microbatch."""
        ...

    def frozen(self, part: B, old: Any | None) -> dict[str, Tensor]:
        """Return fields of the batch that need no gradient, such as the reference's scores."""
        ...

    def select(self, batch: B) -> B:
        """Choose the actions that the policy term trains, now that all ranks' are known."""
        ...

    def advantage_inputs(self, scores: RewardScores, batch: B) -> AdvantageInputs:
        """Return what advantages are made of, from the scores of this half's own rewards."""
        ...

    def denominator(self, batch: B) -> float:
        """Return this rank's part of the loss's denominator; 0 where nothing trains."""
        ...

    def loss(self, scores: Any, part: B, denominator: float) -> HalfLoss: ...

    def refuse_gap(self, gap: float) -> None:
        """Raise ImageRLError when rollout and replay disagree beyond rounding."""
        ...

    def after_step(self, step: int, updates: Sequence[Metrics]) -> None:
        """Do what follows an update, such as adapting the KL's weight."""
        ...

    def metrics(self, updates: Sequence[Metrics]) -> Metrics:
        """Turn the sums of a step's updates into metrics for the log."""
        ...

    def state(self) -> dict[str, object]:
        """Return all but weights and optimizer that the next step depends on, as JSON takes it."""
        ...

    def restore(self, state: Mapping[str, object]) -> None: ...


def train_on(batch: B, advantages: AdvantageOutput) -> B:
    """Give the batch its advantages; samples without a usable reward lose all their actions."""
    mask = batch.action_mask
    values = advantages.advantages.to(mask.device)
    return replace(
        batch,
        advantages=values[:, None] if values.dim() == 1 else values,
        action_mask=mask & advantages.valid.to(mask.device)[:, None],
    )


def reward_inputs(scores: RewardScores, group_size: int, action_mask: Tensor) -> AdvantageInputs:
    """Return the advantages' inputs of the scores of a half, without what only that half knows."""
    return AdvantageInputs(
        rewards=torch.from_numpy(scores.totals),
        components=torch.from_numpy(np.stack(list(scores.gated.values()), axis=1)),
        weights=tuple(scores.weights[label] for label in scores.gated),
        group_size=group_size,
        action_mask=action_mask.cpu(),
    )
