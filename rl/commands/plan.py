"""`imagerl plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagerl.rl.commands.options import Overrides

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe
    from imagerl.rl.data.prompt_sets import PromptSet
    from imagerl.rl.engine.plan import Plan

GPU_COUNTS = (1, 2, 4, 8)
TEMPLATE_TOKENS, LETTERS_PER_TOKEN = 40, 3  # of prompts, where the text tokenizer is not at hand


def plan(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="number of GPUs; default: 1, 2, 4 and 8")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of one GPU")] = None,
) -> None:
    """Work out the memory a recipe needs on each GPU, without weights and without a GPU."""
    from imagerl.rl.config.train import load_recipe
    from imagerl.rl.engine.plan import table

    settings = load_recipe(recipe, overrides or [])
    print(table(plans(settings, [gpus] if gpus else GPU_COUNTS), gpu_memory))


def plans(recipe: Recipe, gpu_counts: Sequence[int], prompt_tokens: int | None = None) -> list[Plan]:
    """Make a plan for each number of GPUs that can share a step's prompts. Raises ImageRLError when none can."""
    from imagerl.rl.data.prompt_sets import load_prompt_set
    from imagerl.rl.engine.memory import Bytes, StepShape, at_depth, decoder_bytes, language_model_bytes
    from imagerl.rl.engine.plan import make_plan, step_shape

    recipe = with_starting_adapter(recipe)
    config = model_config(recipe.model.path)
    tokenizer = _tokenizer_parameters(config)
    positions = int(config["num_image_positions"])
    prompts = load_prompt_set(recipe.data.train)
    edits = prompts.prompts[0].columns.get("reference") is not None
    prompt_tokens = prompt_tokens or longest_prompt(recipe.model.path, prompts, positions if edits else 0)
    lora, freeze = recipe.model.lora, recipe.model.freeze
    adapters = None
    if lora is not None:
        adapters = {
            "rank": lora.r,
            "alpha": lora.alpha,
            "dropout": lora.dropout,
            "target_modules": lora.target_modules,
        }
    known: dict[StepShape, tuple[Bytes, Bytes]] = {}

    def costs(shape: StepShape) -> tuple[Bytes, Bytes]:
        if shape not in known:
            layers = int(config["qwen3"]["num_hidden_layers"])

            def language(depth: int) -> Bytes:
                return language_model_bytes(_without_weights(config, depth, 1), shape, adapters, freeze)

            def decoder(depth: int) -> Bytes:
                return decoder_bytes(_without_weights(config, 1, depth), shape)

            # a pattern may name a layer that a shallow model has not
            known[shape] = (
                language(layers) if freeze else at_depth(language, layers),
                at_depth(decoder, int(config["sana"]["num_layers"])),
            )
        return known[shape]

    possible = [count for count in gpu_counts if recipe.rollout.prompts_per_step % count == 0]
    found = []
    for count in possible or gpu_counts[:1]:
        shape = step_shape(recipe, count, prompt_tokens, positions, edits)
        found.append(make_plan(recipe, count, shape, *costs(shape), tokenizer))
    return found


def with_starting_adapter(recipe: Recipe) -> Recipe:
    """Return the recipe, `model.lora` filled in where training goes on with the adapter in `model.path`."""
    from pathlib import Path

    from imagerl.models.common.adapters import ADAPTER_CONFIG, adapter_settings
    from imagerl.rl.config.engine import LoraConfig

    folder = Path(recipe.model.path).expanduser()
    if recipe.model.lora is not None or not (folder / ADAPTER_CONFIG).is_file():
        return recipe
    stored = adapter_settings(folder)
    named = stored.target_modules
    layers = [named] if isinstance(named, str) else named or LoraConfig(r=1).target_modules
    lora = LoraConfig(r=stored.r, alpha=stored.lora_alpha, target_modules=layers)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": lora})})


def model_config(path: str) -> dict[str, Any]:
    """Return the config behind `model.path`. Of published checkpoints that are not here the sizes are known."""
    from imagerl.models.blip3o_next.loading import read_config
    from imagerl.models.blip3o_next.published import HUB_NAMES, from_published, full_size_config, is_published
    from imagerl.models.common.shards import Shards
    from imagerl.models.families import base_folder

    name = path.partition("@")[0]
    if name in HUB_NAMES:
        return full_size_config(edit="edit" in name)
    folder = base_folder(path)
    config = read_config(folder)
    return from_published(config, Shards(folder).shapes) if is_published(config) else config


def longest_prompt(path: str, prompts: PromptSet, picture_tokens: int = 0) -> int:
    """Count tokens of the longest prompt, template included, and of the picture that it edits; estimated for a model
    that is not here."""
    from pathlib import Path

    from imagerl.models.blip3o_next.published import HUB_NAMES
    from imagerl.models.families import load_prompts

    texts = [prompt.text for prompt in prompts]
    if path.partition("@")[0] in HUB_NAMES and not Path(path).is_dir():
        tags = 2 if picture_tokens else 0
        return TEMPLATE_TOKENS + max(map(len, texts)) // LETTERS_PER_TOKEN + picture_tokens + tags
    return load_prompts(path).longest(prompts.prompts)


def _without_weights(config: Mapping[str, Any], layers: int, decoder_layers: int) -> Any:
    """Return the policy without its image tokenizer, of any depth."""
    from imagerl.models.blip3o_next.weights import empty_policy

    parts = {key: value for key, value in config.items() if key not in ("ta_tok", "image_tokenizer")}
    # a list of one entry per layer would contradict the depth
    qwen3 = {
        key: value
        for key, value in config["qwen3"].items()
        if key not in ("layer_types", "max_window_layers")
    }
    sized = {
        "qwen3": {**qwen3, "num_hidden_layers": layers},
        "sana": {**config["sana"], "num_layers": decoder_layers},
    }
    return empty_policy({**parts, **sized}, None)


def _tokenizer_parameters(config: Mapping[str, Any]) -> float:
    from accelerate import init_empty_weights

    from imagerl.models.blip3o_next.building import build_image_tokenizer

    with init_empty_weights(include_buffers=False):
        tokenizer = build_image_tokenizer(config)
    return float(sum(parameter.numel() for parameter in tokenizer.parameters())) if tokenizer else 0.0
