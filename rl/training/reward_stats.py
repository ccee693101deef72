"""The part of each reward, and of the decoder's luck, in the advantages: pure functions of a step's scores."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Literal

import numpy as np

from imagerl.rl.types import RewardScores

Scale = Literal["group", "batch", "none"]


def mixing_metrics(
    scores: RewardScores,
    group_size: int,
    scale: str = "group",
    decoupled: bool = False,
    prefix: str = "",
) -> dict[str, float]:
    """Return for each of two or more rewards its weight at this step, its part of the advantages' variance, and the
    correlation of its values with those of each other one. Empty for a single reward.

    `scores` are those of the whole step, of all ranks; those of one half have a `prefix` for the names."""
    labels = list(scores.gated)
    if len(labels) < 2:
        return {}
    parts = variance_parts(scores.gated, scores.weights, scores.totals, group_size, scale, decoupled)
    metrics: dict[str, float] = {}
    for label in labels:
        metrics[f"reward/{prefix}{label}/weight"] = scores.weights[label]
        metrics[f"reward/{prefix}{label}/variance_part"] = parts[label]
    for one, other in combinations(labels, 2):
        metrics[f"reward/{prefix}{one}/correlation_{other}"] = correlation(
            scores.components[one], scores.components[other]
        )
    return metrics


def variance_parts(
    gated: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    totals: np.ndarray,
    group_size: int,
    scale: str = "group",
    decoupled: bool = False,
) -> dict[str, float]:
    """Return the part of the advantages' variance that comes with each reward; they add up to 1.

    The advantage of a sample is a sum of one term a reward, A = Σ_k a_k with a_k = w_k (r_k − group mean) / s, so
    the part of reward k is Σ a_k·A / Σ A² over all samples that have a total. It is negative where a reward pulls
    against the sum. s is the standard deviation of the total within the group (`scale` group) or one number, which
    cancels. `decoupled` divides each reward by its own deviation within the group instead (GDPO,
    arXiv 2601.05242); what one number for the whole step does afterwards cancels too. NaN where all advantages are 0.

    Args:
        gated: [B] by reward, group-major; NaN where a value is missing or does not apply, which adds nothing.
        totals: [B], NaN for a sample that does not train.
    """
    usable = np.isfinite(totals).reshape(-1, group_size)  # [P, G]
    terms = {
        label: weights[label] * _centred(values.reshape(-1, group_size), usable, decoupled)
        for label, values in gated.items()
    }
    advantages = np.sum(list(terms.values()), axis=0)
    if scale == "group" and not decoupled:
        spread = _deviation(advantages, usable)
        terms = {label: _divided(term, spread) for label, term in terms.items()}
        advantages = _divided(advantages, spread)
    whole = float(np.square(advantages).sum())
    return {
        label: float((term * advantages).sum()) / whole if whole else np.nan for label, term in terms.items()
    }


def variance_split(totals: np.ndarray, group_size: int, decodes: int) -> dict[str, float]:
    """Split the variance of rewards [P·G·M] within a prompt by its sources: unbiased estimates of a one-way analysis of
    variance, means over prompts and sequences.

    `decoder` is the variance among pictures of the same tokens, `tokens` that of a sequence's expected reward, and
    `decoder_part` the decoder's share of the variance of an averaged reward, decoder / M / (tokens + decoder / M):
    the part of an advantage that is the decoder's luck and not the tokens' merit. Prompts with a missing reward
    are left out.

    Returns nothing with M = 1: the two cannot be told apart then.
    """
    if decodes == 1:
        return {}
    rewards = totals.reshape(-1, group_size, decodes)
    rewards = rewards[np.isfinite(rewards).all(axis=(1, 2))]
    if not len(rewards):
        return {}
    decoder = float(rewards.var(axis=2, ddof=1).mean())
    averaged = float(rewards.mean(axis=2).var(axis=1, ddof=1).mean())  # of tokens + decoder / M
    split = {"decoder": decoder, "tokens": averaged - decoder / decodes}
    if averaged > 0:
        split["decoder_part"] = decoder / decodes / averaged
    return split


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation over samples [B] where both are finite; NaN where one of them is constant there."""
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 2 or not (np.ptp(a[known]) and np.ptp(b[known])):
        return float("nan")
    return float(np.corrcoef(a[known], b[known])[0, 1])


def _centred(values: np.ndarray, usable: np.ndarray, scaled: bool) -> np.ndarray:
    """Return [P, G] values less the mean of their group, 0 where there is none."""
    known = usable & np.isfinite(values)
    count = known.sum(axis=1, keepdims=True)
    mean = np.where(known, values, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(known, values - mean, 0.0)
    return _divided(centred, _deviation(centred, known)) if scaled else centred


def _deviation(centred: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the [P, 1] unbiased standard deviation of groups whose mean is 0."""
    count = known.sum(axis=1, keepdims=True)
    spread: np.ndarray = np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return spread


def _divided(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return values / by, and 0 where `by` is no more than rounding noise."""
    return np.where(by > 1e-9, values / np.maximum(by, 1e-9), 0.0)
