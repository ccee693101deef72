"""Janus-Pro is trained by every token algorithm, and serves as the judge of pictures such as its own."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args

import pytest
from PIL import Image

from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.rewards.judge.reward import JudgeReward
from imagerl.rl.commands.chat_server import chat_app
from imagerl.rl.config.algorithm_table import Name
from tests.models.janus_pro.small import policy_in, saved
from tests.served import served
from tests.small_run import low_tokens, small_trainer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> JanusPolicy:
    return policy_in(saved(tmp_path_factory.mktemp("janus")))


def few_codes(completions: list[list[int]], **_: Any) -> list[float]:
    """A second reward, for those that treat rewards apart."""
    return [1 - len(set(tokens)) / len(tokens) for tokens in completions]


@pytest.mark.parametrize("name", get_args(Name))
def test_every_token_algorithm_trains_on_the_guided_distribution(shared: JanusPolicy, name: str) -> None:
    policy = copy.deepcopy(shared)
    trainer = small_trainer(
        f"algorithm.name={name}",
        "rollout.token_guidance=3",
        "algorithm.max_resamples=0",
        policy=policy,
        low_tokens=low_tokens,
        few_codes=few_codes,
    )
    metrics = [trainer.step(step) for step in range(2)]
    assert all(step["rollout/logprob_diff_max"] < 1e-5 and step["grad_norm"] > 0 for step in metrics)
    assert all(math.isfinite(step["loss"]) for step in metrics)
    moved = zip(policy.trainable.parameters(), shared.trainable.parameters(), strict=True)
    assert max(float((one - other).abs().max()) for one, other in moved) > 1e-4


def test_it_is_the_judge_of_pictures_when_it_is_served(
    shared: JanusPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights read nothing: what counts is that each picture gets the model's own answer."""
    monkeypatch.setenv("IMAGERL_SERVE_TOKEN", "of-the-tests")
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "white")]
    with served(chat_app(shared.answer, "janus")) as address:
        judge = JudgeReward(
            f"{address}/v1", "janus", rubric="read_back", key_env="IMAGERL_SERVE_TOKEN", max_tokens=4
        )
        judged = judge(prompts=["", ""], images=pictures, target=["RED", "WHITE"])
    assert len(judged.rewards) == 2 and all(value is not None for value in judged.rewards)
