"""What each reward has to say in the advantages: by hand, and against the advantages themselves."""

from typing import Any

import numpy as np
import pytest
import torch

from imagerl.rl.algorithms.advantages import group_advantages
from imagerl.rl.training.reward_stats import correlation, mixing_metrics, variance_parts
from imagerl.rl.types import RewardRequest, RewardScores
from tests.small_run import low_tokens, small_trainer

NAN = float("nan")


def scores_of(gated: dict[str, list[float]], weights: dict[str, float]) -> RewardScores:
    arrays = {label: np.array(values) for label, values in gated.items()}
    totals = sum(weights[label] * np.nan_to_num(values) for label, values in arrays.items())
    return RewardScores(np.asarray(totals), arrays, {}, {}, arrays, weights)


def test_parts_by_hand() -> None:
    # Centred: a = ∓1, b = ∓3, so A = a + b = ∓4: a is 1·4 of 4·4, b 3·4.
    parts = variance_parts(
        {"a": np.array([1.0, 3.0]), "b": np.array([0.0, 6.0])}, {"a": 1.0, "b": 1.0}, np.array([1.0, 9.0]), 2
    )
    assert parts == pytest.approx({"a": 0.25, "b": 0.75})
    # Weighted 1 and -0.25: A = a - 0.75 = ∓0.25, a is 4 and b -3 of it: it pulls against the sum.
    parts = variance_parts(
        {"a": np.array([1.0, 3.0]), "b": np.array([0.0, 6.0])},
        {"a": 1.0, "b": -0.25},
        np.array([1.0, 1.5]),
        2,
    )
    assert parts == pytest.approx({"a": 4.0, "b": -3.0})


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_parts_agree_with_the_advantages(scale: str) -> None:
    """Leaving a reward's term out of the advantages is what its part says: cov(term, A) / var(A)."""
    rng = np.random.default_rng(0)
    gated = {"a": rng.normal(size=24), "b": 5 * rng.normal(size=24) ** 3}
    gated["b"][:4] = NAN  # does not apply to the first prompt
    weights = {"a": 1.0, "b": 0.1}
    totals = gated["a"] + 0.1 * np.nan_to_num(gated["b"])
    totals[9] = NAN  # lost
    own = group_advantages(torch.from_numpy(totals), 4, scale, eps=1e-12).advantages.double().numpy()  # type: ignore[arg-type]
    # A is linear in the rewards once the divisors are fixed, so a small change of one reward's weight shows its term.
    usable = np.isfinite(totals).reshape(-1, 4)
    grouped = np.where(usable, totals.reshape(-1, 4), NAN)
    divisor = {"group": np.nanstd(grouped, axis=1, ddof=1, keepdims=True), "batch": 1.0, "none": 1.0}[scale]
    a = np.where(usable, gated["a"].reshape(-1, 4), NAN)
    term = np.nan_to_num((a - np.nanmean(a, axis=1, keepdims=True)) / divisor)
    whole = own.reshape(-1, 4) * (np.nanstd(totals, ddof=1) if scale == "batch" else 1.0)
    expected = float((term * whole).sum() / (whole**2).sum())
    parts = variance_parts(gated, weights, totals, 4, scale)
    assert parts["a"] == pytest.approx(expected, rel=1e-5)
    assert parts["a"] + parts["b"] == pytest.approx(1.0)


def test_decoupled_rewards_are_heard_alike() -> None:
    gated = {"small": np.array([0.0, 0.01, 0.0, 0.01]), "large": np.array([0.0, 0.0, 10.0, 10.0])}
    weights, totals = {"small": 1.0, "large": 1.0}, gated["small"] + gated["large"]
    assert variance_parts(gated, weights, totals, 4)["small"] < 1e-5
    assert variance_parts(gated, weights, totals, 4, decoupled=True) == pytest.approx(
        {"small": 0.5, "large": 0.5}
    )


def test_equal_rewards_have_no_part() -> None:
    same = {"a": np.ones(4), "b": np.full(4, 0.1)}
    assert all(np.isnan(v) for v in variance_parts(same, {"a": 1.0, "b": 0.3}, np.full(4, 1.03), 2).values())


def test_correlation_by_hand() -> None:
    a, b = np.array([0.0, 1.0, 2.0, NAN]), np.array([1.0, 0.0, 2.0, 9.0])
    assert correlation(a, b) == pytest.approx(0.5)  # deviations -1, 0, 1 and 0, -1, 1: 1 / 2
    assert np.isnan(correlation(a, np.ones(4)))
    assert np.isnan(correlation(a[:1], b[:1]))


def test_metrics_of_a_step() -> None:
    scores = scores_of({"a": [1.0, 3.0], "b": [0.0, 6.0]}, {"a": 1.0, "b": 1.0})
    assert mixing_metrics(scores, 2) == pytest.approx(
        {
            "reward/a/weight": 1.0,
            "reward/a/variance_part": 0.25,
            "reward/b/weight": 1.0,
            "reward/b/variance_part": 0.75,
            "reward/a/correlation_b": 1.0,
        }
    )
    assert mixing_metrics(scores_of({"a": [1.0, 3.0]}, {"a": 1.0}), 2) == {}


def test_the_trainer_logs_them() -> None:
    def dark(images: list[Any], **_: Any) -> list[float]:
        return [1 - np.asarray(image).mean() / 255 for image in images]

    metrics = small_trainer(low_tokens=low_tokens, dark=dark).step(0)
    assert metrics["reward/low_tokens/variance_part"] + metrics["reward/dark/variance_part"] == pytest.approx(
        1
    )
    assert -1 <= metrics["reward/low_tokens/correlation_dark"] <= 1
    assert metrics["reward/dark/weight"] == 1.0
    assert not [name for name in small_trainer().step(0) if "variance_part" in name]


def test_the_trainer_tells_rewards_its_step() -> None:
    trainer = small_trainer()
    asked: list[int] = []
    submit = trainer.rollouts.scorer.submit

    def listening(request: RewardRequest, with_gold: bool = False) -> int:
        asked.append(request.step)
        return submit(request, with_gold)

    trainer.rollouts.scorer.submit = listening  # type: ignore[method-assign]
    trainer.step(0)
    trainer.step(3)
    assert sorted(set(asked)) == [0, 3]
