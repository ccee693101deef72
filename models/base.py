"""Say what a family of image generators must be able to do to be trained, evaluated, exported, planned, served, asked.

A family is one folder here, or one file of a user's, and one line in `models.families`. It makes policies of model
folders. A policy writes image tokens after a prompt and decodes what it wrote to a picture; how its prompts are
encoded, what its decoder sees of the tokens (hidden states, the tokens themselves, embeddings) and whether that
decoder draws from noise is its own business: it passes through `rl/` as `Rows`, tensors under the family's own names.

`models.common.policy` holds what most families share: adapters, the frozen reference, refusals of what they lack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from imagerl.rl.types import (
    Canvas,
    FlowSampling,
    FlowSchedule,
    FlowScores,
    FlowTrajectory,
    Prompt,
    Rows,
    SamplingParams,
    Thoughts,
    TokenScores,
    TokenTrajectory,
)

Proof = Mapping[str, tuple[Tensor, Tensor]]  # name of a quantity -> what it is, and what it came out as again


class PromptReader(Protocol):
    """A reader of prompts, known without the weights."""

    token_guided: bool  # whether `SamplingParams.token_guidance` may be other than 1
    thought_room: (
        int  # positions that a prompt and a thought may fill together; 0: the model writes no thoughts
    )

    def canvas(self, prompt: Prompt) -> Canvas:
        """Return the sizes of a picture of a prompt. What a step draws is of one canvas."""
        ...

    def require(self, prompts: Iterable[Prompt], questions: bool = False) -> None:
        """Raise ImageRLError, which begins with its place, for the first prompt that the model cannot draw or edit by,
        or with `questions` cannot answer: an empty or a too long one, a size that it cannot draw."""
        ...

    def longest(self, prompts: Sequence[Prompt]) -> int:
        """Count the ids of the longest prompt, template and picture to edit included."""
        ...


class DecoderPolicy(Protocol):
    """A decoder as a policy over its denoising steps. See `models.common.flow_policy`."""

    @property
    def trainable(self) -> nn.Module:
        """forward(condition: Rows [B], latents [B, N, C, h, w], sigma [B, N], guidance) -> velocity [B, N, C, h, w]"""
        ...

    def condition(self, prompts: Rows, trajectory: TokenTrajectory) -> Rows:
        """Return what pictures of a trajectory [B] are drawn by, a row for each token sequence."""
        ...

    def decode_steps(
        self,
        prompts: Rows,
        trajectory: TokenTrajectory,
        noise: Tensor,
        step_noise: Tensor,
        sampling: FlowSampling,
    ) -> tuple[Tensor, FlowTrajectory]:
        """Decode by stochastic steps: pictures [B·M, 3, H, W] in [0, 1], and what replaying the steps needs.

        `prompts` [P], `trajectory` [B = P·G], `noise` [B·M, C, h, w], `step_noise` [B·M, S, C, h, w] of the steps in
        `sampling.window`. `FlowTrajectory.condition` has a row for each token sequence, which serves its M pictures."""
        ...

    def schedule(self, sampling: FlowSampling, shape: Sequence[int]) -> FlowSchedule:
        """Return the stochastic steps of a rollout of latents of a shape [C, h, w]."""
        ...

    def score(self, velocity: Tensor, latents: Tensor, schedule: FlowSchedule) -> FlowScores:
        """Score the steps through latents [B, S + 1, C, h, w], given velocities [B, S, C, h, w] at their beginnings."""
        ...

    def reference_velocity(self, condition: Rows, latents: Tensor, sigma: Tensor, guidance: float) -> Tensor:
        """Return what `trainable` returned when `freeze_reference` was called."""
        ...

    def freeze_reference(self) -> None: ...

    @property
    def reference(self) -> nn.Module | None:
        """The frozen copy of `trainable`; None where there is none, or an adapter's base serves."""
        ...

    @property
    def adapted(self) -> bool:
        """Tell whether the decoder has adapters."""
        ...

    def add_lora(self, rank: int, alpha: float, target_modules: Sequence[str]) -> None: ...

    def merge_lora(self) -> None: ...

    def save_adapter(self, folder: Path) -> None:
        """Write the adapters alone, as diffusers reads them."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Put the adapters in a folder onto the decoder, as diffusers does."""
        ...


class SupervisedScores(NamedTuple):
    """Losses of B given pictures, each [B] float32: sums of −log p over tokens, and the mean squared flow residual."""

    image_nll: Tensor  # over the T image tokens, with BLIP3o-NEXT also the closing `<im_end>`
    prompt_nll: Tensor  # over the prompt's own tokens; 0 when it is not trained on
    flow: Tensor  # 0 where the decoder does not learn


class Lessons(Protocol):
    """A model under supervised training: pictures with captions in, losses out. Made by `Policy.lessons`."""

    parts: Mapping[
        str, Sequence[str]
    ]  # of ar, connector, decoder, which can train, and how: full, lora, caption
    predicts_prompts: bool  # whether it can learn the prompt's own tokens too

    @property
    def trainable(self) -> nn.Module:
        """All that can learn, nothing that is frozen for good.

        forward(prompts: Rows [B], targets: Rows [B], draws: Rows [B]) -> SupervisedScores. The draws of a sample are
        `drop`, bool: its condition is the unconditional one, `uniform` in [0, 1), and `noise` [C, h, w] where the
        canvas has noise."""
        ...

    def part_of(self, name: str) -> str:
        """Tell which of ar, connector and decoder a parameter of `trainable` belongs to, as `decoder.caption` when it
        also trains by that way alone; empty: it never trains."""
        ...

    def targets(self, prompts: Sequence[Prompt], pictures: Tensor) -> Rows:
        """Return what is predicted of pictures [B, 3, H, W] in [-1, 1]: `tokens` [B, T], and what a flow needs."""
        ...

    def counted(self, prompts: Rows, tokens: Tensor) -> Tensor:
        """Count the predicted positions of images and of prompts, [B, 2]."""
        ...


class Policy(Protocol):
    """A model in memory. P prompts, G samples of each, B = P·G in group-major order, M pictures of a sample."""

    sampling: SamplingParams  # the model's own settings, where a user says nothing else
    sampler_dtype: torch.dtype  # of the weights that draw tokens

    @property
    def device(self) -> torch.device: ...

    @property
    def prompts(self) -> PromptReader: ...

    def parts(self) -> Mapping[str, nn.Module]:
        """Return modules that hold every weight between them, by what they are in words; `trainable` comes first."""
        ...

    @property
    def trainable(self) -> nn.Module:
        """The half that writes tokens: all that has gradients there and nothing else, none of what is frozen.

        forward(prompts: Rows [P], tokens [B, T], sampling: SamplingParams) -> TokenScores: log-probs and entropies of
        the very distribution that `sample_tokens` draws from, `temperature` and `token_guidance` included. P may be B,
        or B / G: then a prompt is read once for its group, gradients included."""
        ...

    @property
    def flow(self) -> DecoderPolicy | None:
        """The decoder as a policy, after `train_decoder`; None where it does not train."""
        ...

    # ---- drawing ---------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt], to_draw: bool = True) -> Rows:
        """Encode captions, or instructions with the pictures that they change (`Prompt.reference`), all of one kind.
        Without `to_draw` what only the decoder needs is left out.

        Raises ImageRLError for a prompt that the model cannot read."""
        ...

    def refresh_sampler(self) -> None:
        """Lay out the present weights for sampling. Called after every update, parameters gathered."""
        ...

    def release_sampler(self) -> None:
        """Free what `refresh_sampler` has laid out: nothing is drawn until it is called again."""
        ...

    def think(self, prompts: Rows, uniforms: Tensor, sampling: SamplingParams) -> Thoughts:
        """Write a text after prompts [P], for uniforms [P·G, N] in [0, 1) float64, one number a token: a sample depends
        on its own alone. Only where `PromptReader.thought_room` is more than 0."""
        ...

    def after_thoughts(self, prompts: Rows, thoughts: Thoughts) -> Rows:
        """Return rows [B] of prompts [P] with their thoughts [B]: what image tokens are drawn after, one sample a row,
        and by which `trainable` scores thoughts and tokens, [B, N + T]."""
        ...

    def thought_texts(self, thoughts: Thoughts) -> list[str]:
        """Return thoughts as text."""
        ...

    def sample_tokens(self, prompts: Rows, uniforms: Tensor, sampling: SamplingParams) -> TokenTrajectory:
        """Draw tokens for uniforms [B, T] in [0, 1) float64, one number each: a sample depends on its own alone."""
        ...

    def decode(
        self, prompts: Rows, trajectory: TokenTrajectory, noise: Tensor | None, sampling: SamplingParams
    ) -> Tensor:
        """Decode a trajectory [B] to pictures [B·M, 3, H, W] in [0, 1], from noise [B·M, C, h, w], or None and M = 1
        where `Canvas.noise` is None."""
        ...

    # ---- training --------------------------------------------------------------------------------------------

    @property
    def adapted(self) -> bool:
        """Tell whether `trainable` has a LoRA adapter, new or loaded with the model."""
        ...

    def add_lora(self, rank: int, alpha: float, dropout: float, target_modules: Sequence[str] | str) -> None:
        """Freeze the weights of `trainable` and train low-rank adapters instead (arXiv 2106.09685)."""
        ...

    def merge_lora(self) -> None:
        """Fold the adapter into the weights for good, which may then train again. Nothing to do without."""
        ...

    def load_adapter(self, folder: Path) -> None:
        """Put the adapter in a folder, in PEFT's layout, onto `trainable`, ready to train on."""
        ...

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write the adapter alone, in PEFT's layout; `base` is what it stands on, as a recipe's `model.path`."""
        ...

    def freeze(self, patterns: Sequence[str]) -> None:
        """Leave parameters of `trainable` as they are whose names match a pattern. Raises ImageRLError when one matches
        none."""
        ...

    def recompute(self) -> None:
        """Keep only the inputs of layers for the backward pass, of `trainable` and of a decoder that trains (activation
        checkpointing): less memory, a third more time. Prompts are then read once for each sample, P = B. Raises
        ImageRLError when the family cannot."""
        ...

    def train_decoder(self) -> DecoderPolicy:
        """Give the decoder gradients. Raises ImageRLError, which says why, when it cannot train."""
        ...

    @property
    def learns_flow(self) -> bool:
        """Tell whether the decoder has a flow loss that `lessons` can train it by."""
        ...

    def lessons(self, on_prompt: bool, with_flow: bool) -> Lessons:
        """Make the model ready for supervised training, of the prompt's tokens and by the flow loss or without.

        Raises ImageRLError when it cannot read pictures."""
        ...

    def freeze_reference(self) -> None:
        """Remember the present `trainable` as the KL reference; called again, parameters gathered, renew it."""
        ...

    def reference_scores(self, prompts: Rows, tokens: Tensor, sampling: SamplingParams) -> TokenScores:
        """Return `trainable.forward` of the frozen reference, without gradients."""
        ...

    def reference_state(self) -> dict[str, Tensor]:
        """Return the weights of the frozen copy by name; empty where there is none."""
        ...

    def load_reference(self, state: Mapping[str, Tensor]) -> None: ...

    def references(self) -> Sequence[nn.Module]:
        """Return the frozen copies that KL is measured against, of both halves: they may share weights with `parts`."""
        ...

    # ---- export ----------------------------------------------------------------------------------------------

    def save(self, folder: Path, layout: str, base: Path, dtype: torch.dtype | None) -> None:
        """Write the policy, without adapters, into an empty folder in one of the family's layouts, weights stored as
        `dtype` (None: as they are). `base` is the folder that training began from, for files that are copied."""
        ...

    def proof(self, folder: Path, layout: str, prompts: Sequence[Prompt]) -> Proof | None:
        """Return what the policy computes of prompts, and what comes of it as `save` wrote it, loaded as its users
        will; None where that is a whole model again, which must draw the same tokens and pixels."""
        ...

    # ---- memory ----------------------------------------------------------------------------------------------

    def blank(
        self, prompts: int, length: int, samples: int, edits: bool = False
    ) -> tuple[Rows, TokenTrajectory]:
        """Return rows of prompts of `length` ids and a trajectory, of the right shapes and without content. The
        pictures of edits are encoded, as they would be."""
        ...

    def token_bytes(self) -> tuple[int, int]:
        """Return bytes that a token of a sample holds while others are drawn (keys, values, states), and from then on
        until its picture is decoded."""
        ...

    # ---- reading ---------------------------------------------------------------------------------------------

    def answer(
        self, pictures: Iterable[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """Answer a question about each picture. Raises ImageRLError when the model cannot read pictures."""
        ...


class Outline(Protocol):
    """A model known by its sizes alone."""

    @property
    def prompts(self) -> PromptReader: ...

    def policy(self) -> Policy:
        """Return the policy, whose parameters have shapes only."""
        ...


class Family(Protocol):
    """A kind of model folder."""

    layouts: Mapping[
        str, str
    ]  # of exports: name -> what it is, in words; the first is the family's own, to go on with

    def recognises(self, settings: Mapping[str, object]) -> bool:
        """Tell whether a folder is of the family, by its config.json or model_index.json."""
        ...

    def load(self, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Policy:
        """Load a policy with all its parts in `dtype`, in evaluation mode, nothing but `trainable` with gradients.

        Raises ImageRLError when the folder's files are damaged or do not fit."""
        ...

    def prompts(self, folder: Path) -> PromptReader:
        """Return what the model in a folder can be asked; no weights are read."""
        ...

    def outline(self, folder: Path) -> Outline:
        """Return the sizes of the model in a folder; no weights are read."""
        ...

    def published(self, name: str) -> Outline | None:
        """Return the sizes behind a name of the hub, where they are known without its files."""
        ...
