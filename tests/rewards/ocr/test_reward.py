"""The OCR score by hand, and the real PaddleOCR on rendered words."""

import io
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from imagerl.rewards.base import LoadedReward, as_trl_reward
from imagerl.rewards.ocr import engine as ocr_engine
from imagerl.rewards.ocr.engine import RECOGNISER, Line, model_folder, wheel_models
from imagerl.rewards.ocr.reward import (
    OCRReward,
    exact_match,
    join_lines,
    letter_regions,
    quoted_text,
    score_text,
    target_of,
)
from imagerl.rewards.workers.scoring import score_request
from imagerl.rl.data.tiny import world as tiny_world
from imagerl.rl.types import ImageRLError, RewardRequest


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("STOP", "stop", 1.0),
        ("S T O P", "STOP", 1.0),
        ("please stop here", "stop", 1.0),  # a substring is enough
        ("STQP", "STOP", 1 - 1 / 4),
        ("TOP", "STOP", 1 - 1 / 4),
        ("POTS", "STOP", 0.0),  # P-O-T-S to S-T-O-P: 4 edits
        ("", "STOP", 0.0),
        ("a much longer text", "STOP", 0.0),  # capped at 4 of 4
        ("OPEN 24", "open 247", 1 - 1 / 7),
    ],
)
def test_score_text_by_hand(read: str, target: str, score: float) -> None:
    assert score_text(read, target) == pytest.approx(score, abs=1e-12)


def test_blank_target_has_no_score() -> None:
    with pytest.raises(ValueError, match="blank"):
        score_text("x", " ")


@pytest.mark.parametrize(
    ("read", "target"),
    [
        ("Don't walk", "Don’t walk"),  # straight and curly
        ('say "hi"', "say “hi”"),
        ("CAFÉ", "cafe\u0301"),  # composed and decomposed
        ("ＳＴＯＰ！", "stop!"),  # full width
        ("9-17", "9–17"),
        ("STOP", "STOP 🛑"),
        ("STOP", "ST\u200bOP\ufe0f"),  # invisible
        ("止まれ", "止まれ"),
    ],
)
def test_characters_that_look_alike_are_one(read: str, target: str) -> None:
    assert score_text(read, target) == 1.0
    assert exact_match(read, target) == 1.0


def test_letters_stay_apart() -> None:
    assert score_text("O", "0") == 0.0
    assert score_text("cafe", "café") == 0.75
    assert score_text("a.b", "a-b") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("given", "prompt", "text"),
    [
        ("CAT", 'says "DOG"', "CAT"),
        (247, "", "247"),
        (None, 'says "DOG"', "DOG"),
        ("", 'says "DOG"', "DOG"),
        (" ", "says", None),
        ('say "hi"', "", 'say "hi"'),
    ],
)
def test_target_of(given: object, prompt: str, text: str | None) -> None:
    assert target_of(given, prompt) == text


def test_a_target_that_is_no_text_stops_the_run() -> None:
    for wrong in (["A"], True, {"text": "A"}):
        with pytest.raises(ImageRLError, match="the column target must hold texts, not"):
            target_of(wrong, "")


def test_exact_match_does_not_forgive_surroundings() -> None:
    assert exact_match("s Top", "STOP") == 1.0
    assert exact_match("STOPS", "STOP") == 0.0


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "STOP" and "GO"', "STOP"),
        ("a sign that says “Don’t walk” in red", "Don’t walk"),
        ("a sign that says 'STOP' in red", "STOP"),
        ("the dog's bone and the dogs' house", None),
        ("the shop's sign reads 'It's open'", "It's open"),
        ("a ‘rock’ in the sea", "rock"),
        ('a 6" pipe and a 5" pipe', None),
        ('an empty "" sign, then "A"', "A"),
        ("no quotes at all", None),
        ("", None),
        ("ein Schild „HALT“ in Rot", "HALT"),
        ("un panneau « STOP » rouge", " STOP "),
        ("看板「止まれ」", "止まれ"),
    ],
)
def test_quoted_text(prompt: str, text: str | None) -> None:
    assert quoted_text(prompt) == text


def test_confidence_floor() -> None:
    lines = [Line("OPEN", 0.9), Line("xq#", 0.2), Line("24", 0.5)]
    assert join_lines(lines, 0.5) == "OPEN 24"
    assert join_lines(lines, 0.0) == "OPEN xq# 24"


@pytest.fixture(scope="module")
def recognise() -> OCRReward:
    return OCRReward(mode="recognise", models="offline")


@pytest.fixture(scope="module")
def samples() -> tuple[list[Image.Image], list[str]]:
    """64 pictures of the tiny world without O and 0, which no reader tells apart out of context."""
    rng = random.Random(0)
    texts = [text for text in tiny_world.texts("heldout") if not set(text) & set("O0")][:64]
    return [tiny_world.render(tiny_world.random_scene(rng, text)) for text in texts], texts


def test_reads_rendered_words(recognise: OCRReward, samples: tuple[list[Image.Image], list[str]]) -> None:
    images, texts = samples
    output = recognise(prompts=[f'a sign that says "{text}"' for text in texts], images=images)
    assert np.mean([float(x or 0) for x in output.breakdown["exact_match"]]) >= 0.97
    assert np.mean([float(x or 0) for x in output.rewards]) >= 0.98
    assert min(float(x or 0) for x in output.breakdown["confidence"]) > 0.5
    wrong = recognise(
        prompts=[f'a sign that says "{text}"' for text in [*texts[1:], texts[0]]], images=images
    )
    assert np.mean([float(x or 0) for x in wrong.rewards]) < 0.5


def test_result_does_not_depend_on_the_batch(recognise: OCRReward) -> None:
    scenes = [
        tiny_world.Scene(text, "black", "white", tiny_world.FONTS[0]) for text in ("CAT", "HOUSE", "8241")
    ]
    images = [tiny_world.render(scene) for scene in scenes]
    images[1] = images[1].resize((256, 40))  # another shape in the batch would pad the others
    together = recognise.engine.read(images)
    assert together == [recognise.engine.read([image])[0] for image in images]
    assert together[::-1] == recognise.engine.read(images[::-1])


def test_target_column_wins_and_nothing_asked_is_none(recognise: OCRReward) -> None:
    image = tiny_world.render(tiny_world.Scene("CAT", "black", "white", tiny_world.FONTS[0]))
    output = recognise(
        prompts=['says "DOG"', 'says "CAT"', "says nothing"], images=[image] * 3, target=["CAT", None, None]
    )
    assert list(output.rewards) == [1.0, 1.0, None]
    assert list(output.breakdown["exact_match"]) == [1.0, 1.0, None]


@pytest.mark.parametrize(
    ("prompt", "target", "reason"),
    [
        ("a cat", None, "no column target and no quoted text in 'a cat'"),
        ("", " ", "no column target and no quoted text in ''"),
        ("a sign", "🛑", "the target '🛑' holds nothing that can be read"),
        ("a sign", "СТОП", "the OCR model has no character 'с', which the target 'СТОП' asks for"),
        ('says "ก"', None, "the OCR model has no character 'ก', which the target 'ก' asks for"),
    ],
)
@pytest.mark.filterwarnings("ignore:reward 'ocr'")
def test_what_cannot_be_read_has_no_value_and_a_reason(
    recognise: OCRReward, prompt: str, target: str | None, reason: str
) -> None:
    """A zero would teach that every picture of such a prompt is bad."""
    reward = LoadedReward("ocr", recognise)
    image = np.zeros((2, 32, 64, 3), np.uint8)
    scores = score_request(
        [reward], RewardRequest([prompt] * 2, [[]] * 2, image, {"target": [target] * 2}, group_size=2)
    )
    assert np.isnan(scores.totals).all() and scores.reasons == {"ocr": reason}


def test_a_script_that_is_not_known_is_told_once(recognise: OCRReward) -> None:
    image = Image.new("RGB", (64, 32))
    with pytest.warns(UserWarning, match="has no character 'ж'"):
        assert list(recognise(prompts=["x"], images=[image], target=["Ж"]).rewards) == [None]


def test_corrupt_pictures_are_one_line(recognise: OCRReward) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    cut = Image.open(io.BytesIO(buffer.getvalue()[:2000]))
    good = Image.new("RGB", (64, 32))
    with pytest.raises(ValueError, match=r"^picture 2 cannot be decoded \(OSError: .*truncated"):
        recognise(prompts=["", ""], images=[good, cut], target=["A", "A"])
    with pytest.raises(ValueError, match=r"^picture 1 is empty: 0×5 pixels$"):
        recognise(prompts=[""], images=[Image.new("RGB", (0, 5))], target=["A"])
    with pytest.raises(ValueError, match=r"^picture 1 cannot be decoded \(AttributeError"):
        recognise(prompts=[""], images=[None], target=["A"])  # type: ignore[list-item]


def test_floor_hides_what_the_engine_doubts(recognise: OCRReward) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8))
    doubtful = recognise.engine.read([noise])[0]
    assert join_lines(doubtful, 0.5) == ""
    assert recognise.read([noise]) == [""]


def test_trl_calls_it(recognise: OCRReward) -> None:
    image = tiny_world.render(tiny_world.Scene("CAT", "red", "cyan", tiny_world.FONTS[1]))
    reward = as_trl_reward(recognise)
    assert reward.__name__ == "ocr"
    assert reward(
        prompts=['says "CAT"', "says"],
        completions=["", ""],
        completion_ids=[[1], [2]],
        images=[[image], [image]],
        trainer_state=object(),
        log_extra=print,
        log_metric=print,
    ) == [1.0, None]


def test_full_mode_finds_lines_anywhere() -> None:
    canvas = Image.new("RGB", (320, 160), (255, 255, 255))
    for text, place in (("HOUSE", (20, 10)), ("CAT", (170, 90))):
        scene = tiny_world.Scene(text, "black", "white", tiny_world.FONTS[1])
        canvas.paste(tiny_world.render(scene).resize((128, 64), Image.Resampling.BICUBIC), place)
    blank = Image.new("RGB", (320, 160), (255, 255, 255))
    reward = OCRReward(mode="full", models="offline")
    assert reward.read([canvas, blank]) == ["HOUSE CAT", ""]


def test_model_folders_are_built_whole_by_several_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = wheel_models()
    assert weights is not None
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: model_folder(weights, RECOGNISER, 96), range(4)))
    assert len(set(folders)) == 1
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]  # no half-built ones left
    size = (folders[0] / "inference.onnx").stat().st_size
    (folders[0] / "inference.onnx").write_bytes(b"cut short")
    assert (model_folder(weights, RECOGNISER, 96) / "inference.onnx").stat().st_size == size


def line(text: str, *centres: float) -> Line:
    return Line(text, 0.9, tuple((x, 0.5) for x in centres))


@pytest.mark.parametrize(
    ("lines", "target", "values", "places"),
    [
        ([line("STOP", 0.2, 0.4, 0.6, 0.8)], "stop", [1, 1, 1, 1], [0.2, 0.4, 0.6, 0.8]),
        ([line("SIOP", 0.2, 0.4, 0.6, 0.8)], "STOP", [1, 0, 1, 1], [0.2, 0.4, 0.6, 0.8]),
        ([line("SOP", 0.2, 0.6, 0.8)], "STOP", [1, 0, 1, 1], [0.2, 0.4, 0.6, 0.8]),  # beside a neighbour
        ([line("STOOP", 0.1, 0.3, 0.5, 0.7, 0.9)], "STOP", [1, 1, 1, 1], [0.1, 0.3, 0.5, 0.9]),
        ([line("O K", 0.3, 0.3, 0.7)], "OK", [1, 1], [0.3, 0.7]),  # white space is no letter
        ([line("A", 0.2), line("B", 0.6)], "ab", [1, 1], [0.2, 0.6]),
        ([Line("STOP", 0.1, ((0.5, 0.5),) * 4)], "GO", [0, 0], [0.25, 0.75]),  # below the floor
        ([], "GO", [0, 0], [0.25, 0.75]),
    ],
)
def test_letter_regions_by_hand(
    lines: list[Line], target: str, values: list[float], places: list[float]
) -> None:
    regions = letter_regions(lines, 0.5, target)
    assert [region[0] for region in regions] == values
    middles = [(left + right) / 2 for _, left, _, right, _ in regions if left > 0 and right < 1]
    inner = [p for p, (_, left, _, right, _) in zip(places, regions, strict=True) if left > 0 and right < 1]
    assert middles == pytest.approx(inner)
    assert all((top, bottom) == (0, 1) and left < right for _, left, top, right, bottom in regions)


@pytest.mark.parametrize("mode", ["recognise", "full"])
def test_letters_are_where_they_are_drawn(mode: Literal["recognise", "full"]) -> None:
    """Each letter's ink lies at its region's middle, to half a letter; a letter painted over is found out."""
    picture, width = Image.new("RGB", (400, 96), "white"), 60
    draw, font = (
        ImageDraw.Draw(picture),
        ImageFont.truetype(tiny_world.font_of("DejaVuSansMono-Bold.ttf", 8).path, 64),
    )
    for place, letter in enumerate("HOUSE"):
        draw.text((50 + place * width, 10), letter, fill="black", font=font)
    reward = OCRReward(mode=mode, models="offline")
    (regions,) = reward(prompts=['"HOUSE"'], images=[picture]).regions
    middles = [400 * (left + right) / 2 for _, left, _, right, _ in regions]
    assert middles == pytest.approx([50 + 20 + place * width for place in range(5)], abs=width / 2)
    draw.rectangle((50 + 2 * width, 0, 48 + 3 * width, 96), fill="white")
    (regions,) = reward(prompts=['"HOUSE"'], images=[picture]).regions
    assert [region[0] for region in regions] == [1, 1, 0, 1, 1]


def test_share_of_the_exact_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """STQP is 3/4 of STOP, and "STOPS" holds all of it: both are no match."""
    monkeypatch.setattr(
        ocr_engine.OCREngine,
        "read",
        lambda *_: [[Line(t, 1.0, ((0.5, 0.5),) * len(t))] for t in ("STOP", "STQP", "STOPS")],
    )
    blank = [Image.new("RGB", (64, 32))] * 3
    for share, rewards in ((0.0, [1, 0.75, 1]), (0.5, [1, 0.375, 0.5]), (1.0, [1, 0, 0])):
        reward = OCRReward(models="offline", exact_share=share)
        scored = reward(prompts=['"STOP"'] * 3, images=blank)
        assert list(scored.rewards) == pytest.approx(rewards) and scored.breakdown["exact_match"] == [1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "detect"}, "mode must be full or recognise"),
        ({"models": "mine"}, "models must be auto, offline or download"),
        ({"min_confidence": 50}, r"min_confidence must lie in 0\.\.1"),
        ({"exact_share": -0.5}, r"exact_share must lie in 0\.\.1"),
        ({"recognition_width": 10}, "recognition_width must be at least 48"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ImageRLError, match=message):
        OCRReward(**settings)  # type: ignore[arg-type]


def test_missing_packages_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    find = ocr_engine.importlib.util.find_spec
    monkeypatch.setattr(
        ocr_engine.importlib.util, "find_spec", lambda name: None if name == "rapidocr" else find(name)
    )
    with pytest.raises(ImageRLError, match="pip install rapidocr"):
        OCRReward(models="offline")
    monkeypatch.setattr(ocr_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImageRLError, match="pip install paddleocr"):
        OCRReward()
