"""Reads pictures as one line of text each: the PP-OCR recogniser run by ONNX Runtime without PaddleOCR around it.

Same arithmetic as PaddleOCR's `TextRecognition`, so the same texts and scores, without its start-up and its
machinery around every picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HEIGHT = 48  # pixels, to which the recogniser scales every line
MAX_WIDTH = 3200  # pixels; wider lines are squeezed
BLANK = 0  # the CTC class of no character

_levels = np.arange(256, dtype=np.float32) / np.float32(255)
NORMALISED = (_levels - np.float32(0.5)) / np.float32(
    0.5
)  # [256] value of each byte, rounded as PaddleOCR does


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text and the mean probability of its characters."""

    text: str
    confidence: float


def to_canvas(image: np.ndarray, width: int) -> np.ndarray:
    """The network's input [1, 3, HEIGHT, W] float32 in [-1, 1] of a BGR picture [H, W, 3] uint8.

    It is scaled to HEIGHT and padded with zeros on the right, to `width` or its own width if that is more."""
    import cv2

    height, own_width = image.shape[:2]
    canvas_width = min(int(HEIGHT * max(width / HEIGHT, own_width / height)), MAX_WIDTH)
    scaled_width = min(math.ceil(HEIGHT * (own_width / height)), canvas_width)
    scaled = cv2.resize(image, (scaled_width, HEIGHT))
    canvas = np.zeros((1, 3, HEIGHT, canvas_width), dtype=np.float32)
    canvas[0, :, :, :scaled_width] = NORMALISED[scaled.transpose(2, 0, 1)]
    return canvas


def decode(probabilities: np.ndarray, characters: Sequence[str]) -> Line:
    """The best path of a CTC output [T, K]: repeats merged, blanks dropped. Its confidence is the mean
    probability of the characters kept, 0 without any."""
    best = probabilities.argmax(axis=-1)  # [T]
    kept = best != BLANK
    kept[1:] &= best[1:] != best[:-1]
    if not kept.any():
        return Line("", 0.0)
    certainty = probabilities[np.flatnonzero(kept), best[kept]]
    return Line("".join(characters[index] for index in best[kept]), float(np.mean(certainty)))


def open_model(onnx: Path, threads: int) -> Any:
    """A session of ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])


def characters_of(model: Any) -> list[str]:
    """The characters of a recogniser that names them in its metadata, as those of `rapidocr` do, in order."""
    return model.get_modelmeta().custom_metadata_map["character"].split("\n")


class LineReader:
    """A recogniser that reads."""

    def __init__(self, model: Any, width: int) -> None:
        self._session = model
        self._input = model.get_inputs()[0].name
        self._characters = ["", *characters_of(model), " "]  # the blank stands first
        self._width = width

    def __call__(self, image: np.ndarray) -> Line:
        """What a BGR picture [H, W, 3] uint8 says."""
        output = self._session.run(None, {self._input: to_canvas(image, self._width)})[0]
        return decode(output[0], self._characters)
