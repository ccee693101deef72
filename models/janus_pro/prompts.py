"""Prompts as `JanusProcessor` makes them, without weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from imagerl.models.common.policy import Frame, PlainText
from imagerl.rl.types import Canvas, ImageRLError, Prompt

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusProcessor

MARK = "\ue000"  # a private-use character, where the chat template puts the user's words


def canvas_of(config: JanusConfig) -> Canvas:
    """Return the sizes of every picture that a model draws: its VQ decoder needs no noise."""
    grid, halvings = config.vq_config.num_patches, len(config.vq_config.channel_multiplier) - 1
    return Canvas(grid * grid, (grid << halvings, grid << halvings), None, (grid, grid))


class JanusPrompts:
    """Captions and questions as ids; a user's words are plain text. Implements `models.base.PromptReader`."""

    token_guided = True
    thought_room = 0

    def __init__(self, config: JanusConfig, processor: JanusProcessor) -> None:
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.positions = int(config.text_config.max_position_embeddings)
        self._canvas = canvas_of(config)
        self._text = PlainText(self.tokenizer)
        self._start = self.tokenizer("")["input_ids"]  # what stands before every text
        self.pad = int(self.tokenizer.pad_token_id)
        probe = "a red sign"
        whole = processor(text=[self._rendered(probe, picture=False)], generation_mode="image")["input_ids"]
        if list(map(int, whole[0])) != self.caption(probe):
            raise ImageRLError(
                "the model's text tokenizer encodes a text otherwise than its parts; copy the model again"
            )

    def _rendered(self, words: str, picture: bool) -> str:
        """Return the chat template's text around a user's words."""
        content: list[dict[str, str]] = [{"type": "image"}] if picture else []
        message = {"role": "user", "content": [*content, {"type": "text", "text": words}]}
        try:
            return str(self.processor.apply_chat_template([message], add_generation_prompt=True))
        except Exception as error:  # a template may fail in any way
            raise ImageRLError(
                "the model's folder has no chat template that works; copy chat_template.jinja from the hub's model"
            ) from error

    @cache  # noqa: B019  of two kinds, which live as long as their prompts
    def _frame(self, picture: bool) -> tuple[str, str, Frame]:
        """Return what stands before and after a user's words in the chat template, and around them in a whole prompt: a
        caption, or a question about a picture."""
        before, *rest = self._rendered(MARK, picture).split(MARK)
        if len(rest) != 1:
            raise ImageRLError(
                f"the model's chat template shows the user's words {len(rest)} times, not once"
            )
        (after,), processor = rest, self.processor
        if not picture:
            return before, after, self._text.frame(before, after + processor.image_start_token)
        from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

        system = DEFAULT_SYSTEM_PROMPT if processor.use_default_system_prompt else ""
        places = processor.image_token * processor.num_image_tokens
        shown = f"{processor.image_start_token}{places}{processor.image_end_token}"
        return before, after, self._text.frame(system + before.replace(processor.image_token, shown), after)

    def _framed(self, words: str, picture: bool) -> list[int]:
        before, after, frame = self._frame(picture)
        rendered = self._rendered(words, picture)  # the template may strip the words
        words = rendered[len(before) : len(rendered) - len(after)]
        return [*self._start, *self._text.framed(frame, words)]

    def caption(self, words: str) -> list[int]:
        """Encode a caption, up to the begin of the image."""
        return self._framed(words, picture=False)

    def question(self, words: str) -> list[int]:
        """Encode a question about a picture, whose places come before the words, up to the begin of the answer."""
        return self._framed(words, picture=True)

    def canvas(self, prompt: Prompt) -> Canvas:
        return self._canvas

    def longest(self, prompts: Sequence[Prompt]) -> int:
        longest = sorted(prompts, key=lambda prompt: len(prompt.text))[-100:]
        return max(len(self.caption(prompt.text)) for prompt in longest)

    def require(self, prompts: Iterable[Prompt], questions: bool = False) -> None:
        limit = self.positions - (0 if questions else self._canvas.tokens)
        for prompt in prompts:
            if not prompt.text.strip():
                raise ImageRLError(f"{prompt.place}: a prompt is empty; every prompt needs words")
            if prompt.columns.get("reference") is not None:
                raise ImageRLError(
                    f"{prompt.place}: Janus-Pro does not edit pictures; give captions, or a model that edits"
                )
            length = len(self.question(prompt.text) if questions else self.caption(prompt.text))
            if length > limit:
                raise ImageRLError(
                    f'{prompt.place}: "{" ".join(prompt.text[:40].split())}..." is {length} tokens long with the '
                    f"chat template, and the model takes {limit}; shorten it"
                )
