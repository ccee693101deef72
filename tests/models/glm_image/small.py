"""Small random GLM-Image pipelines in the library's own classes: the oracle that ours must repeat.

Sizes are those of a config file beside the other parity fixtures, so `IMAGERL_PARITY_DIR` can name others."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from tests.parity import FOLDER, seeded_weight

PROMPTS = (
    'a sign that says "RIVER" in red',
    "two cats",
    "a cup with 'TEA' and “milk” beside \"ICE\"",
)
START, END, GRID_BEGIN, GRID_END = "<image_begin>", "<image_end>", "<sop>", "<eop>"
CHAT = (
    "{%- for message in messages %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}<image_begin><image><image_end>{%- else %}{{ part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endfor %}"
)


def sizes() -> dict[str, Any]:
    return json.loads((FOLDER / "glm_image.json").read_text(encoding="utf-8"))


def text_tokenizer(codes: int) -> Any:
    """A tokenizer of bytes: image codes first, then the image's begin and end, padding, text and the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [f"<code_{code}>" for code in range(codes)] + [START, END, "<unused>", *letters]
    names += [GRID_BEGIN, GRID_END, "<image>", "<pad>"]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=START,
        eos_token=END,
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={
            "image_token": "<image>",
            "grid_bos_token": GRID_BEGIN,
            "grid_eos_token": GRID_END,
        },
    )


@cache
def pipeline() -> Any:
    """The library's pipeline on seeded weights. Shared between tests: do not change it."""
    return build_pipeline()


def build_pipeline(layers: int | None = None) -> Any:
    """The same anew, or with another number of layers in both halves."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        GlmImagePipeline,
        GlmImageTransformer2DModel,
    )
    from transformers import (
        ByT5Tokenizer,
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageProcessor,
        T5Config,
        T5EncoderModel,
    )
    from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

    given = sizes()
    if layers is not None:
        given["vision_language_encoder"]["text_config"]["num_hidden_layers"] = layers
        given["transformer"]["num_layers"] = layers
    codes, names = given["codes"], text_tokenizer(given["codes"])
    ar = given["vision_language_encoder"]
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(names),
            "vision_vocab_size": codes + 3,
            "pad_token_id": names.pad_token_id,
            "eos_token_id": names.eos_token_id,
            **ar["text_config"],
        },
        vision_config=ar["vision_config"],
        vq_config={"num_embeddings": codes, **ar["vq_config"]},
        image_token_id=names.convert_tokens_to_ids("<image>"),
        image_start_token_id=names.bos_token_id,
        image_end_token_id=names.eos_token_id,
    )
    patch = ar["vision_config"]["patch_size"]
    pictures = GlmImageImageProcessorPil(
        patch_size=patch,
        temporal_patch_size=1,
        merge_size=1,
        size={"shortest_edge": patch**2, "longest_edge": 128**2},
    )
    pipe = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=GlmImageProcessor(pictures, names, chat_template=CHAT),
        text_encoder=T5EncoderModel(T5Config(**given["text_encoder"])),
        vision_language_encoder=GlmImageForConditionalGeneration(config),
        vae=AutoencoderKL(**given["vae"]),
        transformer=GlmImageTransformer2DModel(
            text_embed_dim=given["text_encoder"]["d_model"],
            prior_vq_quantizer_codebook_size=codes,
            **given["transformer"],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**given["scheduler"]),
    )
    pipe.set_progress_bar_config(disable=True)
    # The library lets an image end at any token. Ours writes image codes only, so here the library must, too.
    generation = pipe.vision_language_encoder.generation_config
    generation.suppress_tokens = list(range(codes, codes + 3))
    for part in (pipe.text_encoder, pipe.vision_language_encoder, pipe.vae, pipe.transformer):
        seed_weights(part, given["seed"])
    return pipe


def seed_weights(module: nn.Module, seed: int) -> None:
    """Fill a module with random weights that are large enough for every part to matter."""
    for name, weight in module.named_parameters():
        weight.data = seeded_weight(name, tuple(weight.shape), seed)
    module.requires_grad_(False).eval()


def saved(folder: Path) -> Path:
    """Write the pipeline as the library does: the layout of the hub."""
    pipeline().save_pretrained(folder)
    return folder


def small_folder(folder: Path) -> Path:
    """Write a pipeline of one layer that draws 64x32 pixels, not 1024x1024, where a prompt names no size."""
    build_pipeline(layers=1).save_pretrained(folder)
    (folder / "sampling.json").write_text('{"height": 64, "width": 32}')
    return folder
