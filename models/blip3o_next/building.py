"""Build new, untrained models from a configuration: the text tokenizer, the vocabulary, and all parts together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from imagerl.models.blip3o_next.ar import ARPolicy, ImageVocabulary
from imagerl.models.blip3o_next.config import FsqSettings, check_config
from imagerl.models.blip3o_next.flow_decoder import FlowDecoder
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.prompts import PICTURE_END, PICTURE_START, REQUEST, SYSTEM, TURN_END
from imagerl.models.blip3o_next.ta_tok import TATokenizer
from imagerl.models.common.image_tokenizer import FSQTokenizer, FSQTokenizerConfig, ImageTokenizer
from imagerl.rl.files.mistakes import validated
from imagerl.rl.types import ImageRLError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, TURN_START = "<|endoftext|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_text_tokenizer(
    corpus: Iterable[str], text_vocabulary: int, image_tokens: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with the image tokens appended in the published order.

    Capitals and digits are always tokens of their own, so that spelling is in the ids. Any text can be encoded:
    all 256 bytes are in the vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex('[A-Z0-9"]'), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_vocabulary,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
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


def build_policy(config: Mapping[str, Any], text_tokenizer: PreTrainedTokenizerFast) -> ImagePolicy:
    """Build all parts with fresh weights from a model folder's config.json. Draws from torch's global generator."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ar = ARPolicy(Qwen3ForCausalLM(Qwen3Config(**config["qwen3"])), ImageVocabulary.from_config(config))
    height, width = config["latent_size"]
    decoder = FlowDecoder(
        config["qwen3"]["hidden_size"],
        config["sana"],
        config["vae"],
        config["scheduler"],
        (height, width),
        edit=bool(config.get("edit", False)),
    )
    return ImagePolicy(ar, decoder, text_tokenizer, config, build_image_tokenizer(config))


def build_image_tokenizer(config: Mapping[str, Any]) -> ImageTokenizer | None:
    """Build the tokenizer a config describes: `ta_tok`, `image_tokenizer`, or none."""
    if config.get("ta_tok"):
        return TATokenizer(config["ta_tok"])
    if config.get("image_tokenizer"):
        return FSQTokenizer(FSQTokenizerConfig.from_dict(config["image_tokenizer"]))
    return None


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
    turns = [f"system\n{SYSTEM}", "assistant\n"]
    for caption in captions:
        turns.append(f"user\n{REQUEST.format(caption=caption)}")
    tokenizer = build_text_tokenizer(turns, text_vocabulary, codes)
    rows, columns = tokenizer_config.grid
    config = {
        **model,
        "qwen3": {**model["qwen3"], "vocab_size": len(tokenizer)},
        **vocabulary_of(tokenizer, codes).to_config(),
        "num_image_positions": rows * columns,
    }
    check_config(config, place)
    return build_policy(config, tokenizer), config
