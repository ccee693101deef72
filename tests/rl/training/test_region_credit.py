"""What rewards say of regions, from their answer to the loss of each token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rewards.base import LoadedReward
from imagerl.rewards.workers.scoring import score_request
from imagerl.rl.rollout.scores import merge_scores, scores_of_half
from imagerl.rl.training.token_half import TokenHalf
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import RewardOutput, RewardRequest
from tests.micro import micro_policy
from tests.small_run import small_trainer

COLUMNS = [0, 1, 2, 3] * 2  # of the eight tokens, on two rows
SIDES = {"left": (0.0, 0.0, 0.5, 1.0), "right": (0.5, 0.0, 1.0, 1.0)}
SETTINGS = ("algorithm.scale_rewards=none", "algorithm.region_credit=0.5")


def low(tokens: list[int], columns: tuple[int, ...]) -> float:
    return float(np.mean([t < 8 for t, column in zip(tokens, COLUMNS, strict=True) if column in columns]))


def by_side(completions: list[list[int]], **_: Any) -> RewardOutput:
    """The share of low tokens, of the picture and of each side."""
    sides = [(low(tokens, (0, 1)), low(tokens, (2, 3))) for tokens in completions]
    regions = [[(left, *SIDES["left"]), (right, *SIDES["right"])] for left, right in sides]
    return RewardOutput([(left + right) / 2 for left, right in sides], regions=regions)


def gridded() -> ImagePolicy:
    policy, _ = micro_policy()
    policy.config["image_tokenizer"] = {"image_size": [32, 64], "patch": [16, 16]}
    assert policy.prompts.canvas(None).grid == (2, 4)  # type: ignore[arg-type]
    return policy


def trained(monkeypatch: pytest.MonkeyPatch, *overrides: str, **rewards: Any) -> tuple[Trainer, torch.Tensor]:
    """A step, and the advantages [B, N] that its loss has used."""
    trainer = small_trainer(*SETTINGS, *overrides, policy=gridded(), **(rewards or {"by_side": by_side}))
    seen: list[torch.Tensor] = []
    loss = TokenHalf.loss

    def watched(half: Any, scores: Any, part: Any, denominator: float) -> Any:
        seen.append(part.advantages)
        return loss(half, scores, part, denominator)

    monkeypatch.setattr(TokenHalf, "loss", watched)
    trainer.step(0)
    return trainer, torch.cat(seen)


def test_tokens_answer_for_their_side(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []
    assemble = TokenHalf.assemble
    monkeypatch.setattr(TokenHalf, "assemble", lambda *a: groups.extend(a[1]) or assemble(*a))
    _, advantages = trained(monkeypatch)
    assert advantages.shape == (8, 8)
    for number, group in enumerate(groups):
        tokens = group.tokens.tolist()
        left, right = (np.array([low(row, side) for row in tokens]) for side in ((0, 1), (2, 3)))
        whole = (left + right) / 2
        wanted = [
            (whole - whole.mean()) + 0.5 * (own - own.mean())
            for own in (left if column < 2 else right for column in COLUMNS)
        ]
        found = advantages[4 * number : 4 * number + 4]
        np.testing.assert_allclose(found, np.stack(wanted, axis=1), atol=1e-6)


def test_shuffled_rewards_take_their_credit_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the control would learn from the regions."""
    _, plain = trained(monkeypatch)
    _, shuffled = trained(monkeypatch, "algorithm.shuffle_rewards=true")
    assert not torch.equal(plain, shuffled)
    # The same samples' credit, in another order: what a token has beyond its sample's first token.
    own, other = ((rows - rows[:, :1]).double().numpy().round(5).tolist() for rows in (plain, shuffled))
    np.testing.assert_allclose(sorted(own), sorted(other), atol=2e-5)


def test_rewards_without_regions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own reward in the place of ocr trains as without credit."""

    def plain(completions: list[list[int]], **_: Any) -> list[float]:
        return [low(tokens, (0, 1, 2, 3)) for tokens in completions]

    with pytest.warns(UserWarning, match=r"no effect: none of the rewards \(plain\) tells regions"):
        _, credited = trained(monkeypatch, plain=plain)
    _, without = trained(monkeypatch, "algorithm.region_credit=0", plain=plain)
    torch.testing.assert_close(credited, without.expand_as(credited))


def scored(*rewards: LoadedReward, size: int = 2) -> Any:
    pictures = np.zeros((size, 4, 4, 3), np.uint8)
    return score_request(rewards, RewardRequest(["x"] * size, [[0] * 8] * size, pictures, {}, size))


def some(count: int) -> Any:
    return lambda images, **_: {
        "rewards": [1.0] * len(images),
        "regions": [[(0.5, 0, 0, 1, 1)] * (count - place) for place in range(len(images))],
    }


def test_scores_keep_regions_by_reward_weighted_and_padded() -> None:
    scores = scored(
        LoadedReward("a", some(2), 2.0), LoadedReward("b", by_side), LoadedReward("off", some(2), 0.0)
    )
    assert scores.regions.keys() == {"a", "b"}
    first, second = scores.regions["a"]
    np.testing.assert_array_equal(first, [[1.0, 0, 0, 1, 1]] * 2)  # 0.5, weight 2
    np.testing.assert_array_equal(second, [[1.0, 0, 0, 1, 1], [np.nan] * 5])
    merged = merge_scores([scores, scored(LoadedReward("a", some(3))), scored(LoadedReward("b", by_side))])
    assert merged.regions["a"].shape == (6, 3, 5) and merged.regions["b"].shape == (6, 2, 5)
    np.testing.assert_array_equal(np.isfinite(merged.regions["a"][..., 0]).sum(axis=1), [2, 1, 3, 2, 0, 0])
    np.testing.assert_array_equal(np.isfinite(merged.regions["b"][..., 0]).sum(axis=1), [2, 2, 0, 0, 2, 2])


def test_a_half_sees_the_regions_of_its_own_rewards() -> None:
    scores = scored(LoadedReward("a", some(1), half="flow"), LoadedReward("b", by_side))
    assert scores_of_half(scores, "tokens", ["b"]).regions.keys() == {"b"}
