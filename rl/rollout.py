"""Drawing groups of pictures: prompts in, tokens, log-probs and pixels out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from rl.seeding import generator
from rl.types import Policy, Prompt, RewardRequest, RolloutGroup, SamplingParams

Autocast = Callable[[], AbstractContextManager[object]]


def to_uint8(pictures: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [0, 1] -> [B, H, W, 3] uint8, rounded to nearest."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def reward_request(groups: Sequence[RolloutGroup]) -> RewardRequest:
    """What rewards get to see of some groups of equal size."""
    size = len(groups[0].images)
    repeated = [group.prompt for group in groups for _ in range(size)]
    return RewardRequest(
        prompts=[prompt.text for prompt in repeated],
        completions=[row for group in groups for row in group.tokens.tolist()],
        images=np.concatenate([group.images for group in groups]),
        columns={name: [prompt.columns[name] for prompt in repeated] for name in groups[0].prompt.columns},
        group_size=size,
    )


class RolloutEngine:
    """Samples groups from a policy. Sample g of a prompt uses random numbers of its own, seeded by (run seed,
    occasion, prompt index, g): a batch can be drawn again bit for bit, or one sample of it alone."""

    def __init__(self, policy: Policy, sampling: SamplingParams, seed: int, autocast: Autocast) -> None:
        self.policy = policy
        self.sampling = sampling
        self.seed = seed
        self.autocast = autocast

    def uniforms(self, occasion: int | str, prompts: Sequence[Prompt], group_size: int) -> Tensor:
        """[P·G, T] float64 in [0, 1): one number per token."""
        rows = [
            torch.rand(
                self.policy.num_actions,
                generator=generator(self.seed, "tokens", occasion, prompt.index, sample),
                dtype=torch.float64,
            )
            for prompt in prompts
            for sample in range(group_size)
        ]
        return torch.stack(rows)

    def noise(self, occasion: int | str, prompts: Sequence[Prompt], group_size: int) -> Tensor:
        """[P·G, C, h, w] decoder noise; with `shared_noise` the same for all samples of a prompt."""
        rows = [
            torch.randn(
                self.policy.latent_shape,
                generator=generator(
                    self.seed, "noise", occasion, prompt.index, 0 if self.sampling.shared_noise else sample
                ),
            )
            for prompt in prompts
            for sample in range(group_size)
        ]
        return torch.stack(rows)

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        occasion: int | str,
        chunk_prompts: int | None = None,
    ) -> Iterator[list[RolloutGroup]]:
        """Yields the groups of `chunk_prompts` prompts at a time, so that scoring can begin with the first.

        `occasion` names the use of the random numbers: a training step, or an evaluation."""
        size = chunk_prompts or len(prompts)
        for start in range(0, len(prompts), size):
            yield self._generate(prompts[start : start + size], group_size, occasion)

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Prompt], group_size: int, occasion: int | str
    ) -> list[RolloutGroup]:
        sampling = self.sampling
        prompt_ids, prompt_mask = self.policy.encode_prompts([prompt.text for prompt in prompts])
        uniforms = self.uniforms(occasion, prompts, group_size)
        trajectory = self.policy.sample_tokens(prompt_ids, prompt_mask, uniforms, sampling.temperature)
        noise = self.noise(occasion, prompts, group_size)
        with self.autocast():
            pictures = self.policy.decode(trajectory.hidden, noise, sampling.guidance, sampling.flow_steps)
        images = to_uint8(pictures)
        rows = [slice(i * group_size, (i + 1) * group_size) for i in range(len(prompts))]
        return [
            RolloutGroup(
                prompt=prompt,
                tokens=trajectory.tokens[row],
                rollout_logprobs=trajectory.rollout_logprobs[row],
                action_mask=trajectory.action_mask[row],
                images=images[row],
            )
            for prompt, row in zip(prompts, rows, strict=True)
        ]
