"""Writing files so that a crash, a kill or a full disk leaves either the old content or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rl.errors import ImageRLError


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8) in one step, durably. Folders on the way are made.

    Raises:
        ImageRLError: nothing could be written (disk full, no permission); the old file is untouched.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where the folder is a file, there is nothing to remove
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Fill a hidden folder beside `path`; when the block ends well it becomes `path`, durably and at once.

    If the block raises, the hidden folder is removed and `path` is as before. With `replace` an existing
    folder is swapped out; a kill between the two renames is repaired by `clean_leftovers`.

    Raises:
        ImageRLError: `path` exists and `replace` is false, or the disk is full or not writable.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise ImageRLError(f"{path} already exists; choose another place or remove it")
    temporary = temporary_name(path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our number
        temporary.mkdir(parents=True)
        yield temporary
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        if path.exists():
            replaced = path.with_name(f".{path.name}.old-{os.getpid()}")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(path, replaced)
            try:
                os.rename(temporary, path)
            except BaseException:
                os.rename(replaced, path)
                raise
            sync(path.parent)
            shutil.rmtree(replaced)
        else:
            os.rename(temporary, path)
            sync(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder such that it is never seen under its name with some files missing."""
    condemned = temporary_name(path)
    shutil.rmtree(condemned, ignore_errors=True)
    os.rename(path, condemned)
    shutil.rmtree(condemned)


def clean_leftovers(folder: Path) -> None:
    """Remove what killed processes left of `write_atomic`, `atomic_folder` and `remove_folder` in
    `folder`, and finish swaps that they began. Work in progress of living processes is left alone."""
    for leftover in folder.glob(".*.old-*"):
        original = leftover.with_name(leftover.name[1:].rpartition(".old-")[0])
        if _abandoned(leftover) and not original.exists():
            os.rename(leftover, original)
        elif _abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(".*.tmp-*"):
        if not _abandoned(leftover):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """The hidden name, beside `path`, under which this process prepares it."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is work in progress, or what a killed process left of it."""
    return name.startswith(".") and (".tmp-" in name or ".old-" in name)


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: Exception) -> ImageRLError:
    """The one-line message for a failed write of `path`."""
    # safetensors reports a full disk in words only
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
        free = 0.0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free / 2**20
        return ImageRLError(
            f"disk full while writing {path} ({free:.0f} MiB free there), earlier files are intact; "
            "make room and run again, a training run with --resume"
        )
    reason = " ".join(str(error).split())
    return ImageRLError(f"cannot write {path}: {reason}; check the folder and its permissions")


def _abandoned(leftover: Path) -> bool:
    """Whether the process that named `leftover` is gone (or is this one, which is not writing now)."""
    number = leftover.name.rpartition("-")[2]
    if not number.isdigit() or int(number) == os.getpid():
        return number.isdigit()
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
