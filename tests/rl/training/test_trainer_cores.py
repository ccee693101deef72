"""How a step is shared out: CPU threads to its phases, prompts to its processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imagerl.rl.files.metrics import is_timing
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


@pytest.mark.parametrize(
    "what", ["model.lora=null", "model.lora={r: 4}", "algorithm.flow={name: flow_grpo, joint: true}"]
)
def test_recomputed_layers_give_the_same_step(what: str) -> None:
    metrics = []
    for on in ("false", "true"):
        trainer = small_trainer(what, "rollout.flow_steps=3", f"engine.activation_checkpointing={on}")
        metrics.append([{k: v for k, v in trainer.step(n).items() if not is_timing(k)} for n in range(2)])
        assert trainer.policy._sampler is None  # its copy of the weights is gone before the update
    for one, other in zip(*metrics, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)


class Rows:
    """A batch of which only the number of samples counts."""

    def __init__(self, count: int) -> None:
        self.action_mask = torch.ones(count, 1)

    def rows(self, which: slice) -> int:
        return len(self.action_mask[which])


def test_prompts_that_processes_do_not_divide() -> None:
    """Every one has as many passes as the busiest, and the prompts of all are the step's, in order."""
    trainer = small_trainer("rollout.prompts_per_step=4", "engine.micro_batch_size=3")
    trainer.engine.world_size = 3
    own, passes = [], []
    for trainer.engine.rank in range(3):
        own += range(4)[trainer._own]
        count = 4 * len(range(4)[trainer._own])
        passes.append([(parts[0], counts) for parts, counts in trainer._microbatches([Rows(count)])])
    assert own == [0, 1, 2, 3]
    assert passes == [[(3, True), (1, True), (1, False)]] * 2 + [[(3, True), (3, True), (2, True)]]
