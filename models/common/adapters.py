"""Save and load LoRA adapters, in PEFT's own layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from imagerl.models.common.adaptable import ADAPTER, Adaptable
from imagerl.models.common.hub import SHIPPED
from imagerl.models.common.settings import Dropout, SamplingSettings, Settings, stored_sampling
from imagerl.models.common.shards import Shards, require_finite
from imagerl.rl.errors import one_line
from imagerl.rl.files.mistakes import validated
from imagerl.rl.files.reading import is_regular, read_json
from imagerl.rl.types import ImageRLError, SamplingParams

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAMPLING = "sampling.json"
# What PEFT writes beside the settings below: of no effect on a language model that is here already.
UNUSED = (
    "task_type",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "revision",
    "init_lora_weights",
    "megatron_core",
    "qalora_group_size",
    "auto_mapping",  # the class that PEFT found, for its own loading
)
Names = str | list[str]


class AdapterSettings(Settings):
    """The settings of PEFT's `LoraConfig` that the sampler repeats; any other that is on is refused. One of those
    imports a module by name."""

    base_model_name_or_path: str = Field(min_length=1)
    peft_type: Literal["LORA"] = "LORA"
    r: int = Field(8, ge=1, le=1 << 14)
    lora_alpha: float = Field(8, gt=0, le=1e6)
    lora_dropout: Dropout = 0.0
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1 << 14)]] = Field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(default_factory=dict)
    use_rslora: bool = False
    bias: Literal["none"] = "none"


def save_adapter(half: Adaptable, folder: Path, base: str, sampling: SamplingParams) -> None:
    """Write the LoRA adapters alone, in PEFT's own layout, with the base model's path beside them, and how pictures are
    drawn, which may not be as the base says."""
    adapter = half.adapter
    if adapter is None:
        raise ImageRLError("the policy has no LoRA adapter to save")
    # a shipped model, or one of the hub
    named = base in SHIPPED or not Path(base).expanduser().is_dir()
    adapter.peft_config[ADAPTER].base_model_name_or_path = (
        base if named else str(Path(base).expanduser().resolve())
    )
    # PEFT's own choice asks a hub about the base, and may put the whole embedding beside the adapters.
    adapter.save_pretrained(
        str(folder), safe_serialization=True, save_embedding_layers=False, selected_adapters=[ADAPTER]
    )
    settings = json.dumps(stored_sampling(sampling), indent=2)
    (folder / SAMPLING).write_text(settings + "\n", encoding="utf-8")


def load_adapter(half: Adaptable, folder: Path) -> None:
    """Put saved adapters onto the half of a base policy, ready to train on.

    Raises ImageRLError when they do not fit, or change the policy in a way that its sampler would not see."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    settings, shards = adapter_settings(folder), Shards(folder, ADAPTER_WEIGHTS)
    base = settings.base_model_name_or_path
    weights = {name: require_finite(shards.read(name), f"{folder}: {name}") for name in shards.in_order()}
    given = settings.model_dump(exclude={"base_model_name_or_path", "peft_type"}, exclude_unset=True)
    try:
        # With dropout the trainer would score other probabilities than those sampled from.
        config = LoraConfig(**{**given, "lora_dropout": 0.0}, task_type=half.task_type)
        adapter = get_peft_model(half.lm, config)
        outcome = set_peft_model_state_dict(adapter, weights)
    except Exception as error:  # what PEFT and torch say of layers and shapes that do not fit
        told = one_line(error, 200)
        raise ImageRLError(f"the adapter in {folder} does not fit its base model {base}: {told}") from error
    absent = [key for key in outcome.missing_keys if "lora_" in key]
    if outcome.unexpected_keys or absent:
        wrong = f"no layer for {outcome.unexpected_keys[0]}" if outcome.unexpected_keys else f"no {absent[0]}"
        raise ImageRLError(f"the adapter in {folder} does not fit its base model {base}: {wrong}")
    half.attach_adapter(adapter)


def adapter_sampling(folder: Path) -> SamplingParams | None:
    """Return how the policy with a folder's adapter draws; None: as its base says."""
    file = folder / SAMPLING
    return validated(SamplingSettings, read_json(file), str(file)).params() if file.exists() else None


def adapter_base(folder: Path) -> str:
    """Return the path or name of what a folder's adapter stands on. Raises ImageRLError when the settings beside
    it are none of ours, or it stands, by way of others, on itself."""
    base = first = adapter_settings(folder).base_model_name_or_path
    seen = {folder.resolve()}
    while is_regular((here := Path(base).expanduser().resolve()) / ADAPTER_CONFIG):
        if here in seen:
            raise ImageRLError(
                f"{folder / ADAPTER_CONFIG}: the base {first} leads back to the adapter itself"
            )
        seen.add(here)
        base = adapter_settings(here).base_model_name_or_path
    return first


def adapter_settings(folder: Path) -> AdapterSettings:
    """Read an adapter's settings. Raises ImageRLError for one that is more than low-rank differences of weights."""
    file = folder / ADAPTER_CONFIG
    content = read_json(file)
    if isinstance(content, dict):
        on = {key: value for key, value in content.items() if not _is_off(value) and key not in UNUSED}
        odd = sorted(on.keys() - AdapterSettings.model_fields.keys())
        if odd or on.get("bias", "none") != "none":
            raise ImageRLError(
                f"the adapter in {folder} has {(odd or ['bias'])[0]}; merge it into its base with PEFT and load that"
            )
        content = on
    return validated(AdapterSettings, content, str(file))


def _is_off(value: object) -> bool:
    """Tell whether PEFT writes an unused setting this way."""
    return value is None or value is False or value in ({}, [])
