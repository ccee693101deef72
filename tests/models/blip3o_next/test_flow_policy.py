"""Rollout and replay of denoising steps on a decoder of a few thousand weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from imagerl.models.blip3o_next.policy import ImagePolicy
from imagerl.models.common.flow_policy import FlowPolicy
from imagerl.rl.data.tiny.world import prompt_set
from imagerl.rl.errors import ImageRLError
from imagerl.rl.types import FlowSampling, SamplingParams
from tests.micro import micro_policy
from tests.models.helpers import load_policy

SAMPLING = FlowSampling("sde", 0.7, range(1, 3), guidance=2.0, steps=4)


@pytest.fixture
def policy() -> ImagePolicy:
    policy, _ = micro_policy()
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.decoder.sana.parameters():  # its last layer begins at zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def inputs(policy: ImagePolicy, batch: int = 3, steps: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = policy.latent_shape
    hidden = torch.randn(batch, policy.num_actions + 1, 32, generator=generator)
    return (
        hidden,
        torch.randn(batch, *shape, generator=generator),
        torch.randn(batch, steps, *shape, generator=generator),
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_empty_window_is_the_deterministic_sampler(policy: ImagePolicy, guidance: float) -> None:
    hidden, noise, step_noise = inputs(policy)
    sampling = FlowSampling("ode", 0.0, range(0), guidance, 4)
    finished, trajectory = FlowPolicy(policy.decoder).sample(
        {"hidden": hidden}, noise, step_noise[:, :0], sampling
    )
    torch.testing.assert_close(
        finished, policy.decoder.latents(hidden, noise, guidance, 4), rtol=0, atol=1e-6
    )
    assert torch.equal(trajectory.latents[:, 0], finished) and trajectory.rollout_logprobs.shape == (3, 0)


@pytest.mark.parametrize("sampler", ["sde", "dance", "cps"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_replay_repeats_the_log_probs_of_the_rollout(
    policy: ImagePolicy, sampler: str, guidance: float
) -> None:
    """In another batch, on the way on which gradients flow."""
    flow = FlowPolicy(policy.decoder)
    sampling = replace(SAMPLING, sampler=sampler, guidance=guidance)
    hidden, noise, step_noise = inputs(policy)
    finished, trajectory = flow.sample({"hidden": hidden}, noise, step_noise, sampling)
    assert trajectory.latents.shape == (3, 3, *policy.latent_shape)
    schedule = flow.schedule(sampling)
    for row in range(3):
        part = trajectory.part(row, 3)
        velocity = flow.trainable(part.condition, part.latents[:, :-1], schedule.sigma.expand(1, 2), guidance)
        scores = flow.score(velocity, part.latents, schedule)
        torch.testing.assert_close(scores.logprobs, part.rollout_logprobs, rtol=0, atol=1e-5)
        # what was drawn is mean + std · noise, and the next step began there
        drawn = scores.means[:, 0] + schedule.std[0] * step_noise[row : row + 1, 0]
        torch.testing.assert_close(drawn, part.latents[:, 1], rtol=0, atol=1e-5)
    assert (finished - trajectory.latents[:, -1]).abs().max() > 1e-3  # the last step is outside of the window


def test_the_noise_is_each_samples_own(policy: ImagePolicy) -> None:
    flow = FlowPolicy(policy.decoder)
    hidden, noise, step_noise = inputs(policy)
    together, _ = flow.sample({"hidden": hidden}, noise, step_noise, SAMPLING)
    alone, _ = flow.sample({"hidden": hidden[1:2]}, noise[1:2], step_noise[1:2], SAMPLING)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-5)
    other, _ = flow.sample({"hidden": hidden}, noise, step_noise.flip(1), SAMPLING)
    assert (other - together).abs().max() > 1e-2


def test_only_the_network_trains_and_the_autoencoder_is_not_part_of_it(policy: ImagePolicy) -> None:
    flow = FlowPolicy(policy.decoder)
    names = {name.split(".")[0] for name, p in flow.trainable.named_parameters() if p.requires_grad}
    assert names == {"connector", "sana"}
    assert not any(p.requires_grad for p in policy.decoder.vae.parameters())
    hidden, noise, step_noise = inputs(policy)
    _, trajectory = flow.sample({"hidden": hidden}, noise, step_noise, SAMPLING)
    schedule = flow.schedule(SAMPLING)
    velocity = flow.trainable(
        {"hidden": hidden}, trajectory.latents[:, :-1], schedule.sigma.expand(3, 2), 2.0
    )
    flow.score(velocity, trajectory.latents, schedule).logprobs.sum().backward()
    missing = [name for name, p in flow.trainable.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad is None for p in policy.decoder.vae.parameters())


def test_the_reference_stays_where_it_was(policy: ImagePolicy) -> None:
    flow = FlowPolicy(policy.decoder)
    hidden, noise, _ = inputs(policy)
    arguments = ({"hidden": hidden}, noise[:, None], torch.full((3, 1), 0.5), 2.0)
    before = flow.trainable(*arguments).detach()
    with pytest.raises(ImageRLError, match="no reference decoder"):
        flow.reference_velocity(*arguments)
    flow.freeze_reference()
    for parameter in flow.trainable.parameters():
        parameter.data += 0.05
    assert torch.equal(flow.reference_velocity(*arguments), before)
    assert (flow.trainable(*arguments) - before).abs().max() > 1e-3


def test_lora_trains_adapters_refers_to_the_base_and_merges(policy: ImagePolicy) -> None:
    hidden, noise, _ = inputs(policy)
    arguments = ({"hidden": hidden}, noise[:, None], torch.full((3, 1), 0.5), 2.0)
    plain = FlowPolicy(policy.decoder).trainable(*arguments).detach()
    keys = set(policy.decoder.sana.state_dict())
    flow = FlowPolicy(policy.decoder)
    flow.add_lora(2, 4.0, ["to_q", "to_v", "to_out.0"])
    flow.freeze_reference()
    trained = {name: p for name, p in flow.trainable.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    torch.testing.assert_close(flow.trainable(*arguments), plain, rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted = flow.trainable(*arguments).detach()
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(flow.reference_velocity(*arguments), plain, rtol=0, atol=1e-6)
    flow.merge_lora()
    assert set(policy.decoder.sana.state_dict()) == keys
    torch.testing.assert_close(flow.trainable(*arguments), adapted, rtol=0, atol=1e-5)


def test_adapters_of_layers_that_are_not_there_are_refused(policy: ImagePolicy) -> None:
    with pytest.raises(ImageRLError, match=r"algorithm\.flow\.lora.*to_x"):
        FlowPolicy(policy.decoder).add_lora(2, 4.0, ["to_x"])


@pytest.mark.slow
def test_the_gradient_goes_through_both_branches_of_guidance() -> None:
    """flow_grpo detaches the unguided branch and descends along another direction: at guidance 2 on the shipped model
    the cosine between the two is the one of docs/flow.md."""
    policy, _ = load_policy("tiny")
    flow = FlowPolicy(policy.decoder)
    prompts = prompt_set("train", 16)
    draws = torch.Generator().manual_seed(0)
    uniforms = torch.rand(16, policy.num_actions, generator=draws, dtype=torch.float64)
    hidden = policy.sample_tokens(policy.encode(prompts), uniforms, SamplingParams()).states["hidden"]
    noise = torch.randn(16, *policy.latent_shape, generator=draws)
    step_noise = torch.randn(16, 2, *policy.latent_shape, generator=draws)
    _, trajectory = flow.sample({"hidden": hidden}, noise, step_noise, SAMPLING)
    schedule = flow.schedule(SAMPLING)
    points = ({"hidden": hidden}, trajectory.latents[:, :-1], schedule.sigma.expand(16, 2))
    advantages = torch.randn(16, 1, generator=draws)

    def gradient(velocity: Tensor) -> Tensor:
        objective = (advantages * flow.score(velocity, trajectory.latents, schedule).logprobs).mean()
        parameters = list(flow.trainable.parameters())
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(objective, parameters, materialize_grads=True)]
        )

    ours = flow.trainable(*points, 2.0)
    given, unguided = flow.trainable(*points, 1.0), flow.trainable(*points, 0.0).detach()
    theirs = unguided + 2.0 * (given - unguided)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)  # the same velocity
    both, one = gradient(ours), gradient(theirs)
    assert torch.nn.functional.cosine_similarity(both, one, dim=0).item() == pytest.approx(0.924, abs=0.01)
