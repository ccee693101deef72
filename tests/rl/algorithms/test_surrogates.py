"""Ratios and their bounds against values worked out by hand and against the papers' equations in numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from imagerl.rl.algorithms.losses import loss_denominator
from imagerl.rl.algorithms.surrogates import MAX_LOG_RATIO, Bounds, level_ratio, surrogate
from imagerl.rl.config.algorithm_table import ALGORITHMS
from imagerl.rl.types import LossInputs
from tests.loss_examples import LENGTHS, backward, example, settings_of

DOUBLE = torch.float64


def two_samples(advantages: tuple[float, float] = (1.0, -1.0)) -> LossInputs:
    """Ratios 2, 0.5, 3 | 0.25, 1 of two samples; the last action of the second is masked."""
    ratio = torch.tensor([[2.0, 0.5, 3.0], [0.25, 1.0, 9.0]], dtype=DOUBLE)
    old = torch.full((2, 3), -1.0, dtype=DOUBLE)
    return LossInputs(
        logprobs=(old + ratio.log()).requires_grad_(),
        old_logprobs=old,
        ref_logprobs=None,
        advantages=torch.tensor(advantages, dtype=DOUBLE)[:, None],
        action_mask=torch.tensor([[True, True, True], [True, True, False]]),
        denominator=2.0,
    )


def loss(inputs: LossInputs, **settings: Any) -> tuple[float, np.ndarray, dict[str, float]]:
    value, gradient, metrics = backward(inputs, **settings)
    return value.item(), gradient.numpy(), {name: sum_.item() for name, sum_ in metrics.items()}


def test_levels_by_hand() -> None:
    log_ratio = torch.tensor([[1.0, 2.0, 6.0], [1.0, -3.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.equal(level_ratio(log_ratio, mask, "token"), log_ratio)
    assert level_ratio(log_ratio, mask, "sequence").tolist() == [[3.0] * 3, [-1.0] * 3]
    assert level_ratio(log_ratio, mask, "product").tolist() == [[9.0] * 3, [-2.0] * 3]
    with pytest.raises(ValueError, match="token, sequence, product"):
        level_ratio(log_ratio, mask, "mean")  # type: ignore[arg-type]


def test_gspo_by_hand() -> None:
    """The geometric means of the ratios are 3^(1/3) and 1/2: one clip a sample."""
    value, gradient, metrics = loss(two_samples(), ratio_level="sequence", clip_low=0.3, clip_high=0.5)
    root = 3 ** (1 / 3)
    assert value == pytest.approx((-root + 0.7) / 2, abs=1e-12)
    expected = np.array([[-root / 3] * 3, [0, 0, 0]]) / 2
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    assert (metrics["clip_low"], metrics["clip_high"]) == (2, 0)  # actions, not samples
    assert metrics["ratio"] == pytest.approx(3 * root + 2 * 0.5)


def test_gspo_leaves_out_a_single_action() -> None:
    """The form of GSPO-token: a weight of 0 takes away that action's gradient and no other's."""
    inputs = two_samples((1.0, 1.0))
    weights = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=DOUBLE)
    _, whole, _ = loss(inputs, ratio_level="sequence", clip="none")
    _, gradient, metrics = loss(replace(inputs, policy_weights=weights), ratio_level="sequence", clip="none")
    np.testing.assert_allclose(gradient, whole * weights.numpy(), atol=1e-12)
    assert metrics["policy_weight"] == 4.0


def test_rloo_by_hand() -> None:
    """Products 3 and 1/4; the gradient of a sample's log-prob is that of a sum."""
    value, gradient, metrics = loss(two_samples(), ratio_level="product", clip_low=0.8, clip_high=0.5)
    assert value == pytest.approx((-1.5 + 0.25) / 2)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [0.125, 0.125, 0]], atol=1e-12)
    assert metrics["clip_high"] == 3 and metrics["ratio"] == pytest.approx(3 * 3 + 2 * 0.25)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cispo_by_hand(sign: float) -> None:
    """The ratio is a weight on log-probs: capped, whatever the advantage's sign, and never without a gradient."""
    inputs = two_samples((sign, sign))
    value, gradient, metrics = loss(inputs, clip="weight", clip_low=1.0, clip_high=1.5, normaliser="tokens")
    weights = np.array([[2.0, 0.5, 2.5], [0.25, 1.0, 0.0]])
    logprobs = inputs.logprobs.detach().numpy()
    assert value == pytest.approx(-sign * (weights * logprobs).sum() / 2)
    np.testing.assert_allclose(gradient, -sign * weights / 2, atol=1e-12)
    assert (metrics["clip_low"], metrics["clip_high"]) == (0, 1)
    _, gradient, metrics = loss(inputs, clip="weight", clip_low=0.6, clip_high=1.5, normaliser="tokens")
    assert gradient[1, 0] == pytest.approx(-sign * 0.4 / 2) and metrics["clip_low"] == 1


def test_cispo_caps_as_verl_does_and_the_table_as_trl_recommends() -> None:
    row = ALGORITHMS["cispo"]
    assert (1 - row.clip_low, 1 + row.clip_high) == (0.0, 5.0)  # TRL: epsilon_high=5.0, no lower bound


def test_sapo_by_hand() -> None:
    value, gradient, metrics = loss(two_samples(), clip="soft", soft_positive=1.0, soft_negative=2.0)

    def gate(ratio: float, t: float) -> float:
        return 4 / t / (1 + math.exp(-t * (ratio - 1)))

    first = -(gate(2, 1) + gate(0.5, 1) + gate(3, 1)) / 3
    assert value == pytest.approx((first + (gate(0.25, 2) + gate(1, 2)) / 2) / 2)
    # At ratio 1 the slope of the gate is 1: the plain policy gradient.
    assert gradient[1, 1] == pytest.approx(1.0 / 2 / 2)
    assert metrics["clip_low"] == metrics["clip_high"] == 0


def test_gmpo_by_hand() -> None:
    """A > 0 bounds ratios from above, A < 0 from below, each before the mean; both in log space."""
    low, high = math.log(2), math.log(2.5)
    value, gradient, metrics = loss(two_samples(), **settings_of("gmpo", clip_low=low, clip_high=high))
    first, second = (2 * 0.5 * 2.5) ** (1 / 3), (0.5 * 1) ** (1 / 2)
    assert value == pytest.approx((-first + second) / 2)
    expected = np.array([[-first / 3, -first / 3, 0], [0, second / 2, 0]]) / 2
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    assert (metrics["clip_low"], metrics["clip_high"]) == (1, 1)


def test_luspo_is_gspo_times_the_length() -> None:
    inputs = two_samples()
    gspo = settings_of("gspo", clip_low=0.3, clip_high=0.5)
    values = []
    for row, length in ((0, 3), (1, 2)):
        mask = inputs.action_mask & (torch.arange(2) == row)[:, None]
        values.append(length * loss(replace(inputs, action_mask=mask), **gspo)[0])
    luspo = settings_of("luspo", clip_low=0.3, clip_high=0.5)
    assert loss(inputs, **luspo)[0] == pytest.approx(sum(values))


# ---- the equations, naively --------------------------------------------------------------------------------


def naive(inputs: LossInputs, name: str, low: float, high: float) -> float:
    """Sample by sample and action by action, as the papers write it."""
    logp, old = inputs.logprobs.detach().numpy(), inputs.old_logprobs.numpy()
    advantages, total, actions = inputs.advantages.numpy()[:, 0], 0.0, sum(LENGTHS)
    for i, length in enumerate(LENGTHS):
        a = advantages[i]
        r = [math.exp(logp[i, t] - old[i, t]) for t in range(length)]
        if name in ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "dapo", "bnpo"):
            total += sum(min(x * a, np.clip(x, 1 - low, 1 + high) * a) for x in r) / actions
        elif name in ("grpo", "gdpo"):
            total += sum(min(x * a, np.clip(x, 1 - low, 1 + high) * a) for x in r) / length / len(LENGTHS)
        elif name == "dr_grpo":
            total += sum(min(x * a, np.clip(x, 1 - low, 1 + high) * a) for x in r) / (len(LENGTHS) * 7)
        elif name in ("gspo", "luspo", "rloo"):
            s = math.prod(r) ** (1.0 if name == "rloo" else 1 / length)
            one = min(s * a, np.clip(s, 1 - low, 1 + high) * a)
            total += one * (length if name == "luspo" else 1) / len(LENGTHS)
        elif name == "cispo":
            total += (
                sum(np.clip(x, 1 - low, 1 + high) * a * p for x, p in zip(r, logp[i], strict=False)) / actions
            )
        elif name == "sapo":
            tau = 1.0 if a > 0 else 1.05
            total += sum(4 / tau / (1 + math.exp(-tau * (x - 1))) * a for x in r) / length / len(LENGTHS)
        elif name == "gmpo":
            bounded = [min(x, math.exp(high)) if a > 0 else max(x, math.exp(-low)) for x in r]
            total += math.prod(bounded) ** (1 / length) * a / len(LENGTHS)
        else:
            assert name == "reinforce"
            total += sum(x * a for x in r) / len(LENGTHS)
    return -total


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("seed", range(3))
def test_equation(name: str, seed: int) -> None:
    low, high = (1.0, 0.3) if name == "cispo" else (0.1, 0.15)
    settings = settings_of(name, clip_low=low, clip_high=high)
    inputs = example(settings["normaliser"], seed=seed)
    value, _, _ = loss(inputs, **settings)
    assert value == pytest.approx(naive(inputs, name, low, high), abs=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    """By finite differences of one sample's shift in all its log-probs, which sees each level alike. A clipped
    weight is a constant by definition, so CISPO is compared with its own weights held fixed."""
    settings = settings_of(name, clip_low=0.9, clip_high=9.0) | {"kl_coef": 0.0}
    inputs = example(settings["normaliser"])
    _, gradient, _ = backward(inputs, **settings)
    step, mask = 1e-6, inputs.action_mask
    for row in range(len(LENGTHS)):
        shift = torch.zeros_like(inputs.old_logprobs)
        shift[row] = step
        both = [
            loss(replace(inputs, logprobs=(inputs.logprobs.detach() + s).requires_grad_()), **settings)[0]
            for s in (shift, -shift)
        ]
        slope = (both[0] - both[1]) / (2 * step)
        if name == "cispo":
            weight = (inputs.logprobs - inputs.old_logprobs).exp().detach() * mask
            slope = float(-(weight[row] * inputs.advantages[row]).sum() / inputs.denominator)
        assert gradient[row].sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_the_normalisers_of_dapo_and_cispo_count_all_tokens() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    for name, count in (("dapo", 4), ("cispo", 4), ("dr_grpo", 6), ("grpo", 2), ("luspo", 2)):
        assert loss_denominator(mask, ALGORITHMS[name].normaliser, 3) == count  # type: ignore[index]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_ratio_beyond_all_bounds_leaves_finite_numbers(name: str) -> None:
    settings = settings_of(name)
    inputs = example(settings["normaliser"], dtype=torch.float32)
    far = (inputs.old_logprobs + 200.0).requires_grad_()
    value, gradient, _ = backward(
        replace(inputs, logprobs=far, advantages=inputs.advantages.abs()), **settings
    )
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert math.exp(MAX_LOG_RATIO) < torch.finfo(torch.float32).max


def test_unknown_clips_are_refused() -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="clip must be one of ratio, weight, soft, geometric, none"):
        surrogate("hard", "token", zeros, zeros, zeros, zeros.bool(), Bounds(0.2, 0.2))  # type: ignore[arg-type]
