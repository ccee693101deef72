"""Score pictures by a vision-language model with a reward head, as HPSv3 (arXiv 2508.03789) and EditReward (arXiv
2509.26346): the hidden state of a special token behind the question goes through a small network, whose first number
is the reward; the second is its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from imagerl.rewards.clip.heads import linear_layers
from imagerl.rewards.hub import device_of, load_exactly, model_source, read_tensors, weights_file
from imagerl.rewards.pictures import decoded
from imagerl.rl.errors import ImageRLError, why
from imagerl.rl.files.bounds import Count
from imagerl.rl.files.reading import read_text
from imagerl.rl.types import RewardOutput

SPECIAL = "<|Reward|>"
PIXELS = 256 * 28 * 28  # every picture is scaled to about as many
MOST_BYTES = 100_000  # of a question
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n{}"
ANSWER = "<|im_start|>assistant\n"


class VLMReward:
    """The mean reward of the heads of a model of the Qwen2-VL family for a picture and its prompt; each head's is a
    part, `head_0`, and so is its uncertainty, `sigma_0` (natural logarithm, as the model gives it).

    `weights` is the file that its authors give out, here or as owner/repository/file on the hub; `base` a folder or hub
    name with configuration, tokenizer and picture processor of the model that it was trained from. `questions` names a
    text file for each head: what it was asked in training, word for word, with {prompt} for the caption and
    <|Reward|> where the reward is read. `source` shows the picture to be edited first (column `reference`; None there
    is not applicable).

    Raises ImageRLError when something cannot be loaded, or a question lacks one of the two."""

    __name__ = "vlm"

    def __init__(
        self,
        weights: str,
        base: str,
        questions: Sequence[str],
        source: bool = False,
        pixels: int = PIXELS,
        device: str = "auto",
        batch_size: Count = 8,
    ) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

        self._questions = [read_text(Path(path), MOST_BYTES) for path in questions]
        for path, text in zip(questions, self._questions, strict=True):
            if "{prompt}" not in text or text.count(SPECIAL) != 1:
                raise ImageRLError(f"reward 'vlm': {path} must hold {{prompt}} and, once, {SPECIAL}")
        self._source, self._batch = source, batch_size
        self._device = device_of(device, "vlm")
        state = {
            _today(name): value for name, value in read_tensors(weights_file(weights, "vlm"), "vlm").items()
        }
        heads = {name: state.pop(name) for name in [*state] if name.startswith("rm_head")}
        state.pop("lm_head.weight", None)
        single = [name for name in heads if name.startswith("rm_head.")]
        prefixes = ["rm_head."] if single else [f"rm_heads.head_{index}." for index in range(len(questions))]
        self._heads = [
            linear_layers({n.removeprefix(prefix): v for n, v in heads.items() if n.startswith(prefix)})
            for prefix in prefixes
        ]
        embeddings = state.get("language_model.embed_tokens.weight")
        if embeddings is None or not all(self._heads) or len(self._heads) != len(questions):
            raise ImageRLError(
                f"reward 'vlm': {weights} holds no model with {len(questions)} reward heads, as many as questions"
            )
        place, local = model_source(base, "vlm", "base")
        try:
            config = AutoConfig.from_pretrained(place, **local)
            self._tokenizer = AutoTokenizer.from_pretrained(place, **local)
            # Pillow's arithmetic, whether torchvision is there or not.
            self._processor = AutoImageProcessor.from_pretrained(place, backend="pil", **local)
            config.text_config.vocab_size = len(embeddings)
            with torch.device(self._device):
                self._model = AutoModel.from_config(config, dtype=embeddings.dtype)
        except Exception as error:  # the hub's client, and whatever a folder may hold
            raise ImageRLError(f"reward 'vlm': base {base} cannot be loaded ({why(error)})") from error
        self._tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL]})
        self._special = self._tokenizer.convert_tokens_to_ids(SPECIAL)
        self._size = {"shortest_edge": pixels, "longest_edge": pixels}
        load_exactly(self._model, state, "vlm", weights)
        self._model.eval().requires_grad_(False)

    def __call__(
        self,
        *,
        prompts: Sequence[str],
        images: Sequence[Image.Image],
        reference: Sequence[Image.Image | None] | None = None,
        **_: object,
    ) -> RewardOutput:
        if self._source and reference is None:
            raise ImageRLError("reward 'vlm' with source needs the column reference in the prompt set")
        before: Sequence[object] = reference if self._source and reference is not None else [()] * len(images)
        rows = [row for row, picture in enumerate(before) if picture is not None]
        shown = [decoded([before[row], images[row]] if self._source else [images[row]]) for row in rows]
        names = [f"{kind}_{index}" for index in range(len(self._heads)) for kind in ("head", "sigma")]
        parts: dict[str, list[float | None]] = {name: [None] * len(images) for name in names}
        values: list[float | None] = [None] * len(images)
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            scores = self._score([prompts[row] for row in part], shown[start : start + self._batch])
            for row, told in zip(part, scores.tolist(), strict=True):  # [heads, 2]
                values[row] = sum(mu for mu, _ in told) / len(told)
                for name, value in zip(names, [number for pair in told for number in pair], strict=True):
                    parts[name][row] = value
        return RewardOutput(values, parts, None if len(rows) == len(images) else "a sample has no reference")

    @torch.inference_mode()
    def _score(self, prompts: Sequence[str], shown: Sequence[Sequence[Image.Image]]) -> Tensor:
        """Return [B, heads, 2] of some prompts with their pictures."""
        seen = self._processor(
            images=[picture for pictures in shown for picture in pictures],
            size=self._size,
            return_tensors="pt",
        ).to(self._device)
        merged = self._model.config.vision_config.spatial_merge_size**2
        places = (seen["image_grid_thw"].prod(dim=-1) // merged).tolist()
        scores = []
        for question, head in zip(self._questions, self._heads, strict=True):
            counts = iter(places)
            texts = []
            for prompt, pictures in zip(prompts, shown, strict=True):
                pads = (PICTURE.replace("<|image_pad|>", "<|image_pad|>" * next(counts)) for _ in pictures)
                texts.append(
                    CHAT.format("".join(pads) + question.replace("{prompt}", _plain(prompt)), ANSWER)
                )
            words = self._tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(
                self._device
            )
            positions = words["attention_mask"].cumsum(-1) - 1
            hidden = self._model(
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
                # One behind the other, as its public code has them: it never tells the model where the pictures are.
                position_ids=positions.clamp(min=0).expand(3, -1, -1),
                pixel_values=seen["pixel_values"].to(self._model.dtype),
                image_grid_thw=seen["image_grid_thw"],
            ).last_hidden_state
            last = hidden[words["input_ids"] == self._special].float().cpu()  # [B, D]
            for index, (weight, bias) in enumerate(head):
                last = nn.functional.linear(last.relu() if index else last, weight, bias)
            scores.append(last[:, :2])
        return torch.stack(scores, dim=1)


def _plain(prompt: str) -> str:
    """Take from a prompt what would be read as the special token or as a picture."""
    return prompt.replace("<|", "< |")


def _today(name: str) -> str:
    """Return transformers' present name of a weight within the model: files of 2025 have two older ones."""
    name = name.removeprefix("model.")
    if name.startswith(("visual.", "language_model.", "rm_head", "lm_head")):
        return name
    return f"language_model.{name}"
