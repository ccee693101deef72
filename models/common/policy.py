"""What most families share of a policy: adapters, the frozen reference, refusals, and the reading of a user's words."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from imagerl.models.common.adaptable import Adaptable, freeze
from imagerl.models.common.supervised import TokenLessons, TokenModule
from imagerl.rl.types import (
    Canvas,
    ImageRLError,
    Prompt,
    Rows,
    SamplingParams,
    Thoughts,
    TokenScores,
    TokenTrajectory,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from imagerl.models.base import DecoderPolicy, Lessons, Outline, Proof


def recompute_layers(lm: PreTrainedModel) -> None:
    """Let a language model of transformers recompute its layers in the backward pass, which they do in training mode
    only. Raises ImageRLError when they have dropout: recomputed, they would not be what they were."""
    if lm.config.attention_dropout:
        raise ImageRLError(
            "attention_dropout in the model's config.json is not 0, so that engine.activation_checkpointing would "
            "change its log-probs; set it to false"
        )
    lm.activation_checkpointing_enable({"use_reentrant": False})


class BasePolicy:
    """A policy to build on; see `models.base.Policy` for what a family must add: `trainable`, `prompts`, `encode`,
    `sample_tokens` and `decode`."""

    trainable: nn.Module
    flow: DecoderPolicy | None = None
    sampler_dtype = torch.float32
    _reference: nn.Module | None = None

    def __init__(self, trainable: nn.Module, sampling: SamplingParams) -> None:
        self.trainable = trainable
        self.sampling = sampling

    @property
    def device(self) -> torch.device:
        return next(self.trainable.parameters()).device

    def parts(self) -> Mapping[str, nn.Module]:
        return {"model": self.trainable}

    def blank(
        self, prompts: int, length: int, samples: int, edits: bool = False
    ) -> tuple[Rows, TokenTrajectory]:
        raise ImageRLError("this model does not say what memory it takes")

    def token_bytes(self) -> tuple[int, int]:
        return 0, 0

    def proof(self, folder: Path, layout: str, prompts: Sequence[Prompt]) -> Proof | None:
        """Return nothing: every layout is a whole model."""
        return None

    def refresh_sampler(self) -> None:
        """Do nothing: the present weights draw."""

    def release_sampler(self) -> None:
        """Do nothing: no copy of them is held."""

    def recompute(self) -> None:
        raise ImageRLError(
            "this model cannot recompute activations; set engine.activation_checkpointing=false"
        )

    def think(self, prompts: Rows, uniforms: Tensor, sampling: SamplingParams) -> Thoughts:
        raise ImageRLError("this model writes no text before a picture; set rollout.thought_tokens=0")

    def after_thoughts(self, prompts: Rows, thoughts: Thoughts) -> Rows:
        raise ImageRLError("this model writes no text before a picture; set rollout.thought_tokens=0")

    def thought_texts(self, thoughts: Thoughts) -> list[str]:
        return []

    def train_decoder(self) -> DecoderPolicy:
        raise ImageRLError(
            "this model's decoder does not train: it has no denoising steps; remove algorithm.flow"
        )

    def answer(
        self, pictures: Iterable[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        raise ImageRLError("this model cannot read pictures")

    # ---- adapters --------------------------------------------------------------------------------------------

    @property
    def adapted(self) -> bool:
        return isinstance(self.trainable, Adaptable) and self.trainable.adapter is not None

    def _adaptable(self) -> Adaptable:
        if not isinstance(self.trainable, Adaptable):
            raise ImageRLError("this model takes no LoRA adapters; remove model.lora")
        return self.trainable

    def add_lora(self, rank: int, alpha: float, dropout: float, target_modules: Sequence[str] | str) -> None:
        self._adaptable().add_lora(rank, alpha, dropout, target_modules)

    def merge_lora(self) -> None:
        if self.adapted:
            self._adaptable().merge_adapter()

    def load_adapter(self, folder: Path) -> None:
        from imagerl.models.common.adapters import adapter_sampling, load_adapter

        load_adapter(self._adaptable(), folder)
        self.sampling = adapter_sampling(folder) or self.sampling

    def save_adapter(self, folder: Path, base: str) -> None:
        from imagerl.models.common.adapters import save_adapter

        save_adapter(self._adaptable(), folder, base, self.sampling)

    def freeze(self, patterns: Sequence[str]) -> None:
        freeze(self.trainable, patterns)

    # ---- supervised training ---------------------------------------------------------------------------------

    learns_flow = False

    def tokens_of(self, pictures: Tensor) -> Tensor:
        """Return the image tokens [B, T] that pictures [B, 3, H, W] in [-1, 1] should be written by."""
        raise ImageRLError("this model cannot read pictures, so that none can be taught to it")

    def lessons(self, on_prompt: bool, with_flow: bool) -> Lessons:
        """Teach the half that writes tokens alone."""
        return TokenLessons(self, TokenModule(self.trainable))

    # ---- the frozen reference --------------------------------------------------------------------------------

    def freeze_reference(self) -> None:
        """Remember the present policy as the KL reference: a frozen copy of the half that writes tokens, or of the
        adapter alone where one trains. Called again, parameters gathered, it renews the copy of a half."""
        if self.adapted:
            self._adaptable().keep_reference()
        elif self._reference is None:
            self._reference = copy.deepcopy(self.trainable).requires_grad_(False).eval()
        else:
            self.load_reference({n: p.data for n, p in self.trainable.named_parameters()})

    def reference_state(self) -> dict[str, Tensor]:
        return {} if self._reference is None else {n: p.data for n, p in self._reference.named_parameters()}

    @torch.no_grad()
    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        own = self.reference_state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[0]
            raise ImageRLError(
                f"the checkpoint's reference is of another model ({odd}); resume with the same model"
            )
        for name, weight in state.items():
            own[name].copy_(weight)

    def references(self) -> list[nn.Module]:
        copies = [self._reference, None if self.flow is None else self.flow.reference]
        return [copy for copy in copies if copy is not None]

    @torch.no_grad()
    def reference_scores(self, prompts: Rows, tokens: Tensor, sampling: SamplingParams) -> TokenScores:
        if self._reference is not None:
            scores: TokenScores = self._reference(prompts, tokens, sampling)
            return scores
        if not self.adapted:
            raise ImageRLError("no reference policy: call freeze_reference() before training with KL")
        with self._adaptable().reference_weights():
            scores = self.trainable(prompts, tokens, sampling)
        return scores


class BaseFamily:
    """A family to build on, whose memory is not planned."""

    def outline(self, folder: Path) -> Outline:
        raise ImageRLError(f"{folder}: models of this family do not say what memory they take")

    def published(self, name: str) -> Outline | None:
        return None


class PlainPrompts:
    """Implements `models.base.PromptReader` for models that draw pictures of one size, and read any text."""

    thought_room = 0

    def __init__(self, canvas: Canvas, token_guided: bool = False) -> None:
        self.token_guided = token_guided
        self._canvas = canvas

    def canvas(self, prompt: Prompt) -> Canvas:
        return self._canvas

    def require(self, prompts: Iterable[Prompt], questions: bool = False) -> None:
        for prompt in prompts:
            if questions or prompt.columns.get("reference") is not None:
                raise ImageRLError(f"{prompt.place}: this model cannot read pictures")
            if not prompt.text.strip():
                raise ImageRLError(f"{prompt.place}: a prompt is empty; every prompt needs a caption")

    def longest(self, prompts: Sequence[Prompt]) -> int:
        return max(len(prompt.text) for prompt in prompts)


class Frame(NamedTuple):
    """What stands around a user's words in a template."""

    head: list[int]  # up to the last named token before them
    lead: str  # from there to the words
    trail: str  # from the words to the next named token
    tail: list[int]


class PlainText:
    """Text as ids of a tokenizer. `<I5>` or `<|im_end|>` in a caption are seven or more letters, so that nobody can end
    a turn or draw from inside a caption."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids_of_names = tokenizer.get_added_vocab()  # built anew at every call, of 65,000 names
        self._named = set(self.ids_of_names.values())

    def ids(self, text: str) -> list[int]:
        """Return the tokenizer's own ids, names of tokens included."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def named_spans(self, text: str) -> list[tuple[int, int]]:
        """Find where the tokenizer would see a named token in a text."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [span for id_, span in pairs if id_ in self._named]

    def plain(self, text: str) -> list[int]:
        """Return ids of a text in which names of tokens are mere letters; other texts' are the tokenizer's own."""
        ids = self.ids(text)
        if self._named.isdisjoint(ids):
            return ids
        cuts = {start + 1 if end - start > 1 else end for start, end in self.named_spans(text)} - {len(text)}
        if not cuts:
            return ids
        return [
            id_ for part in pairwise([0, *sorted(cuts), len(text)]) for id_ in self.plain(text[slice(*part)])
        ]

    def frame(self, before: str, after: str) -> Frame:
        """Cut parts of a template where named tokens are: between them text is encoded as one piece, so a user's words
        must be joined to what touches them."""
        first = max((end for _, end in self.named_spans(before)), default=0)
        last = min((start for start, _ in self.named_spans(after)), default=len(after))
        return Frame(self.ids(before[:first]), before[first:], after[:last], self.ids(after[last:]))

    def framed(self, frame: Frame, words: str) -> list[int]:
        """Return ids of words between parts of a template, whose named tokens are tokens."""
        return [*frame.head, *self.plain(frame.lead + words + frame.trail), *frame.tail]


def drawn(pixels: Tensor, mean: float = 0.5, deviation: float = 0.5) -> Tensor:
    """Bring what an autoencoder decodes, [B, 3, H, W] in [-1, 1], to [0, 1] in float32.

    Raises ImageRLError for pixels that are not finite, which would be black ones in silence."""
    pixels = pixels.float()
    if not math.isfinite(pixels.sum()):
        raise ImageRLError(
            "the model draws pixels that are not finite: its numbers overflow; check its weights and settings, or, "
            "if it was just trained, go back to an earlier checkpoint and lower optim.lr"
        )
    return (pixels * deviation + mean).clamp(0, 1)
