import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from imagerl.rl.algorithms.kl import ESTIMATORS, adapted_coef, k1, k2, k3, kl_estimate, kl_penalty, kl_sums
from imagerl.rl.config.algorithm_table import KLEstimator

LOG = math.log


def categorical() -> tuple[Tensor, Tensor]:
    """Logits of a policy and log-probs of a reference over 50 actions, KL about 0.1."""
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(50, generator=generator, dtype=torch.float64)
    policy = reference + 0.45 * torch.randn(50, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), reference.log_softmax(0)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) from log-probs, exactly."""
    return (p.exp() * (p - q)).sum()


def test_hand_values():
    p, q = torch.tensor([LOG(0.5), LOG(0.2)]), torch.tensor([LOG(0.25), LOG(0.4)])
    log2 = LOG(2)
    torch.testing.assert_close(k1(p, q), torch.tensor([log2, -log2]))
    torch.testing.assert_close(k2(p, q), torch.tensor([log2**2 / 2, log2**2 / 2]))
    torch.testing.assert_close(k3(p, q), torch.tensor([0.5 + log2 - 1, 2 - log2 - 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative_and_is_zero_at_the_reference(dtype):
    base = -torch.linspace(0, 30, 4001, dtype=dtype)
    for scale in (1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1.0, 10.0):
        noise = scale * torch.randn(4001, generator=torch.Generator().manual_seed(0), dtype=dtype)
        assert (k3(base + noise, base) >= 0).all()
    for name in get_args(KLEstimator):
        assert torch.equal(kl_estimate(name, base, base), torch.zeros_like(base))


def test_k3_near_the_reference_keeps_its_digits_in_float32():
    d = torch.tensor([1e-3, 1e-4, -1e-4])
    exact = torch.expm1(d.double()) - d.double()
    torch.testing.assert_close(k3(torch.zeros(3), d).double(), exact, rtol=5e-3, atol=0)


def test_monte_carlo_means_against_the_exact_divergence():
    policy, q = categorical()
    p = policy.detach().log_softmax(0)
    exact = divergence(p, q)
    drawn = torch.multinomial(p.exp(), 1_000_000, True, generator=torch.Generator().manual_seed(2))
    for estimate in (k1, k3):
        torch.testing.assert_close(estimate(p[drawn], q[drawn]).mean(), exact, rtol=0.01, atol=0)
    assert k3(p, q)[drawn].std() < 0.5 * k1(p, q)[drawn].std()
    # k2 is biased: its mean is E[d^2] / 2 and not the divergence.
    torch.testing.assert_close(
        k2(p[drawn], q[drawn]).mean(), (p.exp() * (p - q) ** 2).sum() / 2, rtol=0.01, atol=0
    )


def test_what_each_gradient_is_in_the_mean():
    """The sum over all actions, weighted with the probability they are drawn with, is the exact mean."""

    def mean_gradient(name: KLEstimator) -> Tensor:
        policy, q = categorical()
        p = policy.log_softmax(0)
        (p.detach().exp() * kl_estimate(name, p, q)).sum().backward()
        assert policy.grad is not None
        return policy.grad

    def exact_gradient(forward: bool) -> Tensor:
        policy, q = categorical()
        p = policy.log_softmax(0)
        (divergence(q, p) if forward else divergence(p, q)).backward()
        assert policy.grad is not None
        return policy.grad

    torch.testing.assert_close(mean_gradient("k1"), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(mean_gradient("k2"), exact_gradient(forward=False), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(mean_gradient("k3"), exact_gradient(forward=True), rtol=1e-10, atol=1e-15)
    assert (exact_gradient(True) - exact_gradient(False)).abs().max() > 1e-3


@pytest.mark.parametrize("name", get_args(KLEstimator))
def test_gradient_reaches_the_policy(name):
    p, q = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -1.0])
    kl_estimate(name, p, q).sum().backward()
    assert p.grad is not None
    assert (p.grad != 0).all()


def test_names():
    assert tuple(ESTIMATORS) == get_args(KLEstimator)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate("k4", torch.zeros(1), torch.zeros(1))  # type: ignore[arg-type]


def test_sums_ignore_what_is_masked():
    p, q = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-1.5, -1.0, -math.inf]])
    sums = kl_sums(p.requires_grad_(), q, torch.tensor([[True, True, False]]))
    assert sums["kl_k1"].item() == pytest.approx(0.5 - 1.0)
    assert sums["kl_k2"].item() == pytest.approx(0.125 + 0.5)
    assert sums["kl_k3"].item() == pytest.approx(math.exp(-0.5) + 0.5 - 1 + math.e - 2)
    assert not any(value.requires_grad for value in sums.values())


def test_penalty_by_hand():
    p = torch.tensor([[-1.0, -2.0], [-1.0, math.inf], [-1.0, -1.0]], requires_grad=True)
    q = torch.tensor([[-1.5, -4.0], [-3.0, math.nan], [-1.0, -1.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    penalty = kl_penalty(p, q, mask, kl_coef=0.1)
    torch.testing.assert_close(penalty, torch.tensor([[0.05, 0.2], [0.2, 0], [0, 0]], dtype=torch.float64))
    assert not penalty.requires_grad


def test_penalty_in_the_reward_has_the_gradient_of_the_true_divergence():
    policy, q = categorical()
    p = policy.log_softmax(0)
    penalty = kl_penalty(p[:, None], q[:, None], torch.ones(50, 1, dtype=torch.bool), 1.0)[:, 0]
    (gradient,) = torch.autograd.grad((p.detach().exp() * penalty * p).sum(), policy, retain_graph=True)
    (exact,) = torch.autograd.grad(divergence(p, q), policy)
    torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-15)


def test_the_controller_by_hand():
    # Proportional within 20 % of the target, then at most rate * 0.2.
    assert adapted_coef(0.5, kl=0.11, target=0.1, rate=0.1) == pytest.approx(0.5 * 1.01)
    assert adapted_coef(0.5, kl=0.09, target=0.1, rate=0.1) == pytest.approx(0.5 * 0.99)
    assert adapted_coef(0.5, kl=9.0, target=0.1, rate=0.1) == pytest.approx(0.5 * 1.02)
    assert adapted_coef(0.5, kl=0.0, target=0.1, rate=0.1) == pytest.approx(0.5 * 0.98)
    assert adapted_coef(0.5, kl=0.1, target=0.1, rate=0.1) == 0.5
    assert adapted_coef(0.5, kl=math.nan, target=0.1, rate=0.1) == 0.5


def test_the_controller_finds_the_coefficient_that_holds_the_target():
    """In a world where the KL is 0.02 / coefficient the target 0.1 needs 0.2."""
    coef = 5.0
    for _ in range(400):
        coef = adapted_coef(coef, kl=0.02 / coef, target=0.1, rate=0.1)
    assert coef == pytest.approx(0.2, rel=0.01)
