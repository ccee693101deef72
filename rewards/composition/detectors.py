"""Find objects in photographs: open-vocabulary detectors of transformers, and colours by a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from imagerl.rewards.clip.memory import Remembered
from imagerl.rewards.clip.models import ClipModel
from imagerl.rewards.composition.rule import COLOURS, Found, without_overlaps
from imagerl.rewards.hub import device_of, model_source
from imagerl.rl.errors import why
from imagerl.rl.types import ImageRLError

TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
QUERIES = {
    "owlv2": "a photo of a {}",
    "owlvit": "a photo of a {}",
}  # as these were trained; others: "a bench."


class Detector(Protocol):
    """Finds objects of the named classes in each picture, above its own threshold."""

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]
    ) -> list[dict[str, list[Found]]]: ...


class OpenVocabularyDetector:
    """OWLv2, OWL-ViT, Grounding DINO and their kin, from a folder or by a hub name.

    A picture is looked at once for each class, so that no class can take another's boxes. Of boxes that overlap by
    `max_overlap` (intersection over union) or more, the most confident is kept.

    Raises ImageRLError in one line: no such folder, or something else in it."""

    def __init__(
        self, model: str, threshold: float, max_overlap: float, device: str = "auto", batch_size: int = 16
    ) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        source, local = model_source(model, "composition", "detector")
        try:
            self._model = AutoModelForZeroShotObjectDetection.from_pretrained(source, **local)
            self._processor = AutoProcessor.from_pretrained(source, **local)
        except Exception as error:  # the hub's client, safetensors, and whatever a configuration may hold
            raise ImageRLError(
                f"reward 'composition': detector {model} cannot be loaded ({why(error)})"
            ) from error
        self._device = device_of(device, "composition")
        self._model.to(self._device).eval().requires_grad_(False)
        self._threshold, self._max_overlap, self._batch_size = threshold, max_overlap, batch_size

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]]
    ) -> list[dict[str, list[Found]]]:
        asked = [(index, name) for index, names in enumerate(classes) for name in names]
        found: list[dict[str, list[Found]]] = [{} for _ in images]
        for start in range(0, len(asked), self._batch_size):
            part = asked[start : start + self._batch_size]
            for (index, name), objects in zip(part, self._look(images, part), strict=True):
                found[index][name] = without_overlaps(objects, self._max_overlap)
        return found

    def _look(self, images: Sequence[Image.Image], asked: Sequence[tuple[int, str]]) -> list[list[Found]]:
        query = QUERIES.get(self._model.config.model_type, "a {}.")
        pictures = [images[index] for index, _ in asked]
        texts: list[object] = [query.format(name) for _, name in asked]
        if self._model.config.model_type in QUERIES:
            texts = [[text] for text in texts]
        inputs = self._processor(images=pictures, text=texts, padding=True, return_tensors="pt").to(
            self._device
        )
        with torch.inference_mode():
            outputs = self._model(**inputs)
        more = {} if self._model.config.model_type in QUERIES else {"input_ids": inputs["input_ids"]}
        results = self._processor.post_process_grounded_object_detection(
            outputs,
            threshold=self._threshold,
            target_sizes=[(picture.height, picture.width) for picture in pictures],
            **more,
        )
        return [
            [
                Found(box, score)
                for box, score in zip(
                    _within(result["boxes"].tolist(), picture.size), result["scores"].tolist(), strict=True
                )
                if box[0] < box[2] and box[1] < box[3]
            ]
            for result, picture in zip(results, pictures, strict=True)
        ]


class ClipColours:
    """Names the colour of objects: which of ten a crop is nearest to, by the mean of three captions, as GenEval."""

    def __init__(self, model: ClipModel) -> None:
        self._model = model
        self._captions = Remembered(self._of_class)

    def __call__(self, image: Image.Image, objects: Sequence[Found], name: str) -> list[str]:
        crops = [_crop(image, found.box) for found in objects]
        captions = self._captions([name], [name])[0]  # [colours, D]
        nearest = (self._model.encode_pictures(crops) @ captions.T).argmax(dim=-1)
        return [COLOURS[index] for index in nearest.tolist()]

    def _of_class(self, names: Sequence[str]) -> torch.Tensor:
        """Return [classes, colours, D], of length 1."""
        texts = [
            template.format(colour=colour, name=name)
            for name in names
            for colour in COLOURS
            for template in TEMPLATES
        ]
        features = self._model.encode_captions(texts).unflatten(0, (len(names), len(COLOURS), len(TEMPLATES)))
        return torch.nn.functional.normalize(features.mean(dim=2), dim=-1)


def _within(
    boxes: Sequence[Sequence[float]], size: tuple[int, int]
) -> list[tuple[float, float, float, float]]:
    """Cut boxes off at the rim of a picture: OWLv2 looks at a square that may reach beyond it."""
    return [
        (max(0.0, box[0]), max(0.0, box[1]), min(float(size[0]), box[2]), min(float(size[1]), box[3]))
        for box in boxes
    ]


def _crop(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """Return the part of a picture in a box, at least a pixel."""
    left, top = (max(0, min(int(low), size - 1)) for low, size in zip(box[:2], image.size, strict=True))
    right, bottom = (
        min(size, max(round(high), low + 1))
        for high, low, size in zip(box[2:], (left, top), image.size, strict=True)
    )
    return image.crop((left, top, right, bottom))
