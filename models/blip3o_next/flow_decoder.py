"""The flow-matching half: hidden states of the language model in, a picture out.

A connector maps hidden states to caption features, a SANA transformer (arXiv 2410.10629) integrates the
velocity field from noise to latents, an autoencoder draws the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from imagerl.models.common.policy import drawn
from imagerl.rl.types import ImageRLError, Rows, TokenTrajectory

CONNECTOR_EPS = 1e-5
MAX_PIXELS = 1 << 21  # in the autoencoder at once: two pictures of 1024x1024, whatever the batch


def build_connector(hidden_size: int, caption_channels: int) -> nn.Sequential:
    """Build the map from hidden states to caption features; the published layout, keys 0, 2 and 3."""
    return nn.Sequential(
        nn.Linear(hidden_size, caption_channels),
        nn.GELU(approximate="tanh"),
        nn.Linear(caption_channels, caption_channels),
        nn.RMSNorm(caption_channels, eps=CONNECTOR_EPS),
    )


def build_unused_connector(channels: int) -> nn.Sequential:
    """Build a layer that published edit checkpoints hold and their code never calls; kept so that they round-trip."""
    return nn.Sequential(nn.Conv2d(2 * channels, channels, 1))


def beside(latents: Tensor, reference: Tensor | None) -> Tensor:
    """Put a reference's latents right of latents [B, C, h, w]: [B, C, h, 2w]; without one return the latents."""
    return latents if reference is None else torch.cat([latents, reference.to(latents.dtype)], dim=-1)


class FlowDecoder(nn.Module):
    """Connector, transformer and autoencoder, built from their configurations alone. With `edit` also the connector
    through which a reference picture's latents join the condition.

    Velocities follow v = noise − x with x_σ = (1 − σ)·x + σ·noise (arXiv 2210.02747, 2209.03003)."""

    trained: tuple[str, ...] = ("connector", "sana")
    adapted: str = "sana"

    def __init__(
        self,
        hidden_size: int,
        sana: Mapping[str, Any],
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        latent_size: tuple[int, int],
        edit: bool = False,
    ) -> None:
        super().__init__()
        from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

        channels, caption_channels = int(sana["in_channels"]), int(sana["caption_channels"])
        self.connector = build_connector(hidden_size, caption_channels)
        self.reference_connector = build_connector(channels, caption_channels) if edit else None
        self.unused_connector = build_unused_connector(channels) if edit else None
        self.sana = SanaTransformer2DModel.from_config(dict(sana))
        self.vae = AutoencoderDC.from_config(dict(vae))
        self.scheduler_config = dict(scheduler)
        self._scheduler_class = FlowMatchEulerDiscreteScheduler
        self.latent_shape: tuple[int, int, int] = (channels, *latent_size)

    @property
    def scaling_factor(self) -> float:
        return self.vae.config.scaling_factor

    @property
    def picture_size(self) -> tuple[int, int]:
        """H, W in pixels."""
        _, rows, columns = self.latent_shape
        return rows * self.vae.spatial_compression_ratio, columns * self.vae.spatial_compression_ratio

    def sigmas(self, steps: int, shape: Sequence[int] = ()) -> Tensor:
        """Return [steps + 1] noise levels from 1 to 0 on the CPU: linspace(1, 1/steps, steps), shifted as the
        scheduler says, then 0. They are those of every shape."""
        scheduler = self._scheduler_class.from_config(self.scheduler_config)
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1.0 / steps, steps).tolist())
        return scheduler.sigmas.float()

    def condition(self, hidden: Tensor, reference: Tensor | None = None) -> Tensor:
        """Map hidden states [B, T + 1, D] to the projected caption [B, T + 1, inner], once per image, not per
        step. For an edit the reference latents [B, C, h, w] follow, h·w rows more."""
        features = self.connector(hidden.to(self.sana.dtype))
        if reference is not None:
            features = torch.cat([features, self.reference_features(reference)], dim=1)
        return self._project(features)

    def unconditional(self, hidden_size: int, edit: bool = False) -> Tensor:
        """Return the condition of the unguided branch [1, 1, inner]: the connector applied to zeros. All rows and
        pictures have the same, and softmax over equal keys is their mean, so one row stands for them all.

        With `edit` [1, 2, inner]: a second row stands for the reference's, which are zeros after their connector."""
        weight = next(self.connector.parameters())
        rows = self.connector(weight.new_zeros(1, 1, hidden_size))
        return self._project(torch.cat([rows, torch.zeros_like(rows)], dim=1) if edit else rows)

    def reference_features(self, reference: Tensor) -> Tensor:
        """Map reference latents [B, C, h, w] to caption features [B, h·w, caption_channels]."""
        connector = self.require_edit()
        return connector(reference.to(next(connector.parameters()).dtype).flatten(2).transpose(1, 2))

    def _project(self, features: Tensor) -> Tensor:
        return self.sana.caption_norm(self.sana.caption_projection(features))

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Return the velocity [B, C, h, w] at noise levels `sigma` [B], given a projected condition [B, R, inner]."""
        return velocity(self.sana, latents, sigma, [caption_keys(self.sana, condition)])

    def branches(self, hidden: Tensor, guidance: float, reference: Tensor | None = None) -> list[CaptionKeys]:
        """Return the cross-attentions' view of hidden states [B, R, D] and an edit's reference latents, once
        for all steps: the caption's branch, and unless guidance is 1 the unconditional one before it."""
        given = caption_keys(self.sana, self.condition(hidden, reference))
        return [given] if guidance == 1.0 else [self._unconditional_keys(hidden, reference), given]

    def flow_condition(self, prompts: Rows, trajectory: TokenTrajectory) -> Rows:
        """Return what denoising steps that train are conditioned on. Raises ImageRLError for edits."""
        if "reference" in prompts:
            raise ImageRLError(
                "denoising steps are trained on captions only; train edits with a token algorithm"
            )
        return {"hidden": trajectory.states["hidden"]}

    def seen(self, condition: Rows, guidance: float) -> list[CaptionKeys]:
        """Return `branches` of a condition."""
        return self.branches(condition["hidden"], guidance)

    def guided_velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        branches: Sequence[CaptionKeys],
        guidance: float,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity [B, C, h, w] at noise `sigma` [B] under classifier-free guidance (arXiv 2207.12598)."""
        seen = torch.cat([beside(x, reference)] * len(branches))
        v = velocity(self.sana, seen, sigma.repeat(len(branches)), branches)[..., : x.shape[-1]]
        if len(branches) == 1:
            return v
        without, given = v.chunk(2)
        return without + guidance * (given - without)

    @torch.no_grad()
    def latents(
        self, hidden: Tensor, noise: Tensor, guidance: float, steps: int, reference: Tensor | None = None
    ) -> Tensor:
        """Integrate from `noise` [B, C, h, w] to latents with Euler steps under classifier-free guidance.

        An edit starts from `reference` [B, C, h, w], a picture's latents: they join the condition, and stand to the
        right of the noise in both branches at every step."""
        branches = self.branches(hidden, guidance, reference)
        x = noise
        for sigma, following in pairwise(self.sigmas(steps).to(noise.device)):
            v = self.guided_velocity(x, sigma.expand(len(x)), branches, guidance, reference)
            x = x + (following - sigma) * v.to(x.dtype)  # the state stays in the noise's precision
        return x

    def _unconditional_keys(self, hidden: Tensor, reference: Tensor | None) -> CaptionKeys:
        condition = self.unconditional(hidden.shape[-1], reference is not None)
        if reference is None:
            return caption_keys(self.sana, condition)
        counts = torch.tensor([hidden.shape[1], reference[0, 0].numel()], device=condition.device)
        return caption_keys(self.sana, condition, counts)

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        """Draw latents [B, C, h, w] as pictures [B, 3, H, W] in [0, 1]. Memory is that of a few pictures, whatever B.

        Raises ImageRLError for pixels that are not finite, which would be black ones in silence."""
        height, width = self.picture_size
        scaled = (latents / self.scaling_factor).to(self.vae.dtype)
        few = scaled.split(max(1, MAX_PIXELS // (height * width)))
        return drawn(torch.cat([self.vae.decode(part).sample.float() for part in few]))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W] in [-1, 1] as latents [B, C, h, w] at the transformer's scale. Memory is that
        of a few pictures, whatever B."""
        height, width = pictures.shape[-2:]
        few = pictures.to(self.vae.dtype).split(max(1, MAX_PIXELS // (height * width)))
        return torch.cat([self.vae.encode(part).latent for part in few]) * self.scaling_factor

    def flow_loss(
        self,
        hidden: Tensor,
        latents: Tensor,
        sigma: Tensor,
        noise: Tensor,
        drop: Tensor,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Return the mean of ‖v − (noise − x)‖² over all numbers: the flow-matching objective."""
        return self.flow_residual(hidden, latents, sigma, noise, drop, reference).square().mean()

    def flow_residual(
        self,
        hidden: Tensor,
        latents: Tensor,
        sigma: Tensor,
        noise: Tensor,
        drop: Tensor,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Return v − (noise − x) [B, C, h, w] in float32.

        `sigma` [B] in (0, 1); `drop` [B] bool, where the condition is replaced by the unconditional one. With
        `reference` [B, C, h, w] the objective of an edit: the velocity of the reference's own half is free."""
        dropped = drop[:, None, None]
        features = self.connector(torch.where(dropped, 0.0, hidden))
        if reference is not None:
            kept = torch.where(dropped, 0.0, self.reference_features(reference))
            features = torch.cat([features, kept], dim=1)
        level = sigma[:, None, None, None]
        noisy = beside((1 - level) * latents + level * noise, reference)
        v = self.velocity(noisy, sigma, self._project(features))[..., : latents.shape[-1]]
        return v.float() - (noise - latents)

    def require_edit(self) -> nn.Sequential:
        """Return the reference connector. Raises ImageRLError when the model has none."""
        if self.reference_connector is None:
            raise ImageRLError("this model draws from captions only; give a model trained to edit pictures")
        return self.reference_connector

    def require_shape(self, noise: Tensor) -> None:
        if tuple(noise.shape[1:]) != self.latent_shape:
            raise ImageRLError(
                f"decoder noise has shape {tuple(noise.shape[1:])}, this model wants {self.latent_shape}"
            )


# ---- velocities of a diffusers SANA transformer, with all that depends on the caption alone computed once per picture
# instead of once per denoising step. Modules and arithmetic are diffusers'; only the cross-attention is spelt out
# here, because its keys and values must outlive one call.


@dataclass(frozen=True, slots=True)
class CaptionKeys:
    """Keys and values of one branch's condition for the cross-attentions of all layers."""

    keys: list[Tensor]  # per layer [B or 1, heads, R, d]
    values: list[Tensor]  # per layer [B or 1, heads, R, d]
    bias: Tensor | None  # [1, R] added to the scores: log of how many equal rows a row stands for


def caption_keys(sana: Any, condition: Tensor, counts: Tensor | None = None) -> CaptionKeys:
    """Compute keys and values of a projected condition [B, R, inner].

    With `counts` [R], row r stands for that many equal rows: softmax over n equal scores s is softmax over the
    one score s + log n."""
    keys, values = [], []
    for block in sana.transformer_blocks:
        attention = block.attn2
        key = attention.to_k(condition)
        if attention.norm_k is not None:
            key = attention.norm_k(key)
        keys.append(_heads(attention, key))
        values.append(_heads(attention, attention.to_v(condition)))
    return CaptionKeys(keys, values, None if counts is None else counts.log()[None].to(condition.dtype))


def velocity(sana: Any, latents: Tensor, sigma: Tensor, branches: Sequence[CaptionKeys]) -> Tensor:
    """Return the velocity [B, C, h, w] of latents [B, C, h, w] at noise levels `sigma` [B]. The batch is as many
    equal parts as there are branches, one after the other.

    After `sana.enable_gradient_checkpointing()` only the inputs of the blocks are kept for the backward pass."""
    batch, _, height, width = latents.shape
    patch = sana.config.patch_size
    rows, columns = height // patch, width // patch
    x = sana.patch_embed(latents.to(sana.dtype))
    timestep, embedded = sana.time_embed(sigma * 1000.0, batch_size=batch, hidden_dtype=x.dtype)
    for layer, block in enumerate(sana.transformer_blocks):
        arguments = (block, x, timestep.view(batch, 6, -1), branches, layer, rows, columns)
        if sana.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_block, *arguments, use_reentrant=False)
        else:
            x = _block(*arguments)
    x = sana.proj_out(sana.norm_out(x, embedded, sana.scale_shift_table))
    x = x.reshape(batch, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, -1, height, width)


def _block(
    block: Any,
    x: Tensor,
    timestep: Tensor,
    branches: Sequence[CaptionKeys],
    layer: int,
    rows: int,
    columns: int,
) -> Tensor:
    """Apply one transformer block to x [B, rows·columns, D]."""
    modulation = block.scale_shift_table[None] + timestep
    shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)
    normed = block.norm1(x) * (1 + scale_sa) + shift_sa
    x = x + gate_sa * block.attn1(normed.to(x.dtype))
    x = _cross_attention(block.attn2, x, branches, layer) + x
    normed = block.norm2(x) * (1 + scale_ff) + shift_ff
    grid = normed.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    return x + gate_ff * block.ff(grid).flatten(2, 3).permute(0, 2, 1)


def _cross_attention(attention: Any, x: Tensor, branches: Sequence[CaptionKeys], layer: int) -> Tensor:
    query = attention.to_q(x)
    if attention.norm_q is not None:
        query = attention.norm_q(query)
    attended = []
    for part, branch in zip(_heads(attention, query).chunk(len(branches)), branches, strict=True):
        key, value = (kept[layer].expand(len(part), -1, -1, -1) for kept in (branch.keys, branch.values))
        attended.append(F.scaled_dot_product_attention(part, key, value, attn_mask=branch.bias))
    joined = torch.cat(attended).transpose(1, 2).flatten(2).to(query.dtype)
    return attention.to_out[0](joined) / attention.rescale_output_factor


def _heads(attention: Any, x: Tensor) -> Tensor:
    """Reshape [B, R, heads·d] to [B, heads, R, d]."""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
