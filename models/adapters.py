"""LoRA adapters in and out, in PEFT's own layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.ar import ADAPTER
from models.image_policy import ImagePolicy
from rl.types import ImageRLError

ADAPTER_CONFIG = "adapter_config.json"
SAMPLING = "sampling.json"
UNSEEN = ("use_dora", "bias", "modules_to_save")  # of PEFT, beyond a low-rank difference of a weight


def save_adapter(
    policy: ImagePolicy, folder: Path, base: str, sampling: Mapping[str, float] | None = None
) -> None:
    """Write the LoRA adapters alone, in PEFT's own layout, with the base model's path beside them, and how pictures are
    drawn where that is not as the base says."""
    adapter = policy.trainable.adapter
    if adapter is None:
        raise ImageRLError("the policy has no LoRA adapter to save")
    named = (
        base in ("tiny", "tiny_edit") or not Path(base).expanduser().is_dir()
    )  # a shipped model, or one of the hub
    adapter.peft_config[ADAPTER].base_model_name_or_path = (
        base if named else str(Path(base).expanduser().resolve())
    )
    # PEFT's own choice asks a hub about the base, and may put the whole embedding beside the adapters.
    adapter.save_pretrained(
        str(folder), safe_serialization=True, save_embedding_layers=False, selected_adapters=[ADAPTER]
    )
    if sampling is not None:
        (folder / SAMPLING).write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")


def load_adapter(policy: ImagePolicy, folder: Path) -> None:
    """Put saved adapters onto a base policy, ready to train on.

    Raises ImageRLError when they do not fit, or change the policy in a way that its sampler would not see."""
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
    odd = [name for name in UNSEEN if getattr(config, name, None) not in (None, False, "none", [])]
    if odd:
        raise ImageRLError(
            f"the adapter in {folder} has {odd[0]}; merge it into its base with PEFT and load that"
        )
    base, config.base_model_name_or_path = config.base_model_name_or_path, None  # the base is here already
    config.inference_mode = False  # as it was saved, nothing would train
    config.lora_dropout = 0.0  # or the trainer would score other probabilities than those sampled from
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


def adapter_sampling(folder: Path) -> dict[str, Any]:
    """How the policy with the adapter in a folder draws, where that is not as its base says."""
    try:
        return dict(json.loads((folder / SAMPLING).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ImageRLError(f"{folder / SAMPLING} cannot be read: {error}") from error


def adapter_base(folder: Path) -> str:
    """What the adapter in a folder stands on: a path or a name."""
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise ImageRLError(f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path; write it in")
    return str(base)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's settings of the adapter in a folder, as they are."""
    try:
        return dict(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ImageRLError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error
