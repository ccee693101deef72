"""Hold a family of a user's own to `models.base` before time is spent: one line for the first thing that is not so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from imagerl.models.base import Policy
from imagerl.rl.types import (
    ImageRLError,
    Prompt,
    SamplingParams,
    TokenScores,
    TokenTrajectory,
    repeat,
    select,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def require_members(thing: object, protocol: type, base: str) -> None:
    """Raise ImageRLError when an object lacks members of a Protocol of `models.base`; `base` has some of them."""
    names = (*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_")))
    missing = [name for name in names if not (hasattr(type(thing), name) or hasattr(thing, name))]
    if missing:
        raise ImageRLError(
            f"{type(thing).__name__} has no {', '.join(missing)}, which models/base.py asks of a {protocol.__name__}; "
            f"write what is missing, or build the class on {base}"
        )


def require_loaded(policy: Policy, folder: Path) -> None:
    """Raise ImageRLError when a policy as it was loaded lacks members, is in training mode, or has gradients outside
    its `trainable`, where nothing would ever train them."""
    require_members(policy, Policy, "BasePolicy of models/common/policy.py")
    own = {id(parameter) for parameter in policy.trainable.parameters()}
    for place, part in {"policy.trainable": policy.trainable, **policy.parts()}.items():
        loose = [n for n, p in part.named_parameters() if p.requires_grad and id(p) not in own]
        if loose:
            raise ImageRLError(
                f"{folder}: load left gradients on {loose[0]} of {place!r}, which is outside policy.trainable; freeze "
                "all that is not in it by requires_grad_(False)"
            )
        if part.training and not isinstance(part, torch.nn.ModuleList):  # which only lists
            raise ImageRLError(
                f"{folder}: load left {place} in training mode; call .eval() on the module itself"
            )
    if not any(parameter.requires_grad for parameter in policy.trainable.parameters()):
        raise ImageRLError(
            f"{folder}: load left no gradients on policy.trainable; freeze only what is outside it"
        )


def _require(method: str, what: str, value: object, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    found = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    wanted = f"{list(shape)} {' or '.join(map(str, dtypes))}"
    if not isinstance(value, Tensor) or list(value.shape) != list(shape) or value.dtype not in dtypes:
        plain = f"{method} returned {what} {found}; make it {wanted}"
        raise ImageRLError(plain.replace("torch.", ""))


@torch.no_grad()
def try_out(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    limit: float,
    autocast: Callable[[], AbstractContextManager[object]],
    grouped: bool = True,
) -> None:
    """Draw three samples of each of two prompts, score them, and decode one, at 0.8 of the temperature, so that a
    sampler without any is seen.

    Raises ImageRLError, which names the method and the fix, for wrong shapes, types and ranges, samples that do not
    follow their numbers, log-probs that differ by more than `limit` between what was drawn and what is scored, or
    between prompts read once for their group, where they are `grouped`, and for each sample, and scores without
    gradients."""
    name, canvas = type(policy).__name__, policy.prompts.canvas(prompts[0])
    encode, sample, score, decode = (
        f"{name}.{method}" for method in ("encode", "sample_tokens", "trainable.forward", "decode")
    )
    sampling = replace(sampling, temperature=0.8 * sampling.temperature, thought_tokens=0, decodes=1)
    pair = [*(p for p in prompts if policy.prompts.canvas(p) == canvas), prompts[0]][:2]
    rows = policy.encode(pair)
    for key, tensor in rows.items():
        if not isinstance(tensor, Tensor) or len(tensor) != 2:
            raise ImageRLError(
                f"{encode} returned {key!r} without a row for each of 2 prompts; give every one its own"
            )
    shape = (6, canvas.tokens)
    numbers = torch.rand(canvas.tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy.refresh_sampler()
    drawn = policy.sample_tokens(rows, torch.stack([numbers, numbers, 1 - numbers] * 2), sampling)
    if not isinstance(drawn, TokenTrajectory):
        raise ImageRLError(f"{sample} returned a {type(drawn).__name__}; make it a TokenTrajectory")
    _require(sample, "tokens", drawn.tokens, shape, torch.int64)
    _require(sample, "rollout_logprobs", drawn.rollout_logprobs, shape, torch.float32)
    _require(sample, "action_mask", drawn.action_mask, shape, torch.bool)
    one, same, other = drawn.tokens.view(2, 3, -1).unbind(1)
    # The first four: rounding in bfloat16 may part two samples later on, hardly both pairs at once here.
    if (one[:, :4] != same[:, :4]).any(1).all():
        raise ImageRLError(
            f"{sample} drew other tokens by the same uniforms for the same prompt, whose samples lie side by side; "
            "draw by those numbers alone, as models.common.tokens.draw_tokens does, so that a run can be repeated"
        )
    if torch.equal(one, other):
        raise ImageRLError(
            f"{sample} drew the same tokens by other uniforms; draw from the distribution, as "
            "models.common.tokens.draw_tokens does, not its most likely token"
        )
    tokens, actions = drawn.tokens.to(policy.device), drawn.action_mask.to(policy.device)
    with autocast():
        each = policy.trainable(repeat(rows, 3), tokens, sampling)
        once = policy.trainable(rows, tokens, sampling) if grouped else each
        with torch.enable_grad():
            single = policy.trainable(select(rows, slice(0, 1)), tokens[:1], sampling)
    for scores in (each, once):
        if not isinstance(scores, TokenScores):
            raise ImageRLError(
                f"{score} returned a {type(scores).__name__}; make it TokenScores(logprobs, entropy)"
            )
        _require(score, "logprobs", scores.logprobs, shape, torch.float32)
        _require(score, "entropy", scores.entropy, shape, torch.float32)
    trains = any(parameter.requires_grad for parameter in policy.trainable.parameters())
    if trains and not single.logprobs.requires_grad:
        raise ImageRLError(
            f"{score} returned logprobs without gradients; compute them outside torch.no_grad, undetached"
        )

    def refuse_gap(found: Tensor, wanted: Tensor, what: str) -> None:
        gap = (found - wanted).abs()[actions].max().item()
        if not gap <= limit:  # NaN too
            raise ImageRLError(
                f"{what}; log-probs differ by {gap:.2g}, more than rounding explains ({limit:g})"
            )

    refuse_gap(
        each.logprobs,
        once.logprobs,
        f"{score} must score alike whether prompts have a row for each sample or for each group, whose samples lie "
        "side by side: rl.types.repeat makes rows of the first kind",
    )
    refuse_gap(
        once.logprobs,
        drawn.rollout_logprobs.to(policy.device),
        f"{sample} and trainable.forward must be of one distribution: the same logits, temperature and token_guidance, "
        "over the same tokens, without dropout",
    )
    noise = None
    if canvas.noise is not None:
        noise = torch.randn(1, *canvas.noise, generator=torch.Generator().manual_seed(1))
    with autocast():
        picture = policy.decode(select(rows, slice(0, 1)), drawn.rows(slice(0, 1)), noise, sampling)
    _require(decode, "pictures", picture, (1, 3, *canvas.pixels), *FLOATS)
    if not (picture.min() >= 0 and picture.max() <= 1):
        raise ImageRLError(
            f"{decode} returned pixels from {picture.min():.3g} to {picture.max():.3g}; bring them to [0, 1], as "
            "models.common.policy.drawn does"
        )
    policy.release_sampler()
