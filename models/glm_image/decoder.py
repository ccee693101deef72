"""The flow-matching half: image tokens and the letters of quoted words in, a picture out.

A diffusion transformer integrates the velocity field from noise to latents, an autoencoder draws the pixels. It is
conditioned on the tokens themselves, on glyph embeddings of the texts in quotation marks, on the picture's size and on
where it was cropped. Text encoder and autoencoder are frozen; neither is part of what trains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imagerl.models.common.policy import drawn
from imagerl.models.glm_image.sizes import Size, flow_shift, upsampled
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Rows, TokenTrajectory, repeat

QUOTED = (r"'([^']*)'", "“([^“”]*)”", r'"([^"]*)"', "「([^「」]*)」")
MAX_GLYPHS = 2048  # tokens of a quoted text
MAX_PIXELS = 1 << 21  # in the autoencoder at once: two pictures of 1024x1024
BLANK_GLYPHS = 64  # tokens of a text, where memory is planned
KEPT_GLYPHS = 1024  # prompts whose glyph embeddings stay in memory


def quoted_texts(prompt: str) -> tuple[str, ...]:
    """Return the texts of a prompt that are to be written in the picture, by kind of quotation mark."""
    return tuple(text for pattern in QUOTED for text in re.findall(pattern, prompt))


class Seen(NamedTuple):
    """What the transformer is told of B pictures beside their noise."""

    prior: Tensor  # [B, N] image tokens
    glyphs: list[Tensor]  # B of [R, D]
    no_glyphs: Tensor  # [R, D] of no text at all, for the unconditional branch
    source: (
        list[tuple[Tensor, Tensor]] | None
    )  # of edits: each layer's keys and values [B, N, heads, d] of the picture


class FlowDecoder(nn.Module):
    """Transformer, autoencoder and text encoder, the library's own.

    Velocities follow v = noise − x with x_σ = (1 − σ)·x + σ·noise (arXiv 2210.02747, 2209.03003)."""

    trained: tuple[str, ...] = ("transformer",)
    adapted: str = "transformer"

    def __init__(
        self, transformer: nn.Module, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any, scheduler: Any
    ) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.vae: Any = vae
        self.text_encoder: Any = text_encoder
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self._numbers: dict[tuple[str, ...], int] = {}
        self._glyphs: dict[tuple[str, ...], Tensor] = {}

    @property
    def compression(self) -> int:
        """Pixels of a side that a latent stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    # ---- glyphs ----------------------------------------------------------------------------------------------

    def glyphs_of(self, prompts: Sequence[str]) -> Tensor:
        """Return numbers [P] by which `velocity` finds the quoted texts of prompts in this process. Their embeddings
        differ in length, so that they would not fit into one tensor."""
        numbers = [self._numbers.setdefault(quoted_texts(prompt), len(self._numbers)) for prompt in prompts]
        return torch.tensor(numbers, device=self.transformer.device)

    def blank_glyphs(self) -> None:
        """Let an embedding without content stand for no text, and so for every prompt that is not known by its text."""
        width = self.text_encoder.config.d_model
        self._glyphs[()] = torch.empty(BLANK_GLYPHS, width, dtype=self.transformer.dtype)

    def _glyphs_by_number(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return glyph embeddings [R, D] by their numbers, made once for each prompt."""
        known = list(self._numbers)
        for texts in {known[number] for number in numbers} - self._glyphs.keys():
            self._glyphs[texts] = self._embed(texts or ("",))
        found = [self._glyphs[known[number]] for number in numbers]
        while len(self._glyphs) > KEPT_GLYPHS:
            self._glyphs.pop(next(iter(self._glyphs)))
        return found

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as [R, D], one behind the other."""
        rows = self.tokenizer(list(texts), max_length=MAX_GLYPHS, truncation=True).input_ids
        # The library pads in front by one where the number of texts, not of tokens, is even.
        front = [self.tokenizer.pad_token_id] * ((len(texts) + 1) % 2)
        longest = max(map(len, rows)) + len(front)
        device = self.text_encoder.device
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(rows):
            ids[row, : len(front) + len(own)] = torch.tensor([*front, *own], device=device)
            mask[row, : len(front) + len(own)] = 1
        embedded: Tensor = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        return embedded[mask.bool()]

    # ---- the velocity field ----------------------------------------------------------------------------------

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        """Return [steps + 1] noise levels from 1 to 0 on the CPU, of latents of a shape [C, h, w]: evenly spaced
        timesteps, whole numbers, shifted to higher noise the larger the picture is."""
        training = self.scheduler.config.num_train_timesteps
        if steps > training:  # two would be rounded to one
            raise ImageRLError(f"{steps} flow steps are more than the {training} that the decoder knows")
        even = torch.linspace(training, 1.0, steps + 1, dtype=torch.float64)[:-1].long().double()
        sigmas = self._shifted(even / training, shape)
        return torch.cat([sigmas, torch.zeros(1)])

    def _factor(self, shape: Sequence[int]) -> float:
        """Return k of the shift s → k·s / (1 + (k − 1)·s)."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        tokens = shape[-2] * shape[-1] // self.transformer.config.patch_size**2
        mu = flow_shift(
            tokens,
            config.get("base_shift", 0.25),
            config.get("max_shift", 0.75),
            config.get("base_image_seq_len", 256),
        )
        return mu if config.time_shift_type == "linear" else math.exp(mu)

    def _shifted(self, even: Tensor, shape: Sequence[int]) -> Tensor:
        """Return noise levels in float32. 1 stays 1, to the bit: stochastic steps divide by 1 − sigma, and in float32
        k / (1 + (k − 1)) is not 1 for one size of picture in seven, 1024x768 among them."""
        k, even = self._factor(shape), even.double()
        return (k * even / (1 + (k - 1) * even)).float()

    def timesteps(self, sigma: Tensor, shape: Sequence[int]) -> Tensor:
        """Return what the transformer is told of noise levels [B]: the timestep before the shift, less one. It knows
        whole ones only, and rounding also takes back what the shift and float32 blurred."""
        k = self._factor(shape)
        sigma = sigma.double()
        even = sigma / (k - (k - 1) * sigma)
        return ((even * self.scheduler.config.num_train_timesteps).round() - 1).float()

    def flow_condition(self, prompts: Rows, trajectory: TokenTrajectory) -> Rows:
        """Return what pictures are drawn by, a row for each token sequence: the number of its glyphs [B], and its
        large grid's tokens [B, N], each for the 2×2 tokens of the transformer's grid that it stands for."""
        size = Size(*prompts["canvas"].shape[1:3])
        group = len(trajectory.tokens) // len(prompts["glyphs"])
        kept = ("glyphs", "source", "source_prior")
        given = {name: rows for name, rows in prompts.items() if name in kept}
        return repeat(given, group) | {"prior": upsampled(trajectory.tokens, size.large)}

    def seen(self, condition: Rows, guidance: float) -> Seen:
        """Find what the transformer is told of a condition [B]."""
        numbers = [*condition["glyphs"].tolist(), *self.glyphs_of([""]).tolist()]
        *glyphs, no_glyphs = self._glyphs_by_number(numbers)
        return Seen(condition["prior"], glyphs, no_glyphs, self._source(condition))

    def _source(self, condition: Rows) -> list[tuple[Tensor, Tensor]] | None:
        """Return keys and values of all layers for the pictures that are edited, without noise and without words."""
        if "source" not in condition:
            return None
        latents = condition["source"]
        cache = self._cache("write")
        time = torch.zeros(len(latents), device=latents.device)
        no_words = latents.new_zeros(len(latents), 0, self.transformer.config.text_embed_dim)
        self._velocity(latents, time, condition["source_prior"], no_words, False, cache)
        return [(layer.k_caches[0], layer.v_caches[0]) for layer in cache.caches]

    def _cache(self, mode: str, stored: Sequence[tuple[Tensor, Tensor]] = ()) -> Any:
        """Return the library's cache of keys and values, one entry for the whole batch."""
        from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

        cache = GlmImageKVCache(num_layers=self.transformer.config.num_layers)
        for layer, (keys, values) in zip(cache.caches, stored, strict=bool(stored)):
            layer.store(keys, values)
        cache.set_mode(mode)
        return cache

    def guided_velocity(self, x: Tensor, sigma: Tensor, seen: Seen, guidance: float) -> Tensor:
        """Return the velocity [B, C, h, w] in float32 at noise `sigma` [B] under classifier-free guidance (arXiv
        2207.12598)."""
        time = self.timesteps(sigma, x.shape)
        given = self._velocity_by_length(x, time, seen)
        if guidance == 1.0:
            return given
        without = self._unconditional(x, time, seen)
        return without + guidance * (given - without)

    def flow_residual(
        self, condition: Rows, latents: Tensor, uniform: Tensor, noise: Tensor, drop: Tensor
    ) -> Tensor:
        """Return v − (noise − x) [B, C, h, w] in float32 at a timestep of `uniform` [B] in [0, 1) of all there are;
        `drop` [B] bool, where the condition is the unconditional one."""
        steps = self.scheduler.config.num_train_timesteps
        even = ((uniform * steps).floor() + 1) / steps  # whole timesteps, which are all that it knows
        sigma = self._shifted(even, latents.shape)
        level = sigma[:, None, None, None]
        noisy, seen = (1 - level) * latents + level * noise, self.seen(condition, 1.0)
        time = self.timesteps(sigma, latents.shape)
        velocity = self._velocity_by_length(noisy, time, seen)
        if drop.any():
            without = self._unconditional(noisy, time, seen)
            velocity = torch.where(drop[:, None, None, None], without, velocity)
        return velocity - (noise - latents)

    def _unconditional(self, x: Tensor, time: Tensor, seen: Seen) -> Tensor:
        no_glyphs = seen.no_glyphs.expand(len(x), -1, -1)
        return self._velocity(x, time, seen.prior, no_glyphs, drop=True)

    def _velocity_by_length(self, x: Tensor, time: Tensor, seen: Seen) -> Tensor:
        """Ask the transformer for rows of equally many glyphs at a time. It has no mask that works: the library's adds
        1 to the scores of what may be seen, and padded rows would change a picture with its neighbours."""
        lengths = [len(glyphs) for glyphs in seen.glyphs]
        found: list[Tensor] = [x] * len(x)
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            glyphs = torch.stack([seen.glyphs[row] for row in rows])
            source = [(keys[rows], values[rows]) for keys, values in seen.source or ()]
            cache = self._cache("read", source) if source else None
            part = self._velocity(x[rows], time[rows], seen.prior[rows], glyphs, False, cache)
            for row, velocity in zip(rows, part, strict=True):
                found[row] = velocity
        return torch.stack(found)

    def _velocity(
        self, x: Tensor, time: Tensor, prior: Tensor, glyphs: Tensor, drop: bool, cache: Any = None
    ) -> Tensor:
        dtype = self.transformer.dtype
        height, width = (side * self.compression for side in x.shape[-2:])
        velocity: Tensor = self.transformer(
            hidden_states=x.to(dtype),
            encoder_hidden_states=glyphs.to(dtype),
            prior_token_id=prior,
            prior_token_drop=torch.full_like(prior, drop, dtype=torch.bool),
            timestep=time,
            target_size=x.new_tensor([[height, width]], dtype=dtype).repeat(len(x), 1),
            crop_coords=x.new_zeros(len(x), 2, dtype=dtype),  # nothing is cut off
            return_dict=False,
            kv_caches=cache,
        )[0]
        return velocity.float()

    @torch.no_grad()
    def latents(self, condition: Rows, noise: Tensor, guidance: float, steps: int) -> Tensor:
        """Integrate from `noise` [B, C, h, w] to latents with Euler steps, given a condition [B]."""
        seen = self.seen(condition, guidance)
        x = noise.to(self.transformer.device)
        for sigma, following in pairwise(self.sigmas(steps, noise.shape[1:]).to(x.device)):
            v = self.guided_velocity(x, sigma.expand(len(x)), seen, guidance)
            x = x + (following - sigma) * v.to(x.dtype)  # the state stays in the noise's precision
        return x

    # ---- pixels ----------------------------------------------------------------------------------------------

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of latents, [C, 1, 1] each."""
        config = self.vae.config
        mean, std = (like.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
        return mean, std

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures [B, 3, H, W] in [-1, 1] as latents [B, C, h, w] at the transformer's scale. Memory is that of
        a few pictures, whatever B."""
        few = pictures.to(self.vae.dtype).split(max(1, MAX_PIXELS // math.prod(pictures.shape[-2:])))
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in few])
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        """Draw latents [B, C, h, w] as pictures [B, 3, H, W] in [0, 1]. Memory is that of a few pictures, whatever B.

        Raises ImageRLError for pixels that are not finite, which would be black ones in silence."""
        latents = latents.to(self.vae.dtype)
        mean, std = self._statistics(latents)
        pixels = latents.shape[-2] * latents.shape[-1] * self.compression**2
        few = (latents * std + mean).split(max(1, MAX_PIXELS // pixels))
        return drawn(torch.cat([self.vae.decode(part).sample.float() for part in few]))
