"""Score pictures by ImageReward (arXiv 2304.05977): BLIP reads caption and picture together, a network makes a number
of its first token.

The public file of weights has BLIP's own names of layers; transformers' classes compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from imagerl.rewards.clip.heads import PictureHead
from imagerl.rewards.hub import device_of, load_exactly, model_source, read_tensors, weights_file
from imagerl.rewards.pictures import decoded
from imagerl.rl.errors import ImageRLError, why
from imagerl.rl.files.bounds import Count
from imagerl.rl.types import RewardOutput

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw values, as its scoring code has them
LENGTH = 35  # tokens of a caption; longer ones are cut
HEAD_WIDTH = 64  # of each attention head, in both halves
VISION = (  # BLIP's names, and transformers'
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


class ImageRewardReward:
    """(raw − MEAN) / STD of ImageReward for a picture and its prompt: 0 on average over the pictures of its training
    set. No prompt: not applicable.

    `weights` is ImageReward.pt, here or as owner/repository/file on the hub; `tokenizer` a folder or hub name of
    BERT's. Raises ImageRLError when one of them cannot be loaded."""

    __name__ = "image_reward"

    def __init__(
        self,
        weights: str,
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str = "auto",
        batch_size: Count = 32,
    ) -> None:
        from transformers import (
            AutoTokenizer,
            BlipTextConfig,
            BlipTextModel,
            BlipVisionConfig,
            BlipVisionModel,
        )
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        label = self.__name__
        state = read_tensors(weights_file(weights, label), label)
        vision, text, head = (
            _below(state, part) for part in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
        )
        if not (vision and text and head):
            raise ImageRLError(f"reward {label!r}: {weights} holds no ImageReward (blip.…, mlp.…)")
        vision = {_renamed(name): value for name, value in vision.items()}
        patches = vision["embeddings.patch_embedding.weight"]
        side = int((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patches.shape[-1]
        seen, words = patches.shape[0], text["embeddings.word_embeddings.weight"]
        self._vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=seen,
                intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_layers(vision, "encoder.layers."),
                num_attention_heads=seen // HEAD_WIDTH,
                image_size=side,
                patch_size=patches.shape[-1],
                layer_norm_eps=1e-6,
            )
        )
        self._text = BlipTextModel(
            BlipTextConfig(
                vocab_size=words.shape[0],
                hidden_size=words.shape[1],
                encoder_hidden_size=seen,
                intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_layers(text, "encoder.layer."),
                num_attention_heads=words.shape[1] // HEAD_WIDTH,
                max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
            ),
            add_pooling_layer=False,
        )
        text.pop("embeddings.position_ids", None)  # a constant
        load_exactly(self._vision, vision, label, weights)
        load_exactly(self._text, text, label, weights)
        self._head = PictureHead(head, weights)
        source, local = model_source(tokenizer, label, "tokenizer")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, **local)
        except Exception as error:  # the hub's client, and whatever a folder may hold
            raise ImageRLError(
                f"reward {label!r}: tokenizer {tokenizer} cannot be loaded ({why(error)})"
            ) from error
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
        self._device, self._batch = device_of(device, label), batch_size
        for half in (self._vision, self._text):
            half.to(self._device).eval().requires_grad_(False)

    def __call__(self, *, prompts: Sequence[str], images: Sequence[Image.Image], **_: object) -> RewardOutput:
        asked = [index for index, prompt in enumerate(prompts) if prompt.strip()]
        values: list[float | None] = [None] * len(prompts)
        for start in range(0, len(asked), self._batch):
            rows = asked[start : start + self._batch]
            raw = self._raw([prompts[row] for row in rows], decoded([images[row] for row in rows]))
            for row, value in zip(rows, ((raw - MEAN) / STD).tolist(), strict=True):
                values[row] = value
        return RewardOutput(values, {}, None if len(asked) == len(prompts) else "a sample has no prompt")

    @torch.inference_mode()
    def _raw(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        seen = self._vision(pixels.to(self._device)).last_hidden_state
        words = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(self._device)
        read = self._text(
            words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self._device),
        )
        return self._head(read.last_hidden_state[:, 0].float().cpu())


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    for old, new in VISION:
        name = name.replace(old, new)
    return f"post_layer{name}" if name.startswith("norm.") else name


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
