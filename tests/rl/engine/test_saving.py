"""Checkpoints written while training goes on, and on file systems of other hosts."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from imagerl.rl.engine import checkpoint, saving
from imagerl.rl.engine.checkpoint import list_checkpoints, load_checkpoint
from imagerl.rl.engine.saving import Saver, Snapshot
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files import writing
from imagerl.rl.files.writing import atomic_folder, clean_leftovers, remove_folder, wait_for


def snapshot(step: int) -> Snapshot:
    tensors = {"model": {"w": torch.full((8,), float(step))}, "optimizer": {"updates": torch.tensor(step)}}
    return Snapshot(step, tensors, {"budget": {"steps": float(step)}})


def test_a_save_is_not_waited_for_until_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, save = threading.Event(), checkpoint.save_checkpoint

    def slow(*given: Any) -> Path:
        assert go_on.wait(30)
        return save(*given)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    saver = Saver()
    saver.save(tmp_path, snapshot(1), keep=2)
    assert saver.has(tmp_path, 1) and not list_checkpoints(tmp_path)
    saver.check()  # nothing has failed
    threading.Timer(0.05, go_on.set).start()
    saver.save(tmp_path, snapshot(2), keep=2)
    assert load_checkpoint(tmp_path / "step_000001").step == 1  # the one before is complete by now
    saver.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001", "step_000002"]
    assert saver.has(tmp_path, 2) and not saver.has(tmp_path / "peak", 2)


def test_a_disk_that_is_full_meanwhile_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver()
    saver.save(tmp_path, snapshot(1), keep=2)
    saver.wait()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        saver.save(tmp_path, snapshot(2), keep=2)
        with pytest.raises(ImageRLError, match=r"disk full.*step_000002"):
            saver.wait()
    saver.check()
    assert not saver.has(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    saver.save(tmp_path, snapshot(2), keep=2)  # there is room again
    saver.wait()
    assert load_checkpoint(tmp_path / "step_000002").state == {"budget": {"steps": 2.0}}


def test_only_the_first_process_hashes_and_parts_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint.save_checkpoint(tmp_path, 3, snapshot(3).tensors, {})
    hashed: list[str] = []
    sha256 = checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: hashed.append(path.name) or sha256(path))
    assert load_checkpoint(folder, verify=False).tensors.keys() == {"model", "optimizer"}
    assert not hashed
    assert load_checkpoint(folder, groups=("model",)).tensors.keys() == {"model"}
    assert sorted(hashed) == ["model.safetensors", "state.json"]


# ---- network file systems ----------------------------------------------------------------------------------


def test_a_rename_whose_answer_is_lost_has_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def sent_twice(source: Path, target: Path) -> None:
        rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", sent_twice)
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "step_000001", replace=True) as folder:
            (folder / "a").write_text(content)
    assert (tmp_path / "step_000001" / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_folders_that_cannot_be_forced_to_the_disk_and_files_that_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(os, "fsync", refuse)
    writing.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="not here"):
        writing.sync(tmp_path / "file")


def test_what_cannot_be_deleted_yet_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps a file that is open somewhere under another name, and its folder with it."""
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000001" / ".nfs01").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
        remove_folder(tmp_path / "step_000001")
    assert not (tmp_path / "step_000001").exists() and list(tmp_path.iterdir())
    clean_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_another_host_wrote_is_waited_for(tmp_path: Path) -> None:
    threading.Timer(0.05, (tmp_path / "manifest.json").touch).start()
    wait_for(tmp_path / "manifest.json")
    start = time.monotonic()
    with pytest.raises(ImageRLError, match="all processes need the same files"):
        wait_for(tmp_path / "absent", seconds=0.05)
    assert time.monotonic() - start < 30


def test_closing_leaves_no_thread(tmp_path: Path) -> None:
    """Not even for the moment that a thread takes to notice that its owner is gone."""
    others, saver = set(threading.enumerate()), Saver()
    saver.save(tmp_path, snapshot(1), keep=1)
    writers = set(threading.enumerate()) - others
    saver.close()
    assert writers and not any(thread.is_alive() for thread in writers)
    assert len(list_checkpoints(tmp_path)) == 1
