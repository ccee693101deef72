"""The decoder's half of a training step: the choice of actions, their scores and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imagerl.models.base import Policy
from imagerl.rl.algorithms.advantages import AdvantageInputs
from imagerl.rl.algorithms.flow_kl import gaussian_kl, kl_as_flow_grpo
from imagerl.rl.algorithms.flow_losses import FLOW_LOSSES, FlowLossInputs
from imagerl.rl.algorithms.flow_matching_losses import MATCHING_LOSSES, MatchingInputs
from imagerl.rl.algorithms.kl import masked
from imagerl.rl.algorithms.losses import loss_denominator
from imagerl.rl.config.flow import FlowConfig
from imagerl.rl.config.train import Recipe
from imagerl.rl.data.seeding import generator
from imagerl.rl.errors import ImageRLError
from imagerl.rl.training.half import HalfLoss, reward_inputs
from imagerl.rl.training.step_metrics import Metrics
from imagerl.rl.types import (
    FlowSampling,
    FlowSchedule,
    LossOutput,
    RewardScores,
    RolloutGroup,
    Rows,
    repeat,
    select,
)

# name of a sum -> key of its mean per action
PER_ACTION = {
    "ratio": "ratio_mean",
    "ratio_deviation": "ratio_deviation",
    "clip_low": "clip_low",
    "clip_high": "clip_high",
    "old_kl": "old_kl",
    "kl": "kl",
    "positive": "nft_positive_error",
    "negative": "nft_negative_error",
    "old_distance": "old_distance",
}


@dataclass(slots=True)
class FlowBatch:
    """B pictures with N actions each, group-major: denoising steps, or noised copies of the finished latents. Both
    are points where the network is asked for a velocity."""

    schedule: FlowSchedule  # of the denoising steps, the same for all pictures
    condition: Rows  # [B / M, ...] of the token sequences
    points: Tensor  # [B, N, C, h, w]
    sigma: Tensor  # [B, N]
    latents: Tensor  # [B, S + 1, C, h, w] as in `FlowTrajectory`
    decodes: int  # M pictures of a token sequence
    noise: Tensor | None  # [B, N, C, h, w] of the noised copies; None for denoising steps
    rollout_logprobs: Tensor  # [B, S]
    action_mask: Tensor  # [B, N] bool; all False for a picture that must not train
    advantages: Tensor  # [B, 1] or [B, N]
    old_velocity: Tensor | None = (
        None  # [B, N, C, h, w] before several updates; None: the policy is the old one
    )
    ref_velocity: Tensor | None = None  # [B, N, C, h, w] of the frozen reference; None without KL

    def rows(self, which: slice) -> FlowBatch:
        """Select some of the pictures, all M of each token sequence, as views."""
        sequences = slice(which.start // self.decodes, -(-which.stop // self.decodes))

        def part(name: str) -> Any:
            value = getattr(self, name)
            if name == "condition":
                return select(value, sequences)
            return value[which] if isinstance(value, Tensor) else value

        return FlowBatch(**{name: part(name) for name in self.__slots__})


def window_at(settings: FlowConfig, steps: int, step: int, seed: int) -> range:
    """Return the stochastic denoising steps of training step `step` (from 0), the same for all samples and ranks.

    Never the last denoising step: nothing would take its noise out of the picture again. A random window
    (Flow-GRPO-Fast) lies anywhere; a sliding one (MixGRPO, arXiv 2507.21802) begins at the first step, moves on by
    one every `window_every` training steps, and begins anew after it has reached the end.
    """
    if settings.is_matching:
        return range(0)
    room = min(steps - 1, settings.window_stop or steps)
    if settings.window == "all":
        return range(room)
    places = room - settings.window_size + 1
    if settings.window == "sliding":
        start = step // settings.window_every % places
    else:
        start = int(torch.randint(places, (), generator=generator(seed, "window", step)))
    return range(start, start + settings.window_size)


class FlowHalf:
    """The decoder's half: it runs every algorithm of `rl.config.flow_table`."""

    name = "flow"
    prefix = "flow/"

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        settings, rollout = recipe.algorithm.flow, recipe.rollout
        assert settings is not None and policy.flow is not None
        self.recipe = recipe
        self.settings: FlowConfig = settings
        self.half = policy.flow
        self.needs_old = recipe.algorithm.updates_per_rollout > 1 or settings.old_policy is not None
        self.per_sequence = rollout.decodes
        self.guidance = rollout.guidance if settings.guidance is None else settings.guidance
        self.steps = settings.steps or rollout.flow_steps

    def sampling(self, step: int) -> FlowSampling:
        """Return the sampling of training step `step`'s rollout."""
        settings = self.settings
        window = window_at(settings, self.steps, step, self.recipe.run.seed)
        return FlowSampling(settings.sampler, settings.noise_level, window, self.guidance, self.steps)

    def assemble(self, groups: Sequence[RolloutGroup], step: int) -> FlowBatch:
        """Assemble the decoder's actions in some groups, without advantages yet."""
        trajectories = [group.flow for group in groups if group.flow is not None]
        if len(trajectories) != len(groups):
            raise ValueError("the rollout kept no denoising steps")
        condition = {
            name: torch.cat([trajectory.condition[name] for trajectory in trajectories])
            for name in trajectories[0].condition
        }
        latents = torch.cat([trajectory.latents for trajectory in trajectories])
        steps = self.half.schedule(self.sampling(step), latents.shape[2:])
        schedule = FlowSchedule(*(value.to(latents.device) for value in steps))
        if self.settings.is_matching:
            sigma, noise = (value.to(latents.device) for value in self._noised(groups, step))
            level = sigma[..., None, None, None]
            points = (1 - level) * latents + level * noise
        else:
            sigma, noise, points = schedule.sigma.expand(len(latents), -1), None, latents[:, :-1]
        return FlowBatch(
            schedule=schedule,
            condition=condition,
            points=points,
            sigma=sigma,
            latents=latents,
            decodes=self.per_sequence,
            noise=noise,
            rollout_logprobs=torch.cat([trajectory.rollout_logprobs for trajectory in trajectories]),
            action_mask=torch.ones(sigma.shape, dtype=torch.bool, device=latents.device),
            advantages=torch.zeros(len(latents), 1, device=latents.device),
        )

    def _noised(self, groups: Sequence[RolloutGroup], step: int) -> tuple[Tensor, Tensor]:
        """Draw noise levels [B, N], one in each N-th of (0, 1], and noises [B, N, C, h, w]: functions of the
        picture."""
        count = self.settings.points
        levels, noises = [], []
        for group in groups:
            assert group.flow is not None
            for number, latents in enumerate(group.flow.latents):
                draws = generator(self.recipe.run.seed, "match", step, group.prompt.index, number)
                place = 1 - torch.rand(count, generator=draws)
                levels.append((torch.arange(count) + place) / count)
                noises.append(torch.randn(count, *latents.shape[1:], generator=draws))
        return torch.stack(levels), torch.stack(noises)

    def arguments(self, part: FlowBatch) -> tuple[Rows, Tensor, Tensor, float]:
        """Return the network's arguments for a microbatch."""
        return repeat(part.condition, part.decodes), part.points, part.sigma, self.guidance

    def frozen(self, part: FlowBatch, old: Tensor | None) -> dict[str, Tensor]:
        """Return the velocities that need no gradient: the reference's, and the trainer's own before several
        updates."""
        fields = {}
        if self.settings.kl_coef:
            fields["ref_velocity"] = self.half.reference_velocity(*self.arguments(part))
        if old is not None and self.needs_old:
            fields["old_velocity"] = old
        return fields

    def advantage_inputs(self, scores: RewardScores, batch: FlowBatch) -> AdvantageInputs:
        """Compare a picture with those of the same tokens where there are several, else with its group."""
        size = batch.decodes if batch.decodes > 1 else self.recipe.rollout.group_size
        return reward_inputs(scores, size, batch.action_mask)

    def select(self, batch: FlowBatch) -> FlowBatch:
        """Return the batch as it is: all its denoising steps train."""
        return batch

    def denominator(self, batch: FlowBatch) -> float:
        """Count this rank's part of the loss's denominator: its pictures that train."""
        return loss_denominator(batch.action_mask, "sequence", batch.action_mask.shape[1])

    def loss(self, velocity: Tensor, part: FlowBatch, denominator: float) -> HalfLoss:
        """Compute the loss of a microbatch, from velocities [B, N, C, h, w] at its points."""
        if part.noise is not None:
            output, gap = self._matching_loss(velocity, part, denominator), torch.zeros(1)
        else:
            output, gap = self._step_loss(velocity, part, denominator)
        sums = output.metrics | {"loss": output.loss.detach(), "replay_gap": gap.sum()}
        return HalfLoss(output.loss, sums, gap.max())

    def _step_loss(self, velocity: Tensor, part: FlowBatch, denominator: float) -> tuple[LossOutput, Tensor]:
        """Return the loss, and |replayed − rollout's log-prob| [B, S] of the policy before any update."""
        schedule = part.schedule
        scores = self.half.score(velocity, part.latents, schedule)
        old_logprobs, old_kl, ref_kl = scores.logprobs.detach(), None, None
        if part.old_velocity is not None:
            old = self.half.score(part.old_velocity, part.latents, schedule)
            old_logprobs, old_kl = old.logprobs, gaussian_kl(scores.means, old.means, schedule.std)
        if part.ref_velocity is not None:
            reference = self.half.score(part.ref_velocity, part.latents, schedule).means
            if self.settings.kl_form == "exact":
                ref_kl = gaussian_kl(scores.means, reference, schedule.std)
            else:
                ref_kl = kl_as_flow_grpo(scores.means, reference, schedule.std, schedule.dt)
        inputs = FlowLossInputs(
            logprobs=scores.logprobs,
            old_logprobs=old_logprobs,
            ref_logprobs=None,
            advantages=part.advantages,
            action_mask=part.action_mask,
            denominator=denominator,
            std=schedule.std,
            dt=schedule.dt,
            old_kl=old_kl,
            ref_kl=ref_kl,
        )
        gap = masked((old_logprobs - part.rollout_logprobs).abs(), part.action_mask)
        return FLOW_LOSSES[self.settings.loss](inputs, **self._bounds()), gap

    def _matching_loss(self, velocity: Tensor, part: FlowBatch, denominator: float) -> LossOutput:
        assert part.noise is not None
        inputs = MatchingInputs(
            velocity=velocity,
            old_velocity=part.old_velocity,
            ref_velocity=part.ref_velocity,
            latents=part.latents[:, -1],
            noise=part.noise,
            sigma=part.sigma,
            advantages=part.advantages,
            action_mask=part.action_mask,
            denominator=denominator,
        )
        return MATCHING_LOSSES[self.settings.loss](inputs, **self._bounds())

    def _bounds(self) -> dict[str, object]:
        """Return the settings that the loss of this name takes."""
        settings = self.settings
        clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        own: dict[str, dict[str, Any]] = {
            "flow_grpo": clip,
            "grpo_guard": clip,
            "flow_dppo": {"kl_threshold": settings.kl_threshold},
            "nft": {"beta": settings.beta},
            "awm": {**clip, "weight": settings.weight},
        }
        return {"advantage_max": settings.advantage_max, "kl_coef": settings.kl_coef} | own[settings.loss]

    def refuse_gap(self, gap: float) -> None:
        """Raise ImageRLError, before the weights change, when a replayed step has another log-prob than in the
        rollout: then one of the two did not see what the other saw."""
        limit = self.settings.max_logprob_diff or (0.1 if self.recipe.engine.precision == "bf16" else 1e-5)
        if not gap <= limit:  # NaN too
            raise ImageRLError(
                f"rollout and replay disagree by {gap:.2g} on the log-prob of a denoising step "
                f"(algorithm.flow.max_logprob_diff is {limit:g}); use engine.precision=fp32, or raise the limit "
                "if bfloat16 or other kernels explain it"
            )

    def after_step(self, step: int, updates: Sequence[Metrics]) -> None:
        """Do nothing: nothing follows an update."""

    def metrics(self, updates: Sequence[Metrics]) -> Metrics:
        """Return means per action of the last update, and the replay gap of the first; see docs/run-folder.md."""
        made = [update for update in updates if update]
        if not made:
            return {"flow/updates": 0.0}
        first, last = made[0], made[-1]
        actions = last["actions"]
        metrics = {
            "flow/updates": float(len(made)),
            "flow/loss": last["loss"],
            "flow/lr": last["lr"] * (self.settings.lr or self.recipe.optim.lr) / self.recipe.optim.lr,
            "flow/logprob_diff_mean": first["replay_gap"] / first["actions"],
            "flow/logprob_diff_max": first["replay_gap_max"],
        }
        metrics |= {f"flow/{key}": last[name] / actions for name, key in PER_ACTION.items() if name in last}
        if "own_grad_norm" in last:
            metrics |= {"flow/grad_norm": last["own_grad_norm"], "flow/grad_part": last["own_grad_part"]}
        return metrics if self.settings.joint else metrics | {"grad_norm": last["grad_norm"]}

    def state(self) -> dict[str, object]:
        """Return nothing: only weights outlive a step."""
        return {}

    def restore(self, state: Mapping[str, object]) -> None:
        """Do nothing: there is nothing to restore."""
