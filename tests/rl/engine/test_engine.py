"""The engine against itself: whatever runs underneath, the same global batch gives the same training."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from imagerl.rl.config.engine import EngineConfig
from imagerl.rl.engine import zero
from imagerl.rl.engine.engine import Engine
from imagerl.rl.engine.schedule import learning_rate
from imagerl.rl.errors import ImageRLError
from tests.resident import alone

UPDATES = 4
SAMPLES = 12
STATE_AFTER = 2


def settings(
    name: str = "torch", zero_stage: int = 0, precision: str = "fp32", offload: bool = False
) -> EngineConfig:
    stage = {"zero_stage": zero_stage, "offload_optimizer": offload} if name == "deepspeed" else {}
    return EngineConfig(name=name, precision=precision, device="cpu", threads=1, timeout_s=300, **stage)


def optim(**changes: Any) -> Any:
    defaults = {
        "lr": 3e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "schedule": "cosine",
        "min_lr": 0.0,
        "warmup_steps": 1,
        "decay_share": 1.0,
        "max_grad_norm": 1.0,
        "ema": None,
    }
    return SimpleNamespace(**(defaults | changes))


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    # the middle matrix is large enough for ZeRO-3 to split it, the last bias odd enough to need padding
    net = nn.Sequential(nn.Linear(8, 384), nn.GELU(), nn.Linear(384, 320), nn.GELU(), nn.Linear(320, 3))
    net[0].bias.requires_grad_(False)
    return net


def batch(update: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(update)
    inputs = torch.randn(SAMPLES, 8, generator=generator)
    targets = torch.randn(SAMPLES, 3, generator=generator)
    mask = torch.rand(SAMPLES, 3, generator=generator) < 0.7  # ranks and microbatches count differently
    return inputs, targets, mask


def run_updates(engine: Engine, first: int, last: int, microbatches: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each update; the global batch is the same however it is divided."""
    curve = []
    for update in range(first, last):
        inputs, targets, mask = batch(update)
        denominator = float(mask.sum())
        mine = torch.arange(SAMPLES).chunk(engine.world_size)[engine.rank].chunk(microbatches)
        total = torch.zeros(())
        for index, rows in enumerate(mine):
            with engine.microbatch(last=index == len(mine) - 1):
                with engine.autocast():
                    outputs = engine.module(inputs[rows])
                loss = ((outputs.float() - targets[rows]) ** 2 * mask[rows]).sum() / denominator
                engine.backward(loss)
            total += loss.detach()
        norm = engine.step()
        curve.append((engine.sum_over_ranks({"loss": total})["loss"], norm))
    return curve


def train(
    config: Any, microbatches: int = 2, state: Any = None, first: int = 0, **changes: Any
) -> dict[str, Any]:
    """Train from `first` to the end; also hand out the state as it was after STATE_AFTER updates."""
    engine = Engine(config)
    engine.prepare(tiny_net(), optim(**changes), UPDATES, state=state)
    assert engine.updates == first
    curve = run_updates(engine, first, STATE_AFTER, microbatches)
    middle = engine.state_dict()
    curve += run_updates(engine, max(first, STATE_AFTER), UPDATES, microbatches)
    with engine.gathered_parameters(), torch.no_grad():
        outputs = engine.unwrapped(batch(99)[0])
    return {
        "curve": curve,
        "middle": middle,
        "end": engine.state_dict(),
        "outputs": outputs,
        "engine": engine,
    }


def train_and_resume(config: Any) -> dict[str, Any]:
    whole = train(config)
    shared = whole["engine"].gather_objects(whole["middle"])[0]
    resumed = train(config, state=shared, first=STATE_AFTER)
    del whole["engine"]
    return whole | {"resumed_curve": resumed["curve"], "resumed_end": resumed["end"]}


CASES = {
    "ddp": settings(),
    "zero0": settings("deepspeed", 0),
    "zero1": settings("deepspeed", 1),
    "zero2": settings("deepspeed", 2),
    "zero3": settings("deepspeed", 3),
    "zero2 offloaded": settings("deepspeed", 2, offload=True),
}


ALONE_IN_A_GROUP = """
from tests.rl.engine.test_engine import Engine, group_timeout, settings
Engine(settings("deepspeed", 2))
print(group_timeout())
"""


def group_timeout() -> float:
    """Seconds that exchanges of the process group may take."""
    backend = torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


def distributed_worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(Path(folder, "compiled")),
    }
    results = {}
    for name, config in CASES.items():
        results[name] = train_and_resume(config)
        results[name]["ranks"] = Engine(config).gather_objects(rank)
    results["timeout"] = group_timeout()
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    engine = Engine(settings())
    engine.barrier()  # nobody leaves while the other still writes
    engine.close()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(distributed_worker, args=(port, str(folder)), nprocs=2)
    assert not (folder / "compiled").exists()  # a bare machine has no compiler
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return train(settings(), microbatches=1)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4 if atol else 0, atol=atol, msg=name)


def assert_same_curve(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> None:
    assert [loss for loss, _ in one] == pytest.approx([loss for loss, _ in other], abs=1e-5)
    assert [norm for _, norm in one] == pytest.approx([norm for _, norm in other], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(
    case: str, two_processes: dict[str, Any], one_process: dict[str, Any]
) -> None:
    result = two_processes[case]
    assert result["ranks"] == [0, 1]
    assert_same_curve(result["curve"], one_process["curve"])
    assert_same(result["end"]["model"], one_process["end"]["model"], atol=1e-5)
    assert_same(result["end"]["optimizer"], one_process["end"]["optimizer"], atol=1e-5)
    torch.testing.assert_close(result["outputs"], one_process["outputs"], rtol=1e-4, atol=1e-5)


def test_the_timeout_reaches_the_process_group(two_processes: dict[str, Any]) -> None:
    assert two_processes["timeout"] == 300
    pytest.importorskip("deepspeed")
    # In a process of its own: a group of one, which an earlier test may have left here, keeps its timeout.
    assert alone(ALONE_IN_A_GROUP) == 300


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact_on_two_processes(case: str, two_processes: dict[str, Any]) -> None:
    result = two_processes[case]
    assert result["resumed_curve"] == result["curve"][STATE_AFTER:]
    for group in ("model", "optimizer"):
        assert_same(result["resumed_end"][group], result["end"][group], atol=0)


@pytest.mark.parametrize("case", ["ddp", "zero2", "zero3"])
def test_state_of_two_processes_resumes_on_one(
    case: str, two_processes: dict[str, Any], one_process: dict[str, Any]
) -> None:
    resumed = train(settings(), state=two_processes[case]["middle"], first=STATE_AFTER)
    assert_same(resumed["end"]["model"], one_process["end"]["model"], atol=1e-5)
    assert_same_curve(resumed["curve"], one_process["curve"][STATE_AFTER:])


def test_training_moves_and_clips(one_process: dict[str, Any]) -> None:
    assert any(norm > 1.0 for _, norm in one_process["curve"])  # or the comparisons say nothing of clipping
    fresh = dict(tiny_net().named_parameters())
    moved = {name: (tensor - fresh[name]).abs().max() for name, tensor in one_process["end"]["model"].items()}
    assert all(distance > 1e-3 for distance in moved.values())
    assert "0.bias" not in moved  # frozen, so neither trained nor saved


def test_accumulation_equals_one_batch(one_process: dict[str, Any]) -> None:
    accumulated = train(settings(), microbatches=6)
    assert_same_curve(accumulated["curve"], one_process["curve"])
    assert_same(accumulated["end"]["model"], one_process["end"]["model"], atol=1e-5)


def test_deepspeed_alone_trains_like_torch(one_process: dict[str, Any]) -> None:
    pytest.importorskip("deepspeed")
    environment = dict(os.environ)
    alone = train_and_resume(settings("deepspeed", 2))
    Engine(settings())
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    assert all(os.environ.get(name) == environment.get(name) for name in launcher)
    assert_same(alone["end"]["model"], one_process["end"]["model"], atol=1e-5)
    assert_same(alone["resumed_end"]["optimizer"], alone["end"]["optimizer"], atol=0)


def test_bf16_is_autocast_over_float32_weights(one_process: dict[str, Any]) -> None:
    rounded = train(settings(precision="bf16"))
    difference = abs(rounded["curve"][0][0] - one_process["curve"][0][0])
    assert 0 < difference < 0.02
    assert all(tensor.dtype == torch.float32 for tensor in rounded["end"]["model"].values())
    pytest.importorskip("deepspeed")
    zero = train(settings("deepspeed", 2, precision="bf16"))
    assert_same_curve(zero["curve"], rounded["curve"])


def test_one_thread_always_stays() -> None:
    engine = Engine(settings())
    engine.leave_cores(5)
    assert torch.get_num_threads() == 1


def test_bf16_weights_become_float32() -> None:
    engine = Engine(settings())
    engine.prepare(tiny_net().bfloat16(), optim(), UPDATES)
    assert engine.unwrapped[2].weight.dtype == torch.float32
    assert engine.unwrapped[0].bias.dtype == torch.bfloat16  # frozen: as it came


@pytest.mark.parametrize("zero_stage", [None, 0, 2, 3])
def test_nan_gradient_stops_and_spares_the_weights(zero_stage: int | None) -> None:
    if zero_stage is not None:
        pytest.importorskip("deepspeed")
    engine = Engine(settings() if zero_stage is None else settings("deepspeed", zero_stage))
    engine.prepare(tiny_net(), optim(), UPDATES)
    before = engine.state_dict()
    with engine.microbatch(last=True):
        engine.backward(engine.module(torch.ones(1, 8)).sum() * math.inf)
    with pytest.raises(ImageRLError, match="update 1"):
        engine.step()
    assert_same(before["model"], engine.state_dict()["model"], atol=0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_norm_is_reported_when_nothing_is_clipped(zero_stage: int) -> None:
    pytest.importorskip("deepspeed")
    torch_curve = train(settings(), max_grad_norm=0.0)["curve"]
    assert_same_curve(train(settings("deepspeed", zero_stage), max_grad_norm=0.0)["curve"], torch_curve)


def test_state_of_another_model_is_refused(one_process: dict[str, Any]) -> None:
    with pytest.raises(ImageRLError, match=r"other parameters.*0\.bias"):
        Engine(settings()).prepare(tiny_net().requires_grad_(True), optim(), 1, state=one_process["end"])
    wider = nn.Sequential(nn.Linear(8, 384), nn.GELU(), nn.Linear(384, 320), nn.GELU(), nn.Linear(320, 4))
    wider[0].bias.requires_grad_(False)
    with pytest.raises(ImageRLError, match=r"4\.weight is"):
        Engine(settings()).prepare(wider, optim(), 1, state=one_process["end"])


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ImageRLError, match="frozen"):
        Engine(settings()).prepare(nn.Linear(2, 2).requires_grad_(False), optim(), 1)


def test_adam_epsilon_reaches_the_optimizer() -> None:
    small = train(settings(), eps=1e-8)["end"]["model"]["4.bias"]
    large = train(settings(), eps=10.0)["end"]["model"]["4.bias"]
    fresh = tiny_net()[4].bias
    assert (large - fresh).abs().max() < 0.1 * (small - fresh).abs().max()


def test_schedules_match_by_hand() -> None:
    def curve(**changes: Any) -> list[float]:
        return [learning_rate(update, 8, optim(lr=1.0, **changes)) for update in range(8)]

    assert curve(schedule="constant", warmup_steps=0) == [1.0] * 8
    assert curve(schedule="constant", warmup_steps=3) == [0.25, 0.5, 0.75] + [1.0] * 5
    assert curve(schedule="linear", warmup_steps=0) == [1 - k / 8 for k in range(8)]
    late = curve(schedule="linear", warmup_steps=0, decay_share=0.5)
    assert late == [1.0] * 4 + [1.0, 0.75, 0.5, 0.25]
    half = curve(schedule="cosine", warmup_steps=4)
    assert half == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.5 - math.sqrt(0.125)]
    )
    assert learning_rate(9, 8, optim(schedule="cosine")) == 0.0
    floor = curve(schedule="cosine", warmup_steps=0, min_lr=0.2)
    assert (floor[0], floor[4]) == (1.0, pytest.approx(0.6))
    assert learning_rate(8, 8, optim(lr=1.0, schedule="linear", min_lr=0.2)) == pytest.approx(0.2)


def test_sums_and_gathers_alone() -> None:
    engine = Engine(settings())
    assert engine.sum_over_ranks({"b": torch.tensor(2), "a": 0.1}) == {"b": 2.0, "a": 0.1}
    assert engine.sum_over_ranks({}) == {}
    assert engine.gather_objects("x") == ["x"]
    with pytest.raises(RuntimeError, match="prepare"):
        _ = engine.module


def test_missing_gpu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImageRLError, match=r"engine\.device=cpu"):
        Engine(EngineConfig(device="cuda"))


def test_ranks_started_by_a_process_that_posed_stay_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed alone in a notebook, then torchrun from there: its ranks inherit the pose and must keep their own."""
    names = {*zero._ALONE, zero._POSING}
    monkeypatch.setattr(os, "environ", {n: value for n, value in os.environ.items() if n not in names})
    assert zero.pose_as_launcher()
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    zero.stop_posing()
    assert {name: os.environ.get(name) for name in launched} == launched
    for name in zero._ALONE:
        monkeypatch.delenv(name, raising=False)
    assert zero.pose_as_launcher()
    zero.stop_posing()
    assert not zero._ALONE.keys() & os.environ.keys() and zero._POSING not in os.environ
