"""The vocabulary of ImageRL: plain data and Protocols. Imports nothing of ours but `rl.errors`.

Shape letters used everywhere: P prompts, G group, B = P·G samples, T image tokens, S flow steps,
N actions (tokens or flow steps), L prompt tokens, D hidden size, H×W pixels, C latent channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from imagerl.rl.errors import ImageRLError as ImageRLError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt set: Prompt(0, 'a sign that says "RIVER" in red', {"target": "RIVER"}).

    `index` is its stable identity there and part of every random seed."""

    index: int
    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False)  # the file or named set it stands in, for messages
    line: int = field(default=0, compare=False)  # there, counted from 1; 0: the source says it all

    @property
    def place(self) -> str:
        """The place where it stands, as a message begins."""
        return f"{self.source}, line {self.line}" if self.line else self.source or f"prompt {self.index + 1}"

    @property
    def reference(self) -> Image.Image | None:
        """The picture to edit, in the column of that name, so that rewards see it too; None: draw a new one. That of
        a prompt file is there once the prompt is drawn; see `rl.rollout.engine.with_pictures`."""
        picture = self.columns.get("reference")
        return picture if isinstance(picture, Image.Image) else None


Rows = dict[str, Tensor]
"""Tensors under a family's own names, each with a row for every prompt or sample: {"ids": [6, 23], "mask": [6, 23]}."""


def select(rows: Rows, which: slice) -> Rows:
    """Select some of the rows, as views."""
    return {name: tensor[which] for name, tensor in rows.items()}


def repeat(rows: Rows, times: int) -> Rows:
    """Repeat every row, copies side by side: P prompts become P·G samples in group-major order."""
    if times == 1:
        return rows
    return {name: tensor.repeat_interleave(times, 0) for name, tensor in rows.items()}


class Canvas(NamedTuple):
    """The sizes of a picture: Canvas(64, (32, 64), (24, 4, 8), (4, 16)) with the tiny model."""

    tokens: int  # T that are drawn of it
    pixels: tuple[int, int]  # H, W
    noise: tuple[int, int, int] | None  # C, h, w that its decoder begins from; None: it needs none
    grid: tuple[int, int] | None = (
        None  # rows and columns on which its tokens lie, row by row; None: no such grid
    )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The settings that samples are drawn with: SamplingParams(1.0, 2.0, 4) for tiny pictures at temperature 1.

    Log-probs are those of exactly this distribution."""

    temperature: float = 1.0
    guidance: float = 2.0  # classifier-free guidance of the decoder; 1: none
    flow_steps: int = 30
    shared_noise: bool = False  # one decoder noise per group instead of one per sample
    decodes: int = 1  # pictures drawn of each token sequence, M
    token_guidance: float = 1.0  # classifier-free guidance on the logits of tokens; 1: none
    thought_tokens: int = 0  # longest text that is written before the image tokens, N; 0: none


@dataclass(slots=True)
class TokenTrajectory:
    """The sampled image tokens of B samples, in group-major order (sample b belongs to prompt b // G).

    The tiny recipe has P = 6, G = 16, T = 64, so tokens [96, 64]; its states are {"hidden": [96, 65, 256]}."""

    tokens: Tensor  # [B, T] int64, 0-based within the image vocabulary
    rollout_logprobs: Tensor  # [B, T] float32, of the sampling distribution
    action_mask: Tensor  # [B, T] bool
    states: Rows = field(default_factory=dict)  # [B, ...] what the family's decoder needs beside the tokens

    def rows(self, which: slice) -> TokenTrajectory:
        """Select some of the samples, as views."""
        return TokenTrajectory(
            self.tokens[which],
            self.rollout_logprobs[which],
            self.action_mask[which],
            select(self.states, which),
        )


@dataclass(slots=True)
class Thoughts:
    """The text that the policy wrote before the image tokens of B samples, group-major: [96, 16] with
    `thought_tokens` 16. Rows end where their mask does; the end of a thought is its last action, but for those that
    were cut at N."""

    tokens: Tensor  # [B, N] int64, 0-based within the text that may be written
    rollout_logprobs: Tensor  # [B, N] float32, of the sampling distribution
    action_mask: Tensor  # [B, N] bool

    def rows(self, which: slice) -> Thoughts:
        """Select some of the samples, as views."""
        return Thoughts(self.tokens[which], self.rollout_logprobs[which], self.action_mask[which])


class TokenScores(NamedTuple):
    """The policy's scores of given tokens, [96, 64] in the tiny recipe. Differentiable when gradients are on. Those of
    thoughts stand before those of image tokens.

    A tuple, because DeepSpeed looks for a module's output tensors in tuples and lists only."""

    logprobs: Tensor  # [B, T] float32
    entropy: Tensor  # [B, T] float32, nats, of the same distribution


@dataclass(frozen=True, slots=True)
class FlowSampling:
    """The decoder's sampling where denoising steps are actions: FlowSampling("sde", 0.7, range(0, 3), 1.0, 4)."""

    sampler: str  # kind of the stochastic steps: sde, dance, cps; ode: there are none
    noise_level: float
    window: range  # the stochastic steps, of 0 .. steps - 2; empty: a deterministic chain
    guidance: float
    steps: int


class FlowSchedule(NamedTuple):
    """The stochastic steps of a `FlowSampling`, on the CPU; S = 3 for range(0, 3). A step is N(latents·x +
    velocity·v, std^2)."""

    sigma: Tensor  # [S] noise level that the step begins at
    dt: Tensor  # [S] change of the noise level, negative
    latents: Tensor  # [S]
    velocity: Tensor  # [S]
    std: Tensor  # [S] of the transition, sqrt(|dt|) included


@dataclass(slots=True)
class FlowTrajectory:
    """The data to replay B pictures: where each stochastic step began and ended, and what it was conditioned on.
    No pixels, and nothing of the deterministic steps. Tiny decoder, S = 3: latents [96, 4, 24, 4, 8]."""

    condition: Rows  # [B / M, ...] what the family's decoder sees of the token sequences
    latents: Tensor  # [B, S + 1, C, h, w] before each step and after the last; S = 0: the finished ones
    rollout_logprobs: Tensor  # [B, S] float32, nats per dimension

    def part(self, number: int, parts: int) -> FlowTrajectory:
        """Return the `number`-th of equal parts."""
        condition = {name: rows.chunk(parts)[number] for name, rows in self.condition.items()}
        return FlowTrajectory(
            condition, *(each.chunk(parts)[number] for each in (self.latents, self.rollout_logprobs))
        )


class FlowScores(NamedTuple):
    """The scores of given steps under a velocity, [96, 3] for 96 pictures of S = 3 steps. Differentiable."""

    logprobs: Tensor  # [B, S] float32, nats per dimension
    means: Tensor  # [B, S, C, h, w] float32, of the transitions


@dataclass(slots=True)
class RolloutGroup:
    """A group of G samples of one prompt; tiny: tokens [16, 64], images [16, 32, 64, 3]."""

    prompt: Prompt
    tokens: Tensor  # [G, T]
    rollout_logprobs: Tensor  # [G, T]
    action_mask: Tensor  # [G, T]
    images: np.ndarray  # [G·M, H, W, 3] uint8 RGB; none of a group that another process has drawn
    flow: FlowTrajectory | None = None  # of the G·M pictures, where the decoder trains
    thoughts: Thoughts | None = None  # [G, N] written before the tokens, with `thought_tokens`
    looks: Mapping[str, float] = field(default_factory=dict)  # statistics of pictures that are not here


@dataclass(slots=True)
class TrainBatch:
    """The inputs of an update: B samples, group-major, of one microbatch or of a step. Tiny: 48 or 96 rows, N = 64."""

    prompts: Rows  # [B, ...] as the policy encodes them: {"ids": [B, L], "mask": [B, L]}
    tokens: Tensor  # [B, T] image tokens; N = T, but with thoughts, which are among the prompts' rows and come first
    action_mask: Tensor  # [B, N] bool; all False for a sample that must not train
    rollout_logprobs: Tensor  # [B, N] from the sampler
    old_logprobs: Tensor | None  # [B, N] from the trainer before the update; None: ratio is 1 by design
    ref_logprobs: Tensor | None  # [B, N] from the frozen reference; None without KL
    advantages: Tensor  # [B, 1] or [B, N]
    entropy: Tensor | None = None  # [B, N] nats, before the update; None unless it decides what trains
    selected: Tensor | None = None  # [B, N] bool, actions that the policy term trains; None: all

    def rows(self, which: slice) -> TrainBatch:
        """Select some of the samples, as views."""

        def part(name: str) -> Any:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                return value[which]
            return None if value is None else select(value, which)

        return TrainBatch(**{name: part(name) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The arguments of every loss. `denominator` is the global count the sum is divided by: gradient
    accumulation and data parallelism stay exact because no loss averages on its own. Tiny: 96.0 samples."""

    logprobs: Tensor  # [B, N] with gradient
    old_logprobs: Tensor  # [B, N]
    ref_logprobs: Tensor | None  # [B, N]
    advantages: Tensor  # [B, N] or [B, 1]
    action_mask: Tensor  # [B, N] bool
    denominator: float
    policy_weights: Tensor | None = None  # [B, N] factors of the policy term, not of the KL; None: all 1
    kl_weights: Tensor | None = None  # [B, N] factors of the KL, where another policy drew; None: all 1


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The result of a loss: `loss` to call backward on, and `metrics`, sums over the given actions, to be divided by
    `metrics["actions"]` (tiny: 96 * 64 = 6144) once all microbatches and ranks are added up."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(slots=True)
class RewardOutput:
    """A reward's answer in place of a bare list: RewardOutput([0.8, None], reason="timed out").

    None or NaN marks a sample without a value, and `reason` says in one line why one of them has none."""

    rewards: Sequence[float | None]
    breakdown: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    reason: str | None = None
    # Of each sample [(value, left, top, right, bottom), ...], sides in [0, 1]: the same K for all samples of a prompt.
    regions: Sequence[Sequence[Sequence[float]]] = ()


@runtime_checkable
class RewardFn(Protocol):
    """A reward: called with keyword arguments only, one list entry per sample.

    `prompts` captions, `completions` lists of image-token ids, `images` PIL pictures (RGB), and every
    column of the prompt set under its own name. The signature is also that of TRL's reward functions.
    """

    def __call__(
        self,
        *,
        prompts: list[str],
        completions: list[list[int]],
        images: list[Image.Image],
        **columns: list[Any],
    ) -> Sequence[float | None] | RewardOutput: ...


@dataclass(slots=True)
class RewardRequest:
    """The samples of whole groups to be scored, such as 2 groups of 16: B = 32, images [32, 32, 64, 3]; every
    sequence has one entry per sample."""

    prompts: list[str]
    completions: list[list[int]]
    images: np.ndarray  # [B, H, W, 3] uint8 RGB
    columns: dict[str, list[Any]]
    group_size: int
    step: int = 0  # of training, counted from 0: weights may depend on it
    progress: float = 0.0  # share of the training steps that are done, for rewards with a schedule


class StoredRequest(NamedTuple):
    """A request whose pictures stay where they were drawn, in Ray's object store, until a reward fetches them."""

    parts: Sequence[object]  # references to RewardRequests of whole groups
    sizes: Sequence[int]  # samples of each
    group_size: int
    step: int


@dataclass(slots=True)
class RewardScores:
    """The scores of one request, such as totals [0.8, NaN]: NaN marks a sample without a usable value. Functions of
    all are in `rl.rollout.scores`."""

    totals: np.ndarray  # [B] float64, weighted sum; NaN: leave this sample out
    components: dict[str, np.ndarray]  # raw values by "<reward>" and "<reward>/<part>", [B] float64
    failures: dict[str, int]  # "<reward>" -> samples lost to errors, time-outs, None, NaN or inf
    reasons: dict[str, str]  # "<reward>" -> the last failure in one line
    # What the total is made of, for algorithms that look at each reward: values by "<reward>" [B] float64 with
    # gates applied, NaN where missing or not applicable, and their weights at this step.
    gated: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    # Totals [B] of "tokens" and "flow" where some rewards teach one half only; empty: both learn from `totals`.
    halves: dict[str, np.ndarray] = field(default_factory=dict)
    # Regions by "<reward>" where it tells some, [B, K, 5], values times its weight; NaN where there are fewer.
    regions: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckPicture:
    """A picture of known worth, for checking rewards: CheckPicture("one letter wrong", "graded", prompt, image).

    By `role`, `honest` answers the prompt, `graded` with a fault; `degenerate` shows nothing, or leaves undone what
    was asked; `hack` aims at the reward instead; `other` answers another prompt."""

    kind: str  # such as "honest" or "one letter wrong"
    role: str
    prompt: Prompt
    image: Image.Image  # RGB


class RewardScorer(Protocol):
    """Scores requests, possibly elsewhere and later, so that scoring overlaps with sampling."""

    def submit(self, request: RewardRequest | StoredRequest, with_gold: bool = False) -> int: ...

    def collect(self, ticket: int) -> RewardScores: ...

    def close(self) -> None: ...


class Source(Protocol):
    """Where pictures come from that are judged: a `RolloutEngine`, its like on Ray actors, or perfect pictures."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        occasion: int | str,
        decode_chunk: int | None = None,
        sample_chunk: int | None = None,
    ) -> Iterator[list[RolloutGroup]]: ...
