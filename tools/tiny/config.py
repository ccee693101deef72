"""The schemas of the recipes that make the tiny models and the small CLIP."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from imagerl.rl.config.engine import OptimConfig
from imagerl.rl.config.recipe import RecipeModel
from imagerl.rl.data.tiny.world import FONTS
from imagerl.rl.files.bounds import (
    Coefficient,
    Count,
    Every,
    LearningRate,
    OutputDir,
    Positive,
    Seed,
    Steps,
    Threads,
)


class StageConfig(RecipeModel):
    """One stage of supervised training."""

    steps: Steps = Field(description="optimizer steps")
    batch_size: Count = Field(32, description="pictures a step")
    lr: LearningRate = Field(2e-3, description="peak learning rate")
    beta2: float = Field(0.95, gt=0, lt=1, description="AdamW's second beta")
    weight_decay: float = Field(0.01, ge=0, le=10, description="AdamW's decoupled weight decay")
    warmup_steps: Every = Field(100, description="linear warm-up")
    decay_share: float = Field(
        0.5, ge=0, le=1, description="last share of the steps, decayed linearly to zero"
    )
    max_grad_norm: Positive = Field(1.0, description="gradient clipping")
    fonts: list[str] = Field(
        default_factory=lambda: list(FONTS),
        description="fonts of the rendered words; none: pictures of shapes",
    )
    bf16: bool = Field(True, description="bfloat16 autocast")

    def optim(self) -> OptimConfig:
        """Write it as the engine has it, whose warm-up reaches `lr` one update after its last step."""
        return OptimConfig(
            lr=self.lr,
            betas=(0.9, self.beta2),
            weight_decay=self.weight_decay,
            schedule="linear" if self.decay_share else "constant",
            decay_share=self.decay_share or 1.0,
            warmup_steps=max(0, self.warmup_steps - 1),
            max_grad_norm=self.max_grad_norm,
        )


class GeneratorStage(StageConfig):
    """The joint stage: cross-entropy on tokens and flow matching on latents."""

    flow_share: float = Field(1.0, gt=0, le=1, description="share of the batch that the flow loss sees")
    flow_weight: Coefficient = Field(1.0, description="weight of the flow loss beside the cross-entropy")
    condition_dropout: float = Field(0.1, ge=0, lt=1, description="chance of the unconditional branch")
    snapshot_every: Steps = Field(1000, description="steps between saved and measured snapshots")


class TasksStage(StageConfig):
    """The stage that teaches the language model to draw, to edit and to read, without the decoder."""

    edit_share: float = Field(0.5, ge=0, le=1, description="share of the batch that edits a picture")
    question_share: float = Field(0.25, ge=0, le=1, description="share that answers; the rest draws captions")
    edit_text_share: float = Field(1 / 3, ge=0, le=1, description="share of edits that replace the text")
    question_text_share: float = Field(1 / 3, ge=0, le=1, description="share of questions for the text")
    snapshot_every: Steps = Field(1000, description="steps between saved snapshots")


class DecoderStage(StageConfig):
    """Connector and decoder, trained on the hidden states of a language model that no longer changes."""

    renew: bool = Field(True, description="start from fresh weights; false: from those the model has")
    edit_share: float = Field(0.0, ge=0, le=1, description="share of the batch that edits a picture")
    pictures: int = Field(
        4864, ge=64, le=10_000_000, multiple_of=64, description="pictures whose hidden states are kept"
    )
    pictures_seed: Seed = Field(0, description="seed of these pictures")
    fade: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the way to the ground that ink is taken: a decoder with a fault to mend",
    )
    condition_dropout: float = Field(0.1, ge=0, lt=1, description="chance of the unconditional branch")
    place_weight: Coefficient = Field(0.3, description="weight of reading a token's place off its condition")
    code_weight: Coefficient = Field(1.0, description="weight of reading a token's code off its condition")


class PretrainRun(RecipeModel):
    seed: Seed = Field(0, description="seed of everything random")
    output_dir: OutputDir = Field(description="folder for the checkpoint and its record")
    threads: Threads | None = Field(None, description="CPU threads; null: all")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")


class TextTokenizerConfig(RecipeModel):
    vocabulary: int = Field(
        384, ge=260, le=10**6, description="byte-level BPE entries before the image tokens"
    )


class PretrainRecipe(RecipeModel):
    """A complete pretraining run: what to build or to begin with, and how long to train each part."""

    kind: Literal["pretrain"] = Field(description="marks the schema")
    run: PretrainRun = Field(description="seed, place and hardware of the run")
    text_tokenizer: TextTokenizerConfig = Field(
        default_factory=TextTokenizerConfig, description="tokenizer of the captions"
    )
    init: str | None = Field(
        None,
        description="model to begin with: for `tasks` it becomes edit-capable; null: build `model`",
    )
    model: dict[str, Any] | None = Field(
        None, description="qwen3, sana, vae, scheduler, image_tokenizer, latent_size; with `init` its own"
    )
    tokenizer: StageConfig | None = Field(None, description="pictures to tokens and back")
    autoencoder: StageConfig | None = Field(None, description="pictures to latents and back")
    generator: GeneratorStage | None = Field(None, description="captions to tokens and pictures, jointly")
    tasks: TasksStage | None = Field(None, description="drawing, editing and reading in one language model")
    decoder: DecoderStage | None = Field(None, description="the decoder on the finished language model")

    @model_validator(mode="after")
    def _whole(self) -> PretrainRecipe:
        new = {name: getattr(self, name) for name in ("model", "tokenizer", "autoencoder", "generator")}
        if self.init is None:
            missing = [name for name, value in new.items() if value is None]
            if missing:
                raise ValueError(f"{', '.join(missing)} must be given where init is not")
            if self.tasks is not None or (self.decoder is not None and self.decoder.edit_share):
                raise ValueError("editing and reading are taught to a model that can draw; name it as init")
        elif given := [name for name, value in new.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} must be left out: init has them already")
        elif self.tasks is None and self.decoder is None:
            raise ValueError("tasks, decoder or both must be given where init is")
        return self


class ClipStage(StageConfig):
    """Contrastive training: of all captions of a batch, which one does a picture show, and the reverse."""

    wrong_captions: int = Field(
        3,
        ge=0,
        le=1024,
        description="captions a picture with one thing wrong in each, beside those of other pictures",
    )
    poor_pictures: int = Field(
        0,
        ge=0,
        le=2**16,
        description="pictures a batch that answer no caption: blank, noise, text over everything",
    )


class ClipRecipe(RecipeModel):
    """A whole run: what to build, how long to train it, and how it is measured."""

    kind: Literal["clip"] = Field(description="marks the schema")
    run: PretrainRun = Field(description="seed, place and hardware of the run")
    vocabulary: int = Field(
        320, gt=256, le=10**6, description="size of the text tokenizer, trained on captions"
    )
    model: dict[str, Any] = Field(description="open_clip's model_cfg: embed_dim, vision_cfg, text_cfg")
    preprocess: dict[str, Any] = Field(description="open_clip's preprocess_cfg")
    training: ClipStage = Field(description="how long it is trained, on what")
    measured: int = Field(512, ge=64, le=10**6, description="held-out pictures that retrieval is measured on")
