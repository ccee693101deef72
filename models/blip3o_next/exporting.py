"""Export policies in the layouts of others: the published BLIP3o-NEXT one, a plain Qwen3, a diffusers pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagerl.models.base import Proof
from imagerl.models.blip3o_next.flow_decoder import FlowDecoder
from imagerl.models.blip3o_next.loading import read_config
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.blip3o_next.published import QWEN3_FIELDS, is_published, to_published
from imagerl.models.blip3o_next.weights import HEAD, full_state, is_tied, language_model_state
from imagerl.models.common.shards import SHARD_BYTES, Shards, own_memory, save_shards, save_tensors
from imagerl.rl.types import ImageRLError, Prompt

Config = Mapping[str, Any]
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
CONNECTORS = {"connector": "connector.safetensors", "reference_connector": "reference_connector.safetensors"}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "generation_config.json"),
)


def save_published(
    policy: ImagePolicy,
    folder: Path,
    config: Config,
    base: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the published layout: flat config.json, all parts under the published keys, a tokenizer.

    `base` is the folder that training began from. If that is a published checkpoint, its tokenizer files are copied
    as they are, and so are tensors that no part of ours holds."""
    state = {name: t for name, t in full_state(policy).items() if not name.startswith("image_tokenizer.")}
    from_published = is_published(read_config(base))
    if from_published:
        shards = Shards(base)
        state |= {name: shards.read(name) for name in shards.entries.keys() - state.keys() - {HEAD}}
    _write_json(folder / "config.json", to_published(_present(policy, config), _dtype_name(dtype)))
    save_shards(state, folder, dtype, max_shard_bytes)
    if from_published:
        for name in TOKENIZER_FILES:
            if (base / name).is_file():
                shutil.copy(base / name, folder / name)
    else:
        save_tokenizer(policy, folder)
    save_generation(policy, config, folder)


def save_language_model(
    policy: ImagePolicy,
    folder: Path,
    config: Config,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the autoregressive half alone as a `Qwen3ForCausalLM`, for vLLM, SGLang and transformers."""
    qwen3 = _present(policy, config)["qwen3"]
    theta = (qwen3.get("rope_parameters") or qwen3).get("rope_theta", 10000.0)
    flat = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{key: qwen3[key] for key in QWEN3_FIELDS if key in qwen3},
        "rope_theta": theta,
        "rope_scaling": None,
        "torch_dtype": _dtype_name(dtype),
    }
    _write_json(folder / "config.json", flat)
    save_shards(language_model_state(policy), folder, dtype, max_shard_bytes)
    save_tokenizer(policy, folder)
    save_generation(policy, config, folder)


def save_generation(policy: ImagePolicy, config: Config, folder: Path) -> None:
    """Write generation_config.json, by which others sample unless told otherwise: from the whole distribution, at the
    model's temperature. What else stands in one that is there already stays."""
    file = folder / "generation_config.json"
    theirs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    whole = {
        "do_sample": True,
        "temperature": float(config["sampling"].get("temperature", 1.0)),
        "top_k": policy.trainable.lm.config.vocab_size,  # "all" has another number in transformers, vLLM and SGLang
        "top_p": 1.0,
    }
    _write_json(file, theirs | whole)


def save_diffusers(policy: ImagePolicy, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the decoder as a `SanaPipeline` folder without a text encoder: its captions are what
    connector.safetensors, with keys 0, 2 and 3 of the public code, makes of hidden states. The public code takes such
    a folder as its `diffusion_name_or_path`."""
    import diffusers

    decoder = policy.decoder
    for name, part in (("transformer", decoder.sana), ("vae", decoder.vae)):
        part.save_config(folder / name)
        save_tensors(part.state_dict(), folder / name / DIFFUSERS_WEIGHTS, dtype)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(decoder.scheduler_config)
    scheduler.save_pretrained(folder / "scheduler")
    for attribute, file in CONNECTORS.items():
        if getattr(decoder, attribute) is not None:
            save_tensors(getattr(decoder, attribute).state_dict(), folder / file, dtype)
    index = {
        "_class_name": "SanaPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    _write_json(folder / "model_index.json", index)


def load_diffusers(folder: Path, hidden_size: int, latent_size: tuple[int, int]) -> FlowDecoder:
    """Load a decoder from such a folder, each part by diffusers' own `from_pretrained`."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
    from safetensors.torch import load_file

    sana = SanaTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    vae = AutoencoderDC.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    edit = (folder / CONNECTORS["reference_connector"]).is_file()
    decoder = FlowDecoder(hidden_size, sana.config, vae.config, scheduler.config, latent_size, edit=edit)
    for part in (sana, vae):
        own_memory(part)
    decoder.sana, decoder.vae = sana, vae
    for attribute, file in CONNECTORS.items():
        if getattr(decoder, attribute) is not None:
            state = {name: tensor.float() for name, tensor in load_file(folder / file).items()}
            getattr(decoder, attribute).load_state_dict(state)
    return decoder.requires_grad_(False).eval()


def load_language_model(folder: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Load a map from ids, mask [B, L] to logits [B, L, vocabulary]: transformers' `AutoModelForCausalLM` in
    float32."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    own_memory(lm)
    if type(lm).__name__ != "Qwen3ForCausalLM":
        raise ImageRLError(f"{folder} loads as {type(lm).__name__}, not as Qwen3ForCausalLM")
    return lambda ids, mask: lm.eval()(input_ids=ids, attention_mask=mask).logits


@torch.no_grad()
def language_model_proof(policy: ImagePolicy, folder: Path, prompts: Sequence[Prompt]) -> Proof:
    """Return the logits of prompts by a policy, and by what `save_language_model` wrote of it."""
    rows = policy.encode(prompts, to_draw=False)
    ours = policy.trainable.lm(input_ids=rows["ids"], attention_mask=rows["mask"]).logits
    return {"logits": (ours, load_language_model(folder)(rows["ids"], rows["mask"]))}


@torch.no_grad()
def decoder_proof(policy: ImagePolicy, folder: Path, count: int) -> Proof:
    """Return the pixels of `count` random conditions by a policy's decoder, and by what `save_diffusers` wrote."""
    width, sampling = policy.trainable.lm.config.hidden_size, policy.sampling
    decoder = load_diffusers(folder, width, policy.latent_shape[1:])
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *policy.latent_shape, generator=draws)
    hidden = torch.randn(count, policy.num_actions + 1, width, generator=draws)
    ours, theirs = (
        each.draw(each.latents(hidden, noise, sampling.guidance, sampling.flow_steps))
        for each in (policy.decoder, decoder)
    )
    return {"pixels": (ours, theirs)}


def save_tokenizer(policy: ImagePolicy, folder: Path) -> None:
    """Write the text tokenizer, readable by transformers 4 and 5: 4 knows neither version 5's name for a
    tokenizer that is one tokenizer.json, nor its list of special tokens, and looks for the chat template here."""
    policy.text_tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if policy.text_tokenizer.chat_template:
        config["chat_template"] = policy.text_tokenizer.chat_template
    _write_json(file, config)


def _present(policy: ImagePolicy, config: Config) -> dict[str, Any]:
    """Return the config with what training may have changed."""
    return {
        **config,
        "qwen3": {**config["qwen3"], "tie_word_embeddings": is_tied(policy)},
        "vae": {**config["vae"], "scaling_factor": policy.decoder.scaling_factor},
    }


def _dtype_name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
