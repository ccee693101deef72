"""One training step: roll out, score, compare within groups, update.

The trainer knows a `Policy` and a `RewardScorer` only by their Protocols, and the machinery below by `Engine`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rl.advantages import AdvantageOutput, group_advantages, shuffled
from rl.config import Recipe
from rl.data import GroupedSampler
from rl.engine import Engine
from rl.errors import ImageRLError
from rl.kl import masked, penalised_rewards
from rl.losses import action_weights, loss_denominator, resolve_loss
from rl.metrics import PhaseTimer
from rl.rollout import RolloutEngine, encode, reward_request
from rl.seeding import generator
from rl.types import LossInputs, Policy, Prompt, RewardScorer, RewardScores, RolloutGroup, TrainBatch

Metrics = dict[str, float]


class Trainer:
    """GRPO and its relatives on the tokens of the autoregressive half (arXiv 2402.03300)."""

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
        self.loss = resolve_loss(recipe.algorithm.name)
        self.temperature = recipe.rollout.temperature
        synchronise = torch.cuda.synchronize if engine.device.type == "cuda" else None
        self.timer = PhaseTimer(synchronise)

    def step(self, step: int) -> Metrics:
        """Train on the prompts of `step` (counted from 0); returns what to log."""
        self.timer.start()
        prompts = self._own_share(self.sampler.step(step))
        groups, tickets = self._roll_out(prompts, step)
        batch = self._assemble(groups)
        with self.timer("reference"):  # rewards are still being computed elsewhere
            batch = self._score_frozen(batch)
        with self.timer("reward_wait"):
            scores = merge_scores([self.scorer.collect(ticket) for ticket in tickets])
        with self.timer("update"):
            rewards, advantages = self._advantages(scores, batch, step)
            batch = train_on(batch, advantages)
            updates = [self._update(batch) for _ in range(self.algorithm.updates_per_rollout)]
        return self._metrics(scores, rewards, advantages, updates)

    def _own_share(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The prompts of this rank: a contiguous part of the step's."""
        size = len(prompts) // self.engine.world_size
        return prompts[self.engine.rank * size : (self.engine.rank + 1) * size]

    def _roll_out(self, prompts: Sequence[Prompt], step: int) -> tuple[list[RolloutGroup], list[int]]:
        settings = self.recipe.rollout
        groups, tickets = [], []
        with self.timer("rollout"):
            with self.engine.gathered_parameters():
                self.policy.refresh_sampler()
            for chunk in self.rollout.generate(
                prompts, settings.group_size, step, settings.decode_chunk, settings.sample_chunk
            ):
                tickets.append(self.scorer.submit(reward_request(chunk)))
                groups += chunk
        return groups, tickets

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
            advantages=torch.zeros(len(groups) * size, device=encoded.ids.device),
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
        references, olds = [], []
        measure_kl = self.algorithm.kl_coef > 0
        several = self.algorithm.updates_per_rollout > 1
        with self.engine.autocast():
            for part in self._microbatches(batch) if measure_kl or several else ():
                arguments = self._arguments(part)
                if measure_kl:
                    references.append(self.policy.reference_scores(*arguments).logprobs)
                if several:
                    olds.append(self.engine.module(*arguments).logprobs)
        return replace(
            batch,
            ref_logprobs=torch.cat(references) if references else None,
            old_logprobs=torch.cat(olds) if olds else None,
        )

    def _advantages(
        self, scores: RewardScores, batch: TrainBatch, step: int
    ) -> tuple[np.ndarray, AdvantageOutput]:
        """Raw total rewards of all ranks, and the advantages of this rank's samples."""
        totals = torch.from_numpy(scores.totals)
        if self.algorithm.kl_in == "reward":
            assert batch.ref_logprobs is not None  # the recipe refuses kl_in=reward without kl_coef
            totals = penalised_rewards(
                totals, batch.rollout_logprobs, batch.ref_logprobs, batch.action_mask, self.algorithm.kl_coef
            )
        own = len(totals)
        gathered = self.engine.gather_objects((totals, scores.totals, scores.reasons))
        everywhere = torch.cat([rank_totals for rank_totals, _, _ in gathered])
        raw = np.concatenate([rank_raw for _, rank_raw, _ in gathered])
        self._refuse_failures(raw, [reasons for _, _, reasons in gathered])
        if self.algorithm.shuffle_rewards:
            everywhere = shuffled(everywhere, generator(self.recipe.run.seed, "shuffle", step))
        output = group_advantages(
            everywhere,
            self.recipe.rollout.group_size,
            self.algorithm.scale_rewards,
            self.algorithm.advantage_eps,
        )
        mine = slice(self.engine.rank * own, (self.engine.rank + 1) * own)
        return raw, replace(output, advantages=output.advantages[mine], valid=output.valid[mine])

    def _refuse_failures(self, totals: np.ndarray, reasons: Sequence[Mapping[str, str]]) -> None:
        """Raises ImageRLError, on all ranks alike, when too many samples of the step have no reward."""
        lost = float(np.isnan(totals).mean())
        limit = self.recipe.rewards.max_failure_rate
        if lost > limit:
            merged = {label: reason for rank in reasons for label, reason in rank.items()}
            why = "; ".join(f"{label}: {reason}" for label, reason in merged.items()) or "no value"
            raise ImageRLError(
                f"{lost:.0%} of the samples have no reward (rewards.max_failure_rate is {limit:g}): {why}"
            )

    def _update(self, batch: TrainBatch) -> Metrics:
        """One optimizer step over all microbatches; returns sums over ranks, and the gradient norm."""
        algorithm = self.algorithm
        local = loss_denominator(batch.action_mask, algorithm.normaliser, batch.tokens.shape[1])
        denominator = self.engine.sum_over_ranks({"n": local})["n"]
        if not denominator:
            return {}
        parts = self._microbatches(batch)
        sums: dict[str, Tensor] = {}
        worst = torch.zeros((), dtype=torch.float64)
        for number, part in enumerate(parts, 1):
            with self.engine.microbatch(last=number == len(parts)):
                with self.engine.autocast():
                    scores = self.engine.module(*self._arguments(part))
                inputs = LossInputs(
                    logprobs=scores.logprobs,
                    old_logprobs=scores.logprobs.detach() if part.old_logprobs is None else part.old_logprobs,
                    ref_logprobs=part.ref_logprobs,
                    advantages=part.advantages[:, None],
                    action_mask=part.action_mask,
                    denominator=denominator,
                )
                output = self.loss(
                    inputs,
                    clip_low=algorithm.clip_low,
                    clip_high=algorithm.clip_high,
                    kl_coef=algorithm.kl_coef if algorithm.kl_in == "loss" else 0.0,
                    kl_estimator=algorithm.kl_estimator,
                    normaliser=algorithm.normaliser,
                )
                loss = output.loss
                if algorithm.entropy_coef:  # else its gradient would be computed and multiplied by 0
                    weights = action_weights(part.action_mask, algorithm.normaliser).to(loss.dtype)
                    loss = loss - algorithm.entropy_coef * (weights * scores.entropy).sum() / denominator
                self.engine.backward(loss)
            gap = replay_gap(inputs, part)
            worst = torch.maximum(worst, gap.max().double().cpu())
            extra = {
                "loss": output.loss.detach(),
                "entropy": (scores.entropy.detach() * part.action_mask).sum(),
                "replay_gap": gap.sum(),
            }
            for name, value in {**output.metrics, **extra}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
        replay_gap_max = max(self.engine.gather_objects(float(worst)))
        self._refuse_gap(replay_gap_max)
        grad_norm = self.engine.step()
        totals = self.engine.sum_over_ranks(sums) | {"replay_gap_max": replay_gap_max}
        return {**totals, "grad_norm": grad_norm, "lr": self.engine.lr}

    def _refuse_gap(self, gap: float) -> None:
        """Raises ImageRLError, on all ranks alike and with the weights as they were, when sampler and trainer
        disagree beyond rounding: then one of them does not compute the distribution that both claim."""
        limit = self.recipe.logprob_limit
        if not gap <= limit:  # NaN too
            raise ImageRLError(
                f"sampler and trainer disagree by {gap:.2g} on a log-prob (rollout.max_logprob_diff "
                f"is {limit:g}); use engine.precision=fp32, or raise the limit if bfloat16 explains it"
            )

    def _metrics(
        self, scores: RewardScores, rewards: np.ndarray, advantages: AdvantageOutput, updates: list[Metrics]
    ) -> Metrics:
        valid = rewards[np.isfinite(rewards)]
        metrics: Metrics = {
            "reward/mean": float(valid.mean()) if len(valid) else math.nan,
            "reward/std": float(valid.std(ddof=1)) if len(valid) > 1 else math.nan,
            "reward/failed": float(len(rewards) - len(valid)),
        }
        failed = self.engine.sum_over_ranks(scores.failures)
        metrics |= {f"reward/{label}/failed": count for label, count in failed.items()}
        for name, values in join_components(
            self.engine.gather_objects((len(scores.totals), scores.components))
        ).items():
            known = values[np.isfinite(values)]
            metrics[f"reward/{name}/mean"] = float(known.mean()) if len(known) else math.nan
            metrics[f"reward/{name}/std"] = float(known.std(ddof=1)) if len(known) > 1 else math.nan
        metrics |= {f"advantages/{name}": value for name, value in advantages.metrics.items()}
        metrics |= update_metrics(updates, on_policy=self.algorithm.updates_per_rollout == 1)
        timing = self.timer.metrics()
        return metrics | timing | {"images_per_s": len(rewards) / timing["time/step_s"]}


def replay_gap(inputs: LossInputs, part: TrainBatch) -> Tensor:
    """|trainer's log-prob before any update − sampler's| [B, N], 0 where masked."""
    return masked((inputs.old_logprobs - part.rollout_logprobs).abs(), part.action_mask)


def update_metrics(updates: Sequence[Metrics], on_policy: bool) -> Metrics:
    """Means over the actions of the last update, where the policy has moved furthest from the rollout. The replay
    gap is that of the first. With one update the ratio is 1 by design, and the log says so."""
    made = [update for update in updates if update]
    metrics: Metrics = {"policy/updates": float(len(made)), "policy/ratio_is_one_expected": float(on_policy)}
    if not made:
        return metrics
    first, last = made[0], made[-1]
    actions = last["actions"]
    names = {
        "policy/entropy": "entropy",
        "policy/ratio_mean": "ratio",
        "policy/ratio_deviation": "ratio_deviation",
        "policy/clip_low": "clip_low",
        "policy/clip_high": "clip_high",
        "policy/old_kl": "old_kl",
        "kl/k1": "kl_k1",
        "kl/k2": "kl_k2",
        "kl/k3": "kl_k3",
    }
    metrics |= {key: last[name] / actions for key, name in names.items() if name in last}
    return metrics | {
        "loss": last["loss"],
        "grad_norm": last["grad_norm"],
        "lr": last["lr"],
        "rollout/logprob_diff_mean": first["replay_gap"] / first["actions"],
        "rollout/logprob_diff_max": first["replay_gap_max"],
    }


def train_on(batch: TrainBatch, advantages: AdvantageOutput) -> TrainBatch:
    """The batch with its advantages; samples without a usable reward lose all their actions."""
    valid = advantages.valid.to(batch.action_mask.device)
    return replace(
        batch,
        advantages=advantages.advantages.to(batch.tokens.device),
        action_mask=batch.action_mask & valid[:, None],
    )


def merge_scores(parts: Sequence[RewardScores]) -> RewardScores:
    """Scores of consecutive requests as one."""
    failures: dict[str, int] = {}
    for part in parts:
        for label, count in part.failures.items():
            failures[label] = failures.get(label, 0) + count
    return RewardScores(
        totals=np.concatenate([part.totals for part in parts]),
        components=join_components([(len(part.totals), part.components) for part in parts]),
        failures=failures,
        reasons={label: reason for part in parts for label, reason in part.reasons.items()},
    )


def join_components(parts: Sequence[tuple[int, Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Components of consecutive samples as one; NaN where a part lacks one, as when a reward failed there."""
    names = dict.fromkeys(name for _, components in parts for name in components)
    return {
        name: np.concatenate([components.get(name, np.full(size, np.nan)) for size, components in parts])
        for name in names
    }
