"""The whole generator: a language model that writes image tokens and a diffusion transformer that draws by them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagerl.models.base import Proof
from imagerl.models.common.flow_policy import FlowPolicy
from imagerl.models.common.policy import BasePolicy
from imagerl.models.glm_image.ar import TokenWriter
from imagerl.models.glm_image.decoder import FlowDecoder, Seen
from imagerl.models.glm_image.prompts import PromptEncoder
from imagerl.models.glm_image.sizes import Size
from imagerl.rl.types import Prompt, Rows, SamplingParams, TokenTrajectory, repeat


class GlmImagePolicy(BasePolicy):
    """Implements `models.base.Policy` around the library's own pipeline, whose parts it trains in place. Vision tower,
    text encoder and autoencoder are frozen, and no part of what trains or of its reference."""

    trainable: TokenWriter

    def __init__(self, pipeline: Any, sampling: SamplingParams, default_size: Size) -> None:
        self.pipeline = pipeline
        self.model = pipeline.vision_language_encoder
        codes = self.model.config.vq_config.num_embeddings
        super().__init__(TokenWriter(self.model.model.language_model, self.model.lm_head, codes), sampling)
        self.default_size = default_size
        self.decoder = FlowDecoder(
            pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler
        )

    def parts(self) -> dict[str, nn.Module]:
        return {"language model and vision tower": self.model, "decoder": self.decoder}

    @cached_property
    def prompts(self) -> PromptEncoder:
        return PromptEncoder(
            self.pipeline.processor,
            self.model.config.text_config.max_position_embeddings,
            self.default_size,
            self.pipeline.transformer.config.in_channels,
            self.decoder.compression,
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], to_draw: bool = True) -> Rows:
        """Encode captions of one size: ids and mask [P, L] left-padded, their places and those of the image tokens
        that follow on three axes, and with `to_draw` the size and the glyphs that the decoder asks for."""
        self.prompts.require(prompts)
        encoded = self.prompts.encode(prompts)
        ids, mask, grids, counts = (
            encoded[name].to(self.device)
            for name in ("input_ids", "attention_mask", "image_grid_thw", "images_per_sample")
        )
        # The library's own, which leaves the places of what is to be written behind.
        places, _ = self.model.model.get_rope_index(ids, grids, counts, mask)
        grid = self.model.model._cached_decode_position_ids
        rows = {"ids": ids, "mask": mask, "places": places.transpose(0, 1), "grid": grid}
        if to_draw:
            rows["glyphs"] = self.decoder.glyphs_of([prompt.text for prompt in prompts])
            rows["size"] = torch.tensor([self.prompts.size(prompt) for prompt in prompts])
        return rows

    def sample_tokens(self, prompts: Rows, uniforms: Tensor, sampling: SamplingParams) -> TokenTrajectory:
        """Draw tokens for uniforms [P·G, T] after prompts [P]; see `TokenWriter.sample`."""
        return self.trainable.sample(prompts, uniforms.to(self.device), sampling)

    @torch.no_grad()
    def decode(
        self, prompts: Rows, trajectory: TokenTrajectory, noise: Tensor | None, sampling: SamplingParams
    ) -> Tensor:
        """Decode a trajectory [B] and noise [B·M, C, h, w] to pictures [B·M, 3, H, W] in [0, 1]."""
        assert noise is not None
        decodes = len(noise) // len(trajectory.tokens)
        condition = repeat(self.decoder.flow_condition(prompts, trajectory), decodes)
        latents = self.decoder.latents(condition, noise, sampling.guidance, sampling.flow_steps)
        return self.decoder.draw(latents)

    def train_decoder(self) -> FlowPolicy[Seen]:
        """Make the decoder a policy over its denoising steps, with gradients."""
        self.flow = flow = FlowPolicy(self.decoder)
        return flow

    def save(self, folder: Path, layout: str, base: Path, dtype: torch.dtype | None) -> None:
        """Write the policy in the published layout; see `models.glm_image.loading`."""
        from imagerl.models.glm_image.loading import save_policy

        save_policy(self, folder, base, dtype)

    def proof(self, folder: Path, layout: str, prompts: Sequence[Prompt]) -> Proof:
        """Return a digest of each part's weights, and of what diffusers' pipeline loads. Pixels would not do: drawn by
        equal weights they differ by 1e-6 from one load to the next."""
        from imagerl.models.glm_image.loading import weights_again

        return weights_again(self, folder)
