"""What a recipe trains of a model, by which losses: the part of supervised training that is every family's."""

from __future__ import annotations

import torch

from imagerl.models.base import Lessons, Policy
from imagerl.rl.config.sft import SFTRecipe
from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.errors import ImageRLError


def lessons_for(policy: Policy, recipe: SFTRecipe) -> Lessons:
    """Return what the engine trains, whose parameter names are those of checkpoints, with gradients for what the recipe
    trains and for nothing else.

    Raises ImageRLError for what the model does not have or cannot learn."""
    trained, objective = recipe.train, recipe.objective
    with_flow = objective.flow_weight > 0
    if with_flow and not policy.learns_flow:
        raise ImageRLError(
            "objective.flow_weight is above 0, but this model's decoder draws tokens without noise and has no flow "
            "loss; set it to 0, and train.connector and train.decoder to frozen"
        )
    policy.merge_lora()  # that the start came with
    lessons = policy.lessons(objective.on_prompt, with_flow)
    if objective.on_prompt and not lessons.predicts_prompts:
        raise ImageRLError(
            "objective.on_prompt trains the prompt's own tokens, but this model's head predicts image tokens only; "
            "set it to false"
        )
    for part in ("ar", "connector", "decoder"):
        how, ways = getattr(trained, part), (*lessons.parts.get(part, ()), "frozen")
        if how not in ways:
            raise ImageRLError(
                f"train.{part} is {how}, but with this model it can only be {' or '.join(ways)}"
            )
    lessons.trainable.requires_grad_(False)
    if trained.ar == "lora":
        lora = trained.lora
        torch.manual_seed(derive_seed(recipe.run.seed, "lora"))  # adapters begin at random
        policy.add_lora(lora.r, lora.alpha, lora.dropout, lora.target_modules)
    for name, parameter in lessons.trainable.named_parameters():
        part, _, piece = lessons.part_of(name).partition(".")
        if part and getattr(trained, part) in ("full", piece):
            parameter.requires_grad_(True)
    if trained.gradient_checkpointing:
        policy.recompute()
    return lessons


def learning_rate_share(recipe: SFTRecipe, lessons: Lessons, name: str) -> float:
    """Return the share of the scheduled learning rate that a parameter has."""
    return recipe.optim.factor(lessons.part_of(name).partition(".")[0] or "ar")
