"""Prompt files that name pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rewards.ocr import wanted_text
from rl.config import PromptSetConfig
from rl.data import PromptSet, load_prompt_set, refuse_overlap
from rl.errors import ImageRLError
from rl.prompt_pictures import with_pictures
from rl.rollout import RolloutEngine
from rl.types import SamplingParams
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
    with pytest.raises(ImageRLError, match="line 2: repeats the prompt of line 1"):
        written(tmp_path, row("turn it", "pictures/red.png"), row("turn it", "pictures/red.png"))
    with pytest.raises(ImageRLError, match=r"1 prompts of data\.heldout"):
        refuse_overlap(both, PromptSet("heldout", both.prompts[:1]), wanted_text)


@pytest.mark.parametrize(
    ("picture", "complaint"),
    [("pictures/none.png", "line 1: .*none at 'pictures/none.png'"), (7, "line 1: .*none at 7")],
)
def test_a_missing_picture_is_said_at_once(tmp_path: Path, picture: Any, complaint: str) -> None:
    with pytest.raises(ImageRLError, match=complaint):
        written(tmp_path, row("turn it", picture))


def test_a_damaged_picture_is_said_when_it_is_opened(tmp_path: Path) -> None:
    (prompt,) = written(tmp_path, row("turn it", "pictures/broken.png"))
    with pytest.raises(ImageRLError, match=r"broken\.png cannot be read as a picture"):
        with_pictures(prompt)


def test_rows_without_a_picture_are_captions(tmp_path: Path) -> None:
    (prompt,) = written(tmp_path, row("a red sign", None))
    assert with_pictures(prompt) is prompt and prompt.reference is None
