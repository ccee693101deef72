from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.data.tiny.world import prompt_set, truth
from imagerl.rl.errors import ImageRLError
from imagerl.rl.evaluation.evaluate import Evaluation, GroundTruth, evaluate, try_rewards
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.types import RewardRequest, RewardScores, SamplingParams
from tests.models.helpers import lively_policy

PROMPTS = prompt_set("heldout", 5)


class Brightness:
    """A scorer with one reward, its part, a gold metric, and one sample that it cannot score."""

    def __init__(self) -> None:
        self.requests: list[RewardRequest] = []
        self.gold: list[bool] = []
        self.open: list[int] = []

    def submit(self, request: RewardRequest, with_gold: bool = False) -> int:
        self.requests.append(request)
        self.gold.append(with_gold)
        self.open.append(len(self.requests) - 1)
        return len(self.requests) - 1

    def collect(self, ticket: int) -> RewardScores:
        self.open.remove(ticket)
        request = self.requests[ticket]
        value = request.images.mean((1, 2, 3)) / 255
        value[[target == PROMPTS[3].columns["target"] for target in request.columns["target"]]] = math.nan
        exact = (value > 0.5).astype(float)
        return RewardScores(
            totals=2 * value,
            components={"ocr": value, "ocr/exact_match": exact, "colours/ink": 1 - value},
            failures={},
            reasons={},
        )

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def policy() -> ImagePolicy:
    return lively_policy()


def run(policy: ImagePolicy, batch_size: int = 2, seed: int = 0) -> tuple[Evaluation, Brightness]:
    scorer = Brightness()
    rollout = RolloutEngine(policy, SamplingParams(flow_steps=2), seed, nullcontext)
    return evaluate("ocr", PROMPTS, rollout, scorer, batch_size), scorer


def test_metrics_have_short_names_and_leave_out_what_could_not_be_scored(policy: ImagePolicy) -> None:
    result, scorer = run(policy)
    assert set(result.metrics) == {"total", "ocr", "exact_match", "colours/ink"}
    assert set(result.flat()) == {f"eval/ocr/{name}" for name in result.metrics}
    means = np.stack(result.images).mean((1, 2, 3)) / 255
    known = np.delete(means, 3)
    assert result.metrics["ocr"].n == 4
    assert result.flat()["eval/ocr/ocr"] == pytest.approx(known.mean())
    assert result.flat()["eval/ocr/total"] == pytest.approx(2 * known.mean())  # its weight
    assert result.metrics["colours/ink"].mean == pytest.approx(1 - known.mean())
    assert not result.metrics["ocr"].bounded  # four prompts
    assert [len(request.prompts) for request in scorer.requests] == [2, 2, 1]
    assert scorer.gold == [True] * 3 and not scorer.open


class Failing(Brightness):
    """One reward gives no value for `lost` of the samples, a gold metric for one."""

    def __init__(self, lost: int) -> None:
        super().__init__()
        self.lost = lost

    def collect(self, ticket: int) -> RewardScores:
        scores = super().collect(ticket)
        scores.failures = {"ocr": self.lost, "ink": 1}
        scores.reasons = {"ocr": "too red", "ink": "too blue"}
        return scores


def test_rewards_are_tried_on_a_few_pictures_of_the_whole_set(policy: ImagePolicy) -> None:
    rollout = RolloutEngine(policy, SamplingParams(flow_steps=2), 0, nullcontext)
    prompts = prompt_set("heldout", 20)
    scorer = Failing(lost=6)
    try_rewards("ocr", prompts, rollout, scorer)
    ((request,), gold) = scorer.requests, scorer.gold
    assert request.prompts == [prompt.text for prompt in prompts[::3]] and gold == [True]
    with pytest.raises(
        ImageRLError, match="'ocr' has no value for 7 of 7 pictures that were tried first: too red"
    ):
        try_rewards("ocr", prompts, rollout, Failing(lost=7))
    with pytest.raises(ImageRLError, match="'ocr' has no value for 1 of 1 "):
        try_rewards("ocr", prompts[:1], rollout, Failing(lost=1))
    perfect = GroundTruth(truth)
    with pytest.raises(ImageRLError, match="'ocr' has no value for 5 of 5 "):
        try_rewards("ocr", PROMPTS, perfect, Failing(lost=5))


def test_rows_say_which_prompt_they_are_about(policy: ImagePolicy) -> None:
    result, _ = run(policy)
    assert [row["index"] for row in result.per_prompt] == [prompt.index for prompt in PROMPTS]
    assert [row["prompt"] for row in result.per_prompt] == [prompt.text for prompt in PROMPTS]
    assert math.isnan(result.per_prompt[3]["total"])
    assert result.per_prompt[4]["total"] == pytest.approx(2 * result.images[4].mean() / 255)
    document = result.to_dict(step=7, model="tiny")
    assert document["suite"] == "ocr" and document["step"] == 7 and document["n"] == 5
    assert document["metrics"]["exact_match"] == asdict(result.metrics["exact_match"])
    assert document["per_prompt"] == result.per_prompt


def test_every_evaluation_uses_the_same_draws(policy: ImagePolicy) -> None:
    first, _ = run(policy)
    again, _ = run(policy)
    assert np.array_equal(first.images, again.images)
    assert first.flat() == again.flat()
    whole, _ = run(policy, batch_size=64)
    assert abs(np.stack(whole.images).astype(int) - first.images).max() <= 1
    other, _ = run(policy, seed=1)
    assert not np.array_equal(first.images, other.images)


class Rank:
    """One of two processes that share an evaluation; `found` is what those before it had."""

    world_size = 2

    def __init__(self, rank: int, found: list[Any]) -> None:
        self.rank, self.found = rank, found

    def gather_objects(self, value: Any) -> list[Any]:
        self.found.append(value)
        return self.found


@pytest.mark.parametrize("batch_size", [2, 64])
def test_ranks_share_an_evaluation_and_measure_what_one_does(policy: ImagePolicy, batch_size: int) -> None:
    alone, _ = run(policy, batch_size)
    found: list[Any] = []
    for rank in (1, 0):
        rollout, scorer = RolloutEngine(policy, SamplingParams(flow_steps=2), 0, nullcontext), Brightness()
        together = evaluate("ocr", PROMPTS, rollout, scorer, batch_size, shown=3, ranks=Rank(rank, found))
        assert len(scorer.requests) == {2: [2, 1], 64: [1, 0]}[batch_size][rank]
    np.testing.assert_equal(together.per_prompt, alone.per_prompt)  # bit for bit, NaN included
    assert np.array_equal(together.images, alone.images[:3])


def test_two_policies_are_compared_on_the_same_random_numbers(policy: ImagePolicy) -> None:
    seen = []

    class Watched(RolloutEngine):
        def uniforms(self, *arguments: object) -> object:  # type: ignore[override]
            seen.append(super().uniforms(*arguments))  # type: ignore[arg-type]
            return seen[-1]

    for candidate in (policy, lively_policy(seed=5)):
        rollout = Watched(candidate, SamplingParams(flow_steps=1), 0, nullcontext)
        evaluate("ocr", PROMPTS, rollout, Brightness(), 5)
    assert (seen[0] == seen[1]).all()


def test_a_reward_cannot_overwrite_a_field(policy: ImagePolicy) -> None:
    """`exact_match` is a part of the suite's reward, `index` and `prompt` are the row's own."""

    class Clashing(Brightness):
        def __init__(self, label: str) -> None:
            super().__init__()
            self.label = label

        def collect(self, ticket: int) -> RewardScores:
            scores = super().collect(ticket)
            scores.components[self.label] = scores.totals
            return scores

    rollout = RolloutEngine(policy, SamplingParams(flow_steps=2), 0, nullcontext)
    for label in ("exact_match", "index", "prompt", "total"):
        with pytest.raises(ImageRLError, match=f"reward '{label}': an evaluation of 'ocr' has another field"):
            evaluate("ocr", PROMPTS[:1], rollout, Clashing(label), 1)
