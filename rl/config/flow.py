"""The `algorithm.flow` section of a training recipe. Importable without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, get_args

from pydantic import Field, model_validator

from imagerl.rl.config.flow_table import (
    FLOW_ALGORITHMS,
    MATCHING,
    FlowLoss,
    FlowName,
    KLForm,
    Place,
    Sampler,
    Weight,
)
from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.files.bounds import Coefficient, FlowSteps, Guidance, LearningRate, Positive, Steps

if TYPE_CHECKING:
    from imagerl.rl.config.train import Recipe

ROW = FLOW_ALGORITHMS["flow_grpo"]


def is_matching(flow: object) -> bool:
    """Tell whether an `algorithm.flow` as written in YAML, right or wrong, asks for a loss on finished samples: by its
    loss, or by the name of the row that has no other."""
    return isinstance(flow, dict) and flow.get("loss", flow.get("name")) in MATCHING


class FlowLoraConfig(RecipeModel):
    r: int = Field(32, ge=1, le=4096, description="rank of the decoder's adapters")
    alpha: Positive = Field(64.0, description="adapters are scaled by alpha / r")
    target_modules: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="names of the decoder's layers to adapt",
    )


class OldPolicyConfig(RecipeModel):
    """The decay of nft's old policy: it grows with the updates, from 0, at which the old policy is the present one. The
    defaults are those of DiffusionNFT's code; its slower schedule is {after: 75, rate: 0.0075, most: 0.999}."""

    after: int = Field(0, ge=0, le=10**6, description="updates without decay")
    rate: float = Field(0.001, gt=0, le=1, description="growth of the decay per update from then on")
    most: float = Field(0.5, gt=0, lt=1, description="the decay grows up to this")


class FlowConfig(RecipeModel):
    """The settings of the decoder's algorithm. `name` supplies the defaults that differ between algorithms; the
    defaults shown here are Flow-GRPO's."""

    name: FlowName = Field("flow_grpo", description="sets the defaults of this section: docs/flow.md")
    joint: bool = Field(False, description="train the tokens too, in the same steps; else they are frozen")
    lora: FlowLoraConfig | None = Field(
        None, description="train adapters of the transformer; null: it and the connector in full"
    )
    lr: LearningRate | None = Field(None, description="the decoder's learning rate; null: optim.lr")

    sampler: Sampler = Field(
        ROW.sampler, description="how stochastic steps draw; ode (for nft and awm): none is"
    )
    noise_level: float = Field(
        ROW.noise_level, ge=0, le=10, description="size of their noise, eta of the papers"
    )
    window: Place = Field(
        ROW.window, description="which steps are stochastic and train: all but the last, or a window of them"
    )
    window_size: FlowSteps = Field(ROW.window_size, description="steps in a random or sliding window")
    window_stop: FlowSteps | None = Field(
        None, description="stochastic steps lie before this one; null: the last"
    )
    window_every: Steps = Field(25, description="training steps between moves of a sliding window by one")
    guidance: Guidance | None = Field(
        None,
        description="guidance of training rollouts and replay; null: rollout.guidance, for nft and awm 1 by default",
    )
    allow_guidance: bool = Field(
        False,
        description="nft, awm: train at a guidance other than 1 all the same, with its spurious gradient",
    )
    steps: FlowSteps | None = Field(
        None, description="denoising steps of training rollouts; null: rollout.flow_steps"
    )

    loss: FlowLoss = Field(ROW.loss, description="what is minimised; the table's names in docs/flow.md")
    clip_low: float = Field(
        ROW.clip_low, ge=1e-9, le=1, description="ratios below 1 - clip_low get no gradient"
    )
    clip_high: Positive = Field(ROW.clip_high, description="ratios above 1 + clip_high get no gradient")
    kl_threshold: Positive = Field(
        1e-5, description="flow_dppo: KL from the old policy at which a step stops, nats per dimension"
    )
    advantage_max: Positive = Field(ROW.advantage_max, description="advantages are clamped to ± this")
    beta: Positive = Field(1.0, description="nft: how far the implicit policies lie from the old one")
    old_policy: OldPolicyConfig | None = Field(
        None,
        description="nft: draw by a moving average of the policy, which is then the old one; null: by the policy",
    )
    weight: Weight = Field("uniform", description="awm: weight of a noise level")
    points: FlowSteps = Field(4, description="nft, awm: noise levels that a sample is matched at per update")

    kl_coef: Coefficient = Field(
        ROW.kl_coef,
        description="weight of the KL to the frozen decoder, per step and dimension; 0: none",
    )
    kl_form: KLForm = Field(
        "exact",
        description="exact, or times the step's length as flow_grpo has it; nft, awm: squared velocities",
    )
    max_logprob_diff: Positive | None = Field(
        None,
        description="stop when replay differs more from the rollout on a log-prob; null: 1e-5, bf16 0.1",
    )

    @property
    def is_matching(self) -> bool:
        """Tell whether finished samples are matched, instead of denoising steps scored."""
        return self.loss in MATCHING

    @model_validator(mode="before")
    @classmethod
    def _row(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("name", "flow_grpo") in get_args(FlowName):
            return {**FLOW_ALGORITHMS[data.get("name", "flow_grpo")].defaults(), **data}
        return data

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.is_matching != (self.sampler == "ode"):
            wanted = "ode" if self.is_matching else "sde, dance or cps"
            raise ValueError(
                f"algorithm.flow.loss {self.loss} needs another sampler than {self.sampler}; set "
                f"algorithm.flow.sampler to {wanted}"
            )
        if not self.is_matching and self.noise_level == 0:
            raise ValueError(
                "algorithm.flow.noise_level is 0: without noise no step has a log-prob; raise it, or train by "
                "name: nft or awm"
            )
        if self.sampler == "cps" and self.noise_level >= 1:
            raise ValueError(
                "algorithm.flow.noise_level must be below 1 with sampler cps: at 1 all noise is new"
            )
        return self

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError where the rest of a training recipe leaves this section impossible."""
        self._check_steps(self.steps or recipe.rollout.flow_steps)
        guidance = recipe.rollout.guidance if self.guidance is None else self.guidance
        if self.is_matching and guidance != 1 and not self.allow_guidance:
            key = "rollout" if self.guidance is None else "algorithm.flow"
            raise ValueError(
                f"{key}.guidance is {guidance:g}, but {self.loss} matches the velocity of unguided samples and gets a "
                "spurious gradient from others; set it to 1, or algorithm.flow.allow_guidance: true as well"
            )
        if self.old_policy and self.loss != "nft":
            raise ValueError(
                f"algorithm.flow.old_policy is of nft, and the loss is {self.loss}; remove it, or set "
                "algorithm.flow.name: nft"
            )
        if self.old_policy and recipe.engine.name == "deepspeed":
            raise ValueError(
                "algorithm.flow.old_policy needs whole weights on every process; set engine.name: torch"
            )
        if recipe.engine.zero_stage == 3:
            raise ValueError(
                "algorithm.flow samples from the weights it trains; set engine.zero_stage to 2 or less"
            )
        if self.joint:
            return
        if recipe.model.lora:
            raise ValueError(
                "model.lora is of the language model, which does not train; set algorithm.flow.lora, or "
                "algorithm.flow.joint: true"
            )
        if recipe.algorithm.kl_in == "reward" or recipe.algorithm.reference_every:
            raise ValueError(
                "algorithm.kl_in: reward and algorithm.reference_every are of the tokens, which do not train; "
                "remove them, or set algorithm.flow.joint: true"
            )

    def _check_steps(self, steps: int) -> None:
        """Keep the last denoising step deterministic: noise put in there would stay in the picture."""
        if self.is_matching:
            return
        room = min(steps - 1, self.window_stop or steps)
        size = 1 if self.window == "all" else self.window_size
        if size > room:
            raise ValueError(
                f"algorithm.flow needs {size} stochastic steps but only {room} of {steps} can be; raise "
                "algorithm.flow.steps or window_stop, or lower window_size"
            )
