"""Checkpoints survive kills, full disks and damage, and resuming repeats the run bit for bit."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from imagerl.rl.config.engine import EngineConfig
from imagerl.rl.engine import checkpoint
from imagerl.rl.engine.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_sound,
    save_checkpoint,
)
from imagerl.rl.engine.engine import Engine
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files import writing as files
from imagerl.rl.files.writing import (
    process_place,
    write_atomic,
)


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Content that tells which step wrote it."""
    return {
        "model": {"a.weight": torch.full((64, 33), float(step)), "b": torch.tensor(step)},
        "optimizer": {"exp_avg/a.weight": torch.full((64, 33), step / 3)},
    }


def save(directory: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(directory, step, tensors_of(step), {"step": step, "share": step / 3}, keep=keep)


def assert_sound(folder: Path | None) -> int:
    assert folder is not None
    loaded = load_checkpoint(folder)
    assert loaded.state == {"step": loaded.step, "share": loaded.step / 3}
    for group, named in tensors_of(loaded.step).items():
        assert loaded.tensors[group].keys() == named.keys()
        assert all(torch.equal(loaded.tensors[group][name], tensor) for name, tensor in named.items())
    return loaded.step


def hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_round_trip_and_manifest(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    assert folder == tmp_path / "step_000020"
    assert assert_sound(latest_checkpoint(tmp_path)) == 20
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert hidden(tmp_path) == []


def test_keeps_the_newest_and_leaves_an_abandoned_future(tmp_path: Path) -> None:
    for step in (5, 10, 1_000_000):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000010", "step_1000000"]
    save(tmp_path, 15)  # resumed from step 10: step 1000000 belongs to another run now
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000010", "step_000015"]
    save(tmp_path, 15, keep=0)  # saved again; the newest is never deleted
    assert assert_sound(latest_checkpoint(tmp_path)) == 15
    assert len(list_checkpoints(tmp_path)) == 1


def test_incomplete_and_foreign_folders_are_ignored(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    save(tmp_path, 3)
    (tmp_path / "step_000009").mkdir()
    (tmp_path / "step_000009" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step_last").mkdir()
    (tmp_path / f".step_000012.tmp-999999999@{process_place()}").mkdir()
    (tmp_path / f".step_000013.tmp-{os.getppid()}@{process_place()}").mkdir()
    assert assert_sound(latest_checkpoint(tmp_path)) == 3
    assert hidden(tmp_path) == [f".step_000013.tmp-{os.getppid()}@{process_place()}"]  # its writer lives


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x81  # no longer ASCII, nor what was hashed
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_damage_is_one_clear_line_and_the_one_before_is_taken(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    damage(folder / name)
    with pytest.raises(ImageRLError) as error:
        load_checkpoint(folder)
    assert name in str(error.value)
    assert "an earlier one can be used instead" in str(error.value)
    assert "\n" not in str(error.value)
    caplog.clear()
    sound = newest_sound(tmp_path)
    assert sound is not None and sound.step == 1
    (line,) = caplog.messages
    assert "step_000002" in line and line.endswith(": going on from step_000001")
    damage(tmp_path / "step_000001" / name)
    with pytest.raises(ImageRLError, match=r"step_000001.*none is left: begin again with --overwrite"):
        newest_sound(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 7}', '{"step": 2, "format": 99, "files": {}}'])
def test_damaged_manifest(content: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ImageRLError):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": {"state.json": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"../state.json": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"state.json": {"bytes": 1, "sha256": "none"}}},
        {"files": {"state.json": None}},
        {"versions": None},
        {"format": [99]},
        {"step": "2"},
    ],
)
def test_a_manifest_lists_all_that_it_verifies(change: dict[str, object], tmp_path: Path) -> None:
    """One that lists nothing would verify anything."""
    folder = save(tmp_path, 2)
    file = folder / "manifest.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | change))
    with pytest.raises(ImageRLError, match="step_000002") as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)
    del whole["files"]["optimizer.safetensors"]
    file.write_text(json.dumps(whole))
    with pytest.raises(ImageRLError, match=r"it does not list optimizer\.safetensors"):
        load_checkpoint(folder)


def test_a_state_that_no_run_wrote(tmp_path: Path) -> None:
    for number, state in enumerate(([], {"first_eval": 7}, {"watch": []}, {"budget": {"steps": "many"}}), 1):
        folder = save_checkpoint(tmp_path, number, tensors_of(number), {"state": state})
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        content = (folder / "state.json").read_bytes()
        manifest["files"]["state.json"] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ImageRLError, match=r"state\.json is damaged"):
            load_checkpoint(folder)


def test_wrong_folder_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ImageRLError, match="step_000020"):
        load_checkpoint(tmp_path)
    with pytest.raises(ImageRLError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "step_000004")


@pytest.mark.parametrize("moment", range(8))
def test_full_disk_leaves_earlier_checkpoints_intact(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    calls = 0

    def full(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("sync", "clean_leftovers"):
            patch.setattr(files, name, full(getattr(files, name)))
        patch.setattr(os, "rename", full(os.rename))
        patch.setattr(checkpoint, "_write_json", full(checkpoint._write_json))
        with pytest.raises(ImageRLError, match=r"disk full.*step_000002.*--resume"):
            save(tmp_path, 2)
    assert hidden(tmp_path) == []
    assert assert_sound(latest_checkpoint(tmp_path)) in (1, 2)  # 2: only the last fsync failed
    assert assert_sound(tmp_path / "step_000001") == 1


def test_full_disk_for_real(tmp_path: Path) -> None:
    """On a file system of 1 MiB, where safetensors itself runs into the end."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {small} 2>/dev/null") != 0:
        pytest.skip("this machine does not allow mounts")
    try:
        save(small, 1)
        large = {"model": {"w": torch.zeros(2**20)}}
        with pytest.raises(ImageRLError, match="disk full"):
            save_checkpoint(small, 2, large, {})
        assert [path.name for path in small.iterdir()] == ["step_000001"]
        assert assert_sound(latest_checkpoint(small)) == 1
        with pytest.raises(ImageRLError, match="disk full"):
            write_atomic(small / "metrics.jsonl", b"x" * 2**21)
        assert [path.name for path in small.iterdir()] == ["step_000001"]
    finally:
        os.system(f"umount {small}")


def test_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ImageRLError, match="cannot write"):
        save(tmp_path / "file", 1)


# Killed writers -------------------------------------------------------------------------------------------


def save_and_die(directory: str, die_at: int) -> None:
    """Save step 1, and step 2 twice, and die by SIGKILL before the given file operation."""
    calls = 0

    def dying(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return wrapper

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    for step in (1, 2, 2):
        save(Path(directory), step, keep=1)
        Path(directory, "done").write_text(str(step))


def save_for_ever(directory: str, first: int) -> None:
    step = first
    while True:
        step += 1
        save(Path(directory), step, keep=1)
        write_atomic(Path(directory, "done"), str(step))


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "imagerl.rl.engine.checkpoint"])
    return context


def die_everywhere(directory: str, limit: int) -> None:
    """Fork a writer for each moment of death, from a process without threads; note how each one ended."""
    for die_at in range(1, limit):
        folder = Path(directory, f"{die_at:03d}")
        folder.mkdir()
        child = os.fork()
        if child == 0:
            save_and_die(str(folder), die_at)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / "status").write_text(str(status))
        if status != -signal.SIGKILL:
            break


def test_killed_before_every_file_operation(processes: Any, tmp_path: Path) -> None:
    process = processes.Process(target=die_everywhere, args=(str(tmp_path), 200))
    process.start()
    process.join(120)
    runs = sorted(tmp_path.iterdir())
    statuses = [int((run / "status").read_text()) for run in runs]
    assert statuses == [-signal.SIGKILL] * (len(runs) - 1) + [0]
    assert len(runs) > 30
    for run in runs:
        done = int((run / "done").read_text()) if (run / "done").exists() else 0
        newest = latest_checkpoint(run)
        if done or newest:
            assert assert_sound(newest) >= done  # what was reported as saved is there, or something newer
        assert hidden(run) == []


def test_killed_at_random_moments(processes: Any, tmp_path: Path) -> None:
    done = tmp_path / "done"
    reached = 0
    moments = random.Random(0)
    for _ in range(8):
        process = processes.Process(target=save_for_ever, args=(str(tmp_path), reached))
        process.start()
        deadline = time.monotonic() + 60
        while not (done.exists() and int(done.read_text()) > reached) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.1))
        process.kill()
        process.join()
        newest = assert_sound(latest_checkpoint(tmp_path))
        assert newest >= int(done.read_text()) > reached
        assert hidden(tmp_path) == []
        reached = newest


# Resuming -------------------------------------------------------------------------------------------------


def train(
    directory: Path, first: int, last: int, deepspeed: bool
) -> tuple[list[float], dict[str, dict[str, torch.Tensor]]]:
    """A miniature of the trainer: noise from the global generator is seeded by the step alone."""
    zero = {"name": "deepspeed", "zero_stage": 2} if deepspeed else {}
    engine = Engine(EngineConfig(device="cpu", threads=1, **zero))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 2))
    state = load_checkpoint(directory / f"step_{first:06d}").tensors if first else None
    optim = SimpleNamespace(
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        schedule="cosine",
        warmup_steps=1,
        decay_share=1.0,
        min_lr=0.0,
        max_grad_norm=0.5,
        ema=None,
    )
    engine.prepare(net, optim, 6, state=state)  # type: ignore[arg-type]
    losses = []
    for step in range(first + 1, last + 1):
        torch.manual_seed(1000 + step)
        with engine.microbatch(last=True):
            loss = engine.module(torch.randn(4, 6)).square().mean()
            engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        save_checkpoint(directory, step, engine.state_dict(), {"step": step}, keep=9)
    return losses, engine.state_dict()


@pytest.mark.parametrize("deepspeed", [False, True])
def test_resumed_run_equals_one_never_stopped(deepspeed: bool, tmp_path: Path) -> None:
    if deepspeed:
        pytest.importorskip("deepspeed")
    losses, state = train(tmp_path / "whole", 0, 6, deepspeed)
    train(tmp_path / "parts", 0, 3, deepspeed)
    resumed_losses, resumed_state = train(tmp_path / "parts", 3, 6, deepspeed)
    assert resumed_losses == losses[3:]
    assert len(set(losses)) == 6
    for group, named in state.items():
        assert named.keys() == resumed_state[group].keys()
        assert all(torch.equal(tensor, resumed_state[group][name]) for name, tensor in named.items())
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = (tmp_path / run / "step_000006" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
