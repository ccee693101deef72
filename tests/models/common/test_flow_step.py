import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from imagerl.models.common.flow_step import (
    StepKind,
    cps_logprob_as_flow_grpo,
    next_latents,
    step_coefficients,
    transition_logprob,
    transition_mean,
)
from tests.parity import algorithms

KINDS = get_args(StepKind)
SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def public() -> dict[str, Tensor]:
    return {
        key.removeprefix("flow/"): value for key, value in algorithms().items() if key.startswith("flow/")
    }


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_step_is_that_of_flow_grpo(public, kind):
    """Row i of the fixture is step i, the first of them at sigma = 1, where flow_grpo guards the division."""
    coefficients = step_coefficients(kind, public["sigmas"], 0.7)
    for row, step in enumerate(public["step_index"].tolist()):
        x, v, following = (public[name][row : row + 1] for name in ("x", "v", "x_next"))
        mean = transition_mean(coefficients, step, x, v)
        torch.testing.assert_close(mean[0], public[f"{kind}/mean"][row], rtol=0, atol=1e-6)
        g = (
            coefficients.std / (public["sigmas"][:-1] - public["sigmas"][1:]).sqrt()
        )  # std / √−d, their std_dev_t
        std = coefficients.std if kind == "cps" else g
        torch.testing.assert_close(std[step], public[f"{kind}/std_dev_t"][row], rtol=1e-6, atol=0)
        if kind == "cps":
            logprob = cps_logprob_as_flow_grpo(following, mean)
        else:
            logprob = transition_logprob(following, mean, float(coefficients.std[step]))
        expected = public[f"{kind}/log_prob_as_flow_grpo"][row]
        torch.testing.assert_close(logprob[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma", [1 - 2**-24, 1 + 2**-23])
def test_a_schedule_that_begins_at_1_but_for_rounding_has_the_steps_of_1(sigma: float) -> None:
    exact, rounded = (step_coefficients("sde", torch.tensor([s, 0.6, 0.0]), 0.7) for s in (1.0, sigma))
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(other, one)


def test_cps_log_probs_are_flow_grpos_up_to_its_missing_factor(public):
    """Differences of log-probs, all that a ratio sees, differ by the factor 2 std^2 that flow_grpo drops."""
    coefficients = step_coefficients("cps", public["sigmas"], 0.7)
    std = float(coefficients.std[1])
    mean, moved = randn(3, 4, 5, 5), randn(3, 4, 5, 5, seed=1)
    following = randn(3, 4, 5, 5, seed=2)
    exact = transition_logprob(following, mean, std) - transition_logprob(following, moved, std)
    theirs = cps_logprob_as_flow_grpo(following, mean) - cps_logprob_as_flow_grpo(following, moved)
    torch.testing.assert_close(exact * 2 * std**2, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_every_kind_is_the_euler_step(kind):
    coefficients = step_coefficients(kind, SIGMAS, 0.0)
    assert not coefficients.std.any()
    x, v = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for step, length in enumerate(SIGMAS.diff().tolist()):
        torch.testing.assert_close(
            transition_mean(coefficients, step, x, v), x + length * v, atol=1e-6, rtol=0
        )


def test_hand_values_at_one_step():
    """From 0.5 to 0.25 at noise level 0.6: g = 0.6 for sde and dance alike."""
    sigmas = torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64)
    for kind in ("sde", "dance"):
        a, b, std = (float(value[1]) for value in step_coefficients(kind, sigmas, 0.6))
        assert (a, b) == pytest.approx((1 - 0.36 * 0.25, -(1 + 0.36 * 0.5) * 0.25))
        assert std == pytest.approx(0.6 * 0.5)
    a, b, std = (float(value[1]) for value in step_coefficients("cps", sigmas, 1 / 3))
    r = 0.25 * math.sqrt(3) / 2  # sin 30° renewed, cos 30° kept
    assert (a, b, std) == pytest.approx((0.75 + r, 0.5 * r - 0.5 * 0.75, 0.125))


@pytest.mark.parametrize(("kind", "noise_level"), [("ode", 0.0), ("sde", 0.7), ("dance", 0.5)])
def test_the_marginals_are_those_of_the_data(kind, noise_level):
    """Data N(2, 0.5^2), whose velocity is known: whatever the noise, the samples end with that distribution."""
    center, spread, steps, count = 2.0, 0.5, 200, 40_000
    sigmas = torch.linspace(1, 0, steps + 1)
    coefficients = step_coefficients(kind, sigmas, noise_level)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=generator)
    for step, sigma in enumerate(sigmas[:-1].tolist()):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        off = x - (1 - sigma) * center
        velocity = off * (sigma - (1 - sigma) * spread**2) / variance - center
        mean = transition_mean(coefficients, step, x, velocity)
        x = next_latents(mean, float(coefficients.std[step]), torch.randn(count, 1, generator=generator))
    assert x.mean().item() == pytest.approx(center, rel=0.01)
    assert x.std().item() == pytest.approx(spread, rel=0.03)


def test_cps_keeps_the_share_of_noise_exactly():
    """With every sample at the same picture the velocity is exact and x has the spread sigma after any step."""
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.1])
    coefficients = step_coefficients("cps", sigmas, 0.8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, 1, generator=generator)
    for step, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        velocity = (x - (1 - sigma) * 2.0) / sigma - 2.0
        mean = transition_mean(coefficients, step, x, velocity)
        x = next_latents(mean, float(coefficients.std[step]), torch.randn(len(x), 1, generator=generator))
        assert x.std().item() == pytest.approx(following, rel=0.01)
        assert x.mean().item() == pytest.approx((1 - following) * 2.0, abs=0.01)


def test_the_density_integrates_to_one_and_its_mean_is_minus_the_entropy():
    std = 0.37
    grid = torch.linspace(-4, 4, 8001)[:, None]
    density = transition_logprob(grid, torch.full_like(grid, 0.3), std).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=1e-4)
    mean = randn(2000, 3, 4, 4)
    drawn = next_latents(mean, std, randn(2000, 3, 4, 4, seed=1))
    entropy = math.log(2 * math.pi * math.e * std**2) / 2
    assert transition_logprob(drawn, mean, std).mean().item() == pytest.approx(-entropy, rel=0.01)


def test_the_sum_is_the_log_density_and_the_mean_that_of_a_dimension():
    mean, following, std = randn(4, 2, 3, 3), randn(4, 2, 3, 3, seed=1), 0.6
    exact = torch.distributions.Normal(mean, std).log_prob(following).flatten(1)
    total = transition_logprob(following, mean, std, reduce="sum")
    torch.testing.assert_close(total, exact.sum(1), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(transition_logprob(following, mean, std), total / 18, rtol=1e-5, atol=1e-6)


def test_the_gradient_pulls_the_mean_to_the_sample_and_not_the_sample():
    mean = randn(3, 2, 2, 2).requires_grad_()
    following = randn(3, 2, 2, 2, seed=1).requires_grad_()
    transition_logprob(following, mean, 0.5).sum().backward()
    assert following.grad is None
    torch.testing.assert_close(mean.grad, (following - mean).detach() / 0.25 / 8)


def test_rounding_the_next_latents_changes_the_log_prob():
    """Why nothing here is bfloat16: the ratio of such a pair is off by far more than a clip of 1e-4."""
    mean, std = randn(1, 4, 8, 8), 0.05
    drawn = next_latents(mean, std, randn(1, 4, 8, 8, seed=1))
    exact, rounded = (transition_logprob(x, mean, std) for x in (drawn, drawn.bfloat16()))
    assert (exact - rounded).abs().item() > 1e-4
    assert (
        transition_mean(step_coefficients("sde", SIGMAS, 0.7), 1, mean, mean.bfloat16()).dtype
        == torch.float32
    )


def test_a_permutation_of_the_batch_permutes_the_log_probs():
    mean, following, order = randn(5, 2, 3, 3), randn(5, 2, 3, 3, seed=1), torch.tensor([3, 0, 4, 1, 2])
    straight = transition_logprob(following, mean, 0.4)
    assert torch.equal(transition_logprob(following[order], mean[order], 0.4), straight[order])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_coefficients("heun", SIGMAS), "must be one of ode, sde, dance, cps"),  # type: ignore[arg-type]
        (lambda: step_coefficients("ode", SIGMAS.flip(0)), "falling"),
        (lambda: step_coefficients("ode", SIGMAS[:1]), "falling"),
        (lambda: step_coefficients("cps", SIGMAS, 1.5), "outside"),
        (lambda: step_coefficients("sde", SIGMAS, -0.1), "outside"),
        (lambda: next_latents(torch.zeros(1, 1), 0.1), "needs noise"),
        (lambda: transition_logprob(torch.zeros(1, 1), torch.zeros(1, 1), 0.0), "no log-prob"),
        (lambda: transition_logprob(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, "max"), "mean or sum"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("steps", "widest", "end"), [(10, 0.091, -0.035), (30, 0.062, -0.004), (4000, 0.046, 0.002)]
)
def test_sde_begins_too_wide_however_fine_its_steps(steps, widest, end):
    """Data N(0, 1), whose velocity is known: the spread after each step, exactly, against that of the data. At sigma 1
    the published noise is infinite and capped, which puts about eta^2 too much variance into the first steps."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sde, ode = step_coefficients("sde", sigmas, 0.7), step_coefficients("ode", sigmas)
    variance, off = 1.0, []
    for step, (sigma, following) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        a, b, std = (float(value[step]) for value in (ode if step == steps - 1 else sde))
        slope = (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)
        variance = (a + b * slope) ** 2 * variance + std**2
        off.append(math.sqrt(variance / ((1 - following) ** 2 + following**2)) - 1)
    assert off.index(max(off)) == 1
    assert (max(off), off[-1]) == pytest.approx((widest, end), abs=6e-4)
