"""The whole generator: a language model that writes image tokens and a decoder that draws them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from imagerl.models.blip3o_next.ar import ARPolicy, ImageVocabulary
from imagerl.models.blip3o_next.ar_sampler import TokenSampler
from imagerl.models.blip3o_next.flow_decoder import FlowDecoder
from imagerl.models.blip3o_next.flow_policy import FlowPolicy
from imagerl.models.blip3o_next.prompts import TURN_END, PromptEncoder, Rows, pad_left
from imagerl.models.blip3o_next.understanding import greedy_text
from imagerl.models.common.image_tokenizer import ImageTokenizer
from imagerl.models.common.pictures import prepare_picture
from imagerl.rl.types import FlowSampling, FlowTrajectory, ImageRLError, TokenScores, TokenTrajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ImagePolicy:
    """Implements `rl.types.Policy`. In RL only `trainable`, the autoregressive half, has gradients, and
    `flow.trainable` of the decoder once `train_decoder` was called."""

    def __init__(
        self,
        ar: ARPolicy,
        decoder: FlowDecoder,
        text_tokenizer: PreTrainedTokenizerBase,
        num_tokens: int,
        image_tokenizer: ImageTokenizer | None = None,
    ) -> None:
        self.trainable = ar
        self.decoder = decoder
        self.flow: FlowPolicy | None = None
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.num_actions = num_tokens
        self.sampler_dtype = torch.float32
        self._reference: ARPolicy | None = None
        self._sampler: TokenSampler | None = None

    @property
    def vocabulary(self) -> ImageVocabulary:
        return self.trainable.vocabulary

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.decoder.latent_shape

    @property
    def device(self) -> torch.device:
        return self.trainable.lm.device

    def to(self, device: torch.device | str) -> ImagePolicy:
        for module in (self.trainable, self.decoder, self.image_tokenizer, self._reference):
            if module is not None:
                module.to(device)
        return self

    def renew_decoder(self) -> FlowDecoder:
        """Put a decoder with fresh weights, drawn from torch's global generator, in the place of the present one,
        whose autoencoder it keeps."""
        old = self.decoder
        new = FlowDecoder(
            self.trainable.lm.config.hidden_size,
            old.sana.config,
            old.vae.config,
            old.scheduler_config,
            (old.latent_shape[1], old.latent_shape[2]),
            edit=old.reference_connector is not None,
        )
        new.vae.load_state_dict(old.vae.state_dict())
        self.decoder = new.to(self.device)
        return self.decoder

    @cached_property
    def prompts(self) -> PromptEncoder:
        positions = self.trainable.lm.config.max_position_embeddings
        return PromptEncoder(self.text_tokenizer, self.vocabulary, positions, self.num_actions)

    def _padded(self, rows: Rows) -> tuple[Tensor, Tensor]:
        ids, mask = pad_left(rows, self.prompts.pad)
        return ids.to(self.device), mask.to(self.device)

    def encode_prompts(
        self, texts: Sequence[str], reference_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode captions as ids and mask [P, L], left-padded, each ending in `<im_start><S0>`. With the tokens
        [P, T] of reference pictures the texts are instructions that edit these.

        Raises ImageRLError for an empty text, and for references when the model cannot read pictures."""
        if reference_tokens is None:
            return self._padded(self.prompts.captions(texts))
        return self._padded(self.prompts.edits(texts, reference_tokens))

    def encode_questions(self, texts: Sequence[str], picture_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode questions about pictures of tokens [P, T] as ids and mask [P, L], left-padded; the answer follows."""
        return self._padded(self.prompts.questions(texts, picture_tokens))

    def answer(self, picture_tokens: Tensor, questions: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Return the model's own words about pictures of tokens [P, T]: greedy decoding up to the end of its turn."""
        ids, mask = self.encode_questions(questions, picture_tokens)
        stop = {
            self.prompts.id_of(TURN_END),
            self.text_tokenizer.eos_token_id,
            self.text_tokenizer.pad_token_id,
        }
        rows = greedy_text(self.trainable, ids, mask, stop, max_new_tokens)
        return [self.text_tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    def reference_of(self, pictures: Sequence[Image.Image] | Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts of reference pictures that an edit needs: tokens [P, T] and latents [P, C, h, w].

        `pictures` are PIL pictures of any size and mode, or a tensor [P, 3, H, W] in [-1, 1] of the decoder's size.
        Raises ImageRLError when the model cannot edit or a picture cannot be read."""
        if isinstance(pictures, Tensor):
            self.decoder.require_edit()
            return self.tokens_of(pictures), self.decoder.encode(pictures.to(self.device))
        return self.picture_tokens(pictures), self.picture_latents(pictures)

    def picture_tokens(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return tokens [P, T] of PIL pictures of any size and mode. Raises ImageRLError like `reference_of`."""
        tokenizer = self.require_tokenizer()
        self.decoder.require_edit()
        small = torch.stack([prepare_picture(picture, tokenizer.picture_size) for picture in pictures])
        return tokenizer.encode(small.to(self.device))

    def picture_latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return latents [P, C, h, w] of PIL pictures of any size and mode. Raises ImageRLError like `reference_of`."""
        self.decoder.require_edit()
        size = self.decoder.picture_size
        large = torch.stack([prepare_picture(p, size, Image.Resampling.BILINEAR) for p in pictures])
        return self.decoder.encode(large.to(self.device))

    def tokens_of(self, pictures: Tensor) -> Tensor:
        """Return image tokens [P, T] of pictures [P, 3, H, W] in [-1, 1] of the decoder's size."""
        tokenizer = self.require_tokenizer()
        if tokenizer.picture_size != self.decoder.picture_size:
            small = F.interpolate(pictures, tokenizer.picture_size, mode="bicubic", antialias=True)
            pictures = small.clamp(-1, 1)
        return tokenizer.encode(pictures.to(self.device))

    def require_tokenizer(self) -> ImageTokenizer:
        """Raise ImageRLError when the model came without its image tokenizer."""
        if self.image_tokenizer is None:
            raise ImageRLError("this model has no image tokenizer: it cannot read pictures")
        return self.image_tokenizer

    def refresh_sampler(self) -> None:
        """Lay out the present weights for sampling, in `sampler_dtype`. Call after every update, parameters
        gathered."""
        self._sampler = None  # before the new one needs its memory
        self._sampler = TokenSampler(self.trainable, self.sampler_dtype)

    def sample_tokens(
        self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, temperature: float
    ) -> TokenTrajectory:
        """Draw tokens for uniforms [P·G, T] after prompts [P, L]; see `TokenSampler.sample`."""
        if self._sampler is None:
            self.refresh_sampler()
        assert self._sampler is not None
        return self._sampler.sample(prompt_ids, prompt_mask, uniforms.to(self.device), temperature)

    def decode(
        self, hidden: Tensor, noise: Tensor, guidance: float, steps: int, reference: Tensor | None = None
    ) -> Tensor:
        """Decode hidden states [B, T + 1, D] and noise [B, C, h, w] to pictures [B, 3, H, W] in [0, 1].

        `reference` [P, C, h, w] are the latents of the pictures that an edit starts from, B = P·G group-major."""
        self.decoder.require_shape(noise)
        noise = noise.to(self.device)
        if reference is not None:
            reference = reference.to(self.device).repeat_interleave(len(noise) // len(reference), 0)
        return self.decoder.draw(self.decoder.latents(hidden, noise, guidance, steps, reference))

    def train_decoder(self) -> FlowPolicy:
        """Make the decoder a policy over its denoising steps, with gradients."""
        self.flow = FlowPolicy(self.decoder)
        return self.flow

    def decode_steps(
        self, hidden: Tensor, noise: Tensor, step_noise: Tensor, sampling: FlowSampling
    ) -> tuple[Tensor, FlowTrajectory]:
        """Decode by stochastic steps: pictures [B, 3, H, W] in [0, 1], and what replaying the steps needs.

        `step_noise` [B, S, C, h, w] is the noise of the steps in `sampling.window`."""
        if self.flow is None:
            raise ImageRLError("the decoder does not train: call train_decoder() first")
        self.decoder.require_shape(noise)
        noise, step_noise = noise.to(self.device), step_noise.to(self.device)
        latents, trajectory = self.flow.sample(hidden, noise, step_noise, sampling)
        return self.decoder.draw(latents), trajectory

    def freeze_reference(self) -> None:
        """Remember the present policy as the KL reference: a frozen copy of the autoregressive half, or of the adapter
        alone where one trains. Called again, parameters gathered, it renews the copy of a half."""
        if self.trainable.adapter is not None:
            self.trainable.keep_reference()
        elif self._reference is None:
            self._reference = copy.deepcopy(self.trainable).requires_grad_(False).eval()
        else:
            self.load_reference({n: p.data for n, p in self.trainable.named_parameters()})

    def reference_state(self) -> dict[str, Tensor]:
        """Return the weights of the frozen copy by name; empty where there is none."""
        return {} if self._reference is None else {n: p.data for n, p in self._reference.named_parameters()}

    @torch.no_grad()
    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Give the frozen copy other weights."""
        own = self.reference_state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[0]
            raise ImageRLError(
                f"the checkpoint's reference is of another model ({odd}); resume with the same model"
            )
        for name, weight in state.items():
            own[name].copy_(weight)

    @torch.no_grad()
    def reference_scores(
        self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, temperature: float
    ) -> TokenScores:
        """Score tokens [B, T] under the frozen reference."""
        if self._reference is not None:
            return self._reference(prompt_ids, prompt_mask, tokens, temperature)
        if self.trainable.adapter is None:
            raise ImageRLError("no reference policy: call freeze_reference() before training with KL")
        with self.trainable.reference_weights():
            return self.trainable(prompt_ids, prompt_mask, tokens, temperature)
