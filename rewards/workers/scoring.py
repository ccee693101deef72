"""Calls rewards safely and adds them up once; a value missing for one sample never reaches another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from imagerl.rewards.base import LoadedReward
from imagerl.rewards.boundary.guard import score_samples
from imagerl.rewards.boundary.targets import SAMPLE_NAMES
from imagerl.rewards.boundary.wire import Reply
from imagerl.rewards.mixing import Mix, weight_at
from imagerl.rl.errors import one_line
from imagerl.rl.types import ImageRLError, RewardRequest, RewardScores


@dataclass(slots=True)
class RewardValues:
    """The reply of one reward for B samples."""

    values: np.ndarray  # [B] float64, NaN where there is no usable value
    not_applicable: np.ndarray  # [B] bool, True where the reward returned None
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # [B] float64 by part, NaN where missing
    reason: str | None = None  # the last thing that went wrong, in one line
    regions: np.ndarray | None = None  # [B, K, 5] float64, NaN where a sample has fewer than K


def to_pil_images(images: np.ndarray) -> list[Image.Image]:
    """Turn pictures [B, H, W, 3] uint8 RGB into B PIL pictures that own their pixels.

    Raises ValueError for another shape or type."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be [B, H, W, 3] uint8, not {list(images.shape)} {images.dtype}")
    return [Image.fromarray(np.ascontiguousarray(image)).copy() for image in images]


def to_values(reply: Reply) -> RewardValues:
    """Turn a reply into arrays."""

    def column(entries: Sequence[float | None]) -> np.ndarray:
        return np.array(entries, dtype=np.float64)  # None becomes NaN

    return RewardValues(
        column(reply.rewards),
        np.array([value is None for value in reply.rewards], dtype=bool),
        {name: column(entries) for name, entries in reply.breakdown.items()},
        reply.reason,
        padded_regions(reply.regions),
    )


def padded_regions(samples: Sequence[Sequence[Sequence[float]]]) -> np.ndarray | None:
    """Return the regions of B samples as [B, K, 5], NaN where a sample has fewer than K; None where none has any."""
    most = max(map(len, samples), default=0)
    if not most:
        return None
    padded = np.full((len(samples), most, 5), np.nan)
    for row, regions in zip(padded, samples, strict=True):
        row[: len(regions)] = np.reshape(regions, (-1, 5))
    return padded


def call_reward(reward: LoadedReward, request: RewardRequest) -> Reply:
    """Score a request by one reward. Raises ImageRLError as the reward does; see `boundary.score_samples`."""
    columns = {name: list(values) for name, values in request.columns.items() if name not in SAMPLE_NAMES}
    samples: dict[str, list[Any]] = {
        "prompts": list(request.prompts),
        "completions": [list(tokens) for tokens in request.completions],
        "images": to_pil_images(request.images),
        "groups": [place // request.group_size for place in range(len(request.prompts))],
        "progress": [request.progress] * len(request.prompts),
        **columns,
    }
    return score_samples(reward.fn, samples)


def part_of(request: RewardRequest, which: slice) -> RewardRequest:
    """Return some consecutive samples of a request."""
    return RewardRequest(
        prompts=request.prompts[which],
        completions=request.completions[which],
        images=request.images[which],
        columns={name: values[which] for name, values in request.columns.items()},
        group_size=request.group_size,
        step=request.step,
        progress=request.progress,
    )


def combine(mixes: Sequence[Mix], replies: Sequence[Reply], group_size: int, step: int = 0) -> RewardScores:
    """Return the weighted sum of the components, per sample, with the weights of `step` and gates applied.

    A component that returned None for every sample of a group does not apply to that prompt and is left out
    of the group's sums; a gate by it stands open there. Any other missing component, or value to gate by, makes
    the sample's total NaN and is one failure of that reward; so is a sample to which no reward applies, because
    it has no total either. A reward of weight 0 is measured only: what it lacks is counted and costs nothing. Where
    rewards teach one half of the generator only, each half has a total of its own, by the same rules.

    Raises ValueError when the samples are not whole groups, and ImageRLError when a gate names a part that its
    reward does not have."""
    values = [to_values(reply) for reply in replies]
    size = values[0].values.size
    if size % group_size:
        raise ValueError(f"{size} samples are not whole groups of {group_size}")
    applies = [
        ~np.repeat(value.not_applicable.reshape(-1, group_size).all(axis=1), group_size) for value in values
    ]
    weights = [weight_at(mix.weight, step) for mix in mixes]
    parts: list[
        tuple[Mix, np.ndarray, np.ndarray]
    ] = []  # of the totals: where each applies, and what it adds
    weighted = [used for used, weight in zip(applies, weights, strict=True) if weight]
    orphaned = ~np.any(weighted, axis=0) if weighted else np.zeros(size, dtype=bool)  # [B]
    scores = RewardScores(np.zeros(size), {}, {}, {})
    places = {mix.label: place for place, mix in enumerate(mixes)}
    for mix, weight, value, used in zip(mixes, weights, values, applies, strict=True):
        gated = value.values
        if mix.gate:
            by = places[mix.gate.by.partition("/")[0]]
            opening = mix.gate.opening(_gate_values(mix, values[by]))
            gated = gated * np.where(applies[by], opening, 1.0)
        if weight:
            parts.append((mix, used, np.where(used, weight * gated, 0.0)))
        scores.components[mix.label] = value.values
        scores.components |= {f"{mix.label}/{part}": column for part, column in value.parts.items()}
        scores.gated[mix.label] = np.where(used, gated, np.nan)
        scores.weights[mix.label] = weight
        if weight and value.regions is not None:
            scores.regions[mix.label] = value.regions * [weight, 1, 1, 1, 1]
        lost = (np.isnan(gated) & used) | orphaned
        scores.failures[mix.label] = int(lost.sum())
        if lost.any():
            gate_missing = mix.gate and np.isfinite(value.values[lost]).all()
            reason = f"{mix.gate.by}, its gate, has no value" if mix.gate and gate_missing else value.reason
            scores.reasons[mix.label] = one_line(reason or "returned None")
    scores.totals = _total(parts, size)
    if any(mix.half != "both" for mix in mixes):
        scores.halves = {
            half: _total([part for part in parts if part[0].half in (half, "both")], size)
            for half in ("tokens", "flow")
        }
    return scores


def _total(parts: Sequence[tuple[Mix, np.ndarray, np.ndarray]], size: int) -> np.ndarray:
    """Add up what rewards give to samples [B], NaN where none of them applies."""
    total = np.zeros(size)
    for _, _, share in parts:
        total += share
    orphaned = ~np.any([used for _, used, _ in parts], axis=0) if parts else np.zeros(size, dtype=bool)
    return np.where(orphaned, np.nan, total)


def _gate_values(mix: Mix, value: RewardValues) -> np.ndarray:
    """Return the values [B] that the gate of `mix` looks at. Raises ImageRLError for a part that does not exist."""
    assert mix.gate is not None
    label, _, part = mix.gate.by.partition("/")
    if not part:
        return value.values
    if part not in value.parts and np.isfinite(value.values).any():
        has = ", ".join(value.parts) or "none"
        raise ImageRLError(
            f"the gate of reward {mix.label!r} asks for {mix.gate.by}; the parts of {label!r} are: {has}"
        )
    return value.parts.get(part, np.full(value.values.size, np.nan))


def score_request(functions: Sequence[LoadedReward], request: RewardRequest) -> RewardScores:
    """Score whole groups in this process. See `combine` for how missing values are treated.

    Raises ImageRLError when a reward says that the recipe must be mended."""
    replies = [call_reward(reward, request) for reward in functions]
    mixes = [Mix(reward.label, reward.weight, reward.gate, reward.half) for reward in functions]
    return combine(mixes, replies, request.group_size, request.step)
