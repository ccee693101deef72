"""`imagerl plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from imagerl.rl.commands.options import Overrides

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe
    from imagerl.rl.engine.plan import Plan

GPU_COUNTS = (1, 2, 4, 8)


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
    from imagerl.models.families import load_outline
    from imagerl.rl.data.prompt_sets import load_prompt_set
    from imagerl.rl.engine.memory import Bytes, StepShape, at_depth, decoder_bytes, token_half_bytes
    from imagerl.rl.engine.plan import make_plan, step_shape

    recipe = with_starting_adapter(recipe)
    outline = load_outline(recipe.model.path, recipe.model.family)
    prompts = load_prompt_set(recipe.data.train).prompts
    edits = prompts[0].columns.get("reference") is not None
    prompt_tokens = prompt_tokens or outline.prompts.longest(prompts)
    canvas = max(map(outline.prompts.canvas, prompts), key=lambda canvas: math.prod(canvas.pixels))
    known: dict[StepShape, tuple[Bytes, Bytes]] = {}

    def costs(shape: StepShape) -> tuple[Bytes, Bytes]:
        def tokens(depth: int) -> Bytes:
            policy = outline.policy(depth, min(1, outline.decoder_layers))
            return token_half_bytes(policy, shape, recipe.model.lora, recipe.model.freeze)

        if shape not in known:
            known[shape] = (
                # a pattern may name a layer that a shallow model has not
                tokens(outline.layers) if recipe.model.freeze else at_depth(tokens, outline.layers),
                at_depth(
                    lambda depth: decoder_bytes(outline.policy(1, depth), shape), outline.decoder_layers
                ),
            )
        return known[shape]

    possible = [count for count in gpu_counts if recipe.rollout.prompts_per_step % count == 0]
    found = []
    for count in possible or gpu_counts[:1]:
        shape = step_shape(recipe, count, prompt_tokens, canvas, edits)
        found.append(make_plan(recipe, count, shape, *costs(shape)))
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
