"""The recogniser without PaddleOCR around it: by hand, and against PaddleOCR itself."""

import numpy as np
import pytest
from PIL import Image

from rewards.ocr_engine import RECOGNISER, OCREngine, model_folder, wheel_models
from rewards.ocr_lines import NORMALISED, decode, to_canvas
from rl import tiny_world


def test_decode_by_hand() -> None:
    best = [0, 1, 1, 0, 1, 2, 2, 0]  # blank, A, A, blank, A, B, B, blank: "AAB"
    probabilities = np.full((8, 3), 0.1, dtype=np.float32)
    for step, index in enumerate(best):
        probabilities[step, index] = 0.5 + step / 20
    line = decode(probabilities, ["", "A", "B"])
    assert line.text == "AAB"
    assert line.confidence == pytest.approx((0.55 + 0.70 + 0.75) / 3, abs=1e-6)
    assert decode(np.eye(3, dtype=np.float32)[[0, 0]], ["", "A", "B"]).confidence == 0.0


@pytest.mark.parametrize(
    ("size", "width", "shape", "scaled"),
    [
        ((64, 32), 160, (1, 3, 48, 160), 96),
        ((64, 32), 96, (1, 3, 48, 96), 96),
        ((256, 40), 160, (1, 3, 48, 307), 307),  # 48 · 256/40 = 307.2: the canvas is rounded down
        ((10, 100), 48, (1, 3, 48, 48), 5),
        ((7000, 48), 160, (1, 3, 48, 3200), 3200),
    ],
)
def test_canvas(size: tuple[int, int], width: int, shape: tuple[int, ...], scaled: int) -> None:
    canvas = to_canvas(np.full((size[1], size[0], 3), 255, dtype=np.uint8), width)
    assert canvas.shape == shape and canvas.dtype == np.float32
    assert (canvas[..., :scaled] == 1).all() and (canvas[..., scaled:] == 0).all()
    assert NORMALISED[0] == -1 and abs(NORMALISED[51] + 0.6) < 1e-6


def test_says_what_paddleocr_says() -> None:
    import paddleocr

    weights = wheel_models()
    assert weights is not None
    pictures = [tiny_world.truth(prompt) for prompt in tiny_world.prompt_set("heldout", 12)]
    pictures += [
        pictures[0].resize((300, 20)),
        pictures[1].crop((0, 0, 20, 32)),
        pictures[2].resize((31, 64)),
    ]
    pictures.append(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)))
    theirs = paddleocr.TextRecognition(
        model_name=RECOGNISER,
        model_dir=str(model_folder(weights, RECOGNISER)),
        engine="onnxruntime",
        engine_config={"intra_op_num_threads": 1},
        device="cpu",
    ).predict([np.asarray(picture)[:, :, ::-1].copy() for picture in pictures], batch_size=1)
    ours = OCREngine(mode="recognise", models="offline", recognition_width=320).read(pictures)
    assert [line.text for [line] in ours] == [result["rec_text"] for result in theirs]
    assert [line.confidence for [line] in ours] == pytest.approx([r["rec_score"] for r in theirs], abs=1e-6)
    assert ours[0][0].text  # something was read at all
