"""A generator small enough for unit tests: the real classes with random weights, a few thousand parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from imagerl.models.blip3o_next.loading import save_policy
from imagerl.models.blip3o_next.policy import ImagePolicy
from tools.tiny.model import new_policy
from tools.tiny.samples import captions

MODEL: dict[str, Any] = {
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "latent_size": [2, 4],
    "sana": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 24,
        "mlp_ratio": 2.0,
        "sample_size": 4,
        "patch_size": 1,
        "interpolation_scale": 1,
    },
    "vae": {
        "in_channels": 3,
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": [8, 8, 8, 8, 8],
        "decoder_block_out_channels": [8, 8, 8, 8, 8],
        "encoder_layers_per_block": [0, 1, 1, 1, 1],
        "decoder_layers_per_block": [0, 1, 1, 1, 1],
        "encoder_qkv_multiscales": [[], [], [], [], []],
        "decoder_qkv_multiscales": [[], [], [], [], []],
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 1.0,
    },
    "sampling": {"guidance": 2.0, "flow_steps": 3},
    "scheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "image_tokenizer": {"image_size": [32, 64], "patch": [16, 16], "width": 8, "depth": 1, "levels": [4, 4]},
}


def micro_policy(seed: int = 0, **qwen3: Any) -> tuple[ImagePolicy, dict[str, Any]]:
    """A policy with 8 image tokens of 16 codes and 32×64 pictures; `qwen3` overrides its language model."""
    model = copy.deepcopy(MODEL)
    model["qwen3"] |= qwen3
    torch.manual_seed(seed)
    policy, config = new_policy(model, captions(0, 20), 300)
    policy.trainable.eval()
    policy.decoder.requires_grad_(False).eval()
    return policy, config


def micro_folder(folder: Path, seed: int = 0, **qwen3: Any) -> Path:
    """The same as a model folder, for whatever takes `model.path`."""
    policy, config = micro_policy(seed, **qwen3)
    folder.mkdir(parents=True, exist_ok=True)
    save_policy(policy, folder, config)
    return folder
