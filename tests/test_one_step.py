"""How much of ours one reads to follow a GRPO step to its loss: docs/one-step.md walks through it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import imagerl
from imagerl.rl.algorithms.losses import policy_loss
from imagerl.rl.training.token_half import TokenHalf
from tests.small_run import small_trainer

ROOT = Path(imagerl.__file__).resolve().parents[1]
MOST_FILES, MOST_LINES = 20, 4_650


def read_in_a_step() -> dict[str, int]:
    """Lines of each file of `rl/` and `models/` that runs from the beginning of a step until its first loss is there,
    recipe files aside, which are settings. Rewards run in processes of their own, behind their Protocol."""
    trainer = small_trainer("algorithm.kl_coef=0.01", "rollout.flow_steps=2")
    seen: set[Path] = set()
    ended = False

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal ended
        if event == "return" and frame.f_code is TokenHalf.loss.__code__:
            ended = True
        if event == "call" and not ended and frame.f_code.co_filename.endswith(".py"):
            seen.add(Path(frame.f_code.co_filename).resolve())

    sys.setprofile(look)
    try:
        trainer.step(0)
    finally:
        sys.setprofile(None)
    assert ended and Path(policy_loss.__code__.co_filename).resolve() in seen
    ours = [path.relative_to(ROOT) for path in seen if path.is_relative_to(ROOT)]
    counted = [path for path in ours if path.parts[0] in ("rl", "models") and path.parts[1] != "config"]
    return {str(path): len((ROOT / path).read_text().splitlines()) for path in sorted(counted)}


def test_a_step_is_read_in_few_files() -> None:
    files = read_in_a_step()
    listing = "\n".join(f"{lines:5d} {path}" for path, lines in files.items())
    assert len(files) <= MOST_FILES, listing
    assert sum(files.values()) <= MOST_LINES, listing
    walked = (ROOT / "docs" / "one-step.md").read_text()
    missing = [path for path in files if f"../{path}" not in walked]
    assert not missing, f"docs/one-step.md does not lead through {missing}"
