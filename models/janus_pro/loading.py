"""Read and write model folders in the hub's layout, that of transformers' `JanusForConditionalGeneration`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imagerl.models.common.settings import SamplingSettings
from imagerl.models.common.shards import Shards, own_memory, require_finite, save_shards
from imagerl.models.janus_pro.ar import Blank
from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.models.janus_pro.prompts import JanusPrompts, canvas_of
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import read_json
from imagerl.rl.types import ImageRLError, SamplingParams

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusProcessor

MODEL_TYPE, OLD_MODEL_TYPE = "janus", "multi_modality"
GENERATION = "generation_config.json"
GUIDANCE = 5.0  # of the published models, where a folder does not say
# What the sampler repeats of a Llama: other settings would be drawn from in silence.
LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_logger = logging.getLogger(__name__)


@contextmanager
def _their_errors(what: str) -> Iterator[None]:
    """Turn whatever transformers raises of files that are not as it wants them into one line."""
    try:
        yield
    except ImageRLError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ImageRLError(f"{what} ({type(error).__name__}: {why}); copy the model again") from error


def read_config(folder: Path) -> JanusConfig:
    """Read config.json. Raises ImageRLError for one of DeepSeek's own format, or of a model that our code would not
    compute as transformers does."""
    from transformers import JanusConfig

    file = folder / "config.json"
    settings = read_json(file)
    if settings.get("model_type") == OLD_MODEL_TYPE:
        raise ImageRLError(
            f"{folder} is in DeepSeek's own format, whose weights are pickles; give deepseek-community/Janus-Pro-1B or "
            "-7B, or a folder that transformers' convert_janus_weights_to_hf.py made of it"
        )
    if settings.get("quantization_config"):
        raise ImageRLError(f"{file}: quantised weights do not train; give the model as it was published")
    with _their_errors(f"{file} describes no Janus model"):
        config = JanusConfig(**settings)
        text, vision = config.text_config, config.vision_config
        odd = {key: value for key, value in LLAMA.items() if getattr(text, key) != value}
        rope = text.rope_parameters["rope_type"]
        tokens = canvas_of(config).tokens
    if odd or rope != "default":
        key, value = next(iter(odd.items()), ("rope_type", "default"))
        raise ImageRLError(f"{file}: text_config.{key} must be {value!r}: nothing else is sampled")
    if vision.num_image_tokens != tokens:
        raise ImageRLError(
            f"{file}: vision_config.num_image_tokens is {vision.num_image_tokens}, but the VQ decoder draws {tokens}"
        )
    return config


def read_processor(folder: Path) -> JanusProcessor:
    """Read the text tokenizer, the chat template and how pictures are scaled."""
    from transformers import JanusProcessor

    with _their_errors(f"{folder} has no usable processor"):
        processor: JanusProcessor = JanusProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return processor


def load_prompts(folder: Path) -> JanusPrompts:
    """Load what the model in a folder can be asked; no weights are read."""
    return JanusPrompts(read_config(folder), read_processor(folder))


def load_policy(folder: Path, device: torch.device | str, dtype: torch.dtype) -> JanusPolicy:
    """Load a policy with all its parts in `dtype`.

    Raises ImageRLError with one line when the folder is no Janus model, or its files are damaged or do not fit."""
    from transformers import JanusForConditionalGeneration
    from transformers.utils import logging as their_logging

    config, processor, shards = read_config(folder), read_processor(folder), Shards(folder)
    their_logging.disable_progress_bar()
    with _their_errors(f"the weights in {folder} do not fit its config.json"):
        model, found = JanusForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise ImageRLError(
            f"{folder} does not fit its config.json: {len(missing)} tensors are missing, such as {missing[0]}"
        )
    if unknown := sorted(shards.entries.keys() - model.state_dict().keys()):
        _logger.warning("%s: %d tensors such as %s are not used", folder, len(unknown), unknown[0])
    own_memory(model)
    for name, parameter in model.named_parameters():
        require_finite(parameter.data, f"{folder}: {name}")
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    model.requires_grad_(False).eval().to(device)
    shown = processor.image_processor
    policy = JanusPolicy(
        model,
        JanusPrompts(config, processor),
        blank_of(generation, processor),
        sampling_of(generation, str(folder / GENERATION)),
        _scale(shown.image_mean, shown.image_std),
    )
    policy.trainable.requires_grad_(True)
    return policy


def blank_of(generation: Mapping[str, Any], processor: JanusProcessor) -> Blank:
    """Return how transformers makes the unconditional prompt, by generation_config.json or else the tokenizer."""
    tokenizer = processor.tokenizer
    begin = tokenizer.convert_tokens_to_ids(processor.image_start_token)
    begin = (generation.get("generation_kwargs") or generation).get("boi_token_id", begin)
    kept = (generation.get("bos_token_id", tokenizer.bos_token_id), begin)
    return Blank((int(kept[0]), int(kept[1])), int(generation.get("pad_token_id", tokenizer.pad_token_id)))


def _scale(mean: Sequence[float], deviation: Sequence[float]) -> tuple[float, float]:
    """Return how pictures are scaled, the same for all colours in every published model."""
    if len(set(mean)) > 1 or len(set(deviation)) > 1:
        raise ImageRLError(
            f"the processor scales colours apart (image_mean {list(mean)}, image_std {list(deviation)}), which no VQ "
            "decoder of Janus draws; copy preprocessor_config.json from the hub's model"
        )
    return float(mean[0]), float(deviation[0])


def sampling_of(generation: Mapping[str, Any], place: str) -> SamplingParams:
    """Return how a model draws: by the whole distribution, guided as its generation_config.json says."""
    given = {
        "temperature": float(generation.get("temperature") or 1.0),
        "token_guidance": float(generation.get("guidance_scale") or GUIDANCE),
        "guidance": 1.0,
        "flow_steps": 1,
    }
    return validated(SamplingSettings, given, place).params()


def save_policy(policy: JanusPolicy, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a model folder that `JanusForConditionalGeneration.from_pretrained` loads as it is. `dtype` is what weights
    are stored in; the default keeps each tensor's own."""
    model, blank = policy.model, policy.trainable.blank
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.lm_head.weight is model.get_input_embeddings().weight:
        del state["lm_head.weight"]
    save_shards(state, folder, dtype)
    settings = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
    }
    generation = (
        model.generation_config.to_diff_dict()
        | {
            "_from_model_config": False,  # or transformers forgets what it does not know, such as generation_kwargs
            "generation_kwargs": {"boi_token_id": blank.kept[1]},
            "bos_token_id": blank.kept[0],
            "pad_token_id": blank.pad,
            "guidance_scale": policy.sampling.token_guidance,
            "temperature": policy.sampling.temperature,
            "top_k": 0,  # no cut: transformers' own default keeps 50
            "top_p": 1.0,
        }
    )
    for name, content in (("config.json", settings), (GENERATION, generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    policy.prompts.processor.save_pretrained(folder)
