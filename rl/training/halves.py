"""The parts of a generator that a recipe trains, as the one module that the engine takes over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from imagerl.models.base import Policy
from imagerl.rl.config.train import Recipe
from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.errors import ImageRLError
from imagerl.rl.training.flow_half import FlowHalf
from imagerl.rl.training.half import Gather, Half
from imagerl.rl.training.token_half import TokenHalf

TOKENS, FLOW = "tokens", "flow"


class Halves(nn.Module):
    """A module of both halves, so that one forward and one backward pass of an engine's module reach them: ranks
    exchange the gradients of a module once."""

    def __init__(self, tokens: nn.Module, flow: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens
        self.flow = flow

    def forward(self, tokens: Sequence[object], flow: Sequence[object]) -> tuple[object, object]:
        """Call each half with its own arguments."""
        return self.tokens(*tokens), self.flow(*flow)


def trained_halves(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the trained halves, in the order in which the trained module takes arguments."""
    flow = recipe.algorithm.flow
    if flow is None:
        return (TOKENS,)
    return (TOKENS, FLOW) if flow.joint else (FLOW,)


def halves_in_training(recipe: Recipe, policy: Policy, gather: Gather) -> list[Half[Any]]:
    """Make the halves that the trainer drives, in the order of `trained_halves`. `gather` returns every rank's
    value."""
    make: dict[str, Callable[[], Half[Any]]] = {
        TOKENS: lambda: TokenHalf(recipe, policy, gather),
        FLOW: lambda: FlowHalf(recipe, policy),
    }
    return [make[name]() for name in trained_halves(recipe)]


def trained_module(policy: Policy, recipe: Recipe) -> nn.Module:
    """Give a policy the adapters and frozen parts that the recipe asks for, and return the module that the engine
    prepares, whose parameter names are those of checkpoints. With one half it is that half itself; the other one is
    frozen. An adapter that the policy came with goes on training; under a new one, or where tokens do not train, it is
    merged.

    Raises ImageRLError when adapters cannot be had."""
    halves = trained_halves(recipe)
    if recipe.model.lora or TOKENS not in halves:
        policy.merge_lora()
    elif policy.adapted and recipe.algorithm.reference_every:
        raise ImageRLError(
            "algorithm.reference_every needs full weights, and model.path is an adapter; give its merged export "
            "(without --adapter) as model.path"
        )
    if lora := recipe.model.lora:
        torch.manual_seed(derive_seed(recipe.run.seed, "lora"))  # adapters begin at random
        policy.add_lora(lora.r, lora.alpha, lora.dropout, lora.target_modules)
    policy.freeze(recipe.model.freeze)
    if recipe.engine.activation_checkpointing:
        policy.recompute()
    flow = recipe.algorithm.flow
    if flow is None:
        return policy.trainable
    half = policy.train_decoder()
    if flow.lora:
        torch.manual_seed(derive_seed(recipe.run.seed, "flow lora"))
        half.add_lora(flow.lora.r, flow.lora.alpha, flow.lora.target_modules)
    if TOKENS in halves:
        return Halves(policy.trainable, half.trainable)
    policy.trainable.requires_grad_(False)
    return half.trainable


def freeze_references(policy: Policy, recipe: Recipe) -> None:
    """Remember the present policy where a KL to it is asked for, in the loss or in evaluations."""
    halves, flow = trained_halves(recipe), recipe.algorithm.flow
    if TOKENS in halves and (recipe.algorithm.needs_reference or recipe.eval.kl):
        policy.freeze_reference()
    if flow is not None and flow.kl_coef and policy.flow is not None:
        policy.flow.freeze_reference()


def lr_factor(recipe: Recipe, name: str) -> float:
    """Return the share of the scheduled learning rate, optim.lr, that a parameter of `trained_module` gets."""
    flow = recipe.algorithm.flow
    if flow is None or flow.lr is None or (flow.joint and not name.startswith(f"{FLOW}.")):
        return 1.0
    return flow.lr / recipe.optim.lr
