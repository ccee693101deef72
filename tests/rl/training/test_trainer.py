"""One training step and what it must not do, on a model of a few thousand weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagerl.rl.algorithms.advantages import group_advantages
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import is_timing
from imagerl.rl.training.token_half import TokenHalf
from imagerl.rl.training.trainer import Trainer
from imagerl.rl.types import LossInputs, SamplingParams, TokenTrajectory
from tests.micro import micro_policy
from tests.small_run import low_tokens, small_trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.trainable.named_parameters()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def watch_loss(trainer: Trainer) -> list[tuple[LossInputs, dict[str, Any]]]:
    """Everything that the loss is called with from now on."""
    calls: list[tuple[LossInputs, dict[str, Any]]] = []
    (tokens,) = trainer.halves
    assert isinstance(tokens, TokenHalf)
    loss = tokens.policy_loss

    def watched(inputs: LossInputs, **settings: Any) -> Any:
        calls.append((replace(inputs, logprobs=inputs.logprobs.detach().clone()), settings))
        return loss(inputs, **settings)

    tokens.policy_loss = watched
    return calls


def gradients(trainer: Trainer, step: int = 0) -> dict[str, Tensor]:
    """The gradients that the engine is given in a step."""
    found: dict[str, Tensor] = {}
    engine_step = trainer.engine.step

    def watched() -> float:
        for name, parameter in trainer.policy.trainable.named_parameters():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()
        return engine_step()

    trainer.engine.step = watched  # type: ignore[method-assign]
    trainer.step(step)
    return found


def shift_rollout_logprobs(trainer: Trainer, shift: float) -> None:
    sample = trainer.policy.sample_tokens

    def shifted(*arguments: Any) -> TokenTrajectory:
        trajectory = sample(*arguments)
        trajectory.rollout_logprobs = trajectory.rollout_logprobs + shift
        return trajectory

    trainer.policy.sample_tokens = shifted  # type: ignore[method-assign]


# ---- ratio -------------------------------------------------------------------------------------------------


def test_one_update_is_on_policy_by_design() -> None:
    trainer = small_trainer()
    calls = watch_loss(trainer)
    for step in range(2):
        metrics = trainer.step(step)
        assert metrics["policy/ratio_is_one_expected"] == 1.0
        assert metrics["policy/ratio_mean"] == 1.0 and metrics["policy/ratio_deviation"] == 0.0
        assert metrics["policy/clip_low"] == metrics["policy/clip_high"] == metrics["policy/old_kl"] == 0.0
    assert len(calls) == 2
    assert all(torch.equal(inputs.old_logprobs, inputs.logprobs) for inputs, _ in calls)


def test_several_updates_compare_with_the_trainer_before_the_first() -> None:
    trainer = small_trainer("algorithm.updates_per_rollout=3", "optim.lr=0.003", "algorithm.clip_high=0.01")
    shift_rollout_logprobs(trainer, 0.004)  # below the limit; nothing but the gap may show it
    calls = watch_loss(trainer)
    metrics = trainer.step(0)
    inputs = [inputs for inputs, _ in calls]
    assert len(inputs) == 3
    torch.testing.assert_close(inputs[0].old_logprobs, inputs[0].logprobs, rtol=0, atol=1e-6)
    assert torch.equal(inputs[0].old_logprobs, inputs[2].old_logprobs)
    moved = [float((i.logprobs - i.old_logprobs).abs().mean()) for i in inputs]
    assert 100 * moved[0] < moved[1] < moved[2]
    assert metrics["policy/ratio_is_one_expected"] == 0.0 and metrics["policy/updates"] == 3.0
    expected = float(((inputs[2].logprobs - inputs[2].old_logprobs).exp() - 1).abs().mean())
    assert metrics["policy/ratio_deviation"] == pytest.approx(expected, rel=1e-4) and expected > 0.005
    assert metrics["policy/clip_high"] > 0
    assert metrics["rollout/logprob_diff_mean"] == pytest.approx(0.004, abs=1e-5)


# ---- accumulation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", ["sequence", "tokens", "constant"])
def test_microbatches_add_up_to_the_batch(normaliser: str) -> None:
    def failing(completions: list[list[int]], **_: Any) -> list[float | None]:
        """Lost samples make microbatches count differently."""
        rewards: list[float | None] = [*low_tokens(completions)]
        rewards[1] = None
        return rewards

    results = []
    for size in (8, 3):
        common = (f"algorithm.normaliser={normaliser}", "algorithm.updates_per_rollout=2")
        trainer = small_trainer(*common, f"engine.micro_batch_size={size}", failing=failing)
        results.append(([trainer.step(step) for step in range(2)], weights(trainer)))
    (whole, whole_weights), (parts, parts_weights) = results
    assert largest_difference(whole_weights, parts_weights) < 1e-6
    assert largest_difference(whole_weights, weights(small_trainer())) > 1e-3  # the steps did something
    for one, other in zip(whole, parts, strict=True):
        measured = {key: value for key, value in one.items() if not is_timing(key)}
        assert {key: other[key] for key in measured} == pytest.approx(measured, rel=1e-4, abs=1e-6)


def test_chunks_of_prompts_change_nothing() -> None:
    whole, chunked = (
        small_trainer(f"rollout.decode_chunk={size}", f"rollout.sample_chunk={size}")
        for size in ("null", "1")
    )
    assert chunked.step(0)["loss"] == pytest.approx(whole.step(0)["loss"], abs=1e-6)
    assert largest_difference(weights(whole), weights(chunked)) < 1e-5


# ---- rewards that fail -------------------------------------------------------------------------------------

LEFT_OUT = 2  # a sample of the first group


def scored_as(value: float | None) -> Callable[..., list[float | None]]:
    def scored(completions: list[list[int]], **_: Any) -> list[float | None]:
        rewards: list[float | None] = [*low_tokens(completions)]
        rewards[LEFT_OUT] = value
        return rewards

    return scored


def scored_as_its_group(completions: list[list[int]], **_: Any) -> list[float]:
    """The sample gets the mean of its group's others: it changes no advantage and has none itself."""
    rewards = low_tokens(completions)
    rewards[LEFT_OUT] = float(np.mean([r for i, r in enumerate(rewards[:4]) if i != LEFT_OUT]))
    return rewards


def raising() -> Callable[..., list[float]]:
    culprit: list[int] = []

    def scored(completions: list[list[int]], **_: Any) -> list[float]:
        if len(completions) == 8:  # a step's first call; repeated by halves
            culprit[:] = completions[LEFT_OUT]
        if culprit in completions:
            raise ValueError("no such picture")
        return low_tokens(completions)

    return scored


@pytest.mark.parametrize(
    "reward",
    [scored_as(None), scored_as(math.nan), scored_as(math.inf), raising()],
    ids=["None", "NaN", "inf", "raises"],
)
def test_a_sample_without_a_value_is_left_out(reward: Callable[..., Any]) -> None:
    common = ("algorithm.scale_rewards=none", "algorithm.kl_coef=0")
    reference = gradients(small_trainer(*common, scored=scored_as_its_group))
    trainer = small_trainer(*common, scored=reward)
    calls = watch_loss(trainer)
    found = gradients(trainer)
    # the mean is over 7 samples instead of 8
    assert (
        largest_difference({n: 7 * g for n, g in found.items()}, {n: 8 * g for n, g in reference.items()})
        < 1e-5
    )
    assert max(float(g.abs().max()) for g in reference.values()) > 1e-2
    ((inputs, _),) = calls
    assert inputs.action_mask.all(dim=1).tolist() == [row != LEFT_OUT for row in range(8)]
    metrics = trainer.step(1)
    assert metrics["reward/failed"] == metrics["advantages/invalid_samples"] == 1.0
    assert all(math.isfinite(v) for v in metrics.values())


def test_too_many_failures_stop_with_the_reason() -> None:
    def broken(images: list[Any], **_: Any) -> list[float]:
        raise ValueError("camera\nbroken")

    trainer = small_trainer(broken=broken)
    before = weights(trainer)
    with pytest.raises(ImageRLError) as caught:
        trainer.step(0)
    message = str(caught.value)
    assert (
        "100%" in message and "max_failure_rate" in message and "broken: ValueError: camera broken" in message
    )
    assert "\n" not in message
    assert largest_difference(before, weights(trainer)) == 0


def test_a_step_without_any_reward_changes_nothing_when_that_is_allowed() -> None:
    def silent(images: list[Any], **_: Any) -> list[None]:
        return [None] * len(images)

    trainer = small_trainer("rewards.max_failure_rate=1", silent=silent)
    before = weights(trainer)
    metrics = trainer.step(0)
    assert metrics["reward/failed"] == 8.0 and metrics["policy/updates"] == 0.0
    assert largest_difference(before, weights(trainer)) == 0


def test_equal_rewards_teach_nothing() -> None:
    trainer = small_trainer("algorithm.kl_coef=0", equal=lambda completions, **_: [0.3] * len(completions))
    before = weights(trainer)
    metrics = trainer.step(0)
    assert metrics["grad_norm"] == 0.0 and metrics["advantages/zero_variance_groups"] == 2.0
    assert largest_difference(before, weights(trainer)) == 0


# ---- KL, entropy, control ----------------------------------------------------------------------------------


def test_kl_is_zero_first_and_positive_later() -> None:
    trainer = small_trainer("optim.lr=0.01")
    first, *_, last = [trainer.step(step) for step in range(3)]
    assert [first[f"kl/{name}"] for name in ("k1", "k2", "k3")] == [0.0, 0.0, 0.0]
    assert last["kl/k3"] > 1e-3 and last["kl/k2"] > 1e-3 and last["kl/k1"] != 0.0


def test_kl_holds_the_policy_back() -> None:
    far, near = (small_trainer(f"algorithm.kl_coef={c}", "optim.lr=0.01") for c in ("0.000001", "10"))
    for step in range(6):
        apart, close = far.step(step), near.step(step)
    assert close["kl/k3"] < 0.5 * apart["kl/k3"]


def test_kl_in_the_reward_enters_the_advantages_only() -> None:
    trainer = small_trainer("algorithm.kl_in=reward", "algorithm.kl_coef=0.1", "optim.lr=0.01")
    trainer.step(0)
    calls = watch_loss(trainer)
    metrics = trainer.step(1)
    ((inputs, settings),) = calls
    assert settings["kl_coef"] == 0.0 and inputs.ref_logprobs is not None
    totals = trainer.rollouts.scorer.scores[-1].totals  # type: ignore[attr-defined]
    penalty = (inputs.logprobs - inputs.ref_logprobs).double().sum(dim=1)
    assert float(penalty.abs().max()) > 0.1
    expected = group_advantages(torch.from_numpy(totals) - 0.1 * penalty, 4)
    torch.testing.assert_close(inputs.advantages[:, 0], expected.advantages, rtol=0, atol=1e-4)
    assert metrics["reward/mean"] == pytest.approx(totals.mean())  # reported as it was given


@pytest.mark.parametrize("normaliser", ["sequence", "tokens"])
def test_an_entropy_bonus_raises_entropy(normaliser: str) -> None:
    def equal(completions: list[list[int]], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    common = ("algorithm.kl_coef=0", f"algorithm.normaliser={normaliser}", "rollout.temperature=0.1")
    trainer = small_trainer(*common, "algorithm.entropy_coef=1", equal=equal)
    batch = trainer._assemble(trainer._roll_out(0).groups, 0)[0]
    arguments = (batch.prompts, batch.tokens, SamplingParams(0.1))
    before = trainer.policy.trainable(*arguments).entropy.mean().item()
    trainer.step(0)
    assert trainer.policy.trainable(*arguments).entropy.mean().item() > before + 0.01


def test_shuffled_rewards_are_the_same_numbers_elsewhere() -> None:
    usual, shuffled = (
        small_trainer("algorithm.scale_rewards=none", f"algorithm.shuffle_rewards={flag}")
        for flag in ("false", "true")
    )
    calls = watch_loss(shuffled)
    ours, theirs = usual.step(0), shuffled.step(0)
    assert theirs["reward/mean"] == ours["reward/mean"]
    ((inputs, _),) = calls
    totals = torch.from_numpy(shuffled.rollouts.scorer.scores[0].totals)  # type: ignore[attr-defined]
    honest = group_advantages(totals, 4, "none").advantages
    assert not torch.allclose(inputs.advantages[:, 0], honest)
    assert theirs["grad_norm"] != ours["grad_norm"]


# ---- LoRA --------------------------------------------------------------------------------------------------


def test_lora_trains_adapters_and_refers_to_the_base() -> None:
    trainer = small_trainer("model.lora={r: 4}", "optim.lr=0.02")
    before = weights(trainer)
    first, second = trainer.step(0), trainer.step(1)
    assert first["kl/k3"] == 0.0 and second["kl/k3"] > 0.0
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name for name in moved)
    assert {n for n, p in trainer.policy.trainable.named_parameters() if p.requires_grad} >= moved

    base = micro_policy()[0]
    ids, mask = base.encode_prompts(["a word", "another word in red"])
    tokens = torch.arange(16).view(2, 8)
    expected = base.trainable({"ids": ids, "mask": mask}, tokens, SamplingParams()).logprobs
    reference = trainer.policy.reference_scores({"ids": ids, "mask": mask}, tokens, SamplingParams()).logprobs
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-6)
    adapted = trainer.policy.trainable({"ids": ids, "mask": mask}, tokens, SamplingParams()).logprobs.detach()
    assert float((adapted - expected).abs().max()) > 1e-3


# ---- sampler against trainer -------------------------------------------------------------------------------


def test_a_sampler_that_disagrees_stops_the_run() -> None:
    trainer = small_trainer("engine.micro_batch_size=4")
    shift_rollout_logprobs(trainer, 0.1)
    before = weights(trainer)
    with pytest.raises(ImageRLError, match=r"disagree by 0\.1 .*rollout\.max_logprob_diff") as caught:
        trainer.step(0)
    assert "\n" not in str(caught.value)
    assert largest_difference(before, weights(trainer)) == 0


def test_a_stale_sampler_is_noticed() -> None:
    """The weights change with every update, so sampling from older ones must show."""
    trainer = small_trainer("optim.lr=0.02")
    trainer.policy.refresh_sampler()
    trainer.policy.release_sampler = trainer.policy.refresh_sampler = lambda: None  # type: ignore[method-assign]
    trainer.step(0)
    with pytest.raises(ImageRLError, match="sampler and trainer disagree"):
        trainer.step(1)


# ---- what rewards see, what is logged ----------------------------------------------------------------------


def test_rewards_see_whole_groups_in_order() -> None:
    seen: list[dict[str, Any]] = []

    def watching(**given: Any) -> list[float]:
        seen.append(given)
        return [0.0] * len(given["prompts"])

    trainer = small_trainer(watching=watching)
    trainer.step(3)
    (given,) = seen
    expected = [prompt for prompt in trainer.sampler.step(3) for _ in range(4)]
    assert given["prompts"] == [prompt.text for prompt in expected]
    assert given["target"] == [prompt.columns["target"] for prompt in expected]
    assert all(image.mode == "RGB" and image.size == (64, 32) for image in given["images"])
    assert len({tuple(tokens) for tokens in given["completions"]}) > 4


def test_everything_that_the_log_promises() -> None:
    metrics = small_trainer(low_tokens=low_tokens, other=lambda images, **_: [1.0] * len(images)).step(0)
    assert set(metrics) >= {
        *("reward/mean", "reward/std", "reward/failed", "reward/low_tokens/mean", "reward/other/std"),
        *("advantages/advantage_std", "advantages/zero_variance_groups", "advantages/incomparable_groups"),
        *("kl/k1", "kl/k2", "kl/k3", "policy/entropy", "policy/ratio_mean", "policy/ratio_deviation"),
        *("policy/ratio_is_one_expected", "policy/clip_low", "policy/clip_high", "loss", "grad_norm", "lr"),
        *("rollout/logprob_diff_mean", "rollout/logprob_diff_max", "images_per_s", "time/step_s"),
        *(f"time/{phase}_s" for phase in ("rollout", "reference", "reward_wait", "update")),
        *(f"share/{phase}" for phase in ("rollout", "reference", "reward_wait", "update", "other")),
    }
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/low_tokens/mean"] + 1.0)
    assert sum(value for key, value in metrics.items() if key.startswith("share/")) == pytest.approx(1.0)
    assert 0 < metrics["policy/entropy"] <= math.log(16) + 1e-6
    assert metrics["rollout/logprob_diff_max"] < 1e-5


# ---- learning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", [False, True])
def test_an_easy_reward_is_learned_and_a_shuffled_one_is_not(control: bool) -> None:
    trainer = small_trainer(
        "rollout.prompts_per_step=4",
        "engine.micro_batch_size=32",
        "rollout.group_size=8",
        "optim.lr=0.01",
        f"algorithm.shuffle_rewards={str(control).lower()}",
    )
    rewards = [trainer.step(step)["reward/mean"] for step in range(12)]
    gain = float(np.mean(rewards[-3:]) - np.mean(rewards[:2]))
    assert abs(gain) < 0.2 if control else gain > 0.3
