"""Small random Janus models in transformers' own classes: the oracle that ours must repeat.

Sizes are those of a config file beside the other parity fixtures, so `IMAGERL_PARITY_DIR` can name others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagerl.models.janus_pro.loading import load_policy
from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.rl.types import Prompt, Rows
from tests.parity import FOLDER, seeded_weight
from tools.tiny.janus import USER, new_model, text_tokenizer

CAPTIONS = ('a sign that says "RIVER" in red', "two cats", "a blue cup beside a green plate, seen from above")
PROMPTS = [Prompt(index, caption) for index, caption in enumerate(CAPTIONS)]


def sizes() -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((FOLDER / "janus_pro.json").read_text(encoding="utf-8"))
    return settings


def build(vq: dict[str, Any] | None = None, **text_config: Any) -> tuple[Any, Any]:
    """The library's model on seeded weights, and its processor; `vq` and `text_config` override sizes."""
    settings = sizes()
    settings["vq_config"] |= vq or {}
    settings["text_config"] |= text_config
    model, processor = new_model(
        settings, text_tokenizer([f"{USER}: {caption}" for caption in CAPTIONS], 300)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(seeded_weight(name, tuple(parameter.shape), settings["seed"]))
    return model, processor


def saved(folder: Path, vq: dict[str, Any] | None = None, **text_config: Any) -> Path:
    """The same in the hub's layout, written by the library."""
    model, processor = build(vq, **text_config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def policy_in(folder: Path) -> JanusPolicy:
    return load_policy(folder, "cpu", torch.float32)


def random_tokens(policy: JanusPolicy, batch: int, seed: int = 0) -> Tensor:
    tokens = policy.prompts.canvas(PROMPTS[0]).tokens
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(policy.trainable.codes, (batch, tokens), generator=draws)


def uniforms(policy: JanusPolicy, batch: int, seed: int = 0) -> Tensor:
    tokens = policy.prompts.canvas(PROMPTS[0]).tokens
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(batch, tokens, generator=draws, dtype=torch.float64)


def their_inputs(processor: Any, captions: tuple[str, ...] = CAPTIONS) -> Any:
    """What the library's own processor makes of captions, in one left-padded batch."""
    messages = [[{"role": "user", "content": [{"type": "text", "text": caption}]}] for caption in captions]
    texts = [processor.apply_chat_template(each, add_generation_prompt=True) for each in messages]
    return processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")


def first(prompts: Rows, count: int) -> Rows:
    return {name: rows[:count] for name, rows in prompts.items()}
