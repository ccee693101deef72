"""Both halves learn in the same steps, each from its own reward: short runs on small random weights, against rewards
that are dealt out at random.

What it prints is in docs/glm-image.md: `python -m pytest -s -m slow tests/models/glm_image/test_learning.py`"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from imagerl.models.glm_image.loading import load_policy
from imagerl.models.glm_image.policy import GlmImagePolicy
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.rollout.engine import RolloutEngine, training_sampling
from tests.models.glm_image.small import small_folder
from tests.small_run import small_trainer

STEPS, HELDOUT = 12, 24
HALVES = {"low_codes": "tokens", "darkness": "flow"}


def low_codes(completions: list[list[int]], **_: Any) -> list[float]:
    """Share of the tokens from the lower half of the 48 codes."""
    return [float(np.mean([token < 24 for token in tokens])) for tokens in completions]


def darkness(images: list[Any], **_: Any) -> list[float]:
    return [1 - float(np.asarray(image).mean()) / 255 for image in images]


def heldout(policy: GlmImagePolicy, trainer: Any) -> dict[str, np.ndarray]:
    """Rewards of held-out prompts, one picture each, by the same random numbers whenever it is called."""
    rollout = RolloutEngine(policy, training_sampling(trainer.recipe), 1, nullcontext)
    groups = [g for part in rollout.generate(prompt_set("heldout", HELDOUT), 1, "heldout") for g in part]
    codes = low_codes([group.tokens[0].tolist() for group in groups])
    return {
        "low_codes": np.array(codes),
        "darkness": np.array(darkness([group.images[0] for group in groups])),
    }


def change(folder: Path, seed: int, shuffled: bool) -> dict[str, tuple[float, np.ndarray]]:
    """Mean rewards before, and paired differences after training."""
    policy = load_policy(folder, "cpu", torch.float32)
    trainer = small_trainer(
        f"run.seed={seed}",
        f"run.steps={STEPS}",
        "rollout.prompts_per_step=2",
        "rollout.group_size=8",
        "rollout.decodes=2",
        "rollout.flow_steps=3",
        "rollout.guidance=1",
        "engine.micro_batch_size=16",
        "optim.lr=0.002",
        "algorithm.flow={name: flow_grpo, joint: true, lr: 0.002}",
        f"algorithm.shuffle_rewards={str(shuffled).lower()}",
        policy=policy,
        specs=[{"import_path": f"unused.py:{name}", "half": half} for name, half in HALVES.items()],
        low_codes=low_codes,
        darkness=darkness,
    )
    scorer: Any = trainer.rollouts.scorer
    scorer.rewards = [replace(each, half=HALVES[each.label]) for each in scorer.rewards]
    before = heldout(policy, trainer)
    for step in range(STEPS):
        trainer.step(step)
    after = heldout(policy, trainer)
    return {name: (float(before[name].mean()), after[name] - before[name]) for name in before}


@pytest.mark.slow
def test_each_half_learns_its_own_reward_and_by_chance_none(tmp_path: Path) -> None:
    folder = small_folder(tmp_path)
    learnt, chance = [], []
    for seed, shuffled in ((0, False), (1, False), (2, False), (0, True)):
        for name, (before, differences) in change(folder, seed, shuffled).items():
            interval = stats.bootstrap(
                [differences], np.mean, rng=np.random.default_rng(0)
            ).confidence_interval
            (chance if shuffled else learnt).append((name, interval))
            mean, told = differences.mean(), f"({interval.low:+.3f} to {interval.high:+.3f})"
            print(
                f"seed {seed}{', rewards shuffled' if shuffled else ''}, {name}: {before:.3f} -> {before + mean:.3f}, "
                f"{mean:+.3f} {told}"
            )
    assert all(interval.low > 0 for _, interval in learnt)
    for name, interval in chance:
        if name == "low_codes":  # darkness is moved by other tokens, too
            assert interval.high < min(own.low for other, own in learnt if other == name)
