"""The decoder's half of a training step: which steps are actions, how they are scored, what is minimised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rl.config import Recipe
from rl.flow_config import FlowConfig
from rl.flow_kl import gaussian_kl, kl_as_flow_grpo
from rl.flow_losses import FLOW_LOSSES
from rl.losses import loss_denominator
from rl.matching_losses import MATCHING_LOSSES
from rl.seeding import generator
from rl.types import (
    FlowHalf,
    FlowLossInputs,
    FlowSampling,
    FlowSchedule,
    FlowTrajectory,
    LossOutput,
    MatchingInputs,
    RolloutGroup,
)


@dataclass(slots=True)
class FlowBatch:
    """B pictures with N actions each, group-major: denoising steps, or noised copies of the finished latents. Both
    are points where the network is asked for a velocity."""

    hidden: Tensor  # [B / M, R, D] of the token sequences
    points: Tensor  # [B, N, C, h, w]
    sigma: Tensor  # [B, N]
    latents: Tensor  # [B, S + 1, C, h, w] as in `FlowTrajectory`
    noise: Tensor | None  # [B, N, C, h, w] of the noised copies; None for denoising steps
    rollout_logprobs: Tensor  # [B, S]
    old_velocity: Tensor | None  # [B, N, C, h, w] before several updates; None: the policy is the old one
    ref_velocity: Tensor | None  # [B, N, C, h, w] of the frozen reference; None without KL
    action_mask: Tensor  # [B, N] bool; all False for a sample that must not train
    advantages: Tensor  # [B]

    def rows(self, which: slice) -> FlowBatch:
        """Some of the samples, as views."""

        def part(name: str) -> Any:
            tensor = getattr(self, name)
            return None if tensor is None else tensor[which]

        return FlowBatch(**{name: part(name) for name in self.__slots__})


def window_at(settings: FlowConfig, steps: int, step: int, seed: int) -> range:
    """The stochastic denoising steps of training step `step` (from 0), the same for all samples and ranks.

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


class FlowActor:
    """Scores the decoder's actions and says their loss; the trainer owns the order of things and the optimizer."""

    def __init__(self, recipe: Recipe, settings: FlowConfig, half: FlowHalf) -> None:
        rollout = recipe.rollout
        self.settings = settings
        self.half = half
        self.seed = recipe.run.seed
        self.several = recipe.algorithm.updates_per_rollout > 1
        self.guidance = rollout.guidance if settings.guidance is None else settings.guidance
        self.steps = settings.steps or rollout.flow_steps
        self.logprob_limit = settings.max_logprob_diff or (0.1 if recipe.engine.precision == "bf16" else 1e-5)

    def sampling(self, step: int) -> FlowSampling:
        """How the rollout of training step `step` draws."""
        window = window_at(self.settings, self.steps, step, self.seed)
        return FlowSampling(
            self.settings.sampler, self.settings.noise_level, window, self.guidance, self.steps
        )

    def assemble(self, groups: Sequence[RolloutGroup], step: int) -> FlowBatch:
        """The actions of some groups, without advantages yet."""
        trajectories = [group.flow for group in groups if group.flow is not None]
        if len(trajectories) != len(groups):
            raise ValueError("the rollout kept no denoising steps")
        hidden, latents, rollout_logprobs = (
            torch.cat([getattr(trajectory, name) for trajectory in trajectories])
            for name in FlowTrajectory.__slots__
        )
        if self.settings.is_matching:
            sigma, noise = self._noised(groups, step)
            sigma, noise = sigma.to(latents.device), noise.to(latents.device)
            level = sigma[..., None, None, None]
            points = (1 - level) * latents + level * noise
        else:
            sigma, noise = self._schedule(step, latents.device).sigma.expand(len(latents), -1), None
            points = latents[:, :-1]
        return FlowBatch(
            hidden=hidden,
            points=points,
            sigma=sigma,
            latents=latents,
            noise=noise,
            rollout_logprobs=rollout_logprobs,
            old_velocity=None,
            ref_velocity=None,
            action_mask=torch.ones(sigma.shape, dtype=torch.bool, device=latents.device),
            advantages=torch.zeros(len(latents), device=latents.device),
        )

    def _noised(self, groups: Sequence[RolloutGroup], step: int) -> tuple[Tensor, Tensor]:
        """Noise levels [B, M], one in each M-th of (0, 1], and noises [B, M, C, h, w]: functions of the sample."""
        levels, noises = [], []
        for group in groups:
            assert group.flow is not None
            shape = (self.settings.points, *group.flow.latents.shape[2:])
            for sample in range(len(group.images)):
                draws = generator(self.seed, "match", step, group.prompt.index, sample)
                place = 1 - torch.rand(shape[0], generator=draws)
                levels.append((torch.arange(shape[0]) + place) / shape[0])
                noises.append(torch.randn(shape, generator=draws))
        return torch.stack(levels), torch.stack(noises)

    def _schedule(self, step: int, device: torch.device) -> FlowSchedule:
        return FlowSchedule(*(value.to(device) for value in self.half.schedule(self.sampling(step))))

    def arguments(self, part: FlowBatch) -> tuple[Tensor, Tensor, Tensor, float]:
        """What the network scores a microbatch by."""
        return part.hidden, part.points, part.sigma, self.guidance

    def score_reference(self, part: FlowBatch) -> FlowBatch:
        """With the frozen reference's velocities, where there is a KL."""
        if not self.settings.kl_coef:
            return part
        return replace(part, ref_velocity=self.half.reference_velocity(*self.arguments(part)))

    def denominator(self, batch: FlowBatch) -> float:
        """This rank's part of what the loss is divided by: its samples that train."""
        return loss_denominator(batch.action_mask, "sequence", batch.action_mask.shape[1])

    def loss(self, velocity: Tensor, part: FlowBatch, denominator: float, step: int) -> tuple[LossOutput, Tensor]:
        """The loss of a microbatch, and |replayed − rollout's log-prob| [B, N] of the policy before any update."""
        if part.noise is not None:
            return self._matching_loss(velocity, part, denominator), torch.zeros_like(part.sigma)
        schedule = self._schedule(step, velocity.device)
        scores = self.half.score(velocity, part.latents, schedule)
        old_logprobs, old_kl = scores.logprobs.detach(), None
        if part.old_velocity is not None:
            old = self.half.score(part.old_velocity, part.latents, schedule)
            old_logprobs, old_kl = old.logprobs, gaussian_kl(scores.means, old.means, schedule.std)
        inputs = FlowLossInputs(
            logprobs=scores.logprobs,
            old_logprobs=old_logprobs,
            ref_logprobs=None,
            advantages=part.advantages[:, None],
            action_mask=part.action_mask,
            denominator=denominator,
            std=schedule.std,
            dt=schedule.dt,
            old_kl=old_kl,
            ref_kl=self._kl(scores.means, part, schedule),
        )
        gap = (old_logprobs - part.rollout_logprobs).abs()
        return FLOW_LOSSES[self.settings.loss](inputs, **self._bounds()), gap * part.action_mask

    def _kl(self, means: Tensor, part: FlowBatch, schedule: FlowSchedule) -> Tensor | None:
        if part.ref_velocity is None:
            return None
        reference = self.half.score(part.ref_velocity, part.latents, schedule).means
        if self.settings.kl_form == "exact":
            return gaussian_kl(means, reference, schedule.std)
        return kl_as_flow_grpo(means, reference, schedule.std, schedule.dt)

    def _matching_loss(self, velocity: Tensor, part: FlowBatch, denominator: float) -> LossOutput:
        assert part.noise is not None
        inputs = MatchingInputs(
            velocity=velocity,
            old_velocity=part.old_velocity,
            ref_velocity=part.ref_velocity,
            latents=part.latents[:, -1],
            noise=part.noise,
            sigma=part.sigma,
            advantages=part.advantages[:, None],
            action_mask=part.action_mask,
            denominator=denominator,
        )
        return MATCHING_LOSSES[self.settings.loss](inputs, **self._bounds())

    def _bounds(self) -> dict[str, Any]:
        """The settings that the loss of this name takes."""
        settings = self.settings
        common = {"advantage_max": settings.advantage_max, "kl_coef": settings.kl_coef}
        clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        own: dict[str, dict[str, Any]] = {
            "flow_grpo": clip,
            "grpo_guard": clip,
            "flow_dppo": {"kl_threshold": settings.kl_threshold},
            "nft": {"beta": settings.beta},
            "awm": {**clip, "weight": settings.weight},
        }
        return common | own[settings.loss]
