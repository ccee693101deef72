"""A small Janus-Pro for square pictures of numbers: its VQ codes are trained here, its language model is left at random
for `imagerl sft`, with the pictures and prompts to train and judge it by.

The codebook is made by hand: the 2^bits corners of a cube, scaled to the unit sphere on which Janus looks codes up, so
that the nearest code is the signs of what the encoder says (binary spherical quantization, arXiv 2406.07548)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imagerl.rl.data.seeding import derive_seed, generator
from imagerl.rl.files.writing import atomic_folder
from tools.tiny.config import StageConfig
from tools.tiny.model import byte_pairs
from tools.tiny.number_world import scenes, write_world
from tools.tiny.samples import pictures
from tools.tiny.stages import LogFn, fit, reconstruction_loss, show

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration, JanusProcessor, PreTrainedTokenizerFast

SIDE = 32  # pixels of a picture's side, 4 of a token's
BITS = 10  # of a code: 1,024 codes
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
IMAGE, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
# As the published template: named tokens for the two speakers, the picture before the words, which are stripped.
CHAT = (
    "{% for message in messages %}<|User|>: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image_placeholder>\n{% else %}{{ part['text'].strip() }}{% endif %}"
    "{% endfor %}\n\n{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
WIDTH = 128
SIZES: dict[str, dict[str, Any]] = {
    "text_config": {
        "hidden_size": WIDTH,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    },
    "vision_config": {  # untrained: the model draws and reads nothing
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 4,
        "projection_dim": WIDTH,
        "num_image_tokens": 64,
    },
    "vq_config": {
        "embed_dim": BITS,
        "num_embeddings": 1 << BITS,
        "num_patches": 8,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 0,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    },
}
CODES = StageConfig(steps=1500, batch_size=16, lr=2e-3, warmup_steps=50, bf16=False)


def text_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a text tokenizer with the named tokens of Janus, which puts the begin of sequence before every text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    raw = byte_pairs(corpus, vocabulary, [BOS, EOS, PAD, IMAGE, BEGIN, END, USER, ASSISTANT])
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END},
    )


def new_model(
    sizes: dict[str, dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """Build the library's model with weights from torch's global generator, and its processor."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = sizes["vision_config"]
    config = JanusConfig(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **sizes["text_config"], **ids},
        vision_config=vision,
        vq_config=sizes["vq_config"],
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config).eval()
    generation = model.generation_config
    generation._from_model_config = False  # as the published converter does
    generation.guidance_scale = 5
    generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids(BEGIN)}
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    shown = JanusImageProcessorPil(size=side, min_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = JanusProcessor(
        shown,
        tokenizer,
        chat_template=CHAT,
        use_default_system_prompt=True,
        num_image_tokens=vision["num_image_tokens"],
    )
    return model, processor


def corners(bits: int) -> Tensor:
    """Return the corners of a cube in the unit sphere, [2^bits, bits]; the bits of a row's number are its signs."""
    signs = torch.arange(1 << bits)[:, None] >> torch.arange(bits) & 1
    return (2.0 * signs - 1) / bits**0.5


def redrawn(vq: Any, images: Tensor) -> Tensor:
    """Draw pictures [B, 3, H, W] again by their codes; the gradient passes straight through the rounding."""
    smooth = F.normalize(vq.quant_conv(vq.encoder(images)).float(), dim=1)
    code = smooth.sign() / smooth.shape[1] ** 0.5
    drawn: Tensor = vq.decoder(vq.post_quant_conv(smooth + (code - smooth).detach()))
    return drawn


def fit_codes(vq: Any, seen: Tensor, stage: StageConfig, log: LogFn) -> None:
    """Train encoder and decoder to draw pictures [N, 3, H, W] again; the codebook is and stays the cube's corners."""
    vq.requires_grad_(True)
    vq.quantize.embedding.weight.data.copy_(corners(vq.quantize.embedding_dim))
    vq.quantize.requires_grad_(False)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        wanted = seen[torch.randint(len(seen), (stage.batch_size,), generator=generator("codes", step))]
        return reconstruction_loss(redrawn(vq, wanted), wanted), {}

    fit("codes", vq, loss_of, stage, log)


def run(out: Path, steps: int, count: int, seed: int) -> None:
    """Write a new folder with `model`, `train` and `heldout` pictures, and prompts of both splits."""
    captions = [f"{USER}: {scene.caption}" for scene in scenes("train", 500)]
    torch.manual_seed(derive_seed(seed, "janus"))
    model, processor = new_model(SIZES, text_tokenizer(captions, 320))
    with atomic_folder(out) as folder:
        seen = pictures(scenes("train", count, seed), (SIDE, SIDE))
        fit_codes(model.model.vqmodel, seen, CODES.model_copy(update={"steps": steps}), show)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        write_world(folder, (SIDE, SIDE), count, seed)
