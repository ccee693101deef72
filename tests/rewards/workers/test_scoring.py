"""Combining rewards: weights, and values that are missing."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagerl.rewards.base import LoadedReward
from imagerl.rewards.boundary.guard import failed, join
from imagerl.rewards.boundary.wire import Reply
from imagerl.rewards.workers.pool import RewardWorkers
from imagerl.rewards.workers.scoring import score_request, to_pil_images
from imagerl.rl.types import ImageRLError, RewardOutput, RewardRequest, RewardScores

NAN, INF = float("nan"), float("inf")


def request(prompts: int = 2, group: int = 2) -> RewardRequest:
    size = prompts * group
    images = np.arange(size * 2 * 3 * 3, dtype=np.uint8).reshape(size, 2, 3, 3)
    return RewardRequest(
        prompts=[f"prompt {i // group}" for i in range(size)],
        completions=[[i] for i in range(size)],
        images=images,
        columns={"target": [i // group for i in range(size)]},
        group_size=group,
    )


def returning(value: Any, label: str = "a", weight: float = 1.0) -> LoadedReward:
    return LoadedReward(label, lambda **_: value, weight)


def score(*rewards: LoadedReward) -> RewardScores:
    return score_request(rewards, request())


def test_weights_apply_once_and_components_stay_raw() -> None:
    scores = score(
        returning(RewardOutput([1, 2, 3, 4], {"part": [1.0, None, 0, INF]}), "a", 0.5),
        returning(np.array([1.0, 0, 0, 1]), "b", -2.0),
    )
    assert scores.totals.tolist() == [-1.5, 1.0, 1.5, 0.0]
    assert scores.components["a"].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(scores.components["a/part"], [1, NAN, 0, NAN])
    assert list(scores.components) == ["a", "a/part", "b"]
    assert scores.failures == {"a": 0, "b": 0}
    assert scores.reasons == {}


@pytest.mark.parametrize(
    ("bad", "reason"), [(NAN, "returned nan"), (INF, "returned inf"), (None, "returned None")]
)
def test_one_bad_value_loses_one_sample(bad: float | None, reason: str) -> None:
    scores = score(returning([1.0, bad, 3.0, 4.0]), returning([1.0] * 4, "b"))
    np.testing.assert_array_equal(scores.totals, [2, NAN, 4, 5])
    np.testing.assert_array_equal(scores.components["a"], [1, NAN, 3, 4])
    assert scores.failures == {"a": 1, "b": 0}
    assert scores.reasons == {"a": reason}


def test_none_for_a_whole_group_does_not_apply() -> None:
    scores = score(returning([None, None, 3.0, 4.0]), returning([1.0] * 4, "b"))
    assert scores.totals.tolist() == [1, 1, 4, 5]
    assert scores.failures == {"a": 0, "b": 0}
    # NaN is no such statement.
    scores = score(returning([NAN, NAN, 3.0, 4.0]), returning([1.0] * 4, "b"))
    np.testing.assert_array_equal(scores.totals, [NAN, NAN, 4, 5])
    assert scores.failures == {"a": 2, "b": 0}


def test_group_to_which_nothing_applies_has_no_total() -> None:
    scores = score(returning([None, None, 3.0, 4.0]))
    np.testing.assert_array_equal(scores.totals, [NAN, NAN, 3, 4])
    assert scores.failures == {"a": 2}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1.0, 2.0], "returned 2 values for 4 samples"),
        (None, "returned NoneType; return a list"),
        (0.5, "returned float; return a list"),
        (["1", "2", "3", "4"], "returned '4', which is not a number"),
        ([[1.0, 2.0]] * 4, "returned [1.0, 2.0], which is not a number"),
        (RewardOutput([1, 2, 3, 4], {"part": [1]}), "returned 1 values for 4 samples"),
    ],
)
def test_malformed_output_is_counted(value: Any, reason: str) -> None:
    scores = score(returning(value), returning([1.0] * 4, "b"))
    assert np.isnan(scores.totals).all()
    assert scores.components["b"].tolist() == [1] * 4
    assert scores.failures == {"a": 4, "b": 0}
    assert scores.reasons["a"].startswith(reason)


def raising(error: Exception) -> Callable[..., list[float]]:
    def reward(**_: Any) -> list[float]:
        raise error

    return reward


def test_users_error_is_counted_and_ours_stops() -> None:
    scores = score(LoadedReward("a", raising(ValueError("too\nred"))))
    assert scores.failures == {"a": 4}
    assert scores.reasons["a"].startswith("ValueError: too red (test_scoring.py:")
    with pytest.raises(ImageRLError, match="mend"):
        score(LoadedReward("a", raising(ImageRLError("mend"))))


def test_rewards_see_the_samples_and_cannot_spoil_them() -> None:
    seen = []

    def vandal(**given: Any) -> list[float]:
        seen.append([np.asarray(image).copy() for image in given["images"]])
        for image in given["images"]:
            image.paste((0, 0, 0), (0, 0, *image.size))
        given["prompts"].clear()
        given["target"].clear()
        assert given["completion_ids"] == [[0], [1], [2], [3]]
        return [0.0] * 4

    asked = request()
    score_request([LoadedReward("a", vandal), LoadedReward("b", vandal)], asked)
    for images in seen:
        np.testing.assert_array_equal(np.stack(images), asked.images)
    assert (len(asked.prompts), len(asked.columns["target"])) == (4, 4)


def test_images_must_be_rgb_bytes() -> None:
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\] uint8"):
        to_pil_images(np.zeros((1, 3, 2, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="float32"):
        to_pil_images(np.zeros((1, 2, 2, 3), dtype=np.float32))


def test_shards_join_in_order() -> None:
    first = Reply([1.0], {"part": [5.0]}, None)
    joined = join([first, failed(2, "hung"), first])
    np.testing.assert_array_equal(joined.rewards, [1, NAN, NAN, 1])
    assert joined.breakdown == {"part": [5.0, None, None, 5.0]} and joined.reason == "hung"


def test_an_error_costs_only_the_samples_at_fault() -> None:
    calls = []

    def touchy(prompts: list[str], images: list[object], **_: object) -> list[float]:
        calls.append(len(prompts))
        if any(np.asarray(image).max() == 0 for image in images):
            raise ZeroDivisionError("a black picture")
        return [1.0] * len(prompts)

    asked = request()
    asked.images = np.full_like(asked.images, 9)
    asked.images[2] = 0
    scores = score_request([LoadedReward("touchy", touchy)], asked)
    np.testing.assert_array_equal(scores.totals, [1, 1, NAN, 1])
    assert scores.failures == {"touchy": 1}
    assert scores.reasons["touchy"].startswith("ZeroDivisionError: a black picture")
    assert calls == [4, 2, 2, 1, 1]


def test_a_measured_reward_costs_nothing_when_it_fails() -> None:
    measured = LoadedReward("measured", lambda **_: [NAN, 1.0, 1.0, 1.0], weight=0.0)
    scores = score_request([LoadedReward("kept", lambda **_: [1.0, 2.0, 3.0, 4.0]), measured], request())
    np.testing.assert_array_equal(scores.totals, [1, 2, 3, 4])
    assert scores.failures == {"kept": 0, "measured": 1}


CONTEXT = """
def siblings(groups, images):
    assert groups.count(groups[0]) == groups.count(groups[-1]) == 2, "a torn group"
    if 1 in groups:
        raise ValueError("asked to")
    return [float(group) for group in groups]

def late(images, progress):
    return [progress for _ in images]

def consistent(images, policy):
    return [policy for _ in images]

def plain(images, **columns):
    assert set(columns) == {"prompts", "completions", "completion_ids", "target"}
    return [0.0 for _ in images]
"""


@pytest.mark.parametrize("python", [None, sys.executable])
def test_a_reward_sees_what_it_names(tmp_path: Path, python: str | None) -> None:
    (tmp_path / "mine.py").write_text(CONTEXT)
    asked = replace(request(), progress=0.25)
    entries = [
        {"import_path": f"{tmp_path}/mine.py:{n}", "python": python} for n in ("siblings", "late", "plain")
    ]
    scorer = RewardWorkers(entries, workers=0)
    scores = scorer.collect(scorer.submit(asked))
    np.testing.assert_array_equal(scores.components["siblings"], [0, 0, NAN, NAN])  # whole groups are lost
    assert scores.reasons["siblings"].startswith("ValueError: asked to")
    assert scores.components["late"].tolist() == [0.25] * 4
    assert scores.components["plain"].tolist() == [0.0] * 4


def test_the_policy_is_where_it_trains(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CONTEXT)
    entry = {"import_path": f"{tmp_path}/mine.py:consistent"}
    scorer = RewardWorkers([entry], workers=0, policy=0.5)  # whatever trains
    assert scorer.collect(scorer.submit(request())).totals.tolist() == [0.5] * 4
    for elsewhere in (entry, {**entry, "python": sys.executable}):
        with pytest.raises(
            ImageRLError, match=r"asks for the policy.*rewards\.workers=0, and leave out python"
        ):
            RewardWorkers([elsewhere], workers=0)
