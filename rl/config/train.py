"""The schema of a training recipe. Defaults are BLIP3o-NEXT's published settings where it has them
(arXiv 2510.15857). Importable without torch, so that mistakes show before anything loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from imagerl.rl.config.algorithm import AlgorithmConfig
from imagerl.rl.config.engine import CheckpointConfig, EngineConfig, LoraConfig, OptimConfig
from imagerl.rl.config.flow import is_matching
from imagerl.rl.config.monitors import MonitorsConfig
from imagerl.rl.config.recipe import Loc, RecipeModel, load_yaml_recipe
from imagerl.rl.config.rewards import RewardsConfig, RewardSpec
from imagerl.rl.config.rollout import RolloutConfig
from imagerl.rl.files.bounds import (
    Count,
    Every,
    FlowSteps,
    Guidance,
    OutputDir,
    Seed,
    Steps,
)

MAX_DRAWN = 2**20  # pictures a step
FILES = (".jsonl", ".json", ".csv", ".txt", ".yaml", ".yml", ".parquet")  # of prompts, without splits


class ReportConfig(RecipeModel):
    """The part of `run` that says who is told how it goes."""

    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]] = Field(
        ["tensorboard"],
        description="trackers; all but tensorboard are installed apart",
    )
    project: str = Field("imagerl", min_length=1, description="what trackers call the project")

    @field_validator("report_to")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("it names a tracker twice; name each once")
        return names


class RunConfig(ReportConfig):
    steps: Steps = Field(description="training steps, each one rollout with its updates")
    seed: Seed = Field(0, description="seed of prompts, samples and noise")
    output_dir: OutputDir = Field(description="run folder")
    sample_every: Every = Field(10, description="steps between grids of the fixed prompts; 0: none")
    sample_prompts: Count = Field(8, description="held-out prompts on a grid")
    report_every: Every = Field(
        10, description="steps between two writings of report.html; 0: first and last"
    )
    images: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="end before steps, when these many are drawn; lr follows them; null: no limit",
    )
    minutes: float | None = Field(
        None,
        ge=1e-3,
        le=525_600,
        description="end before steps, after this much training; lr follows it; null: no limit",
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.images is not None and self.minutes is not None:
            raise ValueError("run.images and run.minutes both end a run; give only one")
        return self


class ModelConfig(RecipeModel):
    path: str = Field(
        "tiny",
        min_length=1,
        description='model folder, hub name, or a shipped one: "tiny", "tiny_edit" or "tiny_shapes"',
    )
    family: str | None = Field(
        None,
        min_length=1,
        description="what kind of model: null: as its folder says; your own: file.py:Class",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of frozen weights: decoder, reference, a LoRA base; what trains is fp32"
    )
    lora: LoraConfig | None = Field(None, description="train adapters instead of full weights")
    freeze: list[str] = Field(
        default_factory=list, description="patterns of parameters that are not trained, as in *embed_tokens*"
    )


class PromptSetConfig(RecipeModel):
    name: str | None = Field(
        None,
        description="a named set: tiny_world, tiny_shapes, tiny_edits, tiny_text_edits, ocr_signs or edits",
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="a prompt file (.jsonl, .json, .csv, .txt, .yaml, .parquet), a saved data set, or hf:owner/name",
    )
    split: str | None = Field(
        None, min_length=1, description="which part: train or heldout of a named set, its own name in others"
    )
    subset: str | None = Field(None, min_length=1, description="configuration of a data set of the hub")
    size: Steps | None = Field(None, description="take only the first this many prompts; null: all")
    seed: Seed = Field(0, description="what a named set draws at random, such as colours")
    column: str = Field("prompt", min_length=1, description="which column of a file holds the prompt")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="new names of a file's columns, ours: theirs, as in {target: answer}",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.path is None):
            raise ValueError("give exactly one of name and path")
        if self.name is not None and self.split not in ("train", "heldout"):
            raise ValueError("a named set needs its split: train or heldout")
        if self.path is not None and self.split is not None and PurePath(self.path).suffix in FILES:
            raise ValueError("a file has no splits; remove split, and use two files")
        if self.subset is not None and not (self.path or "").startswith("hf:"):
            raise ValueError("only data sets of the hub have a subset; remove it")
        if self.columns and self.name is not None:
            raise ValueError("columns renames those of a file; a named set has its own")
        return self


class CurriculumConfig(RecipeModel):
    """Which prompts come more often, by their success rate in the run so far."""

    success: str = Field(
        "total",
        min_length=1,
        description="what tells success: total, a reward, or a part such as ocr/exact_match",
    )
    threshold: float = Field(0.5, ge=-1e6, le=1e6, description="a sample succeeds when that is at least this")
    memory: float = Field(
        0.5, ge=0, le=1, description="share of a prompt's earlier samples that counts when it is drawn again"
    )
    floor: float = Field(
        0.1,
        gt=0,
        le=1,
        description="weight of a prompt always or never solved; one solved half the time has 1",
    )


class DataConfig(RecipeModel):
    train: PromptSetConfig = Field(description="prompts to train on")
    heldout: PromptSetConfig = Field(description="prompts to evaluate on, none of them in train")
    curriculum: CurriculumConfig | None = Field(
        None, description="draw prompts neither solved nor hopeless more often; null: all alike, in epochs"
    )

    @property
    def success(self) -> str:
        """What of the scores says that a prompt is solved."""
        return self.curriculum.success if self.curriculum else "total"


class EvalConfig(RecipeModel):
    suite: Literal["ocr", "edit", "clip", "composition"] = Field(
        "ocr",
        description="name of the evaluation; a reward of that name gives its parts without it: `exact_match`",
    )
    every: Every = Field(0, description="steps between evaluations; 0: only before and after")
    size: Steps = Field(256, description="held-out prompts evaluated, one sample each")
    batch_size: Count = Field(64, description="samples drawn at a time")
    guidance: Guidance | None = Field(None, description="of the decoder; null: as in training")
    flow_steps: FlowSteps | None = Field(None, description="of the decoder; null: as in rollout")
    seed: Seed = Field(0, description="seed of the samples, the same at every evaluation")
    temperatures: list[Annotated[float, Field(ge=1e-3, le=100)]] = Field(
        [],
        max_length=16,
        description="others to evaluate at, before and after: both models are also compared at the best of each, "
        "chosen on other prompts",
    )
    kl: bool = Field(
        False,
        description="measure the KL of the judged weights to the first ones on held-out samples, as the metric `kl`",
    )


class Recipe(RecipeModel):
    """A complete training run."""

    kind: Literal["train"] = Field("train", description="marks the schema")
    run: RunConfig = Field(description="length, seed and place of the run")
    model: ModelConfig = Field(default_factory=ModelConfig, description="what is trained")
    data: DataConfig = Field(description="the prompt sets, `train` and `heldout`")
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
    monitors: MonitorsConfig = Field(
        default_factory=MonitorsConfig, description="what the run watches itself for, reward hacking first"
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="what a resumed run needs"
    )

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, data: object) -> object:
        """Write out short spellings, and the one default that depends on another section."""
        if not isinstance(data, dict):
            return data
        algorithm, rollout = data.get("algorithm"), data.get("rollout", {})
        flow = algorithm.get("flow") if isinstance(algorithm, dict) else None
        if is_matching(flow) and isinstance(rollout, dict):
            data = {**data, "rollout": {"guidance": 1.0, **rollout}}
        return cls.prepare(data)

    @classmethod
    def prepare(cls, data: dict[str, object]) -> dict[str, object]:
        """Turn `rewards` as a bare list into the mapping that it stands for."""
        if isinstance(data.get("rewards"), list):
            return {**data, "rewards": {"functions": data["rewards"]}}
        return data

    @classmethod
    def redirect(cls, loc: Loc, value: object) -> Loc:
        """Accept `rewards` spelt as the bare list: `rewards=[...]` and `rewards.0.weight=1` mean its
        functions and leave `rewards.workers` and the like alone."""
        if loc[0] == "rewards" and (isinstance(loc[1], int) if len(loc) > 1 else isinstance(value, list)):
            return ("rewards", "functions", *loc[1:])
        return loc

    @property
    def logprob_limit(self) -> float:
        """Return `rollout.max_logprob_diff`, or what rounding explains: bfloat16 keeps 8 bits of every activation. No
        limit where differences are expected and corrected."""
        if self.rollout.max_logprob_diff is None and self.algorithm.importance_cap is not None:
            return math.inf
        return self.rollout.max_logprob_diff or (1.0 if self.engine.precision == "bf16" else 0.01)

    @property
    def doubts(self) -> list[str]:
        """List settings that are possible but hardly meant, one line each."""
        flow = self.algorithm.flow
        if flow is None or flow.loss != "nft" or self.algorithm.scale_rewards != "none":
            return []
        return [
            "algorithm.scale_rewards is none: nft weighs advantages against algorithm.flow.advantage_max, so rewards "
            "that differ by 0.1 within a group give it a tenth of the signal of scaled ones; use group or batch"
        ]

    @model_validator(mode="after")
    def _possible(self) -> Self:
        trained = {spec.label for spec in self.rewards.functions}
        for index, spec in enumerate(self.gold):
            if spec.label in trained:
                raise ValueError(
                    f'gold.{index} ("{spec.label}") is among the rewards; a gold metric must not be'
                )
            if spec.gate or spec.scheduled or spec.half != "both":
                raise ValueError(
                    f'gold.{index} ("{spec.label}") enters no total; remove its gate, schedule and half'
                )
        success = self.data.success
        if success != "total" and not any(f"{success}/".startswith(f"{label}/") for label in trained):
            raise ValueError(
                f'data.curriculum.success is "{success}", and no reward is named so; it may be total, '
                f"{', '.join(sorted(trained))} or a part of one, such as ocr/exact_match"
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
        flow = self.algorithm.flow
        self.rewards.require_halves(joint=flow is not None and flow.joint)
        if flow is not None:
            flow.check(self)
        if self.eval.kl and flow is not None and not flow.joint:
            raise ValueError("eval.kl is of the tokens, which do not train here; set it to false")
        if self.eval.kl and self.engine.zero_stage == 3:
            raise ValueError(
                "eval.kl scores on one process at a time, which ZeRO-3 cannot; set another zero_stage"
            )
        if self.algorithm.region_credit and (
            self.rollout.decodes > 1 or (flow is not None and not flow.joint)
        ):
            raise ValueError(
                "algorithm.region_credit goes to the tokens of one picture; train the tokens, with rollout.decodes: 1"
            )
        self.optim.check(self.engine)
        if self.rollout.thought_tokens and self.engine.zero_stage == 3:
            raise ValueError(
                "rollout.thought_tokens reads the head of the language model whole; set engine.zero_stage to 2 or less"
            )
        if self.model.dtype == "bf16" and self.engine.precision != "bf16":
            raise ValueError(
                "model.dtype: bf16 needs engine.precision: bf16, or the KL reference would compute in another "
                "precision than the policy"
            )
        drawn = self.rollout.prompts_per_step * self.rollout.group_size * self.rollout.decodes
        if drawn > MAX_DRAWN:
            raise ValueError(
                f"rollout.prompts_per_step x group_size x decodes is {drawn} pictures a step, more than {MAX_DRAWN}"
            )
        self.rollout.check(self)
        if self.run.images is not None and self.run.images < drawn:
            raise ValueError(f"run.images ({self.run.images}) is less than the {drawn} that one step draws")
        updates = self.run.steps * self.algorithm.updates_per_rollout
        if self.optim.warmup_steps >= updates:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below the run's {updates} updates"
            )
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a training recipe with `dotted.key=value` overrides. Raises ImageRLError with one line on a mistake."""
    return load_yaml_recipe(Recipe, path, overrides)
