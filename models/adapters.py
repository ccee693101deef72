"""LoRA adapters in and out, in PEFT's own layout."""

from __future__ import annotations

import json
from pathlib import Path

from models.image_policy import ImagePolicy
from rl.types import ImageRLError

ADAPTER_CONFIG = "adapter_config.json"


def save_adapter(policy: ImagePolicy, folder: Path, base: str) -> None:
    """Write the LoRA adapters alone, in PEFT's own layout, with the base model's path beside them."""
    adapter = policy.trainable.adapter
    if adapter is None:
        raise ImageRLError("the policy has no LoRA adapter to save")
    named = (
        base in ("tiny", "tiny_edit") or not Path(base).expanduser().is_dir()
    )  # a shipped model, or one of the hub
    adapter.peft_config["default"].base_model_name_or_path = (
        base if named else str(Path(base).expanduser().resolve())
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


def adapter_base(folder: Path) -> str:
    """What the adapter in a folder stands on: a path or a name."""
    try:
        return str(
            json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        )
    except (OSError, ValueError, KeyError) as error:
        raise ImageRLError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error
