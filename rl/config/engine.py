"""The sections of every recipe that updates weights: optimizer, adapters, engine, checkpoints."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.files.bounds import Coefficient, Count, Every, LearningRate, Positive, Threads


class LoraConfig(RecipeModel):
    r: int = Field(16, ge=1, le=4096, description="rank of the adapters")
    alpha: Positive = Field(32.0, description="adapters are scaled by alpha / r")
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


class OptimConfig(RecipeModel):
    lr: LearningRate = Field(1e-6, description="learning rate after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="AdamW's two decay rates")
    eps: float = Field(1e-8, ge=1e-16, le=1, description="AdamW's epsilon; too large swamps small gradients")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="linear, cosine: to min_lr"
    )
    decay_share: float = Field(1.0, gt=0, le=1, description="last share of the updates, in which lr falls")
    min_lr: float = Field(0.0, ge=0, le=10, description="what the linear and cosine schedules fall to")
    warmup_steps: Every = Field(0, description="updates of linear warm-up")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the trained weights, which is evaluated and exported in their place; "
        "null: none",
    )
    max_grad_norm: Coefficient = Field(1.0, description="clip the gradient norm to this; 0: never")

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

    def check(self, engine: EngineConfig) -> None:
        """Raise ValueError for what an engine cannot do."""
        if self.ema is not None and engine.name == "deepspeed":
            raise ValueError("optim.ema needs whole weights on every process; set engine.name: torch")


class EngineConfig(RecipeModel):
    name: Literal["torch", "deepspeed"] = Field("torch", description="what runs the training")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(None, description="ZeRO stage, deepspeed only (there 1)")
    activation_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass: far less memory, a third more time"
    )
    offload_optimizer: bool = Field(
        False,
        description="keep ZeRO's optimizer state in host memory and update there; slower, saves 8 bytes a "
        "trained parameter and ZeRO's copy of it",
    )
    offload_frozen: bool = Field(
        False,
        description="keep what only draws, and the references, in host memory while weights are updated: a copy "
        "there and back every step",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of matrix products; weights stay fp32")
    micro_batch_size: Count = Field(16, description="samples of one forward and backward pass")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    deterministic: bool = Field(
        True, description="ask for GPU kernels that repeat bit for bit; false: any, some of which are faster"
    )
    timeout_s: float = Field(
        1800.0,
        ge=1,
        le=86400,
        description="seconds that a process waits in an exchange with the others before the run ends",
    )
    threads: Threads | None = Field(
        None,
        description="CPU threads of torch, less rewards.workers while scoring; null: its own choice",
    )

    @model_validator(mode="before")
    @classmethod
    def _published_stage(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("name") == "deepspeed" and data.get("zero_stage") is None:
            return {**data, "zero_stage": 1}
        return data

    @model_validator(mode="after")
    def _stage_needs_deepspeed(self) -> Self:
        if self.zero_stage is not None and self.name != "deepspeed":
            raise ValueError(f"engine.zero_stage needs engine.name: deepspeed, not {self.name}")
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError(
                "engine.offload_optimizer needs engine.name: deepspeed and a zero_stage of 1 to 3"
            )
        return self


class CheckpointConfig(RecipeModel):
    every: Every = Field(20, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(2, description="newest checkpoints kept")
    weights_only: bool = Field(
        False, description="leave the optimizer out: a third of the size, to evaluate and export; no --resume"
    )
    grace_s: float = Field(
        25.0,
        ge=0,
        le=86400,
        description="after Ctrl-C or SIGTERM a step is given up after so many seconds and the one before, kept in host "
        "memory, is saved; 0: never, and nothing is kept",
    )
