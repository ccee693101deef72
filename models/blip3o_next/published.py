"""The published BLIP3o-NEXT layout (arXiv 2510.15857): one flat config.json with the fields of Qwen3, and tensors of
all parts under one set of keys.

That config.json holds no sizes of the decoder, the autoencoder and the vision tower: the public code takes them from
the stock models that it downloads first. They are written down here instead, or read off the tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagerl.models.blip3o_next.ar import ImageVocabulary
from imagerl.models.blip3o_next.config import PublishedSettings, check_config
from imagerl.rl.files.mistakes import validated
from imagerl.rl.types import ImageRLError

Shapes = Mapping[str, tuple[int, ...]]

VISION_TOWER = "model.vision_tower.vision_tower."
EDIT_CONNECTOR = "model.und_image_vae_connector."
EDIT_UNUSED = "model.und_image_vae_as_noise_connector."
ARCHITECTURE, MODEL_TYPE = "blip3oQwenForCausalLM", "blip3o_qwen"
STOCK_DIFFUSION = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
HUB_NAMES = tuple(
    f"BLIP3o/BLIP3o-NEXT-{name}"
    for name in ("Pretrain-3B", "SFT-3B", "GRPO-Geneval-3B", "GRPO-TexT-3B", "edit-VAE")
)

# transformer/config.json of the stock decoder. SANA 1.5 differs from SANA 1.0 by the norms of queries and keys.
SANA: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "dropout": 0.0,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "qk_norm": "rms_norm_across_heads",
}
_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_MULTISCALES: list[list[int]] = [[], [], [], [5], [5], [5]]
_WIDTHS = [128, 256, 512, 512, 1024, 1024]
# vae/config.json of the stock decoder: dc-ae-f32c32-sana-1.1 (arXiv 2410.10733)
VAE: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": _BLOCKS,
    "decoder_block_types": _BLOCKS,
    "encoder_block_out_channels": _WIDTHS,
    "decoder_block_out_channels": _WIDTHS,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": _MULTISCALES,
    "decoder_qkv_multiscales": _MULTISCALES,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
# The stock scheduler's flow_shift of 3 belongs to another solver; the public code's Euler scheduler ignores it.
SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}
# Qwen3-1.7B's config.json (arXiv 2505.09388); the vocabulary is that of its tokenizer with the image tokens
QWEN3: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 217210,
}
IMAGE_TOKENS = ImageVocabulary(
    image_start_tag_id=151669,
    image_end_tag_id=151670,
    scale_start_token_id=151671,
    scale_end_token_id=151673,
    num_scale_tokens=3,
    image_start_token_id=151674,
    image_end_token_id=217209,
    num_image_tokens=65536,
)
# SigLIP2-so400m-patch14-384 with a SimVQ codebook (arXiv 2506.18898). The codes' width is not published in words: a
# checkpoint's own is read off its tensors, and 1536, the width of the embeddings it began from, stands in without one.
TA_TOK: dict[str, Any] = {
    "siglip": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "bottleneck": {
        "bottleneck_dim": 1536,
        "regularizer": {"name": "simvq", "args": {"codebook_size": 65536, "l2_normalized": True}},
    },
    "decoder_depth": 3,
}
DECODING: dict[str, Any] = {  # what the public inference code hard-codes
    "latent_size": [32, 32],
    "num_image_positions": 729,
    "sampling": {"guidance": 2.0, "flow_steps": 30},
}
STOCK: dict[str, Any] = {"sana": SANA, "vae": VAE, "scheduler": SCHEDULER, **DECODING}

QWEN3_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "vocab_size"),
    *("hidden_act", "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id"),
    *("initializer_range", "max_window_layers", "use_sliding_window", "sliding_window"),
)
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def full_size_config(edit: bool = False, vision_tower: bool = True) -> dict[str, object]:
    """Return the config of the published 3B model, as a model folder of ours would hold it."""
    config = {"qwen3": dict(QWEN3), **STOCK, **IMAGE_TOKENS.to_config()}
    return config | ({"ta_tok": TA_TOK} if vision_tower else {}) | ({"edit": True} if edit else {})


def is_published(config: Mapping[str, object]) -> bool:
    """Tell whether a config.json is of the published layout, not of ours."""
    names = config.get("architectures")
    first = str(names[0]) if isinstance(names, list) and names else ""
    return "qwen3" not in config and ("diffusion_name_or_path" in config or first.startswith("blip3o"))


def from_published(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Return our config for a published one and the shapes of its tensors. The original stays under `published`,
    so that an export has the same fields again.

    Raises ImageRLError when a field is missing, or is none that a model can be built with."""
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise ImageRLError(f"config.json lacks {', '.join(missing)}: not a whole BLIP3o-NEXT checkpoint")
    validated(PublishedSettings, dict(config), "config.json")
    vocabulary = ImageVocabulary.from_config(config)
    qwen3 = {key: config[key] for key in QWEN3_FIELDS if config.get(key) is not None}
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    qwen3["rope_parameters"] = {"rope_type": "default", "rope_theta": float(theta)}
    if "lm_head.weight" not in shapes:
        qwen3["tie_word_embeddings"] = True
    ours = dict(config.get("imagerl") or {})
    ta_tok = ours.pop("ta_tok", None)
    nested = {"qwen3": qwen3, **STOCK, **ours, **vocabulary.to_config()}
    if VISION_TOWER + "bottleneck.in_linear.weight" in shapes:
        nested["ta_tok"] = ta_tok or _ta_tok_of(shapes)
    if EDIT_CONNECTOR + "0.weight" in shapes:
        nested["edit"] = True
    check_config(nested, "config.json")
    return {**nested, "published": {key: value for key, value in config.items() if key != "imagerl"}}


def to_published(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the flat config.json for one of ours; `dtype` is "float32" or "bfloat16". Sizes that are not the stock
    models' go under the key `imagerl`, which the public code does not read."""
    qwen3 = config["qwen3"]
    rope = qwen3.get("rope_parameters") or {}
    flat: dict[str, Any] = {
        **_TRAINER_FIELDS,
        "mm_hidden_size": config.get("ta_tok", TA_TOK)["siglip"]["hidden_size"],
        "num_new_tokens": config["num_image_tokens"],
        **(_EDIT_FIELDS if config.get("edit") else {}),
        **config.get("published", {}),
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{key: qwen3[key] for key in QWEN3_FIELDS if key in qwen3},
        "rope_theta": rope.get("rope_theta", qwen3.get("rope_theta", 10000.0)),
        "rope_scaling": None,
        **ImageVocabulary.from_config(config).to_config(),
        "torch_dtype": dtype,
    }
    own = {key: config[key] for key in STOCK if config[key] != STOCK[key]}
    if own:
        if "ta_tok" in config:
            own["ta_tok"] = config["ta_tok"]
        flat["imagerl"] = own
    return flat


# What the public trainers leave in config.json beside the fields of Qwen3.
_TRAINER_FIELDS: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "diffusion_name_or_path": STOCK_DIFFUSION,
    "image_aspect_ratio": "square",
    "mm_patch_merge_type": "flat",
    "mm_tunable_parts": "mm_language_model",
    "mm_use_im_start_end": True,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": None,
    "mm_vision_tower_lr": None,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
    "vision_tower_pretrained": None,
}
_EDIT_FIELDS: dict[str, Any] = {
    "use_tar_siglip_features": False,
    "use_und_image_vae": True,
    "use_und_image_vae_as_noise": True,
    "only_use_und_image_vae_as_noise": False,
}


def _ta_tok_of(shapes: Shapes) -> dict[str, object]:
    """Read the tokenizer's sizes off its tensors; heads and picture size, which shapes do not tell, are stock."""

    def shape(name: str) -> tuple[int, ...]:
        if VISION_TOWER + name not in shapes:
            raise ImageRLError(f"the vision tower lacks {VISION_TOWER + name}; copy the checkpoint again")
        return shapes[VISION_TOWER + name]

    def depth(prefix: str) -> int:
        whole = VISION_TOWER + prefix
        return len({name.removeprefix(whole).split(".")[0] for name in shapes if name.startswith(whole)})

    codes, width = shape("bottleneck.regularizer.embedding.weight")
    patches = shape("encoder.embeddings.patch_embedding.weight")
    siglip = TA_TOK["siglip"] | {
        "hidden_size": patches[0],
        "patch_size": patches[-1],
        "intermediate_size": shape("encoder.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": depth("encoder.encoder.layers."),
    }
    regularizer = {"name": "simvq", "args": {"codebook_size": codes, "l2_normalized": True}}
    return {
        "siglip": siglip,
        "bottleneck": {"bottleneck_dim": width, "regularizer": regularizer},
        "decoder_depth": depth("decoder.vision_model.encoder.layers."),
    }
