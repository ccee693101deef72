"""The learning rate of every update."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imagerl.rl.config.engine import OptimConfig


def learning_rate(update: int, total: int, optim: OptimConfig, share: float | None = None) -> float:
    """Return the learning rate of 0-based `update` out of `total`, a pure function so that resuming needs no state.

    Warm-up rises linearly and its first update is not wasted on zero; then constant, or constant up to the last
    `decay_share` of the updates and from there down to `min_lr` along a line or half a cosine. Where the number of
    updates is not known beforehand, `share` in [0, 1] says how much of the run is over, and the fall follows that.
    """
    warmup = optim.warmup_steps
    if update < warmup:
        return optim.lr * (update + 1) / (warmup + 1)
    if share is None:
        begin = max(float(warmup), (1.0 - optim.decay_share) * total)
        progress = min(1.0, max(0.0, update - begin) / max(1.0, total - begin))
    else:
        progress = min(1.0, max(0.0, share - (1.0 - optim.decay_share)) / optim.decay_share)
    if optim.schedule == "linear":
        return optim.min_lr + (optim.lr - optim.min_lr) * (1.0 - progress)
    if optim.schedule == "cosine":
        return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.lr
