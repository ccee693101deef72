"""Several pictures of one token sequence: rewards averaged over them, and the parts of the rewards' spread that are
due to the tokens and to the decoder. Pure functions of a step's rewards."""

from __future__ import annotations

import numpy as np

from imagerl.rl.rollout.scores import map_samples
from imagerl.rl.types import RewardScores


def average_decodes(scores: RewardScores, decodes: int) -> RewardScores:
    """Reduce scores [B·M] of pictures to those [B] of their token sequences: means over the M pictures that have a
    value, NaN where none has. With M = 1 they are the scores themselves."""
    if decodes == 1:
        return scores
    return map_samples(scores, lambda values: _mean(values, decodes))


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


def _mean(values: np.ndarray, decodes: int) -> np.ndarray:
    rows = values.reshape(-1, decodes)
    known = np.isfinite(rows)
    count = known.sum(axis=1)
    total = np.where(known, rows, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
