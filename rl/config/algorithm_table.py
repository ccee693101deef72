"""The table of algorithms. A row names an advantage, a ratio, a clip, a normaliser and a KL, and is the set of
defaults that `algorithm.name` gives a recipe; any key of the recipe overrides its part of the row.

docs/algorithms.md has each row's equation and where we differ from other libraries on purpose. Importable
without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Baseline = Literal["group_mean", "leave_one_out", "batch_mean", "moving_average"]
Scale = Literal["group", "batch", "whiten", "none"]
RatioLevel = Literal["token", "sequence", "product"]
Clip = Literal["ratio", "weight", "soft", "geometric", "none"]
Normaliser = Literal["sequence", "tokens", "constant", "sum"]
KLEstimator = Literal["k1", "k2", "k3"]
KLPlace = Literal["loss", "reward"]

Name = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "bnpo",
    "gspo",
    "cispo",
    "sapo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "gmpo",
    "luspo",
    "gdpo",
    "reinforce",
]


@dataclass(frozen=True, slots=True)
class Row:
    """One algorithm: those fields of `AlgorithmConfig` in which algorithms differ. The defaults are GRPO's,
    with the KL of BLIP3o-NEXT (arXiv 2510.15857)."""

    baseline: Baseline = "group_mean"
    scale_rewards: Scale = "group"
    decouple_rewards: bool = False
    advantage_eps: float = 1e-4
    ratio_level: RatioLevel = "token"
    clip: Clip = "ratio"
    clip_low: float = 0.2
    clip_high: float = 0.2
    normaliser: Normaliser = "sequence"
    kl_coef: float = 0.001
    kl_estimator: KLEstimator = "k3"
    kl_in: KLPlace = "loss"
    max_resamples: int = 0

    def defaults(self) -> dict[str, object]:
        """Map each recipe key within `algorithm` to its value."""
        return asdict(self)


# The settings are those of the papers named in docs/algorithms.md; kl_coef is 0 where the paper has no KL.
ALGORITHMS: dict[Name, Row] = {
    "grpo": Row(),
    "dr_grpo": Row(scale_rewards="none", normaliser="constant", kl_coef=0.0),
    "dapo": Row(clip_high=0.28, normaliser="tokens", kl_coef=0.0, max_resamples=3),
    "bnpo": Row(normaliser="tokens"),
    "gspo": Row(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
    "cispo": Row(clip="weight", clip_low=1.0, clip_high=4.0, normaliser="tokens", kl_coef=0.0),
    "sapo": Row(clip="soft", kl_coef=0.0),
    "rloo": Row(
        baseline="leave_one_out", scale_rewards="none", ratio_level="product", kl_in="reward", kl_coef=0.05
    ),
    "reinforce_plus_plus": Row(
        baseline="batch_mean",
        scale_rewards="whiten",
        advantage_eps=1e-8,
        normaliser="tokens",
        kl_in="reward",
    ),
    "reinforce_plus_plus_baseline": Row(
        scale_rewards="whiten", advantage_eps=1e-8, normaliser="tokens", kl_estimator="k2"
    ),
    "gmpo": Row(ratio_level="sequence", clip="geometric", clip_low=0.4, clip_high=0.4, kl_coef=0.0),
    "luspo": Row(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, normaliser="sum", kl_coef=0.0),
    "gdpo": Row(decouple_rewards=True),
    "reinforce": Row(baseline="batch_mean", scale_rewards="none", clip="none", normaliser="sum"),
}
