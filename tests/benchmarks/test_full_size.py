from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer

from benchmarks import full_size
from benchmarks.full_size import Table, bandwidth, bytes_per_token, main, parity, require_memory
from imagerl.models.blip3o_next.weights import empty_policy, fill_randomly, full_state
from imagerl.rl.errors import ImageRLError
from tests.command import exit_code
from tests.micro import micro_folder, micro_policy


def call(*arguments: str) -> int:
    script = typer.Typer()
    script.command()(main)
    return exit_code(arguments, script)


def test_what_does_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call("--device", "cuda") == 1
    assert "there is no GPU here; give --device cpu" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24 * 2**30, 0))
    with pytest.raises(ImageRLError, match=r"needs about 40 GiB and 24\.0 are free; try --size tiny"):
        require_memory("cuda")


def test_a_small_model_runs_the_same_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = micro_folder(tmp_path / "model")
    assert call("--size", str(folder), "--samples", "4", "--rank", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[:20].strip() for line in lines[1:]]
    assert names == [
        "build",
        "lay out the sampler",
        "sample",
        "denoise",
        "draw pixels",
        "train a step of LoRA",
        "plan",
    ]
    assert "4 pictures of 64x32" in lines[5] and re.search(r"gradient norm \d", lines[6])
    assert re.search(r"GiB, most while .*; measured \d+\.\d\d; .* pictures/s", lines[7])


def test_a_device_that_draws_the_same_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(torch.device("cpu"))
    parity(table, samples=2)
    assert "100% of samples equal; of these log-probs to 0.0e+00, pixels to 0.0e+00" in str(table)


def test_bytes_of_a_token_are_those_of_all_layers_and_the_head() -> None:
    policy, _ = micro_policy()
    policy.refresh_sampler()
    lm = policy.trainable.lm
    layers = sum(p.numel() for name, p in lm.model.layers.named_parameters() if "proj" in name)
    norms = len(lm.model.layers) * (4 + 2) * 8  # one scale for each head's numbers
    head = policy.trainable.head.numel()
    assert bytes_per_token(policy) == 4 * (layers + norms + head)


def test_bandwidth_counts_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "_timed", lambda task, device: 0.5)
    assert bandwidth(torch.device("cpu"), 1) == 2 * 2**20 / 0.5


def test_random_weights_are_reproducible_and_tame() -> None:
    _, config = micro_policy()
    states = []
    for _ in range(2):
        policy = empty_policy(config, None)
        fill_randomly(policy, torch.float32, "cpu", seed=3)
        states.append(full_state(policy))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    weight = states[0]["model.layers.0.mlp.up_proj.weight"]
    assert weight.std() == pytest.approx(32**-0.5, rel=0.1)
    assert torch.equal(states[0]["model.norm.weight"], torch.ones(32))
