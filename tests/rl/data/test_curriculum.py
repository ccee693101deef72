"""Prompts chosen by what the run has measured of them: weights by hand, frequencies, memory, resuming, refusals."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from imagerl.rl.config.train import CurriculumConfig, load_recipe
from imagerl.rl.data.curriculum import CurriculumSampler, prompt_weights
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import is_timing
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import Prompt
from tests.command import imagerl
from tests.micro import micro_folder
from tests.small_run import small_trainer, write_recipe

PROMPTS = [Prompt(10 * i, f"prompt {i}") for i in range(6)]


def sampler(per_step: int = 2, seed: int = 0, **settings: float) -> CurriculumSampler:
    return CurriculumSampler(PROMPTS, per_step, seed, lambda _: None, CurriculumConfig(**settings))


def test_weights_are_those_of_the_formula() -> None:
    """Never drawn, half solved, solved, hopeless: 4 p (1 - p) with p = 1/2, 1/2, 17/18, 1/18."""
    found = prompt_weights(np.array([0, 8, 16, 0]), np.array([0, 16, 16, 16]), floor=0.1)
    assert found.tolist() == pytest.approx([1, 1, 0.1 + 0.9 * 17 / 81, 0.1 + 0.9 * 17 / 81])
    assert prompt_weights(np.array([5]), np.array([5]), floor=1.0).tolist() == [1]


def test_prompts_come_as_often_as_their_weights_say() -> None:
    """The first of a step is drawn with probability w / sum(w)."""
    choice = sampler(memory=1.0)
    values = np.array([[1.0] * 50, [0.0] * 50, [1.0, 0.0] * 25])
    log = choice.learn([0, 10, 20], values)
    assert log == {
        "curriculum/success": 0.5,
        "curriculum/seen": 0.5,
        "curriculum/solved": pytest.approx(1 / 3),
        "curriculum/hopeless": pytest.approx(1 / 3),
    }
    first = Counter(choice.step(step)[0].index for step in range(4000))
    extreme = 0.1 + 0.9 * 4 * (51 / 52) * (1 / 52)
    weights = np.array([extreme, extreme, 1, 1, 1, 1])
    counts = [first[prompt.index] for prompt in PROMPTS]
    assert chisquare(counts, weights / weights.sum() * 4000).pvalue > 1e-3
    assert chisquare(counts).pvalue < 1e-9


def test_a_step_has_each_prompt_once_and_others_are_the_rest() -> None:
    choice = sampler()
    for step in range(20):
        own, others = choice.step(step), choice.others(step)
        assert sorted(p.index for p in [*own, *others]) == [0, 10, 20, 30, 40, 50] and len(own) == 2
    steps = [[sampler(seed=seed).step(step) for step in range(5)] for seed in (0, 1)]
    assert steps[0] == [choice.step(step) for step in range(5)] != steps[1]


def test_what_is_remembered_fades_and_missing_values_do_not_count() -> None:
    choice = sampler(memory=0.5, threshold=0.8)
    choice.learn([30], np.array([[0.9, 0.8, 0.79, math.nan]]))
    assert choice.state() == {"30": [2.0, 3.0]}
    choice.learn([30, 10], np.array([[0.0, 0.0, 1.0, 1.0], [math.nan] * 4]))
    assert choice.state() == {"10": [0.0, 0.0], "30": [3.0, 5.5]}
    again = sampler(memory=0.5, threshold=0.8)
    again.restore(json.loads(json.dumps(choice.state())))
    assert again.state() == choice.state() and again.step(3) == choice.step(3)


def test_kinds_do_not_mix() -> None:
    """A step's prompts are of one kind; kinds come in proportion to the steps that they fill."""
    choice = CurriculumSampler(PROMPTS, 2, 0, lambda prompt: prompt.index < 20, CurriculumConfig())
    low = 0
    for step in range(600):
        kinds = {prompt.index < 20 for prompt in [*choice.step(step), *choice.others(step)]}
        assert len(kinds) == 1
        low += kinds == {True}
    assert low / 600 == pytest.approx(1 / 3, abs=0.06)


RUN = ("data.curriculum={success: low_tokens, floor: 0.01}", "rollout.prompts_per_step=4", "run.steps=4")


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_a_resumed_run_chooses_the_same_prompts(algorithm: str) -> None:
    def steps(trainer: Trainer, which: Iterable[int]) -> list[dict[str, float]]:
        return [{k: v for k, v in trainer.step(step).items() if not is_timing(k)} for step in which]

    options = (*RUN, f"algorithm.name={algorithm}")
    whole = small_trainer(*options)
    expected = steps(whole, range(4))
    begun = small_trainer(*options)
    assert steps(begun, range(2)) == expected[:2]
    kept = json.loads(json.dumps(begun.state()))
    resumed = small_trainer(*options, state=begun.engine.state_dict())
    resumed.restore(kept, {})
    assert steps(resumed, range(2, 4)) == expected[2:] and resumed.state() == whole.state()
    assert 0 < expected[0]["curriculum/success"] < 1
    assert expected[-1]["curriculum/seen"] > expected[0]["curriculum/seen"] >= 4 / 32


def test_success_is_of_the_reward_that_is_named_and_of_its_own_prompt() -> None:
    trainer = small_trainer(*RUN)
    asked = [prompt.index for prompt in trainer.sampler.step(0)]
    trainer.step(0)
    (scores,) = trainer.rollouts.scorer.scores  # type: ignore[attr-defined]
    won = (scores.components["low_tokens"].reshape(4, 4) >= 0.5).sum(1)
    assert len(set(won)) > 1
    expected = {str(index): [float(count), 4.0] for index, count in zip(asked, won, strict=True)}
    assert trainer.state()["curriculum"] == expected


def test_a_reward_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ImageRLError, match=r'success is "ocrr", and no reward is named so; it may be total, ocr'
    ):
        load_recipe("tiny_ocr_grpo", ["data.curriculum={success: ocrr}"])
    load_recipe("tiny_ocr_grpo", ["data.curriculum={success: ocr/exact_match}"])
    trainer = small_trainer(RUN[0].replace("low_tokens", "low_tokens/part"), *RUN[1:])
    with pytest.raises(ImageRLError, match='low_tokens/part", and the rewards give total, low_tokens'):
        trainer.step(0)


def test_a_part_that_no_reward_gives_is_told_before_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    micro_folder(tmp_path / "model")
    wrong = RUN[0].replace("low_tokens", "low_tokens/part")
    told = imagerl(capsys, "train", str(write_recipe(tmp_path, wrong, *RUN[1:])))
    assert told.code == 1 and "held-out after" not in told.out
    assert 'low_tokens/part", and the rewards give total, low_tokens' in told.err
