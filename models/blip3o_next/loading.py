"""Read and write model folders: ours and the published BLIP3o-NEXT ones.

A folder holds config.json, safetensors and a Hugging Face tokenizer. Nothing is unpickled, no code from a folder is
run, and no other model is fetched first."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagerl.models.blip3o_next.ar import ImageVocabulary
from imagerl.models.blip3o_next.config import check_config
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.prompts import PromptEncoder, canvas_of
from imagerl.models.blip3o_next.published import EDIT_UNUSED, from_published, is_published
from imagerl.models.blip3o_next.weights import check_fit, empty_policy, fill, full_state, is_tied
from imagerl.models.blip3o_next.weights import load_state as load_state
from imagerl.models.common.shards import SHARD_BYTES, WEIGHTS, Shards, save_shards
from imagerl.rl.errors import one_line
from imagerl.rl.files.reading import read_json
from imagerl.rl.types import ImageRLError

MAX_CONFIG = 1 << 22  # bytes of a config.json
REQUIRED = ("qwen3", "sana", "vae", "scheduler", "latent_size", "num_image_positions", "sampling")
_logger = logging.getLogger(__name__)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it is, of either layout. One of ours describes a model that can be built; see
    `models.blip3o_next.config`."""
    file = folder / "config.json"
    config = read_json(file, MAX_CONFIG)
    missing = [key for key in REQUIRED if key not in config]
    if missing and not is_published(config):
        raise ImageRLError(
            f"{file} lacks {', '.join(missing)}: neither an ImageRL nor a BLIP3o-NEXT model folder"
        )
    if not is_published(config):
        check_config(config, str(file))
    return config


def save_policy(
    policy: ImagePolicy,
    folder: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder (which must exist). `dtype` is the storage type; the default keeps each tensor's own."""
    config = {
        **config,
        "qwen3": {**config["qwen3"], "tie_word_embeddings": is_tied(policy)},
        "vae": {**config["vae"], "scaling_factor": policy.decoder.scaling_factor},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_shards(full_state(policy), folder, dtype, max_shard_bytes)
    policy.text_tokenizer.save_pretrained(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, floating-point numbers as float32."""
    shards = Shards(folder)
    read = ((name, shards.read(name)) for name in shards.in_order())
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read}


def load_text_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedConfig

    try:  # with a config given, config.json is not read, whose model type transformers does not know
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, config=PreTrainedConfig()
        )
        tokenizer("a word", add_special_tokens=False, return_offsets_mapping=True)  # as prompts are read
        return tokenizer
    except Exception as error:  # transformers and tokenizers raise anything on files that are not theirs
        raise ImageRLError(f"{folder} has no usable tokenizer: {one_line(error, 200)}") from error


def _require_image_tokens(text_tokenizer: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Raise ImageRLError when the tokenizer gives image tokens other ids than config.json, or any token an id that
    the language model does not have."""
    highest, size = max(text_tokenizer.get_vocab().values(), default=0), config["qwen3"]["vocab_size"]
    if highest >= size:
        raise ImageRLError(
            f"{folder}: the tokenizer has a token {highest}, but qwen3.vocab_size in config.json is {size}"
        )
    vocabulary = ImageVocabulary.from_config(config)
    last = vocabulary.num_image_tokens - 1
    known = text_tokenizer.get_added_vocab()
    for token, wanted in (
        ("<im_start>", vocabulary.image_start_tag_id),
        ("<S0>", vocabulary.scale_start_token_id),
        ("<I0>", vocabulary.image_start_token_id),
        (f"<I{last}>", vocabulary.image_end_token_id),
    ):
        if known.get(token, wanted) != wanted:
            raise ImageRLError(
                f"{folder}: {token} is {known[token]} in the tokenizer but {wanted} in config.json; they belong to "
                "different models"
            )


def load_prompts(folder: Path) -> PromptEncoder:
    """Load the prompt encoder of the model in a folder; no weights are read."""
    from transformers import Qwen3Config

    config, text_tokenizer, _, _ = _open(folder)
    positions = Qwen3Config(**config["qwen3"]).max_position_embeddings
    return PromptEncoder(text_tokenizer, ImageVocabulary.from_config(config), positions, canvas_of(config))


def _open(folder: Path) -> tuple[dict[str, Any], Any, Shards, dict[str, Any] | None]:
    """Return our config, the text tokenizer, the tensors yet to be read, and a published config.json as it is."""
    config, shards = read_config(folder), Shards(folder)
    published = config if is_published(config) else None
    if published is not None:
        config = from_published(published, shards.shapes)
    text_tokenizer = load_text_tokenizer(folder)
    _require_image_tokens(text_tokenizer, config, folder)
    return config, text_tokenizer, shards, published


def load_policy(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[ImagePolicy, dict[str, Any]]:
    """Load a policy with all its parts in `dtype`, and its config in our form, from a folder of ours or of the
    published layout. Beside the policy one tensor at a time is in memory.

    Raises ImageRLError with one line when the folder is not a model, or its files are damaged or do not fit."""
    folder = Path(folder)
    config, text_tokenizer, shards, published = _open(folder)
    policy = empty_policy(config, text_tokenizer)
    if not any(name.startswith(EDIT_UNUSED) for name in shards.entries):
        policy.decoder.unused_connector = None
    notes = check_fit(policy, shards.shapes, folder / WEIGHTS, published)
    if notes:
        _logger.warning("%s: %s", folder, one_line("; ".join(notes)))  # it names tensors as the file does
    fill(policy, shards, dtype, device)
    policy.trainable.eval()
    policy.decoder.requires_grad_(False).eval()
    if policy.image_tokenizer is not None:
        policy.image_tokenizer.requires_grad_(False).eval()
    return policy.to(device), config
