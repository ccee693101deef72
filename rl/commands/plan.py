"""`imagerl plan`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from imagerl.rl.commands.options import Overrides
from imagerl.rl.errors import ImageRLError

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe
    from imagerl.rl.training.plan import Plan

GPU_COUNTS = (1, 2, 4, 8)


def plan(
    recipe: Annotated[str, typer.Argument(help="recipe YAML")],
    overrides: Overrides = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="number of GPUs, default: 1, 2, 4 and 8; or 8x80: find settings for 8 of 80 GiB"),
    ] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of one GPU")] = None,
) -> None:
    """Work out the memory a recipe needs on each GPU, without weights and without a GPU."""
    from imagerl.rl.config.train import load_recipe
    from imagerl.rl.training.plan import table

    settings, (count, size) = load_recipe(recipe, overrides or []), _gpus(gpus)
    if settings.rollout.thought_tokens:
        print(
            "imagerl: thoughts come on top of what is planned here: rollout.thought_tokens", file=sys.stderr
        )
    if count is None or size is None:
        print(table(plans(settings, [count] if count else GPU_COUNTS), gpu_memory))
        return
    found, changes = fitting(settings, count, size)
    print(table(found, size))
    told = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    print(f"set: {told}" if told else "the recipe fits as it is")


def _gpus(text: str | None) -> tuple[int | None, float | None]:
    """Read 8, or 8x80. Raises ImageRLError for anything else."""
    if text is None:
        return None, None
    count, _, size = text.partition("x")
    try:
        read = int(count), float(size) if size else None
    except ValueError:
        read = 0, None
    if read[0] < 1 or (read[1] is not None and not 0.1 <= read[1] <= 10_000):
        raise ImageRLError(
            f"--gpus is {text!r}; give a number, as 8, or a number and the GiB of each, as 8x80"
        )
    return read


def fitting(recipe: Recipe, gpus: int, gib: float) -> tuple[list[Plan], dict[str, object]]:
    """Find settings with which a recipe fits, and its plans with them. Each makes the step slower and changes nothing
    else. Raises ImageRLError when none are enough."""
    from imagerl.rl.config.recipe import validate_recipe
    from imagerl.rl.training.plan import GIB, USABLE, lighter

    data = recipe.model_dump()
    changes: dict[str, object] = {}
    while True:
        all_plans = plans(recipe, [gpus])
        found = max(all_plans, key=lambda plan: plan.peak)
        if found.peak <= USABLE * gib * GIB:
            return all_plans, changes
        step = lighter(recipe, found)
        if step is None:
            tried = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
            raise ImageRLError(
                f"{found.peak / GIB:.1f} GiB at {found.busiest} do not fit {gpus} GPUs of {gib:g} GiB, even with "
                f"{tried or 'the settings as they are'}; set model.lora='{{r: 16}}', or use more or larger GPUs"
            )
        changes |= step
        for key, value in step.items():
            section, name = key.split(".")
            data[section][name] = value
        recipe = validate_recipe(type(recipe), data, "the recipe")


def plans(recipe: Recipe, gpu_counts: Sequence[int], prompt_tokens: int | None = None) -> list[Plan]:
    """Make a plan for each number of GPUs that can share a step's prompts, and one for those of rollout actors, where
    there are any. Raises ImageRLError when none can."""
    from imagerl.models.families import load_outline
    from imagerl.rl.data.prompt_sets import load_prompt_set
    from imagerl.rl.training.memory import Bytes, StepShape, step_bytes
    from imagerl.rl.training.plan import actor_plan, make_plan, step_shape, training_gpus

    recipe = with_starting_adapter(recipe)
    outline = load_outline(recipe.model.path, recipe.model.family)
    prompts = load_prompt_set(recipe.data.train).prompts
    edits = prompts[0].columns.get("reference") is not None
    prompt_tokens = prompt_tokens or outline.prompts.longest(prompts)
    canvas = max(map(outline.prompts.canvas, prompts), key=lambda canvas: math.prod(canvas.pixels))
    known: dict[StepShape, Bytes] = {}

    reserved = gpu_counts[-1] - training_gpus(recipe, gpu_counts[-1])
    training = [count - reserved for count in gpu_counts if count > reserved]
    shared = [count for count in training if recipe.rollout.prompts_per_step % count == 0]
    found = []
    for count in shared or training[:1]:
        shape = step_shape(recipe, count, prompt_tokens, canvas, edits)
        found.append(make_plan(recipe, count, shape, step_bytes(outline.policy, recipe, shape, known)))
    if recipe.rollout.workers:
        shape = step_shape(recipe, found[0].gpus, prompt_tokens, canvas, edits, actor=True)
        found.append(actor_plan(recipe, step_bytes(outline.policy, recipe, shape, known)))
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
