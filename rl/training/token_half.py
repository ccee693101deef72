"""The autoregressive half of a training step: its actions are image tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imagerl.models.base import Policy
from imagerl.rl.algorithms.advantages import AdvantageInputs
from imagerl.rl.algorithms.credit import region_credit
from imagerl.rl.algorithms.kl import adapted_coef, kl_penalty
from imagerl.rl.algorithms.loading import load_loss, loss_settings
from imagerl.rl.algorithms.losses import (
    action_weights,
    entropy_threshold,
    highest_entropy,
    loss_denominator,
    policy_weights,
)
from imagerl.rl.config.train import Recipe
from imagerl.rl.rollout.engine import replayed, training_sampling
from imagerl.rl.rollout.scores import average_decodes
from imagerl.rl.training.half import Gather, HalfLoss, reward_inputs
from imagerl.rl.training.step_metrics import (
    THOUGHT,
    Metrics,
    microbatch_sums,
    refuse_gap,
    replay_gap,
    thought_metrics,
    thought_sums,
    update_metrics,
)
from imagerl.rl.types import (
    LossInputs,
    RewardScores,
    RolloutGroup,
    Rows,
    SamplingParams,
    TokenScores,
    TrainBatch,
    select,
)


class TokenHalf:
    """The autoregressive half: it runs every algorithm of `rl.config.algorithm_table`."""

    name = "tokens"
    prefix = ""
    per_sequence = 1

    def __init__(self, recipe: Recipe, policy: Policy, gather: Gather) -> None:
        """Set the half up; `gather` returns every rank's value."""
        self.recipe = recipe
        self.algorithm = recipe.algorithm
        self.policy = policy
        self.gather = gather
        self.policy_loss = load_loss(recipe.algorithm)
        self.sampled_with = training_sampling(recipe)
        self._weigh_kl(recipe.algorithm.kl_coef)  # adapted where there is a target
        self.grid: tuple[int, int] | None = None  # of the tokens of the present step's pictures
        # Older weights draw then, over whose samples the KL is no mean.
        self.stale = recipe.rollout.max_staleness > 0
        self.several = recipe.algorithm.updates_per_rollout > 1
        self.choosy = recipe.algorithm.top_entropy < 1
        self.needs_old = self.several or self.choosy

    def sampling(self, step: int) -> None:
        """Return None: tokens do not care how the decoder draws."""

    def assemble(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Assemble the tokens of some groups, without advantages yet."""
        self.grid = self.policy.prompts.canvas(groups[0].prompt).grid  # all pictures of a step have one
        rows, tokens, action_mask, rollout_logprobs = replayed(self.policy, groups)
        return TrainBatch(
            prompts=rows,
            tokens=tokens,
            action_mask=action_mask,
            rollout_logprobs=rollout_logprobs,
            old_logprobs=None,
            ref_logprobs=None,
            advantages=torch.zeros(len(tokens), 1, device=tokens.device),
        )

    def arguments(self, part: TrainBatch) -> tuple[Rows, Tensor, SamplingParams]:
        """Return the policy's arguments for a microbatch. One of whole groups names each prompt once."""
        group = self.recipe.rollout.group_size
        engine = self.recipe.engine
        together = engine.micro_batch_size % group == 0 and not engine.activation_checkpointing
        # After thoughts of their own samples have no prompt in common.
        share = group if together and not self.sampled_with.thought_tokens else 1
        return select(part.prompts, slice(None, None, share)), part.tokens, self.sampled_with

    def frozen(self, part: TrainBatch, old: TokenScores | None) -> dict[str, Tensor]:
        """Return the log-probs that need no gradient: the reference's, and the trainer's own before several updates."""
        fields = {}
        if self.algorithm.needs_reference:
            fields["ref_logprobs"] = self.policy.reference_scores(*self.arguments(part)).logprobs
        if old is not None and self.several:
            fields["old_logprobs"] = old.logprobs
        if old is not None and self.choosy:
            fields["entropy"] = old.entropy
        return fields

    def advantage_inputs(self, scores: RewardScores, batch: TrainBatch) -> AdvantageInputs:
        """Give each token sequence the mean reward of its pictures."""
        rollout = self.recipe.rollout
        averaged = average_decodes(scores, rollout.decodes)
        inputs = reward_inputs(averaged, rollout.group_size, batch.action_mask)
        if self.algorithm.region_credit and self.grid is not None:
            inputs = replace(inputs, credit=self._credit(scores, batch, self.grid))
        if self.algorithm.kl_in != "reward":
            return inputs
        assert batch.ref_logprobs is not None  # the recipe refuses kl_in=reward without kl_coef
        penalty = kl_penalty(batch.rollout_logprobs, batch.ref_logprobs, batch.action_mask, self.kl_coef)
        return replace(inputs, penalty=penalty.cpu())

    def _credit(self, scores: RewardScores, batch: TrainBatch, grid: tuple[int, int]) -> Tensor:
        """Return what regions of the pictures give to the tokens there, [B, N], and nothing to thoughts before them."""
        if not scores.regions and batch.tokens.numel():
            told = (
                f"none of the rewards ({', '.join(scores.weights)}) tells regions of a picture, as ocr does"
            )
            warnings.warn(f"algorithm.region_credit has no effect: {told}", stacklevel=2)
        size = self.recipe.rollout.group_size
        credit = torch.zeros(batch.tokens.shape, dtype=torch.float64)
        for regions in scores.regions.values():
            credit += self.algorithm.region_credit * region_credit(regions, size, grid)
        return F.pad(credit, (batch.action_mask.shape[1] - batch.tokens.shape[1], 0))

    def select(self, batch: TrainBatch) -> TrainBatch:
        """Choose with `top_entropy` the actions that the policy term trains; the threshold is that of all ranks."""
        if batch.entropy is None:
            return batch
        entropies = batch.entropy[batch.action_mask].float().cpu().numpy()
        threshold = entropy_threshold(np.concatenate(self.gather(entropies)), self.algorithm.top_entropy)
        return replace(batch, selected=highest_entropy(batch.entropy, batch.action_mask, threshold))

    def denominator(self, batch: TrainBatch) -> float:
        """Return this rank's part of the loss's denominator."""
        return loss_denominator(batch.action_mask, self.algorithm.normaliser, batch.action_mask.shape[1])

    def loss(self, scores: TokenScores, part: TrainBatch, denominator: float) -> HalfLoss:
        """Compute the policy loss of a microbatch with its entropy bonus."""
        algorithm, mask = self.algorithm, part.action_mask
        old = scores.logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        cap = algorithm.importance_cap
        inputs = LossInputs(
            logprobs=scores.logprobs,
            old_logprobs=old,
            ref_logprobs=part.ref_logprobs,
            advantages=part.advantages,
            action_mask=mask,
            denominator=denominator,
            policy_weights=policy_weights(old, part.rollout_logprobs, mask, cap, part.selected),
            kl_weights=policy_weights(old, part.rollout_logprobs, mask, cap, None) if self.stale else None,
        )
        output = self.policy_loss(inputs, **self.settings)
        loss = output.loss
        if algorithm.entropy_coef:  # else its gradient would be computed and multiplied by 0
            weights = action_weights(mask, algorithm.normaliser).to(loss.dtype)
            loss = loss - algorithm.entropy_coef * (weights * scores.entropy).sum() / denominator
        sums = output.metrics | microbatch_sums(inputs, part, scores, cap) | {"loss": output.loss.detach()}
        if self.sampled_with.thought_tokens:
            sums |= thought_sums(inputs, scores, self.sampled_with.thought_tokens)
        return HalfLoss(loss, sums, replay_gap(inputs, part).max())

    def refuse_gap(self, gap: float) -> None:
        """Raise ImageRLError when sampler and trainer disagree beyond rounding."""
        refuse_gap(gap, self.recipe.logprob_limit)

    def after_step(self, step: int, updates: Sequence[Metrics]) -> None:
        """Adapt the KL's weight. The KL of the first update is that of the policy which drew the samples."""
        target, first = self.algorithm.kl_target, updates[0]
        if target is not None and first:
            kl = first["kl_k3"] / first["actions"]
            self._weigh_kl(adapted_coef(self.kl_coef, kl, target, self.algorithm.kl_rate))

    def metrics(self, updates: Sequence[Metrics]) -> Metrics:
        """Return means per token of the last update; see docs/run-folder.md."""
        own = [{name: update[name] for name in update if not name.startswith(THOUGHT)} for update in updates]
        metrics = update_metrics(own, on_policy=not self.several) | thought_metrics(updates)
        if self.algorithm.kl_target is not None:
            metrics["kl/coef"] = self.kl_coef
        return metrics

    def state(self) -> dict[str, object]:
        """Return the adapted weight of the KL."""
        return {"kl_coef": self.kl_coef}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._weigh_kl(state.get("kl_coef", self.kl_coef))

    def _weigh_kl(self, coef: float) -> None:
        self.kl_coef = coef
        self.settings = loss_settings(self.algorithm, coef)
