"""Rewards that teach one half of the generator only: totals, advantages and metrics of each half by hand."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagerl.rewards.base import LoadedReward, RewardSpec
from imagerl.rewards.workers.scoring import score_request
from imagerl.rl.config.recipe import validate_recipe
from imagerl.rl.config.train import Recipe
from imagerl.rl.errors import ImageRLError
from imagerl.rl.rollout.scores import merge_scores, scores_of_half
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import RewardRequest
from tests.small_run import recipe_data, small_trainer

# Two prompts of four samples. The meaning is for the tokens, the detail for the decoder, and the text for both.
MEANING = [0.0, 1.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5]
DETAIL = [3.0, 3.0, 3.0, 3.0, 0.0, 10.0, 0.0, 10.0]
TEXT = [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
HALVES = {"meaning": "tokens", "detail": "flow", "text": "both"}
WEIGHTS = {"meaning": 2.0, "detail": 0.1, "text": 1.0}


def spread(values: list[float]) -> list[float]:
    """Group-relative advantages of groups of four, (r - mean) / (std + 1e-4)."""
    rows = np.array(values).reshape(-1, 4)
    centred = rows - rows.mean(1, keepdims=True)
    return list((centred / (rows.std(1, ddof=1, keepdims=True) + 1e-4)).ravel())


def reward(values: list[Any]) -> Any:
    """Values by sample; they come round with each step."""
    places = count()
    return lambda images, **_: [values[next(places) % len(values)] for _ in images]


def joint_trainer(**values: list[Any]) -> Trainer:
    chosen = {name: reward(own) for name, own in values.items()}
    specs = [
        {"import_path": f"unused.py:{name}", "half": HALVES[name], "weight": WEIGHTS[name]} for name in chosen
    ]
    trainer = small_trainer(
        "algorithm.flow={name: flow_grpo, joint: true}",
        "rollout.flow_steps=3",
        "engine.micro_batch_size=4",
        specs=specs,
        **chosen,
    )
    scorer: Any = trainer.rollouts.scorer
    scorer.rewards = [
        LoadedReward(each.label, each.fn, WEIGHTS[each.label], half=HALVES[each.label])  # type: ignore[arg-type]
        for each in scorer.rewards
    ]
    return trainer


def request(size: int) -> RewardRequest:
    return RewardRequest([""] * size, [[0]] * size, np.zeros((size, 1, 1, 3), np.uint8), {}, 4)


def loaded(**values: list[Any]) -> list[LoadedReward]:
    return [
        LoadedReward(name, reward(own), WEIGHTS[name], half=HALVES[name])  # type: ignore[arg-type]
        for name, own in values.items()
    ]


def test_each_half_has_a_total_of_its_own_rewards() -> None:
    scores = score_request(loaded(meaning=MEANING, detail=DETAIL, text=TEXT), request(8))
    np.testing.assert_allclose(scores.halves["tokens"], 2 * np.array(MEANING) + TEXT)
    np.testing.assert_allclose(scores.halves["flow"], 0.1 * np.array(DETAIL) + TEXT)
    np.testing.assert_allclose(scores.totals, 2 * np.array(MEANING) + 0.1 * np.array(DETAIL) + TEXT)
    both = merge_scores([scores, scores])
    assert all(len(totals) == 16 for totals in both.halves.values())
    own = scores_of_half(scores, "flow", ["detail", "text"])
    assert list(own.gated) == ["detail", "text"] and own.weights == {"detail": 0.1, "text": 1.0}
    np.testing.assert_array_equal(own.totals, scores.halves["flow"])


def test_what_one_half_lacks_does_not_cost_the_other() -> None:
    """A missing value loses the sample for the half that it teaches; a prompt that it is not for has no total there."""
    detail = [None, None, None, None, math.nan, 10.0, 0.0, 10.0]
    scores = score_request(loaded(meaning=MEANING, detail=detail), request(8))
    np.testing.assert_allclose(scores.halves["tokens"], 2 * np.array(MEANING))
    np.testing.assert_allclose(scores.halves["flow"], [math.nan] * 5 + [1.0, 0.0, 1.0])


def test_each_half_trains_on_its_own_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = joint_trainer(meaning=MEANING, detail=DETAIL, text=TEXT)
    outputs: list[Any] = []
    make = trainer.advantages
    monkeypatch.setattr(trainer, "advantages", lambda inputs: outputs.append(make(inputs)) or outputs[-1])
    metrics = trainer.step(0)
    tokens, flow = (output.advantages for output in outputs)
    wanted = spread([2 * m + t for m, t in zip(MEANING, TEXT, strict=True)])
    np.testing.assert_allclose(tokens, wanted, atol=1e-6)
    wanted = spread([0.1 * d + t for d, t in zip(DETAIL, TEXT, strict=True)])
    np.testing.assert_allclose(flow, wanted, atol=1e-6)
    # Both are logged: the second prompt teaches the tokens nothing and the decoder something.
    assert (
        metrics["advantages/zero_variance_groups"] == 1
        and metrics["flow/advantages/zero_variance_groups"] == 0
    )
    assert metrics["reward/of_tokens/mean"] == pytest.approx(1.25) and metrics[
        "reward/of_flow/mean"
    ] == pytest.approx(0.65)
    parts = {key: value for key, value in metrics.items() if key.endswith("variance_part")}
    assert parts.keys() == {
        f"reward/of_{half}/variance_part"
        for half in ("tokens/meaning", "tokens/text", "flow/detail", "flow/text")
    }
    assert parts["reward/of_tokens/meaning/variance_part"] + parts[
        "reward/of_tokens/text/variance_part"
    ] == pytest.approx(1)


def test_a_half_whose_rewards_are_all_equal_stays_as_it_is() -> None:
    trainer = joint_trainer(meaning=MEANING, detail=[1.0])
    flow: Any = trainer.policy.flow
    before = [weight.detach().clone() for weight in flow.trainable.parameters()]
    metrics = trainer.step(0)
    assert metrics["flow/grad_norm"] == 0 and metrics["grad_norm"] > 0
    after = list(flow.trainable.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_moving_average_is_each_halfs_own() -> None:
    trainer = joint_trainer(meaning=MEANING, detail=DETAIL)
    assert trainer.moving_means == {"tokens": None, "flow": None}
    trainer.step(0)
    assert trainer.moving_means == pytest.approx({"tokens": 1.0, "flow": 0.4})
    again = joint_trainer(meaning=MEANING, detail=DETAIL)
    again.restore(trainer.state(), {})
    assert again.moving_means == trainer.moving_means


@pytest.mark.parametrize(
    ("joint", "halves", "message"),
    [
        (
            False,
            ["flow", "both"],
            'the half of reward "r0" is flow, which has no meaning where one half trains',
        ),
        (
            True,
            ["flow", "flow"],
            "no reward with a weight teaches the tokens; give one half: tokens or half: both",
        ),
        (True, ["decoder", "both"], '"rewards.functions.0.half" cannot be "decoder"'),
        (True, ["flow", "tokens"], None),
    ],
)
def test_recipes_say_what_a_reward_teaches(joint: bool, halves: list[str], message: str | None) -> None:
    data = recipe_data(
        Path("unused"), f"algorithm.flow={{joint: {str(joint).lower()}}}", "rollout.flow_steps=4"
    )
    data["rewards"]["functions"] = [
        {"import_path": f"reward.py:r{number}", "half": half} for number, half in enumerate(halves)
    ]
    if message is None:
        recipe = validate_recipe(Recipe, data, "test")
        assert recipe.rewards.labels_of("flow") == ["r0"] and recipe.rewards.labels_of("tokens") == ["r1"]
        entry = recipe.rewards.functions[0].model_dump()
        assert RewardSpec.from_mapping(entry).half == "flow"  # and it is no setting of the reward
        assert not RewardSpec.from_mapping(entry).settings
        return
    with pytest.raises(ImageRLError, match=message.split("(")[0].replace(".", "[.]")):
        validate_recipe(Recipe, data, "test")
