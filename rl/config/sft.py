"""The schema of a supervised fine-tuning recipe. Defaults are those of BLIP3o-NEXT's public training script (branch
BLIP3o-NEXT, scripts/sft.sh; arXiv 2510.15857) where it has them. Importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from imagerl.rl.config.engine import CheckpointConfig, EngineConfig, LoraConfig, OptimConfig
from imagerl.rl.config.recipe import RecipeModel, load_yaml_recipe
from imagerl.rl.config.train import Recipe, ReportConfig
from imagerl.rl.files.bounds import (
    Coefficient,
    Count,
    Every,
    LearningRate,
    OutputDir,
    Positive,
    Seed,
    Steps,
    Workers,
)


class SFTRunConfig(ReportConfig):
    steps: Steps = Field(description="optimizer steps")
    seed: Seed = Field(0, description="seed of the data's order, noise and samples")
    output_dir: OutputDir = Field(description="run folder; the result is its model/")
    sample_every: Every = Field(0, description="steps between grids; 0: only before and after")
    sample_prompts: Count = Field(8, description="held-out captions on a grid")
    model_dtype: Literal["fp32", "bf16"] = Field("fp32", description="how model/ stores weights")


class SFTModelConfig(RecipeModel):
    path: str = Field(
        "tiny", min_length=1, description='model folder, hub name, or "tiny": the shipped checkpoint'
    )
    family: str | None = Field(
        None,
        min_length=1,
        description="what kind of model: null: as its folder says; your own: file.py:Class",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of weights that do not train; others are fp32"
    )


class TrainedConfig(RecipeModel):
    ar: Literal["full", "lora", "frozen"] = Field("full", description="the language model")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="adapters, for ar: lora")
    connector: Literal["full", "frozen"] = Field("full", description="hidden states to caption features")
    decoder: Literal["full", "caption", "frozen"] = Field(
        "caption", description="the flow transformer; caption: only its caption projection and norm"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, slower")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.ar == self.connector == self.decoder == "frozen":
            raise ValueError("train: everything is frozen; train at least one of ar, connector, decoder")
        return self


class SourceConfig(RecipeModel):
    path: str = Field(min_length=1, description="folder of pictures or of tar shards, a .tar, or a pattern")
    weight: Positive = Field(1.0, description="share of the samples, relative to the other sources")
    caption_field: str = Field("caption", min_length=1, description="field of the caption in JSON")


class ImageDataConfig(RecipeModel):
    train: list[SourceConfig] = Field(min_length=1, description="sources to train on")
    heldout: list[SourceConfig] = Field(
        default_factory=list, description="sources of the held-out loss; none: it is not measured"
    )
    batch_size: int = Field(
        512, ge=1, le=2**20, description="samples of an optimizer step, all processes together"
    )
    open_shards: int = Field(4, ge=1, le=1024, description="tar shards that are shuffled into each other")
    workers: Workers = Field(2, description="threads that read ahead, in each process; 0: none")
    max_bad_share: float = Field(0.1, ge=0, lt=1, description="stop when more of the samples are bad")
    max_pixels: int = Field(1 << 26, ge=1, le=2**30, description="a larger picture is bad: too_large")
    min_side: Count = Field(16, description="a picture with a shorter side is bad: too_small")
    max_aspect: float = Field(8.0, ge=1, le=1000, description="a longer or taller picture is bad: elongated")
    max_caption_chars: int = Field(4096, ge=1, le=10**6, description="a longer caption is bad: long_caption")

    @field_validator("train", "heldout", mode="before")
    @classmethod
    def _bare_paths(cls, sources: object) -> object:
        if isinstance(sources, str):
            sources = [sources]
        if isinstance(sources, list):
            return [{"path": one} if isinstance(one, str) else one for one in sources]
        return sources

    @model_validator(mode="after")
    def _apart(self) -> Self:
        trained = {source.path for source in self.train}
        for source in self.heldout:
            if source.path in trained:
                raise ValueError(
                    f"data.heldout ({source.path}) is also in data.train; hold out other pictures"
                )
        return self


class ObjectiveConfig(RecipeModel):
    cross_entropy_weight: Coefficient = Field(1.0, description="weight of predicting the tokens")
    flow_weight: Coefficient = Field(1.0, description="weight of the flow-matching loss")
    condition_dropout: float = Field(0.1, ge=0, lt=1, description="chance of the unconditional branch")
    on_prompt: bool = Field(True, description="cross-entropy on the prompt too, as published")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.cross_entropy_weight == self.flow_weight == 0:
            raise ValueError("objective: both weights are 0, there is nothing to learn from")
        return self


class SFTOptimConfig(OptimConfig):
    lr: LearningRate = Field(5e-5, description="learning rate after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="linear, cosine: to min_lr"
    )
    min_lr: float = Field(1e-5, ge=0, le=10, description="what the linear and cosine schedules fall to")
    ar_lr: LearningRate | None = Field(None, description="peak rate of the language model; null: lr")
    connector_lr: LearningRate | None = Field(None, description="peak rate of the connector; null: lr")
    decoder_lr: LearningRate | None = Field(None, description="peak rate of the decoder; null: lr")

    def factor(self, part: str) -> float:
        """Return the share of ar, connector or decoder of the scheduled learning rate."""
        own: float | None = getattr(self, f"{part}_lr")
        return 1.0 if own is None else own / self.lr


class SFTEvalConfig(RecipeModel):
    every: Every = Field(0, description="steps between held-out losses; 0: only before and after")
    size: Steps = Field(256, description="held-out samples, the first good ones")
    seed: Seed = Field(0, description="seed of their noise and of the grids, always the same")


class SFTRecipe(RecipeModel):
    """A complete supervised fine-tuning run."""

    kind: Literal["sft"] = Field(description="marks the schema")
    run: SFTRunConfig = Field(description="length, seed and place of the run")
    model: SFTModelConfig = Field(default_factory=SFTModelConfig, description="what it starts from")
    data: ImageDataConfig = Field(description="pictures with captions")
    train: TrainedConfig = Field(default_factory=TrainedConfig, description="which parts learn")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="what is minimised")
    optim: SFTOptimConfig = Field(default_factory=SFTOptimConfig, description="AdamW and its schedule")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="hardware, precision, parallelism")
    eval: SFTEvalConfig = Field(default_factory=SFTEvalConfig, description="held-out loss")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="what a resumed run needs"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.optim.warmup_steps >= self.run.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below run.steps ({self.run.steps})"
            )
        self.optim.check(self.engine)
        if self.model.dtype == "bf16" and self.engine.precision != "bf16":
            raise ValueError("model.dtype: bf16 needs engine.precision: bf16")
        parts = (("ar", self.train.ar), ("connector", self.train.connector), ("decoder", self.train.decoder))
        for part, how in parts:
            if how == "frozen" and getattr(self.optim, f"{part}_lr") is not None:
                raise ValueError(f"optim.{part}_lr is set but train.{part} is frozen; remove one of them")
        for part, how in parts[1:]:
            if how != "frozen" and self.objective.flow_weight == 0:
                raise ValueError(
                    f"objective.flow_weight is 0 but train.{part} is {how}; freeze it or raise the weight"
                )
        return self


AnyRecipe = Recipe | SFTRecipe


def load_sft_recipe(path: str | Path, overrides: Sequence[str] = ()) -> SFTRecipe:
    """Load a fine-tuning recipe with `dotted.key=value` overrides. Raises ImageRLError with one line on a mistake."""
    return load_yaml_recipe(SFTRecipe, path, overrides)
