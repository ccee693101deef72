"""The schema of a training recipe. Defaults are BLIP3o-NEXT's published settings where it has them
(arXiv 2510.15857). Importable without torch, so that mistakes show before anything loads."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from rl.algorithm_config import AlgorithmConfig
from rl.recipe import Loc, RecipeModel, load_yaml_recipe


class RunConfig(RecipeModel):
    steps: int = Field(ge=1, description="training steps, each one rollout with its updates")
    seed: int = Field(0, ge=0, description="seed of prompts, samples and noise")
    output_dir: str = Field(min_length=1, description="run folder")
    sample_every: int = Field(10, ge=0, description="steps between grids of the fixed prompts; 0: none")
    sample_prompts: int = Field(8, ge=1, description="held-out prompts on a grid")
    images: int | None = Field(
        None, ge=1, description="end before steps, when these many are drawn; lr follows them; null: no limit"
    )
    minutes: float | None = Field(
        None, gt=0, description="end before steps, after this much training; lr follows it; null: no limit"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.images is not None and self.minutes is not None:
            raise ValueError("run.images and run.minutes both end a run; give only one")
        return self


class LoraConfig(RecipeModel):
    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="adapters are scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of the layers to adapt, or all-linear"
    )

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value:
            raise ValueError("model.lora.dropout must be 0: with dropout the trainer scores other "
                             "probabilities than those sampled from")  # fmt: skip
        return value


class ModelConfig(RecipeModel):
    path: str = Field(
        "tiny", min_length=1, description='model folder, hub name, or a shipped one: "tiny" or "tiny_edit"'
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of frozen weights: decoder, reference, a LoRA base; what trains is fp32"
    )
    lora: LoraConfig | None = Field(None, description="train adapters instead of full weights")
    freeze: list[str] = Field(
        default_factory=list, description="patterns of parameters that are not trained, as in *embed_tokens*"
    )


class PromptSetConfig(RecipeModel):
    name: str | None = Field(None, description="a named prompt set: tiny_world or tiny_edits")
    path: str | None = Field(None, description="a prompt file: .jsonl, .csv, .txt or .yaml")
    split: Literal["train", "heldout"] | None = Field(None, description="which part of a named set")
    size: int | None = Field(None, ge=1, description="take only the first this many prompts; null: all")
    seed: int = Field(0, ge=0, description="what a named set draws at random, such as colours")
    column: str = Field("prompt", min_length=1, description="which column of a file holds the prompt")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.path is None):
            raise ValueError("give exactly one of name and path")
        if self.name is not None and self.split is None:
            raise ValueError("a named set needs its split: train or heldout")
        if self.path is not None and self.split is not None:
            raise ValueError("a file has no splits; remove split, and use two files")
        return self


class DataConfig(RecipeModel):
    train: PromptSetConfig = Field(description="prompts to train on")
    heldout: PromptSetConfig = Field(description="prompts to evaluate on, none of them in train")


class RolloutConfig(RecipeModel):
    prompts_per_step: int = Field(16, ge=1, description="prompts drawn each step")
    group_size: int = Field(16, ge=2, description="samples of each prompt; advantages compare within them")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of the scored distribution alike")
    top_k: int | None = Field(None, description="must stay null: log-probs are of the whole distribution")
    top_p: float | None = Field(None, description="must stay null: log-probs are of the whole distribution")
    guidance: float = Field(2.0, ge=0, description="classifier-free guidance of the decoder; 1: none")
    flow_steps: int = Field(30, ge=1, description="denoising steps of the decoder")
    shared_noise: bool = Field(False, description="one decoder noise a group: rewards differ by tokens only")
    decodes: int = Field(
        1,
        ge=1,
        description="pictures drawn of each token sequence, whose rewards are averaged for the tokens",
    )
    sample_chunk: int | None = Field(
        None, ge=1, description="prompts whose tokens are sampled together; null: all of a step"
    )
    decode_chunk: int | None = Field(
        None, ge=1, description="prompts drawn, then handed to the rewards, at a time; null: as sampled"
    )
    max_logprob_diff: float | None = Field(
        None,
        gt=0,
        description="stop when sampler and trainer differ more on a log-prob; null: 0.01, bf16 1",
    )

    @field_validator("top_k", "top_p")
    @classmethod
    def _whole_distribution(cls, value: float | None) -> None:
        if value is not None:
            raise ValueError("top_k and top_p must be null in training: samples would come from a truncated "
                             "distribution but be scored by the whole one")  # fmt: skip


class GateConfig(RecipeModel):
    by: str = Field(
        min_length=1, description="another reward of the list, or one of its parts: ocr/exact_match"
    )
    at_least: float | None = Field(None, description="it passes from this value on")
    at_most: float | None = Field(None, description="it passes up to this value; give one of the two")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a gate needs exactly one of at_least and at_most")
        return self


# The fields of a row of an evaluation: a reward of such a name would overwrite one.
EVALUATION_FIELDS = ("index", "sample", "prompt", "reward", "exact_match", "confidence")


# YAML's keys are texts to the recipe reader.
Step = Annotated[int, Field(strict=False)]


class RewardSpec(RecipeModel):
    """One reward. Unknown keys are arguments of its constructor."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(None, description="a reward that ships with imagerl")
    import_path: str | None = Field(None, description="your own: file.py:function or package.module:function")
    weight: float | dict[Step, float] = Field(
        1.0, description="factor in the total reward; 0: measured only; {step: weight}: linear between steps"
    )
    gate: GateConfig | None = Field(
        None, description="count it only where another reward passes, as 0 elsewhere"
    )

    @property
    def scheduled(self) -> bool:
        return isinstance(self.weight, dict)

    @field_validator("weight")
    @classmethod
    def _schedule(cls, weight: float | dict[int, float]) -> float | dict[int, float]:
        if isinstance(weight, dict) and (not weight or min(weight) < 0):
            raise ValueError("a schedule of weights needs steps from 0 on, for example {0: 1.0, 100: 0.2}")
        return weight

    @property
    def label(self) -> str:
        """What the metrics call it: the name, or that of the function."""
        return self.name or str(self.import_path).rpartition(":")[2]

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        for key in self.kwargs:
            near = difflib.get_close_matches(key, list(RewardSpec.model_fields), 1, 0.75)
            if near:
                raise ValueError(f'unknown key "{key}" of a reward; did you mean "{near[0]}"?')
        if (self.name is None) == (self.import_path is None):
            raise ValueError("a reward needs exactly one of name and import_path")
        if self.import_path is not None and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", self.import_path):
            raise ValueError(f'import_path "{self.import_path}" should look like file.py:function')
        if self.label in EVALUATION_FIELDS:
            raise ValueError(
                f'a reward cannot be called "{self.label}": evaluations have a field of that name; rename the function'
            )
        return self


class RewardsConfig(RecipeModel):
    functions: list[RewardSpec] = Field(
        min_length=1, description="the rewards; their weighted sum is maximised"
    )
    workers: int = Field(1, ge=0, description="Ray actors that score; 0: in this process")
    timeout_s: float = Field(60.0, gt=0, description="a scoring call that takes longer has failed")
    max_failure_rate: float = Field(
        0.5, ge=0, le=1, description="stop when a greater share of samples failed"
    )
    max_restarts: int = Field(3, ge=0, description="times that a dead or hanging actor is replaced")

    @field_validator("functions")
    @classmethod
    def _labels(cls, functions: list[RewardSpec]) -> list[RewardSpec]:
        labels = [spec.label for spec in functions]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f'two rewards are called "{label}"; metrics could not tell them apart')
        weights = [spec.weight for spec in functions]
        if not any(any(w.values()) if isinstance(w, dict) else w for w in weights):
            raise ValueError("the weights are all 0: there is nothing to learn from")
        for spec in functions:
            by = spec.gate.by.partition("/")[0] if spec.gate else None
            if spec.gate and (by not in labels or by == spec.label):
                others = ", ".join(label for label in labels if label != spec.label) or "none"
                raise ValueError(
                    f'the gate of "{spec.label}" asks for "{spec.gate.by}", which is no other reward; '
                    f"there is: {others}"
                )
        return functions


class OptimConfig(RecipeModel):
    lr: float = Field(1e-6, gt=0, description="learning rate after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="AdamW's two decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon; too large swamps small gradients")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="linear, cosine: to min_lr"
    )
    decay_share: float = Field(1.0, gt=0, le=1, description="last share of the updates, in which lr falls")
    min_lr: float = Field(0.0, ge=0, description="what the linear and cosine schedules fall to")
    warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient norm to this; 0: never")

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("optim.betas must lie in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr ({self.min_lr:g}) is more than optim.lr ({self.lr:g})")
        return self


class EngineConfig(RecipeModel):
    name: Literal["torch", "deepspeed"] = Field("torch", description="what runs the training")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(None, description="ZeRO stage, deepspeed only (there 1)")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of matrix products; weights stay fp32")
    micro_batch_size: int = Field(16, ge=1, description="samples of one forward and backward pass")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of torch, less rewards.workers while scoring; null: its own choice",
    )

    @model_validator(mode="before")
    @classmethod
    def _published_stage(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") == "deepspeed" and data.get("zero_stage") is None:
            return {**data, "zero_stage": 1}
        return data

    @model_validator(mode="after")
    def _stage_needs_deepspeed(self) -> Self:
        if self.zero_stage is not None and self.name != "deepspeed":
            raise ValueError(f"engine.zero_stage needs engine.name: deepspeed, not {self.name}")
        return self


class EvalConfig(RecipeModel):
    suite: Literal["ocr", "edit", "clip", "composition"] = Field(
        "ocr", description="name of the evaluation; the reward or gold metric of that name is its `reward`"
    )
    every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    size: int = Field(256, ge=1, description="held-out prompts evaluated, one sample each")
    batch_size: int = Field(64, ge=1, description="samples drawn at a time")
    guidance: float | None = Field(None, ge=0, description="of the decoder; null: as in rollout")
    flow_steps: int | None = Field(None, ge=1, description="of the decoder; null: as in rollout")
    seed: int = Field(0, ge=0, description="seed of the samples, the same at every evaluation")


class CheckpointConfig(RecipeModel):
    every: int = Field(20, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")


class Recipe(RecipeModel):
    """A complete training run."""

    kind: Literal["train"] = Field("train", description="marks the schema")
    run: RunConfig = Field(description="length, seed and place of the run")
    model: ModelConfig = Field(default_factory=ModelConfig, description="what is trained")
    data: DataConfig = Field(description="prompts")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="how samples are drawn")
    rewards: RewardsConfig = Field(description="what is maximised: a list of rewards, or a mapping")
    gold: list[RewardSpec] = Field(
        default_factory=list, description="rewards measured at evaluation, never trained on"
    )
    algorithm: AlgorithmConfig = Field(
        default_factory=AlgorithmConfig, description="how rewards become gradients"
    )
    optim: OptimConfig = Field(default_factory=OptimConfig, description="AdamW and its schedule")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="hardware, precision, parallelism")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="held-out evaluation")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="what a resumed run needs"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_rewards(cls, data: Any) -> Any:
        return cls.prepare(data) if isinstance(data, dict) else data

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`rewards` as a bare list becomes the mapping that it stands for."""
        if isinstance(data.get("rewards"), list):
            return {**data, "rewards": {"functions": data["rewards"]}}
        return data

    @classmethod
    def redirect(cls, loc: Loc, value: Any) -> Loc:
        """`rewards` may be spelt as the bare list: `rewards=[...]` and `rewards.0.weight=1` mean its
        functions and leave `rewards.workers` and the like alone."""
        if loc[0] == "rewards" and (isinstance(loc[1], int) if len(loc) > 1 else isinstance(value, list)):
            return ("rewards", "functions", *loc[1:])
        return loc

    @property
    def logprob_limit(self) -> float:
        """`rollout.max_logprob_diff`, or what rounding explains: bfloat16 keeps 8 bits of every activation. No
        limit where differences are expected and corrected."""
        if self.rollout.max_logprob_diff is None and self.algorithm.importance_cap is not None:
            return math.inf
        return self.rollout.max_logprob_diff or (1.0 if self.engine.precision == "bf16" else 0.01)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        trained = {spec.label for spec in self.rewards.functions}
        for index, spec in enumerate(self.gold):
            if spec.label in trained:
                raise ValueError(
                    f'gold.{index} ("{spec.label}") is among the rewards; a gold metric must not be'
                )
            if spec.gate or spec.scheduled:
                raise ValueError(
                    f'gold.{index} ("{spec.label}") enters no total; remove its gate and schedule'
                )
        gold = [spec.label for spec in self.gold]
        if len(set(gold)) < len(gold):
            raise ValueError("two gold metrics have the same name")
        for key, size, needed in (
            (
                "data.train.size",
                self.data.train.size,
                ("rollout.prompts_per_step", self.rollout.prompts_per_step),
            ),
            ("data.heldout.size", self.data.heldout.size, ("eval.size", self.eval.size)),
            ("data.heldout.size", self.data.heldout.size, ("run.sample_prompts", self.run.sample_prompts)),
        ):
            if size is not None and size < needed[1]:
                raise ValueError(f"{needed[0]} ({needed[1]}) is more than {key} ({size})")
        if self.algorithm.reference_every and self.model.lora:
            raise ValueError(
                "algorithm.reference_every needs full weights: with model.lora the reference is the base model"
            )
        if self.algorithm.flow is not None:
            self.algorithm.flow.check(self)
        if self.model.dtype == "bf16" and self.engine.precision != "bf16":
            raise ValueError(
                "model.dtype: bf16 needs engine.precision: bf16, or the KL reference would compute in another "
                "precision than the policy"
            )
        drawn = self.rollout.prompts_per_step * self.rollout.group_size * self.rollout.decodes
        if self.run.images is not None and self.run.images < drawn:
            raise ValueError(f"run.images ({self.run.images}) is less than the {drawn} that one step draws")
        updates = self.run.steps * self.algorithm.updates_per_rollout
        if self.optim.warmup_steps >= updates:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below the run's {updates} updates"
            )
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A training recipe with `dotted.key=value` overrides. Raises ImageRLError with one line on a mistake."""
    return load_yaml_recipe(Recipe, path, overrides)
