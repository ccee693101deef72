"""Which parts of a generator a recipe trains, as the one module that the engine takes over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rl.config import Recipe
from rl.types import ImageRLError, Policy

TOKENS, FLOW = "tokens", "flow"


class Halves(nn.Module):
    """Both halves at once, so that one forward and one backward pass of an engine's module reach them: ranks
    exchange the gradients of a module once."""

    def __init__(self, tokens: nn.Module, flow: nn.Module) -> None:
        super().__init__()
        self.tokens = tokens
        self.flow = flow

    def forward(self, tokens: Sequence[Any], flow: Sequence[Any]) -> tuple[Any, Any]:
        """What each half says to its own arguments."""
        return self.tokens(*tokens), self.flow(*flow)


def trained_halves(recipe: Recipe) -> tuple[str, ...]:
    """Their names, in the order in which `trained_module` takes arguments."""
    flow = recipe.algorithm.flow
    if flow is None:
        return (TOKENS,)
    return (TOKENS, FLOW) if flow.joint else (FLOW,)


def trained_module(policy: Policy, recipe: Recipe) -> nn.Module:
    """The module that the engine prepares, whose parameter names are those of checkpoints. With one half it is
    that half itself; the other one is frozen."""
    halves = trained_halves(recipe)
    if FLOW not in halves:
        return policy.trainable
    if policy.flow is None:
        raise ImageRLError("algorithm.flow trains the decoder, but the policy has none that trains")
    if TOKENS in halves:
        return Halves(policy.trainable, policy.flow.trainable)
    policy.trainable.requires_grad_(False)
    return policy.flow.trainable


def lr_factor(recipe: Recipe, name: str) -> float:
    """The share of the scheduled learning rate, optim.lr, that a parameter of `trained_module` gets."""
    flow = recipe.algorithm.flow
    if flow is None or flow.lr is None or (flow.joint and not name.startswith(f"{FLOW}.")):
        return 1.0
    return flow.lr / recipe.optim.lr
