"""A guided model learns from its reward: short runs on small random weights, against rewards dealt out at random.

What it prints is in docs/families.md: `python -m pytest -s -m slow tests/models/janus_pro/test_learning.py`"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from imagerl.models.janus_pro.policy import JanusPolicy
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.rollout.engine import RolloutEngine, training_sampling
from tests.models.janus_pro.small import policy_in, saved
from tests.small_run import small_trainer

STEPS, HELDOUT = 25, 64


def low_tokens(completions: list[list[int]], **_: Any) -> list[float]:
    """Share of the tokens from the lower half of the 24 codes."""
    return [float(np.mean([token < 12 for token in tokens])) for tokens in completions]


def heldout(policy: JanusPolicy, trainer: Any) -> np.ndarray:
    """Rewards of held-out prompts, one picture each, by the same random numbers whenever it is called."""
    policy.refresh_sampler()
    rollout = RolloutEngine(policy, training_sampling(trainer.recipe), 1, nullcontext)
    groups = [
        group for part in rollout.generate(prompt_set("heldout", HELDOUT), 1, "heldout") for group in part
    ]
    return np.array(low_tokens([group.tokens[0].tolist() for group in groups]))


def change(folder: Path, seed: int, shuffled: bool) -> tuple[float, np.ndarray]:
    """Mean reward before, and paired differences after training."""
    policy = policy_in(folder)
    trainer = small_trainer(
        f"run.seed={seed}",
        f"run.steps={STEPS}",
        "rollout.prompts_per_step=4",
        "rollout.group_size=8",
        "rollout.token_guidance=3",
        "rollout.temperature=1",
        "engine.micro_batch_size=32",
        "optim.lr=0.0005",
        f"algorithm.shuffle_rewards={str(shuffled).lower()}",
        policy=policy,
        low_tokens=low_tokens,
    )
    before = heldout(policy, trainer)
    for step in range(STEPS):
        trainer.step(step)
    return float(before.mean()), heldout(policy, trainer) - before


@pytest.mark.slow
def test_the_reward_rises_and_by_chance_it_does_not(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    found = {}
    for seed, shuffled in ((seed, shuffled) for shuffled in (False, True) for seed in range(3)):
        before, differences = change(folder, seed, shuffled)
        interval = stats.bootstrap([differences], np.mean, rng=np.random.default_rng(0)).confidence_interval
        found[seed, shuffled] = interval
        name = f"seed {seed}{', rewards shuffled' if shuffled else ''}"
        mean = differences.mean()
        print(
            f"{name}: {before:.3f} -> {before + mean:.3f}, {mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
        )
    learnt = [interval.low for (_, shuffled), interval in found.items() if not shuffled]
    chance = [interval.high for (_, shuffled), interval in found.items() if shuffled]
    assert min(learnt) > 0 and max(chance) < min(learnt)
