"""Encode what the language model reads: the published chat prompts around a user's words and a picture's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from imagerl.models.blip3o_next.ar import ImageVocabulary
from imagerl.models.common.policy import PlainText
from imagerl.rl.types import Canvas, ImageRLError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM = "You are a helpful assistant."
REQUEST = "Please generate image based on the following caption: {caption}"
EDIT = "Please edit this image according to the following instruction: {instruction}.\n"
PICTURE_START, PICTURE_END = "<|vision_start|>", "<|vision_end|>"
TURN_END = "<|im_end|>"
MARK = "\ue000"  # a private-use character, where the chat template puts the user's words

Rows = list[list[int]]
Kind = Literal["caption", "edit", "question"]


class PromptTooLong(ImageRLError):
    """A prompt that leaves the model no positions for its answer."""


class PromptEncoder(PlainText):
    """Prompts as ids. A user's words are encoded as plain text: `<I5>` or `<|im_end|>` in a caption are seven or more
    letters, never the token of that name, so that nobody can end a turn or draw from inside a caption.

    Implements `models.base.PromptReader`."""

    token_guided = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: ImageVocabulary,
        positions: int,
        canvas: Canvas,
    ) -> None:
        """Take the language model's `positions`, for prompt and answer together, and the sizes of its pictures."""
        super().__init__(tokenizer)
        self.vocabulary = vocabulary
        self.positions = positions
        self.image_tokens = canvas.tokens
        self.thought_room = positions - canvas.tokens
        self._canvas = canvas
        self.pad = tokenizer.pad_token_id or 0
        before, self._after = _chat_frame(tokenizer)
        self._frame = self.frame(before, self._after)

    def canvas(self, prompt: Prompt) -> Canvas:
        """Return the sizes of every picture that the model draws."""
        return self._canvas

    def longest(self, prompts: Sequence[Prompt]) -> int:
        """Count the ids of the longest prompt, or of one of the longest texts where there are many."""
        return max(
            len(
                self.encode(prompt.text, "edit" if prompt.columns.get("reference") is not None else "caption")
            )
            for prompt in sorted(prompts, key=lambda prompt: len(prompt.text))[-100:]
        )

    def require(self, prompts: Iterable[Prompt], questions: bool = False) -> None:
        """Ask of every prompt, a question or else what a picture is drawn of, whether the model can read it.

        Raises ImageRLError that begins with the place of the first one that it cannot, PromptTooLong for its length."""
        for prompt in prompts:
            edit = prompt.columns.get("reference") is not None
            try:
                self.encode(prompt.text, "question" if questions else "edit" if edit else "caption")
            except ImageRLError as error:
                raise type(error)(f"{prompt.place}: {error}") from None

    def encode(self, text: str, kind: Kind) -> list[int]:
        """Encode one prompt, with no particular picture's tokens. Raises ImageRLError for what the model cannot
        read."""
        if kind == "caption":
            return self.captions([text])[0]
        picture = torch.zeros(1, self.image_tokens, dtype=torch.long)
        return (self.edits if kind == "edit" else self.questions)([text], picture)[0]

    def captions(self, texts: Sequence[str]) -> Rows:
        """Encode text-to-image prompts, each ending in `<im_start><S0>`."""
        require_words(texts, "prompt", "a caption")
        rows = [self.framed(self._frame, REQUEST.format(caption=text)) + self.image_tags for text in texts]
        return self._fitting(rows, texts, self.image_tokens)

    def edits(self, texts: Sequence[str], reference_tokens: Tensor) -> Rows:
        """Encode edit prompts around the references' tokens [P, T], each ending in `<im_start><S0>`."""
        require_words(texts, "prompt", "an instruction")
        frame = self._frame
        rows = [
            frame.head
            + self.plain(frame.lead + EDIT.format(instruction=text))
            + picture
            + self.ids(self._after)
            + self.image_tags
            for text, picture in zip(texts, self._pictures(reference_tokens, len(texts)), strict=True)
        ]
        return self._fitting(rows, texts, self.image_tokens)

    def questions(self, texts: Sequence[str], picture_tokens: Tensor) -> Rows:
        """Encode questions about pictures of tokens [P, T], each ending where the answer starts. The picture stands
        before the words."""
        require_words(texts, "question", "words")
        frame = self._frame
        rows = [
            frame.head + self.plain(frame.lead) + picture + self.plain(f"\n{text}{frame.trail}") + frame.tail
            for text, picture in zip(texts, self._pictures(picture_tokens, len(texts)), strict=True)
        ]
        return self._fitting(rows, texts, 0)

    def _fitting(self, rows: Rows, texts: Sequence[str], drawn: int) -> Rows:
        """Return the rows. Raises PromptTooLong when one leaves no positions for the `drawn` tokens of a picture."""
        limit = self.positions - drawn
        for row, text in zip(rows, texts, strict=True):
            if len(row) > limit:
                less = f", less {drawn} for the picture" if drawn else ""
                raise PromptTooLong(
                    f'"{" ".join(text[:40].split())}..." is {len(row)} tokens long with the chat template, and the '
                    f"model takes {limit} (it has {self.positions} positions{less}); shorten it"
                )
        return rows

    def answers(self, texts: Sequence[str]) -> Rows:
        """Encode the model's answers: the words and the end of its turn."""
        return [[*self.plain(text), self.id_of(TURN_END)] for text in texts]

    @cached_property
    def thought_ids(self) -> list[int]:
        """The ids that a thought is made of: text, no named token but the one that begins a picture, which ends the
        thought. It is the last."""
        named = set(self.ids_of_names.values())
        return [
            *(n for n in range(len(self.tokenizer)) if n not in named),
            self.vocabulary.image_start_tag_id,
        ]

    @property
    def image_tags(self) -> list[int]:
        return [self.vocabulary.image_start_tag_id, self.vocabulary.scale_start_token_id]

    def _pictures(self, tokens: Tensor, count: int) -> Rows:
        if tokens.ndim != 2 or len(tokens) != count:
            raise ImageRLError(
                f"{count} prompts need picture tokens of shape [{count}, T], not {list(tokens.shape)}"
            )
        start, end = self.id_of(PICTURE_START), self.id_of(PICTURE_END)
        first = self.vocabulary.image_start_token_id
        return [[start, *(first + token for token in row), end] for row in tokens.tolist()]

    def id_of(self, name: str) -> int:
        id_ = self.ids_of_names.get(name)
        if id_ is None:
            raise ImageRLError(
                f"this model's text tokenizer has no {name}: it cannot read pictures; use a model trained to edit"
            )
        return int(id_)


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the chat template's text before and after the user's words, up to where the model goes on.

    Raises ImageRLError when there is no template, or it does not show the user's words exactly once."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": MARK}]
    try:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may fail in any way
        raise ImageRLError(
            "the model's text tokenizer has no chat template that works; copy it from the base model"
        ) from error
    before, *after = prompt.split(MARK)
    if len(after) != 1:
        raise ImageRLError(
            f"the chat template of the model's text tokenizer shows the user's words {len(after)} times, not once"
        )
    return before, after[0]


def require_words(texts: Sequence[str], what: str, needed: str) -> None:
    for text in texts:
        if not text.strip():
            raise ImageRLError(f"a {what} is empty; every {what} needs {needed}")


def canvas_of(config: Mapping[str, Any]) -> Canvas:
    """Return the sizes of the pictures that a config in our form describes."""
    rows, columns = config["latent_size"]
    pixels = 2 ** (len(config["vae"]["encoder_block_out_channels"]) - 1)  # of a side that a latent stands for
    latents = (int(config["sana"]["in_channels"]), rows, columns)
    tokens = int(config["num_image_positions"])
    return Canvas(tokens, (rows * pixels, columns * pixels), latents, token_grid(config, tokens))


def token_grid(config: Mapping[str, Any], tokens: int) -> tuple[int, int] | None:
    """Return the rows and columns of a picture's tokens: those of our own tokenizer, else a square as TA-Tok's."""
    own = config.get("image_tokenizer")
    if own:
        (height, width), (down, across) = own["image_size"], own["patch"]
        grid = height // down, width // across
    else:
        grid = math.isqrt(tokens), math.isqrt(tokens)
    return grid if grid[0] * grid[1] == tokens else None
