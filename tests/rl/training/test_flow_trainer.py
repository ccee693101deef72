"""Training steps on the decoder, alone and with the tokens, on a model of a few thousand weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.rl.config.flow import FlowConfig
from imagerl.rl.config.flow_table import FLOW_ALGORITHMS
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.metrics import is_timing
from imagerl.rl.training.flow_half import window_at
from imagerl.rl.training.trainer import Trainer
from tests.micro import micro_policy
from tests.small_run import small_trainer

COMMON = ("rollout.flow_steps=4", "optim.lr=0.003", "engine.micro_batch_size=4")


def brightness(images: list[Any], **_: Any) -> list[float]:
    return [float(np.asarray(image).mean() / 255) for image in images]


def stirred() -> ImagePolicy:
    """A micro policy whose decoder says something: the transformer's last layer begins at zero."""
    policy, _ = micro_policy()
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.decoder.sana.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def flow_trainer(*overrides: str, **rewards: Any) -> Trainer:
    return small_trainer(*COMMON, *overrides, policy=stirred(), **(rewards or {"brightness": brightness}))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    policy: Any = trainer.policy
    found = {f"tokens.{n}": p for n, p in policy.trainable.named_parameters()}
    found |= {f"decoder.{n}": p for n, p in policy.decoder.named_parameters()}
    return {name: p.detach().clone() for name, p in found.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {".".join(n.split(".")[:2]) for n in before if not torch.equal(before[n], after[n])}


@pytest.mark.parametrize("name", FLOW_ALGORITHMS)
def test_every_algorithm_trains_the_network_and_nothing_else(name: str) -> None:
    trainer = flow_trainer(f"algorithm.flow={{name: {name}, window_size: 2}}")
    before = weights(trainer)
    first, second = trainer.step(0), trainer.step(1)
    assert moved(before, weights(trainer)) == {"decoder.connector", "decoder.sana"}
    for metrics in (first, second):
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert metrics["flow/updates"] == 1.0 and metrics["grad_norm"] > 0
        assert metrics["flow/logprob_diff_max"] <= 1e-5
        assert metrics.get("flow/ratio_deviation", 0.0) == 0.0
        assert not any(key.startswith(("policy/", "advantages/")) for key in metrics)
    if FLOW_ALGORITHMS[name].kl_coef:  # type: ignore[index]
        assert first["flow/kl"] == 0.0 and second["flow/kl"] > 0.0


@pytest.mark.parametrize("name", ["flow_grpo", "nft", "awm"])
def test_the_reward_rises(name: str) -> None:
    """Brightness is the decoder's business: a few large steps must show."""
    more = "rollout.group_size=8", "rollout.guidance=1", "rollout.flow_steps=3", "engine.micro_batch_size=16"
    trainer = flow_trainer(f"algorithm.flow={{name: {name}, kl_coef: 0, lr: 0.02, points: 2}}", *more)
    rewards = [trainer.step(step)["reward/mean"] for step in range(6)]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 2e-3


def test_microbatches_add_up_to_the_batch() -> None:
    results = []
    for size in (8, 3):
        trainer = flow_trainer("algorithm.flow={name: flow_grpo}", f"engine.micro_batch_size={size}")
        results.append((trainer.step(0), weights(trainer)))
    (whole, whole_weights), (parts, parts_weights) = results
    for name in whole_weights:
        torch.testing.assert_close(whole_weights[name], parts_weights[name], rtol=0, atol=1e-6)
    measured = {key: value for key, value in whole.items() if not is_timing(key) and "diff" not in key}
    assert {key: parts[key] for key in measured} == pytest.approx(measured, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["flow_grpo", "grpo_guard", "flow_dppo", "nft", "awm"])
def test_several_updates_move_away_from_the_old_policy(name: str) -> None:
    trainer = flow_trainer(f"algorithm.flow={{name: {name}}}", "algorithm.updates_per_rollout=3")
    metrics = trainer.step(0)
    assert metrics["flow/updates"] == 3.0
    assert metrics["flow/old_distance" if name in ("nft", "awm") else "flow/old_kl"] > 0
    if name != "nft":
        assert metrics["flow/ratio_deviation"] > 0


def test_lora_trains_adapters_alone() -> None:
    trainer = flow_trainer(
        "algorithm.flow={name: flow_grpo, lora: {r: 2, alpha: 4, target_modules: [to_q, to_v]}}"
    )
    before = weights(trainer)
    first, second = trainer.step(0), trainer.step(1)
    after = weights(trainer)
    assert first["flow/kl"] == 0.0 and second["flow/kl"] > 0.0
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)


def test_a_replay_that_sees_something_else_stops_the_run() -> None:
    trainer = flow_trainer("algorithm.flow={name: flow_grpo}")
    decode_steps = trainer.policy.flow.decode_steps

    def shifted(*arguments: Any) -> Any:
        pictures, trajectory = decode_steps(*arguments)
        trajectory.latents = trajectory.latents + 0.01
        return pictures, trajectory

    trainer.policy.flow.decode_steps = shifted  # type: ignore[method-assign]
    before = weights(trainer)
    with pytest.raises(
        ImageRLError, match=r"disagree by .*algorithm\.flow\.max_logprob_diff is 1e-05"
    ) as caught:
        trainer.step(0)
    assert "\n" not in str(caught.value)
    assert not moved(before, weights(trainer))


def test_the_replay_never_runs_the_autoencoder() -> None:
    trainer = flow_trainer("algorithm.flow={name: flow_grpo}", "algorithm.updates_per_rollout=2")
    calls: list[int] = []
    policy: Any = trainer.policy
    policy.decoder.vae.decoder.register_forward_hook(lambda _m, _i, pictures: calls.append(len(pictures)))
    trainer.step(0)
    assert calls == [8]  # the rollout's pictures, once


@pytest.mark.parametrize("joint", ["false", "true"])
def test_the_old_policy_of_nft_draws_and_moves_as_its_formula_says(joint: str) -> None:
    """After update u it keeps η = min(u / 4, 1/2) of itself: θ_old = η θ_old + (1 − η) θ."""
    old_policy = f"algorithm.flow={{name: nft, joint: {joint}, old_policy: {{rate: 0.25, most: 0.5}}}}"
    trainer = flow_trainer(old_policy, "run.steps=9")
    policy: Any = trainer.policy
    drawing, decode_steps = [], policy.flow.decode_steps
    policy.flow.decode_steps = lambda *a: drawing.append(weights(trainer)) or decode_steps(*a)
    old = weights(trainer)
    for step, decay in enumerate((0.25, 0.5, 0.5)):
        before = weights(trainer)
        metrics = trainer.step(step)
        assert metrics["flow/old_decay"] == decay
        assert (metrics["flow/old_distance"] > 0) == (step > 0)
        for name, drawn in drawing.pop().items():
            expected = old[name] if name.startswith("decoder.") else before[name]
            torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-7)
        old = {name: decay * old[name] + (1 - decay) * now for name, now in weights(trainer).items()}


def test_samples_without_a_reward_are_left_out() -> None:
    def failing(images: list[Any], **_: Any) -> list[float | None]:
        rewards: list[float | None] = [*brightness(images)]
        rewards[2] = None
        return rewards

    trainer = flow_trainer("algorithm.flow={name: flow_grpo}", failing=failing)
    metrics = trainer.step(0)
    assert metrics["flow/advantages/invalid_samples"] == 1.0 and metrics["flow/updates"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())


# ---- both halves -------------------------------------------------------------------------------------------

JOINT = "algorithm.flow={name: flow_grpo, joint: true}"


def test_joint_trains_both_halves_each_with_its_own_rate() -> None:
    trainer = flow_trainer(JOINT, "algorithm.flow.lr=0.001", "optim.lr=0.004")
    before = weights(trainer)
    first, second = trainer.step(0), trainer.step(1)
    after = weights(trainer)
    assert moved(before, after) == {"tokens.lm", "decoder.connector", "decoder.sana"}
    assert first["lr"] == 0.004 and first["flow/lr"] == pytest.approx(0.001)
    largest = {half: max(float((after[n] - before[n]).abs().max()) for n in before if n.startswith(half))
               for half in ("tokens", "decoder")}  # fmt: skip
    assert largest["tokens"] == pytest.approx(4 * largest["decoder"], rel=0.3)  # Adam's step is about lr
    assert second["kl/k3"] > 0 and second["flow/kl"] > 0
    assert 0 < first["flow/grad_part"] < 1


def test_joint_gradients_are_those_of_the_halves_alone() -> None:
    """The same rollout, so nothing but the sum of two losses: each half gets what it gets alone."""
    gradients = []
    for overrides in ((), ("algorithm.flow={name: flow_grpo}",), (JOINT,)):
        trainer = flow_trainer(*overrides, "optim.max_grad_norm=0")
        engine_step, found = trainer.engine.step, {}
        policy: Any = trainer.policy

        def watched(policy: Any = policy, found: dict[str, Tensor] = found, step: Any = engine_step) -> float:
            named = [*policy.trainable.named_parameters(), *policy.decoder.named_parameters()]
            found.update({n: p.grad.clone() for n, p in named if p.grad is not None})
            return step()

        trainer.engine.step = watched  # type: ignore[method-assign]
        if not overrides:  # the same stochastic pictures, without training on them
            sampling = flow_trainer(JOINT).halves[1].sampling(0)
            policy.train_decoder().trainable.requires_grad_(False)
            start = trainer.rollouts.start
            trainer.rollouts.start = lambda *a, go=start, s=sampling: go(*a[:-1], s)  # type: ignore[method-assign]
        trainer.step(0)
        gradients.append(found)
    tokens, flow, joint = gradients
    assert tokens.keys() | flow.keys() == joint.keys() and not tokens.keys() & flow.keys()
    for name, gradient in joint.items():
        torch.testing.assert_close(gradient, {**tokens, **flow}[name], rtol=1e-4, atol=1e-7)


def test_several_pictures_of_a_token_sequence() -> None:
    """Tokens are compared by the mean of their pictures, pictures with those of the same tokens."""
    trainer = flow_trainer(
        JOINT, "rollout.decodes=3", "algorithm.scale_rewards=none", "engine.micro_batch_size=3"
    )
    seen: list[Any] = []
    advantages = trainer.advantages
    trainer.advantages = lambda inputs: seen.append(inputs) or advantages(inputs)  # type: ignore[func-returns-value]
    metrics = trainer.step(0)
    tokens, pictures = seen
    raw = torch.from_numpy(trainer.rollouts.scorer.scores[0].totals)  # type: ignore[attr-defined]
    assert raw.shape == (2 * 4 * 3,) and len(np.unique(raw.numpy())) > 20
    torch.testing.assert_close(tokens.rewards, raw.view(8, 3).mean(1))
    assert tokens.group_size == 4
    assert torch.equal(pictures.rewards, raw) and pictures.group_size == 3
    split = raw.view(2, 4, 3)
    assert metrics["reward/variance/decoder"] == pytest.approx(float(split.var(2).mean()))
    assert metrics["rollout/images"] == 24.0
    assert metrics["flow/logprob_diff_max"] <= 1e-5 and metrics["rollout/logprob_diff_max"] < 1e-4


# ---- what outlives a step ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flow",
    [
        "{name: flow_grpo}",
        "{name: nft, lora: {r: 2, target_modules: [to_q]}, old_policy: {rate: 0.25}}",
        "{joint: true, lr: 0.001}",
        "{name: nft, joint: true, old_policy: {rate: 0.25}}",
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(flow: str) -> None:
    common = (*COMMON, f"algorithm.flow={flow}", "run.steps=3")

    def steps(trainer: Trainer, which: range) -> list[dict[str, float]]:
        found = [trainer.step(step) for step in which]
        return [{key: value for key, value in metrics.items() if not is_timing(key)} for metrics in found]

    whole = small_trainer(*common, policy=stirred(), brightness=brightness)
    expected = steps(whole, range(3))
    stopped = small_trainer(*common, policy=stirred(), brightness=brightness)
    assert steps(stopped, range(2)) == expected[:2]
    resumed = small_trainer(
        *common, policy=stirred(), state=stopped.engine.state_dict(), brightness=brightness
    )
    resumed.restore(stopped.state(), stopped.engine.state_dict() | stopped.tensors())
    assert steps(resumed, range(2, 3)) == expected[2:]
    ours, theirs = whole.engine.state_dict(), resumed.engine.state_dict()
    for group in ours:
        assert all(torch.equal(ours[group][name], theirs[group][name]) for name in ours[group])


# ---- windows -----------------------------------------------------------------------------------------------


def test_windows_leave_the_last_step_alone() -> None:
    every = FlowConfig(name="flow_grpo")
    assert window_at(every, 10, 7, 0) == range(9)
    assert window_at(FlowConfig(name="flow_grpo", window_stop=5), 10, 7, 0) == range(5)
    assert window_at(FlowConfig(name="nft"), 10, 7, 0) == range(0)
    fast = FlowConfig(name="flow_grpo_fast")
    windows = [window_at(fast, 10, step, 0) for step in range(200)]
    assert {window.start for window in windows} == set(range(8)) and {len(w) for w in windows} == {2}
    assert windows == [window_at(fast, 10, step, 0) for step in range(200)]
    sliding = FlowConfig(name="mixgrpo", window_every=2)
    starts = [window_at(sliding, 10, step, 0).start for step in range(14)]
    assert starts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0]
