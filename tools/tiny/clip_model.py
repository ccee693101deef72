"""Build a new, untrained open_clip model with a small tokenizer of its own, and its folder in open_clip's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from imagerl.rewards.clip.packages import import_open_clip
from imagerl.rl.errors import one_line
from imagerl.rl.types import ImageRLError
from tools.tiny.model import byte_pairs

PAD, END = "<pad>", "<end>"
LARGEST_SIZE = 1 << 13
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def build_tokenizer(corpus: Iterable[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer: `END` follows every text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_pairs(corpus, vocabulary, [PAD, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def new_model(config: Mapping[str, Any], tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Build an untrained model and its complete `model_cfg`. Draws from torch's global generator.

    Raises ImageRLError when open_clip does not take the configuration."""
    open_clip = import_open_clip()
    refuse_sizes(config, "model")
    text = {
        **config["text_cfg"],
        "vocab_size": len(tokenizer),
        "hf_tokenizer_name": "tokenizer.json",  # its folder is where open_clip looks for it
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }
    complete = {**config, "text_cfg": text}
    try:
        return open_clip.model.CLIP(**complete), complete
    except Exception as error:  # open_clip checks nothing: sizes that do not fit raise anything
        raise ImageRLError(f"model: open_clip does not take it ({one_line(error, 200)})") from error


def refuse_sizes(config: Mapping[str, Any], place: str) -> None:
    """Raises ImageRLError for a number of the configuration, at any depth, that is no size of a small model."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_sizes(value, f"{place}.{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value <= LARGEST_SIZE:
            raise ImageRLError(f"{place}.{key} should lie between 0 and {LARGEST_SIZE}, not {value}")


def preprocessing(config: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return open_clip's map of a PIL picture to the [3, H, W] that a model with this `preprocess_cfg` sees.

    Raises ImageRLError for an unknown key."""
    open_clip = import_open_clip()
    try:
        return open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(**config), is_train=False
        )
    except TypeError as error:
        raise ImageRLError(f"preprocess: open_clip does not take it ({error})") from error


def save_model(
    model: Any, model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], tokenizer: Any, folder: Path
) -> None:
    """Writes what `local-dir:FOLDER` of open_clip reads: configuration, weights in bfloat16 and tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    document = {"model_cfg": dict(model_cfg), "preprocess_cfg": dict(preprocess_cfg)}
    (folder / CONFIG).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    weights = {
        name: value.detach().cpu().to(torch.bfloat16 if value.is_floating_point() else value.dtype)
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
    tokenizer.save_pretrained(folder)
