"""Run PaddleOCR on ONNX Runtime, with weights that need no download when the `rapidocr` wheel is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagerl.rewards.pictures import decoded
from imagerl.rl.errors import why
from imagerl.rl.types import ImageRLError

DETECTOR, RECOGNISER = "PP-OCRv6_small_det", "PP-OCRv6_small_rec"
FULL_WIDTH = 320  # pixels, the recogniser's own canvas
HEIGHT = 48  # pixels, to which the recogniser scales every line


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text and the mean probability of its characters."""

    text: str
    confidence: float
    centres: tuple[tuple[float, float], ...] = ()  # x, y of each character, in [0, 1] of the picture


def wheel_models() -> Path | None:
    """Return the folder with the ONNX weights inside the `rapidocr` wheel, found without importing it."""
    spec = importlib.util.find_spec("rapidocr")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if all((Path(place) / "models" / name).is_file() for name in _WHEEL_FILES.values()):
            return Path(place) / "models"
    return None


_WHEEL_FILES = {DETECTOR: "PP-OCRv6_det_small.onnx", RECOGNISER: "PP-OCRv6_rec_small.onnx"}


def _detector_config() -> dict[str, object]:
    return {
        "Global": {"model_name": DETECTOR},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"DetResizeForTest": {"resize_long": 960}},
                {
                    "NormalizeImage": {
                        "mean": [0.485, 0.456, 0.406],
                        "std": [0.229, 0.224, 0.225],
                        "order": "hwc",
                        "scale": "1./255.",
                    }
                },
                {"ToCHWImage": None},
                {"KeepKeys": {"keep_keys": ["image", "shape", "polys", "ignore_tags"]}},
            ]
        },
        "PostProcess": {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.6, "unclip_ratio": 1.5},
    }


def characters_of(onnx: Path) -> list[str]:
    """Return the characters of a recogniser that names them in its metadata, as those of `rapidocr` do, in order."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map["character"].split("\n")


def _recogniser_config(onnx: Path, width: int) -> dict[str, object]:
    return {
        "Global": {"model_name": RECOGNISER},
        "PreProcess": {
            "transform_ops": [
                {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                {"RecResizeImg": {"image_shape": [3, HEIGHT, width]}},
                {"KeepKeys": {"keep_keys": ["image", "label_ctc"]}},
            ]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": characters_of(onnx)},
    }


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagerl" / "paddleocr"


def _write_model_folder(folder: Path, onnx: Path, model: str, width: int) -> None:
    import yaml

    config = _detector_config() if model == DETECTOR else _recogniser_config(onnx, width)
    shutil.copyfile(onnx, folder / "inference.onnx")
    with open(folder / "inference.yml", "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file, allow_unicode=True)


def model_folder(weights: Path, model: str, width: int = FULL_WIDTH) -> Path:
    """Return a folder with `inference.onnx` and `inference.yml` as PaddleOCR wants them, made once per user.

    It is built beside its place and renamed into it, so that processes starting together never see half of
    one. Where the cache cannot be written it is a temporary folder."""
    onnx = weights / _WHEEL_FILES[model]
    config_version = 1  # raise it when the written configuration changes
    key = hashlib.sha256(onnx.read_bytes() + f"{width} {config_version}".encode()).hexdigest()[:16]
    folder = _cache_root() / f"{model}-{key}"

    def complete() -> bool:
        copy = folder / "inference.onnx"
        return (
            (folder / "inference.yml").is_file()
            and copy.is_file()
            and copy.stat().st_size == onnx.stat().st_size
        )

    if complete():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        built = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError:
        built = Path(tempfile.mkdtemp(prefix=f"imagerl-{folder.name}-"))
        _write_model_folder(built, onnx, model, width)
        return built
    try:
        _write_model_folder(built, onnx, model, width)
        if folder.exists() and not complete():
            shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)
    except OSError:
        if not complete():  # not merely another process that was faster
            raise
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return folder


class OCREngine:
    """Reads pictures. `mode="full"` finds lines and reads them; `mode="recognise"` reads the whole picture as
    one line, three times as fast and right for pictures of one word.

    `models="offline"` takes the weights of the `rapidocr` wheel, "download" lets PaddleOCR fetch its own,
    "auto" downloads only when the wheel is missing. `threads` is ONNX Runtime's count per picture.
    `recognition_width` (pixels at 48 pixels of height, recognise mode) is the least canvas a picture is
    padded to: smaller is faster, wider pictures are never squeezed.

    `characters` are those that it can read; None when they are not known, as with downloaded models.

    Raises ImageRLError when PaddleOCR or ONNX Runtime is missing or the models cannot be loaded."""

    def __init__(
        self, *, mode: str = "full", models: str = "auto", threads: int = 1, recognition_width: int = 160
    ) -> None:
        if mode not in ("full", "recognise"):
            raise ImageRLError(f"reward 'ocr': mode must be full or recognise, not {mode!r}")
        if models not in ("auto", "offline", "download"):
            raise ImageRLError(f"reward 'ocr': models must be auto, offline or download, not {models!r}")
        if recognition_width < HEIGHT:
            raise ImageRLError(
                f"reward 'ocr': recognition_width must be at least {HEIGHT}, not {recognition_width}"
            )
        for package in ("paddleocr", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise ImageRLError(f"reward 'ocr' needs {package}; install it with: pip install {package}")
        weights = None if models == "download" else wheel_models()
        if models == "offline" and weights is None:
            raise ImageRLError(
                "reward 'ocr': models=offline needs the weights in: pip install rapidocr==3.10.0"
            )
        self.mode = mode
        if weights is not None:
            # Must be set before paddleocr is imported: it looks for its model hosts on import.
            os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
        self.characters: frozenset[str] | None = None
        try:
            if weights is not None:
                self.characters = frozenset(characters_of(weights / _WHEEL_FILES[RECOGNISER]))
            self._engine = self._build(weights, threads, recognition_width)
        except Exception as error:
            raise ImageRLError(f"reward 'ocr': PaddleOCR could not load its models ({why(error)})") from error

    def _build(self, weights: Path | None, threads: int, width: int) -> Any:
        import paddleocr

        run: dict[str, object] = {"engine": "onnxruntime", "device": "cpu"}
        run["engine_config"] = {"intra_op_num_threads": threads}
        if self.mode == "recognise":
            folder = str(model_folder(weights, RECOGNISER, width)) if weights else None
            return paddleocr.TextRecognition(model_name=RECOGNISER, model_dir=folder, **run)
        return paddleocr.PaddleOCR(
            text_detection_model_name=DETECTOR,
            text_detection_model_dir=str(model_folder(weights, DETECTOR)) if weights else None,
            text_recognition_model_name=RECOGNISER,
            text_recognition_model_dir=str(model_folder(weights, RECOGNISER)) if weights else None,
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
            text_recognition_batch_size=1,
            **run,
        )

    def read(self, images: Sequence[Image.Image]) -> list[list[Line]]:
        """Return the lines of each picture, top to bottom. A picture's result depends on that picture alone:
        it is run as a batch of one, since padding to a common width and the kernels picked by batch size both
        change the numbers, while a larger batch is no faster on a CPU.

        Raises ValueError for a picture that cannot be decoded or has no pixels."""
        pictures = decoded(images)
        for number, picture in enumerate(pictures, 1):
            if not picture.width * picture.height:
                raise ValueError(f"picture {number} is empty: {picture.width}×{picture.height} pixels")
        if not pictures:
            return []
        arrays = [np.ascontiguousarray(np.asarray(picture)[:, :, ::-1]) for picture in pictures]  # BGR
        if self.mode == "recognise":
            results = self._engine.predict(arrays, batch_size=1, return_word_box=True)
            return [[_recognised(result["rec_text"], float(result["rec_score"]))] for result in results]
        return [
            [
                Line(text, float(score), _along(box, len(text), picture.size))
                for text, score, box in zip(
                    result["rec_texts"], result["rec_scores"], result["rec_polys"], strict=True
                )
            ]
            for result, picture in zip(self._engine.predict(arrays), pictures, strict=True)
        ]


def _recognised(read: tuple[str, Sequence[Any]] | str, confidence: float) -> Line:
    """Return the line that fills a picture. PaddleOCR tells how many columns of the recogniser's output the picture
    has, and at which of them it read each character but white space."""
    if isinstance(read, str):
        return Line(read, confidence)
    text, (columns, _, words, _) = read
    places = iter([(column + 0.5) / columns for word in words for column in word])
    centres: list[tuple[float, float]] = []
    for character in text:
        x = centres[-1][0] if character.isspace() and centres else next(places, None)
        if x is None:
            return Line(text, confidence, _along([[0, 0], [1, 0], [1, 1], [0, 1]], len(text)))
        centres.append((min(x, 1.0), 0.5))
    return Line(text, confidence, tuple(centres))


def _along(corners: Any, count: int, size: tuple[int, int] = (1, 1)) -> tuple[tuple[float, float], ...]:
    """Spread characters evenly over a line, whose corners are given in pixels, clockwise from the upper left."""
    upper_left, upper_right, lower_right, lower_left = np.asarray(corners, dtype=np.float64) / size
    start, end = (upper_left + lower_left) / 2, (upper_right + lower_right) / 2
    return tuple(
        (float(x), float(y)) for x, y in (start + (end - start) * (n + 0.5) / count for n in range(count))
    )
