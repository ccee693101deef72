"""Drawing groups of pictures: prompts in, tokens, log-probs and pixels out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from imagerl.models.base import Policy
from imagerl.rl.data.seeding import generator
from imagerl.rl.engine.engine import OLD
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.reading import read_picture
from imagerl.rl.types import (
    Canvas,
    FlowSampling,
    FlowTrajectory,
    Prompt,
    RewardRequest,
    RewardScorer,
    RewardScores,
    RolloutGroup,
    Rows,
    SamplingParams,
    Source,
    Thoughts,
    TokenTrajectory,
    repeat,
    select,
)

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe
    from imagerl.rl.engine.engine import Engine

Autocast = Callable[[], AbstractContextManager[object]]


def training_sampling(recipe: Recipe) -> SamplingParams:
    """Return the sampling that a recipe trains with."""
    settings = recipe.rollout
    return SamplingParams(
        settings.temperature,
        settings.guidance,
        settings.flow_steps,
        settings.shared_noise,
        settings.decodes,
        settings.token_guidance,
        settings.thought_tokens,
    )


def to_uint8(pictures: Tensor) -> np.ndarray:
    """Convert [B, 3, H, W] in [0, 1] to [B, H, W, 3] uint8, rounded to nearest."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def with_pictures(prompt: Prompt) -> Prompt:
    """Return the prompt with its pictures opened, RGB.

    Raises ImageRLError when a file is no picture that can be read."""
    paths = {name: value for name, value in prompt.columns.items() if isinstance(value, Path | bytes)}
    if not paths:
        return prompt
    return replace(
        prompt, columns={**prompt.columns, **{name: read_picture(path, name) for name, path in paths.items()}}
    )


def reward_request(groups: Sequence[RolloutGroup], step: int = 0, steps: int = 0) -> RewardRequest:
    """Make the request that shows rewards some groups of equal size, at a training step of so many."""
    size = len(groups[0].images)
    decodes = size // len(groups[0].tokens)
    repeated = [group.prompt for group in groups for _ in range(size)]
    return RewardRequest(
        prompts=[prompt.text for prompt in repeated],
        completions=[row for group in groups for row in group.tokens.tolist() for _ in range(decodes)],
        images=np.concatenate([group.images for group in groups]),
        columns={name: [prompt.columns[name] for prompt in repeated] for name in groups[0].prompt.columns},
        group_size=size,
        step=step,
        progress=step / steps if steps else 0.0,
    )


def replayed(policy: Policy, groups: Sequence[RolloutGroup]) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Return what the actions of groups are scored again by: rows of their prompts, image tokens [B, T], and of all N
    actions, thoughts before the image tokens among them, the mask and the log-probs of the rollout, [B, N]."""
    encoded = policy.encode([group.prompt for group in groups], to_draw=False)
    tokens, mask, logprobs = (
        torch.cat(rows)
        for rows in zip(*((g.tokens, g.action_mask, g.rollout_logprobs) for g in groups), strict=True)
    )
    parts = [group.thoughts for group in groups if group.thoughts]
    if not parts:
        return repeat(encoded, len(groups[0].tokens)), tokens, mask, logprobs
    thoughts = Thoughts(*(torch.cat([getattr(part, name) for part in parts]) for name in Thoughts.__slots__))
    return (
        policy.after_thoughts(encoded, thoughts),
        tokens,
        torch.cat([thoughts.action_mask, mask], dim=1),
        torch.cat([thoughts.rollout_logprobs, logprobs], dim=1),
    )


class RolloutEngine:
    """Samples groups from a policy. Sample g of a prompt uses random numbers of its own, seeded by (run seed,
    occasion, prompt index, g): a batch can be drawn again bit for bit, or one sample of it alone."""

    def __init__(
        self, policy: Policy, sampling: SamplingParams, seed: int = 0, autocast: Autocast = nullcontext
    ) -> None:
        self.policy = policy
        self.sampling = sampling
        self.seed = seed
        self.autocast = autocast

    def uniforms(self, occasion: int | str, prompts: Sequence[Prompt], group_size: int) -> Tensor:
        """Draw [P·G, T] float64 in [0, 1): one number per token."""
        count = self.policy.prompts.canvas(prompts[0]).tokens
        return self._uniforms("tokens", count, occasion, prompts, group_size)

    def _uniforms(
        self, of: str, count: int, occasion: int | str, prompts: Sequence[Prompt], group_size: int
    ) -> Tensor:
        rows = [
            torch.rand(
                count,
                generator=generator(self.seed, of, occasion, prompt.index, sample),
                dtype=torch.float64,
            )
            for prompt in prompts
            for sample in range(group_size)
        ]
        return torch.stack(rows)

    def trajectory(
        self, prompts: Sequence[Prompt], group_size: int, occasion: int | str
    ) -> tuple[Rows, Thoughts | None, TokenTrajectory]:
        """Draw the tokens [B] of prompts of one canvas: encoded prompts, thoughts where `thought_tokens` asks for them,
        and what follows. With thoughts there is a row of the prompts for each sample."""
        encoded, thoughts = self.policy.encode(prompts), None
        if count := self.sampling.thought_tokens:
            uniforms = self._uniforms("thoughts", count, occasion, prompts, group_size)
            thoughts = self.policy.think(encoded, uniforms, self.sampling)
            encoded = self.policy.after_thoughts(encoded, thoughts)
        uniforms = self.uniforms(occasion, prompts, group_size)
        return encoded, thoughts, self.policy.sample_tokens(encoded, uniforms, self.sampling)

    def thoughts_of(self, groups: Sequence[RolloutGroup]) -> list[str]:
        """Return what was written before the first sample of each group, "" for nothing."""
        return [self.policy.thought_texts(one.thoughts)[0] if one.thoughts else "" for one in groups]

    def noise(self, occasion: int | str, prompts: Sequence[Prompt], group_size: int) -> Tensor | None:
        """Draw [P·G·M, C, h, w] decoder noise; with `shared_noise` the m-th is the same for all samples of a prompt.
        None for a decoder that needs none."""
        shape = self.policy.prompts.canvas(prompts[0]).noise
        if shape is None:
            return None
        rows = []
        for prompt, sample, decode in self._decodes(prompts, group_size):
            own = 0 if self.sampling.shared_noise else sample
            key = (self.seed, "noise", occasion, prompt.index, own, *([decode] if decode else []))
            rows.append(torch.randn(shape, generator=generator(*key)))
        return torch.stack(rows)

    def step_noise(
        self, occasion: int | str, prompts: Sequence[Prompt], group_size: int, steps: int
    ) -> Tensor:
        """Draw [P·G·M, S, C, h, w] noise of stochastic denoising steps, each picture's own."""
        noise = self.policy.prompts.canvas(prompts[0]).noise
        assert noise is not None
        shape = (steps, *noise)
        rows = [
            torch.randn(
                shape, generator=generator(self.seed, "steps", occasion, prompt.index, sample, decode)
            )
            for prompt, sample, decode in self._decodes(prompts, group_size)
        ]
        return torch.stack(rows)

    def _decodes(self, prompts: Sequence[Prompt], group_size: int) -> Iterator[tuple[Prompt, int, int]]:
        return product(prompts, range(group_size), range(self.sampling.decodes))

    def at(self, temperature: float) -> RolloutEngine:
        """Return an engine that draws with the same random numbers at another temperature."""
        sampling = replace(self.sampling, temperature=temperature)
        return RolloutEngine(self.policy, sampling, self.seed, self.autocast)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        occasion: int | str,
        decode_chunk: int | None = None,
        sample_chunk: int | None = None,
        flow: FlowSampling | None = None,
    ) -> Iterator[list[RolloutGroup]]:
        """Yield the groups of `decode_chunk` prompts at a time, so that scoring can begin with the first while
        the next are drawn. Tokens of `sample_chunk` prompts are sampled together: the more, the faster and the
        more memory for keys and values. None: all at once.

        `occasion` names the use of the random numbers: a training step, or an evaluation. With `flow` the decoder
        draws as it says and the groups keep its stochastic steps."""
        for together in self._chunks(prompts, sample_chunk):
            together = [with_pictures(prompt) for prompt in together]
            encoded, thoughts, trajectory = self.trajectory(together, group_size, occasion)
            first = 0
            for part in _chunks(together, decode_chunk):
                own = slice(first, first + len(part))
                first += len(part)
                samples = slice(own.start * group_size, own.stop * group_size)
                given = select(encoded, samples if thoughts else own)
                rows = trajectory.rows(samples)
                images, steps = self._decode(part, given, rows, group_size, occasion, flow)
                yield list(_groups(part, thoughts and thoughts.rows(samples), rows, images, steps))

    def _chunks(self, prompts: Sequence[Prompt], size: int | None) -> Iterator[Sequence[Prompt]]:
        """Yield at most `size` prompts at a time whose pictures are of the same sizes."""
        alike: dict[Canvas, list[Prompt]] = {}
        for prompt in prompts:
            alike.setdefault(self.policy.prompts.canvas(prompt), []).append(prompt)
        for same in alike.values():
            yield from _chunks(same, size)

    def _decode(
        self,
        prompts: Sequence[Prompt],
        encoded: Rows,
        trajectory: TokenTrajectory,
        group_size: int,
        occasion: int | str,
        flow: FlowSampling | None,
    ) -> tuple[np.ndarray, FlowTrajectory | None]:
        noise = self.noise(occasion, prompts, group_size)
        with self.autocast():
            if flow is None:
                return to_uint8(self.policy.decode(encoded, trajectory, noise, self.sampling)), None
            if self.policy.flow is None or noise is None:
                raise ImageRLError("the decoder does not train: call train_decoder() first")
            step_noise = self.step_noise(occasion, prompts, group_size, len(flow.window))
            pictures, steps = self.policy.flow.decode_steps(encoded, trajectory, noise, step_noise, flow)
        return to_uint8(pictures), steps


@dataclass(frozen=True, slots=True)
class Rollout:
    """What was drawn for a training step: this process's groups, in the order of its prompts."""

    groups: list[RolloutGroup]
    version: int  # the step before which the weights that drew them were the present ones
    scores: Callable[[], list[RewardScores]]  # waits for the parts' scores, in order; once, and collective


class Rollouts(Protocol):
    """Where groups come from: `LocalRollouts` or `rl.rollout.ray_rollouts.RayRollouts`. All collective."""

    scorer: RewardScorer

    def wait_until_ready(self) -> None:
        """Return when it can draw. Raises ImageRLError when it cannot."""
        ...

    def publish(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Let the weights before step `version`, the present ones or the main process's given, draw from now on."""
        ...

    def start(self, step: int, prompts: Sequence[Prompt], flow: FlowSampling | None) -> None:
        """Begin to draw the groups of this process's prompts, and to score them."""
        ...

    def collect(self, step: int) -> Rollout:
        """Wait until what was started for the step is drawn."""
        ...

    def published(self) -> tuple[int, Mapping[str, Tensor]]:
        """Return version and, on the main process, weights of the last `publish`, for a run that goes on later."""
        ...

    def judged(self, engine: RolloutEngine) -> Source:
        """Return what draws held-out pictures as `engine` does, by the weights that it has now."""
        ...

    def close(self) -> None: ...


class LocalRollouts:
    """Rollouts in this process, with the weights that train: drawn when they are collected, not before, as nothing
    runs beside. Rewards score the first pictures while the next are drawn."""

    def __init__(self, recipe: Recipe, rollout: RolloutEngine, scorer: RewardScorer, engine: Engine) -> None:
        self.recipe = recipe
        self.rollout = rollout
        self.scorer = scorer
        self.engine = engine
        self.version = 0
        self._asked: tuple[Sequence[Prompt], FlowSampling | None] = (), None

    def wait_until_ready(self) -> None:
        """Do nothing: there is nothing to wait for."""

    def publish(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Lay the present weights out for sampling: the sampler has its own copy, which an update leaves behind."""
        with self.engine.gathered_parameters():
            self.rollout.policy.refresh_sampler()
        self.version = version

    def start(self, step: int, prompts: Sequence[Prompt], flow: FlowSampling | None) -> None:
        self._asked = prompts, flow

    def collect(self, step: int) -> Rollout:
        settings, (prompts, flow) = self.recipe.rollout, self._asked
        groups, tickets = [], []
        with self.engine.averaged(OLD):
            for chunk in self.rollout.generate(
                prompts, settings.group_size, step, settings.decode_chunk, settings.sample_chunk, flow
            ):
                tickets.append(self.scorer.submit(reward_request(chunk, step, self.recipe.run.steps)))
                self.engine.leave_cores(self.recipe.rewards.workers)
                groups += chunk
        return Rollout(groups, self.version, lambda: [self.scorer.collect(ticket) for ticket in tickets])

    def published(self) -> tuple[int, Mapping[str, Tensor]]:
        return self.version, {}

    def judged(self, engine: RolloutEngine) -> Source:
        return engine

    def close(self) -> None:
        """Do nothing: nothing runs beside."""


def _chunks(prompts: Sequence[Prompt], size: int | None) -> Iterator[Sequence[Prompt]]:
    size = size or max(len(prompts), 1)  # a rank may have none, as when others replace silent groups
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _groups(
    prompts: Sequence[Prompt],
    thoughts: Thoughts | None,
    trajectory: TokenTrajectory,
    images: np.ndarray,
    steps: FlowTrajectory | None,
) -> Iterator[RolloutGroup]:
    """Return the groups of some prompts, whose samples are those of thoughts, trajectory, images and steps."""
    size, drawn = len(trajectory.tokens) // len(prompts), len(images) // len(prompts)
    for number, prompt in enumerate(prompts):
        samples = slice(number * size, (number + 1) * size)
        own = trajectory.rows(samples)
        yield RolloutGroup(
            prompt=prompt,
            tokens=own.tokens,
            rollout_logprobs=own.rollout_logprobs,
            action_mask=own.action_mask,
            images=images[number * drawn : (number + 1) * drawn],
            flow=steps.part(number, len(prompts)) if steps is not None else None,
            thoughts=thoughts and thoughts.rows(samples),
        )
