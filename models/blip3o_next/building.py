"""Build a policy with fresh weights from a model folder's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from imagerl.models.blip3o_next.ar import ARPolicy, ImageVocabulary
from imagerl.models.blip3o_next.flow_decoder import FlowDecoder
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.ta_tok import TATokenizer
from imagerl.models.common.image_tokenizer import FSQTokenizer, FSQTokenizerConfig, ImageTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
