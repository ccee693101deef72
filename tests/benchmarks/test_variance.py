from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest

from benchmarks.variance import crossed_split, gains, measure
from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.data.tiny.edits import edit_set
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.rollout.engine import RolloutEngine
from imagerl.rl.types import Prompt, RewardRequest, RewardScores, SamplingParams
from tests.models.helpers import edit_policy, lively_policy


def crossed(tokens: float, noise: float, both: float, shape: tuple[int, int, int]) -> np.ndarray:
    """Rewards with given standard deviations, and a mean for each prompt that must not matter."""
    generator, (prompts, group, decodes) = np.random.default_rng(0), shape
    return (
        generator.normal(0, 5, (prompts, 1, 1))
        + generator.normal(0, tokens, (prompts, group, 1))
        + generator.normal(0, noise, (prompts, 1, decodes))
        + generator.normal(0, both, shape)
    )


def test_crossed_split_by_hand() -> None:
    rewards = np.array([[[0.0, 2.0], [4.0, 10.0]]])  # rows 1, 7; columns 2, 6; mean 4; rests ±1
    split = crossed_split(rewards)
    assert split["both"].tolist() == [4.0]
    assert split["tokens"].tolist() == [18.0 - 4.0 / 2]
    assert split["noise"].tolist() == [8.0 - 4.0 / 2]


def test_crossed_split_recovers_the_variances() -> None:
    split = {
        name: values.mean() for name, values in crossed_split(crossed(0.5, 0.3, 0.2, (4000, 6, 4))).items()
    }
    assert split == pytest.approx({"tokens": 0.25, "noise": 0.09, "both": 0.04}, rel=0.03)


def test_signals_are_parts_of_the_variance_of_advantages() -> None:
    """Against advantages made from the rewards: each one's correlation with the merit, squared, is its signal."""
    generator, shape = np.random.default_rng(1), (4000, 8, 4)
    merit = generator.normal(0, 0.5, (*shape[:2], 1))
    noise, both = generator.normal(0, 0.3, (shape[0], 1, shape[2])), generator.normal(0, 0.2, shape)
    alone = generator.normal(0, 0.3, shape)  # noise of each picture's own
    report = gains(merit + noise + both, {"tokens": 1.0, "update": 1.0, "decode": 0.5, "score": 0.5})

    def correlation(rewards: np.ndarray) -> float:
        advantages = rewards.mean(axis=2) - rewards.mean(axis=(1, 2))[:, None]
        centred = merit[..., 0] - merit[..., 0].mean(axis=1, keepdims=True)
        return float(np.corrcoef(advantages.ravel(), centred.ravel())[0, 1] ** 2)

    for decodes in (1, 2, 4):
        part = (slice(None), slice(None), slice(decodes))
        assert report[f"signal/shared_{decodes}"] == pytest.approx(
            correlation((merit + noise + both)[part]), rel=0.02
        )
        assert report[f"signal/own_{decodes}"] == pytest.approx(
            correlation((merit + alone + both)[part]), rel=0.02
        )
    assert report["gain/own_1"] == report["gain/own_1_low"] == report["gain/own_1_high"] == 1
    expected = report["signal/own_4"] / report["signal/own_1"] * 3 / 6  # seconds of a sequence: 3, then 6
    assert report["gain/own_4"] == pytest.approx(expected)
    assert report["gain/own_4_low"] < expected < report["gain/own_4_high"]


def editor() -> ImagePolicy:
    policy, _ = edit_policy()
    policy.trainable.requires_grad_(True)
    return policy


@pytest.mark.parametrize(("make", "prompts"), [(lively_policy, prompt_set), (editor, edit_set)])
def test_measuring(make: Callable[[], ImagePolicy], prompts: Callable[[str, int], list[Prompt]]) -> None:
    policy = make()

    def score(request: RewardRequest) -> RewardScores:
        return RewardScores(request.images.mean(axis=(1, 2, 3)) / 255, {}, {}, {})

    sampling = SamplingParams(flow_steps=1, shared_noise=True, decodes=2)
    rollout = RolloutEngine(policy, sampling, 0, nullcontext)
    rewards, seconds = measure(policy, rollout, score, prompts("train", 5), 3, 1)
    assert rewards.shape == (5, 3, 2) and set(seconds) == {"tokens", "decode", "score", "update"}
    assert all(value > 0 for value in seconds.values())
    (groups,) = rollout.generate(prompts("train", 1), 3, "variance")
    assert rewards[0] == pytest.approx(groups[0].images.mean(axis=(1, 2, 3)).reshape(3, 2) / 255, abs=1e-2)
