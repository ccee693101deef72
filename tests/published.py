"""Folders in the published layout, written from the parity fixtures' keys: what BLIP3o-NEXT checkpoints look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagerl.models.common.shards import save_shards
from tests.parity import config_of, fixture, seeded_weight

VISION_TOWER = "model.vision_tower."
PAD, TURN_START, TURN_END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
VISION = ("<|vision_start|>", "<|vision_end|>")


def text_tokenizer(image_tokens: int = 256) -> Any:
    """Characters as tokens 0 to 99, then the image tokens at the fixtures' ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tools.tiny.model import CHAT_TEMPLATE

    special = [PAD, TURN_START, TURN_END, UNKNOWN, *VISION]
    letters = [chr(code) for code in range(32, 127) if chr(code) not in "~^"] + ["\n"]
    tokens = [*special, *letters]
    assert len(tokens) == 100
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=TURN_END, unk_token=UNKNOWN, padding_side="left"
    )
    wrapped.add_special_tokens({"additional_special_tokens": [TURN_START, *VISION]})
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.add_tokens(["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>"], special_tokens=True)
    wrapped.add_tokens([f"<I{i}>" for i in range(image_tokens)], special_tokens=True)
    return wrapped


def published_state(variant: str = "t2i") -> dict[str, Tensor]:
    given = fixture(variant)
    return {key: seeded_weight(key, shape, given.json["seed"]) for key, shape in given.shapes.items()}


def published_config(variant: str = "t2i") -> dict[str, Any]:
    """config.json as the public trainers leave it, and the small sizes of our own key."""
    given = fixture(variant)
    ours = config_of(given)
    sizes = ("sana", "vae", "scheduler", "ta_tok", "latent_size", "num_image_positions", "sampling")
    edit = {"use_und_image_vae": True, "use_und_image_vae_as_noise": True} if variant == "edit" else {}
    return {
        "architectures": ["blip3oQwenForCausalLM"],
        "model_type": "blip3o_qwen",
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        **given.json["qwen3"],
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
        "diffusion_name_or_path": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "mm_vision_tower": None,
        **given.json["token_ids"],
        **edit,
        "imagerl": {key: ours[key] for key in sizes},
    }


def write_published(
    folder: Path,
    variant: str = "t2i",
    state: dict[str, Tensor] | None = None,
    max_bytes: int = 1 << 40,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> Path:
    """A whole folder; `changes` are fields of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(variant) | changes))
    save_shards(state or published_state(variant), folder, dtype, max_bytes)
    text_tokenizer().save_pretrained(folder)
    return folder
