"""Every algorithm in whole training steps of a model of a few thousand weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.rl.algorithms.advantages import decoupled_advantages
from imagerl.rl.engine.checkpoint import load_checkpoint, save_checkpoint
from imagerl.rl.files.metrics import is_timing
from imagerl.rl.training.trainer import Trainer
from tests.rl.algorithms.test_advantage_rows import given
from tests.rl.training.test_trainer import largest_difference, shift_rollout_logprobs, watch_loss, weights
from tests.small_run import low_tokens, small_trainer


def measured(trainer: Trainer, steps: range) -> list[dict[str, float]]:
    return [{k: v for k, v in trainer.step(step).items() if not is_timing(k)} for step in steps]


def failing(completions: list[list[int]], **_: Any) -> list[float | None]:
    """A lost sample makes microbatches count differently."""
    rewards: list[float | None] = [*low_tokens(completions)]
    rewards[1] = None
    return rewards


def first_token(completions: list[list[int]], **_: Any) -> list[float]:
    return [float(tokens[0]) for tokens in completions]


@pytest.mark.parametrize(
    "name", ["cispo", "dapo", "gdpo", "gmpo", "gspo", "luspo", "reinforce_plus_plus", "rloo", "sapo"]
)
def test_microbatches_add_up_to_the_batch(name: str) -> None:
    results = []
    for size in (8, 3):
        common = (f"algorithm.name={name}", "algorithm.updates_per_rollout=2", "algorithm.max_resamples=0")
        trainer = small_trainer(*common, f"engine.micro_batch_size={size}", failing=failing)
        (line,) = measured(trainer, range(1))
        del line["advantages/informative_samples"]  # a penalty's rounding decides whether one is exactly 0
        results.append((line, weights(trainer)))
    (whole, whole_weights), (parts, parts_weights) = results
    assert largest_difference(whole_weights, parts_weights) < 1e-6
    assert largest_difference(whole_weights, weights(small_trainer())) > 1e-4  # the step did something
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert all(math.isfinite(value) for value in whole.values())
    assert whole["policy/ratio_std"] > 0 and 0 < whole["policy/effective_actions"] <= 1


# ---- resampling --------------------------------------------------------------------------------------------


def varied_from(first: int) -> Any:
    """Equal rewards in the groups drawn before the `first`-th."""
    seen = [0]

    def reward(completions: list[list[int]], **_: Any) -> list[float]:
        values = low_tokens(completions)
        for start in range(0, len(values), 4):
            if seen[0] < first:
                values[start : start + 4] = [0.5] * 4
            seen[0] += 1
        return values

    return reward


def test_silent_groups_give_way_to_other_prompts() -> None:
    overrides = ("algorithm.name=dapo", "algorithm.max_resamples=3")
    trainer = small_trainer(*overrides, scored=varied_from(3))
    calls = watch_loss(trainer)
    drawn: list[int] = []
    submit = trainer.rollouts.scorer.submit

    def watched(request: Any, with_gold: bool = False) -> int:
        drawn.append(len(request.prompts) // 4)
        return submit(request, with_gold)

    trainer.rollouts.scorer.submit = watched  # type: ignore[method-assign]
    metrics = trainer.step(0)
    assert drawn == [2, 2, 1]  # both silent, then one of their two successors
    assert metrics["rollout/resampled_groups"] == 3 and metrics["rollout/images"] == 20
    assert metrics["advantages/zero_variance_groups"] == 0 and metrics["advantages/groups"] == 2
    ((inputs, _),) = calls
    assert inputs.advantages.ne(0).any(dim=1).view(2, 4).any(dim=1).all()
    again = small_trainer(*overrides, scored=varied_from(3))
    assert measured(again, range(1))[0] == {k: v for k, v in metrics.items() if not is_timing(k)}
    assert largest_difference(weights(trainer), weights(again)) == 0
    plain = small_trainer(*overrides, "algorithm.max_resamples=0", scored=varied_from(3)).step(0)
    assert plain["advantages/zero_variance_groups"] == 2 and "rollout/resampled_groups" not in plain


@pytest.mark.parametrize("decodes", [1, 2])
def test_resampling_ends(decodes: int) -> None:
    equal = small_trainer(
        "algorithm.name=dapo",
        f"rollout.decodes={decodes}",
        equal=lambda completions, **_: [1.0] * len(completions),
    )
    metrics = equal.step(0)
    assert metrics["rollout/resampled_groups"] == 6 and metrics["advantages/zero_variance_groups"] == 2
    assert metrics["grad_norm"] == 0
    used_up = small_trainer(
        "algorithm.name=dapo",
        "algorithm.max_resamples=99",
        equal=lambda completions, **_: [1.0] * len(completions),
    )
    assert used_up.step(0)["rollout/resampled_groups"] == 30  # 32 prompts, 2 of them first


def test_resampled_prompts_are_not_those_of_the_step() -> None:
    sampler = small_trainer().sampler
    step = {prompt.index for prompt in sampler.step(3)}
    others = [prompt.index for prompt in sampler.others(3)]
    assert len(others) == 30 and not step & set(others) and len(set(others)) == 30
    assert others == [prompt.index for prompt in sampler.others(3)] != [p.index for p in sampler.others(4)]


# ---- what outlives a step ----------------------------------------------------------------------------------

STATEFUL = (
    *("algorithm.kl_target=0.0001", "algorithm.kl_coef=0.1", "algorithm.reference_every=2", "optim.lr=0.01"),
    *("algorithm.baseline=moving_average", "algorithm.scale_rewards=batch", "run.steps=6"),
)


def test_a_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole = small_trainer(*STATEFUL)
    expected = measured(whole, range(5))
    assert len({line["kl/coef"] for line in expected}) == 5  # it adapts
    assert expected[2]["kl/k3"] == 0 < expected[3]["kl/k3"]  # the reference was renewed after two steps

    begun = small_trainer(*STATEFUL)
    assert measured(begun, range(3)) == expected[:3]
    save_checkpoint(tmp_path, 3, begun.engine.state_dict() | begun.tensors(), {"trainer": begun.state()})
    saved = load_checkpoint(tmp_path / "step_000003")
    continued = small_trainer(*STATEFUL, state=saved.tensors)
    continued.restore(saved.state["trainer"], saved.tensors)
    assert measured(continued, range(3, 5)) == expected[3:]
    assert largest_difference(weights(whole), weights(continued)) == 0

    forgetful = small_trainer(*STATEFUL, state=saved.tensors)
    assert measured(forgetful, range(3, 4)) != expected[3:4]


def test_the_kl_to_the_reference_is_that_of_the_policy_which_drew() -> None:
    trainer = small_trainer("algorithm.updates_per_rollout=3", "optim.lr=0.01")
    first, second = measured(trainer, range(2))
    assert (
        first["kl/k3"] == first["kl/k1"] == 0 < first["policy/old_kl"]
    )  # it is the reference at the first update
    assert second["kl/k3"] > 0


def test_the_controller_raises_and_lowers_the_coefficient() -> None:
    common = ("optim.lr=0.01", "algorithm.kl_coef=0.1")
    for target, sign in (("1e-6", 1), ("10", -1)):
        lines = measured(small_trainer(*common, f"algorithm.kl_target={target}"), range(4))
        coefficients = [line["kl/coef"] for line in lines]
        assert coefficients[0] == 0.1
        assert coefficients[1] < 0.1  # the first KL is 0: the policy is the reference
        assert sign * (coefficients[3] - coefficients[2]) > 0


def test_an_adapted_coefficient_is_that_of_the_loss_and_of_the_penalty() -> None:
    for place in ("loss", "reward"):
        trainer = small_trainer("algorithm.kl_target=10", "algorithm.kl_coef=0.1", f"algorithm.kl_in={place}")
        calls = watch_loss(trainer)
        lines = measured(trainer, range(2))
        wanted = [line["kl/coef"] if place == "loss" else 0.0 for line in lines]
        assert [settings["kl_coef"] for _, settings in calls] == wanted
        assert lines[0]["kl/coef"] != lines[1]["kl/coef"]


def test_a_lora_run_has_no_copy_of_the_reference() -> None:
    trainer = small_trainer("model.lora={r: 4}")
    assert trainer.policy.reference_state() == {} and trainer.tensors() == {}


# ---- options -----------------------------------------------------------------------------------------------


def test_the_kl_can_be_measured_without_being_minimised() -> None:
    free, watched = (
        small_trainer("algorithm.name=dr_grpo", f"algorithm.measure_kl={flag}", "optim.lr=0.01")
        for flag in ("false", "true")
    )
    lines = measured(watched, range(2))
    assert lines[1]["kl/k3"] > 0 and "kl/k3" not in free.step(0)
    free.step(1)
    assert largest_difference(weights(free), weights(watched)) == 0


def test_only_actions_of_high_entropy_train() -> None:
    trainer = small_trainer("algorithm.top_entropy=0.25", "algorithm.kl_coef=0", "engine.micro_batch_size=4")
    calls = watch_loss(trainer)
    metrics = trainer.step(0)
    chosen = torch.cat([inputs.policy_weights for inputs, _ in calls])  # type: ignore[misc]
    assert chosen.shape == (8, 8) and set(chosen.unique().tolist()) == {0.0, 1.0}
    assert metrics["policy/selected"] == metrics["policy/weight_mean"] == float(chosen.mean()) == 0.25
    assert metrics["policy/ratio_deviation"] == 0.0  # the look beforehand leaves the update on-policy


def test_truncated_importance_corrects_another_sampler() -> None:
    trainer = small_trainer("algorithm.importance_cap=1.5", "algorithm.kl_coef=0")
    shift_rollout_logprobs(trainer, -0.3)  # the sampler thought less of its samples
    metrics = trainer.step(0)
    assert metrics["policy/weight_mean"] == pytest.approx(math.exp(0.3), rel=1e-4)
    assert metrics["policy/importance_capped"] == 0
    assert metrics["policy/ratio_is_one_expected"] == 1 and metrics["policy/ratio_mean"] == 1
    capped = small_trainer("algorithm.importance_cap=1.2", "algorithm.kl_coef=0")
    shift_rollout_logprobs(capped, -0.3)
    metrics = capped.step(0)
    assert metrics["policy/weight_mean"] == pytest.approx(1.2) and metrics["policy/importance_capped"] == 1


def test_rewards_are_decoupled_with_their_weights() -> None:
    trainer = small_trainer("algorithm.name=gdpo", low_tokens=low_tokens)
    calls = watch_loss(trainer)
    trainer.step(0)
    totals = trainer.rollouts.scorer.scores[0].totals  # type: ignore[attr-defined]
    expected = decoupled_advantages(given(totals, 4))
    ((inputs, _),) = calls
    torch.testing.assert_close(inputs.advantages[:, 0], expected.advantages)


def test_a_loss_and_advantages_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from imagerl.rl.types import LossOutput\n"
        "def loss(inputs, clip_high):\n"
        "    value = -(inputs.logprobs * inputs.advantages).mean()\n"
        "    return LossOutput(value, {'bound': clip_high * inputs.action_mask.sum()})\n"
        "def advantages(inputs):\n"
        "    return inputs.rewards - 0.5\n"
    )
    trainer = small_trainer(
        f"algorithm.import_path={file}:loss", f"algorithm.advantage_import_path={file}:advantages"
    )
    calls = watch_loss(trainer)
    before = weights(trainer)
    metrics = trainer.step(0)
    assert metrics["policy/bound"] == pytest.approx(0.2) and metrics["kl/k3"] == 0
    assert largest_difference(before, weights(trainer)) > 0
    totals = torch.from_numpy(trainer.rollouts.scorer.scores[0].totals)  # type: ignore[attr-defined]
    torch.testing.assert_close(calls[0][0].advantages[:, 0], (totals - 0.5).float())
