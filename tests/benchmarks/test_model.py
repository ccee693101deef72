from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import model as bench_model
from benchmarks.__main__ import bench
from benchmarks.model import bandwidth, bytes_per_token, require_memory
from imagerl.models.blip3o_next.weights import empty_policy, fill_randomly, full_state
from imagerl.rl.errors import ImageRLError
from tests.command import exit_code
from tests.micro import micro_folder, micro_policy


def call(*arguments: str) -> int:
    return exit_code(arguments, bench)


def test_without_a_gpu_the_full_size_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call("model") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "needs a GPU with about" in message and "try --size tiny" in message


def test_a_small_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        total_memory = 24e9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Small())
    with pytest.raises(ImageRLError, match="needs about 60 GB, this GPU has 24 GB"):
        require_memory(60, "the model", "try another")
    require_memory(20, "the model", "try another")


def test_a_small_model_runs_the_same_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = micro_folder(tmp_path / "model")
    arguments = ("--samples", "4", "--micro-batch", "2", "--flow-steps", "1", "--repeats", "1")
    written = tmp_path / "bench.json"
    assert call("model", "--size", str(folder), *arguments, "--json", str(written)) == 0
    report = json.loads(written.read_text())
    policy, _ = micro_policy()
    assert report["sampled_tokens_per_s"] == pytest.approx(4 * policy.num_actions / report["time/sample_s"])
    drawing = sum(report[f"time/{part}_s"] for part in ("layout", "sample", "flow", "vae"))
    assert report["images_per_s"] == pytest.approx(4 / drawing)
    assert report["train_tokens_per_s"] == pytest.approx(2 * policy.num_actions / report["time/update_s"])
    share = report["sampled_tokens_per_s"] / report["bandwidth_limit_tokens_per_s"]
    assert report["ratio/of_bandwidth_limit"] == pytest.approx(share) and 0 < share < 1
    assert "sampled_tokens_per_s" in capsys.readouterr().out


def test_bytes_of_a_token_are_those_of_all_layers_and_the_head() -> None:
    policy, _ = micro_policy()
    policy.refresh_sampler()
    lm = policy.trainable.lm
    layers = sum(p.numel() for name, p in lm.model.layers.named_parameters() if "proj" in name)
    norms = len(lm.model.layers) * (4 + 2) * 8  # one scale for each head's numbers
    head = policy.trainable.head.numel()
    assert bytes_per_token(policy) == 4 * (layers + norms + head)


def test_bandwidth_counts_reading_and_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "_timed", lambda task, device: 0.5)
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
