"""docs/examples/trl_loop.py on the micro model: TRL's trainer, driven by our rollout, makes our update."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.rl.config.train import load_recipe
from tests.micro import micro_folder
from tests.small_run import write_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "examples" / "trl_loop.py"))


@pytest.mark.slow
def test_two_steps_of_both_trainers_agree(tmp_path: Path, example: dict[str, Any]) -> None:
    micro_folder(tmp_path / "model")
    more = ("run.steps=2", "algorithm.kl_coef=0", "algorithm.scale_rewards=none", "monitors.pictures=false")
    recipe = load_recipe(write_recipe(tmp_path, *more, reward="brightness"))
    policy, theirs, seconds = example["train_with_trl"](recipe, tmp_path / "trl")
    own, ours, _ = example["train_with_imagerl"](recipe)
    assert len(theirs) == len(seconds) == 2 and all(second > 0 for second in seconds)
    assert theirs == pytest.approx(ours, abs=1e-6)  # the same pictures, so the same rewards
    trained = {name: value.detach() for name, value in own.trainable.named_parameters()}
    before = load_recipe_model(tmp_path)
    moved = 0.0
    for name, value in policy.trainable.named_parameters():
        if name in trained:
            torch.testing.assert_close(value.detach(), trained[name], rtol=1e-4, atol=2e-6)
            moved = max(moved, float((trained[name] - before[name]).abs().max()))
    assert moved > 1e-3


def load_recipe_model(folder: Path) -> dict[str, torch.Tensor]:
    from imagerl.models.families import load_policy

    policy = load_policy(str(folder / "model"))
    return {name: value.detach() for name, value in policy.trainable.named_parameters()}


def test_table(example: dict[str, Any]) -> None:
    text = example["table"]([[0.0, 0.2, 0.4], [0.2, 0.4, 0.6]], [[0.1, 0.3, 0.4], [0.3, 0.5, 0.8]], 2)
    assert text.splitlines()[2:] == [
        "| 1–2 | 0.200 ± 0.141 | 0.300 ± 0.141 | 0.100 ± 0.000 |",
        "| 3–3 | 0.500 ± 0.141 | 0.600 ± 0.283 | 0.100 ± 0.141 |",
    ]


def test_the_head_gives_image_tokens_only(example: dict[str, Any]) -> None:
    lm = torch.nn.Module()
    lm.lm_head = torch.nn.Linear(4, 6, bias=False)
    example["image_tokens_only"](lm, slice(2, 5))
    logprobs = lm.lm_head(torch.ones(4)).log_softmax(-1)
    assert float(logprobs[2:5].exp().sum()) == pytest.approx(1)
    assert float(logprobs.exp()[[0, 1, 5]].sum()) == 0
    assert torch.isfinite(logprobs.exp() * logprobs).all() and not lm.lm_head.bias.requires_grad
