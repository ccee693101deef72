"""The whole generator: a language model that writes image tokens, and a VQ decoder that draws them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from imagerl.models.common.policy import BasePolicy, drawn, recompute_layers
from imagerl.models.common.supervised import TokenLessons, TokenModule
from imagerl.models.common.token_sampler import TokenSampler
from imagerl.models.common.tokens import pad_left
from imagerl.models.janus_pro.ar import Blank, JanusAR
from imagerl.models.janus_pro.prompts import JanusPrompts
from imagerl.rl.types import ImageRLError, Prompt, Rows, SamplingParams, TokenTrajectory

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration

    from imagerl.models.base import DecoderPolicy, Lessons


class JanusPolicy(BasePolicy):
    """Implements `models.base.Policy` around transformers' own model, whose layers `trainable` shares. The VQ decoder
    and the tower that reads pictures never train."""

    trainable: JanusAR

    def __init__(
        self,
        model: JanusForConditionalGeneration,
        prompts: JanusPrompts,
        blank: Blank,
        sampling: SamplingParams,
        scale: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        """Take transformers' model; `scale` is the mean and deviation of what its decoder draws, per colour value."""
        super().__init__(JanusAR(model, blank).eval(), sampling)
        self.model = model
        self.prompts = prompts
        self.scale = scale
        self._sampler: TokenSampler | None = None

    def parts(self) -> dict[str, nn.Module]:
        own, whole = set(self.trainable.modules()), (*self.model.model.children(), self.model.lm_head)
        rest = nn.ModuleList(part for part in whole if part not in own)
        return {"language model": self.trainable, "VQ decoder and vision tower": rest}

    def blank(
        self, prompts: int, length: int, samples: int, edits: bool = False
    ) -> tuple[Rows, TokenTrajectory]:
        """Return prompts and a trajectory without content."""
        shape = (samples, self.prompts.canvas(Prompt(0, "")).tokens)
        ids, mask = (torch.empty(prompts, length, dtype=kind) for kind in (torch.int64, torch.bool))
        tokens, actions = (torch.empty(shape, dtype=kind) for kind in (torch.int64, torch.bool))
        return {"ids": ids, "mask": mask}, TokenTrajectory(tokens, torch.empty(shape), actions)

    def token_bytes(self) -> tuple[int, int]:
        """Count keys and values, of both branches where tokens are guided. The decoder needs the tokens alone."""
        config = self.trainable.lm.config
        cache = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
        branches = 1 if self.sampling.token_guidance == 1 else 2
        return branches * cache * self.sampler_dtype.itemsize, 0

    def encode(self, prompts: Sequence[Prompt], to_draw: bool = True) -> Rows:
        """Encode captions as ids and mask [P, L], left-padded, each ending in the begin of the image."""
        self.prompts.require(prompts)
        return self._padded([self.prompts.caption(prompt.text) for prompt in prompts])

    def _padded(self, rows: list[list[int]]) -> Rows:
        ids, mask = pad_left(rows, self.prompts.pad)
        return {"ids": ids.to(self.device), "mask": mask.to(self.device)}

    def refresh_sampler(self) -> None:
        """Lay out the present weights for sampling, in `sampler_dtype`."""
        self._sampler = None  # before the new one needs its memory
        trainable, dtype = self.trainable, self.sampler_dtype
        head = copy.deepcopy(trainable.generation_head).requires_grad_(False)
        for parameter in head.parameters():  # one by one: `to` has no effect on those without content
            parameter.data = parameter.data.to(dtype)
        with torch.no_grad():
            image_rows = trainable.image_embedding()
        self._sampler = TokenSampler(trainable.lm, image_rows, head, dtype)

    def sample_tokens(self, prompts: Rows, uniforms: Tensor, sampling: SamplingParams) -> TokenTrajectory:
        """Draw tokens for uniforms [P·G, T] after P prompts; see `TokenSampler.sample`."""
        if self._sampler is None:
            self.refresh_sampler()
        assert self._sampler is not None
        guidance = sampling.token_guidance
        ids = self.trainable.prompt_ids(prompts, guidance)
        uniforms = uniforms.to(self.device)
        return self._sampler.sample(ids, uniforms, sampling.temperature, guidance, keep_hidden=False)

    def decode(
        self, prompts: Rows, trajectory: TokenTrajectory, noise: Tensor | None, sampling: SamplingParams
    ) -> Tensor:
        """Draw tokens [B, T] as pictures [B, 3, H, W] in [0, 1], as the processor scales them. Raises ImageRLError for
        pixels that are not finite."""
        return drawn(self.model.decode_image_tokens(trajectory.tokens).permute(0, 3, 1, 2), *self.scale)

    def recompute(self) -> None:
        recompute_layers(self.trainable.lm)
        self.trainable.lm.train()  # Llama is what it is otherwise

    def train_decoder(self) -> DecoderPolicy:
        raise ImageRLError(
            "Janus-Pro's decoder draws tokens as they are: it has no denoising steps to train; remove algorithm.flow"
        )

    def lessons(self, on_prompt: bool, with_flow: bool) -> Lessons:
        """Teach the language model and the layers of image tokens, with and without the caption, as guidance asks."""
        return TokenLessons(self, TokenModule(self.trainable, self.trainable.unconditional))

    @torch.no_grad()
    def tokens_of(self, pictures: Tensor) -> Tensor:
        """Return the image tokens [B, T] of pictures [B, 3, H, W] in [-1, 1], as the VQ encoder reads them."""
        tokens: Tensor = self.model.model.vqmodel.encode(
            pictures.to(self.device, self.model.dtype)
        ).image_tokens
        return tokens.view(len(pictures), -1)

    @torch.no_grad()
    def answer(
        self, pictures: Iterable[Image.Image], questions: Sequence[str], max_new_tokens: int = 64
    ) -> list[str]:
        """Return the model's own words about pictures: greedy decoding, as transformers' `generate` does it."""
        rows = self._padded([self.prompts.question(question) for question in questions])
        pixels = self.prompts.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        written = self.model.generate(
            input_ids=rows["ids"],
            attention_mask=rows["mask"],
            pixel_values=pixels.to(self.device, self.model.dtype),
            generation_mode="text",
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        answers = self.prompts.processor.tokenizer.batch_decode(
            written[:, rows["ids"].shape[1] :], skip_special_tokens=True
        )
        return [answer.strip() for answer in answers]

    def save(self, folder: Path, layout: str, base: Path, dtype: torch.dtype | None) -> None:
        """Write the hub's layout; see `models.janus_pro.loading`."""
        from imagerl.models.janus_pro.loading import save_policy

        save_policy(self, folder, dtype)
