"""Training on samples of weights that are one update old: the order of things, what a checkpoint keeps, the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imagerl.rl.algorithms.losses import policy_loss
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import is_timing
from imagerl.rl.rollout.actors import checksum, load_weights, moved, store_weights
from imagerl.rl.rollout.engine import LocalRollouts, Rollout
from imagerl.rl.rollout.ray_rollouts import RolloutThread, pieces
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import FlowSampling, LossInputs, Prompt, RolloutGroup
from tests.small_run import recipe_data, small_trainer

STALE = ("rollout.workers=1", "rollout.max_staleness=1", "algorithm.importance_cap=2")


class Ahead(LocalRollouts):
    """Draws when it is started, by what was published last, and keeps a record: as actors do, in this process."""

    def __init__(self, trainer: Trainer) -> None:
        local: Any = trainer.rollouts
        super().__init__(local.recipe, local.rollout, local.scorer, local.engine)
        self.calls: list[tuple[str, int]] = []
        self.weights: dict[str, Tensor] = {}
        self.drawn: dict[int, Rollout] = {}

    def publish(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        self.calls.append(("publish", version))
        self.version = version
        present = self.engine.state_dict(moments=False)["model"] if weights is None else weights
        self.weights = {name: tensor.clone() for name, tensor in present.items()}

    def start(self, step: int, prompts: Sequence[Prompt], flow: FlowSampling | None) -> None:
        self.calls.append(("start", step))
        super().start(step, prompts, flow)
        parameters = dict(self.engine.unwrapped.named_parameters())
        present = {name: parameters[name].data for name in self.weights}
        for name, tensor in self.weights.items():
            parameters[name].data = tensor
        self.rollout.policy.refresh_sampler()
        self.drawn[step] = super().collect(step)
        for name, tensor in present.items():
            parameters[name].data = tensor

    def collect(self, step: int) -> Rollout:
        self.calls.append(("collect", step))
        return self.drawn.pop(step)

    def published(self) -> tuple[int, Mapping[str, Tensor]]:
        return self.version, self.weights


def ahead(*overrides: str, state: Mapping[str, Any] | None = None) -> tuple[Trainer, Ahead]:
    trainer = small_trainer(*STALE, "rollout.flow_steps=1", "optim.lr=0.01", *overrides, state=state)
    trainer.rollouts = rollouts = Ahead(trainer)
    return trainer, rollouts


def told(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not is_timing(name)}


def test_the_next_step_is_drawn_by_the_weights_before_this_update() -> None:
    trainer, rollouts = ahead()
    metrics = [trainer.step(step) for step in range(4)]  # run.steps
    begin = [("publish", 0), ("start", 0), ("collect", 0), ("publish", 0), ("start", 1)]
    later = [("collect", 1), ("publish", 1), ("start", 2), ("collect", 2), ("publish", 2), ("start", 3)]
    assert rollouts.calls == [*begin, *later, ("collect", 3)]  # and nothing after the last step
    assert [each["rollout/age"] for each in metrics] == [0, 1, 1, 1]
    weights = [each["policy/weight_mean"] for each in metrics]
    assert weights[0] == pytest.approx(1, abs=1e-5) and all(abs(weight - 1) > 1e-4 for weight in weights[1:])
    assert all(each["rollout/logprob_diff_max"] > 0.01 for each in metrics[1:])


def test_a_resumed_run_draws_by_the_same_older_weights() -> None:
    whole, _ = ahead()
    expected = [told(whole.step(step)) for step in range(4)]
    first, _ = ahead()
    assert [told(first.step(step)) for step in range(2)] == expected[:2]
    state, tensors = first.state(), {name: dict(own) for name, own in first.tensors().items()}
    second, rollouts = ahead(state=first.engine.state_dict())
    second.restore(state, tensors)
    assert rollouts.calls == [("publish", 1), ("start", 2)]
    assert [told(second.step(step)) for step in range(2, 4)] == expected[2:]
    assert "published" not in second.tensors()  # nothing is under way after the last step
    fresh, _ = ahead(state=first.engine.state_dict())  # as if the older weights had been forgotten
    assert told(fresh.step(2)) != expected[2]


def test_the_kl_is_weighed_as_the_policy_term_is() -> None:
    rng = torch.Generator().manual_seed(0)
    logprobs, ref, weights = (torch.randn(2, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    weights = weights.exp()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    inputs = LossInputs(logprobs, logprobs, ref, torch.zeros(2, 1), mask, 2.0, kl_weights=weights)
    k3 = (torch.exp(ref - logprobs) - (ref - logprobs) - 1) * weights
    expected = 0.5 * (k3[0, :2].mean() + k3[1].mean()) / 2
    found = policy_loss(inputs, kl_coef=0.5).loss
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    unweighed = policy_loss(replace(inputs, kl_weights=None), kl_coef=0.5).loss
    assert abs(float(found - unweighed)) > 1e-3
    seen: list[LossInputs] = []
    for overrides in ((), STALE):
        trainer = small_trainer("algorithm.importance_cap=2", "algorithm.kl_coef=0.1", *overrides)
        half: Any = trainer.halves[0]
        loss = half.policy_loss
        half.policy_loss = lambda inputs, go=loss, **kw: seen.append(inputs) or go(inputs, **kw)
        trainer.rollouts = Ahead(trainer)
        trainer.step(0)
    assert seen[0].kl_weights is None and seen[-1].kl_weights is not None
    assert torch.equal(seen[-1].kl_weights, seen[-1].policy_weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["rollout.workers=0"], "set rollout.workers to 1 or more"),
        (["algorithm.importance_cap=null"], "set algorithm.importance_cap, for example 2"),
        (["algorithm.flow={name: flow_grpo, joint: true}", "rollout.flow_steps=3"], "remove algorithm.flow"),
        (["algorithm.kl_in=reward"], "set algorithm.kl_in: loss"),
        (["data.curriculum={}"], "remove data.curriculum"),
        (["algorithm.max_resamples=1"], "set algorithm.max_resamples: 0"),
    ],
)
def test_what_cannot_be_corrected_is_refused(tmp_path: Any, overrides: list[str], told: str) -> None:
    with pytest.raises(ImageRLError) as caught:
        validate_recipe(Recipe, recipe_data(tmp_path, *STALE, *overrides), "test")
    assert told in str(caught.value) and "\n" not in str(caught.value)


# ---- what goes to an actor and comes back ------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 5, 9])
@pytest.mark.parametrize("chunk", [None, 2])
def test_any_number_of_workers_serves_any_number_of_prompts(
    tmp_path: Any, ranks: int, workers: int, chunk: int | None
) -> None:
    chunked = f"rollout.sample_chunk={'null' if chunk is None else chunk}"
    recipe = validate_recipe(Recipe, recipe_data(tmp_path, f"rollout.workers={workers}", chunked), "test")
    everyone = [[Prompt(10 * rank + i, "") for i in range(5 - rank)] for rank in range(ranks)]
    weights: Any = None
    cut = list(pieces(recipe, [*everyone, []], 3, None, weights))
    for rank, prompts in enumerate(everyone):
        assert [prompt for piece in cut if piece.rank == rank for prompt in piece.prompts] == prompts
    sizes = [len(piece.prompts) for piece in cut]
    assert min(sizes) > 0 and max(sizes) <= (chunk or 5)
    if chunk is None and ranks == 1:
        assert len(cut) <= min(workers, 5) + 1


class Store:
    """Stands in for Ray's object store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray

        monkeypatch.setattr(ray, "put", lambda value: value)
        monkeypatch.setattr(ray, "get", lambda value: value)


def test_weights_travel_in_buckets_and_damage_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    Store(monkeypatch)
    monkeypatch.setattr("imagerl.rl.rollout.actors.BUCKET_BYTES", 48)
    sizes = {"a": (3,), "b": (5,), "large": (40,), "c": (2, 2), "d": ()}
    weights = {name: torch.randn(size) for name, size in sizes.items()}
    stored = store_weights(7, weights)
    assert [list(bucket.arrays) for bucket in stored.buckets] == [["a", "b"], ["large"], ["c", "d"]]
    parameters = {name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    load_weights(stored, parameters)
    assert all(torch.equal(parameters[name], tensor) for name, tensor in weights.items())
    assert parameters["a"].data.data_ptr() != weights["a"].data_ptr()  # an update must not reach it
    lacking = store_weights(7, {"a": weights["a"]})
    with pytest.raises(ImageRLError, match="the weights of version 7 lack b"):
        load_weights(lacking, parameters)
    before = checksum(stored.buckets[2].arrays)
    weights["c"][1, 0] += 1e-6  # the arrays are views
    assert checksum(stored.buckets[2].arrays) != before
    with pytest.raises(ImageRLError, match="version 7 arrived damaged"):
        load_weights(stored, parameters)


def test_a_group_is_sent_without_what_it_is_a_view_of() -> None:
    tokens = torch.arange(24).reshape(6, 4)
    whole = RolloutGroup(
        Prompt(0, ""), tokens[:2], tokens[:2].float(), tokens[:2] > 0, torch.zeros(0).numpy()
    )
    sent = moved(whole, torch.device("cpu"))
    assert torch.equal(sent.tokens, tokens[:2]) and sent.tokens.untyped_storage().nbytes() == 2 * 4 * 8


def test_a_stale_version_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    worker: Any = RolloutThread.__new__(RolloutThread)
    said = iter([1, SimpleNamespace(version=3)])
    worker.actor = SimpleNamespace(draw=SimpleNamespace(remote=lambda piece: None))
    worker._next, worker.ask = lambda stream: 0, lambda reference: next(said)
    piece: Any = SimpleNamespace(weights=SimpleNamespace(version=4))
    with pytest.raises(ImageRLError, match="by the weights of version 3 where 4 was asked for") as caught:
        worker.do(piece)
    assert "\n" not in str(caught.value)
