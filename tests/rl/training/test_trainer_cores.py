"""How many CPU threads each phase of a training step uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.small_run import small_trainer


def test_a_core_is_left_to_the_scoring_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small_trainer("rewards.workers=1", "rollout.decode_chunk=1")
    before = torch.get_num_threads()
    trainer.engine.threads = 3
    used: dict[str, list[int]] = {"draw": [], "reference": [], "update": []}

    def watch(target: Any, name: str, phase: str) -> None:
        original = getattr(target, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            used[phase].append(torch.get_num_threads())
            return original(*arguments, **named)

        monkeypatch.setattr(target, name, watched)

    watch(trainer.policy, "decode", "draw")
    watch(trainer.policy, "reference_scores", "reference")
    watch(trainer.engine, "backward", "update")
    try:
        trainer.engine.leave_cores(0)
        trainer.step(0)
    finally:
        torch.set_num_threads(before)
    assert used["draw"][0] == 3 and set(used["draw"][1:]) == {2}  # nothing to score before the first pictures
    assert set(used["reference"]) == {2}
    assert set(used["update"]) == {3}
