"""Training of a small CLIP: the loss by hand, what wrong captions are, what is measured, and a run of the command."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from imagerl.rl.data.tiny.world import BACKGROUNDS, FONTS, INKS, Scene, split_of
from tests.command import exit_code
from tests.rewards.clip_folders import need_open_clip
from tools.tiny.__main__ import tiny
from tools.tiny.clip import BLOCK, PARTS, altered, contrastive_loss, measure, trainable

RECIPE = str(Path(__file__).parents[3] / "tools" / "tiny" / "tiny_clip.yaml")
RIVER = Scene("RIVER", "red", "white", FONTS[0])


def test_loss_by_hand() -> None:
    """Two pairs at right angles, one more picture that looks like the first, one more caption that fits the second."""
    east, north = [1.0, 0.0], [0.0, 1.0]
    scale = torch.tensor(2.0)
    e = math.exp(2.0)
    pictures, captions = torch.tensor([east, north]), torch.tensor([east, north])
    plain = math.log((e + 1) / e)
    assert contrastive_loss(pictures, captions, 2, scale).item() == pytest.approx(plain)
    more_pictures, more_captions = torch.tensor([east, north, east]), torch.tensor([east, north, north])
    of_pictures = (math.log((e + 2) / e) + math.log((2 * e + 1) / e)) / 2  # rows (e, 1, 1) and (1, e, e)
    of_captions = (math.log((2 * e + 1) / e) + math.log((e + 2) / e)) / 2  # columns (e, 1, e) and (1, e, 1)
    got = contrastive_loss(more_pictures, more_captions, 2, scale).item()
    assert got == pytest.approx((of_pictures + of_captions) / 2)
    assert of_pictures != pytest.approx(plain)


def test_one_thing_is_wrong() -> None:
    rng = random.Random(0)
    for part in PARTS:
        for _ in range(20):
            other = altered(RIVER, part, rng)
            assert [name for name in PARTS if getattr(other, name) != getattr(RIVER, name)] == [part]
            assert other.ink in INKS and other.background in BACKGROUNDS
            assert sum(a != b for a, b in zip(other.text, RIVER.text, strict=True)) == (part == "text")
    assert altered(Scene("2024", "red", "white", FONTS[0]), "text", rng).text.isdigit()


def test_no_heldout_text_is_trained_on() -> None:
    rng = random.Random(0)
    several = [altered(RIVER, "text", rng).text for _ in range(100)]
    assert {split_of(text) for text in several} == {"train", "heldout"}
    assert {split_of(trainable(RIVER, "text", rng).text) for _ in range(100)} == {"train"}


def colours_of(picture: Image.Image) -> list[float]:
    """Features that tell ground and ink, and nothing of the text."""
    ground = picture.getpixel((0, 0))
    ink = min(picture.get_flattened_data(), key=sum)  # type: ignore[type-var]
    return [*ground, *ink]  # type: ignore[misc]


def test_what_is_measured_of_a_model_that_sees_colours_alone() -> None:
    """It tells inks and grounds, no letters, and finds one of 64 as often as its colours are unique."""

    def pictures(images: Sequence[Image.Image]) -> torch.Tensor:
        rows = torch.tensor([colours_of(image) for image in images])
        return torch.nn.functional.normalize(rows.float() - 128, dim=-1)

    def captions(texts: list[str]) -> torch.Tensor:
        rows = []
        for text in texts:
            ink, ground = text.split('" in ')[1].removesuffix(" background").split(" on a ")
            rows.append([*BACKGROUNDS[ground], *INKS[ink]])
        return torch.nn.functional.normalize(torch.tensor(rows).float() - 128, dim=-1)

    told = measure(pictures, captions, 2 * BLOCK + 5, seed=0)
    assert {interval.n for interval in told.values()} == {2 * BLOCK}
    assert told["caption/text"].mean == 0.0
    assert told["caption/ink"].mean == told["caption/background"].mean == 1.0
    assert told["picture/background"].mean == 1.0
    assert 0.1 < told["caption_of_64"].mean < 0.5


def test_what_is_measured_of_a_model_that_sees_nothing() -> None:

    def nothing(samples: Sequence[object]) -> torch.Tensor:
        return torch.ones(len(samples), 1)

    told = measure(nothing, nothing, BLOCK, seed=0)
    assert told["caption_of_64"].mean == told["picture_of_64"].mean == 1 / BLOCK
    assert told["caption/text"].mean == 0.0


def test_a_run_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that open_clip reads, with its record; the same numbers again from the same seed."""
    need_open_clip()
    small = [
        "training.steps=2",
        "training.batch_size=4",
        "training.poor_pictures=1",
        "measured=64",
        "run.threads=null",
    ]
    small += ["model.vision_cfg={image_size: 64, patch_size: 32, width: 32, head_width: 16, layers: 1}"]
    documents = []
    for name in ("a", "b"):
        assert (
            exit_code(["clip", RECIPE, f"run.output_dir={tmp_path / name}", *small], tiny, "tools.tiny") == 0
        )
        documents.append(json.loads((tmp_path / name / "model" / "training.json").read_text()))
    assert documents[0]["measured"] == documents[1]["measured"]
    assert set(documents[0]["measured"]) == {"caption_of_64", "picture_of_64"} | {
        f"{side}/{part}" for side in ("caption", "picture") for part in PARTS
    }
    assert documents[0]["recipe"]["training"]["steps"] == 2
    weights = [
        (tmp_path / name / "model" / "open_clip_model.safetensors").read_bytes() for name in ("a", "b")
    ]
    assert weights[0] == weights[1]
    assert "caption_of_64" in capsys.readouterr().out
