"""The `algorithm` section of a training recipe. Importable without torch."""

from __future__ import annotations

import re
from typing import Self, get_args

from pydantic import Field, field_validator, model_validator

from imagerl.rl.config.algorithm_table import (
    ALGORITHMS,
    Baseline,
    Clip,
    KLEstimator,
    KLPlace,
    Name,
    Normaliser,
    RatioLevel,
    Scale,
)
from imagerl.rl.config.flow import FlowConfig
from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.files.bounds import Coefficient, Every, FlowSteps, Positive

GRPO = ALGORITHMS["grpo"]
WITHIN_GROUP = ("group_mean", "leave_one_out")


class AlgorithmConfig(RecipeModel):
    """The settings of the algorithm. `name` supplies the defaults that differ between algorithms; the defaults shown
    here are GRPO's."""

    name: Name = Field("grpo", description="sets the defaults of this section: docs/algorithms.md")
    import_path: str | None = Field(None, description="your own loss in place of it: file.py:function")
    advantage_import_path: str | None = Field(None, description="your own advantages: file.py:function")
    arguments: dict[str, object] = Field(
        default_factory=dict, description="keyword arguments of your own loss"
    )

    baseline: Baseline = Field(GRPO.baseline, description="what a reward is compared with")
    baseline_decay: float = Field(0.9, ge=0, lt=1, description="of the moving average, per step")
    scale_rewards: Scale = Field(
        GRPO.scale_rewards,
        description="divide by the std of the group, of the batch, or not; whiten: over all actions",
    )
    decouple_rewards: bool = Field(
        GRPO.decouple_rewards, description="advantages of each reward alone, then summed (2601.05242)"
    )
    advantage_eps: Positive = Field(GRPO.advantage_eps, description="added to that standard deviation")
    max_resamples: int = Field(
        GRPO.max_resamples,
        ge=0,
        le=1000,
        description="times that other prompts replace groups of equal rewards",
    )

    ratio_level: RatioLevel = Field(
        GRPO.ratio_level, description="ratio of an action, mean of its sample's (in log), or their product"
    )
    clip: Clip = Field(
        GRPO.clip,
        description="bound ratios as PPO, CISPO (weight), SAPO (soft), GMPO (geometric), or not",
    )
    clip_low: float = Field(
        GRPO.clip_low, ge=1e-9, le=1, description="lower bound 1 - clip_low; in log if geometric"
    )
    clip_high: Positive = Field(GRPO.clip_high, description="upper bound 1 + clip_high; in log if geometric")
    soft_positive: Positive = Field(1.0, description="temperature of the soft clip where advantages are > 0")
    soft_negative: Positive = Field(1.05, description="temperature of the soft clip elsewhere")
    normaliser: Normaliser = Field(
        GRPO.normaliser,
        description="mean per sample first, over all tokens, over a constant (2503.20783), or sum per sample",
    )
    entropy_coef: Coefficient = Field(0.0, description="weight of an entropy bonus")
    top_entropy: float = Field(
        1.0,
        gt=0,
        le=1,
        description="train only this share of the tokens, those of highest entropy (2506.01939)",
    )
    importance_cap: Positive | None = Field(
        None, description="weigh by trainer / sampler probability up to this; lifts max_logprob_diff"
    )

    kl_coef: Coefficient = Field(GRPO.kl_coef, description="weight of the KL to the reference; 0: none")
    kl_estimator: KLEstimator = Field(GRPO.kl_estimator, description="which estimate of the KL is minimised")
    kl_in: KLPlace = Field(GRPO.kl_in, description="KL as a loss term or subtracted from rewards")
    kl_target: Positive | None = Field(
        None, description="adapt kl_coef towards this KL, nats per action; null: fixed"
    )
    kl_rate: float = Field(
        0.1, gt=0, lt=5, description="of that adaptation: 0.1 changes kl_coef by at most 2 % a step"
    )
    measure_kl: bool = Field(False, description="log the KL even with kl_coef 0; costs a forward pass")
    reference_every: Every = Field(
        0, description="steps after which the policy becomes the reference again; 0: never"
    )

    flow: FlowConfig | None = Field(None, description="train the decoder's denoising steps: docs/flow.md")

    updates_per_rollout: FlowSteps = Field(1, description="passes over a rollout; above 1 the clip matters")
    region_credit: Coefficient = Field(
        0.0,
        description="weight, beside the advantage of the whole picture, of what rewards say of regions of it, such as "
        "ocr of each letter: it goes to the tokens that lie there; of no effect where rewards tell no regions; 0: none",
    )
    shuffle_rewards: bool = Field(
        False, description="control: permute rewards over the batch; nothing is learned"
    )

    @property
    def needs_reference(self) -> bool:
        """Tell whether the log-probs of the reference are computed."""
        return self.kl_coef > 0 or self.measure_kl

    @model_validator(mode="before")
    @classmethod
    def _row(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("name", "grpo") in get_args(Name):
            return {**ALGORITHMS[data.get("name", "grpo")].defaults(), **data}
        return data

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if isinstance(value, str) and value.lower() == "ppo":
            raise ValueError(
                'algorithm.name cannot be "ppo": there is no critic here. PPO\'s clipped objective, on advantages '
                "within groups, is grpo with clip: ratio and updates_per_rollout above 1"
            )
        return value

    @field_validator("import_path", "advantage_import_path")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", value):
            raise ValueError(f'"{value}" should look like file.py:function')
        return value

    @model_validator(mode="after")
    def _kl(self) -> Self:
        for key, given in (("kl_in", self.kl_in == "reward"), ("kl_target", self.kl_target is not None)):
            if given and self.kl_coef == 0:
                raise ValueError(
                    f"algorithm.{key} is {getattr(self, key)} but algorithm.kl_coef is 0; raise it or "
                    + ("set kl_in: loss" if key == "kl_in" else "remove kl_target")
                )
        if self.reference_every and not self.needs_reference:
            raise ValueError(
                "algorithm.reference_every renews a reference that nothing uses; set algorithm.kl_coef or "
                "algorithm.measure_kl"
            )
        if self.reference_every == 1 and (self.kl_target is not None or self.updates_per_rollout == 1):
            raise ValueError(
                "algorithm.reference_every is 1: a step then begins at its own reference, so that the KL of its first "
                "update is 0 and kl_target would run kl_coef to nothing; set it to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _advantage(self) -> Self:
        if self.baseline not in WITHIN_GROUP:
            if self.scale_rewards == "group":
                raise ValueError(
                    f"algorithm.baseline {self.baseline} looks beyond the group; set scale_rewards to batch, "
                    "whiten or none"
                )
            for key in ("max_resamples", "decouple_rewards"):
                if getattr(self, key):
                    raise ValueError(
                        f"algorithm.{key} needs a baseline within the group: {' or '.join(WITHIN_GROUP)}"
                    )
        if self.region_credit and self.scale_rewards != "none":
            raise ValueError(
                f"algorithm.region_credit is in units of the reward, and scale_rewards {self.scale_rewards} changes "
                "those of the advantages; set scale_rewards: none"
            )
        if self.decouple_rewards and (self.kl_in == "reward" or self.scale_rewards == "whiten"):
            raise ValueError(
                "algorithm.decouple_rewards needs kl_in: loss, and scale_rewards other than whiten"
            )
        return self

    @model_validator(mode="after")
    def _ratio(self) -> Self:
        if self.clip == "geometric" and self.ratio_level != "sequence":
            raise ValueError("algorithm.clip geometric is a mean over the sample; set ratio_level: sequence")
        if self.ratio_level == "product" and self.normaliser != "sequence":
            raise ValueError(
                "algorithm.ratio_level product counts a sample once; set algorithm.normaliser: sequence"
            )
        return self
