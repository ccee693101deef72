"""Weights over the run and gates, by hand."""

from typing import Any

import numpy as np
import pytest

from imagerl.rewards.base import LoadedReward, RewardSpec
from imagerl.rewards.mixing import Gate, weight_at
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rewards.workers.scoring import score_request
from imagerl.rl.types import ImageRLError, RewardOutput, RewardRequest, RewardScores

NAN = float("nan")


def request(step: int = 0) -> RewardRequest:
    return RewardRequest(["p"] * 4, [[0]] * 4, np.zeros((4, 2, 2, 3), np.uint8), {}, group_size=2, step=step)


def reward(label: str, value: Any, **mix: Any) -> LoadedReward:
    return LoadedReward(label, lambda **_: value, **mix)


def score(*rewards: LoadedReward, step: int = 0) -> RewardScores:
    return score_request(rewards, request(step))


@pytest.mark.parametrize(
    ("weight", "step", "expected"),
    [
        (0.3, 7, 0.3),
        ({10: 1.0, 20: 0.0}, 0, 1.0),
        ({10: 1.0, 20: 0.0}, 10, 1.0),
        ({20: 0.0, 10: 1.0}, 13, 0.7),
        ({10: 1.0, 20: 0.0}, 500, 0.0),
        ({5: -2.0}, 0, -2.0),
    ],
)
def test_weight_at(weight: Any, step: int, expected: float) -> None:
    assert weight_at(weight, step) == pytest.approx(expected, abs=1e-12)


def test_weights_change_with_the_step() -> None:
    rewards = [reward("a", [1.0] * 4), reward("b", [1.0, 2, 3, 4], weight={0: 0.0, 10: 1.0})]
    assert score(*rewards).totals.tolist() == [1, 1, 1, 1]
    later = score(*rewards, step=5)
    assert later.totals.tolist() == [1.5, 2, 2.5, 3]
    assert later.weights == {"a": 1.0, "b": 0.5}
    assert later.gated["b"].tolist() == later.components["b"].tolist() == [1, 2, 3, 4]


def test_gate_by_another_reward() -> None:
    by = reward("ocr", [0.2, 0.8, 0.9, 1.0], weight=0.0)
    scores = score(by, reward("b", [10.0, 20, 30, 40], gate=Gate("ocr", 0.9)))
    assert scores.totals.tolist() == [0, 0, 30, 40]
    assert scores.components["b"].tolist() == [10, 20, 30, 40]  # raw in the log
    assert scores.gated["b"].tolist() == [0, 0, 30, 40]
    most = score(by, reward("b", [10.0, 20, 30, 40], gate=Gate("ocr", 0.8, at_least=False)))
    assert most.totals.tolist() == [10, 20, 0, 0]


def test_gate_by_a_part() -> None:
    ocr = reward("ocr", RewardOutput([1.0] * 4, {"exact": [1.0, 0.0, 0.0, 1.0]}), weight=0.0)
    scores = score(reward("b", [1.0, 2, 3, 4], gate=Gate("ocr/exact", 1.0)), ocr)
    assert scores.totals.tolist() == [1, 0, 0, 4]
    with pytest.raises(ImageRLError, match="asks for ocr/exakt; the parts of 'ocr' are: exact"):
        score(reward("b", [1.0] * 4, gate=Gate("ocr/exakt", 1.0)), ocr)


def test_gates_and_missing_values() -> None:
    """A gate that does not apply to a prompt is open; one that failed takes the sample with it."""
    scores = score(
        reward("ocr", [None, None, 1.0, NAN], weight=0.0), reward("b", [1.0, 2, 3, 4], gate=Gate("ocr", 0.5))
    )
    np.testing.assert_array_equal(scores.totals, [1, 2, 3, NAN])
    assert scores.failures["b"] == 1
    assert scores.reasons["b"] == "ocr, its gate, has no value"
    scores = score(reward("ocr", [0.0, 1, 1, 1]), reward("b", [None, None, 3.0, None], gate=Gate("ocr", 0.5)))
    np.testing.assert_array_equal(scores.totals, [0, 1, 4, NAN])
    np.testing.assert_array_equal(scores.gated["b"], [NAN, NAN, 3, NAN])
    assert scores.reasons["b"] == "returned None"


def test_spec_of_a_recipe_entry() -> None:
    spec = RewardSpec.from_mapping(
        {
            "name": "ocr",
            "weight": {0: 1.0},
            "gate": {"by": "colours", "at_least": 1.0, "at_most": None},
            "mode": "full",
        }
    )
    assert spec.gate == Gate("colours", 1.0) and spec.weight == {0: 1.0} and spec.settings == {"mode": "full"}
    for wrong in ({"by": "a"}, {"by": "a", "at_least": 1, "at_most": 2}, {"at_least": 1}):
        with pytest.raises(ImageRLError, match="a gate needs by and one of at_least and at_most"):
            Gate.from_mapping(wrong)


def test_workers_mix_alike() -> None:
    ours = {"import_path": f"{__file__}:ones"}
    entries = [
        ours | {"weight": {0: 0.0, 4: 1.0}},
        {"name": "colours", "gate": {"by": "ones", "at_least": 2.0}},
    ]
    columns = {"ink_rgb": [[0, 0, 0]] * 4, "background_rgb": [[0, 0, 0]] * 4}
    asked = request(step=2)
    asked.columns.update(columns)
    scorer = RewardWorkers(entries, workers=0)
    scores = scorer.collect(scorer.submit(asked))
    assert scores.weights == {"ones": 0.5, "colours": 1.0} and scores.totals.tolist() == [0.5] * 4
    with pytest.raises(ImageRLError, match="asks for twos, which is no reward"):
        RewardWorkers([ours | {"gate": {"by": "twos", "at_most": 0.0}}], workers=0)


def ones(images: list[Any]) -> list[float]:
    return [1.0] * len(images)
