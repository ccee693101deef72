"""Rollouts by Ray actors: the same groups, whichever actor draws them and whatever becomes of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagerl.api.training import load_rollout
from imagerl.models.families import load_policy
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rl.engine.cluster import start_ray, stop_ray
from imagerl.rl.evaluation.evaluate import evaluate
from imagerl.rl.files.metrics import is_timing
from imagerl.rl.rollout.engine import LocalRollouts, RolloutEngine
from imagerl.rl.rollout.ray_rollouts import RayRollouts
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import SamplingParams
from tests.micro import micro_folder
from tests.models.test_family_contract import disturb
from tests.small_run import REWARD_FILE, small_trainer

PROMPTS = ("rollout.prompts_per_step=4", "rollout.sample_chunk=1", "rollout.flow_steps=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("actors")
    micro_folder(folder / "model")
    (folder / "reward.py").write_text(REWARD_FILE)
    assert start_ray(3)
    yield folder
    stop_ray()


def trainer_of(place: Path, *overrides: str) -> Trainer:
    """A trainer of the model in the folder, with rollouts in this process and rewards that look at pictures."""
    policy: Any = load_policy(str(place / "model"))
    trainer = small_trainer(f"model.path={place / 'model'}", *PROMPTS, *overrides, policy=policy)
    return scored(trainer, place, 0)


def scored(trainer: Trainer, place: Path, workers: int) -> Trainer:
    names = ("low_tokens", "brightness")
    specs = [{"import_path": f"{place / 'reward.py'}:{name}"} for name in names]
    trainer.rollouts.scorer = RewardWorkers(specs, workers=workers)
    return trainer


def with_actors(trainer: Trainer) -> tuple[Trainer, RayRollouts]:
    recipe = trainer.recipe
    rollouts = RayRollouts(recipe, partial(load_rollout, recipe), trainer.rollouts.scorer, trainer.engine)
    trainer.rollouts = rollouts
    rollouts.wait_until_ready()
    return trainer, rollouts


def told(trainer: Trainer, steps: int = 2) -> list[dict[str, float]]:
    return [{k: v for k, v in trainer.step(n).items() if not is_timing(k)} for n in range(steps)]


def ask(rollouts: RayRollouts, number: int, question: Any) -> Any:
    """Have an actor's process call a function of the actor."""
    import ray

    return ray.get(rollouts._workers[number].actor.__ray_call__.remote(question))


@pytest.mark.slow
def test_actors_draw_what_this_process_draws(place: Path) -> None:
    """Killed ones are replaced, a slow one keeps its own piece only, tokens and pictures are the same bit for bit."""
    expected = told(trainer_of(place))
    trainer, rollouts = with_actors(scored(trainer_of(place, "rollout.workers=2"), place, 1))
    try:
        assert told(trainer, 1) == expected[:1]
        for number in range(2):  # between the steps: both of them
            os.kill(ask(rollouts, number, lambda actor: os.getpid()), signal.SIGKILL)
        gate = place / "open"
        rollouts.publish(1)
        prompts = trainer.sampler.step(1)

        def slow(actor: Any, gate: str = str(gate)) -> None:
            import os
            import time

            sample = actor._rollout.policy.sample_tokens

            def held(*arguments: Any) -> Any:
                while not os.path.exists(gate):
                    time.sleep(0.01)
                return sample(*arguments)

            actor._rollout.policy.sample_tokens = held

        rollouts.start(1, prompts[:2], None)  # the killed ones are noticed and replaced
        drawn = rollouts.collect(1)
        assert [group.prompt for group in drawn.groups] == prompts[:2]
        assert len(drawn.scores()) == 2 and not any(group.images.size for group in drawn.groups)
        ask(rollouts, 0, slow)
        rollouts.start(1, prompts, None)
        answers = [answer for _, answer in rollouts._begun[1]]
        while sum(answer.done() for answer in answers) < 3:  # the other one draws all but one
            assert not any(answer.done() and answer.exception() for answer in answers)
        gate.touch()
        held = rollouts.collect(1)
        assert [group.prompt for group in held.groups] == prompts
        held.scores()
        metrics = trainer.step(1)
        assert {k: v for k, v in metrics.items() if not is_timing(k)} == expected[1]
    finally:
        rollouts.close()
        rollouts.scorer.close()


@pytest.mark.slow
def test_held_out_pictures_are_drawn_by_actors_as_in_this_process(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the weights that are judged, in the batches of one process; then training goes on by the published ones."""
    trainer, rollouts = with_actors(trainer_of(place, "rollout.workers=2"))
    here = RolloutEngine(trainer.policy, SamplingParams(0.7, flow_steps=2), seed=5)
    prompts = trainer.sampler.step(3) + trainer.sampler.step(4)[:1]
    published = trainer_of(place)
    try:
        rollouts.publish(0)
        disturb(trainer.policy.trainable, 0.1)
        trainer.policy.refresh_sampler()
        expected = evaluate("ocr", prompts, here, rollouts.scorer, 2, samples=2)
        source = rollouts.judged(here)
        disturb(trainer.policy.trainable, 0.1)  # too late
        monkeypatch.delattr(RolloutEngine, "generate")  # of this process
        found = evaluate("ocr", prompts, source, rollouts.scorer, 2, samples=2)
        monkeypatch.undo()
        assert found.per_prompt == expected.per_prompt and len(found.per_prompt) == 10
        for one, other in zip(found.images, expected.images, strict=True):
            np.testing.assert_array_equal(one, other)
        published.rollouts.publish(0)
        groups = []
        for each in (rollouts, published.rollouts):
            each.start(0, prompts[:2], None)
            groups.append(each.collect(0).groups)
        for one, other in zip(*groups, strict=True):
            assert torch.equal(one.tokens, other.tokens)
    finally:
        rollouts.close()


@pytest.mark.slow
def test_pictures_outlive_the_actor_that_drew_them(place: Path) -> None:
    """They are scored after it is gone; and in this process, where there are no reward workers."""
    trainer, rollouts = with_actors(trainer_of(place, "rollout.workers=1", "algorithm.flow={name: flow_grpo}",
                                               "rollout.flow_steps=3"))  # fmt: skip
    local = trainer_of(place, "algorithm.flow={name: flow_grpo}", "rollout.flow_steps=3")
    assert isinstance(local.rollouts, LocalRollouts)
    try:
        rollouts.publish(0)
        trainer._start(0, trainer.sampler.step(0))
        drawn = rollouts.collect(0)
        os.kill(ask(rollouts, 0, lambda actor: os.getpid()), signal.SIGKILL)
        scores = drawn.scores()
        local.rollouts.publish(0)
        local._start(0, local.sampler.step(0))
        expected = local.rollouts.collect(0)
        for one, other in zip(scores, expected.scores(), strict=True):
            assert one.totals.tolist() == other.totals.tolist()
        assert all(one.flow and one.flow.latents.equal(other.flow.latents)  # type: ignore[union-attr]
                   for one, other in zip(drawn.groups, expected.groups, strict=True))  # fmt: skip
        assert told(trainer, 1) == told(local, 1)
    finally:
        rollouts.close()
