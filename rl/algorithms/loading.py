"""The loss and the advantages that a recipe's `algorithm` section asks for, a user's own included."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from imagerl.rl.algorithms.advantages import (
    AdvantageInputs,
    AdvantageOutput,
    advantages_of,
    group_advantages,
    spread,
)
from imagerl.rl.algorithms.kl import kl_sums
from imagerl.rl.algorithms.losses import policy_loss
from imagerl.rl.config.algorithm import AlgorithmConfig
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.importing import import_callable
from imagerl.rl.types import LossInputs, LossOutput

Loss = Callable[..., LossOutput]
Advantages = Callable[[AdvantageInputs], AdvantageOutput]
SETTINGS = (
    *("ratio_level", "clip", "clip_low", "clip_high", "soft_positive", "soft_negative"),
    *("normaliser", "kl_estimator"),
)


def load_loss(algorithm: AlgorithmConfig) -> Loss:
    """Return the function to call with `LossInputs` and the keywords of `loss_settings`.

    Raises:
        ImageRLError: the user's own cannot be imported or asks for what it would not get; when called, it returns
            no LossOutput with a scalar loss. What it does not measure itself, actions and KL, is added.
    """
    if algorithm.import_path is None:
        if algorithm.arguments:
            raise ImageRLError(
                "algorithm.arguments are for a loss of your own; set algorithm.import_path too"
            )
        return policy_loss
    key = "algorithm.import_path"
    loss = import_callable(algorithm.import_path, key)
    call = taking(loss, loss_settings(algorithm, algorithm.kl_coef), algorithm.arguments, key)

    def checked(inputs: LossInputs, **settings: object) -> LossOutput:
        output = call(inputs, **settings)
        if not isinstance(output, LossOutput) or output.loss.dim():
            raise ImageRLError(
                f"{key} {algorithm.import_path!r} must return LossOutput(loss, metrics) with a scalar loss"
            )
        measured = {"actions": inputs.action_mask.sum()}
        if inputs.ref_logprobs is not None:
            measured |= kl_sums(inputs.logprobs, inputs.ref_logprobs, inputs.action_mask)
        return replace(output, metrics={**measured, **output.metrics})

    return checked


def loss_settings(algorithm: AlgorithmConfig, kl_coef: float) -> dict[str, object]:
    """Return the keyword arguments of `policy_loss`; `kl_coef` is the present one."""
    settings = {name: getattr(algorithm, name) for name in SETTINGS}
    return settings | {"kl_coef": kl_coef if algorithm.kl_in == "loss" else 0.0}


def load_advantages(algorithm: AlgorithmConfig) -> Advantages:
    """Return the function that turns a step's rewards into advantages.

    Raises:
        ImageRLError: the user's own cannot be imported; when called, it returns something else than advantages.
    """
    if algorithm.advantage_import_path is None:
        return partial(
            advantages_of,
            baseline=algorithm.baseline,
            scale=algorithm.scale_rewards,
            eps=algorithm.advantage_eps,
            decouple=algorithm.decouple_rewards,
        )
    target, key = algorithm.advantage_import_path, "algorithm.advantage_import_path"
    function = import_callable(target, key)

    def checked(inputs: AdvantageInputs) -> AdvantageOutput:
        try:
            return user_advantages(inputs, function)
        except ValueError as error:
            raise ImageRLError(f"{key} {target!r}: {error}") from error

    return checked


def user_advantages(
    inputs: AdvantageInputs, function: Callable[[AdvantageInputs], Tensor]
) -> AdvantageOutput:
    """Call a user's function and return its [B] or [B, N], with 0 for samples without a reward.

    Raises:
        ValueError: another shape, or a number that is not finite for a sample with a reward.
    """
    output = group_advantages(inputs.rewards, inputs.group_size, "none")
    values = torch.as_tensor(function(inputs)).detach()
    if values.shape not in (inputs.rewards.shape, inputs.action_mask.shape):
        raise ValueError(
            f"must return [B] or [B, N] = {list(inputs.action_mask.shape)}, not {list(values.shape)}"
        )
    advantages = values.where(output.valid if values.dim() == 1 else output.valid[:, None], 0.0).float()
    if not advantages.isfinite().all():
        raise ValueError("returned NaN or inf for a sample that has a reward")
    return replace(output, advantages=advantages, metrics=output.metrics | spread(advantages, output.valid))


def taking(
    function: Callable[..., object], settings: Mapping[str, object], own: Mapping[str, object], key: str
) -> Callable[..., object]:
    """Wrap the function so that all our settings may be passed by keyword: it gets those that it names, and
    all of its `own` arguments.

    Raises:
        ImageRLError: it has no such argument of its own, or needs one that it would not get.
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]  # the first takes the inputs
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in own:
        if name not in names and not takes_all:
            raise ImageRLError(
                f"{key}: {function.__name__} has no argument {name!r}; it has: {', '.join(names)}"
            )
    for name, parameter in names.items():
        if parameter.default is parameter.empty and name not in own and name not in settings:
            raise ImageRLError(
                f"{key}: {function.__name__} needs the argument {name!r}; set algorithm.arguments.{name}"
            )

    def call(inputs: object, **given: object) -> object:
        chosen = {name: value for name, value in given.items() if takes_all or name in names}
        return function(inputs, **{**chosen, **own})

    return call
