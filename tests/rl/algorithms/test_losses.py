import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from imagerl.rl.algorithms.losses import action_weights, loss_denominator, policy_loss
from imagerl.rl.config.algorithm_table import ALGORITHMS, Normaliser
from imagerl.rl.types import LossInputs
from tests.loss_examples import LENGTHS, backward, example, rows, settings_of

NORMALISERS = get_args(Normaliser)


def hand_inputs(denominator: float) -> LossInputs:
    """Ratios 2, 1 | 0.5, 1.1 of samples with advantage 1 and -1; the last action is masked."""
    old = torch.tensor([[-1.0, -2.0], [-1.0, -3.0]], dtype=torch.float64)
    ratio = torch.tensor([[2.0, 1.0], [0.5, 1.1]], dtype=torch.float64)
    return LossInputs(
        logprobs=(old + ratio.log()).requires_grad_(),
        old_logprobs=old,
        ref_logprobs=old,
        advantages=torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        action_mask=torch.tensor([[True, True], [True, False]]),
        denominator=denominator,
    )


@pytest.mark.parametrize(
    ("normaliser", "denominator", "loss", "gradient"),
    [  # clipped terms: -1.2, -1 | +0.8; only the on-policy action keeps a gradient, -ratio * advantage
        ("sequence", 2, ((-1.2 - 1.0) / 2 + 0.8) / 2, -1 / 4),
        ("tokens", 3, (-1.2 - 1.0 + 0.8) / 3, -1 / 3),
        ("constant", 4, (-1.2 - 1.0 + 0.8) / 4, -1 / 4),
        ("sum", 2, (-1.2 - 1.0 + 0.8) / 2, -1 / 2),
    ],
)
def test_hand_values_of_the_clipped_surrogate(normaliser, denominator, loss, gradient):
    inputs = hand_inputs(denominator)
    assert loss_denominator(inputs.action_mask, normaliser, max_length=2) == denominator
    value, grad, metrics = backward(inputs, normaliser=normaliser)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(grad, torch.tensor([[0, gradient], [0, 0]], dtype=torch.float64))
    sums = {name: metrics[name].item() for name in ("actions", "ratio", "ratio_deviation")}
    assert sums == pytest.approx({"actions": 3, "ratio": 3.5, "ratio_deviation": 1.5})
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (1, 1)


def test_hand_values_of_the_kl_term():
    # Against ref = old, d = -log ratio: k3 is 0.5 + log 2 - 1 at ratio 2 and 2 - log 2 - 1 at ratio 0.5.
    k3 = {"k3": (0.5 + math.log(2) - 1) + (2 - math.log(2) - 1), "k2": math.log(2) ** 2, "k1": 0.0}
    for estimator, total in k3.items():
        plain, plain_gradient, metrics = backward(hand_inputs(3), normaliser="tokens")
        value, gradient, _ = backward(
            hand_inputs(3), normaliser="tokens", kl_coef=0.5, kl_estimator=estimator
        )
        assert (value - plain).item() == pytest.approx(0.5 * total / 3, abs=1e-12)
        assert metrics[f"kl_{estimator}"].item() == pytest.approx(total, abs=1e-12)
        assert (gradient - plain_gradient)[0, 0] != 0
        assert gradient[1, 1] == 0


def test_clipping_depends_on_the_sign_of_the_advantage():
    """A ratio outside the clip keeps its gradient when the surrogate there is the worse of the two."""
    inputs = hand_inputs(3)
    inputs = replace(inputs, advantages=-inputs.advantages)
    value, gradient, metrics = backward(inputs, normaliser="tokens")
    assert value.item() == pytest.approx((2 + 1 - 0.5) / 3)
    torch.testing.assert_close(gradient, torch.tensor([[2, 1], [-0.5, 0]], dtype=torch.float64) / 3)
    assert metrics["clip_low"].item() == metrics["clip_high"].item() == 0


def test_each_side_has_its_own_clip():
    value, _, metrics = backward(hand_inputs(3), normaliser="tokens", clip_low=0.6, clip_high=0.28)
    assert value.item() == pytest.approx((-1.28 - 1.0 + 0.5) / 3)
    assert (metrics["clip_low"].item(), metrics["clip_high"].item()) == (0, 1)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_policy_gradient_is_the_policy_gradient(name):
    settings = settings_of(name)
    inputs = example(settings["normaliser"])
    inputs = replace(inputs, old_logprobs=inputs.logprobs.detach())
    _, gradient, metrics = backward(inputs, **settings)
    weights = action_weights(inputs.action_mask, settings["normaliser"])
    if settings["ratio_level"] == "product":  # of log pi(sample), a sum over its actions
        weights = inputs.action_mask.double()
    torch.testing.assert_close(gradient, -inputs.advantages * weights / inputs.denominator)
    assert metrics["ratio"] == metrics["actions"] == sum(LENGTHS)
    assert all(metrics[name] == 0 for name in ("ratio_deviation", "clip_low", "clip_high", "old_kl"))
    assert metrics["ratio_deviation_squared"] == 0


def test_advantages_may_differ_between_actions():
    inputs = example()
    per_action = replace(inputs, advantages=inputs.advantages.repeat(1, 7))
    for one, other in zip(backward(inputs)[:2], backward(per_action)[:2], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"\[B, N\] or \[B, 1\]"):
        policy_loss(replace(inputs, advantages=inputs.advantages[:, 0]))


def test_the_kl_from_the_old_policy_is_that_of_its_actions():
    """Ten actions in the very shares of the old policy: the estimate is the enumerated KL(old || policy)."""
    old = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    new = torch.tensor([0.3, 0.1, 0.6], dtype=torch.float64)
    actions = torch.tensor([[0] * 7 + [1] * 2 + [2]])
    inputs = LossInputs(
        logprobs=new.log()[actions],
        old_logprobs=old.log()[actions],
        ref_logprobs=None,
        advantages=torch.ones(1, 1, dtype=torch.float64),
        action_mask=torch.ones(1, 10, dtype=torch.bool),
        denominator=1.0,
    )
    logged = policy_loss(inputs).metrics["old_kl"].item() / 10
    assert logged == pytest.approx(0.7 * math.log(7 / 3) + 0.2 * math.log(2) + 0.1 * math.log(1 / 6))
    assert logged == pytest.approx(
        0.55256, abs=1e-5
    )  # KL(policy || old) is 0.752, and its k3 of these actions 0.497


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]])
def test_accumulated_microbatches_equal_one_batch(name, sizes):
    settings = settings_of(name, kl_coef=0.1)
    normaliser = settings["normaliser"]
    whole = example(normaliser)
    weights = torch.rand(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = replace(whole, policy_weights=weights)
    loss, gradient, metrics = backward(whole, **settings)
    parts = [backward(rows(whole, torch.arange(6).split(sizes)[i]), **settings) for i in range(len(sizes))]
    torch.testing.assert_close(torch.stack([p[0] for p in parts]).sum(), loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), gradient, rtol=0, atol=1e-14)
    for name, total in metrics.items():
        torch.testing.assert_close(torch.stack([p[2][name] for p in parts]).sum(), total)
    ranks = [loss_denominator(mask, normaliser, 7) for mask in whole.action_mask.split(sizes)]
    assert sum(ranks) == whole.denominator


@pytest.mark.parametrize("name", ALGORITHMS)
def test_permuting_the_batch_permutes_the_gradient(name):
    settings = settings_of(name, kl_coef=0.1, kl_estimator="k2")
    whole, order = example(settings["normaliser"]), torch.tensor([3, 0, 5, 1, 4, 2])
    loss, gradient, _ = backward(whole, **settings)
    permuted_loss, permuted_gradient, _ = backward(rows(whole, order), **settings)
    torch.testing.assert_close(permuted_loss, loss, rtol=0, atol=1e-14)
    assert torch.equal(permuted_gradient, gradient[order])


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_masked_cannot_poison(name, garbage):
    lengths, settings = [7, 0, 5, 1, 0, 2], settings_of(name, kl_coef=0.1)
    clean = example(settings["normaliser"], lengths=lengths)
    clean = replace(clean, policy_weights=torch.full((6, 7), 0.5, dtype=torch.float64))
    hole = ~clean.action_mask
    assert clean.ref_logprobs is not None
    dirty = replace(
        clean,
        logprobs=clean.logprobs.detach().masked_fill(hole, garbage).requires_grad_(),
        old_logprobs=clean.old_logprobs.masked_fill(hole, -garbage),
        ref_logprobs=clean.ref_logprobs.masked_fill(hole, garbage),
        advantages=clean.advantages.repeat(1, 7).masked_fill(hole, garbage),
        policy_weights=clean.policy_weights.masked_fill(hole, garbage),
    )
    expected, result = backward(clean, **settings), backward(dirty, **settings)
    assert torch.equal(result[0], expected[0])
    assert torch.isfinite(result[0])
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[1][hole], torch.zeros(int(hole.sum()), dtype=torch.float64))
    assert {name: v.item() for name, v in result[2].items()} == {n: v.item() for n, v in expected[2].items()}


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_sample_that_must_not_train_leaves_no_trace(normaliser):
    padded = example(normaliser, lengths=[7, 0, 5, 1, 0, 2])
    keep = padded.action_mask.any(dim=1)
    alone = rows(padded, keep)
    assert loss_denominator(alone.action_mask, normaliser, 7) == padded.denominator
    torch.testing.assert_close(
        policy_loss(alone, normaliser=normaliser, kl_coef=0.1).loss,
        policy_loss(padded, normaliser=normaliser, kl_coef=0.1).loss,
        rtol=0,
        atol=1e-14,
    )


def test_a_microbatch_without_actions_is_zero_and_differentiable():
    inputs = example(lengths=[0] * 6)
    assert [loss_denominator(inputs.action_mask, n, 7) for n in NORMALISERS] == [0.0] * 4
    loss, gradient, metrics = backward(replace(inputs, denominator=5.0), kl_coef=0.1)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(value == 0 for value in metrics.values())
    with pytest.raises(ValueError, match="nothing trains"):
        policy_loss(inputs)


def test_wrong_settings_are_refused():
    inputs = example()
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(replace(inputs, ref_logprobs=None), kl_coef=0.1)
    assert "kl_k3" not in policy_loss(replace(inputs, ref_logprobs=None)).metrics
    with pytest.raises(ValueError, match="sequence, tokens, constant, sum"):
        loss_denominator(inputs.action_mask, "mean", 7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sequence, tokens, constant, sum"):
        policy_loss(inputs, normaliser="mean")  # type: ignore[arg-type]
