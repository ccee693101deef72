"""The whole generator: a language model that writes image tokens and a decoder that draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.ar import ARPolicy, ImageVocabulary
from models.ar_sampler import TokenSampler
from models.flow_decoder import FlowDecoder
from models.flow_policy import FlowPolicy
from models.image_tokenizer import FSQTokenizer
from rl.types import FlowSampling, FlowTrajectory, ImageRLError, TokenScores, TokenTrajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM = "You are a helpful assistant."
REQUEST = "Please generate image based on the following caption: {caption}"


class ImagePolicy:
    """Implements `rl.types.Policy`. In RL only `trainable`, the autoregressive half, has gradients, and
    `flow.trainable` of the decoder once `train_decoder` was called."""

    def __init__(
        self,
        ar: ARPolicy,
        decoder: FlowDecoder,
        text_tokenizer: PreTrainedTokenizerBase,
        num_tokens: int,
        image_tokenizer: FSQTokenizer | None = None,
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
        )
        new.vae.load_state_dict(old.vae.state_dict())
        self.decoder = new.to(self.device)
        return self.decoder

    def encode_prompts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> ids and mask [B, L], left-padded, each ending in `<im_start><S0>`."""
        for text in texts:
            if not text.strip():
                raise ImageRLError("a prompt is empty; every prompt needs a caption")
        tags = [self.vocabulary.image_start_tag_id, self.vocabulary.scale_start_token_id]
        rows = [self._chat_ids(text) + tags for text in texts]
        longest = max(len(row) for row in rows)
        pad = self.text_tokenizer.pad_token_id or 0
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, dtype=torch.bool, device=self.device)

    def _chat_ids(self, caption: str) -> list[int]:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": REQUEST.format(caption=caption)},
        ]
        text = self.text_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.text_tokenizer(text, add_special_tokens=False)["input_ids"]

    def refresh_sampler(self) -> None:
        """Lay out the present weights for sampling, in `sampler_dtype`. Call after every update, parameters
        gathered."""
        self._sampler = TokenSampler(self.trainable, self.sampler_dtype)

    def sample_tokens(
        self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, temperature: float
    ) -> TokenTrajectory:
        """Draw tokens for uniforms [P·G, T] after prompts [P, L]; see `TokenSampler.sample`."""
        if self._sampler is None:
            self.refresh_sampler()
        assert self._sampler is not None
        return self._sampler.sample(prompt_ids, prompt_mask, uniforms.to(self.device), temperature)

    def decode(self, hidden: Tensor, noise: Tensor, guidance: float, steps: int) -> Tensor:
        """Hidden states [B, T + 1, D] and noise [B, C, h, w] -> pictures [B, 3, H, W] in [0, 1]."""
        self.decoder.require_shape(noise)
        noise = noise.to(self.device)
        return self.decoder.draw(self.decoder.latents(hidden, noise, guidance, steps))

    def train_decoder(self) -> FlowPolicy:
        """Make the decoder a policy over its denoising steps, with gradients."""
        self.flow = FlowPolicy(self.decoder)
        return self.flow

    def decode_steps(
        self, hidden: Tensor, noise: Tensor, step_noise: Tensor, sampling: FlowSampling
    ) -> tuple[Tensor, FlowTrajectory]:
        """`decode` by stochastic steps: pictures [B, 3, H, W] in [0, 1], and what replaying the steps needs.

        `step_noise` [B, S, C, h, w] is the noise of the steps in `sampling.window`."""
        if self.flow is None:
            raise ImageRLError("the decoder does not train: call train_decoder() first")
        self.decoder.require_shape(noise)
        noise, step_noise = noise.to(self.device), step_noise.to(self.device)
        latents, trajectory = self.flow.sample(hidden, noise, step_noise, sampling)
        return self.decoder.draw(latents), trajectory

    def freeze_reference(self) -> None:
        """Remember the present policy as the KL reference: a frozen copy of the autoregressive half, or nothing
        at all with LoRA, where the reference is the base with adapters off."""
        import copy

        if self.trainable.adapter is None:
            self._reference = copy.deepcopy(self.trainable).requires_grad_(False).eval()

    @torch.no_grad()
    def reference_scores(
        self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, temperature: float
    ) -> TokenScores:
        """Scores of tokens [B, T] under the frozen reference."""
        if self._reference is not None:
            return self._reference(prompt_ids, prompt_mask, tokens, temperature)
        if self.trainable.adapter is None:
            raise ImageRLError("no reference policy: call freeze_reference() before training with KL")
        with self.trainable.base_weights():
            return self.trainable(prompt_ids, prompt_mask, tokens, temperature)
