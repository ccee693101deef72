"""Prompts as the library's processor makes them: the user's words and the picture's grids, then the image begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imagerl.models.glm_image.sizes import Size, size_of
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import Canvas, Prompt


class PromptEncoder:
    """Implements `models.base.PromptReader` around a `GlmImageProcessor`."""

    token_guided = False
    thought_room = 0

    def __init__(
        self, processor: Any, positions: int, default_size: Size, channels: int, compression: int
    ) -> None:
        """Read by `processor`; the model has `positions`, draws `default_size` where a prompt names none, and begins
        from latents of `channels`, which stand for `compression` pixels a side."""
        self.processor = processor
        processor.tokenizer.padding_side = "left"
        self.positions = positions
        self.default_size = default_size
        self.channels, self.compression = channels, compression
        self._named = {id_: token for token, id_ in processor.tokenizer.get_added_vocab().items()}

    def size(self, prompt: Prompt) -> Size:
        """Return the size that a prompt asks for. Raises ImageRLError for one that the model cannot draw."""
        return size_of(prompt.columns, self.default_size)

    def canvas(self, prompt: Prompt) -> Canvas:
        """Return the sizes of a picture of a prompt."""
        size = self.size(prompt)
        noise = self.channels, size.height // self.compression, size.width // self.compression
        return Canvas(size.tokens, (size.height, size.width), noise)

    def require(self, prompts: Iterable[Prompt], questions: bool = False) -> None:
        """Raise ImageRLError, which begins with its place, for the first prompt that the model cannot draw by."""
        for prompt in prompts:
            if questions:
                raise ImageRLError("GLM-Image draws pictures and answers no questions; ask another model")
            try:
                self._require(prompt)
            except ImageRLError as error:
                raise ImageRLError(f"{prompt.place}: {error}") from None

    def _require(self, prompt: Prompt) -> None:
        if not prompt.text.strip():
            raise ImageRLError("a prompt is empty; every prompt needs a caption")
        ids = self.processor.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        if named := next((self._named[id_] for id_ in ids if id_ in self._named), None):
            raise ImageRLError(
                f"the prompt holds {named}, which is a token of the model's own; write it otherwise"
            )
        if prompt.columns.get("reference") is not None:
            raise ImageRLError("GLM-Image draws new pictures here; it cannot edit one yet. Remove the column")
        length = self.longest([prompt]) + self.size(prompt).tokens
        if length > self.positions:
            raise ImageRLError(
                f"the prompt and its picture are {length} tokens long, and the model has {self.positions} positions; "
                "shorten the one or the other"
            )

    def longest(self, prompts: Sequence[Prompt]) -> int:
        """Count the ids of the longest prompt, its grids included."""
        texts = sorted(prompts, key=lambda prompt: len(prompt.text))[-100:]
        return max(len(self.encode([text])["input_ids"][0]) for text in texts)

    def encode(self, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
        """Return the processor's `input_ids`, `attention_mask` [P, L], `image_grid_thw` and `images_per_sample` of
        prompts of one size."""
        height, width = self.size(prompts[0])
        messages = [
            [{"role": "user", "content": [{"type": "text", "text": prompt.text}]}] for prompt in prompts
        ]
        settings = {"padding": True, "target_h": height, "target_w": width, "return_tensors": "pt"}
        encoded: Mapping[str, Any] = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, processor_kwargs=settings
        )
        return encoded
