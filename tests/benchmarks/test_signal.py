from __future__ import annotations

import pytest
import torch

from benchmarks.signal import gradients, shared


def test_the_cosine_is_the_signals_part_of_a_gradient() -> None:
    """The true gradient has length 1, the noise of a step length 2: 1 / (1 + 4) of the squared norm is signal."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(20_000)
    truth[7] = 1.0
    noise = torch.randn(12, 20_000, generator=generator) * 2 / 20_000**0.5
    report = shared(truth + noise)
    assert report["signal/cosine"] == pytest.approx(0.2, abs=0.01)
    assert report["signal/steps_to_half"] == pytest.approx(4.0, rel=0.06)
    nothing = shared(noise)
    assert abs(nothing["signal/cosine"]) < 3 * nothing["signal/cosine_error"] < 0.01
    assert "signal/steps_to_half" not in nothing


def test_the_error_is_not_too_small() -> None:
    """The jackknife's, beside the spread of the cosine over 200 repetitions; for few steps it says a little more."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.full((50,), 0.5 / 50**0.5)
    reports = [shared(truth + torch.randn(8, 50, generator=generator) / 50**0.5) for _ in range(200)]
    spread = torch.tensor([report["signal/cosine"] for report in reports]).std()
    told = torch.tensor([report["signal/cosine_error"] for report in reports]).square().mean().sqrt()
    assert float(spread) < float(told) < 1.5 * float(spread)


def test_weights_stay_and_every_gradient_is_seen() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)

    def train() -> None:
        for number in range(4):
            weight.grad = torch.full((3,), float(number))
            optimizer.step()

    assert gradients(train).tolist() == [[float(number)] * 3 for number in range(4)]
    assert weight.tolist() == [1.0, 1.0, 1.0]
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()  # nobody looks any more
    assert weight.tolist() != [1.0, 1.0, 1.0]
