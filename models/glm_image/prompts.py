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
        self._named = [token for token in processor.tokenizer.get_added_vocab() if token]

    def size(self, prompt: Prompt) -> Size:
        """Return the size that a prompt asks for. Raises ImageRLError for one that the model cannot draw."""
        return size_of(prompt.columns, self.default_size)

    def canvas(self, prompt: Prompt) -> Canvas:
        """Return the sizes of a picture of a prompt."""
        size = self.size(prompt)
        noise = self.channels, size.height // self.compression, size.width // self.compression
        return Canvas(size.tokens("reference" in prompt.columns), (size.height, size.width), noise)

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
        for token in self._named:
            if token in prompt.text:
                raise ImageRLError(
                    f"the prompt holds {token}, which is a token of the model's own; write it otherwise"
                )
        size, edit = self.size(prompt), "reference" in prompt.columns
        length = self.longest([prompt]) + size.tokens(edit)
        if length > self.positions:
            raise ImageRLError(
                f"the prompt and its picture are {length} tokens long, and the model has {self.positions} positions; "
                "shorten the one or the other"
            )

    def longest(self, prompts: Sequence[Prompt]) -> int:
        """Count the ids of the longest prompt, its grids included. A picture to edit counts as one of the same size."""
        texts = sorted(prompts, key=lambda prompt: len(prompt.text))[-100:]
        return max(
            len(self.encode([text], None)["input_ids"][0])
            + (size.large[0] * size.large[1] if "reference" in text.columns else 0)
            for text in texts
            for size in [self.size(text)]
        )

    def encode(self, prompts: Sequence[Prompt], pictures: Sequence[Any] | None) -> Mapping[str, Any]:
        """Return the processor's `input_ids`, `attention_mask` [P, L], `image_grid_thw` and `images_per_sample` of
        prompts of one size; with `pictures` to edit also their `pixel_values`."""
        height, width = self.size(prompts[0])
        messages = []
        for row, prompt in enumerate(prompts):
            content: list[dict[str, Any]] = [{"type": "text", "text": prompt.text}]
            if pictures is not None:
                content.insert(0, {"type": "image", "image": pictures[row]})
            messages.append([{"role": "user", "content": content}])
        settings = {"padding": True, "target_h": height, "target_w": width, "return_tensors": "pt"}
        encoded: Mapping[str, Any] = self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, processor_kwargs=settings
        )
        return encoded
