"""Small models of pictures and words with random weights, in the folders of open_clip and of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.rewards.clip.packages import import_open_clip
from imagerl.rl.types import ImageRLError
from tools.tiny.clip_model import build_tokenizer, new_model, save_model

CAPTIONS = ["a red ball", "a blue box on a table", "three green birds"]
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 12, "width": 16, "heads": 2, "layers": 1}
PREPROCESS = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}


def need_open_clip() -> Any:
    """open_clip, or the test is skipped. `make` installs it, so that this never happens in CI."""
    try:
        return import_open_clip()
    except ImageRLError as error:
        pytest.skip(str(error))


def open_clip_folder(folder: Path, width: int = 24) -> str:
    """A model in open_clip's format."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS * 4, 270)
    model, config = new_model({"embed_dim": width, "vision_cfg": VISION, "text_cfg": TEXT}, tokenizer)
    save_model(model, config, PREPROCESS, tokenizer, folder)
    return str(folder)


def transformers_folder(folder: Path, kind: str) -> str:
    """A model in transformers' format: `clip` or `siglip`."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = build_tokenizer(CAPTIONS * 4, 270)
    common: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = common | {
        "hidden_size": 16,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    vision = common | {"hidden_size": 16, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        processor: Any = CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
