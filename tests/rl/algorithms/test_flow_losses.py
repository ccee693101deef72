from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from imagerl.rl.algorithms.flow_kl import gaussian_kl, kl_as_flow_grpo
from imagerl.rl.algorithms.flow_losses import (
    FLOW_LOSSES,
    FlowLossInputs,
    flow_dppo_loss,
    flow_grpo_loss,
    grpo_guard_loss,
)
from imagerl.rl.algorithms.losses import loss_denominator
from tests.parity import algorithms

SETTINGS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"clip_low": 1e-3, "clip_high": 1e-3},
    "grpo_guard": {"clip_low": 1e-3, "clip_high": 1e-3},
    "flow_dppo": {"kl_threshold": 1e-4},
}


@pytest.fixture(scope="module")
def fixture() -> dict[str, Tensor]:
    return algorithms()


def public_inputs(tensors: dict[str, Tensor]) -> FlowLossInputs:
    """Six samples at one step each, as the fixture has them."""
    part = {
        key.removeprefix("loss_in/"): value for key, value in tensors.items() if key.startswith("loss_in/")
    }
    std = (part["std_dev_t"] * part["sqrt_dt"])[:, None]
    return FlowLossInputs(
        logprobs=part["log_prob"][:, None].clone().requires_grad_(),
        old_logprobs=part["old_log_prob"][:, None],
        ref_logprobs=None,
        advantages=part["advantages"][:, None],
        action_mask=torch.ones(6, 1, dtype=torch.bool),
        denominator=6.0,
        std=std,
        dt=-part["sqrt_dt"].square()[:, None],
        old_kl=gaussian_kl(part["mean"][:, None], part["old_mean"][:, None], std),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flow_grpo", "loss/flow_grpo_clip1e-3_advmax5"),
        ("grpo_guard", "loss/grpo_guard_clip1e-3_advmax5"),
        ("flow_dppo", "loss/flow_dppo_threshold1e-4"),
    ],
)
def test_losses_are_those_of_verl_omni(fixture, name, expected):
    loss = FLOW_LOSSES[name](public_inputs(fixture), **SETTINGS[name]).loss
    torch.testing.assert_close(loss.detach(), fixture[expected], rtol=1e-6, atol=1e-6)


def example(seed: int = 0, samples: int = 5, steps: int = 3) -> tuple[FlowLossInputs, Tensor]:
    """Real transitions: means of a moved policy, old and reference means, log-probs that belong to them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    std, dt = torch.tensor([0.4, 0.3, 0.2])[:steps].double(), -torch.tensor([0.3, 0.2, 0.1])[:steps].double()
    old = randn(samples, steps, 2, 3, 3)
    mean = (old + 0.02 * randn(*old.shape)).requires_grad_()
    reference = old + 0.05 * randn(*old.shape)
    drawn = old + std[:, None, None, None] * randn(*old.shape)
    mask = torch.ones(samples, steps, dtype=torch.bool)
    mask[1] = False
    inputs = FlowLossInputs(
        logprobs=logprob(drawn, mean, std),
        old_logprobs=logprob(drawn, old, std),
        ref_logprobs=None,
        advantages=randn(samples, 1),
        action_mask=mask,
        denominator=loss_denominator(mask, "sequence", steps),
        std=std,
        dt=dt,
        old_kl=exact_kl(mean, old, std),
        ref_kl=exact_kl(mean, reference, std),
    )
    return inputs, mean


def logprob(drawn: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    scale = std[:, None, None, None]
    return torch.distributions.Normal(mean, scale.expand_as(mean)).log_prob(drawn).flatten(2).mean(2)


def exact_kl(left: Tensor, right: Tensor, std: Tensor) -> Tensor:
    """In float64 through torch's own divergence: `gaussian_kl` is float32."""
    scale = std[:, None, None, None].expand_as(left)
    p, q = torch.distributions.Normal(left, scale), torch.distributions.Normal(right, scale)
    return torch.distributions.kl_divergence(p, q).flatten(2).mean(2)


def test_the_divergence_is_torchs_and_flow_grpos_is_shorter_by_dt():
    inputs, mean = example()
    other = mean.detach() + 0.1
    kl = gaussian_kl(mean, other, inputs.std.float())
    torch.testing.assert_close(kl.double(), exact_kl(mean, other, inputs.std), rtol=1e-5, atol=0)
    theirs = kl_as_flow_grpo(mean, other, inputs.std.float(), inputs.dt.float())
    coefficient = inputs.std / inputs.dt.abs().sqrt()  # their std_dev_t
    by_hand = (mean - other).square().flatten(2).mean(2) / (2 * coefficient.square())
    torch.testing.assert_close(theirs.double(), by_hand, rtol=1e-5, atol=0)
    assert torch.equal(gaussian_kl(other, other, inputs.std), torch.zeros(5, 3, dtype=torch.float64))


def test_the_divergence_against_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1, 1, 6, generator=generator) for _ in range(2))
    std = torch.tensor([0.9])
    drawn = left + std * torch.randn(200_000, 1, 6, generator=generator)
    ratio = (drawn - right).square() - (drawn - left).square()
    sampled = (ratio / (2 * std**2)).mean(2)  # log p - log q per dimension
    assert sampled.mean().item() == pytest.approx(gaussian_kl(left, right, std).item(), rel=0.01)


@pytest.mark.parametrize("name", FLOW_LOSSES)
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(name):
    inputs, mean = example()
    logprobs = inputs.logprobs
    on_policy = replace(inputs, old_logprobs=logprobs.detach(), old_kl=None, ref_kl=None)
    output = FLOW_LOSSES[name](on_policy, **SETTINGS[name])
    (gradient,) = torch.autograd.grad(output.loss, mean, retain_graph=True)
    weight = inputs.action_mask * (inputs.std / inputs.dt.abs() if name == "grpo_guard" else 1.0)
    plain = -(weight * inputs.advantages * logprobs).sum() / 3 / 4  # 3 steps, 4 of 5 samples train
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, mean)[0])
    assert gradient.abs().max() > 1e-4 and not gradient[1].any()
    assert output.metrics["ratio_deviation"] == 0 and output.metrics["old_kl"] == 0
    assert output.metrics["actions"] == 12


@pytest.mark.parametrize("name", FLOW_LOSSES)
def test_kl_term_has_the_gradient_of_the_divergence_and_none_at_the_reference(name):
    inputs, mean = example()
    still = replace(inputs, advantages=torch.zeros(5, 1, dtype=torch.float64))
    output = FLOW_LOSSES[name](still, kl_coef=2.0, **SETTINGS[name])
    (gradient,) = torch.autograd.grad(output.loss, mean, retain_graph=True)
    assert inputs.ref_kl is not None
    expected = 2 * (inputs.ref_kl * inputs.action_mask).sum() / 3 / 4
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, mean)[0])
    assert gradient.abs().max() > 1e-3
    at_reference = replace(still, ref_kl=exact_kl(mean, mean.detach(), inputs.std))
    output = FLOW_LOSSES[name](at_reference, kl_coef=2.0, **SETTINGS[name])
    assert output.loss == 0 and not torch.autograd.grad(output.loss, mean)[0].any()
    assert output.metrics["kl"] == 0


@pytest.mark.parametrize("name", FLOW_LOSSES)
def test_microbatches_add_up_to_the_batch_and_order_does_not_matter(name):
    inputs, mean = example()
    settings = SETTINGS[name] | {"kl_coef": 0.5}
    whole = FLOW_LOSSES[name](inputs, **settings)
    (gradient,) = torch.autograd.grad(whole.loss, mean, retain_graph=True)
    total, summed = torch.zeros(5, 3, 2, 3, 3, dtype=torch.float64), 0.0
    for which in (torch.tensor([4, 1]), torch.tensor([0, 3, 2])):
        output = FLOW_LOSSES[name](rows(inputs, which), **settings)
        total += torch.autograd.grad(output.loss, mean, retain_graph=True)[0]
        summed += output.loss.item()
    torch.testing.assert_close(total, gradient)
    assert summed == pytest.approx(whole.loss.item(), rel=1e-12)


def rows(inputs: FlowLossInputs, which: Tensor) -> FlowLossInputs:
    names = ("logprobs", "old_logprobs", "advantages", "action_mask", "old_kl", "ref_kl")
    return replace(inputs, **{name: getattr(inputs, name)[which] for name in names})


@pytest.mark.parametrize("name", FLOW_LOSSES)
def test_a_sample_that_does_not_train_may_hold_anything(name):
    inputs, mean = example()
    settings = SETTINGS[name] | {"kl_coef": 0.5}
    clean = FLOW_LOSSES[name](inputs, **settings)
    (expected,) = torch.autograd.grad(clean.loss, mean, retain_graph=True)
    spoilt = {}
    for key in ("logprobs", "old_logprobs", "advantages", "old_kl", "ref_kl"):
        value = getattr(inputs, key)
        bad = torch.full_like(value, float("nan"))
        spoilt[key] = torch.where(torch.arange(5)[:, None] == 1, bad, value)
    output = FLOW_LOSSES[name](replace(inputs, **spoilt), **settings)
    torch.testing.assert_close(torch.autograd.grad(output.loss, mean)[0], expected)
    assert output.metrics["ratio"].isfinite() and output.loss == clean.loss


def test_the_guarded_ratio_is_the_projection_of_the_shift_on_the_noise():
    """Quadratic parts cancel: (log ratio + KL) · std = mean(noise · shift), whatever the step's std."""
    generator = torch.Generator().manual_seed(3)
    noise, shift = (torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    for size in (0.05, 1.5):
        std = torch.tensor([size], dtype=torch.float64)
        old, mask = torch.zeros_like(noise), torch.ones(4, 1, dtype=torch.bool)
        drawn, mean = old + size * noise, old + 0.01 * shift
        inputs = FlowLossInputs(
            logprobs=logprob(drawn[:, :, None], mean[:, :, None], std),
            old_logprobs=logprob(drawn[:, :, None], old[:, :, None], std),
            ref_logprobs=None,
            advantages=torch.ones(4, 1, dtype=torch.float64),
            action_mask=mask,
            denominator=4.0,
            std=std,
            dt=torch.tensor([-0.5]),
            old_kl=exact_kl(mean[:, :, None], old[:, :, None], std),
        )
        loss = grpo_guard_loss(inputs, clip_low=0.9, clip_high=0.9).loss
        by_hand = -torch.exp(0.01 * (noise * shift).flatten(2).mean(2)).mean() / 0.5
        torch.testing.assert_close(loss, by_hand)


def test_dppo_stops_only_what_moves_further_away():
    """Ratios 1.1, 0.9 with advantages of both signs; the first column is far from the old policy."""
    logprobs = torch.log(torch.tensor([[1.1, 1.1], [0.9, 0.9], [1.1, 1.1], [0.9, 0.9]])).requires_grad_()
    inputs = FlowLossInputs(
        logprobs=logprobs,
        old_logprobs=torch.zeros(4, 2),
        ref_logprobs=None,
        advantages=torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]),
        action_mask=torch.ones(4, 2, dtype=torch.bool),
        denominator=4.0,
        std=torch.ones(2),
        dt=torch.ones(2),
        old_kl=torch.tensor([[1e-4, 1e-6]]).repeat(4, 1),
    )
    output = flow_dppo_loss(inputs, kl_threshold=1e-5)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    assert (gradient == 0).tolist() == [[True, False], [False, False], [False, False], [True, False]]
    assert output.metrics["clip_high"] == 1 and output.metrics["clip_low"] == 1


def test_advantages_are_clamped_and_impossible_settings_refused():
    inputs, _ = example()
    huge = replace(inputs, advantages=inputs.advantages * 100, ref_kl=None)
    limited = replace(inputs, advantages=(inputs.advantages * 100).clamp(-5, 5), ref_kl=None)
    assert flow_grpo_loss(huge).loss == flow_grpo_loss(limited).loss
    assert flow_grpo_loss(huge).loss != flow_grpo_loss(huge, advantage_max=6.0).loss
    with pytest.raises(ValueError, match="ref_kl"):
        flow_grpo_loss(huge, kl_coef=0.1)
    with pytest.raises(ValueError, match="nothing trains"):
        flow_grpo_loss(replace(huge, denominator=0.0))
