from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from imagerl.rl.algorithms.flow_matching_losses import (
    MATCHING_LOSSES,
    MatchingInputs,
    MatchingWeight,
    awm_loss,
    matching_logprobs,
    nft_loss,
    old_policy_decay,
)
from imagerl.rl.algorithms.losses import loss_denominator
from tests.parity import algorithms


def test_nft_is_that_of_verl_omni():
    tensors = algorithms()
    part = {key.removeprefix("nft_in/"): value for key, value in tensors.items() if key.startswith("nft_in/")}
    level = part["t"][:, None, None, None]
    inputs = MatchingInputs(
        velocity=part["forward"][:, None].clone().requires_grad_(),
        old_velocity=part["old"][:, None],
        ref_velocity=part["ref"][:, None],
        latents=part["x0"],
        noise=((part["xt"].double() - (1 - level).double() * part["x0"]) / level)[:, None].float(),
        sigma=part["t"][:, None],
        advantages=(2 * part["reward_prob"] - 1)[:, None] * 5,
        action_mask=torch.ones(6, 1, dtype=torch.bool),
        denominator=6.0,
    )
    loss = nft_loss(inputs, beta=0.3, advantage_max=5.0, kl_coef=1e-4, min_weight=1e-5).loss
    expected = tensors["loss/nft_beta0.3_advmax5_refkl1e-4_minweight1e-5"]
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-5)


def example(seed: int = 0, moved: float = 0.1) -> MatchingInputs:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 3, 2, 3, 3)
    old, noise, reference, shift = (torch.randn(shape, generator=generator) for _ in range(4))
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2] = False
    return MatchingInputs(
        velocity=(old + moved * shift).requires_grad_(),
        old_velocity=old,
        ref_velocity=reference,
        latents=torch.randn(4, 2, 3, 3, generator=generator),
        noise=noise,
        sigma=torch.rand(4, 3, generator=generator),
        advantages=torch.tensor([[1.0], [-2.0], [7.0], [0.5]]),
        action_mask=mask,
        denominator=loss_denominator(mask, "sequence", 3),
    )


def gradient(name: str, inputs: MatchingInputs, **settings: Any) -> Tensor:
    output = MATCHING_LOSSES[name](inputs, **settings)
    return torch.autograd.grad(output.loss, inputs.velocity)[0]


@pytest.mark.parametrize(
    ("schedule", "decays"),
    [  # the three of the public code, by hand
        ((0, 0.001, 0.5), {0: 0, 1: 0.001, 400: 0.4, 500: 0.5, 5000: 0.5}),
        ((75, 0.0075, 0.999), {0: 0, 75: 0, 76: 0.0075, 208: 0.9975, 209: 0.999}),
        ((0, 1e-9, 0.5), {0: 0, 1000: 1e-6}),
    ],
)
def test_the_decay_of_the_old_policy(schedule: tuple[int, float, float], decays: dict[int, float]) -> None:
    for updates, decay in decays.items():
        assert old_policy_decay(updates, *schedule) == pytest.approx(decay, abs=1e-12)


@pytest.mark.parametrize("name", MATCHING_LOSSES)
def test_good_samples_pull_and_bad_ones_push(name):
    """The gradient descends towards the sample's own velocity where A > 0 and away where A < 0."""
    inputs = replace(example(moved=0.0), ref_velocity=None)
    descent = -gradient(name, inputs)
    towards = (inputs.noise - inputs.latents[:, None] - inputs.velocity).detach()
    along = (descent * towards).flatten(1).sum(1)
    assert (along.sign() == torch.tensor([1, -1, 0, 1])).all()


def test_at_the_old_policy_awm_is_the_weighted_matching_loss():
    inputs = replace(example(), old_velocity=None, ref_velocity=None)
    target = inputs.noise - inputs.latents[:, None]
    error = (inputs.velocity - target).square().flatten(2).mean(2)
    plain = (inputs.advantages * inputs.action_mask * error).sum() / 3 / 3
    expected = torch.autograd.grad(plain, inputs.velocity)[0]
    torch.testing.assert_close(gradient("awm", inputs, advantage_max=100.0), expected)
    assert awm_loss(inputs).metrics["ratio_deviation"] == 0


def test_at_the_old_policy_the_gradient_of_nft_depends_on_neither_beta_nor_the_limit():
    inputs = replace(example(), old_velocity=None, ref_velocity=None, advantages=torch.tensor([[1.0]] * 4))
    first = gradient("nft", inputs, beta=1.0, advantage_max=5.0)
    assert first.abs().max() > 1e-4
    for beta, limit in ((0.1, 5.0), (1.0, 2.0)):
        again = gradient("nft", inputs, beta=beta, advantage_max=limit)
        torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", MATCHING_LOSSES)
@pytest.mark.parametrize(
    ("guidance", "spurious"), [(1.0, (0, 0, 0)), (2.0, (-0.195, 0.169, 0.053)), (4.5, (0.053, 0.854, 0.229))]
)
def test_guidance_adds_a_spurious_gradient(name, guidance, spurious):
    """Pictures of one number: captioned ones are N(0, 1/4), all together N(0, 1). The velocities of both are known, and
    the guided one, slope·x, draws N(0, 1/4^guidance). What a constant added to it does to the expected loss, by
    quadrature, less the true gradient E[A (v* - u)] of the velocity v* that those samples have, in parts of the latter.
    """
    nodes, masses = np.polynomial.hermite_e.hermegauss(8)
    z, noise = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes)).reshape(2, -1, 1))
    mass = torch.from_numpy(np.outer(masses, masses).reshape(-1, 1)) / masses.sum() ** 2
    spread = 0.5**guidance

    def slope(level, deviation):
        variance = ((1 - level) * deviation) ** 2 + level**2
        return (level - (1 - level) * deviation**2) / variance, variance

    found = []
    for level in (0.25, 0.5, 0.75):
        x = (1 - level) * spread * z + level * noise
        guided = slope(level, 1.0)[0] + guidance * (slope(level, 0.5)[0] - slope(level, 1.0)[0])
        sizes = {}
        for key, used in (("guided", guided), ("true", slope(level, spread)[0])):
            inputs = MatchingInputs(
                velocity=(used * x)[..., None, None, None].float().requires_grad_(),
                old_velocity=None,
                ref_velocity=None,
                latents=(spread * z)[..., None, None].float(),
                noise=noise[..., None, None, None].float(),
                sigma=torch.full_like(z, level).float(),
                advantages=(z * mass).float(),  # the reward is the number itself
                action_mask=torch.ones_like(z, dtype=torch.bool),
                denominator=1.0,
            )
            settings = {"min_weight": 1e3} if name == "nft" else {}  # no adaptive weight: the error itself
            sizes[key] = gradient(name, inputs, **settings).double().sum().item()
        assert sizes["true"] > 0
        found.append(sizes["guided"] / sizes["true"] - 1)
    assert found == pytest.approx(spurious, abs=2e-3)


@pytest.mark.parametrize("name", MATCHING_LOSSES)
def test_kl_is_zero_at_the_reference_and_pulls_to_it(name):
    inputs = replace(example(), advantages=torch.zeros(4, 1), old_velocity=None)
    without = gradient(name, replace(inputs, ref_velocity=None))
    pull = gradient(name, inputs, kl_coef=1.0) - without
    assert inputs.ref_velocity is not None
    weight = inputs.action_mask[:, :, None, None, None] / (3 * 3 * 18)
    expected = 2 * (inputs.velocity - inputs.ref_velocity) * weight
    torch.testing.assert_close(pull, expected.detach(), rtol=1e-4, atol=1e-6)
    there = replace(inputs, ref_velocity=inputs.velocity.detach())
    torch.testing.assert_close(gradient(name, there, kl_coef=1.0), without)
    assert MATCHING_LOSSES[name](there, kl_coef=1.0).metrics["kl"] == 0


@pytest.mark.parametrize("name", MATCHING_LOSSES)
def test_microbatches_add_up_to_the_batch_and_lost_samples_may_hold_nan(name):
    inputs = example()
    whole = gradient(name, inputs, kl_coef=0.1)
    total = torch.zeros_like(whole)
    names = (
        "velocity",
        "old_velocity",
        "ref_velocity",
        "latents",
        "noise",
        "sigma",
        "advantages",
        "action_mask",
    )
    for which in (torch.tensor([3, 1]), torch.tensor([0, 2])):
        part = replace(inputs, **{key: getattr(inputs, key)[which] for key in names})
        total += torch.autograd.grad(MATCHING_LOSSES[name](part, kl_coef=0.1).loss, inputs.velocity)[0]
    torch.testing.assert_close(total, whole)
    advantages = torch.where(torch.arange(4)[:, None] == 2, float("nan"), inputs.advantages)
    torch.testing.assert_close(gradient(name, replace(inputs, advantages=advantages), kl_coef=0.1), whole)


@pytest.mark.parametrize("weight", get_args(MatchingWeight))
def test_weights_of_the_matching_loss(weight):
    """e = 0.25 everywhere at sigma = 0.5."""
    inputs = replace(example(), sigma=torch.full((4, 3), 0.5))
    velocity = (inputs.noise - inputs.latents[:, None] + 0.5).requires_grad_()
    value = {"uniform": 0.25, "sigma": 0.125, "sigma_squared": 0.0625, "huber": 0.25}
    expected = value.get(weight, (0.25**0.25 - 1e-10**0.25) * 4 * 0.5)
    logprobs = matching_logprobs(velocity, inputs, weight)
    torch.testing.assert_close(logprobs, torch.full((4, 3), -expected), rtol=1e-4, atol=0)
    perfect = (inputs.noise - inputs.latents[:, None]).requires_grad_()
    logprobs = matching_logprobs(perfect, inputs, weight)
    assert (logprobs == 0).all()
    assert torch.autograd.grad(logprobs.sum(), perfect)[0].isfinite().all()


def test_impossible_settings_are_refused():
    inputs = example()
    with pytest.raises(ValueError, match="weight must be one of"):
        awm_loss(inputs, weight="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ref_velocity"):
        nft_loss(replace(inputs, ref_velocity=None), kl_coef=1.0)
    with pytest.raises(ValueError, match="nothing trains"):
        awm_loss(replace(inputs, denominator=0.0))
