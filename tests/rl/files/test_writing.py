"""Files appear whole or not at all, whoever dies meanwhile; one holder a lock."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from imagerl.rl.engine.checkpoint import (
    latest_checkpoint,
)
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.writing import (
    atomic_folder,
    clean_leftovers,
    lock_file,
    process_place,
    temporary_name,
    write_atomic,
)
from tests.rl.engine.test_checkpoint import assert_sound, hidden, save


def test_write_atomic_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_atomic(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    write_atomic(path, b"new")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ImageRLError, match=r"disk full while writing .*metrics\.jsonl"):
        write_atomic(path, b"never")
    assert path.read_bytes() == b"new"
    assert hidden(tmp_path) == []


def test_the_work_of_other_hosts_is_left_alone_until_it_is_old(tmp_path: Path) -> None:
    """Process numbers of a host that shares the folder say nothing here, whether such a process runs here or not."""
    elsewhere = process_place().replace(".", "-too.", 1)
    names = [
        *(f".step_000002.tmp-999999999@{elsewhere}", f".step_000003.old-{os.getpid()}@{elsewhere}"),
        *(
            ".metrics.jsonl.tmp-999999999@far-away.f00",
            ".notes.tmp-999999999",
            ".bashrc",
        ),  # the last: nobody's
    ]
    save(tmp_path, 1)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    gone = temporary_name(tmp_path / "report.html")
    gone.touch()  # this process does not write now
    assert assert_sound(latest_checkpoint(tmp_path)) == 1
    assert sorted(hidden(tmp_path)) == sorted(names)
    week_ago = time.time() - 7 * 24 * 3600
    for name in names:
        os.utime(tmp_path / name, (week_ago, week_ago))
    clean_leftovers(tmp_path)
    assert sorted(hidden(tmp_path)) == sorted(names)  # a file in it is new
    for name in names:
        os.utime(tmp_path / name / "model.safetensors", (week_ago, week_ago))
    clean_leftovers(tmp_path)
    assert sorted(hidden(tmp_path)) == [".bashrc", ".notes.tmp-999999999"]
    assert (tmp_path / "step_000003" / "model.safetensors").exists()  # its swap is finished


def test_a_lock_has_one_holder_also_when_its_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock_file(path)
    assert first is not None and lock_file(path) is None
    path.unlink()  # before it is freed
    second = lock_file(path)
    assert second is not None
    first.close()
    assert lock_file(path) is None
    second.close()


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "export"
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as folder:  # noqa: PT012
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "1"
    with pytest.raises(ImageRLError, match="already exists"), atomic_folder(target):
        pass
    with pytest.raises(ValueError, match="mine"), atomic_folder(target, replace=True):
        raise ValueError("mine")
    assert (target / "sub" / "file").exists()
    with atomic_folder(target, replace=True) as folder:
        (folder / "other").touch()
    assert [path.name for path in target.iterdir()] == ["other"]
    assert hidden(tmp_path) == []
