"""Frozen weights in host memory during the update: nothing uses them there, and a run computes what it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imagerl.rl.engine.host_memory import HostMemory
from imagerl.rl.files.metrics import is_timing
from imagerl.rl.training.trainer import Trainer
from tests.rl.training.test_flow_trainer import flow_trainer


def test_what_waits_comes_back_as_it_was_and_what_trains_stays() -> None:
    shared, alone, trained = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)
    trained.bias = alone.bias  # a weight of both is used
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    memory = HostMemory()

    def used() -> None:
        with memory.holding([shared, alone, alone], but=trained):
            assert [p.numel() for p in (*shared.parameters(), alone.weight)] == [0, 0, 0]
            assert alone.bias.numel() == 3 and trained.weight.numel() == 3
            shared(torch.ones(1, 2))

    for _ in range(2):
        with pytest.raises(RuntimeError):  # and they come back all the same
            used()
        assert all(torch.equal(p, before[name]) for name, p in alone.named_parameters())
        with torch.no_grad():
            alone.weight += 1  # as a reference is renewed: the next time the new weight waits
        before["weight"] = before["weight"] + 1


@pytest.mark.parametrize(
    "changes",
    [
        ("algorithm.kl_coef=0.1",),
        ("algorithm.kl_coef=0.1", "model.lora={r: 2}"),
        ("algorithm.flow={name: flow_grpo, kl_coef: 0.1}",),
        ("algorithm.flow={name: nft, lora: {r: 2, target_modules: [to_q]}}",),
        ("algorithm.kl_coef=0.1", "algorithm.flow={name: flow_grpo, joint: true, kl_coef: 0.1}"),
        ("algorithm.max_resamples=1", "algorithm.reference_every=2", "algorithm.kl_coef=0.1"),
    ],
)
def test_an_update_needs_nothing_of_what_waits(
    changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, waiting = flow_trainer(*changes), flow_trainer(*changes, "engine.offload_frozen=true")
    found: list[int] = []
    update = Trainer._update

    def looked_at(trainer: Trainer, batches: list[object]) -> list[object]:
        vae = trainer.policy.parts()["autoencoder"]
        found.append(
            sum(p.numel() for part in (vae, *trainer.policy.references()) for p in part.parameters())
        )
        return update(trainer, batches)

    monkeypatch.setattr(Trainer, "_update", looked_at)
    for step in range(2):
        without, with_it = plain.step(step), waiting.step(step)
        assert found[-2] > 0 and found[-1] == 0
        for name, value in without.items():
            if not is_timing(name):
                assert with_it[name] == value, name
