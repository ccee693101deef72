"""The whole generator: a language model that writes image tokens and a diffusion transformer that draws by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from imagerl.models.base import Proof
from imagerl.models.common.flow_policy import FlowPolicy
from imagerl.models.common.pictures import fitted, prepare_picture
from imagerl.models.common.policy import BasePolicy, recompute_layers
from imagerl.models.glm_image.ar import TokenWriter
from imagerl.models.glm_image.decoder import FlowDecoder, Seen
from imagerl.models.glm_image.prompts import PromptEncoder
from imagerl.models.glm_image.sizes import TOKEN_PIXELS, Grid, Size, upsampled
from imagerl.models.glm_image.supervised import Lessons
from imagerl.rl.types import ImageRLError, Prompt, Rows, SamplingParams, TokenTrajectory, repeat


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
        """Encode captions or edits of one size: ids and mask [P, L] left-padded, their places and those of the image
        tokens that follow on three axes, and with `to_draw` the size, the glyphs and what the decoder is shown of
        pictures to edit.

        Raises ImageRLError when only some of the prompts edit a picture."""
        self.prompts.require(prompts)
        pictures = [prompt.reference for prompt in prompts if prompt.reference is not None]
        if pictures and len(pictures) < len(prompts):
            raise ImageRLError(
                f"{len(pictures)} of {len(prompts)} prompts have a picture to edit; put edits in a prompt set of "
                "their own"
            )
        size, encoded = self.prompts.size(prompts[0]), self.prompts.encode(prompts)
        ids, mask, grids, counts = (
            encoded[name].to(self.device)
            for name in ("input_ids", "attention_mask", "image_grid_thw", "images_per_sample")
        )
        if pictures:
            tokens = self._tokens_of(encoded["pixel_values"], grids[counts.cumsum(0) - counts], size.large)
            ids = ids.masked_scatter(ids == self.model.config.image_token_id, tokens)
        # The library's own, which leaves the places of what is to be written behind.
        places, _ = self.model.model.get_rope_index(ids, grids, counts, mask)
        grid = self.model.model._cached_decode_position_ids
        rows = {"ids": ids, "mask": mask, "places": places.transpose(0, 1), "grid": grid}
        if to_draw:
            rows["glyphs"] = self.decoder.glyphs_of([prompt.text for prompt in prompts])
            rows["canvas"] = torch.empty(len(prompts), *size, 0)  # the pictures' size, as a shape
            if pictures:
                shown = torch.stack(
                    [prepare_picture(picture, (size.height, size.width)) for picture in pictures]
                )
                rows["source"] = self.decoder.encode(shown.to(self.device))
                rows["source_prior"] = upsampled(tokens, size.large)
        return rows

    def _tokens_of(self, pixels: Tensor, grids: Tensor, grid: Grid) -> Tensor:
        """Return the image tokens [P, rows · columns] of pictures as the processor cuts them into patches.

        Raises ImageRLError when it scales them to another grid than they are drawn on."""
        if grids[:, 1:].tolist() != [list(grid)] * len(grids):
            raise ImageRLError(
                f"the model's processor shows pictures of this size by {'x'.join(map(str, grids[0, 1:].tolist()))} "
                f"tokens, but they are drawn by {grid[0]}x{grid[1]}; ask for larger pictures"
            )
        features = self.model.get_image_features(pixels.to(self.device), grids).pooler_output
        tokens: Tensor = self.model.get_image_tokens(features, grids)
        return tokens.view(len(grids), -1)

    @torch.no_grad()
    def tokens_of(self, pictures: Tensor) -> Tensor:
        """Return the tokens [B, T] of pictures [B, 3, H, W] in [-1, 1]: those of a preview of each, then its own."""
        size, parts = Size(*pictures.shape[-2:]), []
        pixels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for rows, columns in (size.preview, size.large):
            shown = (rows * TOKEN_PIXELS, columns * TOKEN_PIXELS)
            read = self.pipeline.processor.image_processor(
                [fitted(Image.fromarray(each), shown) for each in pixels],
                size={"shortest_edge": 1, "longest_edge": 1 << 24},  # as large as they are, however small
                return_tensors="pt",
            )
            grids = read["image_grid_thw"].to(self.device)
            parts.append(self._tokens_of(read["pixel_values"], grids, (rows, columns)))
        return torch.cat(parts, 1)

    def recompute(self) -> None:
        recompute_layers(self.trainable.lm)
        self.trainable.recomputes = True
        self.decoder.transformer.enable_gradient_checkpointing()

    learns_flow = True

    def lessons(self, on_prompt: bool, with_flow: bool) -> Lessons:
        """Teach the language model, and by the flow loss the transformer; see `models.glm_image.supervised`."""
        return Lessons(self, with_flow)

    def blank(
        self, prompts: int, length: int, samples: int, edits: bool = False
    ) -> tuple[Rows, TokenTrajectory]:
        """Return prompts and a trajectory without content, of the default size; no text is to be written."""
        size = self.default_size
        tokens = math.prod(size.large) if edits else size.tokens  # an edit has no preview
        self.decoder.blank_glyphs()
        rows = {
            "ids": torch.empty(prompts, length, dtype=torch.int64),
            "mask": torch.empty(prompts, length, dtype=torch.bool),
            "places": torch.empty(prompts, 3, length, dtype=torch.int64),
            "grid": torch.empty(prompts, 3, tokens + 1, dtype=torch.int64),
            "glyphs": self.decoder.glyphs_of([""] * prompts),
            "canvas": torch.empty(prompts, *size, 0),
        }
        if edits:
            rows["source"] = self.decoder.encode(torch.empty(prompts, 3, *size))
            rows["source_prior"] = upsampled(torch.empty(prompts, tokens, dtype=torch.int64), size.large)
        shape = samples, tokens
        actions = torch.empty(shape, dtype=torch.bool)
        return rows, TokenTrajectory(torch.empty(shape, dtype=torch.int64), torch.empty(shape), actions)

    def token_bytes(self) -> tuple[int, int]:
        """Count keys and values, in the type of the weights themselves. The decoder needs the tokens alone."""
        config = self.trainable.lm.config
        head_dim = config.hidden_size // config.num_attention_heads
        width = next(self.trainable.parameters()).element_size()
        return 2 * config.num_key_value_heads * head_dim * config.num_hidden_layers * width, 0

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
        """Return a digest of each part's weights, and of what diffusers' pipeline loads. Equal weights draw equal
        pixels, which take minutes at full size."""
        from imagerl.models.glm_image.loading import weights_again

        return weights_again(self, folder)
