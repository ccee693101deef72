"""One training step: roll out, score, compare within groups, update.

The trainer knows a `Policy` and a `RewardScorer` only by their Protocols, and the machinery below by `Engine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imagerl.models.base import Policy
from imagerl.rl.algorithms.advantages import AdvantageInputs, AdvantageOutput, moved_mean, shuffled
from imagerl.rl.algorithms.flow_matching_losses import old_policy_decay
from imagerl.rl.algorithms.loading import load_advantages
from imagerl.rl.config.train import Recipe
from imagerl.rl.data.curriculum import CurriculumSampler
from imagerl.rl.data.seeding import GroupedSampler, generator
from imagerl.rl.engine.engine import OLD, Engine
from imagerl.rl.engine.host_memory import HostMemory
from imagerl.rl.rollout.engine import Rollout, Rollouts
from imagerl.rl.rollout.picture_stats import group_stats, mean_of_groups
from imagerl.rl.rollout.scores import average_decodes, component, merge_scores, scores_of_half
from imagerl.rl.training.half import Half, train_on
from imagerl.rl.training.halves import FLOW, halves_in_training
from imagerl.rl.training.resampling import Drawn, resample
from imagerl.rl.training.reward_stats import mixing_metrics, variance_split
from imagerl.rl.training.step_metrics import Metrics, PhaseTimer, refuse_failures, reward_metrics
from imagerl.rl.types import Prompt, RewardScores, RolloutGroup

Batches = list[Any]  # one per half


class Trainer:
    """A trainer for every algorithm of `rl.config.algorithm_table` on the tokens of the autoregressive half, every
    one of `rl.config.flow_table` on the denoising steps of the decoder, or both in one step, from the same rewards or
    each from its own."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        sampler: GroupedSampler,
        rollouts: Rollouts,
        engine: Engine,
    ) -> None:
        self.recipe = recipe
        self.algorithm = recipe.algorithm
        self.policy = policy
        self.sampler = sampler
        self.rollouts = rollouts
        self.engine = engine
        self._begun: int | None = None  # the step whose rollout is under way
        self.halves = halves_in_training(recipe, policy, engine.gather_objects)
        self.advantages = load_advantages(recipe.algorithm)
        # Of each half's rewards so far, for that baseline; None: there were none.
        self.moving_means: dict[str, float | None] = {half.name: None for half in self.halves}
        flow = recipe.algorithm.flow
        self.old_policy = flow.old_policy if flow else None
        if self.old_policy:
            engine.keep_average(OLD, part=f"{FLOW}." if len(self.halves) > 1 else "")
        synchronise = torch.cuda.synchronize if engine.device.type == "cuda" else None
        self.timer = PhaseTimer(synchronise)
        self.host_memory = HostMemory()
        self._asked: list[int] = []  # prompts of the present step, by index, in the order of their scores

    def step(self, step: int) -> Metrics:
        """Train on the prompts of `step` (counted from 0); returns what to log."""
        self.timer.start()
        self._asked = []
        rollout = self._roll_out(step)
        groups = rollout.groups
        if self.algorithm.max_resamples:
            # Which groups are silent is known from rewards only, so here scoring cannot overlap with the reference.
            groups, scores, drawn = resample(
                groups,
                merge_scores(self._collect(rollout)),
                self.sampler.others(step),
                self.algorithm.max_resamples,
                draw=lambda prompts: self._draw(prompts, step),
                gather=self.engine.gather_objects,
                rank=self.engine.rank,
            )
            self.policy.release_sampler()
            batches = self._score_frozen(self._assemble(groups, step))
        else:
            self.policy.release_sampler()
            batches = self._score_frozen(self._assemble(groups, step))  # rewards are still being computed
            scores = drawn = merge_scores(self._collect(rollout))
        drawn = merge_scores(self.engine.gather_objects(drawn))
        refuse_failures(drawn, self.recipe.rewards.max_failure_rate)
        with self.timer("update"), self._only_what_trains():
            advantages = self._advantages(scores, batches, step)
            batches = [train_on(batch, output) for batch, output in zip(batches, advantages, strict=True)]
            batches = [half.select(batch) for half, batch in zip(self.halves, batches, strict=True)]
            updates = [self._update(batches) for _ in range(self.algorithm.updates_per_rollout)]
        looks = self._looks(groups)
        metrics = self._metrics(drawn, advantages, updates) | looks  # which hold the time that looking took
        if self.recipe.rollout.max_staleness:
            metrics["rollout/age"] = float(step - rollout.version)
        for half, own in zip(self.halves, zip(*updates, strict=True), strict=True):
            half.after_step(step, own)
        self._renew_reference(step)
        metrics |= self._move_old_policy() | self._learn_of_prompts(drawn)
        return metrics

    # ---- what outlives a step ------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        """Return all but weights and optimizer that the next step depends on, as JSON takes it."""
        state: dict[str, object] = {"moving_means": self.moving_means}
        if self._begun is not None:
            state["rollout"] = {"step": self._begun, "version": self.rollouts.published()[0]}
        if isinstance(self.sampler, CurriculumSampler):
            state["curriculum"] = self.sampler.state()
        for half in self.halves:
            state |= half.state()
        return state

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the state held in tensors: the reference, where it is no longer the model that the run began from, and
        the older weights that a rollout under way is drawn by."""
        tensors = {"reference": self.policy.reference_state()} if self.algorithm.reference_every else {}
        if self._begun is not None:
            tensors["published"] = dict(self.rollouts.published()[1])
        return tensors

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from what `state` and `tensors` returned."""
        self.moving_means |= state.get("moving_means", {})
        if isinstance(self.sampler, CurriculumSampler):
            self.sampler.restore(state["curriculum"])
        for half in self.halves:
            half.restore(state)
        if "reference" in tensors:
            self.policy.load_reference(tensors["reference"])
        if self.old_policy:
            self.engine.keep_average(OLD, tensors[OLD])
        if begun := state.get("rollout"):  # drawn again, by the same weights
            self._begin(begun["step"], begun["version"], tensors["published"])

    def _learn_of_prompts(self, drawn: RewardScores) -> Metrics:
        """Tell a curriculum how all prompts of the step, of all ranks, have gone."""
        if not isinstance(self.sampler, CurriculumSampler):
            return {}
        asked = [index for rank in self.engine.gather_objects(self._asked) for index in rank]
        values = component(drawn, self.sampler.settings.success)
        return self.sampler.learn(asked, values.reshape(len(asked), -1))

    def _move_old_policy(self) -> Metrics:
        if not self.old_policy:
            return {}
        decay = old_policy_decay(self.engine.updates, **self.old_policy.model_dump())
        self.engine.move_average(OLD, decay)
        return {"flow/old_decay": decay}

    def _renew_reference(self, step: int) -> None:
        every = self.algorithm.reference_every
        if every and (step + 1) % every == 0:
            with self.engine.gathered_parameters():
                self.policy.freeze_reference()

    # ---- rollout and rewards -------------------------------------------------------------------------------

    @property
    def _own(self) -> slice:
        """The places of this rank's prompts among the step's: as many as other ranks have, or one less."""
        count, ranks, rank = self.sampler.prompts_per_step, self.engine.world_size, self.engine.rank
        return slice(count * rank // ranks, count * (rank + 1) // ranks)

    def _roll_out(self, step: int) -> Rollout:
        """Collect the rollout of the step; where it may be an update old, the next one then begins with the present
        weights."""
        with self.timer("rollout"):
            if self._begun is None:
                self._begin(step, version=step)
            rollout, self._begun = self.rollouts.collect(step), None
            if self.recipe.rollout.max_staleness and step + 1 < self.recipe.run.steps:
                self._begin(step + 1, version=step)
        self._asked += [group.prompt.index for group in rollout.groups]
        return rollout

    def _begin(self, step: int, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        self.rollouts.publish(version, weights)
        self._start(step, self.sampler.step(step)[self._own])
        self._begun = step

    def _start(self, step: int, prompts: Sequence[Prompt]) -> None:
        flow = next(filter(None, (half.sampling(step) for half in self.halves)), None)
        self.rollouts.start(step, prompts, flow)

    def _collect(self, rollout: Rollout) -> list[RewardScores]:
        with self.timer("reward_wait"):
            scores = rollout.scores()
        self.engine.leave_cores(0)
        return scores

    def _looks(self, groups: Sequence[RolloutGroup]) -> Metrics:
        """Measure the pictures of all ranks, and how much those of a prompt differ."""
        if not self.recipe.monitors.pictures:
            return {}
        with self.timer("monitors"):
            rows = self.engine.gather_objects([group.looks or group_stats(group) for group in groups])
        return mean_of_groups([row for rank in rows for row in rank])

    def _draw(self, prompts: Sequence[Prompt], step: int) -> Drawn | None:
        """Draw more groups of this step with their scores."""
        with self.timer("rollout"):
            self._start(step, prompts)
            rollout = self.rollouts.collect(step)
        self._asked += [group.prompt.index for group in rollout.groups]
        scores = self._collect(rollout)
        return (rollout.groups, merge_scores(scores)) if rollout.groups else None

    def _only_what_trains(self) -> AbstractContextManager[None]:
        """Leave the device to what trains, where the recipe asks for it."""
        if not self.recipe.engine.offload_frozen:
            return nullcontext()
        frozen = (*self.policy.parts().values(), *self.policy.references())
        return self.host_memory.holding(frozen, but=self.engine.unwrapped)

    def _assemble(self, groups: Sequence[RolloutGroup], step: int) -> Batches:
        return [half.assemble(groups, step) for half in self.halves]

    def _microbatches(self, batches: Batches) -> list[tuple[Batches, bool]]:
        """Cut the batches of all halves into the same token sequences, `micro_batch_size` at a time.

        A rank with a prompt less than others repeats its last microbatch, marked False, where it would have fewer of
        them: every rank must take part in the exchanges of every forward pass. What comes of those does not count."""
        size = self.recipe.engine.micro_batch_size
        each = [half.per_sequence for half in self.halves]
        own = self._own.stop - self._own.start
        sequences = len(batches[0].action_mask) // each[0]
        most = -(-self.sampler.prompts_per_step // self.engine.world_size) * sequences // own
        parts = [
            [batch.rows(slice(start * m, (start + size) * m)) for batch, m in zip(batches, each, strict=True)]
            for start in range(0, sequences, size)
        ]
        rounds = range(-(-most // size))
        return [(parts[min(number, len(parts) - 1)], number < len(parts)) for number in rounds]

    def _scores(self, parts: Batches) -> Sequence[Any]:
        """Call the module on a microbatch; returns one result for every half."""
        arguments = [half.arguments(part) for half, part in zip(self.halves, parts, strict=True)]
        with self.engine.autocast():
            if len(self.halves) == 1:
                return [self.engine.module(*arguments[0])]
            scores: Sequence[Any] = self.engine.module(*arguments)
            return scores

    @torch.no_grad()
    def _score_frozen(self, batches: Batches) -> Batches:
        """Score what needs no gradient: by the references, and by the trainer itself before several updates."""
        needs_old = any(half.needs_old for half in self.halves)
        found: list[dict[str, list[Tensor]]] = [{} for _ in self.halves]
        with self.timer("reference"), self.engine.autocast():
            for parts, counts in self._microbatches(batches):
                with self.engine.averaged(OLD):
                    olds = self._scores(parts) if needs_old else [None] * len(parts)
                for half, part, old, fields in zip(self.halves, parts, olds, found, strict=True):
                    for name, value in half.frozen(part, old).items():
                        fields.setdefault(name, []).extend([value] if counts else [])
        return [
            replace(batch, **{name: torch.cat(values) for name, values in fields.items()})
            for batch, fields in zip(batches, found, strict=True)
        ]

    # ---- update --------------------------------------------------------------------------------------------

    def _advantages(self, scores: RewardScores, batches: Batches, step: int) -> list[AdvantageOutput]:
        """Compute the advantages of this rank's samples from the rewards of all ranks, once for every half: each is
        normalised among its own rewards."""
        outputs = []
        for half, batch in zip(self.halves, batches, strict=True):
            own_inputs = half.advantage_inputs(self._scores_of(half, scores), batch)
            inputs = AdvantageInputs.join(self.engine.gather_objects(own_inputs))
            mean = self.moving_means[half.name]
            inputs = replace(inputs, moving_mean=mean)
            if self.algorithm.shuffle_rewards:
                seed = self.recipe.run.seed, "shuffle", step
                inputs = replace(
                    inputs,
                    rewards=shuffled(inputs.rewards, generator(*seed)),
                    # A fresh generator of the same seed: the same order as the totals, which are made of these.
                    components=shuffled(inputs.components, generator(*seed)),
                    credit=inputs.credit
                    if inputs.credit is None
                    else shuffled(inputs.credit, generator(*seed)),
                )
            self.moving_means[half.name] = moved_mean(mean, inputs.rewards, self.algorithm.baseline_decay)
            # `join` puts ranks one after another, in the order of the step's prompts.
            per_prompt = len(batch.action_mask) // (self._own.stop - self._own.start)
            mine = slice(self._own.start * per_prompt, self._own.stop * per_prompt)
            output = self.advantages(inputs)
            if inputs.credit is not None:
                output = output.with_credit(inputs.credit)
            outputs.append(output.rows(mine))
        return outputs

    def _scores_of(self, half: Half[Any], scores: RewardScores) -> RewardScores:
        return scores_of_half(scores, half.name, self.recipe.rewards.labels_of(half.name))

    def _update(self, batches: Batches) -> list[Metrics]:
        """Make one optimizer step over all microbatches; returns for every half sums over ranks, and the norm of
        the gradient."""
        denominators = [
            self.engine.sum_over_ranks({"n": half.denominator(batch)})["n"]
            for half, batch in zip(self.halves, batches, strict=True)
        ]
        # Counted over all ranks, so that all of them return here and none waits for the others at a barrier.
        if not all(denominators):
            return [{} for _ in self.halves]
        sums: list[dict[str, Tensor]] = [{} for _ in self.halves]
        worst = [0.0 for _ in self.halves]
        microbatches = self._microbatches(batches)
        for number, (parts, counts) in enumerate(microbatches, 1):
            with self.engine.microbatch(last=number == len(microbatches)):
                losses = [
                    half.loss(scores, part, denominator)
                    for half, scores, part, denominator in zip(
                        self.halves, self._scores(parts), parts, denominators, strict=True
                    )
                ]
                self.engine.backward(torch.stack([output.loss for output in losses]).sum() * counts)
            for index, output in enumerate(losses if counts else ()):
                worst[index] = max_or_nan(worst[index], float(output.gap))
                for name, value in output.sums.items():
                    total = sums[index].get(name, torch.zeros((), dtype=torch.float64))
                    # float64, whatever a loss sums in: float32 would lose digits over many microbatches.
                    sums[index][name] = total + value.double().cpu()
        gaps = [max_or_nan(*column) for column in zip(*self.engine.gather_objects(worst), strict=True)]
        # Before `engine.step`, so that a refused step leaves the weights as they were.
        for half, gap in zip(self.halves, gaps, strict=True):
            half.refuse_gap(gap)
        names = [half.name for half in self.halves]
        parts_of_norm = self.engine.gradient_norms(names) if len(names) > 1 else {}
        grad_norm = self.engine.step()
        common = {"grad_norm": grad_norm, "lr": self.engine.lr}
        return [
            self.engine.sum_over_ranks(total)
            | {"replay_gap_max": gap, **common}
            | own_norm(name, parts_of_norm)
            for name, total, gap in zip(names, sums, gaps, strict=True)
        ]

    def _metrics(
        self, drawn: RewardScores, advantages: list[AdvantageOutput], updates: list[list[Metrics]]
    ) -> Metrics:
        rollout = self.recipe.rollout
        metrics = reward_metrics(drawn)
        mixed = {f"of_{half.name}/": self._scores_of(half, drawn) for half in self.halves}
        for prefix, scores in (mixed if drawn.halves else {"": drawn}).items():
            metrics |= mixing_metrics(
                average_decodes(scores, rollout.decodes),
                rollout.group_size,
                self.algorithm.scale_rewards,
                self.algorithm.decouple_rewards,
                prefix,
            )
        split = variance_split(drawn.totals, rollout.group_size, rollout.decodes)
        metrics |= {f"reward/variance/{name}": value for name, value in split.items()}
        for half, output, own in zip(self.halves, advantages, zip(*updates, strict=True), strict=True):
            metrics |= {f"{half.prefix}advantages/{k}": v for k, v in output.metrics.items()}
            metrics |= half.metrics(own)
        if self.algorithm.max_resamples:
            # Halves count their own samples: one a token sequence, or one each of its pictures.
            samples = sum(self.engine.gather_objects(len(advantages[-1].valid)))
            trained = samples / (rollout.group_size * self.halves[-1].per_sequence)
            groups = len(drawn.totals) / (rollout.group_size * rollout.decodes)
            metrics["rollout/resampled_groups"] = groups - trained
        timing = self.timer.metrics()
        images = float(len(drawn.totals))
        return metrics | timing | {"rollout/images": images, "images_per_s": images / timing["time/step_s"]}


def max_or_nan(*values: float) -> float:
    """Return the largest, or NaN where there is one."""
    # Python's max drops a NaN that is not its first argument, and with it the fault; np.max keeps it.
    return float(np.max(values))


def own_norm(half: str, norms: Mapping[str, float]) -> Metrics:
    """Return a half's own gradient norm, and its part of the squared norm of both."""
    if not norms:
        return {}
    total = sum(norm**2 for norm in norms.values())
    return {"own_grad_norm": norms[half], "own_grad_part": norms[half] ** 2 / total if total else 0.0}
