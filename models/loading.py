"""Model folders in and out: config.json, model.safetensors, a Hugging Face tokenizer. Nothing is unpickled and no
code from a folder is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.building import build_policy
from models.image_policy import ImagePolicy
from rl.types import ImageRLError

WEIGHTS = "model.safetensors"
TINY = "tiny"
SHIPPED = (TINY, "tiny_edit")
ADAPTER_CONFIG = "adapter_config.json"
REQUIRED = ("qwen3", "sana", "vae", "scheduler", "latent_size", "num_image_positions", "sampling")


def model_folder(path: str) -> Path:
    """The folder a recipe's `model.path` means: a shipped model, or a path."""
    folder = Path(__file__).parent / path if path in SHIPPED else Path(path).expanduser()
    if not folder.is_dir():
        raise ImageRLError(
            f"model {path!r} is no folder; give a model folder or {TINY!r} for the shipped one"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ImageRLError(f"{folder} has no config.json; give the folder of a model or of an export")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageRLError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ImageRLError(f"{file} holds no settings; give the folder of a model or of an export")
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise ImageRLError(f"{file} lacks {', '.join(missing)}: not an ImageRL model folder")
    return config


def module_prefixes(policy: ImagePolicy) -> dict[str, nn.Module]:
    """Where each part lives in the published key layout."""
    parts: dict[str, nn.Module] = {
        "model.diffusion_connector.": policy.decoder.connector,
        "model.sana.": policy.decoder.sana,
        "model.sana_vae.": policy.decoder.vae,
    }
    decoder = policy.decoder
    if decoder.reference_connector is not None and decoder.unused_connector is not None:
        parts["model.und_image_vae_connector."] = decoder.reference_connector
        parts["model.und_image_vae_as_noise_connector."] = decoder.unused_connector
    if policy.image_tokenizer is not None:
        parts[policy.image_tokenizer.key_prefix] = policy.image_tokenizer
    return parts


def language_model_state(policy: ImagePolicy) -> dict[str, Tensor]:
    """The language model's own keys, adapters merged; a tied head is not stored twice."""
    from models.ar_sampler import effective_weight

    state: dict[str, Tensor] = {}
    adapted = {name for name, module in policy.trainable.lm.named_modules() if hasattr(module, "base_layer")}
    for name, tensor in policy.trainable.lm.state_dict().items():
        if any(name.startswith(prefix + ".") for prefix in adapted):
            continue
        state[name] = tensor
    for name in adapted:
        state[f"{name}.weight"] = effective_weight(policy.trainable.lm.get_submodule(name))
    if policy.trainable.lm.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def full_state(policy: ImagePolicy, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of the generator under its published key, contiguous, on the CPU."""
    state = language_model_state(policy)
    for prefix, module in module_prefixes(policy).items():
        state.update({prefix + name: tensor for name, tensor in module.state_dict().items()})

    def stored(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor.to(dtype).contiguous() if dtype and tensor.is_floating_point() else tensor.contiguous()

    return {name: stored(tensor).clone() for name, tensor in state.items()}


def save_policy(
    policy: ImagePolicy,
    folder: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder (which must exist). `dtype` is the storage type; the default keeps each tensor's own.
    `state` may be a ready `full_state`."""
    from safetensors.torch import save_file

    tied = policy.trainable.lm.config.tie_word_embeddings
    config = {
        **config,
        "qwen3": {**config["qwen3"], "tie_word_embeddings": tied},
        "vae": {**config["vae"], "scaling_factor": policy.decoder.scaling_factor},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(dict(state or full_state(policy, dtype)), folder / WEIGHTS, metadata={"format": "pt"})
    policy.text_tokenizer.save_pretrained(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file, in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        hint = f" ({pickles[0]} is a pickle and is not loaded; convert it to safetensors)" if pickles else ""
        raise ImageRLError(f"{folder} has no {WEIGHTS}{hint}")
    try:
        return {name: tensor.float() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise ImageRLError(f"{file} is damaged or cut short ({error}); copy it again") from error


def load_state(policy: ImagePolicy, state: Mapping[str, Tensor], source: Path) -> None:
    """Fill a policy from published keys. Raises ImageRLError naming what is missing, unknown or of another shape."""
    wanted = full_shapes(policy)
    missing = sorted(wanted.keys() - state.keys())
    unknown = sorted(state.keys() - wanted.keys())
    if missing or unknown:
        parts = [
            f"{len(keys)} {what} such as {keys[0]}"
            for what, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise ImageRLError(f"{source} does not fit its config.json: tensors {', '.join(parts)}")
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise ImageRLError(f"{source}: {name} is {tuple(state[name].shape)}, config.json says {shape}")
    prefixes = module_prefixes(policy)
    own = {name: t for name, t in state.items() if not any(name.startswith(p) for p in prefixes)}
    policy.trainable.lm.load_state_dict(own, strict=False)  # strict but for the tied head, checked above
    for prefix, module in prefixes.items():
        module.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})


def full_shapes(policy: ImagePolicy) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in full_state(policy).items()}


def load_text_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ImageRLError(
            f"{folder} has no usable tokenizer: {' '.join(str(error).split())[:200]}"
        ) from error


def save_adapter(policy: ImagePolicy, folder: Path, base: str) -> None:
    """Write the LoRA adapters alone, in PEFT's own layout, with the base model's path beside them."""
    adapter = policy.trainable.adapter
    if adapter is None:
        raise ImageRLError("the policy has no LoRA adapter to save")
    adapter.peft_config["default"].base_model_name_or_path = (
        base if base in SHIPPED else str(Path(base).resolve())
    )
    # PEFT's own choice asks a hub about the base, and may put the whole embedding beside the adapters.
    adapter.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def load_adapter(policy: ImagePolicy, folder: Path) -> None:
    """Put saved adapters onto a base policy."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = LoraConfig.from_pretrained(str(folder))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ImageRLError(
            f"{folder} holds no usable adapter: {' '.join(str(error).split())[:200]}"
        ) from error
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # the base is here already
    try:
        adapter = get_peft_model(policy.trainable.lm, config)
        outcome = set_peft_model_state_dict(adapter, weights)
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ImageRLError(f"the adapter in {folder} does not fit its base model {base}: {why}") from error
    absent = [key for key in outcome.missing_keys if "lora_" in key]
    if outcome.unexpected_keys or absent:
        wrong = f"no layer for {outcome.unexpected_keys[0]}" if outcome.unexpected_keys else f"no {absent[0]}"
        raise ImageRLError(f"the adapter in {folder} does not fit its base model {base}: {wrong}")
    policy.trainable.attach_adapter(adapter)


def _adapter_base(folder: Path) -> str:
    try:
        return str(
            json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        )
    except (OSError, ValueError, KeyError) as error:
        raise ImageRLError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error


def load_policy(path: str, device: torch.device | str = "cpu") -> tuple[ImagePolicy, dict[str, Any]]:
    """A policy in float32 and its config. `path` is "tiny", a model folder, or a folder with a LoRA adapter, whose
    base is then loaded under it.

    Raises ImageRLError with one line when the folder is not a model, or its files are damaged or do not fit."""
    folder = model_folder(path)
    if (folder / ADAPTER_CONFIG).is_file():
        policy, config = load_policy(_adapter_base(folder), device)
        load_adapter(policy, folder)
        return policy.to(device), config
    config = read_config(folder)
    policy = build_policy(config, load_text_tokenizer(folder))
    load_state(policy, read_weights(folder), folder / WEIGHTS)
    policy.trainable.eval()
    policy.decoder.requires_grad_(False).eval()
    if policy.image_tokenizer is not None:
        policy.image_tokenizer.requires_grad_(False).eval()
    return policy.to(device), config
