"""Turn a model that draws pictures into one that can also be taught to edit and to read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from imagerl.models.blip3o_next.building import build_policy, build_text_tokenizer, vocabulary_of
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.prompts import EDIT, REQUEST, SYSTEM
from imagerl.rl.types import ImageRLError


def turns(
    captions: Iterable[str], instructions: Iterable[str], questions: Iterable[str], answers: Iterable[str]
) -> list[str]:
    """Return chat turns of all three tasks, to train a text tokenizer on."""
    return [
        f"system\n{SYSTEM}",
        *(f"user\n{REQUEST.format(caption=caption)}" for caption in captions),
        *(f"user\n{EDIT.format(instruction=instruction)}" for instruction in instructions),
        *(f"user\n\n{question}" for question in questions),
        *(f"assistant\n{answer}" for answer in answers),
    ]


def grow(
    old: ImagePolicy, old_config: Mapping[str, Any], corpus: Iterable[str], text_vocabulary: int
) -> tuple[ImagePolicy, dict[str, Any]]:
    """Build an edit-capable policy and its config, with every weight of `old` and a text tokenizer of its own
    that is trained on `corpus`. Only the decoder's reference connector is fresh, from torch's global generator.

    A token keeps the embedding that `old` has for its name; a new piece of text begins as the mean of the tokens
    that `old` spells it with. Raises ImageRLError when `old` has no image tokenizer to read pictures with."""
    if old.image_tokenizer is None:
        raise ImageRLError("init names a model without an image tokenizer; it cannot learn to read pictures")
    codes = old.vocabulary.num_image_tokens
    tokenizer = build_text_tokenizer(corpus, text_vocabulary, codes)
    config = {
        **old_config,
        "qwen3": {**old_config["qwen3"], "vocab_size": len(tokenizer)},
        **vocabulary_of(tokenizer, codes).to_config(),
        "edit": True,
    }
    new = build_policy(config, tokenizer)
    lm = new.trainable.lm
    fresh = lm.get_input_embeddings().weight.detach()
    state = dict(old.trainable.lm.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = carried_rows(old.text_tokenizer, tokenizer, state[name], fresh)
    lm.load_state_dict(state)
    new.decoder.load_state_dict(old.decoder.state_dict(), strict=False)
    new.decoder.vae.register_to_config(scaling_factor=old.decoder.scaling_factor)
    new.image_tokenizer = old.image_tokenizer
    return new, config


def carried_rows(old_tokenizer: Any, new_tokenizer: Any, old_rows: Tensor, fresh: Tensor) -> Tensor:
    """Return rows [V, D] for the new tokenizer's ids out of the old one's; `fresh` [V, D] where there is nothing to
    carry: named tokens that the old one lacks."""
    known, named = old_tokenizer.get_vocab(), new_tokenizer.get_added_vocab()
    rows = fresh.clone()
    for token, id_ in new_tokenizer.get_vocab().items():
        if token in known:
            rows[id_] = old_rows[known[token]]
        elif token not in named:
            pieces = old_tokenizer(new_tokenizer.decode([id_]), add_special_tokens=False)["input_ids"]
            rows[id_] = old_rows[torch.tensor(pieces)].mean(0)
    return rows
