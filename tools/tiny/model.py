"""New, untrained tiny models: the text tokenizers, a policy of all its parts, and one that grows out of another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imagerl.models.blip3o_next.ar import ImageVocabulary
from imagerl.models.blip3o_next.building import build_policy
from imagerl.models.blip3o_next.config import FsqSettings, check_config
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.prompts import EDIT, PICTURE_END, PICTURE_START, REQUEST, SYSTEM, TURN_END
from imagerl.models.common.image_tokenizer import FSQTokenizerConfig
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.mistakes import validated

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, TURN_START = "<|endoftext|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_pairs(corpus: Iterable[str], vocabulary: int, special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer. Capitals and digits are always tokens of their own, so that spelling is in the
    ids. Any text can be encoded: all 256 bytes are in the vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex('[A-Z0-9"]'), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def build_text_tokenizer(
    corpus: Iterable[str], text_vocabulary: int, image_tokens: int
) -> PreTrainedTokenizerFast:
    """Train a text tokenizer with the image tokens appended in the published order."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_pairs(corpus, text_vocabulary, [PAD, TURN_START, TURN_END])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=TURN_END, padding_side="left"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.add_tokens([PICTURE_START, PICTURE_END], special_tokens=True)
    wrapped.add_tokens(["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>"], special_tokens=True)
    wrapped.add_tokens([f"<I{i}>" for i in range(image_tokens)], special_tokens=True)
    return wrapped


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> ImageVocabulary:
    def id_of(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    return ImageVocabulary(
        image_start_tag_id=id_of("<im_start>"),
        image_end_tag_id=id_of("<im_end>"),
        scale_start_token_id=id_of("<S0>"),
        scale_end_token_id=id_of("<S2>"),
        num_scale_tokens=3,
        image_start_token_id=id_of("<I0>"),
        image_end_token_id=id_of(f"<I{image_tokens - 1}>"),
        num_image_tokens=image_tokens,
    )


def new_policy(
    model: Mapping[str, Any], captions: Iterable[str], text_vocabulary: int
) -> tuple[ImagePolicy, dict[str, Any]]:
    """Build an untrained policy and its complete config from a pretraining recipe's `model` section.

    `captions` are what the text tokenizer is trained on, in the prompt template. Raises ImageRLError with the first key
    that is wrong."""
    place = "model"
    absent = [key for key in ("qwen3", "image_tokenizer") if not isinstance(model.get(key), dict)]
    if absent:
        raise ImageRLError(f"{place}.{absent[0]} should be a mapping, as in the recipe tiny_pretrain")
    validated(FsqSettings, model["image_tokenizer"], f"{place}.image_tokenizer")
    tokenizer_config = FSQTokenizerConfig.from_dict(model["image_tokenizer"])
    codes = math.prod(tokenizer_config.levels)
    asked = (f"user\n{REQUEST.format(caption=caption)}" for caption in captions)
    corpus = [f"system\n{SYSTEM}", "assistant\n", *asked]
    tokenizer = build_text_tokenizer(corpus, text_vocabulary, codes)
    rows, columns = tokenizer_config.grid
    config = {
        **model,
        "qwen3": {**model["qwen3"], "vocab_size": len(tokenizer)},
        **vocabulary_of(tokenizer, codes).to_config(),
        "num_image_positions": rows * columns,
    }
    check_config(config, place)
    return build_policy(config, tokenizer), config


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
