"""A small GLM-Image for pictures of numbers: what `imagerl sft` leaves frozen is fitted here, which is the autoencoder
and the codes; the vision tower and the text encoder stay at random, and so do the two halves that learn.

A picture of 64x32 is two tokens behind a preview of 11 by 22, and each code stands for a colour."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imagerl.models.glm_image.loading import SAMPLING, load_policy, quiet
from imagerl.models.glm_image.policy import GlmImagePolicy
from imagerl.models.glm_image.sizes import Size
from imagerl.rl.data.seeding import derive_seed, generator
from imagerl.rl.data.tiny.world import HEIGHT, WIDTH
from imagerl.rl.files.writing import atomic_folder
from tools.tiny.config import StageConfig
from tools.tiny.model import byte_pairs
from tools.tiny.number_world import scenes, write_world
from tools.tiny.samples import pictures
from tools.tiny.stages import LogFn, fit, reconstruction_loss, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START, END, GRID_BEGIN, GRID_END = "<image_begin>", "<image_end>", "<sop>", "<eop>"
CHAT = (
    "{%- for message in messages %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}<image_begin><image><image_end>{%- else %}{{ part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endfor %}"
)
LATENT = 16  # channels, each for 8x8 pixels
SIZES: dict[str, Any] = {
    "codes": 96,
    "vision_language_encoder": {
        "text_config": {
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "mrope_section": [6, 3, 3],
            },
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "image_size": 128,
            "patch_size": 16,
        },
        "vq_config": {"embed_dim": 24, "latent_channels": 32},
    },
    "text_encoder": {
        "vocab_size": 384,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    "transformer": {
        "patch_size": 2,
        "in_channels": LATENT,
        "out_channels": LATENT,
        "num_layers": 2,
        "attention_head_dim": 24,
        "num_attention_heads": 4,
        "time_embed_dim": 96,
        "condition_dim": 16,
    },
    "vae": {
        "block_out_channels": [16, 16, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "latent_channels": LATENT,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
        "latents_mean": [0.0] * LATENT,
        "latents_std": [1.0] * LATENT,
    },
    "scheduler": {
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
        "base_shift": 0.25,
        "max_shift": 0.75,
        "shift": 1.0,
    },
}
PIXELS = StageConfig(steps=600, batch_size=16, lr=3e-3, warmup_steps=20, bf16=False)


def text_tokenizer(codes: int, corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a text tokenizer of bytes and 64 pairs of them. Image codes come first, then the image's begin and end."""
    from transformers import PreTrainedTokenizerFast

    names = [*(f"<code_{code}>" for code in range(codes)), START, END, "<unused>"]
    names += [GRID_BEGIN, GRID_END, "<image>", "<pad>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(corpus, len(names) + 256 + 64, names),
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


def new_pipeline(sizes: dict[str, Any], captions: Iterable[str] = ()) -> Any:
    """Build the library's pipeline with weights from torch's global generator, its pairs of bytes those of captions."""
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

    codes, names = sizes["codes"], text_tokenizer(sizes["codes"], captions)
    ar = sizes["vision_language_encoder"]
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
    shown = GlmImageImageProcessorPil(
        patch_size=patch,
        temporal_patch_size=1,
        merge_size=1,
        size={"shortest_edge": patch**2, "longest_edge": 128**2},
    )
    pipe = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=GlmImageProcessor(shown, names, chat_template=CHAT),
        text_encoder=T5EncoderModel(T5Config(**sizes["text_encoder"])),
        vision_language_encoder=GlmImageForConditionalGeneration(config),
        vae=AutoencoderKL(**sizes["vae"]),
        transformer=GlmImageTransformer2DModel(
            text_embed_dim=sizes["text_encoder"]["d_model"],
            prior_vq_quantizer_codebook_size=codes,
            **sizes["transformer"],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**sizes["scheduler"]),
    )
    pipe.set_progress_bar_config(disable=True)
    # The library lets an image end at any token. Ours writes image codes only, so here the library must, too.
    pipe.vision_language_encoder.generation_config.suppress_tokens = list(range(codes, codes + 3))
    return pipe


def fit_autoencoder(vae: Any, seen: Tensor, stage: StageConfig, log: LogFn) -> None:
    """Train the autoencoder to draw pictures [N, 3, H, W] again, and note down the statistics of its latents."""

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        wanted = seen[torch.randint(len(seen), (stage.batch_size,), generator=generator("vae", step))]
        return reconstruction_loss(vae.decode(vae.encode(wanted).latent_dist.mode()).sample, wanted), {}

    fit("autoencoder", vae, loss_of, stage, log)
    with torch.no_grad():
        latents = vae.encode(seen[:256]).latent_dist.mode()
    mean, std = (value.tolist() for value in (latents.mean((0, 2, 3)), latents.std((0, 2, 3))))
    vae.register_to_config(latents_mean=mean, latents_std=std)


@torch.no_grad()
def fit_codes(policy: GlmImagePolicy, seen: Tensor) -> None:
    """Make codes that tell colours in pictures [N, 3, H, W], from the pictures' own patches and half as many of their
    previews: what the random vision tower says of a patch is brought to the mean colour by least squares, and the
    codebook is the centres of clusters (k-means) of that."""
    from scipy.cluster.vq import kmeans2

    vq, size = policy.model.model.vqmodel, Size(*seen.shape[-2:])
    told: list[Tensor] = []
    hook = vq.quant_conv.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0].flatten(2)[0].T))
    policy.tokens_of(seen)
    hook.remove()
    previews, large = (torch.cat(part) for part in (told[: len(seen)], told[len(seen) :]))
    seen_small, seen_large = (
        F.adaptive_avg_pool2d(seen, grid).flatten(2).mT.flatten(0, 1) for grid in (size.preview, size.large)
    )
    chosen = torch.randperm(len(previews))[: len(large) // 2]
    features, colours = torch.cat([previews[chosen], large]), torch.cat([seen_small[chosen], seen_large])
    # With a 1 behind each colour: codes are looked up by direction, and pink and black have the same.
    with_one = F.pad(colours, (0, 1), value=1)
    mapping = torch.linalg.lstsq(F.pad(features, (0, 1), value=1), with_one).solution
    for own, fitted in ((vq.quant_conv.weight[..., 0, 0], mapping[:-1].T), (vq.quant_conv.bias, mapping[-1])):
        own.zero_()[: len(fitted)] = fitted
    points = F.normalize(vq.quant_conv(features[..., None, None]).flatten(1))
    codebook = vq.quantize.embedding.weight
    centres, _ = kmeans2(points.double().numpy(), len(codebook), minit="++", rng=0)
    codebook.copy_(torch.from_numpy(centres))


def run(out: Path, steps: int, count: int, seed: int) -> None:
    """Write a new folder with `model`, `train` and `heldout` pictures, and prompts of both splits."""
    torch.manual_seed(derive_seed(seed, "glm_image"))
    pipe = new_pipeline(SIZES, (scene.caption for scene in scenes("train", 500)))
    with atomic_folder(out) as folder:
        seen = pictures(scenes("train", count, seed), (WIDTH, HEIGHT))
        fit_autoencoder(pipe.vae, seen, PIXELS.model_copy(update={"steps": steps}), show)
        model = folder / "model"
        with quiet():
            pipe.save_pretrained(model)
        drawn = {"height": HEIGHT, "width": WIDTH, "guidance": 1.0, "flow_steps": 4}
        (model / SAMPLING).write_text(json.dumps(drawn), encoding="utf-8")
        policy = load_policy(model, "cpu", torch.float32)
        fit_codes(policy, seen[:256])
        with quiet():
            policy.model.save_pretrained(model / "vision_language_encoder")
        write_world(folder, (WIDTH, HEIGHT), count, seed)
