"""Drawing groups of pictures: prompts in, tokens, log-probs and pixels out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from imagerl.rl.data.prompt_pictures import with_pictures
from imagerl.rl.data.seeding import generator
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import (
    FlowSampling,
    FlowTrajectory,
    Policy,
    Prompt,
    RewardRequest,
    RolloutGroup,
    SamplingParams,
    TokenTrajectory,
)

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe

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
    )


def evaluation_sampling(recipe: Recipe) -> SamplingParams:
    """Return the sampling that a recipe is judged by: as in training where `eval` does not say otherwise, one picture
    of each token sequence. A decoder that trains at a guidance of its own is judged at that one."""
    training, settings, flow = training_sampling(recipe), recipe.eval, recipe.algorithm.flow
    wanted = (settings.guidance, flow.guidance if flow else None, training.guidance)
    return replace(
        training,
        guidance=next(value for value in wanted if value is not None),
        flow_steps=settings.flow_steps or training.flow_steps,
        decodes=1,
    )


def to_uint8(pictures: Tensor) -> np.ndarray:
    """Convert [B, 3, H, W] in [0, 1] to [B, H, W, 3] uint8, rounded to nearest."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """The policy's inputs for P prompts."""

    ids: Tensor  # [P, L] left-padded
    mask: Tensor  # [P, L]
    latents: Tensor | None  # [P, C, h, w] of the pictures to edit; None: draw new ones


def encode(policy: Policy, prompts: Sequence[Prompt], to_draw: bool = True) -> EncodedPrompts:
    """Encode captions, or instructions with the pictures that they change. Without `to_draw` no latents: scoring tokens
    needs none.

    Raises ImageRLError when only some of the prompts have a picture."""
    texts = [prompt.text for prompt in prompts]
    pictures = [prompt.reference for prompt in prompts if prompt.reference is not None]
    if not pictures:
        return EncodedPrompts(*policy.encode_prompts(texts), None)
    if len(pictures) < len(texts):
        raise ImageRLError(
            f"{len(pictures)} of {len(texts)} prompts have a picture to edit; put edits in a prompt set of their own"
        )
    ids, mask = policy.encode_prompts(texts, policy.picture_tokens(pictures))
    return EncodedPrompts(ids, mask, policy.picture_latents(pictures) if to_draw else None)


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
        """Draw [P·G·M, C, h, w] decoder noise; with `shared_noise` the m-th is the same for all samples of a prompt."""
        shape = self.policy.latent_shape
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
        shape = (steps, *self.policy.latent_shape)
        rows = [
            torch.randn(
                shape, generator=generator(self.seed, "steps", occasion, prompt.index, sample, decode)
            )
            for prompt, sample, decode in self._decodes(prompts, group_size)
        ]
        return torch.stack(rows)

    def _decodes(self, prompts: Sequence[Prompt], group_size: int) -> Iterator[tuple[Prompt, int, int]]:
        return product(prompts, range(group_size), range(self.sampling.decodes))

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
        for together in _chunks(prompts, sample_chunk):
            together = [with_pictures(prompt) for prompt in together]
            encoded = encode(self.policy, together)
            uniforms = self.uniforms(occasion, together, group_size)
            trajectory = self.policy.sample_tokens(
                encoded.ids, encoded.mask, uniforms, self.sampling.temperature
            )
            first = 0
            for part in _chunks(together, decode_chunk):
                rows = slice(first * group_size, (first + len(part)) * group_size)
                latents = None if encoded.latents is None else encoded.latents[first : first + len(part)]
                first += len(part)
                hidden = trajectory.hidden[rows]
                images, steps = self._decode(part, hidden, latents, group_size, occasion, flow)
                yield list(_groups(part, trajectory, rows, images, steps))

    def _decode(
        self,
        prompts: Sequence[Prompt],
        hidden: Tensor,
        reference: Tensor | None,
        group_size: int,
        occasion: int | str,
        flow: FlowSampling | None,
    ) -> tuple[np.ndarray, FlowTrajectory | None]:
        sampling = self.sampling
        noise = self.noise(occasion, prompts, group_size)
        repeated = hidden.repeat_interleave(sampling.decodes, 0)
        steps = None
        if flow is not None and reference is not None:
            raise ImageRLError(
                "denoising steps are trained on captions only; train edits with a token algorithm"
            )
        given = {} if reference is None else {"reference": reference}
        with self.autocast():
            if flow is None:
                pictures = self.policy.decode(
                    repeated, noise, sampling.guidance, sampling.flow_steps, **given
                )
            else:
                step_noise = self.step_noise(occasion, prompts, group_size, len(flow.window))
                pictures, steps = self.policy.decode_steps(repeated, noise, step_noise, flow)
                steps.hidden = hidden  # one row serves all decodes of a token sequence
        return to_uint8(pictures), steps


def _chunks(prompts: Sequence[Prompt], size: int | None) -> Iterator[Sequence[Prompt]]:
    size = size or max(len(prompts), 1)  # a rank may have none, as when others replace silent groups
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _groups(
    prompts: Sequence[Prompt],
    trajectory: TokenTrajectory,
    rows: slice,
    images: np.ndarray,
    steps: FlowTrajectory | None,
) -> Iterator[RolloutGroup]:
    """Return the groups of some prompts, whose samples are `rows` of the trajectory and all of images and steps."""
    size, drawn = (rows.stop - rows.start) // len(prompts), len(images) // len(prompts)
    for number, prompt in enumerate(prompts):
        own = slice(rows.start + number * size, rows.start + (number + 1) * size)
        yield RolloutGroup(
            prompt=prompt,
            tokens=trajectory.tokens[own],
            rollout_logprobs=trajectory.rollout_logprobs[own],
            action_mask=trajectory.action_mask[own],
            images=images[number * drawn : (number + 1) * drawn],
            flow=steps.part(number, len(prompts)) if steps is not None else None,
        )
