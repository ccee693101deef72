"""The whole generator: a language model that writes image tokens and a decoder that draws them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from imagerl.models.blip3o_next.ar import TAGS, ARPolicy, ImageVocabulary
from imagerl.models.blip3o_next.flow_decoder import CaptionKeys, FlowDecoder
from imagerl.models.blip3o_next.prompts import TURN_END, PromptEncoder, canvas_of
from imagerl.models.blip3o_next.supervised import Lessons
from imagerl.models.blip3o_next.understanding import greedy_text
from imagerl.models.common.flow_policy import FlowPolicy
from imagerl.models.common.image_tokenizer import ImageTokenizer
from imagerl.models.common.pictures import prepare_picture
from imagerl.models.common.policy import BasePolicy, recompute_layers
from imagerl.models.common.settings import SamplingSettings, stored_sampling
from imagerl.models.common.token_sampler import TokenSampler
from imagerl.models.common.tokens import PromptIds, pad_left
from imagerl.rl.types import ImageRLError, Prompt, Rows, SamplingParams, Thoughts, TokenTrajectory, repeat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from imagerl.models.base import Proof

ROW_TYPES = {"ids": torch.int64, "mask": torch.bool}


class ImagePolicy(BasePolicy):
    """Implements `models.base.Policy`. In RL only `trainable`, the autoregressive half, has gradients, and
    `flow.trainable` of the decoder once `train_decoder` was called."""

    trainable: ARPolicy

    def __init__(
        self,
        ar: ARPolicy,
        decoder: FlowDecoder,
        text_tokenizer: PreTrainedTokenizerBase,
        config: Mapping[str, Any],
        image_tokenizer: ImageTokenizer | None = None,
    ) -> None:
        """Put the parts together; `config` is config.json in our form."""
        super().__init__(ar, SamplingSettings.model_validate(config["sampling"]).params())
        self.config = dict(config)
        self.decoder = decoder
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.num_actions = int(config["num_image_positions"])
        self._sampler: TokenSampler | None = None

    @property
    def vocabulary(self) -> ImageVocabulary:
        return self.trainable.vocabulary

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.decoder.latent_shape

    def to(self, device: torch.device | str) -> ImagePolicy:
        for module in (*self.parts().values(), *([] if self._reference is None else [self._reference])):
            module.to(device)
        return self

    def parts(self) -> dict[str, nn.Module]:
        decoder = [part for name, part in self.decoder.named_children() if name != "vae"]
        tokenizer = {} if self.image_tokenizer is None else {"image tokenizer": self.image_tokenizer}
        return {
            "language model": self.trainable,
            "connector and decoder": nn.ModuleList(decoder),
            "autoencoder": self.decoder.vae,
            **tokenizer,
        }

    def blank(
        self, prompts: int, length: int, samples: int, edits: bool = False
    ) -> tuple[Rows, TokenTrajectory]:
        """Return prompts and a trajectory without content."""
        rows = {name: torch.empty(prompts, length, dtype=kind) for name, kind in ROW_TYPES.items()}
        if edits:
            rows["reference"] = self.decoder.encode(torch.empty(prompts, 3, *self.decoder.picture_size))
        shape, width = (samples, self.num_actions), self.trainable.lm.config.hidden_size
        hidden = torch.empty(samples, self.num_actions + 1, width, dtype=self.sampler_dtype)
        tokens, mask = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)
        return rows, TokenTrajectory(tokens, torch.empty(shape), mask, {"hidden": hidden})

    def token_bytes(self) -> tuple[int, int]:
        """Count keys, values and hidden states; these are a list while drawing, and stacked at its end."""
        config, width = self.trainable.lm.config, self.sampler_dtype.itemsize
        hidden = config.hidden_size * width
        cache = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * width
        return cache + 2 * hidden, hidden

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
        return PromptEncoder(self.text_tokenizer, self.vocabulary, positions, canvas_of(self.config))

    def encode(self, prompts: Sequence[Prompt], to_draw: bool = True) -> Rows:
        """Encode prompts as `encode_prompts` does; with pictures to edit the rows hold their latents too.

        Raises ImageRLError when only some of the prompts have a picture."""
        texts = [prompt.text for prompt in prompts]
        pictures = [prompt.reference for prompt in prompts if prompt.reference is not None]
        if pictures and len(pictures) < len(texts):
            raise ImageRLError(
                f"{len(pictures)} of {len(texts)} prompts have a picture to edit; put edits in a prompt set of "
                "their own"
            )
        ids, mask = self.encode_prompts(texts, self.picture_tokens(pictures) if pictures else None)
        rows = {"ids": ids, "mask": mask}
        return rows | {"reference": self.picture_latents(pictures)} if pictures and to_draw else rows

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
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

    @torch.no_grad()
    def answer(
        self, pictures: Iterable[Image.Image], questions: Sequence[str], max_new_tokens: int = 64
    ) -> list[str]:
        """Return the model's own words about pictures: greedy decoding up to the end of its turn."""
        ids, mask = self.encode_questions(questions, self.picture_tokens(pictures))
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

    def picture_tokens(self, pictures: Iterable[Image.Image]) -> Tensor:
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
        model, head = self.trainable.lm.model, self.trainable.head.detach().to(self.sampler_dtype)
        image_rows = model.embed_tokens.weight[self.vocabulary.columns]
        self._sampler = TokenSampler(
            model, image_rows, lambda hidden: F.linear(hidden, head), self.sampler_dtype
        )

    def release_sampler(self) -> None:
        self._sampler = None

    def recompute(self) -> None:
        recompute_layers(self.trainable.lm)
        self.trainable.lm.train()  # Qwen3 is what it is otherwise
        self.decoder.sana.enable_gradient_checkpointing()

    def sample_tokens(self, prompts: Rows, uniforms: Tensor, sampling: SamplingParams) -> TokenTrajectory:
        """Draw tokens for uniforms [P·G, T] after P prompts; see `TokenSampler.sample`."""
        if self._sampler is None:
            self.refresh_sampler()
        assert self._sampler is not None
        ids = PromptIds(prompts["ids"], prompts["mask"])
        return self._sampler.sample(ids, uniforms.to(self.device), sampling.temperature)

    def decode(
        self, prompts: Rows, trajectory: TokenTrajectory, noise: Tensor | None, sampling: SamplingParams
    ) -> Tensor:
        """Decode hidden states [B, T + 1, D] and noise [B·M, C, h, w] to pictures [B·M, 3, H, W] in [0, 1]."""
        assert noise is not None
        self.decoder.require_shape(noise)
        noise = noise.to(self.device)
        hidden = repeat(trajectory.states, len(noise) // len(trajectory.tokens))["hidden"]
        reference = prompts.get("reference")
        if reference is not None:
            reference = reference.to(self.device).repeat_interleave(len(noise) // len(reference), 0)
        latents = self.decoder.latents(hidden, noise, sampling.guidance, sampling.flow_steps, reference)
        return self.decoder.draw(latents)

    learns_flow = True

    def lessons(self, on_prompt: bool, with_flow: bool) -> Lessons:
        """Teach language model, connector and decoder; see `models.blip3o_next.supervised`."""
        return Lessons(self, on_prompt, with_flow)

    @cached_property
    def thought_ids(self) -> Tensor:
        """The ids [W] of `PromptEncoder.thought_ids`."""
        return torch.tensor(self.prompts.thought_ids, device=self.device)

    def think(self, prompts: Rows, uniforms: Tensor, sampling: SamplingParams) -> Thoughts:
        """Write thoughts for uniforms [P·G, N] after P prompts, by the sampler's own layers: text up to the token that
        begins a picture, or N tokens."""
        if self._sampler is None:
            self.refresh_sampler()
        assert self._sampler is not None
        lm, ids = self.trainable.lm, self.thought_ids
        head = lm.lm_head.weight[ids].detach().to(self.sampler_dtype)
        writer = TokenSampler(
            lm.model,
            lm.model.embed_tokens.weight[ids],
            lambda hidden: F.linear(hidden, head),
            self.sampler_dtype,
            self._sampler.layers,
        )
        before = PromptIds(prompts["ids"][:, :-TAGS], prompts["mask"][:, :-TAGS])
        drawn = writer.sample(before, uniforms.to(self.device), sampling.temperature, keep_hidden=False)
        ends = drawn.tokens == len(ids) - 1
        return Thoughts(drawn.tokens, drawn.rollout_logprobs, ends.cumsum(1) - ends.long() == 0)

    def after_thoughts(self, prompts: Rows, thoughts: Thoughts) -> Rows:
        """Return rows [B] of prompt, thought and `<im_start><S0>`; what a thought leaves of its N places is masked."""
        tokens, actions = thoughts.tokens.to(self.device), thoughts.action_mask.to(self.device)
        rows = repeat(prompts, len(tokens) // len(prompts["ids"]))
        for half in (self.trainable, self._reference):
            if isinstance(half, ARPolicy):
                half.thought_ids = self.thought_ids
        written = actions & (tokens < len(self.thought_ids) - 1)
        text = torch.where(written, self.thought_ids[tokens], self.prompts.pad)
        ids, mask = rows["ids"], rows["mask"]
        return rows | {
            "ids": torch.cat([ids[:, :-TAGS], text, ids[:, -TAGS:]], dim=1),
            "mask": torch.cat([mask[:, :-TAGS], written, mask[:, -TAGS:]], dim=1),
            "thought": tokens,
        }

    def thought_texts(self, thoughts: Thoughts) -> list[str]:
        written = thoughts.action_mask & (thoughts.tokens < len(self.thought_ids) - 1)
        rows = zip(self.thought_ids[thoughts.tokens.to(self.device)], written, strict=True)
        return [self.text_tokenizer.decode(ids[kept.to(ids.device)].tolist()) for ids, kept in rows]

    def train_decoder(self) -> FlowPolicy[list[CaptionKeys]]:
        """Make the decoder a policy over its denoising steps, with gradients."""
        self.flow = flow = FlowPolicy(self.decoder)
        return flow

    def save(self, folder: Path, layout: str, base: Path, dtype: torch.dtype | None) -> None:
        """Write the policy in one of `layouts`; see `models.blip3o_next.exporting`."""
        from imagerl.models.blip3o_next import exporting, loading

        config = {**self.config, "sampling": stored_sampling(self.sampling)}
        if layout == "blip3o":
            exporting.save_published(self, folder, config, base, dtype)
        elif layout == "qwen3":
            exporting.save_language_model(self, folder, config, dtype)
        elif layout == "diffusers":
            exporting.save_diffusers(self, folder, dtype)
        else:
            loading.save_policy(self, folder, config, dtype)

    def proof(self, folder: Path, layout: str, prompts: Sequence[Prompt]) -> Proof | None:
        """Return the logits of the language model, or the pixels of the decoder, where it alone was written."""
        from imagerl.models.blip3o_next.exporting import decoder_proof, language_model_proof

        if layout == "qwen3":
            return language_model_proof(self, folder, prompts)
        return decoder_proof(self, folder, len(prompts)) if layout == "diffusers" else None
