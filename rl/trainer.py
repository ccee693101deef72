"""One training step: roll out, score, compare within groups, update.

The trainer knows a `Policy` and a `RewardScorer` only by their Protocols, and the machinery below by `Engine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl.advantages import AdvantageInputs, AdvantageOutput, moved_mean, shuffled
from rl.algorithm_loading import load_advantages, load_loss, loss_settings
from rl.config import Recipe
from rl.data import GroupedSampler
from rl.engine import Engine
from rl.kl import adapted_coef, kl_penalty
from rl.losses import action_weights, loss_denominator
from rl.metrics import PhaseTimer
from rl.policy_weights import entropy_threshold, highest_entropy, policy_weights
from rl.resampling import Drawn, resample
from rl.rollout import RolloutEngine, encode, reward_request
from rl.scores import merge_scores
from rl.seeding import generator
from rl.step_checks import refuse_failures, refuse_gap
from rl.step_metrics import Metrics, microbatch_sums, replay_gap, reward_metrics, update_metrics
from rl.types import LossInputs, Policy, Prompt, RewardScorer, RewardScores, RolloutGroup, TrainBatch


class Trainer:
    """Every algorithm of `rl.algorithms` on the tokens of the autoregressive half."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        scorer: RewardScorer,
        sampler: GroupedSampler,
        rollout: RolloutEngine,
        engine: Engine,
    ) -> None:
        self.recipe = recipe
        self.algorithm = recipe.algorithm
        self.policy = policy
        self.scorer = scorer
        self.sampler = sampler
        self.rollout = rollout
        self.engine = engine
        self.loss = load_loss(recipe.algorithm)
        self.advantages = load_advantages(recipe.algorithm)
        self.temperature = recipe.rollout.temperature
        self.kl_coef = recipe.algorithm.kl_coef  # adapted where there is a target
        self.moving_mean: float | None = None  # of the rewards so far, for that baseline
        synchronise = torch.cuda.synchronize if engine.device.type == "cuda" else None
        self.timer = PhaseTimer(synchronise)

    def step(self, step: int) -> Metrics:
        """Train on the prompts of `step` (counted from 0); returns what to log."""
        self.timer.start()
        self._refresh_sampler()
        groups, tickets = self._roll_out(self._own_share(self.sampler.step(step)), step)
        if self.algorithm.max_resamples:
            groups, scores, drawn = self._resample(groups, self._collect(tickets), step)
            batch = self._score_frozen(self._assemble(groups))
        else:
            batch = self._score_frozen(self._assemble(groups))  # rewards are still being computed elsewhere
            scores = drawn = self._collect(tickets)
        drawn = merge_scores(self.engine.gather_objects(drawn))
        refuse_failures(drawn, self.recipe.rewards.max_failure_rate)
        with self.timer("update"):
            advantages = self._advantages(scores, batch, step)
            batch = self._select(train_on(batch, advantages))
            updates = [self._update(batch) for _ in range(self.algorithm.updates_per_rollout)]
        metrics = self._metrics(drawn, advantages, updates)
        self._adapt_kl(updates)
        self._renew_reference(step)
        return metrics

    # ---- what outlives a step ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All but weights and optimizer that the next step depends on, as JSON takes it."""
        return {"kl_coef": self.kl_coef, "moving_mean": self.moving_mean}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The same in tensors: the reference, where it is no longer the model that the run began from."""
        return {"reference": self.policy.reference_state()} if self.algorithm.reference_every else {}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from what `state` and `tensors` returned."""
        self.kl_coef = state.get("kl_coef", self.kl_coef)
        self.moving_mean = state.get("moving_mean")
        if "reference" in tensors:
            self.policy.load_reference(tensors["reference"])

    def _adapt_kl(self, updates: Sequence[Metrics]) -> None:
        """The KL of the first update is that of the policy which drew the samples."""
        target, first = self.algorithm.kl_target, updates[0]
        if target is not None and first:
            kl = first["kl_k3"] / first["actions"]
            self.kl_coef = adapted_coef(self.kl_coef, kl, target, self.algorithm.kl_rate)

    def _renew_reference(self, step: int) -> None:
        every = self.algorithm.reference_every
        if every and (step + 1) % every == 0:
            with self.engine.gathered_parameters():
                self.policy.freeze_reference()

    # ---- rollout and rewards -------------------------------------------------------------------------------

    def _own_share(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The prompts of this rank: a contiguous part of the step's."""
        size = len(prompts) // self.engine.world_size
        return prompts[self.engine.rank * size : (self.engine.rank + 1) * size]

    def _refresh_sampler(self) -> None:
        with self.timer("rollout"), self.engine.gathered_parameters():
            self.policy.refresh_sampler()

    def _roll_out(self, prompts: Sequence[Prompt], step: int) -> tuple[list[RolloutGroup], list[int]]:
        settings = self.recipe.rollout
        groups, tickets = [], []
        with self.timer("rollout"):
            for chunk in self.rollout.generate(
                prompts, settings.group_size, step, settings.decode_chunk, settings.sample_chunk
            ):
                tickets.append(self.scorer.submit(reward_request(chunk)))
                groups += chunk
        return groups, tickets

    def _collect(self, tickets: Sequence[int]) -> RewardScores:
        with self.timer("reward_wait"):
            return merge_scores([self.scorer.collect(ticket) for ticket in tickets])

    def _resample(
        self, groups: Sequence[RolloutGroup], scores: RewardScores, step: int
    ) -> tuple[list[RolloutGroup], RewardScores, RewardScores]:
        """Groups to train on, their scores, and the scores of all samples drawn; see `rl.resampling`."""

        def draw(prompts: Sequence[Prompt]) -> Drawn | None:
            if not prompts:
                return None
            fresh, tickets = self._roll_out(prompts, step)
            return fresh, self._collect(tickets)

        others, rounds = self.sampler.others(step), self.algorithm.max_resamples
        gather, rank = self.engine.gather_objects, self.engine.rank
        return resample(groups, scores, others, rounds, draw, gather, rank)

    def _assemble(self, groups: Sequence[RolloutGroup]) -> TrainBatch:
        encoded = encode(self.policy, [group.prompt for group in groups])
        size = len(groups[0].images)
        return TrainBatch(
            prompt_ids=encoded.ids.repeat_interleave(size, 0),
            prompt_mask=encoded.mask.repeat_interleave(size, 0),
            tokens=torch.cat([group.tokens for group in groups]),
            action_mask=torch.cat([group.action_mask for group in groups]),
            rollout_logprobs=torch.cat([group.rollout_logprobs for group in groups]),
            old_logprobs=None,
            ref_logprobs=None,
            advantages=torch.zeros(len(groups) * size, 1, device=encoded.ids.device),
        )

    def _microbatches(self, batch: TrainBatch) -> list[TrainBatch]:
        size = self.recipe.engine.micro_batch_size
        return [batch.rows(slice(start, start + size)) for start in range(0, len(batch.tokens), size)]

    def _arguments(self, part: TrainBatch) -> tuple[Tensor, Tensor, Tensor, float]:
        """What the policy scores a microbatch by. One of whole groups names each prompt once."""
        group = self.recipe.rollout.group_size
        share = group if self.recipe.engine.micro_batch_size % group == 0 else 1
        return part.prompt_ids[::share], part.prompt_mask[::share], part.tokens, self.temperature

    @torch.no_grad()
    def _score_frozen(self, batch: TrainBatch) -> TrainBatch:
        """Log-probs that need no gradient: the reference's, and the trainer's own before several updates."""
        references, olds, entropies = [], [], []
        measure_kl, several = self.algorithm.needs_reference, self.algorithm.updates_per_rollout > 1
        choosy = self.algorithm.top_entropy < 1
        with self.timer("reference"), self.engine.autocast():
            for part in self._microbatches(batch) if measure_kl or several or choosy else ():
                arguments = self._arguments(part)
                if measure_kl:
                    references.append(self.policy.reference_scores(*arguments).logprobs)
                if several or choosy:
                    scores = self.engine.module(*arguments)
                    olds.append(scores.logprobs)
                    entropies.append(scores.entropy)
        return replace(
            batch,
            ref_logprobs=torch.cat(references) if measure_kl else None,
            old_logprobs=torch.cat(olds) if several else None,
            entropy=torch.cat(entropies) if choosy else None,
        )

    # ---- update --------------------------------------------------------------------------------------------

    def _advantages(self, scores: RewardScores, batch: TrainBatch, step: int) -> AdvantageOutput:
        """The advantages of this rank's samples, made from the rewards of all ranks."""
        inputs = AdvantageInputs.join(self.engine.gather_objects(self._advantage_inputs(scores, batch)))
        if self.algorithm.shuffle_rewards:
            seed = self.recipe.run.seed, "shuffle", step
            inputs = replace(
                inputs,
                rewards=shuffled(inputs.rewards, generator(*seed)),
                components=shuffled(inputs.components, generator(*seed)),
            )
        output = self.advantages(inputs)
        self.moving_mean = moved_mean(self.moving_mean, inputs.rewards, self.algorithm.baseline_decay)
        own = len(scores.totals)
        return output.rows(slice(self.engine.rank * own, (self.engine.rank + 1) * own))

    def _advantage_inputs(self, scores: RewardScores, batch: TrainBatch) -> AdvantageInputs:
        penalty = None
        if self.algorithm.kl_in == "reward":
            assert batch.ref_logprobs is not None  # the recipe refuses kl_in=reward without kl_coef
            penalty = kl_penalty(
                batch.rollout_logprobs, batch.ref_logprobs, batch.action_mask, self.kl_coef
            ).cpu()
        rewards = self.recipe.rewards.functions
        components = [scores.components[reward.label] for reward in rewards]
        return AdvantageInputs(
            rewards=torch.from_numpy(scores.totals),
            components=torch.from_numpy(np.stack(components, axis=1)),
            weights=tuple(reward.weight for reward in rewards),
            group_size=self.recipe.rollout.group_size,
            action_mask=batch.action_mask.cpu(),
            penalty=penalty,
            moving_mean=self.moving_mean,
        )

    def _select(self, batch: TrainBatch) -> TrainBatch:
        """With `top_entropy` the actions that the policy term trains; the threshold is that of all ranks."""
        if batch.entropy is None:
            return batch
        entropies = batch.entropy[batch.action_mask].float().cpu().numpy()
        everywhere = np.concatenate(self.engine.gather_objects(entropies))
        threshold = entropy_threshold(everywhere, self.algorithm.top_entropy)
        return replace(batch, selected=highest_entropy(batch.entropy, batch.action_mask, threshold))

    def _update(self, batch: TrainBatch) -> Metrics:
        """One optimizer step over all microbatches; returns sums over ranks, and the gradient norm."""
        algorithm = self.algorithm
        local = loss_denominator(batch.action_mask, algorithm.normaliser, batch.tokens.shape[1])
        denominator = self.engine.sum_over_ranks({"n": local})["n"]
        if not denominator:
            return {}
        parts, settings = self._microbatches(batch), loss_settings(algorithm, self.kl_coef)
        sums: dict[str, Tensor] = {}
        worst = torch.zeros((), dtype=torch.float64)
        for number, part in enumerate(parts, 1):
            with self.engine.microbatch(last=number == len(parts)):
                with self.engine.autocast():
                    scores = self.engine.module(*self._arguments(part))
                old = scores.logprobs.detach() if part.old_logprobs is None else part.old_logprobs
                mask, cap = part.action_mask, algorithm.importance_cap
                inputs = LossInputs(
                    logprobs=scores.logprobs,
                    old_logprobs=old,
                    ref_logprobs=part.ref_logprobs,
                    advantages=part.advantages,
                    action_mask=mask,
                    denominator=denominator,
                    policy_weights=policy_weights(old, part.rollout_logprobs, mask, cap, part.selected),
                )
                output = self.loss(inputs, **settings)
                loss = output.loss
                if algorithm.entropy_coef:  # else its gradient would be computed and multiplied by 0
                    weights = action_weights(mask, algorithm.normaliser).to(loss.dtype)
                    loss = loss - algorithm.entropy_coef * (weights * scores.entropy).sum() / denominator
                self.engine.backward(loss)
            worst = torch.maximum(worst, replay_gap(inputs, part).max().double().cpu())
            measured = microbatch_sums(inputs, part, scores, cap) | {"loss": output.loss.detach()}
            for name, value in {**output.metrics, **measured}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
        replay_gap_max = max(self.engine.gather_objects(float(worst)))
        refuse_gap(replay_gap_max, self.recipe.logprob_limit)
        grad_norm = self.engine.step()
        totals = self.engine.sum_over_ranks(sums) | {"replay_gap_max": replay_gap_max}
        return {**totals, "grad_norm": grad_norm, "lr": self.engine.lr}

    def _metrics(self, drawn: RewardScores, advantages: AdvantageOutput, updates: list[Metrics]) -> Metrics:
        metrics = reward_metrics(drawn) | {f"advantages/{k}": v for k, v in advantages.metrics.items()}
        metrics |= update_metrics(updates, on_policy=self.algorithm.updates_per_rollout == 1)
        if self.algorithm.kl_target is not None:
            metrics["kl/coef"] = self.kl_coef
        if self.algorithm.max_resamples:
            trained = len(advantages.valid) * self.engine.world_size
            replaced = (len(drawn.totals) - trained) / self.recipe.rollout.group_size
            metrics["rollout/resampled_groups"] = replaced
        timing = self.timer.metrics()
        images = float(len(drawn.totals))
        return metrics | timing | {"rollout/images": images, "images_per_s": images / timing["time/step_s"]}


def train_on(batch: TrainBatch, advantages: AdvantageOutput) -> TrainBatch:
    """The batch with its advantages; samples without a usable reward lose all their actions."""
    valid = advantages.valid.to(batch.action_mask.device)
    values = advantages.advantages.to(batch.tokens.device)
    return replace(
        batch,
        advantages=values[:, None] if values.dim() == 1 else values,
        action_mask=batch.action_mask & valid[:, None],
    )
