"""A decoder as a policy: its denoising steps are actions with log-probs that reinforcement learning can train."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from imagerl.models.common.flow_step import (
    StepCoefficients,
    next_latents,
    step_coefficients,
    transition_logprob,
    transition_mean,
)
from imagerl.rl.errors import one_line
from imagerl.rl.types import (
    FlowSampling,
    FlowSchedule,
    FlowScores,
    FlowTrajectory,
    ImageRLError,
    Rows,
    TokenTrajectory,
    repeat,
)

if TYPE_CHECKING:
    from peft import PeftModel

S = TypeVar("S")  # what a decoder makes of a condition, once for all steps


class VelocityField(Protocol[S]):
    """What the decoder of a family gives: an `nn.Module` whose children `trained` are what can learn."""

    trained: tuple[str, ...]
    adapted: str  # the child that takes low-rank adapters

    def flow_condition(self, prompts: Rows, trajectory: TokenTrajectory, /) -> Rows:
        """Return what pictures of a trajectory [B] are drawn by, a row for each token sequence."""
        ...

    def sigmas(self, steps: int, shape: Sequence[int], /) -> Tensor:
        """Return [steps + 1] falling noise levels from 1 to 0 on the CPU, for latents of a shape [C, h, w]."""
        ...

    def seen(self, condition: Rows, guidance: float, /) -> S:
        """Compute what depends on the condition alone."""
        ...

    def guided_velocity(self, x: Tensor, sigma: Tensor, seen: S, guidance: float, /) -> Tensor:
        """Return the velocity [B, C, h, w] at noise levels `sigma` [B]."""
        ...

    def draw(self, latents: Tensor, /) -> Tensor:
        """Draw latents [B, C, h, w] as pictures [B, 3, H, W] in [0, 1]."""
        ...


class FlowNetwork(nn.Module, Generic[S]):
    """The part of a decoder that trains, never the autoencoder. It gives velocities; all else is arithmetic."""

    def __init__(self, decoder: VelocityField[S]) -> None:
        super().__init__()
        for name in decoder.trained:
            self.add_module(name, getattr(decoder, name))
        self._decoder = (decoder,)  # in a tuple, so that what is frozen is not registered

    def forward(self, condition: Rows, latents: Tensor, sigma: Tensor, guidance: float) -> Tensor:
        """Return guided velocities [B, N, C, h, w] in float32 at N points of each sample: latents [B, N, C, h, w] at
        noise levels sigma [B, N], all given the same condition [B].

        What depends on the condition alone is computed once for the N points, gradients included."""
        (decoder,) = self._decoder
        seen = decoder.seen(condition, guidance)
        points = zip(latents.unbind(1), sigma.unbind(1), strict=True)
        return torch.stack([decoder.guided_velocity(x, s, seen, guidance).float() for x, s in points], 1)


class FlowPolicy(Generic[S]):
    """Implements `models.base.DecoderPolicy` around a decoder."""

    def __init__(self, decoder: VelocityField[S]) -> None:
        """Give gradients to the network only; the rest stays frozen."""
        self.decoder = decoder
        self.trainable = FlowNetwork(decoder)
        self.trainable.requires_grad_(True)
        self._adapter: PeftModel | None = None
        self.reference: FlowNetwork[S] | None = None

    def condition(self, prompts: Rows, trajectory: TokenTrajectory) -> Rows:
        """Return what pictures of a trajectory [B] are drawn by, a row for each token sequence."""
        return self.decoder.flow_condition(prompts, trajectory)

    @torch.no_grad()
    def decode_steps(
        self,
        prompts: Rows,
        trajectory: TokenTrajectory,
        noise: Tensor,
        step_noise: Tensor,
        sampling: FlowSampling,
    ) -> tuple[Tensor, FlowTrajectory]:
        """Decode by stochastic steps: pictures [B·M, 3, H, W] in [0, 1], and what replaying the steps needs."""
        condition = self.condition(prompts, trajectory)
        repeated = repeat(condition, len(noise) // len(trajectory.tokens))
        latents, steps = self.sample(repeated, noise, step_noise, sampling)
        steps.condition = condition  # one row serves all pictures of a token sequence
        return self.decoder.draw(latents), steps

    @torch.no_grad()
    def sample(
        self, condition: Rows, noise: Tensor, step_noise: Tensor, sampling: FlowSampling
    ) -> tuple[Tensor, FlowTrajectory]:
        """Integrate from `noise` [B, C, h, w], stochastic within the window with `step_noise` [B, S, C, h, w].

        Returns the finished latents [B, C, h, w], and what replay needs. Latents stay float32 throughout."""
        decoder, window = self.decoder, sampling.window
        sigmas = decoder.sigmas(sampling.steps, noise.shape[1:])
        plain = step_coefficients("ode", sigmas)
        drawing = step_coefficients(sampling.sampler, sigmas, sampling.noise_level)  # type: ignore[arg-type]
        seen = decoder.seen(condition, sampling.guidance)
        device = next(self.trainable.parameters()).device
        x, step_noise = noise.to(device).float(), step_noise.to(device)
        visited, logprobs = [], []
        for step in range(sampling.steps):
            sigma = sigmas[step].to(device).expand(len(x))
            velocity = decoder.guided_velocity(x, sigma, seen, sampling.guidance)
            if step not in window:
                x = transition_mean(plain, step, x, velocity)
                continue
            visited.append(x)
            mean, std = transition_mean(drawing, step, x, velocity), float(drawing.std[step])
            x = next_latents(mean, std, step_noise[:, step - window.start])
            logprobs.append(transition_logprob(x, mean, std))
            if step + 1 == window.stop:
                visited.append(x)
        rollout_logprobs = torch.stack(logprobs, 1) if logprobs else x.new_zeros(len(x), 0)
        return x, FlowTrajectory(condition, torch.stack(visited or [x], 1), rollout_logprobs)

    def schedule(self, sampling: FlowSampling, shape: Sequence[int] = ()) -> FlowSchedule:
        """Return the stochastic steps of a rollout of latents of a shape [C, h, w], on which some families' depend."""
        sigmas = self.decoder.sigmas(sampling.steps, shape)
        drawing = step_coefficients(sampling.sampler, sigmas, sampling.noise_level)  # type: ignore[arg-type]
        rows = slice(sampling.window.start, sampling.window.stop)
        return FlowSchedule(sigmas[:-1][rows], sigmas.diff()[rows], *(value[rows] for value in drawing))

    def score(self, velocity: Tensor, latents: Tensor, schedule: FlowSchedule) -> FlowScores:
        """Return log-probs of the steps through latents [B, S + 1, C, h, w], given the velocities
        [B, S, C, h, w] at their beginnings. No network and no autoencoder is run."""
        coefficients = StepCoefficients(schedule.latents, schedule.velocity, schedule.std)
        means, logprobs = [], []
        for step, std in enumerate(schedule.std.tolist()):
            means.append(transition_mean(coefficients, step, latents[:, step], velocity[:, step]))
            logprobs.append(transition_logprob(latents[:, step + 1], means[-1], std))
        return FlowScores(torch.stack(logprobs, 1), torch.stack(means, 1))

    def freeze_reference(self) -> None:
        """Remember the present network as the KL reference: a frozen copy of what trains, or nothing at all with LoRA,
        where the reference is the base with adapters off."""
        if self._adapter is None:
            decoder: Any = copy.copy(self.decoder)
            decoder._modules = {**decoder._modules}
            for name in decoder.trained:
                decoder._modules[name] = copy.deepcopy(getattr(self.decoder, name))
            self.reference = FlowNetwork(decoder).requires_grad_(False).eval()

    @torch.no_grad()
    def reference_velocity(self, condition: Rows, latents: Tensor, sigma: Tensor, guidance: float) -> Tensor:
        """Return `FlowNetwork.forward` of the frozen reference."""
        velocity: Tensor
        if self.reference is not None:
            velocity = self.reference(condition, latents, sigma, guidance)
            return velocity
        if self._adapter is None:
            raise ImageRLError("no reference decoder: call freeze_reference() before training with KL")
        with self.base_weights():
            velocity = self.trainable(condition, latents, sigma, guidance)
            return velocity

    def add_lora(self, rank: int, alpha: float, target_modules: Sequence[str]) -> None:
        """Freeze the network and train low-rank adapters of the transformer instead (arXiv 2106.09685), by PEFT."""
        from peft import LoraConfig, get_peft_model

        self.trainable.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules))
        try:
            self._adapter = get_peft_model(getattr(self.decoder, self.decoder.adapted), config)
        except ValueError as error:
            raise ImageRLError(f"algorithm.flow.lora: {one_line(error, 300)}") from error

    @property
    def adapted(self) -> bool:
        """Tell whether the network trains by adapters."""
        return self._adapter is not None

    def save_adapter(self, folder: Path) -> None:
        """Write the adapters alone in the layout that every pipeline of diffusers reads by `load_lora_weights`, and a
        transformer by `load_lora_adapter`. Rank and alpha go with them."""
        from diffusers.loaders import SanaLoraLoaderMixin  # any family's: all write a transformer alike
        from peft import get_peft_model_state_dict

        assert self._adapter is not None
        weights = get_peft_model_state_dict(self._adapter)
        SanaLoraLoaderMixin.save_lora_weights(
            str(folder),
            {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()},
            transformer_lora_adapter_metadata=self._adapter.peft_config["default"].to_dict(),
        )

    def load_adapter(self, folder: Path) -> None:
        """Put what `save_adapter` wrote onto the network, by diffusers' own loader."""
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        getattr(self.decoder, self.decoder.adapted).load_lora_adapter(
            str(folder), weight_name=LORA_WEIGHT_NAME_SAFE, local_files_only=True
        )

    def merge_lora(self) -> None:
        """Fold the adapters into the weights for good. Nothing to do without."""
        if self._adapter is not None:
            self._adapter.merge_and_unload()
            self._adapter = None

    def base_weights(self) -> AbstractContextManager[object]:
        """Turn adapters off in a context."""
        return self._adapter.disable_adapter() if self._adapter is not None else nullcontext()
