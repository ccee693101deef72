"""The flow-matching half: hidden states of the language model in, a picture out.

A connector maps hidden states to caption features, a SANA transformer (arXiv 2410.10629) integrates the
velocity field from noise to latents, an autoencoder draws the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.sana import CaptionKeys, caption_keys, velocity
from rl.types import ImageRLError

CONNECTOR_EPS = 1e-5


def build_connector(hidden_size: int, caption_channels: int) -> nn.Sequential:
    """hidden states -> caption features; the published layout, keys 0, 2 and 3."""
    return nn.Sequential(
        nn.Linear(hidden_size, caption_channels),
        nn.GELU(approximate="tanh"),
        nn.Linear(caption_channels, caption_channels),
        nn.RMSNorm(caption_channels, eps=CONNECTOR_EPS),
    )


class FlowDecoder(nn.Module):
    """Connector, transformer and autoencoder, built from their configurations alone.

    Velocities follow v = noise − x with x_σ = (1 − σ)·x + σ·noise (arXiv 2210.02747, 2209.03003)."""

    def __init__(
        self,
        hidden_size: int,
        sana: Mapping[str, Any],
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        latent_size: tuple[int, int],
    ) -> None:
        super().__init__()
        from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

        self.connector = build_connector(hidden_size, int(sana["caption_channels"]))
        self.sana = SanaTransformer2DModel.from_config(dict(sana))
        self.vae = AutoencoderDC.from_config(dict(vae))
        self.scheduler_config = dict(scheduler)
        self._scheduler_class = FlowMatchEulerDiscreteScheduler
        self.latent_shape: tuple[int, int, int] = (int(sana["in_channels"]), *latent_size)

    @property
    def scaling_factor(self) -> float:
        return self.vae.config.scaling_factor

    def sigmas(self, steps: int) -> Tensor:
        """[steps + 1] noise levels from 1 to 0 on the CPU: linspace(1, 1/steps, steps), shifted as the scheduler
        says, then 0."""
        scheduler = self._scheduler_class.from_config(self.scheduler_config)
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1.0 / steps, steps).tolist())
        return scheduler.sigmas.float()

    def condition(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T + 1, D] -> projected caption [B, T + 1, inner], once per image, not per step."""
        features = self.connector(hidden)
        return self.sana.caption_norm(self.sana.caption_projection(features))

    def unconditional(self, hidden_size: int) -> Tensor:
        """The condition of the unguided branch [1, 1, inner]: the connector applied to zeros. All rows and pictures
        have the same, and softmax over equal keys is their mean, so one row stands for them all."""
        weight = self.connector[0].weight
        return self.condition(torch.zeros(1, 1, hidden_size, device=weight.device, dtype=weight.dtype))

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Velocity [B, C, h, w] at noise levels `sigma` [B], given a projected condition [B, T + 1, inner]."""
        return velocity(self.sana, latents, sigma, [caption_keys(self.sana, condition)])

    def branches(self, hidden: Tensor, guidance: float) -> list[CaptionKeys]:
        """What the cross-attentions see of a picture's hidden states [B, R, D], once for all its steps: the caption's
        branch, and unless guidance is 1 the unconditional one before it."""
        given = caption_keys(self.sana, self.condition(hidden))
        if guidance == 1.0:
            return [given]
        return [caption_keys(self.sana, self.unconditional(hidden.shape[-1])), given]

    def guided_velocity(
        self, x: Tensor, sigma: Tensor, branches: Sequence[CaptionKeys], guidance: float
    ) -> Tensor:
        """Velocity [B, C, h, w] at noise levels `sigma` [B] under classifier-free guidance (arXiv 2207.12598)."""
        v = velocity(self.sana, torch.cat([x] * len(branches)), sigma.repeat(len(branches)), branches)
        if len(branches) == 1:
            return v
        without, given = v.chunk(2)
        return without + guidance * (given - without)

    @torch.no_grad()
    def latents(self, hidden: Tensor, noise: Tensor, guidance: float, steps: int) -> Tensor:
        """Integrate from `noise` [B, C, h, w] to latents with Euler steps under classifier-free guidance."""
        branches = self.branches(hidden, guidance)
        x = noise
        for sigma, following in pairwise(self.sigmas(steps).to(noise.device)):
            v = self.guided_velocity(x, sigma.expand(len(x)), branches, guidance)
            x = x + (following - sigma) * v.to(x.dtype)  # the state stays in the noise's precision
        return x

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, H, W] in [0, 1]."""
        pictures = self.vae.decode(latents / self.scaling_factor).sample
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] at the transformer's scale."""
        return self.vae.encode(pictures).latent * self.scaling_factor

    def flow_loss(
        self, hidden: Tensor, latents: Tensor, sigma: Tensor, noise: Tensor, drop: Tensor
    ) -> Tensor:
        """Mean of ‖v − (noise − x)‖² over all numbers: the flow-matching objective.

        `sigma` [B] in (0, 1); `drop` [B] bool, where the condition is replaced by the unconditional one."""
        condition = self.condition(torch.where(drop[:, None, None], 0.0, hidden))
        level = sigma[:, None, None, None]
        noisy = (1 - level) * latents + level * noise
        v = self.velocity(noisy, sigma, condition)
        return (v.float() - (noise - latents)).square().mean()

    def require_shape(self, noise: Tensor) -> None:
        if tuple(noise.shape[1:]) != self.latent_shape:
            raise ImageRLError(
                f"decoder noise has shape {tuple(noise.shape[1:])}, this model wants {self.latent_shape}"
            )
