"""The moving average of the trained weights: its value, its use, and that resuming keeps it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imagerl.rl.config.engine import EngineConfig, OptimConfig
from imagerl.rl.engine.engine import AVERAGE, Engine, StateDict

OPTIM = OptimConfig(lr=0.1, ema=0.75)


def _engine(state: StateDict | None = None) -> Engine:
    torch.manual_seed(0)
    engine = Engine(EngineConfig(device="cpu", threads=1))
    engine.prepare(nn.Linear(3, 2), OPTIM, 4, state)
    return engine


def _update(engine: Engine, number: int) -> torch.Tensor:
    """Make an update, a function of its number; returns the weights after it."""
    with engine.microbatch(last=True):
        engine.backward((engine.module(torch.full((1, 3), float(number + 1))) ** 2).sum())
    engine.step()
    return engine.unwrapped.weight.detach().clone()


def test_the_average_is_the_recurrence_of_its_definition_and_replaces_weights_only_inside() -> None:
    engine = _engine()
    expected = engine.unwrapped.weight.detach().clone()
    for number in range(3):
        weights = _update(engine, number)
        expected = 0.75 * expected + 0.25 * weights
    with engine.averaged():
        torch.testing.assert_close(engine.unwrapped.weight.data, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(engine.unwrapped.weight, weights)
    assert not torch.allclose(weights, expected)
    saved = engine.state_dict()
    torch.testing.assert_close(saved[AVERAGE]["weight"], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(saved["model"]["weight"], weights)
    assert AVERAGE in engine.state_dict(moments=False)


def test_a_resumed_average_goes_on_bit_for_bit() -> None:
    whole = _engine()
    for number in range(4):
        _update(whole, number)
    half = _engine()
    for number in range(2):
        _update(half, number)
    resumed = _engine(half.state_dict())
    for number in range(2, 4):
        _update(resumed, number)
    for group, named in whole.state_dict().items():
        for name, tensor in named.items():
            assert torch.equal(tensor, resumed.state_dict()[group][name]), (group, name)


def test_an_average_needs_whole_weights() -> None:
    from imagerl.rl.config.train import load_recipe
    from imagerl.rl.errors import ImageRLError

    with pytest.raises(ImageRLError, match=r"optim\.ema needs whole weights"):
        load_recipe("tiny_ocr_grpo", ["optim.ema=0.9", "engine.name=deepspeed"])
