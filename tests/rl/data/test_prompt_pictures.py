"""Prompt files that name pictures."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imagerl.rewards.ocr.reward import wanted_text
from imagerl.rl.config.train import PromptSetConfig
from imagerl.rl.data.prompt_sets import PromptSet, load_prompt_set, refuse_overlap
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.reading import read_picture
from imagerl.rl.rollout.engine import RolloutEngine, with_pictures
from imagerl.rl.types import SamplingParams
from tests.models.helpers import edit_policy


def written(folder: Path, *rows: dict[str, Any]) -> PromptSet:
    (folder / "pictures").mkdir(exist_ok=True)
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (64, 32), colour).save(folder / "pictures" / f"{name}.png")
    Image.new("LA", (64, 32), (0, 0)).save(folder / "pictures" / "clear.png")
    (folder / "pictures" / "broken.png").write_bytes(b"no picture")
    file = folder / "edits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompt_set(PromptSetConfig(path=str(file)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def row(prompt: str, picture: str | None, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "reference": picture, **columns}


def test_pictures_are_opened_when_a_prompt_is_drawn(tmp_path: Path) -> None:
    """Relative to the prompt file, wherever the command runs."""
    prompts = written(
        tmp_path, row("make it blue", "pictures/red.png", mask="pictures/clear.png", edited="style")
    )
    (prompt,) = prompts
    assert prompt.reference is None and prompt.columns["reference"] == tmp_path / "pictures" / "red.png"
    opened = with_pictures(prompt)
    assert opened.reference is not None and opened.reference.getpixel((0, 0)) == (200, 0, 0)
    assert opened.columns["mask"].mode == "RGB" and opened.columns["mask"].getpixel((0, 0)) == (255, 255, 255)
    assert opened.columns["edited"] == "style" and opened.index == prompt.index
    assert with_pictures(opened) is opened


def test_they_reach_rollouts_and_rewards(tmp_path: Path) -> None:
    policy, _ = edit_policy()
    prompts = written(tmp_path, row("turn it", "pictures/red.png"), row("turn it", "pictures/blue.png"))
    engine = RolloutEngine(policy, SamplingParams(flow_steps=1), 0, torch.enable_grad)
    (groups,) = engine.generate(tuple(prompts), 2, 0)
    assert [group.prompt.reference.getpixel((0, 0)) for group in groups] == [(200, 0, 0), (0, 0, 200)]  # type: ignore[union-attr]
    assert not torch.equal(groups[0].rollout_logprobs, groups[1].rollout_logprobs)


def test_one_instruction_for_two_pictures_is_two_prompts(tmp_path: Path) -> None:
    both = written(tmp_path, row("turn it", "pictures/red.png"), row("turn it", "pictures/blue.png"))
    assert len(both) == 2
    with pytest.raises(ImageRLError, match=r"1 prompts of data\.heldout"):
        refuse_overlap(both, PromptSet("heldout", both.prompts[:1]), wanted_text)


@pytest.mark.parametrize(
    ("picture", "complaint"),
    [("pictures/none.png", "line 1: .*none at 'pictures/none.png'"), (7, "line 1: .*none at 7")],
)
def test_a_missing_picture_is_said_at_once(tmp_path: Path, picture: Any, complaint: str) -> None:
    with pytest.raises(ImageRLError, match=complaint):
        written(tmp_path, row("turn it", picture))


def test_what_is_no_picture_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match=r"line 1: .*broken\.png cannot be read as a picture"):
        written(tmp_path, row("turn it", "pictures/broken.png"))


def test_pictures_are_judged_before_they_are_decoded(tmp_path: Path) -> None:
    """A PNG of 20 KB holds 13,000² pixels, half a gigabyte; one that is cut short shows only when it is decoded."""
    pixels = zlib.compress(bytes((1 + 13_000 // 8) * 13_000), 9)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )
    assert (tmp_path / "bomb.png").stat().st_size < 30_000
    with pytest.raises(ImageRLError, match=r"line 1: .*bomb\.png .*13000x13000 pixels; at most 67108864"):
        written(tmp_path, row("turn it", "bomb.png"))
    with pytest.raises(ImageRLError, match="13000x13000"):
        read_picture(tmp_path / "bomb.png")
    noise = Image.effect_noise((64, 64), 50)
    noise.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-500])
    (prompt,) = written(tmp_path, row("turn it", "cut.png"))
    with pytest.raises(ImageRLError, match=r"reference: .*cut\.png cannot be read as a picture"):
        with_pictures(prompt)


def test_pipes_and_programs_are_no_pictures(tmp_path: Path) -> None:
    """A pipe would be waited for, and Pillow gives Encapsulated PostScript to a program to run."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageRLError, match=r"none at 'pipe\.png'"):
        written(tmp_path, row("turn it", "pipe.png"))
    with pytest.raises(ImageRLError, match="is a pipe"):
        read_picture(tmp_path / "pipe.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "page.eps")
    with pytest.raises(ImageRLError, match=r"line 1: .*page\.eps .*it is none of PNG, JPEG"):
        written(tmp_path, row("turn it", "page.eps"))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "x", "source_image": "pictures/red.png"}, '"source_image" as the picture to edit'),
        (
            {"instruction": "x", "Image": "pictures/red.png"},
            '"instruction" as the prompt and "Image" as the picture',
        ),
        (
            {"caption": "x", "images": ["pictures/red.png"]},
            '"caption" as the prompt and "images" as the picture',
        ),
        ({"prompt": "x", "reference": "pictures/red.png", "image": "kept"}, ""),
    ],
)
def test_columns_of_public_edit_sets_are_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, columns: dict[str, Any], said: str
) -> None:
    (prompt,) = written(tmp_path, columns)
    assert prompt.text == "x" and prompt.columns["reference"] == tmp_path / "pictures" / "red.png"
    assert set(prompt.columns) == {"reference"} | ({"image"} if "image" in columns else set())
    assert len(caplog.messages) == bool(said)
    assert all(said in message and str(tmp_path / "edits.jsonl") in message for message in caplog.messages)


def test_an_edit_starts_from_one_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match='line 1: "images" names 2 pictures'):
        written(tmp_path, {"prompt": "x", "images": ["pictures/red.png", "pictures/blue.png"]})


def test_rows_without_a_picture_are_captions(tmp_path: Path) -> None:
    (tmp_path / "some.csv").write_text("prompt,image\na red sign,\n")
    (prompt,) = load_prompt_set(PromptSetConfig(path=str(tmp_path / "some.csv")))
    assert with_pictures(prompt) is prompt and prompt.columns == {"reference": None}
    (prompt,) = written(tmp_path, row("a red sign", None))
    assert with_pictures(prompt) is prompt and prompt.reference is None
