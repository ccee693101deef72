"""What a training step says of itself: seconds, sums and scores as the keys of docs/run-folder.md, reasons to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from imagerl.rl.algorithms.kl import masked
from imagerl.rl.algorithms.losses import truncated_importance
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import LossInputs, RewardScores, TokenScores, TrainBatch

Metrics = dict[str, float]

# name of a sum -> key of its mean per action
PER_ACTION = {
    "entropy": "policy/entropy",
    "ratio": "policy/ratio_mean",
    "ratio_deviation": "policy/ratio_deviation",
    "clip_low": "policy/clip_low",
    "clip_high": "policy/clip_high",
    "old_kl": "policy/old_kl",
    "policy_weight": "policy/weight_mean",
    "selected": "policy/selected",
    "importance_capped": "policy/importance_capped",
    "kl_k1": "kl/k1",
    "kl_k2": "kl/k2",
    "kl_k3": "kl/k3",
}
THOUGHT = "thought/"  # begins the names of sums and keys that are of thoughts alone
KL_SUMS = ("kl_k1", "kl_k2", "kl_k3")
OTHER_SUMS = ("actions", "loss", "grad_norm", "lr", "replay_gap", "replay_gap_max", "ratio_deviation_squared")


def reward_metrics(scores: RewardScores) -> Metrics:
    """Return means and spreads of the totals and of each component, over all samples that have them."""
    metrics: Metrics = {}
    of_halves = {f"of_{half}": totals for half, totals in scores.halves.items()}
    for name, values in {"": scores.totals, **of_halves, **scores.components}.items():
        known, key = values[np.isfinite(values)], f"reward/{name}/" if name else "reward/"
        metrics[f"{key}mean"] = float(known.mean()) if len(known) else math.nan
        metrics[f"{key}std"] = float(known.std(ddof=1)) if len(known) > 1 else math.nan
    metrics["reward/failed"] = float(len(scores.totals) - np.isfinite(scores.totals).sum())
    return metrics | {f"reward/{label}/failed": float(count) for label, count in scores.failures.items()}


def replay_gap(inputs: LossInputs, part: TrainBatch) -> Tensor:
    """Return |trainer's log-prob before any update − sampler's| [B, N], 0 where masked."""
    return masked((inputs.old_logprobs - part.rollout_logprobs).abs(), part.action_mask)


def microbatch_sums(
    inputs: LossInputs, part: TrainBatch, scores: TokenScores, importance_cap: float | None
) -> dict[str, Tensor]:
    """Sum over a microbatch's actions what no loss needs to know of, to be added to its own sums."""
    mask = part.action_mask
    sums = {
        "actions": mask.sum(),
        "entropy": masked(scores.entropy.detach(), mask).sum(),
        "replay_gap": replay_gap(inputs, part).sum(),
    }
    if part.selected is not None:
        sums["selected"] = (part.selected & mask).sum()
    if importance_cap is not None:
        weight = truncated_importance(inputs.old_logprobs, part.rollout_logprobs, importance_cap)
        sums["importance_capped"] = ((weight >= importance_cap) & mask).sum()
    return sums


def thought_sums(inputs: LossInputs, scores: TokenScores, length: int) -> dict[str, Tensor]:
    """Sum over the thoughts of a microbatch, which are the first `length` actions of each sample."""
    mask = inputs.action_mask[:, :length]
    sums = {
        "actions": mask.sum(),
        "samples": mask[:, 0].sum(),
        "full": mask[:, -1].sum(),
        "entropy": masked(scores.entropy.detach()[:, :length], mask).sum(),
    }
    if inputs.ref_logprobs is not None:
        difference = (inputs.ref_logprobs - inputs.logprobs.detach())[:, :length]
        sums["kl"] = masked(difference.exp() - difference - 1, mask).sum()  # k3
    return {f"{THOUGHT}{name}": value for name, value in sums.items()}


def thought_metrics(updates: Sequence[Metrics]) -> Metrics:
    """Return the mean length of thoughts, the share that fills all places, and per action of theirs the entropy in the
    last update and the KL to the reference in the first."""
    made = [update for update in updates if update.get(f"{THOUGHT}actions")]
    if not made:
        return {}
    first, last = made[0], made[-1]
    actions, samples = last[f"{THOUGHT}actions"], last[f"{THOUGHT}samples"]
    metrics = {
        "length": actions / samples,
        "full": last[f"{THOUGHT}full"] / samples,
        "entropy": last[f"{THOUGHT}entropy"] / actions,
    }
    if f"{THOUGHT}kl" in first:
        metrics["kl"] = first[f"{THOUGHT}kl"] / first[f"{THOUGHT}actions"]
    return {f"{THOUGHT}{name}": value for name, value in metrics.items()}


def update_metrics(updates: Sequence[Metrics], on_policy: bool) -> Metrics:
    """Return means over the actions of the last update, where the policy has moved furthest from the rollout. The
    replay gap and the KL to the reference are those of the first: actions tell the KL of the policy that drew them,
    not of a later one. With one update the ratio is 1 by design, and the log says so. Sums of a user's own loss come
    as `policy/<name>`."""
    made = [update for update in updates if update]
    metrics: Metrics = {"policy/updates": float(len(made)), "policy/ratio_is_one_expected": float(on_policy)}
    if not made:
        return metrics
    first, last = made[0], made[-1]
    actions = last["actions"]
    kl_to_reference = {name: value for name, value in first.items() if name in KL_SUMS}
    metrics |= {
        PER_ACTION.get(name, f"policy/{name}"): value / actions
        for name, value in {**last, **kl_to_reference}.items()
        if name not in OTHER_SUMS
    }
    if "ratio_deviation_squared" in last:
        mean, square = last["ratio"] / actions - 1, last["ratio_deviation_squared"] / actions
        metrics["policy/ratio_std"] = math.sqrt(max(square - mean**2, 0.0))
        metrics["policy/effective_actions"] = (1 + mean) ** 2 / (1 + 2 * mean + square)
    return metrics | {
        "loss": last["loss"],
        "grad_norm": last["grad_norm"],
        "lr": last["lr"],
        "rollout/logprob_diff_mean": first["replay_gap"] / first["actions"],
        "rollout/logprob_diff_max": first["replay_gap_max"],
    }


# ---- reasons to stop; ranks call these with gathered values, so that all of them stop alike ----------------


def refuse_failures(drawn: RewardScores, limit: float) -> None:
    """Raise ImageRLError when too many samples of the step have no reward."""
    lost = float(np.isnan(drawn.totals).mean())
    if lost > limit:
        why = "; ".join(f"{label}: {reason}" for label, reason in drawn.reasons.items()) or "no value"
        raise ImageRLError(
            f"{lost:.0%} of the samples have no reward (rewards.max_failure_rate is {limit:g}): {why}"
        )


def refuse_gap(gap: float, limit: float) -> None:
    """Raise ImageRLError, before the weights change, when sampler and trainer disagree beyond rounding: then one of
    them does not compute the distribution that both claim."""
    if not gap <= limit:  # NaN too
        raise ImageRLError(
            f"sampler and trainer disagree by {gap:.2g} on a log-prob (rollout.max_logprob_diff "
            f"is {limit:g}); use engine.precision=fp32, or raise the limit if bfloat16 explains it"
        )


# ---- time --------------------------------------------------------------------------------------------------


class PhaseTimer:
    """Seconds and shares of the phases of a step: `with timer("rollout"): ...`.

    `synchronise` is called at both ends of a phase; give `torch.cuda.synchronize` on a GPU, where kernels
    return before they have run.
    """

    def __init__(
        self,
        synchronise: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronise = synchronise or (lambda: None)
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._start = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._synchronise()
        start = self._clock()
        try:
            yield
        finally:
            self._synchronise()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def start(self) -> None:
        """Begin a step: forget the phases so far."""
        self._start = self._clock()
        self._seconds = {}

    def metrics(self) -> dict[str, float]:
        """Return `time/<phase>_s`, `share/<phase>` and `time/step_s` since `start`.

        Shares are of that wall time, so what no phase covers shows as `share/other`.
        """
        total, seconds = self._clock() - self._start, self._seconds
        result = {f"time/{phase}_s": value for phase, value in seconds.items()} | {"time/step_s": total}
        # Phases within phases may add up to more than the step; a share below 0 would only puzzle.
        seconds = seconds | {"other": max(0.0, total - sum(seconds.values()))}
        return result | {f"share/{phase}": value / max(total, 1e-9) for phase, value in seconds.items()}
